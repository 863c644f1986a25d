// Any processor without a path of its own.
#include "ops.h"

extern const Ops ops_portable;

const Ops *ops_select(void) {
    return &ops_portable;
}
