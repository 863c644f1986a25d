// Products of many rows and 16-bit weights: the launches. What they launch: prompt_product_kernel.cuh, by the protocol
// in prompt_product.h.
#include "prompt_product.h"

#include <string.h>

#include "prompt_product_kernel.cuh"
#include "tensor_map.h"

// Tokens that go through the weights side by side: as many as 66 clusters have rows of weights meanwhile.
enum { TOKENS_TOGETHER = 2048 };

// Calls body with the shape of a tile, if it is one of these rows.
template <PromptKind KIND, int TOKENS, bool SHARES, int... ROWS, class Body>
static cudaError_t with_rows(int rows, Body body) {
    cudaError_t status = cudaErrorInvalidValue;
    (void)((rows == ROWS && (status = body(PromptShape<KIND, TOKENS, ROWS, SHARES>()), true)) || ...);
    return status;
}
template <PromptKind KIND, bool SHARES, class Body> static cudaError_t with_tokens(PromptTile tile, Body body) {
    if (tile.tokens == PROMPT_TOKENS)
        return with_rows<KIND, PROMPT_TOKENS, SHARES, 256, 224, 192, 96>(tile.rows, body);
    else if constexpr (KIND == PROMPT_SWIGLU)
        return with_rows<KIND, PROMPT_FEW_TOKENS, SHARES, 224, 128, 64>(tile.rows, body);
    else if constexpr (KIND == PROMPT_QKV)
        return with_rows<KIND, PROMPT_FEW_TOKENS, SHARES, 96, 48, 32>(tile.rows, body);
    else
        return with_rows<KIND, PROMPT_FEW_TOKENS, SHARES, 64, 32>(tile.rows, body);
}
template <PromptKind KIND, class Body> static cudaError_t with_tile(PromptTile tile, Body body) {
    return tile.shares_tokens ? with_tokens<KIND, true>(tile, body) : with_tokens<KIND, false>(tile, body);
}
// Calls body with a value of a type of 16 bits.
template <class Body> static auto with_16_bits(DType dtype, Body body) {
    return dtype == DTYPE_F16 ? body(f16()) : body(bf16());
}

// Calls body(kernel) for all kernels of a type.
template <PromptKind KIND, class Body> static cudaError_t for_kernels_of(DType dtype, Body body) {
    cudaError_t status = cudaSuccess;
    for (int i = 0; status == cudaSuccess && prompt_tile_choice(KIND, i).rows > 0; i++)
        status = with_16_bits(dtype, [&](auto type) {
            return with_tile<KIND>(prompt_tile_choice(KIND, i), [&](auto shape) {
                return body((const void *)prompt_product_kernel<decltype(type), decltype(shape)>);
            });
        });
    return status;
}
template <class Body> static cudaError_t for_kernels(DType dtype, Body body) {
    cudaError_t status = for_kernels_of<PROMPT_SWIGLU>(dtype, body);
    if (status == cudaSuccess) status = for_kernels_of<PROMPT_QKV>(dtype, body);
    return status == cudaSuccess ? for_kernels_of<PROMPT_ADD>(dtype, body) : status;
}

bool prompt_open(CudaState *s, Error *err) {
    cudaFuncAttributes kernel;
    int device = 0, major = 0, sms = 0;
    s->prompt_clusters = 0;
    if (s->element != 2) return true;
    CUDA_TRY(cudaGetDevice(&device));
    CUDA_TRY(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    CUDA_TRY(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device));
    if (major != 9) return true;
    CUDA_TRY(cudaFuncGetAttributes(
        &kernel, (const void *)prompt_product_kernel<bf16, PromptShape<PROMPT_SWIGLU, PROMPT_TOKENS, 256, false>>));
    if (kernel.maxThreadsPerBlock != PromptShape<PROMPT_SWIGLU, PROMPT_TOKENS, 256, false>::THREADS)
        return true; // not the code of sm_90a
    CUDA_TRY(for_kernels(s->type, [&](const void *kernel) {
        return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, PROMPT_SHARED);
    }));
    s->prompt_clusters = sms / PROMPT_CLUSTER;
    s->prompt_least[PROMPT_SWIGLU] = 80;
    s->prompt_least[PROMPT_QKV] = 70;
    s->prompt_least[PROMPT_ADD] = 80;
    return true;
}

bool prompt_takes(const CudaState *s, PromptKind kind, const Matrix *w, int T) {
    const int rows = w->rows * (kind == PROMPT_SWIGLU ? 2 : 1);
    if (s->prompt_clusters == 0 || w->cols % PROMPT_COLUMNS != 0 || w->rows % 8 != 0) return false;
    if (kind == PROMPT_ADD && !matrix_is_quantised(w) &&
        prompt_tile(kind, T, rows, s->prompt_clusters).tokens == PROMPT_TOKENS)
        return false;
    return prompt_utilisation(kind, T, rows, s->prompt_clusters) + prompt_allowance(kind, T) >= s->prompt_least[kind];
}

// A map of one matrix, or of two alike, in boxes of so many rows, matrices and panels.
static bool map_panels(const CudaState *s, CUtensorMap *map, const void *data, const void *other, int rows, int cols,
                       int box_rows, int box_matrices, int box_panels, Error *err) {
    const cuuint64_t pitch = (cuuint64_t)cols * 2, apart = other ? (const char *)other - (const char *)data : pitch;
    const cuuint64_t dims[4] = {PROMPT_COLUMNS, (cuuint64_t)rows, (cuuint64_t)(other ? 2 : 1),
                                (cuuint64_t)(cols / PROMPT_COLUMNS)},
                     strides[3] = {pitch, apart, PROMPT_COLUMNS * 2};
    const cuuint32_t box[4] = {PROMPT_COLUMNS, (cuuint32_t)box_rows, (cuuint32_t)box_matrices, (cuuint32_t)box_panels};
    return tensor_map(map, s->type == DTYPE_F16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                      data, 4, dims, strides, box, PROMPT_COLUMNS * 2, err);
}

// Tokens of a tile: of few as many as there are for each block of a cluster, so that no box is mostly beyond them,
// which takes longer (an earlier version's down, H200: 1 token in boxes of 32 79 us, 64 tokens 51).
static int tile_tokens(PromptTile tile, int T) {
    if (tile.tokens == PROMPT_TOKENS) return PROMPT_TOKENS;
    const int tiles = (T + tile.tokens - 1) / tile.tokens, tokens = (T + tiles - 1) / tiles;
    return (tokens + 7) / 8 * 8;
}

// What all kinds have in common. other: up, beside gate; NULL: there is one matrix.
template <PromptKind KIND>
static bool launch(CudaState *s, PromptParams *p, const Matrix *w, const Matrix *other, const void *in, int T,
                   Error *err) {
    const PromptTile tile = prompt_tile(KIND, T, w->rows * (other ? 2 : 1), s->prompt_clusters),
                     of_each = {tile.tokens, other ? tile.rows / 2 : tile.rows, tile.shares_tokens};
    p->T = T;
    p->rows = w->rows;
    p->cols = w->cols;
    p->row_tiles = (int)prompt_row_tiles(w->rows, of_each);
    p->token_tiles = (int)prompt_token_tiles(T, tile);
    p->tile_tokens = tile_tokens(tile, T);
    p->together = TOKENS_TOGETHER / tile.tokens / (tile.shares_tokens ? 1 : PROMPT_CLUSTER);
    p->weights_are_stable = !s->widening.slab_bytes; // another stream fills slabs, for which this one waits
    const int tiles = p->row_tiles * p->token_tiles, clusters = tiles < s->prompt_clusters ? tiles : s->prompt_clusters;
    CUDA_TRY(with_16_bits(s->type, [&](auto type) {
        return with_tile<KIND>(tile, [&](auto shape) {
            typedef decltype(shape) Shape;
            if (!map_panels(s, &p->input, in, NULL, T, w->cols, Shape::token_box(p->tile_tokens), 1,
                            Shape::TOKEN_PANELS, err) ||
                !map_panels(s, &p->weights, w->data, other ? other->data : NULL, w->rows, w->cols, Shape::BOX_ROWS,
                            Shape::BOX_MATRICES, Shape::WEIGHT_PANELS, err))
                return cudaErrorInvalidValue;
            return launch_kernel(prompt_product_kernel<decltype(type), Shape>, (unsigned)clusters * PROMPT_CLUSTER,
                                 Shape::THREADS, 1024 + Shape::STAGES * Shape::STAGE, s->pdl, s->stream, *p);
        });
    }));
    return true;
}

bool prompt_swiglu(CudaState *s, void *h, int pitch, const Matrix *gate, const Matrix *up, const float *gate_scale,
                   const float *up_scale, const void *in, int T, Error *err) {
    PromptParams p;
    memset(&p, 0, sizeof p);
    p.h = h;
    p.pitch = pitch;
    p.scale[0] = gate_scale;
    p.scale[1] = up_scale;
    return launch<PROMPT_SWIGLU>(s, &p, gate, up, in, T, err);
}

bool prompt_add(CudaState *s, float *x, int pitch, const Matrix *w, const float *scale, const void *in, int T,
                Error *err) {
    PromptParams p;
    memset(&p, 0, sizeof p);
    p.x = x;
    p.pitch = pitch;
    p.scale[0] = scale;
    return launch<PROMPT_ADD>(s, &p, w, NULL, in, T, err);
}

bool prompt_qkv(CudaState *s, PromptParams *p, const Matrix *w, const void *in, int T, Error *err) {
    return launch<PROMPT_QKV>(s, p, w, NULL, in, T, err);
}
