// Many small matching problems at once on the CPU: IoU, assignment, answers. No threads:
// a caller divides the problems among its threads as it likes.
#pragma once

#include <cstdint>

#include "box_iou.h"

namespace virft_fast {

// N problems. Boxes are rows of 4 contiguous numbers, padded or packed.
template <typename T>
struct Problems {
  const T* pred;                       // (N, K, 4), or packed (sum of num_pred, 4)
  const T* gt;                         // (N, M, 4), or packed (sum of num_gt, 4)
  const int64_t* num_pred;             // (N,) in 0..K
  const int64_t* num_gt;               // (N,) in 0..M
  int64_t max_pred;                    // K
  int64_t max_gt;                      // M
  const int64_t* first_pred = nullptr; // (N,) where each problem's boxes begin; null if padded
  const int64_t* first_gt = nullptr;

  int64_t pred_at(int64_t n) const { return first_pred ? first_pred[n] : n * max_pred; }
  int64_t gt_at(int64_t n) const { return first_gt ? first_gt[n] : n * max_gt; }
};

// N cost matrices, padded.
template <typename T>
struct Costs {
  const T* cost;            // (N, K, M)
  const int64_t* num_rows;  // (N,) in 0..K
  const int64_t* num_cols;  // (N,) in 0..M
  int64_t max_rows;         // K
  int64_t max_cols;         // M
  bool maximize;
  const int64_t* addresses = nullptr;  // (N,) of matrices without padding, instead of `cost`; CPU
};

struct MatchOptions {
  bool greedy;
  double min_iou;
  const double* scores;  // (N, K), or packed, for greedy, NaN last; null keeps the order given
};

// Problems begin..end-1. `out` (N, K, M), 0 past the counts.
template <typename T>
void iou_batch(const Problems<T>& problems, IouKind kind, T* out, int64_t begin, int64_t end);

// Problems begin..end-1. `matches` (N, K), -1 where none; `ious` (N, K), 0 where none; both as
// packed as the predictions are.
template <typename T>
void match_batch(const Problems<T>& problems, const MatchOptions& options, int64_t* matches,
                 T* ious, int64_t begin, int64_t end);

// Problems begin..end-1: min(rows, columns) pairs of the least total cost, or the largest.
// `matches` (N, K), -1 where none; `totals` (N,), NaN where an entry can't be a cost.
template <typename T>
void assign_batch(const Costs<T>& costs, int64_t* matches, double* totals, int64_t begin,
                  int64_t end);

// Which version of the code this machine runs: "avx512f", "avx2" or "baseline".
const char* instructions();

}  // namespace virft_fast
