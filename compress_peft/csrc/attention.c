/* Attention of one query a sequence, which is decoding: softmax(scale * q k^T) v. A pass over keys and values serves all
   the queries that share them. torch's kernel, made for many queries, takes longer where there are many tokens. */

#include <float.h>

#include "common.h"
#include "exp_x86.h"

#ifdef HAVE_X86
#define QUERIES 3 /* that share a pass: with CHUNK accumulators each they fit into the registers */
#define CHUNK 4   /* vectors of a value that are summed at a time */
#define TOKENS 32
#define AHEAD 8   /* tokens ahead that are asked for beforehand */

/* scores[r * n + t] = scale * q[r] . k[t] of `rows` queries, -FLT_MAX where the mask is 0. */
INLINE AVX2 void score(const float *q, const float *k, int64_t step, const uint8_t *mask, float scale, int64_t n,
                       int64_t dim, const int rows, float *scores) {
    for (int64_t t = 0; t < n; t++, k += step) {
        __m256 total[QUERIES];
        for (int r = 0; r < rows; r++) total[r] = _mm256_setzero_ps();
        for (int64_t i = 0; i < dim; i += 8) {
            const __m256 key = _mm256_loadu_ps(k + i);
            if (i % 16 == 0) __builtin_prefetch(k + AHEAD * step + i);
            for (int r = 0; r < rows; r++)
                total[r] = _mm256_fmadd_ps(key, _mm256_loadu_ps(q + r * dim + i), total[r]);
        }
        for (int r = 0; r < rows; r++)
            scores[r * n + t] = mask && !mask[t] ? -FLT_MAX : scale * sum_avx2(total[r]);
    }
}

/* Scores to exp(score - largest). Returns the sum of these. */
AVX2 static float exponentials(float *scores, int64_t n, float *largest) {
    float top = -FLT_MAX, sum = 0.0f;
    for (int64_t t = 0; t < n; t++) top = scores[t] > top ? scores[t] : top;
    const __m256 shift = _mm256_set1_ps(top);
    __m256 sums = _mm256_setzero_ps();
    int64_t t = 0;
    for (; t + 8 <= n; t += 8) {
        const __m256 y = exp_avx2(_mm256_sub_ps(_mm256_loadu_ps(scores + t), shift));
        _mm256_storeu_ps(scores + t, y);
        sums = _mm256_add_ps(sums, y);
    }
    for (; t < n; t++) {
        scores[t] = _mm256_cvtss_f32(exp_avx2(_mm256_set1_ps(scores[t] - top)));
        sum += scores[t];
    }
    *largest = top;
    return sum + sum_avx2(sums);
}

/* out[r * stride + 8 i] += sum over t of weights[r * n + t] * v[t], t < many, of `rows` queries and `chunk` vectors. */
INLINE AVX2 void weigh(const float *weights, int64_t n, const float *v, int64_t step, int64_t many, const int rows,
                       const int chunk, float *out, int64_t stride) {
    __m256 total[QUERIES][CHUNK];
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < chunk; i++) total[r][i] = _mm256_loadu_ps(out + r * stride + 8 * i);
    for (int64_t t = 0; t < many; t++, v += step)
        for (int i = 0; i < chunk; i++) {
            const __m256 value = _mm256_loadu_ps(v + 8 * i);
            if (i % 2 == 0) __builtin_prefetch(v + AHEAD * step + 8 * i);
            for (int r = 0; r < rows; r++)
                total[r][i] = _mm256_fmadd_ps(_mm256_set1_ps(weights[r * n + t]), value, total[r][i]);
        }
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < chunk; i++) _mm256_storeu_ps(out + r * stride + 8 * i, total[r][i]);
}

/* Of `rows` queries: out[r * (dim + 2)] = sum of exp(score - largest) * v, then their sum and the largest score. */
INLINE AVX2 void attend(const float *q, const float *k, const float *v, const uint8_t *mask, float scale, int64_t n,
                        int64_t dim, int64_t step_k, int64_t step_v, const int rows, float *scores, float *out) {
    const int64_t stride = dim + 2;
    score(q, k, step_k, mask, scale, n, dim, rows, scores);
    for (int r = 0; r < rows; r++)
        out[r * stride + dim] = exponentials(scores + r * n, n, out + r * stride + dim + 1);
    for (int r = 0; r < rows; r++) memset(out + r * stride, 0, (size_t)dim * sizeof(float));
    for (int64_t t = 0; t < n; t += TOKENS) { /* few enough to be in the cache when the next vectors' turn comes */
        const int64_t many = n - t < TOKENS ? n - t : TOKENS;
        const float *from = v + t * step_v;
        int64_t i = 0;
        for (; i + 8 * CHUNK <= dim; i += 8 * CHUNK)
            weigh(scores + t, n, from + i, step_v, many, rows, CHUNK, out + i, stride);
        for (; i < dim; i += 8) weigh(scores + t, n, from + i, step_v, many, rows, 1, out + i, stride);
    }
}

/* The same for any number of queries of one head of keys and values. */
AVX2 static void attend_all(const float *q, const float *k, const float *v, const uint8_t *mask, float scale, int64_t n,
                            int64_t dim, int64_t step_k, int64_t step_v, int64_t rows, float *scores, float *out) {
    for (; rows > 0; rows -= QUERIES, q += QUERIES * dim, out += QUERIES * (dim + 2)) switch (rows) {
            case 1: attend(q, k, v, mask, scale, n, dim, step_k, step_v, 1, scores, out); break;
            case 2: attend(q, k, v, mask, scale, n, dim, step_k, step_v, 2, scores, out); break;
            default: attend(q, k, v, mask, scale, n, dim, step_k, step_v, QUERIES, scores, out);
        }
}

/* The parts of a head's tokens together: out (dim). */
AVX2 static void join(const float *found, int64_t parts, int64_t distance, int64_t dim, float *out) {
    float top = -FLT_MAX, sum = 0.0f;
    for (int64_t p = 0; p < parts; p++) {
        const float largest = found[p * distance + dim + 1];
        top = largest > top ? largest : top;
    }
    memset(out, 0, (size_t)dim * sizeof(float));
    for (int64_t p = 0; p < parts; p++, found += distance) {
        const float factor = _mm256_cvtss_f32(exp_avx2(_mm256_set1_ps(found[dim + 1] - top)));
        sum += factor * found[dim];
        for (int64_t i = 0; i < dim; i++) out[i] += factor * found[i];
    }
    for (int64_t i = 0; i < dim; i++) out[i] /= sum;
}
#endif

/* q (rows, heads, dim) and out alike, without gaps; k, v (rows, kv_heads, tokens, dim) with strides[3] each of row,
   head and token in floats; mask (rows, tokens) of bytes, rows mask_stride apart, or NULL: 0 = not seen. dim is a
   multiple of 8, kv_heads divides heads. Returns 0, 1 where the processor lacks AVX2, 2 where there is no memory. */
EXPORT int attention(const float *q, const float *k, const float *v, const uint8_t *mask, float *out, int64_t rows,
                     int64_t heads, int64_t kv_heads, int64_t tokens, int64_t dim, const int64_t *strides_k,
                     const int64_t *strides_v, int64_t mask_stride, float scale, int isa, int threads) {
#ifdef HAVE_X86
    if (isa < 2) return 1;
    if (rows * heads * tokens * dim < PARALLEL_FROM) threads = 1;
    /* Threads share the tokens of a head: there may be fewer heads than threads, or one more. */
    const int64_t share = tokens < 16 * threads ? tokens : (tokens + threads - 1) / threads;
    const int64_t parts = (tokens + share - 1) / share;
    const int64_t group = heads / kv_heads, units = rows * kv_heads, distance = heads * (dim + 2);
    float *found = malloc((size_t)(rows * parts * distance) * sizeof(float));
    float *scores = malloc((size_t)(units * parts * QUERIES * share) * sizeof(float));
    if (found && scores) {
#ifdef _OPENMP
#pragma omp parallel for schedule(static) num_threads(threads)
#endif
        for (int64_t item = 0; item < units * parts; item++) {
            const int64_t part = item / units, row = item % units / kv_heads, head = item % kv_heads;
            const int64_t first = part * share, n = tokens - first < share ? tokens - first : share;
            attend_all(q + (row * heads + head * group) * dim,
                       k + row * strides_k[0] + head * strides_k[1] + first * strides_k[2],
                       v + row * strides_v[0] + head * strides_v[1] + first * strides_v[2],
                       mask ? mask + row * mask_stride + first : NULL, scale, n, dim, strides_k[2], strides_v[2], group,
                       scores + item * QUERIES * share,
                       found + (row * parts + part) * distance + head * group * (dim + 2));
        }
        for (int64_t row = 0; row < rows; row++)
            for (int64_t head = 0; head < heads; head++)
                join(found + row * parts * distance + head * (dim + 2), parts, distance, dim,
                     out + (row * heads + head) * dim);
    }
    const int failed = found && scores ? 0 : 2;
    free(found);
    free(scores);
    return failed;
#else
    (void)q, (void)k, (void)v, (void)mask, (void)out, (void)rows, (void)heads, (void)kv_heads, (void)tokens, (void)dim;
    (void)strides_k, (void)strides_v, (void)mask_stride, (void)scale, (void)isa, (void)threads;
    return 1;
#endif
}
