// Sixteen scales at once for a block of a group, in whole numbers: what the search for the scale of int8 and int4
// compares. A weight is a 16-bit number x, a scale a multiplier m, and y = x × m the weight in units of the scale,
// times 256. r is the code nearest to y and e = y - 256 r. Whole numbers,
// so that every instruction set gives the same sums.
#ifndef QUANT_SCAN_H
#define QUANT_SCAN_H

#include <stdint.h>

enum { SCAN_SCALES = 16, SCAN_ONE = 256 };

// Of each scale the sums of e², e·r and r²; n · (largest |e|)² < 2^31.
typedef struct {
    int32_t error[SCAN_SCALES], product[SCAN_SCALES], square[SCAN_SCALES];
} Scan;

// x [n], n even. int4: x and m are of int16, y = x · m / 2^15, rounded, and r is -8 to 7. int8, of magnitudes:
// y = x · m / 2^16, rounded down, and r at most 127.
typedef void ScanFunction(Scan *out, const uint16_t *x, int n, const uint16_t m[SCAN_SCALES]);
typedef struct {
    ScanFunction *int4, *int8;
} QuantScan;

extern const QuantScan quant_scan_portable;
// The fastest for the processor that runs this.
const QuantScan *quant_scan_select(void);

#endif
