// Decode and prefill attention in true float32 products. Plain fused multiply-adds: no tensor core multiplies float32
// exactly.
#pragma once

#include "decode_combine.cuh"
#include "decode_copy.cuh"
#include "prefill.cuh"

constexpr int F32_STAGES = 2; // tiles per warp in its ring; 8 KB each (K and V)

// One element of a result: largest score (log2), sum of weights, weighted sum of V. Rounding is spelled out, as
// combining in registers and from the workspace must give the same bits.
struct F32Sum {
    float m, l, o;
    __device__ __forceinline__ void add(const F32Sum &x) {
        float top = fmaxf(m, x.m), a = exp2_fast(m - top), b = exp2_fast(x.m - top);
        l = __fmaf_rn(x.l, b, __fmul_rn(l, a));
        o = __fmaf_rn(x.o, b, __fmul_rn(o, a));
        m = top;
    }
};

// Tile arithmetic in plain float32. Eight lanes share a key: lane i of them owns dims 4i..4i+3 of every 32. The four
// sets of eight lanes keep their own running maximum and sums, which store() combines.
template <int D> struct FmaTile {
    typedef float Elem;
    static constexpr int DIM = D, HEADS = 4, TOKENS = D == 64 ? 16 : 8;
    float4 q[HEADS][D / 32], o[HEADS][D / 32];
    float m[HEADS], l[HEADS];

    __device__ __forceinline__ void load_q(const float *q_rows, int64_t head_stride, int n_rows, int lane) {
#pragma unroll
        for (int h = 0; h < HEADS; h++)
#pragma unroll
            for (int j = 0; j < D / 32; j++)
                q[h][j] = h < n_rows ? __ldcg((const float4 *)(q_rows + h * head_stride + (lane & 7) * 4 + j * 32))
                                     : make_float4(0, 0, 0, 0);
    }
    __device__ __forceinline__ void reset() {
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
#pragma unroll
            for (int j = 0; j < D / 32; j++) o[h][j] = make_float4(0, 0, 0, 0);
            m[h] = -INFINITY;
            l[h] = 0.0f;
        }
    }

    // Two keys a lane at a time, which share one rescaling of the sums so far.
    __device__ __forceinline__ void accumulate(uint32_t k_tile, uint32_t v_tile, int n_valid, float scale_log2,
                                               int lane) {
#pragma unroll 1
        for (int first = lane >> 3; first < TOKENS; first += 8) {
            float s[2][HEADS] = {};
#pragma unroll
            for (int j = 0; j < D / 32; j++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    float4 k = load4(k_tile, first + 4 * i, j, lane);
#pragma unroll
                    for (int h = 0; h < HEADS; h++) {
                        s[i][h] = fmaf(q[h][j].x, k.x, s[i][h]);
                        s[i][h] = fmaf(q[h][j].y, k.y, s[i][h]);
                        s[i][h] = fmaf(q[h][j].z, k.z, s[i][h]);
                        s[i][h] = fmaf(q[h][j].w, k.w, s[i][h]);
                    }
                }
#pragma unroll
            for (int x = 1; x < 8; x *= 2)
#pragma unroll
                for (int h = 0; h < HEADS; h++)
#pragma unroll
                    for (int i = 0; i < 2; i++) s[i][h] += __shfl_xor_sync(~0u, s[i][h], x);
            float alpha[HEADS];
            bool changed = false;
#pragma unroll
            for (int h = 0; h < HEADS; h++) {
                float top = m[h];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    s[i][h] = first + 4 * i < n_valid ? s[i][h] * scale_log2 : -INFINITY;
                    top = fmaxf(top, s[i][h]);
                }
                float base = top == -INFINITY ? 0.0f : top; // no key yet: all weights 0
                alpha[h] = exp2_fast(m[h] - base);
                changed |= alpha[h] != 1.0f;
                m[h] = top;
                l[h] *= alpha[h];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    s[i][h] = exp2_fast(s[i][h] - base); // a weight from here on
                    l[h] += s[i][h];
                }
            }
            if (__any_sync(~0u, changed))
#pragma unroll
                for (int h = 0; h < HEADS; h++)
#pragma unroll
                    for (int j = 0; j < D / 32; j++) {
                        o[h][j].x *= alpha[h];
                        o[h][j].y *= alpha[h];
                        o[h][j].z *= alpha[h];
                        o[h][j].w *= alpha[h];
                    }
#pragma unroll
            for (int j = 0; j < D / 32; j++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    float4 v = load4(v_tile, first + 4 * i, j, lane);
#pragma unroll
                    for (int h = 0; h < HEADS; h++) {
                        o[h][j].x += s[i][h] * v.x;
                        o[h][j].y += s[i][h] * v.y;
                        o[h][j].z += s[i][h] * v.z;
                        o[h][j].w += s[i][h] * v.w;
                    }
                }
        }
    }

    static __device__ __forceinline__ float4 load4(uint32_t tile, int token, int j, int lane) {
        return load_shared_float4(tile + tile_offset<float, D>(token, (lane & 7) + j * 8));
    }

    __device__ __forceinline__ void store(float2 *ml, float *rows, int pitch, int n_rows, int lane) {
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
            float top = fmaxf(m[h], __shfl_xor_sync(~0u, m[h], 8));
            top = fmaxf(top, __shfl_xor_sync(~0u, top, 16));
            float w = top == -INFINITY ? 0.0f : exp2_fast(m[h] - top), sum = l[h] * w;
#pragma unroll
            for (int x = 8; x < 32; x *= 2) sum += __shfl_xor_sync(~0u, sum, x);
            // Of the sums over four lanes each keeps a quarter: half of them crosses over, then half of the rest.
            float v[D / 8];
#pragma unroll
            for (int j = 0; j < D / 32; j++)
                v[4 * j] = o[h][j].x * w, v[4 * j + 1] = o[h][j].y * w, v[4 * j + 2] = o[h][j].z * w,
                      v[4 * j + 3] = o[h][j].w * w;
            auto halve = [&](auto count, int x) {
                constexpr int n = decltype(count)::value;
#pragma unroll
                for (int i = 0; i < n; i++) {
                    float other = __shfl_xor_sync(~0u, lane & x ? v[i] : v[i + n], x);
                    v[i] = (lane & x ? v[i + n] : v[i]) + other;
                }
            };
            halve(std::integral_constant<int, D / 16>(), 16);
            halve(std::integral_constant<int, D / 32>(), 8);
            int first = lane / 16 * (D / 16) + lane / 8 % 2 * (D / 32); // of all D / 8 of a lane
            float *row = rows + h * pitch + lane % 8 * 4;
            if constexpr (D == 128) {
                if (h < n_rows) *(float4 *)(row + first * 8) = make_float4(v[0], v[1], v[2], v[3]);
            } else
#pragma unroll
                for (int i = 0; i < D / 32; i++)
                    if (h < n_rows) row[(first + i) / 4 * 32 + (first + i) % 4] = v[i];
            if (h < n_rows && lane == 0) ml[h] = make_float2(top, sum);
        }
    }
};

template <class Tile> __host__ __device__ constexpr int f32_tile_bytes() {
    return Tile::TOKENS * Tile::DIM * (int)sizeof(typename Tile::Elem);
}
// The rings, then for each warp o[rows][D + 4] (the 4 keeps store() free of bank conflicts) and ml[rows].
template <class Tile> inline size_t f32_smem_bytes(int warps, int rows) {
    return (size_t)warps *
           (F32_STAGES * 2 * f32_tile_bytes<Tile>() + rows * (sizeof(float2) + (Tile::DIM + 4) * sizeof(float)));
}

// Rows of a tile that are copied together: they are one after another in the cache.
template <class Tile> __host__ __device__ constexpr int f32_copy_rows() {
    return Tile::TOKENS < 16 ? Tile::TOKENS : 16;
}
template <class Tile> __host__ __device__ constexpr int f32_copies() {
    return f32_copy_rows<Tile>() * Tile::DIM * (int)sizeof(typename Tile::Elem) / 512;
}

// A warp starts the copy of one tile: positions pos .. pos+TOKENS-1 of one KV head; zeros from `total` on. dst: where
// in the tile each of the lane's copies goes. Without with_new it leaves out the new token.
template <class Tile>
__device__ __forceinline__ void f32_load_tile(const DecodeParams &p, const DecodeCursor &item, int pos, uint32_t k_tile,
                                              uint32_t v_tile, const uint32_t (&dst)[f32_copies<Tile>()], bool with_new,
                                              int lane) {
    typedef typename Tile::Elem T;
    constexpr int D = Tile::DIM, CHUNKS = D * (int)sizeof(T) / 16, ROWS = f32_copy_rows<Tile>();
    const Cache<T> &cache = (const Cache<T> &)p.cache;
#pragma unroll
    for (int half = 0; half < Tile::TOKENS;
         half += ROWS, k_tile += ROWS * D * sizeof(T), v_tile += ROWS * D * sizeof(T), pos += ROWS) {
        size_t base = pos < item.total ? decode_row(cache, item, pos) : 0;
        const char *k = (const char *)(cache.k + base) + lane * 16, *v = (const char *)(cache.v + base) + lane * 16;
        if (pos + ROWS <= item.total - p.append) {
#pragma unroll
            for (int i = 0; i < f32_copies<Tile>(); i++) {
                copy_async16(k_tile + dst[i], k + i * 512);
                copy_async16(v_tile + dst[i], v + i * 512);
            }
        } else {
#pragma unroll 1 // short: it runs once
            for (int i = 0; i < f32_copies<Tile>(); i++) {
                int row = (i * 32 + lane) / CHUNKS, chunk = (i * 32 + lane) % CHUNKS;
                uint32_t at = tile_offset<T, D>(row, chunk);
                bool valid = pos + row < item.total;
                const char *ki = valid ? k + i * 512 : (const char *)cache.k,
                           *vi = valid ? v + i * 512 : (const char *)cache.v;
                if (p.append && pos + row == item.total - 1) { // the new token: not in the cache yet
                    if (!with_new) continue;
                    ki = (const char *)((const T *)p.k_new + item.seq * p.k_token_stride +
                                        item.kv_head * p.k_head_stride) +
                         chunk * 16;
                    vi = (const char *)((const T *)p.v_new + item.seq * p.v_token_stride +
                                        item.kv_head * p.v_head_stride) +
                         chunk * 16;
                }
                copy_async16(k_tile + at, ki, valid);
                copy_async16(v_tile + at, vi, valid);
            }
        }
    }
}

// Computes: attention of one new token per sequence to its cache, in KV splits; appends K and V if asked.
// Reads:    q [seq][head][D], k_new and v_new [seq][kv head][D], the cache, all float32; seq_lens [seq] int32.
// Writes:   out [seq][head][D] (NaN for a sequence that would overflow its cache); with append, row seq_lens[seq] of K
//           and V; of query tiles that several blocks share, partial_ml and partial_o [seq][head][split], and arrived.
// Grid:     as many blocks of 4 or 8 warps as fit on the GPU; a block owns a range of items, a warp every 4th or 8th
//           tile of an item's split, a thread some elements of the result.
// Requires: head_dim = Tile::DIM, 16-byte rows, scale > 0, arrived = 0; dynamic shared memory of f32_smem_bytes.
template <class Tile, int WARPS>
__global__ void __launch_bounds__(WARPS * 32, 1) decode_f32_kernel(const __grid_constant__ DecodeParams p) {
    typedef typename Tile::Elem T;
    constexpr int D = Tile::DIM, PITCH = D + 4, TILE_BYTES = f32_tile_bytes<Tile>(), CHUNKS = D * (int)sizeof(T) / 16;
    // Of the result, per thread.
    constexpr int THREADS = WARPS * 32, ELEMENTS = (Tile::HEADS * D + THREADS - 1) / THREADS;
    extern __shared__ __align__(1024) char smem[];
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    int max_rows = min(p.heads_per_kv, Tile::HEADS);
    uint32_t ring = shared_address(smem) + warp * F32_STAGES * 2 * TILE_BYTES;
    float *sum_o = (float *)(smem + WARPS * F32_STAGES * 2 * TILE_BYTES); // [warp][row][PITCH]
    float2 *sum_ml = (float2 *)(sum_o + WARPS * max_rows * PITCH);        // [warp][row]
    uint32_t dst[f32_copies<Tile>()];
#pragma unroll
    for (int i = 0; i < f32_copies<Tile>(); i++)
        dst[i] = tile_offset<T, D>((i * 32 + lane) / CHUNKS, (i * 32 + lane) % CHUNKS);

    if (!p.kv_stable) wait_for_previous_kernel();
    DecodeCursor item, ahead; // ahead: the item whose tiles are being fetched
    item.start(p, lane);
    ahead = item;
    int ahead_tile = 0, stage = 0;
    bool waited = false;
    auto fetch = [&](int to) { // this warp's next tile, wherever it is
        DecodeNew<DecodeCursor> left_out;
        for (; ahead.work_left > 0; ahead.next(p), ahead_tile = 0) {
            int pos = ahead.begin() + (ahead_tile * WARPS + warp) * Tile::TOKENS;
            if (pos >= ahead.end()) continue;
            uint32_t tile = ring + to * 2 * TILE_BYTES;
            f32_load_tile<Tile>(p, ahead, pos, tile, tile + TILE_BYTES, dst, waited, lane);
            if (!waited) left_out = DecodeNew<DecodeCursor>(p, ahead, pos, Tile::TOKENS);
            ahead_tile++;
            break;
        }
        return left_out;
    };
    DecodeNew<DecodeCursor> first, second; // new tokens among the tiles that are copied before the wait
#pragma unroll 1
    for (int i = 0; i < F32_STAGES; i++) {
        first = second;
        second = fetch(i);
        if (i + 1 < F32_STAGES) copy_async_commit();
    }
    wait_for_previous_kernel(); // from here on q, k_new and v_new are there, and all may be written
    let_next_kernel_start();
    waited = true;
    if (first.row >= 0 && lane < CHUNKS) first.load<T, D>(p, ring, ring + TILE_BYTES, lane);
    if (second.row >= 0 && lane < CHUNKS) second.load<T, D>(p, ring + 2 * TILE_BYTES, ring + 3 * TILE_BYTES, lane);
    copy_async_commit();

    Tile state;
    DecodeCombine<F32Sum> combine[ELEMENTS];
    int visited = 0;    // splits of the present query tile that this block has done
    bool whole = false; // will it do all of them?
    int n_shared = 0;   // query tiles that it shares with others
    for (; item.work_left > 0; item.next(p)) {
        int seq = item.seq, end = item.end(), head0 = item.kv_head * p.heads_per_kv + item.head_tile * Tile::HEADS;
        int rows = min(Tile::HEADS, p.heads_per_kv - item.head_tile * Tile::HEADS);
        if (visited == 0) {
            whole = item.split == 0 && item.reaches(item.n_splits - 1);
            if (!whole) share_tile(p, item, Tile::HEADS, n_shared++);
            state.load_q((const T *)p.q + seq * p.q_token_stride + head0 * p.q_head_stride, p.q_head_stride, rows,
                         lane);
        }
        state.reset();
        for (int pos = item.begin() + warp * Tile::TOKENS; pos < end; pos += WARPS * Tile::TOKENS) {
            if (first.row < 0)
                copy_async_wait<F32_STAGES - 1>();
            else
                copy_async_wait<0>(); // new tokens came with the last tile before the wait
            __syncwarp();             // the other lanes' copies have landed too
            uint32_t tile = ring + stage * 2 * TILE_BYTES;
            if (p.append && item.head_tile == 0 && item.total <= pos + Tile::TOKENS && lane < CHUNKS)
                for (int v = 0; v < 2; v++)
                    decode_append<T, D>(p, decode_row((const Cache<T> &)p.cache, item, item.total - 1),
                                        tile + v * TILE_BYTES, item.total - 1 - pos, v, lane);
            state.accumulate(tile, tile + TILE_BYTES, end - pos, p.scale_log2, lane);
            __syncwarp(); // every lane has read the stage before it is filled again
            fetch(stage);
            stage = stage + 1 == F32_STAGES ? 0 : stage + 1;
            copy_async_commit(); // always: the waits above count groups
            first.row = -1;
        }

        __syncthreads(); // the sums of the item before have been read
        state.store(sum_ml + warp * rows, sum_o + warp * rows * PITCH, PITCH, rows, lane);
        __syncthreads();
        visited++;
#pragma unroll
        for (int e = 0; e < ELEMENTS; e++) {
            int i = e * THREADS + threadIdx.x, row = i / D, d = i % D;
            if (i >= rows * D) break;
            F32Sum x = {-INFINITY, 0.0f, 0.0f};
            float2 ml[WARPS];
#pragma unroll
            for (int w = 0; w < WARPS; w++) {
                ml[w] = sum_ml[w * rows + row];
                x.m = fmaxf(x.m, ml[w].x);
            }
#pragma unroll
            for (int w = 0; w < WARPS; w++) {
                float weight = exp2_fast(ml[w].x - x.m); // a warp without a key: 2^-inf = 0
                x.l += ml[w].y * weight;
                x.o += sum_o[(w * rows + row) * PITCH + d] * weight;
            }
            if (whole)
                combine[e].add(x, item.split, item.n_splits);
            else {
                size_t part = ((size_t)seq * p.n_heads + head0 + row) * p.max_splits + item.split;
                p.partial_o[part * D + d] = x.o;
                if (d == 0) p.partial_ml[part] = make_float2(x.m, x.l);
            }
        }
        if (item.split + 1 < item.n_splits) continue;

#pragma unroll
        for (int e = 0; e < ELEMENTS; e++) {
            int i = e * THREADS + threadIdx.x, row = i / D, d = i % D;
            if (whole && i < rows * D)
                ((T *)p.out)[seq * p.out_token_stride + (head0 + row) * p.out_head_stride + d] =
                    from_combined<T>(combine[e].all.o, __frcp_rn(combine[e].all.l));
        }
        visited = 0;
    }
    if (n_shared) combine_arrive<T, D, DecodeCursor>(p, n_shared);
    if (item.overflow) decode_refuse<T, D>(p);
}

constexpr int F32_P_PITCH = F32_KEYS + 4;

template <int D> constexpr size_t prefill_f32_smem_bytes() {
    return sizeof(float) * (F32_ROWS * (D + 4) + F32_KEYS * (D + 4) + F32_KEYS * D + F32_ROWS * F32_P_PITCH);
}
static_assert(prefill_f32_smem_bytes<128>() <= 99 * 1024, "a block of any GPU since sm_80 may have that");

// Computes: attention of 64 query rows of one head to the cache, true float32 products.
// Reads:    q [token][head][D] float32; K and V from the cache [block][kv head][position][D] float32.
// Writes:   out [token][head][D] float32.
// Grid:     (query tiles × heads) × 256 threads; thread (ty, tx) of 16 x 16 owns rows ty + 16i, of them keys
//           tx + 16j of the scores and dims 2tx, 2tx+1 of every 32 of the output.
// Requires: the new K and V in the cache, head_dim = D, 16-byte rows, scale > 0; shared memory for Q, K, V and P.
template <int D>
__global__ void __launch_bounds__(256, 2)
    prefill_f32_kernel(const __grid_constant__ PrefillParams p, const __grid_constant__ PrefillBatch b) {
    constexpr int PITCH = D + 4, CHUNKS = D / 4; // the 4: eight rows in eight different bank groups
    extern __shared__ __align__(1024) char smem[];
    float *q_tile = (float *)smem, *k_tile = q_tile + F32_ROWS * PITCH, *v_tile = k_tile + F32_KEYS * PITCH,
          *p_tile = v_tile + F32_KEYS * D;
    const Cache<float> &cache = (const Cache<float> &)p.cache;
    int tx = threadIdx.x & 15, ty = threadIdx.x >> 4;
    PrefillTile tile = prefill_tile(&b, p.n_heads, F32_ROWS, blockIdx.x);
    int kv_head = tile.head / p.heads_per_kv, total = tile.seq_len + tile.n_rows;
    int own_row = table_row(cache, b.first_seq + tile.seq);
    int end = p.causal ? tile.seq_len + min(tile.row0 + F32_ROWS, tile.n_rows) : total;

    const float *q = (const float *)p.q + b.q_start[tile.seq] * p.q_token_stride + tile.head * p.q_head_stride;
    for (int i = threadIdx.x; i < F32_ROWS * CHUNKS; i += 256) {
        int row = i / CHUNKS, chunk = i % CHUNKS;
        bool valid = tile.row0 + row < tile.n_rows;
        copy_async16(shared_address(q_tile + row * PITCH + chunk * 4),
                     q + (valid ? tile.row0 + row : 0) * p.q_token_stride + chunk * 4, valid);
    }

    float o[4][D / 32][2] = {}, m[4], l[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        m[i] = -INFINITY;
        l[i] = 0.0f;
    }
    for (int base = 0; base < end; base += F32_KEYS) {
        for (int i = threadIdx.x; i < F32_KEYS * CHUNKS; i += 256) {
            int row = i / CHUNKS, chunk = i % CHUNKS;
            bool valid = base + row < end;
            size_t offset = cache_row(cache, own_row, kv_head, valid ? base + row : 0) + chunk * 4;
            copy_async16(shared_address(k_tile + row * PITCH + chunk * 4), cache.k + offset, valid);
            copy_async16(shared_address(v_tile + row * D + chunk * 4), cache.v + offset, valid);
        }
        copy_async_commit();
        copy_async_wait<0>();
        __syncthreads(); // everyone's copies of the tile have landed

        float s[4][2] = {};
#pragma unroll 8
        for (int d = 0; d < D; d += 4) {
            float4 k[2];
#pragma unroll
            for (int j = 0; j < 2; j++) k[j] = *(float4 *)(k_tile + (tx + 16 * j) * PITCH + d);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float4 x = *(float4 *)(q_tile + (ty + 16 * i) * PITCH + d);
#pragma unroll
                for (int j = 0; j < 2; j++) s[i][j] += x.x * k[j].x + x.y * k[j].y + x.z * k[j].z + x.w * k[j].w;
            }
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int row = tile.row0 + ty + 16 * i, n_keys = (p.causal ? min(tile.seq_len + row + 1, end) : end) - base;
            float top = m[i];
#pragma unroll
            for (int j = 0; j < 2; j++) {
                s[i][j] = tx + 16 * j < n_keys ? s[i][j] * p.scale_log2 : -INFINITY;
                top = fmaxf(top, s[i][j]);
            }
#pragma unroll
            // Finite: every row attends to key 0.
            for (int x = 1; x < 16; x *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, x));
            float alpha = exp2_fast(m[i] - top);
            m[i] = top;
            l[i] *= alpha;
#pragma unroll
            for (int j = 0; j < 2; j++) {
                float w = exp2_fast(s[i][j] - top);
                l[i] += w;
                p_tile[(ty + 16 * i) * F32_P_PITCH + tx + 16 * j] = w;
            }
#pragma unroll
            for (int j = 0; j < D / 32; j++) {
                o[i][j][0] *= alpha;
                o[i][j][1] *= alpha;
            }
        }
        __syncwarp(); // a row's weights are written and read by the same half warp
#pragma unroll 2
        for (int key = 0; key < F32_KEYS; key += 4) {
            float4 w[4];
#pragma unroll
            for (int i = 0; i < 4; i++) w[i] = *(float4 *)(p_tile + (ty + 16 * i) * F32_P_PITCH + key);
#pragma unroll
            for (int n = 0; n < 4; n++)
#pragma unroll
                for (int j = 0; j < D / 32; j++) {
                    float2 v = *(float2 *)(v_tile + (key + n) * D + j * 32 + tx * 2);
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        float x = n == 0 ? w[i].x : n == 1 ? w[i].y : n == 2 ? w[i].z : w[i].w;
                        o[i][j][0] += x * v.x;
                        o[i][j][1] += x * v.y;
                    }
                }
        }
        __syncthreads(); // everyone has read the tile before the next one lands
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int x = 1; x < 16; x *= 2) l[i] += __shfl_xor_sync(~0u, l[i], x);
        int row = tile.row0 + ty + 16 * i;
        if (row >= tile.n_rows) continue;
        float *out = (float *)p.out + (b.q_start[tile.seq] + row) * p.out_token_stride + tile.head * p.out_head_stride;
#pragma unroll
        for (int j = 0; j < D / 32; j++)
            *(float2 *)(out + j * 32 + tx * 2) = make_float2(o[i][j][0] / l[i], o[i][j][1] / l[i]);
    }
}
