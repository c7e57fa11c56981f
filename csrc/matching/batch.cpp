#include "batch.h"

#include <algorithm>
#include <memory>
#include <numeric>

#include "assignment.h"

// One binary for all x86-64 machines: the loader picks the version for the CPU it runs on.
// Not under sanitizers: the choice runs before their start-up code.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define VIRFT_MULTIVERSIONED 1
#define VIRFT_MULTIVERSION __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define VIRFT_MULTIVERSIONED 0
#define VIRFT_MULTIVERSION
#endif
#define VIRFT_INLINE inline __attribute__((always_inline))

namespace virft_fast {
namespace {

constexpr int64_t kLane = 8;  // columns are padded to a multiple of this

int64_t padded(int64_t count) { return (count + kLane - 1) / kLane * kLane; }

// Valid boxes as five arrays, one after the other: x1, y1, x2, y2, area. A degenerate box becomes
// one of area 0 that lies nowhere near any other, so that loops over columns need no branch.
struct Columns {
  double *x1, *y1, *x2, *y2, *area;

  Columns(double* memory, int64_t width)
      : x1(memory), y1(x1 + width), x2(y1 + width), y2(x2 + width), area(y2 + width) {}
};

template <typename T>
VIRFT_INLINE void load_columns(const Columns& columns, const T* boxes, int64_t count,
                               int64_t width) {
  for (int64_t c = 0; c < width; ++c) {
    Box box = {0, 0, 0, 0};
    if (c < count) box = load_box(boxes + 4 * c);
    const bool valid = is_valid(box);
    if (!valid) box = {0, 0, 0, 0};
    columns.x1[c] = box.x1;
    columns.y1[c] = box.y1;
    columns.x2[c] = box.x2;
    columns.y2[c] = box.y2;
    columns.area[c] = area(box);
  }
}

// One row of IoUs. `row` is valid; columns that are no box get 0.
template <typename T, IouKind kind, int kWidth>
VIRFT_INLINE void iou_row(const Box& row, const Columns& columns, int64_t width_given, T* out) {
  const int64_t width = kWidth ? kWidth : width_given;
  const double row_area = area(row);
#pragma omp simd
  for (int64_t c = 0; c < width; ++c) {
    const Box column = {columns.x1[c], columns.y1[c], columns.x2[c], columns.y2[c]};
    const double iou = overlap<kind, T>(row, row_area, column, columns.area[c]);
    // What is no box has no width; an area may have underflowed.
    out[c] = T(kind == IouKind::kIou || columns.x2[c] > columns.x1[c] ? iou : 0.0);
  }
}

// Memory for one problem after the other, at most kWidth columns wide: on the stack, or for
// kWidth = 0 on the heap and of the size given.
template <typename T, int kWidth>
struct Scratch {
  alignas(64) double columns[5 * kWidth];
  alignas(64) T reals[workspace_reals(kWidth, kWidth)];
  int32_t ints[workspace_ints(kWidth, kWidth)];
};

template <typename T>
struct HeapScratch {
  int64_t rows, width;
  std::unique_ptr<double[]> columns;
  std::unique_ptr<T[]> reals;
  std::unique_ptr<int32_t[]> ints;

  HeapScratch(int64_t rows, int64_t width)
      : rows(rows), width(width), columns(new double[5 * width]), reals(new T[workspace_reals(rows, width)]),
        ints(new int32_t[workspace_ints(rows, width)]) {}
};

template <typename T>
void reserve(std::unique_ptr<HeapScratch<T>>& heap, int64_t rows, int64_t width) {
  if (heap && heap->rows >= rows && heap->width >= width) return;
  heap.reset(new HeapScratch<T>(std::max(rows, heap ? heap->rows : 0),
                                std::max(width, heap ? heap->width : 0)));
}

// Positions of `count` scores, descending, equal ones in the order given, NaN as the lowest.
void sort_descending(const double* scores, int64_t count, int32_t* order) {
  const auto key = [scores](int32_t i) {
    return scores[i] == scores[i] ? scores[i] : -kInfinity<double>;
  };
  std::iota(order, order + count, 0);
  std::stable_sort(order, order + count,
                   [key](int32_t a, int32_t b) { return key(a) > key(b); });
}

template <typename T, int kWidth>
VIRFT_INLINE void match_one(const Problems<T>& p, const MatchOptions& options, int64_t n,
                            double* column_memory, T* reals, int32_t* ints, int32_t* order,
                            int64_t* matches, T* ious) {
  const int64_t num_pred = p.num_pred[n], num_gt = p.num_gt[n];
  const bool swapped = num_pred > num_gt;  // the smaller side are the rows
  const T* pred = p.pred + p.pred_at(n) * 4;
  const T* gt = p.gt + p.gt_at(n) * 4;
  const int64_t rows = swapped ? num_gt : num_pred, cols = swapped ? num_pred : num_gt;
  const int64_t width = kWidth ? kWidth : padded(cols);
  const Columns columns(column_memory, width);
  const Workspace<T> w = make_workspace(reals, ints, rows, width);
  load_columns(columns, swapped ? pred : gt, cols, width);
  const T* row_boxes = swapped ? gt : pred;
  const T threshold = T(options.min_iou);
  for (int64_t r = 0; r < rows; ++r) {
    T* worth = w.worth + r * width;
    const Box box = load_box(row_boxes + 4 * r);
    if (!is_valid(box)) {
      std::fill(worth, worth + width, T(0));
      continue;
    }
    iou_row<T, IouKind::kIou, kWidth>(box, columns, width, worth);
#pragma omp simd
    for (int64_t c = 0; c < width; ++c) worth[c] = worth[c] > threshold ? worth[c] : T(0);
  }
  if (options.greedy) {
    if (options.scores) sort_descending(options.scores + p.pred_at(n), num_pred, order);
    const int64_t stride = width;
    greedy_rows(w.worth, int(num_pred), int(num_gt), swapped ? 1 : stride, swapped ? stride : 1,
                options.scores ? order : nullptr, swapped ? w.col_of : w.row_of,
                swapped ? w.row_of : w.col_of);
  } else {
    assign_rows<T, kWidth>(w, int(rows), int(width));
  }
  const int32_t* found = swapped ? w.row_of : w.col_of;
  for (int64_t k = 0; k < num_pred; ++k) {
    const int32_t match = found[k];
    if (match < 0) continue;
    matches[k] = match;
    ious[k] = swapped ? w.worth[match * width + k] : w.worth[k * width + match];
  }
}

// One cost matrix. Returns the total cost; NaN, with no matches, if an entry can't be a cost.
template <typename T, int kWidth>
VIRFT_INLINE double assign_one(const Costs<T>& p, int64_t n, double* reals, int32_t* ints,
                               int64_t* matches) {
  const int64_t num_rows = p.num_rows[n], num_cols = p.num_cols[n];
  const bool swapped = num_rows > num_cols;  // the smaller side are the rows
  const int64_t rows = swapped ? num_cols : num_rows, cols = swapped ? num_rows : num_cols;
  const int64_t width = kWidth ? kWidth : padded(cols);
  const int64_t pitch = p.addresses ? num_cols : p.max_cols;
  const T* cost = p.addresses ? reinterpret_cast<const T*>(p.addresses[n])
                              : p.cost + n * p.max_rows * p.max_cols;
  const Workspace<double> w = make_workspace(reals, ints, rows, width);
  CostScale scale = {p.maximize ? 1.0 : -1.0};
  double least = kInfinity<double>, largest = -kInfinity<double>;
  bool forbids = false;
  for (int64_t r = 0; r < num_rows; ++r)
    for (int64_t c = 0; c < num_cols; ++c) {
      const double given = double(cost[r * pitch + c]), value = scale.sign * given;
      if (scale.is_invalid(given)) return std::numeric_limits<double>::quiet_NaN();
      if (!is_finite(value)) {
        forbids = true;
        continue;
      }
      least = value < least ? value : least;
      largest = value > largest ? value : largest;
    }
  scale.set_range(least, largest, forbids, rows);
  for (int64_t r = 0; r < rows; ++r) {
    double* worth = w.worth + r * width;
    const T* from = swapped ? cost + r : cost + r * pitch;
    const int64_t stride = swapped ? pitch : 1;
    for (int64_t c = 0; c < cols; ++c) worth[c] = scale.worth(double(from[c * stride]));
    std::fill(worth + cols, worth + width, scale.padding());
  }
  if (forbids)
    assign_rows<double, kWidth>(w, int(rows), int(width));
  else
    assign_rows<double, kWidth, true>(w, int(rows), int(width));
  const int32_t* column_of = swapped ? w.row_of : w.col_of;
  double total = 0;
  for (int64_t k = 0; k < num_rows; ++k) {
    matches[k] = column_of[k];
    if (column_of[k] >= 0) total += double(cost[k * pitch + column_of[k]]);
  }
  return total;
}

template <typename T>
VIRFT_INLINE void assign_problems(const Costs<T>& p, int64_t* matches, double* totals,
                                  int64_t begin, int64_t end) {
  std::unique_ptr<HeapScratch<double>> heap;
  Scratch<double, 128> stack;
  for (int64_t n = begin; n < end; ++n) {
    int64_t* match = matches + n * p.max_rows;
    std::fill(match, match + p.max_rows, int64_t(-1));
    const int64_t cols = std::max(p.num_rows[n], p.num_cols[n]);
    const int64_t rows = std::min(p.num_rows[n], p.num_cols[n]);
    totals[n] = 0;
    if (rows == 0) continue;
#define VIRFT_ASSIGN(kWidth) totals[n] = assign_one<T, kWidth>(p, n, stack.reals, stack.ints, match)
    if (cols <= 8) {
      VIRFT_ASSIGN(8);
    } else if (cols <= 32) {
      VIRFT_ASSIGN(32);
    } else if (cols <= 128) {
      VIRFT_ASSIGN(128);
    } else {
      reserve(heap, rows, padded(cols));
      totals[n] = assign_one<T, 0>(p, n, heap->reals.get(), heap->ints.get(), match);
    }
#undef VIRFT_ASSIGN
  }
}

template <typename T>
VIRFT_INLINE void match_problems(const Problems<T>& p, const MatchOptions& options,
                                 int64_t* matches, T* ious, int64_t begin, int64_t end) {
  const std::unique_ptr<int32_t[]> order(new int32_t[options.scores ? p.max_pred : 0]);
  std::unique_ptr<HeapScratch<T>> heap;
  Scratch<T, 128> stack;
  for (int64_t n = begin; n < end; ++n) {
    int64_t* match = matches + p.pred_at(n);
    T* iou = ious + p.pred_at(n);
    const int64_t length = p.first_pred ? p.num_pred[n] : p.max_pred;
    std::fill(match, match + length, int64_t(-1));
    std::fill(iou, iou + length, T(0));
    const int64_t cols = std::max(p.num_pred[n], p.num_gt[n]);
    if (std::min(p.num_pred[n], p.num_gt[n]) == 0) continue;
#define VIRFT_MATCH(kWidth)                                                              \
  match_one<T, kWidth>(p, options, n, stack.columns, stack.reals, stack.ints, order.get(), match, \
                       iou)
    if (cols <= 8) {
      VIRFT_MATCH(8);
    } else if (cols <= 16) {
      VIRFT_MATCH(16);
    } else if (cols <= 32) {
      VIRFT_MATCH(32);
    } else if (cols <= 64) {
      VIRFT_MATCH(64);
    } else if (cols <= 128) {
      VIRFT_MATCH(128);
    } else {
      reserve(heap, std::min(p.num_pred[n], p.num_gt[n]), padded(cols));
      match_one<T, 0>(p, options, n, heap->columns.get(), heap->reals.get(), heap->ints.get(),
                      order.get(), match, iou);
    }
#undef VIRFT_MATCH
  }
}

template <typename T, IouKind kind>
VIRFT_INLINE void iou_problems(const Problems<T>& p, T* out, int64_t begin, int64_t end) {
  const int64_t width = padded(p.max_gt);
  const std::unique_ptr<double[]> memory(new double[5 * width]);
  const std::unique_ptr<T[]> row(new T[width]);
  const Columns columns(memory.get(), width);
  for (int64_t n = begin; n < end; ++n) {
    load_columns(columns, p.gt + n * p.max_gt * 4, p.num_gt[n], width);
    for (int64_t k = 0; k < p.max_pred; ++k) {
      T* to = out + (n * p.max_pred + k) * p.max_gt;
      const Box box = load_box(p.pred + (n * p.max_pred + k) * 4);
      if (k >= p.num_pred[n] || !is_valid(box)) {
        std::fill(to, to + p.max_gt, T(0));
        continue;
      }
      iou_row<T, kind, 0>(box, columns, width, row.get());
      std::copy(row.get(), row.get() + p.max_gt, to);
    }
  }
}

}  // namespace

// target_clones wants plain functions; all they call is inlined into each of them.
VIRFT_MULTIVERSION void iou_float(const Problems<float>& p, IouKind kind, float* out, int64_t begin,
                                  int64_t end) {
  kind == IouKind::kIou ? iou_problems<float, IouKind::kIou>(p, out, begin, end)
                        : iou_problems<float, IouKind::kGiou>(p, out, begin, end);
}
VIRFT_MULTIVERSION void iou_double(const Problems<double>& p, IouKind kind, double* out,
                                   int64_t begin, int64_t end) {
  kind == IouKind::kIou ? iou_problems<double, IouKind::kIou>(p, out, begin, end)
                        : iou_problems<double, IouKind::kGiou>(p, out, begin, end);
}
VIRFT_MULTIVERSION void match_float(const Problems<float>& p, const MatchOptions& options,
                                    int64_t* matches, float* ious, int64_t begin, int64_t end) {
  match_problems<float>(p, options, matches, ious, begin, end);
}
VIRFT_MULTIVERSION void match_double(const Problems<double>& p, const MatchOptions& options,
                                     int64_t* matches, double* ious, int64_t begin, int64_t end) {
  match_problems<double>(p, options, matches, ious, begin, end);
}

VIRFT_MULTIVERSION void assign_float(const Costs<float>& p, int64_t* matches, double* totals,
                                     int64_t begin, int64_t end) {
  assign_problems<float>(p, matches, totals, begin, end);
}
VIRFT_MULTIVERSION void assign_double(const Costs<double>& p, int64_t* matches, double* totals,
                                      int64_t begin, int64_t end) {
  assign_problems<double>(p, matches, totals, begin, end);
}

template <>
void iou_batch(const Problems<float>& p, IouKind kind, float* out, int64_t begin, int64_t end) {
  iou_float(p, kind, out, begin, end);
}
template <>
void iou_batch(const Problems<double>& p, IouKind kind, double* out, int64_t begin, int64_t end) {
  iou_double(p, kind, out, begin, end);
}
template <>
void match_batch(const Problems<float>& p, const MatchOptions& options, int64_t* matches,
                 float* ious, int64_t begin, int64_t end) {
  match_float(p, options, matches, ious, begin, end);
}
template <>
void match_batch(const Problems<double>& p, const MatchOptions& options, int64_t* matches,
                 double* ious, int64_t begin, int64_t end) {
  match_double(p, options, matches, ious, begin, end);
}

template <>
void assign_batch(const Costs<float>& p, int64_t* matches, double* totals, int64_t begin,
                  int64_t end) {
  assign_float(p, matches, totals, begin, end);
}
template <>
void assign_batch(const Costs<double>& p, int64_t* matches, double* totals, int64_t begin,
                  int64_t end) {
  assign_double(p, matches, totals, begin, end);
}

const char* instructions() {
#if VIRFT_MULTIVERSIONED
  if (__builtin_cpu_supports("avx512f")) return "avx512f";
  if (__builtin_cpu_supports("avx2")) return "avx2";
#endif
  return "baseline";
}

}  // namespace virft_fast
