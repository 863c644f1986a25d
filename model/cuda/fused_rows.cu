#include "fused_rows.h"

#include "gemm.h"
#include "ops.h"
#include "prompt_product.h"
#include "widen.h"

template <typename T> struct RopeRows {
    const float *x;     // [rows][n_q + 2 n_kv][head_dim]: queries, keys, values
    const float2 *rope; // [rows][head_dim/2]: cosine and sine
    T *out;             // [n_q + 2 n_kv][rows][head_dim]
    int rows, n_q, n_kv, head_dim;
    // Where keys and values go; NULL: to out.
    T *k, *v;               // [page][n_kv][KV_PAGE][head_dim]
    const int *pos, *slots; // [rows]: where each row is in the cache
    const int *table;       // [slot][table_width]: the pages of each slot
    int table_width;
};

// Two pairs, by their cosines and sines.
__device__ static float4 rotate(float4 x, float4 by) {
    const float2 a = rotated(make_float2(x.x, x.y), make_float2(by.x, by.y)),
                 b = rotated(make_float2(x.z, x.w), make_float2(by.z, by.w));
    return make_float4(a.x, a.y, b.x, b.y);
}

// Computes: queries and keys rotated, and values, all rounded to T. RoPE's pairs are neighbours (upload.cu).
// Reads:    x and rope; for the cache pos, slots and table.
// Writes:   out, or out, k and v.
// Grid:     rows × (enough × 256 threads); a thread owns eight elements of a row, as they are in x.
// Requires: head_dim % 8 = 0; the table has the pages of all pos.
template <typename T> __global__ void rope_rows_kernel(const __grid_constant__ RopeRows<T> p) {
    const int heads = p.n_q + 2 * p.n_kv, in_head = p.head_dim / 8, blocks = gridDim.x / p.rows;
    const int row = blockIdx.x / blocks, i = blockIdx.x % blocks * blockDim.x + threadIdx.x;
    const int head = i / in_head, dim = 8 * (i % in_head);
    wait_for_previous_kernel();
    let_next_kernel_start(); // attention, in a step
    if (head >= heads) return;
    const float4 *from = (const float4 *)(p.x + ((size_t)row * heads + head) * p.head_dim + dim);
    const float4 *rope = (const float4 *)(p.rope + ((size_t)row * p.head_dim + dim) / 2);
    float4 lo = from[0], hi = from[1];
    if (head < p.n_q + p.n_kv) {
        lo = rotate(lo, rope[0]);
        hi = rotate(hi, rope[1]);
    }
    T *to = p.out + ((size_t)head * p.rows + row) * p.head_dim;
    if (p.k && head >= p.n_q) {
        const bool is_key = head < p.n_q + p.n_kv;
        const int pos = p.pos[row], kv_head = head - (is_key ? p.n_q : p.n_q + p.n_kv);
        const size_t page = p.table[(size_t)p.slots[row] * p.table_width + pos / KV_PAGE];
        to = (is_key ? p.k : p.v) + ((page * p.n_kv + kv_head) * KV_PAGE + pos % KV_PAGE) * p.head_dim;
    }
    store8(to + dim, lo, hi);
}

// Whether prompt_product.h takes a product, of what is widened, too.
static bool takes_prompt(const CudaState *s, PromptKind kind, const Matrix *w, int T) {
    return (w->dtype == s->type || (matrix_is_quantised(w) && !stays_packed(s, w, T))) && prompt_takes(s, kind, w, T);
}

// prompt_qkv of all rows of w, slab by slab if it is widened.
static bool qkv_by_prompt(CudaState *s, PromptParams p, const Matrix *w, int T, Error *err) {
    if (w->dtype == s->type) return prompt_qkv(s, &p, w, s->xb, T, err);
    const float *scales = scales_after_product(s, w);
    const int slab = widen_rows(s, w, SLAB_ROWS, s->element);
    for (p.first_row = 0; p.first_row < w->rows; p.first_row += slab) {
        const Matrix rows = matrix_rows(w, p.first_row, min(slab, w->rows - p.first_row));
        Matrix wide;
        p.scale[0] = scales ? scales + p.first_row : NULL;
        if (!widen(s, &wide, &rows, err) || !prompt_qkv(s, &p, &wide, s->xb, T, err) || !widen_end(s, err))
            return false;
    }
    return true;
}

// prompt_swiglu of all rows of gate and up: of what is widened a slab has some of each.
static bool swiglu_by_prompt(CudaState *s, const Matrix *gate, const Matrix *up, int T, Error *err) {
    const int n = gate->rows;
    if (gate->dtype == s->type) return prompt_swiglu(s, s->h, n, gate, up, NULL, NULL, s->xb, T, err);
    const float *gate_scale = scales_after_product(s, gate), *up_scale = scales_after_product(s, up);
    const int slab = widen_rows(s, gate, SLAB_ROWS / 2, 2 * s->element);
    for (int first = 0; first < n; first += slab) {
        const int rows = min(slab, n - first);
        const Matrix both[2] = {matrix_rows(gate, first, rows), matrix_rows(up, first, rows)};
        Matrix wide[2];
        if (!widen_both(s, wide, both, err) ||
            !prompt_swiglu(s, (uint16_t *)s->h + first, n, &wide[0], &wide[1], gate_scale ? gate_scale + first : NULL,
                           up_scale ? up_scale + first : NULL, s->xb, T, err) ||
            !widen_end(s, err))
            return false;
    }
    return true;
}

bool feed_forward_fused(CudaState *s, const LayerWeights *l, int T, Error *err) {
    if (takes_prompt(s, PROMPT_SWIGLU, &l->w1, T)) return swiglu_by_prompt(s, &l->w1, &l->w3, T, err);
    return matmul_gate_up(s, l, T, err) && swiglu(s, l, T, err);
}

bool project_qkv_fused(Model *m, const Matrix *first, int T, int n_q, int n_kv, int layer, Error *err) {
    const Config *c = &m->config;
    CudaState *s = (CudaState *)m->state;
    const int heads = n_q + 2 * n_kv;
    const bool codes = s->fp8 && layer >= 0;
    const size_t at = (size_t)(layer < 0 ? 0 : layer) * own_layer_elements(m) * s->element;
    const Matrix w = matrix_rows(first, 0, heads * c->head_dim);
    if (!codes && takes_prompt(s, PROMPT_QKV, &w, T)) {
        PromptParams p = {};
        p.rope = s->rope_table;
        p.out = s->qkv_in;
        p.n_q = n_q;
        p.n_kv = n_kv;
        p.head_dim = c->head_dim;
        if (layer >= 0) {
            p.k = (char *)m->kv.k + at;
            p.v = (char *)m->kv.v + at;
            p.pos = s->pos;
            p.slots = s->row_slots;
            p.table = s->block_table;
            p.table_width = m->kv.table_width;
        }
        return qkv_by_prompt(s, p, &w, T, err);
    }
    if (!matmul_heads_by_row(s, c, s->qkv, first, T, heads, codes, err)) return false;
    CUDA_TRY(with_type(s->type, [&](auto type) {
        typedef decltype(type) N;
        RopeRows<N> p = {};
        p.x = s->qkv;
        p.rope = s->rope_table;
        p.out = (N *)s->qkv_in;
        p.rows = T;
        p.n_q = n_q;
        p.n_kv = n_kv;
        p.head_dim = c->head_dim;
        if (layer >= 0) {
            p.k = (N *)((char *)m->kv.k + at);
            p.v = (N *)((char *)m->kv.v + at);
            p.pos = s->pos;
            p.slots = s->row_slots;
            p.table = s->block_table;
            p.table_width = m->kv.table_width;
        }
        const int blocks = (heads * c->head_dim / 8 + 255) / 256; // of a row
        return launch_kernel(rope_rows_kernel<N>, (unsigned)(T * blocks), 256, 0, s->pdl, s->stream, p);
    }));
    return true;
}
