/* The AVX2 and AVX-512 kernels of affine.c, which includes this where they can be compiled. */

/* What turns the codes of one group into weights: a table of them for codes that a permutation can look up, else
   factor and summand. */
typedef struct {
    __m256 table, scale, shift;
} Decoder8;

INLINE AVX2 Decoder8 decoder_avx2(const float scale, const float zero) {
    Decoder8 d;
    d.scale = _mm256_set1_ps(scale);
    d.shift = _mm256_set1_ps(-zero * scale);
    d.table = _mm256_sub_ps(_mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_ps(zero));
    d.table = _mm256_mul_ps(d.table, d.scale);
    return d;
}

/* The 8 codes from p on as integers; of codes of 3 bits only the lowest 3 bits count. */
INLINE AVX2 __m256i codes_avx2(const uint8_t *p, const int bits) {
    const __m256i steps = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    if (bits == 8) return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p));
    if (bits == 4) {
        const __m256i word = _mm256_srlv_epi32(_mm256_set1_epi32((int)load32(p)), _mm256_slli_epi32(steps, 2));
        return _mm256_and_si256(word, _mm256_set1_epi32(15));
    }
    if (bits == 3) {
        const __m256i word = _mm256_set1_epi32(p[0] | p[1] << 8 | p[2] << 16);
        return _mm256_srlv_epi32(word, _mm256_add_epi32(steps, _mm256_slli_epi32(steps, 1)));
    }
    const __m256i word = _mm256_srlv_epi32(_mm256_set1_epi32(p[0] | p[1] << 8), _mm256_slli_epi32(steps, 1));
    return _mm256_and_si256(word, _mm256_set1_epi32(3));
}

INLINE AVX2 __m256 decode_avx2(const uint8_t *p, const int bits, const Decoder8 *d) {
    const __m256i codes = codes_avx2(p, bits);
    if (bits < 4) return _mm256_permutevar8x32_ps(d->table, codes);
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(codes), d->scale, d->shift);
}

INLINE AVX2 void dequant_avx2_bits(const Affine *w, int64_t row, float *f32, uint16_t *bf16, const int bits) {
    const uint8_t *codes = w->codes + row * w->row_bytes;
    for (int64_t g0 = 0; g0 < w->groups; g0 += CHUNK) {
        const int count = (int)(w->groups - g0 < CHUNK ? w->groups - g0 : CHUNK);
        Grid grid;
        load_grid(w, row * w->groups + g0, count, &grid);
        for (int g = 0; g < count; g++) {
            const Decoder8 d = decoder_avx2(grid.scale[g], grid.zero[g]);
            const __m256 zero = _mm256_set1_ps(grid.zero[g]);
            const int64_t end = (g0 + g + 1) * w->group;
            int64_t i = end - w->group;
            for (; i + 8 <= end; i += 8) {
                const uint8_t *p = codes + i * bits / 8;
                __m256 v;
                if (bits < 4) v = decode_avx2(p, bits, &d);
                else /* rounded as in the reference */
                    v = _mm256_mul_ps(_mm256_sub_ps(_mm256_cvtepi32_ps(codes_avx2(p, bits)), zero), d.scale);
                store_avx2(v, f32, bf16, i);
            }
            dequant_some(codes, bits, i, end, grid.scale[g], grid.zero[g], f32, bf16);
        }
    }
}

INLINE AVX2 void dot_avx2_tile(const Affine *w, int64_t row, const int width, int64_t k, const float *x, const int rows,
                               float *out, int64_t stride, const int bits) {
    __m256 total[WIDTH][4];
    float rest[WIDTH][4] = {{0}};
    for (int j = 0; j < width; j++)
        for (int r = 0; r < rows; r++) total[j][r] = _mm256_setzero_ps();
    const uint8_t *codes = w->codes + row * w->row_bytes;
    for (int64_t g0 = 0; g0 < w->groups; g0 += CHUNK) {
        const int count = (int)(w->groups - g0 < CHUNK ? w->groups - g0 : CHUNK);
        Grid grid[WIDTH];
        for (int j = 0; j < width; j++) load_grid(w, (row + j) * w->groups + g0, count, &grid[j]);
        for (int g = 0; g < count; g++) {
            const int64_t end = (g0 + g + 1) * w->group;
            int64_t i = end - w->group;
            Decoder8 d[WIDTH];
            for (int j = 0; j < width; j++) d[j] = decoder_avx2(grid[j].scale[g], grid[j].zero[g]);
            for (; i + 8 <= end; i += 8)
                for (int j = 0; j < width; j++) {
                    const __m256 v = decode_avx2(codes + j * w->row_bytes + i * bits / 8, bits, &d[j]);
                    for (int r = 0; r < rows; r++)
                        total[j][r] = _mm256_fmadd_ps(v, _mm256_loadu_ps(x + r * k + i), total[j][r]);
                }
            if (i < end)
                for (int j = 0; j < width; j++)
                    for (int r = 0; r < rows; r++)
                        rest[j][r] += dot_some(codes + j * w->row_bytes, bits, i, end, grid[j].scale[g],
                                               grid[j].zero[g], x + r * k);
        }
    }
    for (int j = 0; j < width; j++)
        for (int r = 0; r < rows; r++) out[r * stride + j] = sum_avx2(total[j][r]) + rest[j][r];
}

/* The same for 16 codes; codes of up to 4 bits are looked up. */
typedef struct {
    __m512 table, scale, shift;
} Decoder16;

INLINE AVX512 Decoder16 decoder_avx512(const float scale, const float zero, const int bits) {
    const __m512i steps = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    /* A permutation takes 4 bits of an index: what lies above a shorter code must not matter. */
    const __m512 plain = _mm512_cvtepi32_ps(_mm512_and_si512(steps, _mm512_set1_epi32((1 << bits) - 1)));
    Decoder16 d;
    d.scale = _mm512_set1_ps(scale);
    d.shift = _mm512_set1_ps(-zero * scale);
    d.table = _mm512_mul_ps(_mm512_sub_ps(plain, _mm512_set1_ps(zero)), d.scale);
    return d;
}

INLINE AVX512 __m512 decode_avx512(const uint8_t *p, const int bits, const Decoder16 *d) {
    const __m512i steps = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i cycle = _mm512_and_si512(steps, _mm512_set1_epi32(7));
    __m512i word;
    if (bits == 8) {
        word = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
        return _mm512_fmadd_ps(_mm512_cvtepi32_ps(word), d->scale, d->shift);
    }
    if (bits == 4) {
        word = _mm512_mask_set1_epi32(_mm512_set1_epi32((int)load32(p)), 0xff00, (int)load32(p + 4));
        word = _mm512_srlv_epi32(word, _mm512_slli_epi32(cycle, 2));
    } else if (bits == 3) {
        word = _mm512_mask_set1_epi32(_mm512_set1_epi32((int)load32(p)), 0xff00, (int)(load32(p + 2) >> 8));
        word = _mm512_srlv_epi32(word, _mm512_add_epi32(cycle, _mm512_slli_epi32(cycle, 1)));
    } else {
        word = _mm512_srlv_epi32(_mm512_set1_epi32((int)load32(p)), _mm512_slli_epi32(steps, 1));
    }
    return _mm512_permutexvar_ps(word, d->table);
}

INLINE AVX512 void dequant_avx512_bits(const Affine *w, int64_t row, float *f32, uint16_t *bf16, const int bits) {
    const uint8_t *codes = w->codes + row * w->row_bytes;
    for (int64_t g0 = 0; g0 < w->groups; g0 += CHUNK) {
        const int count = (int)(w->groups - g0 < CHUNK ? w->groups - g0 : CHUNK);
        Grid grid;
        load_grid(w, row * w->groups + g0, count, &grid);
        for (int g = 0; g < count; g++) {
            const Decoder16 d = decoder_avx512(grid.scale[g], grid.zero[g], bits);
            const __m512 zero = _mm512_set1_ps(grid.zero[g]);
            const int64_t end = (g0 + g + 1) * w->group;
            int64_t i = end - w->group;
            for (; i + 16 <= end; i += 16) {
                const uint8_t *p = codes + i * bits / 8;
                __m512 v;
                if (bits < 8) v = decode_avx512(p, bits, &d);
                else { /* rounded as in the reference */
                    const __m512i q = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
                    v = _mm512_mul_ps(_mm512_sub_ps(_mm512_cvtepi32_ps(q), zero), d.scale);
                }
                store_avx512(v, f32, bf16, i);
            }
            dequant_some(codes, bits, i, end, grid.scale[g], grid.zero[g], f32, bf16);
        }
    }
}

/* The 32 codes of 4 bits from p on: those at even places, then those at odd ones. */
INLINE AVX512 void decode_pairs(const uint8_t *p, const Decoder16 *d, __m512 *even, __m512 *odd) {
    const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
    *even = _mm512_permutexvar_ps(bytes, d->table);
    *odd = _mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), d->table);
}

/* moved: of every 32 values of x, those at even places come first; for 4 bits and groups of multiples of 32. */
INLINE AVX512 void dot_avx512_tile(const Affine *w, int64_t row, const int width, int64_t k, const float *x,
                                   const int rows, float *out, int64_t stride, const int bits, const int moved) {
    __m512 total[WIDTH][MAX_ROWS];
    float rest[WIDTH][MAX_ROWS] = {{0}};
    for (int j = 0; j < width; j++)
        for (int r = 0; r < rows; r++) total[j][r] = _mm512_setzero_ps();
    const uint8_t *codes = w->codes + row * w->row_bytes;
    for (int64_t g0 = 0; g0 < w->groups; g0 += CHUNK) {
        const int count = (int)(w->groups - g0 < CHUNK ? w->groups - g0 : CHUNK);
        Grid grid[WIDTH];
        for (int j = 0; j < width; j++) load_grid(w, (row + j) * w->groups + g0, count, &grid[j]);
        for (int g = 0; g < count; g++) {
            const int64_t end = (g0 + g + 1) * w->group;
            int64_t i = end - w->group;
            Decoder16 d[WIDTH];
            for (int j = 0; j < width; j++) d[j] = decoder_avx512(grid[j].scale[g], grid[j].zero[g], bits);
            for (; moved && i < end; i += 32)
                for (int j = 0; j < width; j++) {
                    __m512 even, odd;
                    decode_pairs(codes + j * w->row_bytes + i / 2, &d[j], &even, &odd);
                    for (int r = 0; r < rows; r++) {
                        total[j][r] = _mm512_fmadd_ps(even, _mm512_loadu_ps(x + r * k + i), total[j][r]);
                        total[j][r] = _mm512_fmadd_ps(odd, _mm512_loadu_ps(x + r * k + i + 16), total[j][r]);
                    }
                }
            for (; i + 16 <= end; i += 16) {
                __m512 part[MAX_ROWS];
                for (int r = 0; r < rows; r++) part[r] = _mm512_loadu_ps(x + r * k + i);
                for (int j = 0; j < width; j++) {
                    const __m512 v = decode_avx512(codes + j * w->row_bytes + i * bits / 8, bits, &d[j]);
                    for (int r = 0; r < rows; r++) total[j][r] = _mm512_fmadd_ps(v, part[r], total[j][r]);
                }
            }
            if (i < end)
                for (int j = 0; j < width; j++)
                    for (int r = 0; r < rows; r++)
                        rest[j][r] += dot_some(codes + j * w->row_bytes, bits, i, end, grid[j].scale[g],
                                               grid[j].zero[g], x + r * k);
        }
    }
    for (int j = 0; j < width; j++)
        for (int r = 0; r < rows; r++) out[r * stride + j] = _mm512_reduce_add_ps(total[j][r]) + rest[j][r];
}

/* Tiles as large as the registers allow. */
#define KERNELS(bits)                                                                                                  \
    AVX2 static void dequant_avx2_##bits(const Affine *w, int64_t row, float *f32, uint16_t *bf16) {                   \
        dequant_avx2_bits(w, row, f32, bf16, bits);                                                                    \
    }                                                                                                                  \
    AVX512 static void dequant_avx512_##bits(const Affine *w, int64_t row, float *f32, uint16_t *bf16) {               \
        dequant_avx512_bits(w, row, f32, bf16, bits);                                                                  \
    }                                                                                                                  \
    AVX2 static void dot_avx2_##bits(const Affine *w, int64_t row, int width, int64_t k, const float *x, int rows,     \
                                     float *out, int64_t stride) {                                                     \
        for (; rows > 0; rows -= 4, x += 4 * k, out += 4 * stride) {                                                   \
            if (rows == 1 && width == WIDTH) {                                                                         \
                dot_avx2_tile(w, row, WIDTH, k, x, 1, out, stride, bits);                                              \
                continue;                                                                                              \
            }                                                                                                          \
            int j = 0;                                                                                                 \
            for (; j + 2 <= width && rows > 1; j += 2) {                                                               \
                if (rows >= 4) dot_avx2_tile(w, row + j, 2, k, x, 4, out + j, stride, bits);                           \
                if (rows == 3) dot_avx2_tile(w, row + j, 2, k, x, 3, out + j, stride, bits);                           \
                if (rows == 2) dot_avx2_tile(w, row + j, 2, k, x, 2, out + j, stride, bits);                           \
            }                                                                                                          \
            for (; j < width; j++)                                                                                     \
                for (int r = 0; r < rows && r < 4; r++)                                                                \
                    dot_avx2_tile(w, row + j, 1, k, x + r * k, 1, out + r * stride + j, stride, bits);                 \
        }                                                                                                              \
    }

#define KERNELS_AVX512(name, bits, moved)                                                                              \
    AVX512 static void dot_avx512_##name(const Affine *w, int64_t row, int width, int64_t k, const float *x, int rows, \
                                         float *out, int64_t stride) {                                                 \
        if (width == WIDTH) switch (rows) {                                                                            \
            case 1: dot_avx512_tile(w, row, WIDTH, k, x, 1, out, stride, bits, moved); return;                         \
            case 2: dot_avx512_tile(w, row, WIDTH, k, x, 2, out, stride, bits, moved); return;                         \
            case 3: dot_avx512_tile(w, row, WIDTH, k, x, 3, out, stride, bits, moved); return;                         \
            case 4: dot_avx512_tile(w, row, WIDTH, k, x, 4, out, stride, bits, moved); return;                         \
            }                                                                                                          \
        int j = 0;                                                                                                     \
        for (; j + 2 <= width && rows > 4; j += 2) switch (rows) {                                                     \
            case 5: dot_avx512_tile(w, row + j, 2, k, x, 5, out + j, stride, bits, moved); break;                      \
            case 6: dot_avx512_tile(w, row + j, 2, k, x, 6, out + j, stride, bits, moved); break;                      \
            case 7: dot_avx512_tile(w, row + j, 2, k, x, 7, out + j, stride, bits, moved); break;                      \
            default: dot_avx512_tile(w, row + j, 2, k, x, 8, out + j, stride, bits, moved);                            \
            }                                                                                                          \
        for (; j < width; j++)                                                                                         \
            for (int r = 0; r < rows; r++)                                                                             \
                dot_avx512_tile(w, row + j, 1, k, x + r * k, 1, out + r * stride + j, stride, bits, moved);            \
    }

KERNELS(2)
KERNELS(3)
KERNELS(4)
KERNELS(8)
KERNELS_AVX512(2, 2, 0)
KERNELS_AVX512(3, 3, 0)
KERNELS_AVX512(4, 4, 0)
KERNELS_AVX512(8, 8, 0)
KERNELS_AVX512(4_moved, 4, 1)
#define BY_BITS(name, bits) ((bits) == 2 ? name##_2 : (bits) == 3 ? name##_3 : (bits) == 4 ? name##_4 : name##_8)
