// libFuzzer target: any bytes as boxes, scores and options.
#include <cstring>

#include "check_answer.h"

namespace {

template <typename T>
void run(const uint8_t* data, size_t size, uint8_t flags, size_t share) {
  std::vector<T> numbers(size / sizeof(T));
  if (!numbers.empty()) std::memcpy(numbers.data(), data, numbers.size() * sizeof(T));
  const size_t boxes = std::min<size_t>(numbers.size() / 4, 300);
  const size_t num_pred = boxes * share / 255;
  const std::vector<T> pred(numbers.begin(), numbers.begin() + 4 * num_pred);
  const std::vector<T> gt(numbers.begin() + 4 * num_pred, numbers.begin() + 4 * boxes);
  const std::vector<double> scores(pred.begin(), pred.begin() + num_pred);
  virft_fast::testing::check_answer<T>(pred, gt, flags & 1, (flags >> 4) / 15.0,
                                       flags & 2 ? &scores : nullptr);
  // The same numbers as costs.
  const int64_t rows = int64_t(share % 40), cols = rows ? int64_t(numbers.size()) / rows % 150 : 0;
  const std::vector<T> cost(numbers.begin(), numbers.begin() + rows * cols);
  std::vector<int64_t> matches(rows);
  double total = 0;
  virft_fast::assign_batch<T>({cost.data(), &rows, &cols, rows, cols, bool(flags & 1)},
                              matches.data(), &total, 0, 1);
  for (const int64_t match : matches) REQUIRE(match >= -1 && match < cols);
}

// Small whole coordinates: boxes that overlap, touch and repeat.
template <typename T>
void run_bytes(const uint8_t* data, size_t size, uint8_t flags, size_t share) {
  const std::vector<T> numbers(data, data + std::min<size_t>(size, 1200));
  run<T>(reinterpret_cast<const uint8_t*>(numbers.data()), numbers.size() * sizeof(T), flags,
         share);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < 2) return 0;
  const uint8_t flags = data[0];
  const size_t share = data[1];
  data += 2, size -= 2;
  if (flags & 4)
    flags & 8 ? run<double>(data, size, flags, share) : run<float>(data, size, flags, share);
  else
    flags & 8 ? run_bytes<double>(data, size, flags, share)
              : run_bytes<float>(data, size, flags, share);
  return 0;
}
