// The K/V cache as the kernels see it, and where rows are: of the cache in memory, of a tile in shared memory.
#pragma once

#include "../cuda/ptx.cuh"

constexpr float LOG2E = 1.44269504088896340736f;

template <typename T> struct Cache {
    T *k, *v;         // [block][n_kv_heads][block_size][head_dim]
    const int *table; // [row][table_width], or NULL: row i is block i
    const int *rows;  // [n_seq]: the sequences' rows of it, or NULL: sequence i has row i
    int n_kv_heads, head_dim, block_size, table_width;
};

// The row of the block table that sequence seq has.
template <typename T> __device__ __forceinline__ int table_row(const Cache<T> &c, int seq) {
    return c.rows ? load_l2(c.rows + seq) : seq;
}

// Offset in elements of the K (and V) row of one position, of the sequence with that row of the block table. Rows of 16
// positions that start on a multiple of 16 lie one after another, in a paged cache as well: block_size is a multiple of
// 16 there.
template <typename T>
__device__ __forceinline__ size_t cache_row(const Cache<T> &c, int table_row, int kv_head, int pos) {
    int block = table_row;
    if (c.table) {
        block = load_l2(c.table + (size_t)table_row * c.table_width + pos / c.block_size);
        pos %= c.block_size;
    }
    return (((size_t)block * c.n_kv_heads + kv_head) * c.block_size + pos) * c.head_dim;
}

// Byte offset of the 16-byte chunk `chunk` of row `row` in a tile of rows of D elements in shared memory. 16-bit tiles
// permute the chunks so that ldmatrix, which reads one chunk of eight rows, meets eight different bank groups.
template <typename T, int D> __device__ __forceinline__ uint32_t tile_offset(int row, int chunk) {
    if constexpr (sizeof(T) == 2) chunk ^= D == 96 ? (row >> 1) & 3 : row & 7;
    return (uint32_t)(row * D * (int)sizeof(T) + chunk * 16);
}
