// The ranks of a model on several GPUs: what they gather, and in which order they go on (parallel/comm.h).
#include <stdio.h>

#include "state.h"

void name_gpu(const CudaState *s, Error *err) {
    const Error why = *err;
    if (is_interrupt(err) || is_out_of_memory(err)) return;
    snprintf(err->text, sizeof err->text, "GPU %d: %.480s", s->device, why.text);
}

// A rank's Model; of one in another process what is known of it: its shard.
static Model *rank_or_shard(Model *m, int rank, Model *room) {
    if (!m->by_processes) return model_of_rank(m, rank);
    if (rank == m->shard.rank) return m;
    *room = *m;
    room->shard = shard_of(&m->config, rank, m->shard.count);
    return room;
}

bool gather(Model *m, int rows, int columns, OwnColumns (*of)(const Model *m), Error *err) {
    CudaState *s = (CudaState *)m->state;
    CommPart parts[MAX_SHARDS];
    Model room;
    size_t element = 0;
    if (!s->comm) return true;
    for (int r = 0; r < m->shard.count; r++) {
        OwnColumns c = of(rank_or_shard(m, r, &room));
        element = c.element;
        parts[r] = {c.own, (size_t)c.columns.n * element, (size_t)c.columns.first * element, c.all};
    }
    return comm_gather(s->comm, parts, rows, (size_t)columns * element, err);
}

static OwnColumns own_x(const Model *m) {
    const CudaState *s = (const CudaState *)m->state;
    return {s->x, s->x_all, m->shard.dim, sizeof *s->x};
}

static OwnColumns own_att(const Model *m) {
    const CudaState *s = (const CudaState *)m->state;
    const int each = m->config.group * m->config.head_dim; // columns of the queries of a K/V head
    return {s->att, s->att_all, {m->shard.kv_heads.first * each, m->shard.kv_heads.n * each}, s->element};
}

static OwnColumns own_h(const Model *m) {
    const CudaState *s = (const CudaState *)m->state;
    return {s->h, s->h_all, m->shard.hidden, s->element};
}

bool gather_x(Model *m, int T, Error *err) {
    return gather(m, T, m->config.dim, own_x, err);
}

bool gather_att(Model *m, int T, Error *err) {
    return gather(m, T, m->config.q_dim, own_att, err);
}

bool gather_h(Model *m, int T, Error *err) {
    return gather(m, T, m->config.hidden_dim, own_h, err);
}

bool gather_logits(Model *m, int first, int n, Error *err) {
    CudaState *s = (CudaState *)m->state;
    CommPart parts[MAX_SHARDS];
    const size_t row = (size_t)m->config.vocab_size * sizeof(float);
    Model room;
    if (!s->comm) return true;
    for (int r = 0; r < m->shard.count; r++) {
        const Model *own = rank_or_shard(m, r, &room);
        const CudaState *at = (const CudaState *)own->state;
        const Rows vocab = own->shard.vocab;
        parts[r] = {at->own_logits, (size_t)vocab.n * sizeof(float), (size_t)vocab.first * sizeof(float),
                    (char *)at->logits + (size_t)first * row};
    }
    return comm_gather(s->comm, parts, n, row, err);
}

bool take_own_x(const Model *m, CudaState *s, int T, Error *err) {
    const Rows own = m->shard.dim;
    if (!s->comm) return true;
    CUDA_TRY(cudaMemcpy2DAsync(s->x, (size_t)own.n * sizeof *s->x, s->x_all + own.first,
                               (size_t)m->config.dim * sizeof *s->x, (size_t)own.n * sizeof *s->x, (size_t)T,
                               cudaMemcpyDeviceToDevice, s->stream));
    return true;
}

bool join_shards(Model *m, Error *err) {
    Comm *comm = ((CudaState *)m->state)->comm;
    return !comm || comm_join(comm, err);
}

bool fork_shards(Model *m, Error *err) {
    Comm *comm = ((CudaState *)m->state)->comm;
    return !comm || comm_fork(comm, err);
}

bool wait_for_shards(Model *m, Error *err) {
    return for_shards(m, err, [&](Model *, CudaState *s) {
        CUDA_TRY(cudaStreamSynchronize(s->stream));
        return true;
    });
}
