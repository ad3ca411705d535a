#include "host/peak.h"

#include <chrono>
#include <cmath>
#include <memory>
#include <new>
#include <string>

#include "kernels/table.h"

namespace py = pybind11;

namespace kronfac::host {
namespace {

constexpr std::align_val_t kPage{4096};

struct Release {
  void operator()(float* p) const { ::operator delete(p, kPage); }
};
using Buffer = std::unique_ptr<float[], Release>;

// Written once by the calling thread, so that every page is there, and near to the core that will use it.
Buffer allocate(int64_t n) {
  Buffer buffer(static_cast<float*>(::operator new(static_cast<size_t>(n) * sizeof(float), kPage)));
  for (int64_t i = 0; i < n; ++i) buffer[static_cast<size_t>(i)] = 1.0f;
  return buffer;
}

const kernels::Table& find(const char* function, const std::string& isa) {
  const kernels::Table* table = kernels::find_table(isa.c_str());
  if (table == nullptr) {
    throw py::value_error(std::string(function) + ": isa: expected one of kronfac._host.instruction_sets(), got '" +
                          isa + "'");
  }
  return *table;
}

void check_seconds(const char* function, double seconds) {
  if (!(seconds > 0) || !std::isfinite(seconds)) {
    throw py::value_error(std::string(function) + ": seconds: expected a positive number, got " +
                          std::to_string(seconds));
  }
}

// Work per second of `chunk`, which returns how much it did, over at least `seconds`.
template <class Chunk>
double rate(double seconds, Chunk chunk) {
  using Clock = std::chrono::steady_clock;
  chunk();  // warms caches and wakes the vector units
  double done = 0, elapsed = 0;
  const Clock::time_point start = Clock::now();
  do {
    done += chunk();
    elapsed = std::chrono::duration<double>(Clock::now() - start).count();
  } while (elapsed < seconds);
  return done / elapsed;
}

template <class T>
double multiply_adds(const kernels::PeakKernels<T>& peak, double seconds) {
  std::unique_ptr<T[]> state(new T[static_cast<size_t>(peak.state_size)]);
  for (int64_t i = 0; i < peak.state_size; ++i) state[static_cast<size_t>(i)] = T(0.5);
  return rate(seconds, [&] { return static_cast<double>(peak.multiply_add(20000, state.get())); });
}

double peak_flops(const std::string& isa, const std::string& dtype, double seconds) {
  const kernels::Table& table = find("peak_flops", isa);
  check_seconds("peak_flops", seconds);
  if (dtype != "float32" && dtype != "float64") {
    throw py::value_error("peak_flops: dtype: expected 'float32' or 'float64', got '" + dtype + "'");
  }
  const py::gil_scoped_release release;
  return dtype == "float32" ? multiply_adds(*table.peak_f32, seconds) : multiply_adds(*table.peak_f64, seconds);
}

int64_t check_bytes(const char* function, int64_t bytes) {
  if (bytes < int64_t{1} << 16) {
    throw py::value_error(std::string(function) + ": bytes: expected at least 65536, got " + std::to_string(bytes));
  }
  return bytes / static_cast<int64_t>(sizeof(float));
}

double copy_bandwidth(const std::string& isa, int64_t bytes, double seconds) {
  const kernels::Table& table = find("copy_bandwidth", isa);
  check_seconds("copy_bandwidth", seconds);
  const int64_t n = check_bytes("copy_bandwidth", bytes);
  const py::gil_scoped_release release;
  const Buffer from = allocate(n), to = allocate(n);
  return rate(seconds, [&] {
    table.peak_f32->copy(from.get(), to.get(), n);
    return 2.0 * static_cast<double>(n) * sizeof(float);
  });
}

double read_bandwidth(const std::string& isa, int64_t bytes, double seconds) {
  const kernels::Table& table = find("read_bandwidth", isa);
  check_seconds("read_bandwidth", seconds);
  const int64_t n = check_bytes("read_bandwidth", bytes);
  const py::gil_scoped_release release;
  const Buffer from = allocate(n);
  volatile float sink = 0;  // the sums are wanted by nobody
  return rate(seconds, [&] {
    sink = table.peak_f32->sum(from.get(), n);
    return static_cast<double>(n) * sizeof(float);
  });
}

}  // namespace

void define_peak(py::module_& m) {
  m.def("peak_flops", &peak_flops, py::arg("isa"), py::arg("dtype"), py::arg("seconds"),
        "Floating-point operations per second of one core in a loop of multiply-adds in registers; the GIL is free "
        "meanwhile, so that several threads can be measured at once.");
  m.def("copy_bandwidth", &copy_bandwidth, py::arg("isa"), py::arg("bytes"), py::arg("seconds"),
        "Bytes per second, read and written, of one core that copies an array of `bytes`; the GIL is free meanwhile.");
  m.def("read_bandwidth", &read_bandwidth, py::arg("isa"), py::arg("bytes"), py::arg("seconds"),
        "Bytes per second of one core that sums an array of `bytes`; the GIL is free meanwhile.");
}

}  // namespace kronfac::host
