/* Affine grids on the CPU: block dequantization and few-row products for codes of 2, 3, 4 and 8 bits.

   Layout (compress_peft/tensors/affine.py): weight = (code - zero) * scale; every row is packed on its own, code j in
   the bits [j * bits, (j + 1) * bits) from the lowest bit of its first byte. A group is `group` weights of a row, a
   multiple of 8 or the whole row, so that every group starts at a byte.

   Products decode a few rows of the weight at a time, which share what is read of x. */

#include "common.h"

#define CHUNK 64 /* groups whose scales and zeros are converted at a time; a multiple of 16 */

enum { ZERO_FIXED, ZERO_U8, ZERO_F16, ZERO_F32 };

typedef struct {
    const uint8_t *codes;
    const void *scales; /* float16 or float32 (rows, groups) */
    const void *zeros;  /* by zero_kind (rows, groups) */
    int half_scales, zero_kind, bits;
    int64_t group, groups, row_bytes;
} Affine;

typedef struct {
    float scale[CHUNK], zero[CHUNK];
} Grid;

/* Finite float16, also subnormal, to float32; 2^112 is the difference of the biases. */
INLINE float half_to_float(uint16_t half) {
    const uint32_t sign = (uint32_t)(half & 0x8000u) << 16, rest = (uint32_t)(half & 0x7fffu) << 13;
    float value;
    memcpy(&value, &rest, 4);
    value *= 0x1p112f;
    uint32_t bits;
    memcpy(&bits, &value, 4);
    bits |= sign;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE void widen(const void *source, int64_t first, int count, int half, float *out) {
    if (half)
        for (int i = 0; i < count; i++) out[i] = half_to_float(((const uint16_t *)source)[first + i]);
    else
        for (int i = 0; i < count; i++) out[i] = ((const float *)source)[first + i];
}

/* Scales and zeros of `count` groups from `first` on. */
INLINE void load_grid(const Affine *w, int64_t first, int count, Grid *grid) {
    widen(w->scales, first, count, w->half_scales, grid->scale);
    if (w->zero_kind == ZERO_FIXED)
        for (int i = 0; i < count; i++) grid->zero[i] = (float)(1 << (w->bits - 1));
    else if (w->zero_kind == ZERO_U8)
        for (int i = 0; i < count; i++) grid->zero[i] = (float)((const uint8_t *)w->zeros)[first + i];
    else
        widen(w->zeros, first, count, w->zero_kind == ZERO_F16, grid->zero);
}

INLINE float code_at(const uint8_t *row, int64_t j, int bits) {
    const int64_t bit = j * bits;
    const int shift = (int)(bit & 7);
    unsigned value = row[bit >> 3] >> shift;
    if (shift + bits > 8) value |= (unsigned)row[(bit >> 3) + 1] << (8 - shift);
    return (float)(value & ((1u << bits) - 1));
}

INLINE uint32_t load32(const uint8_t *p) {
    uint32_t value;
    memcpy(&value, p, 4);
    return value;
}

/* Weights [begin, end) of a row, all of one group; one of the output pointers is NULL. */
INLINE void dequant_some(const uint8_t *codes, int bits, int64_t begin, int64_t end, float scale, float zero,
                         float *f32, uint16_t *bf16) {
    for (int64_t i = begin; i < end; i++) {
        const float value = (code_at(codes, i, bits) - zero) * scale;
        if (f32) f32[i] = value;
        else bf16[i] = to_bf16(value);
    }
}

/* sum_i weight * x over [begin, end): the ends of groups that are no multiple of a vector. */
INLINE float dot_some(const uint8_t *codes, int bits, int64_t begin, int64_t end, float scale, float zero,
                      const float *x) {
    float sum = 0.0f;
    for (int64_t i = begin; i < end; i++) sum += (code_at(codes, i, bits) - zero) * scale * x[i];
    return sum;
}

/* A row of the weight, dequantized. */
typedef void (*Dequant)(const Affine *, int64_t row, float *f32, uint16_t *bf16);
/* `width` (1 .. WIDTH) rows of the weight times `rows` (1 .. MAX_ROWS) rows of x: out[r * stride + j] for row + j. */
typedef void (*Dot)(const Affine *, int64_t row, int width, int64_t k, const float *x, int rows, float *out,
                    int64_t stride);

static void dequant_portable(const Affine *w, int64_t row, float *f32, uint16_t *bf16) {
    for (int64_t g = 0; g < w->groups; g++) {
        Grid grid;
        load_grid(w, row * w->groups + g, 1, &grid);
        dequant_some(w->codes + row * w->row_bytes, w->bits, g * w->group, (g + 1) * w->group, grid.scale[0],
                     grid.zero[0], f32, bf16);
    }
}

static void dot_portable(const Affine *w, int64_t row, int width, int64_t k, const float *x, int rows, float *out,
                         int64_t stride) {
    for (int j = 0; j < width; j++) {
        const uint8_t *codes = w->codes + (row + j) * w->row_bytes;
        float total[MAX_ROWS] = {0};
        for (int64_t g = 0; g < w->groups; g++) {
            Grid grid;
            float sum[MAX_ROWS] = {0};
            load_grid(w, (row + j) * w->groups + g, 1, &grid);
            for (int64_t i = g * w->group; i < (g + 1) * w->group; i++) {
                const float value = code_at(codes, i, w->bits) - grid.zero[0];
                for (int r = 0; r < rows; r++) sum[r] += value * x[r * k + i];
            }
            for (int r = 0; r < rows; r++) total[r] += grid.scale[0] * sum[r];
        }
        for (int r = 0; r < rows; r++) out[r * stride + j] = total[r];
    }
}

#ifdef HAVE_X86
#include "affine_x86.h"
#endif

static Affine describe(const uint8_t *codes, const void *scales, const void *zeros, int half_scales, int zero_kind,
                       int bits, int64_t group, int64_t k) {
    const Affine w = {codes, scales, zeros, half_scales, zero_kind, bits, group, k / group, (k * bits + 7) / 8};
    return w;
}

/* Rows [first, first + rows) of a weight with k columns to float32 (out_f32) or bfloat16 (out_bf16, the other NULL). */
EXPORT void affine_dequantize(const uint8_t *codes, const void *scales, const void *zeros, int half_scales,
                              int zero_kind, int bits, int64_t group, int64_t k, int64_t first, int64_t rows,
                              float *out_f32, uint16_t *out_bf16, int isa, int threads) {
    const Affine w = describe(codes, scales, zeros, half_scales, zero_kind, bits, group, k);
    Dequant dequant = dequant_portable;
#ifdef HAVE_X86
    if (isa == 2) dequant = BY_BITS(dequant_avx2, bits);
    if (isa == 3) dequant = BY_BITS(dequant_avx512, bits);
#endif
    if (rows * k < PARALLEL_FROM) threads = 1;
    (void)threads;
#ifdef _OPENMP
#pragma omp parallel for schedule(static) num_threads(threads)
#endif
    for (int64_t row = 0; row < rows; row++)
        dequant(&w, first + row, out_f32 ? out_f32 + row * k : NULL, out_bf16 ? out_bf16 + row * k : NULL);
}

/* out (m, n) = x (m, k) @ weight (n, k)^T, x and out float32. Returns 0, or 1 if there is no memory for a copy of x. */
EXPORT int affine_matmul(const uint8_t *codes, const void *scales, const void *zeros, int half_scales, int zero_kind,
                         int bits, int64_t group, const float *x, float *out, int64_t m, int64_t n, int64_t k, int isa,
                         int threads) {
    const Affine w = describe(codes, scales, zeros, half_scales, zero_kind, bits, group, k);
    Dot dot = dot_portable;
    float *moved = NULL;
#ifdef HAVE_X86
    if (isa == 2) dot = BY_BITS(dot_avx2, bits);
    if (isa == 3) dot = BY_BITS(dot_avx512, bits);
    if (isa == 3 && bits == 4 && group % 32 == 0 && m <= 4) { /* with more rows the products take the time */
        moved = even_first(x, m * k, 32);
        if (!moved) return 1;
        x = moved;
        dot = dot_avx512_4_moved;
    }
#endif
    if (m * n * k < PARALLEL_FROM) threads = 1;
    (void)threads;
#ifdef _OPENMP
#pragma omp parallel for schedule(static) num_threads(threads)
#endif
    for (int64_t row = 0; row < n; row += WIDTH) {
        prefetch(codes + (row + WIDTH) * w.row_bytes, codes + n * w.row_bytes, WIDTH * w.row_bytes);
        for (int64_t r = 0; r < m; r += MAX_ROWS)
            dot(&w, row, (int)(n - row < WIDTH ? n - row : WIDTH), k, x + r * k,
                (int)(m - r < MAX_ROWS ? m - r : MAX_ROWS), out + r * n + row, n);
    }
    free(moved);
    return 0;
}
