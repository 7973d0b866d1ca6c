/* SPDX-License-Identifier: Apache-2.0 */
/* Contracts of all kernels. C99, no allocation, no stdio, no global state.
 *
 * Layout: activations and gradients are int8 NHWC with batch 1; weights are OHWI, depthwise (C, kh, kw).
 * Arithmetic: docs/arithmetic.md, to the letter; every rounding is in tl_math.h and nowhere else.
 * Sizes: channels 1..65535, rows and columns 1..65535, kernel, stride and dilation 1..255.
 * Pointers: int32_t, uint32_t, int16_t and float buffers and all scratch are aligned to 4 bytes; int8 buffers need no
 * alignment. Scratch is never read before it is written and holds nothing between calls unless said.
 * Buffers do not overlap unless said.
 */
#ifndef TL_H
#define TL_H

#include <stddef.h>
#include <stdint.h>

typedef enum {
    TL_OK = 0,
    TL_ZERO_GRADIENT,   /* not an error: the gradient is all zero, there is nothing to propagate */
    TL_BAD_ARGUMENT,    /* null pointer or label out of range */
    TL_BAD_SIZE,        /* arena, state or blob is too small */
    TL_BAD_ALIGNMENT,   /* arena or state is not aligned */
    TL_BAD_LR,          /* learning rate is negative, not finite or too large for a layer's scale */
    TL_NOT_FINITE,      /* a logit or a feature gradient is not finite */
    TL_BAD_ORDER,       /* rows were not fed, or too many were */
    TL_BAD_BLOB         /* a saved state is damaged or belongs to another model */
} tl_status;

/* A strided int8 tensor: element (y, x, c) is data[(y % ring) * row + x * pixel + c].
 * A plain H x W x C buffer has pixel = C, row = W * C, ring = H. A ring buffer of the last n rows has ring = n.
 * A vector that stands for every pixel has pixel = row = 0, ring = 1. */
typedef struct {
    int8_t *data;
    int32_t pixel, row, ring;
} tl_view;

/* Weights of a convolution whose input channels `channels` (n of each group; depthwise: of all) are trained.
 * frozen: the other channels, compact and in ascending order: [O][kh][kw][Cg - n], depthwise [C - n][kh][kw]; may be
 * NULL where none is left. trained: [O][kh][kw][n], depthwise [n][kh][kw]. A frozen layer has n = 0, trained = channels
 * = NULL. A fully trained layer has n = Cg, frozen = channels = NULL. channels is ascending. n = TL_READY: frozen holds
 * all, in the order of the general forward kernel (tl_tile.h): by blocks of 16 output channels of a group, padded with
 * zeros, and in them by pairs of terms (tap, input channel), likewise: [block][pair][16][2]. */
enum { TL_READY = -1 };
typedef struct {
    const int8_t *frozen, *trained;
    const uint16_t *channels;
    int32_t n;
} tl_weights;

/* Geometry of a convolution; pad_h and pad_w are the padding above and to the left. */
typedef struct {
    int32_t in_h, in_w, in_c, out_h, out_w, out_c;
    int32_t kh, kw, stride_h, stride_w, dil_h, dil_w, pad_h, pad_w;
    int32_t groups;   /* depthwise kernels: groups = in_c = out_c */
    int32_t x_zero;   /* zero point of the input, -128..127 */
} tl_conv;

/* Requantisation of an int32 sum (page section 1): mult[O], shift[O] from quantize_multiplier; y_zero, lo..hi in -128..127. */
typedef struct {
    const int32_t *mult;
    const int8_t *shift;
    int32_t y_zero, lo, hi;
} tl_requant;

/* Forward. Output rows y0 .. y1-1 of y. bias [O], |bias| <= 2^30. Scratch: tl_conv2d_scratch / tl_depthwise_scratch.
 * A depthwise kernel of stride 1 whose output has the size of its input may write over it, x.data = y.data, all rows in
 * one call: the scratch is tl_depthwise_ring more then. */
void tl_conv2d_s8(const tl_conv *c, const tl_requant *q, tl_weights w, const int32_t *bias, tl_view x, tl_view y,
                  int32_t y0, int32_t y1, void *scratch);
void tl_depthwise_s8(const tl_conv *c, const tl_requant *q, tl_weights w, const int32_t *bias, tl_view x, tl_view y,
                     int32_t y0, int32_t y1, void *scratch);

/* TFLite int8 ADD. Shapes H x W x C; rows y0..y1-1. (m, sh) by quantize_multiplier of: a's and b's scale over twice the
 * larger one, and twice the larger one over 2^20 y_scale. y may be a or b. */
typedef struct {
    int32_t a_zero, b_zero, y_zero, lo, hi;
    int32_t a_mult, b_mult, y_mult;
    int32_t a_shift, b_shift, y_shift;
} tl_add;
void tl_add_s8(const tl_add *p, tl_view a, tl_view b, tl_view y, int32_t width, int32_t channels, int32_t y0, int32_t y1);

/* TFLite int8 AVERAGE_POOL_2D: padding is left out of the mean; clamp to -128..127. Output rows y0..y1-1.
 * dil and groups of c are ignored; in_c = out_c. Scratch: tl_avg_pool_scratch = 4 * C bytes. */
void tl_avg_pool_s8(const tl_conv *c, tl_view x, tl_view y, int32_t y0, int32_t y1, void *scratch);

/* Maximum over windows; padding never wins. Output rows y0..y1-1. dil and groups of c are ignored; in_c = out_c. */
void tl_max_pool_s8(const tl_conv *c, tl_view x, tl_view y, int32_t y0, int32_t y1);

/* ---- what the forward pass keeps ---- */

/* The number, row by row from 0, of the element of each window that is its maximum, the first of equals; kh kw <= 127. */
void tl_max_pool_winners_s8(const tl_conv *c, tl_view x, tl_view winners, int32_t y0, int32_t y1);

/* A gradient passes where the mask is 1. bits: packed, element i of the H x W x C order is bit i % 8 of byte i / 8.
 * Otherwise y, if not NULL: a plain H x W x C buffer, the mask is lo < y < hi. Both NULL: everything passes. */
typedef struct {
    const uint8_t *bits;
    const int8_t *y;
    int32_t lo, hi;
} tl_mask;

/* bits[ceil(n/8)] of lo < y[i] < hi; unused bits of the last byte are 0. */
void tl_clip_mask_s8(const int8_t *y, int32_t n, int32_t lo, int32_t hi, uint8_t *bits);
/* out[p][g*n + j] = x[p][g*Cg + channels[j]] for all `pixels`; Cg = channels_in / groups. */
void tl_select_channels_s8(const int8_t *x, int32_t pixels, int32_t channels_in, int32_t groups, const uint16_t *channels,
                           int32_t n, int8_t *out);

/* ---- head and loss: fp32 in the written order, section 3 ---- */

/* f[c] = (x[c] - zero) * scale; logits[k] = sum over c ascending of w[k][c] f[c], then + b[k]. */
void tl_dense_f32(const int8_t *x, int32_t zero, float scale, const float *w, const float *b, int32_t classes,
                  int32_t features, float *logits);
/* TL_BAD_LR where lr is negative or not finite or lr * largest is not finite. */
tl_status tl_check_lr(float lr, float largest);
/* loss and g[k] = p[k] - (k == label). TL_BAD_ARGUMENT (label), TL_NOT_FINITE (logits); then nothing is written. */
tl_status tl_softmax_xent_f32(const float *logits, int32_t classes, int32_t label, float *loss, float *g);
/* gf[c] = sum over k ascending of w[k][c] g[k]. */
void tl_dense_dx_f32(const float *g, const float *w, int32_t classes, int32_t features, float *gf);
/* SGD of the head; l[k] = lr g[k], 0 below 2^-100. */
void tl_dense_sgd_f32(const float *g, const int8_t *x, int32_t zero, float scale, float lr, int32_t classes,
                      int32_t features, float *w, float *b);
/* Random start (section 5): n floats within +-range from word(i), site 0xffffffff, step 0; range = (fp32)(1/sqrt(fan-in)). */
void tl_random_f32(uint32_t seed, int32_t n, float range, float *out);

/* ---- gradients, section 4 ---- */

/* Run-time facts of one training step. */
typedef struct {
    uint32_t key;       /* mix(seed + 0x9e3779b9 * step); a site's key is mix(key + site) */
    int32_t anchor;     /* A, set by tl_enter_grad_s8 */
    uint32_t saturated; /* elements of rounded gradients that met the clamp, summed over the step */
    uint32_t rounded;   /* elements rounded */
} tl_step;

/* An int8 gradient and its exponent. */
typedef struct {
    tl_view r;
    int32_t e;
} tl_grad;

/* Entry into integers. v[n] is read and overwritten by v * factor; factor is fp32, such as 1/(H W) of a global pool. Writes
 * r[n], *e = A - 7 and step->anchor. TL_NOT_FINITE or TL_ZERO_GRADIENT (then nothing else is written). */
tl_status tl_enter_grad_s8(tl_step *step, uint32_t site, float *v, int32_t n, float factor, int8_t *r, int16_t *e);
/* out = r where the mask is 1, else 0; H x W x C. out may be r, if that is plain. */
void tl_mask_grad_s8(tl_view r, tl_mask mask, int32_t height, int32_t width, int32_t channels, int8_t *out);

/* Gradient of a maximum over windows: each r at the element that won, 0 elsewhere, in_h x in_w x in_c. winners as above, a
 * plain out_h x out_w x in_c buffer. _s8 for windows that lie apart, _s32 sums what an element has won. */
void tl_max_pool_dx_s8(const tl_conv *c, tl_view r, const int8_t *winners, int8_t *rx);
void tl_max_pool_dx_s32(const tl_conv *c, tl_view r, const int8_t *winners, int32_t *acc);

/* The rounding site of a gradient tensor: its number, its state rho, where e_x = A + rho - 6 is written, further gradients
 * (n of them, in the order of the consumers), mask. */
typedef struct {
    uint32_t number;
    int8_t *rho;
    int16_t *e;
    const tl_grad *further;
    int32_t n_further;
    tl_mask mask;
} tl_site;

/* Scale of an input gradient's sums: v = mult 2^(exp - 31); one entry, and mt[O], for a general convolution; one entry per
 * channel, mt = NULL, for a depthwise one. pre is p of section 2. */
typedef struct {
    const int16_t *mt;
    const int32_t *mult;
    const int16_t *exp;
    int32_t pre;
} tl_dx_scale;

/* Input gradient with further gradients, mask and the one rounding: rows y0..y1-1 of rx, a plain in_h x in_w x in_c
 * buffer. Calls for consecutive row ranges from 0 to in_h share `scratch`, whose first tl_*_dx_seen bytes carry the
 * rounding's statistics from call to call; rho is updated by the call that ends at in_h. Weights are those before their
 * update. rx does not overlap g, but a depthwise one of stride 1 that keeps the size may write over a plain g, all rows in
 * one call: the scratch is tl_depthwise_ring more then. Scratch: tl_conv2d_dx_scratch / tl_depthwise_dx_scratch. */
void tl_conv2d_dx_s8(tl_step *step, const tl_conv *c, const tl_dx_scale *v, tl_weights w, tl_grad g, const tl_site *site,
                     int8_t *rx, int32_t y0, int32_t y1, void *scratch);
void tl_depthwise_dx_s8(tl_step *step, const tl_conv *c, const tl_dx_scale *v, tl_weights w, tl_grad g,
                        const tl_site *site, int8_t *rx, int32_t y0, int32_t y1, void *scratch);
/* A site where no consumer computes: h = 0 with n = 16, then the further gradients. */
void tl_round_grad_s8(tl_step *step, const tl_site *site, int32_t height, int32_t width, int32_t channels, int8_t *rx);

/* ---- updates, section 4 ---- */

/* b[o] -= ... ; rate[o] = kb[o], 0 for a dead channel; pre is p for the bound 127 * pixels. Scratch 4 * C bytes. */
void tl_bias_sgd_s8(const tl_step *step, uint32_t site, tl_grad g, int32_t height, int32_t width, int32_t channels,
                    const float *rate, float lr, int32_t pre, int32_t *bias, void *scratch);

/* Weight update of the kept channels. c is the layer's geometry, x the kept channels of its input (groups * kept, depthwise
 * kept) over in_h x in_w; channels[kept] maps them to the weight's last axis (NULL: all). rate[O] = kw[o], 0 for a dead
 * channel. w [O][kh][kw][kept] (depthwise [kept][kh][kw]); fraction: NULL (L = 0), packed nibbles, low first (L = 4), or
 * int8 (L = 8), in the order of w. Random words use the index in the full layout. Scratch: tl_*_dw_scratch. */
typedef struct {
    uint32_t site;
    const uint16_t *channels;
    int32_t kept, bits, pre; /* bits is L */
    const float *rate;
} tl_dw;
void tl_conv2d_dw_s8(const tl_step *step, const tl_conv *c, const tl_dw *d, tl_grad g, tl_view x, float lr, int8_t *w,
                     uint8_t *fraction, void *scratch);
void tl_depthwise_dw_s8(const tl_step *step, const tl_conv *c, const tl_dw *d, tl_grad g, tl_view x, float lr, int8_t *w,
                        uint8_t *fraction, void *scratch);

/* ---- gradients stored as sums, where they are not fused with what rounds them: the same bytes from more memory ---- */

/* acc[in_h][in_w][in_c] = sum of W t, depthwise sum of W r; r has the output's size. Weights are those before their update. */
void tl_conv2d_dx_s32(const tl_conv *c, const int16_t *mt, tl_weights w, tl_view r, int32_t *acc);
void tl_depthwise_dx_s32(const tl_conv *c, tl_weights w, tl_view r, int32_t *acc);
/* Rounds such sums, e being the exponent of the r that they were made from. v->mt is not read; per_channel: v has an entry
 * per channel (depthwise). rx does not overlap acc. */
void tl_round_grad_s32(tl_step *step, const tl_dx_scale *v, int32_t per_channel, const int32_t *acc, int32_t e,
                       const tl_site *site, int32_t height, int32_t width, int32_t channels, int8_t *rx);
/* dw = sum of r (x - x_zero) of the kept channels, in the order of tl_dw's w. channels: those of r, NULL for all. */
void tl_conv2d_dw_s32(const tl_conv *c, int32_t kept, tl_view r, tl_view x, int32_t *dw);
void tl_depthwise_dw_s32(const tl_conv *c, const uint16_t *channels, int32_t kept, tl_view r, tl_view x, int32_t *dw);
/* The update of w by such sums, e being the exponent of r; general and depthwise layers. */
void tl_weight_sgd_s32(const tl_step *step, const tl_conv *c, const tl_dw *d, const int32_t *dw, int32_t e, float lr,
                       int8_t *w, uint8_t *fraction);
/* db[channels] = sum of r; and the update of a bias by it. */
void tl_bias_grad_s32(tl_view r, int32_t height, int32_t width, int32_t channels, int32_t *db);
void tl_bias_sgd_s32(const tl_step *step, uint32_t site, const int32_t *db, int32_t e, int32_t channels,
                     const float *rate, float lr, int32_t pre, int32_t *bias);

/* ---- scratch sizes in bytes, a multiple of 4; also called from the compiler through the host library ---- */
int32_t tl_conv2d_scratch(const tl_conv *c);
int32_t tl_conv2d_packed_scratch(const tl_conv *c); /* where weights are TL_READY */
int32_t tl_depthwise_scratch(const tl_conv *c);
int32_t tl_depthwise_ring(const tl_conv *c);
int32_t tl_conv2d_dx_scratch(const tl_conv *c);
int32_t tl_depthwise_dx_scratch(const tl_conv *c);
int32_t tl_conv2d_dw_scratch(const tl_conv *c, int32_t kept);
int32_t tl_depthwise_dw_scratch(const tl_conv *c, int32_t kept);

#endif
