// Products of quantised weights: the kernel. The protocol that it keeps: packed_product.h.
#pragma once

#include "codes.cuh"
#include "packed_product.h"

namespace {

template <class Codes> constexpr int PACKED_PANELS = PACKED_SLICE_BYTES * 8 / Codes::BITS / PACKED_PANEL; // of a slice
template <class Codes> constexpr int PACKED_SLICES = PACK_COLUMNS / PACKED_PANEL / PACKED_PANELS<Codes>;  // of a block

// ---- tiles ----------------------------------------------------------------------------------------------------------
// Rows of weights and of activations, who multiplies, and what a block takes: blocks of a cluster and of an SM, warps
// that multiply, threads, dynamic shared memory. (Boxes of 8 rows of activations or more: a swizzle's period.)

template <int ROWS_, int N_, int C_, int CONSUMERS_> struct PackedTile {
    static constexpr int ROWS = ROWS_, N = N_, C = C_, CONSUMERS = CONSUMERS_;
    static constexpr int CODES_STAGE = ROWS * PACKED_SLICE_BYTES, PANEL = N * PACKED_PANEL * 2;
    static_assert(N / C >= 8 && N % C == 0, "boxes");
};
// By mma.sync: each warp has M times 16 of the rows, and all of the activations. A stage has a slice of codes and the
// activations of as many columns.
template <int ROWS, int N, int M_> struct PackedWarps : PackedTile<ROWS, N, N == 16 ? 2 : 4, 2 * ROWS / M_> {
    static constexpr bool BY_WARP = true, MOVES_REGISTERS = false;
    static constexpr int M = M_, BLOCKS = 2, THREADS = 2 * ROWS / M + 64;
    // Of 228 KB that an SM has; each block takes one more, and its barriers.
    static constexpr int SHARED = 112 << 10;
    template <class Codes> static constexpr int PANELS = PACKED_PANELS<Codes>;
};
// By wgmma: each warpgroup has 64 of the rows. Codes and activations have stages of their own,
// of a slice and of a panel.
template <int ROWS, int N, int INPUTS_> struct PackedWarpgroups : PackedTile<ROWS, N, 2, 2 * ROWS> {
    // Of 128 accumulators a thread there is room for if producers give their registers away, a warpgroup at a time.
    static constexpr bool BY_WARP = false, MOVES_REGISTERS = true;
    static constexpr int INPUTS = INPUTS_, BLOCKS = 1, THREADS = 2 * ROWS + 128;
    static constexpr int SHARED = 226 << 10;
    template <class Codes> static constexpr int PANELS = 1;
    static_assert(INPUTS <= PACKED_MAX_STAGES, "barriers");
};
template <class Codes, class Tile> constexpr int PACKED_INPUT_STAGE = Tile::template PANELS<Codes> * Tile::PANEL;

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

template <class Codes, class Tile>
__device__ __forceinline__ void packed_produce_input(const PackedParams &p, const PackedPlace &place, PackedRing ring) {
    constexpr int PART = Tile::N / Tile::C, PANELS = Tile::template PANELS<Codes>;
    const int n = 2 * packed_pairs(p), row = place.token + place.rank * PART;
    for (int first = 0; first < n; first += PANELS, ring.next()) {
        const uint32_t full = ring.full_barrier(), to = ring.stage() + place.rank * PART * PACKED_PANEL * 2;
        mbarrier_wait(ring.empty_barrier(), ring.parity ^ 1);
        mbarrier_arrive_expect_tx(full, PANELS * Tile::PANEL);
#pragma unroll
        for (int i = 0; i < PANELS; i++)
            copy_tensor_2d_to_blocks(to + i * Tile::PANEL, &p.input, (first + i) * PACKED_PANEL, row, full,
                                     (1 << Tile::C) - 1);
    }
}

// ---- consumers ------------------------------------------------------------------------------------------------------

// A pair of codes times a scale, rounded to float32 and to bf16.
// (Of two numbers of 8 bits the float32 product is exact.)
__device__ __forceinline__ uint32_t times_float(uint32_t pair, float scale) {
    float2 v = unpack2<bf16>(pair);
    return pack2<bf16>(__fmul_rn(v.x, scale), __fmul_rn(v.y, scale));
}

// Of 16 rows of weights and N of activations the sums, times a power of two, to out. A lane has two rows, 8 apart, of
// the matrix from `row` on, and of every 8 tokens two, `apart` from each other, from `token` on.
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

// The row of 8 that lane group g has, of weights and of activations: in the order 0, 2, 4, 6, 1, 3, 5, 7, so that loads
// of 8 bytes by 16 lanes, which take two neighbouring 16 bytes of four rows, find them in different banks.
__device__ __forceinline__ int packed_line(int g) {
    return g % 4 * 2 + g / 4;
}

// Where a lane's part is: of codes in a stage, for even and odd steps in the first row's first chunk; of the first
// row's scales in their buffer, and what their addresses are xored with; of activations in a panel,
// for each of its four steps.
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

// What a lane has of a panel's codes: of M times 16 rows, in its row and the one 8 further on, for each step of 16
// columns the word with its 4 columns.
template <int M> struct PackedQuads {
    uint32_t words[M][2][4];
};
template <class Codes, int M>
__device__ __forceinline__ void load_quads(PackedQuads<M> &quads, const PackedQuadLane &own, uint32_t stage,
                                           int panel) {
#pragma unroll
    for (int u = 0; u < 2; u++) {
        const uint32_t at = stage + (own.codes[u] ^ (Codes::BITS == 4 ? panel / 2 * 64 : panel * 64));
#pragma unroll
        for (int i = 0; i < 2 * M; i++) {
            uint32_t(&words)[4] = quads.words[i / 2][i % 2];
            const uint32_t in_row = at + i * 8 * PACKED_SLICE_BYTES;
            if constexpr (Codes::BITS == 4) {
                const uint2 v = load_shared8(in_row + panel % 2 * 8);
                words[u] = v.x, words[2 + u] = v.y;
            } else {
                words[u] = load_shared4(in_row);
                words[2 + u] = load_shared4(in_row + 8);
            }
        }
    }
}

// A slice's scales of a lane's rows, as they are in memory: of two bytes all, or of groups of 64 and 128 columns those
// in the 8 bytes around; of four bytes those of one panel, which are loaded for each.
template <class Codes, PackedScales SCALES, int M> struct PackedQuadScales {
    static constexpr int WORDS = SCALES == SCALES_BF16_OF_32 && Codes::BITS == 4 ? 4 : 2;
    uint32_t words[2 * M][WORDS];
};
template <class Codes, PackedScales SCALES, int M>
__device__ __forceinline__ void load_quad_scales(PackedQuadScales<Codes, SCALES, M> &scales, const PackedParams &p,
                                                 const PackedQuadLane &own, uint32_t buffer, int column) {
    const int group = column >> p.group_log2, bytes = SCALES == SCALES_BF16 ? (group & ~3) * 2 : group * 2;
    const uint32_t at = buffer + ((own.scales + bytes) ^ own.scales_swizzle);
#pragma unroll
    for (int i = 0; i < 2 * M; i++) {
        uint32_t(&words)[scales.WORDS] = scales.words[i];
        if constexpr (scales.WORDS == 4) {
            const uint4 v = load_shared16(at + i * 8 * p.scale_pitch);
            words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
        } else {
            const uint2 v = load_shared8(at + i * 8 * p.scale_pitch);
            words[0] = v.x, words[1] = v.y;
        }
    }
}
// by[row][32 columns]: of a panel of a slice, two bytes in both halves of a word.
template <class Codes, PackedScales SCALES, int M>
__device__ __forceinline__ void panel_scales(uint32_t (&by)[2 * M][2], const PackedQuadScales<Codes, SCALES, M> &scales,
                                             const PackedParams &p, const PackedQuadLane &own, uint32_t buffer,
                                             int column, int panel) {
    const int first = column >> p.group_log2, next = (panel * PACKED_PANEL) >> p.group_log2;
#pragma unroll
    for (int i = 0; i < 2 * M; i++) {
        if constexpr (SCALES == SCALES_BF16)
            by[i][0] = by[i][1] =
                __byte_perm(scales.words[i][0], scales.words[i][1], 0x1010 + 0x2222 * ((first & 3) + next));
        if constexpr (SCALES == SCALES_BF16_OF_32)
            by[i][0] = __byte_perm(scales.words[i][panel], 0, 0x1010),
            by[i][1] = __byte_perm(scales.words[i][panel], 0, 0x3232);
        if constexpr (SCALES == SCALES_FLOAT32)
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const int group = (column + panel * PACKED_PANEL + j * 32) >> p.group_log2;
                by[i][j] =
                    load_shared4(buffer + ((own.scales + group * 4) ^ own.scales_swizzle) + i * 8 * p.scale_pitch);
            }
    }
}

// w: what mma takes of a lane of step s of a panel, times 1 / QUAD_FACTOR.
template <class Codes, PackedScales SCALES, int M>
__device__ __forceinline__ void widen_quads(uint32_t (&w)[M][4], const PackedQuads<M> &quads,
                                            const uint32_t (&by)[2 * M][2], int s, int shift) {
#pragma unroll
    for (int i = 0; i < 2 * M; i++) {
        uint32_t word = quads.words[i / 2][i % 2][s], scale = by[i][s / 2];
        if constexpr (Codes::BITS == 4) word >>= shift;
        uint32_t quad[2];
        Codes::quad(word, quad[0], quad[1]);
#pragma unroll
        for (int j = 0; j < 2; j++)
            w[i / 2][2 * j + i % 2] = SCALES == SCALES_OF_ROWS   ? quad[j]
                                      : SCALES == SCALES_FLOAT32 ? times_float(quad[j], __uint_as_float(scale))
                                                                 : multiply2(quad[j], scale);
    }
}

// Everything is loaded, and codes are widened, before what is in front of it is multiplied: words a panel ahead,
// activations a group of up to 32 tokens, widened codes a step.
template <class Codes, PackedScales SCALES, class Tile>
__device__ __forceinline__ void packed_consume_by_warp(const PackedParams &p, const PackedPlace &place,
                                                       PackedRing codes, uint32_t scales, uint32_t inputs) {
    constexpr int M = Tile::M, N = Tile::N, B = N / 8 < 4 ? N / 8 : 4, GROUPS = N / 8 / B;
    constexpr int PANELS = PACKED_PANELS<Codes>, STEPS = 4 * PANELS, LAST = STEPS * GROUPS - 1;
    constexpr bool GROUPED = SCALES == SCALES_BF16 || SCALES == SCALES_BF16_OF_32;
    const int lane = threadIdx.x % 32, scales_stage = Tile::ROWS * p.scale_pitch,
              slices = (packed_pairs(p) + PANELS / 2 - 1) / (PANELS / 2);
    const PackedQuadLane own = packed_quad_lane<Codes, Tile>(p);
    const uint32_t emptied = address_in_block(codes.empty, lane % Tile::C);
    uint32_t buffer = scales, input = inputs;
    const uint32_t buffers_end = scales + p.n_scales * scales_stage;
    float acc[M][N / 2] = {};
    PackedQuads<M> quads[2];
    PackedQuadScales<Codes, SCALES, M> raw;
    uint32_t by[2 * M][2], w[2][M][4];
    uint2 in[2][B];
    // Group `at` of activations in a stage: of step at / GROUPS, 8 B tokens.
    auto load_in = [&](uint2(&to)[B], uint32_t stage, int at) {
        const int step = at / GROUPS;
        const uint32_t from = stage + own.input[step % 4] + step / 4 * Tile::PANEL;
#pragma unroll
        for (int i = 0; i < B; i++) to[i] = load_shared8(from + (at % GROUPS * B + i) * 8 * PACKED_PANEL * 2);
    };
    codes.wait_full();
    if constexpr (GROUPED) load_quad_scales<Codes, SCALES, M>(raw, p, own, buffer, 0);
    load_quads<Codes, M>(quads[0], own, codes.stage(), 0);
    load_in(in[0], input, 0);
    panel_scales<Codes, SCALES, M>(by, raw, p, own, buffer, 0, 0);
    widen_quads<Codes, SCALES, M>(w[0], quads[0], by, 0, own.shift);
    int column = 0;
    for (int slice = 0; slice < slices; slice++) {
        const uint32_t stage = codes.stage(), in_stage = input, released = emptied + 8 * codes.slot;
        // Of the last slice the next one is itself, loaded once more and not used.
        if (slice + 1 < slices) codes.next();
        input = inputs + codes.slot * PACKED_INPUT_STAGE<Codes, Tile>;
        const int next_column = (column + PANELS * PACKED_PANEL) % PACK_COLUMNS;
#pragma unroll
        for (int q = 0; q < STEPS; q++) {
            if (q == STEPS - 4) {
                codes.wait_full();
                if (next_column == 0) buffer = buffer + scales_stage == buffers_end ? scales : buffer + scales_stage;
                column = next_column;
                if constexpr (GROUPED) load_quad_scales<Codes, SCALES, M>(raw, p, own, buffer, column);
                load_quads<Codes, M>(quads[0], own, codes.stage(), 0);
            } else if (q % 4 == 0)
                load_quads<Codes, M>(quads[(q / 4 + 1) % 2], own, stage, q / 4 + 1);
            const int next = q + 1;
            if (next % 4 == 0) panel_scales<Codes, SCALES, M>(by, raw, p, own, buffer, column, next / 4 % PANELS);
            widen_quads<Codes, SCALES, M>(w[next % 2], quads[next / 4 % 2], by, next % 4, own.shift);
#pragma unroll
            for (int group = 0; group < GROUPS; group++) {
                const int at = q * GROUPS + group;
                if (at < LAST)
                    load_in(in[(at + 1) % 2], in_stage, at + 1);
                else
                    load_in(in[0], input, 0);
#pragma unroll
                for (int i = 0; i < B; i++)
#pragma unroll
                    for (int m = 0; m < M; m++)
                        mma_16x8x16<bf16>(&acc[m][4 * (group * B + i)], w[q % 2][m], in[at % 2][i].x, in[at % 2][i].y);
            }
        }
        uint32_t all = 0; // loads of this stage have come
#pragma unroll
        for (int i = 0; i < B; i++) all |= in[LAST % 2][i].x;
        if (lane < Tile::C) mbarrier_arrive_read_after(released, all);
    }
    __syncwarp();
    wait_for_previous_kernel();
    const int t = lane % 4;
#pragma unroll
    for (int m = 0; m < M; m++)
        packed_store<N>(p, place.matrix, place.row + (threadIdx.x / 32 * M + m) * 16 + packed_line(lane / 4),
                        place.token + packed_line(2 * t), 2, Codes::QUAD_FACTOR, acc[m]);
}

// ---- consumers by wgmma ---------------------------------------------------------------------------------------------

// What a lane has of a panel's codes, of rows g and g + 8: the word of each run of each 32 columns that has its pair;
// and their scales.
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

// Loads panel `half` of a pair of panels (a chunk): `chunk` is its number in the slice, `column` the panel's first one
// in its block of 1024.
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

template <class Codes, PackedScales SCALES, class Tile>
__device__ __forceinline__ void packed_consume_by_warpgroup(const PackedParams &p, const PackedPlace &place,
                                                            PackedRing codes, uint32_t scales, PackedRing input) {
    constexpr int PER_SLICE = PACKED_PANELS<Codes> / 2; // pairs of panels
    constexpr int SCALE_BYTES = SCALES == SCALES_OF_ROWS ? 0 : SCALES == SCALES_FLOAT32 ? 4 : 2;
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
    packed_store<Tile::N>(p, place.matrix, place.row + threadIdx.x / 32 * 16 + lane / 4, place.token + lane % 4 * 2, 1,
                          1, acc);
}

// Computes: out (+)= in · wᵀ, times the rows' scales.
// Reads:    packed matrices, activations bf16; shapes in PackedParams.
// Writes:   out float32.
// Grid:     (tiles of all matrices, rounded up to C, × token_tiles) × Tile::THREADS; a block owns a tile.
// Requires: cols % 8 = 0; at least two stages in each ring.
template <class Codes, PackedScales SCALES, class Tile>
__global__ void __cluster_dims__(Tile::C, 1, 1) __launch_bounds__(Tile::THREADS, Tile::BLOCKS)
    packed_product_kernel(const __grid_constant__ PackedParams p) {
    extern __shared__ __align__(1024) char dynamic[];
    __shared__ uint64_t barriers[4 * PACKED_MAX_STAGES];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint32_t first = shared_address(barriers), base = (shared_address(dynamic) + 1023) & ~1023u,
                   inputs = base + p.n_codes * Tile::CODES_STAGE,
                   scales = inputs + p.n_inputs * PACKED_INPUT_STAGE<Codes, Tile>;
    const uint32_t input_first = Tile::BY_WARP ? first : first + 16 * PACKED_MAX_STAGES; // one barrier for both, or two
    const PackedRing codes = {first, first + 8 * PACKED_MAX_STAGES, base, p.n_codes, Tile::CODES_STAGE},
                     input = {input_first, input_first + 8 * PACKED_MAX_STAGES, inputs, p.n_inputs,
                              PACKED_INPUT_STAGE<Codes, Tile>};
    const PackedPlace place = packed_place_of<Tile>(p);
    if (threadIdx.x == 0) {
        for (int i = 0; i < p.n_inputs; i++) {
            mbarrier_init(input.full + 8 * i, Tile::BY_WARP ? 2 : 1);
            mbarrier_init(input.empty + 8 * i, Tile::CONSUMERS / 32 * Tile::C);
        }
        if constexpr (!Tile::BY_WARP)
            for (int i = 0; i < p.n_codes; i++) {
                mbarrier_init(codes.full + 8 * i, 1);
                mbarrier_init(codes.empty + 8 * i, Tile::CONSUMERS / 32);
            }
        fence_mbarrier_init();
    }
    __syncthreads();
    let_next_kernel_start(); // it waits for all of this one
    cluster_arrive();
    if (threadIdx.x >= Tile::CONSUMERS) {
        if constexpr (Tile::MOVES_REGISTERS) decrease_registers<40>();
        if (warp == Tile::CONSUMERS / 32) { // waits for nobody: its barriers are this block's
            if (lane == 0) packed_produce_codes<Codes, Tile>(p, place, codes, scales);
            __syncwarp();
        }
        cluster_wait();
        if (warp == Tile::CONSUMERS / 32 + 1) {
            wait_for_previous_kernel();
            fence_proxy_async_global();
            if (lane == 0) packed_produce_input<Codes, Tile>(p, place, input);
            __syncwarp();
        }
    } else {
        if constexpr (Tile::MOVES_REGISTERS) increase_registers<232>();
        cluster_wait();
        if constexpr (Tile::BY_WARP)
            packed_consume_by_warp<Codes, SCALES, Tile>(p, place, codes, scales, inputs);
        else
            packed_consume_by_warpgroup<Codes, SCALES, Tile>(p, place, codes, scales, input);
    }
    // Others may still send to this block's shared memory, or arrive at its barriers.
    __syncwarp();
    {
        cluster_arrive_release();
        cluster_wait();
    }
}

#else

// In code for other GPUs, without launch bounds: packed_product.cu knows it by that, and never launches it.
template <class Codes, PackedScales SCALES, class Tile>
__global__ void packed_product_kernel(const __grid_constant__ PackedParams p) {
}

#endif

} // namespace
