/* Attention of many queries, in tiles of which no more than the scores of one are held (FlashAttention, Dao et al. 2022,
   arXiv 2205.14135, algorithm 1). benchmarks/decode_cpu.py has torch's beside it. */

#include <float.h>
#include <math.h>

#include "common.h"
#include "exp_x86.h"

#define QUERIES 48 /* of a head, that go over its keys together */
#define KEYS 64    /* of a tile */
#define TILE_ROWS 6
#define MAX_DIM 256

typedef struct {
    const float *q, *v, *packed; /* keys (rows, kv_heads, tiles, dim, KEYS), 0 behind the last */
    const uint8_t *mask;
    float *out;
    int64_t queries, heads, kv_heads, tokens, tiles, dim, mask_row, mask_query;
    const int64_t *strides_q, *strides_v;
    float scale;
    int causal;
} Prefill;

#ifdef HAVE_X86
static int any_seen(const uint8_t *mask, int64_t stride, int64_t rows, int64_t keys) {
    for (int64_t r = 0; r < rows; r++)
        if (memchr(mask + r * stride, 1, (size_t)keys)) return 1;
    return 0;
}

#define TARGET AVX2
#define ISA(name) name##_avx2
#define V __m256
#define LANES 8
#define VECS 2
#define LOAD _mm256_loadu_ps
#define STORE _mm256_storeu_ps
#define SET1 _mm256_set1_ps
#define FMA _mm256_fmadd_ps
#define ADD _mm256_add_ps
#define SUB _mm256_sub_ps
#define MUL _mm256_mul_ps
#define MAX _mm256_max_ps
#define EXP exp_avx2
#define SUM sum_avx2
#define TOP top_avx2
#define FIRST _mm256_cvtss_f32
INLINE AVX2 float top_avx2(__m256 v) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
}
#include "prefill_x86.h"
#undef TARGET
#undef ISA
#undef V
#undef LANES
#undef VECS
#undef LOAD
#undef STORE
#undef SET1
#undef FMA
#undef ADD
#undef SUB
#undef MUL
#undef MAX
#undef EXP
#undef SUM
#undef TOP
#undef FIRST

#define TARGET AVX512
#define ISA(name) name##_avx512
#define V __m512
#define LANES 16
#define VECS 4
#define LOAD _mm512_loadu_ps
#define STORE _mm512_storeu_ps
#define SET1 _mm512_set1_ps
#define FMA _mm512_fmadd_ps
#define ADD _mm512_add_ps
#define SUB _mm512_sub_ps
#define MUL _mm512_mul_ps
#define MAX _mm512_max_ps
#define EXP exp_avx512
#define SUM _mm512_reduce_add_ps
#define TOP _mm512_reduce_max_ps
#define FIRST _mm512_cvtss_f32
#include "prefill_x86.h"
#endif

/* q (rows, heads, queries, dim), k and v (rows, kv_heads, tokens, dim), each with strides[3] of row, head and token in
   floats; out (rows, queries, heads, dim) without gaps. mask: bytes 0 or 1, mask_row and mask_query apart, or NULL.
   causal: a query sees the tokens up to its own number. Of a query that sees none, out is 0. dim is a multiple of 16 up to MAX_DIM, kv_heads divides heads.
   Returns 0, 1 where the processor lacks AVX2, 2 where there is no memory. */
EXPORT int prefill(const float *q, const float *k, const float *v, const uint8_t *mask, float *out, int64_t rows,
                   int64_t heads, int64_t kv_heads, int64_t queries, int64_t tokens, int64_t dim,
                   const int64_t *strides_q, const int64_t *strides_k, const int64_t *strides_v, int64_t mask_row,
                   int64_t mask_query, int causal, float scale, int isa, int threads) {
#ifdef HAVE_X86
    if (isa < 2 || dim > MAX_DIM) return 1;
    (void)threads;
    const int64_t tiles = (tokens + KEYS - 1) / KEYS, blocks = (queries + QUERIES - 1) / QUERIES;
    float *packed = malloc((size_t)(rows * kv_heads * tiles * KEYS * dim) * sizeof(float));
    if (!packed) return 2;
    const Prefill p = {q,    v,     packed, mask,     out,        queries,   heads,     kv_heads, tokens,
                       tiles, dim,  mask_row, mask_query, strides_q, strides_v, scale, causal};
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
#endif
    {
#ifdef _OPENMP
#pragma omp for schedule(static)
#endif
        for (int64_t item = 0; item < rows * kv_heads * tiles; item++) {
            const int64_t head = item / tiles, first = item % tiles * KEYS;
            const float *from = k + head / kv_heads * strides_k[0] + head % kv_heads * strides_k[1];
            float *to = packed + item * KEYS * dim;
            for (int64_t t = 0; t < KEYS; t++)
                for (int64_t i = 0; i < dim; i++)
                    to[i * KEYS + t] = first + t < tokens ? from[(first + t) * strides_k[2] + i] : 0.0f;
        }
#ifdef _OPENMP
#pragma omp for schedule(dynamic)
#endif
        for (int64_t item = 0; item < rows * heads * blocks; item++) {
            const int64_t start = (blocks - 1 - item / (rows * heads)) * QUERIES; /* the longest first */
            const int64_t row = item % (rows * heads) / heads, head = item % heads;
            if (isa >= 3) attend_avx512(&p, row, head, start);
            else attend_avx2(&p, row, head, start);
        }
    }
    free(packed);
    return 0;
#else
    (void)q, (void)k, (void)v, (void)mask, (void)out, (void)rows, (void)heads, (void)kv_heads, (void)queries;
    (void)tokens, (void)dim, (void)strides_q, (void)strides_k, (void)strides_v, (void)mask_row, (void)mask_query;
    (void)causal, (void)scale, (void)isa, (void)threads;
    return 1;
#endif
}
