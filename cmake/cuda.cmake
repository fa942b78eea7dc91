# The CUDA kernels, a library of their own: mnp_fast/_cuda.so. Only nvcc is needed to build it, no GPU
# and no torch with CUDA. Sets cuda_left_out to why it is not built, if it is not.

set(MNP_FAST_CUDA
    AUTO
    CACHE STRING "Build the CUDA kernels: ON, OFF, or AUTO (where torch and a toolkit allow it)")
if(NOT MNP_FAST_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "MNP_FAST_CUDA must be AUTO, ON or OFF, not '${MNP_FAST_CUDA}'.")
endif()

set(cuda_left_out "")
if(MNP_FAST_CUDA STREQUAL "OFF")
  set(cuda_left_out "mnp_fast was built with MNP_FAST_CUDA=OFF")
elseif(MNP_FAST_CUDA STREQUAL "AUTO" AND NOT torch_cuda)
  set(cuda_left_out "mnp_fast was built against torch ${torch_version}, which has no CUDA")
else()
  set(nvcc $ENV{CUDACXX})
  if(NOT nvcc)
    find_program(
      nvcc nvcc
      HINTS ENV CUDA_HOME ENV CUDA_PATH /usr/local/cuda
      PATH_SUFFIXES bin)
  endif()
  if(NOT nvcc)
    set(cuda_left_out "mnp_fast was built without nvcc, which was not found")
  else()
    execute_process(COMMAND ${nvcc} --version OUTPUT_VARIABLE nvcc_says)
    string(REGEX MATCH "release ([0-9]+)\\.([0-9]+)" nvcc_release "${nvcc_says}")
    set(toolkit_major ${CMAKE_MATCH_1})
    set(toolkit ${CMAKE_MATCH_1}.${CMAKE_MATCH_2})
    string(REGEX MATCH "^[0-9]+" torch_cuda_major "${torch_cuda}")
    if(toolkit VERSION_LESS 12.1)
      set(cuda_left_out "mnp_fast needs CUDA 12.1 or later, and was built with nvcc ${toolkit}")
    elseif(torch_cuda AND NOT toolkit_major EQUAL torch_cuda_major)
      set(cuda_left_out
          "mnp_fast was built with nvcc ${toolkit}, but torch ${torch_version} is for CUDA ${torch_cuda}"
      )
    endif()
  endif()
  if(cuda_left_out AND MNP_FAST_CUDA STREQUAL "ON")
    message(FATAL_ERROR "MNP_FAST_CUDA=ON, but the CUDA kernels cannot be built: ${cuda_left_out}.")
  endif()
endif()

if(cuda_left_out)
  message(STATUS "No CUDA kernels: ${cuda_left_out}")
  return()
endif()

# Devices of a later compute capability compile the last one's intermediate code when they load it.
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  if(toolkit VERSION_LESS 12.8)
    set(CMAKE_CUDA_ARCHITECTURES 80-real 90)
  else()
    set(CMAKE_CUDA_ARCHITECTURES 80-real 90-real 100)
  endif()
endif()
set(CMAKE_CUDA_COMPILER ${nvcc})
enable_language(CUDA)
message(STATUS "CUDA kernels by nvcc ${toolkit}, for ${CMAKE_CUDA_ARCHITECTURES}")

add_library(
  _cuda MODULE
  csrc/cuda/epilogue.cu
  csrc/cuda/epilogue_grad.cu
  csrc/cuda/magnitude.cu
  csrc/cuda/mask_update.cu
  csrc/ops/tensors.cpp
  csrc/ops/cuda/library.cpp
  csrc/ops/cuda/masked_affine.cpp
  csrc/ops/cuda/neuron_magnitude.cpp
  csrc/ops/cuda/mask_update.cpp)
use_torch(_cuda)
# What torch has for CUDA is in a library that a torch without CUDA lacks; in both, this one names all
# that there are.
find_library(whole_torch torch PATHS ${torch_dir}/lib NO_DEFAULT_PATH REQUIRED)
target_link_libraries(_cuda PRIVATE -Wl,--no-as-needed ${whole_torch})
set_target_properties(_cuda PROPERTIES PREFIX "" SUFFIX .so CUDA_STANDARD 20
                                       CUDA_STANDARD_REQUIRED ON)
target_compile_options(
  _cuda PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra;-Xptxas=-warn-spills>
                $<$<COMPILE_LANGUAGE:CXX>:-O2;-Wall;-Wextra>)
