/* SPDX-License-Identifier: Apache-2.0 */
/* Rounding of gradient tensors; see tl_round.h for the interface and section 4 of the arithmetic page for the rule.
 * Loops run over all TL_LANES lanes with constant bounds so that compilers make vectors of them; lanes past `count`
 * hold h = 0, which rounds to 0 with any word and touches neither statistics nor counters. */
#include "tl_round.h"

#include "tl_math.h"
#include "tl_move.h"

#define TL_NOTHING_SEEN INT32_MIN
#define TL_H_MAX ((int32_t)1 << 30)

void tl_round_begin(tl_round *r, tl_step *step, const tl_site *site, const tl_dx_scale *v, int32_t per_channel,
                    int32_t e_y, int32_t width, int32_t channels, int32_t *seen, int32_t first) {
    memset(r, 0, sizeof *r);
    r->step = step;
    r->site = site;
    r->mult = v ? v->mult : NULL;
    r->exp = v ? v->exp : NULL;
    r->pre = v ? v->pre : 0;
    r->per_channel = per_channel;
    r->e_y = e_y;
    r->e_x = step->anchor + *site->rho - 6;
    r->width = width;
    r->channels = channels;
    r->key = tl_site_key(step->key, site->number);
    r->seen = seen;
    if (first) *seen = TL_NOTHING_SEEN;
    *site->e = (int16_t)r->e_x;
}

/* bitlen(a | b) is the larger bitlen, so the largest rel over all elements and channels is one running maximum. */
static void flush_seen(tl_round *r) {
    for (int32_t j = 0; j < TL_LANES; j++) {
        if (r->lane_or[j] == 0) continue;
        *r->seen = TL_MAX(*r->seen, tl_bitlen(r->lane_or[j]) - r->lane_n[j]);
        r->lane_or[j] = 0;
    }
}

void tl_round_lanes(tl_round *r, int32_t c0, int32_t count) {
    flush_seen(r);
    r->c0 = c0;
    r->count = count;
    for (int32_t j = 0; j < TL_LANES; j++) {
        const int32_t c = r->per_channel ? c0 + TL_MIN(j, count - 1) : 0;
        const tl_shift s = tl_shift_of(r->mult ? r->e_x - (r->exp[c] + r->e_y - r->pre + 1) : 16);
        r->lane_mult[j] = r->mult && !s.none ? r->mult[c] : 0;
        r->lane_d[j] = s.d;
        r->lane_n[j] = s.n;
    }
}

/* h = prescale(smmulr(acc << p, mult), n) */
static void scale_lanes(const tl_round *r, const int32_t *acc, int32_t *h) {
    const int32_t pre = r->pre;
    for (int32_t j = 0; j < TL_LANES; j++) {
        h[j] = tl_round_shift(tl_smmulr(tl_shl(acc[j], pre), r->lane_mult[j]), r->lane_d[j]);
    }
}

static void add_further(const tl_round *r, const tl_grad *g, int32_t y, int32_t x, int32_t *h) {
    int32_t more[TL_LANES];
    const int8_t *from = g->r.data + (ptrdiff_t)(y % g->r.ring) * g->r.row + (ptrdiff_t)x * g->r.pixel + r->c0;
    const int32_t apart = g->e - r->e_x;
    if (r->count == TL_LANES) {
        for (int32_t j = 0; j < TL_LANES; j++) more[j] = from[j];
    } else {
        tl_zero32(more, TL_LANES);
        for (int32_t j = 0; j < r->count; j++) more[j] = from[j];
    }
    for (int32_t j = 0; j < TL_LANES; j++) {
        const int32_t k = apart + r->lane_n[j];
        const int32_t up = tl_clamp(k, 0, 24);
        const int32_t down = tl_clamp(-k, 0, 8); /* 8 bits and more leave nothing of |r'| <= 127 */
        const int32_t add = tl_round_shift(tl_clamp(tl_shl(more[j], up), -TL_H_MAX, TL_H_MAX), down);
        h[j] = TL_MIN(h[j], TL_H_MAX - TL_MAX(add, 0)); /* 2^30 + 2^30 is no int32 */
        h[j] = tl_clamp(h[j] + add, -TL_H_MAX, TL_H_MAX);
    }
}

static void mask_bits(const uint8_t *bits, uint32_t index, int32_t count, int32_t *h) {
    const uint32_t first = index >> 3, last = (index + (uint32_t)count - 1) >> 3; /* the last byte ends the buffer */
    uint32_t word = bits[first];
    if (last > first) word |= (uint32_t)bits[first + 1] << 8;
    if (last > first + 1) word |= (uint32_t)bits[first + 2] << 16;
    word >>= index & 7;
    for (int32_t j = 0; j < TL_LANES; j++) h[j] &= -(int32_t)(word >> j & 1);
}

static void mask_value(const tl_mask *m, uint32_t index, int32_t count, int32_t *h) {
    const int8_t *y = m->y + index;
    const int32_t lo = m->lo, hi = m->hi;
    if (count == TL_LANES) {
        for (int32_t j = 0; j < TL_LANES; j++) h[j] = lo < y[j] && y[j] < hi ? h[j] : 0;
    } else {
        for (int32_t j = 0; j < count; j++) h[j] = lo < y[j] && y[j] < hi ? h[j] : 0;
    }
}

/* out = sround(h, n, word) within -128..128, so that one comparison tells what met the clamp to +-127. */
static void round_lanes(const tl_round *r, uint32_t index, const int32_t *h, int32_t *out) {
    const uint32_t at = r->key + index;
    for (int32_t j = 0; j < TL_LANES; j++) {
        const int32_t n = r->lane_n[j];
        const int32_t up = TL_MIN(TL_MAX(-n, 0), 20);
        const int32_t v = tl_sround_right(h[j], TL_MAX(n, 0), tl_mix(at + (uint32_t)j));
        out[j] = tl_shl(tl_clamp(v, -128, 128), up);
    }
}

void tl_round_pixel(tl_round *r, int32_t y, int32_t x, const int32_t *acc, int8_t *out) {
    const tl_site *site = r->site;
    const uint32_t index =
        ((uint32_t)y * (uint32_t)r->width + (uint32_t)x) * (uint32_t)r->channels + (uint32_t)r->c0;
    const int32_t count = r->count;
    int32_t h[TL_LANES], v[TL_LANES];
    if (r->mult) {
        scale_lanes(r, acc, h);
    } else {
        tl_zero32(h, TL_LANES);
    }
    for (int32_t i = 0; i < site->n_further; i++) add_further(r, &site->further[i], y, x, h);
    if (site->mask.bits) {
        mask_bits(site->mask.bits, index, count, h);
    } else if (site->mask.y) {
        mask_value(&site->mask, index, count, h);
    }
    for (int32_t j = 0; j < TL_LANES; j++) r->lane_or[j] |= (uint32_t)(h[j] ^ (h[j] >> 31));
    round_lanes(r, index, h, v);
    for (int32_t j = 0; j < TL_LANES; j++) {
        r->lane_met[j] += v[j] < -127 || v[j] > 127;
        v[j] = tl_clamp(v[j], -127, 127);
    }
    r->rounded += (uint32_t)count;
    if (count == TL_LANES) {
        for (int32_t j = 0; j < TL_LANES; j++) out[j] = (int8_t)v[j];
    } else {
        for (int32_t j = 0; j < count; j++) out[j] = (int8_t)v[j];
    }
}

void tl_round_end(tl_round *r, int32_t last) {
    flush_seen(r);
    for (int32_t j = 0; j < TL_LANES; j++) r->step->saturated += r->lane_met[j];
    r->step->rounded += r->rounded;
    if (!last || *r->seen == TL_NOTHING_SEEN) return;
    const int32_t rel = *r->seen + r->e_x - r->step->anchor;
    *r->site->rho = (int8_t)tl_clamp(TL_MAX(rel, *r->site->rho - 1), -60, 60);
}

void tl_round_grad_s8(tl_step *step, const tl_site *site, int32_t height, int32_t width, int32_t channels,
                      int8_t *rx) {
    tl_round r;
    int32_t seen;
    tl_round_begin(&r, step, site, NULL, 0, 0, width, channels, &seen, 1);
    for (int32_t c = 0; c < channels; c += TL_LANES) {
        tl_round_lanes(&r, c, TL_MIN(TL_LANES, channels - c));
        for (int32_t y = 0; y < height; y++) {
            for (int32_t x = 0; x < width; x++) {
                tl_round_pixel(&r, y, x, NULL, rx + ((ptrdiff_t)y * width + x) * channels + c);
            }
        }
    }
    tl_round_end(&r, 1);
}
