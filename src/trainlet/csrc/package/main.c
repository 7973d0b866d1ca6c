/* SPDX-License-Identifier: Apache-2.0 */
/* Trains on two synthetic images and compares logits, losses and the whole trained state with the expected ones.
 * Exit code 0: every byte is equal. */
#include <stdio.h>
#include <string.h>

#include "@NAME@.h"
#include "expected.h"
#include "synthetic.h"

static uint32_t arena[(@UPPER@_ARENA_BYTES + 3) / 4];
static uint32_t state[(@UPPER@_STATE_BYTES + 3) / 4];

int main(void)
{
    @NAME@_context model;
    tl_step_info info = {0, 0, 0};
    int wrong = 0;

    if (@NAME@_init(&model, arena, sizeof arena, state, sizeof state, EXPECTED_SEED) != TL_OK) return 2;
    for (int t = 0; t < EXPECTED_STEPS; t++) {
        int8_t row[@UPPER@_WIDTH * @UPPER@_CHANNELS];
        if (@NAME@_begin(&model) != TL_OK) return 2;
        for (int y = 0; y < @UPPER@_HEIGHT; y++) {
            synthetic_row(t, y, row);
            if (@NAME@_feed_row(&model, row) != TL_OK) return 2;
        }
        if (@NAME@_finish_train(&model, t % @UPPER@_CLASSES, EXPECTED_LR, &info) != TL_OK) return 2;
        printf("step %d: loss %.6f, predicted class %d, %.2f %% of gradients saturated\n", t, (double)info.loss,
               (int)info.prediction, 100.0 * (double)info.saturated);
        wrong += memcmp(&info.loss, &expected_loss[t], sizeof info.loss) != 0;
        wrong += info.prediction != expected_prediction[t];
    }
    wrong += memcmp(state, expected_state, sizeof expected_state) != 0;
    puts(wrong ? "MISMATCH with the expected bytes" : "equal to the expected bytes");
    return wrong != 0;
}
