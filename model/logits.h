// What is asked of a row of logits.
#ifndef LOGITS_H
#define LOGITS_H

// The largest logit; the lowest id among equals.
int argmax(const float *logits, int n);
// The position of the first NaN or Inf, or -1.
int find_not_finite(const float *logits, int n);
// log(sum(exp(logits))), in float64.
double log_sum_exp(const float *logits, int n);
// The k ids of the largest logits, largest first, lowest id first among equals. k is small.
void top_ids(const float *logits, int n, int k, int *ids);

#endif
