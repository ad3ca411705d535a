// The update of symmetric.h for any source. For kernels only.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/symmetric_split.h"
#include "kernels/tile.h"

namespace kronfac::kernels::KRONFAC_ISA {

// So many k at most are summed in one go; longer sums are sums of such runs, which bounds the rounding error of float32
// sums over 10^5 and more positions (32 to 43 blocks of kc inside a run, the runs outside).
inline constexpr int64_t kRunLength = 8192;

template <class T>
static int64_t packed_elements(int64_t nk, int64_t row1) {
  constexpr Blocks block = blocks_of<T>();
  return round_up(smaller(nk, block.kc) * round_up(row1, block.nr), panel_alignment);
}

// Bytes of packed panels for one run.
template <class T>
static int64_t packed_bytes(int64_t nk, int64_t row0, int64_t row1) {
#ifdef KRONFAC_SPLIT
  if (sizeof(T) == sizeof(float) && split_worthwhile(nk, row1 - row0)) {
    return larger(SplitLayout(nk, row1, kFloatParts).bytes(), SplitLayout(nk, row1, kBfloatParts).bytes());
  }
#endif
  (void)row0;
  return packed_elements<T>(nk, row1) * static_cast<int64_t>(sizeof(T));
}

template <class T>
static int64_t update_scratch(int64_t nk, int64_t row0, int64_t row1) {
  constexpr Blocks block = blocks_of<T>();
  const int64_t run = nk > kRunLength ? round_up(row1 - row0, block.mr) * round_up(row1, block.nr) : 0;
  return packed_bytes<T>(nk, row0, row1) + run * static_cast<int64_t>(sizeof(T));
}

// One tile of the sum: := in the first block of a run, += afterwards.
template <class T, int vectors>
static inline void update_tile(bool first, int64_t kc, const T* a, const T* b, T* sum, int64_t ld) {
  if (first) {
    Tile<T, vectors>::run(kc, a, b, [&](int r, int64_t s, Vector<T> v) { store(sum + r * ld + s, v); });
  } else {
    Tile<T, vectors>::run(kc, a, b, [&](int r, int64_t s, Vector<T> v) {
      T* out = sum + r * ld + s;
      store(out, load(out) + v);
    });
  }
}

// The same for a tile of which only so many vectors are needed.
template <class T, int vectors = kPanelVectors<T>>
static inline void update_tile(int64_t needed, bool first, int64_t kc, const T* a, const T* b, T* sum, int64_t ld) {
  if constexpr (vectors > 1) {
    if (needed < vectors) return update_tile<T, vectors - 1>(needed, first, kc, a, b, sum, ld);
  }
  update_tile<T, vectors>(first, kc, a, b, sum, ld);
}

// One run, or what is left of one.
template <class T>
static void update_run_packed(const Source<T>& source, int64_t k0, int64_t k1, int64_t row0, int64_t row1, T* sum,
                              int64_t ld, T* panels) {
  constexpr Blocks block = blocks_of<T>();
  for (int64_t k = k0; k < k1; k += block.kc) {
    const int64_t kc = smaller(block.kc, k1 - k);
    source.pack(source.context, k, kc, 0, row1, panels);
    for (int64_t j = 0; j < row1; j += block.nr) {
      for (int64_t i = larger(row0, j); i < row1; i += block.mr) {
        // Vectors that lie wholly right of the diagonal or of the last column are left out.
        const int64_t columns = smaller(i + block.mr, row1) - j;
        update_tile(1 + (columns - 1) / kLanes<T>, k == k0, kc, packed_column(panels, kc, i), panels + j * kc,
                    sum + (i - row0) * ld + j, ld);
      }
    }
  }
}

template <class T>
static void update_run(const Source<T>& source, int64_t k0, int64_t k1, int64_t row0, int64_t row1, bool split, T* sum,
                       int64_t ld, void* panels) {
#ifdef KRONFAC_SPLIT
  if constexpr (sizeof(T) == sizeof(float)) {
    if (split && source.bfloat) {
      return update_run_split<kBfloatParts>(source, k0, k1, row0, row1, sum, ld, panels);
    }
    if (split) return update_run_split<kFloatParts>(source, k0, k1, row0, row1, sum, ld, panels);
  }
#endif
  (void)split;
  update_run_packed(source, k0, k1, row0, row1, sum, ld, static_cast<T*>(panels));
}

template <class T>
static void update(const Source<T>& source, int64_t k0, int64_t k1, int64_t row0, int64_t row1, T* sum, int64_t ld,
                   void* scratch) {
  constexpr Blocks block = blocks_of<T>();
  char* panels = static_cast<char*>(scratch);
  if (k0 >= k1) {
    for (int64_t i = 0; i < row1 - row0; ++i) __builtin_memset(sum + i * ld, 0, static_cast<size_t>(row1) * sizeof(T));
    return;
  }
#ifdef KRONFAC_SPLIT
  const bool split = sizeof(T) == sizeof(float) && split_worthwhile(k1 - k0, row1 - row0);
#else
  constexpr bool split = false;
#endif
  update_run(source, k0, smaller(k1, k0 + kRunLength), row0, row1, split, sum, ld, panels);
  const int64_t run_ld = round_up(row1, block.nr);
  T* run = reinterpret_cast<T*>(panels + packed_bytes<T>(k1 - k0, row0, row1));
  for (int64_t k = k0 + kRunLength; k < k1; k += kRunLength) {
    update_run(source, k, smaller(k1, k + kRunLength), row0, row1, split, run, run_ld, panels);
    for (int64_t i = row0; i < row1; ++i) {
      T* total = sum + (i - row0) * ld;
      const T* part = run + (i - row0) * run_ld;
      for (int64_t j = 0; j <= i; ++j) total[j] += part[j];
    }
  }
}

}  // namespace kronfac::kernels::KRONFAC_ISA
