// Engine fused: the consumers' part where weights are quantised (packed.h). Included by fused_kernel.cuh, in its
// namespace. Codes are widened in registers to bf16, exactly, and meet the tensor cores as 16-bit weights do: a lane's
// 8 columns of a row are four registers. What has to be multiplied by one scale is one chain of mmas, whose sum is then
// multiplied; sums are rounded to nearest in float32 from there on.

// (x & mask) | bits, in one instruction.
template <uint32_t MASK, uint32_t BITS> __device__ __forceinline__ uint32_t and_or(uint32_t x) {
    uint32_t y;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(y) : "r"(x), "n"(MASK), "n"(BITS));
    return y;
}
__device__ __forceinline__ uint32_t subtract2(uint32_t a, uint32_t b) {
    __nv_bfloat162 x = __hsub2(*(__nv_bfloat162 *)&a, *(__nv_bfloat162 *)&b);
    return *(uint32_t *)&x;
}

// How codes are widened. LOADS: of 16 bytes, for what a lane has of a row's chunk; `widen` gives, of its 8 columns of 32,
// columns 0 and 1, 2 and 3, 4 and 5, 6 and 7.
struct CodesFp8 {
    static constexpr int BITS = 8, LOADS = 2;
    // Exponent and mantissa of e4m3 in bf16's places (packed_fp8): the value, subnormal or not, times 2^-120.
    static __device__ __forceinline__ uint32_t times_2_120(uint32_t v) {
        const uint32_t scale = 0x7b807b80u;
        __nv_bfloat162 x = __hmul2(*(__nv_bfloat162 *)&v, *(const __nv_bfloat162 *)&scale);
        return *(uint32_t *)&x;
    }
    static __device__ __forceinline__ uint32_t first(uint32_t codes) {
        return times_2_120(codes & 0x87f087f0u);
    }
    static __device__ __forceinline__ uint32_t second(uint32_t codes) {
        return times_2_120((codes << 4 & 0x80f080f0u) | (codes >> 4 & 0x07000700u));
    }
    static __device__ __forceinline__ void widen(const uint32_t (&codes)[8], int j, uint32_t (&w)[4]) {
        uint32_t a = codes[2 * j], b = codes[2 * j + 1];
        w[0] = first(a), w[1] = second(a), w[2] = first(b), w[3] = second(b);
    }
};

struct CodesInt8 {
    static constexpr int BITS = 8, LOADS = 2;
    // 128 + the lower seven bits, less 128, or 256 for a negative one: both are bf16 numbers with seven bits of mantissa.
    static __device__ __forceinline__ uint32_t widen2(uint32_t low) {
        return subtract2(and_or<0x007f007fu, 0x43004300u>(low), and_or<0x00800080u, 0x43004300u>(low));
    }
    static __device__ __forceinline__ void widen(const uint32_t (&codes)[8], int j, uint32_t (&w)[4]) {
        uint32_t a = codes[2 * j], b = codes[2 * j + 1];
        w[0] = widen2(a), w[1] = widen2(a >> 8), w[2] = widen2(b), w[3] = widen2(b >> 8);
    }
};

struct CodesInt4 {
    static constexpr int BITS = 4, LOADS = 1;
    // 128 + the code, less 136.
    static __device__ __forceinline__ uint32_t widen2(uint32_t low) {
        return subtract2(and_or<0x000f000fu, 0x43004300u>(low), 0x43084308u);
    }
    static __device__ __forceinline__ void widen(const uint32_t (&codes)[4], int j, uint32_t (&w)[4]) {
        uint32_t a = codes[j];
        w[0] = widen2(a), w[1] = widen2(a >> 4), w[2] = widen2(a >> 8), w[3] = widen2(a >> 12);
    }
};

// The tiles of a product of quantised weights. An mma m16n8k16 takes the tile's 16 rows and up to 8 activation rows; lane
// 4g + t has weight rows g and g + 8 and activation row g. What a chunk is made of, for each of its 32 columns: two mmas,
// of a lane's columns 8t + 0, 1, 4, 5 and 8t + 2, 3, 6, 7, since activations have words 1 and 2 of every four exchanged
// (permuted_index). SCALES of a chunk that a row has: none, where there is one for the whole row; 1; or 4, of which the
// first two may be one and the last two another.
template <typename N, class Codes, int SCALES>
__device__ __forceinline__ void consume_packed_tiles(const FusedParams &s, const Product &f, const Block &block,
                                                     Ring &ring, Ring &partials_ring) {
    constexpr int TILE = N::TILE, WARPS = CONSUMER_WARPS, CODE_BYTES = PACK_COLUMNS * Codes::BITS / 8,
                  CHUNK_BYTES = PACK_CHUNK * Codes::BITS / 8, CHUNKS = PACK_COLUMNS / PACK_CHUNK,
                  UNROLL = Codes::BITS == 4 && SCALES < 4 ? 2 : 1; // as registers allow
    static_assert(TILE == 16 && MAX_ACT_ROWS == 8 && WARPS % CHUNKS == 0, "whole mmas; a warp's chunk of every block");
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int act_rows = s.n_rows * N::TERMS, n_slices = f.n_slices, slice_chunks = f.slice / PACK_CHUNK,
              slices_per_sum = f.slices_per_sum, pitch = f.weight_pitch, block_bytes = f.block_bytes,
              scale_bytes = f.scale_bytes, n_chunks = (f.cols + PACK_CHUNK - 1) / PACK_CHUNK;
    const int sum_floats = WARPS * act_rows * TILE, partial_floats = s.partial_floats, stage_bytes = s.stage_bytes;
    const int scale_shift = scale_bytes == 2 ? 16 : 0; // from what is loaded to a float32
    // The warp's first chunk of a slice; the next one is WARPS chunks, whole blocks, further on.
    const uint32_t row = block.stages + g * pitch + warp / CHUNKS * block_bytes;
    const uint32_t codes_at = row + warp % CHUNKS * CHUNK_BYTES + t * 16, scales_at = row + CODE_BYTES;
    const uint32_t act = block.act + g * f.act_pitch + t * 16;
    const bool there = g < act_rows; // lanes without an activation row load nothing
    uint32_t scale_at[4];
#pragma unroll
    for (int j = 0; j < SCALES; j++)
        scale_at[j] = scales_at + (warp % CHUNKS * PACK_CHUNK + j * 32 >> f.group_log2) * scale_bytes;
    float *partials = block.partials + (warp * act_rows + 2 * t) * TILE + partial_place<N>(g);
    for (;;) {
        int tile = 0, in_sum = 0, part = 0;
        float sum[4] = {};
        for (int p = 0; p < n_slices; p++) {
            const int chunks = min(slice_chunks, n_chunks - p * slice_chunks);
            ring.wait_full();
            if (p == 0) tile = *(volatile const int *)(block.stage_tile + ring.slot);
            const uint32_t stage = ring.slot * stage_bytes, input = act + p * slice_chunks * PACK_CHUNK * 2;
#pragma unroll(UNROLL)
            for (int chunk = warp, at = stage; chunk < chunks; chunk += WARPS, at += WARPS / CHUNKS * block_bytes) {
                uint32_t codes[2][4 * Codes::LOADS], scale[2][4];
                uint4 a[4];
#pragma unroll
                for (int half = 0; half < 2; half++) { // rows g and g + 8
#pragma unroll
                    for (int i = 0; i < Codes::LOADS; i++) {
                        uint4 v = load_shared16(codes_at + at + half * 8 * pitch + i * 64);
                        codes[half][4 * i] = v.x, codes[half][4 * i + 1] = v.y, codes[half][4 * i + 2] = v.z,
                                        codes[half][4 * i + 3] = v.w;
                    }
#pragma unroll
                    for (int j = 0; j < SCALES; j++)
                        scale[half][j] = load_shared_2_or_4(scale_at[j] + at + half * 8 * pitch, scale_bytes == 2);
                }
#pragma unroll
                for (int j = 0; j < 4; j++) a[j] = load_shared16(input + chunk * PACK_CHUNK * 2 + j * 64, there);
                float acc[2][4] = {};
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    uint32_t upper[4], lower[4];
                    Codes::widen(codes[0], j, upper);
                    Codes::widen(codes[1], j, lower);
                    mma_16x8x16<bf16>(acc[0], upper[0], lower[0], upper[2], lower[2], a[j].x, a[j].y);
                    mma_16x8x16<bf16>(acc[1], upper[1], lower[1], upper[3], lower[3], a[j].z, a[j].w);
                    if (SCALES < 4 && j < 3) continue;
#pragma unroll
                    for (int i = 0; i < 4; i++) { // rows g, g, g + 8, g + 8
                        float chain = acc[0][i] + acc[1][i];
                        sum[i] = SCALES == 0
                                     ? sum[i] + chain
                                     : fmaf(chain, __uint_as_float(scale[i / 2][SCALES == 4 ? j : 0] << scale_shift),
                                            sum[i]);
                        acc[0][i] = acc[1][i] = 0;
                    }
                }
            }
            if (lane == 0) mbarrier_arrive_after(ring.empty + 8 * ring.slot, (sum[0] + sum[1]) + (sum[2] + sum[3]));
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
            for (int i = 0; i < 4; i++) {
                if (2 * t + i % 2 < act_rows) to[i % 2 * TILE + partial_place<N>(i / 2 * 8)] = sum[i];
                sum[i] = 0;
            }
        }
        __syncwarp();
        if (lane == 0) mbarrier_arrive(partials_ring.full + 8 * partials_ring.slot);
        partials_ring.next();
        if (tile == END_OF_PRODUCT) return;
    }
}

template <typename N, class Codes>
__device__ __forceinline__ void consume_codes(const FusedParams &s, const Product &f, const Block &block, Ring &ring,
                                              Ring &partials_ring) {
    if (f.scale_bytes == 0)
        consume_packed_tiles<N, Codes, 0>(s, f, block, ring, partials_ring);
    else if (1 << f.group_log2 == PACK_CHUNK)
        consume_packed_tiles<N, Codes, 1>(s, f, block, ring, partials_ring);
    else
        consume_packed_tiles<N, Codes, 4>(s, f, block, ring, partials_ring);
}

// Columns from cols on to the end of their chunk are zero: so are the codes there, but a number that is left over may be
// none.
__device__ __forceinline__ void clear_last_chunk(const Product &f, int act_rows, char *to) {
    const int each = -f.cols % PACK_CHUNK + PACK_CHUNK;
    for (int i = threadIdx.x; i < act_rows * each; i += CONSUMER_THREADS)
        ((uint16_t *)(to + i / each * f.act_pitch))[f.cols + i % each] = 0;
}

template <typename N>
__device__ __forceinline__ void consume_packed_product(const FusedParams &s, const Product &f, const Block &block,
                                                       Ring &ring, Ring &partials_ring) {
    if (f.codes == CODES_FP8) // a scale for each row
        consume_packed_tiles<N, CodesFp8, 0>(s, f, block, ring, partials_ring);
    else if (f.codes == CODES_INT8)
        consume_codes<N, CodesInt8>(s, f, block, ring, partials_ring);
    else
        consume_codes<N, CodesInt4>(s, f, block, ring, partials_ring);
}
