/* attention.h: causal grouped-query attention over a KV cache on the GPU (attention.cu). It stands alone: `make lib`
 * builds build/libattention.so, and any program that can call C can load it.
 *
 *   attention_prefill   any number of new tokens per sequence, ragged batches in one launch
 *   attention_decode    one new token per sequence, or up to 8, at the speed of reading the cache once
 *
 * Both compute, for every new token t of every sequence and every query head h,
 *
 *   out[t][h] = softmax(scale * q[t][h] . K) V    over the positions 0 .. p of its sequence (causal: p = t's own)
 *
 * where K and V are those of KV head h / (n_heads / n_kv_heads). All accumulation is float32.
 * Both return 0, or nonzero with a message in attention_error(); after a refusal nothing was launched or written.
 */
#ifndef ATTENTION_H
#define ATTENTION_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { ATTENTION_F32 = 0, ATTENTION_F16 = 1, ATTENTION_BF16 = 2 };

/* "device" and "host" say where a pointer points; strides count elements. Zero the struct, then fill in what applies.
 * q, k_new, v_new and the caches are 16-byte aligned, and every stride is a multiple of 16 bytes. */
typedef struct AttentionArgs {
    int dtype;               /* of q, out, k_new, v_new and the cache: ATTENTION_F32, _F16 or _BF16 */
    int n_seq;               /* sequences in this call */
    int n_heads, n_kv_heads; /* query heads; KV heads, which divide them */
    int head_dim;            /* 64, 96 or 128 */
    int causal;              /* 1: a new token attends to the cache and the new tokens up to itself; 0: to all new */
    int append;              /* 1: the call writes k_new, v_new into the cache; 0: they are there already */
    int verbose;             /* 1: launch parameters on standard error */
    float scale;             /* 0: 1/sqrt(head_dim) */

    const void *q;             /* device [token][n_heads][head_dim] */
    void *out;                 /* device [token][n_heads][head_dim] */
    const void *k_new, *v_new; /* device [token][n_kv_heads][head_dim]; read only if append */
    int64_t q_token_stride, q_head_stride;
    int64_t out_token_stride, out_head_stride;
    int64_t k_token_stride, k_head_stride;
    int64_t v_token_stride, v_head_stride;

    /* The cache, K and V alike: device [block][n_kv_heads][block_size][head_dim].
     * Contiguous (block_table NULL): sequence i owns block i, of block_size = cache_max_len positions.
     * Paged: position p of sequence i is in block block_table[i][p / block_size], at p % block_size. (A table of width
     * 1 with block_size = cache_max_len is a map from sequences to slots.) Both give the same bits.
     * block_rows: sequence i has row block_rows[i] of the table in place of row i (contiguous: block block_rows[i]), so
     * that a call can take any of the sequences that a table has, in any order. */
    void *k_cache, *v_cache;
    int cache_max_len;      /* positions that one sequence may hold */
    const int *block_table; /* device [row][ceil(cache_max_len / block_size)], or NULL */
    const int *block_rows;  /* device [n_seq]: the row of the block table that each sequence has; NULL: i */
    int block_size;         /* positions per block if paged: a multiple of 16, or cache_max_len */

    /* Lengths. What shapes a launch or refuses one is read on the host; what may change between replays of a CUDA
     * graph is read on the device. So attention_prefill takes host arrays only, and attention_decode the device array;
     * give decode the host copy too and overflow is refused before the launch. Without it (a captured graph) the
     * kernel checks: a sequence that would overflow writes nothing to the cache and gets NaN as its output. */
    const int *q_start;  /* host [n_seq+1]: the tokens of sequence i are q_start[i] .. q_start[i+1]-1 (prefill) */
    const int *seq_lens; /* host [n_seq]: tokens in the cache before this call (decode: may be NULL) */
    const int *seq_lens_device; /* device [n_seq]: the same numbers (decode only; token i belongs to sequence i) */

    /* Decode only, f16 and bf16: several new tokens of a sequence in one call, such as candidates to be verified. Each
     * has the bits that a call with it alone has, after its predecessors: token j of a sequence (from 0 on) attends to
     * the cache and the new tokens up to itself; causal is 1. K and V are read from memory once for all of them (again
     * from L2 for every 16 pairs of a token and a query head of the KV head). Values of a later token never reach an
     * earlier one, NaN either; where V of a new token is not finite, the outputs of its KV head are NaN from that token
     * on. n_seq, n_new and n_tokens shape the launch; how many tokens a sequence has is read on the device, and may be
     * 0. Tokens that would overflow the cache write nothing to it and get NaN. */
    int n_new;    /* new tokens of a sequence, at most 8; 0 or 1: one each, token i is that of sequence i */
    int n_tokens; /* new tokens in all, at most; 0: n_seq * n_new. The workspace depends on it */
    /* device [n_seq+1]: as q_start, within 0 to n_tokens; read only if n_new > 1. Then q_start is a host copy or NULL;
     * with it and seq_lens overflow is refused before the launch. */
    const int *q_start_device;

    /* Decode only. Zero it once, before its first use (cudaMemset); every call leaves it ready for the next, of any
     * shape that it is large enough for. Calls that run concurrently need one each. */
    void *workspace;        /* device, 16-byte aligned */
    size_t workspace_bytes; /* at least attention_workspace_bytes */

    /* Decode only. 1: K and V are stable. The kernel launched right before this call on its stream writes neither the
     * cache nor block_table, block_rows, q_start_device or the lengths (but q, k_new and v_new it may: it can be a
     * projection, or a decode call on another cache); nor does it let its successor start before its own wait for the
     * kernels before it (cudaGridDependencySynchronize). On Hopper and later the call then reads all of these while
     * that kernel still runs. 0 is always safe. */
    int kv_stable;
} AttentionArgs;

/* stream: a cudaStream_t. Neither call synchronizes or allocates, and both can be captured into a CUDA graph. */
int attention_prefill(const AttentionArgs *args, void *stream);
int attention_decode(const AttentionArgs *args, void *stream);

/* What attention_decode needs (attention_prefill needs none): from dtype, n_seq, n_heads, n_kv_heads, head_dim,
 * cache_max_len, n_new and n_tokens. SIZE_MAX, with a message, if one of these is refused. */
size_t attention_workspace_bytes(const AttentionArgs *args);

/* Bytes of one contiguous cache, K or V. SIZE_MAX, with a message, if a dimension is refused. */
size_t attention_cache_bytes(const AttentionArgs *args);

/* The message of this thread's last call that did not return 0. */
const char *attention_error(void);

#ifdef __cplusplus
}
#endif
#endif
