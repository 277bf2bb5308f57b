/* What the CPU kernels share. Plain C: no headers of torch or Python.

   isa: 0 = portable C, 2 = AVX2, 3 = AVX-512; the caller passes at most cpu_best_isa(). */

#ifndef COMPRESS_PEFT_COMMON_H
#define COMPRESS_PEFT_COMMON_H

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(_MSC_VER)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

#if (defined(__x86_64__) || defined(_M_X64)) && defined(__GNUC__)
#define HAVE_X86 1
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2,fma")))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#define INLINE static inline __attribute__((always_inline))
#else
#define INLINE static inline
#endif

#define MAX_ROWS 8           /* rows of x that one pass over the codes serves */
#define WIDTH 4              /* rows of the weight that are decoded together */
#define SHORT_ROWS 4096      /* bytes of WIDTH rows up to which the next ones are asked for beforehand */
#define PARALLEL_FROM 131072 /* products or weights below which a parallel region costs more than it saves */

/* Ask for the codes of the next rows beforehand. Where rows are short the processor does not look ahead far enough on
   its own (small layers out of memory: 1.7 times faster, Zen 4); of long ones a burst of requests would only get in
   the way. */
INLINE void prefetch(const uint8_t *from, const uint8_t *end, int64_t bytes) {
#if defined(__GNUC__)
    if (bytes > SHORT_ROWS) return;
    if (end - from < bytes) bytes = end - from;
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i);
#else
    (void)from, (void)end, (void)bytes;
#endif
}

INLINE uint16_t to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((bits >> 16) | 0x40u); /* NaN stays NaN */
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

/* A copy of x in which, of every `group` values, those at even places come first; NULL if there is no memory. */
INLINE float *even_first(const float *x, int64_t count, int64_t group) {
    float *moved = malloc((size_t)count * sizeof(float));
    if (!moved) return NULL;
    for (int64_t start = 0; start < count; start += group)
        for (int64_t i = 0; i < group / 2; i++) {
            moved[start + i] = x[start + 2 * i];
            moved[start + group / 2 + i] = x[start + 2 * i + 1];
        }
    return moved;
}

#ifdef HAVE_X86
/* 8 values to float32 or bfloat16 (the other pointer is NULL). */
INLINE AVX2 void store_avx2(__m256 v, float *f32, uint16_t *bf16, int64_t i) {
    if (f32) {
        _mm256_storeu_ps(f32 + i, v);
        return;
    }
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i half = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i top = _mm256_srli_epi32(half, 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(top, top), 0x08);
    _mm_storeu_si128((__m128i *)(bf16 + i), _mm256_castsi256_si128(packed));
}

INLINE AVX2 float sum_avx2(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}

/* 16 values, as above. */
INLINE AVX512 void store_avx512(__m512 v, float *f32, uint16_t *bf16, int64_t i) {
    if (f32) {
        _mm512_storeu_ps(f32 + i, v);
        return;
    }
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i half = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    _mm256_storeu_si256((__m256i *)(bf16 + i), _mm512_cvtepi32_epi16(_mm512_srli_epi32(half, 16)));
}
#endif

#endif
