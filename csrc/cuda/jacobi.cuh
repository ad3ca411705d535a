// The eigendecomposition of a small symmetric matrix in the shared memory of one block of threads: cyclic Jacobi
// rotations from both sides, in double, in the parallel order of a tournament (Brent and Luk, SIAM J. Sci. Stat.
// Comput. 6, 1985): a round pairs every index with another one, and its rotations act on rows and columns of their own.
//
// Why double, also for float32 matrices: sweeps end where the entries beside the diagonal are rounding, so that
// residual and orthogonality are the rounding of the result to its type (in float32 a tenth of LAPACK's); nothing needs
// a second try; and what binds is shared memory and latency. Of the arithmetic only a division for each rotation is
// double's alone: the angle itself may be a float's, because a rotation is as orthogonal as its sine fits its tangent,
// whatever the angle. What a rounded angle leaves beside the diagonal is 1e-7 of what was there, and the next sweep's.
//
// Cost, order n: a round reads and writes half of A (n^2 / 2 numbers) and all of V (n^2), 24 n^2 bytes of shared memory
// at 128 bytes a clock, and waits for the angles (about 300 clocks) and two barriers. There are n - 1 rounds in a sweep
// and 7 to 9 sweeps, up to 22 where eigenvalues repeat or fall over many orders. With 8 of them and 1.8 GHz that is 0.1
// ms for n = 32, 0.3 ms for 64 and 1.4 ms for 112, for as many matrices as have a place on the device at once.
// Where double runs at a 64th of float's rate, arithmetic binds (4 n^2 fused multiply-adds a round): 2 ms for n = 64.
#pragma once

#include <cmath>

#include "cuda/block.cuh"
#include "cuda/launch.h"

namespace kronfac::cuda {

// 22 is the most that was seen; the bound is for what nobody has thought of.
inline constexpr int kMostSweeps = 50;

// Even: with an odd order a last row of zeros, which no rotation touches, sits out in turns.
KRONFAC_BOTH constexpr int jacobi_order(int n) { return n + n % 2; }

// Where things lie in shared memory.
struct Jacobi {
  int n, m;                // the order and the even one
  double *a, *v;           // the lower triangle by rows (m rows); the eigenvectors one after another (n, n)
  double *sine, *tangent;  // of a round's rotations: sin x, and tan(x / 2) (m / 2 each)
  double* partial;         // one number of each thread
  int *p, *q;              // the pairs of a round (m / 2 each)

  KRONFAC_DEVICE double& at(int i, int j) const { return i >= j ? a[i * (i + 1) / 2 + j] : a[j * (j + 1) / 2 + i]; }
};
constexpr int64_t jacobi_bytes(int n, int threads) {
  const int64_t m = jacobi_order(n);
  return (m * (m + 1) / 2 + n * static_cast<int64_t>(n) + m + threads) * static_cast<int64_t>(sizeof(double)) +
         m * static_cast<int64_t>(sizeof(int));
}
KRONFAC_DEVICE Jacobi jacobi_shared(double* memory, int n, int threads) {
  Jacobi s{};
  s.n = n;
  s.m = jacobi_order(n);
  s.a = memory;
  s.v = s.a + s.m * (s.m + 1) / 2;
  s.sine = s.v + n * n;
  s.tangent = s.sine + s.m / 2;
  s.partial = s.tangent + s.m / 2;
  s.p = reinterpret_cast<int*>(s.partial + threads);
  s.q = s.p + s.m / 2;
  return s;
}

// value(thread) of all threads put together, in an order that is always the same.
template <int kThreads, class Block, class Value, class Together>
KRONFAC_DEVICE double fold_threads(Block& block, double* partial, const Value& value, const Together& together) {
  using State = typename Block::State;
  static_assert(kThreads % 32 == 0);
  block.each([&](int thread, State&) { partial[thread] = value(thread); });
  block.each([&](int thread, State&) {
    if (thread >= 32) return;
    double sum = partial[thread];
    for (int i = thread + 32; i < kThreads; i += 32) sum = together(sum, partial[i]);
    partial[thread] = sum;
  });
  double sum = partial[0];
  for (int i = 1; i < 32; ++i) sum = together(sum, partial[i]);
  block.each([](int, State&) {});  // all have read before anybody writes again
  return sum;
}
struct Sum {
  KRONFAC_DEVICE double operator()(double x, double y) const { return x + y; }
};
struct Largest {
  KRONFAC_DEVICE double operator()(double x, double y) const { return y > x ? y : x; }
};

// Pair number k of a round: the last index against all others in turn, these against each other as they sit.
KRONFAC_DEVICE void jacobi_pair(int m, int round, int k, int& p, int& q) {
  const int last = m - 1;
  int x = round + k, y = round - k;
  if (x >= last) x -= last;
  if (y < 0) y += last;
  if (k == 0) x = last;
  p = x < y ? x : y;
  q = x < y ? y : x;
}

// The rotation of pair k that takes a_qp to (nearly) nothing, and what becomes of the three entries that are its own:
//   x_p := cos x_p - sin x_q,  x_q := sin x_p + cos x_q.
KRONFAC_DEVICE void jacobi_angle(const Jacobi& s, int round, int k) {
  // Entries below are left where they are. All together they are less than half of what double converges to, and the
  // square of twice an entry above is a float.
  constexpr double kNegligible = 0x1p-62;
  int p, q;
  jacobi_pair(s.m, round, k, p, q);
  s.p[k] = p;
  s.q[k] = q;
  const double app = s.at(p, p), aqq = s.at(q, q), g = s.at(q, p);
  double tangent = 0, sine = 0;
  if (std::fabs(g) > kNegligible) {
    const double d = aqq - app;
    const float df = static_cast<float>(d), gf = static_cast<float>(2 * g);
    const float whole = (df < 0 ? -gf : gf) / (std::fabs(df) + std::sqrt(df * df + gf * gf));
    tangent = static_cast<double>(whole / (1.0f + std::sqrt(1.0f + whole * whole)));
    sine = 2 * tangent / (1 + tangent * tangent);
    const double cosine = 1 - sine * tangent;
    // By differences: what is small stays accurate to its own size.
    const double change = sine * (sine * d - 2 * cosine * g);
    s.at(p, p) = app + change;
    s.at(q, q) = aqq - change;
    s.at(q, p) = (cosine - sine) * (cosine + sine) * g - cosine * sine * d;
  }
  s.sine[k] = sine;
  s.tangent[k] = tangent;
}

KRONFAC_DEVICE void jacobi_rotate(double sine, double tangent, double& x, double& y) {
  const double old = x;
  x -= sine * (y + tangent * x);
  y += sine * (old - tangent * y);
}

// The four entries that pairs k > l have in common, rotated from both sides.
KRONFAC_DEVICE void jacobi_block(const Jacobi& s, int k, int l) {
  const double sine_k = s.sine[k], sine_l = s.sine[l];
  if (sine_k == 0 && sine_l == 0) return;
  const double tangent_k = s.tangent[k], tangent_l = s.tangent[l];
  double &pp = s.at(s.p[k], s.p[l]), &pq = s.at(s.p[k], s.q[l]);
  double &qp = s.at(s.q[k], s.p[l]), &qq = s.at(s.q[k], s.q[l]);
  double x_pp = pp, x_pq = pq, x_qp = qp, x_qq = qq;
  jacobi_rotate(sine_k, tangent_k, x_pp, x_qp);
  jacobi_rotate(sine_k, tangent_k, x_pq, x_qq);
  jacobi_rotate(sine_l, tangent_l, x_pp, x_pq);
  jacobi_rotate(sine_l, tangent_l, x_qp, x_qq);
  pp = x_pp;
  pq = x_pq;
  qp = x_qp;
  qq = x_qq;
}

// The rotations of a round. The order is at most kOrder.
template <int kOrder, int kThreads, class Block>
KRONFAC_DEVICE void jacobi_round(Block& block, const Jacobi& s, int round) {
  using State = typename Block::State;
  const int half = s.m / 2;
  block.each([&](int thread, State&) {
    for (int k = thread; k < half; k += kThreads) jacobi_angle(s, round, k);
  });
  block.each([&](int thread, State&) {
    // Rows k and half - k of the strict lower triangle of pairs have `half` entries together: lanes are side by side in
    // columns, whose places in the packed triangle fall into different banks (nearly: triangular numbers).
    const int entries = half / 2 * half;
    for (int e = thread; e < entries; e += kThreads) {
      const int row = e / half + 1, column = e % half;
      const bool first = column < row;
      if (first || 2 * row < half) jacobi_block(s, first ? row : half - row, first ? column : column - row);
    }
    // A warp takes a pair, its lanes the entries of both eigenvectors, all on their way before the first is written.
    constexpr int kTogether = (kOrder + 31) / 32;
    for (int k = thread / 32; k < half; k += kThreads / 32) {
      const double sine = s.sine[k], tangent = s.tangent[k];
      if (sine == 0) continue;
      double* const p = s.v + s.p[k] * s.n + thread % 32;
      double* const q = s.v + s.q[k] * s.n + thread % 32;
      const int left = s.n - thread % 32;
      double x[kTogether], y[kTogether];
      KRONFAC_UNROLL
      for (int e = 0; e < kTogether; ++e) {
        x[e] = 32 * e < left ? p[32 * e] : 0;
        y[e] = 32 * e < left ? q[32 * e] : 0;
      }
      KRONFAC_UNROLL
      for (int e = 0; e < kTogether; ++e) {
        jacobi_rotate(sine, tangent, x[e], y[e]);
        if (32 * e >= left) continue;
        p[32 * e] = x[e];
        q[32 * e] = y[e];
      }
    }
  });
}

// a := diagonal, v := eigenvectors, where the entries beside the diagonal are at most tolerance * |A| together (in
// Frobenius norms) in the end; false when they are not. a: lower triangle, largest entry of the order of 1; v:
// identity.
template <int kOrder, int kThreads, class Block>
KRONFAC_DEVICE bool jacobi_sweeps(Block& block, const Jacobi& s, double tolerance) {
  const double diagonal = fold_threads<kThreads>(
      block, s.partial,
      [&](int thread) {
        double sum = 0;
        for (int i = thread; i < s.n; i += kThreads) sum += s.at(i, i) * s.at(i, i);
        return sum;
      },
      Sum{});
  double norm = -1;
  for (int sweep = 0;; ++sweep) {
    const double beside = fold_threads<kThreads>(
        block, s.partial,
        [&](int thread) {
          double sum = 0;
          for (int i = thread / 32; i < s.n; i += kThreads / 32) {
            for (int j = thread % 32; j < i; j += 32) sum += s.at(i, j) * s.at(i, j);
          }
          return 2 * sum;
        },
        Sum{});
    if (norm < 0) norm = diagonal + beside;
    if (beside <= tolerance * tolerance * norm) return true;
    if (sweep == kMostSweeps) return false;
    for (int round = 0; round < s.m - 1; ++round) jacobi_round<kOrder, kThreads>(block, s, round);
  }
}

}  // namespace kronfac::cuda
