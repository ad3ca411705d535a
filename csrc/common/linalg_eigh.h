// torch's own eigensolver, through the dispatcher.
#pragma once

#include <array>
#include <string>

#include "common/checks.h"

namespace kronfac {

// Calls aten::linalg_eigh on one triangle, "L" or "U"; false when it failed. Never throws: it runs inside parallel
// regions.
inline bool linalg_eigh(const Tensor& matrix, const char* triangle, Tensor& values, Tensor& vectors) noexcept {
  try {
    namespace detail = torch::stable::detail;
    std::array<StableIValue, 2> stack{detail::from(matrix), detail::from(std::string(triangle))};
    if (torch_call_dispatcher("aten::linalg_eigh", "", stack.data(), TORCH_ABI_VERSION) != 0) return false;
    values = detail::to<Tensor>(stack[0]);
    vectors = detail::to<Tensor>(stack[1]);
    return true;
  } catch (...) {
    return false;
  }
}

}  // namespace kronfac
