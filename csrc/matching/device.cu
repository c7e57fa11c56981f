// The matcher on CUDA: a warp a problem up to 32 columns, a block above.
//
// The threads of a problem are a team; each owns every team-size-th column. Worth is computed here
// and never stored outside: up to 32 columns it lies in shared memory, above it is computed again
// whenever a row is relaxed. The search is the one of assignment.h.
#include "device.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "assignment.h"

namespace virft_fast {
namespace {

constexpr int kWarp = 32;
constexpr int kWarpsPerBlock = 4;
constexpr int kBlock = 128;  // threads of a problem with more than 32 columns
constexpr int kMaxShared = 48 * 1024;

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

// Where a team's worth comes from: rows are the smaller side.
template <typename T>
struct Boxes {
  using Worth = T;
  const T *row_boxes, *col_boxes;
  T min_iou;

  __device__ T worth(int r, int c) const {
    return pair_worth(row_boxes, r, col_boxes, c, min_iou);
  }
};

template <typename T>
struct Matrix {
  using Worth = double;
  const T* cost;
  int64_t row_stride, col_stride;
  CostScale scale;

  __device__ double worth(int r, int c) const {
    return scale.worth(double(cost[r * row_stride + c * col_stride]));
  }
};

// One problem as its team sees it.
template <typename Source>
struct Table {
  using Worth = typename Source::Worth;
  Source source;
  int rows, cols;
  Worth* cached;  // (rows, kWarp + 1) in shared memory, or null

  __device__ Worth worth(int r, int c) const {
    return cached ? cached[r * (kWarp + 1) + c] : source.worth(r, c);
  }
};

template <int kThreads, typename Source, typename T = typename Source::Worth>
__device__ void augment(const Table<Source>& table, const State<T>& s, int start, bool all) {
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
    if (!all && base < alone_at) {
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

// `all`: places every row, whatever its worth, as kAll of assign_rows.
template <int kThreads, typename Source, typename T = typename Source::Worth>
__device__ void assign(const Table<Source>& table, const State<T>& s, bool all) {
  using Group = Team<kThreads>;
  for (int c = Group::lane(); c < table.cols; c += kThreads) {
    s.v[c] = 0;
    s.row_of[c] = -1;
  }
  Group::sync();
  for (int r = 0; r < table.rows; ++r) {
    Found<T> best = {all ? kInfinity<T> : T(0), 0}, free = {0, table.cols};
    for (int c = Group::lane(); c < table.cols; c += kThreads)
      best = lower(best, {-table.worth(r, c), c});
    best = Group::least(best);
    for (int c = Group::lane(); c < table.cols; c += kThreads)
      if (-table.worth(r, c) == best.value && s.row_of[c] < 0) free = lower(free, {T(-1), c});
    free = Group::least(free);
    if (Group::lane() == 0) {
      const bool takes = (all || best.value < 0) && free.at < table.cols;
      s.u[r] = -best.value;
      s.col_of[r] = takes ? free.at : -1;
      if (takes) s.row_of[free.at] = r;
    }
    Group::sync();
  }
  for (int r = 0; r < table.rows; ++r)
    if (s.col_of[r] < 0 && (all || s.u[r] > 0)) augment<kThreads>(table, s, r, all);
}

// Predictions by descending score, the first of equals first, take their best free true box.
template <int kThreads, typename Source, typename T = typename Source::Worth>
__device__ void assign_greedily(const Table<Source>& table, const State<T>& s, bool swapped,
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

// A team's memory: its state, and the cache of its worth if it is a warp.
template <int kThreads, typename Source>
__device__ State<typename Source::Worth> set_up(Table<Source>& table, char* scratch,
                                                int64_t problem, int64_t state_bytes) {
  using Group = Team<kThreads>;
  using T = typename Source::Worth;
  extern __shared__ __align__(8) char shared[];
  constexpr int kTeams = kBlock / kThreads;
  const int team = threadIdx.x / kThreads;
  char* memory = scratch ? scratch + problem * state_bytes : shared + team * state_bytes;
  const State<T> s = make_state<T>(memory, table.rows, table.cols);
  if (kThreads == kWarp) {
    T* cached = reinterpret_cast<T*>(shared + kTeams * state_bytes) + team * kWarp * (kWarp + 1);
    for (int r = 0; r < table.rows; ++r)
      for (int c = Group::lane(); c < table.cols; c += kThreads)
        cached[r * (kWarp + 1) + c] = table.source.worth(r, c);
    table.cached = cached;
    Group::sync();
  }
  return s;
}

// A direct call may bring any count; nothing outside the tensors is read for it.
__device__ int bounded(int64_t count, int64_t limit) {
  return int(min(max(count, int64_t(0)), limit));
}

template <typename T, int kThreads>
__global__ void __launch_bounds__(kBlock, 4)
    match_kernel(Problems<T> p, MatchOptions options, int64_t* matches, T* ious, int64_t count,
                 char* scratch, int64_t state_bytes) {
  using Group = Team<kThreads>;
  const int64_t n = int64_t(blockIdx.x) * (kBlock / kThreads) + threadIdx.x / kThreads;
  if (n >= count) return;  // whole teams leave; no team waits for another
  const int num_pred = bounded(p.num_pred[n], p.max_pred);
  const int num_gt = bounded(p.num_gt[n], p.max_gt);
  const bool swapped = num_pred > num_gt;
  const T *pred = p.pred + n * p.max_pred * 4, *gt = p.gt + n * p.max_gt * 4;
  Table<Boxes<T>> table = {{swapped ? gt : pred, swapped ? pred : gt, T(options.min_iou)},
                           swapped ? num_gt : num_pred,
                           swapped ? num_pred : num_gt,
                           nullptr};
  const State<T> s = set_up<kThreads>(table, scratch, n, state_bytes);
  if (options.greedy)
    assign_greedily<kThreads>(table, s, swapped,
                              options.scores ? options.scores + n * p.max_pred : nullptr);
  else
    assign<kThreads>(table, s, false);
  const int* found = swapped ? s.row_of : s.col_of;
  for (int64_t k = Group::lane(); k < p.max_pred; k += kThreads) {
    const int match = k < num_pred ? found[k] : -1;
    const int64_t at = n * p.max_pred + k;
    matches[at] = match;
    ious[at] = match < 0 ? T(0) : swapped ? table.worth(match, int(k)) : table.worth(int(k), match);
  }
}

template <typename T, int kThreads>
__global__ void __launch_bounds__(kBlock, 4)
    assign_kernel(Costs<T> p, int64_t* matches, double* totals, int64_t count, char* scratch,
                  int64_t state_bytes) {
  using Group = Team<kThreads>;
  const int64_t n = int64_t(blockIdx.x) * (kBlock / kThreads) + threadIdx.x / kThreads;
  if (n >= count) return;
  const int num_rows = bounded(p.num_rows[n], p.max_rows);
  const int num_cols = bounded(p.num_cols[n], p.max_cols);
  const bool swapped = num_rows > num_cols;
  const T* cost = p.cost + n * p.max_rows * p.max_cols;
  CostScale scale = {p.maximize ? 1.0 : -1.0};
  Table<Matrix<T>> table = {{cost, swapped ? 1 : p.max_cols, swapped ? p.max_cols : 1, scale},
                            swapped ? num_cols : num_rows,
                            swapped ? num_rows : num_cols,
                            nullptr};
  Found<double> least = {kInfinity<double>, 0}, largest = least, strange = {0, 0};
  for (int r = 0; r < num_rows; ++r)
    for (int c = Group::lane(); c < num_cols; c += kThreads) {
      const double given = double(cost[r * p.max_cols + c]), value = scale.sign * given;
      if (is_finite(value)) {
        least = lower(least, {value, 0});
        largest = lower(largest, {-value, 0});
      } else {
        strange = lower(strange, {scale.is_invalid(given) ? -2.0 : -1.0, 0});
      }
    }
  least = Group::least(least);
  largest = Group::least(largest);
  strange = Group::least(strange);
  if (strange.value == -2) {  // the same on every thread
    for (int64_t k = Group::lane(); k < p.max_rows; k += kThreads) matches[n * p.max_rows + k] = -1;
    if (Group::lane() == 0) totals[n] = nan("");
    return;
  }
  scale.set_range(least.value, -largest.value, strange.value < 0, table.rows);
  table.source.scale = scale;
  const State<double> s = set_up<kThreads>(table, scratch, n, state_bytes);
  assign<kThreads>(table, s, !scale.forbids);
  const int* found = swapped ? s.row_of : s.col_of;
  for (int64_t k = Group::lane(); k < p.max_rows; k += kThreads)
    matches[n * p.max_rows + k] = k < num_rows ? found[k] : -1;
  if (Group::lane() == 0) {  // in the rows' order, as on the CPU
    double total = 0;
    for (int k = 0; k < num_rows; ++k)
      if (found[k] >= 0) total += double(cost[k * p.max_cols + found[k]]);
    totals[n] = total;
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

void check(cudaError_t error) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("virft_fast: CUDA: ") + cudaGetErrorString(error));
}

// Makes a device the current one while it lives.
class Guard {
 public:
  explicit Guard(int index) {
    check(cudaGetDevice(&before_));
    check(cudaSetDevice(index));
  }
  ~Guard() { cudaSetDevice(before_); }

 private:
  int before_ = 0;
};

int64_t state_bytes(int64_t max_rows, int64_t max_cols, int64_t real) {
  const int64_t rows = std::min(max_rows, max_cols), cols = std::max(max_rows, max_cols);
  return (state_size(rows, cols, real) + 7) / 8 * 8;
}

// Launches one of a kernel's two versions: run(kernel's kThreads, blocks, shared bytes, scratch).
template <typename Warp, typename Block>
void launch(int64_t count, int64_t max_rows, int64_t max_cols, int64_t real, void* scratch,
            Device device, const Warp& warp, const Block& block) {
  if (count == 0 || max_rows == 0) return;
  const Guard guard(device.index);
  const int64_t bytes = state_bytes(max_rows, max_cols, real);
  if (std::max(max_rows, max_cols) <= kWarp) {
    const int64_t shared = kWarpsPerBlock * (bytes + kWarp * (kWarp + 1) * real);
    warp(unsigned((count + kWarpsPerBlock - 1) / kWarpsPerBlock), size_t(shared), nullptr, bytes);
  } else if (scratch_bytes(count, max_rows, max_cols, real) > 0) {
    block(unsigned(count), 0, static_cast<char*>(scratch), bytes);
  } else {
    block(unsigned(count), size_t(bytes), nullptr, bytes);
  }
  check(cudaGetLastError());
}

}  // namespace

int64_t scratch_bytes(int64_t count, int64_t max_rows, int64_t max_cols, int64_t real) {
  const int64_t bytes = state_bytes(max_rows, max_cols, real);
  return std::max(max_rows, max_cols) > kWarp && bytes > kMaxShared - 1024 ? count * bytes : 0;
}

template <typename T>
void iou_on_device(const Problems<T>& p, IouKind kind, T* out, int64_t count, Device device) {
  const int64_t total = count * p.max_pred * p.max_gt;
  if (total == 0) return;
  const Guard guard(device.index);
  const unsigned blocks = unsigned(std::min<int64_t>((total + 255) / 256, 65535));
  const auto kernel =
      kind == IouKind::kGiou ? iou_kernel<T, IouKind::kGiou> : iou_kernel<T, IouKind::kIou>;
  kernel<<<blocks, 256, 0, static_cast<cudaStream_t>(device.stream)>>>(
      p.pred, p.gt, p.num_pred, p.num_gt, out, total, p.max_pred, p.max_gt);
  check(cudaGetLastError());
}

template <typename T>
void match_on_device(const Problems<T>& p, const MatchOptions& options, int64_t* matches, T* ious,
                     int64_t count, void* scratch, Device device) {
  const auto stream = static_cast<cudaStream_t>(device.stream);
  launch(
      count, p.max_pred, p.max_gt, sizeof(T), scratch, device,
      [&](unsigned blocks, size_t shared, char* memory, int64_t bytes) {
        match_kernel<T, kWarp><<<blocks, kBlock, shared, stream>>>(p, options, matches, ious,
                                                                    count, memory, bytes);
      },
      [&](unsigned blocks, size_t shared, char* memory, int64_t bytes) {
        match_kernel<T, kBlock><<<blocks, kBlock, shared, stream>>>(p, options, matches, ious,
                                                                     count, memory, bytes);
      });
}

template <typename T>
void assign_on_device(const Costs<T>& p, int64_t* matches, double* totals, int64_t count,
                      void* scratch, Device device) {
  const auto stream = static_cast<cudaStream_t>(device.stream);
  launch(
      count, p.max_rows, p.max_cols, sizeof(double), scratch, device,
      [&](unsigned blocks, size_t shared, char* memory, int64_t bytes) {
        assign_kernel<T, kWarp><<<blocks, kBlock, shared, stream>>>(p, matches, totals, count,
                                                                     memory, bytes);
      },
      [&](unsigned blocks, size_t shared, char* memory, int64_t bytes) {
        assign_kernel<T, kBlock><<<blocks, kBlock, shared, stream>>>(p, matches, totals, count,
                                                                      memory, bytes);
      });
}

#define VIRFT_INSTANTIATE(T)                                                                    \
  template void iou_on_device(const Problems<T>&, IouKind, T*, int64_t, Device);                \
  template void match_on_device(const Problems<T>&, const MatchOptions&, int64_t*, T*, int64_t, \
                                void*, Device);                                                 \
  template void assign_on_device(const Costs<T>&, int64_t*, double*, int64_t, void*, Device);
VIRFT_INSTANTIATE(float)
VIRFT_INSTANTIATE(double)

}  // namespace virft_fast
