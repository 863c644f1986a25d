// RoPE's frequencies (Su et al. 2021), with LLaMA 3's scaling or a linear one. What rotates by them are the engines.
#include <math.h>

#include "model.h"

// The frequency of each pair of elements, in radians per position: 1 / theta^(2i/head_dim); for linear divided by the
// factor, for llama3 with the scaling of long wavelengths by a factor and a smooth step between. Every operation is the
// float32 one, in the order, of transformers' modeling_rope_utils.py (there a number divided by a tensor is the number
// times the reciprocal).
void rope_frequencies(const Config *c, float *freq) {
    for (int i = 0; i < c->head_dim / 2; i++) {
        float exponent = (float)(2 * i) / (float)c->head_dim;
        float f = 1.0f / (float)pow((double)c->rope_theta, (double)exponent);
        if (c->rope_type == ROPE_LINEAR) f /= c->rope_factor;
        if (c->rope_type == ROPE_LLAMA3) {
            float low_wavelength = c->rope_original_max_seq_len / c->rope_low_freq_factor;
            float high_wavelength = c->rope_original_max_seq_len / c->rope_high_freq_factor;
            float wavelength = (1.0f / f) * 6.283185307179586f;
            float slowed = wavelength > low_wavelength ? f / c->rope_factor : f;
            if (wavelength >= high_wavelength && wavelength <= low_wavelength) {
                float smooth = ((1.0f / wavelength) * c->rope_original_max_seq_len - c->rope_low_freq_factor) /
                               (c->rope_high_freq_factor - c->rope_low_freq_factor);
                slowed = (1.0f - smooth) * slowed / c->rope_factor + smooth * slowed;
            }
            f = slowed;
        }
        freq[i] = f;
    }
}
