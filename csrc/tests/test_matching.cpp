// Tests of the torch-free core, without Python; built by CMakeLists.txt, run by ctest.
#include <cstring>
#include <limits>
#include <random>
#include <utility>

#include "check_answer.h"

namespace virft_fast::testing {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();

template <typename T>
std::vector<T> random_boxes(std::mt19937& random, int64_t count, bool whole) {
  std::uniform_real_distribution<double> unit(0, 1);
  std::vector<T> boxes;
  for (int64_t i = 0; i < count; ++i) {
    double x = unit(random) * 10, y = unit(random) * 10;
    double w = unit(random) * 9 + 1, h = unit(random) * 9 + 1;
    if (whole) x = std::floor(x), y = std::floor(y), w = std::floor(w), h = std::floor(h);
    boxes.insert(boxes.end(), {T(x), T(y), T(x + w), T(y + h)});
  }
  for (T& value : boxes)  // what models write
    if (random() % 60 == 0) value = T(std::vector<double>{kNan, kInf, -kInf, -1, 0}[random() % 5]);
  return boxes;
}

template <typename T>
void small_problems_reach_the_brute_force_optimum() {
  std::mt19937 random(1);
  for (int i = 0; i < 4000; ++i) {
    const auto pred = random_boxes<T>(random, random() % 7, i % 2);
    const auto gt = random_boxes<T>(random, random() % 7, i % 2);
    std::vector<double> scores(pred.size() / 4);
    for (double& score : scores) score = random() % 5 ? double(random() % 4) : kNan;
    for (const double min_iou : {0.0, 0.3}) {
      const double best = check_answer<T>(pred, gt, false, min_iou, nullptr);
      const double greedy = check_answer<T>(pred, gt, true, min_iou, &scores);
      REQUIRE(greedy <= best + 1e-5);
    }
  }
}

template <typename T>
void sides_can_be_exchanged_at_every_width() {
  std::mt19937 random(2);
  for (const int64_t count : {1, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 200}) {
    const auto pred = random_boxes<T>(random, count, false);
    const auto gt = random_boxes<T>(random, 1 + int64_t(random() % count), false);
    const double total = check_answer<T>(pred, gt, false, 0.1, nullptr);
    const double exchanged = check_answer<T>(gt, pred, false, 0.1, nullptr);
    REQUIRE(std::abs(total - exchanged) <= 1e-4);
    REQUIRE(check_answer<T>(pred, gt, true, 0.1, nullptr) <= total + 1e-4);
  }
}

void ties_go_to_the_first() {
  const std::vector<float> twice = {0, 0, 1, 1, 0, 0, 1, 1};
  const int64_t two = 2;
  const Problems<float> problems = {twice.data(), twice.data(), &two, &two, 2, 2};
  for (const bool greedy : {false, true}) {
    int64_t matches[2];
    float ious[2];
    match_batch<float>(problems, {greedy, 0.5, nullptr}, matches, ious, 0, 1);
    REQUIRE(matches[0] == 0 && matches[1] == 1 && ious[0] == 1 && ious[1] == 1);
  }
}

// The largest number of allowed pairs of rows from `row` on, then their least total.
std::pair<int, double> best_pairs(const std::vector<double>& cost, int rows, int cols, int row,
                                  unsigned taken) {
  if (row == rows) return {0, 0.0};
  std::pair<int, double> best = best_pairs(cost, rows, cols, row + 1, taken);
  for (int c = 0; c < cols; ++c) {
    if (taken >> c & 1 || cost[row * cols + c] == kInf) continue;
    auto rest = best_pairs(cost, rows, cols, row + 1, taken | 1u << c);
    rest = {rest.first + 1, rest.second + cost[row * cols + c]};
    if (rest.first > best.first || (rest.first == best.first && rest.second < best.second))
      best = rest;
  }
  return best;
}

void assignments_reach_the_brute_force_optimum() {
  std::mt19937 random(4);
  std::uniform_real_distribution<double> unit(-1, 1);
  for (int i = 0; i < 3000; ++i) {
    const int64_t rows = random() % 6, cols = random() % 6;
    std::vector<double> cost(rows * cols);
    for (double& value : cost) value = i % 2 ? unit(random) : double(random() % 5);
    if (i % 3 == 0)
      for (double& value : cost) value = random() % 3 ? value : kInf;
    std::vector<int64_t> matches(rows);
    double total = 7;
    assign_batch<double>({cost.data(), &rows, &cols, rows, cols, false}, matches.data(), &total, 0,
                         1);
    int pairs = 0;
    double sum = 0;
    for (int64_t r = 0; r < rows; ++r) {
      if (matches[r] < 0) continue;
      REQUIRE(matches[r] < cols && cost[r * cols + matches[r]] < kInf);
      for (int64_t other = 0; other < r; ++other) REQUIRE(matches[other] != matches[r]);
      sum += cost[r * cols + matches[r]];
      ++pairs;
    }
    const auto best = best_pairs(cost, int(rows), int(cols), 0, 0);
    REQUIRE(sum == total && pairs == best.first && std::abs(total - best.second) < 1e-12);
    for (double& value : cost) value = -value;
    double largest = 7;
    assign_batch<double>({cost.data(), &rows, &cols, rows, cols, true}, matches.data(), &largest, 0,
                         1);
    REQUIRE(largest == -total);
  }
}

void assignments_of_every_width_take_all_rows_or_columns() {
  std::mt19937 random(5);
  std::uniform_real_distribution<float> unit(0, 1);
  for (const int64_t rows : {1, 8, 9, 32, 33, 128, 129, 200})
    for (const int64_t cols : {1, 31, 128, 150}) {
      std::vector<float> cost(rows * cols);
      for (float& value : cost) value = unit(random);
      std::vector<int64_t> matches(rows);
      double total = 0;
      assign_batch<float>({cost.data(), &rows, &cols, rows, cols, false}, matches.data(), &total, 0,
                          1);
      std::vector<bool> taken(cols);
      int64_t pairs = 0;
      for (const int64_t match : matches) {
        if (match < 0) continue;
        REQUIRE(!taken[match]);
        taken[match] = true;
        ++pairs;
      }
      REQUIRE(pairs == std::min(rows, cols));
      cost[0] = float(kNan);
      assign_batch<float>({cost.data(), &rows, &cols, rows, cols, false}, matches.data(), &total, 0,
                          1);
      REQUIRE(total != total && matches[0] == -1);
    }
}

void a_problem_may_be_any_part_of_a_batch() {
  std::mt19937 random(3);
  const int64_t n = 20, k = 5, m = 9;
  const auto pred = random_boxes<double>(random, n * k, true);
  const auto gt = random_boxes<double>(random, n * m, true);
  std::vector<int64_t> num_pred(n), num_gt(n), whole(n * k), part(n * k, 7);
  for (int64_t i = 0; i < n; ++i) num_pred[i] = random() % (k + 1), num_gt[i] = random() % (m + 1);
  const Problems<double> problems = {pred.data(), gt.data(), num_pred.data(), num_gt.data(), k, m};
  std::vector<double> ious(n * k), part_ious(n * k, 7);
  match_batch<double>(problems, {false, 0, nullptr}, whole.data(), ious.data(), 0, n);
  for (int64_t i = n; i-- > 0;)
    match_batch<double>(problems, {false, 0, nullptr}, part.data(), part_ious.data(), i, i + 1);
  REQUIRE(whole == part && ious == part_ious);
}

}  // namespace
}  // namespace virft_fast::testing

int main() {
  using namespace virft_fast::testing;
  small_problems_reach_the_brute_force_optimum<float>();
  small_problems_reach_the_brute_force_optimum<double>();
  sides_can_be_exchanged_at_every_width<float>();
  sides_can_be_exchanged_at_every_width<double>();
  ties_go_to_the_first();
  assignments_reach_the_brute_force_optimum();
  assignments_of_every_width_take_all_rows_or_columns();
  a_problem_may_be_any_part_of_a_batch();
  std::printf("all passed, instructions: %s\n", virft_fast::instructions());
}
