// Engine fused: its launches. What they launch: fused_kernel.cuh, by the protocol in fused.h.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fused.h"
#include "fused_kernel.cuh"

namespace {

// Bytes of so many rows of terms in shared memory.
size_t activation_bytes(int cols, int term_rows) { return (size_t)term_rows * ((cols + 63) / 64 * 128); }

// A stage holds a tile of the model's dim, if that is not too long: most rows are.
int largest_piece(const Config *c) {
    int piece = (c->dim + 511) / 512 * 512;
    return piece < MAX_PIECE ? piece : MAX_PIECE;
}

} // namespace

struct FusedState {
    int n_blocks, max_rows, terms;   // rows: of one pass over the weights
    size_t shared_limit;
    void *h;                         // 16-bit [MAX_TERM_ROWS][hidden_dim]
    float *carry;                    // [MAX_TERM_ROWS][dim]
    unsigned *done;                  // [n_layers + 1][MAX_PHASES], and as many counters of claimed tiles behind them
    int2 *best;                      // [MAX_TERM_ROWS][n_blocks]
};

// What a segment of n rows keeps in shared memory: activations, partial sums, and a ring in the rest. Short rows come two
// groups in a tile, where that leaves room for a ring. Activations of down that are too long come in sections. False: it
// does not fit.
static bool segment_layout(const Model *m, const FusedState *f, int n, Segment *s, bool *sections) {
    const Config *c = &m->config;
    int rows = n * f->terms, largest = largest_piece(c), widest = c->dim > c->q_dim ? c->dim : c->q_dim;
    int n_sections = (c->hidden_dim + largest - 1) / largest;
    for (int whole = 1; whole >= 0; whole--)
        for (int groups = whole && largest * MAX_GROUPS <= MAX_PIECE ? MAX_GROUPS : 1; groups > 0; groups--) {
            int hidden = whole || c->hidden_dim < largest ? c->hidden_dim : largest;
            size_t act = activation_bytes(hidden > widest ? hidden : widest, rows);
            s->tile = groups * GROUP;
            s->part_floats = (whole ? n_sections : 1) * CONSUMERS * rows * s->tile;
            s->parts_offset = (int)act;
            s->turns_offset = s->parts_offset + PARTS * s->part_floats * (int)sizeof(float);
            s->residuals_offset = s->turns_offset + n * c->head_dim * (int)sizeof(float);
            s->ring_offset = (s->residuals_offset + RESIDUALS * n * s->tile * (int)sizeof(float) + 127) / 128 * 128;
            s->stage_bytes = s->tile * 2 * largest;
            int stages = ((int)f->shared_limit - s->ring_offset) / s->stage_bytes;
            s->n_stages = stages < MAX_STAGES ? stages : MAX_STAGES;
            s->window = (WINDOW_BYTES + s->stage_bytes - 1) / s->stage_bytes;
            if (s->window > s->n_stages) s->window = s->n_stages;
            s->window_ahead = (s->window + 1) / 2;
            *sections = !whole;
            if (s->n_stages >= (whole ? 4 : 2)) return whole || n_sections <= MAX_PHASES - 3;
        }
    return false;
}

static void add_phase(Segment *s, int n_blocks, int largest, PhaseKind kind, const void *weights, const void *up, const float *norm,
                      int rows, int cols) {
    Phase *f = &s->phase[s->n_phases++];
    f->kind = kind;
    f->rows = rows;
    f->cols = f->stride = cols;
    f->weights = (const char *)weights;
    f->up = (const char *)up;
    f->norm = norm;
    f->n_pieces = (cols + largest - 1) / largest;
    f->piece = cols < largest ? (cols + 511) / 512 * 512 : largest;
    f->weight_pitch = 2 * (f->n_pieces > 1 ? f->piece : cols);
    f->section = kind == PHASE_DOWN ? 1 : f->n_pieces;
    f->pitch = (int)activation_bytes(cols, 1);
    if (s->n_phases > 1) f->first_block = (f[-1].first_block + (f[-1].rows + s->tile - 1) / s->tile) % n_blocks;
}

// Makes the last phase, down, several, a section each.
static void split_phase(Segment *s) {
    Phase whole = s->phase[--s->n_phases];
    for (int first = 0; first < whole.cols; first += whole.section * whole.piece) {
        Phase *f = &s->phase[s->n_phases++];
        *f = whole;
        f->column = first;
        f->cols = whole.cols - first < whole.section * whole.piece ? whole.cols - first : whole.section * whole.piece;
        f->n_pieces = (f->cols + f->piece - 1) / f->piece;
        f->weight_pitch = 2 * f->piece;
        f->pitch = (int)activation_bytes(f->cols, 1);
        f->carry_in = first > 0;
        f->carry_out = first + f->cols < whole.cols;
    }
}

// Of a step, in FusedState.done.
static int n_counters(const Model *m) { return 2 * (m->config.n_layers + 1) * MAX_PHASES; }

// A step of n rows from row `first` on, in segments as laid out.
template <typename N> static bool step_of(Model *m, const Segment &layout, bool sections, int first, int n, Error *err) {
    const Config *c = &m->config;
    const Weights *w = &m->weights;
    CudaState *s = (CudaState *)m->state;
    FusedState *f = s->fused;
    bool verbose = first_launch(m, &s->logged_decode);
    int largest = largest_piece(c);
    CUDA_TRY(launch_kernel(decode_begin_kernel<typename N::W>, n, 256, 0, false, s->stream, s->x,
                           (const typename N::W *)w->tok_embeddings.data, (const int *)s->step->tokens + first, c->dim, s->rope_table,
                           (const int *)s->step->lens + first, (const float *)s->rope_freq, c->head_dim / 2));
    for (int i = 0; i <= c->n_layers; i++) {
        const LayerWeights *l = &w->layers[i], *before = l - 1;
        Segment g = layout;
        if (i > 0) {
            AttentionArgs a = attention_args(m, s, n, n, i - 1);
            a.seq_lens_device = s->step->lens + first;
            a.block_table = s->step->slots + first;
            a.verbose = verbose && i == 1; // every layer is launched alike
            if (attention_decode(&a, s->stream) != 0) return fail(err, "%s", attention_error());
            add_phase(&g, f->n_blocks, largest, PHASE_OUT, before->wo.data, NULL, NULL, c->dim, c->q_dim);
            add_phase(&g, f->n_blocks, largest, PHASE_GATE_UP, before->w1.data, before->w3.data, before->ffn_norm, 2 * c->hidden_dim, c->dim);
            add_phase(&g, f->n_blocks, largest, PHASE_DOWN, before->w2.data, NULL, NULL, c->dim, c->hidden_dim);
            if (sections) split_phase(&g);
        }
        if (i < c->n_layers) add_phase(&g, f->n_blocks, largest, PHASE_QKV, l->wq.data, NULL, l->attention_norm, c->q_dim + 2 * c->kv_dim, c->dim);
        else add_phase(&g, f->n_blocks, largest, PHASE_HEAD, w->output.data, NULL, w->norm, c->vocab_size, c->dim);
        g.n_rows = n;
        g.n_heads = c->n_heads;
        g.n_kv_heads = c->n_kv_heads;
        g.head_dim = c->head_dim;
        g.head_dim_inverse = 0xffffffffu / (unsigned)c->head_dim + 1;
        g.dim = c->dim;
        g.hidden_dim = c->hidden_dim;
        g.q_dim = c->q_dim;
        g.vocab_size = c->vocab_size;
        g.eps = c->norm_eps;
        g.x = s->x;
        g.qkv = s->qkv_in;
        g.att = s->att;
        g.h = f->h;
        g.carry = f->carry;
        g.phases = s->rope_table;
        g.logits = s->logits + (size_t)first * c->vocab_size;
        g.best = f->best;
        g.done = f->done + i * MAX_PHASES;
        g.claimed = (int *)f->done + (c->n_layers + 1 + i) * MAX_PHASES;
        size_t shared = g.ring_offset + (size_t)g.n_stages * g.stage_bytes;
        if (verbose && i <= 1)
            fprintf(stderr, "decode: decode_segment_kernel %d products, %d rows, tiles of %d, grid %d, block %d, shared %zu: a ring of %d x %d bytes, %d in flight\n",
                    g.n_phases, n, g.tile, f->n_blocks, THREADS, shared, g.n_stages, g.stage_bytes, g.window);
        CUDA_TRY(launch_kernel(decode_segment_kernel<N>, f->n_blocks, THREADS, shared, true, s->stream, g));
    }
    CUDA_TRY(launch_kernel(decode_end_kernel, 1, 32 * MAX_TERM_ROWS, 0, true, s->stream, (const int2 *)f->best, f->n_blocks, c->vocab_size,
                           s->argmax + first, s->argmax_host + first, s->step, first, n, f->done, n_counters(m)));
    return true;
}

// Calls body with the Numbers that the model's weights and precision ask for, and tiles of so many rows.
template <typename W, int TERMS, class Body> static bool with_tile(int tile, Body body) {
    return tile == GROUP ? body(Numbers<W, TERMS, 1>()) : body(Numbers<W, TERMS, MAX_GROUPS>());
}
template <class Body> static bool for_numbers(const Model *m, int tile, Body body) {
    bool f32 = m->precision == PRECISION_F32;
    if (m->weights.layers[0].wq.dtype == DTYPE_BF16) return f32 ? with_tile<bf16, 3>(tile, body) : with_tile<bf16, 1>(tile, body);
    return f32 ? with_tile<f16, 3>(tile, body) : with_tile<f16, 1>(tile, body);
}

// A step of n rows: in passes of max_rows, each of which reads all weights once; more than one pass of bf16 is cublas's.
static bool enqueue_step_fused(Model *m, int n, Error *err) {
    CudaState *s = (CudaState *)m->state;
    FusedState *f = s->fused;
    if (n > f->max_rows && (f->terms == 1 || n > 8)) return enqueue_step_cublas(m, n, err);
    for (int first = 0; first < n; first += f->max_rows) {
        int rows = n - first < f->max_rows ? n - first : f->max_rows;
        Segment g;
        bool sections;
        memset(&g, 0, sizeof g);
        if (!segment_layout(m, f, rows, &g, &sections)) return fail(err, "%d rows do not fit in %zu bytes of shared memory", rows, f->shared_limit);
        if (for_numbers(m, g.tile, [&](auto numbers) { return step_of<decltype(numbers)>(m, g, sections, first, rows, err); })) continue;
        cudaMemsetAsync(f->done, 0, n_counters(m) * sizeof *f->done, s->stream); // what was launched is not followed by the step's end
        return false;
    }
    return true;
}

// What the device gives, and how many rows of this model one pass takes: 0 if it has no room for one.
static bool size_fused(const Model *m, FusedState *f, Error *err) {
    int device = 0, limit = 0;
    CUDA_TRY(cudaGetDevice(&device));
    CUDA_TRY(cudaDeviceGetAttribute(&f->n_blocks, cudaDevAttrMultiProcessorCount, device));
    CUDA_TRY(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    f->terms = m->precision == PRECISION_F32 ? 3 : 1;
    f->shared_limit = (size_t)limit - 1024; // the kernel's own barriers
    Segment g;
    bool sections;
    memset(&g, 0, sizeof g);
    for (f->max_rows = MAX_TERM_ROWS / f->terms; f->max_rows > 0 && !segment_layout(m, f, f->max_rows, &g, &sections);) f->max_rows--;
    return true;
}

static bool usable_fused(const Model *m, Error *err) {
    if (!usable_cuda(m, err)) return false;
    int device = 0, major = 0;
    CUDA_TRY(cudaGetDevice(&device));
    CUDA_TRY(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    if (major < 9) return fail(err, "engine fused needs compute capability 9.0, the GPU has %d", major);
    if (m->weights.dtype == DTYPE_F32 && m->precision == PRECISION_F32)
        return fail(err, "engine fused has no products of float32 weights, only of BF16 and F16");
    if (m->config.dim > MAX_DIM) return fail(err, "engine fused takes a dim of %d at most, this model has %d", MAX_DIM, m->config.dim);
    FusedState f;
    memset(&f, 0, sizeof f);
    if (!size_fused(m, &f, err)) return false;
    return f.max_rows > 0 || fail(err, "engine fused: rows of %d and %d columns do not fit in %zu bytes of shared memory", m->config.dim,
                                  m->config.hidden_dim, f.shared_limit);
}

static bool prepare_fused(Model *m, Error *err) {
    CudaState *s = (CudaState *)m->state;
    FusedState *f = s->fused;
    if (!size_fused(m, f, err)) return false;
    CUDA_TRY(cudaMalloc(&f->h, (size_t)MAX_TERM_ROWS * m->config.hidden_dim * 2));
    CUDA_TRY(cudaMalloc((void **)&f->carry, (size_t)MAX_TERM_ROWS * m->config.dim * sizeof(float)));
    CUDA_TRY(cudaMalloc((void **)&f->done, n_counters(m) * sizeof *f->done));
    CUDA_TRY(cudaMalloc((void **)&f->best, (size_t)MAX_TERM_ROWS * f->n_blocks * sizeof(int2)));
    CUDA_TRY(cudaMemsetAsync(f->done, 0, n_counters(m) * sizeof *f->done, s->stream)); // once; every step leaves them so
    for (int groups = 1; groups <= MAX_GROUPS; groups++)
        if (!for_numbers(m, groups * GROUP, [&](auto numbers) {
                CUDA_TRY(cudaFuncSetAttribute((const void *)decode_segment_kernel<decltype(numbers)>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                              (int)f->shared_limit));
                return true;
            }))
            return false;
    return true;
}

static void close_fused(Model *m) {
    CudaState *s = (CudaState *)m->state;
    FusedState *f = s ? s->fused : NULL;
    close_cuda(m);
    if (!f) return;
    cudaFree(f->h);
    cudaFree(f->carry);
    cudaFree(f->done);
    cudaFree(f->best);
    free(f);
}

static bool open_fused(Model *m, Error *err) {
    if (!open_cuda(m, true, err)) return false;
    CudaState *s = (CudaState *)m->state;
    if (!(s->fused = (FusedState *)calloc(1, sizeof *s->fused))) return fail(err, "out of memory: the engine's state");
    s->enqueue_step = enqueue_step_fused;
    return prepare_fused(m, err);
}

extern "C" const Engine engine_fused = {"fused", usable_fused, open_fused, close_fused, forward_cuda, read_logits_cuda};
