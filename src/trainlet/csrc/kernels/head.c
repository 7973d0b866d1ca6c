/* SPDX-License-Identifier: Apache-2.0 */
/* Head and loss in fp32, section 3: the written order, no libm, no fused multiply-add. */
#include "tl_math.h"
#include "tl.h"

static uint32_t bits_of(float v)
{
    uint32_t u;
    memcpy(&u, &v, sizeof u);
    return u;
}

static float float_of(uint32_t u)
{
    float v;
    memcpy(&v, &u, sizeof v);
    return v;
}

static int is_finite(float v)
{
    return (bits_of(v) & 0x7f800000u) != 0x7f800000u;
}

static float absolute(float v)
{
    return float_of(bits_of(v) & 0x7fffffffu);
}

/* 2^n for n in -126..127. */
static float power_of_two(int32_t n)
{
    return float_of((uint32_t)(n + 127) << 23);
}

static float floor_of(float x)
{
    const float t = (float)(int32_t)x;
    return t > x ? t - 1.0f : t;
}

/* x <= 0 */
static float exp_of(float x)
{
    static const float c[] = {8.3333333e-3f, 4.1666667e-2f, 1.6666667e-1f, 0.5f, 1.0f, 1.0f};
    float n, r, p = 1.3888889e-3f;
    if (x < -80.0f) return 0.0f;
    n = x * 1.44269504f;
    n = floor_of(n + 0.5f);
    r = n * 0.693359375f;
    r = x - r;
    r = r - n * -2.12194440e-4f;
    for (int i = 0; i < 6; i++) {
        p = p * r;
        p = p + c[i];
    }
    return p * power_of_two((int32_t)n);
}

/* z >= 1 */
static float log_of(float z)
{
    static const float c[] = {0.28571429f, 0.4f, 0.66666667f, 2.0f};
    const uint32_t u = bits_of(z);
    int32_t e = (int32_t)(u >> 23) - 126;
    float f = float_of((u & 0x7fffffu) | 0x3f000000u), s, t, p = 0.22222222f;
    if (f < 0.70710678f) {
        f = 2.0f * f;
        e = e - 1;
    }
    s = (f - 1.0f) / (f + 1.0f);
    t = s * s;
    for (int i = 0; i < 4; i++) {
        p = p * t;
        p = p + c[i];
    }
    p = s * p;
    return (float)e * 0.69314718f + p;
}

void tl_dense_f32(const int8_t *x, int32_t zero, float scale, const float *w, const float *b, int32_t classes,
                  int32_t features, float *logits)
{
    for (int32_t k = 0; k < classes; k++) {
        float a = 0.0f;
        for (int32_t c = 0; c < features; c++) {
            const float f = (float)(x[c] - zero) * scale;
            const float product = w[k * features + c] * f;
            a = a + product;
        }
        logits[k] = a + b[k];
    }
}

tl_status tl_check_lr(float lr, float largest)
{
    const float v = lr * largest;
    return is_finite(lr) && is_finite(v) && !(lr < 0.0f) ? TL_OK : TL_BAD_LR;
}

tl_status tl_softmax_xent_f32(const float *logits, int32_t classes, int32_t label, float *loss, float *g)
{
    float top, sum = 0.0f;
    if (label < 0 || label >= classes) return TL_BAD_ARGUMENT;
    for (int32_t k = 0; k < classes; k++)
        if (!is_finite(logits[k])) return TL_NOT_FINITE;
    top = logits[0];
    for (int32_t k = 1; k < classes; k++) top = logits[k] > top ? logits[k] : top;
    for (int32_t k = 0; k < classes; k++) {
        g[k] = exp_of(logits[k] - top);
        sum = sum + g[k];
    }
    for (int32_t k = 0; k < classes; k++) {
        float p = g[k] / sum;
        if (p < power_of_two(-60)) p = 0.0f;
        g[k] = k == label ? p - 1.0f : p;
    }
    *loss = log_of(sum) - (logits[label] - top);
    return TL_OK;
}

void tl_dense_dx_f32(const float *g, const float *w, int32_t classes, int32_t features, float *gf)
{
    for (int32_t c = 0; c < features; c++) gf[c] = 0.0f;
    for (int32_t k = 0; k < classes; k++) {
        for (int32_t c = 0; c < features; c++) {
            const float product = w[k * features + c] * g[k];
            gf[c] = gf[c] + product;
        }
    }
}

void tl_dense_sgd_f32(const float *g, const int8_t *x, int32_t zero, float scale, float lr, int32_t classes,
                      int32_t features, float *w, float *b)
{
    for (int32_t k = 0; k < classes; k++) {
        float l = lr * g[k];
        if (absolute(l) < power_of_two(-100)) l = 0.0f;
        for (int32_t c = 0; c < features; c++) {
            const float f = (float)(x[c] - zero) * scale;
            const float product = l * f;
            w[k * features + c] = w[k * features + c] - product;
        }
        b[k] = b[k] - l;
    }
}

void tl_random_f32(uint32_t seed, int32_t n, float range, float *out)
{
    const uint32_t key = tl_site_key(tl_step_key(seed, 0), 0xffffffffu);
    for (int32_t i = 0; i < n; i++) {
        const float unit = (float)(tl_word(key, (uint32_t)i) >> 8) * power_of_two(-23);
        out[i] = (unit - 1.0f) * range;
    }
}

/* The exponent of frexp: |v| = f 2^e with f in [0.5, 1); v is normal (tiny values were cut to 0). */
static int32_t exponent_of(float v)
{
    return (int32_t)(bits_of(v) >> 23 & 0xff) - 126;
}

/* trunc(v 2^n), exact: the integer part of a scaled mantissa. */
static int32_t scaled_trunc(float v, int32_t n)
{
    const uint32_t u = bits_of(v);
    const int32_t shift = (int32_t)(u >> 23 & 0xff) - 150 + n;
    const int64_t m = (int64_t)((u & 0x7fffffu) | 0x800000u);
    const int64_t h = shift >= 0 ? m * ((int64_t)1 << TL_MIN(shift, 31)) : shift < -31 ? 0 : m >> -shift;
    if ((u & 0x7fffffffu) == 0) return 0;
    return (int32_t)(u >> 31 ? -h : h);
}

tl_status tl_enter_grad_s8(tl_step *step, uint32_t site, float *v, int32_t n, float factor, int8_t *r, int16_t *e)
{
    const uint32_t key = tl_site_key(step->key, site);
    float largest = 0.0f;
    for (int32_t i = 0; i < n; i++) {
        const float scaled = v[i] * factor;
        if (!is_finite(scaled)) return TL_NOT_FINITE;
        v[i] = absolute(scaled) < power_of_two(-100) ? 0.0f : scaled;
        largest = absolute(v[i]) > largest ? absolute(v[i]) : largest;
    }
    if (largest == 0.0f) return TL_ZERO_GRADIENT;
    step->anchor = exponent_of(largest);
    *e = (int16_t)(step->anchor - 7);
    for (int32_t i = 0; i < n; i++) {
        const int32_t q = tl_sround(scaled_trunc(v[i], 20 - *e), 20, tl_word(key, (uint32_t)i));
        r[i] = (int8_t)tl_clamp(q, -127, 127);
        step->saturated += q != r[i];
    }
    step->rounded += (uint32_t)n;
    return TL_OK;
}
