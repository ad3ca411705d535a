// Products C = A B for a list of layers of different sizes, in one launch: what the two preconditioners are made of.
// The list travels as an argument of the kernels, in batches of kMostLayers, as in damped_inverse.h.
#pragma once

#include <cstdint>

#include "cuda/launch.h"

namespace kronfac::cuda {

inline constexpr int kMostLayers = 32;  // all arguments of a kernel together take 4 KiB at most
// The tile of C that a block of threads forms.
inline constexpr int kProductThreads = 256, kProductColumns = 64;
KRONFAC_BOTH constexpr int product_rows(bool wide) { return wide ? 64 : 128; }

// What becomes of C; ⟨,⟩ sums go to `partial`, one number for each tile.
enum class Finish {
  store,    // c := C
  dot,      // c := C, rounded to the type of grad, and ⟨C, other⟩ with other the gradient
  divide,   // c := C / (other + damping), and ⟨C, c⟩, with other the eigenvalues
  rounded,  // c := C, rounded to the type of grad
};

// A matrix as a factor of a product.
struct View {
  const void* data;
  int64_t row, column;  // strides
  View transposed() const { return {data, column, row}; }
};

struct Product {
  const void* a;  // (m, k); C itself in `finish`
  const void* b;  // (k, n)
  int64_t a_row, a_k, b_k, b_column;
  void* c;            // (m, n), contiguous; null where `dot` has nothing to round
  const void* other;  // (m, n)
  int64_t other_row, other_column;
  int32_t m, n, k, index;  // index: its place in damping and dots
};

struct ProductBatch {
  Product problem[kMostLayers];
  int32_t first[kMostLayers + 1];  // the first tile of each layer
  int32_t count;
  const void* damping;
  int64_t damping_stride;
  double* partial;

  static int32_t tiles(const Product& p, bool wide) {
    const int32_t rows = product_rows(wide);
    return (p.m + rows - 1) / rows * ((p.n + kProductColumns - 1) / kProductColumns);
  }
  int32_t layout(bool wide) {
    first[0] = 0;
    for (int32_t i = 0; i < count; ++i) first[i + 1] = first[i] + tiles(problem[i], wide);
    return first[count];
  }
};

// A list of addresses on its way to the device's memory.
inline constexpr int32_t kMostAddresses = 4 * 3 * kMostLayers;  // three matrices in each of four products
struct Addresses {
  const void* address[kMostAddresses];
  int32_t count;
  const void** target;
};

// a and b are of type f32 or f64 (`wide`), except that b is of type `grad` where b_grad says so, and what is rounded,
// and other in `dot`.
void product(const ProductBatch& batch, Finish finish, Element grad, bool wide, bool b_grad, Stream stream);
// Only what becomes of C, where C (m, n) is there already, in a with strides a_row and a_k; tiles are those of `wide`.
// `store` copies an a of any strides, of type `grad` where a_grad says so.
void finish(const ProductBatch& batch, Finish finish, Element grad, bool wide, bool a_grad, Stream stream);
// Writes addresses, which the kernel's arguments hold, to the memory of the device.
void store_addresses(const Addresses& addresses, Stream stream);
// dots[index] := the sum of a layer's partial numbers, in order.
void product_dots(const ProductBatch& batch, bool wide, void* dots, Stream stream);

}  // namespace kronfac::cuda
