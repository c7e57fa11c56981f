// Many small matching problems at once on the CPU: IoU, assignment, answers. No torch, no threads:
// a caller divides the problems among its threads as it likes.
#pragma once

#include <cstdint>

#include "box_iou.h"

namespace virft_fast {

// N problems in the padded layout. Boxes are rows of 4 contiguous numbers.
template <typename T>
struct Problems {
  const T* pred;            // (N, K, 4)
  const T* gt;              // (N, M, 4)
  const int64_t* num_pred;  // (N,) in 0..K
  const int64_t* num_gt;    // (N,) in 0..M
  int64_t max_pred;         // K
  int64_t max_gt;           // M
};

struct MatchOptions {
  bool greedy;
  double min_iou;
  const double* scores;  // (N, K) for greedy, NaN last; null keeps the order given
};

// Problems begin..end-1. `out` (N, K, M), 0 past the counts.
template <typename T>
void iou_batch(const Problems<T>& problems, IouKind kind, T* out, int64_t begin, int64_t end);

// Problems begin..end-1. `matches` (N, K), -1 where none; `ious` (N, K), 0 where none.
template <typename T>
void match_batch(const Problems<T>& problems, const MatchOptions& options, int64_t* matches,
                 T* ious, int64_t begin, int64_t end);

// Which version of the code this machine runs: "avx512f", "avx2" or "baseline".
const char* instructions();

}  // namespace virft_fast
