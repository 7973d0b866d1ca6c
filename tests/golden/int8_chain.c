/* SPDX-License-Identifier: Apache-2.0 */
/* int8_chain, made by trainlet: one kernel call per node, in the order of the schedule. */
#include "int8_chain.h"
#include "int8_chain_data.h"

/* Where tensors lie: A_ in the arena, S_ in the state. */
enum {
    A_INPUT = 452,
    A_CONV_2_KEPT = 512,
    A_HEAD_DX = 560,
    A_CONV_1_Y = 576,
    A_ADD_0_Y = 672,
    A_CONV_2_Y = 672,
    A_CONV_1_Y_MASK = 792,
    A_POOL_Y = 804,
    A_ADD_0_Y_ENTERED = 812,
    A_CONV_0_Y = 832,
    A_CONV_1_Y_GRAD = 928,
    A_LOGITS_GRAD = 928,
    A_LOGITS = 1024,
    S_CONV_1_BIAS = 8,
    S_CONV_2_BIAS = 32,
    S_HEAD_WEIGHT = 56,
    S_HEAD_BIAS = 152,
    S_CONV_1_TRAINED = 168,
    S_CONV_1_FRACTION = 222,
    S_CONV_2_TRAINED = 249,
    S_CONV_2_FRACTION = 267,
    S_CONV_2_RHO = 276,
};

static void row_conv_0(tl_context *c, int32_t y)
{
    uint8_t *const a = c->arena;
    /* stem: conv2d */
    { tl_conv2d_s8(&conv_0_geometry, &conv_0_requant, (tl_weights){conv_0_weight_ready, NULL, NULL, TL_READY},
        conv_0_bias, TL_PLAIN(TL_AT(int8_t, a, A_INPUT), 3, 8, 3), TL_PLAIN(TL_AT(int8_t, a, A_CONV_0_Y), 4, 4, 6),
        y, y + 1, a + 4); }
}

static const tl_stage conv_0_depth_first_stages[] = {
    {row_conv_0, TL_FED, TL_WHOLE, 4, 8, 3, 2, 0},
};
static const tl_depth_first conv_0_depth_first = {conv_0_depth_first_stages, 1, 0u};

static void prefix(tl_context *c)
{
    (void)c;
}

static void forward(tl_context *c)
{
    uint8_t *const a = c->arena;
    uint8_t *const s = c->state;
    /* block.depthwise: conv2d */
    { tl_depthwise_s8(&conv_1_geometry, &conv_1_requant,
        (tl_weights){NULL, TL_AT(int8_t, s, S_CONV_1_TRAINED), NULL, 6}, TL_AT(int32_t, s, S_CONV_1_BIAS),
        TL_PLAIN(TL_AT(int8_t, a, A_CONV_0_Y), 4, 4, 6), TL_PLAIN(TL_AT(int8_t, a, A_CONV_1_Y), 4, 4, 6), 0, 4,
        a + 0); }
    /* block.project: select_channels */
    { tl_select_channels_s8(TL_AT(int8_t, a, A_CONV_1_Y), 16, 6, 1, conv_2_channels, 3,
        TL_AT(int8_t, a, A_CONV_2_KEPT)); }
    /* block.depthwise: clip_mask */
    { tl_clip_mask_s8(TL_AT(int8_t, a, A_CONV_1_Y), 96, -128, 127, TL_AT(uint8_t, a, A_CONV_1_Y_MASK)); }
    /* block.project: conv2d */
    { tl_conv2d_s8(&conv_2_geometry, &conv_2_requant,
        (tl_weights){conv_2_weight_frozen, TL_AT(int8_t, s, S_CONV_2_TRAINED), conv_2_channels, 3},
        TL_AT(int32_t, s, S_CONV_2_BIAS), TL_PLAIN(TL_AT(int8_t, a, A_CONV_1_Y), 4, 4, 6),
        TL_PLAIN(TL_AT(int8_t, a, A_CONV_2_Y), 4, 4, 6), 0, 4, a + 0); }
    /* add.0: add */
    { tl_add_s8(&add_0_scale, TL_PLAIN(TL_AT(int8_t, a, A_CONV_0_Y), 4, 4, 6),
        TL_PLAIN(TL_AT(int8_t, a, A_CONV_2_Y), 4, 4, 6), TL_PLAIN(TL_AT(int8_t, a, A_ADD_0_Y), 4, 4, 6), 4, 6, 0,
        4); }
    /* pool: avg_pool */
    { tl_avg_pool_s8(&pool_geometry, TL_PLAIN(TL_AT(int8_t, a, A_ADD_0_Y), 4, 4, 6),
        TL_PLAIN(TL_AT(int8_t, a, A_POOL_Y), 1, 1, 6), 0, 1, a + 768); }
    /* head: dense */
    { tl_dense_f32(TL_AT(int8_t, a, A_POOL_Y), 2, 0x1.8bc9e40000000p-5f, TL_AT(float, s, S_HEAD_WEIGHT),
        TL_AT(float, s, S_HEAD_BIAS), 4, 6, TL_AT(float, a, A_LOGITS)); }
}

static tl_status gradient(tl_context *c)
{
    uint8_t *const a = c->arena;
    uint8_t *const s = c->state;
    /* lr: check_lr */
    { TL_TRY(tl_check_lr(c->lr, 0x1.505afa0000000p+13f)); }
    /* loss: softmax_xent */
    { TL_TRY(tl_softmax_xent_f32(TL_AT(float, a, A_LOGITS), 4, *c->target, &c->loss,
        TL_AT(float, a, A_LOGITS_GRAD))); }
    /* head: dense_dx */
    { tl_dense_dx_f32(TL_AT(float, a, A_LOGITS_GRAD), TL_AT(float, s, S_HEAD_WEIGHT), 4, 6,
        TL_AT(float, a, A_HEAD_DX)); }
    /* pool: enter_grad */
    { TL_TRY(tl_enter_grad_s8(&c->step, 256u, TL_AT(float, a, A_HEAD_DX), 6, 0x1.0000000000000p-4f,
        TL_AT(int8_t, a, A_ADD_0_Y_ENTERED), &c->exponent[0])); }
    return TL_OK;
}

static void head(tl_context *c)
{
    uint8_t *const a = c->arena;
    uint8_t *const s = c->state;
    /* head: dense_sgd */
    { tl_dense_sgd_f32(TL_AT(float, a, A_LOGITS_GRAD), TL_AT(int8_t, a, A_POOL_Y), 2, 0x1.8bc9e40000000p-5f, c->lr,
        4, 6, TL_AT(float, s, S_HEAD_WEIGHT), TL_AT(float, s, S_HEAD_BIAS)); }
}

static void backward(tl_context *c)
{
    uint8_t *const a = c->arena;
    uint8_t *const s = c->state;
    /* block.project: conv2d_db_sgd */
    { tl_bias_sgd_s8(&c->step, 161u, (tl_grad){TL_VECTOR(TL_AT(int8_t, a, A_ADD_0_Y_ENTERED)), c->exponent[0]}, 16,
        1, 6, conv_2_bias_sgd_rate, c->lr, 16, TL_AT(int32_t, s, S_CONV_2_BIAS), a + 560); }
    /* block.depthwise: conv2d_dx_round */
    { tl_conv2d_dx_s8(&c->step, &conv_2_round_geometry, &conv_2_round_scale,
        (tl_weights){conv_2_weight_frozen, TL_AT(int8_t, s, S_CONV_2_TRAINED), conv_2_channels, 3},
        (tl_grad){TL_VECTOR(TL_AT(int8_t, a, A_ADD_0_Y_ENTERED)), c->exponent[0]},
        &(const tl_site){128u, TL_AT(int8_t, s, S_CONV_2_RHO), &c->exponent[1], NULL, 0, (tl_mask){TL_AT(uint8_t, a,
        A_CONV_1_Y_MASK), NULL, -128, 127}}, TL_AT(int8_t, a, A_CONV_1_Y_GRAD), 0, 4, a + 0); }
    /* block.project: conv2d_dw_sgd */
    { tl_conv2d_dw_s8(&c->step, &conv_2_weight_sgd_geometry, &conv_2_weight_sgd_update,
        (tl_grad){TL_VECTOR(TL_AT(int8_t, a, A_ADD_0_Y_ENTERED)), c->exponent[0]},
        TL_PLAIN(TL_AT(int8_t, a, A_CONV_2_KEPT), 4, 4, 3), c->lr, TL_AT(int8_t, s, S_CONV_2_TRAINED),
        TL_AT(uint8_t, s, S_CONV_2_FRACTION), a + 0); }
    /* block.depthwise: conv2d_dw_sgd */
    { tl_depthwise_dw_s8(&c->step, &conv_1_weight_sgd_geometry, &conv_1_weight_sgd_update,
        (tl_grad){TL_PLAIN(TL_AT(int8_t, a, A_CONV_1_Y_GRAD), 4, 4, 6), c->exponent[1]},
        TL_PLAIN(TL_AT(int8_t, a, A_CONV_0_Y), 4, 4, 6), c->lr, TL_AT(int8_t, s, S_CONV_1_TRAINED),
        TL_AT(uint8_t, s, S_CONV_1_FRACTION), a + 0); }
    /* block.depthwise: conv2d_db_sgd */
    { tl_bias_sgd_s8(&c->step, 97u, (tl_grad){TL_PLAIN(TL_AT(int8_t, a, A_CONV_1_Y_GRAD), 4, 4, 6), c->exponent[1]},
        4, 4, 6, conv_1_bias_sgd_rate, c->lr, 16, TL_AT(int32_t, s, S_CONV_1_BIAS), a + 0); }
}

static const tl_init start[] = {
    {8u, 24u, conv_1_bias_start, 0.0f},
    {32u, 24u, conv_2_bias_start, 0.0f},
    {56u, 96u, NULL, 0x1.a20bd80000000p-2f},
    {168u, 54u, conv_1_trained_start, 0.0f},
    {249u, 18u, conv_2_trained_start, 0.0f},
    {276u, 1u, conv_2_rho_start, 0.0f},
};

static const tl_port inputs[] = {
    {TL_S8, 8, 8, 3, 452u, 3, 0x1.0000000000000p-6f, -3},
};
static const tl_port outputs[] = {
    {TL_F32, 1, 1, 4, 1024u, 1, 0x1.0000000000000p+0f, 0},
};
static const tl_port targets[] = {
    {TL_S32, 1, 1, 1, 0u, 1, 0x1.0000000000000p+0f, 0},
};
static const tl_model model = {
    .hash = 0x2b3c62d0u,
    .arena_bytes = 1044u,
    .state_bytes = 280u,
    .inputs = inputs,
    .outputs = outputs,
    .targets = targets,
    .n_inputs = 1,
    .n_outputs = 1,
    .n_targets = 1,
    .feed = &conv_0_depth_first,
    .init = start,
    .n_init = 6,
    .prefix = prefix,
    .forward = forward,
    .gradient = gradient,
    .head = head,
    .backward = backward,
};

const tl_model *int8_chain_model(void)
{
    return &model;
}

tl_status int8_chain_init(int8_chain_context *c, void *arena, size_t arena_bytes, void *state, size_t state_bytes,
                      uint32_t seed)
{
    return c ? tl_model_init(&model, &c->base, c->exponent, arena, arena_bytes, state, state_bytes, seed)
             : TL_BAD_ARGUMENT;
}

void int8_chain_reset(int8_chain_context *c, uint32_t seed)
{
    tl_model_reset(&model, &c->base, seed);
}

tl_status int8_chain_begin(int8_chain_context *c)
{
    return tl_model_begin(&model, &c->base);
}

tl_status int8_chain_feed_row(int8_chain_context *c, const int8_t *row)
{
    return tl_model_feed_row(&model, &c->base, row);
}

tl_status int8_chain_finish(int8_chain_context *c, const float **logits)
{
    return tl_model_finish(&model, &c->base, logits);
}

tl_status int8_chain_finish_train(int8_chain_context *c, int32_t label, float lr, tl_step_info *info)
{
    return tl_model_finish_train(&model, &c->base, label, lr, info);
}

tl_status int8_chain_infer(int8_chain_context *c, const int8_t *image, const float **logits)
{
    return tl_model_infer(&model, &c->base, image, logits);
}

tl_status int8_chain_train(int8_chain_context *c, const int8_t *image, int32_t label, float lr, tl_step_info *info)
{
    return tl_model_train(&model, &c->base, image, label, lr, info);
}

tl_status int8_chain_save(const int8_chain_context *c, uint8_t *blob, size_t bytes)
{
    return tl_model_save(&model, &c->base, blob, bytes);
}

tl_status int8_chain_load(int8_chain_context *c, const uint8_t *blob, size_t bytes)
{
    return tl_model_load(&model, &c->base, blob, bytes);
}
