#include "perplexity.h"

#include <math.h>

#include "../generate/generate.h"
#include "../generate/sampler.h"
#include "../logits.h"

bool perplexity_run(Model *m, const TokenList *ids, size_t n_bytes, int stride, FILE *out, Error *err) {
    int window = m->kv.max_len;
    bool ok = true;
    double sum = 0, squares = 0, start = clock_seconds();
    size_t scored = 0;
    for (size_t begin = 0, done = 1; ok && done < ids->n; begin += (size_t)stride) {
        size_t end = begin + (size_t)window < ids->n ? begin + (size_t)window : ids->n;
        kv_reset(&m->kv, 0);
        ok = done - 1 == begin || model_prefill(m, 0, ids->ids + begin, (int)(done - 1 - begin), 0, err);
        while (ok && done < end) { // the logits of token done-1 predict token done
            int rows = end - done < LOGIT_ROWS ? (int)(end - done) : LOGIT_ROWS;
            ok = model_prefill(m, 0, ids->ids + done - 1, rows, rows, err) && m->engine->read_logits(m, err);
            for (int r = 0; ok && r < rows; r++, done++) {
                const float *logits = m->logits + (size_t)r * (size_t)m->config.vocab_size;
                double nll = log_sum_exp(logits, m->config.vocab_size) - (double)logits[ids->ids[done]];
                if (!isfinite(nll)) ok = fail(err, "position %zu: the logits are not finite", done - 1);
                sum += nll;
                squares += nll * nll;
                scored++;
            }
            if (model_interrupted(m)) ok = fail_interrupted(err);
        }
    }
    if (ok) {
        double mean = sum / (double)scored, variance = squares / (double)scored - mean * mean;
        double error = exp(mean) * sqrt((variance > 0 ? variance : 0) / (double)scored),
               elapsed = clock_seconds() - start;
        fprintf(out,
                "perplexity %.4f ± %.4f over %zu tokens, %.4f bits per byte; window %d, stride %d, %.0f tokens/s\n",
                exp(mean), error, scored, sum / log(2) / (double)n_bytes, window, stride, (double)scored / elapsed);
    }
    return ok;
}
