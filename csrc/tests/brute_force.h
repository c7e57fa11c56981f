// What the tests compare with: the best total over every way to pair rows with columns.
#pragma once

#include <cstdint>
#include <vector>

namespace virft_fast::testing {

template <typename T>
double best_total(const std::vector<std::vector<T>>& worth, size_t row, uint64_t taken) {
  if (row == worth.size()) return 0;
  double best = best_total(worth, row + 1, taken);  // this row alone
  for (size_t c = 0; c < worth[row].size(); ++c)
    if (!(taken >> c & 1) && worth[row][c] > 0) {
      const double with = worth[row][c] + best_total(worth, row + 1, taken | uint64_t(1) << c);
      if (with > best) best = with;
    }
  return best;
}

}  // namespace virft_fast::testing
