#include "version.h"

const char version_number[] = "0.1";
const char version_commit[] = COMMIT;
const char version_cuda[] = CUDA_IS;
