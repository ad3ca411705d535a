// The only header that reaches torch: the LibTorch stable ABI, so that one wheel serves torch 2.11 and later.
#pragma once

#include <cstdint>
#include <string>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

namespace kronfac {

// Registers the kernel of an operator, and of its overload `detached` (csrc/ops.cpp).
template <class Library>
void implement(Library& m, const char* name, void (*kernel)(StableIValue*, uint64_t, uint64_t)) {
  m.impl(name, kernel);
  m.impl((std::string(name) + ".detached").c_str(), kernel);
}

}  // namespace kronfac
