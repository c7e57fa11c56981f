// The CUDA backend of torch.ops.virft_fast: a warp a problem up to 32 columns, a block above.
//
// The threads of a problem are a team; each owns every team-size-th column. IoUs are computed here
// and never stored outside: up to 32 columns they lie in shared memory, above they are computed
// again whenever a row is relaxed. The search is the one of matching/assignment.h.
//
// Bindings go through torch's stable ABI, so that no c10 or ATen CUDA header is needed.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>

#include "matching/box_iou.h"

namespace virft_fast {
namespace {

using torch::stable::Tensor;

constexpr int kWarp = 32;
constexpr int kWarpsPerBlock = 4;
constexpr int kBlock = 128;  // threads of a problem with more than 32 columns
constexpr int kMaxShared = 48 * 1024;

template <typename T>
struct Problem {
  const T* pred;  // (K, 4)
  const T* gt;    // (M, 4)
  int num_pred, num_gt;
};

template <typename T>
struct Batch {
  const T* pred;
  const T* gt;
  const int64_t* num_pred;
  const int64_t* num_gt;
  const double* scores;  // (N, K) or null
  int64_t* matches;      // (N, K)
  T* ious;               // (N, K)
  char* scratch;         // state of every problem where shared memory is too small, or null
  int64_t problems, max_pred, max_gt, state_bytes;
  T min_iou;
  bool greedy;
};

// What a problem's team shares; `rows` <= `cols`.
template <typename T>
struct State {
  T *u, *v, *key, *price, *passed_at;
  int *from, *row_of, *col_of;
};

__host__ __device__ inline int64_t state_size(int64_t rows, int64_t cols, int64_t real) {
  return (rows + 4 * cols) * real + (rows + 2 * cols) * int64_t(sizeof(int));
}

template <typename T>
__device__ State<T> make_state(char* memory, int rows, int cols) {
  State<T> s;
  s.v = reinterpret_cast<T*>(memory);
  s.key = s.v + cols;
  s.price = s.key + cols;
  s.passed_at = s.price + cols;
  s.u = s.passed_at + cols;
  s.from = reinterpret_cast<int*>(s.u + rows);
  s.row_of = s.from + cols;
  s.col_of = s.row_of + cols;
  return s;
}

template <typename T>
struct Found {
  T value;
  int at;
};

template <typename T>
__device__ Found<T> lower(Found<T> a, Found<T> b) {
  return b.value < a.value || (b.value == a.value && b.at < a.at) ? b : a;
}

template <int kThreads>
struct Team {
  __device__ static int lane() { return threadIdx.x % kThreads; }

  __device__ static void sync() {
    if (kThreads == kWarp)
      __syncwarp();
    else
      __syncthreads();
  }

  // The least value and, of equals, the least index; the same on every thread.
  template <typename T>
  __device__ static Found<T> least(Found<T> mine) {
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      const Found<T> other = {__shfl_xor_sync(0xffffffffu, mine.value, offset),
                              __shfl_xor_sync(0xffffffffu, mine.at, offset)};
      mine = lower(mine, other);
    }
    if (kThreads == kWarp) return mine;
    __shared__ T values[kThreads / kWarp];
    __shared__ int places[kThreads / kWarp];
    const int warp = threadIdx.x / kWarp;
    if (threadIdx.x % kWarp == 0) {
      values[warp] = mine.value;
      places[warp] = mine.at;
    }
    __syncthreads();
    mine = {values[0], places[0]};
    for (int i = 1; i < kThreads / kWarp; ++i) mine = lower(mine, {values[i], places[i]});
    __syncthreads();
    return mine;
  }
};

// The worth of a pair: its IoU if that counts, else 0.
template <typename T>
__device__ T pair_worth(const T* row_boxes, int r, const T* col_boxes, int c, T min_iou) {
  const Box row = load_box(row_boxes + 4 * int64_t(r));
  const Box col = load_box(col_boxes + 4 * int64_t(c));
  if (!is_valid(row) || !is_valid(col)) return 0;
  const T iou = T(overlap<IouKind::kIou, T>(row, area(row), col, area(col)));
  return iou > min_iou ? iou : T(0);
}

// Rows and columns of one problem as its team sees them.
template <typename T>
struct Table {
  const T *row_boxes, *col_boxes;
  T* cached;  // (rows, kWarp + 1) in shared memory, or null
  int rows, cols;
  T min_iou;

  __device__ T worth(int r, int c) const {
    return cached ? cached[r * (kWarp + 1) + c]
                  : pair_worth(row_boxes, r, col_boxes, c, min_iou);
  }
};

template <typename T, int kThreads>
__device__ void augment(const Table<T>& table, const State<T>& s, int start) {
  using Group = Team<kThreads>;
  const int cols = table.cols;
  for (int c = Group::lane(); c < cols; c += kThreads) {
    s.key[c] = kInfinity<T>;
    s.price[c] = s.v[c];
    s.passed_at[c] = kInfinity<T>;
  }
  Group::sync();
  T alone_at = kInfinity<T>, reached = 0, total = 0;
  int alone = start, row = start, sink = -1;
  while (true) {
    const T base = reached + s.u[row];
    if (base < alone_at) {
      alone_at = base;
      alone = row;
    }
    Found<T> mine = {kInfinity<T>, cols};
    for (int c = Group::lane(); c < cols; c += kThreads) {
      const T distance = base + s.price[c] - table.worth(row, c);
      if (distance < s.key[c]) {
        s.key[c] = distance;
        s.from[c] = row;
      }
      mine = lower(mine, {s.key[c], c});
    }
    const Found<T> found = Group::least(mine);
    if (!(found.value < alone_at)) {
      total = alone_at;
      break;
    }
    reached = total = found.value;
    if (s.row_of[found.at] < 0) {
      sink = found.at;
      break;
    }
    row = s.row_of[found.at];
    if (found.at % kThreads == Group::lane()) {
      s.passed_at[found.at] = reached;
      s.key[found.at] = s.price[found.at] = kInfinity<T>;
    }
  }
  Group::sync();
  for (int c = Group::lane(); c < cols; c += kThreads) {
    if (s.passed_at[c] < kInfinity<T>) {
      const T gain = total > s.passed_at[c] ? total - s.passed_at[c] : T(0);
      s.v[c] += gain;
      s.u[s.row_of[c]] -= gain;
    }
  }
  Group::sync();
  if (Group::lane() == 0) {
    s.u[start] -= total;
    int column = sink;
    bool more = true;
    if (sink < 0) {
      column = s.col_of[alone];
      s.col_of[alone] = -1;
      more = alone != start;
    }
    while (more) {
      const int r = s.from[column];
      const int before = s.col_of[r];
      s.col_of[r] = column;
      s.row_of[column] = r;
      more = r != start;
      column = before;
    }
  }
  Group::sync();
}

template <typename T, int kThreads>
__device__ void assign(const Table<T>& table, const State<T>& s) {
  using Group = Team<kThreads>;
  for (int c = Group::lane(); c < table.cols; c += kThreads) {
    s.v[c] = 0;
    s.row_of[c] = -1;
  }
  Group::sync();
  for (int r = 0; r < table.rows; ++r) {
    Found<T> best = {0, 0}, free = {0, table.cols};
    for (int c = Group::lane(); c < table.cols; c += kThreads)
      best = lower(best, {-table.worth(r, c), c});
    best = Group::least(best);
    for (int c = Group::lane(); c < table.cols; c += kThreads)
      if (-table.worth(r, c) == best.value && s.row_of[c] < 0) free = lower(free, {T(-1), c});
    free = Group::least(free);
    if (Group::lane() == 0) {
      const bool takes = best.value < 0 && free.at < table.cols;
      s.u[r] = -best.value;
      s.col_of[r] = takes ? free.at : -1;
      if (takes) s.row_of[free.at] = r;
    }
    Group::sync();
  }
  for (int r = 0; r < table.rows; ++r)
    if (s.col_of[r] < 0 && s.u[r] > 0) augment<T, kThreads>(table, s, r);
}

// Predictions by descending score, the first of equals first, take their best free true box.
template <typename T, int kThreads>
__device__ void assign_greedily(const Table<T>& table, const State<T>& s, bool swapped,
                                const double* scores) {
  using Group = Team<kThreads>;
  const int preds = swapped ? table.cols : table.rows, gts = swapped ? table.rows : table.cols;
  int* gt_of = swapped ? s.row_of : s.col_of;
  int* pred_of = swapped ? s.col_of : s.row_of;
  constexpr int kWaiting = -2;
  for (int i = Group::lane(); i < preds; i += kThreads) gt_of[i] = kWaiting;
  for (int i = Group::lane(); i < gts; i += kThreads) pred_of[i] = -1;
  Group::sync();
  for (int turn = 0; turn < preds; ++turn) {
    int pred = turn;
    if (scores) {
      Found<double> next = {kInfinity<double>, preds};
      for (int i = Group::lane(); i < preds; i += kThreads) {
        const double score = scores[i] == scores[i] ? scores[i] : -kInfinity<double>;
        if (gt_of[i] == kWaiting) next = lower(next, {-score, i});
      }
      pred = Group::least(next).at;
    }
    Found<T> best = {0, gts};
    for (int j = Group::lane(); j < gts; j += kThreads) {
      const T worth = swapped ? table.worth(j, pred) : table.worth(pred, j);
      if (pred_of[j] < 0 && worth > 0) best = lower(best, {-worth, j});
    }
    best = Group::least(best);
    if (Group::lane() == 0) {
      gt_of[pred] = best.at < gts ? best.at : -1;
      if (best.at < gts) pred_of[best.at] = pred;
    }
    Group::sync();
  }
}

template <typename T, int kThreads>
__global__ void __launch_bounds__(kBlock, 4) match_kernel(Batch<T> batch) {
  using Group = Team<kThreads>;
  extern __shared__ __align__(8) char shared[];
  constexpr int kTeams = kBlock / kThreads;
  const int team = threadIdx.x / kThreads;
  const int64_t n = int64_t(blockIdx.x) * kTeams + team;
  if (n >= batch.problems) return;  // whole teams leave; no team waits for another
  // A direct call may bring any count; nothing outside the tensors is read for it.
  const int num_pred = int(min(max(batch.num_pred[n], int64_t(0)), batch.max_pred));
  const int num_gt = int(min(max(batch.num_gt[n], int64_t(0)), batch.max_gt));
  const bool swapped = num_pred > num_gt;
  const T* pred = batch.pred + n * batch.max_pred * 4;
  const T* gt = batch.gt + n * batch.max_gt * 4;
  Table<T> table = {swapped ? gt : pred,          swapped ? pred : gt, nullptr,
                    swapped ? num_gt : num_pred,  swapped ? num_pred : num_gt, batch.min_iou};
  char* memory = batch.scratch ? batch.scratch + n * batch.state_bytes
                               : shared + team * batch.state_bytes;
  const State<T> s = make_state<T>(memory, table.rows, table.cols);
  if (kThreads == kWarp) {
    T* cached = reinterpret_cast<T*>(shared + kTeams * batch.state_bytes) +
                team * kWarp * (kWarp + 1);
    for (int r = 0; r < table.rows; ++r)
      for (int c = Group::lane(); c < table.cols; c += kThreads)
        cached[r * (kWarp + 1) + c] =
            pair_worth(table.row_boxes, r, table.col_boxes, c, batch.min_iou);
    table.cached = cached;
    Group::sync();
  }
  if (batch.greedy)
    assign_greedily<T, kThreads>(table, s, swapped,
                                 batch.scores ? batch.scores + n * batch.max_pred : nullptr);
  else
    assign<T, kThreads>(table, s);
  const int* found = swapped ? s.row_of : s.col_of;
  for (int64_t k = Group::lane(); k < batch.max_pred; k += kThreads) {
    const int match = k < num_pred ? found[k] : -1;
    const int64_t at = n * batch.max_pred + k;
    batch.matches[at] = match;
    batch.ious[at] = match < 0 ? T(0) : swapped ? table.worth(match, int(k))
                                                : table.worth(int(k), match);
  }
}

template <typename T, IouKind kind>
__global__ void __launch_bounds__(256)
    iou_kernel(const T* pred, const T* gt, const int64_t* num_pred, const int64_t* num_gt, T* out,
               int64_t total, int64_t max_pred, int64_t max_gt) {
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < total; i += stride) {
    const int64_t c = i % max_gt, row = i / max_gt;  // row = n * max_pred + r
    const int64_t n = row / max_pred, r = row % max_pred;
    T result = 0;
    if (r < num_pred[n] && c < num_gt[n]) {
      const Box a = load_box(pred + 4 * row), b = load_box(gt + 4 * (n * max_gt + c));
      if (is_valid(a) && is_valid(b)) result = T(overlap<kind, T>(a, area(a), b, area(b)));
    }
    out[i] = result;
  }
}

void check_launch() {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "virft_fast: launch failed: ", cudaGetErrorString(error));
}

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

template <typename T>
T* pointer(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

constexpr auto kFloat = torch::headeronly::ScalarType::Float;
constexpr auto kDouble = torch::headeronly::ScalarType::Double;
constexpr auto kLong = torch::headeronly::ScalarType::Long;
constexpr auto kByte = torch::headeronly::ScalarType::Byte;

// Python has checked these and gives full messages; a direct call is kept inside its tensors.
void check(const Tensor& pred, const Tensor& gt, const Tensor& num_pred, const Tensor& num_gt) {
  for (const Tensor* t : {&pred, &gt, &num_pred, &num_gt})
    STD_TORCH_CHECK(t->is_cuda() && t->is_contiguous() &&
                        t->get_device_index() == pred.get_device_index(),
                    "expected contiguous tensors on one CUDA device");
  STD_TORCH_CHECK(pred.dim() == 3 && gt.dim() == 3 && pred.size(2) == 4 && gt.size(2) == 4 &&
                      pred.size(0) == gt.size(0) && pred.scalar_type() == gt.scalar_type() &&
                      (pred.scalar_type() == kFloat || pred.scalar_type() == kDouble),
                  "expected pred (N, K, 4) and gt (N, M, 4), both float32 or both float64");
  STD_TORCH_CHECK(num_pred.dim() == 1 && num_gt.dim() == 1 && num_pred.size(0) == pred.size(0) &&
                      num_gt.size(0) == pred.size(0) && num_pred.scalar_type() == kLong &&
                      num_gt.scalar_type() == kLong,
                  "expected counts (N,) int64");
}

template <typename T>
void launch_iou(const Tensor& pred, const Tensor& gt, const Tensor& num_pred, const Tensor& num_gt,
                bool giou, const Tensor& out) {
  const int64_t total = out.numel();
  if (total == 0) return;
  const unsigned blocks = unsigned(std::min<int64_t>((total + 255) / 256, 65535));
  const auto kernel = giou ? iou_kernel<T, IouKind::kGiou> : iou_kernel<T, IouKind::kIou>;
  kernel<<<blocks, 256, 0, current_stream(pred)>>>(
      pointer<T>(pred), pointer<T>(gt), pointer<int64_t>(num_pred), pointer<int64_t>(num_gt),
      pointer<T>(out), total, pred.size(1), gt.size(1));
  check_launch();
}

Tensor pairwise_iou_cuda(const Tensor& pred, const Tensor& gt, const Tensor& num_pred,
                         const Tensor& num_gt, bool giou) {
  check(pred, gt, num_pred, num_gt);
  const torch::stable::accelerator::DeviceGuard guard(pred.get_device_index());
  Tensor out = torch::stable::new_empty(pred, {pred.size(0), pred.size(1), gt.size(1)});
  if (pred.scalar_type() == kFloat)
    launch_iou<float>(pred, gt, num_pred, num_gt, giou, out);
  else
    launch_iou<double>(pred, gt, num_pred, num_gt, giou, out);
  return out;
}

template <typename T>
void launch_match(const Tensor& pred, const Tensor& gt, const Tensor& num_pred,
                  const Tensor& num_gt, const std::optional<Tensor>& scores, bool greedy,
                  double min_iou, const Tensor& matches, const Tensor& ious) {
  Batch<T> batch = {};
  batch.pred = pointer<T>(pred);
  batch.gt = pointer<T>(gt);
  batch.num_pred = pointer<int64_t>(num_pred);
  batch.num_gt = pointer<int64_t>(num_gt);
  batch.scores = scores ? pointer<double>(*scores) : nullptr;
  batch.matches = pointer<int64_t>(matches);
  batch.ious = pointer<T>(ious);
  batch.problems = pred.size(0);
  batch.max_pred = pred.size(1);
  batch.max_gt = gt.size(1);
  batch.min_iou = T(min_iou);
  batch.greedy = greedy;
  if (batch.problems == 0 || batch.max_pred == 0) return;
  const int64_t rows = std::min(batch.max_pred, batch.max_gt);
  const int64_t cols = std::max(batch.max_pred, batch.max_gt);
  batch.state_bytes = (state_size(rows, cols, sizeof(T)) + 7) / 8 * 8;
  const cudaStream_t stream = current_stream(pred);
  if (cols <= kWarp) {
    const int64_t shared = kWarpsPerBlock * (batch.state_bytes + kWarp * (kWarp + 1) * sizeof(T));
    const unsigned blocks = unsigned((batch.problems + kWarpsPerBlock - 1) / kWarpsPerBlock);
    match_kernel<T, kWarp><<<blocks, kBlock, size_t(shared), stream>>>(batch);
    check_launch();
    return;
  }
  std::optional<Tensor> scratch;  // stream-ordered: freed only after the kernel has used it
  int64_t shared = batch.state_bytes;
  if (shared > kMaxShared - 1024) {
    scratch = torch::stable::new_empty(pred, {batch.problems * batch.state_bytes}, kByte);
    batch.scratch = pointer<char>(*scratch);
    shared = 0;
  }
  match_kernel<T, kBlock><<<unsigned(batch.problems), kBlock, size_t(shared), stream>>>(batch);
  check_launch();
}

std::tuple<Tensor, Tensor> match_boxes_cuda(const Tensor& pred, const Tensor& gt,
                                            const Tensor& num_pred, const Tensor& num_gt,
                                            const std::optional<Tensor>& scores, bool greedy,
                                            double min_iou) {
  check(pred, gt, num_pred, num_gt);
  if (scores)
    STD_TORCH_CHECK(scores->is_cuda() && scores->is_contiguous() &&
                        scores->scalar_type() == kDouble && scores->dim() == 2 &&
                        scores->size(0) == pred.size(0) && scores->size(1) == pred.size(1),
                    "expected scores (N, K) float64, contiguous, on the device of pred");
  const torch::stable::accelerator::DeviceGuard guard(pred.get_device_index());
  Tensor matches = torch::stable::new_empty(num_pred, {pred.size(0), pred.size(1)});
  Tensor ious = torch::stable::new_empty(pred, {pred.size(0), pred.size(1)});
  if (pred.scalar_type() == kFloat)
    launch_match<float>(pred, gt, num_pred, num_gt, scores, greedy, min_iou, matches, ious);
  else
    launch_match<double>(pred, gt, num_pred, num_gt, scores, greedy, min_iou, matches, ious);
  return {matches, ious};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(virft_fast, CUDA, m) {
  m.impl("pairwise_iou", TORCH_BOX(&pairwise_iou_cuda));
  m.impl("match_boxes", TORCH_BOX(&match_boxes_cuda));
}

}  // namespace virft_fast
