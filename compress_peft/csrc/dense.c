/* Products of a few rows with a dense float32 weight: the layers that are not compressed, above all the output head.

   torch gives such products to MKL, which on processors that are not Intel's takes a generic way that does not keep up
   with the memory. With few rows memory is the limit: AVX-512 brings nothing over AVX2. */

#include "common.h"

#ifdef HAVE_X86
#define GROUP 4 /* rows of x that share a pass over a row of the weight */
#define SUMS 3  /* of each row of x: more do not fit into the registers, and a row must not depend on the others */

/* A row of the weight times `rows` (1 .. GROUP) rows of x: out[r * n]. The weight is read from front to back. Several of
   its rows at a time would spare loads of x, but be as many streams, each too short for the processor to run ahead. */
INLINE AVX2 void dot(const float *weight, float bias, int64_t k, const float *x, const int rows, float *out,
                     int64_t n) {
    __m256 total[GROUP][SUMS];
    for (int r = 0; r < rows; r++)
        for (int s = 0; s < SUMS; s++) total[r][s] = _mm256_setzero_ps();
    int64_t i = 0;
    for (; i + 8 * SUMS <= k; i += 8 * SUMS)
        for (int s = 0; s < SUMS; s++) {
            const __m256 w = _mm256_loadu_ps(weight + i + 8 * s);
            for (int r = 0; r < rows; r++)
                total[r][s] = _mm256_fmadd_ps(w, _mm256_loadu_ps(x + r * k + i + 8 * s), total[r][s]);
        }
    for (; i < k; i += 8) {
        static const int32_t first[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
        const __m256i there = _mm256_loadu_si256((const __m256i *)(first + 8 - (k - i < 8 ? k - i : 8)));
        const __m256 w = _mm256_maskload_ps(weight + i, there);
        for (int r = 0; r < rows; r++)
            total[r][0] = _mm256_fmadd_ps(w, _mm256_maskload_ps(x + r * k + i, there), total[r][0]);
    }
    for (int r = 0; r < rows; r++) {
        for (int s = 1; s < SUMS; s++) total[r][0] = _mm256_add_ps(total[r][0], total[r][s]);
        out[r * n] = sum_avx2(total[r][0]) + bias;
    }
}

/* The same for any number of rows of x. */
AVX2 static void dots(const float *weight, float bias, int64_t k, const float *x, int64_t rows, float *out, int64_t n) {
    for (; rows > 0; rows -= GROUP, x += GROUP * k, out += GROUP * n) switch (rows) {
            case 1: dot(weight, bias, k, x, 1, out, n); break;
            case 2: dot(weight, bias, k, x, 2, out, n); break;
            case 3: dot(weight, bias, k, x, 3, out, n); break;
            default: dot(weight, bias, k, x, GROUP, out, n);
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
    for (int64_t row = 0; row < n; row++) dots(weight + row * k, bias ? bias[row] : 0.0f, k, x, m, out + row, n);
    return 0;
#else
    (void)weight, (void)bias, (void)x, (void)out, (void)m, (void)n, (void)k, (void)isa, (void)threads;
    return 1;
#endif
}
