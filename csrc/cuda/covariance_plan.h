// covariance of large x as products by cuBLAS: the lower triangle in panels of kPanelWidth rows, each against all
// columns up to its diagonal block.
//
// With n panels that is (1 + 1/n) / 2 of the operations of x^T x at cuBLAS' rate. Why that rate: on an H100 or H200 its
// bfloat16 products are expected at about 700 TFLOP/s, by instructions (wgmma) that read shared memory for four warps
// at once, and own tiles at half of that: mma.sync reaches some 62 % of the peak of 989 at most. So for 65536 x 4096 in
// bfloat16, by this arithmetic and relative to x^T x:
//   own tiles  (1 + 1/32) / 2 of the operations at half the rate:        1.0
//   panels     (1 + 1/4) / 2, and 265 MB of sums and result at 4 TB/s:   0.65
// of which only the latter meets a bar of 0.85; TF32 (a bar of 1.0) takes about twice the time on either side.
//
// The number of tiles of a panel must suit the GPU too: 1024 x 4096 is 128 tiles of 128 x 256, a round of the 132
// multiprocessors of an H100; 1024 x 1024 is 32 tiles and would take as long. So the rows of x are cut into parts
// (split.h: 4, 2, 4 and 1 for the panels of 4096), and the four panels take 2.5 rounds where x^T x takes 4.
#pragma once

#include <limits>
#include <vector>

#include "cuda/blas.h"
#include "cuda/covariance.h"

namespace kronfac::cuda {

// Below this many columns there is but one panel, or a small second one, and nothing is gained; below this many rows
// rounds are so short that starting the products takes as long as own tiles do altogether.
constexpr int64_t kPlanColumns = 2048, kPlanRows = 4096;

constexpr int64_t kPanelWidth = 1024;
constexpr int kMostPanels = 120;
// Sums of parts take this much memory at most (256 MB in float32).
constexpr int64_t kMostPartial = int64_t{1} << 26;

struct PanelShape {
  int64_t width = kPanelWidth;
  int64_t tile_rows = 128, tile_columns = 256;  // of cuBLAS' kernels for products of this kind
  // One tile on each of 132 multiprocessors; a row of a round takes 12.4 ns at 700 TFLOP/s, sums of a tile 65 ns to
  // write and read, a launch 5 us, an addend 75 ns.
  Split split{132, 512, 400, 5.3, 6};
};

// Panel i: rows [i width, (i + 1) width) of x^T x, `leading` numbers apart, from number `first` of Covariance::partial
// on, once for each of its parts. Without parts, the panel lies in out and needs its mirror image only. `sums`: column
// sums (sum_parts, features), where there is a bias.
struct CovariancePanels {
  struct Panel {
    int64_t first, leading;
    int32_t parts;
  };
  int64_t width, features, entries, sums;
  int32_t count, sum_parts;
  Panel panel[kMostPanels];

  KRONFAC_BOTH int64_t begin(int64_t i) const { return i * width; }
  KRONFAC_BOTH int64_t end(int64_t i) const { return (i + 1) * width < features ? (i + 1) * width : features; }
  KRONFAC_BOTH int64_t part_size(int64_t i) const { return (end(i) - begin(i)) * panel[i].leading; }
};

inline int64_t input_bytes(const Covariance& p) { return p.type == Element::f64 ? 8 : p.type == Element::f32 ? 4 : 2; }

// Whether cuBLAS can read x as it lies: rows or columns whose entries are neighbours.
inline bool plain_matrix(const Covariance& p) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();  // of cuBLAS' sizes
  const bool rows = p.feature == 1 && p.row >= p.features, columns = p.row == 1 && p.feature >= p.m;
  return (rows || columns) && std::max({p.row, p.feature, p.m, p.features, p.out_row}) <= kMost;
}

// Whether panels are worth it.
inline bool covariance_large(const Covariance& p) { return p.features >= kPlanColumns && p.m >= kPlanRows; }

// Whether x is better copied to rows that begin at multiples of 16 bytes, as the copy unit and cuBLAS want them. From
// kCopiedColumns on that takes a third of the time of the products at most (4 m d bytes at 4 TB/s, m d^2 operations at
// 350 TFLOP/s; twice both in TF32), and products of entries that are gathered one by one more than twice their time.
inline bool covariance_needs_copy(const Covariance& p, bool large) {
  constexpr int64_t kCopiedColumns = 1024, kCopiedRows = 2048;
  if (!(p.tensor_cores || large) || p.features < kCopiedColumns || p.m < kCopiedRows) return false;
  const int64_t run = 16 / input_bytes(p);
  const bool rows = p.feature == 1 && p.row % run == 0 && (!large || p.row >= p.features),
             columns = large && p.row == 1 && p.feature >= p.m && p.feature % run == 0;
  return !(rows || columns) || reinterpret_cast<uintptr_t>(p.x) % 16 != 0;
}

// Where sums go: into out where their product is the only one of its panel and out is as cuBLAS writes best, else into
// memory of its own.
inline CovariancePanels covariance_panels(const Covariance& p, const PanelShape& shape = {}) {
  CovariancePanels panels{};
  const int64_t least = (p.features + kMostPanels - 1) / kMostPanels, align = 16;
  panels.features = p.features;
  panels.width = std::max(shape.width, (least + shape.width - 1) / shape.width * shape.width);
  panels.count = static_cast<int32_t>((p.features + panels.width - 1) / panels.width);
  const int64_t bytes = std::max<int64_t>(input_bytes(p), 4);
  // cuBLAS takes a scale of 0 for leave to ignore x, and what is not finite in it.
  const bool direct = p.out_column == 1 && p.out_row >= p.d() && p.out_row * bytes % align == 0 &&
                      reinterpret_cast<uintptr_t>(p.out) % align == 0 && static_cast<float>(p.scale) != 0;
  int64_t in_parts = 0;
  for (int64_t i = 0; i < panels.count; ++i) {
    CovariancePanels::Panel& panel = panels.panel[i];
    const int64_t rows = panels.end(i) - panels.begin(i), columns = panels.end(i);
    panel.first = panels.entries;
    panel.leading = (columns + align - 1) / align * align;
    const int64_t size = rows * panel.leading, tiles = (rows + shape.tile_rows - 1) / shape.tile_rows *
                                                       ((columns + shape.tile_columns - 1) / shape.tile_columns);
    const int64_t parts = split_parts(shape.split, tiles, p.m, std::max<int64_t>(1, (kMostPartial - in_parts) / size));
    panel.parts = static_cast<int32_t>(parts == 1 && direct ? 0 : parts);
    if (parts > 1) in_parts += parts * size;
    panels.entries += panel.parts * size;
  }
  panels.sums = panels.entries;
  panels.sum_parts = p.bias ? static_cast<int32_t>(std::clamp<int64_t>(p.m / 1024, 1, 32)) : 0;
  panels.entries += panels.sum_parts * p.features;
  return panels;
}

// The products of all panels. c is row-major, so that its transpose is what cuBLAS forms: columns of the panel first.
inline std::vector<Gemm> covariance_products(const Covariance& p, const CovariancePanels& panels) {
  const bool rows_of_x = p.feature == 1 && p.row >= p.features;  // else its columns are what lies in memory
  const int64_t bytes = input_bytes(p), out_bytes = std::max<int64_t>(bytes, 4);
  const auto x = [&](int64_t k, int64_t i) {
    return static_cast<const char*>(p.x) + (k * p.row + i * p.feature) * bytes;
  };
  std::vector<Gemm> products;
  for (int64_t i = 0; i < panels.count; ++i) {
    const CovariancePanels::Panel& panel = panels.panel[i];
    const bool direct = panel.parts == 0;
    const int64_t parts = direct ? 1 : panel.parts;
    Gemm g;
    g.type = p.type, g.c_type = p.type == Element::f64 ? Element::f64 : Element::f32;
    g.m = panels.end(i), g.n = panels.end(i) - panels.begin(i);
    g.k = parts == 1 ? p.m : p.m / parts / 8 * 8;  // parts are aligned as x is
    g.a = x(0, 0), g.b = x(0, panels.begin(i));
    g.lda = g.ldb = rows_of_x ? p.row : p.feature;
    g.a_transposed = !rows_of_x, g.b_transposed = rows_of_x;
    g.count = parts, g.a_stride = g.b_stride = g.k * p.row;
    if (direct) {
      g.c = static_cast<char*>(p.out) + panels.begin(i) * p.out_row * out_bytes, g.ldc = p.out_row;
      g.alpha = p.scale, g.beta = p.decay;
    } else {
      g.c = static_cast<char*>(p.partial) + panel.first * out_bytes, g.ldc = panel.leading;
      g.c_stride = panels.part_size(i);
    }
    products.push_back(g);
    const int64_t done = g.k * parts;
    if (done == p.m) continue;
    // The few rows that equal parts leave over join the first part.
    g.k = p.m - done, g.a = x(done, 0), g.b = x(done, panels.begin(i)), g.count = 1, g.beta = 1;
    products.push_back(g);
  }
  return products;
}

// After the products: sums of columns, and what is in memory of its own added up, both triangles written.
void covariance_finish(const Covariance& p, const CovariancePanels& panels, Stream stream);

}  // namespace kronfac::cuda
