#include "version.h"

const char version_number[] = VERSION;
const char version_commit[] = COMMIT;
const char version_cuda[] = CUDA_IS;
