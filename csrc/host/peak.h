// The measured peak of one core, for benchmarks.
#pragma once

#include <pybind11/pybind11.h>

namespace kronfac::host {

// Adds peak_flops, copy_bandwidth and read_bandwidth to the module.
void define_peak(pybind11::module_& m);

}  // namespace kronfac::host
