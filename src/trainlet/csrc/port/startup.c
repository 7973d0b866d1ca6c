/* SPDX-License-Identifier: Apache-2.0 */
/* From reset to main on any Cortex-M, without a C library or a vendor's files. The stack lies at the bottom of SRAM and
 * grows down: where it overflows it leaves the memory and stops, instead of eating data unseen. */
#include <stdint.h>

#define PAINT 0xc5c5c5c5u /* what stack that was never used still holds */

extern uint32_t tl_port_stack_low[], tl_port_stack_top[];
extern uint32_t tl_port_data_load[], tl_port_data[], tl_port_data_end[], tl_port_bss[], tl_port_bss_end[];

int main(void);
void Reset_Handler(void);
void tl_port_start(void);
void tl_port_fault(void);

#ifdef TL_PORT_REGIONS
#define REGISTER(address) (*(volatile uint32_t *)(address))

static const uint32_t regions[][2] = {TL_PORT_REGIONS};

/* For a core with more memory around it than the program may use: base address and attributes of each region that it
 * may, by the memory protection unit of Armv7-M. What lies in none of them faults. A core that stands for one of
 * Armv6-M also refuses unaligned accesses, as that one does. */
static void protect(void)
{
    for (uint32_t i = 0; i < sizeof regions / sizeof regions[0]; i++) {
        REGISTER(0xe000ed98u) = i;
        REGISTER(0xe000ed9cu) = regions[i][0];
        REGISTER(0xe000eda0u) = regions[i][1];
    }
#ifndef __ARM_FEATURE_UNALIGNED
    REGISTER(0xe000ed14u) |= 1u << 3;
#endif
    REGISTER(0xe000ed94u) = 1;
    __asm__ volatile("dsb\nisb" ::: "memory");
}
#endif

__attribute__((used, noreturn)) void tl_port_start(void)
{
#ifdef TL_PORT_REGIONS
    protect();
#endif
    const uint32_t *from = tl_port_data_load;
    for (uint32_t *to = tl_port_data; to < tl_port_data_end;) *to++ = *from++;
    for (uint32_t *to = tl_port_bss; to < tl_port_bss_end;) *to++ = 0;
    main();
    tl_port_fault();
    for (;;) {}
}

/* Naked: no instruction that a compiler might place in a prologue comes before the FPU is on. Full access to
 * coprocessors 10 and 11 in CPACR turns it on. The stack is painted before anything is on it. */
__attribute__((naked, noreturn)) void Reset_Handler(void)
{
    __asm__ volatile(
        ".syntax unified\n"
        "ldr r0, =tl_port_stack_low\n"
        "ldr r1, =tl_port_stack_top\n"
        "ldr r2, =%c0\n"
        "b 2f\n"
        "1: str r2, [r0]\n"
        "adds r0, #4\n"
        "2: cmp r0, r1\n"
        "blo 1b\n"
#ifdef __ARM_FP
        "ldr r0, =0xe000ed88\n"
        "ldr r1, [r0]\n"
        "orr r1, r1, #0xf00000\n"
        "str r1, [r0]\n"
        "dsb\n"
        "isb\n"
#endif
        "ldr r0, =tl_port_start\n"
        "bx r0\n"
        ".ltorg\n" ::"i"(PAINT));
}

/* Where every exception ends, since nothing here enables an interrupt: a debugger sees the registers of the fault. */
__attribute__((naked, noreturn)) void tl_port_fault(void)
{
    __asm__ volatile("bkpt #1\n1: b 1b\n");
}

typedef struct {
    uint32_t *stack;
    void (*handlers[15])(void);
} vectors;

__attribute__((section(".vectors"), used)) const vectors tl_port_vectors = {
    tl_port_stack_top,
    {Reset_Handler, tl_port_fault, tl_port_fault, tl_port_fault, tl_port_fault, tl_port_fault, 0, 0, 0, 0,
     tl_port_fault, tl_port_fault, 0, tl_port_fault, tl_port_fault},
};
