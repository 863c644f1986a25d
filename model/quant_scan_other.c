// Any processor without a path of its own.
#include "quant_scan.h"

const QuantScan *quant_scan_select(void) {
    return &quant_scan_portable;
}
