// Steps on the GPU: CUDA graphs, and the step that runs ahead of its caller.
#include <string.h>

#include "ops.h"

// ---- pages ----------------------------------------------------------------------------------------------------------
//
// Why no page is read or written by the wrong sequence, though a step runs ahead of its caller, who may meanwhile end a
// sequence, give its pages to others, or take them to the host:
// - All that touches pages and the block table is in one stream: changes of the table, prompts, steps, copies of pages.
//   What was enqueued first has finished with a page before anything that comes later touches it.
// - A step that runs ahead finds its pages by the table as it was when it was enqueued. model_forward had reserved
//   the page of the position it writes (kv_reserve_batch; where none was free, no step runs ahead), and that change of
//   the table came before the step in the stream.
// - It writes one position of each sequence, the first that its slot has not filled, on a page that no other slot had
//   and that nobody could share: published pages are whole pages of filled positions. The page may be another slot's by
//   the time it is written. Whoever has it then writes each position, later in the stream, before it reads it: what the
//   step left there is never read, and the page is published only after that.
// - Its result counts only if the step asked for is the same: slot, length and token of each row, and the page it wrote
//   to, which could have been given back and replaced. Copies of pages make an end of the prediction: after them the
//   same slot and length may be another sequence's.
// - Graphs hold the table's address, which never changes, and read its entries as they are when they run.

// Brings to the device what has changed in the tables of a batch's slots. The changes are in pinned memory, which is
// written again at the next call at the earliest: by then a batch's argmax has been waited for, which came after them
// (on all GPUs: record_argmax).
static bool update_table(Model *m, const Batch *b, Error *err) {
    CudaState *s = (CudaState *)m->state;
    int n = 0;
    for (int i = 0; i < b->n_seq; i++) {
        int slot = b->slot[i], first, count = kv_take_changes(&m->kv, slot, &first);
        for (int j = first; j < first + count; j++)
            s->table_changes[n++] = {slot * m->kv.table_width + j, kv_slot_pages(&m->kv, slot)[j]};
    }
    return n == 0 || for_shards(m, err, [&](Model *, CudaState *s) { return change_table(s, n, err); });
}

void *allocate_pinned(size_t bytes) {
    void *memory;
    if (cudaMallocHost(&memory, bytes) == cudaSuccess) return memory;
    cudaGetLastError(); // is the caller's to report
    return NULL;
}

void free_pinned(void *memory) {
    cudaDeviceSynchronize(); // a copy may be on its way
    cudaFreeHost(memory);
}

// Of a page's heads in host memory, which are those of the whole model, each rank copies its own.
static bool copy_own_heads(const Model *m, const CudaState *s, const int *pages, int n, void *const *host, bool to_host,
                           Error *err) {
    const Config *c = &m->config;
    size_t whole = kv_page_elements(c->n_kv_heads, c->head_dim) * s->element; // of one layer, K or V
    size_t bytes = kv_page_elements(own_kv_heads(m), c->head_dim) * s->element;
    size_t first = kv_page_elements(m->shard.kv_heads.first, c->head_dim) * s->element;
    size_t layer = m->kv.n_pages * bytes;
    char *caches[] = {(char *)m->kv.k, (char *)m->kv.v};
    for (int i = 0; i < n; i++) {
        char *saved = (char *)host[i] + first;
        for (char *cache : caches)
            for (int l = 0; l < c->n_layers; l++, saved += whole) {
                char *page = cache + l * layer + pages[i] * bytes;
                CUDA_TRY(cudaMemcpyAsync(to_host ? saved : page, to_host ? page : saved, bytes,
                                         to_host ? cudaMemcpyDeviceToHost : cudaMemcpyHostToDevice, s->stream));
            }
    }
    return true;
}

// (The join is for free_pinned, which waits for rank 0's GPU.)
bool copy_pages_cuda(Model *m, const int *pages, int n, void *const *host, bool to_host, Error *err) {
    ((CudaState *)m->state)->next_step.n = 0; // no step is the predicted one from here on
    return for_shards(m, err,
                      [&](Model *m, CudaState *s) { return copy_own_heads(m, s, pages, n, host, to_host, err); }) &&
           join_shards(m, err);
}

// ---- steps ----------------------------------------------------------------------------------------------------------

bool publish_step(Model *m, int n, bool several, Error *err) {
    return for_shards(m, err,
                      [&](Model *, CudaState *s) { return publish_argmax(s, n, several ? NULL : s->step, err); });
}

static bool ranks_are_apart(const Model *m, int n) {
    const CudaState *s = (const CudaState *)m->state;
    return s->comm && s->ranks_are_apart && s->ranks_are_apart(m, n);
}

// What has been enqueued so far, on all GPUs, comes before argmax_ready. (Where ranks are apart rank 0's argmax has
// waited for all of them: what they have left to do is their own.)
static bool record_argmax(Model *m, Error *err) {
    CudaState *s = (CudaState *)m->state;
    if (!s->last_step_apart && !join_shards(m, err)) return false;
    CUDA_TRY(cudaEventRecord(s->argmax_ready, s->stream));
    return true;
}

// Waits for the argmax of n_logits rows.
static bool wait_for_argmax(Model *m, int n_logits, Error *err) {
    CudaState *s = (CudaState *)m->state;
    s->n_logits = n_logits;
    if (s->comm && !comm_wait(s->comm, s->argmax_ready, err)) return false;
    CUDA_TRY(cudaEventSynchronize(s->argmax_ready));
    memcpy(m->argmax, s->next_step.running ? s->other_argmax_host : s->argmax_host, (size_t)n_logits * sizeof(int));
    return true;
}

// Rows of prompts: their logits and argmax from row first_logit on, those before it stay. A step that runs ahead runs
// in vain then.
static bool prompt_cuda(Model *m, const Batch *b, int first_logit, Error *err) {
    CudaState *s = (CudaState *)m->state;
    int n_logits = first_logit + b->n_logits; // of the whole batch, so far
    s->next_step.running = false;
    s->next_step.n = 0;
    s->last_step_apart = false;
    if (!forward_prompt(m, b, first_logit, err)) return false;
    if (n_logits > 0 && !publish_argmax(s, n_logits, NULL, err)) return false;
    return record_argmax(m, err) && wait_for_argmax(m, n_logits, err);
}

// The last step's logits and argmax stay as they are; what comes next writes the other buffer.
static bool switch_buffers(Model *, CudaState *s) {
    float *logits = s->logits;
    int *argmax = s->argmax_host;
    s->logits = s->other_logits;
    s->argmax_host = s->other_argmax_host;
    s->other_logits = logits;
    s->other_argmax_host = argmax;
    s->buffer ^= 1;
    return true;
}

static bool gather_tables(Model *m, int n_seq, bool several, Error *err) {
    return for_shards(m, err,
                      [&](Model *, CudaState *s) { return gather_table(s, n_seq, m->kv.table_width, several, err); });
}

static bool enqueue_step(Model *m, int n, bool several, Error *err) {
    return gather_tables(m, several ? m->kv.n_slots : n, several, err) &&
           ((CudaState *)m->state)->enqueue_step(m, n, several, err);
}

static bool begin_capture(Model *, CudaState *s, Error *err) {
    CUDA_TRY(cudaStreamBeginCapture(s->stream, cudaStreamCaptureModeThreadLocal));
    return true;
}

static bool make_graph(CudaState *s, cudaGraph_t graph, cudaGraphExec_t *exec, Error *err) {
    cudaError_t status = cudaGraphInstantiate(exec, graph, 0);
    cudaGraphDestroy(graph);
    CUDA_TRY(status);
    CUDA_TRY(cudaGraphUpload(*exec, s->stream));
    return true;
}

// A step of so many rows as a graph, which is replayed from then on: launching 500 kernels one by one would take longer
// than running them. Of several GPUs one graph has all: their streams join rank 0's capture at its beginning, and rank
// 0's stream waits for them at its end. Where ranks are apart each has its own; all captures end before the first is
// made a graph, which no capture allows beside it.
static bool capture_step(Model *m, int n, bool several, Error *err) {
    CudaState *s = (CudaState *)m->state;
    cudaGraph_t graphs[MAX_SHARDS] = {};
    if (!ranks_are_apart(m, n)) {
        if (!begin_capture(m, s, err)) return false;
        bool ok = fork_shards(m, err) && enqueue_step(m, n, several, err) && join_shards(m, err);
        cudaError_t ended = cudaStreamEndCapture(s->stream, graphs);
        if (!ok) return false;
        CUDA_TRY(ended);
        return make_graph(s, graphs[0], &s->graphs[several][s->buffer][n], err);
    }
    bool ok = for_shards(m, err, [&](Model *m, CudaState *s) { return begin_capture(m, s, err); }) &&
              enqueue_step(m, n, several, err);
    ok = for_shards(m, err,
                    [&](Model *m, CudaState *s) {
                        cudaError_t ended = cudaStreamEndCapture(s->stream, &graphs[m->shard.rank]);
                        if (ok) CUDA_TRY(ended);
                        return true;
                    }) &&
         ok;
    return ok && for_shards(m, err, [&](Model *m, CudaState *s) {
               return make_graph(s, graphs[m->shard.rank], &s->graphs[several][s->buffer][n], err);
           });
}

// Whether a batch's decode rows continue the predicted step: the one after the last, for the tokens that the last one
// predicted.
static bool is_predicted_step(const Model *m, const CudaState *s, const Batch *b) {
    if (s->next_step.n != b->n_decode || b->start[b->n_decode] != b->n_decode) return false;
    for (int i = 0; i < b->n_decode; i++) {
        int slot = b->slot[i], len = m->kv.len[slot];
        if (slot != s->next_step.slots[i] || len != s->next_step.lens[i] || b->tokens[i] != m->argmax[i]) return false;
        if (s->next_step.running && kv_slot_pages(&m->kv, slot)[len / KV_PAGE] != s->next_step.pages[i]) return false;
    }
    return true;
}

// Rows that are computed for n, one of each sequence: a run whose sequences end one by one has few graphs then. Those
// that nobody asked for are at a position that no context has (upload_step): attention neither reads nor writes for
// them.
static int graph_rows(const Model *m, int n) {
    const int unit = n <= 8 ? 1 : n <= 32 ? 4 : 16, rows = (n + unit - 1) / unit * unit;
    return rows < m->kv.n_slots ? rows : m->kv.n_slots; // as many as there is memory for
}

// n: graph_rows, if not several. The first of so many rows is launched kernel by kernel: its graph is made while it
// runs.
static bool launch_step(Model *m, int n, bool several, Error *err) {
    CudaState *s = (CudaState *)m->state;
    s->last_step_apart = ranks_are_apart(m, n);
    if (!s->ran[several][n]) {
        s->ran[several][n] = true;
        return enqueue_step(m, n, several, err);
    }
    cudaGraphExec_t *graph = &s->graphs[several][s->buffer][n];
    if (!*graph && !capture_step(m, n, several, err)) return false;
    if (s->last_step_apart)
        return for_shards(m, err, [&](Model *, CudaState *s) {
            CUDA_TRY(cudaGraphLaunch(s->graphs[several][s->buffer][n], s->stream));
            return true;
        });
    if (!join_shards(m, err)) return false; // the graph is in rank 0's stream
    CUDA_TRY(cudaGraphLaunch(*graph, s->stream));
    return fork_shards(m, err);
}

// Brings the decode rows of a batch to the device: s->step.
static bool upload_step(Model *m, const Batch *b, Error *err) {
    CudaState *s = (CudaState *)m->state;
    StepInput *step = s->step_host;
    int n = b->n_decode, rows = b->start[n];
    for (int i = 0; i < n; i++) {
        step->slots[i] = b->slot[i];
        step->start[i] = b->start[i];
        step->seq_lens[i] = m->kv.len[b->slot[i]];
        for (int r = b->start[i]; r < b->start[i + 1]; r++) {
            step->tokens[r] = b->tokens[r];
            step->lens[r] = step->seq_lens[i] + r - b->start[i];
        }
    }
    for (int i = n; i <= m->kv.n_slots; i++) {
        step->start[i] = rows;
        if (i < m->kv.n_slots) step->slots[i] = step->seq_lens[i] = 0; // no rows
    }
    for (int r = rows; r < MAX_STEP_ROWS; r++) {
        step->tokens[r] = 0;
        step->lens[r] = m->kv.max_len;
    }
    return for_shards(m, err, [&](Model *, CudaState *s) {
        CUDA_TRY(cudaMemcpyAsync(s->step, step, sizeof *step, cudaMemcpyHostToDevice, s->stream));
        return true;
    });
}

// Where ranks are apart: what a step has beside engine fused's kernels, once for each number of rows, as kernels that
// wait for another GPU run forever if what they wait for cannot be loaded beside them.
static bool load_step_kernels(Model *m, Error *err) {
    const int most = model_step_rows(m) < 8 ? model_step_rows(m) : 8;
    for (int several = 0; several <= (m->speculates ? 1 : 0); several++)
        for (int n = several + 1; n <= most && ranks_are_apart(m, n); n++)
            if (!gather_tables(m, several ? m->kv.n_slots : n, several, err) ||
                !for_shards(m, err, [&](Model *m, CudaState *s) {
                    return attend_step_rows(m, s, 0, 0, n, several, false, err);
                }))
                return false;
    return wait_for_shards(m, err);
}

bool prepare_steps(Model *m, Error *err) {
    CudaState *s = (CudaState *)m->state;
    const int none = 0;
    Batch b = {};
    b.start = &none;                        // no row is a sequence's
    s->warming_up = model_sequences(m) > 1; // else its launches are those that are logged
    if (!upload_step(m, &b, err) || !load_step_kernels(m, err) || !launch_step(m, 1, false, err)) return false;
    for (int buffer = 0; buffer < 2; buffer++)
        if (!capture_step(m, 1, false, err) || !for_shards(m, err, switch_buffers)) return false;
    s->warming_up = false;
    return wait_for_shards(m, err);
}

// The rows that are computed for a batch's decode rows.
static int rows_of_step(const Model *m, const Batch *b) {
    const int n = b->n_decode, rows = b->start[n];
    return rows > n ? rows : graph_rows(m, n);
}

// Enqueues the decode rows of a batch, unless they run already.
static bool enqueue_decode_rows(Model *m, const Batch *b, bool predicted, Error *err) {
    if (predicted && ((CudaState *)m->state)->next_step.running) return true;
    return upload_step(m, b, err) && launch_step(m, rows_of_step(m, b), b->start[b->n_decode] > b->n_decode, err);
}

static bool step_cuda(Model *m, const Batch *b, Error *err) {
    CudaState *s = (CudaState *)m->state;
    const int n = b->n_decode, rows = rows_of_step(m, b);
    const bool several = b->start[n] > n;
    // Where the next step may have candidates, or has other sequences, none is predicted.
    bool predicted = is_predicted_step(m, s, b), room = !m->speculates && !b->ends;
    if (!enqueue_decode_rows(m, b, predicted, err)) return false;
    s->next_step.n = room ? n : 0;
    for (int i = 0; i < n && room; i++) {
        int slot = b->slot[i], len = m->kv.len[slot] + 1;
        s->next_step.slots[i] = slot;
        s->next_step.lens[i] = len;
        room = room && len < m->kv.max_len && kv_pages(len + 1) <= m->kv.held[slot];
        if (room) s->next_step.pages[i] = kv_slot_pages(&m->kv, slot)[len / KV_PAGE];
    }
    // A step that was predicted predicts the next: who samples, or changes the batch, never has a step run in vain
    // twice. (A draw may well be the argmax; but the next one would wait until the step that runs ahead leaves SMs
    // free.)
    s->next_step.running = predicted && room && !s->next_step.sampled && s->graphs[0][s->buffer][rows];
    s->next_step.sampled = false;
    if (!record_argmax(m, err)) return false;
    if (s->next_step.running) {
        if (!for_shards(m, err, switch_buffers) || !launch_step(m, rows, false, err)) return false;
    } else if (!s->graphs[several][s->buffer][rows] && !capture_step(m, rows, several, err))
        return false;
    return wait_for_argmax(m, b->start[n], err);
}

// Decode rows and rows of prompts: in one pass over the weights, where that is how the run computes them (two_passes),
// unless decode rows are several of a sequence or run already; else in two. The step's logits are the first rows, the
// prompts' come after them in the same buffer. No step runs ahead of what prompts may change.
static bool mixed_cuda(Model *m, const Batch *b, Error *err) {
    CudaState *s = (CudaState *)m->state;
    BatchPart prompts;
    int n = b->n_decode;
    bool predicted = is_predicted_step(m, s, b);
    if (!m->two_passes && b->start[n] == n && !(predicted && s->next_step.running))
        return upload_step(m, b, err) && gather_tables(m, n, false, err) && prompt_cuda(m, b, 0, err);
    batch_part(b, b->start[n], b->n_rows - b->start[n], &prompts);
    return enqueue_decode_rows(m, b, predicted, err) && prompt_cuda(m, &prompts.batch, b->start[n], err);
}

bool forward_cuda(Model *m, const Batch *b, int first_logit, Error *err) {
    int n = b->n_decode;
    if (!update_table(m, b, err)) return false;
    if (n == 0) return prompt_cuda(m, b, first_logit, err);
    // A step's logits are the first of its buffer's.
    if (first_logit != 0 || (b->start[n] != n && !m->speculates))
        return fail(err, "engine %s: %d sequences decode %d rows after %d logits, expected a row each and 0 logits",
                    m->engine->name, n, b->start[n], first_logit);
    return n == b->n_seq ? step_cuda(m, b, err) : mixed_cuda(m, b, err);
}

// Where the last batch's logits are, and a stream in which they are complete: beside a step that runs ahead, the side
// stream.
static const float *last_logits(const CudaState *s, cudaStream_t *stream) {
    bool ahead = s->next_step.running;
    *stream = ahead ? s->side : s->stream;
    return ahead ? s->other_logits : s->logits;
}

bool read_logits_cuda(Model *m, Error *err) {
    CudaState *s = (CudaState *)m->state;
    size_t bytes = (size_t)s->n_logits * (size_t)m->config.vocab_size * sizeof(float);
    cudaStream_t stream;
    const float *logits = last_logits(s, &stream);
    CUDA_TRY(cudaMemcpyAsync(m->logits, logits, bytes, cudaMemcpyDeviceToHost, stream));
    CUDA_TRY(cudaStreamSynchronize(stream));
    return true;
}

bool sample_cuda(Model *m, const SampleRow *rows, int n, int *ids, Error *err) {
    CudaState *s = (CudaState *)m->state;
    cudaStream_t stream;
    const float *logits = last_logits(s, &stream);
    s->next_step.sampled = true;
    return sample_rows(&s->sample, logits, m->config.vocab_size, m->argmax, rows, n, ids, stream, err);
}
