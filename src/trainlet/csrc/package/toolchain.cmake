# SPDX-License-Identifier: Apache-2.0
# Finds the compiler for @TARGET@, a @CORE@.
set(CMAKE_SYSTEM_NAME Generic)
set(CMAKE_SYSTEM_PROCESSOR arm)

find_program(ARM_GCC arm-none-eabi-gcc)
if(NOT ARM_GCC)
  message(FATAL_ERROR "arm-none-eabi-gcc was not found. Install it, on Debian with: @HINT@; "
                      "or name it: -DARM_GCC=/path/to/arm-none-eabi-gcc. -DHOST=ON builds for this machine instead")
endif()
set(CMAKE_C_COMPILER ${ARM_GCC})
set(CMAKE_C_FLAGS_INIT "@CORE_FLAGS@")

# There is no C library that a test program of CMake's could be linked with.
set(CMAKE_TRY_COMPILE_TARGET_TYPE STATIC_LIBRARY)
list(APPEND CMAKE_TRY_COMPILE_PLATFORM_VARIABLES ARM_GCC)
