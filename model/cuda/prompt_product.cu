// Products of many rows and 16-bit weights: the launches. What they launch: prompt_product_kernel.cuh, by the protocol
// in prompt_product.h.
#include "prompt_product.h"

#include <string.h>

#include "prompt_product_kernel.cuh"
#include "tensor_map.h"

// Tokens that go through the weights side by side: as many as 66 clusters have rows of weights meanwhile.
enum { TOKENS_TOGETHER = 2048 };

template <int N, bool SHARES_TOKENS> struct Tile {
    static constexpr int ROWS = N;
    static constexpr bool SHARES = SHARES_TOKENS;
};
// Calls body with a tile.
template <bool SHARES, class Body> static auto with_rows(int rows, Body body) {
    return rows == 256   ? body(Tile<256, SHARES>())
           : rows == 224 ? body(Tile<224, SHARES>())
           : rows == 192 ? body(Tile<192, SHARES>())
                         : body(Tile<96, SHARES>());
}
template <class Body> static auto with_tile(PromptTile tile, Body body) {
    return tile.shares_tokens ? with_rows<true>(tile.rows, body) : with_rows<false>(tile.rows, body);
}
// Calls body with a value of a type of 16 bits.
template <class Body> static auto with_16_bits(DType dtype, Body body) {
    return dtype == DTYPE_F16 ? body(f16()) : body(bf16());
}

// Calls body(kernel) for all kernels of a type.
template <class Body> static cudaError_t for_kernels(DType dtype, Body body) {
    cudaError_t status = cudaSuccess;
    for (int i = 0; prompt_tile_choice(i).rows > 0; i++)
        with_16_bits(dtype, [&](auto type) {
            return with_tile(prompt_tile_choice(i), [&](auto tile) {
                typedef decltype(type) T;
                typedef decltype(tile) Own;
                for (auto kernel : {prompt_product_kernel<T, Own::ROWS, PROMPT_SWIGLU, Own::SHARES>,
                                    prompt_product_kernel<T, Own::ROWS, PROMPT_QKV, Own::SHARES>,
                                    prompt_product_kernel<T, Own::ROWS, PROMPT_ADD, Own::SHARES>})
                    if (status == cudaSuccess) status = body((const void *)kernel);
                return 0;
            });
        });
    return status;
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
    CUDA_TRY(cudaFuncGetAttributes(&kernel, (const void *)prompt_product_kernel<bf16, 256, PROMPT_SWIGLU, false>));
    if (kernel.maxThreadsPerBlock != PROMPT_THREADS) return true; // not the code of sm_90a
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
    const int rows = w->rows * (kind == PROMPT_SWIGLU ? 2 : 1), least = s->prompt_least[kind];
    return s->prompt_clusters > 0 && w->cols % PROMPT_COLUMNS == 0 && w->rows % 8 == 0 &&
           prompt_utilisation(T, rows, s->prompt_clusters) >= least;
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
    const PromptTile own = prompt_tile(T, w->rows * (other ? 2 : 1), s->prompt_clusters),
                     of_each = {other ? own.rows / 2 : own.rows, own.shares_tokens};
    p->T = T;
    p->rows = w->rows;
    p->cols = w->cols;
    p->row_tiles = (int)prompt_row_tiles(w->rows, of_each);
    p->token_tiles = (int)prompt_token_tiles(T, own);
    p->together = TOKENS_TOGETHER / PROMPT_TOKENS / (own.shares_tokens ? 1 : PROMPT_CLUSTER);
    if (!map_rows(s, &p->input, in, T, w->cols, own.shares_tokens ? PROMPT_TOKENS / 2 : PROMPT_TOKENS, err) ||
        !map_rows(s, &p->weights[0], w->data, w->rows, w->cols, own.rows / 2, err) ||
        !map_rows(s, &p->weights[1], other ? other->data : w->data, w->rows, w->cols, own.rows / 2, err))
        return false;
    const int tiles = p->row_tiles * p->token_tiles, clusters = tiles < s->prompt_clusters ? tiles : s->prompt_clusters;
    CUDA_TRY(with_16_bits(s->type, [&](auto type) {
        return with_tile(own, [&](auto tile) {
            typedef decltype(tile) Own;
            constexpr int N = Own::ROWS;
            return launch_kernel(prompt_product_kernel<decltype(type), N, KIND, Own::SHARES>,
                                 (unsigned)clusters * PROMPT_CLUSTER, PROMPT_THREADS,
                                 1024 + PROMPT_STAGES<N> * PROMPT_STAGE<N>, s->pdl, s->stream, *p);
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
