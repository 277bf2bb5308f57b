/* The RMS norm of a few rows: one call instead of the six operations of torch that it is written in. */

#include <math.h>

#include "common.h"

/* out (rows, n) = weight (n) * x (rows, n) / sqrt(mean(x^2) + eps). */
EXPORT void rms_norm(const float *x, const float *weight, float eps, float *out, int64_t rows, int64_t n) {
    for (int64_t row = 0; row < rows; row++, x += n, out += n) {
        float part[16] = {0}, sum = 0.0f; /* as many sums at a time as the processor likes */
        int64_t i = 0;
        for (; i + 16 <= n; i += 16)
            for (int j = 0; j < 16; j++) part[j] += x[i + j] * x[i + j];
        for (int j = 0; j < 16; j++) sum += part[j];
        for (; i < n; i++) sum += x[i] * x[i];
        const float factor = 1.0f / sqrtf(sum / (float)n + eps);
        for (i = 0; i < n; i++) out[i] = weight[i] * (x[i] * factor);
    }
}
