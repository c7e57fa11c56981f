// One-to-one assignment of rows to columns that makes the summed worth largest, for host and device.
// No torch.
//
// For boxes, worth is >= 0, and a pair worth 0 is no pair: each row may as well stay alone. That
// makes the problem sparse wherever boxes don't overlap, and lets a search end early.
//
// Shortest augmenting paths with a greedy start: Jonker and Volgenant 1987; the bookkeeping follows
// Crouse 2016, doi:10.1109/TAES.2016.140952. Dual prices u (rows) and v (columns) are >= 0 and keep
// every reduced cost u[r] + v[c] - worth[r][c] >= 0. Of equal columns the first is taken.
#pragma once

#include <cstdint>
#include <limits>

#include "box_iou.h"

namespace virft_fast {

// Scratch for one problem: `rows` <= `cols`, both padded as `width` says.
template <typename T>
struct Workspace {
  T* worth;          // (rows, width), padding 0
  T* u;              // (rows)
  T* v;              // (width)
  T* key;            // (width) distance of a column that the search has not reached, else inf
  T* price;          // (width) v, or inf for a column that the search has passed
  int32_t* from;     // (width) the row before it on the shortest path
  int32_t* row_of;   // (width) -1 where free
  int32_t* col_of;   // (rows) -1 where alone
  int32_t* passed;   // (rows) columns in the order the search passed them
  T* passed_at;      // (rows) their distances
};

// Elements of T and of int32 that a Workspace points into.
constexpr int64_t workspace_reals(int64_t rows, int64_t width) {
  return rows * width + 2 * rows + 3 * width;
}
constexpr int64_t workspace_ints(int64_t rows, int64_t width) { return 2 * width + 2 * rows; }

template <typename T>
VIRFT_HOST_DEVICE Workspace<T> make_workspace(T* reals, int32_t* ints, int64_t rows,
                                              int64_t width) {
  Workspace<T> w;
  w.worth = reals;
  w.v = w.worth + rows * width;
  w.key = w.v + width;
  w.price = w.key + width;
  w.u = w.price + width;
  w.passed_at = w.u + rows;
  w.from = ints;
  w.row_of = w.from + width;
  w.col_of = w.row_of + width;
  w.passed = w.col_of + rows;
  return w;
}

// Puts `start` into the matching along the cheapest path; a row on the path, `start` itself maybe,
// is left alone if that costs less than any free column, unless kAll.
template <typename T, int kWidth, bool kAll>
VIRFT_HOST_DEVICE void augment(const Workspace<T>& w, int start, int width_given) {
  const int width = kWidth ? kWidth : width_given;
  for (int c = 0; c < width; ++c) {
    w.key[c] = kInfinity<T>;
    w.price[c] = w.v[c];
  }
  T alone_at = kInfinity<T>;  // distance of the cheapest row to leave alone
  int alone = start, row = start, num_passed = 0, sink = -1;
  T reached = 0, lowest = 0;
  while (true) {
    const T base = reached + w.u[row];
    if (!kAll && base < alone_at) {
      alone_at = base;
      alone = row;
    }
    const T* worth = w.worth + int64_t(row) * width;
    lowest = kInfinity<T>;
#pragma omp simd reduction(min : lowest)
    for (int c = 0; c < width; ++c) {
      const T distance = base + w.price[c] - worth[c];
      const bool better = distance < w.key[c];
      const T key = better ? distance : w.key[c];
      w.key[c] = key;
      w.from[c] = better ? row : w.from[c];
      lowest = key < lowest ? key : lowest;
    }
    if (!(lowest < alone_at)) break;
    int column = 0;
    while (w.key[column] != lowest) ++column;
    if (w.row_of[column] < 0) {
      sink = column;
      break;
    }
    w.passed[num_passed] = column;
    w.passed_at[num_passed++] = lowest;
    w.key[column] = w.price[column] = kInfinity<T>;
    reached = lowest;
    row = w.row_of[column];
  }
  const T total = sink < 0 ? alone_at : lowest;
  w.u[start] -= total;
  for (int i = 0; i < num_passed; ++i) {
    const int column = w.passed[i];
    // Never below 0, not even by rounding: a price under 0 would make a pair of worth 0 attractive.
    const T gain = total > w.passed_at[i] ? total - w.passed_at[i] : T(0);
    w.v[column] += gain;
    w.u[w.row_of[column]] -= gain;
  }
  int column = sink;
  if (sink < 0) {
    column = w.col_of[alone];
    w.col_of[alone] = -1;
    if (alone == start) return;
  }
  while (true) {  // shift the pairs along the path back to its start
    const int r = w.from[column];
    const int before = w.col_of[r];
    w.col_of[r] = column;
    w.row_of[column] = r;
    if (r == start) return;
    column = before;
  }
}

// Rows still waiting bid for their best column, at a price that leaves it no better than their
// second best, and put out who had it (the augmenting row reduction of Jonker and Volgenant). Cheaper
// than a search, which then has few rows left to place.
template <typename T, int kWidth, bool kAll>
VIRFT_HOST_DEVICE void bid(const Workspace<T>& w, int rows, int width_given) {
  const int width = kWidth ? kWidth : width_given;
  constexpr T kNothing = kAll ? -kInfinity<T> : T(0);
  for (int first = 0, turns = 4 * rows; first < rows; ++first) {
    int row = first;
    while (row >= 0 && w.col_of[row] < 0 && (kAll || w.u[row] > 0) && turns-- > 0) {
      const T* worth = w.worth + int64_t(row) * width;
      T best = kNothing;
#pragma omp simd reduction(max : best)
      for (int c = 0; c < width; ++c) {
        const T gain = worth[c] - w.v[c];
        w.key[c] = gain;
        best = gain > best ? gain : best;
      }
      if (!kAll && !(best > 0)) {
        w.u[row] = 0;
        break;
      }
      int column = 0;
      while (w.key[column] != best) ++column;
      w.key[column] = kNothing;
      T second = kNothing;
#pragma omp simd reduction(max : second)
      for (int c = 0; c < width; ++c) second = w.key[c] > second ? w.key[c] : second;
      const int other = w.row_of[column];
      w.u[row] = second;
      if (other >= 0 && !(second < best)) break;  // a tie: the search decides
      w.v[column] += best - second;
      w.row_of[column] = row;
      w.col_of[row] = column;
      if (other < 0) break;
      w.col_of[other] = -1;
      row = other;
    }
  }
}

// Maximum-worth assignment; the answer is in col_of and row_of. kWidth: a compile-time width, or 0.
// kAll: places every row, whatever its worth, which may be negative; padding is -inf then.
template <typename T, int kWidth, bool kAll = false>
VIRFT_HOST_DEVICE void assign_rows(const Workspace<T>& w, int rows, int width_given) {
  const int width = kWidth ? kWidth : width_given;
  for (int c = 0; c < width; ++c) {
    w.v[c] = 0;
    w.row_of[c] = -1;
  }
  bool waiting = false;
  for (int r = 0; r < rows; ++r) {  // greedy start: each row its best column, if that is free
    const T* worth = w.worth + int64_t(r) * width;
    T best = kAll ? -kInfinity<T> : T(0);
#pragma omp simd reduction(max : best)
    for (int c = 0; c < width; ++c) best = worth[c] > best ? worth[c] : best;
    w.u[r] = best;
    w.col_of[r] = -1;
    if (!kAll && !(best > 0)) continue;
    int column = 0;
    while (column < width && (worth[column] != best || w.row_of[column] >= 0)) ++column;
    if (column < width) {
      w.row_of[column] = r;
      w.col_of[r] = column;
    } else {
      waiting = true;
    }
  }
  if (!waiting) return;
  bid<T, kWidth, kAll>(w, rows, width);
  for (int r = 0; r < rows; ++r)
    if (w.col_of[r] < 0 && (kAll || w.u[r] > 0)) augment<T, kWidth, kAll>(w, r, width);
}

// Turns costs into worth for assign_rows. Without forbidden pairs, that is the cost with its sign
// turned (or not, if maximizing), and all rows are placed, so no digit is lost. An infinite cost
// that could only be chosen last forbids its pair: then worth is shifted above 0, where one pair
// more is worth more than any saving, and a forbidden pair is worth 0.
struct CostScale {
  double sign;
  bool forbids = false;
  double least = 0, bonus = 0;

  // NaN, or an infinity that every solution would choose.
  VIRFT_HOST_DEVICE bool is_invalid(double cost) const {
    return !(sign * cost < kInfinity<double>);
  }

  // From the least and largest finite cost times `sign`.
  VIRFT_HOST_DEVICE void set_range(double smallest, double largest, bool any_forbidden,
                                   int64_t rows) {
    forbids = any_forbidden;
    if (smallest > largest) smallest = largest = 0;  // all are forbidden
    // Smaller numbers where sums of a few could overflow.
    const double most = greater(largest, -smallest) * 4 * double(rows + 2);
    if (!is_finite(most)) {
      const double smaller = 1.0 / (1024.0 * double(rows + 2));
      sign *= smaller, smallest *= smaller, largest *= smaller;
    }
    const double span = largest - smallest;
    least = smallest;
    bonus = (span > 0 ? span : 1.0) * double(rows + 1);
  }

  VIRFT_HOST_DEVICE double worth(double cost) const {
    const double value = sign * cost;
    if (!forbids) return value;
    return is_finite(value) ? (value - least) + bonus : 0.0;
  }

  // Of columns that only fill up a row.
  VIRFT_HOST_DEVICE double padding() const { return forbids ? 0.0 : -kInfinity<double>; }
};

// Rows in `order` take their best free column, the first of equals, if it is worth anything.
template <typename T>
VIRFT_HOST_DEVICE void greedy_rows(const T* worth, int rows, int cols, int64_t row_stride,
                                   int64_t col_stride, const int32_t* order, int32_t* row_of,
                                   int32_t* col_of) {
  for (int c = 0; c < cols; ++c) row_of[c] = -1;
  for (int i = 0; i < rows; ++i) {
    const int r = order ? order[i] : i;
    T best = 0;
    int column = -1;
    for (int c = 0; c < cols; ++c) {
      const T value = worth[r * row_stride + c * col_stride];
      if (row_of[c] < 0 && value > best) {
        best = value;
        column = c;
      }
    }
    col_of[r] = column;
    if (column >= 0) row_of[column] = r;
  }
}

}  // namespace virft_fast
