// The same batches on a CUDA device: all pointers are to its memory, in padded layout. Each function
// only launches on `stream`, and throws std::runtime_error if CUDA refuses.
#pragma once

#include <cstdint>

#include "batch.h"

namespace virft_fast {

struct Device {
  int index;
  void* stream;  // cudaStream_t
};

template <typename T>
void iou_on_device(const Problems<T>& problems, IouKind kind, T* out, int64_t count, Device device);

// `scratch`: as many bytes as scratch_bytes says, kept until the stream has passed.
template <typename T>
void match_on_device(const Problems<T>& problems, const MatchOptions& options, int64_t* matches,
                     T* ious, int64_t count, void* scratch, Device device);
template <typename T>
void assign_on_device(const Costs<T>& costs, int64_t* matches, double* totals, int64_t count,
                      void* scratch, Device device);

// For `count` problems of K and M; `real`: 8 for double boxes and all costs, 4 for float boxes.
int64_t scratch_bytes(int64_t count, int64_t max_rows, int64_t max_cols, int64_t real);

}  // namespace virft_fast
