#include "logits.h"

#include <math.h>

int argmax(const float *logits, int n) {
    int best = 0;
    for (int i = 1; i < n; i++)
        if (logits[i] > logits[best]) best = i;
    return best;
}

int find_not_finite(const float *logits, int n) {
    for (int i = 0; i < n; i++)
        if (!isfinite(logits[i])) return i;
    return -1;
}

double log_sum_exp(const float *logits, int n) {
    double max = (double)logits[argmax(logits, n)], sum = 0;
    for (int i = 0; i < n; i++) sum += exp((double)logits[i] - max);
    return max + log(sum);
}

void top_ids(const float *logits, int n, int k, int *ids) {
    int kept = 0;
    for (int i = 0; i < n; i++) {
        if (kept == k && logits[i] <= logits[ids[k - 1]]) continue;
        int at = kept < k ? kept++ : k - 1;
        for (; at > 0 && logits[i] > logits[ids[at - 1]]; at--) ids[at] = ids[at - 1];
        ids[at] = i;
    }
}
