// Products of quantised weights: the kernel. The protocol that it keeps: packed_product.h.
#pragma once

#include "codes.cuh"
#include "packed_product.h"

namespace {

template <class Codes> constexpr int PACKED_PANELS = PACKED_SLICE_BYTES * 8 / Codes::BITS / PACKED_PANEL; // of a slice
template <class Codes> constexpr int PACKED_SLICES = PACK_COLUMNS / PACKED_PANEL / PACKED_PANELS<Codes>;  // of a block

// ---- tiles ----------------------------------------------------------------------------------------------------------
// Rows of weights and of activations, who multiplies, and what a block takes: blocks of a cluster, blocks of an SM, panels
// of a stage of the ring of inputs and its stages, warps that multiply, threads. (Boxes of 8 rows of activations or more: a
// swizzle's period.)

template <int ROWS_, int N_, int CONSUMERS_> struct PackedTile {
    static constexpr int ROWS = ROWS_, N = N_, CONSUMERS = CONSUMERS_;
    static constexpr int CODES_STAGE = ROWS * PACKED_SLICE_BYTES, PANEL = N * PACKED_PANEL * 2;
};
// By mma.sync: each warp has M times 16 of the rows, and all of the activations.
template <int ROWS, int N, int M_, int INPUTS_> struct PackedWarps : PackedTile<ROWS, N, 2 * ROWS / M_> {
    typedef PackedTile<ROWS, N, 2 * ROWS / M_> Base;
    static constexpr bool BY_WARP = true, MOVES_REGISTERS = false;
    static constexpr int M = M_, C = N == 16 ? 2 : 4, BLOCKS = 2, PANELS = 2, INPUTS = INPUTS_;
    static constexpr int THREADS = Base::CONSUMERS + 64, INPUT_STAGE = PANELS * Base::PANEL;
    // Dynamic shared memory of a block, of 228 KB that an SM has; each block takes one more, and its barriers.
    static constexpr int SHARED = 112 << 10;
    static_assert(N / C >= 8 && N % C == 0 && INPUTS <= PACKED_MAX_STAGES, "boxes and barriers");
};
// By wgmma: each warpgroup has 64 of the rows.
template <int ROWS, int N, int INPUTS_> struct PackedWarpgroups : PackedTile<ROWS, N, 2 * ROWS> {
    typedef PackedTile<ROWS, N, 2 * ROWS> Base;
    // Of 128 accumulators a thread there is room for if producers give their registers away, a warpgroup at a time.
    static constexpr bool BY_WARP = false, MOVES_REGISTERS = true;
    static constexpr int C = 2, BLOCKS = 1, PANELS = 1, INPUTS = INPUTS_;
    static constexpr int THREADS = Base::CONSUMERS + 128, INPUT_STAGE = PANELS * Base::PANEL;
    static constexpr int SHARED = 226 << 10;
    static_assert(N / C >= 8 && N % C == 0 && INPUTS <= PACKED_MAX_STAGES, "boxes and barriers");
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDA_ARCH__)

// A ring of stages, and how far along a warp is. Parity is that of `full`; a fresh `empty` counts as complete.
struct PackedRing {
    uint32_t full, empty, stages; // addresses of the barriers [n] and of the stages
    int n, stage_bytes;
    int slot = 0, parity = 0;
    __device__ __forceinline__ void next() {
        if (++slot == n) slot = 0, parity ^= 1;
    }
    __device__ __forceinline__ uint32_t full_barrier() const {
        return full + 8 * slot;
    }
    __device__ __forceinline__ uint32_t empty_barrier() const {
        return empty + 8 * slot;
    }
    __device__ __forceinline__ bool is_full() const {
        return mbarrier_is_complete(full_barrier(), parity);
    }
    __device__ __forceinline__ void wait_full() const {
        mbarrier_wait(full_barrier(), parity);
    }
    __device__ __forceinline__ uint32_t stage() const {
        return stages + slot * stage_bytes;
    }
};

// A block's tile: of which matrix, its first row there (which may be none of the matrix's) and its first token.
struct PackedPlace {
    int matrix, row, token, rank;
};
// Clusters that have the same weights are neighbours.
template <class Tile> __device__ __forceinline__ PackedPlace packed_place_of(const PackedParams &p) {
    const int cluster = blockIdx.x / Tile::C, rank = Tile::C > 1 ? rank_in_cluster() : 0,
              tile = cluster / p.token_tiles * Tile::C + rank, matrix = min(tile / p.tiles, p.matrices - 1);
    return {matrix, (tile - matrix * p.tiles) * Tile::ROWS, cluster % p.token_tiles * Tile::N, rank};
}

// Panels are taken by two, so that there are as many of codes as of activations: 128 columns, a chunk.
__device__ __forceinline__ int packed_pairs(const PackedParams &p) {
    return (p.cols + PACK_CHUNK - 1) / PACK_CHUNK;
}

// ---- producers ------------------------------------------------------------------------------------------------------

template <class Codes, class Tile>
__device__ __forceinline__ void packed_produce_codes(const PackedParams &p, const PackedPlace &place, PackedRing ring,
                                                     uint32_t scales) {
    constexpr int SLICES = PACKED_SLICES<Codes>, PER_SLICE = PACKED_PANELS<Codes> / 2;
    const uint64_t policy = l2_evict_first();
    const bool once = p.token_tiles == 1; // no other block has these rows
    const int n = (packed_pairs(p) + PER_SLICE - 1) / PER_SLICE, scales_stage = Tile::ROWS * p.scale_pitch;
    const CUtensorMap *codes_map = &p.codes[place.matrix], *scales_map = &p.scales[place.matrix];
    for (int q = 0, scales_slot = 0; q < n; q++, ring.next()) {
        const int x = q / SLICES * p.block_bytes;
        const bool first = q % SLICES == 0 && p.scale_pitch > 0;
        mbarrier_wait(ring.empty_barrier(), ring.parity ^ 1);
        mbarrier_arrive_expect_tx(ring.full_barrier(), Tile::CODES_STAGE + (first ? scales_stage : 0));
        if (once)
            copy_tensor_2d(ring.stage(), codes_map, x + q % SLICES * PACKED_SLICE_BYTES, place.row, ring.full_barrier(),
                           policy);
        else
            copy_tensor_2d(ring.stage(), codes_map, x + q % SLICES * PACKED_SLICE_BYTES, place.row,
                           ring.full_barrier());
        if (!first) continue;
        copy_tensor_2d(scales + scales_slot * scales_stage, scales_map, x + p.code_bytes, place.row,
                       ring.full_barrier());
        if (++scales_slot == p.n_scales) scales_slot = 0;
    }
}

template <class Tile>
__device__ __forceinline__ void packed_produce_input(const PackedParams &p, const PackedPlace &place, PackedRing ring) {
    constexpr int PART = Tile::N / Tile::C; // rows
    const int n = 2 * packed_pairs(p), row = place.token + place.rank * PART;
    for (int first = 0; first < n; first += Tile::PANELS, ring.next()) {
        const uint32_t full = ring.full_barrier(), to = ring.stage() + place.rank * PART * PACKED_PANEL * 2;
        mbarrier_wait(ring.empty_barrier(), ring.parity ^ 1);
        mbarrier_arrive_expect_tx(full, Tile::INPUT_STAGE);
#pragma unroll
        for (int i = 0; i < Tile::PANELS; i++)
            copy_tensor_2d_to_blocks(to + i * Tile::PANEL, &p.input, (first + i) * PACKED_PANEL, row, full,
                                     (1 << Tile::C) - 1);
    }
}

// ---- consumers ------------------------------------------------------------------------------------------------------

// A pair of codes times a scale, rounded to float32 and to bf16. (Of two numbers of 8 bits the float32 product is exact.)
__device__ __forceinline__ uint32_t times_float(uint32_t pair, float scale) {
    float2 v = unpack2<bf16>(pair);
    return pack2<bf16>(__fmul_rn(v.x, scale), __fmul_rn(v.y, scale));
}

// Of 16 rows of weights and N of activations the sums, times a power of two, to out. A lane has two rows, 8 apart, of the
// matrix from `row` on, and of every 8 tokens two, `apart` from each other, from `token` on.
template <int N>
__device__ __forceinline__ void packed_store(const PackedParams &p, int matrix, int row, int token, int apart,
                                             float factor, const float (&acc)[N / 2]) {
    constexpr int EACH = N / 8 < 4 ? N / 8 : 4; // groups of 8 tokens whose loads are under way at once
    float *out = p.out + (size_t)matrix * p.T * p.pitch + row;
    float scale[2] = {1, 1};
    bool there[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        there[i] = row + 8 * i < p.rows;
        if (p.row_scales && there[i]) scale[i] = __ldg(p.row_scales + row + 8 * i);
    }
#pragma unroll
    for (int j0 = 0; j0 < N / 8; j0 += EACH) {
        float before[EACH][4] = {};
        if (p.adds)
#pragma unroll
            for (int i = 0; i < 4 * EACH; i++) {
                const int at = token + (j0 + i / 4) * 8 + i % 2 * apart;
                if (there[i % 4 / 2] && at < p.T)
                    before[i / 4][i % 4] = __ldcg(out + (size_t)at * p.pitch + i % 4 / 2 * 8);
            }
#pragma unroll
        for (int i = 0; i < 4 * EACH; i++) {
            const int at = token + (j0 + i / 4) * 8 + i % 2 * apart;
            const float sum = acc[4 * j0 + i] * factor, by = scale[i % 4 / 2];
            if (there[i % 4 / 2] && at < p.T)
                out[(size_t)at * p.pitch + i % 4 / 2 * 8] =
                    p.adds ? __fmaf_rn(sum, by, before[i / 4][i % 4]) : __fmul_rn(sum, by);
        }
    }
}

// ---- consumers by mma.sync ------------------------------------------------------------------------------------------

// The row of 8 that lane group g has, of weights and of activations: in the order 0, 2, 4, 6, 1, 3, 5, 7, so that loads of 8
// bytes by 16 lanes, which take two neighbouring 16 bytes of four rows, find them in different banks.
__device__ __forceinline__ int packed_line(int g) {
    return g % 4 * 2 + g / 4;
}

// What a lane has of a panel's codes: for each of its four steps the word with its 4 columns; and their scales.
template <int M> struct PackedQuads {
    uint32_t words[M][2][4], scales[M][2][2]; // [16 rows][row, the one 8 further on][step]; [32 columns]
};
// Where it is in a stage: for even and odd steps in the first row's first chunk; scales as in PackedLane; in a panel of
// activations, for each of the four steps.
struct PackedQuadLane {
    uint32_t codes[2], scales, scales_swizzle, input[4];
    int shift;
};
template <class Codes, class Tile> __device__ __forceinline__ PackedQuadLane packed_quad_lane(const PackedParams &p) {
    const int lane = threadIdx.x % 32, t = lane % 4, line = packed_line(lane / 4),
              row = threadIdx.x / 32 * 16 * Tile::M + line;
    PackedQuadLane own;
#pragma unroll
    for (int u = 0; u < 2; u++)
        own.codes[u] = row * PACKED_SLICE_BYTES + (((2 * u + t / 2) ^ line) << 4) + Codes::RUN_WORDS / 2 * (t % 2 * 4);
#pragma unroll
    for (int s = 0; s < 4; s++) own.input[s] = line * PACKED_PANEL * 2 + (((2 * s + t / 2) ^ line) << 4) + t % 2 * 8;
    own.scales = row * p.scale_pitch;
    own.scales_swizzle = p.scale_pitch == 0 ? 0 : (own.scales >> 7 & (p.scale_pitch / 16 - 1)) << 4;
    own.shift = Codes::quad_shift(t);
    // So that the compiler keeps what it could compute anew for every panel.
#pragma unroll
    for (int s = 0; s < 4; s++) asm("" : "+r"(own.input[s]));
    asm("" : "+r"(own.codes[0]), "+r"(own.codes[1]), "+r"(own.scales), "+r"(own.scales_swizzle), "+r"(own.shift));
    return own;
}

// Loads panel `half` of a chunk: `chunk` is its number in the slice, `column` the panel's first one in its block of 1024.
template <class Codes, int SCALE_BYTES, int M>
__device__ __forceinline__ void load_quads(PackedQuads<M> &panel, const PackedParams &p, const PackedQuadLane &own,
                                           uint32_t stage, int chunk, int half, uint32_t scales, int column) {
    if constexpr (SCALE_BYTES > 0) {
#pragma unroll
        for (int j = 0; j < 2; j++) {
            if (j == 1 && p.group_log2 > 5) { // a panel has one group
#pragma unroll
                for (int i = 0; i < 2 * M; i++) panel.scales[i / 2][i % 2][1] = panel.scales[i / 2][i % 2][0];
                continue;
            }
            const uint32_t in_row = ((column + j * 32) >> p.group_log2) * SCALE_BYTES,
                           at = scales + ((own.scales + in_row) ^ own.scales_swizzle);
#pragma unroll
            for (int i = 0; i < 2 * M; i++)
                panel.scales[i / 2][i % 2][j] = load_shared_2_or_4(at + i * 8 * p.scale_pitch, SCALE_BYTES == 2);
        }
    }
#pragma unroll
    for (int u = 0; u < 2; u++) {
        const uint32_t at = stage + (own.codes[u] ^ (Codes::BITS == 4 ? chunk * 64 : half * 64));
#pragma unroll
        for (int i = 0; i < 2 * M; i++) {
            uint32_t(&words)[4] = panel.words[i / 2][i % 2];
            const uint32_t in_row = at + i * 8 * PACKED_SLICE_BYTES;
            if constexpr (Codes::BITS == 4) {
                const uint2 v = load_shared8(in_row + half * 8);
                words[u] = v.x, words[2 + u] = v.y;
            } else {
                words[u] = load_shared4(in_row);
                words[2 + u] = load_shared4(in_row + 8);
            }
        }
    }
}

// Scales as weights are multiplied by them: times QUAD_FACTOR, of two bytes in both halves of a word.
template <class Codes, int SCALE_BYTES, int M> __device__ __forceinline__ void prepare_scales(PackedQuads<M> &panel) {
#pragma unroll
    for (int i = 0; i < 4 * M; i++) {
        uint32_t &scale = panel.scales[i / 4][i / 2 % 2][i % 2];
        if constexpr (SCALE_BYTES == 2) scale = multiply2(__byte_perm(scale, 0, 0x1010), 0x42804280u); // 64
        if constexpr (SCALE_BYTES == 4) scale = __float_as_uint(__uint_as_float(scale) * Codes::QUAD_FACTOR);
    }
}

// w: what mma takes of a lane of 16 rows and step s of a panel; without scales times 1 / QUAD_FACTOR.
template <class Codes, int SCALE_BYTES, int M>
__device__ __forceinline__ void widen_quads(uint32_t (&w)[4], const PackedQuads<M> &panel, int m, int s, int shift) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        uint32_t word = panel.words[m][i][s], scale = panel.scales[m][i][s / 2];
        if constexpr (Codes::BITS == 4) word >>= shift;
        Codes::quad(word, w[i], w[2 + i]);
#pragma unroll
        for (int j = i; j < 4; j += 2) {
            if constexpr (SCALE_BYTES == 2) w[j] = multiply2(w[j], scale);
            if constexpr (SCALE_BYTES == 4) w[j] = times_float(w[j], __uint_as_float(scale));
        }
    }
}

template <class Codes, int SCALE_BYTES, class Tile>
__device__ __forceinline__ void packed_consume_by_warp(const PackedParams &p, const PackedPlace &place, PackedRing codes,
                                                       uint32_t scales, PackedRing input) {
    constexpr int PER_SLICE = PACKED_PANELS<Codes> / 2; // chunks
    constexpr int M = Tile::M, N = Tile::N, B = N / 8 < 4 ? N / 8 : 4, GROUPS = N / 8 / B, LAST = 8 * GROUPS - 1;
    const int lane = threadIdx.x % 32, chunks = packed_pairs(p), scales_stage = Tile::ROWS * p.scale_pitch;
    const PackedQuadLane own = packed_quad_lane<Codes, Tile>(p);
    const uint32_t emptied = address_in_block(input.empty, lane % Tile::C);
    int scales_slot = 0;
    float acc[M][N / 2] = {};
    PackedQuads<M> panels[2];
    uint2 in[2][B];
    // Group `at` of activations in a chunk: of step at / GROUPS, 8 B tokens.
    auto load_in = [&](uint2(&to)[B], uint32_t stage, int at) {
        const int step = at / GROUPS;
        const uint32_t from = stage + step / 4 * Tile::PANEL + own.input[step % 4];
#pragma unroll
        for (int i = 0; i < B; i++) to[i] = load_shared8(from + (at % GROUPS * B + i) * 8 * PACKED_PANEL * 2);
    };
    codes.wait_full();
    load_quads<Codes, SCALE_BYTES>(panels[0], p, own, codes.stage(), 0, 0, scales, 0);
    input.wait_full();
    load_in(in[0], input.stage(), 0);
    for (int chunk = 0; chunk < chunks; chunk++) {
        const bool more = chunk + 1 < chunks, slice_ends = (chunk + 1) % PER_SLICE == 0;
        const int column = chunk * PACK_CHUNK % PACK_COLUMNS;
        const uint32_t stage = input.stage(), released = emptied + 8 * input.slot;
        PackedRing next_codes = codes;
        if (slice_ends) next_codes.next();
        input.next();
        // Asked before, so that the answer is not waited for.
        const bool codes_full = !more || !slice_ends || __all_sync(~0u, next_codes.is_full());
        const bool input_full = !more || __all_sync(~0u, input.is_full());
#pragma unroll
        for (int half = 0; half < 2; half++) {
            prepare_scales<Codes, SCALE_BYTES>(panels[half]);
            // The next panel's codes.
            if (half == 0)
                load_quads<Codes, SCALE_BYTES>(panels[1], p, own, codes.stage(), chunk % PER_SLICE, 1,
                                               scales + scales_slot * scales_stage, column + PACKED_PANEL);
            else {
                if (slice_ends) {
                    uint32_t all = 0; // loads of this slice have come
#pragma unroll
                    for (int i = 0; i < 8 * M; i++) all |= panels[1].words[i / 8][i / 4 % 2][i % 4];
                    if (lane == 0) mbarrier_arrive_after(codes.empty_barrier(), __uint_as_float(all));
                    __syncwarp();
                }
                codes = next_codes;
                if (more) {
                    if (!codes_full) codes.wait_full();
                    if (column + PACK_CHUNK == PACK_COLUMNS && ++scales_slot == p.n_scales) scales_slot = 0;
                    load_quads<Codes, SCALE_BYTES>(panels[0], p, own, codes.stage(), (chunk + 1) % PER_SLICE, 0,
                                                   scales + scales_slot * scales_stage,
                                                   (column + PACK_CHUNK) % PACK_COLUMNS);
                }
            }
#pragma unroll
            for (int s = 0; s < 4; s++) {
                uint32_t w[M][4];
#pragma unroll
                for (int m = 0; m < M; m++) widen_quads<Codes, SCALE_BYTES>(w[m], panels[half], m, s, own.shift);
#pragma unroll
                for (int group = 0; group < GROUPS; group++) {
                    const int at = (half * 4 + s) * GROUPS + group;
                    if (at < LAST)
                        load_in(in[(at + 1) % 2], stage, at + 1);
                    else if (more) {
                        if (!input_full) input.wait_full();
                        load_in(in[0], input.stage(), 0);
                    }
#pragma unroll
                    for (int i = 0; i < B; i++)
#pragma unroll
                        for (int m = 0; m < M; m++)
                            mma_16x8x16<bf16>(&acc[m][4 * (group * B + i)], w[m], in[at % 2][i].x, in[at % 2][i].y);
                }
            }
        }
        uint32_t all = 0; // loads of this stage have come
#pragma unroll
        for (int i = 0; i < B; i++) all |= in[LAST % 2][i].x;
        if (lane < Tile::C) mbarrier_arrive_read_after(released, all);
        __syncwarp();
    }
    wait_for_previous_kernel();
    const int t = lane % 4;
#pragma unroll
    for (int m = 0; m < M; m++)
        packed_store<N>(p, place.matrix, place.row + (threadIdx.x / 32 * M + m) * 16 + packed_line(lane / 4),
                        place.token + packed_line(2 * t), 2, SCALE_BYTES > 0 ? 1 : Codes::QUAD_FACTOR, acc[m]);
}

// ---- consumers by wgmma ---------------------------------------------------------------------------------------------

// What a lane has of a panel's codes, of rows g and g + 8: the word of each run of each 32 columns that has its pair; and
// their scales.
struct PackedPanel {
    uint32_t words[2][4][2], scales[2][2]; // [row][run][32 columns], [row][32 columns]
};

// Where a lane's words are in a stage: in runs 0 to 3 of the first row's first chunk.
struct PackedLane {
    uint32_t runs[4];
    uint32_t scales, scales_swizzle; // of the first row's scales in their buffer; what their addresses are xored with
    int t;
};
template <class Codes> __device__ __forceinline__ PackedLane packed_lane(const PackedParams &p) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, row = threadIdx.x / 32 * 16 + g;
    PackedLane own;
#pragma unroll
    for (int r = 0; r < 4; r++) own.runs[r] = row * PACKED_SLICE_BYTES + ((r ^ g) << 4) + Codes::RUN_WORDS * t / 4 * 4;
    own.scales = row * p.scale_pitch;
    own.scales_swizzle = p.scale_pitch == 0 ? 0 : (own.scales >> 7 & (p.scale_pitch / 16 - 1)) << 4;
    own.t = t;
    // So that the compiler keeps what it could compute anew for every panel.
#pragma unroll
    for (int r = 0; r < 4; r++) asm("" : "+r"(own.runs[r]));
    asm("" : "+r"(own.scales), "+r"(own.scales_swizzle));
    return own;
}

// Loads panel `half` of a pair of panels (a chunk): `chunk` is its number in the slice, `column` the panel's first one in
// its block of 1024.
template <class Codes, int SCALE_BYTES>
__device__ __forceinline__ void load_panel(PackedPanel &panel, const PackedParams &p, const PackedLane &own,
                                           uint32_t stage, int chunk, int half, uint32_t scales, int column) {
    constexpr int ROWS_8 = 8 * PACKED_SLICE_BYTES;
#pragma unroll
    for (int r = 0; r < 4; r++) {
        if constexpr (Codes::BITS == 4) {
            const uint32_t at = stage + (own.runs[r] ^ (chunk * 64)) + half * 8;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                uint2 v = load_shared8(at + i * ROWS_8);
                panel.words[i][r][0] = v.x, panel.words[i][r][1] = v.y;
            }
        } else {
            const uint32_t at = stage + (own.runs[r] ^ (half * 64));
#pragma unroll
            for (int i = 0; i < 2; i++)
#pragma unroll
                for (int j = 0; j < 2; j++) panel.words[i][r][j] = load_shared4(at + i * ROWS_8 + j * 8);
        }
    }
    if constexpr (SCALE_BYTES > 0) {
#pragma unroll
        for (int j = 0; j < 2; j++) {
            if (j == 1 && p.group_log2 > 5) { // a panel has one group
                panel.scales[0][1] = panel.scales[0][0], panel.scales[1][1] = panel.scales[1][0];
                continue;
            }
            const uint32_t in_row = ((column + j * 32) >> p.group_log2) * SCALE_BYTES,
                           at = scales + ((own.scales + in_row) ^ own.scales_swizzle);
#pragma unroll
            for (int i = 0; i < 2; i++)
                panel.scales[i][j] = load_shared_2_or_4(at + i * 8 * p.scale_pitch, SCALE_BYTES == 2);
        }
    }
}

// w: of each of the panel's four steps of 16 columns, what wgmma takes of a lane.
template <class Codes, int SCALE_BYTES>
__device__ __forceinline__ void widen_panel(uint32_t (&w)[4][4], const PackedPanel &panel, int t) {
#pragma unroll
    for (int s = 0; s < 4; s++)
#pragma unroll
        for (int r = 0; r < 2; r++)
#pragma unroll
            for (int i = 0; i < 2; i++) w[s][2 * r + i] = Codes::pair(panel.words[i][s % 2 * 2 + r][s / 2], t);
    if constexpr (SCALE_BYTES == 2) {
        uint32_t both[2][2];
#pragma unroll
        for (int i = 0; i < 4; i++) both[i / 2][i % 2] = __byte_perm(panel.scales[i / 2][i % 2], 0, 0x1010);
#pragma unroll
        for (int i = 0; i < 16; i++) w[i / 4][i % 4] = multiply2(w[i / 4][i % 4], both[i % 2][i / 8]);
    }
    if constexpr (SCALE_BYTES == 4)
#pragma unroll
        for (int i = 0; i < 16; i++)
            w[i / 4][i % 4] = times_float(w[i / 4][i % 4], __uint_as_float(panel.scales[i % 2][i / 8]));
}

template <class Codes, int SCALE_BYTES, class Tile>
__device__ __forceinline__ void packed_consume_by_warpgroup(const PackedParams &p, const PackedPlace &place, PackedRing codes,
                                               uint32_t scales, PackedRing input) {
    constexpr int PER_SLICE = PACKED_PANELS<Codes> / 2; // pairs of panels
    const int lane = threadIdx.x % 32, pairs = packed_pairs(p), scales_stage = Tile::ROWS * p.scale_pitch;
    const PackedLane own = packed_lane<Codes>(p);
    const uint32_t emptied = address_in_block(input.empty, Tile::C > 1 ? lane % Tile::C : 0);
    uint32_t before = 0; // the `empty` barrier of the panel before
    int scales_slot = 0;
    float acc[Tile::N / 2] = {};
    uint32_t w[2][4][4];
    PackedPanel panel;
    codes.wait_full();
    load_panel<Codes, SCALE_BYTES>(panel, p, own, codes.stage(), 0, 0, scales, 0);
    for (int pair = 0; pair < pairs; pair++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const bool full = input.is_full(); // asked before, so that the answer is not waited for
            widen_panel<Codes, SCALE_BYTES>(w[half], panel, own.t);
            if (!full) input.wait_full();
            const uint64_t in = wgmma_operand(input.stage(), 1024);
            wgmma_fence();
#pragma unroll
            for (int s = 0; s < 4; s++) wgmma_rows<Tile::N>(acc, w[half][s], in + 2 * s);
            wgmma_commit();
            // The next panel's codes, on their way while wgmma works.
            if (half == 0)
                load_panel<Codes, SCALE_BYTES>(panel, p, own, codes.stage(), pair % PER_SLICE, 1,
                                               scales + scales_slot * scales_stage,
                                               pair * PACK_CHUNK % PACK_COLUMNS + PACKED_PANEL);
            else if (pair + 1 < pairs) {
                if ((pair + 1) % PER_SLICE == 0) {
                    if (lane == 0) mbarrier_arrive(codes.empty_barrier());
                    codes.next();
                    codes.wait_full();
                }
                if ((pair + 1) * PACK_CHUNK % PACK_COLUMNS == 0 && ++scales_slot == p.n_scales) scales_slot = 0;
                load_panel<Codes, SCALE_BYTES>(panel, p, own, codes.stage(), (pair + 1) % PER_SLICE, 0,
                                               scales + scales_slot * scales_stage,
                                               (pair + 1) * PACK_CHUNK % PACK_COLUMNS);
            }
            wgmma_wait<1>(); // so the panel before is complete
            if (pair + half > 0 && lane < Tile::C) mbarrier_arrive_read(before);
            before = emptied + 8 * input.slot;
            input.next();
        }
    }
    wgmma_wait<0>();
    wgmma_pin(acc);
    wait_for_previous_kernel();
    packed_store<Tile::N>(p, place.matrix, place.row + threadIdx.x / 32 * 16 + lane / 4, place.token + lane % 4 * 2, 1, 1,
                          acc);
}

// Computes: out (+)= in · wᵀ, times the rows' scales.
// Reads:    packed matrices, activations bf16; shapes in PackedParams.
// Writes:   out float32.
// Grid:     (tiles of all matrices, rounded up to C, × token_tiles) × Tile::THREADS; a block owns a tile.
// Requires: cols % 8 = 0; at least two stages in each ring.
template <class Codes, int SCALE_BYTES, class Tile>
__global__ void __cluster_dims__(Tile::C, 1, 1) __launch_bounds__(Tile::THREADS, Tile::BLOCKS)
    packed_product_kernel(const __grid_constant__ PackedParams p) {
    extern __shared__ __align__(1024) char dynamic[];
    __shared__ uint64_t barriers[4 * PACKED_MAX_STAGES];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint32_t first = shared_address(barriers), base = (shared_address(dynamic) + 1023) & ~1023u,
                   inputs = base + p.n_codes * Tile::CODES_STAGE, scales = inputs + Tile::INPUTS * Tile::INPUT_STAGE;
    const PackedRing codes = {first, first + 8 * PACKED_MAX_STAGES, base, p.n_codes, Tile::CODES_STAGE},
                     input = {first + 16 * PACKED_MAX_STAGES, first + 24 * PACKED_MAX_STAGES, inputs, Tile::INPUTS,
                              Tile::INPUT_STAGE};
    const PackedPlace place = packed_place_of<Tile>(p);
    if (threadIdx.x == 0) {
        for (int i = 0; i < p.n_codes; i++) {
            mbarrier_init(codes.full + 8 * i, 1);
            mbarrier_init(codes.empty + 8 * i, Tile::CONSUMERS / 32);
        }
        for (int i = 0; i < Tile::INPUTS; i++) {
            mbarrier_init(input.full + 8 * i, 1);
            mbarrier_init(input.empty + 8 * i, Tile::CONSUMERS / 32 * Tile::C);
        }
        fence_mbarrier_init();
    }
    __syncthreads();
    let_next_kernel_start(); // it waits for all of this one
    if constexpr (Tile::C > 1) cluster_arrive();
    if (threadIdx.x >= Tile::CONSUMERS) {
        if constexpr (Tile::MOVES_REGISTERS) decrease_registers<40>();
        if (warp == Tile::CONSUMERS / 32) { // waits for nobody: its barriers are this block's
            if (lane == 0) packed_produce_codes<Codes, Tile>(p, place, codes, scales);
            __syncwarp();
        }
        if constexpr (Tile::C > 1) cluster_wait();
        if (warp == Tile::CONSUMERS / 32 + 1) {
            wait_for_previous_kernel();
            fence_proxy_async_global();
            if (lane == 0) packed_produce_input<Tile>(p, place, input);
            __syncwarp();
        }
    } else {
        if constexpr (Tile::MOVES_REGISTERS) increase_registers<232>();
        if constexpr (Tile::C > 1) cluster_wait();
        if constexpr (Tile::BY_WARP)
            packed_consume_by_warp<Codes, SCALE_BYTES, Tile>(p, place, codes, scales, input);
        else
            packed_consume_by_warpgroup<Codes, SCALE_BYTES, Tile>(p, place, codes, scales, input);
    }
    // Others may still send to this block's shared memory, or arrive at its barriers.
    __syncwarp();
    if constexpr (Tile::C > 1) {
        cluster_arrive_release();
        cluster_wait();
    }
}

#else

// In code for other GPUs, without launch bounds: packed_product.cu knows it by that, and never launches it.
template <class Codes, int SCALE_BYTES, class Tile>
__global__ void packed_product_kernel(const __grid_constant__ PackedParams p) {
}

#endif

} // namespace
