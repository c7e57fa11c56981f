// torch.ops.virft_fast: operator schemas, the CPU backend, and the module virft_fast._C, which says
// how it was built. Shapes and dtypes are checked with full messages in virft_fast/matching; what is
// checked here keeps a direct call of the operators from reading past a tensor.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include <algorithm>
#include <string>
#include <tuple>

#include "matching/batch.h"

namespace virft_fast {
namespace {

using at::Tensor;

// Pairs of boxes that are worth another thread; below, starting one costs more than it saves.
constexpr int64_t kPairsPerThread = 32768;

void check_counts(const char* name, const Tensor& counts, int64_t problems, int64_t most) {
  TORCH_CHECK_VALUE(counts.dim() == 1 && counts.size(0) == problems && counts.is_contiguous() &&
                        counts.scalar_type() == at::kLong && counts.is_cpu(),
                    name, ": expected (", problems, ",) int64 on the CPU, got ", counts.sizes(), " ",
                    counts.scalar_type(), " on ", counts.device());
  const int64_t* values = counts.const_data_ptr<int64_t>();
  for (int64_t n = 0; n < problems; ++n)
    TORCH_CHECK_VALUE(values[n] >= 0 && values[n] <= most, name, ": expected counts in 0..", most,
                      ", got ", values[n], " for problem ", n,
                      "; a count can not exceed the padded number of boxes");
}

void check_boxes(const char* name, const Tensor& boxes, const Tensor& like) {
  TORCH_CHECK_VALUE(boxes.dim() == 3 && boxes.size(2) == 4 && boxes.is_contiguous() &&
                        boxes.is_cpu() && boxes.size(0) == like.size(0) &&
                        boxes.scalar_type() == like.scalar_type() &&
                        (boxes.scalar_type() == at::kFloat || boxes.scalar_type() == at::kDouble),
                    name, ": expected contiguous (N, boxes, 4) float32 or float64 on the CPU, the "
                    "same N and dtype for pred and gt, got ", boxes.sizes(), " ",
                    boxes.scalar_type(), " on ", boxes.device());
}

template <typename T>
Problems<T> problems_of(const Tensor& pred, const Tensor& gt, const Tensor& num_pred,
                        const Tensor& num_gt) {
  return {pred.const_data_ptr<T>(),         gt.const_data_ptr<T>(), num_pred.const_data_ptr<int64_t>(),
          num_gt.const_data_ptr<int64_t>(), pred.size(1),           gt.size(1)};
}

void check_problems(const Tensor& pred, const Tensor& gt, const Tensor& num_pred,
                    const Tensor& num_gt) {
  check_boxes("pred", pred, pred);
  check_boxes("gt", gt, pred);
  check_counts("num_pred", num_pred, pred.size(0), pred.size(1));
  check_counts("num_gt", num_gt, gt.size(0), gt.size(1));
}

template <typename Work>
void for_problems(const Tensor& pred, const Tensor& gt, const Work& work) {
  const int64_t pairs = std::max<int64_t>(pred.size(1) * gt.size(1), 1);
  const int64_t grain = std::max<int64_t>(kPairsPerThread / pairs, 1);
  at::parallel_for(0, pred.size(0), grain, work);
}

Tensor pairwise_iou_cpu(const Tensor& pred, const Tensor& gt, const Tensor& num_pred,
                        const Tensor& num_gt, bool giou) {
  check_problems(pred, gt, num_pred, num_gt);
  Tensor out = at::empty({pred.size(0), pred.size(1), gt.size(1)}, pred.options());
  const IouKind kind = giou ? IouKind::kGiou : IouKind::kIou;
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const Problems<T> problems = problems_of<T>(pred, gt, num_pred, num_gt);
    T* to = out.mutable_data_ptr<T>();
    for_problems(pred, gt, [&](int64_t begin, int64_t end) {
      iou_batch<T>(problems, kind, to, begin, end);
    });
  };
  pred.scalar_type() == at::kFloat ? run(float(0)) : run(double(0));
  return out;
}

std::tuple<Tensor, Tensor> match_boxes_cpu(const Tensor& pred, const Tensor& gt,
                                           const Tensor& num_pred, const Tensor& num_gt,
                                           const std::optional<Tensor>& scores, bool greedy,
                                           double min_iou) {
  check_problems(pred, gt, num_pred, num_gt);
  MatchOptions options = {greedy, min_iou, nullptr};
  if (scores) {
    TORCH_CHECK_VALUE(scores->sizes() == pred.sizes().slice(0, 2) && scores->is_contiguous() &&
                          scores->scalar_type() == at::kDouble && scores->is_cpu(),
                      "scores: expected contiguous ", pred.sizes().slice(0, 2),
                      " float64 on the CPU, got ", scores->sizes(), " ", scores->scalar_type(),
                      " on ", scores->device());
    options.scores = scores->const_data_ptr<double>();
  }
  Tensor matches = at::empty({pred.size(0), pred.size(1)}, num_pred.options());
  Tensor ious = at::empty({pred.size(0), pred.size(1)}, pred.options());
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const Problems<T> problems = problems_of<T>(pred, gt, num_pred, num_gt);
    int64_t* to = matches.mutable_data_ptr<int64_t>();
    T* iou_to = ious.mutable_data_ptr<T>();
    for_problems(pred, gt, [&](int64_t begin, int64_t end) {
      match_batch<T>(problems, options, to, iou_to, begin, end);
    });
  };
  pred.scalar_type() == at::kFloat ? run(float(0)) : run(double(0));
  return {matches, ious};
}

}  // namespace

TORCH_LIBRARY(virft_fast, m) {
  m.def(
      "pairwise_iou(Tensor pred, Tensor gt, Tensor num_pred, Tensor num_gt, bool giou) -> Tensor");
  m.def(
      "match_boxes(Tensor pred, Tensor gt, Tensor num_pred, Tensor num_gt, Tensor? scores, "
      "bool greedy, float min_iou) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(virft_fast, CPU, m) {
  m.impl("pairwise_iou", &pairwise_iou_cpu);
  m.impl("match_boxes", &match_boxes_cpu);
}

}  // namespace virft_fast

#define VIRFT_STRING_OF(x) #x
#define VIRFT_STRING(x) VIRFT_STRING_OF(x)

PYBIND11_MODULE(_C, m) {
  m.doc() = "virft_fast's native matcher; importing it registers torch.ops.virft_fast";
  m.def("build_info", [] {
    pybind11::dict info;
    info["version"] = VIRFT_STRING(VIRFT_FAST_VERSION);
    info["torch"] = VIRFT_STRING(VIRFT_TORCH_VERSION);
    info["compiler"] = __VERSION__;
    info["cuda_archs"] = VIRFT_STRING(VIRFT_CUDA_ARCHS);
    info["threads"] = at::get_num_threads();
    info["instructions"] = virft_fast::instructions();
    return info;
  }, "How this module was built, and the instructions that it uses on this machine.");
}
