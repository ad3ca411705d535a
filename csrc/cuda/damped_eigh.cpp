// Eigendecompositions of F_i + damping_i I for a ragged list of symmetric matrices.
#include "cuda/damped_eigh.h"

#include <array>
#include <numeric>
#include <optional>
#include <tuple>

#include "common/linalg_eigh.h"
#include "cuda/glue.h"
#include "cuda/solver.h"

namespace kronfac::cuda {
namespace {

// Up to this order cuSOLVER's batched solver is as fast as its solver for one matrix, or faster, even for one matrix
// (measured in pytorch#175403); beyond, torch chooses.
constexpr int64_t kLibraryOrder = 2048;
// Matrices and entries of one call of it: its workspace grows with both.
constexpr int64_t kLibraryMatrices = 256;
constexpr int64_t kLibraryEntries = int64_t{1} << 27;

class DampedEigh {
 public:
  DampedEigh(const std::vector<Tensor>& factors, const Tensor& damping)
      : device_(damping), factors_(factors), damping_(damping), type_(damping.scalar_type()) {
    for (const Tensor& factor : factors) {
      values_.push_back(empty_like(damping, {factor.size(0)}, type_));
      vectors_.push_back(empty_columns(factor.size(0)));
    }
    const int64_t count = static_cast<int64_t>(factors.size());
    info_ = empty_like(damping, {count}, ScalarType::Int);
    info_ = torch::stable::zero_(info_);
    exponent_ = empty_like(damping, {count}, ScalarType::Int);
  }

  std::tuple<std::vector<Tensor>, std::vector<Tensor>, Tensor> run() {
    // By descending order: equal ones come together, and so do those of a class.
    std::vector<size_t> order(factors_.size());
    std::iota(order.begin(), order.end(), size_t{0});
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return size(a) > size(b); });
    const int64_t small_order = order.empty() ? 0 : eigh_small_order();
    size_t begin = 0;
    while (begin < order.size() && size(order[begin]) > 0) {
      const int64_t n = size(order[begin]);
      const bool small = n <= small_order;
      const int64_t most = small ? static_cast<int64_t>(order.size())
                                 : std::clamp<int64_t>(kLibraryEntries / (n * n), 1, kLibraryMatrices);
      size_t end = begin;
      while (end < order.size() && static_cast<int64_t>(end - begin) < most && size(order[end]) > 0 &&
             (small ? jacobi_class(size(order[end])) == jacobi_class(n) : size(order[end]) == n)) {
        ++end;
      }
      const std::vector<size_t> members(order.begin() + static_cast<std::ptrdiff_t>(begin),
                                        order.begin() + static_cast<std::ptrdiff_t>(end));
      small ? solve_small(members) : solve_large(members, n);
      begin = end;
    }
    return {values_, vectors_, info_};
  }

 private:
  int64_t size(size_t i) const { return factors_[i].size(0); }
  Element element() const { return element_of(damping_); }

  // Eigenvectors are column-major, as the libraries leave them.
  Tensor empty_columns(int64_t n) const {
    const std::array<int64_t, 2> sizes{n, n}, strides{1, std::max<int64_t>(n, 1)};
    AtenTensorHandle handle = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_empty_strided(2, sizes.data(), strides.data(),
                                 type_ == ScalarType::Double ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32(),
                                 aoti_torch_device_type_cuda(), damping_.get_device_index(), &handle));
    return Tensor(handle);
  }

  EighProblem problem(size_t i) {
    const Tensor& f = factors_[i];
    EighProblem p{};
    p.f = f.const_data_ptr();
    p.row_stride = f.stride(0);
    p.column_stride = f.stride(1);
    p.values = values_[i].mutable_data_ptr();
    p.vectors = vectors_[i].mutable_data_ptr();
    p.n = static_cast<int32_t>(size(i));
    p.index = static_cast<int32_t>(i);
    return p;
  }

  // launch(type, batch, stream) for as many problems at a time as fit among a kernel's arguments.
  template <class Launch>
  void launch(const std::vector<EighProblem>& problems, const Launch& launch_batch) {
    EighBatch batch{};
    batch.damping = damping_.const_data_ptr();
    batch.damping_stride = damping_.dim() == 0 ? 0 : damping_.stride(0);
    batch.info = info_.mutable_data_ptr<int32_t>();
    batch.exponent = exponent_.mutable_data_ptr<int32_t>();
    for (const EighProblem& p : problems) {
      batch.problem[batch.count++] = p;
      if (batch.count < kEighMatrices) continue;
      launch_batch(element(), batch, device_.stream());
      batch.count = 0;
    }
    if (batch.count > 0) launch_batch(element(), batch, device_.stream());
  }

  void solve_small(const std::vector<size_t>& members) {
    std::vector<EighProblem> problems;
    for (const size_t i : members) problems.push_back(problem(i));
    launch(problems, eigh_small);
  }

  // Matrices of one order, too large for shared memory.
  void solve_large(const std::vector<size_t>& members, int64_t n) {
    const int64_t count = static_cast<int64_t>(members.size());
    if (n > kLibraryOrder || !solver_available()) return solve_one_by_one(members, n);
    const Tensor a = empty_like(damping_, {count, n, n}, type_), w = empty_like(damping_, {count, n}, type_);
    const Tensor failed = empty_like(damping_, {count}, ScalarType::Int);
    const int64_t bytes = element_bytes(type_);
    std::vector<EighProblem> problems;
    for (int64_t at = 0; at < count; ++at) {
      problems.push_back(problem(members[static_cast<size_t>(at)]));
      problems.back().a = static_cast<std::byte*>(a.mutable_data_ptr()) + at * n * n * bytes;
      problems.back().w = static_cast<std::byte*>(w.mutable_data_ptr()) + at * n * bytes;
      problems.back().failed = failed.const_data_ptr<int32_t>() + at;
    }
    launch(problems, eigh_load);
    Tensor workspace;
    const bool solved = syev_batched(
        {element(), n, count, a.mutable_data_ptr(), w.mutable_data_ptr(), failed.mutable_data_ptr<int32_t>()},
        damping_.get_device_index(), device_.stream(), [&](size_t size_in_bytes) {
          workspace = empty_like(damping_, {static_cast<int64_t>(size_in_bytes)}, ScalarType::Byte);
          return workspace.mutable_data_ptr();
        });
    solved ? launch(problems, eigh_finish) : solve_one_by_one(members, n);
  }

  // By torch, which waits for the device after each, to know whether it converged.
  void solve_one_by_one(const std::vector<size_t>& members, int64_t n) {
    for (const size_t i : members) {
      const Tensor a = empty_columns(n);
      EighProblem p = problem(i);
      p.a = a.mutable_data_ptr();
      launch({p}, eigh_load);
      Tensor failed = empty_like(damping_, {1}, ScalarType::Int);
      Tensor w, v;
      const bool solved = linalg_eigh(a, "L", w, v);
      torch::stable::fill_(failed, solved ? 0.0 : 1.0);
      p.failed = failed.const_data_ptr<int32_t>();
      if (solved) {
        STD_TORCH_CHECK(
            v.stride(0) == 1 && v.stride(1) == n && w.stride(0) == 1,
            "kronfac::damped_eigh: expected column-major eigenvectors from aten::linalg_eigh, got strides (",
            v.stride(0), ", ", v.stride(1), ")");
        p.a = v.mutable_data_ptr();
        p.w = w.mutable_data_ptr();
      } else {
        p.w = p.a;  // is read, and comes to nothing
      }
      launch({p}, eigh_finish);
    }
  }

  const OnDeviceOf device_;
  const std::vector<Tensor>& factors_;
  const Tensor& damping_;
  const ScalarType type_;
  std::vector<Tensor> values_, vectors_;
  Tensor info_, exponent_;
};

// `basis` is checked, and otherwise left aside: whether refining it held is known on the device alone, so that the full
// solution would have to follow in any case.
std::tuple<std::vector<Tensor>, std::vector<Tensor>, Tensor> damped_eigh(std::vector<Tensor> factors, Tensor damping,
                                                                         std::optional<std::vector<Tensor>> basis) {
  check_damped_eigh(factors, damping, basis);
  return DampedEigh(factors, damping).run();
}

}  // namespace
}  // namespace kronfac::cuda

STABLE_TORCH_LIBRARY_IMPL(kronfac, CUDA, m) {
  kronfac::implement(m, "damped_eigh", TORCH_BOX(&kronfac::cuda::damped_eigh));
}
