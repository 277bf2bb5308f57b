/* The kernels that other kernels call; what they do stands where they are defined. */

#ifndef COMPRESS_PEFT_KERNELS_H
#define COMPRESS_PEFT_KERNELS_H

#include "common.h"

#define NF4_MATMUL(name)                                                                                            \
    EXPORT int name(const uint8_t *codes, const float *absmax, const uint8_t *absmax_codes,                         \
                    const float *absmax_scales, const float *map, const float *offset, int64_t block,               \
                    const float *x, float *out, int64_t m, int64_t n, int64_t k, int isa, int threads)
NF4_MATMUL(nf4_matmul);
NF4_MATMUL(fp4_matmul);
#undef NF4_MATMUL

EXPORT int affine_matmul(const uint8_t *codes, const void *scales, const void *zeros, int half_scales, int zero_kind,
                         int bits, int64_t group, const float *x, float *out, int64_t m, int64_t n, int64_t k, int isa,
                         int threads);
EXPORT int dense_matmul(const float *weight, const float *bias, const float *x, float *out, int64_t m, int64_t n,
                        int64_t k, int isa, int threads);
EXPORT void rms_norm(const float *x, const float *weight, float eps, float *out, int64_t rows, int64_t n);
EXPORT int attention(const float *q, const float *k, const float *v, const uint8_t *mask, float *out, int64_t rows,
                     int64_t heads, int64_t kv_heads, int64_t tokens, int64_t dim, const int64_t *strides_k,
                     const int64_t *strides_v, int64_t mask_stride, float scale, int isa, int threads);

#endif
