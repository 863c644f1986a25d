// test_attention.cu: the attention library against a float64 reference on the same rounded inputs, element by element.
// Inputs are random normal; outputs, caches and workspace start as NaN. `--small` runs shapes for compute-sanitizer,
// `--only TEXT` the tests whose name contains TEXT.
#include <algorithm>
#include <functional>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <string>
#include <vector>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../model/attention/attention.h"

#define CUDA(call) \
    do { \
        cudaError_t e = (call); \
        if (e != cudaSuccess) { \
            printf("FAIL %s:%d %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(e)); \
            exit(1); \
        } \
    } while (0)

static const char *DTYPES[] = {"f32", "f16", "bf16"};
static int g_small;

// What an element may be off by. f32: products and sums of some hundred terms; f16 and bf16: half a unit of the
// output's last place (2^-12, 2^-9 of it), and a little for the weights.
static double bound_abs(int dtype) {
    return dtype == ATTENTION_F32 ? 1e-5 : dtype == ATTENTION_F16 ? 1e-3 : 2e-3;
}
static double bound_rel(int dtype) {
    return dtype == ATTENTION_F32 ? 1e-5 : dtype == ATTENTION_F16 ? 1e-3 : 1.0 / 256;
}

struct Result {
    std::string name;
    int dtype;
    double largest, sum, fraction;
    long long n;
    bool failed;
    std::string why;
};
static Result *g_result;

static void fail(const char *format, ...) {
    char text[600];
    va_list list;
    va_start(list, format);
    vsnprintf(text, sizeof text, format, list);
    va_end(list);
    if (!g_result->failed) g_result->why = text;
    g_result->failed = true;
}

// --------------------------------------------------------------------------------------------------------------------
// Data on the device

template <typename T> __device__ double to_double(T x) {
    return (double)(float)x;
}
template <typename T> __device__ T from_f(float x) {
    return (T)x;
}

__device__ uint64_t mix(uint64_t x) {
    x ^= x >> 30;
    x *= 0xbf58476d1ce4e5b9ull;
    x ^= x >> 27;
    x *= 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

// x[i] normal, the same for the same (tensor, sequence id, element within the sequence)
template <typename T> __global__ void fill_normal(T *x, long long n, uint64_t seed) {
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < n;
         i += (long long)gridDim.x * blockDim.x) {
        uint64_t h = mix(mix(seed) + i);
        float u = ((uint32_t)h + 0.5f) * 2.3283064e-10f, v = (uint32_t)(h >> 32) * 2.3283064e-10f;
        x[i] = from_f<T>(sqrtf(-2.0f * logf(fminf(u, 0.99999994f))) * cosf(6.2831853f * v));
    }
}

// rows of D elements from the master [seq][pos][heads][D] to packed tokens with strides
template <typename T>
__global__ void pack_rows(T *dst, long long token_stride, long long head_stride, const T *src, int heads, int D,
                          long long L, const int *seq, const int *pos) {
    int t = blockIdx.x;
    for (int i = threadIdx.x; i < heads * D; i += blockDim.x)
        dst[t * token_stride + i / D * head_stride + i % D] = src[((seq[t] * L + pos[t]) * heads) * D + i];
}

// ref[t][h][d] in float64: an online softmax over chunks of 128 keys.
// kv_group 0: K and V have a head for each query head
template <typename T>
__global__ void reference(double *ref, const T *q, const T *k, const T *v, int H, int Hkv, int D, long long L,
                          const int *seq, const int *pos, const int *sees, double scale) {
    __shared__ double w[128];
    __shared__ double top_all, sum_all;
    int t = blockIdx.x, h = blockIdx.y, kv = h / (H / Hkv), i = threadIdx.x;
    const T *qr = q + ((seq[t] * L + pos[t]) * H + h) * D;
    double acc = 0, top = -INFINITY, sum = 0;
    for (int base = 0; base < sees[t]; base += 128) {
        int n = min(128, sees[t] - base);
        if (i < n) {
            const T *kr = k + ((seq[t] * L + base + i) * Hkv + kv) * D;
            double s = 0;
            for (int d = 0; d < D; d++) s += to_double(qr[d]) * to_double(kr[d]);
            w[i] = s * scale;
        }
        __syncthreads();
        if (i == 0) {
            double m = top;
            for (int j = 0; j < n; j++) m = fmax(m, w[j]);
            top_all = m;
        }
        __syncthreads();
        double alpha = exp(top - top_all);
        top = top_all;
        __syncthreads();
        if (i < n) w[i] = exp(w[i] - top);
        __syncthreads();
        if (i == 0) {
            sum *= alpha;
            for (int j = 0; j < n; j++) sum += w[j];
            sum_all = sum;
        }
        acc *= alpha;
        if (i < D)
            for (int j = 0; j < n; j++) acc += w[j] * to_double(v[((seq[t] * L + base + j) * Hkv + kv) * D + i]);
        __syncthreads();
    }
    if (i < D) ref[((long long)t * H + h) * D + i] = acc / sum_all;
}

template <typename T>
__global__ void repeat_heads(T *dst, const T *src, int H, int Hkv, int D) { // [row][Hkv][D] -> [row][H][D]
    long long row = blockIdx.x;
    for (int i = threadIdx.x; i < H * D; i += blockDim.x)
        dst[row * H * D + i] = src[(row * Hkv + i / D / (H / Hkv)) * D + i % D];
}

// The first lens[seq] positions of a master [seq][L][Hkv][D] into a cache of blocks: a block of threads per position
// and sequence.
template <typename T>
__global__ void fill_cache(T *cache, const T *master, int Hkv, int D, long long L, int block, int table_width,
                           const int *table, const int *lens) {
    long long pos = blockIdx.x, seq = blockIdx.y, b = table ? table[seq * table_width + pos / block] : seq;
    if (pos >= lens[seq]) return;
    for (int i = threadIdx.x; i < Hkv * D; i += blockDim.x)
        cache[((b * Hkv + i / D) * block + pos % block) * D + i % D] = master[(seq * L + pos) * Hkv * D + i];
}

static void with_type(int dtype, const std::function<void(float)> &f32, const std::function<void(__half)> &f16,
                      const std::function<void(__nv_bfloat16)> &bf16) {
    if (dtype == ATTENTION_F32)
        f32(0.0f);
    else if (dtype == ATTENTION_F16)
        f16(__half());
    else
        bf16(__nv_bfloat16());
}
#define TYPED(dtype, body) \
    with_type( \
        dtype, \
        [&](auto z) { \
            typedef decltype(z) T; \
            body; \
        }, \
        [&](auto z) { \
            typedef decltype(z) T; \
            body; \
        }, \
        [&](auto z) { \
            typedef decltype(z) T; \
            body; \
        })

// A kernel that lets the next one start and takes its time to write.
__global__ void copy_late(uint4 *to, const uint4 *from, size_t n) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
    for (long long end = clock64() + 50000; clock64() < end;) {
    }
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x)
        to[i] = from[i];
}

struct Shape {
    int dtype, n_seq, H, Hkv, D, max_len;
    int causal = 1, block_size = 0, first_id = 0, table_seed = 1;
};

// A batch of sequences: their whole future as master arrays, a cache, and how far each has come.
struct Model {
    Shape s;
    int bytes, table_width;
    long long L, max_tokens, head_stride, q_stride, kv_stride;
    size_t cache_bytes, workspace_bytes;
    char *q, *k, *v; // master [seq][pos][heads][D]
    char *kc, *vc, *workspace, *qbuf, *kbuf, *vbuf, *out;
    double *ref;
    int *table = nullptr, *rows = nullptr, *lens_dev, *index; // index: seq, pos, sees of each token
    int *start_dev = nullptr;                                 // of decode with several new tokens per sequence
    std::vector<int> lens, table_host;
    std::vector<char> out_host; // the last call's output with its strides
    AttentionArgs args;
    cudaStream_t stream = 0; // with one of its own, the inputs are written by a kernel that overlaps the call

    Model(const Shape &shape, int max_new) : s(shape) {
        bytes = s.dtype == ATTENTION_F32 ? 4 : 2;
        L = s.max_len + 64; // the master goes on past the cache: for the tests of overflow
        max_tokens = (long long)max_new * s.n_seq;
        head_stride = s.D + 8;
        q_stride = s.H * head_stride + 16;
        kv_stride = s.Hkv * head_stride + 8;
        lens.assign(s.n_seq, 0);
        auto master = [&](int heads, int tensor) {
            char *x = device(s.n_seq * L * heads * s.D * bytes);
            for (int i = 0; i < s.n_seq; i++)
                TYPED(s.dtype, (fill_normal<T><<<1024, 256>>>((T *)x + i * L * heads * s.D, L * heads * s.D,
                                                              (s.first_id + i) * 16 + tensor)));
            return x;
        };
        q = master(s.H, 1);
        k = master(s.Hkv, 2);
        v = master(s.Hkv, 3);
        int block = s.block_size ? s.block_size : s.max_len, blocks = (s.max_len + block - 1) / block;
        table_width = blocks;
        cache_bytes = (size_t)s.n_seq * blocks * s.Hkv * block * s.D * bytes;
        kc = device(cache_bytes);
        vc = device(cache_bytes);
        if (s.block_size) { // a shuffled table
            table_host.resize(s.n_seq * blocks);
            for (size_t i = 0; i < table_host.size(); i++) table_host[i] = (int)i;
            srand(s.table_seed);
            for (size_t i = table_host.size() - 1; i > 0; i--) std::swap(table_host[i], table_host[rand() % (i + 1)]);
            table = (int *)device(table_host.size() * 4);
            CUDA(cudaMemcpy(table, table_host.data(), table_host.size() * 4, cudaMemcpyHostToDevice));
        }
        lens_dev = (int *)device(s.n_seq * 4);
        index = (int *)device(max_tokens * 12);
        qbuf = device(max_tokens * q_stride * bytes);
        kbuf = device(max_tokens * kv_stride * bytes);
        vbuf = device(max_tokens * kv_stride * bytes);
        out = device(max_tokens * q_stride * bytes);
        ref = (double *)device(max_tokens * s.H * s.D * 8);
        memset(&args, 0, sizeof args);
        args.dtype = s.dtype;
        args.n_seq = s.n_seq;
        args.n_heads = s.H;
        args.n_kv_heads = s.Hkv;
        args.head_dim = s.D;
        args.causal = s.causal;
        args.append = 1;
        args.q = qbuf;
        args.out = out;
        args.k_new = kbuf;
        args.v_new = vbuf;
        args.k_cache = kc;
        args.v_cache = vc;
        args.q_token_stride = args.out_token_stride = q_stride;
        args.k_token_stride = args.v_token_stride = kv_stride;
        args.q_head_stride = args.out_head_stride = args.k_head_stride = args.v_head_stride = head_stride;
        args.cache_max_len = s.max_len;
        args.block_table = table;
        args.block_size = s.block_size;
        args.seq_lens_device = lens_dev;
        workspace_bytes = attention_workspace_bytes(&args);
        workspace = device(workspace_bytes);
        CUDA(cudaMemset(workspace, 0, workspace_bytes));
        args.workspace = workspace;
        args.workspace_bytes = workspace_bytes;
    }
    ~Model() {
        for (void *p : {(void *)q, (void *)k, (void *)v, (void *)kc, (void *)vc, (void *)workspace, (void *)qbuf,
                        (void *)kbuf, (void *)vbuf, (void *)out, (void *)ref, (void *)table, (void *)rows,
                        (void *)lens_dev, (void *)index, (void *)start_dev})
            CUDA(cudaFree(p));
    }
    // Gives the sequences other rows of a larger table, in another order; an address from a row that no sequence has is
    // far outside the cache.
    void permute_table(int seed) {
        int n = 2 * s.n_seq + 1;
        std::vector<int> row(n), wide((size_t)n * table_width, 0x3fffffff);
        for (int i = 0; i < n; i++) row[i] = i;
        srand(seed);
        for (int i = n - 1; i > 0; i--) std::swap(row[i], row[rand() % (i + 1)]);
        for (int i = 0; i < s.n_seq; i++)
            memcpy(&wide[(size_t)row[i] * table_width], &table_host[(size_t)i * table_width], table_width * 4);
        CUDA(cudaFree(table));
        table = (int *)device(wide.size() * 4);
        rows = (int *)device(s.n_seq * 4);
        CUDA(cudaMemcpy(table, wide.data(), wide.size() * 4, cudaMemcpyHostToDevice));
        CUDA(cudaMemcpy(rows, row.data(), s.n_seq * 4, cudaMemcpyHostToDevice));
        args.block_table = table;
        args.block_rows = rows;
    }
    // Decode may have up to n new tokens per sequence from here on.
    void allow_new(int n) {
        args.n_new = n;
        start_dev = (int *)device((s.n_seq + 1) * 4);
        args.q_start_device = start_dev;
        CUDA(cudaFree(workspace));
        args.workspace_bytes = workspace_bytes = attention_workspace_bytes(&args);
        args.workspace = workspace = device(workspace_bytes);
        CUDA(cudaMemset(workspace, 0, workspace_bytes));
    }
    static char *device(size_t n) {
        char *p;
        CUDA(cudaMalloc(&p, n + 256));
        CUDA(cudaMemset(p, 0xff, n + 256)); // NaN in all three types
        return p;
    }

    // Tokens of this call: counts[i] new ones of sequence i.
    int tokens(const std::vector<int> &counts, std::vector<int> *seq, std::vector<int> *pos,
               std::vector<int> *sees) const {
        for (int i = 0; i < s.n_seq; i++)
            for (int j = 0; j < counts[i]; j++) {
                seq->push_back(i);
                pos->push_back(lens[i] + j);
                sees->push_back(s.causal ? lens[i] + j + 1 : lens[i] + counts[i]);
            }
        return (int)seq->size();
    }

    int call(const std::vector<int> &counts, bool decode, bool host_lens) { // runs the library; nothing is compared
        std::vector<int> seq, pos, sees, start(1, 0);
        int n = tokens(counts, &seq, &pos, &sees);
        for (int c : counts) start.push_back(start.back() + c);
        CUDA(cudaMemcpy(index, seq.data(), n * 4, cudaMemcpyHostToDevice));
        CUDA(cudaMemcpy(index + n, pos.data(), n * 4, cudaMemcpyHostToDevice));
        CUDA(cudaMemcpy(index + 2 * n, sees.data(), n * 4, cudaMemcpyHostToDevice));
        CUDA(cudaMemcpy(lens_dev, lens.data(), s.n_seq * 4, cudaMemcpyHostToDevice));
        TYPED(s.dtype,
              (pack_rows<T><<<n, 256>>>((T *)qbuf, q_stride, head_stride, (T *)q, s.H, s.D, L, index, index + n),
               pack_rows<T><<<n, 256>>>((T *)kbuf, kv_stride, head_stride, (T *)k, s.Hkv, s.D, L, index, index + n),
               pack_rows<T><<<n, 256>>>((T *)vbuf, kv_stride, head_stride, (T *)v, s.Hkv, s.D, L, index, index + n)));
        CUDA(cudaMemset(out, 0xff, max_tokens * q_stride * bytes));
        args.q_start = start.data();
        if (args.n_new > 1)
            CUDA(cudaMemcpy(start_dev, start.data(), start.size() * sizeof(int), cudaMemcpyHostToDevice));
        args.seq_lens = host_lens ? lens.data() : nullptr;
        char *held = nullptr;
        if (stream) {
            size_t size = (size_t)n * q_stride * bytes;
            held = device(size);
            CUDA(cudaMemcpy(held, qbuf, size, cudaMemcpyDeviceToDevice));
            CUDA(cudaMemset(qbuf, 0xff, size));
            CUDA(cudaDeviceSynchronize());
            copy_late<<<8, 256, 0, stream>>>((uint4 *)qbuf, (uint4 *)held, size / 16);
        }
        int status = decode ? attention_decode(&args, stream) : attention_prefill(&args, 0);
        CUDA(cudaGetLastError());
        CUDA(cudaDeviceSynchronize());
        CUDA(cudaFree(held));
        return status;
    }

    // One call with its comparison; afterwards the sequences are longer. Decode if every sequence has one new token.
    void step(const std::vector<int> &counts, int mode = 0,
              bool compare = true) { // mode 1: prefill even for one token, 2: decode without host lengths
        bool decode = mode != 1;
        for (int c : counts) decode = decode && (c == 1 || args.n_new > 1);
        if (call(counts, decode, mode != 2)) {
            fail("%s", attention_error());
            return;
        }
        if (compare) check(counts, (char *)k, (char *)v, s.Hkv);
        for (int i = 0; i < s.n_seq; i++) lens[i] += counts[i];
    }
    void step(int count, int mode = 0, bool compare = true) {
        step(std::vector<int>(s.n_seq, count), mode, compare);
    }

    // What a first step of n tokens, or of so many of each sequence, leaves in the cache, without the step.
    void fill(int n) {
        fill(std::vector<int>(s.n_seq, n));
    }
    void fill(const std::vector<int> &n) {
        dim3 grid(std::max(*std::max_element(n.begin(), n.end()), 1), s.n_seq);
        CUDA(cudaMemcpy(lens_dev, n.data(), s.n_seq * 4, cudaMemcpyHostToDevice));
        int block = s.block_size ? s.block_size : s.max_len;
        TYPED(s.dtype,
              (fill_cache<T><<<grid, 256>>>((T *)kc, (T *)k, s.Hkv, s.D, L, block, table_width, table, lens_dev),
               fill_cache<T><<<grid, 256>>>((T *)vc, (T *)v, s.Hkv, s.D, L, block, table_width, table, lens_dev)));
        lens = n;
    }

    // The output of the last call (lens: those before it) against the reference with the given master K and V.
    void check(const std::vector<int> &counts, const char *mk, const char *mv, int heads) {
        std::vector<int> seq, pos, sees;
        int n = tokens(counts, &seq, &pos, &sees);
        double scale = args.scale != 0 ? args.scale : 1.0 / sqrt((double)s.D);
        TYPED(s.dtype, (reference<T><<<dim3(n, s.H), 128>>>(ref, (T *)q, (T *)mk, (T *)mv, s.H, heads, s.D, L, index,
                                                            index + n, index + 2 * n, scale)));
        std::vector<double> r((size_t)n * s.H * s.D);
        CUDA(cudaMemcpy(r.data(), ref, r.size() * 8, cudaMemcpyDeviceToHost));
        read_out(n);
        for (int t = 0; t < n; t++)
            for (int h = 0; h < s.H; h++)
                for (int d = 0; d < head_stride; d++) {
                    double got = value(t, h, d), want = d < s.D ? r[((size_t)t * s.H + h) * s.D + d] : 0;
                    if (d >= s.D) {
                        if (!isnan(got)) fail("written outside a row: token %d head %d", t, h);
                        continue;
                    }
                    double error = fabs(got - want), bound = bound_abs(s.dtype) + bound_rel(s.dtype) * fabs(want);
                    g_result->sum += error;
                    g_result->n++;
                    if (!(error <= g_result->largest)) g_result->largest = error;
                    if (!(error / bound <= g_result->fraction)) g_result->fraction = error / bound;
                    if (!(error <= bound))
                        fail("sequence %d position %d head %d dim %d: got %.7g, expected %.7g, bound %.2g", seq[t],
                             pos[t], h, d, got, want, bound);
                }
    }
    void read_out(int n) {
        out_host.resize((size_t)n * q_stride * bytes);
        CUDA(cudaMemcpy(out_host.data(), out, out_host.size(), cudaMemcpyDeviceToHost));
    }
    double value(int t, int h, int d) const {
        size_t i = t * q_stride + h * head_stride + d;
        if (s.dtype == ATTENTION_F32) return ((const float *)out_host.data())[i];
        if (s.dtype == ATTENTION_F16) return (double)__half2float(((const __half *)out_host.data())[i]);
        return (double)__bfloat162float(((const __nv_bfloat16 *)out_host.data())[i]);
    }
    std::vector<char> row(int t) const {
        return std::vector<char>(out_host.begin() + t * q_stride * bytes,
                                 out_host.begin() + (t + 1) * q_stride * bytes);
    }

    // The cache holds exactly the master's K and V up to lens, and poison from there on.
    void check_cache() {
        std::vector<char> c(cache_bytes), m((size_t)s.n_seq * L * s.Hkv * s.D * bytes), poison(s.D * bytes, (char)0xff);
        int block = s.block_size ? s.block_size : s.max_len;
        for (int which = 0; which < 2; which++) {
            CUDA(cudaMemcpy(c.data(), which ? vc : kc, c.size(), cudaMemcpyDeviceToHost));
            CUDA(cudaMemcpy(m.data(), which ? v : k, m.size(), cudaMemcpyDeviceToHost));
            for (int i = 0; i < s.n_seq; i++)
                for (int p = 0; p < s.max_len; p++)
                    for (int h = 0; h < s.Hkv; h++) {
                        int b = s.block_size ? table_host[i * table_width + p / block] : i;
                        const char *got = c.data() + (((size_t)b * s.Hkv + h) * block + p % block) * s.D * bytes;
                        const char *want =
                            p < lens[i] ? m.data() + ((i * L + p) * s.Hkv + h) * s.D * bytes : poison.data();
                        if (memcmp(got, want, s.D * bytes)) {
                            fail("%s cache of sequence %d, position %d, head %d: %s", which ? "V" : "K", i, p, h,
                                 p < lens[i] ? "not what was appended" : "written");
                            return;
                        }
                    }
        }
    }
    std::vector<char> snapshot() {
        std::vector<char> c(2 * cache_bytes);
        CUDA(cudaMemcpy(c.data(), kc, cache_bytes, cudaMemcpyDeviceToHost));
        CUDA(cudaMemcpy(c.data() + cache_bytes, vc, cache_bytes, cudaMemcpyDeviceToHost));
        return c;
    }
};

// --------------------------------------------------------------------------------------------------------------------
// Cache

static void
test_cache_prefill_then_single_tokens(int dtype) { // 64 then 10 x 1 equals 74 at once, and both the reference
    Model a({dtype, 2, 8, 2, 128, 96}, 74), b({dtype, 2, 8, 2, 128, 96}, 74);
    a.step(74);
    std::vector<double> whole;
    for (int i = 0; i < 2; i++)
        for (int p = 64; p < 74; p++)
            for (int h = 0; h < 8; h++)
                for (int d = 0; d < 128; d++) whole.push_back(a.value(i * 74 + p, h, d));
    b.step(64);
    for (int j = 0; j < 10; j++) {
        b.step(1);
        for (int i = 0; i < 2; i++)
            for (int h = 0; h < 8; h++)
                for (int d = 0; d < 128; d++) {
                    double x = whole[((i * 10 + j) * 8 + h) * 128 + d], y = b.value(i, h, d);
                    if (!(fabs(x - y) <= 2 * (bound_abs(dtype) + bound_rel(dtype) * fabs(x))))
                        fail("token %d: %g at once, %g one by one", 64 + j, x, y);
                }
    }
    a.check_cache();
    b.check_cache();
}

static void test_cache_first_call_on_empty(int dtype) {
    for (int n : {1, 5, 40}) {
        Model m({dtype, 3, 4, 2, 64, 48}, n);
        m.step(n);
        m.check_cache();
    }
}

static void test_cache_first_token_by_decode(int dtype) {
    Model m({dtype, 3, 4, 2, 64, 48}, 1);
    for (int i = 0; i < 20; i++) m.step(1);
    m.check_cache();
}

static void test_cache_one_step_on_256(int dtype) {
    for (int mode : {0, 1, 2}) {
        Model m({dtype, 1, 8, 8, 128, 300}, 256);
        m.step(256);
        m.step(1, mode);
        m.check_cache();
    }
}

static void test_cache_batch_heads_length(int dtype) {
    int shapes[3][3] = {{1, 8, 32}, {4, 8, 128}, {8, 16, 256}};
    for (auto &x : shapes) {
        Model m({dtype, x[0], x[1], x[1], 128, x[2] + 8}, x[2]);
        m.step(x[2]);
        for (int i = 0; i < 3; i++) m.step(1);
        m.check_cache();
    }
}

static void test_cache_length_per_sequence(int dtype) {
    std::vector<int> lens = {1, 700, 64, 255, 256, 257, 0, 31, 513, 128};
    Model m({dtype, (int)lens.size(), 8, 2, 128, 720}, 700);
    m.step(lens);
    for (int i = 0; i < 4; i++) m.step(1, i % 2 * 2);
    m.check_cache();
}

static void test_cache_lengths_around_tile_edges(int dtype) {
    std::vector<int> edges = {1,   2,   7,   8,   15,  16,  17,  31,  32,  33,  63,  64,  65,
                              79,  80,  81,  95,  96,  97,  127, 128, 129, 191, 192, 193, 255,
                              256, 257, 319, 320, 321, 383, 384, 385, 511, 512, 513};
    for (int D : {64, 96, 128}) {
        Model m({dtype, (int)edges.size(), 2, 1, D, 600}, 513);
        m.step(edges);                         // prefill of each length
        for (int i = 0; i < 3; i++) m.step(1); // decode at each length and past each edge
        m.step(std::vector<int>(edges.rbegin(), edges.rend()), 0, true);
        m.check_cache();
    }
}

static void test_cache_long_steps_memory_unchanged(int dtype) {
    int steps = g_small ? 20 : 1100;
    Model m({dtype, 2, 8, 2, 64, steps + 8}, 4);
    m.step(4);
    size_t before, after, total;
    m.step(1);
    CUDA(cudaMemGetInfo(&before, &total));
    for (int i = 0; i < steps; i++) m.step(1, i % 2 * 2, i % 50 == 0 || i > steps - 10);
    CUDA(cudaMemGetInfo(&after, &total));
    if (before != after) fail("device memory changed: %zu bytes free before, %zu after %d steps", before, after, steps);
    m.check_cache();
}

static void test_cache_overflow_refused(int dtype) {
    Model m({dtype, 2, 4, 2, 64, 40}, 41);
    m.step({40, 12});
    std::vector<char> before = m.snapshot();
    auto refused = [&](const std::vector<int> &counts, bool decode, const char *numbers) {
        int status = m.call(counts, decode, true);
        if (!status)
            fail("an overflow was accepted");
        else if (!strstr(attention_error(), numbers))
            fail("'%s' does not say '%s'", attention_error(), numbers);
        m.read_out(2);
        for (char c : m.out_host)
            if (c != (char)0xff) {
                fail("a refused call wrote output");
                break;
            }
        if (m.snapshot() != before) fail("a refused call wrote to the cache");
    };
    refused({1, 1}, true, "40 positions + 1 new > cache_max_len 40");
    refused({0, 29}, false, "12 positions + 29 new > cache_max_len 40");
    // Without host lengths the kernel refuses: nothing written for sequence 0 but NaN, sequence 1 as ever.
    if (m.call({1, 1}, true, false)) fail("%s", attention_error());
    m.read_out(2);
    for (int h = 0; h < 4; h++)
        for (int d = 0; d < 64; d++) {
            if (!isnan(m.value(0, h, d))) fail("a sequence that overflows on the device has an output");
            if (isnan(m.value(1, h, d))) fail("its neighbour has none");
        }
    m.lens[1]++;
    m.check_cache();
}

static void test_cache_block_table_same_bits(int dtype) {
    std::vector<int> lens = {300, 1, 77, 128, 129};
    for (int D : {64, 128})
        for (int block : {16, 48, 64, 192, 256, 400}) {
            Model a({dtype, 5, 8, 2, D, 400}, 300);
            Shape s = a.s;
            s.block_size = block;
            Model b(s, 300);
            auto both = [&](const std::vector<int> &c, int mode) {
                a.step(c, mode);
                b.step(c, mode);
                if (a.out_host != b.out_host) fail("blocks of %d: not the bits of a contiguous cache", block);
            };
            both(lens, 0);
            both({7, 70, 3, 1, 64}, 0);
            for (int i = 0; i < 3; i++) both({1, 1, 1, 1, 1}, 0);
            b.check_cache();
        }
}

// Sequences that have other rows of the block table, or without one other blocks: the bits of sequences in order.
static void block_rows_same_bits(const Shape &shape, const std::vector<std::vector<int>> &prompts, bool no_table) {
    int longest = 1;
    for (auto &c : prompts)
        for (int n : c) longest = std::max(longest, n);
    Model a(shape, longest), b(shape, longest);
    if (no_table) { // a table of blocks that hold whole sequences is what block_rows is without one
        b.args.block_table = nullptr;
        b.args.block_rows = b.table;
    } else
        b.permute_table(2);
    for (int i = 0; i < (int)prompts.size() + 3; i++) {
        std::vector<int> counts = i < (int)prompts.size() ? prompts[i] : std::vector<int>(shape.n_seq, 1);
        b.args.kv_stable = i % 2;
        a.step(counts, 0, i % 2 == 0);
        b.step(counts, 0, false);
        int n = 0;
        for (int c : counts) n += c;
        a.read_out(n);
        b.read_out(n);
        if (a.out_host != b.out_host)
            fail("head_dim %d, blocks of %d, call %d: not the bits of sequences in order", shape.D, shape.block_size,
                 i);
    }
    b.check_cache();
}
static void test_cache_block_rows_same_bits(int dtype) {
    std::vector<std::vector<int>> prompts = {{300, 1, 77, 128, 129}, {7, 70, 3, 1, 64}};
    for (int D : {64, 96, 128})
        for (int block : {16, 64, 400}) {
            Shape s = {dtype, 5, 8, 2, D, 400};
            s.block_size = block;
            block_rows_same_bits(s, prompts, false);
            if (block == s.max_len) block_rows_same_bits(s, prompts, true);
        }
    Shape s = {dtype, 300, 4, 2, 64, 40}; // more than a launch of prefill has, and than a warp of decode has at once
    s.block_size = 16;
    std::vector<int> c(300);
    for (int i = 0; i < 300; i++) c[i] = i * 7 % 21;
    block_rows_same_bits(s, {c}, false);
}

static void test_cache_without_append(int dtype) { // K and V already in the cache: same bits as with append
    Model a({dtype, 2, 8, 2, 128, 200}, 130), b({dtype, 2, 8, 2, 128, 200}, 130);
    a.step({130, 40});
    a.step({1, 1});
    std::vector<char> out = a.out_host;
    b.step({130, 40});
    b.step({1, 1});
    b.lens = {130, 40};
    b.args.append = 0;
    b.args.k_new = b.args.v_new = nullptr;
    b.step({1, 1});
    if (b.out_host != out) fail("decode without append differs");
    b.lens = {100, 0};
    b.step({31, 41}, 1);
}

static void test_cache_long_context(int dtype) {
    int length = g_small ? 600 : 131072;
    Model m({dtype, 1, 2, 1, 128, length}, length);
    m.args.seq_lens = nullptr;
    int first = length - 140;
    for (int done = 0; done < first;) {
        int n = first - done < 16384 ? first - done : 16384;
        m.step({n}, 0, false);
        done += n;
    }
    m.step({129}, 0);
    for (int i = 0; i < 5; i++) m.step(1);
    if (g_small) return;
    for (int context : {4096, 8191, 8192, 8193, 32767, 32768, 32769, 65536}) { // where the length of KV splits changes
        m.lens = {context - 1};
        m.step(1);
    }
}

// --------------------------------------------------------------------------------------------------------------------
// Grouped queries

static void gqa(int dtype, int H, int Hkv,
                int D) { // against K and V repeated for every query head; with cache, prefill then decode
    Model m({dtype, 2, H, Hkv, D, 300}, 150);
    char *rk = Model::device(2ll * m.L * H * D * m.bytes), *rv = Model::device(2ll * m.L * H * D * m.bytes);
    TYPED(dtype, (repeat_heads<T><<<2 * m.L, 256>>>((T *)rk, (T *)m.k, H, Hkv, D),
                  repeat_heads<T><<<2 * m.L, 256>>>((T *)rv, (T *)m.v, H, Hkv, D)));
    for (auto counts : std::vector<std::vector<int>>{{33, 150}, {1, 1}, {100, 20}, {1, 1}, {1, 1}}) {
        bool decode = counts[0] == 1;
        if (m.call(counts, decode, true)) {
            fail("%s", attention_error());
            break;
        }
        m.check(counts, rk, rv, H);
        for (int i = 0; i < 2; i++) m.lens[i] += counts[i];
    }
    m.check_cache();
    CUDA(cudaFree(rk));
    CUDA(cudaFree(rv));
}

// More KV splits than up to 131,072 positions, of as many query tiles as two blocks share each.
static void test_cache_beyond_131072(int dtype) {
    const int length = 131080, heads = 128;
    Model m({dtype, 1, heads, heads, 64, length}, 1);
    size_t row = 64 * m.bytes;
    for (int h = 0; h < heads; h++) {
        CUDA(cudaMemcpy2D(m.kc + h * length * row, row, m.k + h * row, heads * row, row, length - 1,
                          cudaMemcpyDeviceToDevice));
        CUDA(cudaMemcpy2D(m.vc + h * length * row, row, m.v + h * row, heads * row, row, length - 1,
                          cudaMemcpyDeviceToDevice));
    }
    for (int have : {131071, 131072, length - 1}) {
        m.lens = {have};
        m.step(1);
    }
}

static void test_gqa_ratios(int dtype) {
    for (int ratio : {1, 2, 4, 7, 8, 14, 16, 32})
        for (int D : {64, 128}) gqa(dtype, ratio * 2, 2, D);
}
static void test_gqa_14_to_2_heads(int dtype) {
    gqa(dtype, 14, 2, 64);
    gqa(dtype, 14, 2, 128);
}
static void test_gqa_28_to_4_heads(int dtype) {
    gqa(dtype, 28, 4, 128);
}
static void test_gqa_32_heads_of_96(int dtype) {
    gqa(dtype, 32, 32, 96);
    gqa(dtype, 32, 8, 96);
}
static void test_gqa_cache_a_quarter(int dtype) {
    Model a({dtype, 1, 32, 8, 128, 64}, 1), b({dtype, 1, 32, 32, 128, 64}, 1);
    if (attention_cache_bytes(&a.args) * 4 != attention_cache_bytes(&b.args))
        fail("cache at 32:8 is %zu bytes, at 32:32 %zu", attention_cache_bytes(&a.args),
             attention_cache_bytes(&b.args));
    if (attention_cache_bytes(&a.args) != a.cache_bytes)
        fail("attention_cache_bytes %zu, expected %zu", attention_cache_bytes(&a.args), a.cache_bytes);
}

// --------------------------------------------------------------------------------------------------------------------
// Causality

static void test_causal_against_reference(int dtype) {
    for (int n : {1, 16, 128, 130, 512}) {
        if (g_small && n > 200) continue;
        Model m({dtype, 2, 8, 2, 128, n}, n);
        m.step(n, 1);
    }
}

static void test_causal_mask_visible_in_v(int dtype) { // later V marked with 1e4: rows before it keep their bits
    int n = 300;
    Model a({dtype, 1, 4, 2, 128, n}, n), b({dtype, 1, 4, 2, 128, n}, n);
    a.step(n);
    size_t row = (size_t)b.s.Hkv * b.s.D;
    for (int cut : {1, 63, 64, 100, 128, 129, 255}) {
        std::vector<float> mark((n - cut) * row, 1e4f);
        if (dtype == ATTENTION_F32)
            CUDA(cudaMemcpy(b.v + cut * row * 4, mark.data(), mark.size() * 4, cudaMemcpyHostToDevice));
        else {
            std::vector<uint16_t> m16(mark.size(), dtype == ATTENTION_F16 ? 0x70e2 : 0x461c); // 1e4, near enough
            CUDA(cudaMemcpy(b.v + cut * row * 2, m16.data(), m16.size() * 2, cudaMemcpyHostToDevice));
        }
        b.lens = {0};
        b.step({n}, 0, false);
        b.read_out(n);
        for (int t = 0; t < cut; t++)
            if (a.row(t) != b.row(t)) {
                fail("row %d sees V of %d and later", t, cut);
                break;
            }
        for (int h = 0; h < 4; h++)
            if (!(b.value(n - 1, h, 0) > 10)) fail("the mark cannot be seen at all");
        TYPED(dtype, (cudaMemcpy(b.v, a.v, n * row * sizeof(T), cudaMemcpyDeviceToDevice)));
    }
}

static void test_causal_with_cache_offset(int dtype) {
    for (int before : {1, 37, 64, 128, 200})
        for (int n : {2, 64, 90, 128, 131}) {
            Model m({dtype, 1, 4, 2, 128, before + n}, 200);
            m.step(before);
            m.step(n);
        }
}

static void test_not_causal(int dtype) {
    for (int n : {1, 3, 64, 128, 150, 257}) {
        Shape s = {dtype, 2, 8, 2, 128, 2 * n};
        s.causal = 0;
        Model m(s, n);
        m.step(n, 1);
        m.step(n);
        m.check_cache();
    }
}

static void test_scale_huge(int dtype) { // a weight of 1 and nothing else, whatever the largest score is
    for (int D : {64, 96, 128}) {
        Model m({dtype, 2, 8, 2, D, 400}, 300);
        m.step(300, 0, false);
        m.args.scale = 1e9f;
        for (int i = 0; i < 3; i++) m.step(1);
    }
}

static void test_scale_given(int dtype) {
    Model m({dtype, 2, 8, 2, 64, 200}, 150);
    m.args.scale = 0.05f;
    m.step(150);
    m.step(1);
}

// --------------------------------------------------------------------------------------------------------------------
// Together

static void test_together(int dtype) { // causal + GQA + ragged + cache: prefill in chunks, then 50 steps
    for (int D : {64, 96, 128}) {
        Shape s = {dtype, 5, 16, 4, D, 500};
        s.block_size = D == 96 ? 32 : 0;
        Model m(s, 200);
        for (auto c : std::vector<std::vector<int>>{{200, 3, 64, 0, 129}, {17, 150, 64, 1, 0}, {100, 100, 1, 128, 5}})
            m.step(c);
        for (int i = 0; i < 50; i++) m.step(1, i % 2 * 2);
        m.check_cache();
    }
}

static void test_together_300_sequences(int dtype) { // more than one launch holds
    Model m({dtype, 300, 4, 2, 64, 40}, 20);
    std::vector<int> c(300);
    for (int i = 0; i < 300; i++) c[i] = i * 7 % 21;
    m.step(c);
    for (int i = 0; i < 2; i++) m.step(1);
    m.check_cache();
}

// --------------------------------------------------------------------------------------------------------------------
// Refusals

static void test_refusals(int dtype) {
    Model m({dtype, 2, 8, 2, 64, 64}, 8);
    m.step(8);
    std::vector<char> before = m.snapshot();
    std::vector<int> start = {0, 4, 8}, lens = {8, 8};
    CUDA(cudaMemset(m.out, 0xff, 8));
    struct Bad {
        const char *says;
        std::function<void(AttentionArgs &)> change;
        int entries;
    }; // entries: 1 prefill, 2 decode, 4 sizes
    static int bad_start[3] = {0, 5, 4}, none[3] = {4, 4, 4}, negative[2] = {8, -3}, full[2] = {8, 64},
               below[3] = {-1, 4, 8};
    std::vector<Bad> all = {
        {"dtype 7", [](AttentionArgs &a) { a.dtype = 7; }, 7},
        {"n_seq 0", [](AttentionArgs &a) { a.n_seq = 0; }, 7},
        {"n_seq -2", [](AttentionArgs &a) { a.n_seq = -2; }, 7},
        {"n_heads 0", [](AttentionArgs &a) { a.n_heads = 0; }, 7},
        {"n_heads -8", [](AttentionArgs &a) { a.n_heads = -8; }, 7},
        {"n_kv_heads 0", [](AttentionArgs &a) { a.n_kv_heads = 0; }, 7},
        {"n_kv_heads -1", [](AttentionArgs &a) { a.n_kv_heads = -1; }, 7},
        {"n_heads 8 is not a multiple of n_kv_heads 3", [](AttentionArgs &a) { a.n_kv_heads = 3; }, 7},
        {"n_heads 8 is not a multiple of n_kv_heads 16", [](AttentionArgs &a) { a.n_kv_heads = 16; }, 7},
        {"head_dim 80", [](AttentionArgs &a) { a.head_dim = 80; }, 7},
        {"head_dim 0", [](AttentionArgs &a) { a.head_dim = 0; }, 7},
        {"head_dim -64", [](AttentionArgs &a) { a.head_dim = -64; }, 7},
        {"head_dim 256", [](AttentionArgs &a) { a.head_dim = 256; }, 7},
        {"cache_max_len 0", [](AttentionArgs &a) { a.cache_max_len = 0; }, 7},
        {"cache_max_len -5", [](AttentionArgs &a) { a.cache_max_len = -5; }, 7},
        {"scale -1", [](AttentionArgs &a) { a.scale = -1; }, 3},
        {"scale", [](AttentionArgs &a) { a.scale = NAN; }, 3},
        {"scale", [](AttentionArgs &a) { a.scale = INFINITY; }, 3},
        {"q is NULL", [](AttentionArgs &a) { a.q = nullptr; }, 3},
        {"out is NULL", [](AttentionArgs &a) { a.out = nullptr; }, 3},
        {"k_cache is NULL", [](AttentionArgs &a) { a.k_cache = nullptr; }, 3},
        {"v_cache is NULL", [](AttentionArgs &a) { a.v_cache = nullptr; }, 3},
        {"k_new is NULL", [](AttentionArgs &a) { a.k_new = nullptr; }, 3},
        {"v_new is NULL", [](AttentionArgs &a) { a.v_new = nullptr; }, 3},
        {"multiple of 16 bytes", [](AttentionArgs &a) { a.q = (const char *)a.q + 4; }, 3},
        {"q_token_stride 0", [](AttentionArgs &a) { a.q_token_stride = 0; }, 3},
        {"q_head_stride 63", [](AttentionArgs &a) { a.q_head_stride = 63; }, 3},
        {"out_token_stride -8", [](AttentionArgs &a) { a.out_token_stride = -8; }, 3},
        {"out_head_stride 0", [](AttentionArgs &a) { a.out_head_stride = 0; }, 3},
        {"k_token_stride 3", [](AttentionArgs &a) { a.k_token_stride = 3; }, 3},
        {"k_head_stride 0", [](AttentionArgs &a) { a.k_head_stride = 0; }, 3},
        {"v_token_stride 3", [](AttentionArgs &a) { a.v_token_stride = 3; }, 3},
        {"v_head_stride -1", [](AttentionArgs &a) { a.v_head_stride = -1; }, 3},
        {"block_size 0",
         [](AttentionArgs &a) {
             a.block_table = (const int *)a.q;
             a.block_size = 0;
         },
         3},
        {"block_size 24",
         [](AttentionArgs &a) {
             a.block_table = (const int *)a.q;
             a.block_size = 24;
         },
         3},
        {"block_rows is at", [](AttentionArgs &a) { a.block_rows = (const int *)((const char *)a.q + 2); }, 3},
        {"seq_lens[1] is -3", [](AttentionArgs &a) { a.seq_lens = negative; }, 3},
        {"64 positions + ", [](AttentionArgs &a) { a.seq_lens = full; }, 3},
        {"q_start is NULL", [](AttentionArgs &a) { a.q_start = nullptr; }, 1},
        {"seq_lens is NULL", [](AttentionArgs &a) { a.seq_lens = nullptr; }, 1},
        {"q_start[2] is 4, expected at least q_start[1] = 5", [](AttentionArgs &a) { a.q_start = bad_start; }, 1},
        {"q_start[0] is -1", [](AttentionArgs &a) { a.q_start = below; }, 1},
        {"0 new tokens", [](AttentionArgs &a) { a.q_start = none; }, 1},
        {"seq_lens_device is NULL", [](AttentionArgs &a) { a.seq_lens_device = nullptr; }, 2},
        {"workspace is NULL", [](AttentionArgs &a) { a.workspace = nullptr; }, 2},
        {"workspace of 100 bytes", [](AttentionArgs &a) { a.workspace_bytes = 100; }, 2},
    };
    for (auto &bad : all)
        for (int entry : {1, 2, 4}) {
            if (!(bad.entries & entry)) continue;
            AttentionArgs a = m.args;
            a.q_start = start.data();
            a.seq_lens = lens.data();
            bad.change(a);
            bool refused = entry == 1 ? attention_prefill(&a, 0) != 0
                           : entry == 2
                               ? attention_decode(&a, 0) != 0
                               : attention_workspace_bytes(&a) == SIZE_MAX && attention_cache_bytes(&a) == SIZE_MAX;
            if (!refused)
                fail("entry %d accepted: %s", entry, bad.says);
            else if (!strstr(attention_error(), bad.says))
                fail("'%s' does not say '%s'", attention_error(), bad.says);
        }
    if (!attention_prefill(nullptr, 0) || !attention_decode(nullptr, 0) ||
        attention_workspace_bytes(nullptr) != SIZE_MAX)
        fail("args NULL accepted");
    CUDA(cudaDeviceSynchronize());
    if (m.snapshot() != before) fail("a refused call wrote to the cache");
    CUDA(cudaGetLastError());
}

// --------------------------------------------------------------------------------------------------------------------
// Bits

static void test_two_runs_same_bits(int dtype) {
    std::vector<char> first[2];
    for (int run = 0; run < 2; run++) {
        Model m({dtype, 4, 32, 8, 128, 900}, 400);
        m.step({400, 1, 130, 257}, 0, run == 0);
        m.read_out(788);
        std::vector<char> bits = m.out_host;
        for (int i = 0; i < 3; i++) {
            m.step(1, 0, run == 0);
            m.read_out(4);
            bits.insert(bits.end(), m.out_host.begin(), m.out_host.end());
        }
        first[run] = bits;
    }
    if (first[0] != first[1]) fail("two runs differ");
}

static void test_alone_and_among_16_same_bits(int dtype) {
    std::vector<int> lens = {5, 300, 64, 2000, 128, 1000, 77, 1, 513, 256, 255, 1500, 40, 700, 333, 90, 411};
    Model all({dtype, 17, 8, 2, 128, 2048}, 2000);
    all.step(lens, 0, false);
    all.read_out(10000 < all.max_tokens ? 10000 : (int)all.max_tokens);
    std::vector<char> prefill = all.out_host, decode[3];
    for (int i = 0; i < 3; i++) {
        all.step(1, 0, i == 0);
        all.read_out(17);
        decode[i] = all.out_host;
    }
    int start = 0;
    for (int i = 0; i < 17; i++) {
        Shape s = {dtype, 1, 8, 2, 128, 2048};
        s.first_id = i;
        Model one(s, 2000);
        one.step({lens[i]}, 0, false);
        one.read_out(lens[i]);
        size_t bytes = one.q_stride * one.bytes;
        if ((start + lens[i]) * bytes <= prefill.size() &&
            memcmp(one.out_host.data(), prefill.data() + start * bytes, lens[i] * bytes))
            fail("prefill of sequence %d alone differs", i);
        start += lens[i];
        for (int j = 0; j < 3; j++) {
            one.step({1}, 0, false);
            one.read_out(1);
            if (memcmp(one.out_host.data(), decode[j].data() + i * bytes, bytes))
                fail("step %d of sequence %d alone differs", j, i);
        }
    }
}

// Equal lengths, so that a few blocks share each query tile: between groups of 8 KV splits and elsewhere. Alone, a
// sequence's splits are a block's each.
static void test_shared_query_tiles_same_bits(int dtype) {
    // sequences, KV heads, head_dim, positions, query heads of a KV head, block size. Those of 33: on an H200 a query
    // tile for every block, whose new token is in one of its first steps.
    int shapes[][6] = {{12, 8, 128, 2046, 2, 0}, {12, 8, 64, 2174, 2, 0},   {12, 8, 96, 1300, 2, 0},
                       {6, 8, 64, 4094, 2, 0},   {16, 4, 128, 3070, 2, 0},  {12, 8, 64, 4090, 2, 0},
                       {12, 8, 64, 2044, 16, 0}, {12, 8, 128, 2044, 1, 64}, {12, 8, 96, 4000, 3, 48},
                       {33, 8, 64, 126, 2, 0},   {33, 8, 64, 254, 2, 0},    {33, 8, 64, 382, 2, 32},
                       {33, 8, 96, 62, 2, 0},    {33, 8, 128, 126, 2, 0}};
    for (int shape = 0; shape < (g_small ? 2 : (int)(sizeof shapes / sizeof *shapes)); shape++) {
        const int *x = shapes[shape];
        Shape s = {dtype, x[0], x[4] * x[1], x[1], x[2], x[3] + 4};
        s.block_size = x[5];
        Model all(s, 1);
        s.n_seq = 1;
        s.first_id = x[0] - 1;
        Model one(s, 1);
        all.fill(x[3]);
        one.fill(x[3]);
        for (int i = 0; i < (g_small ? 1 : 4); i++) {
            all.step(1);
            one.step(1);
            if (all.row(x[0] - 1) != one.row(0))
                fail("step %d after %d positions, group %d, head_dim %d: alone it differs", i, x[3], x[4], x[2]);
        }
    }
}

// Several new tokens of a sequence in one decode call: each has the bits of a call with it alone, and K and V of all of
// them are in the cache afterwards.
static void new_tokens_same_bits(const Shape &shape, const std::vector<int> &lens,
                                 const std::vector<std::vector<int>> &calls) {
    Model all(shape, 8), one(shape, 8);
    all.allow_new(8);
    all.fill(lens);
    one.fill(lens);
    for (int call = 0; call < (int)calls.size(); call++) {
        const std::vector<int> &counts = calls[call];
        int most = *std::max_element(counts.begin(), counts.end()), n = 0;
        all.args.n_new = std::max(most, 2);
        all.args.kv_stable = call % 2;
        one.lens = all.lens;
        if (call % 2) CUDA(cudaStreamCreate(&all.stream));
        all.step(counts, call % 2 * 2);
        if (call % 2) CUDA(cudaStreamDestroy(all.stream));
        all.stream = 0;
        for (int j = 0; j < most; j++) {
            one.step(1, 0, false);
            one.read_out(shape.n_seq);
            n = 0;
            for (int i = 0; i < shape.n_seq; n += counts[i++])
                if (j < counts[i] && all.row(n + j) != one.row(i))
                    fail("%d:%d heads of %d, blocks of %d, call %d, sequence %d of %d after %d positions, new token %d "
                         "of %d: not the bits of a call with it alone",
                         shape.H, shape.Hkv, shape.D, shape.block_size, call, i, shape.n_seq, one.lens[i] - 1 - j, j,
                         counts[i]);
        }
    }
    all.check_cache();
}

static void test_new_tokens_same_bits(int dtype) {
    if (dtype == ATTENTION_F32) { // has one only
        Model m({dtype, 2, 8, 2, 64, 64}, 8);
        m.fill(20);
        m.allow_new(4);
        if (!m.call({4, 1}, true, true))
            fail("float32 takes several new tokens");
        else if (!strstr(attention_error(), "n_new 4 in float32"))
            fail("'%s' does not say 'n_new 4 in float32'", attention_error());
        return;
    }
    std::vector<int> lens = {63, 64, 65, 127, 128, 129, 255, 256, 257, 1000, 4090, 4097, 0, 60, 4085};
    std::vector<std::vector<int>> calls(5, std::vector<int>(lens.size()));
    for (int i = 0; i < (int)lens.size(); i++) {
        calls[0][i] = i % 8 + 1;
        calls[1][i] = 8;
        calls[2][i] = 2;
        calls[3][i] = i * 5 % 4; // none of some
        calls[4][i] = i == 9 ? 5 : 1;
    }
    if (g_small) {
        for (int D : {64, 96, 128}) {
            Shape s = {dtype, 4, 8, 2, D, 288};
            s.block_size = D == 128 ? 0 : 16;
            new_tokens_same_bits(s, {60, 129, 0, 255}, {{8, 2, 1, 3}, {1, 0, 8, 8}});
        }
        return;
    }
    for (int D : {64, 96, 128})
        for (int block : {0, 16, 64})
            for (int group : {1, 3, 4, 8, 16}) {
                Shape s = {dtype, (int)lens.size(), 2 * group, 2, D, 4160};
                s.block_size = block;
                new_tokens_same_bits(s, lens, calls);
            }
    for (int length : {100, 2000, 8186, 65530}) { // alone, and where KV splits get longer
        Shape s = {dtype, 1, 32, 8, 128, length + 32};
        new_tokens_same_bits(s, {length}, {{8}, {5}, {2}});
    }
    std::vector<int> many(70), counts(70), ones(70, 1); // more than a warp has at once
    for (int i = 0; i < 70; i++) {
        many[i] = i * 37 % 700;
        counts[i] = i * 3 % 8 + 1;
    }
    Shape s = {dtype, 70, 8, 2, 128, 720};
    s.block_size = 64;
    new_tokens_same_bits(s, many, {counts, ones});
}

static void test_new_tokens_with_nan(int dtype) { // of a later token nothing reaches an earlier one
    if (dtype == ATTENTION_F32) return;
    for (int D : {64, 96, 128})
        for (int length : {60, 124, 300}) {
            Shape s = {dtype, 1, 8, 2, D, 320};
            Model all(s, 8), one(s, 8);
            all.allow_new(8);
            all.fill(length);
            one.fill(length);
            // V of token 5, KV head 1, one dim, and K of token 7, KV head 0
            CUDA(cudaMemset(all.v + (((size_t)(length + 5) * 2 + 1) * D + 9) * 2, 0xff, 2));
            CUDA(cudaMemset(all.k + (size_t)(length + 7) * 2 * D * 2, 0xff, 2));
            all.step({8}, 0, false);
            all.read_out(8);
            for (int j = 0; j < 8; j++) {
                one.step(1);
                for (int h = 0; h < 8; h++)
                    for (int d = 0; d < D; d++) {
                        bool nan = h / 4 ? j >= 5 : j == 7;
                        if (nan ? !isnan(all.value(j, h, d)) : all.value(j, h, d) != one.value(0, h, d))
                            fail("head_dim %d, %d positions, new token %d head %d dim %d: got %g, expected %g", D,
                                 length, j, h, d, all.value(j, h, d), nan ? NAN : one.value(0, h, d));
                    }
            }
            all.check_cache();
        }
}

static void test_new_tokens_overflow(int dtype) {
    if (dtype == ATTENTION_F32) return;
    Model m({dtype, 3, 8, 2, 64, 128}, 8), one({dtype, 3, 8, 2, 64, 128}, 8);
    m.allow_new(8);
    m.fill({125, 128, 50});
    one.fill({125, 119, 50});
    std::vector<int> start = {0, 4, 6, 11};
    if (!m.call({4, 2, 5}, true, true))
        fail("an overflow was accepted");
    else if (!strstr(attention_error(), "125 positions + 4 new > cache_max_len 128"))
        fail("'%s' does not say the numbers", attention_error());
    if (m.call({4, 2, 5}, true, false)) fail("%s", attention_error());
    m.read_out(11);
    for (int j = 0; j < 5; j++) {
        if (j < 3) one.step(1, 0, false);
        one.read_out(3);
        if (j < 3 && (m.row(j) != one.row(0) || m.row(6 + j) != one.row(2))) fail("new token %d of those with room", j);
        for (int t : {3, 4, 5})
            for (int h = 0; h < 8; h++)
                for (int d = 0; d < 64; d++)
                    if (!isnan(m.value(t, h, d))) fail("new token %d overflows and has an output", t);
    }
    m.lens = {128, 128, 55};
    m.check_cache();
    struct Bad {
        const char *says;
        std::function<void(AttentionArgs &)> change;
    };
    static int host_lens[3] = {1, 1, 1}, more[4] = {0, 9, 10, 11};
    std::vector<Bad> all = {
        {"n_new 9, expected 0 to 8", [](AttentionArgs &a) { a.n_new = 9; }},
        {"n_new -1, expected 0 to 8", [](AttentionArgs &a) { a.n_new = -1; }},
        {"n_tokens -1", [](AttentionArgs &a) { a.n_tokens = -1; }},
        {"causal 0 with n_new 8", [](AttentionArgs &a) { a.causal = 0; }},
        {"q_start_device is at", [](AttentionArgs &a) { a.q_start_device = nullptr; }},
        {"sequence 0 has the tokens from q_start 0 to 9, expected up to 8 of 24",
         [](AttentionArgs &a) { a.q_start = more; }},
        {"sequence 2 has the tokens from q_start 6 to 11, expected up to 8 of 10",
         [](AttentionArgs &a) { a.n_tokens = 10; }},
    };
    for (auto &bad : all) {
        AttentionArgs a = m.args;
        a.q_start = start.data();
        a.seq_lens = host_lens;
        bad.change(a);
        if (!attention_decode(&a, 0))
            fail("accepted: %s", bad.says);
        else if (!strstr(attention_error(), bad.says))
            fail("'%s' does not say '%s'", attention_error(), bad.says);
    }
    m.check_cache();
}

static void test_new_tokens_graph_replay(int dtype) { // how many tokens a sequence has is read on the device
    if (dtype == ATTENTION_F32) return;
    Shape s = {dtype, 4, 8, 2, 128, 700};
    Model m(s, 8), eager(s, 8);
    m.allow_new(8);
    eager.allow_new(8);
    m.fill({300, 126, 0, 511});
    eager.fill({300, 126, 0, 511});
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    CUDA(cudaStreamCreate(&stream));
    m.args.seq_lens = nullptr;
    CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    if (attention_decode(&m.args, stream)) fail("%s", attention_error());
    CUDA(cudaStreamEndCapture(stream, &graph));
    CUDA(cudaGraphInstantiate(&exec, graph, 0));
    for (auto &counts : std::vector<std::vector<int>>{{1, 1, 1, 1}, {8, 8, 8, 8}, {3, 0, 5, 1}, {1, 4, 2, 7}}) {
        int n = 0;
        for (int c : counts) n += c;
        eager.step(counts);
        CUDA(cudaMemcpy(m.qbuf, eager.qbuf, n * m.q_stride * m.bytes, cudaMemcpyDeviceToDevice));
        CUDA(cudaMemcpy(m.kbuf, eager.kbuf, n * m.kv_stride * m.bytes, cudaMemcpyDeviceToDevice));
        CUDA(cudaMemcpy(m.vbuf, eager.vbuf, n * m.kv_stride * m.bytes, cudaMemcpyDeviceToDevice));
        CUDA(cudaMemcpy(m.lens_dev, m.lens.data(), 16, cudaMemcpyHostToDevice));
        CUDA(cudaMemcpy(m.start_dev, eager.start_dev, 20, cudaMemcpyDeviceToDevice));
        CUDA(cudaMemset(m.out, 0xff, m.max_tokens * m.q_stride * m.bytes));
        CUDA(cudaDeviceSynchronize());
        CUDA(cudaGraphLaunch(exec, stream));
        CUDA(cudaStreamSynchronize(stream));
        m.read_out(n);
        if (m.out_host != eager.out_host) fail("replay differs from a plain call of %d tokens", n);
        for (int i = 0; i < 4; i++) m.lens[i] += counts[i];
    }
    m.check_cache();
    CUDA(cudaGraphExecDestroy(exec));
    CUDA(cudaGraphDestroy(graph));
    CUDA(cudaStreamDestroy(stream));
}

static void test_graph_replay(int dtype) { // a captured step, replayed with lengths that grow on the device
    Model m({dtype, 3, 8, 2, 128, 700}, 300), eager({dtype, 3, 8, 2, 128, 700}, 300);
    std::vector<int> lens = {300, 250, 20};
    m.step(lens);
    eager.step(lens);
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    CUDA(cudaStreamCreate(&stream));
    m.args.seq_lens = nullptr;
    CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < 2; i++) // twice over the same token: the second replaces the first
        if (attention_decode(&m.args, stream)) fail("%s", attention_error());
    CUDA(cudaStreamEndCapture(stream, &graph));
    CUDA(cudaGraphInstantiate(&exec, graph, 0));
    for (int step = 0; step < 300; step++) {
        eager.step(1, 0, step % 60 == 0);
        if (step % 60 && g_small) {
            for (int &x : m.lens) x++;
            continue;
        }
        // the eager model's packed inputs are this step's
        CUDA(cudaMemcpy(m.qbuf, eager.qbuf, 3 * m.q_stride * m.bytes, cudaMemcpyDeviceToDevice));
        CUDA(cudaMemcpy(m.kbuf, eager.kbuf, 3 * m.kv_stride * m.bytes, cudaMemcpyDeviceToDevice));
        CUDA(cudaMemcpy(m.vbuf, eager.vbuf, 3 * m.kv_stride * m.bytes, cudaMemcpyDeviceToDevice));
        CUDA(cudaMemcpy(m.lens_dev, m.lens.data(), 12, cudaMemcpyHostToDevice));
        CUDA(cudaDeviceSynchronize());
        CUDA(cudaGraphLaunch(exec, stream));
        CUDA(cudaStreamSynchronize(stream));
        m.read_out(3);
        eager.read_out(3);
        if (!g_small && m.out_host != eager.out_host) {
            fail("step %d: replay differs from a plain call", step);
            break;
        }
        for (int &x : m.lens) x++;
    }
    CUDA(cudaGraphExecDestroy(exec));
    CUDA(cudaGraphDestroy(graph));
    CUDA(cudaStreamDestroy(stream));
}

static void test_kv_stable_before_inputs_are_written(int dtype) {
    for (int D : {64, 96, 128})
        for (int kv_stable : {1, 0}) {
            Shape s = {dtype, 5, 16, 4, D, 1000};
            s.block_size = D == 64 ? 1000 : D == 96 ? 32 : 0;
            Model m(s, 700);
            m.step({700, 250, 20, 1, 640});
            m.args.kv_stable = kv_stable;
            CUDA(cudaStreamCreate(&m.stream));
            for (int i = 0; i < 6; i++) m.step(1, 2);
            CUDA(cudaStreamDestroy(m.stream));
            m.stream = 0;
            m.check_cache();
        }
}

static void test_kv_stable_chain(int dtype) { // calls that overlap: layers with caches of their own, one workspace
    int layers = 4, steps = g_small ? 3 : 20;
    std::vector<Model *> m, plain;
    for (int i = 0; i < 2 * layers; i++) {
        Shape s = {dtype, 3, 8, 2, 128, 2300};
        s.first_id = i % layers * 3;
        (i < layers ? m : plain).push_back(new Model(s, 2000));
        (i < layers ? m : plain).back()->step({2000, 150, 33}, 0, false);
    }
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    CUDA(cudaStreamCreate(&stream));
    CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (Model *x : m) {
        AttentionArgs a = x->args;
        a.seq_lens = nullptr;
        a.kv_stable = 1;
        a.workspace = m[0]->workspace;
        if (attention_decode(&a, stream)) fail("%s", attention_error());
    }
    CUDA(cudaStreamEndCapture(stream, &graph));
    CUDA(cudaGraphInstantiate(&exec, graph, 0));
    for (int step = 0; step < steps; step++) {
        for (int i = 0; i < layers; i++) {
            Model &a = *m[i], &b = *plain[i];
            b.step(1, 0, step == 0);
            CUDA(cudaMemcpy(a.qbuf, b.qbuf, 3 * a.q_stride * a.bytes, cudaMemcpyDeviceToDevice));
            CUDA(cudaMemcpy(a.kbuf, b.kbuf, 3 * a.kv_stride * a.bytes, cudaMemcpyDeviceToDevice));
            CUDA(cudaMemcpy(a.vbuf, b.vbuf, 3 * a.kv_stride * a.bytes, cudaMemcpyDeviceToDevice));
            CUDA(cudaMemcpy(a.lens_dev, a.lens.data(), 12, cudaMemcpyHostToDevice));
            CUDA(cudaMemset(a.out, 0xff, 3 * a.q_stride * a.bytes));
            for (int &x : a.lens) x++;
        }
        CUDA(cudaDeviceSynchronize());
        CUDA(cudaGraphLaunch(exec, stream));
        CUDA(cudaStreamSynchronize(stream));
        for (int i = 0; i < layers; i++) {
            m[i]->read_out(3);
            plain[i]->read_out(3);
            if (m[i]->out_host != plain[i]->out_host) fail("step %d, layer %d differs from a call alone", step, i);
        }
    }
    CUDA(cudaGraphExecDestroy(exec));
    CUDA(cudaGraphDestroy(graph));
    CUDA(cudaStreamDestroy(stream));
    for (int i = 0; i < layers; i++) {
        m[i]->check_cache();
        delete m[i];
        delete plain[i];
    }
}

struct Test {
    const char *name;
    void (*run)(int dtype);
    int small;
}; // small: sized for compute-sanitizer
static const Test TESTS[] = {
#define T(name, small) {#name, name, small}
    T(test_cache_prefill_then_single_tokens, 1),
    T(test_cache_first_call_on_empty, 1),
    T(test_cache_first_token_by_decode, 1),
    T(test_cache_one_step_on_256, 1),
    T(test_cache_batch_heads_length, 0),
    T(test_cache_length_per_sequence, 0),
    T(test_cache_lengths_around_tile_edges, 0),
    T(test_cache_long_steps_memory_unchanged, 1),
    T(test_cache_overflow_refused, 1),
    T(test_cache_block_table_same_bits, 0),
    T(test_cache_block_rows_same_bits, 0),
    T(test_cache_without_append, 1),
    T(test_cache_long_context, 1),
    T(test_cache_beyond_131072, 0),
    T(test_gqa_ratios, 0),
    T(test_gqa_14_to_2_heads, 1),
    T(test_gqa_28_to_4_heads, 1),
    T(test_gqa_32_heads_of_96, 0),
    T(test_gqa_cache_a_quarter, 1),
    T(test_causal_against_reference, 1),
    T(test_causal_mask_visible_in_v, 1),
    T(test_causal_with_cache_offset, 0),
    T(test_not_causal, 0),
    T(test_scale_given, 1),
    T(test_scale_huge, 1),
    T(test_together, 0),
    T(test_together_300_sequences, 1),
    T(test_refusals, 1),
    T(test_two_runs_same_bits, 0),
    T(test_alone_and_among_16_same_bits, 0),
    T(test_shared_query_tiles_same_bits, 1),
    T(test_new_tokens_same_bits, 1),
    T(test_new_tokens_with_nan, 1),
    T(test_new_tokens_overflow, 1),
    T(test_new_tokens_graph_replay, 1),
    T(test_graph_replay, 0),
    T(test_kv_stable_before_inputs_are_written, 0),
    T(test_kv_stable_chain, 1),
#undef T
};

int main(int argc, char **argv) {
    const char *only = getenv("ONLY");
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--small"))
            g_small = 1;
        else if (!strcmp(argv[i], "--only") && i + 1 < argc)
            only = argv[++i];
        else {
            fprintf(stderr, "usage: %s [--small] [--only TEXT]\n", argv[0]);
            return 2;
        }
    }
    int devices = 0;
    cudaError_t e = cudaGetDeviceCount(&devices);
    bool gpu = e == cudaSuccess && devices > 0;
    int passed = 0, failed = 0, skipped = 0;
    std::vector<Result> results;
    for (const Test &test : TESTS) {
        if (only && !strstr(test.name, only)) continue;
        if (g_small && !test.small) continue;
        if (!gpu) {
            printf("SKIP %s: no GPU (%s)\n", test.name, e != cudaSuccess ? cudaGetErrorString(e) : "0 devices");
            skipped++;
            continue;
        }
        for (int dtype : {ATTENTION_F32, ATTENTION_F16, ATTENTION_BF16}) {
            results.push_back({test.name, dtype, 0, 0, 0, 0, false, ""});
            g_result = &results.back();
            test.run(dtype);
            if (g_result->failed) {
                printf("FAIL %s %s: %s\n", test.name, DTYPES[dtype], g_result->why.c_str());
                failed++;
            } else {
                printf("ok %s %s\n", test.name, DTYPES[dtype]);
                passed++;
            }
            fflush(stdout);
        }
    }
    if (gpu) {
        printf("\n%-42s %-5s %11s %11s %11s %22s %9s\n", "against float64", "dtype", "elements", "largest", "mean",
               "bound", "of bound");
        for (const Result &r : results)
            if (r.n)
                printf("%-42s %-5s %11lld %11.2e %11.2e %10.0e + %.1e|ref| %8.2f%s\n", r.name.c_str(), DTYPES[r.dtype],
                       r.n, r.largest, r.sum / r.n, bound_abs(r.dtype), bound_rel(r.dtype), r.fraction,
                       r.failed ? "  FAIL" : "");
    }
    printf("%d passed, %d failed, %d skipped\n", passed, failed, skipped);
    return failed != 0;
}
