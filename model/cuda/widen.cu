#include "widen.h"

#include <string.h>

#include <cuda_fp8.h>

// ---- kernels --------------------------------------------------------------------------------------------------------

enum { LANE_CODES = 16, RUN = 8 }; // codes that a thread takes at once: two runs of neighbouring columns

// The value of a code.
template <DType CODES> __device__ __forceinline__ float code_value(uint32_t code) {
    if constexpr (CODES == DTYPE_F8_E4M3)
        return to_float(f16(__nv_cvt_fp8_to_halfraw((__nv_fp8_storage_t)code, __NV_E4M3)));
    else if constexpr (CODES == DTYPE_I8)
        return (float)(int8_t)code;
    else
        return (float)((int)code - 8);
}

template <typename T> __device__ __forceinline__ void store_run(T *to, const float *v) {
    store4(to, make_float4(v[0], v[1], v[2], v[3]));
    store4(to + 4, make_float4(v[4], v[5], v[6], v[7]));
}
__device__ __forceinline__ void store_run(bf16 *to, const float *v) {
    *(uint4 *)to =
        make_uint4(pack2<bf16>(v[0], v[1]), pack2<bf16>(v[2], v[3]), pack2<bf16>(v[4], v[5]), pack2<bf16>(v[6], v[7]));
}

// Computes: y = the weights of a packed matrix: code × scale rounded to float32, then to T; codes_alone: the code.
// Reads:    rows as packed.h has them; scales [n_rows], where each has one.
// Writes:   y [n_rows][cols].
// Grid:     enough × 256; a thread owns the 16 codes of a lane of a chunk.
// Requires: cols % 8 = 0; rows and y aligned to 16 bytes.
template <typename T, DType CODES>
__global__ void widen_packed_kernel(T *y, const char *rows, Packing p, int cols, const float *scales, unsigned n_rows,
                                    bool codes_alone) {
    constexpr int BITS = CODES == DTYPE_U8 ? 4 : 8;
    const unsigned lanes = (unsigned)(cols + PACK_CHUNK - 1) / PACK_CHUNK * (PACK_CHUNK / LANE_CODES), // of a row
        i = blockIdx.x * blockDim.x + threadIdx.x, row = i / lanes;
    if (row >= n_rows) return;
    const int lane = (int)(i % lanes), block = lane / (PACK_COLUMNS / LANE_CODES),
              place = lane % (PACK_COLUMNS / LANE_CODES) * LANE_CODES;
    const char *packed = rows + (size_t)row * p.row_bytes;
    const char *at = packed + (size_t)block * p.block_bytes + place * BITS / 8;
    uint64_t codes[2];
    if constexpr (BITS == 8) {
        ulonglong2 both = *(const ulonglong2 *)at;
        codes[0] = both.x;
        codes[1] = both.y;
    } else {
        uint2 both = *(const uint2 *)at;
        codes[0] = both.x;
        codes[1] = both.y;
    }
    if constexpr (CODES == DTYPE_F8_E4M3)
        for (int step = 0; step < 2; step++) {
            uint64_t braided = codes[step];
            codes[step] = 0;
#pragma unroll
            for (int at = 0; at < 64; at += 16) {
                const unsigned both = (unsigned)(braided >> at);
                codes[step] |= (uint64_t)(packed_fp8_first(both) | packed_fp8_second(both) << 8) << at;
            }
        }
    for (int step = 0; step < 2; step++) {
        int c = block * PACK_COLUMNS + packed_column(BITS, place + step * RUN);
        if (c >= cols) return;
        const char *scale_at = packed + (p.group ? packed_scale(&p, c) : 0);
        float scale = codes_alone          ? 1
                      : p.group == 0       ? scales[row]
                      : p.scale_bytes == 2 ? to_float(*(const bf16 *)scale_at)
                                           : *(const float *)scale_at;
        float v[RUN];
#pragma unroll
        for (int k = 0; k < RUN; k++)
            v[k] = __fmul_rn(
                code_value<CODES>((uint32_t)(codes[step] >> BITS * packed_place(BITS, k)) & ((1u << BITS) - 1)), scale);
        store_run(y + (size_t)row * cols + c, v);
    }
}

// Computes: y = x in float32.
// Reads:    x [n].
// Writes:   y [n].
// Grid:     enough × 256; a thread owns four elements.
// Requires: n % 4 = 0.
template <typename T> __global__ void widen_kernel(float *y, const T *x, size_t n) {
    size_t i = 4 * ((size_t)blockIdx.x * blockDim.x + threadIdx.x);
    if (i < n)
        *(float4 *)(y + i) = make_float4(to_float(x[i]), to_float(x[i + 1]), to_float(x[i + 2]), to_float(x[i + 3]));
}

// Computes: codes = the codes of a packed FP8 matrix, in the order of columns.
// Reads:    rows as packed.h has them.
// Writes:   codes [n_rows][cols].
// Grid:     enough × 256; a thread owns the 16 codes of a lane of a chunk.
// Requires: cols % 16 = 0; rows and codes aligned to 16 bytes.
__global__ void unpack_codes_kernel(uint8_t *codes, const char *rows, Packing p, int cols, unsigned n_rows) {
    const unsigned lanes = (unsigned)(cols + PACK_CHUNK - 1) / PACK_CHUNK * (PACK_CHUNK / LANE_CODES), // of a row
        i = blockIdx.x * blockDim.x + threadIdx.x, row = i / lanes;
    if (row >= n_rows) return;
    const int lane = (int)(i % lanes), block = lane / (PACK_COLUMNS / LANE_CODES),
              place = lane % (PACK_COLUMNS / LANE_CODES) * LANE_CODES;
    const uint4 braided = *(const uint4 *)(rows + (size_t)row * p.row_bytes + (size_t)block * p.block_bytes + place);
    // Of four columns: packed_fp8_first and _second of both halves of a word.
    auto four = [](uint32_t both) {
        const uint32_t first = (both >> 8 & 0x00800080u) | (both >> 4 & 0x007f007fu),
                       second = (both >> 4 & 0x00800080u) | (both >> 8 & 0x00700070u) | (both & 0x000f000fu);
        return __byte_perm(first, second, 0x6420);
    };
    const uint2 runs[2] = {{four(braided.x), four(braided.y)}, {four(braided.z), four(braided.w)}};
    for (int step = 0; step < 2; step++) {
        const int c = block * PACK_COLUMNS + packed_column(8, place + step * RUN);
        if (c < cols) *(uint2 *)(codes + (size_t)row * cols + c) = runs[step];
    }
}

template <typename T> static void launch_packed(T *y, const Matrix *w, cudaStream_t stream) {
    const Packing p = matrix_packing(w);
    const unsigned lanes = (unsigned)(w->cols + PACK_CHUNK - 1) / PACK_CHUNK * (PACK_CHUNK / LANE_CODES),
                   blocks = ((unsigned)w->rows * lanes + 255) / 256;
    auto kernel = w->dtype == DTYPE_F8_E4M3 ? widen_packed_kernel<T, DTYPE_F8_E4M3>
                  : w->dtype == DTYPE_I8    ? widen_packed_kernel<T, DTYPE_I8>
                                            : widen_packed_kernel<T, DTYPE_U8>;
    kernel<<<blocks, 256, 0, stream>>>(y, (const char *)w->data, p, w->cols, (const float *)w->scale, (unsigned)w->rows,
                                       w->scale && sizeof(T) == 2);
}

// y [rows][cols] = a matrix in s->type.
static bool launch_widen(const CudaState *s, void *y, const Matrix *w, cudaStream_t stream, Error *err) {
    size_t n = (size_t)w->rows * (size_t)w->cols;
    if (!matrix_is_quantised(w))
        with_type(w->dtype, [&](auto type) {
            widen_kernel<<<(unsigned)((n + 1023) / 1024), 256, 0, stream>>>((float *)y, (const decltype(type) *)w->data,
                                                                            n);
        });
    else if (s->type == DTYPE_F32)
        launch_packed((float *)y, w, stream);
    else
        launch_packed((bf16 *)y, w, stream);
    CUDA_TRY(cudaGetLastError());
    return true;
}

// ---- slabs ----------------------------------------------------------------------------------------------------------

void widen_size(Widening *w, uint64_t most_elements, int most_cols, size_t element) {
    size_t bytes = (size_t)most_elements * element;
    w->least_bytes = ((size_t)SLAB_ROWS * (size_t)most_cols * element + 255) / 256 * 256;
    if (bytes > SLAB_BYTES) bytes = SLAB_BYTES;
    if (bytes < w->least_bytes) bytes = w->least_bytes;
    w->slab_bytes = (bytes + 255) / 256 * 256;
}

bool widen_open(CudaState *s, Error *err) {
    Widening *w = &s->widening;
    if (w->slab_bytes == 0) return true;
    CUDA_TRY(cudaStreamCreateWithFlags(&w->stream, cudaStreamNonBlocking));
    for (int i = 0; i < 2; i++) {
        CUDA_TRY(cudaEventCreateWithFlags(&w->widened[i], cudaEventDisableTiming));
        CUDA_TRY(cudaEventCreateWithFlags(&w->used[i], cudaEventDisableTiming));
    }
    return true;
}

void widen_close(CudaState *s) {
    Widening *w = &s->widening;
    for (int i = 0; i < 2; i++) {
        if (w->widened[i]) cudaEventDestroy(w->widened[i]);
        if (w->used[i]) cudaEventDestroy(w->used[i]);
    }
    if (w->stream) cudaStreamDestroy(w->stream);
}

bool widen_begin(CudaState *s, Error *err) {
    Widening *w = &s->widening;
    for (int i = 0; i < 2 && w->slab_bytes > 0; i++) CUDA_TRY(cudaEventRecord(w->used[i], s->stream));
    return true;
}

int widen_rows(const CudaState *s, const Matrix *w, int unit, size_t element) {
    const int most = (int)(s->widening.slab_bytes / ((size_t)w->cols * element)) / unit * unit;
    const int slabs = (w->rows + most - 1) / most, each = (w->rows + slabs - 1) / slabs;
    return (each + unit - 1) / unit * unit;
}

// The slab whose turn it is, of rows in that dtype. launch(slab, stream) fills it.
template <class Launch>
static bool fill_slab(CudaState *s, Matrix *wide, const Matrix *rows, DType dtype, Launch launch, Error *err) {
    Widening *w = &s->widening;
    int i = w->turn;
    char *slab = w->slabs + (size_t)i * w->slab_bytes;
    CUDA_TRY(cudaStreamWaitEvent(w->stream, w->used[i], 0));
    if (!launch(slab, w->stream)) return false;
    CUDA_TRY(cudaEventRecord(w->widened[i], w->stream));
    CUDA_TRY(cudaStreamWaitEvent(s->stream, w->widened[i], 0));
    memset(wide, 0, sizeof *wide);
    wide->data = slab;
    wide->dtype = dtype;
    wide->rows = rows->rows;
    wide->all_rows = rows->all_rows;
    wide->cols = rows->cols;
    return true;
}

bool widen(CudaState *s, Matrix *wide, const Matrix *rows, Error *err) {
    auto launch = [&](char *slab, cudaStream_t stream) { return launch_widen(s, slab, rows, stream, err); };
    return fill_slab(s, wide, rows, s->type, launch, err);
}

bool widen_both(CudaState *s, Matrix wide[2], const Matrix rows[2], Error *err) {
    const size_t bytes = (size_t)rows[0].rows * rows[0].cols * s->element;
    auto launch = [&](char *slab, cudaStream_t stream) {
        return launch_widen(s, slab, &rows[0], stream, err) && launch_widen(s, slab + bytes, &rows[1], stream, err);
    };
    if (!fill_slab(s, &wide[0], &rows[0], s->type, launch, err)) return false;
    wide[1] = wide[0];
    wide[1].data = (const char *)wide[0].data + bytes;
    return true;
}

bool unpack_codes(CudaState *s, Matrix *codes, const Matrix *rows, Error *err) {
    auto launch = [&](char *slab, cudaStream_t stream) {
        const unsigned lanes = (unsigned)(rows->cols + PACK_CHUNK - 1) / PACK_CHUNK * (PACK_CHUNK / LANE_CODES),
                       blocks = ((unsigned)rows->rows * lanes + 255) / 256;
        unpack_codes_kernel<<<blocks, 256, 0, stream>>>((uint8_t *)slab, (const char *)rows->data, matrix_packing(rows),
                                                        rows->cols, (unsigned)rows->rows);
        CUDA_TRY(cudaGetLastError());
        return true;
    };
    return fill_slab(s, codes, rows, DTYPE_F8_E4M3, launch, err);
}

bool widen_end(CudaState *s, Error *err) {
    Widening *w = &s->widening;
    CUDA_TRY(cudaEventRecord(w->used[w->turn], s->stream));
    w->turn ^= 1;
    return true;
}
