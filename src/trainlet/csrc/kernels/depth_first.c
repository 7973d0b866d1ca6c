/* SPDX-License-Identifier: Apache-2.0 */
/* A depth-first run makes one row at a time, always of its last stage that has the rows it needs. The compiler has walked the
 * same way and knows from it how many rows of each tensor there have to be. */
#include "tl_math.h"
#include "tl_model.h"

static uint16_t *counters(const tl_depth_first *s, tl_context *c)
{
    return TL_AT(uint16_t, c->arena, s->counters);
}

static int enough(const uint16_t *done, int32_t source, int32_t rows, int32_t fed)
{
    return source == TL_WHOLE || (source == TL_FED ? fed : done[source]) >= rows;
}

static int ready(const tl_stage *t, int32_t y, const uint16_t *done, int32_t fed)
{
    const int32_t rows = TL_MIN(TL_MAX(y * t->stride - t->pad + t->size, 0), t->in_height);
    return y < t->height && enough(done, t->first, rows, fed) && enough(done, t->second, rows, fed);
}

void tl_depth_first_begin(const tl_depth_first *s, tl_context *c)
{
    uint16_t *const done = counters(s, c);
    for (int32_t i = 0; i < s->n; i++) done[i] = 0;
}

void tl_depth_first_feed(const tl_depth_first *s, tl_context *c, int32_t fed)
{
    uint16_t *const done = counters(s, c);
    for (int32_t i = s->n - 1; i >= 0;) {
        if (ready(s->stages + i, done[i], done, fed)) {
            s->stages[i].run(c, done[i]);
            done[i]++;
            i = s->n;
        }
        i--;
    }
}

void tl_depth_first_run(const tl_depth_first *s, tl_context *c)
{
    tl_depth_first_begin(s, c);
    tl_depth_first_feed(s, c, 0);
}
