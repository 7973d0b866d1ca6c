/* SPDX-License-Identifier: Apache-2.0 */
#include <string.h>

#include "tl_math.h"
#include "tl_model.h"

static uint32_t get32(const uint8_t *p)
{
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

static void put32(uint8_t *p, uint32_t v)
{
    for (int i = 0; i < 4; i++) p[i] = (uint8_t)(v >> (8 * i));
}

static uint32_t crc32(const uint8_t *p, uint32_t n)
{
    uint32_t crc = 0xffffffffu;
    for (uint32_t i = 0; i < n; i++) {
        crc ^= p[i];
        for (int k = 0; k < 8; k++) crc = (crc >> 1) ^ (0xedb88320u & (0u - (crc & 1u)));
    }
    return ~crc;
}

/* The state begins with seed and step, so that saving it saves them. */
static uint32_t *header(const tl_context *c)
{
    return (uint32_t *)(void *)c->state;
}

tl_status tl_model_init(const tl_model *m, tl_context *c, int16_t *exponent, void *arena, size_t arena_bytes, void *state,
                        size_t state_bytes, uint32_t seed)
{
    if (!c || !arena || !state) return TL_BAD_ARGUMENT;
    if (arena_bytes < m->arena_bytes || state_bytes < m->state_bytes) return TL_BAD_SIZE;
    if (((uintptr_t)arena | (uintptr_t)state) & 3u) return TL_BAD_ALIGNMENT;
    memset(c, 0, sizeof *c);
    c->arena = arena;
    c->state = state;
    c->exponent = exponent;
    c->rows = -1;
    tl_model_reset(m, c, seed);
    return TL_OK;
}

void tl_model_reset(const tl_model *m, tl_context *c, uint32_t seed)
{
    memset(c->state, 0, m->state_bytes);
    for (int32_t i = 0; i < m->n_init; i++) {
        const tl_init *const t = m->init + i;
        if (t->data)
            memcpy(c->state + t->offset, t->data, t->bytes);
        else
            tl_random_f32(seed, (int32_t)(t->bytes / 4), t->range, TL_AT(float, c->state, t->offset));
    }
    header(c)[0] = seed;
    header(c)[1] = 0;
}

tl_status tl_model_begin(const tl_model *m, tl_context *c)
{
    c->rows = 0;
    if (m->feed) tl_depth_first_begin(m->feed, c);
    return TL_OK;
}

tl_status tl_model_feed_row(const tl_model *m, tl_context *c, const int8_t *row)
{
    const tl_port *const x = m->inputs;
    const uint32_t bytes = (uint32_t)(x->width * x->channels);
    if (!row) return TL_BAD_ARGUMENT;
    if (c->rows < 0 || c->rows >= x->height) return TL_BAD_ORDER;
    memcpy(c->arena + x->offset + (uint32_t)(c->rows % x->rows) * bytes, row, bytes);
    c->rows++;
    if (m->feed) tl_depth_first_feed(m->feed, c, c->rows);
    return TL_OK;
}

tl_status tl_model_prefix(const tl_model *m, tl_context *c)
{
    if (c->rows != m->inputs->height) return TL_BAD_ORDER;
    c->rows = -1;
    m->prefix(c);
    return TL_OK;
}

void tl_model_infer_rest(const tl_model *m, tl_context *c, const float **logits)
{
    m->forward(c);
    if (logits) *logits = (const float *)(const void *)(c->arena + m->outputs->offset);
}

static int32_t argmax(const float *v, int32_t n)
{
    int32_t best = 0;
    for (int32_t i = 1; i < n; i++)
        if (v[i] > v[best]) best = i;
    return best;
}

tl_status tl_model_train_rest(const tl_model *m, tl_context *c, int32_t label, float lr, tl_step_info *info)
{
    const float *logits;
    const int32_t classes = m->outputs->channels;
    if (label < 0 || label >= classes) return TL_BAD_ARGUMENT;
    c->target = &label;
    c->lr = lr;
    c->step.key = tl_mix(header(c)[0] + 0x9e3779b9u * header(c)[1]);
    c->step.saturated = c->step.rounded = 0;
    tl_model_infer_rest(m, c, &logits);
    const int32_t prediction = argmax(logits, classes);
    const tl_status status = m->gradient(c);
    if (status != TL_OK && status != TL_ZERO_GRADIENT) return status;
    m->head(c);
    if (status == TL_OK) m->backward(c);
    header(c)[1]++;
    if (!info) return TL_OK;
    info->loss = c->loss;
    info->prediction = prediction;
    info->saturated = c->step.rounded ? (float)c->step.saturated / (float)c->step.rounded : 0.0f;
    return TL_OK;
}

tl_status tl_model_finish(const tl_model *m, tl_context *c, const float **logits)
{
    TL_TRY(tl_model_prefix(m, c));
    tl_model_infer_rest(m, c, logits);
    return TL_OK;
}

tl_status tl_model_finish_train(const tl_model *m, tl_context *c, int32_t label, float lr, tl_step_info *info)
{
    TL_TRY(tl_model_prefix(m, c));
    return tl_model_train_rest(m, c, label, lr, info);
}

static tl_status feed(const tl_model *m, tl_context *c, const int8_t *image)
{
    if (!image) return TL_BAD_ARGUMENT;
    TL_TRY(tl_model_begin(m, c));
    const tl_port *const x = m->inputs;
    for (int32_t y = 0; y < x->height; y++) TL_TRY(tl_model_feed_row(m, c, image + y * x->width * x->channels));
    return TL_OK;
}

tl_status tl_model_infer(const tl_model *m, tl_context *c, const int8_t *image, const float **logits)
{
    TL_TRY(feed(m, c, image));
    return tl_model_finish(m, c, logits);
}

tl_status tl_model_train(const tl_model *m, tl_context *c, const int8_t *image, int32_t label, float lr,
                         tl_step_info *info)
{
    TL_TRY(feed(m, c, image));
    return tl_model_finish_train(m, c, label, lr, info);
}

tl_status tl_model_save(const tl_model *m, const tl_context *c, uint8_t *blob, size_t bytes)
{
    if (!blob) return TL_BAD_ARGUMENT;
    if (bytes < TL_BLOB_HEADER + m->state_bytes) return TL_BAD_SIZE;
    put32(blob, TL_BLOB_MAGIC);
    put32(blob + 4, TL_BLOB_VERSION);
    put32(blob + 8, m->hash);
    put32(blob + 12, m->state_bytes);
    put32(blob + 16, crc32(c->state, m->state_bytes));
    memcpy(blob + TL_BLOB_HEADER, c->state, m->state_bytes);
    return TL_OK;
}

tl_status tl_model_load(const tl_model *m, tl_context *c, const uint8_t *blob, size_t bytes)
{
    if (!blob) return TL_BAD_ARGUMENT;
    if (bytes < TL_BLOB_HEADER + m->state_bytes) return TL_BAD_SIZE;
    if (get32(blob) != TL_BLOB_MAGIC || get32(blob + 4) != TL_BLOB_VERSION || get32(blob + 8) != m->hash ||
        get32(blob + 12) != m->state_bytes || get32(blob + 16) != crc32(blob + TL_BLOB_HEADER, m->state_bytes))
        return TL_BAD_BLOB;
    memcpy(c->state, blob + TL_BLOB_HEADER, m->state_bytes);
    return TL_OK;
}
