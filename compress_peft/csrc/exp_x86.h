/* exp of a vector of numbers that are not positive, as softmax needs it, to about 1 unit in the last place; 0 below -87,
   NaN of NaN. */

#ifndef COMPRESS_PEFT_EXP_H
#define COMPRESS_PEFT_EXP_H

#include "common.h"

#ifdef HAVE_X86
#define EXP_SERIES {1.0f / 5040, 1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}
#define EXP_LOWEST (-87.0f)
#define LOG2_E 1.44269504f
#define LN2_HIGH 0.693359375f /* ln 2 in two parts, the first of few digits */
#define LN2_LOW (-2.12194440e-4f)
#define NEAREST (_MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)

INLINE AVX2 __m256 exp_avx2(__m256 x) {
    static const float series[] = EXP_SERIES;
    const __m256 lowest = _mm256_set1_ps(EXP_LOWEST), there = _mm256_cmp_ps(x, lowest, _CMP_NLT_UQ);
    x = _mm256_max_ps(lowest, x);
    const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(LOG2_E)), NEAREST);
    x = _mm256_fnmadd_ps(n, _mm256_set1_ps(LN2_HIGH), x);
    x = _mm256_fnmadd_ps(n, _mm256_set1_ps(LN2_LOW), x);
    __m256 y = _mm256_set1_ps(series[0]);
    for (int i = 1; i < 8; i++) y = _mm256_fmadd_ps(y, x, _mm256_set1_ps(series[i]));
    const __m256i power = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
    return _mm256_and_ps(_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(y), power)), there);
}

INLINE AVX512 __m512 exp_avx512(__m512 x) {
    static const float series[] = EXP_SERIES;
    const __m512 lowest = _mm512_set1_ps(EXP_LOWEST);
    const __mmask16 there = _mm512_cmp_ps_mask(x, lowest, _CMP_NLT_UQ);
    x = _mm512_max_ps(lowest, x);
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(LOG2_E)), NEAREST);
    x = _mm512_fnmadd_ps(n, _mm512_set1_ps(LN2_HIGH), x);
    x = _mm512_fnmadd_ps(n, _mm512_set1_ps(LN2_LOW), x);
    __m512 y = _mm512_set1_ps(series[0]);
    for (int i = 1; i < 8; i++) y = _mm512_fmadd_ps(y, x, _mm512_set1_ps(series[i]));
    return _mm512_maskz_scalef_ps(there, y, n);
}
#endif

#endif
