// Products of quantised weights: the kernel. The protocol that it keeps: packed_product.h.
#pragma once

#include "codes.cuh"
#include "packed_product.h"

namespace {

template <class Codes> constexpr int PACKED_PANELS = PACKED_SLICE_BYTES * 8 / Codes::BITS / PACKED_PANEL; // of a slice
template <class Codes> constexpr int PACKED_SLICES = PACK_COLUMNS / PACKED_PANEL / PACKED_PANELS<Codes>;  // of a block

// What depends on N, the rows of activations of a tile: warpgroups, blocks of a cluster, blocks of an SM, stages of the
// ring of inputs, threads. (Boxes of 8 rows or more: a swizzle's period.)
template <int N_> struct PackedTile {
    static constexpr int N = N_, W = N == 256 ? 2 : 1, C = N == 16 || N == 256 ? 2 : 4, BLOCKS = N == 256 ? 1 : 2;
    static constexpr int INPUTS = N == 16 ? 16 : N == 32 ? 12 : N == 64 ? 6 : 4;
    static constexpr int ROWS = 64 * W, CONSUMERS = 128 * W;
    // Of 128 accumulators a thread there is room for if producers give their registers away, a warpgroup at a time.
    static constexpr bool MOVES_REGISTERS = N == 256;
    static constexpr int THREADS = CONSUMERS + (MOVES_REGISTERS ? 128 : 64);
    static constexpr int CODES_STAGE = ROWS * PACKED_SLICE_BYTES, INPUT_STAGE = N * PACKED_PANEL * 2;
    // Dynamic shared memory of a block, of 228 KB that an SM has; each block takes one more, and its barriers.
    static constexpr int SHARED = BLOCKS == 1 ? 226 << 10 : 112 << 10;
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
    for (int panel = 0; panel < n; panel++, ring.next()) {
        const uint32_t full = ring.full_barrier();
        mbarrier_wait(ring.empty_barrier(), ring.parity ^ 1);
        mbarrier_arrive_expect_tx(full, Tile::INPUT_STAGE);
        if constexpr (Tile::C == 1)
            copy_tensor_2d(ring.stage(), &p.input, panel * PACKED_PANEL, row, full);
        else
            copy_tensor_2d_to_blocks(ring.stage() + place.rank * PART * PACKED_PANEL * 2, &p.input,
                                     panel * PACKED_PANEL, row, full, (1 << Tile::C) - 1);
    }
}

// ---- consumers ------------------------------------------------------------------------------------------------------

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

// A pair of codes times a scale, rounded to float32 and to bf16. (Of two numbers of 8 bits the float32 product is exact.)
__device__ __forceinline__ uint32_t times_float(uint32_t pair, float scale) {
    float2 v = unpack2<bf16>(pair);
    return pack2<bf16>(__fmul_rn(v.x, scale), __fmul_rn(v.y, scale));
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

// The sums of a tile to out. A lane has rows g and g + 8, of every 8 tokens 2t and 2t + 1.
template <class Tile>
__device__ __forceinline__ void packed_store(const PackedParams &p, const PackedPlace &place,
                                             const float (&acc)[Tile::N / 2]) {
    constexpr int EACH = Tile::N / 8 < 4 ? Tile::N / 8 : 4; // groups of 8 tokens whose loads are under way at once
    const int lane = threadIdx.x % 32, row = place.row + threadIdx.x / 32 * 16 + lane / 4,
              first = place.token + lane % 4 * 2;
    float *out = p.out + (size_t)place.matrix * p.T * p.pitch + row;
    float scale[2] = {1, 1};
    bool there[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        there[i] = row + 8 * i < p.rows;
        if (p.row_scales && there[i]) scale[i] = __ldg(p.row_scales + row + 8 * i);
    }
#pragma unroll
    for (int j0 = 0; j0 < Tile::N / 8; j0 += EACH) {
        float before[EACH][4] = {};
        if (p.adds)
#pragma unroll
            for (int i = 0; i < 4 * EACH; i++) {
                const int token = first + (j0 + i / 4) * 8 + i % 2;
                if (there[i % 4 / 2] && token < p.T)
                    before[i / 4][i % 4] = __ldcg(out + (size_t)token * p.pitch + i % 4 / 2 * 8);
            }
#pragma unroll
        for (int i = 0; i < 4 * EACH; i++) {
            const int token = first + (j0 + i / 4) * 8 + i % 2;
            const float sum = acc[4 * j0 + i], by = scale[i % 4 / 2];
            if (there[i % 4 / 2] && token < p.T)
                out[(size_t)token * p.pitch + i % 4 / 2 * 8] =
                    p.adds ? __fmaf_rn(sum, by, before[i / 4][i % 4]) : __fmul_rn(sum, by);
        }
    }
}

template <class Codes, int SCALE_BYTES, class Tile>
__device__ __forceinline__ void packed_consume(const PackedParams &p, const PackedPlace &place, PackedRing codes,
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
    packed_store<Tile>(p, place, acc);
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
            mbarrier_init(codes.empty + 8 * i, 4 * Tile::W);
        }
        for (int i = 0; i < Tile::INPUTS; i++) {
            mbarrier_init(input.full + 8 * i, 1);
            mbarrier_init(input.empty + 8 * i, 4 * Tile::W * Tile::C);
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
        packed_consume<Codes, SCALE_BYTES, Tile>(p, place, codes, scales, input);
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
