/* SPDX-License-Identifier: Apache-2.0 */
#include "tl_math.h"
#include "tl_round.h"

static int32_t weight_at(const tl_conv *c, tl_weights w, int32_t o, int32_t tap, int32_t i)
{
    const int32_t taps = c->kh * c->kw, cg = c->in_c / c->groups;
    if (!w.channels) return (w.n ? w.trained : w.frozen)[(o * taps + tap) * cg + i];
    int32_t below = 0;
    while (below < w.n && w.channels[below] < i) below++;
    if (below < w.n && w.channels[below] == i) return w.trained[(o * taps + tap) * w.n + below];
    return w.frozen[(o * taps + tap) * (cg - w.n) + i - below];
}
int32_t tl_conv2d_scratch(const tl_conv *c) { (void)c; return 0; }
int32_t tl_conv2d_dx_scratch(const tl_conv *c) { (void)c; return 4; }
int32_t tl_conv2d_dw_scratch(const tl_conv *c, int32_t kept) { (void)c; (void)kept; return 0; }

void tl_conv2d_s8(const tl_conv *c, const tl_requant *q, tl_weights w, const int32_t *bias, tl_view x, tl_view y,
                  int32_t y0, int32_t y1, void *scratch)
{
    const int32_t cg = c->in_c / c->groups, og = c->out_c / c->groups;
    (void)scratch;
    for (int32_t oy = y0; oy < y1; oy++)
        for (int32_t ox = 0; ox < c->out_w; ox++)
            for (int32_t o = 0; o < c->out_c; o++) {
                int32_t acc = bias[o];
                for (int32_t t = 0; t < c->kh * c->kw; t++) {
                    const int32_t iy = oy * c->stride_h - c->pad_h + t / c->kw * c->dil_h;
                    const int32_t ix = ox * c->stride_w - c->pad_w + t % c->kw * c->dil_w;
                    if (iy < 0 || ix < 0 || iy >= c->in_h || ix >= c->in_w) continue;
                    const int8_t *p = x.data + (iy % x.ring) * x.row + ix * x.pixel + o / og * cg;
                    for (int32_t i = 0; i < cg; i++) acc += weight_at(c, w, o, t, i) * (p[i] - c->x_zero);
                }
                y.data[(oy % y.ring) * y.row + ox * y.pixel + o] =
                    (int8_t)tl_clamp(tl_sat32((int64_t)tl_mbqm(acc, q->mult[o], q->shift[o]) + q->y_zero), q->lo, q->hi);
            }
}

void tl_conv2d_dx_s8(tl_step *step, const tl_conv *c, const tl_dx_scale *v, tl_weights w, tl_grad g, const tl_site *site,
                     int8_t *rx, int32_t y0, int32_t y1, void *scratch)
{
    const int32_t cg = c->in_c / c->groups, og = c->out_c / c->groups;
    tl_round r;
    tl_round_begin(&r, step, site, v, 0, g.e, c->in_w, c->in_c, scratch, y0 == 0);
    for (int32_t c0 = 0; c0 < c->in_c; c0 += TL_LANES) {
        const int32_t count = TL_MIN(TL_LANES, c->in_c - c0);
        tl_round_lanes(&r, c0, count);
        for (int32_t iy = y0; iy < y1; iy++)
            for (int32_t ix = 0; ix < c->in_w; ix++) {
                int32_t acc[TL_LANES] = {0};
                for (int32_t t = 0; t < c->kh * c->kw; t++) {
                    const int32_t ay = iy + c->pad_h - t / c->kw * c->dil_h, ax = ix + c->pad_w - t % c->kw * c->dil_w;
                    if (ay < 0 || ax < 0 || ay % c->stride_h || ax % c->stride_w) continue;
                    const int32_t oy = ay / c->stride_h, ox = ax / c->stride_w;
                    if (oy >= c->out_h || ox >= c->out_w) continue;
                    const int8_t *p = g.r.data + (oy % g.r.ring) * g.r.row + ox * g.r.pixel;
                    for (int32_t j = 0; j < count; j++) {
                        const int32_t grp = (c0 + j) / cg;
                        for (int32_t o = grp * og; o < (grp + 1) * og; o++)
                            acc[j] += weight_at(c, w, o, t, (c0 + j) % cg) * (p[o] * v->mt[o]);
                    }
                }
                tl_round_pixel(&r, iy, ix, acc, rx + (iy * c->in_w + ix) * c->in_c + c0);
            }
    }
    tl_round_end(&r, y1 == c->in_h);
}

void tl_conv2d_dw_s8(const tl_step *step, const tl_conv *c, const tl_dw *d, tl_grad g, tl_view x, float lr, int8_t *w,
                     uint8_t *fraction, void *scratch)
{
    const int32_t taps = c->kh * c->kw, og = c->out_c / c->groups;
    const uint32_t key = tl_site_key(step->key, d->stream);
    (void)scratch;
    for (int32_t o = 0; o < c->out_c; o++) {
        const float v = lr * d->rate[o];
        if (v == 0.0f) continue;
        const tl_rate rate = tl_rate_of(v, g.e, d->pre, d->bits);
        for (int32_t t = 0; t < taps; t++)
            for (int32_t j = 0; j < d->kept; j++) {
                int32_t acc = 0;
                for (int32_t oy = 0; oy < c->out_h; oy++)
                    for (int32_t ox = 0; ox < c->out_w; ox++) {
                        const int32_t iy = oy * c->stride_h - c->pad_h + t / c->kw * c->dil_h;
                        const int32_t ix = ox * c->stride_w - c->pad_w + t % c->kw * c->dil_w;
                        if (iy < 0 || ix < 0 || iy >= c->in_h || ix >= c->in_w) continue;
                        acc += g.r.data[(oy % g.r.ring) * g.r.row + ox * g.r.pixel + o] *
                               (x.data[(iy % x.ring) * x.row + ix * x.pixel + o / og * d->kept + j] - c->x_zero);
                    }
                const int32_t i = d->channels ? d->channels[j] : j;
                tl_weight_sub(w, fraction, (o * taps + t) * d->kept + j, d->bits,
                              tl_rate_step(&rate, acc, tl_word(key, (uint32_t)((o * taps + t) * (c->in_c / c->groups) + i))));
            }
    }
}
