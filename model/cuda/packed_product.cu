// Products of quantised weights: the launches. What they launch: packed_product_kernel.cuh, by the protocol in
// packed_product.h.
#include "packed_product.h"

#include <string.h>

#include "packed_product_kernel.cuh"
#include "tensor_map.h"

// The tiles that there are: rows of weights x of activations.
enum PackedShape {
    SHAPE_32x16,
    SHAPE_32x32,
    SHAPE_64x32,
    SHAPE_128x16,
    SHAPE_128x32,
    SHAPE_128x64,
    SHAPE_128x256,
    N_SHAPES
};

// Calls body with a tile; with the type of a matrix's codes and the bytes of a group's scale.
template <class Body> static auto with_tile(PackedShape shape, Body body) {
    return shape == SHAPE_32x16    ? body(PackedWarps<32, 16, 1>())
           : shape == SHAPE_32x32  ? body(PackedWarps<32, 32, 1>())
           : shape == SHAPE_64x32  ? body(PackedWarps<64, 32, 1>())
           : shape == SHAPE_128x16 ? body(PackedWarps<128, 16, 1>())
           : shape == SHAPE_128x32 ? body(PackedWarps<128, 32, 1>())
           : shape == SHAPE_128x64 ? body(PackedWarps<128, 64, 2>())
                                   : body(PackedWarpgroups<128, 256, 4>());
}
template <PackedScales SCALES> using Scales = std::integral_constant<PackedScales, SCALES>;
template <class Codes, class Body> static auto with_scales(PackedScales scales, Body body) {
    return scales == SCALES_OF_ROWS      ? body(Codes(), Scales<SCALES_OF_ROWS>())
           : scales == SCALES_BF16_OF_32 ? body(Codes(), Scales<SCALES_BF16_OF_32>())
           : scales == SCALES_BF16       ? body(Codes(), Scales<SCALES_BF16>())
                                         : body(Codes(), Scales<SCALES_FLOAT32>());
}
template <class Body> static auto with_codes(DType dtype, PackedScales scales, Body body) {
    return dtype == DTYPE_F8_E4M3 ? body(CodesFp8(), Scales<SCALES_OF_ROWS>())
           : dtype == DTYPE_I8    ? with_scales<CodesInt8>(scales, body)
                                  : with_scales<CodesInt4>(scales, body);
}
static PackedScales packed_scales(const Packing *packing) {
    return packing->group == 0         ? SCALES_OF_ROWS
           : packing->scale_bytes == 4 ? SCALES_FLOAT32
           : packing->group == 32      ? SCALES_BF16_OF_32
                                       : SCALES_BF16;
}

bool packed_open(CudaState *s, Error *err) {
    int device = 0, major = 0;
    s->packed_rows = 0;
    CUDA_TRY(cudaGetDevice(&device));
    CUDA_TRY(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    if (major != 9 || s->type != DTYPE_BF16) return true;
    // wgmma is Hopper's alone, in sm_90a's code.
    typedef PackedWarpgroups<128, 256, 4> Largest;
    cudaFuncAttributes kernel;
    CUDA_TRY(cudaFuncGetAttributes(&kernel, (const void *)packed_product_kernel<CodesInt4, SCALES_OF_ROWS, Largest>));
    if (kernel.maxThreadsPerBlock != Largest::THREADS) return true;
    for (DType dtype : {DTYPE_F8_E4M3, DTYPE_I8, DTYPE_U8})
        for (PackedScales kind : {SCALES_OF_ROWS, SCALES_BF16_OF_32, SCALES_BF16, SCALES_FLOAT32})
            for (int shape = 0; shape < N_SHAPES; shape++)
                CUDA_TRY(with_codes(dtype, kind, [&](auto codes, auto scales) {
                    return with_tile((PackedShape)shape, [&](auto tile) {
                        typedef decltype(tile) Tile;
                        return cudaFuncSetAttribute(
                            (const void *)packed_product_kernel<decltype(codes), decltype(scales)::value, Tile>,
                            cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::SHARED);
                    });
                }));
    s->packed_rows = PACKED_ROWS;
    return true;
}

bool packed_takes(const Matrix *w) {
    return matrix_is_quantised(w) && w->rows % PACKED_UNIT == 0 && w->cols % PACKED_UNIT == 0;
}

// The tile for T rows of activations and so many of weights. Of few weights a tile is small, so that there are some for
// all SMs, as long as one of 128 x 64 would leave many idle. Of more, codes are widened once for up to 64 activations,
// unless their scales leave no room for two stages of so many, and for 256 where there are enough such tiles.
static PackedShape packed_shape(int T, int rows, const Packing *packing) {
    const bool small = rows <= PACKED_FEW_ROWS;
    const int scales = packing->block_bytes - PACK_COLUMNS * packing->bits / 8;
    if (T <= 16) return small ? SHAPE_32x16 : SHAPE_128x16;
    if (T <= 32) return small ? SHAPE_32x32 : SHAPE_128x32;
    if (small) return SHAPE_64x32;
    if (T > 128 && (rows + 127) / 128 * ((T + 255) / 256) >= PACKED_LARGE_BLOCKS) return SHAPE_128x256;
    return packing->bits == 4 && scales >= 64 ? SHAPE_128x32 : SHAPE_128x64;
}

// What is the matrices' in a kernel's parameters.
static bool set_matrices(PackedParams *p, const Matrix *w, const Matrix *other, int tile_rows, Error *err) {
    const Packing packing = matrix_packing(w);
    p->matrices = other ? 2 : 1;
    p->rows = w->rows;
    p->cols = w->cols;
    p->tiles = (w->rows + tile_rows - 1) / tile_rows;
    p->block_bytes = packing.block_bytes;
    p->code_bytes = PACK_COLUMNS * packing.bits / 8;
    p->scale_pitch = packing.block_bytes - p->code_bytes;
    while (1 << p->group_log2 < packing.group) p->group_log2++;
    const cuuint64_t dims[2] = {(cuuint64_t)packing.row_bytes, (cuuint64_t)w->rows},
                     strides[1] = {(cuuint64_t)packing.row_bytes};
    const cuuint32_t codes_box[2] = {PACKED_SLICE_BYTES, (cuuint32_t)tile_rows},
                     scales_box[2] = {(cuuint32_t)p->scale_pitch, (cuuint32_t)tile_rows};
    for (int i = 0; i < p->matrices; i++) {
        const void *data = i == 0 ? w->data : other->data;
        if (!tensor_map(&p->codes[i], CU_TENSOR_MAP_DATA_TYPE_UINT8, data, 2, dims, strides, codes_box,
                        PACKED_SLICE_BYTES, err) ||
            (p->scale_pitch > 0 && !tensor_map(&p->scales[i], CU_TENSOR_MAP_DATA_TYPE_UINT8, data, 2, dims, strides,
                                               scales_box, p->scale_pitch, err)))
            return false;
    }
    return true;
}

// As many stages as there is room for, and their buffers of scales. Returns the bytes that a block takes.
template <class Codes, class Tile> static size_t set_stages(PackedParams *p) {
    const int scales_stage = Tile::ROWS * p->scale_pitch;
    size_t bytes;
    p->n_codes = PACKED_MAX_STAGES + 1;
    do {
        p->n_codes--;
        if constexpr (Tile::BY_WARP)
            p->n_inputs = p->n_codes;
        else
            p->n_inputs = Tile::INPUTS;
        p->n_scales = p->scale_pitch > 0 ? packed_scale_buffers(p->n_codes, PACKED_SLICES<Codes>) : 0;
        bytes = 1024 + (size_t)p->n_codes * Tile::CODES_STAGE + (size_t)p->n_scales * scales_stage +
                (size_t)p->n_inputs * PACKED_INPUT_STAGE<Codes, Tile>;
    } while (bytes > Tile::SHARED);
    return bytes;
}

bool packed_product(CudaState *s, float *out, int pitch, const Matrix *w, const Matrix *other, const float *row_scales,
                    const void *in, int T, float beta, Error *err) {
    const Packing packing = matrix_packing(w);
    PackedParams p;
    memset(&p, 0, sizeof p);
    p.out = out;
    p.row_scales = row_scales;
    p.T = T;
    p.pitch = pitch;
    p.adds = beta != 0;
    return with_tile(packed_shape(T, w->rows * (other ? 2 : 1), &packing), [&](auto tile) {
        typedef decltype(tile) Tile;
        const cuuint64_t dims[2] = {(cuuint64_t)w->cols, (cuuint64_t)T}, strides[1] = {(cuuint64_t)w->cols * 2};
        const cuuint32_t box[2] = {PACKED_PANEL, Tile::N / Tile::C};
        if (!set_matrices(&p, w, other, Tile::ROWS, err) ||
            !tensor_map(&p.input, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, in, 2, dims, strides, box, PACKED_PANEL * 2, err))
            return false;
        p.token_tiles = (T + Tile::N - 1) / Tile::N;
        const int clusters = (p.tiles * p.matrices + Tile::C - 1) / Tile::C * p.token_tiles;
        CUDA_TRY(with_codes(w->dtype, packed_scales(&packing), [&](auto codes, auto scales) {
            const size_t shared = set_stages<decltype(codes), Tile>(&p);
            if (p.n_codes < 2) return cudaErrorInvalidConfiguration; // see packed_shape
            return launch_kernel(packed_product_kernel<decltype(codes), decltype(scales)::value, Tile>,
                                 (unsigned)(clusters * Tile::C), Tile::THREADS, shared, s->pdl, s->stream, p);
        }));
        return true;
    });
}
