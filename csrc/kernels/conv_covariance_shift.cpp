#include "kernels/conv_covariance_shift.h"

#include <cstddef>

#include "kernels/source.h"
#include "kernels/split.h"
#include "kernels/vector.h"

namespace kronfac::kernels::KRONFAC_ISA {
namespace {

// Positions of one run: 8 KiB of each panel, so that one panel of the left operand and three of the right one stay in
// an L1 of 32 KiB; a run also bounds the rounding error of float32 sums.
constexpr int64_t kRun = smaller(256, 8192 / kVectorBytes);

// Vectors of the right operand that a tile takes: three, where that leaves registers for enough rows.
#if defined(__AVX2__) || defined(__aarch64__)
constexpr int kMostVectors = 3;
#else
constexpr int kMostVectors = 2;
#endif

// Rows of a tile: accumulators for a tile of one vector must hide the latency of a multiply-add, while one of three is
// bounded by the registers (32 with AVX-512, where 8 x 3 or 16 x 1 fit; else 16).
template <class T, int vectors>
constexpr int tile_rows() {
  constexpr int lanes = static_cast<int>(kLanes<T>);
#if defined(__AVX512F__)
  constexpr int most = vectors == 1 ? 16 : 8;
#else
  constexpr int most = vectors == 1 ? 8 : 4;
#endif
  return lanes < most ? lanes : most;
}

// Offsets of the positions of a run from the first one of the box, in elements. One flat list: rows of a map are short,
// and a loop over them inside a tile would cost a mispredicted branch each.
struct Run {
  int64_t offsets[kRun];
  int64_t count;
};

template <class T, int vectors>
inline void tile(const Run& run, const T* left, const T* right, int64_t panel_stride, T* sum, int64_t ld) {
  constexpr int rows = tile_rows<T, vectors>();
  Vector<T> acc[rows][vectors];
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) acc[i][j] = Vector<T>{};
  }
#pragma GCC unroll 2
  for (int64_t k = 0; k < run.count; ++k) {
    const T *a = left + run.offsets[k], *b = right + run.offsets[k];
    Vector<T> in[vectors];
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) in[j] = load(b + j * panel_stride);
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
      const Vector<T> entry = a[i] - Vector<T>{};
#pragma GCC unroll 4
      for (int j = 0; j < vectors; ++j) acc[i][j] += entry * in[j];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) {
      T* out = sum + i * ld + j * kLanes<T>;
      store(out, load(out) + acc[i][j]);
    }
  }
}

// One panel of rows against `vectors` panels of columns.
template <class T, int vectors = kMostVectors>
inline void panel(int64_t wanted, const Run& run, const T* left, int64_t rows, const T* right, int64_t panel_stride,
                  T* sum, int64_t ld) {
  if constexpr (vectors > 1) {
    if (wanted < vectors) {
      return panel<T, vectors - 1>(wanted, run, left, rows, right, panel_stride, sum, ld);
    }
  }
  constexpr int height = tile_rows<T, vectors>();
  for (int64_t i = 0; i < rows; i += height) {
    tile<T, vectors>(run, left + i, right, panel_stride, sum + i * ld, ld);
  }
}

// Calls f(run) for the positions of a box, in runs of kRun and a last one of what is left.
template <class T, class F>
void for_runs(const ShiftBox& box, F f) {
  constexpr int64_t lanes = kLanes<T>;
  for (const int64_t count : box.count) {
    if (count <= 0) return;
  }
  Run run;
  run.count = 0;
  const int64_t width = box.count[3], step = box.stride[3] * lanes;
  for (int64_t n = 0; n < box.count[0]; ++n) {
    for (int64_t z = 0; z < box.count[1]; ++z) {
      for (int64_t y = 0; y < box.count[2]; ++y) {
        const int64_t start = (n * box.stride[0] + z * box.stride[1] + y * box.stride[2]) * lanes;
        for (int64_t x = 0; x < width;) {
          const int64_t length = smaller(width - x, kRun - run.count);
          int64_t* out = run.offsets + run.count;
          for (int64_t i = 0; i < length; ++i) out[i] = start + (x + i) * step;
          run.count += length;
          x += length;
          if (run.count == kRun) {
            f(run);
            run.count = 0;
          }
        }
      }
    }
  }
  if (run.count > 0) f(run);
}

// One run against all panels of the right operand.
template <class T>
void run_products(const Run& run, const T* left, int64_t row0, int64_t row1, const T* right, int64_t panel_stride,
                  bool lower, T* sum, int64_t ld) {
  constexpr int64_t lanes = kLanes<T>;
  // The panels of the right operand stay in L1 while those of the left one go by.
  for (int64_t j = 0, taken; j < ld; j += taken * lanes) {
    const int64_t rest = (ld - j) / lanes;
    taken = rest == kMostVectors + 1 ? rest / 2 : smaller(kMostVectors, rest);
    for (int64_t i = lower ? larger(row0, j) : row0; i < row1; i += lanes) {
      const int64_t vectors = lower ? smaller(taken, (i - j) / lanes + 1) : taken;
      panel<T>(vectors, run, left + i / lanes * panel_stride, smaller(lanes, row1 - i),
               right + j / lanes * panel_stride, panel_stride, sum + i * ld + j, ld);
    }
  }
}

#ifdef KRONFAC_SPLIT
// From so many channels on, splitting costs less than it saves; shorter runs leave tiles empty.
constexpr int64_t kSplitChannels = 96, kSplitPositions = 32;

// Strips of the panels [row0, row1) over `terms` positions; either of left and right may be null.
void pack_positions(const int64_t* offsets, int64_t terms, const float* panels, int64_t row0, int64_t row1,
                    int64_t panel_stride, char* left, char* right) {
  const int64_t bytes = strip_bytes(terms, kFloatParts);
  for (int64_t row = row0; row < row1; row += kStripLines) {
    const float* source = panels + row / kStripLines * panel_stride;
    for (int64_t t = 0; t < terms; t += kStepTerms) {
      const auto load_pair = [&](int i, Vector<float>& first, Vector<float>& second) {
        first = t + i < terms ? load(source + offsets[t + i]) : Vector<float>{};
        second = t + i + 16 < terms ? load(source + offsets[t + i + 16]) : Vector<float>{};
      };
      const int64_t at = (row - row0) / kStripLines * bytes + t / kStepTerms * kFloatParts * kTileBytes;
      pack_step<kFloatParts>(load_pair, right == nullptr ? nullptr : right + at, left == nullptr ? nullptr : left + at);
    }
  }
}

void split_run(const Run& run, const float* left, int64_t row0, int64_t row1, const float* right, int64_t columns,
               int64_t panel_stride, bool lower, float* sum, int64_t ld, void* scratch) {
  static_assert(kLanes<float> == kStripLines);
  char* left_strips = static_cast<char*>(scratch);
  char* right_strips = left_strips + strip_count(row1 - row0) * strip_bytes(kSplitTerms<kFloatParts>, kFloatParts);
  const int64_t used = lower ? smaller(columns, row1) : columns;
  for (int64_t t = 0; t < run.count; t += kSplitTerms<kFloatParts>) {
    const int64_t terms = smaller(kSplitTerms<kFloatParts>, run.count - t);
    const int64_t* offsets = run.offsets + t;
    if (left == right && row0 == 0 && row1 == used) {
      pack_positions(offsets, terms, left, 0, used, panel_stride, left_strips, right_strips);
    } else {
      pack_positions(offsets, terms, left, row0, row1, panel_stride, left_strips, nullptr);
      pack_positions(offsets, terms, right, 0, used, panel_stride, nullptr, right_strips);
    }
    multiply_chunk<kFloatParts>(row1 - row0, used, terms, left_strips, right_strips, lower ? row0 : kNoDiagonal,
                                [&](const float* block, int64_t i, int64_t j, int64_t rows, int64_t width) {
                                  for (int64_t r = 0; r < rows; ++r) {
                                    merge_row(block + r * kBlock, width, 1, 1, sum + (row0 + i + r) * ld + j);
                                  }
                                });
  }
}
#endif

template <class T>
int64_t split_scratch([[maybe_unused]] int64_t rows, [[maybe_unused]] int64_t columns) {
#ifdef KRONFAC_SPLIT
  if (sizeof(T) == sizeof(float) && rows >= kSplitChannels && columns >= kSplitChannels) {
    return (strip_count(rows) + strip_count(columns)) * strip_bytes(kSplitTerms<kFloatParts>, kFloatParts);
  }
#endif
  return 0;
}

template <class T>
void products(const ShiftBox& box, const T* left, int64_t row0, int64_t row1, const T* right, int64_t columns,
              int64_t panel_stride, bool lower, T* sum, [[maybe_unused]] void* split) {
  const int64_t ld = round_up(columns, kLanes<T>);
#ifdef KRONFAC_SPLIT
  if constexpr (sizeof(T) == sizeof(float)) {
    if (split != nullptr) {
      const Tiles tiles;
      return for_runs<T>(box, [&](const Run& run) {
        if (run.count >= kSplitPositions) {
          split_run(run, left, row0, row1, right, columns, panel_stride, lower, sum, ld, split);
        } else {
          run_products(run, left, row0, row1, right, panel_stride, lower, sum, ld);
        }
      });
    }
  }
#endif
  for_runs<T>(box, [&](const Run& run) { run_products(run, left, row0, row1, right, panel_stride, lower, sum, ld); });
}

template <class T>
void sums(const ShiftBox& box, const T* left, int64_t rows, int64_t panel_stride, T* sum) {
  constexpr int64_t lanes = kLanes<T>;
  for_runs<T>(box, [&](const Run& run) {
    for (int64_t i = 0; i < rows; i += lanes) {
      Vector<T> acc{};
      for (int64_t k = 0; k < run.count; ++k) acc += load(left + i / lanes * panel_stride + run.offsets[k]);
      store(sum + i, load(sum + i) + acc);
    }
  });
}

constexpr int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

// One row of positions for one lane.
template <class T, class S>
void pack_lane(const S* source, int64_t stride, int64_t first, int64_t last, int64_t count, T* out) {
  constexpr int64_t lanes = kLanes<T>;
  for (int64_t x = 0; x < first; ++x) out[x * lanes] = T(0);
  if (stride == 1) {
    for (int64_t x = first; x < last; ++x) out[x * lanes] = convert<T>(source[x]);
  } else {
    for (int64_t x = first; x < last; ++x) out[x * lanes] = convert<T>(source[x * stride]);
  }
  for (int64_t x = last; x < count; ++x) out[x * lanes] = T(0);
}

template <class T>
void pack(const ShiftInput& input, const ShiftRow* rows, int64_t count, const ShiftChunk& chunk, T* panels) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t panel_stride = chunk.positions() * lanes, width = chunk.count[2];
  visit(input.type, [&](auto* tag) {
    using S = __typeof__(*tag);
    for (int64_t j = 0; j < count; j += lanes) {
      const ShiftRow* group = rows + j;
      const int64_t used = smaller(lanes, count - j);
      // Where each lane's row of the map starts for the chunk's first position, and which positions x it has.
      int64_t offset[lanes], first[lanes], last[lanes];
      bool together = used == lanes && input.channel_stride == 1;
      for (int64_t lane = 0; lane < used; ++lane) {
        const ShiftRow& row = group[lane];
        offset[lane] = row.channel * input.channel_stride;
        for (int axis = 0; axis < 3; ++axis) {
          offset[lane] += (row.base[axis] + chunk.first[axis] * input.step[axis]) * input.axis_stride[axis];
        }
        const int64_t step = input.step[2], start = row.base[2] + chunk.first[2] * step;
        const int64_t inside = input.size[2] - start;
        first[lane] = clamp(start >= 0 ? 0 : (step - 1 - start) / step, 0, width);
        last[lane] = clamp(inside <= 0 ? 0 : (inside + step - 1) / step, first[lane], width);
        together = together && offset[lane] == offset[0] + lane && row.base[0] == group[0].base[0] &&
                   row.base[1] == group[0].base[1] && row.base[2] == group[0].base[2];
      }
      T* out = panels + j / lanes * panel_stride;
      const int64_t x_stride = input.step[2] * input.axis_stride[2];
      for (int64_t n = 0; n < chunk.images; ++n) {
        for (int64_t z = 0; z < chunk.count[0]; ++z) {
          for (int64_t y = 0; y < chunk.count[1]; ++y, out += width * lanes) {
            const int64_t place = (chunk.image + n) * input.batch_stride + z * input.step[0] * input.axis_stride[0] +
                                  y * input.step[1] * input.axis_stride[1];
            const auto inside = [&](const ShiftRow& row) {
              const int64_t in_z = row.base[0] + (chunk.first[0] + z) * input.step[0],
                            in_y = row.base[1] + (chunk.first[1] + y) * input.step[1];
              return in_z >= 0 && in_z < input.size[0] && in_y >= 0 && in_y < input.size[1];
            };
            const S* source = static_cast<const S*>(input.data);
            if (together) {
              const bool real = inside(group[0]);
              const int64_t x0 = real ? first[0] : width, x1 = real ? last[0] : width;
              for (int64_t x = 0; x < x0; ++x) store(out + x * lanes, Vector<T>{});
              for (int64_t x = x0; x < x1; ++x) {
                const S* entry = source + (place + offset[0] + x * x_stride);
                for (int64_t lane = 0; lane < lanes; ++lane) out[x * lanes + lane] = convert<T>(entry[lane]);
              }
              for (int64_t x = x1; x < width; ++x) store(out + x * lanes, Vector<T>{});
              continue;
            }
            if (used < lanes) __builtin_memset(out, 0, static_cast<size_t>(width * lanes) * sizeof(T));
            // Runs of 16 positions: what is written stays in L1 while the lanes go by.
            for (int64_t x0 = 0; x0 < width; x0 += 16) {
              const int64_t run = smaller(16, width - x0);
              for (int64_t lane = 0; lane < used; ++lane) {
                const bool real = inside(group[lane]);
                const int64_t low = real ? clamp(first[lane] - x0, 0, run) : run,
                              high = real ? clamp(last[lane] - x0, low, run) : run;
                const int64_t at = place + offset[lane] + x0 * x_stride;
                pack_lane(source + (low < high ? at : 0), x_stride, low, high, run, out + x0 * lanes + lane);
              }
            }
          }
        }
      }
    }
  });
}

template <class T>
void flush(int64_t n, T* part, T* total) {
  for (int64_t i = 0; i < n; ++i) {
    total[i] += part[i];
    part[i] = T(0);
  }
}

template <class T>
void add(int64_t n, const T* part, T* total) {
  for (int64_t i = 0; i < n; ++i) total[i] += part[i];
}

template <class T>
void gather(const T* const* boxes, int64_t count, int64_t rows, int64_t columns, int64_t ld, bool fresh, T* out,
            int64_t row_stride, int64_t col_stride) {
  constexpr int64_t width = 64;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c0 = 0; c0 < columns; c0 += width) {
      const int64_t n = smaller(width, columns - c0);
      T sum[width] = {};
      for (int64_t box = 0; box < count; ++box) {
        const T* row = boxes[box] + r * ld + c0;
        for (int64_t c = 0; c < n; ++c) sum[c] += row[c];
      }
      T* to = out + r * row_stride + c0 * col_stride;
      if (!fresh) {
        for (int64_t c = 0; c < n; ++c) sum[c] += to[c * col_stride];
      }
      for (int64_t c = 0; c < n; ++c) to[c * col_stride] = sum[c];
    }
  }
}

}  // namespace

extern const ShiftKernels<float> shift_f32;
extern const ShiftKernels<double> shift_f64;
const ShiftKernels<float> shift_f32{kLanes<float>, pack<float>,  products<float>, split_scratch<float>,
                                    sums<float>,   flush<float>, add<float>,      gather<float>};
const ShiftKernels<double> shift_f64{kLanes<double>, pack<double>,  products<double>, split_scratch<double>,
                                     sums<double>,   flush<double>, add<double>,      gather<double>};

}  // namespace kronfac::kernels::KRONFAC_ISA
