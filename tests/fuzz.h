// What the fuzz targets share: a safetensors file in memory, and the vocabulary of 256 bytes and three special tokens.
#ifndef FUZZ_H
#define FUZZ_H

#define _GNU_SOURCE // memfd_create: to be included first

#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "../tokenizer/tokenizer.h"

enum { FUZZ_VOCAB = 259, FUZZ_VOCAB_BYTES = 298, FUZZ_MAX_DATA = 1 << 20 };

// Stops with a message where a promise is broken: libFuzzer keeps the input.
#define MUST(condition) \
    do { \
        if (!(condition)) { \
            fprintf(stderr, "%s:%d: broken: %s\n", __FILE__, __LINE__, #condition); \
            abort(); \
        } \
    } while (0)

// A failure says why, in one printable line; what worked says nothing.
__attribute__((unused)) static void must_explain(bool ok, const Error *err) {
    MUST(ok == !err->text[0]);
    for (const char *c = err->text; *c; c++) MUST((unsigned char)*c >= 0x20 && *c != 0x7F);
}

__attribute__((unused)) static void byte_tables(uint32_t *offsets, uint8_t *kind, uint8_t *bytes) {
    static const char *const special[] = {"<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"};
    uint32_t at = 0;
    for (int id = 0; id < FUZZ_VOCAB; id++) {
        offsets[id] = at;
        kind[id] = id >= 256 ? TOKEN_SPECIAL : TOKEN_MERGEABLE;
        if (id < 256) bytes[at++] = (uint8_t)id;
        for (const char *c = id < 256 ? "" : special[id - 256]; *c; c++) bytes[at++] = (uint8_t)*c;
    }
    offsets[FUZZ_VOCAB] = at;
    MUST(at == FUZZ_VOCAB_BYTES);
}

// Makes a file of the input and gives its path. The input is "r" and then the file itself, or a decimal number of bytes
// of data, a newline and a header: that is padded to 4096, and the data is zeros that end with a good tokenizer. "a"
// before the number: its last token is added and not special.
__attribute__((unused)) static const char *fuzz_file(const uint8_t *input, size_t n) {
    static int fd = -1;
    static char path[32];
    static uint8_t file[1 << 16], tail[4 * (FUZZ_VOCAB + 1) + FUZZ_VOCAB + FUZZ_VOCAB_BYTES];
    if (fd < 0) {
        MUST((fd = memfd_create("fuzz", 0)) >= 0);
        snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
        byte_tables((uint32_t *)tail, tail + 4 * (FUZZ_VOCAB + 1), tail + 4 * (FUZZ_VOCAB + 1) + FUZZ_VOCAB);
    }
    size_t length = 0, data = 0;
    if (n && input[0] == 'r') {
        length = n - 1;
        memcpy(file, input + 1, length);
    } else {
        size_t at = n && input[0] == 'a';
        tail[4 * (FUZZ_VOCAB + 1) + FUZZ_VOCAB - 1] = at ? TOKEN_ADDED : TOKEN_SPECIAL;
        while (at < n && input[at] >= '0' && input[at] <= '9' && data < FUZZ_MAX_DATA)
            data = data * 10 + (input[at++] - '0');
        at += at < n;
        length = (8 + n - at + 4095) / 4096 * 4096;
        for (int i = 0; i < 8; i++) file[i] = (uint8_t)((length - 8) >> 8 * i);
        memset(file + 8, ' ', length - 8);
        memcpy(file + 8, input + at, n - at);
    }
    MUST(ftruncate(fd, 0) == 0 && ftruncate(fd, (off_t)(length + data)) == 0);
    MUST(pwrite(fd, file, length, 0) == (ssize_t)length);
    if (data >= sizeof tail)
        MUST(pwrite(fd, tail, sizeof tail, (off_t)(length + data - sizeof tail)) == (ssize_t)sizeof tail);
    return path;
}

#endif
