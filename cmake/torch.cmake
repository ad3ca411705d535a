# Torch as headers and two import libraries. find_package(Torch) is avoided: it fails against CUDA wheels on machines without a
# full toolkit, and drags in far more than the stable ABI needs.
set(KRONFAC_TORCH_ROOT "" CACHE PATH "directory of the torch package to build against; empty asks Python")
set(KRONFAC_TORCH_TARGET "0x020b000000000000" CACHE STRING "oldest LibTorch that the operator libraries load in (2.11)")

if(NOT KRONFAC_TORCH_ROOT)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c
            "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')"
    OUTPUT_VARIABLE KRONFAC_TORCH_ROOT OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
endif()
if(NOT EXISTS "${KRONFAC_TORCH_ROOT}/include/torch/csrc/stable/library.h")
  message(FATAL_ERROR "kronfac: no torch >= 2.11 found (looked at '${KRONFAC_TORCH_ROOT}'); "
                      "install it, or set KRONFAC_TORCH_ROOT to the directory of the torch package")
endif()

# The version is recorded in the host module, so that `kronfac info` can say what the operators were compiled against.
set(KRONFAC_TORCH_VERSION "unknown")
if(EXISTS "${KRONFAC_TORCH_ROOT}/version.py")
  file(STRINGS "${KRONFAC_TORCH_ROOT}/version.py" _line REGEX "^__version__ = ")
  string(REGEX REPLACE ".*'([^']*)'.*" "\\1" KRONFAC_TORCH_VERSION "${_line}")
endif()

set(_suffix "${CMAKE_SHARED_LIBRARY_SUFFIX}")
add_library(torch_stable INTERFACE)
target_include_directories(torch_stable SYSTEM INTERFACE "${KRONFAC_TORCH_ROOT}/include")
target_compile_definitions(torch_stable INTERFACE TORCH_TARGET_VERSION=${KRONFAC_TORCH_TARGET})
target_link_libraries(torch_stable INTERFACE "${KRONFAC_TORCH_ROOT}/lib/libtorch_cpu${_suffix}")

# libtorch carries no symbols of its own; the NEEDED entry alone brings libtorch_cuda into scope where torch is a CUDA build.
add_library(torch_stable_cuda INTERFACE)
target_link_libraries(torch_stable_cuda INTERFACE torch_stable
  "-Wl,--push-state,--no-as-needed" "${KRONFAC_TORCH_ROOT}/lib/libtorch${_suffix}" "-Wl,--pop-state")
