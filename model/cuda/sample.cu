// Draws tokens on the GPU: the arithmetic of sampler_weights.h, and so sample_token's ids.
//
// No row is sorted. A place in a row's order (largest logit first, the lowest id first among equals) is found from a
// cumulative weight: tokens go into bins that follow the order, the bin in which the weight is reached is the only one
// that is looked into, and there a few tokens are sorted. What top-p keeps is one such search, what the random number
// draws is another one, since every cut keeps the beginning of the order (sampler.c).
//
// What it should cost, for 256 rows of 128,256 logits (33 million) at top-p 0.9:
// - 3 times the logits, 131 MB each: for the bins, for the bin of the cut, for the bin of the draw. 0.1 ms at 4 TB/s.
// - 30 float64 additions and products for each weight, once: 1.0e9, 0.07 ms at the 64 a cycle and SM of an H200. (The
//   later passes compute weights in the bin that they look for alone, and find it in float32.)
// - 3 atomic additions to shared memory for each weight of 45 bits: there are none of 64 bits in hardware, so the sum
//   of a bin is kept in three sums of 15 bits each. 3e6 by a warp, of 2 to 4 cycles and as many again where lanes meet
//   in a bin, which of bins of 1/32 in the base-2 logarithm two or three of 32 do: 0.1 to 0.2 ms.
// - 400 atomic additions of 64 bits to L2 for each block, one for a bin that has tokens.
// A row alone has 63 blocks for its weights, which take it a few microseconds; then one block looks through it twice,
// at 25 KB under way in an SM in 6 to 8 microseconds each.
#include <math.h>
#include <string.h>

#include "sample.h"

extern "C" {
#include "../generate/sampler.h"
}
#include "../generate/sampler_weights.h"

constexpr int THREADS = 512, WARPS = THREADS / 32;
constexpr int BLOCKS_PER_SM = 2;    // at least: 64 registers for a thread, which is what it takes
constexpr int DIGITS = SAMPLE_BINS; // bins, and values of a digit of a key
constexpr int LIST = 4096;          // tokens that are sorted in shared memory, at most
constexpr int PARTS = 3, PART = 15; // a weight's, and bits of one
constexpr int SLICE = 1 << 17;      // tokens of a block at most: so many parts of 15 bits fit into 32 bits
// Of a thread under way at once: where weights are computed; where a block alone looks through the row, and waits for
// memory.
constexpr int WEIGHT_LOADS = 4, SEARCH_LOADS = 12;
static_assert(PARTS * PART > WEIGHT_BITS && (uint64_t)SLICE * ((1 << PART) - 1) < 1ull << 32, "a bin's sums");
static_assert(DIGITS % THREADS == 0, "a thread has as many digits as another");

// What the threads of a block share.
struct SampleShared {
    union {
        unsigned parts[PARTS][DIGITS]; // and, with top-k, counts
        unsigned long long list[LIST]; // order_key, id
        unsigned long long digits[DIGITS];
    };
    unsigned count[DIGITS];
    unsigned long long warp_sums[WARPS];
    unsigned long long through;
    int found, n_list;
    bool last;
};

// A token, and the weight of all up to it in their order.
struct Place {
    int id;
    uint64_t through;
};

// The row of logits that a block works on.
struct Row {
    const float *logits; // [n]
    int n;
    WeightRule rule;
    uint64_t least; // smaller weights are cut off (min-p)
    SampleJob job;

    __device__ Row(const float *all_logits, int vocab, const SampleJob &job)
        : logits(all_logits + (size_t)job.row * vocab), n(vocab), job(job) {
        rule.scale = job.scale;
        rule.max = logits[job.argmax];
        rule.bits = job.bits;
        least = job.min_p > 0 ? least_weight(job.min_p, job.bits) : 0;
    }

    // The bin, which follows the order: 0 is the largest logit's.
    __device__ int bin(float logit) const {
        return (int)fminf(__fmul_rn(__fsub_rn(rule.max, logit), job.bin_scale), DIGITS - 1);
    }
    __device__ uint64_t weight(float logit) const {
        return token_weight(logit, rule);
    }
    // Calls body(id, logit) for ids of [begin, end), each by one thread of the block.
    template <int LOADS, class Body> __device__ void each(int begin, int end, Body body) const {
        for (int at = begin + threadIdx.x; at < end; at += LOADS * THREADS) {
            float logit[LOADS];
#pragma unroll
            for (int j = 0; j < LOADS; j++) logit[j] = at + j * THREADS < end ? logits[at + j * THREADS] : 0;
#pragma unroll
            for (int j = 0; j < LOADS; j++)
                if (at + j * THREADS < end) body(at + j * THREADS, logit[j]);
        }
    }
};

// ---- sums over a block ----------------------------------------------------------------------------------------------

__device__ static uint64_t warp_prefix(uint64_t x) {
    for (int step = 1; step < 32; step *= 2) {
        uint64_t before = __shfl_up_sync(~0u, x, step);
        if (threadIdx.x % 32 >= step) x += before;
    }
    return x;
}

// The sum of this thread's x and those of the threads before it; *total: of all. The block's threads call it together.
__device__ static uint64_t block_prefix(SampleShared *s, uint64_t x, uint64_t *total) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    x = warp_prefix(x);
    __syncthreads(); // the sums before have been read
    if (lane == 31) s->warp_sums[warp] = x;
    __syncthreads();
    uint64_t sums = warp_prefix(lane < WARPS ? s->warp_sums[lane] : 0);
    *total = __shfl_sync(~0u, sums, WARPS - 1);
    uint64_t before = __shfl_sync(~0u, sums, max(warp - 1, 0));
    return warp ? x + before : x;
}

// The first of DIGITS numbers up to which the sum, *below included, is more than target; *below becomes the sum before
// it. value(digit) is called by one thread for each.
template <class Value>
__device__ static int find_digit(SampleShared *s, Value value, uint64_t target, uint64_t *below) {
    constexpr int EACH = DIGITS / THREADS;
    uint64_t values[EACH], sum = 0, total;
    for (int j = 0; j < EACH; j++) sum += values[j] = value(EACH * threadIdx.x + j);
    uint64_t before = *below + block_prefix(s, sum, &total) - sum;
    for (int j = 0; j < EACH; j++) {
        if (before <= target && target < before + values[j]) {
            s->found = EACH * threadIdx.x + j;
            s->through = before;
        }
        before += values[j];
    }
    __syncthreads();
    *below = s->through;
    return s->found;
}

// ---- a place in the order -------------------------------------------------------------------------------------------

// Sorts the list [n], ascending: a bitonic network (Batcher 1968).
__device__ static void sort_list(unsigned long long *list, int n) {
    int size = 2;
    while (size < n) size *= 2;
    for (int i = n + threadIdx.x; i < size; i += THREADS) list[i] = ~0ull;
    __syncthreads();
    for (int run = 2; run <= size; run *= 2)
        for (int gap = run / 2; gap > 0; gap /= 2) {
            for (int i = threadIdx.x; i < size / 2; i += THREADS) {
                int a = 2 * i - (i & (gap - 1)), b = a + gap;
                unsigned long long x = list[a], y = list[b];
                if ((x > y) == ((a & run) == 0)) list[a] = y, list[b] = x;
            }
            __syncthreads();
        }
}

// The first of n tokens up to which the weight, `below` included, is more than target. token(i, &weight): the i-th.
template <class Token>
__device__ static Place find_among(SampleShared *s, int n, Token token, uint64_t below, uint64_t target) {
    if (threadIdx.x == 0) s->found = -1;
    for (int first = 0; first < n; first += THREADS) {
        uint64_t weight = 0, sum;
        int i = first + threadIdx.x, id = i < n ? token(i, &weight) : -1;
        uint64_t through = below + block_prefix(s, weight, &sum);
        if (through - weight <= target && target < through) {
            s->found = id;
            s->through = through;
        }
        __syncthreads();
        if (s->found >= 0) break;
        below += sum;
    }
    Place place = {s->found, s->through};
    __syncthreads(); // before they are written again
    return place;
}

// The first token in the order up to which the weight, or with `count` the number of tokens, is more than target. In
// the bin where that is, the tokens are sorted if there are few; else those stay whose keys have the digit in which it
// is, from the highest on, until they are few, or all equal.
__device__ static Place find_in_order(SampleShared *s, const Row &row, const SampleBins *bins, bool count,
                                      uint64_t target) {
    uint64_t below = 0, prefix = 0;
    int shift = 32; // the bits of a key that prefix does not have
    int bin = find_digit(
        s, [&](int i) { return count ? (uint64_t)__ldcg(&bins->count[i]) : __ldcg(&bins->weight[i]); }, target, &below);
    auto is_in = [&](float logit) { return row.bin(logit) == bin && (uint64_t)order_key(logit) >> shift == prefix; };
    auto value = [&](float logit) { return count ? 1 : row.weight(logit); };
    for (;;) {
        if (threadIdx.x == 0) s->n_list = 0;
        __syncthreads();
        row.each<SEARCH_LOADS>(0, row.n, [&](int id, float logit) {
            if (!is_in(logit)) return;
            int at = atomicAdd(&s->n_list, 1);
            if (at < LIST) s->list[at] = (unsigned long long)order_key(logit) << 32 | id;
        });
        __syncthreads();
        int n = s->n_list;
        if (n <= LIST) {
            sort_list(s->list, n);
            auto token = [&](int i, uint64_t *weight) {
                int id = (int)(unsigned)s->list[i];
                *weight = value(row.logits[id]);
                return id;
            };
            return find_among(s, n, token, below, target);
        }
        if (shift == 0) { // all equal: by their ids
            auto token = [&](int id, uint64_t *weight) {
                *weight = is_in(row.logits[id]) ? value(row.logits[id]) : 0;
                return id;
            };
            return find_among(s, row.n, token, below, target);
        }
        int next = shift == 32 ? 21 : shift == 21 ? 10 : 0;
        for (int i = threadIdx.x; i < DIGITS; i += THREADS) s->digits[i] = 0;
        __syncthreads();
        row.each<SEARCH_LOADS>(0, row.n, [&](int, float logit) {
            if (is_in(logit))
                atomicAdd(&s->digits[order_key(logit) >> next & ((1u << (shift - next)) - 1)],
                          (unsigned long long)value(logit));
        });
        __syncthreads();
        int digit = find_digit(s, [&](int i) { return (uint64_t)s->digits[i]; }, target, &below);
        prefix = prefix << (shift - next) | digit;
        shift = next;
    }
}

// ---- bins -----------------------------------------------------------------------------------------------------------

// Ids of a part of the row, where the order is that of ids: as few whole warps as make DIGITS parts or fewer.
__device__ static int part_size(int n) {
    return ((n - 1) / (32 * DIGITS) + 1) * 32;
}

// The weights of this block's parts of the row, each by a warp.
__device__ static void weigh_parts(const Row &row, SampleBins *bins) {
    int size = part_size(row.n), lane = threadIdx.x % 32;
    for (int part = blockIdx.x * WARPS + threadIdx.x / 32; part * size < row.n; part += gridDim.x * WARPS) {
        uint64_t sum = 0;
        for (int id = part * size + lane; id < min((part + 1) * size, row.n); id += 32) {
            uint64_t weight = row.weight(row.logits[id]);
            sum += weight < row.least ? 0 : weight;
        }
        sum = warp_prefix(sum);
        if (lane == 31) __stcg(&bins->weight[part], (unsigned long long)sum);
    }
}

// The weights of this block's tokens, added to the bins'.
__device__ static void weigh_bins(SampleShared *s, const Row &row, SampleBins *bins) {
    for (int i = threadIdx.x; i < DIGITS; i += THREADS) {
        for (int part = 0; part < PARTS; part++) s->parts[part][i] = 0;
        s->count[i] = 0;
    }
    __syncthreads();
    int size = (row.n - 1) / gridDim.x + 1, first = min((int)blockIdx.x * size, row.n);
    const uint64_t least = row.least;
    uint64_t likely = 0;
    row.each<WEIGHT_LOADS>(first, min(first + size, row.n), [&](int, float logit) {
        uint64_t weight = row.weight(logit);
        int bin = row.bin(logit);
        if (row.job.top_k) atomicAdd(&s->count[bin], 1);
        if (weight >= least) likely += weight;
        for (int part = 0; part < PARTS; part++) {
            unsigned bits = (unsigned)(weight >> part * PART) & ((1 << PART) - 1);
            if (bits) atomicAdd(&s->parts[part][bin], bits);
        }
    });
    if (least) {
        uint64_t sum;
        block_prefix(s, likely, &sum);
        if (threadIdx.x == 0) atomicAdd(&bins->likely, (unsigned long long)sum);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < DIGITS; i += THREADS) {
        unsigned long long weight = 0;
        for (int part = 0; part < PARTS; part++) weight += (unsigned long long)s->parts[part][i] << part * PART;
        if (weight) atomicAdd(&bins->weight[i], weight);
        if (s->count[i]) atomicAdd(&bins->count[i], s->count[i]);
    }
    __syncthreads();
}

// ---- the draw -------------------------------------------------------------------------------------------------------

// The token that the row's random number draws, by one block, when the bins are complete.
__device__ static int draw(SampleShared *s, const Row &row, const SampleBins *bins, bool by_id) {
    const SampleJob &job = row.job;
    uint64_t sum, weight = 0;
    for (int i = threadIdx.x; i < DIGITS; i += THREADS) weight += __ldcg(&bins->weight[i]);
    block_prefix(s, weight, &sum);
    if (by_id) {
        uint64_t target = drawn_weight(job.u, sum), below = 0;
        int size = part_size(row.n);
        int first = size * find_digit(s, [&](int i) { return (uint64_t)__ldcg(&bins->weight[i]); }, target, &below);
        auto token = [&](int i, uint64_t *weight) {
            *weight = row.weight(row.logits[first + i]);
            if (*weight < row.least) *weight = 0;
            return first + i;
        };
        __syncthreads();
        return find_among(s, min(size, row.n - first), token, below, target).id;
    }
    // In a loop, so that the code of a search is there once: a row alone waits for instructions, too.
    enum { CUT_K, CUT_P, DRAW };
    Place place;
#pragma unroll 1
    for (int stage = CUT_K; stage <= DRAW; stage++) {
        if ((stage == CUT_K && job.top_k == 0) || (stage == CUT_P && job.top_p >= 1)) continue;
        if (stage == DRAW && row.least) sum = min(sum, (uint64_t)__ldcg(&bins->likely));
        uint64_t target = stage == CUT_K   ? job.top_k - 1
                          : stage == CUT_P ? nucleus_weight(job.top_p, sum) - 1
                                           : drawn_weight(job.u, sum);
        place = find_in_order(s, row, bins, stage == CUT_K, target);
        sum = place.through;
        if (stage > CUT_K) continue;
        uint32_t last = order_key(row.logits[place.id]); // with all that are as likely as the k-th
        weight = 0;
        row.each<SEARCH_LOADS>(0, row.n, [&](int, float logit) {
            if (order_key(logit) <= last) weight += row.weight(logit);
        });
        block_prefix(s, weight, &sum);
    }
    return place.id;
}

// Computes: a token for each job, as sample_token does.
// Reads:    logits [*][vocab], finite; jobs [rows].
// Writes:   ids [rows], pinned host memory; bins [rows], zero before and after.
// Grid:     (blocks, rows) × THREADS; the blocks of a row fill its bins together, and the last one to finish draws.
// Requires: vocab <= blocks × SLICE; each job's argmax is its row's.
__global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
    sample_kernel(int *ids, SampleBins *all_bins, const float *logits, int vocab, const SampleJob *jobs) {
    __shared__ SampleShared shared;
    SampleShared *s = &shared;
    SampleBins *bins = &all_bins[blockIdx.y];
    Row row(logits, vocab, jobs[blockIdx.y]);
    bool by_id = row.job.top_k == 0 && row.job.top_p >= 1;
    if (by_id)
        weigh_parts(row, bins);
    else
        weigh_bins(s, row, bins);
    // What every block has added is visible to the one that counts last: fence, count; count, fence.
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) s->last = atomicAdd(&bins->done, 1) == gridDim.x - 1;
    __syncthreads();
    if (!s->last) return;
    __threadfence();
    int id = draw(s, row, bins, by_id);
    __syncthreads();
    for (int i = threadIdx.x; i < DIGITS; i += THREADS) bins->weight[i] = bins->count[i] = 0;
    if (threadIdx.x > 0) return;
    bins->likely = bins->done = 0;
    ids[blockIdx.y] = id;
}

// ---- launch ---------------------------------------------------------------------------------------------------------

// Blocks that fill a row's bins: with few rows so many that two thousand tokens are a block's, with many that there are
// two waves of what the SMs have room for.
static int blocks_of_row(int rows, int vocab, int n_sms) {
    int most = (vocab - 1) / 2048 + 1, least = (vocab - 1) / SLICE + 1,
        blocks = (2 * BLOCKS_PER_SM * n_sms - 1) / rows + 1;
    return blocks < least ? least : blocks < most ? blocks : most;
}

static SampleJob job_of(const SampleRow *row, int vocab, int argmax) {
    const SamplerConfig *config = row->config;
    SampleJob job;
    job.scale = LOG2_E / (double)config->temperature;
    job.u = row->u;
    // A bin is 1/32 of a doubling of the weight; of a temperature near zero, the largest logit has one of its own.
    job.bin_scale = (float)fmin(32 * job.scale, 1e30);
    job.top_p = config->top_p;
    job.min_p = config->min_p;
    job.top_k = config->top_k < vocab ? config->top_k : 0;
    job.row = row->row;
    job.argmax = argmax;
    job.bits = weight_bits(vocab);
    return job;
}

bool sample_rows(const SampleBuffers *b, const float *logits, int vocab, const int *argmax, const SampleRow *rows,
                 int n, int *ids, cudaStream_t stream, Error *err) {
    int device = 0, n_sms = 0;
    if (n == 0) return true;
    for (int i = 0; i < n; i++) b->jobs_host[i] = job_of(&rows[i], vocab, argmax[rows[i].row]);
    CUDA_TRY(cudaGetDevice(&device));
    CUDA_TRY(cudaDeviceGetAttribute(&n_sms, cudaDevAttrMultiProcessorCount, device));
    CUDA_TRY(cudaMemcpyAsync(b->jobs, b->jobs_host, (size_t)n * sizeof *b->jobs, cudaMemcpyHostToDevice, stream));
    dim3 grid((unsigned)blocks_of_row(n, vocab, n_sms), (unsigned)n);
    sample_kernel<<<grid, THREADS, 0, stream>>>(b->ids_host, b->bins, logits, vocab, b->jobs);
    CUDA_TRY(cudaGetLastError());
    CUDA_TRY(cudaStreamSynchronize(stream));
    memcpy(ids, b->ids_host, (size_t)n * sizeof *ids);
    return true;
}

bool load_sample_kernel(Error *err) {
    cudaFuncAttributes attributes;
    CUDA_TRY(cudaFuncGetAttributes(&attributes, sample_kernel));
    return true;
}
