// Products of many rows and 16-bit weights: the launches. What they launch: prompt_product_kernel.cuh, by the protocol
// in prompt_product.h.
#include "prompt_product.h"

#include <string.h>

#include "prompt_product_kernel.cuh"
#include "tensor_map.h"

enum {
    // Rows from which on these kernels are worth it.
    PROMPT_LEAST_ROWS = 257,
    // Pairs of tiles of tokens that go through the weights side by side: 2048 tokens and, of 66 clusters, as many rows
    // of weights.
    PROMPT_TOGETHER = 8,
};

template <PromptKind KIND> using Kind = std::integral_constant<PromptKind, KIND>;
template <int N> using TileRows = std::integral_constant<int, N>;

// Calls body with the rows of weights of a tile.
template <class Body> static auto with_rows(int rows, Body body) {
    return rows == 256   ? body(TileRows<256>())
           : rows == 224 ? body(TileRows<224>())
           : rows == 192 ? body(TileRows<192>())
           : rows == 128 ? body(TileRows<128>())
                         : body(TileRows<96>());
}
// Calls body with a value of a type of 16 bits.
template <class Body> static auto with_16_bits(DType dtype, Body body) {
    return dtype == DTYPE_F16 ? body(f16()) : body(bf16());
}

// Calls body(kernel) for all kernels of a type.
template <class Body> static cudaError_t for_kernels(DType dtype, Body body) {
    cudaError_t status = cudaSuccess;
    for (int rows : {96, 128, 192, 224, 256})
        with_16_bits(dtype, [&](auto type) {
            return with_rows(rows, [&](auto n) {
                constexpr int N = decltype(n)::value;
                for (auto kernel : {prompt_product_kernel<decltype(type), N, PROMPT_SWIGLU>,
                                    prompt_product_kernel<decltype(type), N, PROMPT_QKV>})
                    if (status == cudaSuccess) status = body((const void *)kernel);
                return 0;
            });
        });
    return status;
}

bool prompt_open(CudaState *s, Error *err) {
    cudaFuncAttributes kernel;
    int device = 0, major = 0, sms = 0;
    s->prompt_rows = 0;
    if (s->element != 2) return true;
    CUDA_TRY(cudaGetDevice(&device));
    CUDA_TRY(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    CUDA_TRY(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device));
    if (major != 9) return true;
    CUDA_TRY(cudaFuncGetAttributes(&kernel, (const void *)prompt_product_kernel<bf16, 256, PROMPT_SWIGLU>));
    if (kernel.maxThreadsPerBlock != PROMPT_THREADS) return true; // not the code of sm_90a
    CUDA_TRY(for_kernels(s->type, [&](const void *kernel) {
        return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, PROMPT_SHARED);
    }));
    s->prompt_clusters = sms / PROMPT_CLUSTER;
    s->prompt_rows = PROMPT_LEAST_ROWS;
    return true;
}

bool prompt_takes(const CudaState *s, const Matrix *w, int T) {
    return s->prompt_rows > 0 && T >= s->prompt_rows && w->dtype == s->type && w->cols % PROMPT_COLUMNS == 0 && w->rows % 8 == 0;
}

static bool map_rows(const CudaState *s, CUtensorMap *map, const void *data, int rows, int cols, int box_rows,
                     Error *err) {
    const cuuint64_t dims[2] = {(cuuint64_t)cols, (cuuint64_t)rows}, strides[1] = {(cuuint64_t)cols * 2};
    const cuuint32_t box[2] = {PROMPT_COLUMNS, (cuuint32_t)box_rows};
    return tensor_map(map, s->type == DTYPE_F16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                      data, 2, dims, strides, box, PROMPT_COLUMNS * 2, err);
}

// What all kinds have in common. other: up, beside gate; NULL: there is one matrix.
template <PromptKind KIND>
static bool launch(CudaState *s, PromptParams *p, const Matrix *w, const Matrix *other, const void *in, int T,
                   Error *err) {
    const int rows = prompt_tile_rows(T, w->rows * (other ? 2 : 1), s->prompt_clusters),
              tile = other ? rows / 2 : rows; // rows of each matrix
    p->T = T;
    p->rows = w->rows;
    p->cols = w->cols;
    p->row_tiles = (w->rows + tile - 1) / tile;
    p->token_pairs = (T + PROMPT_CLUSTER * PROMPT_TOKENS - 1) / (PROMPT_CLUSTER * PROMPT_TOKENS);
    p->together = PROMPT_TOGETHER;
    if (!map_rows(s, &p->input, in, T, w->cols, PROMPT_TOKENS, err) ||
        !map_rows(s, &p->weights[0], w->data, w->rows, w->cols, rows / 2, err) ||
        !map_rows(s, &p->weights[1], other ? other->data : w->data, w->rows, w->cols, rows / 2, err))
        return false;
    const int pairs = p->row_tiles * p->token_pairs,
              clusters = pairs < s->prompt_clusters ? pairs : s->prompt_clusters;
    CUDA_TRY(with_16_bits(s->type, [&](auto type) {
        return with_rows(rows, [&](auto n) {
            constexpr int N = decltype(n)::value;
            return launch_kernel(prompt_product_kernel<decltype(type), N, KIND>, (unsigned)clusters * PROMPT_CLUSTER,
                                 PROMPT_THREADS, 1024 + PROMPT_STAGES<N> * PROMPT_STAGE<N>, s->pdl, s->stream, *p);
        });
    }));
    return true;
}

bool prompt_swiglu(CudaState *s, void *h, const Matrix *gate, const Matrix *up, const void *in, int T, Error *err) {
    PromptParams p;
    memset(&p, 0, sizeof p);
    p.h = h;
    return launch<PROMPT_SWIGLU>(s, &p, gate, up, in, T, err);
}

bool prompt_qkv(CudaState *s, PromptParams *p, const Matrix *w, const void *in, int T, Error *err) {
    return launch<PROMPT_QKV>(s, p, w, NULL, in, T, err);
}
