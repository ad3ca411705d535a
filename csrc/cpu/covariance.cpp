// out <- decay * out + scale * [x 1]^T [x 1].
#include "common/arguments.h"
#include "cpu/symmetric.h"

namespace kronfac::cpu {
namespace {

// Packed panels of a flat matrix take this much at most: what several cores share of a cache, and Scratch keeps.
constexpr int64_t kFlatBytes = int64_t{8} << 20;
// Fewer entries are packed by one thread: waiting for others to wake would take longer.
constexpr int64_t kPackedAlone = int64_t{1} << 18;
// A thread gets this many multiply-adds at least.
constexpr double kLeastWork = 5e5;

template <class T>
void flat_covariance(const SymmetricOutput& out, const kernels::CovarianceInput& input, int64_t m, T decay, T scale,
                     int64_t threads) {
  const Kernels<T> kernels;
  const kernels::CovarianceFlat<T>& flat = kernels.covariance_flat;
  const int64_t nr = kernels.blocks.nr;
  const Scratch scratch(flat.packed(m, out.d) * static_cast<int64_t>(sizeof(T)));
  T* panels = scratch.at<T>();
  T* data = out.tensor.mutable_data_ptr<T>();
  const int64_t packers = threads == 1 || m * out.d < kPackedAlone ? 1 : threads,
                columns = (out.d / packers + nr) / nr * nr;
  const auto pack = [&](int64_t part) {
    const int64_t lo = std::min(out.d, part * columns), hi = std::min(out.d, lo + columns);
    if (lo < hi) flat.pack(input, m, out.d, lo, hi, panels);
  };
  if (packers == 1) {
    pack(0);
  } else {
    torch::stable::parallel_for(0, packers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) pack(part);
    });
  }
  if (threads == 1) {
    flat.rows(panels, m, out.d, 0, out.d, decay, scale, data, out.row_stride, out.col_stride);
    return;
  }
  const std::vector<int64_t> bounds = symmetric::panels(out.d, threads, nr);
  torch::stable::parallel_for(0, static_cast<int64_t>(bounds.size()) - 1, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      flat.rows(panels, m, out.d, bounds[static_cast<size_t>(p)], bounds[static_cast<size_t>(p + 1)], decay, scale,
                data, out.row_stride, out.col_stride);
    }
  });
}

template <class T>
void covariance_into(const Tensor& out, const Tensor& x, double decay, double scale) {
  const Kernels<T> kernels;
  const kernels::CovarianceInput input{matrix_of(x), x.size(1)};
  const SymmetricOutput target = symmetric_output(out, 1);
  const int64_t m = x.size(0), d = target.d;
  const double work = static_cast<double>(m) * static_cast<double>(d) * static_cast<double>(d + 1) / 2;
  const int64_t threads = worthwhile_threads(work, kLeastWork);
  const bool narrow = d <= kernels::kNarrowColumns;
  const auto& flat = kernels.covariance_flat;
  const int64_t most_rows = input.x.type == kernels::Element::bf16 ? flat.most_bfloat_rows : flat.most_rows;
  if (!narrow && m > 0 && m <= most_rows && flat.packed(m, d) <= kFlatBytes / static_cast<int64_t>(sizeof(T))) {
    return flat_covariance<T>(target, input, m, static_cast<T>(decay), static_cast<T>(scale), threads);
  }
  const kernels::CovarianceUpdate<T> update = narrow ? kernels.covariance_narrow : kernels.covariance;
  symmetric_sum<T>(target, m, decay, scale, threads,
                   [&](int64_t, int64_t k0, int64_t k1, int64_t row0, int64_t row1, T* sum, int64_t ld, void* scratch) {
                     update(input, k0, k1, row0, row1, sum, ld, scratch);
                   });
}

void covariance_into(const Tensor& out, const Tensor& x, double decay, double scale) {
  if (out.scalar_type() == ScalarType::Double) {
    covariance_into<double>(out, x, decay, scale);
  } else {
    covariance_into<float>(out, x, decay, scale);
  }
}

Tensor covariance(Tensor x, bool bias, double scale) {
  check_covariance_input("covariance", x, scale);
  const int64_t d = x.size(1) + (bias ? 1 : 0);
  const Tensor out = empty_matrix(d, d, accumulation_type(x.scalar_type()));
  covariance_into(out, x, 0, scale);
  return out;
}

void covariance_(Tensor out, Tensor x, bool bias, double decay, double scale) {
  check_covariance(out, x, bias, decay, scale);
  covariance_into(out, apart_from(out, x), decay, scale);
}

}  // namespace
}  // namespace kronfac::cpu

STABLE_TORCH_LIBRARY_IMPL(kronfac, CPU, m) {
  kronfac::implement(m, "covariance", TORCH_BOX(&kronfac::cpu::covariance));
  kronfac::implement(m, "covariance_", TORCH_BOX(&kronfac::cpu::covariance_));
}
