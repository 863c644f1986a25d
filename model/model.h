// The map: everything a model is made of. T tokens of one call, row-major everywhere, float = float32.
#ifndef MODEL_H
#define MODEL_H

#include <signal.h>
#include <stdint.h>

#include "../tokenizer/chat.h"
#include "../tokenizer/error.h"
#include "batch.h"
#include "file/safetensors.h"
#include "generate/sampler.h"
#include "kv_cache.h"

enum { MAX_EOS = 16, MAX_HEAD_DIM = 256 };

typedef enum { ROPE_DEFAULT, ROPE_LLAMA3, ROPE_LINEAR } RopeType;
// Inputs of products and the cache: in bf16 (f16 for F16 weights), in float32, or in bf16 but for prompts, whose inputs
// of the layers' products are e4m3 codes with a scale for each row.
// The last: the engine's own.
typedef enum { PRECISION_BF16, PRECISION_F32, PRECISION_FP8, PRECISION_DEFAULT } Precision;
enum { N_PRECISIONS = PRECISION_FP8 + 1 };
extern const char *const precision_names[N_PRECISIONS]; // as --precision takes them

typedef struct {
    int dim, hidden_dim, n_layers, n_heads, n_kv_heads, head_dim, vocab_size, max_seq_len;
    int q_dim, kv_dim, group; // n_heads × head_dim, n_kv_heads × head_dim, query heads per K/V head
    float norm_eps, rope_theta;
    RopeType rope_type;
    float rope_factor;                                                            // not ROPE_DEFAULT
    float rope_low_freq_factor, rope_high_freq_factor, rope_original_max_seq_len; // ROPE_LLAMA3 only
    bool tie_embeddings;
    int bos_id; // -1: none
    int n_eos, eos_ids[MAX_EOS];
    ChatFormat chat_format;
    bool chat_checked; // whether chat_format is known to be what the checkpoint's template writes, or was asked for
    const char *chat_system; // the template's own system message, at most 64 KiB; NULL: none. In model->file.header
    const char *chat_date;   // the date that the template writes, or "today"; NULL: CHAT_DATE. In model->file.header
    int chat_bos_id;         // what the template writes first; -1: nothing
} Config;

enum { WHOLE_ROW = 1 << 30 }; // a Matrix.group: more than any row has

// A weight matrix [rows][cols], row-major, as the engine that computes with it holds it.
typedef struct {
    const void *data;  // [rows][cols] of dtype; of DTYPE_U8 [rows][cols / 2], two int4 to a byte
    const void *scale; // [rows][(cols + group - 1) / group] of scale_dtype: what codes are multiplied by (quant.h)
    DType dtype, scale_dtype;
    int rows, cols;
    int all_rows; // GPU engines: of the whole matrix, of which `rows` are a GPU's or a slab's
    int group;    // columns that share a scale, WHOLE_ROW where a row has one; 0: data are numbers, there are no scales
} Matrix;

static inline bool matrix_is_quantised(const Matrix *m) {
    return m->group != 0;
}

typedef struct {
    const float *attention_norm; // [dim]
    Matrix wq;                   // [q_dim][dim]
    Matrix wk, wv;               // [kv_dim][dim]
    Matrix wo;                   // [dim][q_dim]
    const float *ffn_norm;       // [dim]
    Matrix w1, w3;               // [hidden_dim][dim]: gate, up
    Matrix w2;                   // [dim][hidden_dim]: down
} LayerWeights;

typedef struct {
    // In the file: of the layers' matrices (of those that are not quantised, where there are any), and of the two that
    // may have others. What an engine makes of each is the Matrix's own.
    DType dtype, embeddings_dtype, output_dtype;
    Matrix tok_embeddings; // [vocab_size][dim]
    LayerWeights *layers;  // [n_layers]
    const float *norm;     // [dim]
    Matrix output;         // [vocab_size][dim]; the embeddings again when tied
    uint64_t bytes;        // of all tensors, norms and weights, where the engine holds them
} Weights;

// Rows [first, first + n) of a matrix, or of the heads.
typedef struct {
    int first, n;
} Rows;

// What a GPU holds of a model that several compute together (parallel/shard.h).
typedef struct {
    int rank, count;
    Rows kv_heads;           // of the cache; of wk and wv, each of head_dim rows; of wq, each of group × head_dim
    Rows dim, hidden, vocab; // of wo and w2; of w1 and w3; of the output matrix
} Shard;

typedef struct Model Model;

// A Model.kv_memory: as much as all slots can use, or the start is refused.
#define KV_MEMORY_ALL UINT64_MAX

// What computes the function. One table each; model.c chooses.
typedef struct {
    const char *name;
    Precision precision; // where none is asked for
    // Whether it can compute this model on this machine; if not, err says why.
    bool (*usable)(const Model *model, Error *err);
    // Brings the weights to where the engine computes, and allocates its state and the cache, for as many slots and
    // positions as model->kv says: how many pages there are is the engine's to choose (kv_init).
    bool (*open)(Model *model, Error *err);
    void (*close)(Model *model);
    // Computes at most model->max_rows rows, decoded ones first, writes their keys and values after model->kv.len
    // positions of each sequence, in the pages that it has, and leaves the most likely token after each row with logits
    // in model->argmax, from first_logit on: those before it are of parts of the same batch. model_forward has reserved
    // the pages, and counts the positions.
    bool (*forward)(Model *model, const Batch *part, int first_logit, Error *err);
    // Brings the logits of the last batch's rows with logits to model->logits.
    bool (*read_logits)(Model *model, Error *err);
    // Draws ids [n] from rows of the last batch's logits, which are finite, as sample_token does.
    bool (*sample)(Model *model, const SampleRow *rows, int n, int *ids, Error *err);
    // Host memory for copies of pages, which the engine copies to and from fast. NULL: there is none.
    void *(*allocate_host)(size_t bytes);
    void (*free_host)(void *memory);
    // Copies so many pages of the cache to the host, or back: host[i] is [2][n_layers][page], the keys and values of
    // page pages[i]. It comes after what the engine was asked for before, and before what it will be asked for.
    bool (*copy_pages)(Model *model, const int *pages, int n, void *const *host, bool to_host, Error *err);
    // Rows that a step may have, its sequences' candidates among them, so that every row has the bits that it has in a
    // run whose steps have n_slots rows at most, one of each sequence; 0: no more than these, and err says why. Before
    // open. NULL: bits always depend on how many rows there are.
    int (*step_rows)(const Model *model, int n_slots, Error *err);
} Engine;

// The keys and values of a sequence that has left its slot, for the model that they are of; {0} is empty.
typedef struct {
    int len;      // positions
    int n;        // pages
    void **pages; // [n], each as Engine.copy_pages has it
} SavedPages;

struct Model {
    Config config;
    Weights weights;
    Tokenizer tokenizer;
    KVCache kv;
    uint64_t kv_memory;  // bytes for keys and values together, to be set before a start; 0: the engine's default
    int gpus;            // that compute it together, to be set before an engine is chosen; 0: one, or none
    bool by_processes;   // all but one of these are other processes' (parallel/processes.h); to be set with gpus
    bool one_gpu;        // for tests: the parts of so many GPUs are all on the first
    bool gathers_only;   // for tests: as if kernels did not reach other GPUs' memory
    uint64_t gpu_memory; // for tests: bytes that a GPU has free, at most; 0: what it has
    Shard shard;         // what this one holds: of a model that is started
    void **spare_pages;  // [n_spare_pages]: host memory that saved pages gave back, for those to come
    int n_spare_pages, max_spare_pages;
    float *rope_freq;          // [head_dim/2], radians per position
    int argmax[MAX_STEP_ROWS]; // of each row with logits the most likely token, the lowest id of equals; -1: not all
                               // are finite
    float *logits;             // [model_logit_rows][vocab_size], the engine's, in host memory
    Precision precision;       // PRECISION_DEFAULT until an engine is chosen
    const Engine *engine;
    int max_rows;          // rows that the engine computes at once: a longer batch comes in parts
    int sequences;         // that a step of this run may have; 0: as many as there are slots. See model_sequences
    int step_rows;         // rows that may be decoded in a step of this run, at most MAX_STEP_ROWS; 0: one for each
                           // sequence. See model_step_rows
    bool speculates;       // steps may have several rows of a sequence
    bool two_passes;       // the engine reads the weights twice for decoded rows beside rows of prompts
    Error not_used;        // why a faster engine than this was not chosen; empty: none is faster, or one was named
    void *state;           // the engine's own buffers
    SafeTensors file;      // open until model_close; n_tensors is 0 for a synthetic model
    uint64_t seed;         // of a synthetic model's weights
    char note[64];         // how the engine computes, human-readable
    bool verbose;          // GPU engines: launch parameters on standard error, of the first prompt and the first step
    uint64_t buffer_bytes; // of the engine's activations and logits
    // "loading" counts bytes, "prefilling" tokens. NULL: nobody watches.
    void (*progress)(const char *what, uint64_t done, uint64_t total);
    // Engine cpu tells what each matrix is multiplied by: x [n][matrix->cols]. NULL: nobody watches.
    void (*watch_inputs)(void *context, const Matrix *matrix, const float *x, int n);
    void *watch_context;
    const volatile sig_atomic_t *interrupted; // non-zero: stop loading and computing. NULL: never
};

// Chooses an engine for that precision (NULL: the fastest here), unless one is chosen already. For several GPUs, and
// for FP8 products, which take FP8 weights alone: one that computes on GPUs, or none.
bool model_choose(Model *model, const char *engine, Precision precision, Error *err);
// The same, and gives it a cache of n_slots sequences of at most max_len positions. (kv.n_pages says for how many
// positions of all of them there is memory.)
bool model_start(Model *model, const char *engine, Precision precision, int n_slots, int max_len, Error *err);
// Bytes of keys and values of a page, of all layers; element_bytes: of each number.
uint64_t cache_page_bytes(const Config *c, size_t element_bytes);
// For an engine that opens: sets up the slots' lengths and pages, of keys and values of so many bytes each, and
// kv.bytes. pages: how many, where kv_memory is 0; 0: as many as the slots can use.
bool model_size_cache(Model *model, size_t element_bytes, int64_t pages, Error *err);
// Undoes a start, also one that failed: the engine gives everything back, and may be started with another cache.
void model_stop(Model *model);
// Computes a batch: reserves its pages, or refuses it where a slot has no room or too few pages are free, cuts it into
// parts, reports progress, stops when interrupted (the parts before stay in the cache) and counts the positions. Every
// way to an engine leads through here.
bool model_forward(Model *model, const Batch *batch, Error *err);
// For one sequence: n tokens after those in its slot, the logits of the last n_logits wanted.
bool model_prefill(Model *model, int slot, const int *tokens, int n, int n_logits, Error *err);
bool model_decode(Model *model, int slot, int token, Error *err);
// A slot's keys and values leave it: to host memory, and the slot is empty. False: out of memory, or the engine failed;
// the slot is as before. *saved was empty.
bool model_save_pages(Model *model, int slot, SavedPages *saved, Error *err);
// Brings them to a slot that is empty, which needs kv_pages(saved->len) free pages; *saved is empty then. What is
// computed after that has the same bits as if they had never left.
bool model_restore_pages(Model *model, int slot, SavedPages *saved, Error *err);
// What was saved is not needed any more. (Before the model is stopped.)
void model_free_pages(Model *model, SavedPages *saved);
// Bytes of keys and values of one page, of all layers, once it is started.
static inline uint64_t model_page_bytes(const Model *model) {
    return model->kv.bytes / (uint64_t)model->kv.n_pages;
}
void model_close(Model *model);
// Whether its weights are made from a seed (synthetic.h) and not a file's.
static inline bool model_is_synthetic(const Model *model) {
    return model->file.n_tensors == 0;
}
// Engine fused adds up in another order where steps may have many sequences: which order is a matter of the run, so
// that no sequence's numbers depend on how many others it has beside it, or on how many candidates are verified.
static inline int model_sequences(const Model *model) {
    return model->sequences ? model->sequences : model->kv.n_slots;
}
static inline int model_step_rows(const Model *model) {
    return model->step_rows ? model->step_rows : model_sequences(model);
}
// Rows with logits that a batch may have.
static inline int model_logit_rows(const Model *model) {
    int64_t positions = (int64_t)model->kv.n_slots * model->kv.max_len;
    int rows = model->kv.n_slots > LOGIT_ROWS ? model->kv.n_slots : LOGIT_ROWS;
    if (model_step_rows(model) > rows) rows = model_step_rows(model);
    return positions < rows ? (int)positions : rows;
}
static inline bool model_interrupted(const Model *model) {
    return model->interrupted && *model->interrupted;
}
// q_dim, kv_dim and group from the other dimensions.
void config_derive(Config *c);
// freq [head_dim/2], radians per position: rope.c.
void rope_frequencies(const Config *c, float *freq);
bool model_has_engine(const char *name);
// A list of the engines in this build, for messages.
const char *model_engines(void);

// Bytes of a row's numbers or codes, and of a whole matrix with its scales.
uint64_t matrix_row_bytes(const Matrix *m);
uint64_t matrix_bytes(const Matrix *m);

// Whether any matrix is quantised.
bool weights_are_quantised(const Model *model);
// The first matrix of the layers that is not; NULL: all are.
const Matrix *weights_numbers(const Model *model);
// The first matrix of the layers that is not FP8, and its name in the file; NULL: all are.
enum { MATRIX_NAME = 32 };
const Matrix *weights_not_fp8(const Model *model, char name[MATRIX_NAME]);
// The dtypes in the file, for people: "BF16", or "BF16, embeddings F16, output F32" where they differ; of quantised
// layers "int4:128", or "int4:128 and others".
enum { WEIGHTS_DTYPES = 64 };
const char *weights_dtypes(const Model *model, char text[WEIGHTS_DTYPES]);

// One tensor: a matrix, or a norm.
typedef struct {
    const char *name;   // in the file
    Matrix *matrix;     // its rows and cols are set, data and dtype the visitor's to set; NULL: a norm
    const float **norm; // [n], the visitor's to set; NULL: a matrix
    int n;
} Weight;
uint64_t weight_bytes(const Weight *w);
// Bytes of the matrices that one step of so many sequences reads at least: all weights once, but of the embedding table
// one row for each sequence, unless it is the output matrix too. (Norms, 0.01 % of a model, are not counted.)
uint64_t weights_read(const Model *model, int batch);

// The way through all tensors, in file order. (checkpoint.c checks shapes with it, engines bind addresses with it, so
// that no list of tensors is written twice.)
typedef bool WeightVisitor(void *context, const Weight *weight, Error *err);
bool weights_visit(Model *model, WeightVisitor *visit, void *context, Error *err);

#endif
