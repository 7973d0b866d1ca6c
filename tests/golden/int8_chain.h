/* SPDX-License-Identifier: Apache-2.0 */
/* int8_chain, made by trainlet. Contracts of all calls: tl_model.h. */
#ifndef INT8_CHAIN_H
#define INT8_CHAIN_H

#include "tl_model.h"

#define INT8_CHAIN_HEIGHT 8
#define INT8_CHAIN_WIDTH 8
#define INT8_CHAIN_CHANNELS 3
#define INT8_CHAIN_CLASSES 4
#define INT8_CHAIN_ARENA_BYTES 1044u /* all activations, gradients and scratch of a step */
#define INT8_CHAIN_STATE_BYTES 280u /* trained parameters; keep it, or save it, between steps */
#define INT8_CHAIN_BLOB_BYTES (TL_BLOB_HEADER + INT8_CHAIN_STATE_BYTES)
#define INT8_CHAIN_MODEL_HASH 0x2b3c62d0u

typedef struct {
    tl_context base;
    int16_t exponent[2];
} int8_chain_context;

tl_status int8_chain_init(int8_chain_context *c, void *arena, size_t arena_bytes, void *state, size_t state_bytes,
                      uint32_t seed);
void int8_chain_reset(int8_chain_context *c, uint32_t seed);
tl_status int8_chain_begin(int8_chain_context *c);
tl_status int8_chain_feed_row(int8_chain_context *c, const int8_t *row);
tl_status int8_chain_finish(int8_chain_context *c, const float **logits);
tl_status int8_chain_finish_train(int8_chain_context *c, int32_t label, float lr, tl_step_info *info);
tl_status int8_chain_infer(int8_chain_context *c, const int8_t *image, const float **logits);
tl_status int8_chain_train(int8_chain_context *c, const int8_t *image, int32_t label, float lr, tl_step_info *info);
tl_status int8_chain_save(const int8_chain_context *c, uint8_t *blob, size_t bytes);
tl_status int8_chain_load(int8_chain_context *c, const uint8_t *blob, size_t bytes);
/* The model behind these calls, for the tl_model_* functions. */
const tl_model *int8_chain_model(void);

#endif
