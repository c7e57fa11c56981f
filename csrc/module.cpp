// virft_fast._C: the matcher, and the CPU's part of speculation, on addresses. Python allocates and
// checks (virft_fast/matching/solver.py, virft_fast/kernels/speculation.py), so this file needs no
// torch and one build serves every version.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "matching/batch.h"
#ifdef VIRFT_CUDA
#include "matching/device.h"
#endif
#include "speculation/speculation.h"

namespace virft_fast {
namespace {

namespace py = pybind11;
using Address = uintptr_t;

constexpr int kInterface = 3;  // counts changes of the functions below, as native.py knows them

// Pairs of a row and a column worth a thread; starting one for fewer costs more than it saves.
constexpr int64_t kPairsPerThread = 32768;
constexpr int kPartsPerThread = 4;  // problems differ in cost

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// The threads are those of the OpenMP library that torch has loaded; none is linked here.
template <typename Work>
void for_problems(int64_t problems, int64_t pairs, int threads, const Work& work) {
  const int64_t team = std::min<int64_t>({threads, pairs / kPairsPerThread, problems});
  if (team <= 1) return work(0, problems);
  const int64_t parts = std::min<int64_t>(team * kPartsPerThread, problems);
#pragma omp parallel for num_threads(int(team)) schedule(dynamic, 1)
  for (int64_t part = 0; part < parts; ++part)
    work(problems * part / parts, problems * (part + 1) / parts);
}

int64_t count_pairs(const int64_t* rows, const int64_t* cols, int64_t problems) {
  int64_t pairs = 0;
  for (int64_t n = 0; n < problems; ++n) pairs += rows[n] * cols[n];
  return pairs;
}

// Where each problem of a packed batch begins; checks that the counts add up to `length`.
std::vector<int64_t> starts(const char* name, const int64_t* counts, int64_t problems,
                            int64_t length) {
  std::vector<int64_t> first(problems + 1, 0);
  for (int64_t n = 0; n < problems; ++n) first[n + 1] = first[n] + counts[n];
  if (first[problems] != length)
    throw py::value_error(std::string(name) + ": expected counts that add up to the " +
                          std::to_string(length) + " packed boxes, got " +
                          std::to_string(first[problems]));
  return first;
}

int64_t check_counts(const char* name, const int64_t* counts, int64_t problems, int64_t most) {
  int64_t largest = 0;
  for (int64_t n = 0; n < problems; ++n) {
    largest = std::max(largest, counts[n]);
    if (counts[n] < 0 || counts[n] > most)
      throw py::value_error(std::string(name) + ": expected counts in 0.." + std::to_string(most) +
                            ", got " + std::to_string(counts[n]) + " for problem " +
                            std::to_string(n) + "; a count cannot exceed the number of boxes");
  }
  return largest;
}

template <typename T>
void iou(Address pred, Address gt, Address num_pred, Address num_gt, int64_t count, int64_t rows,
         int64_t cols, bool giou, Address out, int threads) {
  const Problems<T> p = {at<T>(pred), at<T>(gt), at<int64_t>(num_pred), at<int64_t>(num_gt), rows,
                         cols};
  check_counts("num_pred", p.num_pred, count, rows);
  check_counts("num_gt", p.num_gt, count, cols);
  const py::gil_scoped_release released;
  for_problems(count, count * rows * cols, threads, [&](int64_t begin, int64_t end) {
    iou_batch<T>(p, giou ? IouKind::kGiou : IouKind::kIou, at<T>(out), begin, end);
  });
}

template <typename T>
void match(Address pred, Address gt, Address num_pred, Address num_gt, int64_t count, int64_t rows,
           int64_t cols, bool packed, Address scores, bool greedy, double min_iou, Address matches,
           Address ious, int threads) {
  Problems<T> p = {at<T>(pred), at<T>(gt), at<int64_t>(num_pred), at<int64_t>(num_gt), rows, cols};
  const int64_t most_pred = check_counts("num_pred", p.num_pred, count, rows);
  const int64_t most_gt = check_counts("num_gt", p.num_gt, count, cols);
  std::vector<int64_t> first_pred, first_gt;
  if (packed) {
    first_pred = starts("num_pred", p.num_pred, count, rows);
    first_gt = starts("num_gt", p.num_gt, count, cols);
    p.first_pred = first_pred.data(), p.first_gt = first_gt.data();
    p.max_pred = most_pred, p.max_gt = most_gt;
  }
  const MatchOptions options = {greedy, min_iou, at<double>(scores)};
  const py::gil_scoped_release released;
  const int64_t pairs = count_pairs(p.num_pred, p.num_gt, count);
  for_problems(count, pairs, threads, [&](int64_t begin, int64_t end) {
    match_batch<T>(p, options, at<int64_t>(matches), at<T>(ious), begin, end);
  });
}

template <typename T>
void assign(Address cost, Address num_rows, Address num_cols, int64_t count, int64_t rows,
            int64_t cols, bool maximize, bool listed, Address matches, Address totals,
            int threads) {
  Costs<T> p = {at<T>(cost), at<int64_t>(num_rows), at<int64_t>(num_cols), rows, cols, maximize};
  if (listed) p.addresses = at<int64_t>(cost);
  check_counts("num_rows", p.num_rows, count, rows);
  check_counts("num_cols", p.num_cols, count, cols);
  const py::gil_scoped_release released;
  const int64_t pairs = count_pairs(p.num_rows, p.num_cols, count);
  for_problems(count, pairs, threads, [&](int64_t begin, int64_t end) {
    assign_batch<T>(p, at<int64_t>(matches), at<double>(totals), begin, end);
  });
}

using PoolArguments = std::tuple<Address, Address, int64_t, int64_t, int64_t>;
using RowArguments = std::tuple<int64_t, Address, Address, int64_t, Address>;

Pool pool_of(const PoolArguments& given) {
  const auto [tokens, table, size, first, width] = given;
  return {at<int64_t>(tokens), at<int64_t>(table), size, first, width};
}

Rows rows_of(const RowArguments& given) {
  const auto [count, tokens, counters, stride, slots] = given;
  return {count, at<int64_t>(tokens), at<int64_t>(counters), stride, at<int64_t>(slots)};
}

void keep(const PoolArguments& pool, const RowArguments& rows, Address drawn, Address logps,
          int64_t read, Address active, Address goes_on, Address all_logps, int64_t width,
          int64_t length, Address seen, int64_t vocabulary, Address kept) {
  const Drawn own = {at<int64_t>(drawn), at<float>(logps), read};
  const Completions all = {at<int64_t>(active), at<int64_t>(goes_on), at<float>(all_logps), width,
                           length, at<bool>(seen), vocabulary};
  keep_drawn(pool_of(pool), own, rows_of(rows), all, at<int64_t>(kept));
}

void guess(const PoolArguments& pool, const RowArguments& rows) {
  look_up(pool_of(pool), rows_of(rows));
}

#ifdef VIRFT_CUDA
template <typename T>
void iou_cuda(Address pred, Address gt, Address num_pred, Address num_gt, int64_t count,
              int64_t rows, int64_t cols, bool giou, Address out, int device, Address stream) {
  const Problems<T> p = {at<T>(pred), at<T>(gt), at<int64_t>(num_pred), at<int64_t>(num_gt), rows,
                         cols};
  iou_on_device<T>(p, giou ? IouKind::kGiou : IouKind::kIou, at<T>(out), count,
                   {device, at<void>(stream)});
}

template <typename T>
void match_cuda(Address pred, Address gt, Address num_pred, Address num_gt, int64_t count,
                int64_t rows, int64_t cols, Address scores, bool greedy, double min_iou,
                Address matches, Address ious, Address scratch, int device, Address stream) {
  const Problems<T> p = {at<T>(pred), at<T>(gt), at<int64_t>(num_pred), at<int64_t>(num_gt), rows,
                         cols};
  match_on_device<T>(p, {greedy, min_iou, at<double>(scores)}, at<int64_t>(matches), at<T>(ious),
                     count, at<void>(scratch), {device, at<void>(stream)});
}

template <typename T>
void assign_cuda(Address cost, Address num_rows, Address num_cols, int64_t count, int64_t rows,
                 int64_t cols, bool maximize, Address matches, Address totals, Address scratch,
                 int device, Address stream) {
  const Costs<T> p = {at<T>(cost), at<int64_t>(num_rows), at<int64_t>(num_cols), rows, cols,
                      maximize};
  assign_on_device<T>(p, at<int64_t>(matches), at<double>(totals), count, at<void>(scratch),
                      {device, at<void>(stream)});
}
#endif

template <typename T>
void define(py::module_& m, const std::string& suffix) {
  m.def(("iou_" + suffix).c_str(), &iou<T>);
  m.def(("match_" + suffix).c_str(), &match<T>);
  m.def(("assign_" + suffix).c_str(), &assign<T>);
#ifdef VIRFT_CUDA
  m.def(("iou_cuda_" + suffix).c_str(), &iou_cuda<T>);
  m.def(("match_cuda_" + suffix).c_str(), &match_cuda<T>);
  m.def(("assign_cuda_" + suffix).c_str(), &assign_cuda<T>);
#endif
}

}  // namespace
}  // namespace virft_fast

PYBIND11_MODULE(_C, m) {
  m.doc() = "virft_fast's native matcher and guesses, on addresses";
  m.def("keep_drawn", &virft_fast::keep);
  m.def("look_up", &virft_fast::guess);
  virft_fast::define<float>(m, "float32");
  virft_fast::define<double>(m, "float64");
#ifdef VIRFT_CUDA
  m.def("scratch_bytes", &virft_fast::scratch_bytes);
#endif
  m.def("build_info", [] {
    pybind11::dict info;
    info["version"] = VIRFT_FAST_VERSION;
    info["interface"] = virft_fast::kInterface;
    info["compiler"] = __VERSION__;
#ifdef VIRFT_CUDA
    info["cuda_archs"] = VIRFT_CUDA_ARCHS;
#else
    info["cuda_archs"] = "none";
#endif
#ifdef _OPENMP
    info["threads"] = "OpenMP";
#else
    info["threads"] = "one";
#endif
    info["instructions"] = virft_fast::instructions();
    return info;
  });
}
