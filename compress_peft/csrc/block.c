/* A block of a Llama-like decoder at one token a sequence, by one call: what a dozen calls from Python would start. It
   runs the same kernels in the same order, so that its results are theirs.

   h = x + o(attention(rope(q), keys + rope(k), values + v)), q, k, v of norm(x); out = h + down(silu(gate) * up), gate
   and up of norm(h). */

#include <math.h>

#include "common.h"
#include "exp_x86.h"
#include "kernels.h"

enum { DENSE, AFFINE, NF4, FP4 };

/* A linear layer (n, k), its tensors as the products of these kinds take them. */
typedef struct {
    int64_t kind, n, k;
    const void *tensors[6];
    int64_t numbers[4]; /* affine: half_scales, zero_kind, bits, group; nf4 and fp4: block */
    const float *bias;  /* (n) or NULL */
    const float *scale; /* (rows, n) by which the output is multiplied, rows `scale_step` floats apart; or NULL */
    int64_t scale_step;
} Linear;

typedef struct {
    const float *weight; /* NULL: there is none */
    float eps;
} Norm;

typedef struct {
    Linear q, k, v, o, gate, up, down;
    Norm before, after, of_q, of_k; /* of_q and of_k: of each head */
    int64_t hidden, heads, kv_heads, dim;
    float scaling;
} Block;

#ifdef HAVE_X86
static int product(const Linear *w, const float *x, float *out, int64_t rows, int isa, int threads) {
    const void *const *t = w->tensors;
    const int64_t *p = w->numbers;
    int failed;
    switch (w->kind) {
        case DENSE: return dense_matmul(t[0], w->bias, x, out, rows, w->n, w->k, 2, threads);
        case AFFINE:
            failed = affine_matmul(t[0], t[1], t[2], (int)p[0], (int)p[1], (int)p[2], p[3], x, out, rows, w->n, w->k,
                                   isa, threads);
            break;
        case NF4:
            failed = nf4_matmul(t[0], t[1], t[2], t[3], t[4], t[5], p[0], x, out, rows, w->n, w->k, isa, threads);
            break;
        default:
            failed = fp4_matmul(t[0], t[1], t[2], t[3], t[4], t[5], p[0], x, out, rows, w->n, w->k, isa, threads);
    }
    if (w->bias)
        for (int64_t r = 0; r < rows; r++)
            for (int64_t i = 0; i < w->n; i++) out[r * w->n + i] += w->bias[i];
    return failed;
}

static int linear(const Linear *w, const float *x, float *out, int64_t rows, int isa, int threads) {
    const int failed = product(w, x, out, rows, isa, threads);
    if (w->scale)
        for (int64_t r = 0; r < rows; r++)
            for (int64_t i = 0; i < w->n; i++) out[r * w->n + i] *= w->scale[r * w->scale_step + i];
    return failed;
}

/* to (rows, heads, dim), rows and heads `row` and `head` floats apart, = x * cos + rotate_half(x) * sin of x without
   gaps; cos and sin (dim) of each row, `step` floats apart. May be in place. */
static void rotate(const float *x, float *to, int64_t row, int64_t head, const float *cosine, const float *sine,
                   int64_t step, int64_t rows, int64_t heads, int64_t dim) {
    const int64_t half = dim / 2;
    for (int64_t r = 0; r < rows; r++, cosine += step, sine += step)
        for (int64_t h = 0; h < heads; h++, x += dim) {
            float *place = to + r * row + h * head;
            for (int64_t i = 0; i < half; i++) {
                const float first = x[i], second = x[i + half];
                place[i] = first * cosine[i] - second * sine[i];
                place[i + half] = second * cosine[i + half] + first * sine[i + half];
            }
        }
}

/* gate = silu(gate) * up = gate / (1 + exp(-gate)) * up; exp of a number that is not positive, on either side. */
AVX2 static void silu_times(float *gate, const float *up, int64_t count) {
    const __m256 one = _mm256_set1_ps(1.0f), zero = _mm256_setzero_ps(), sign = _mm256_set1_ps(-0.0f);
    for (int64_t i = 0; i < count; i += 8) {
        float x[8] = {0}, y[8] = {0};
        const int64_t many = count - i < 8 ? count - i : 8;
        memcpy(x, gate + i, (size_t)many * sizeof(float));
        memcpy(y, up + i, (size_t)many * sizeof(float));
        const __m256 g = _mm256_loadu_ps(x);
        const __m256 e = exp_avx2(_mm256_or_ps(g, sign)); /* exp(-|g|) */
        const __m256 top = _mm256_blendv_ps(one, e, _mm256_cmp_ps(g, zero, _CMP_LT_OQ));
        const __m256 silu = _mm256_mul_ps(g, _mm256_div_ps(top, _mm256_add_ps(one, e)));
        _mm256_storeu_ps(x, _mm256_mul_ps(silu, _mm256_loadu_ps(y)));
        memcpy(gate + i, x, (size_t)many * sizeof(float));
    }
}

static void add(float *out, const float *x, int64_t count) {
    for (int64_t i = 0; i < count; i++) out[i] = x[i] + out[i];
}
#endif

/* x and out (rows, hidden) without gaps; cosine, sine (dim) of each row, `step` floats apart (0: of all). keys, values
   (rows, kv_heads, tokens, dim) with strides as in attention.c, of which the last token is written here; mask as there.
   Returns 0, 1 where the processor lacks AVX2, 2 where there is no memory. */
EXPORT int decode_block(const Block *b, const float *x, float *out, int64_t rows, const float *cosine,
                        const float *sine, int64_t step, float *keys, float *values, int64_t tokens,
                        const int64_t *strides_k, const int64_t *strides_v, const uint8_t *mask, int64_t mask_stride,
                        int isa, int threads) {
#ifdef HAVE_X86
    if (isa < 2) return 1;
    const int64_t dim = b->dim, n_q = b->heads * dim, n_k = b->kv_heads * dim, wide = b->gate.n;
    const int64_t most = n_q > wide ? n_q : wide;
    float *space = malloc((size_t)(rows * (b->hidden + 2 * most + 2 * n_k)) * sizeof(float));
    if (!space) return 2;
    float *h = space, *one = h + rows * b->hidden, *two = one + rows * most, *k = two + rows * most, *v = k + rows * n_k;
    int failed = 0;
    rms_norm(x, b->before.weight, b->before.eps, h, rows, b->hidden);
    failed |= linear(&b->q, h, one, rows, isa, threads);
    failed |= linear(&b->k, h, k, rows, isa, threads);
    failed |= linear(&b->v, h, v, rows, isa, threads);
    if (b->of_q.weight) rms_norm(one, b->of_q.weight, b->of_q.eps, one, rows * b->heads, dim);
    if (b->of_k.weight) rms_norm(k, b->of_k.weight, b->of_k.eps, k, rows * b->kv_heads, dim);
    rotate(one, one, n_q, dim, cosine, sine, step, rows, b->heads, dim);
    rotate(k, keys + (tokens - 1) * strides_k[2], strides_k[0], strides_k[1], cosine, sine, step, rows, b->kv_heads, dim);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t j = 0; j < b->kv_heads; j++)
            memcpy(values + r * strides_v[0] + j * strides_v[1] + (tokens - 1) * strides_v[2],
                   v + (r * b->kv_heads + j) * dim, (size_t)dim * sizeof(float));
    failed |= attention(one, keys, values, mask, two, rows, b->heads, b->kv_heads, tokens, dim, strides_k, strides_v,
                        mask_stride, b->scaling, 2, threads);
    failed |= linear(&b->o, two, out, rows, isa, threads);
    add(out, x, rows * b->hidden);
    rms_norm(out, b->after.weight, b->after.eps, h, rows, b->hidden);
    failed |= linear(&b->gate, h, one, rows, isa, threads);
    failed |= linear(&b->up, h, two, rows, isa, threads);
    silu_times(one, two, rows * wide);
    failed |= linear(&b->down, one, h, rows, isa, threads);
    for (int64_t i = 0; i < rows * b->hidden; i++) out[i] += h[i];
    free(space);
    return failed ? 2 : 0;
#else
    (void)b, (void)x, (void)out, (void)rows, (void)cosine, (void)sine, (void)step, (void)keys, (void)values;
    (void)tokens, (void)strides_k, (void)strides_v, (void)mask, (void)mask_stride, (void)isa, (void)threads;
    return 1;
#endif
}
