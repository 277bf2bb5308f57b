/* Products of a few rows with a dense float32 weight: the layers that are not compressed, above all the output head.

   torch gives such products to MKL, which on processors that are not Intel's takes a generic way that does not keep up
   with the memory. With few rows memory is the limit: AVX-512 brings nothing over AVX2. */

#include "common.h"

#ifdef HAVE_X86
/* `width` rows of the weight times `rows` rows of x: out[r * n + j]. */
INLINE AVX2 void tile(const float *weight, const float *bias, int64_t k, const int width, const float *x,
                      const int rows, float *out, int64_t n) {
    __m256 total[WIDTH][4];
    for (int j = 0; j < width; j++)
        for (int r = 0; r < rows; r++) total[j][r] = _mm256_setzero_ps();
    int64_t whole = 0;
    for (; whole + 8 <= k; whole += 8)
        for (int j = 0; j < width; j++) {
            const __m256 w = _mm256_loadu_ps(weight + j * k + whole);
            for (int r = 0; r < rows; r++)
                total[j][r] = _mm256_fmadd_ps(w, _mm256_loadu_ps(x + r * k + whole), total[j][r]);
        }
    for (int j = 0; j < width; j++)
        for (int r = 0; r < rows; r++) {
            float sum = sum_avx2(total[j][r]);
            for (int64_t i = whole; i < k; i++) sum += weight[j * k + i] * x[r * k + i];
            out[r * n + j] = sum + (bias ? bias[j] : 0.0f);
        }
}

/* Up to WIDTH rows of the weight times any number of rows of x, in tiles as large as the registers allow. */
AVX2 static void dot(const float *weight, const float *bias, int64_t k, int width, const float *x, int64_t rows,
                     float *out, int64_t n) {
    for (; rows > 0; rows -= 4, x += 4 * k, out += 4 * n) {
        int j = 0;
        if (rows == 1 && width == WIDTH) {
            tile(weight, bias, k, WIDTH, x, 1, out, n);
            continue;
        }
#define FROM_J weight + j * k, bias ? bias + j : NULL, k
        for (; j + 2 <= width && rows > 1; j += 2) {
            if (rows >= 4) tile(FROM_J, 2, x, 4, out + j, n);
            if (rows == 3) tile(FROM_J, 2, x, 3, out + j, n);
            if (rows == 2) tile(FROM_J, 2, x, 2, out + j, n);
        }
        for (; j < width; j++)
            for (int r = 0; r < rows && r < 4; r++) tile(FROM_J, 1, x + r * k, 1, out + r * n + j, n);
    }
}
#endif

/* out (m, n) = x (m, k) @ weight (n, k)^T + bias (n) or NULL. Returns 0, or 1 where the processor lacks AVX2. */
EXPORT int dense_matmul(const float *weight, const float *bias, const float *x, float *out, int64_t m, int64_t n,
                        int64_t k, int isa, int threads) {
#ifdef HAVE_X86
    if (isa < 2) return 1;
    if (m * n * k < PARALLEL_FROM) threads = 1;
    (void)threads;
#ifdef _OPENMP
#pragma omp parallel for schedule(static) num_threads(threads)
#endif
    for (int64_t row = 0; row < n; row += WIDTH)
        dot(weight + row * k, bias ? bias + row : NULL, k, (int)(n - row < WIDTH ? n - row : WIDTH), x, m, out + row, n);
    return 0;
#else
    (void)weight, (void)bias, (void)x, (void)out, (void)m, (void)n, (void)k, (void)isa, (void)threads;
    return 1;
#endif
}
