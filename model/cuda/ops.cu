#include "ops.h"

#include <float.h>

#include <cuda_fp8.h>

// Computes: x = the embedding of each token, widened.
// Reads:    table [vocab][dim] T, tokens [rows].
// Writes:   x [rows][dim].
// Grid:     rows × 256; a block owns a row.
// Requires: 0 <= tokens < vocab (the tokenizer's promise).
template <typename T> __global__ void embed_kernel(float *x, const T *table, const int *tokens, int dim) {
    const T *from = table + (size_t)tokens[blockIdx.x] * dim;
    for (int i = threadIdx.x; i < dim; i += blockDim.x) x[(size_t)blockIdx.x * dim + i] = to_float(from[i]);
}

// Blocks may take the rows written last first: part of what a product has written is still in L2.
__device__ static unsigned newest_first() {
    return gridDim.x - 1 - blockIdx.x;
}

// Computes: y = x / sqrt(mean(x²) + eps) * weight (Zhang & Sennrich 2019), rounded to T.
// Reads:    x [rows][dim], weight [dim].
// Writes:   y [rows][dim].
// Grid:     rows × 512; a block owns a row.
// Requires: dim % 4 = 0 (usable_cuda).
template <typename T> __global__ void rmsnorm_kernel(T *y, const float *x, const float *weight, float eps, int dim) {
    constexpr int HELD = 4; // of a thread's float4s in registers: up to a dim of 8192 x is read once
    const int n = dim / 4, first = threadIdx.x;
    float4 v[HELD], w[HELD];
    let_next_kernel_start(); // a product, whose weights depend on nothing
    for (int j = 0; j < HELD; j++)
        if (first + j * 512 < n) w[j] = ((const float4 *)weight)[first + j * 512];
    wait_for_previous_kernel();
    size_t row = newest_first();
    const float4 *from = (const float4 *)(x + row * dim);
    float squares = 0;
    auto add = [&](float4 v) { squares += (v.x * v.x + v.y * v.y) + (v.z * v.z + v.w * v.w); };
    for (int j = 0; j < HELD; j++)
        if (first + j * 512 < n) add(v[j] = from[first + j * 512]);
    for (int i = first + HELD * 512; i < n; i += 512) add(from[i]);
    float scale = 1.0f / sqrtf(block_sum(squares) / (float)dim + eps);
    auto store = [&](int i, float4 v, float4 w) {
        store4(y + row * dim + 4 * i,
               make_float4(w.x * (v.x * scale), w.y * (v.y * scale), w.z * (v.z * scale), w.w * (v.w * scale)));
    };
    for (int j = 0; j < HELD; j++)
        if (first + j * 512 < n) store(first + j * 512, v[j], w[j]);
    for (int i = first + HELD * 512; i < n; i += 512) store(i, from[i], ((const float4 *)weight)[i]);
}

// ---- e4m3 codes with one scale for a row ----
//
// The scale is the largest magnitude / 448 in float32, so that the largest number has the largest code; of a row of
// zeros it is 1. A code is the nearest to number / scale, which float32 has rounded, of two the even one; beyond 448 it
// is that, as it is for infinities, whose row has the scale of the largest number. NaN stays NaN. Numbers are those
// that would enter a bf16 product.

static const float MOST_E4M3 = 448;

// Divides by a row's scale as __fdiv_rn does, in three operations: a quotient by the inverse, rounded to nearest, and
// its correction by what is left over (Markstein 1990: right unless the divisor's mantissa is all ones). Between 2^-60
// and 2^60 nothing overflows, and a rest that underflows belongs to a number whose code is 0. Other scales are divided
// by in the long way.
struct RowScale {
    float scale, inverse;
    bool is_plain;
    __device__ __forceinline__ float divide(float x) const {
        if (!is_plain) return __fdiv_rn(x, scale);
        const float q = __fmul_rn(x, inverse);
        return copysignf(__fmaf_rn(__fmaf_rn(-q, scale, x), inverse, q), x);
    }
};
__device__ static RowScale row_scale(float scale) {
    return {scale, __frcp_rn(scale),
            scale > 0x1p-60f && scale < 0x1p60f && (__float_as_uint(scale) & 0x7fffff) != 0x7fffff};
}

// Four codes, the first lowest.
__device__ static uint32_t four_codes(float4 v, const RowScale &scale) {
    const float2 low = make_float2(scale.divide(v.x), scale.divide(v.y)),
                 high = make_float2(scale.divide(v.z), scale.divide(v.w));
    return __nv_cvt_float2_to_fp8x2(low, __NV_SATFINITE, __NV_E4M3) |
           (uint32_t)__nv_cvt_float2_to_fp8x2(high, __NV_SATFINITE, __NV_E4M3) << 16;
}

// The first four and the last four of eight bf16 numbers.
__device__ static void unpack8(uint4 v, float4 *lo, float4 *hi) {
    const float2 a = unpack2<bf16>(v.x), b = unpack2<bf16>(v.y), c = unpack2<bf16>(v.z), d = unpack2<bf16>(v.w);
    *lo = make_float4(a.x, a.y, b.x, b.y);
    *hi = make_float4(c.x, c.y, d.x, d.y);
}
__device__ static uint4 pack8(float4 lo, float4 hi) {
    return make_uint4(pack2<bf16>(lo.x, lo.y), pack2<bf16>(lo.z, lo.w), pack2<bf16>(hi.x, hi.y),
                      pack2<bf16>(hi.z, hi.w));
}

// The scale of a row whose largest magnitude is that of one of the block's threads.
__device__ static RowScale scale_of_codes(float most) {
    const float largest = __fdiv_rn(fminf(block_max(most), FLT_MAX), MOST_E4M3);
    return row_scale(largest > 0 ? largest : 1);
}

// A block's row of `cols` numbers as codes [cols], cols % 8 = 0, and its scale. load(c): eight of them in bf16, from
// column c on; it is called once for each while HELD a thread are enough, else twice.
template <int HELD, class Load>
__device__ static void write_codes(uint8_t *codes, float *scale_to, int cols, Load load) {
    const int first = 8 * threadIdx.x, step = 8 * blockDim.x;
    uint4 held[HELD];
    float most = 0;
    auto count = [&](uint4 v) {
        float4 lo, hi;
        unpack8(v, &lo, &hi);
        most = fmaxf(most, fmaxf(fmaxf(fmaxf(fabsf(lo.x), fabsf(lo.y)), fmaxf(fabsf(lo.z), fabsf(lo.w))),
                                 fmaxf(fmaxf(fabsf(hi.x), fabsf(hi.y)), fmaxf(fabsf(hi.z), fabsf(hi.w)))));
    };
#pragma unroll
    for (int j = 0; j < HELD; j++)
        if (first + j * step < cols) count(held[j] = load(first + j * step));
    for (int c = first + HELD * step; c < cols; c += step) count(load(c));
    const RowScale scale = scale_of_codes(most);
    auto store = [&](int c, uint4 v) {
        float4 lo, hi;
        unpack8(v, &lo, &hi);
        *(uint2 *)(codes + c) = make_uint2(four_codes(lo, scale), four_codes(hi, scale));
    };
#pragma unroll
    for (int j = 0; j < HELD; j++)
        if (first + j * step < cols) store(first + j * step, held[j]);
    for (int c = first + HELD * step; c < cols; c += step) store(c, load(c));
    if (threadIdx.x == 0) *scale_to = scale.scale;
}

// Computes: rows as codes.
// Reads:    x [rows][cols].
// Writes:   codes [rows][cols], scales [rows].
// Grid:     rows × 128, or 512 for long ones; a block owns a row.
// Requires: cols % 8 = 0; x aligned to 16 bytes.
__global__ void encode_rows_kernel(uint8_t *codes, float *scales, const bf16 *x, int cols) {
    let_next_kernel_start(); // a product
    wait_for_previous_kernel();
    const size_t row = newest_first();
    write_codes<4>(codes + row * cols, scales + row, cols, [&](int c) { return *(const uint4 *)(x + row * cols + c); });
}

// Computes: what rmsnorm_kernel<bf16> does, to the bit, as codes.
// Reads:    x [rows][dim], weight [dim].
// Writes:   codes [rows][dim], scales [rows].
// Grid:     rows × 128; a block owns a row, of which a thread holds HELD float4s; more are read three times.
// Requires: dim % 8 = 0.
template <int HELD>
__global__ void __launch_bounds__(128)
    rmsnorm_codes_kernel(uint8_t *codes, float *scales, const float *x, const float *weight, float eps, int dim) {
    // A thread does what four of rmsnorm_kernel's 512 do: number k of them has every fourth of this one's float4s.
    constexpr int EACH = 4, WARPS = 128 / 32;
    __shared__ float parts[EACH * WARPS];
    const int n = dim / 4, t = threadIdx.x;
    let_next_kernel_start(); // a product
    wait_for_previous_kernel();
    const size_t row = newest_first();
    const float4 *from = (const float4 *)(x + row * dim);
    float4 v[HELD];
    float squares[EACH] = {};
    auto add = [&](int k, float4 v) { squares[k] += (v.x * v.x + v.y * v.y) + (v.z * v.z + v.w * v.w); };
#pragma unroll
    for (int j = 0; j < HELD; j++)
        if (t + j * 128 < n) v[j] = from[t + j * 128];
#pragma unroll
    for (int j = 0; j < HELD; j++)
        if (t + j * 128 < n) add(j % EACH, v[j]);
    for (int i = t + HELD * 128; i < n; i += EACH * 128)
#pragma unroll
        for (int k = 0; k < EACH; k++)
            if (i + k * 128 < n) add(k, from[i + k * 128]);
#pragma unroll
    for (int k = 0; k < EACH; k++) {
        const float sum = warp_sum(squares[k]);
        if (t % 32 == 0) parts[k * WARPS + t / 32] = sum;
    }
    __syncthreads();
    float sum = 0, most = 0;
#pragma unroll
    for (int i = 0; i < EACH * WARPS; i++) sum += parts[i];
    const float scale = 1.0f / sqrtf(sum / (float)dim + eps);
    auto normalised = [&](int i, float4 v) { // rounded to bf16
        const float4 w = ((const float4 *)weight)[i];
        const float2 low = unpack2<bf16>(pack2<bf16>(w.x * (v.x * scale), w.y * (v.y * scale))),
                     high = unpack2<bf16>(pack2<bf16>(w.z * (v.z * scale), w.w * (v.w * scale)));
        return make_float4(low.x, low.y, high.x, high.y);
    };
    auto count = [&](float4 v) {
        most = fmaxf(most, fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w))));
    };
#pragma unroll
    for (int j = 0; j < HELD; j++)
        if (t + j * 128 < n) count(v[j] = normalised(t + j * 128, v[j]));
    for (int i = t + HELD * 128; i < n; i += 128) count(normalised(i, from[i]));
    const RowScale code_scale = scale_of_codes(most);
    uint32_t *to = (uint32_t *)(codes + row * dim);
#pragma unroll
    for (int j = 0; j < HELD; j++)
        if (t + j * 128 < n) to[t + j * 128] = four_codes(v[j], code_scale);
    for (int i = t + HELD * 128; i < n; i += 128) to[i] = four_codes(normalised(i, from[i]), code_scale);
    if (t == 0) scales[row] = code_scale.scale;
}

// Computes: cosine and sine of the float32 angle pos × freq.
// Reads:    pos [rows], freq [half].
// Writes:   table [rows][half].
// Grid:     rows × 128; a block owns a row.
// Requires: none.
__global__ void rope_table_kernel(float2 *table, const int *pos, const float *freq, int half) {
    for (int i = threadIdx.x; i < half; i += blockDim.x)
        table[(size_t)blockIdx.x * half + i] = rope_angle(pos[blockIdx.x], freq[i]);
}

// Computes: y = x rounded to T.
// Reads:    x [n].
// Writes:   y [n].
// Grid:     enough × 256; a thread owns four elements.
// Requires: n % 4 = 0.
template <typename T> __global__ void round_kernel(T *y, const float *x, size_t n) {
    wait_for_previous_kernel();
    let_next_kernel_start(); // attention, in a step
    size_t i = 4 * ((size_t)newest_first() * blockDim.x + threadIdx.x);
    if (i < n) store4(y + i, *(const float4 *)(x + i));
}

// Computes: a prompt's keys and values rounded to T, in their places in the cache.
// Reads:    x [2][n_kv_heads][T][head_dim]: keys, values; pos and slots [T]; table [slot][table_width].
// Writes:   k, v [page][n_kv_heads][KV_PAGE][head_dim].
// Grid:     T × 256; a block owns a row.
// Requires: head_dim % 4 = 0; the table has the pages of all pos.
template <typename T>
__global__ void append_kv_kernel(T *k, T *v, const float *x, const int *pos, const int *slots, const int *table,
                                 int table_width, int n_kv_heads, int head_dim) {
    wait_for_previous_kernel();
    int row = newest_first(), quads = head_dim / 4;
    int page = table[(size_t)slots[row] * table_width + pos[row] / KV_PAGE];
    size_t at = (size_t)page * n_kv_heads * KV_PAGE + pos[row] % KV_PAGE;
    for (int i = threadIdx.x; i < 2 * n_kv_heads * quads; i += blockDim.x) {
        int head = i / quads, dim = 4 * (i % quads), kv_head = head < n_kv_heads ? head : head - n_kv_heads;
        store4((head < n_kv_heads ? k : v) + (at + (size_t)kv_head * KV_PAGE) * head_dim + dim,
               *(const float4 *)(x + ((size_t)head * gridDim.x + row) * head_dim + dim));
    }
}

// Computes: entries of the block table.
// Reads:    changes [n], pinned.
// Writes:   table.
// Grid:     enough × 256; a thread owns a change.
// Requires: no entry twice.
__global__ void change_table_kernel(int *table, const TableChange *changes, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) table[changes[i].at] = changes[i].page;
}

// Computes: the block table of a step's sequences, as far as they have pages.
// Reads:    table [slots][width], step.
// Writes:   step_table [sequences][width].
// Grid:     sequences × 32 threads; a block owns a sequence.
// Requires: launched without PDL. several: of candidates (StepInput.start).
__global__ void gather_table_kernel(int *step_table, const int *table, int width, const StepInput *step, bool several) {
    int i = blockIdx.x,
        positions = several ? step->seq_lens[i] + step->start[i + 1] - step->start[i] : step->lens[i] + 1,
        pages = min((positions + KV_PAGE - 1) / KV_PAGE, width);
    for (int p = threadIdx.x; p < pages; p += blockDim.x)
        step_table[(size_t)i * width + p] = table[(size_t)step->slots[i] * width + p];
}

// To be rounded to T: of 16 bits as prompt_product_kernel.cuh does, to the bit.
template <typename T> __device__ static float4 gated(float4 g, float4 u) {
    if constexpr (std::is_same<T, float>::value)
        return make_float4(silu(g.x) * u.x, silu(g.y) * u.y, silu(g.z) * u.z, silu(g.w) * u.w);
    else
        return make_float4(silu_fast(g.x) * u.x, silu_fast(g.y) * u.y, silu_fast(g.z) * u.z, silu_fast(g.w) * u.w);
}

__device__ static float4 times(float4 a, float4 b) {
    return make_float4(a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w);
}

// Eight numbers in float32.
__device__ static void load8(const float *x, float4 *lo, float4 *hi) {
    *lo = ((const float4 *)x)[0];
    *hi = ((const float4 *)x)[1];
}
__device__ static void load8(const bf16 *x, float4 *lo, float4 *hi) {
    unpack8(*(const uint4 *)x, lo, hi);
}

// Computes: h = gate / (1 + exp(-gate)) * up (Shazeer 2020), each times its scale, rounded to T (gated).
// Reads:    gate, up [n/rows][rows] In, float32 or bf16; gate_scale, up_scale [rows], or NULL.
// Writes:   h [n/rows][rows].
// Grid:     enough × 256; a thread owns eight elements.
// Requires: rows % 8 = 0 (usable_cuda).
template <typename T, typename In>
__global__ void swiglu_kernel(T *h, const In *gate, const In *up, const float *gate_scale, const float *up_scale,
                              size_t n, unsigned rows) {
    let_next_kernel_start(); // a product, whose weights depend on nothing
    wait_for_previous_kernel();
    size_t i = 8 * ((size_t)newest_first() * blockDim.x + threadIdx.x);
    if (i >= n) return;
    float4 g0, g1, u0, u1;
    load8(gate + i, &g0, &g1);
    load8(up + i, &u0, &u1);
    if (gate_scale) {
        const float4 *a = (const float4 *)(gate_scale + i % rows), *b = (const float4 *)(up_scale + i % rows);
        g0 = times(g0, a[0]), g1 = times(g1, a[1]), u0 = times(u0, b[0]), u1 = times(u1, b[1]);
    }
    store8(h + i, gated<T>(g0, u0), gated<T>(g1, u1));
}

// Computes: h = gate / (1 + exp(-gate)) * up (gated), rounded to bf16, as codes.
// Reads:    gate, up [T][cols] bf16.
// Writes:   codes [T][cols], scales [T].
// Grid:     T × 256; a block owns a row.
// Requires: cols % 8 = 0.
__global__ void swiglu_codes_kernel(uint8_t *codes, float *scales, const bf16 *gate, const bf16 *up, int cols) {
    let_next_kernel_start(); // a product
    wait_for_previous_kernel();
    const size_t row = newest_first();
    write_codes<8>(codes + row * cols, scales + row, cols, [&](int c) {
        float4 g0, g1, u0, u1;
        load8(gate + row * cols + c, &g0, &g1);
        load8(up + row * cols + c, &u0, &u1);
        return pack8(gated<bf16>(g0, u0), gated<bf16>(g1, u1));
    });
}

// Computes: y *= scale.
// Reads:    y [count][T][rows], scale [count][rows].
// Writes:   y.
// Grid:     enough × 256; a thread owns an element of n in all.
// Requires: none.
__global__ void scale_rows_kernel(float *y, const float *scale, unsigned n, unsigned T, unsigned rows) {
    wait_for_previous_kernel();
    unsigned i = newest_first() * blockDim.x + threadIdx.x;
    if (i < n) y[i] *= scale[i / (T * rows) * rows + i % rows];
}

// Computes: x += y * scale.
// Reads:    x, y [n/rows][rows], scale [rows].
// Writes:   x.
// Grid:     enough × 256; a thread owns four elements.
// Requires: rows % 4 = 0.
__global__ void add_scaled_kernel(float *x, const float *y, const float *scale, unsigned n, unsigned rows) {
    wait_for_previous_kernel();
    unsigned i = 4 * (newest_first() * blockDim.x + threadIdx.x);
    if (i >= n) return;
    float4 a = *(const float4 *)(x + i), b = *(const float4 *)(y + i), c = *(const float4 *)(scale + i % rows);
    *(float4 *)(x + i) = make_float4(__fmaf_rn(b.x, c.x, a.x), __fmaf_rn(b.y, c.y, a.y), __fmaf_rn(b.z, c.z, a.z),
                                     __fmaf_rn(b.w, c.w, a.w));
}

// Computes: some rows of x and, in its own order, of what is known about each.
// Reads:    x [*][n] in 16 bytes each, pos and slots [*], rows [grid].
// Writes:   y [grid][n], row_pos and row_slots [grid].
// Grid:     rows × 256; a block owns a row.
// Requires: none.
__global__ void gather_kernel(uint4 *y, const uint4 *x, int n, int *row_pos, const int *pos, int *row_slots,
                              const int *slots, const int *rows) {
    size_t to = blockIdx.x, from = rows[blockIdx.x];
    for (int i = threadIdx.x; i < n; i += blockDim.x) y[to * n + i] = x[from * n + i];
    if (threadIdx.x > 0) return;
    row_pos[to] = pos[from];
    row_slots[to] = slots[from];
}

// Computes: the largest logit's id, the lowest of equals; -1 if one is not finite.
// Reads:    logits [rows][vocab].
// Writes:   argmax [rows].
// Grid:     rows × 1024; a block owns a row.
// Requires: none.
__global__ void argmax_kernel(int *argmax, const float *logits, int vocab) {
    constexpr int LOADS = 16;
    __shared__ float best_of[1024];
    __shared__ int id_of[1024];
    const float *row = logits + (size_t)blockIdx.x * vocab;
    float best = -INFINITY;
    int id = vocab, bad = 0;
    for (int at = threadIdx.x; at < vocab; at += LOADS * blockDim.x) {
        float logit[LOADS]; // many loads in flight: one block has to read it all
        for (int j = 0; j < LOADS; j++) logit[j] = at + j * blockDim.x < vocab ? row[at + j * blockDim.x] : -INFINITY;
        for (int j = 0; j < LOADS; j++) {
            bad |= at + j * blockDim.x < vocab && !isfinite(logit[j]);
            if (logit[j] > best) best = logit[j], id = at + j * blockDim.x;
        }
    }
    best_of[threadIdx.x] = best;
    id_of[threadIdx.x] = id;
    bad = __syncthreads_or(bad);
    for (int step = 512; step > 0; step /= 2) {
        if (threadIdx.x < step) {
            float other = best_of[threadIdx.x + step];
            int other_id = id_of[threadIdx.x + step];
            if (other > best_of[threadIdx.x] || (other == best_of[threadIdx.x] && other_id < id_of[threadIdx.x])) {
                best_of[threadIdx.x] = other;
                id_of[threadIdx.x] = other_id;
            }
        }
        __syncthreads();
    }
    if (threadIdx.x == 0) argmax[blockIdx.x] = bad ? -1 : id_of[0];
}

// Computes: nothing; sends argmax to the host, and makes it the next step's input.
// Reads:    argmax [n].
// Writes:   argmax_host [n], pinned; of step (NULL: none) tokens and lens.
// Grid:     1 × MAX_SLOTS.
// Requires: n <= MAX_SLOTS if there is a step.
__global__ void publish_argmax_kernel(int *argmax_host, const int *argmax, StepInput *step, int n) {
    for (int i = threadIdx.x; i < n; i += blockDim.x) argmax_host[i] = argmax[i];
    if (!step || threadIdx.x >= n) return;
    step->tokens[threadIdx.x] = max(argmax[threadIdx.x], 0); // -1: the caller stops here
    step->lens[threadIdx.x]++;
}

// ---- launches -------------------------------------------------------------------------------------------------------

static unsigned blocks_for(size_t n) { // of 256 threads with four elements each
    return (unsigned)((n + 1023) / 1024);
}

bool embed(CudaState *s, const Model *m, const int *tokens, int T, Error *err) {
    const Matrix *table = &m->weights.tok_embeddings;
    with_type(table->dtype, [&](auto type) {
        embed_kernel<<<T, 256, 0, s->stream>>>(s->x_all, (const decltype(type) *)table->data, tokens, table->cols);
    });
    CUDA_TRY(cudaGetLastError());
    return true;
}

bool rmsnorm(CudaState *s, const float *weight, float eps, int T, int dim, Error *err) {
    CUDA_TRY(with_type(s->type, [&](auto type) {
        return launch_kernel(rmsnorm_kernel<decltype(type)>, T, 512, 0, s->pdl, s->stream, (decltype(type) *)s->xb,
                             (const float *)s->x_all, weight, eps, dim);
    }));
    return true;
}

bool rmsnorm_codes(CudaState *s, const float *weight, float eps, int T, int dim, Error *err) {
    CUDA_TRY(launch_kernel(dim <= 4096 ? rmsnorm_codes_kernel<8> : rmsnorm_codes_kernel<16>, T, 128, 0, s->pdl,
                           s->stream, s->codes, s->code_scales, (const float *)s->x_all, weight, eps, dim));
    return true;
}

bool encode_rows(CudaState *s, const void *in, int T, int cols, Error *err) {
    CUDA_TRY(launch_kernel(encode_rows_kernel, T, cols <= 4096 ? 128 : 512, 0, s->pdl, s->stream, s->codes,
                           s->code_scales, (const bf16 *)in, cols));
    return true;
}

bool round_to_type(CudaState *s, void *out, const float *in, size_t n, Error *err) {
    if (s->type == DTYPE_F32) return true;
    CUDA_TRY(with_type(s->type, [&](auto type) {
        return launch_kernel(round_kernel<decltype(type)>, blocks_for(n), 256, 0, s->pdl, s->stream,
                             (decltype(type) *)out, in, n);
    }));
    return true;
}

bool append_kv(const Model *m, CudaState *s, const float *in, int T, int layer, Error *err) {
    size_t at = (size_t)layer * own_layer_elements(m);
    CUDA_TRY(with_type(s->type, [&](auto type) {
        return launch_kernel(append_kv_kernel<decltype(type)>, T, 256, 0, s->pdl, s->stream,
                             (decltype(type) *)m->kv.k + at, (decltype(type) *)m->kv.v + at, in, (const int *)s->pos,
                             (const int *)s->row_slots, (const int *)s->block_table, m->kv.table_width, own_kv_heads(m),
                             m->config.head_dim);
    }));
    return true;
}

bool change_table(CudaState *s, int n, Error *err) {
    change_table_kernel<<<(n + 255) / 256, 256, 0, s->stream>>>(s->block_table, s->table_changes, n);
    CUDA_TRY(cudaGetLastError());
    return true;
}

bool gather_table(CudaState *s, int n_seq, int width, bool several, Error *err) {
    gather_table_kernel<<<n_seq, 32, 0, s->stream>>>(s->step_table, s->block_table, width, s->step, several);
    CUDA_TRY(cudaGetLastError());
    return true;
}

bool swiglu(CudaState *s, const LayerWeights *l, int T, Error *err) {
    size_t n = (size_t)T * l->w1.rows;
    CUDA_TRY(with_type(s->type, [&](auto type) {
        return launch_kernel(swiglu_kernel<decltype(type), float>, blocks_for(n / 2), 256, 0, s->pdl, s->stream,
                             (decltype(type) *)s->h, (const float *)s->gate_up, (const float *)s->gate_up + n,
                             scales_after_product(s, &l->w1), scales_after_product(s, &l->w3), n, (unsigned)l->w1.rows);
    }));
    return true;
}

bool swiglu_16(CudaState *s, const LayerWeights *l, int T, Error *err) {
    const size_t n = (size_t)T * l->w1.rows;
    const bf16 *gate = (const bf16 *)s->gate_up;
    CUDA_TRY(launch_kernel(swiglu_kernel<bf16, bf16>, blocks_for(n / 2), 256, 0, s->pdl, s->stream, (bf16 *)s->h, gate,
                           gate + n, (const float *)NULL, (const float *)NULL, n, (unsigned)l->w1.rows));
    return true;
}

bool swiglu_codes(CudaState *s, const LayerWeights *l, int T, Error *err) {
    const bf16 *gate = (const bf16 *)s->gate_up;
    CUDA_TRY(launch_kernel(swiglu_codes_kernel, T, 256, 0, s->pdl, s->stream, s->codes, s->code_scales, gate,
                           gate + (size_t)T * l->w1.rows, l->w1.rows));
    return true;
}

bool scale_rows(CudaState *s, float *y, const float *scale, int count, int T, int rows, Error *err) {
    unsigned n = (unsigned)count * T * rows;
    CUDA_TRY(launch_kernel(scale_rows_kernel, (n + 255) / 256, 256, 0, s->pdl, s->stream, y, scale, n, (unsigned)T,
                           (unsigned)rows));
    return true;
}

bool add_scaled(CudaState *s, float *x, const float *y, const float *scale, int T, int rows, Error *err) {
    unsigned n = (unsigned)T * rows;
    CUDA_TRY(
        launch_kernel(add_scaled_kernel, blocks_for(n), 256, 0, s->pdl, s->stream, x, y, scale, n, (unsigned)rows));
    return true;
}

bool rope_table(CudaState *s, const Config *c, const int *pos, int T, Error *err) {
    rope_table_kernel<<<T, 128, 0, s->stream>>>(s->rope_table, pos, s->rope_freq, c->head_dim / 2);
    CUDA_TRY(cudaGetLastError());
    return true;
}

bool keep_logit_rows(CudaState *s, float *x, int n, int dim, Error *err) {
    size_t row = (size_t)dim * sizeof(float);
    gather_kernel<<<n, 256, 0, s->stream>>>((uint4 *)s->gate_up, (const uint4 *)x, (int)(row / 16), s->logit_pos,
                                            s->pos, s->logit_slots, s->row_slots, s->logit_rows);
    CUDA_TRY(cudaGetLastError());
    CUDA_TRY(cudaMemcpyAsync(x, s->gate_up, n * row, cudaMemcpyDeviceToDevice, s->stream));
    return true;
}

bool argmax_rows(CudaState *s, int first, int n, int vocab, Error *err) {
    argmax_kernel<<<n, 1024, 0, s->stream>>>(s->argmax + first, s->logits + (size_t)first * vocab, vocab);
    CUDA_TRY(cudaGetLastError());
    return true;
}

bool publish_argmax(CudaState *s, int n, StepInput *step, Error *err) {
    publish_argmax_kernel<<<1, MAX_SLOTS, 0, s->stream>>>(s->argmax_host, s->argmax, step, n);
    CUDA_TRY(cudaGetLastError());
    return true;
}

cudaError_t kernel_attributes(cudaFuncAttributes *attributes) {
    return cudaFuncGetAttributes(attributes, rope_table_kernel);
}
