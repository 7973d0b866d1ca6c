/* SPDX-License-Identifier: Apache-2.0 */
/* Counts executed instructions: the emulator calls tl_count_block at the start of every basic block, without Python.
 * Between two blocks of the emitted model everything counts for the first of them, which ends with the call of a
 * kernel: so each node of the graph gets its own figure. */
#include <stdint.h>

typedef int (*read_memory)(void *emulator, uint64_t address, void *bytes, uint64_t n);

typedef struct {
    uint64_t base;                   /* address of flash */
    uint64_t model, model_end;       /* the emitted functions */
    uint64_t runtime_end;            /* behind them the code that calls them: no node is running there */
    uint64_t blocks;                 /* entries of the tables: halfwords of flash */
    uint16_t *bytes, *instructions;  /* by block: size when it was last counted, and what was counted */
    uint64_t *by_block;              /* instructions executed in each block */
    uint64_t *by_call;               /* by halfword of the emitted functions, from 1 on; 0: elsewhere */
    int64_t *change;                 /* by halfword: how much oftener it is executed than the one before it */
    uint64_t current, total;
    read_memory read;
} tl_counter;

void tl_count_block(void *emulator, uint64_t address, uint32_t size, tl_counter *c);

/* A Thumb instruction has 4 bytes where its first halfword begins with 0b11101, 0b11110 or 0b11111. */
static uint16_t count(tl_counter *c, void *emulator, uint64_t address, uint32_t size)
{
    uint16_t code[2048], n = 0;
    if (size > sizeof code || c->read(emulator, address, code, size)) return (uint16_t)(size / 2);
    for (uint32_t i = 0; i < size / 2; n++) i += code[i] >= 0xe800u ? 2 : 1;
    return n;
}

void tl_count_block(void *emulator, uint64_t address, uint32_t size, tl_counter *c)
{
    const uint64_t i = (address - c->base) >> 1;
    if (i >= c->blocks) return;
    if (c->bytes[i] != size) {
        c->bytes[i] = (uint16_t)size;
        c->instructions[i] = count(c, emulator, address, size);
    }
    if (address >= c->model && address < c->runtime_end)
        c->current = address < c->model_end ? 1 + ((address + size - 2 - c->model) >> 1) : 0;
    c->by_block[i] += c->instructions[i];
    c->change[i]++;
    if (i + size / 2 < c->blocks) c->change[i + size / 2]--;
    c->by_call[c->current] += c->instructions[i];
    c->total += c->instructions[i];
}
