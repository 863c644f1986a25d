// Tensor maps: what tells a Hopper GPU's copies of boxes (ptx.cuh, copy_tensor_2d and its like) where a tensor is.
#ifndef CUDA_TENSOR_MAP_H
#define CUDA_TENSOR_MAP_H

#include <cuda.h> // types of tensor maps only; the one driver function is found at run time

#include "check.h"
extern "C" {
#include "../../tokenizer/error.h"
}

// A map of `rank` dimensions, the closest one first; stride_bytes: of those after it. box: what a copy brings, its rows
// as close as they can be, inner_bytes each (a power of two from 16 to 128), swizzled if they are 32 or more: the 16
// bytes at an address of the box's go to the address whose bits 4 and up have been xored with its bits 7 and up, as
// many as a row of a box has. What is outside the dimensions is zero.
bool tensor_map(CUtensorMap *map, CUtensorMapDataType type, const void *base, int rank, const cuuint64_t *dims,
                const cuuint64_t *stride_bytes, const cuuint32_t *box, int inner_bytes, Error *err);

#endif
