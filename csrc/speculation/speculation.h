// The CPU's `keep_drawn` and `look_up` of virft_fast/kernels/speculation.py, which documents them.
#pragma once
#include <algorithm>
#include <cstdint>

namespace virft_fast {

// These equal the constants of the Python module.
constexpr int kMaxRead = 8, kContext = 4;
constexpr int64_t kNowhere = kContext;
constexpr uint64_t kFactors[kContext] = {16294208416658607535u, 7960286522194355701u,
                                         487617019471545679u, 17909611376780542445u};
enum Counter { kLengths, kPositions, kDrawnAt, kRight, kGuessed, kAccepted, kPlace };

struct Pool {
  int64_t* tokens;
  int64_t* table;  // (3, size)
  int64_t size, first, width;

  // The place after the last token that a row has drawn.
  int64_t end(int64_t slot, int64_t drawn_at) const {
    return first + slot * width + kContext + drawn_at;
  }

  // Call `use(n, entry)` for each n of 2, 3 and 4 tokens before `place`, as long as all are known.
  template <typename Use>
  void ngrams(int64_t place, const Use& use) const {
    uint64_t hash = 0;
    for (int n = 1; n <= kContext; ++n) {
      const int64_t token = tokens[place - n];
      if (token < 0) return;
      hash += uint64_t(token) * kFactors[n - 1];
      if (n > 1) use(n, table + (n - 2) * size + ((int64_t(hash) >> 33) & (size - 1)));
    }
  }
};

// What the rows have, one number or one row of numbers for each.
struct Rows {
  int64_t count;
  int64_t* tokens;    // (rows, 1 + kMaxRead)
  int64_t* counters;  // (7, stride)
  int64_t stride;
  const int64_t* slots;

  int64_t& counter(Counter which, int64_t row) const { return counters[which * stride + row]; }
};

struct Drawn {
  const int64_t* tokens;  // (rows, read)
  const float* logps;     // (rows, read)
  int64_t read;
};

struct Completions {
  int64_t* active;
  const int64_t* goes_on;  // (vocabulary,)
  float* logps;            // (N, width)
  int64_t width, length;
  bool* seen;  // (rows, vocabulary), or null
  int64_t vocabulary;
};

inline void keep_drawn(const Pool& pool, const Drawn& drawn, const Rows& rows,
                       const Completions& all, int64_t* kept) {
  for (int64_t row = 0; row < rows.count; ++row) {
    const int64_t* own = drawn.tokens + row * drawn.read;
    int64_t* tokens = rows.tokens + row * (1 + kMaxRead);
    int64_t& drawn_at = rows.counter(kDrawnAt, row);
    const int64_t was_active = all.active[row], slot = rows.slots[row];
    int64_t right = 0, end = 0;
    while (right < drawn.read && own[right] == tokens[1 + right]) ++right;
    while (end < drawn.read && all.goes_on[own[end]]) ++end;
    const int64_t room = std::min(all.length - drawn_at, drawn.read);
    const int64_t keep = was_active ? std::min(std::min(right, end) + 1, room) : 0;
    const int64_t base = pool.end(slot, drawn_at);
    for (int64_t t = 0; t < keep; ++t) {
      pool.tokens[base + t] = own[t];
      all.logps[slot * all.width + drawn_at + t] = drawn.logps[row * drawn.read + t];
      if (all.seen) all.seen[row * all.vocabulary + own[t]] = true;
      pool.ngrams(base + t, [&](int, int64_t* entry) { *entry = std::max(*entry, base + t); });
    }
    const int64_t last = std::max<int64_t>(keep - 1, 0), accepted = keep - was_active;
    tokens[0] = own[last];
    int64_t& place = rows.counter(kPlace, row);
    place = right >= keep ? place + keep : kNowhere;
    for (const Counter which : {kLengths, kPositions, kDrawnAt}) rows.counter(which, row) += keep;
    all.active[row] = was_active && all.goes_on[own[last]] && drawn_at < all.length;
    rows.counter(kRight, row) += std::min(right, keep);
    rows.counter(kGuessed, row) += all.active[row] ? drawn.read - 1 : accepted;
    rows.counter(kAccepted, row) += accepted;
    kept[row] = keep;
  }
}

inline void look_up(const Pool& pool, const Rows& rows) {
  for (int64_t row = 0; row < rows.count; ++row) {
    const int64_t end = pool.end(rows.slots[row], rows.counter(kDrawnAt, row));
    int64_t& place = rows.counter(kPlace, row);
    if (pool.tokens[place] < 0) {
      place = kNowhere;
      pool.ngrams(end, [&](int n, const int64_t* entry) {
        const int64_t* found = pool.tokens + *entry;
        if (*entry > kNowhere && std::equal(found - n, found, pool.tokens + end - n))
          place = *entry;  // a longer one counts more, so the last stays
      });
    }
    int64_t* guesses = rows.tokens + row * (1 + kMaxRead) + 1;
    const int64_t* source = pool.tokens + place;
    const int64_t* stop = std::find_if(source, source + kMaxRead, [](int64_t t) { return t < 0; });
    std::fill(std::copy(source, stop, guesses), guesses + kMaxRead, 0);
  }
}

}  // namespace virft_fast
