#include "tensor_map.h"

typedef CUresult (*EncodeTiled)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *,
                                const cuuint64_t *, const cuuint32_t *, const cuuint32_t *, CUtensorMapInterleave,
                                CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

bool tensor_map(CUtensorMap *map, CUtensorMapDataType type, const void *base, int rank, const cuuint64_t *dims,
                const cuuint64_t *stride_bytes, const cuuint32_t *box, int inner_bytes, Error *err) {
    static EncodeTiled encode; // found once, without linking the driver's library
    cuuint32_t unit[4] = {1, 1, 1, 1};
    if (!encode) {
        void *found = NULL;
        cudaDriverEntryPointQueryResult result;
        CUDA_TRY(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result));
        if (!found) return fail(err, "the driver has no cuTensorMapEncodeTiled");
        encode = (EncodeTiled)found;
    }
    const CUtensorMapSwizzle swizzle = inner_bytes == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                                       : inner_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                       : inner_bytes == 32 ? CU_TENSOR_MAP_SWIZZLE_32B
                                                           : CU_TENSOR_MAP_SWIZZLE_NONE;
    CUresult status =
        encode(map, type, rank, (void *)base, dims, stride_bytes, box, unit, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return status == CUDA_SUCCESS || fail(err, "cuTensorMapEncodeTiled failed: driver error %d", (int)status);
}
