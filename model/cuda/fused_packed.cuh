// Engine fused: the consumers' part where weights are quantised (packed.h). Included by fused_kernel.cuh, in its
// namespace. Codes are widened in registers to bf16, exactly, and meet the tensor cores as 16-bit weights do: a lane's
// 8 columns of a row are four registers. What has to be multiplied by one scale is one chain of mmas, whose sum is then
// multiplied; sums are rounded to nearest in float32 from there on.

// How codes are widened: `widen` gives a lane's 8 columns for one of a chunk's two mmas. Lane: its codes for both.
struct CodesFp8 {
    static constexpr int BITS = 8;
    typedef uint4 Lane;
    // Exponent and mantissa of e4m3 in bf16's places: the value, subnormal or not, times 2^-120.
    static __device__ __forceinline__ uint32_t widen2(uint32_t high) {
        uint32_t v = high >> 4 & 0x07f007f0u | high & 0x80008000u;
        __nv_bfloat162 x = __hmul2(*(__nv_bfloat162 *)&v, __nv_bfloat162(__ushort_as_bfloat16(0x7b80), __ushort_as_bfloat16(0x7b80)));
        return *(uint32_t *)&x;
    }
    static __device__ __forceinline__ void widen(uint4 codes, int step, uint32_t (&w)[4]) {
        uint32_t a = step == 0 ? codes.x : codes.z, b = step == 0 ? codes.y : codes.w;
        w[0] = widen2(a << 8), w[1] = widen2(a), w[2] = widen2(b << 8), w[3] = widen2(b);
    }
};

struct CodesInt8 {
    static constexpr int BITS = 8;
    typedef uint4 Lane;
    // 128 + the lower seven bits, less 128, or 256 for a negative one: both are bf16 numbers with seven bits of mantissa.
    static __device__ __forceinline__ uint32_t widen2(uint32_t low) {
        uint32_t v = low & 0x007f007fu | 0x43004300u, less = low & 0x00800080u | 0x43004300u;
        __nv_bfloat162 x = __hsub2(*(__nv_bfloat162 *)&v, *(__nv_bfloat162 *)&less);
        return *(uint32_t *)&x;
    }
    static __device__ __forceinline__ void widen(uint4 codes, int step, uint32_t (&w)[4]) {
        uint32_t a = step == 0 ? codes.x : codes.z, b = step == 0 ? codes.y : codes.w;
        w[0] = widen2(a), w[1] = widen2(a >> 8), w[2] = widen2(b), w[3] = widen2(b >> 8);
    }
};

struct CodesInt4 {
    static constexpr int BITS = 4;
    typedef uint2 Lane;
    // 128 + the code, less 136.
    static __device__ __forceinline__ uint32_t widen2(uint32_t low) {
        uint32_t v = low & 0x000f000fu | 0x43004300u, less = 0x43084308u;
        __nv_bfloat162 x = __hsub2(*(__nv_bfloat162 *)&v, *(__nv_bfloat162 *)&less);
        return *(uint32_t *)&x;
    }
    static __device__ __forceinline__ void widen(uint2 codes, int step, uint32_t (&w)[4]) {
        uint32_t a = step == 0 ? codes.x : codes.y;
        w[0] = widen2(a), w[1] = widen2(a >> 4), w[2] = widen2(a >> 8), w[3] = widen2(a >> 12);
    }
};

__device__ __forceinline__ uint4 load_lane(uint32_t address, bool valid, uint4) {
    return load_shared16(address, valid);
}
__device__ __forceinline__ uint2 load_lane(uint32_t address, bool valid, uint2) {
    return load_shared8(address, valid);
}

// A scale in a stage: bf16, or float32.
__device__ __forceinline__ float load_scale(uint32_t address, int scale_bytes, bool valid) {
    return scale_bytes == 2 ? __uint_as_float(load_shared2(address, valid) << 16) : load_shared4(address, valid);
}

// The tiles of a product of quantised weights. Each warp has a chunk of every block of the columns, of its set's rows.
// BY_STEP: groups are shorter than a chunk, so that each of its two mmas has a scale of its own.
template <typename N, int PAIRS, class Codes, bool BY_STEP>
__device__ __forceinline__ void consume_packed_tiles(const FusedParams &s, const Product &f, const Block &block,
                                                     Ring &ring, Ring &partials_ring) {
    constexpr int GROUPS = N::OWN_GROUPS, TILE = N::TILE, CHUNK_BYTES = PACK_CHUNK * Codes::BITS / 8,
                  SCALES = BY_STEP ? 2 : 1, DEPTH = (Codes::BITS * GROUPS * SCALES > 8 ? 4 : 8) / PAIRS / 2 > 1
                                                        ? (Codes::BITS * GROUPS * SCALES > 8 ? 4 : 8) / PAIRS / 2
                                                        : 1; // blocks at a time, as registers allow
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % CONSUMER_WARPS, g = lane / 4, t = lane % 4;
    const int first_row = threadIdx.x / CONSUMER_THREADS * GROUPS * MMA_WEIGHT_ROWS;
    const int act_rows = s.n_rows * N::TERMS, n_slices = f.n_slices, slice_blocks = f.slice_blocks,
              slices_per_sum = f.slices_per_sum, pitch = f.weight_pitch, block_bytes = f.block_bytes,
              scale_bytes = f.scale_bytes, cols = f.cols, n_blocks = f.blocks;
    const int sum_floats = CONSUMER_WARPS * act_rows * TILE, partial_floats = s.partial_floats,
              stage_bytes = s.stage_bytes;
    const bool grouped = scale_bytes > 0;
    const uint32_t row = block.stages + (first_row + mma_weight_row(lane)) * pitch;
    const uint32_t codes_at = row + warp * CHUNK_BYTES + lane % 8 * (CHUNK_BYTES / 8);
    // Of the lane's half of 64 columns, in both of the chunk's mmas.
    uint32_t scale_at[SCALES];
#pragma unroll
    for (int step = 0; step < SCALES; step++)
        scale_at[step] = row + PACK_COLUMNS * Codes::BITS / 8 +
                         (grouped ? (warp * PACK_CHUNK + step * 64 + g % 2 * 32 >> f.group_log2) * scale_bytes : 0);
    float *partials = block.partials + (warp * act_rows + t / 2) * TILE + first_row + g / 2;
    const int act_column = warp * PACK_CHUNK + mma_act_column(lane);
    uint32_t act[PAIRS];
#pragma unroll
    for (int r = 0; r < PAIRS; r++) {
        int of = r * MMA_ACT_ROWS + mma_act_row(lane) < act_rows ? r * MMA_ACT_ROWS + mma_act_row(lane) : 0;
        act[r] = block.act + of * f.act_pitch + act_column * 2 + mma_act_pair(lane) * 8;
    }
    for (;;) {
        int tile = 0, in_sum = 0, part = 0;
        float sum[GROUPS][PAIRS] = {};
        for (int p = 0; p < n_slices; p++) {
            const int blocks = min(slice_blocks, n_blocks - p * slice_blocks), left = cols - p * slice_blocks * PACK_COLUMNS;
            ring.wait_full();
            if (p == 0) tile = *(volatile const int *)(block.stage_tile + ring.slot);
            const uint32_t stage = ring.slot * stage_bytes;
            for (int c0 = 0; c0 < blocks; c0 += DEPTH) {
                typename Codes::Lane codes[DEPTH][GROUPS];
                float scale[DEPTH][GROUPS][SCALES];
                uint2 a[DEPTH][PAIRS][2];
#pragma unroll
                for (int d = 0; d < DEPTH; d++) {
                    const int c = c0 + d;
                    const bool there = c < blocks;
#pragma unroll
                    for (int i = 0; i < GROUPS; i++) {
                        const uint32_t at = stage + i * MMA_WEIGHT_ROWS * pitch + c * block_bytes;
                        codes[d][i] = load_lane(codes_at + at, there, typename Codes::Lane());
#pragma unroll
                        for (int step = 0; step < SCALES; step++)
                            scale[d][i][step] = grouped ? load_scale(scale_at[step] + at, scale_bytes, there) : 1.0f;
                    }
#pragma unroll
                    for (int r = 0; r < PAIRS; r++)
#pragma unroll
                        for (int step = 0; step < 2; step++)
                            a[d][r][step] =
                                load_shared8(act[r] + (p * slice_blocks + c) * PACK_COLUMNS * 2 + step * 128,
                                             c * PACK_COLUMNS + act_column + step * 64 < left);
                }
#pragma unroll
                for (int d = 0; d < DEPTH; d++)
#pragma unroll
                    for (int i = 0; i < GROUPS; i++) {
                        float acc[PAIRS][4] = {};
#pragma unroll
                        for (int step = 0; step < 2; step++) {
                            uint32_t w[4];
                            Codes::widen(codes[d][i], step, w);
#pragma unroll
                            for (int r = 0; r < PAIRS; r++) {
                                if (BY_STEP && step == 1) acc[r][0] = acc[r][1] = acc[r][2] = acc[r][3] = 0;
                                mma_16x8x16<bf16>(acc[r], w[0], w[1], w[2], w[3], a[d][r][step].x, a[d][r][step].y);
                                if (BY_STEP || step == 1)
                                    sum[i][r] = fmaf(acc[r][0] + acc[r][3], scale[d][i][BY_STEP ? step : 0], sum[i][r]);
                            }
                        }
                    }
            }
            float all = 0;
#pragma unroll
            for (int i = 0; i < GROUPS; i++)
#pragma unroll
                for (int r = 0; r < PAIRS; r++) all += sum[i][r];
            if (lane == 0) mbarrier_arrive_after(ring.empty + 8 * ring.slot, all);
            ring.next();
            if (p == 0) {
                partials_ring.wait_empty();
                if (threadIdx.x == 0) *(volatile int *)(block.partial_tile + partials_ring.slot) = tile;
                if (tile == END_OF_PRODUCT) break; // what was computed is of no tile
            }
            if (++in_sum < slices_per_sum && p + 1 < n_slices) continue;
            float *to = partials + partials_ring.slot * partial_floats + part++ * sum_floats;
            in_sum = 0;
#pragma unroll
            for (int i = 0; i < GROUPS; i++)
#pragma unroll
                for (int r = 0; r < PAIRS; r++) {
                    sum[i][r] += __shfl_xor_sync(~0u, sum[i][r], 5); // both halves of 64 columns
                    if (g % 2 == 0 && t % 2 == 0 && r * 2 + t / 2 < act_rows)
                        to[r * 2 * TILE + i * MMA_WEIGHT_ROWS] = sum[i][r];
                    sum[i][r] = 0;
                }
        }
        __syncwarp();
        if (lane == 0) mbarrier_arrive(partials_ring.full + 8 * partials_ring.slot);
        partials_ring.next();
        if (tile == END_OF_PRODUCT) return;
    }
}

template <typename N, int PAIRS>
__device__ __forceinline__ void consume_packed_product(const FusedParams &s, const Product &f, const Block &block,
                                                       Ring &ring, Ring &partials_ring) {
    const bool by_step = f.scale_bytes > 0 && 1 << f.group_log2 < PACK_CHUNK;
    if (f.codes == CODES_FP8)
        consume_packed_tiles<N, PAIRS, CodesFp8, false>(s, f, block, ring, partials_ring);
    else if (f.codes == CODES_INT8 && !by_step)
        consume_packed_tiles<N, PAIRS, CodesInt8, false>(s, f, block, ring, partials_ring);
    else if (f.codes == CODES_INT8)
        consume_packed_tiles<N, PAIRS, CodesInt8, true>(s, f, block, ring, partials_ring);
    else if (!by_step)
        consume_packed_tiles<N, PAIRS, CodesInt4, false>(s, f, block, ring, partials_ring);
    else
        consume_packed_tiles<N, PAIRS, CodesInt4, true>(s, f, block, ring, partials_ring);
}
