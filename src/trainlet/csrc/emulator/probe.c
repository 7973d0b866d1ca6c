/* SPDX-License-Identifier: Apache-2.0 */
/* Called behind every node of a model that is compared node by node. Here a hook looks at memory; on a chip whoever
 * controls it stops at the function. */
#include "tl_model.h"

void tl_port_probe(const tl_context *c, int32_t point, int32_t row);

#if __STDC_HOSTED__
extern void (*tl_port_probe_hook)(int32_t point, int32_t row);
void (*tl_port_probe_hook)(int32_t point, int32_t row);

void tl_port_probe(const tl_context *c, int32_t point, int32_t row)
{
    (void)c;
    if (tl_port_probe_hook) tl_port_probe_hook(point, row);
}
#else
void tl_port_probe(const tl_context *c, int32_t point, int32_t row)
{
    (void)c, (void)point, (void)row;
}
#endif
