#include "quant_scan.h"

#include <string.h>

static void add(Scan *sums, int scale, int32_t y, int32_t r) {
    int32_t e = y - SCAN_ONE * r;
    sums->error[scale] += e * e;
    sums->product[scale] += e * r;
    sums->square[scale] += r * r;
}

static void scan_int4(Scan *out, const uint16_t *x, int n, const uint16_t m[SCAN_SCALES]) {
    memset(out, 0, sizeof *out);
    for (int i = 0; i < n; i++)
        for (int s = 0; s < SCAN_SCALES; s++) {
            int32_t y = ((int16_t)x[i] * (int16_t)m[s] + (1 << 14)) >> 15, r = (y + SCAN_ONE / 2) >> 8;
            add(out, s, y, r < -8 ? -8 : r > 7 ? 7 : r);
        }
}

static void scan_int8(Scan *out, const uint16_t *x, int n, const uint16_t m[SCAN_SCALES]) {
    memset(out, 0, sizeof *out);
    for (int i = 0; i < n; i++)
        for (int s = 0; s < SCAN_SCALES; s++) {
            int32_t y = (int32_t)((uint32_t)x[i] * m[s] >> 16), r = (y + SCAN_ONE / 2) >> 8;
            add(out, s, y, r > 127 ? 127 : r);
        }
}

const QuantScan quant_scan_portable = {scan_int4, scan_int8};
