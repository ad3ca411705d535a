// Products left * grad * right for many layers of different sizes, cut into tasks that need nothing from one another.
#pragma once

#include <cmath>
#include <string>
#include <vector>

#include "common/arguments.h"
#include "cpu/parallel.h"
#include "cpu/typed.h"

namespace kronfac::cpu {

// Part of a product (rows, columns): some of its columns, or some of its rows. Either needs only its own part of the
// inner product, so that no thread waits for another.
struct Slice {
  size_t layer;
  bool by_columns;
  int64_t lo, hi;
  bool whole;  // the layer's only slice
  int64_t width() const { return hi - lo; }
};

struct Layer {
  int64_t rows, columns;
  double work() const {
    return static_cast<double>(rows) * static_cast<double>(columns) * static_cast<double>(rows + columns);
  }
};

// Scratch of one worker, in bytes: the inner product of a slice, the slice itself where it is not computed in place,
// gemm's.
struct SliceScratch {
  int64_t inner = 0, outer = 0, gemm = 0;
  int64_t bytes() const { return inner + outer + gemm; }
};

// A thread gets this many multiply-adds at least.
constexpr double kLeastLayerWork = 1e6;

inline int64_t threads_for(const std::vector<Layer>& layers) {
  double total = 0;
  for (const Layer& layer : layers) total += layer.work();
  return worthwhile_threads(total, kLeastLayerWork);
}

// Along the longer side, because then the shorter factor is the one that is packed again for every slice.
inline std::vector<Slice> cut(const std::vector<Layer>& layers, int64_t threads, const kernels::Blocks& blocks) {
  constexpr double kSlicesPerThread = 4;  // enough for a balance within about an eighth
  constexpr int64_t kNarrowest = 96, kWidest = 2048;
  double total = 0;
  for (const Layer& layer : layers) total += layer.work();
  const double quantum = total / (static_cast<double>(threads) * kSlicesPerThread);
  std::vector<Slice> slices;
  for (size_t l = 0; l < layers.size(); ++l) {
    const bool by_columns = layers[l].columns >= layers[l].rows;
    const int64_t length = std::max(layers[l].rows, layers[l].columns);
    if (layers[l].rows == 0 || layers[l].columns == 0) continue;
    int64_t parts = (length + kWidest - 1) / kWidest;
    if (threads > 1) {
      const int64_t wanted = static_cast<int64_t>(std::ceil(layers[l].work() / quantum));
      parts = std::max(parts, std::min(wanted, std::max<int64_t>(1, length / kNarrowest)));
    }
    const int64_t multiple = by_columns ? blocks.nr : blocks.mr;
    const int64_t width = (length + parts * multiple - 1) / (parts * multiple) * multiple;
    for (int64_t lo = 0; lo < length; lo += width) {
      slices.push_back({l, by_columns, lo, std::min(lo + width, length), width >= length});
    }
  }
  return slices;
}

inline std::vector<int64_t> slices_largest_first(const std::vector<Slice>& slices, const std::vector<Layer>& layers) {
  std::vector<double> costs;
  for (const Slice& s : slices) {
    const Layer& layer = layers[s.layer];
    costs.push_back(layer.work() * static_cast<double>(s.width()) /
                    static_cast<double>(s.by_columns ? layer.columns : layer.rows));
  }
  return largest_first(costs);
}

template <class T>
SliceScratch scratch_for(const Kernels<T>& kernels, const std::vector<Slice>& slices,
                         const std::vector<Layer>& layers) {
  SliceScratch scratch;
  int64_t m = 0, n = 0, k = 0;
  for (const Slice& s : slices) {
    const Layer& layer = layers[s.layer];
    const int64_t area = s.width() * (s.by_columns ? layer.rows : layer.columns);
    scratch.inner = std::max(scratch.inner, Scratch::rounded(area * static_cast<int64_t>(sizeof(T))));
    m = std::max(m, s.by_columns ? layer.rows : s.width());
    n = std::max(n, s.by_columns ? s.width() : layer.columns);
    k = std::max({k, layer.rows, layer.columns});
  }
  scratch.outer = scratch.inner;
  scratch.gemm = Scratch::rounded(kernels.gemm_scratch(m, n, k));
  return scratch;
}

template <class T>
kernels::Matrix dense(const T* data, int64_t row_stride) {
  return {data, Kernels<T>::element, row_stride, 1};
}

inline kernels::Matrix shifted(const kernels::Matrix& m, int64_t i, int64_t j, int64_t element_size) {
  return {static_cast<const std::byte*>(m.data) + (i * m.row_stride + j * m.col_stride) * element_size, m.type,
          m.row_stride, m.col_stride};
}

// c := the slice of left * grad * right; left and right are of type T, grad of any. c has row stride ldc and points at
// the slice's first entry.
template <class T>
void two_sided(const Kernels<T>& kernels, const Slice& slice, const Layer& layer, const kernels::Matrix& left,
               const kernels::Matrix& grad, const kernels::Matrix& right, T* inner, T* c, int64_t ldc,
               void* gemm_scratch) {
  const int64_t o = layer.rows, i = layer.columns, w = slice.width(), size = static_cast<int64_t>(sizeof(T));
  const bool along = kernels.split_pays(o, i, i), across = kernels.split_pays(o, i, o);
  if (slice.by_columns) {
    kernels.gemm(o, w, i, 1, grad, shifted(right, 0, slice.lo, size), 0, inner, w, {}, along, gemm_scratch);
    kernels.gemm(o, w, o, 1, left, dense(inner, w), 0, c, ldc, {}, across, gemm_scratch);
  } else {
    kernels.gemm(w, i, o, 1, shifted(left, slice.lo, 0, size), grad, 0, inner, i, {}, across, gemm_scratch);
    kernels.gemm(w, i, i, 1, dense(inner, i), right, 0, c, ldc, {}, along, gemm_scratch);
  }
}

}  // namespace kronfac::cpu
