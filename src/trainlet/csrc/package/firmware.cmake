# SPDX-License-Identifier: Apache-2.0
# firmware.elf for a bare @TARGET@: the example with start-up code and the chip's memory map, no vendor's files. In a
# project that has start-up code of its own, the library @NAME@ is all that is needed.
set(PORT ${CMAKE_CURRENT_SOURCE_DIR}/port)

target_compile_options(@NAME@ PUBLIC @FLAGS@)
target_include_directories(@NAME@ PUBLIC ${PORT}) # string.h

add_executable(firmware examples/device/main.c ${PORT}/startup.c ${PORT}/memory.c)
set_target_properties(firmware PROPERTIES SUFFIX .elf LINK_DEPENDS ${PORT}/link.ld)
target_include_directories(firmware PRIVATE test_vectors)
target_link_options(firmware PRIVATE -nostdlib -static -Wl,--gc-sections -Wl,--print-memory-usage -T ${PORT}/link.ld)
target_link_libraries(firmware PRIVATE @NAME@ gcc)
