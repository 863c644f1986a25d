// Any processor without a path of its own.
#include "ops.h"

extern const Ops ops_portable;

const Ops *ops_path(int i) {
    return i == 0 ? &ops_portable : NULL;
}

const Ops *ops_select(void) {
    return &ops_portable;
}
