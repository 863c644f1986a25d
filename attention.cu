// attention.cu: causal grouped-query attention over the KV cache, prefill and split-KV decode: the C interface, its
// checks and its launches. Interface and promises: model/attention/attention.h. The kernels: model/attention/*.cuh;
// their sizes and tuning rules: decode_plan.h and prefill_plan.h there.
#include <float.h>
#include <limits.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <cuda_runtime.h>

#include "model/attention/attention.h"
#include "model/attention/decode_kernel.cuh"
#include "model/attention/f32.cuh"
#include "model/attention/prefill_sm80.cuh"
#include "model/attention/prefill_sm90.cuh"

static thread_local char g_error[512];

const char *attention_error(void) {
    return g_error;
}

static int refuse(const char *format, ...) {
    va_list list;
    va_start(list, format);
    vsnprintf(g_error, sizeof g_error, format, list);
    va_end(list);
    return 1;
}

#define TRY_CUDA(call) \
    do { \
        cudaError_t try_error = (call); \
        if (try_error != cudaSuccess) \
            return refuse("%s:%d: %s: %s", __FILE__, __LINE__, #call, cudaGetErrorString(try_error)); \
    } while (0)

// What this build and this GPU can do together.
struct Device {
    int known, n_sms, block_smem, sm_smem, hopper, dependent_launch;
};

static int device_find(Device *found) {
    static Device devices[64]; // filled once each; two threads that race write the same values
    int id;
    TRY_CUDA(cudaGetDevice(&id));
    if (id < 0 || id >= 64) return refuse("attention: device number %d, expected 0 to 63", id);
    Device d = devices[id];
    if (!d.known) {
        int major;
        cudaFuncAttributes f, sm90;
        TRY_CUDA(cudaDeviceGetAttribute(&d.n_sms, cudaDevAttrMultiProcessorCount, id));
        TRY_CUDA(cudaDeviceGetAttribute(&d.block_smem, cudaDevAttrMaxSharedMemoryPerBlockOptin, id));
        TRY_CUDA(cudaDeviceGetAttribute(&d.sm_smem, cudaDevAttrMaxSharedMemoryPerMultiprocessor, id));
        TRY_CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, id));
        TRY_CUDA(cudaFuncGetAttributes(&f, (const void *)prefill_append_kernel));
        // Code for older GPUs does not wait for the kernel before it.
        d.dependent_launch = major >= 9 && f.ptxVersion >= 90;
        // The kernel with wgmma is in sm_90a's code alone;
        // elsewhere an empty one without launch bounds is in its place.
        TRY_CUDA(cudaFuncGetAttributes(&sm90, (const void *)prefill_sm90_kernel<__nv_bfloat16, 128>));
        d.hopper = major == 9 && sm90.maxThreadsPerBlock == SM90_THREADS;
        d.known = 1;
        devices[id] = d;
    }
    *found = d;
    return 0;
}

static int element_bytes(int dtype) {
    return dtype == ATTENTION_F32 ? 4 : 2;
}

static int check_dimensions(const char *who, const AttentionArgs *a) {
    if (!a) return refuse("%s: args is NULL", who);
    if (a->dtype != ATTENTION_F32 && a->dtype != ATTENTION_F16 && a->dtype != ATTENTION_BF16)
        return refuse("%s: dtype %d, expected 0 (f32), 1 (f16) or 2 (bf16)", who, a->dtype);
    if (a->n_seq <= 0) return refuse("%s: n_seq %d, expected at least 1", who, a->n_seq);
    if (a->n_heads <= 0) return refuse("%s: n_heads %d, expected at least 1", who, a->n_heads);
    if (a->n_kv_heads <= 0) return refuse("%s: n_kv_heads %d, expected at least 1", who, a->n_kv_heads);
    if (a->n_heads % a->n_kv_heads)
        return refuse("%s: n_heads %d is not a multiple of n_kv_heads %d", who, a->n_heads, a->n_kv_heads);
    if (a->head_dim != 64 && a->head_dim != 96 && a->head_dim != 128)
        return refuse("%s: head_dim %d, expected 64, 96 or 128", who, a->head_dim);
    if (a->cache_max_len <= 0) return refuse("%s: cache_max_len %d, expected at least 1", who, a->cache_max_len);
    if (a->n_new < 0 || a->n_new > MAX_NEW_TOKENS)
        return refuse("%s: n_new %d, expected 0 to %d", who, a->n_new, MAX_NEW_TOKENS);
    if (a->n_tokens < 0) return refuse("%s: n_tokens %d, expected at least 0", who, a->n_tokens);
    return 0;
}

static int check_pointer(const char *who, const char *name, const void *pointer) {
    if (!pointer) return refuse("%s: %s is NULL", who, name);
    if ((uintptr_t)pointer % 16) return refuse("%s: %s is at %p, expected a multiple of 16 bytes", who, name, pointer);
    return 0;
}

static int check_strides(const char *who, const char *name, int64_t token, int64_t head, const AttentionArgs *a) {
    int unit = 16 / element_bytes(a->dtype);
    if (token <= 0 || token % unit)
        return refuse("%s: %s_token_stride %lld, expected a positive multiple of %d", who, name, (long long)token,
                      unit);
    if (head <= 0 || head % unit)
        return refuse("%s: %s_head_stride %lld, expected a positive multiple of %d", who, name, (long long)head, unit);
    return 0;
}

// Everything but the lengths.
static int check_args(const char *who, const AttentionArgs *a) {
    if (check_dimensions(who, a)) return 1;
    if (!(a->scale >= 0.0f && a->scale <= FLT_MAX))
        return refuse("%s: scale %g, expected a positive number, or 0 for 1/sqrt(head_dim)", who, a->scale);
    if (check_pointer(who, "q", a->q) || check_strides(who, "q", a->q_token_stride, a->q_head_stride, a)) return 1;
    if (check_pointer(who, "out", a->out) || check_strides(who, "out", a->out_token_stride, a->out_head_stride, a))
        return 1;
    if (check_pointer(who, "k_cache", a->k_cache) || check_pointer(who, "v_cache", a->v_cache)) return 1;
    if (a->append) {
        if (check_pointer(who, "k_new", a->k_new) || check_strides(who, "k", a->k_token_stride, a->k_head_stride, a))
            return 1;
        if (check_pointer(who, "v_new", a->v_new) || check_strides(who, "v", a->v_token_stride, a->v_head_stride, a))
            return 1;
    }
    if (a->block_table && (a->block_size <= 0 || (a->block_size % 16 && a->block_size != a->cache_max_len)))
        return refuse("%s: block_size %d, expected a positive multiple of 16, or cache_max_len (%d)", who,
                      a->block_size, a->cache_max_len);
    if ((uintptr_t)a->block_rows % sizeof(int))
        return refuse("%s: block_rows is at %p, expected a multiple of 4 bytes", who, a->block_rows);
    return 0;
}

static int check_length(const char *who, int seq, int seq_len, int n_new, int cache_max_len) {
    if (seq_len < 0) return refuse("%s: seq_lens[%d] is %d, expected at least 0", who, seq, seq_len);
    if ((long long)seq_len + n_new > cache_max_len)
        return refuse("%s: sequence %d overflows the cache: %d positions + %d new > cache_max_len %d", who, seq,
                      seq_len, n_new, cache_max_len);
    return 0;
}

// New tokens of a decode call, at most: the rows of q.
static long long decode_tokens(const AttentionArgs *a) {
    return a->n_new <= 1 ? a->n_seq : a->n_tokens ? a->n_tokens : (long long)a->n_seq * a->n_new;
}

// Of a decode call with several new tokens per sequence.
static int check_rows(const char *who, const AttentionArgs *a) {
    if (a->dtype == ATTENTION_F32) return refuse("%s: n_new %d in float32, expected 0 or 1", who, a->n_new);
    if (!a->causal) return refuse("%s: causal 0 with n_new %d, expected 1", who, a->n_new);
    if (!a->q_start_device || (uintptr_t)a->q_start_device % sizeof(int))
        return refuse("%s: q_start_device is at %p, expected a multiple of 4 bytes", who, a->q_start_device);
    for (int i = 0; a->q_start && i < a->n_seq; i++) {
        long long n = (long long)a->q_start[i + 1] - a->q_start[i];
        if (a->q_start[i] < 0 || n < 0 || n > a->n_new || a->q_start[i + 1] > decode_tokens(a))
            return refuse("%s: sequence %d has the tokens from q_start %d to %d, expected up to %d of %lld", who, i,
                          a->q_start[i], a->q_start[i + 1], a->n_new, decode_tokens(a));
    }
    return 0;
}

static float scale_log2(const AttentionArgs *a) {
    return (a->scale != 0.0f ? a->scale : 1.0f / sqrtf((float)a->head_dim)) * LOG2E;
}

static Cache<char> cache_view(const AttentionArgs *a) {
    int block_size = a->block_table ? a->block_size : a->cache_max_len;
    return {(char *)a->k_cache, (char *)a->v_cache, a->block_table, a->block_rows,
            a->n_kv_heads,      a->head_dim,        block_size,     (a->cache_max_len - 1) / block_size + 1};
}

// Launches a kernel of which several are instantiated: sets its shared memory, logs, checks.
template <typename... P, typename... A>
static int launch(const char *name, const AttentionArgs *a, void (*kernel)(P...), long long grid, int block,
                  size_t smem, bool dependent, int cluster, cudaStream_t stream, A... args) {
    if (grid > 0x7fffffff) return refuse("%s: a grid of %lld blocks, expected at most 2147483647", name, grid);
    if (smem > 48 * 1024)
        TRY_CUDA(cudaFuncSetAttribute((const void *)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)smem));
    cudaLaunchAttribute attributes[2];
    int n = 0;
    if (dependent) {
        attributes[n].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[n++].val.programmaticStreamSerializationAllowed = 1;
    }
    if (cluster > 1) {
        attributes[n].id = cudaLaunchAttributeClusterDimension;
        attributes[n].val.clusterDim.x = cluster;
        attributes[n].val.clusterDim.y = attributes[n].val.clusterDim.z = 1;
        n++;
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)grid);
    config.blockDim = dim3(block);
    config.dynamicSmemBytes = smem;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = n;
    if (a->verbose)
        fprintf(stderr, "attention: %s<%s,%d> %d:%d heads, %d sequences, grid %lld, block %d, shared %zu\n", name,
                a->dtype == ATTENTION_F32   ? "f32"
                : a->dtype == ATTENTION_F16 ? "f16"
                                            : "bf16",
                a->head_dim, a->n_heads, a->n_kv_heads, a->n_seq, grid, block, smem);
    TRY_CUDA(cudaLaunchKernelEx(&config, kernel, args...));
    return 0;
}

// Calls body(T(), integral_constant<int, D>()) for the call's dtype and head_dim.
template <class Body> static int for_types(const AttentionArgs *a, Body body) {
    auto with_dim = [&](auto zero) {
        return a->head_dim == 64   ? body(zero, std::integral_constant<int, 64>())
               : a->head_dim == 96 ? body(zero, std::integral_constant<int, 96>())
                                   : body(zero, std::integral_constant<int, 128>());
    };
    return a->dtype == ATTENTION_F32 ? with_dim(0.0f) : a->dtype == ATTENTION_F16 ? with_dim(f16()) : with_dim(bf16());
}

static size_t round_up(size_t n, size_t unit) {
    return (n + unit - 1) / unit * unit;
}

// The workspace: arrived, of one size for all shapes, as it must stay zero; partial_ml; partial_o.
constexpr size_t ARRIVED_BYTES = DECODE_MAX_BLOCKS * sizeof(unsigned);
static size_t partial_ml_bytes(const AttentionArgs *a) {
    return round_up((size_t)decode_tokens(a) * a->n_heads * max_kv_splits(a->cache_max_len) * sizeof(float2), 256);
}

size_t attention_workspace_bytes(const AttentionArgs *a) {
    if (check_dimensions("attention_workspace_bytes", a)) return SIZE_MAX;
    return ARRIVED_BYTES + partial_ml_bytes(a) +
           (size_t)decode_tokens(a) * a->n_heads * max_kv_splits(a->cache_max_len) * a->head_dim * sizeof(float);
}

size_t attention_cache_bytes(const AttentionArgs *a) {
    if (check_dimensions("attention_cache_bytes", a)) return SIZE_MAX;
    return (size_t)a->n_seq * a->n_kv_heads * a->cache_max_len * a->head_dim * element_bytes(a->dtype);
}

// heads: query heads of a tile, or its columns if they are of several new tokens (rows). cluster_smem: what a block
// needs more in clusters; 0: the kernel has none.
static int decode_launch(const AttentionArgs *a, DecodeParams p, void (*kernel)(DecodeParams), int heads, int block,
                         size_t smem, size_t cluster_smem, bool rows, const Device &device, cudaStream_t stream) {
    int blocks_per_sm;
    p.head_tiles = ((rows ? p.n_new : 1) * p.heads_per_kv + heads - 1) / heads;
    bool can_cluster = cluster_smem && device.dependent_launch && two_blocks_fit(smem + cluster_smem, device.sm_smem);
    if (can_cluster) smem += cluster_smem;
    TRY_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)smem));
    TRY_CUDA(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_per_sm, kernel, block, smem));
    if (blocks_per_sm < 1)
        return refuse("attention_decode: no room on this GPU for a block with %zu bytes of shared memory", smem);
    while (blocks_per_sm > DECODE_BLOCKS_PER_SM) { // more shared memory, until there is no room for another
        smem += 4096;
        TRY_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)smem));
        TRY_CUDA(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_per_sm, kernel, block, smem));
    }
    long long query_tiles = (long long)p.n_seq * p.cache.n_kv_heads * p.head_tiles,
              work = decode_max_work(query_tiles, p.cache_max_len) * (rows ? 2 : 1); // two groups (decode_rows.cuh)
    if (work > 0x7fffffff) return refuse("attention_decode: %lld work items, expected at most 2147483647", work);
    DecodePlan plan = decode_plan(query_tiles, p.max_splits, device.n_sms, blocks_per_sm, can_cluster);
    p.cluster = plan.cluster;
    p.blocks_per_tile = plan.blocks_per_tile;
    p.tiles_fill_gpu = plan.tiles_fill_gpu;
    if (rows) { // whole teams
        if (p.head_tiles > DECODE_MAX_BLOCKS)
            return refuse("attention_decode: %d query heads per KV head with n_new %d, expected at most %d together",
                          p.heads_per_kv, p.n_new, heads * DECODE_MAX_BLOCKS);
        plan.blocks = plan.blocks < p.head_tiles ? p.head_tiles : plan.blocks - plan.blocks % p.head_tiles;
    }
    return launch("decode_kernel", a, kernel, plan.blocks, block, smem, device.dependent_launch, plan.cluster, stream,
                  p);
}

template <typename T, int D, int NT>
static int decode_16bit(const AttentionArgs *a, const DecodeParams &p, const Device &device, cudaStream_t stream) {
    if (p.n_new > 1)
        return decode_launch(a, p, decode_kernel<T, D, NT, 2, DecodeRowsCursor<8 * NT>>, 8 * NT, DECODE_THREADS,
                             decode_smem_bytes(D, NT, 2), 0, true, device, stream);
    auto with = [&](auto stages) {
        constexpr int STAGES = decltype(stages)::value;
        return decode_launch(a, p, decode_kernel<T, D, NT, STAGES, DecodeCursor>, 8 * NT, DECODE_THREADS,
                             decode_smem_bytes(D, NT, STAGES), decode_cluster_bytes(D, NT), false, device, stream);
    };
    constexpr int MOST = decode_max_stages(D, NT);
    if (decode_stages(D, NT, device.sm_smem) == MOST) return with(std::integral_constant<int, MOST>());
    return with(std::integral_constant<int, 2>());
}

template <int D>
static int decode_f32(const AttentionArgs *a, const DecodeParams &p, const Device &device, cudaStream_t stream) {
    typedef FmaTile<D> Tile;
    int rows = p.heads_per_kv < Tile::HEADS ? p.heads_per_kv : Tile::HEADS;
    if (decode_f32_warps(f32_smem_bytes<Tile>(8, Tile::HEADS), device.block_smem) == 8)
        return decode_launch(a, p, decode_f32_kernel<Tile, 8>, Tile::HEADS, 256, f32_smem_bytes<Tile>(8, rows), 0,
                             false, device, stream);
    return decode_launch(a, p, decode_f32_kernel<Tile, 4>, Tile::HEADS, 128, f32_smem_bytes<Tile>(4, rows), 0, false,
                         device, stream);
}

int attention_decode(const AttentionArgs *a, void *cuda_stream) {
    const char *who = "attention_decode";
    cudaStream_t stream = (cudaStream_t)cuda_stream;
    Device device;
    if (check_args(who, a)) return 1;
    if (!a->seq_lens_device) return refuse("%s: seq_lens_device is NULL", who);
    bool rows = a->n_new > 1;
    if (rows && check_rows(who, a)) return 1;
    for (int i = 0; a->seq_lens && (!rows || a->q_start) && i < a->n_seq; i++)
        if (check_length(who, i, a->seq_lens[i], rows ? a->q_start[i + 1] - a->q_start[i] : 1, a->cache_max_len))
            return 1;
    if (check_pointer(who, "workspace", a->workspace)) return 1;
    if (a->workspace_bytes < attention_workspace_bytes(a))
        return refuse("%s: workspace of %zu bytes, expected at least %zu", who, a->workspace_bytes,
                      attention_workspace_bytes(a));
    if (device_find(&device)) return 1;

    DecodeParams p = {a->n_seq,
                      a->n_heads,
                      a->n_heads / a->n_kv_heads,
                      1,
                      a->cache_max_len,
                      max_kv_splits(a->cache_max_len),
                      a->append,
                      a->kv_stable,
                      1,
                      0,
                      0,
                      scale_log2(a),
                      a->seq_lens_device,
                      cache_view(a),
                      a->q,
                      a->out,
                      a->k_new,
                      a->v_new,
                      a->q_token_stride,
                      a->q_head_stride,
                      a->out_token_stride,
                      a->out_head_stride,
                      a->k_token_stride,
                      a->k_head_stride,
                      a->v_token_stride,
                      a->v_head_stride,
                      (unsigned *)a->workspace,
                      (float2 *)((char *)a->workspace + ARRIVED_BYTES),
                      (float *)((char *)a->workspace + ARRIVED_BYTES + partial_ml_bytes(a)),
                      a->q_start_device,
                      a->n_new,
                      (int)decode_tokens(a)};
    const int columns = (rows ? a->n_new : 1) * p.heads_per_kv;
    return for_types(a, [&](auto zero, auto dim) {
        typedef decltype(zero) T;
        constexpr int D = dim;
        if constexpr (std::is_same<T, float>::value)
            return decode_f32<D>(a, p, device, stream);
        else if (columns <= 8)
            return decode_16bit<T, D, 1>(a, p, device, stream);
        else
            return decode_16bit<T, D, 2>(a, p, device, stream);
    });
}

// The batch of sequences first .. first+n-1; returns the number of new tokens.
static int batch_tokens(const AttentionArgs *a, int first, int n, PrefillBatch *b) {
    b->n_seq = n;
    b->first_seq = first;
    memcpy(b->q_start, a->q_start + first, (n + 1) * sizeof(int));
    memcpy(b->seq_len, a->seq_lens + first, n * sizeof(int));
    return b->q_start[n] - b->q_start[0];
}

// A tensor map for boxes of 64 elements x rows, in tiles swizzled as the kernel expects; dims and strides innermost
// first.
static int tensor_map(CUtensorMap *map, int dtype, const void *base, int rank, const cuuint64_t *dims,
                      const cuuint64_t *stride_bytes, const cuuint32_t *box) {
    typedef CUresult (*Encode)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *,
                               const cuuint64_t *, const cuuint32_t *, const cuuint32_t *, CUtensorMapInterleave,
                               CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
    static Encode encode; // found once, without linking the driver's library; threads that race find the same
    if (!encode) {
        void *found = NULL;
        cudaDriverEntryPointQueryResult result;
        TRY_CUDA(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result));
        if (!found) return refuse("attention_prefill: the driver has no cuTensorMapEncodeTiled");
        encode = (Encode)found;
    }
    cuuint32_t unit[3] = {1, 1, 1};
    CUresult error =
        encode(map, dtype == ATTENTION_BF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, rank,
               (void *)base, dims, stride_bytes, box, unit, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (error != CUDA_SUCCESS)
        return refuse("attention_prefill: cuTensorMapEncodeTiled failed: driver error %d", (int)error);
    return 0;
}

template <typename T, int D>
static int prefill_sm90(const AttentionArgs *a, PrefillParams p, PrefillBatch &b, const Device &device,
                        cudaStream_t stream) {
    TensorMaps maps;
    int box_rows = sm90_box_rows(a->block_size, a->block_table && a->block_size != a->cache_max_len);
    cuuint64_t q_dims[3] = {(cuuint64_t)D, (cuuint64_t)a->n_heads, (cuuint64_t)b.q_start[b.n_seq]};
    cuuint64_t q_strides[2] = {(cuuint64_t)a->q_head_stride * 2, (cuuint64_t)a->q_token_stride * 2};
    // A head's part of a block of the cache is the last dimension: what is after its positions is zero in a copy. How
    // many blocks a paged cache has is not known.
    cuuint64_t kv_dims[3] = {(cuuint64_t)D, (cuuint64_t)p.cache.block_size, (cuuint64_t)1 << 31};
    cuuint64_t kv_strides[2] = {(cuuint64_t)D * 2, (cuuint64_t)D * 2 * (cuuint64_t)p.cache.block_size};
    cuuint32_t q_box[3] = {64, 1, SM90_ROWS}, kv_box[3] = {64, (cuuint32_t)box_rows, 1};
    if (tensor_map(&maps.q, a->dtype, a->q, 3, q_dims, q_strides, q_box) ||
        tensor_map(&maps.k, a->dtype, a->k_cache, 3, kv_dims, kv_strides, kv_box) ||
        tensor_map(&maps.v, a->dtype, a->v_cache, 3, kv_dims, kv_strides, kv_box))
        return 1;
    long long n_tiles = prefill_order(&b, SM90_ROWS) * a->n_heads;
    if (n_tiles > 0x7fffffff - device.n_sms)
        return refuse("attention_prefill: %lld query tiles in one launch", n_tiles);
    p.n_tiles = (int)n_tiles;
    return launch("prefill_sm90_kernel", a, prefill_sm90_kernel<T, D>, n_tiles < device.n_sms ? n_tiles : device.n_sms,
                  SM90_THREADS, sm90_smem_bytes<D>(), device.dependent_launch, 1, stream, p, b, maps, box_rows);
}

int attention_prefill(const AttentionArgs *a, void *cuda_stream) {
    const char *who = "attention_prefill";
    cudaStream_t stream = (cudaStream_t)cuda_stream;
    Device device;
    if (check_args(who, a)) return 1;
    if (!a->q_start) return refuse("%s: q_start is NULL", who);
    if (!a->seq_lens) return refuse("%s: seq_lens is NULL", who);
    if (a->q_start[0] < 0) return refuse("%s: q_start[0] is %d, expected at least 0", who, a->q_start[0]);
    for (int i = 0; i < a->n_seq; i++) {
        if (a->q_start[i + 1] < a->q_start[i])
            return refuse("%s: q_start[%d] is %d, expected at least q_start[%d] = %d", who, i + 1, a->q_start[i + 1], i,
                          a->q_start[i]);
        if (check_length(who, i, a->seq_lens[i], a->q_start[i + 1] - a->q_start[i], a->cache_max_len)) return 1;
    }
    if (a->q_start[a->n_seq] == a->q_start[0])
        return refuse("%s: 0 new tokens in %d sequences, expected at least 1", who, a->n_seq);
    if (device_find(&device)) return 1;

    PrefillParams p = {a->q,
                       a->out,
                       a->k_new,
                       a->v_new,
                       a->q_token_stride,
                       a->q_head_stride,
                       a->out_token_stride,
                       a->out_head_stride,
                       a->k_token_stride,
                       a->k_head_stride,
                       a->v_token_stride,
                       a->v_head_stride,
                       cache_view(a),
                       a->n_heads,
                       a->n_heads / a->n_kv_heads,
                       a->causal,
                       0,
                       scale_log2(a)};
    for (int first = 0; first < a->n_seq; first += PREFILL_MAX_BATCH) {
        PrefillBatch b;
        int tokens =
            batch_tokens(a, first, a->n_seq - first < PREFILL_MAX_BATCH ? a->n_seq - first : PREFILL_MAX_BATCH, &b);
        if (tokens == 0) continue;
        if (a->append && launch("prefill_append_kernel", a, prefill_append_kernel, tokens, 128, 0, false, 1, stream, p,
                                b, element_bytes(a->dtype)))
            return 1;
        int failed = for_types(a, [&](auto zero, auto dim) {
            typedef decltype(zero) T;
            constexpr int D = dim;
            if constexpr (std::is_same<T, float>::value)
                return launch("prefill_f32_kernel", a, prefill_f32_kernel<D>, prefill_order(&b, F32_ROWS) * a->n_heads,
                              256, prefill_f32_smem_bytes<D>(), false, 1, stream, p, b);
            else if (device.hopper)
                return prefill_sm90<T, D>(a, p, b, device, stream);
            else
                return launch("prefill_sm80_kernel", a, prefill_sm80_kernel<T, D>,
                              prefill_order(&b, SM80_ROWS) * a->n_heads, 128, prefill_sm80_smem_bytes<T, D>(), false, 1,
                              stream, p, b);
        });
        if (failed) return failed;
    }
    return 0;
}
