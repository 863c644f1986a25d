// From a model.bin to one whose matrices are quantised.
#ifndef QUANTIZE_H
#define QUANTIZE_H

#include "../measure/calibrate.h"
#include "../quant.h"

typedef struct {
    QuantType layers; // of all matrices of the layers
    QuantType output; // of the output matrix, where quantises_output: a tied model is written untied then
    bool quantises_output;
    Calibration *calibration; // rounds with error feedback, for the inputs of a text; NULL: to the nearest
} QuantizeOptions;

typedef struct {
    char name[64], type[QUANT_NAME];
    uint64_t bytes; // of codes and scales
    double error;   // root of the mean squared error, of that of the weights: 0.01 is one in a hundred
} QuantizedMatrix;

typedef struct {
    QuantizedMatrix *matrices; // [n], in file order
    int n;
    int group;                       // columns that share a scale, of those that have groups; 0: none have
    uint64_t bytes_read, bytes_made; // of the two files
    double error;                    // of all matrices together
} QuantizeSummary;

// Writes the model, which is opened, and needs to be started for a calibration only, to path: PATH.part first, which is
// renamed when it is whole. A part of a matrix is in memory at a time. The file depends on the model and on the options
// alone. Refused, before anything is written: a model that is quantised already, a path that is the model's own file,
// columns that the type cannot hold, types with groups of two sizes, too little space; and weights that are not finite.
// model->progress counts "quantising" bytes. The caller frees the summary with quantize_free.
bool quantize_model(Model *model, const char *path, const QuantizeOptions *options, QuantizeSummary *summary,
                    Error *err);
void quantize_free(QuantizeSummary *summary);

#endif
