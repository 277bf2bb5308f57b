/* NF4 and FP4 block dequantization and few-row products for the CPU. Plain C: pointers in, no headers of torch or Python.

   Layout (compress_peft/tensors/nf4.py): weights in row-major order, byte i = code[2i] << 4 | code[2i + 1], one scale
   per `block` consecutive weights. The scales are either float32 (`absmax`) or, if `absmax` is NULL, double quantized:
   scale = map[absmax_codes[b]] * absmax_scales[b / 256] + *offset. */

#include "common.h"

#define UNIT 32      /* weights that one step decodes; `block` is a multiple of it */

static const float NF4[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
    -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
    0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

/* 1 bit of sign, 2 of exponent, 1 of mantissa, over 12. */
static const float FP4[16] = {
    0.0f, 0.0625f / 12, 8.0f / 12, 1.0f, 4.0f / 12, 0.5f, 2.0f / 12, 0.25f,
    0.0f, -0.0625f / 12, -8.0f / 12, -1.0f, -4.0f / 12, -0.5f, -2.0f / 12, -0.25f};

typedef struct {
    const float *grid;
    const uint8_t *codes;
    const float *absmax;
    const uint8_t *absmax_codes;
    const float *absmax_scales;
    const float *map;
    float offset;
    int64_t block;
} Weight;

INLINE float scale_of(const Weight *w, int64_t b) {
    if (w->absmax) return w->absmax[b];
    const float product = w->map[w->absmax_codes[b]] * w->absmax_scales[b >> 8];
    return product + w->offset; /* two roundings: compiled with -ffp-contract=off */
}

INLINE float weight_at(const Weight *w, int64_t i, float scale) {
    const uint8_t byte = w->codes[i >> 1];
    return w->grid[(i & 1) ? (byte & 15) : (byte >> 4)] * scale;
}

/* Weights [begin, end) of one block; either output pointer may be NULL. */
static void dequant_portable(const Weight *w, int64_t begin, int64_t end, float scale, float *f32, uint16_t *bf16) {
    for (int64_t i = begin; i < end; i++) {
        const float value = weight_at(w, i, scale);
        if (f32) f32[i] = value;
        else bf16[i] = to_bf16(value);
    }
}

/* out[r * stride + j] = sum_i x[r * k + i] * weight[(row + j) * k + i] for `width` rows of the weight, `rows` of x. */
static void dot_portable(const Weight *w, int64_t row, int width, int64_t k, const float *x, int rows, float *out,
                         int64_t stride) {
    for (int j = 0; j < width; j++) {
        float total[MAX_ROWS] = {0};
        for (int64_t start = 0; start < k; start += w->block) {
            float sum[MAX_ROWS] = {0};
            for (int64_t i = start; i < start + w->block; i++) {
                const float value = weight_at(w, (row + j) * k + i, 1.0f);
                for (int r = 0; r < rows; r++) sum[r] += value * x[r * k + i];
            }
            const float scale = scale_of(w, ((row + j) * k + start) / w->block);
            for (int r = 0; r < rows; r++) total[r] += scale * sum[r];
        }
        for (int r = 0; r < rows; r++) out[r * stride + j] = total[r];
    }
}

#ifdef HAVE_X86
/* AVX2: the grid as four byte planes, looked up by pshufb and interleaved to floats. Of every 8 weights, out[j] holds
   the even ones in its low and the odd ones in its high lane. */
typedef struct {
    __m256i plane[4];
} Planes;

INLINE AVX2 Planes load_planes(const float *grid) {
    uint8_t bytes[4][16];
    for (int i = 0; i < 16; i++) {
        uint8_t value[4];
        memcpy(value, &grid[i], 4);
        for (int p = 0; p < 4; p++) bytes[p][i] = value[p];
    }
    Planes planes;
    for (int p = 0; p < 4; p++)
        planes.plane[p] = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)bytes[p]));
    return planes;
}

INLINE AVX2 void decode_avx2(const Planes *t, const uint8_t *codes, __m256 out[4]) {
    const __m256i twice = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)codes));
    const __m256i index =
        _mm256_and_si256(_mm256_srlv_epi64(twice, _mm256_set_epi64x(0, 0, 4, 4)), _mm256_set1_epi8(15));
    const __m256i b0 = _mm256_shuffle_epi8(t->plane[0], index), b1 = _mm256_shuffle_epi8(t->plane[1], index);
    const __m256i b2 = _mm256_shuffle_epi8(t->plane[2], index), b3 = _mm256_shuffle_epi8(t->plane[3], index);
    const __m256i low0 = _mm256_unpacklo_epi8(b0, b1), low1 = _mm256_unpackhi_epi8(b0, b1);
    const __m256i high0 = _mm256_unpacklo_epi8(b2, b3), high1 = _mm256_unpackhi_epi8(b2, b3);
    out[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low0, high0));
    out[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low0, high0));
    out[2] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low1, high1));
    out[3] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low1, high1));
}

AVX2 static void dequant_avx2(const Weight *w, int64_t begin, int64_t end, float scale, float *f32, uint16_t *bf16) {
    const Planes planes = load_planes(w->grid);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m256 factor = _mm256_set1_ps(scale);
    int64_t i = begin;
    for (; i + UNIT <= end; i += UNIT) {
        __m256 value[4];
        decode_avx2(&planes, w->codes + i / 2, value);
        for (int j = 0; j < 4; j++) {
            const __m256 v = _mm256_permutevar8x32_ps(_mm256_mul_ps(value[j], factor), order);
            store_avx2(v, f32, bf16, i + 8 * j);
        }
    }
    dequant_portable(w, i, end, scale, f32, bf16);
}

/* `width` rows of the weight: sums that do not wait for each other, and share what is read of x. */
INLINE AVX2 void dot_avx2_tile(const Weight *w, const Planes *planes, int64_t row, const int width, int64_t k,
                               const float *x, const int rows, float *out, int64_t stride) {
    __m256 total[WIDTH][4];
    for (int j = 0; j < width; j++)
        for (int r = 0; r < rows; r++) total[j][r] = _mm256_setzero_ps();
    const uint8_t *codes = w->codes + row * k / 2;
    for (int64_t start = 0, b = row * k / w->block; start < k; start += w->block, b++) {
        __m256 sum[WIDTH][4];
        for (int j = 0; j < width; j++)
            for (int r = 0; r < rows; r++) sum[j][r] = _mm256_setzero_ps();
        for (int64_t i = start; i < start + w->block; i += UNIT)
            for (int j = 0; j < width; j++) {
                __m256 value[4];
                decode_avx2(planes, codes + (j * k + i) / 2, value);
                for (int v = 0; v < 4; v++)
                    for (int r = 0; r < rows; r++)
                        sum[j][r] = _mm256_fmadd_ps(value[v], _mm256_loadu_ps(x + r * k + i + 8 * v), sum[j][r]);
            }
        for (int j = 0; j < width; j++) {
            const __m256 scale = _mm256_set1_ps(scale_of(w, b + j * (k / w->block)));
            for (int r = 0; r < rows; r++) total[j][r] = _mm256_fmadd_ps(scale, sum[j][r], total[j][r]);
        }
    }
    for (int j = 0; j < width; j++)
        for (int r = 0; r < rows; r++) out[r * stride + j] = sum_avx2(total[j][r]);
}

AVX2 static void dot_avx2(const Weight *w, int64_t row, int width, int64_t k, const float *x, int rows, float *out,
                          int64_t stride) {
    const Planes planes = load_planes(w->grid);
    for (; rows > 0; rows -= 4, x += 4 * k, out += 4 * stride) {
        int j = 0;
        if (rows == 1 && width == WIDTH) {
            dot_avx2_tile(w, &planes, row, WIDTH, k, x, 1, out, stride);
            continue;
        }
        if (rows == 2)
            for (; j + 2 <= width; j += 2) dot_avx2_tile(w, &planes, row + j, 2, k, x, 2, out + j, stride);
        for (; j < width; j++) {
            if (rows >= 4) dot_avx2_tile(w, &planes, row + j, 1, k, x, 4, out + j, stride);
            if (rows == 3) dot_avx2_tile(w, &planes, row + j, 1, k, x, 3, out + j, stride);
            if (rows == 2) dot_avx2_tile(w, &planes, row + j, 1, k, x, 2, out + j, stride);
            if (rows == 1) dot_avx2_tile(w, &planes, row + j, 1, k, x, 1, out + j, stride);
        }
    }
}

/* AVX-512: vpermps takes only the low 4 bits of an index, so a zero-extended byte is the index of its low nibble.
   Of every 32 weights, `even` and `odd` hold 16 each. */
INLINE AVX512 void decode_avx512(__m512 grid, const uint8_t *codes, __m512 *even, __m512 *odd) {
    const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)codes));
    *even = _mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), grid);
    *odd = _mm512_permutexvar_ps(bytes, grid);
}

AVX512 static void dequant_avx512(const Weight *w, int64_t begin, int64_t end, float scale, float *f32,
                                  uint16_t *bf16) {
    const __m512 grid = _mm512_loadu_ps(w->grid);
    const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    const __m512 scaled = _mm512_mul_ps(grid, _mm512_set1_ps(scale));
    int64_t i = begin;
    for (; i + UNIT <= end; i += UNIT) {
        __m512 even, odd;
        decode_avx512(scaled, w->codes + i / 2, &even, &odd);
        const __m512 a = _mm512_permutex2var_ps(even, first, odd), b = _mm512_permutex2var_ps(even, second, odd);
        store_avx512(a, f32, bf16, i);
        store_avx512(b, f32, bf16, i + 16);
    }
    dequant_portable(w, i, end, scale, f32, bf16);
}

INLINE AVX512 void dot_avx512_rows(const Weight *w, int64_t row, int64_t k, const float *x, const int rows,
                                   float *out, int64_t stride) {
    const __m512 grid = _mm512_loadu_ps(w->grid);
    __m512 total[MAX_ROWS];
    for (int r = 0; r < rows; r++) total[r] = _mm512_setzero_ps();
    const uint8_t *codes = w->codes + row * k / 2;
    const int64_t first = row * k / w->block;
    for (int64_t start = 0, b = first; start < k; start += w->block, b++) {
        __m512 sum[MAX_ROWS];
        for (int r = 0; r < rows; r++) sum[r] = _mm512_setzero_ps();
        for (int64_t i = start; i < start + w->block; i += UNIT) {
            __m512 even, odd;
            decode_avx512(grid, codes + i / 2, &even, &odd);
            for (int r = 0; r < rows; r++) {
                sum[r] = _mm512_fmadd_ps(even, _mm512_loadu_ps(x + r * k + i), sum[r]);
                sum[r] = _mm512_fmadd_ps(odd, _mm512_loadu_ps(x + r * k + i + 16), sum[r]);
            }
        }
        const __m512 scale = _mm512_set1_ps(scale_of(w, b));
        for (int r = 0; r < rows; r++) total[r] = _mm512_fmadd_ps(scale, sum[r], total[r]);
    }
    for (int r = 0; r < rows; r++) out[r * stride] = _mm512_reduce_add_ps(total[r]);
}

/* `width` rows of the weight share what is read of x; each block's scale goes into its table. */
INLINE AVX512 void dot_avx512_tile(const Weight *w, int64_t row, const int width, int64_t k, const float *x,
                                   const int rows, float *out, int64_t stride) {
    const __m512 grid = _mm512_loadu_ps(w->grid);
    __m512 total[WIDTH][4], table[WIDTH];
    for (int j = 0; j < width; j++)
        for (int r = 0; r < rows; r++) total[j][r] = _mm512_setzero_ps();
    for (int64_t start = 0, b = row * k / w->block; start < k; start += w->block, b++) {
        for (int j = 0; j < width; j++) {
            const float scale = scale_of(w, b + j * (k / w->block));
            table[j] = _mm512_mul_ps(grid, _mm512_set1_ps(scale));
        }
        for (int64_t i = start; i < start + w->block; i += UNIT)
            for (int j = 0; j < width; j++) {
                __m512 even, odd;
                decode_avx512(table[j], w->codes + ((row + j) * k + i) / 2, &even, &odd);
                for (int r = 0; r < rows; r++) {
                    total[j][r] = _mm512_fmadd_ps(even, _mm512_loadu_ps(x + r * k + i), total[j][r]);
                    total[j][r] = _mm512_fmadd_ps(odd, _mm512_loadu_ps(x + r * k + i + 16), total[j][r]);
                }
            }
    }
    for (int j = 0; j < width; j++)
        for (int r = 0; r < rows; r++) out[r * stride + j] = _mm512_reduce_add_ps(total[j][r]);
}

AVX512 static void dot_avx512(const Weight *w, int64_t row, int width, int64_t k, const float *x, int rows, float *out,
                              int64_t stride) {
    if (width == WIDTH) switch (rows) {
        case 1: dot_avx512_tile(w, row, WIDTH, k, x, 1, out, stride); return;
        case 2: dot_avx512_tile(w, row, WIDTH, k, x, 2, out, stride); return;
        case 3: dot_avx512_tile(w, row, WIDTH, k, x, 3, out, stride); return;
        case 4: dot_avx512_tile(w, row, WIDTH, k, x, 4, out, stride); return;
        }
    for (int j = 0; j < width; j++) switch (rows) {
        case 8: dot_avx512_rows(w, row + j, k, x, 8, out + j, stride); break;
        case 7: dot_avx512_rows(w, row + j, k, x, 7, out + j, stride); break;
        case 6: dot_avx512_rows(w, row + j, k, x, 6, out + j, stride); break;
        case 5: dot_avx512_rows(w, row + j, k, x, 5, out + j, stride); break;
        case 4: dot_avx512_rows(w, row + j, k, x, 4, out + j, stride); break;
        case 3: dot_avx512_rows(w, row + j, k, x, 3, out + j, stride); break;
        case 2: dot_avx512_rows(w, row + j, k, x, 2, out + j, stride); break;
        default: dot_avx512_rows(w, row + j, k, x, 1, out + j, stride);
        }
}
#endif

typedef void (*Dequant)(const Weight *, int64_t, int64_t, float, float *, uint16_t *);
typedef void (*Dot)(const Weight *, int64_t, int, int64_t, const float *, int, float *, int64_t);

/* Weights [begin, begin + count), begin a multiple of block, to float32 (out_f32) or bfloat16 (out_bf16, the other NULL). */
static void dequantize(Weight w, int64_t begin, int64_t count, float *out_f32, uint16_t *out_bf16, int isa,
                       int threads) {
    const int64_t block = w.block;
    w.codes += begin / 2;
    Dequant dequant = dequant_portable;
#ifdef HAVE_X86
    if (isa == 2) dequant = dequant_avx2;
    if (isa == 3) dequant = dequant_avx512;
#endif
    const int64_t first = begin / block, blocks = (count + block - 1) / block;
    if (count < PARALLEL_FROM) threads = 1;
    (void)threads;
#ifdef _OPENMP
#pragma omp parallel for schedule(static) num_threads(threads)
#endif
    for (int64_t b = 0; b < blocks; b++) {
        const int64_t end = (b + 1) * block < count ? (b + 1) * block : count;
        dequant(&w, b * block, end, scale_of(&w, first + b), out_f32, out_bf16);
    }
}

/* out (m, n) = x (m, k) @ weight (n, k)^T, all float32; k is a multiple of block, block of 32.
   Returns 0, or 1 if there is no memory for a copy of x. */
static int matmul(Weight w, const float *x, float *out, int64_t m, int64_t n, int64_t k, int isa, int threads) {
    Dot dot = dot_portable;
    int64_t group = 0; /* within every `group` values of x the even ones are moved to the front */
#ifdef HAVE_X86
    if (isa == 2) dot = dot_avx2, group = 8;
    if (isa == 3) dot = dot_avx512, group = 32;
#endif
    float *moved = NULL;
    if (group) {
        moved = even_first(x, m * k, group);
        if (!moved) return 1;
        x = moved;
    }
    if (m * n * k < PARALLEL_FROM) threads = 1;
    (void)threads;
#ifdef _OPENMP
#pragma omp parallel for schedule(static) num_threads(threads)
#endif
    for (int64_t row = 0; row < n; row += WIDTH) {
        prefetch(w.codes + (row + WIDTH) * k / 2, w.codes + n * k / 2, WIDTH * k / 2);
        for (int64_t r = 0; r < m; r += MAX_ROWS)
            dot(&w, row, (int)(n - row < WIDTH ? n - row : WIDTH), k, x + r * k,
                (int)(m - r < MAX_ROWS ? m - r : MAX_ROWS), out + r * n + row, n);
    }
    free(moved);
    return 0;
}

#define TENSORS                                                                                                \
    const uint8_t *codes, const float *absmax, const uint8_t *absmax_codes, const float *absmax_scales,        \
        const float *map, const float *offset, int64_t block
#define WEIGHT(grid) \
    (Weight) { grid, codes, absmax, absmax_codes, absmax_scales, map, offset ? *offset : 0.0f, block }

#define EXPORT_GRID(name, grid)                                                                                \
    EXPORT void name##_dequantize(TENSORS, int64_t begin, int64_t count, float *out_f32, uint16_t *out_bf16,   \
                                  int isa, int threads) {                                                      \
        dequantize(WEIGHT(grid), begin, count, out_f32, out_bf16, isa, threads);                               \
    }                                                                                                          \
    EXPORT int name##_matmul(TENSORS, const float *x, float *out, int64_t m, int64_t n, int64_t k, int isa,    \
                             int threads) {                                                                    \
        return matmul(WEIGHT(grid), x, out, m, n, k, isa, threads);                                            \
    }

EXPORT_GRID(nf4, NF4)
EXPORT_GRID(fp4, FP4)
