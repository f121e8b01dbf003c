/* The forward pass of engine/transformer.py in C: the same steps in the same order, for CPUs.

   PyTorch's kernels each start and stop all threads, for a few microseconds of work where a single token is computed,
   and its fast matrix products want formats that not every processor has. Here one team of threads walks through all
   layers, weights are read in the order in which they lie, from as few bytes as hold them (forms.h), and all arithmetic
   is float32.

   One idea carries it: a PANEL of 16 numbers that lie side by side, times a scalar, added to 16 sums. A weight matrix
   is cut into panels of 16 outputs; a block of the cache holds the keys of 16 tokens turned so that they lie side by
   side; and values already do. tile() is the only loop that multiplies.

   Compiled for this machine by engine/native.py. Indices are long: a cache may hold more than 2^31 numbers. */

#include <math.h>
#include <omp.h>
#include <string.h>

#include "forms.h"

#define ROWS 6            /* rows of one tile: with AVX2, 6 * 2 sums, 2 weights and 1 scalar fill the 16 registers */
#define GROUP 24          /* rows of attention that read a block of the cache together */
#define NEAR 4            /* blocks of values that stay in the first-level cache */
#define ROW_BLOCK 60      /* rows computed before the next ones: their inputs stay in the second-level cache */
#define CHUNK 128         /* inputs for which a panel's weights, as float32, stay in the first-level cache */

typedef struct { const void *weights; const float *bias; long outputs, inputs, form; } Matrix; /* NULL: there is none */
typedef struct { const float *weight, *bias; } Norm;                     /* bias: LayerNorm; without one, RMSNorm */
typedef struct { Norm norm1, norm2, q_norm, k_norm; Matrix qkv, out, gate, up, down; } Layer;
typedef struct {
    long layers, hidden, heads, kv_heads, dim, inner, window;
    long cache_form;                                            /* of keys and values: FLOAT32 or FLOAT16 */
    float eps;
    const Layer *layer;
    Norm norm;
    Matrix head, embedding;                                     /* both (vocabulary, hidden); tied: the same weights */
    const float *positions;                                     /* (context, hidden); NULL: rotary positions */
    const float *angles;                                        /* (dim / 2) */
    void *keys, *values;           /* (blocks, layers, KV heads, dim, 16) and (blocks, layers, KV heads, 16, dim) */
} Model;
typedef struct { long first, count, length; const int32_t *blocks; } Part;
typedef struct {
    long rows, parts, wanted;
    const int32_t *token, *position, *wanted_row;
    const Part *part;
    const int32_t *part_of;                                     /* row -> its part */
} Step;

/* ---- sixteen at a time */

INLINE vec choose(ivec which, vec yes, vec no) { return (vec)((which & (ivec)yes) | (~which & (ivec)no)); }

/* sums[r] += x[r][k] * panel[k], for all k. x: rows `stride` apart. panel: 16 numbers every `step`, in a float form.
   soon, later: memory as large as the panel that will be read next; NULL for none. */
INLINE void tile(int rows, vec total[][PARTS], const float *x, long stride, const void *panel, long step, long inputs,
                 enum Form form, const void *soon, const void *later) {
    const long bytes = PANEL * (form == FLOAT32 ? 4 : 2);
    vec sums[ROWS][PARTS];                                      /* in registers: total is memory */
    for (int r = 0; r < rows; r++)
        for (int p = 0; p < PARTS; p++) sums[r][p] = total[r][p];
#pragma GCC unroll 4
    for (long k = 0; k < inputs; k++) {
        vec w[PARTS];
        if (soon) __builtin_prefetch((const char *)soon + k * bytes);
        if (later) __builtin_prefetch((const char *)later + k * bytes);
        for (int p = 0; p < PARTS; p++) w[p] = load(panel, k * step + p * LANES, form);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
            for (int p = 0; p < PARTS; p++) sums[r][p] += splat(x[r * stride + k]) * w[p];
    }
    for (int r = 0; r < rows; r++)
        for (int p = 0; p < PARTS; p++) total[r][p] = sums[r][p];
}

/* e^x to about 1e-7: 2^n by shifting n into the exponent, the rest of x by a polynomial. */
INLINE vec exp_of(vec x) {
    x = choose(x < -87.0f, splat(-87.0f), choose(x > 87.0f, splat(87.0f), x));
    vec shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;     /* adding 1.5 * 2^23 rounds */
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return (vec)((ivec)p + ((ivec)shifted << 23));
}

INLINE vec silu(vec x) { return x / (1.0f + exp_of(-x)); }

INLINE vec gelu(vec x) {                                        /* the tanh form; (1 + tanh(u)) / 2 = e^(2u) / (e^(2u) + 1) */
    vec u = 0.79788456f * (x + 0.044715f * x * x * x);
    vec e = exp_of(2.0f * u);
    return x * (e / (e + 1.0f));
}

/* Calls f with the number of rows as a constant, so that each number has code of its own; six when there are more. */
#define BY_ROWS(count, f, ...)                                                                                          \
    switch (count) {                                                                                                    \
    case 1: f(1, __VA_ARGS__); break;                                                                                   \
    case 2: f(2, __VA_ARGS__); break;                                                                                   \
    case 3: f(3, __VA_ARGS__); break;                                                                                   \
    case 4: f(4, __VA_ARGS__); break;                                                                                   \
    case 5: f(5, __VA_ARGS__); break;                                                                                   \
    default: f(6, __VA_ARGS__);                                                                                         \
    }

/* ---- a matrix product, spread over the team */

enum After { STORE, ADD, GELU };          /* what becomes of the sums: stored, added to what is there, activated */

INLINE void store(const Matrix *m, vec sums[PARTS], long first, enum After after, float *y) {
    float out[PANEL];
    for (int p = 0; p < PARTS; p++) *(vec_unaligned *)(out + p * LANES) = sums[p];
    long count = m->outputs - first < PANEL ? m->outputs - first : PANEL;
    if (after == ADD) for (long i = 0; i < count; i++) out[i] += y[first + i];
    if (after == GELU)
        for (int p = 0; p < PARTS; p++) *(vec_unaligned *)(out + p * LANES) = gelu(*(vec_unaligned *)(out + p * LANES));
    memcpy(y + first, out, count * sizeof(float));
}

INLINE const char *panel_of(const Matrix *m, long i) {
    return (const char *)m->weights + i * bytes_of(m->form, m->inputs);
}

/* What the sums begin with: the outputs' biases, or zero. */
INLINE void begin(const Matrix *m, long i, long rows, vec sums[][PARTS]) {
    for (long r = 0; r < rows; r++)
        for (int p = 0; p < PARTS; p++)
            sums[r][p] = m->bias ? *(const vec_unaligned *)(m->bias + i * PANEL + p * LANES) : splat(0);
}

/* The i-th panel's outputs of the rows, before they are stored: (rows, 16). */
INLINE void sums_of(const Matrix *m, long i, const float *x, long rows, vec sums[][PARTS], enum Form form) {
    float room[CHUNK * PANEL] __attribute__((aligned(64)));
    const int packed = form == INT8 || form == INT4;
    const char *panel = panel_of(m, i);
    begin(m, i, rows, sums);
    for (long k = 0; k < m->inputs; k += CHUNK) {
        const long inputs = m->inputs - k < CHUNK ? m->inputs - k : CHUNK;
        const char *from = panel + bytes_of(form, k), *weights = packed ? (char *)room : from;
        if (packed) unpack(from, inputs, form, room);
        long count, tiles = (rows + ROWS - 1) / ROWS;
        for (long r = 0; r < rows; r += count) {
            count = (rows - r + tiles - 1) / tiles;             /* eight rows as four and four, not six and two */
            tiles--;
            BY_ROWS(count, tile, sums + r, x + r * m->inputs + k, m->inputs, weights, PANEL, inputs,
                    packed ? FLOAT32 : form, packed ? 0 : from + AHEAD, 0);
        }
    }
}

static __attribute__((noinline, noclone)) void
panel_sums(const Matrix *m, long i, const float *x, long rows, vec sums[][PARTS]) {
    switch (m->form) {
    case FLOAT32: sums_of(m, i, x, rows, sums, FLOAT32); break;
    case FLOAT16: sums_of(m, i, x, rows, sums, FLOAT16); break;
    case BFLOAT16: sums_of(m, i, x, rows, sums, BFLOAT16); break;
    case INT8: sums_of(m, i, x, rows, sums, INT8); break;
    case INT4: sums_of(m, i, x, rows, sums, INT4); break;
    }
}

/* One row's sums of two panels at once: each sum waits some cycles for the one before it, but not for the other's. */
INLINE void pair_of(const char *const panel[2], const float *x, long inputs, vec sums[2][PARTS], enum Form form) {
    vec total[2][PARTS], scale[2][PARTS], least[2][PARTS];
    memcpy(total, sums, sizeof total);
    for (long k = 0; k < inputs; k += SET) {
        const char *set[2] = {panel[0] + bytes_of(form, k), panel[1] + bytes_of(form, k)};
        for (int h = 0; h < 2 && (form == INT8 || form == INT4); h++)
            for (int p = 0; p < PARTS; p++) {
                scale[h][p] = load(set[h], p * LANES, FLOAT16);
                least[h][p] = load(set[h], PANEL + p * LANES, FLOAT16);
            }
        const long count = inputs - k < SET ? inputs - k : SET;
#pragma GCC unroll 4
        for (long j = 0; j < count; j += form == INT4 ? 2 : 1)
            for (int h = 0; h < 2; h++)
                for (int p = 0; p < PARTS; p++) {
                    vec w, next = {};
                    if (form == INT4) {
                        const ivec two = bytes(set[h] + PANEL * 4 + j / 2 * PANEL + p * LANES, 0);
                        w = least[h][p] + scale[h][p] * __builtin_convertvector(two & 15, vec);
                        next = least[h][p] + scale[h][p] * __builtin_convertvector(two >> 4, vec);
                    } else if (form == INT8) {
                        const ivec one = bytes(set[h] + PANEL * 2 + j * PANEL + p * LANES, 1);
                        w = scale[h][p] * __builtin_convertvector(one, vec);
                    } else w = load(set[h], j * PANEL + p * LANES, form);
                    if (p == 0) __builtin_prefetch(set[h] + bytes_of(form, j) + AHEAD);
                    total[h][p] += splat(x[k + j]) * w;
                    if (form == INT4) total[h][p] += splat(x[k + j + 1]) * next;
                }
    }
    memcpy(sums, total, sizeof total);
}

static __attribute__((noinline, noclone)) void
pair_sums(const Matrix *m, const Matrix *other, long i, long j, const float *x, vec sums[2][PARTS]) {
    const char *const panel[2] = {panel_of(m, i), panel_of(other, j)};
    begin(m, i, 1, sums);
    begin(other, j, 1, sums + 1);
    switch (m->form) {
    case FLOAT32: pair_of(panel, x, m->inputs, sums, FLOAT32); break;
    case FLOAT16: pair_of(panel, x, m->inputs, sums, FLOAT16); break;
    case BFLOAT16: pair_of(panel, x, m->inputs, sums, BFLOAT16); break;
    case INT8: pair_of(panel, x, m->inputs, sums, INT8); break;
    case INT4: pair_of(panel, x, m->inputs, sums, INT4); break;
    }
}

/* y (outputs) = x (inputs) * weights^T: multiply() for a single row. */
static void multiply_one(const Matrix *m, const Matrix *gate, const float *x, enum After after, float *y) {
    const long panels = (m->outputs + PANEL - 1) / PANEL, each = gate ? 1 : 2;
#pragma omp for schedule(static)
    for (long i = 0; i < panels; i += each) {
        vec sums[2][PARTS];
        const long other = i + 1 < panels ? i + 1 : i;
        pair_sums(m, gate ? gate : m, i, gate ? i : other, x, sums);
        if (gate) for (int p = 0; p < PARTS; p++) sums[0][p] *= silu(sums[1][p]);
        store(m, sums[0], i * PANEL, after, y);
        if (!gate && other > i) store(m, sums[1], other * PANEL, after, y);
    }
}

/* y (rows, outputs) = x (rows, inputs) * weights^T, times SiLU of the gate's where there is one. */
static void multiply(const Matrix *m, const Matrix *gate, const float *x, long rows, enum After after, float *y) {
    vec sums[ROW_BLOCK][PARTS], gates[ROW_BLOCK][PARTS];
    const long panels = (m->outputs + PANEL - 1) / PANEL;
    if (gate && !gate->weights) gate = 0;
    if (rows == 1 && (!gate || gate->form == m->form)) {
        multiply_one(m, gate, x, after, y);
        return;
    }
    for (long block = 0; block < rows; block += ROW_BLOCK) {
        const long count = block + ROW_BLOCK < rows ? ROW_BLOCK : rows - block;
        const float *in = x + block * m->inputs;
#pragma omp for schedule(static) nowait
        for (long i = 0; i < panels; i++) {
            panel_sums(m, i, in, count, sums);
            if (gate) {
                panel_sums(gate, i, in, count, gates);
                for (long r = 0; r < count; r++)
                    for (int p = 0; p < PARTS; p++) sums[r][p] *= silu(gates[r][p]);
            }
            for (long r = 0; r < count; r++) store(m, sums[r], i * PANEL, after, y + (block + r) * m->outputs);
        }
    }
#pragma omp barrier
}

/* ---- the small parts */

static void normalise(const Norm *norm, const float *x, long n, float eps, float *y) {
    float mean = 0, squares = 0;
    if (norm->bias) {
#pragma omp simd reduction(+ : mean)
        for (long i = 0; i < n; i++) mean += x[i];
        mean /= n;
    }
#pragma omp simd reduction(+ : squares)
    for (long i = 0; i < n; i++) squares += (x[i] - mean) * (x[i] - mean);
    float scale = 1 / sqrtf(squares / n + eps);
    for (long i = 0; i < n; i++) y[i] = (x[i] - mean) * scale * norm->weight[i] + (norm->bias ? norm->bias[i] : 0);
}

static void normalise_rows(const Model *m, const Norm *norm, const float *x, long rows, float *y) {
#pragma omp for schedule(static)
    for (long r = 0; r < rows; r++) normalise(norm, x + r * m->hidden, m->hidden, m->eps, y + r * m->hidden);
}

/* An output's weights as float32: for the embedding, a token's row. */
static void row_of(const Matrix *m, long output, float *to) {
    float room[SET * PANEL] __attribute__((aligned(64)));
    const char *panel = panel_of(m, output / PANEL);
    for (long k = 0; k < m->inputs; k++) {
        long at = k * PANEL + output % PANEL;
        if (m->form == FLOAT32) to[k] = ((const float *)panel)[at];
        else if (m->form == FLOAT16) to[k] = (float)((const half *)panel)[at];
        else if (m->form == BFLOAT16) to[k] = from_bfloat16(((const uint16_t *)panel)[at]);
        else {
            if (k % SET == 0 && m->form == INT8) unpack(panel + bytes_of(INT8, k), SET, INT8, room);
            if (k % SET == 0 && m->form == INT4) unpack(panel + bytes_of(INT4, k), SET, INT4, room);
            to[k] = room[at % (SET * PANEL)];
        }
    }
}

static void embed(const Model *m, const Step *step, float *x, float *turns) {
#pragma omp for schedule(static)
    for (long r = 0; r < step->rows; r++) {
        long position = step->position[r];
        row_of(&m->embedding, step->token[r], x + r * m->hidden);
        for (long i = 0; m->positions && i < m->hidden; i++) x[r * m->hidden + i] += m->positions[position * m->hidden + i];
        for (long i = 0; m->angles && i < m->dim / 2; i++) {
            turns[r * m->dim + i] = cosf(m->angles[i] * position);
            turns[r * m->dim + m->dim / 2 + i] = sinf(m->angles[i] * position);
        }
    }
}

INLINE void rotate(float *x, const float *turn, long dim) {
    for (long i = 0; i < dim / 2; i++) {
        float left = x[i], right = x[dim / 2 + i];
        x[i] = left * turn[i] - right * turn[dim / 2 + i];
        x[dim / 2 + i] = right * turn[i] + left * turn[dim / 2 + i];
    }
}

/* Where a block's keys, or values, of one KV head begin. */
INLINE long cached(const Model *m, long layer, long block, long head) {
    return ((block * m->layers + layer) * m->kv_heads + head) * m->dim * PANEL;
}

INLINE void keep(void *to, long at, float value, enum Form form) {
    if (form == FLOAT32) ((float *)to)[at] = value;
    else ((half *)to)[at] = (half)value;
}

/* Normalise (Qwen3) and rotate queries and keys; keys and values to their place in the cache. */
static void place(const Model *m, const Layer *layer, const Step *step, const float *turns, float *qkv, long l) {
    long width = (m->heads + 2 * m->kv_heads) * m->dim, dim = m->dim;
#pragma omp for schedule(static)
    for (long r = 0; r < step->rows; r++) {
        float *row = qkv + r * width;
        for (long h = 0; h < m->heads + m->kv_heads; h++) {
            const Norm *norm = h < m->heads ? &layer->q_norm : &layer->k_norm;
            if (norm->weight) normalise(norm, row + h * dim, dim, m->eps, row + h * dim);
            if (m->angles) rotate(row + h * dim, turns + r * dim, dim);
        }
        const Part *part = step->part + step->part_of[r];
        long position = step->position[r], in_block = position % PANEL, block = part->blocks[position / PANEL];
        /* Attention multiplies the rest of a last block by zero; what a former owner left there may be NaN. */
        int clear = r == part->first + part->count - 1 && (in_block == 0 || part->count > 1);
        for (long h = 0; h < m->kv_heads; h++) {
            const float *k = row + (m->heads + h) * dim, *v = k + m->kv_heads * dim;
            long at = cached(m, l, block, h);
            for (long i = 0; i < dim; i++) {
                keep(m->keys, at + i * PANEL + in_block, k[i], m->cache_form);
                keep(m->values, at + in_block * dim + i, v[i], m->cache_form);
            }
            for (long i = (in_block + 1) * dim; clear && i < PANEL * dim; i++) keep(m->values, at + i, 0, m->cache_form);
        }
    }
}

/* ---- attention: up to GROUP rows that share a KV head look at the cache together, so that it is read once for them */

typedef struct { const float *q[GROUP]; float *out[GROUP]; long position[GROUP]; int count; } Group;

/* Row r: its products with every cached key, from the block of the first token that any row sees. */
INLINE void score(int rows, const float *q, long dim, const void *keys, const void *soon, const void *later,
                  float *scores, long stride, enum Form form) {
    vec sums[ROWS][PARTS] = {};
    tile(rows, sums, q, dim, keys, PANEL, dim, form, soon, later);
    for (int r = 0; r < rows; r++)
        for (int p = 0; p < PARTS; p++) *(vec_unaligned *)(scores + r * stride + p * LANES) = sums[r][p];
}

/* Scores to weights, in place: softmax over the tokens from low to high; the rest of the blocks gets zero. Their sum. */
INLINE float softmax(float *s, long begin, long low, long high, long end) {
    float most = -INFINITY, total = 0;
    vec sum = {};
    for (long j = begin; j < low; j++) s[j] = -INFINITY;
    for (long j = high + 1; j < end; j++) s[j] = -INFINITY;
#pragma omp simd reduction(max : most)
    for (long j = low; j <= high; j++) most = s[j] > most ? s[j] : most;
    for (long j = begin; j < end; j += LANES) {
        vec_unaligned *v = (vec_unaligned *)(s + j);
        vec e = choose(*v == -INFINITY, splat(0), exp_of(*v - most));
        sum += e;
        *v = e;
    }
    for (int i = 0; i < LANES; i++) total += sum[i];
    return total;
}

/* Add to columns c to c + 16 of the rows' outputs: the weighted sum of the values of some blocks. */
INLINE void mix(int rows, const Model *m, long layer, const int32_t *blocks, long head, long block0, long block1, long c,
                const float *scores, long stride, float *const *out, enum Form form) {
    vec sums[ROWS][PARTS];
    for (int r = 0; r < rows; r++)
        for (int p = 0; p < PARTS; p++) sums[r][p] = *(vec_unaligned *)(out[r] + c + p * LANES);
    for (long b = block0; b < block1; b++)
        tile(rows, sums, scores + b * PANEL, stride, number(m->values, cached(m, layer, blocks[b], head) + c, form), m->dim,
             PANEL, form, 0, 0);
    for (int r = 0; r < rows; r++)
        for (int p = 0; p < PARTS; p++) *(vec_unaligned *)(out[r] + c + p * LANES) = sums[r][p];
}

INLINE void look(const Model *m, const Group *g, long layer, const int32_t *blocks, long head, float *scores, long stride,
                 enum Form form) {
    long dim = m->dim, last = g->position[g->count - 1], first = m->window ? g->position[0] - m->window + 1 : 0;
    long block0 = first > 0 ? first / PANEL : 0, block1 = last / PANEL + 1;
    float q[GROUP * dim], scale = 1 / sqrtf(dim), total[GROUP];
    for (int r = 0; r < g->count; r++)
        for (long i = 0; i < dim; i++) q[r * dim + i] = g->q[r][i] * scale;
    for (long b = block0; b < block1; b++) {
        long at = cached(m, layer, blocks[b], head), next = cached(m, layer, blocks[b + 1 < block1 ? b + 1 : b], head);
        const void *keys = number(m->keys, at, form), *soon = number(m->keys, next, form);
        const void *later = number(m->values, at, form);
        for (int r = 0; r < g->count; r += ROWS, soon = later = 0)
            BY_ROWS(g->count - r, score, q + r * dim, dim, keys, soon, later, scores + r * stride + b * PANEL, stride, form);
    }
    for (int r = 0; r < g->count; r++) {
        long low = m->window && g->position[r] >= m->window ? g->position[r] - m->window + 1 : 0;
        total[r] = softmax(scores + r * stride, block0 * PANEL, low, g->position[r], block1 * PANEL);
    }
    for (int r = 0; r < g->count; r++) memset(g->out[r], 0, dim * sizeof(float));
    for (long b = block0; b < block1; b += NEAR)                /* so few that all rows find them in the nearest cache */
        for (long c = 0; c < dim; c += PANEL)
            for (int r = 0; r < g->count; r += ROWS)
                BY_ROWS(g->count - r, mix, m, layer, blocks, head, b, b + NEAR < block1 ? b + NEAR : block1, c,
                        scores + r * stride, stride, g->out + r, form);
    for (int r = 0; r < g->count; r++)
        for (long i = 0; i < dim; i++) g->out[r][i] /= total[r];
}

/* out (rows, heads * dim). A group is made of the query heads of one KV head, of one token or of several. */
INLINE void attend(const Model *m, const Step *step, const float *qkv, long l, float *out, float *scores, long stride,
                   enum Form form) {
    long width = (m->heads + 2 * m->kv_heads) * m->dim, share = m->heads / m->kv_heads;
    scores += omp_get_thread_num() * GROUP * stride;
    for (long i = 0; i < step->parts; i++) {
        const Part *part = step->part + i;
        long rows = part->count * share;                        /* of one KV head: token 0's heads, token 1's, … */
        long groups = (rows + GROUP - 1) / GROUP;
#pragma omp for schedule(dynamic) nowait
        for (long job = 0; job < groups * m->kv_heads; job++) {
            long head = job % m->kv_heads, start = (groups - 1 - job / m->kv_heads) * GROUP;  /* the longest first */
            Group g = {.count = rows - start < GROUP ? rows - start : GROUP};
            for (int r = 0; r < g.count; r++) {
                long token = (start + r) / share, row = part->first + token, h = head * share + (start + r) % share;
                g.q[r] = qkv + row * width + h * m->dim;
                g.out[r] = out + row * m->heads * m->dim + h * m->dim;
                g.position[r] = step->position[row];
            }
            look(m, &g, l, part->blocks, head, scores, stride, form);
        }
    }
#pragma omp barrier
}

/* ---- the pass */

/* Move the wanted rows to the front, in the order of the step; how many they are. */
static long keep_wanted(const Model *m, const Step *step, float *x, float *seen) {
    long width = m->heads * m->dim;
#pragma omp single
    for (long r = 0; r < step->wanted; r++) {
        memmove(x + r * m->hidden, x + step->wanted_row[r] * m->hidden, m->hidden * sizeof(float));
        memmove(seen + r * width, seen + step->wanted_row[r] * width, width * sizeof(float));
    }
    return step->wanted;
}

/* Floats that forward() needs to work in, for so many rows, contexts of so many tokens, and threads. */
long scratch_floats(const Model *m, long rows, long context, long threads) {
    long width = (m->heads + 2 * m->kv_heads) * m->dim;
    return rows * (2 * m->hidden + width + m->heads * m->dim + m->inner + m->dim) + threads * GROUP * (context + PANEL);
}

/* The greatest of each row and where it stands, while the logits are still near. NaN when any of them is not finite. */
static void find_likeliest(const float *logits, long rows, long n, float *best, int32_t *token) {
#pragma omp for schedule(static)
    for (long r = 0; r < rows; r++) {
        const float *row = logits + r * n;
        float most = -INFINITY, sum = 0;
#pragma omp simd reduction(max : most) reduction(+ : sum)
        for (long i = 0; i < n; i++) {
            most = row[i] > most ? row[i] : most;
            sum += row[i];
        }
        long i = 0;
        while (i < n - 1 && row[i] != most) i++;
        token[r] = i;
        best[r] = isfinite(sum) ? most : NAN;
    }
}

/* What the time went to; engine/native.py has the same names in the same order. */
enum Phase { EMBED, NORMS, QKV, PLACE, ATTEND, OUT, UP, DOWN, HEAD, PHASES };

/* Add the seconds since the last call to a phase. Every phase ends with all threads waiting for each other. */
static void book(double *spent, enum Phase phase, double *last) {
    if (!spent) return;
#pragma omp master
    {
        double now = omp_get_wtime();
        spent[phase] += now - *last;
        *last = now;
    }
}

/* Compute all rows, keep their keys and values; logits (wanted, vocabulary), and of each row the likeliest token.
   spent: PHASES seconds that are added to, or NULL. */
void forward(const Model *m, const Step *step, long context, long threads, float *scratch, float *logits, float *best,
             int32_t *token, double *spent) {
    long width = (m->heads + 2 * m->kv_heads) * m->dim, stride = context + PANEL;
    float *x = scratch, *h = x + step->rows * m->hidden, *qkv = h + step->rows * m->hidden;
    float *seen = qkv + step->rows * width, *inner = seen + step->rows * m->heads * m->dim;
    float *turns = inner + step->rows * m->inner, *scores = turns + step->rows * m->dim;
    double last = omp_get_wtime();
#pragma omp parallel num_threads(threads)
    {
        long rows = step->rows;
        embed(m, step, x, turns);
        book(spent, EMBED, &last);
        for (long l = 0; l < m->layers; l++) {
            const Layer *layer = m->layer + l;
            normalise_rows(m, &layer->norm1, x, rows, h);
            book(spent, NORMS, &last);
            multiply(&layer->qkv, 0, h, rows, STORE, qkv);
            book(spent, QKV, &last);
            place(m, layer, step, turns, qkv, l);
            book(spent, PLACE, &last);
            if (m->cache_form == FLOAT32) attend(m, step, qkv, l, seen, scores, stride, FLOAT32);
            else attend(m, step, qkv, l, seen, scores, stride, FLOAT16);
            book(spent, ATTEND, &last);
            if (l == m->layers - 1) rows = keep_wanted(m, step, x, seen);       /* nobody asks what the others hold */
            multiply(&layer->out, 0, seen, rows, ADD, x);
            book(spent, OUT, &last);
            normalise_rows(m, &layer->norm2, x, rows, h);
            book(spent, NORMS, &last);
            multiply(&layer->up, &layer->gate, h, rows, layer->gate.weights ? STORE : GELU, inner);
            book(spent, UP, &last);
            multiply(&layer->down, 0, inner, rows, ADD, x);
            book(spent, DOWN, &last);
        }
        normalise_rows(m, &m->norm, x, rows, h);
        book(spent, NORMS, &last);
        multiply(&m->head, 0, h, rows, STORE, logits);
        find_likeliest(logits, rows, m->head.outputs, best, token);
        book(spent, HEAD, &last);
    }
}
