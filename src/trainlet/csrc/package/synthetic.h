/* SPDX-License-Identifier: Apache-2.0 */
/* The images of the test vectors, by a formula. */

/* Row y of image t: WIDTH pixels of CHANNELS signed bytes. */
static void synthetic_row(int t, int y, int8_t *row)
{
    for (int x = 0; x < @UPPER@_WIDTH; x++)
        for (int c = 0; c < @UPPER@_CHANNELS; c++)
            row[x * @UPPER@_CHANNELS + c] = (int8_t)((7 * y + 13 * x + 29 * c + 31 * t + y * x * t / 64) % 256 - 128);
}
