// Engine fused: the consumers' part where weights are quantised (packed.h). Included by fused_kernel.cuh, in its
// namespace. Codes are widened in registers to bf16, exactly up to a power of two and an offset (fused.h says how), and
// meet the tensor cores as 16-bit weights do: a lane's 8 columns of a row are four registers. What has to be multiplied
// by one scale is one chain of mmas, whose sum is then multiplied; sums are rounded to nearest in float32 from there
// on.

// How codes are widened. A byte as the low half of a bf16 is its value times 2^-133, as the last bit of the exponent
// goes on where the mantissa ends; so an unsigned code is a bf16 as soon as it is alone. LOADS: of 16 bytes, for what a
// lane has of a row's chunk; `widen` gives, of its 8 columns of 32, columns 0 and 1, 2 and 3, 4 and 5, 6 and 7. What
// they give is (code + OFFSET) × 2^EXPONENT, the second and the last times 2^SECOND besides.
struct CodesFp8 {
    static constexpr int BITS = 8, LOADS = 2, OFFSET = 0, EXPONENT = -120, SECOND = 0;
    // Exponent and mantissa of e4m3 in bf16's places (packed_fp8).
    static __device__ __forceinline__ uint32_t second(uint32_t codes) {
        return and_xor<0x80f080f0u>(codes << 4) | and_xor<0x07000700u>(codes >> 4);
    }
    static __device__ __forceinline__ void widen(const uint32_t (&codes)[8], int j, uint32_t (&w)[4]) {
        uint32_t a = codes[2 * j], b = codes[2 * j + 1];
        w[0] = and_xor<0x87f087f0u>(a), w[1] = second(a), w[2] = and_xor<0x87f087f0u>(b), w[3] = second(b);
    }
};

struct CodesInt8 {
    static constexpr int BITS = 8, LOADS = 2, OFFSET = 128, EXPONENT = -133, SECOND = 0;
    static __device__ __forceinline__ uint32_t widen2(uint32_t low) {
        return and_xor<0x00ff00ffu, 0x00800080u>(low);
    }
    static __device__ __forceinline__ void widen(const uint32_t (&codes)[8], int j, uint32_t (&w)[4]) {
        uint32_t a = codes[2 * j], b = codes[2 * j + 1];
        w[0] = widen2(a), w[1] = widen2(a >> 8), w[2] = widen2(b), w[3] = widen2(b >> 8);
    }
};

struct CodesInt4 {
    static constexpr int BITS = 4, LOADS = 1, OFFSET = 8, EXPONENT = -133, SECOND = 4;
    static __device__ __forceinline__ void widen(const uint32_t (&codes)[4], int j, uint32_t (&w)[4]) {
        uint32_t a = codes[j], b = a >> 8;
        w[0] = and_xor<0x000f000fu>(a), w[1] = and_xor<0x00f000f0u>(a);
        w[2] = and_xor<0x000f000fu>(b), w[3] = and_xor<0x00f000f0u>(b);
    }
};

// Chunks of a block; teams of so many warps, each of which takes every PACK_TEAMSth block, a chunk a warp.
constexpr int PACK_CHUNKS = PACK_COLUMNS / PACK_CHUNK, PACK_TEAMS = CONSUMER_WARPS / PACK_CHUNKS;
// Columns of a product whose activations stay in registers over all its tiles, at most; chunks of a warp that they are.
constexpr int HELD_COLUMNS = 4096, HELD_CHUNKS = HELD_COLUMNS / PACK_CHUNK / CONSUMER_WARPS;
__device__ __forceinline__ float power_of_two(int e) {
    return __int_as_float((127 + e) << 23);
}

// An mma whose sum starts at zero.
__device__ __forceinline__ void first_mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                          uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(0.0f));
}

// Of the warp's chunks of every activation row: the sums of the activations, without ACT_FACTOR, × -OFFSET, of 128
// columns or, in groups of 32, of each 32: sums[chunk][EACH][even number of rows]; what is beside an odd last row is
// not used. 32 columns are two mmas of 16 with 1 / ACT_FACTOR, whichever operand the activations are, so that the bits
// are the same: of more than 2 rows the right one, all rows at once; of up to 2 the left one, whose 16 rows are then 32
// columns each of four chunks.
template <int MAX_ROWS, int EACH, int OFFSET>
__device__ __forceinline__ void sum_activations(const Product &f, const Block &block, int act_rows) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4,
              n_chunks = (f.cols + PACK_CHUNK - 1) / PACK_CHUNK, rows = act_rows + act_rows % 2;
    const uint32_t one = 0x37803780u; // 1 / ACT_FACTOR, twice
    static_assert(ACT_EXPONENT == 16, "its inverse");
    if constexpr (MAX_ROWS > 2) {
        const uint32_t from = block.act + min(g, act_rows - 1) * f.act_pitch + t * 16;
#pragma unroll(HELD_CHUNKS)
        for (int chunk = warp; chunk < n_chunks; chunk += CONSUMER_WARPS) {
            float sums[4][4];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const uint4 v = load_shared16(from + chunk * (PACK_CHUNK * 2) + j * 64);
                first_mma(sums[j], one, one, one, one, v.x, v.y);
                mma_16x8x16<bf16>(sums[j], one, one, one, one, v.z, v.w);
            }
            float *to = block.code_sums + chunk * EACH * rows + 2 * t;
#pragma unroll
            for (int j = 0; j < EACH; j++) {
                float2 sum = EACH == 4 ? make_float2(sums[j][0], sums[j][1])
                                       : make_float2((sums[0][0] + sums[1][0]) + (sums[2][0] + sums[3][0]),
                                                     (sums[0][1] + sums[1][1]) + (sums[2][1] + sums[3][1]));
                if (g == 0 && 2 * t < rows) *(float2 *)(to + j * rows) = make_float2(-OFFSET * sum.x, -OFFSET * sum.y);
            }
        }
    } else {
        for (int row = 0; row < act_rows; row++)
#pragma unroll(2)
            for (int first = warp; first < n_chunks; first += 4 * CONSUMER_WARPS) {
                // Lane 4g + t: of a chunk g / 4 and of one two further on, columns 32 (g % 4) + 8t .. +7.
                const int upper = first + g / 4 * CONSUMER_WARPS, lower = upper + 2 * CONSUMER_WARPS;
                const uint32_t from = block.act + row * f.act_pitch + lane % 16 * 16;
                const uint4 a = load_shared16(from + upper * (PACK_CHUNK * 2), upper < n_chunks),
                            b = load_shared16(from + lower * (PACK_CHUNK * 2), lower < n_chunks);
                float sums[4];
                first_mma(sums, a.x, b.x, a.y, b.y, one, one);
                mma_16x8x16<bf16>(sums, a.z, b.z, a.w, b.w, one, one);
                float sum[2] = {sums[0], sums[2]};
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int chunk = i ? lower : upper;
                    if (EACH == 1) {
                        sum[i] += __shfl_xor_sync(~0u, sum[i], 4);
                        sum[i] += __shfl_xor_sync(~0u, sum[i], 8);
                    }
                    if (t == 0 && (EACH == 4 || g % 4 == 0) && chunk < n_chunks)
                        block.code_sums[(chunk * EACH + g % EACH) * rows + row] = -OFFSET * sum[i];
                }
            }
    }
    __syncwarp();
}

// What a lane has of a product that no tile changes.
struct PackedLane {
    uint32_t codes, scales[4]; // addresses in the first stage: of row g's codes and scales, of the warp's first chunk
    uint32_t lower;            // from there to row g + 8
    uint32_t act, sums;        // addresses of activation row g, and of the sums of rows 2t and 2t + 1
    bool has_act;              // is there a row g?
    int step_bytes, sum_pitch; // step_bytes: from a chunk to the warp's next one
};

__device__ __forceinline__ float load_scale(uint32_t address, bf16) {
    uint16_t v;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(address) : "memory");
    return __uint_as_float((uint32_t)v << 16);
}
__device__ __forceinline__ float load_scale(uint32_t address, float) {
    float v;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(address) : "memory");
    return v;
}

// A lane's activations of a chunk, by its 32 columns: in shared memory, or held in registers. Of up to 2 rows lanes
// without one load nothing: a load of a warp takes as long as all its bytes do, the same ones or not. Of more rows they
// take the last one again, which costs no predicate.
template <int MAX_ROWS> __device__ __forceinline__ uint4 load_activations(uint32_t from, bool there) {
    return MAX_ROWS <= 2 ? load_shared16(from, there) : load_shared16(from);
}
template <int MAX_ROWS> struct SharedActivations {
    uint32_t at;
    bool there;
    __device__ __forceinline__ uint4 load(int chunk, int j) const {
        return load_activations<MAX_ROWS>(at + chunk * (CONSUMER_WARPS * PACK_CHUNK * 2) + j * 64, there);
    }
};
struct HeldActivations {
    const uint4 (&each)[HELD_CHUNKS][4];
    int first;
    __device__ __forceinline__ uint4 load(int chunk, int j) const {
        return each[first + chunk][j];
    }
};

// sum += N chunks of a warp.
template <class Codes, int SCALES, typename Scale, int N, class Activations>
__device__ __forceinline__ void multiply_chunks(float (&sum)[4], const PackedLane &of, uint32_t stage,
                                                const Activations &act, uint32_t sums) {
    constexpr int EACH = SCALES == 4 ? 4 : 1;
    const float FIRST = power_of_two(-Codes::EXPONENT - ACT_EXPONENT),
                SECOND = power_of_two(-Codes::EXPONENT - ACT_EXPONENT - Codes::SECOND);
    uint32_t codes[N][2][4 * Codes::LOADS];
    float scale[N][2][SCALES > 0 ? SCALES : 1];
#pragma unroll
    for (int c = 0; c < N; c++)
#pragma unroll
        for (int half = 0; half < 2; half++) { // rows g and g + 8
            const uint32_t at = stage + c * of.step_bytes + half * of.lower;
#pragma unroll
            for (int i = 0; i < Codes::LOADS; i++) {
                uint4 v = load_shared16(of.codes + at + i * 64);
                codes[c][half][4 * i] = v.x, codes[c][half][4 * i + 1] = v.y, codes[c][half][4 * i + 2] = v.z,
                                   codes[c][half][4 * i + 3] = v.w;
            }
#pragma unroll
            for (int j = 0; j < SCALES; j++) scale[c][half][j] = load_scale(of.scales[j] + at, Scale());
        }
    float acc[N][2][4];
    auto add_scaled = [&](int c, int j) {
        float2 offset = make_float2(0, 0);
        if (Codes::OFFSET) offset = load_shared_float2(sums + (c * CONSUMER_WARPS * EACH + j) * of.sum_pitch);
#pragma unroll
        for (int i = 0; i < 4; i++) { // rows g, g, g + 8, g + 8
            float first = Codes::OFFSET ? fmaf(acc[c][0][i], FIRST, i % 2 ? offset.y : offset.x) : acc[c][0][i] * FIRST;
            float chain = fmaf(acc[c][1][i], SECOND, first);
            sum[i] = SCALES == 0 ? sum[i] + chain : fmaf(chain, scale[c][i / 2][j], sum[i]);
        }
    };
    // Chunk after chunk; or, where a chunk is two chains of four mmas, the chains of all chunks side by side. What is
    // added to sum has one order.
#pragma unroll
    for (int k = 0; k < 4 * N; k++) {
        const int c = SCALES == 4 ? k / 4 : k % N, j = SCALES == 4 ? k % 4 : k / N;
        const uint4 a = act.load(c, j);
        uint32_t upper[4], lower[4];
        Codes::widen(codes[c][0], j, upper);
        Codes::widen(codes[c][1], j, lower);
        if (SCALES == 4 || j == 0) {
            first_mma(acc[c][0], upper[0], lower[0], upper[2], lower[2], a.x, a.y);
            first_mma(acc[c][1], upper[1], lower[1], upper[3], lower[3], a.z, a.w);
        } else {
            mma_16x8x16<bf16>(acc[c][0], upper[0], lower[0], upper[2], lower[2], a.x, a.y);
            mma_16x8x16<bf16>(acc[c][1], upper[1], lower[1], upper[3], lower[3], a.z, a.w);
        }
        if (SCALES == 4) add_scaled(c, j);
    }
    if (SCALES < 4)
#pragma unroll
        for (int c = 0; c < N; c++) add_scaled(c, 0);
}

// The tiles of a product of quantised weights. An mma m16n8k16 takes the tile's 16 rows and up to 8 activation rows;
// lane 4g + t has weight rows g and g + 8 and activation row g. What a chunk is made of, for each of its 32 columns:
// two mmas, of a lane's columns 8t + 0, 1, 4, 5 and 8t + 2, 3, 6, 7, since activations have words 1 and 2 of every four
// exchanged (permuted_index). SCALES of a chunk that a row has: none, where there is one for the whole row; 1; or 4, of
// which the first two may be one and the last two another.
template <typename N, class Codes, int SCALES, typename Scale, bool HELD>
__device__ __forceinline__ void consume_packed_tiles(const FusedParams &s, const Product &f, const Block &block,
                                                     Ring &ring, Ring &partials_ring) {
    constexpr int TILE = N::TILE, WARPS = CONSUMER_WARPS, CODE_BYTES = PACK_COLUMNS * Codes::BITS / 8,
                  CHUNK_BYTES = PACK_CHUNK * Codes::BITS / 8, EACH = SCALES == 4 ? 4 : 1, HELD_SLICES = Codes::BITS / 4,
                  STEP = N::MAX_ROWS > 2 && SCALES == 4 ? 1 : 2; // chunks at once
    static_assert(TILE == 16 && MAX_ACT_ROWS == 8 && WARPS % PACK_CHUNKS == 0, "whole mmas; a warp's chunk of a block");
    const int lane = held(threadIdx.x % 32), warp = held_uniform(threadIdx.x / 32), g = lane / 4, t = lane % 4;
    const int act_rows = s.n_rows * N::TERMS, n_slices = f.n_slices, slice_chunks = f.slice / PACK_CHUNK,
              slices_per_sum = f.slices_per_sum,
              left_chunks = (f.cols + PACK_CHUNK - 1) / PACK_CHUNK - warp + WARPS - 1;
    const int sum_bytes = WARPS * act_rows * TILE * 4, partial_bytes = s.partial_floats * 4,
              stage_bytes = s.stage_bytes;
    // In place of activation rows that are not there a lane has others, or zeros: no one reads those sums.
    const int sum_rows = act_rows + act_rows % 2;
    const int chunk = warp % PACK_CHUNKS; // of a block
    const uint32_t row = block.stages + g * f.weight_pitch + warp / PACK_CHUNKS * f.block_bytes;
    PackedLane of;
    of.codes = row + chunk * CHUNK_BYTES + t * 16;
    of.lower = 8 * f.weight_pitch;
#pragma unroll
    for (int j = 0; j < SCALES; j++)
        of.scales[j] = row + CODE_BYTES + (chunk * PACK_CHUNK + j * 32 >> f.group_log2) * (int)sizeof(Scale);
    of.step_bytes = PACK_TEAMS * f.block_bytes;
    of.sum_pitch = sum_rows * 4;
    of.act = block.act + min(g, act_rows - 1) * f.act_pitch + t * 16 + warp * PACK_CHUNK * 2;
    of.has_act = g < act_rows;
    of.sums = shared_address(block.code_sums) + min(2 * t, sum_rows - 2) * 4 + warp * EACH * of.sum_pitch;
    const uint32_t partials = held(shared_address(block.partials) +
                                   ((warp * act_rows + 2 * t) * TILE + EpilogueLane<N>::partial_place(g)) * 4),
                   stage_tile = held_uniform(shared_address(block.stage_tile)),
                   partial_tile = held_uniform(shared_address(block.partial_tile)), full = held_uniform(ring.full),
                   partial_full = held_uniform(partials_ring.full);
    const bool has_first = 2 * t < act_rows, has_second = 2 * t + 1 < act_rows;
    int slot = ring.slot, parity = ring.parity, to = partials_ring.slot, to_parity = partials_ring.parity;
    if (Codes::OFFSET) sum_activations<N::MAX_ROWS, EACH, Codes::OFFSET>(f, block, act_rows);
    uint4 held_act[HELD_CHUNKS][4];
    if (HELD)
#pragma unroll
        for (int c = 0; c < HELD_CHUNKS; c++)
#pragma unroll
            for (int j = 0; j < 4; j++)
                held_act[c][j] = load_activations<N::MAX_ROWS>(
                    of.act + min(c, f.cols / (WARPS * PACK_CHUNK) - 1) * (WARPS * PACK_CHUNK * 2) + j * 64, of.has_act);
    for (;;) {
        int tile = 0, in_sum = 0;
        uint32_t sums_at = partials + to * partial_bytes;
        float sum[4] = {};
#pragma unroll
        for (int p = 0; p < (HELD ? HELD_SLICES : n_slices); p++) {
            if (HELD && p == n_slices) break;
            const int n = min(slice_chunks, left_chunks - p * slice_chunks) / WARPS;
            uint32_t stage = slot * stage_bytes, act = of.act + p * slice_chunks * PACK_CHUNK * 2,
                     sums = of.sums + p * slice_chunks * EACH * of.sum_pitch;
            const uint32_t full_at = full + 8 * slot;
            mbarrier_wait(full_at, parity);
            if (p == 0) tile = (int)load_shared4(stage_tile + 4 * slot);
            if (HELD) {
#pragma unroll
                for (int c = 0; c < HELD_CHUNKS / HELD_SLICES; c += STEP) {
                    const HeldActivations own = {held_act, p * (HELD_CHUNKS / HELD_SLICES) + c};
                    if (c + STEP <= n)
                        multiply_chunks<Codes, SCALES, Scale, STEP>(sum, of, stage, own, sums);
                    else if (STEP > 1 && c < n)
                        multiply_chunks<Codes, SCALES, Scale, 1>(sum, of, stage, own, sums);
                    stage += STEP * of.step_bytes;
                    sums += STEP * WARPS * EACH * of.sum_pitch;
                }
            } else {
                int c = 0;
#pragma unroll(1)
                for (; c + STEP <= n; c += STEP) {
                    multiply_chunks<Codes, SCALES, Scale, STEP>(sum, of, stage,
                                                                SharedActivations<N::MAX_ROWS>{act, of.has_act}, sums);
                    stage += STEP * of.step_bytes;
                    act += STEP * WARPS * PACK_CHUNK * 2;
                    sums += STEP * WARPS * EACH * of.sum_pitch;
                }
                if (STEP > 1 && c < n)
                    multiply_chunks<Codes, SCALES, Scale, 1>(sum, of, stage,
                                                             SharedActivations<N::MAX_ROWS>{act, of.has_act}, sums);
            }
            if (lane == 0)
                mbarrier_arrive_after(full_at + (ring.empty - ring.full), (sum[0] + sum[1]) + (sum[2] + sum[3]));
            if (++slot == ring.n) slot = 0, parity ^= 1;
            if (p == 0) {
                mbarrier_wait(partial_full + 8 * PARTIAL_BUFFERS + 8 * to, to_parity ^ 1);
                if (warp == 0 && lane == 0) store_shared(partial_tile + 4 * to, (uint32_t)tile);
                if (tile == END_OF_PRODUCT) break; // what was computed is of no tile
            }
            if (++in_sum < slices_per_sum && p + 1 < n_slices) continue;
            in_sum = 0;
            constexpr int LOWER = EpilogueLane<N>::partial_place(8); // row g + 8
            if (has_first)
                store_shared(sums_at, __float_as_uint(sum[0])),
                    store_shared(sums_at + 4 * LOWER, __float_as_uint(sum[2]));
            if (has_second)
                store_shared(sums_at + 4 * TILE, __float_as_uint(sum[1])),
                    store_shared(sums_at + 4 * (TILE + LOWER), __float_as_uint(sum[3]));
            sum[0] = sum[1] = sum[2] = sum[3] = 0;
            sums_at += sum_bytes;
        }
        __syncwarp();
        if (lane == 0) mbarrier_arrive(partial_full + 8 * to);
        if (++to == PARTIAL_BUFFERS) to = 0, to_parity ^= 1;
        if (tile == END_OF_PRODUCT) break;
    }
    ring.slot = slot, ring.parity = parity, partials_ring.slot = to, partials_ring.parity = to_parity;
    end_product(block, partials_ring);
}

// A kernel for this kind of weights alone has registers to hold activations, where all warps have as many chunks, and
// few.
template <typename N, class Codes, int SCALES, typename Scale>
__device__ __forceinline__ void consume_packed(const FusedParams &s, const Product &f, const Block &block, Ring &ring,
                                               Ring &partials_ring) {
    constexpr bool CAN_HOLD = N::KIND == KIND_CODES;
    if (CAN_HOLD && f.cols % (CONSUMER_WARPS * PACK_CHUNK) == 0 && f.cols <= HELD_COLUMNS)
        consume_packed_tiles<N, Codes, SCALES, Scale, CAN_HOLD>(s, f, block, ring, partials_ring);
    else
        consume_packed_tiles<N, Codes, SCALES, Scale, false>(s, f, block, ring, partials_ring);
}

template <typename N, class Codes, typename Scale>
__device__ __forceinline__ void consume_grouped_codes(const FusedParams &s, const Product &f, const Block &block,
                                                      Ring &ring, Ring &partials_ring) {
    if (1 << f.group_log2 == PACK_CHUNK)
        consume_packed<N, Codes, 1, Scale>(s, f, block, ring, partials_ring);
    else
        consume_packed<N, Codes, 4, Scale>(s, f, block, ring, partials_ring);
}
template <typename N, class Codes>
__device__ __forceinline__ void consume_codes(const FusedParams &s, const Product &f, const Block &block, Ring &ring,
                                              Ring &partials_ring) {
    if (f.scale_bytes == 0)
        consume_packed<N, Codes, 0, float>(s, f, block, ring, partials_ring);
    else if (f.scale_bytes == 2)
        consume_grouped_codes<N, Codes, bf16>(s, f, block, ring, partials_ring);
    else
        consume_grouped_codes<N, Codes, float>(s, f, block, ring, partials_ring);
}

// Columns from cols on to the end of their chunk are zero: so are the codes there, but a number that is left over may
// be none.
__device__ __forceinline__ void clear_last_chunk(const Product &f, int act_rows, char *to) {
    const int each = -f.cols % PACK_CHUNK + PACK_CHUNK;
    for (int i = threadIdx.x; i < act_rows * each; i += CONSUMER_THREADS)
        ((uint16_t *)(to + i / each * f.act_pitch))[f.cols + i % each] = 0;
}

template <typename N>
__device__ __forceinline__ void consume_packed_product(const FusedParams &s, const Product &f, const Block &block,
                                                       Ring &ring, Ring &partials_ring) {
    if (f.codes == CODES_FP8) // a scale for each row
        consume_packed<N, CodesFp8, 0, float>(s, f, block, ring, partials_ring);
    else if (f.codes == CODES_INT8)
        consume_codes<N, CodesInt8>(s, f, block, ring, partials_ring);
    else
        consume_codes<N, CodesInt4>(s, f, block, ring, partials_ring);
}
