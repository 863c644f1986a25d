// Prompts in bf16 with AMX: tiles of sixteen rows of x by sixteen words, and of sixteen words by sixteen rows of W, as
// both are packed already, are multiplied by one instruction. No machine at hand has it: tests/test_amx.c runs this
// file on a model of the instructions, written from Intel's manual.
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "products_avx512.h"
#include "prompt_avx512.h"

#define WITH_AMX __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,amx-tile,amx-bf16")))

enum { TILE = 16, X_ROWS = 2 * TILE };
_Static_assert(X_ROWS == (int)STRIP_ROWS && (int)PANEL_ROWS == 2 * TILE && PANEL_WORDS % TILE == 0, "two tiles by two");

// Rows of C, or of y, that are no whole tiles, on their way from y or back.
static WITH_AMX void copy_rows(float *to, size_t to_stride, const float *from, size_t from_stride, const Strip *s) {
    const uint32_t rows = s->rows == PANEL_ROWS ? ~0u : (1u << s->rows) - 1;
    const __mmask16 low = (__mmask16)rows, high = (__mmask16)(rows >> TILE);
    for (int c = 0; c < s->C; c++, to += to_stride, from += from_stride) {
        _mm512_mask_storeu_ps(to, low, _mm512_maskz_loadu_ps(low, from));
        _mm512_mask_storeu_ps(to + TILE, high, _mm512_maskz_loadu_ps(high, from + TILE));
    }
}

// Tile registers: 0 to 3 are sums, of rows of x 0 to 15 and 16 to 31 by rows of W 0 to 15 and 16 to 31; 4 and 5 are of
// x, 6 and 7 of W.
static WITH_AMX void multiply_strip(const Strip *s) {
    static const struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1, .row_bytes = {64, 64, 64, 64, 64, 64, 64, 64}, .rows = {16, 16, 16, 16, 16, 16, 16, 16}};
    float part[X_ROWS * PANEL_ROWS] __attribute__((aligned(64)));
    const bool whole = s->C == X_ROWS && s->rows == PANEL_ROWS;
    float *y = whole ? s->y : part;
    const size_t y_stride = whole ? s->y_stride : PANEL_ROWS, x_bytes = s->x_stride * sizeof *s->x,
                 y_bytes = y_stride * sizeof *y, w_bytes = PANEL_ROWS * sizeof *s->panel;
    _tile_loadconfig(&config);
    if (s->add) {
        if (!whole) {
            for (int i = 0; i < X_ROWS * PANEL_ROWS; i++) part[i] = 0;
            copy_rows(part, PANEL_ROWS, s->y, s->y_stride, s);
        }
        _tile_loadd(0, y, y_bytes);
        _tile_loadd(1, y + TILE, y_bytes);
        _tile_loadd(2, y + TILE * y_stride, y_bytes);
        _tile_loadd(3, y + TILE * y_stride + TILE, y_bytes);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int k = 0; k < s->n; k += TILE) {
        const uint32_t *w = s->panel + (size_t)k * PANEL_ROWS, *x = s->x + k;
        _tile_loadd(4, x, x_bytes);
        _tile_loadd(6, w, w_bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, w + TILE, w_bytes);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, x + TILE * s->x_stride, x_bytes);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, y, y_bytes);
    _tile_stored(1, y + TILE, y_bytes);
    _tile_stored(2, y + TILE * y_stride, y_bytes);
    _tile_stored(3, y + TILE * y_stride + TILE, y_bytes);
    _tile_release();
    if (!whole) copy_rows(s->y, s->y_stride, part, PANEL_ROWS, s);
}

bool amx_supported(void) {
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18, AMX_BF16 = 1 << 22, AMX_TILE = 1 << 24 };
    unsigned a, b, c, d;
    return avx512_supported() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && d & AMX_BF16 && d & AMX_TILE &&
           syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

void matmul_amx(float *y, const float *x, const Matrix *w, int T) {
    prompt_product(y, x, w, T, &(Multiplier){multiply_strip, X_ROWS, .pairs = true, .round = true});
}
