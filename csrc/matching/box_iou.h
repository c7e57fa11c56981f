// Intersection over union of boxes (x1, y1, x2, y2), for host and device. No torch.
//
// Box geometry is continuous: a box from 0 to 10 is 10 wide. A box without positive width and
// height, or with a coordinate that is not finite, is degenerate: its IoU and GIoU with anything
// are 0, never NaN. Arithmetic is in double whatever the boxes are in, in the order of the Python
// reference (virft_fast/matching/boxes.py), so results agree with it bit for bit as long as the
// compiler contracts nothing (-ffp-contract=off, nvcc -fmad=false).
// GIoU: Rezatofighi et al. 2019, arXiv:1902.09630, algorithm 1.
#pragma once

#include <cstdint>
#include <limits>

#if defined(__CUDACC__)
#define VIRFT_HOST_DEVICE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define VIRFT_HOST_DEVICE inline __attribute__((always_inline))
#else
#define VIRFT_HOST_DEVICE inline
#endif

namespace virft_fast {

template <typename T>
inline constexpr T kInfinity = std::numeric_limits<T>::infinity();

enum class IouKind : int { kIou = 0, kGiou = 1 };

struct Box {
  double x1, y1, x2, y2;
};

VIRFT_HOST_DEVICE double lesser(double a, double b) { return a < b ? a : b; }
VIRFT_HOST_DEVICE double greater(double a, double b) { return a > b ? a : b; }

// Comparisons with NaN are false and x - x is NaN for an infinite x.
VIRFT_HOST_DEVICE bool is_finite(double x) { return x - x == 0.0; }

VIRFT_HOST_DEVICE bool is_valid(const Box& b) {
  return b.x2 > b.x1 && b.y2 > b.y1 && is_finite(b.x1) && is_finite(b.y1) && is_finite(b.x2) &&
         is_finite(b.y2);
}

template <typename T>
VIRFT_HOST_DEVICE Box load_box(const T* corners) {
  return {double(corners[0]), double(corners[1]), double(corners[2]), double(corners[3])};
}

VIRFT_HOST_DEVICE double area(const Box& b) { return (b.x2 - b.x1) * (b.y2 - b.y1); }

// One box valid, the other valid or empty at the origin (then the IoU is 0, the GIoU is not). The
// areas come from outside, because one side's is the same for a whole row. T is what the boxes were
// stored in: products of float32 coordinates can't leave float64's range, others can.
template <IouKind kind, typename T>
VIRFT_HOST_DEVICE double overlap(const Box& a, double area_a, const Box& b, double area_b) {
  const double width = lesser(a.x2, b.x2) - greater(a.x1, b.x1);
  const double height = lesser(a.y2, b.y2) - greater(a.y1, b.y1);
  const double inter = (width > 0 ? width : 0) * (height > 0 ? height : 0);
  const double all = area_a + area_b - inter;
  double result = inter / all;
  if (kind == IouKind::kGiou) {
    const double hull = (greater(a.x2, b.x2) - lesser(a.x1, b.x1)) *
                        (greater(a.y2, b.y2) - lesser(a.y1, b.y1));
    result = result - (hull - all) / hull;
  }
  if (sizeof(T) > sizeof(float)) return is_finite(result) ? result : 0.0;
  return result;
}

}  // namespace virft_fast
