// Properties that every answer of match_batch must have; std::abort says which one failed.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "brute_force.h"
#include "matching/batch.h"

#define REQUIRE(condition)                                                       \
  do {                                                                           \
    if (!(condition)) {                                                          \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);       \
      std::abort();                                                              \
    }                                                                            \
  } while (0)

namespace virft_fast::testing {

// Matches one problem of exactly-sized buffers, so that a sanitizer sees any step outside.
template <typename T>
double check_answer(const std::vector<T>& pred, const std::vector<T>& gt, bool greedy,
                    double min_iou, const std::vector<double>* scores) {
  const int64_t num_pred = int64_t(pred.size() / 4), num_gt = int64_t(gt.size() / 4);
  const Problems<T> problems = {pred.data(), gt.data(), &num_pred, &num_gt, num_pred, num_gt};
  std::vector<T> table(num_pred * num_gt), ious(num_pred);
  std::vector<int64_t> matches(num_pred);
  iou_batch<T>(problems, IouKind::kGiou, table.data(), 0, 1);
  for (const T giou : table) REQUIRE(giou >= -1 && giou <= 1);
  iou_batch<T>(problems, IouKind::kIou, table.data(), 0, 1);
  std::vector<std::vector<T>> worth(num_pred, std::vector<T>(num_gt));
  for (int64_t k = 0; k < num_pred; ++k)
    for (int64_t m = 0; m < num_gt; ++m) {
      const T iou = table[k * num_gt + m];
      REQUIRE(iou >= 0 && iou <= 1);
      worth[k][m] = iou > T(min_iou) ? iou : T(0);
    }
  const MatchOptions options = {greedy, min_iou, scores ? scores->data() : nullptr};
  match_batch<T>(problems, options, matches.data(), ious.data(), 0, 1);
  std::vector<bool> taken(num_gt);
  double total = 0;
  for (int64_t k = 0; k < num_pred; ++k) {
    if (matches[k] < 0) {
      REQUIRE(matches[k] == -1 && ious[k] == 0);
      continue;
    }
    REQUIRE(matches[k] < num_gt && !taken[matches[k]]);
    taken[matches[k]] = true;
    REQUIRE(ious[k] == worth[k][matches[k]] && ious[k] > 0);
    total += double(ious[k]);
  }
  if (!greedy && std::min(num_pred, num_gt) <= 6 && std::max(num_pred, num_gt) <= 8) {
    const double best = best_total(worth, 0, 0);
    REQUIRE(std::abs(total - best) <= 1e-5);
  }
  if (greedy)  // maximal: nobody who is alone could still have had somebody who is alone
    for (int64_t k = 0; k < num_pred; ++k)
      for (int64_t m = 0; m < num_gt; ++m)
        REQUIRE(matches[k] >= 0 || taken[m] || worth[k][m] == 0);
  return total;
}

}  // namespace virft_fast::testing
