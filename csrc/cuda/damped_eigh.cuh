// Kernel templates of damped_eigh.h.
#pragma once

#include "cuda/damped_eigh.h"
#include "cuda/damped_inverse.cuh"  // finite, valid_damping
#include "cuda/jacobi.cuh"

namespace kronfac::cuda {

template <class T>
KRONFAC_DEVICE T eigh_damping(const EighBatch& batch, const EighProblem& p) {
  return static_cast<const T*>(batch.damping)[p.index * batch.damping_stride];
}

// The matrix of a batch that a block of threads works at, and the block's number there.
struct EighTask {
  const EighProblem& problem;
  int32_t number;
};
KRONFAC_DEVICE EighTask eigh_task(const EighBatch& batch, int32_t block) {
  const int32_t at = problem_of(batch, block);
  return {batch.problem[at], block - batch.first[at]};
}

// The power of two just above a positive finite number; 0 for 0.
KRONFAC_DEVICE int32_t exponent_of(double largest) {
  int exponent = 0;
  if (largest > 0) std::frexp(largest, &exponent);
  return exponent;
}

// An eigenvalue in the type of the result, before damping.
template <class T>
KRONFAC_DEVICE T scaled_back(double value, int32_t exponent) {
  return static_cast<T>(std::ldexp(value, exponent));
}
// Damped, and floored: rounding may leave an eigenvalue of a positive semi-definite matrix just below zero.
template <class T>
KRONFAC_DEVICE T damped_value(T value, T damping) {
  const T sum = value + damping;
  return sum > damping ? sum : damping;
}

// What fold_threads takes for the largest magnitude: infinity for what is not finite.
KRONFAC_DEVICE double magnitude(double x) { return finite(x) ? std::fabs(x) : static_cast<double>(INFINITY); }

// One matrix of order n <= kOrder <= kJacobiOrder: all of it.
template <class T, int kOrder, int kThreads, class Block>
KRONFAC_DEVICE void small_eigh(Block& block, double* memory, const EighBatch& batch, int32_t number) {
  using State = typename Block::State;
  const EighProblem& p = batch.problem[number];
  const int n = p.n;
  const Jacobi s = jacobi_shared(memory, n, kThreads);
  const T* f = static_cast<const T*>(p.f);
  T* values = static_cast<T*>(p.values);
  T* vectors = static_cast<T*>(p.vectors);
  const T damping = eigh_damping<T>(batch, p);
  const bool by_rows = p.column_stride <= p.row_stride;
  const double largest = fold_threads<kThreads>(
      block, s.partial,
      [&](int thread) {
        double most = 0;
        for (int e = thread; e < n * n; e += kThreads) {
          const int i = by_rows ? e / n : e % n, j = by_rows ? e % n : e / n;
          s.v[e] = i == j ? 1 : 0;
          if (j > i) continue;
          const double value = static_cast<double>(f[i * p.row_stride + j * p.column_stride]);
          s.at(i, j) = value;
          most = Largest{}(most, magnitude(value));
        }
        if (n < s.m) {
          for (int j = thread; j < s.m; j += kThreads) s.at(n, j) = 0;
        }
        return most;
      },
      Largest{});
  int32_t info = finite(largest) && valid_damping(static_cast<double>(damping)) ? 0 : -1;
  const int32_t exponent = info == 0 ? exponent_of(largest) : 0;
  if (info == 0) {
    block.each([&](int thread, State&) {
      for (int e = thread; e < s.m * (s.m + 1) / 2; e += kThreads) s.a[e] = std::ldexp(s.a[e], -exponent);
    });
    // Each column's share of it, 1 / sqrt(n) as a rule, is below what its rounding to T leaves, or LAPACK in double.
    constexpr double kTolerance = sizeof(T) == sizeof(float) ? 0x1p-27 : 0x1p-51;
    if (!jacobi_sweeps<kOrder, kThreads>(block, s, kTolerance)) info = 1;
    const double most = fold_threads<kThreads>(
        block, s.partial,
        [&](int thread) {
          double sum = 0;
          for (int j = thread; j < n; j += kThreads) {
            sum = Largest{}(sum, magnitude(static_cast<double>(scaled_back<T>(s.at(j, j), exponent))));
          }
          return sum;
        },
        Largest{});
    if (!finite(most)) info = 1;
  }
  block.each([&](int thread, State&) {
    if (thread == 0) batch.info[p.index] = info;
    int* const rank = s.p;  // and what follows it: m numbers
    for (int j = thread; j < n; j += kThreads) {
      if (info != 0) {
        values[j] = static_cast<T>(NAN);
        continue;
      }
      const double mine = s.at(j, j);
      int below = 0;
      for (int i = 0; i < n; ++i) below += s.at(i, i) < mine || (s.at(i, i) == mine && i < j) ? 1 : 0;
      rank[j] = below;
      values[below] = damped_value(scaled_back<T>(mine, exponent), damping);
    }
  });
  block.each([&](int thread, State&) {
    const int* const rank = s.p;
    for (int e = thread; e < n * n; e += kThreads) {
      if (info != 0) {
        vectors[e] = static_cast<T>(NAN);
      } else {
        vectors[rank[e / n] * n + e % n] = static_cast<T>(s.v[e]);
      }
    }
  });
}

// The largest order up to kJacobiOrder whose matrices take at most this many bytes of shared memory.
inline int32_t small_order_of(int64_t bytes) {
  int32_t n = kJacobiOrder;
  while (n > 0 && jacobi_bytes(n, kJacobiThreads[jacobi_class(n)]) > bytes) --n;
  return n;
}

struct EighShared {
  double partial[kEighThreads];
};

// exponent and info of one matrix, by one block of threads. What it reads, a library reads many times.
template <class T, class Block>
KRONFAC_DEVICE void eigh_measure(Block& block, EighShared& shared, const EighBatch& batch, int32_t number) {
  const EighProblem& p = batch.problem[number];
  const T* f = static_cast<const T*>(p.f);
  const T damping = eigh_damping<T>(batch, p);
  // A warp takes a line of the lower triangle, its lanes neighbours in memory.
  const bool by_rows = p.column_stride <= p.row_stride;
  const int64_t line = by_rows ? p.row_stride : p.column_stride, step = by_rows ? p.column_stride : p.row_stride;
  const double largest = fold_threads<kEighThreads>(
      block, shared.partial,
      [&](int thread) {
        double most = 0;
        for (int64_t a = thread / 32; a < p.n; a += kEighThreads / 32) {
          const int64_t begin = by_rows ? 0 : a, end = by_rows ? a + 1 : p.n;
          KRONFAC_UNROLL_BY(4)
          for (int64_t b = begin + thread % 32; b < end; b += 32) {
            most = Largest{}(most, magnitude(static_cast<double>(f[a * line + b * step])));
          }
        }
        return most;
      },
      Largest{});
  block.each([&](int thread, typename Block::State&) {
    if (thread != 0) return;
    const bool good = finite(largest) && valid_damping(static_cast<double>(damping));
    batch.info[p.index] = good ? 0 : -1;
    batch.exponent[p.index] = good ? exponent_of(largest) : 0;
  });
}

template <class T>
struct EighTile {
  T entry[kEighTile][kEighTile + 1];
};
KRONFAC_BOTH constexpr int32_t eigh_tiles(int32_t n) {
  const int32_t lines = (n + kEighTile - 1) / kEighTile;
  return lines * (lines + 1) / 2;
}

// a := 2^-exponent f, both triangles, or the identity; one tile of the lower triangle and its mirror image.
template <class T, class Block>
KRONFAC_DEVICE void eigh_copy(Block& block, EighTile<T>& tile, const EighBatch& batch, int32_t number) {
  using State = typename Block::State;
  const EighTask task = eigh_task(batch, number);
  const EighProblem& p = task.problem;
  const LowerTile place = lower_tile(task.number);
  const int64_t n = p.n, row0 = place.row * int64_t{kEighTile}, column0 = place.column * int64_t{kEighTile};
  const bool good = batch.info[p.index] == 0;
  const int32_t exponent = batch.exponent[p.index];
  const T* f = static_cast<const T*>(p.f);
  T* a = static_cast<T*>(p.a);
  const bool by_rows = p.column_stride <= p.row_stride;
  block.each([&](int thread, State&) {
    for (int e = thread; e < kEighTile * kEighTile; e += kEighThreads) {
      const int r = by_rows ? e / kEighTile : e % kEighTile, c = by_rows ? e % kEighTile : e / kEighTile;
      const int64_t i = row0 + r, j = column0 + c;
      if (i >= n || j > i) continue;
      T value = i == j ? T(1) : T(0);
      if (good) {
        const double entry = static_cast<double>(f[i * p.row_stride + j * p.column_stride]);
        value = static_cast<T>(std::ldexp(entry, -exponent));
      }
      tile.entry[r][c] = value;
      if (row0 == column0) tile.entry[c][r] = value;
    }
  });
  block.each([&](int thread, State&) {
    for (int e = thread; e < kEighTile * kEighTile; e += kEighThreads) {
      const int r = e / kEighTile, c = e % kEighTile;
      if (row0 + r < n && column0 + c < n) a[(row0 + r) * n + column0 + c] = tile.entry[r][c];
      if (row0 == column0) continue;
      if (row0 + c < n && column0 + r < n) a[(column0 + r) * n + row0 + c] = tile.entry[c][r];
    }
  });
}

// Entries of the eigenvectors that a block of threads copies.
inline constexpr int64_t kEighChunk = 4096;
KRONFAC_BOTH constexpr int32_t eigh_chunks(int32_t n) {
  return static_cast<int32_t>((static_cast<int64_t>(n) * n + kEighChunk - 1) / kEighChunk);
}

// values, vectors and info from what a library left.
template <class T, class Block>
KRONFAC_DEVICE void eigh_results(Block& block, EighShared& shared, const EighBatch& batch, int32_t number) {
  const EighTask task = eigh_task(batch, number);
  const EighProblem& p = task.problem;
  const T damping = eigh_damping<T>(batch, p);
  const int32_t exponent = batch.exponent[p.index];
  const T* w = static_cast<const T*>(p.w);
  const T* a = static_cast<const T*>(p.a);
  T* values = static_cast<T*>(p.values);
  T* vectors = static_cast<T*>(p.vectors);
  // Every block finds out for itself. info of a matrix that failed here may be set already, and says the same.
  const double most = fold_threads<kEighThreads>(
      block, shared.partial,
      [&](int thread) {
        double sum = 0;
        for (int64_t i = thread; i < p.n; i += kEighThreads) {
          sum = Largest{}(sum, magnitude(static_cast<double>(scaled_back<T>(static_cast<double>(w[i]), exponent))));
        }
        return sum;
      },
      Largest{});
  const bool failed = !finite(most) || (p.failed != nullptr && *p.failed != 0);
  const bool good = !failed && batch.info[p.index] == 0;
  block.each([&](int thread, typename Block::State&) {
    if (task.number == 0) {
      for (int64_t i = thread; i < p.n; i += kEighThreads) {
        values[i] =
            good ? damped_value(scaled_back<T>(static_cast<double>(w[i]), exponent), damping) : static_cast<T>(NAN);
      }
    }
    const int64_t begin = task.number * kEighChunk, size = static_cast<int64_t>(p.n) * p.n;
    const int64_t end = begin + kEighChunk < size ? begin + kEighChunk : size;
    for (int64_t e = begin + thread; e < end; e += kEighThreads) vectors[e] = good ? a[e] : static_cast<T>(NAN);
  });
  block.each([&](int thread, typename Block::State&) {
    if (thread == 0 && task.number == 0 && failed && batch.info[p.index] == 0) batch.info[p.index] = 1;
  });
}

// The launches in order; `go` makes them, on the GPU or in a test.
template <class Launch>
void eigh_load_launches(EighBatch& batch, const Launch& go) {
  const auto one = [](int32_t) { return int32_t{1}; };
  go.measure(batch.layout(one));
  go.copy(batch.layout(eigh_tiles));
}
template <class Launch>
void eigh_finish_launches(EighBatch& batch, const Launch& go) {
  go.results(batch.layout(eigh_chunks));
}

}  // namespace kronfac::cuda
