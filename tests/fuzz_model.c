// Fuzz target: the header, metadata and tensors of a model.bin.
#include "fuzz.h"

#include "../model/file/checkpoint.h"
#include "../model/model.h"

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t n) {
    if (n > 1 << 15) return 0;
    const char *path = fuzz_file(input, n);
    for (int vocab_only = 0; vocab_only < 2; vocab_only++) {
        Model m;
        Error err = {""};
        bool ok = checkpoint_open(&m, path, vocab_only, &err);
        must_explain(ok, &err);
        if (!ok) continue;
        const Config *c = &m.config;
        MUST(c->vocab_size == m.tokenizer.vocab_size && c->bos_id < c->vocab_size && c->n_eos <= MAX_EOS);
        MUST(c->n_layers == 0 || (c->dim > 0 && c->head_dim % 2 == 0 && c->n_heads == c->group * c->n_kv_heads));
        MUST(vocab_only || c->n_layers > 0);
        MUST(c->chat_bos_id >= -1 && c->chat_bos_id < c->vocab_size && c->chat_format <= CHAT_DEEPSEEK);
        MUST(!c->chat_system || strlen(c->chat_system) <= 1 << 16);
        MUST(!c->chat_date || strlen(c->chat_date) <= 1 << 16);
        MUST(c->rope_type == ROPE_DEFAULT || c->n_layers == 0 || c->rope_factor > 0);
        MUST(m.weights.embeddings_dtype <= DTYPE_F32);
        MUST(c->n_layers == 0 || weights_are_quantised(&m) ||
             (m.weights.dtype <= DTYPE_F32 && m.weights.output_dtype <= DTYPE_F32));
        MUST(m.weights.bytes <= m.file.data_bytes);
        model_close(&m);
    }
    return 0;
}
