// Reads a safetensors file: 8 bytes of header length, a JSON header, tensor data.
// https://github.com/huggingface/safetensors Stricter than the format: no duplicate keys, tensors without gap or
// overlap, nothing after the last.
#ifndef SAFETENSORS_H
#define SAFETENSORS_H

#include <stddef.h>
#include <stdint.h>
#include <time.h>

#include "../../tokenizer/error.h"

typedef enum {
    DTYPE_BF16,
    DTYPE_F16,
    DTYPE_F32,
    DTYPE_I32,
    DTYPE_U32,
    DTYPE_U8,
    DTYPE_I8,
    DTYPE_F8_E4M3,
    DTYPE_COUNT
} DType;

extern const char *const dtype_names[DTYPE_COUNT]; // as the format writes them
extern const int dtype_bytes[DTYPE_COUNT];

typedef struct {
    const char *name;
    DType dtype;
    int n_dims;
    uint64_t shape[4];
    uint64_t begin, end; // bytes from the start of the data
} Tensor;

typedef struct {
    const char *key, *value;
} MetaEntry;

typedef struct {
    const char *path; // the caller's string, for messages
    int fd;
    uint64_t file_bytes, data_start, data_bytes;
    struct timespec changed; // when it was opened: the time of its last change
    char *header;            // owns every name and value
    Tensor *tensors;         // sorted by offset
    size_t n_tensors;
    Tensor **by_name; // the same, sorted by name
    MetaEntry *meta;  // sorted by key
    size_t n_meta;
} SafeTensors;

// Opens path and checks its header against the file's size. On failure nothing is left open. hint: for the message,
// what to do if it is a file of another kind.
bool safetensors_open(SafeTensors *st, const char *path, const char *hint, Error *err);
void safetensors_close(SafeTensors *st);

// NULL if there is none of that name.
const Tensor *safetensors_find(const SafeTensors *st, const char *name);
const char *safetensors_meta(const SafeTensors *st, const char *key);

// Reads bytes [begin, begin + n) of the data into dst, by several threads when n is large. The file is read, never
// mapped: one that shrinks meanwhile is an error here and not a SIGBUS somewhere else.
bool safetensors_read(const SafeTensors *st, void *dst, uint64_t begin, uint64_t n, Error *err);

// Whether the file is the one that was opened, as long and as old: what was read belongs together.
bool safetensors_unchanged(const SafeTensors *st, Error *err);

#endif
