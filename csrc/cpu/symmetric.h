// How a symmetric sum is shared among threads: the half of covariance and conv_covariance that knows no Y.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "common/overlap.h"
#include "cpu/parallel.h"
#include "cpu/typed.h"

namespace kronfac::cpu {

// Where the result goes: groups of (d, d) matrices of any strides.
struct SymmetricOutput {
  Tensor tensor;
  int64_t d, groups, group_stride, row_stride, col_stride;
};

// Views a tensor (d, d), or (groups, d, d) where there are several groups.
inline SymmetricOutput symmetric_output(const Tensor& out, int64_t groups) {
  const int64_t first = groups > 1 ? 1 : 0;
  return {out, out.size(first), groups, groups > 1 ? out.stride(0) : 0, out.stride(first), out.stride(first + 1)};
}

namespace symmetric {

// Sums of one panel of rows take this much memory at most where d allows it: small enough for a cache that threads
// share.
constexpr int64_t kPanelBytes = int64_t{4} << 20;
// Rows of a panel at least, whatever d is: every panel packs its input anew, at the cost of about ten rows.
constexpr int64_t kLeastRows = 384;
// Threads share k rather than rows where each gets this much of it and their sums take no more memory than this.
constexpr int64_t kLeastSplit = 512, kSplitBytes = int64_t{64} << 20;

// Boundaries of panels of rows with equal areas under the diagonal, at multiples of nr.
inline std::vector<int64_t> panels(int64_t d, int64_t count, int64_t nr) {
  std::vector<int64_t> bounds{0};
  for (int64_t p = 1; p <= count; ++p) {
    const double share = std::sqrt(static_cast<double>(p) / static_cast<double>(count));
    const int64_t row =
        p == count ? d
                   : static_cast<int64_t>(std::llround(share * static_cast<double>(d) / static_cast<double>(nr))) * nr;
    if (row > bounds.back()) bounds.push_back(std::min(row, d));
  }
  return bounds;
}

}  // namespace symmetric

// out := decay * out + scale * S for every group. update(group, k0, k1, row0, row1, sum, ld, scratch) is a kernel as
// described in kernels/symmetric.h. The sharing depends on sizes and `threads` alone, and sums are added in a fixed
// order.
template <class T, class Update>
void symmetric_sum(const SymmetricOutput& out, int64_t k, double decay, double scale, int64_t threads,
                   const Update& update) {
  const Kernels<T> kernels;
  const auto& symmetric = kernels.symmetric;
  const int64_t d = out.d, groups = out.groups;
  const int64_t size = static_cast<int64_t>(sizeof(T)), nr = kernels.blocks.nr, mr = kernels.blocks.mr;
  if (d == 0 || groups == 0) return;
  const auto up = [](int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; };
  const int64_t ld = up(d, nr);
  const auto sum_bytes = [&](int64_t rows) { return Scratch::rounded(up(rows, mr) * ld * size); };
  T* const data = out.tensor.mutable_data_ptr<T>();
  const T keep = static_cast<T>(decay), weight = static_cast<T>(scale);
  const auto finish = [&](int64_t group, int64_t row0, int64_t row1, T* sums, int64_t count, int64_t distance) {
    symmetric.finish(row0, row1, sums, count, distance, ld, keep, weight, data + group * out.group_stride,
                     out.row_stride, out.col_stride);
  };

  const int64_t most_rows = std::max(symmetric::kLeastRows, symmetric::kPanelBytes / (ld * size)) / nr * nr;
  int64_t count = (d + most_rows - 1) / most_rows;
  const int64_t wanted = (threads + groups - 1) / groups;
  const int64_t splits =
      std::min({wanted, k / symmetric::kLeastSplit, symmetric::kSplitBytes / (groups * sum_bytes(d))});
  if (wanted > 1 && splits > 1) {
    const int64_t bytes = sum_bytes(d), length = (k + splits - 1) / splits;
    const int64_t scratch_bytes = Scratch::rounded(symmetric.scratch(length, 0, d));
    const Scratch sums(bytes * groups * splits), scratch(scratch_bytes * threads);
    std::vector<int64_t> tasks(static_cast<size_t>(groups * splits));
    std::iota(tasks.begin(), tasks.end(), 0);
    run_tasks(tasks, threads, [&](int64_t task, int64_t worker) {
      const int64_t group = task / splits, k0 = task % splits * length;
      update(group, std::min(k, k0), std::min(k, k0 + length), 0, d, sums.at<T>(task * bytes), ld,
             scratch.at(worker * scratch_bytes));
    });
    const std::vector<int64_t> bounds = symmetric::panels(d, threads, nr);
    torch::stable::parallel_for(0, static_cast<int64_t>(bounds.size()) - 1, 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        const int64_t row0 = bounds[static_cast<size_t>(p)], row1 = bounds[static_cast<size_t>(p + 1)];
        for (int64_t group = 0; group < groups; ++group) {
          finish(group, row0, row1, sums.at<T>(group * splits * bytes) + row0 * ld, splits, bytes / size);
        }
      }
    });
    return;
  }

  if (count == 1 && groups == 1 && threads == 1) {  // no lists for what may be one small matrix
    const int64_t bytes = sum_bytes(d);
    const Scratch memory(bytes + symmetric.scratch(k, 0, d));
    update(0, 0, k, 0, d, memory.at<T>(), ld, memory.at(bytes));
    return finish(0, 0, d, memory.at<T>(), 1, 0);
  }
  if (wanted > 1) count = std::max(count, std::min(2 * wanted, std::max<int64_t>(1, d / nr)));
  const std::vector<int64_t> bounds = symmetric::panels(d, count, nr);
  count = static_cast<int64_t>(bounds.size()) - 1;
  int64_t bytes = 0, scratch_bytes = 0;
  for (int64_t p = 0; p < count; ++p) {
    const int64_t row0 = bounds[static_cast<size_t>(p)], row1 = bounds[static_cast<size_t>(p + 1)];
    bytes = std::max(bytes, sum_bytes(row1 - row0));
    scratch_bytes = std::max(scratch_bytes, Scratch::rounded(symmetric.scratch(k, row0, row1)));
  }
  const int64_t workers = std::min(threads, groups * count);
  const Scratch memory((bytes + scratch_bytes) * workers);
  std::vector<int64_t> tasks(static_cast<size_t>(groups * count));
  std::iota(tasks.begin(), tasks.end(), 0);
  run_tasks(tasks, workers, [&](int64_t task, int64_t worker) {
    const int64_t group = task / count;
    const size_t p = static_cast<size_t>(task % count);
    T* sum = memory.at<T>(worker * (bytes + scratch_bytes));
    update(group, 0, k, bounds[p], bounds[p + 1], sum, ld, memory.at(worker * (bytes + scratch_bytes) + bytes));
    finish(group, bounds[p], bounds[p + 1], sum, 1, 0);
  });
}

}  // namespace kronfac::cpu
