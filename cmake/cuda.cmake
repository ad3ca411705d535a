# The CUDA operator library, built where KRONFAC_CUDA_SOURCES names sources and nvcc is found (AUTO) or demanded (ON). It
# compiles and links without a GPU and against the CPU build of torch: stable headers and the CUDA runtime suffice.
if(NOT KRONFAC_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "kronfac: KRONFAC_CUDA must be AUTO, ON or OFF, got '${KRONFAC_CUDA}'")
endif()
if(NOT KRONFAC_CUDA_SOURCES)
  if(KRONFAC_CUDA STREQUAL "ON")
    message(FATAL_ERROR "kronfac: KRONFAC_CUDA=ON, but this version has no CUDA operators; use AUTO or OFF")
  endif()
  return()
endif()
if(KRONFAC_CUDA STREQUAL "OFF")
  return()
endif()

include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  if(KRONFAC_CUDA STREQUAL "ON")
    message(FATAL_ERROR "kronfac: KRONFAC_CUDA=ON, but no nvcc was found; install the CUDA toolkit or set CUDACXX")
  endif()
  return()
endif()
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 80-real 90)
endif()
enable_language(CUDA)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.0)
  set(_old "kronfac: the CUDA operators need CUDA 12 or later (C++20), found ${CMAKE_CUDA_COMPILER_VERSION}")
  if(KRONFAC_CUDA STREQUAL "ON")
    message(FATAL_ERROR "${_old}")
  endif()
  message(WARNING "${_old}; they are left out")
  return()
endif()
find_package(CUDAToolkit REQUIRED)
add_library(kronfac_ops_cuda MODULE ${KRONFAC_CUDA_SOURCES})
# The CUDA runtime is linked in, so that the library loads beside a torch of any CUDA release (its libcudart.so has another
# name in each), as cuBLAS and NCCL do. Two runtimes in a process share what matters: both work in the device's primary
# context, which the driver keeps as current for each thread, and streams and addresses are the driver's. What a runtime
# keeps for itself (registered kernels and their attributes, the last error) belongs to this library alone. Its symbols are
# hidden in the archive, so that none is taken from torch's runtime, nor the other way round. The driver must be of this
# toolkit's major release or newer.
set_target_properties(kronfac_ops_cuda PROPERTIES PREFIX "" OUTPUT_NAME _ops_cuda CUDA_STANDARD 20
  CUDA_VISIBILITY_PRESET hidden SKIP_BUILD_RPATH ON CUDA_RUNTIME_LIBRARY Static)
set_target_properties(kronfac_ops_cuda PROPERTIES CXX_VISIBILITY_PRESET hidden VISIBILITY_INLINES_HIDDEN ON)
target_include_directories(kronfac_ops_cuda PRIVATE csrc)
target_compile_options(kronfac_ops_cuda PRIVATE "$<$<COMPILE_LANGUAGE:CXX>:${KRONFAC_WARNINGS}>"
  "$<$<COMPILE_LANGUAGE:CXX>:-fmacro-prefix-map=${CMAKE_CURRENT_SOURCE_DIR}/=>"
  "$<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra>"
  "$<$<AND:$<COMPILE_LANGUAGE:CUDA>,$<BOOL:${KRONFAC_WERROR}>>:-Werror=all-warnings>")
target_compile_definitions(kronfac_ops_cuda PRIVATE USE_CUDA)
target_link_libraries(kronfac_ops_cuda PRIVATE torch_stable_cuda CUDA::cudart_static)
install(TARGETS kronfac_ops_cuda LIBRARY DESTINATION kronfac)
