/* SPDX-License-Identifier: Apache-2.0 */
/* @NAME@ behind a mailbox: whoever controls the chip (an emulator, a debugger) writes a command and its arguments into
 * tl_port_mailbox while the program stands in tl_port_wait, lets it run, and reads the answer when it stands there
 * again. Nothing but SRAM is used: no UART, no semihosting. With TL_PORT_INFERENCE it refuses to train, and the linker
 * leaves out what that needs. */
#include "@NAME@.h"

enum { INIT = 1, RESET, BEGIN, FEED_ROW, FINISH, TRAIN, PREFIX, INFER_REST, TRAIN_REST };

/* The host writes the first four and the row; the rest is the answer. */
typedef struct {
    uint32_t command, seed;
    int32_t label;
    float lr;
    int32_t status;
    tl_step_info info;
    const float *logits;
} mailbox;

volatile mailbox tl_port_mailbox;
int8_t tl_port_row[@UPPER@_WIDTH * @UPPER@_CHANNELS];
uint32_t tl_port_arena[(@UPPER@_ARENA_BYTES + 3) / 4];
uint32_t tl_port_state[(@UPPER@_STATE_BYTES + 3) / 4];
@NAME@_context tl_port_context;

int main(void);
void tl_port_wait(void);

/* The program stands at the first instruction of this function; whoever waits there goes on at the return address. With
 * a debugger the breakpoint stops it. */
__attribute__((naked, noinline, used)) void tl_port_wait(void)
{
    __asm__ volatile("bkpt #0\nbx lr\n");
}

static tl_status serve(void)
{
    @NAME@_context *const c = &tl_port_context;
    const tl_model *const m = @NAME@_model();
    const float *logits = NULL;
    tl_step_info info = {0, 0, 0};
    tl_status status = TL_BAD_ARGUMENT;

    switch (tl_port_mailbox.command) {
    case INIT:
        status = @NAME@_init(c, tl_port_arena, sizeof tl_port_arena, tl_port_state, sizeof tl_port_state,
                             tl_port_mailbox.seed);
        break;
    case RESET:
        @NAME@_reset(c, tl_port_mailbox.seed);
        status = TL_OK;
        break;
    case BEGIN: status = @NAME@_begin(c); break;
    case FEED_ROW: status = @NAME@_feed_row(c, tl_port_row); break;
    case FINISH: status = @NAME@_finish(c, &logits); break;
#ifndef TL_PORT_INFERENCE
    case TRAIN: status = @NAME@_finish_train(c, tl_port_mailbox.label, tl_port_mailbox.lr, &info); break;
    case TRAIN_REST: status = tl_model_train_rest(m, &c->base, tl_port_mailbox.label, tl_port_mailbox.lr, &info); break;
#endif
    case PREFIX: status = tl_model_prefix(m, &c->base); break;
    case INFER_REST:
        tl_model_infer_rest(m, &c->base, &logits);
        status = TL_OK;
        break;
    default: break;
    }
    tl_port_mailbox.info.loss = info.loss;
    tl_port_mailbox.info.prediction = info.prediction;
    tl_port_mailbox.info.saturated = info.saturated;
    tl_port_mailbox.logits = logits;
    return status;
}

int main(void)
{
    for (;;) {
        tl_port_wait();
        tl_port_mailbox.status = (int32_t)serve();
    }
}
