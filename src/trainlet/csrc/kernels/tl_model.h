/* SPDX-License-Identifier: Apache-2.0 */
/* What is the same for every compiled model: the context, its life, feeding rows, a step, saving. The emitted model.c
 * adds a constant tl_model and straight-line sequences of kernel calls. Two models link into one program. */
#ifndef TL_MODEL_H
#define TL_MODEL_H

#include "tl.h"

#define TL_BLOB_MAGIC 0x54534c54u /* "TLST" */
#define TL_BLOB_VERSION 1u
#define TL_BLOB_HEADER 20u        /* magic, version, model hash, payload bytes, CRC-32 of the payload; little endian */
/* Every state begins with seed and step, 8 bytes. */

/* One run of a model: caller's memory and this step's facts. Treat as opaque. */
typedef struct {
    uint8_t *arena, *state;
    int16_t *exponent;  /* run-time exponents of the gradient tensors */
    tl_step step;
    float lr, loss;
    const int32_t *target; /* what the loss of this step compares with */
    int32_t rows;          /* fed so far; -1 before begin */
} tl_context;

typedef struct {
    float loss;         /* before this step's update */
    int32_t prediction; /* argmax of the logits before this step's update, the first of equals */
    float saturated;    /* share of rounded gradient elements that met the clamp */
} tl_step_info;

/* Initial value of a piece of state: a table, or data = NULL and random floats within +-range; what no row names is 0. */
typedef struct {
    uint32_t offset, bytes;
    const void *data;
    float range;
} tl_init;

/* What the caller gives or gets: its type, its shape (a vector has height = width = 1), where it lies in the arena and
 * how many of its rows there are at once, scale and zero point of int8. Targets are the caller's own and lie nowhere. */
typedef enum { TL_S8, TL_S32, TL_F32 } tl_type;
typedef struct {
    tl_type type;
    int32_t height, width, channels;
    uint32_t offset;
    int32_t rows;
    float scale;
    int32_t zero;
} tl_port;

/* A node of a depth-first run: `run` makes row y of its output, of `height`. It needs the rows y * stride - pad .. + size - 1 of
 * its inputs, of in_height, as far as there are such. An input is made by the stage of that index; or it is TL_WHOLE
 * from the start; or it is the image, TL_FED by rows. */
typedef struct {
    void (*run)(tl_context *, int32_t y);
    int16_t first, second;
    int32_t height, in_height, size, stride, pad;
} tl_stage;
enum { TL_WHOLE = -1, TL_FED = -2 };

/* Nodes that run depth first, by rows. counters: where n uint16_t lie in the arena, the rows that each stage has made. */
typedef struct {
    const tl_stage *stages;
    int32_t n;
    uint32_t counters;
} tl_depth_first;

void tl_depth_first_begin(const tl_depth_first *s, tl_context *c);
/* `fed` rows of the image are there: makes every row that can be made. */
void tl_depth_first_feed(const tl_depth_first *s, tl_context *c, int32_t fed);
/* From begin to end, for a run whose inputs are there. */
void tl_depth_first_run(const tl_depth_first *s, tl_context *c);

/* Today one input, one output of floats and, to train, one target: the class. */
typedef struct {
    uint32_t hash, arena_bytes, state_bytes;
    const tl_port *inputs, *outputs, *targets;
    int32_t n_inputs, n_outputs, n_targets;
    const tl_depth_first *feed;    /* takes the image as it is delivered; NULL: it is kept whole */
    const tl_init *init;
    int32_t n_init;
    void (*prefix)(tl_context *);       /* frozen layers before anything that training keeps */
    void (*forward)(tl_context *);      /* the rest, to the logits */
    tl_status (*gradient)(tl_context *); /* loss, checks and the entry into integers; changes no state */
    void (*head)(tl_context *);         /* update of the head */
    void (*backward)(tl_context *);     /* gradients and updates of the convolutions */
} tl_model;

/* Sets up a context over the caller's memory and resets the state. arena and state are aligned to 4 bytes.
 * TL_BAD_ARGUMENT, TL_BAD_SIZE, TL_BAD_ALIGNMENT; then the context is unusable. */
tl_status tl_model_init(const tl_model *m, tl_context *c, int16_t *exponent, void *arena, size_t arena_bytes, void *state,
                        size_t state_bytes, uint32_t seed);
/* Factory weights, the model's own head or a random one from seed, step 0. */
void tl_model_reset(const tl_model *m, tl_context *c, uint32_t seed);
/* An image: begin, then `height` rows of width * channels bytes, then one of the finish calls. TL_BAD_ORDER otherwise. */
tl_status tl_model_begin(const tl_model *m, tl_context *c);
tl_status tl_model_feed_row(const tl_model *m, tl_context *c, const int8_t *row);
/* *logits points to `classes` floats in the arena, valid until the next call; may be NULL. */
tl_status tl_model_finish(const tl_model *m, tl_context *c, const float **logits);
/* A step of SGD. TL_BAD_ARGUMENT (label), TL_BAD_LR, TL_NOT_FINITE: nothing has changed. info may be NULL. */
tl_status tl_model_finish_train(const tl_model *m, tl_context *c, int32_t label, float lr, tl_step_info *info);
/* The two halves of the finish calls, for callers that keep what the frozen prefix computed. The second half writes over
 * it: put it back before each call. */
tl_status tl_model_prefix(const tl_model *m, tl_context *c);
void tl_model_infer_rest(const tl_model *m, tl_context *c, const float **logits);
tl_status tl_model_train_rest(const tl_model *m, tl_context *c, int32_t label, float lr, tl_step_info *info);
/* Whole images of height * width * channels bytes. */
tl_status tl_model_infer(const tl_model *m, tl_context *c, const int8_t *image, const float **logits);
tl_status tl_model_train(const tl_model *m, tl_context *c, const int8_t *image, int32_t label, float lr,
                         tl_step_info *info);
/* The trained state as TL_BLOB_HEADER + state_bytes bytes. TL_BAD_SIZE; TL_BAD_BLOB (nothing has changed then). */
tl_status tl_model_save(const tl_model *m, const tl_context *c, uint8_t *blob, size_t bytes);
tl_status tl_model_load(const tl_model *m, tl_context *c, const uint8_t *blob, size_t bytes);

/* Views for emitted code. */
#define TL_PLAIN(p, h, w, ch) ((tl_view){(int8_t *)(p), (ch), (w) * (ch), (h)})
#define TL_VECTOR(p) ((tl_view){(int8_t *)(p), 0, 0, 1})
#define TL_AT(type, base, offset) ((type *)(void *)((base) + (offset)))
#define TL_TRY(call)                      \
    do {                                  \
        const tl_status s_ = (call);      \
        if (s_ != TL_OK) return s_;       \
    } while (0)

#endif
