// LLaMA 3's pre-token pattern, as tiktoken and tokenizers match it.
#ifndef SPLIT_H
#define SPLIT_H

#include <stddef.h>
#include <stdint.h>

// Length of the first pre-token of text[0..n), n > 0 and text valid UTF-8.
size_t split_next(const uint8_t *text, size_t n);

#endif
