/* The part of prefill.c that there is once for AVX2 and once for AVX-512: V is a vector of LANES numbers, VECS of them
   stand in a row of a tile, ISA(name) and TARGET make functions of one instruction set. */

/* c (TILE_ROWS, 0 .. vecs * LANES) = a (TILE_ROWS, k) @ b (k, ...), added to what is there or not. */
INLINE TARGET void ISA(tile)(const float *a, int64_t lda, const float *b, int64_t ldb, int64_t k, float *c, int64_t ldc,
                             const int vecs, const int add) {
    V total[TILE_ROWS][VECS];
    for (int r = 0; r < TILE_ROWS; r++)
        for (int i = 0; i < vecs; i++) total[r][i] = add ? LOAD(c + r * ldc + i * LANES) : SET1(0.0f);
    for (int64_t p = 0; p < k; p++, b += ldb) {
        V right[VECS];
        for (int i = 0; i < vecs; i++) right[i] = LOAD(b + i * LANES);
        for (int r = 0; r < TILE_ROWS; r++) {
            const V left = SET1(a[r * lda + p]);
            for (int i = 0; i < vecs; i++) total[r][i] = FMA(left, right[i], total[r][i]);
        }
    }
    for (int r = 0; r < TILE_ROWS; r++)
        for (int i = 0; i < vecs; i++) STORE(c + r * ldc + i * LANES, total[r][i]);
}

/* c (rows, n) = a (rows, k) @ b (k, n); rows is a multiple of TILE_ROWS, n one of LANES. */
TARGET static void ISA(multiply)(const float *a, int64_t lda, const float *b, int64_t ldb, int64_t k, float *c,
                                 int64_t ldc, int64_t rows, int64_t n, const int add) {
    int64_t i = 0;
    for (; i + VECS * LANES <= n; i += VECS * LANES)
        for (int64_t r = 0; r < rows; r += TILE_ROWS)
            ISA(tile)(a + r * lda, lda, b + i, ldb, k, c + r * ldc + i, ldc, VECS, add);
    for (; i < n; i += LANES)
        for (int64_t r = 0; r < rows; r += TILE_ROWS)
            ISA(tile)(a + r * lda, lda, b + i, ldb, k, c + r * ldc + i, ldc, 1, add);
}

/* A row of scores, of which `seen` count, to exp(score - largest so far). What was summed before is scaled to that. */
INLINE TARGET void ISA(soften)(float *scores, int64_t seen, const uint8_t *mask, float *largest, float *sum, float *out,
                               int64_t dim) {
    if (mask)
        for (int64_t t = 0; t < seen; t++) scores[t] = mask[t] ? scores[t] : -FLT_MAX;
    for (int64_t t = seen; t < KEYS; t++) scores[t] = -INFINITY;
    V top = LOAD(scores), total = SET1(0.0f);
    for (int64_t t = LANES; t < KEYS; t += LANES) top = MAX(top, LOAD(scores + t));
    const float before = *largest, found = TOP(top), now = found > before ? found : before;
    const V shift = SET1(now);
    for (int64_t t = 0; t < KEYS; t += LANES) {
        const V y = EXP(SUB(LOAD(scores + t), shift));
        STORE(scores + t, y);
        total = ADD(total, y);
    }
    if (now > before) {
        const V factor = EXP(SET1(before - now));
        for (int64_t i = 0; i < dim; i += LANES) STORE(out + i, MUL(factor, LOAD(out + i)));
        *sum *= FIRST(factor);
        *largest = now;
    }
    *sum += SUM(total);
}

/* QUERIES queries of one head, from `start` on. */
TARGET static void ISA(attend)(const Prefill *p, int64_t row, int64_t head, int64_t start) {
    float q[QUERIES * MAX_DIM], out[QUERIES * MAX_DIM], scores[QUERIES * KEYS], largest[QUERIES], sum[QUERIES];
    const int64_t dim = p->dim, shared = head / (p->heads / p->kv_heads);
    const int64_t count = p->queries - start < QUERIES ? p->queries - start : QUERIES;
    const int64_t rows = (count + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS;
    memset(q, 0, (size_t)(rows * dim) * sizeof(float));
    memset(out, 0, (size_t)(rows * dim) * sizeof(float));
    for (int64_t r = 0; r < count; r++) {
        const float *from = p->q + row * p->strides_q[0] + head * p->strides_q[1] + (start + r) * p->strides_q[2];
        for (int64_t i = 0; i < dim; i++) q[r * dim + i] = p->scale * from[i];
        largest[r] = -INFINITY;
        sum[r] = 0.0f;
    }
    const float *packed = p->packed + (row * p->kv_heads + shared) * p->tiles * KEYS * dim;
    const float *v = p->v + row * p->strides_v[0] + shared * p->strides_v[1];
    const uint8_t *mask = p->mask ? p->mask + row * p->mask_row + start * p->mask_query : NULL;
    for (int64_t t = 0; t < p->tiles; t++) {
        const int64_t first = t * KEYS, left = p->tokens - first, keys = left < KEYS ? left : KEYS;
        if (p->causal && first > start + count - 1) break;
        if (mask && !any_seen(mask + first, p->mask_query, count, keys)) continue;
        ISA(multiply)(q, dim, packed + first * dim, KEYS, dim, scores, KEYS, rows, KEYS, 0);
        for (int64_t r = 0; r < count; r++) {
            const int64_t until = start + r + 1 - first, seen = p->causal && until < keys ? until : keys;
            ISA(soften)(scores + r * KEYS, seen < 0 ? 0 : seen, mask ? mask + r * p->mask_query + first : NULL,
                        largest + r, sum + r, out + r * dim, dim);
        }
        ISA(multiply)(scores, KEYS, v + first * p->strides_v[2], p->strides_v[2], keys, out, dim, rows, dim, 1);
    }
    for (int64_t r = 0; r < count; r++) {
        float *to = p->out + ((row * p->queries + start + r) * p->heads + head) * dim;
        const int blind = largest[r] <= -FLT_MAX && sum[r] == sum[r]; /* has seen no key: padding; NaN stays NaN */
        for (int64_t i = 0; i < dim; i++) to[i] = blind ? 0.0f : out[r * dim + i] / sum[r];
    }
}
