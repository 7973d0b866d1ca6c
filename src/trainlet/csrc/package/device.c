/* SPDX-License-Identifier: Apache-2.0 */
/* Trains @NAME@ on a bare @TARGET@: no vendor's files, no C library, no UART. It takes the steps of the test vectors and
 * compares every byte of what it has learned. When it stands in tl_port_wait, `verdict` says how it went.
 *
 * Yours are camera_row, label_of and learning_rate. Change what you like: `trainlet compile` keeps it. */
#include <string.h>

#include "@NAME@.h"
#include "expected.h"
#include "synthetic.h"

/* All the memory that the model takes; nothing is allocated. The arena may serve other purposes between two steps. The
 * state is what has been learned: it must stay, and @NAME@_save makes a copy of it for flash. */
static uint32_t arena[(@UPPER@_ARENA_BYTES + 3) / 4];
static uint32_t state[(@UPPER@_STATE_BYTES + 3) / 4];
static @NAME@_context model;

static const float learning_rate = EXPECTED_LR;

/* For a debugger: how it went; what stopped it, if something did; loss and prediction of the latest step. */
enum { RUNNING, EQUAL, DIFFERENT, REFUSED };
volatile int32_t verdict = RUNNING;
volatile tl_status status;
volatile tl_step_info latest;

/* Row y of image t as it comes from your camera: @UPPER@_WIDTH pixels of @UPPER@_CHANNELS signed bytes. It is used up
 * when the next one is asked for; rows may come as slowly as they like. */
static const int8_t *camera_row(int t, int y)
{
    static int8_t row[@UPPER@_WIDTH * @UPPER@_CHANNELS];
    synthetic_row(t, y, row);
    return row;
}

/* What image t shows: 0 .. @UPPER@_CLASSES - 1. */
static int32_t label_of(int t)
{
    return t % @UPPER@_CLASSES;
}

static tl_status show(int t)
{
    TL_TRY(@NAME@_begin(&model));
    for (int y = 0; y < @UPPER@_HEIGHT; y++) TL_TRY(@NAME@_feed_row(&model, camera_row(t, y)));
    return TL_OK;
}

/* One step of training. To recognize only, call @NAME@_finish(&model, &logits) in place of the last call. */
static tl_status learn(int t, tl_step_info *info)
{
    TL_TRY(show(t));
    return @NAME@_finish_train(&model, label_of(t), learning_rate, info);
}

/* The end. Set a breakpoint here, or let it turn on a light. */
__attribute__((noinline, noreturn)) static void tl_port_wait(void)
{
    for (;;) __asm__ volatile("wfi");
}

int main(void)
{
    int wrong = 0;

    status = @NAME@_init(&model, arena, sizeof arena, state, sizeof state, EXPECTED_SEED);
    for (int t = 0; t < EXPECTED_STEPS && status == TL_OK; t++) {
        tl_step_info info = {0, 0, 0};
        status = learn(t, &info);
        latest = info;
        wrong += memcmp(&info.loss, &expected_loss[t], sizeof info.loss) != 0;
        wrong += info.prediction != expected_prediction[t];
    }
    wrong += memcmp(state, expected_state, sizeof expected_state) != 0;
    verdict = status != TL_OK ? REFUSED : wrong ? DIFFERENT : EQUAL;
    tl_port_wait();
}
