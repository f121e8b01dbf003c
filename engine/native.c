/* The forward pass of engine/transformer.py in C: the same steps in the same order, for CPUs.

   PyTorch's kernels each start and stop all threads, for a few microseconds of work where a single token is computed,
   and its fast matrix products want formats that not every processor has. Here one team of threads walks through all
   layers, weights are read in the order in which they lie, as float16 or float32, and all arithmetic is float32.

   One idea carries it: a PANEL of 16 numbers that lie side by side, times a scalar, added to 16 sums. A weight matrix
   is cut into panels of 16 outputs; a block of the cache holds the keys of 16 tokens turned so that they lie side by
   side; and values already do. tile() is the only loop that multiplies.

   Compiled for this machine by engine/native.py. Indices are long: a cache may hold more than 2^31 numbers. */

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>
#if defined(__F16C__)
#include <immintrin.h>
#endif

#define PANEL 16
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#define PARTS (PANEL / LANES)
#define AHEAD 512         /* bytes that are asked for before they are needed: no processor looks past a page by itself */
#define ROWS 6         /* rows of one tile: with AVX2, 6 * 2 sums, 2 weights and 1 scalar fill the 16 registers */
#define GROUP 24          /* rows of attention that read a block of the cache together */
#define ROW_BLOCK 60   /* rows computed before the next ones: their inputs stay in the second-level cache */
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float vec_unaligned __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef _Float16 half;

typedef struct { const void *weights; const float *bias; long outputs, inputs; } Matrix;     /* NULL: there is none */
typedef struct { const float *weight, *bias; } Norm;                     /* bias: LayerNorm; without one, RMSNorm */
typedef struct { Norm norm1, norm2, q_norm, k_norm; Matrix qkv, out, gate, up, down; } Layer;
typedef struct {
    long layers, hidden, heads, kv_heads, dim, inner, window;
    long wide, cache_wide;                               /* whether weights, keys and values are float32, not float16 */
    float eps;
    const Layer *layer;
    Norm norm;
    Matrix head;
    const void *embedding;                                      /* (vocabulary, hidden); NULL: it is the head, tied */
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

INLINE vec splat(float x) { return x - (vec){}; }

INLINE vec choose(ivec which, vec yes, vec no) { return (vec)((which & (ivec)yes) | (~which & (ivec)no)); }

INLINE const char *number(const void *numbers, long i, long wide) { return (const char *)numbers + i * (wide ? 4 : 2); }

INLINE vec load(const void *weights, long i, long wide) {
    if (wide) return *(const vec_unaligned *)((const float *)weights + i);
#if defined(__AVX512F__)
    return (vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)((const half *)weights + i)));
#elif defined(__F16C__)
    return (vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)((const half *)weights + i)));
#else
    typedef half hvec __attribute__((vector_size(2 * LANES), aligned(2)));
    return __builtin_convertvector(*(const hvec *)((const half *)weights + i), vec);
#endif
}

/* sums[r] += x[r][k] * panel[k], for all k. x: rows `stride` apart. panel: 16 numbers every `step`.
   soon, later: memory as large as the panel that will be read next; NULL for none. */
INLINE void tile(int rows, vec sums[][PARTS], const float *x, long stride, const void *panel, long step, long inputs,
                 long wide, const void *soon, const void *later) {
    const long bytes = PANEL * (wide ? 4 : 2);
#pragma GCC unroll 4
    for (long k = 0; k < inputs; k++) {
        vec w[PARTS];
        if (soon) __builtin_prefetch((const char *)soon + k * bytes);
        if (later) __builtin_prefetch((const char *)later + k * bytes);
        for (int p = 0; p < PARTS; p++) w[p] = load(panel, k * step + p * LANES, wide);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
            for (int p = 0; p < PARTS; p++) sums[r][p] += splat(x[r * stride + k]) * w[p];
    }
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

INLINE const char *panel_of(const Matrix *m, long i, long wide) {
    return number(m->weights, i * PANEL * m->inputs, wide);
}

/* The sums of the i-th panel before anything is added: its biases, or zero. */
INLINE void begin(int rows, vec sums[][PARTS], const Matrix *m, long i) {
    for (int r = 0; r < rows; r++)
        for (int p = 0; p < PARTS; p++)
            sums[r][p] = m->bias ? *(const vec_unaligned *)(m->bias + i * PANEL + p * LANES) : splat(0);
}

INLINE void panel_rows(int rows, const Matrix *m, const Matrix *gate, long i, const float *x, enum After after, float *y,
                       long wide) {
    vec sums[ROWS][PARTS], gates[ROWS][PARTS];
    begin(rows, sums, m, i);
    const char *panel = panel_of(m, i, wide);
    tile(rows, sums, x, m->inputs, panel, PANEL, m->inputs, wide, panel + AHEAD, 0);
    if (gate) {
        const char *other = panel_of(gate, i, wide);
        begin(rows, gates, gate, i);
        tile(rows, gates, x, m->inputs, other, PANEL, m->inputs, wide, other + AHEAD, 0);
        for (int r = 0; r < rows; r++)
            for (int p = 0; p < PARTS; p++) sums[r][p] *= silu(gates[r][p]);
    }
    for (int r = 0; r < rows; r++) store(m, sums[r], i * PANEL, after, y + r * m->outputs);
}

/* y (rows, outputs) = x (rows, inputs) * weights^T, times SiLU of the gate's where there is one. */
INLINE void product(const Matrix *m, const Matrix *gate, const float *x, long rows, enum After after, float *y, long wide) {
    long panels = (m->outputs + PANEL - 1) / PANEL;
    for (long block = 0; block < rows; block += ROW_BLOCK) {
        long end = block + ROW_BLOCK < rows ? block + ROW_BLOCK : rows;
#pragma omp for schedule(static) nowait
        for (long i = 0; i < panels; i++) {
            long count, tiles = (end - block + ROWS - 1) / ROWS;
            for (long r = block; r < end; r += count) {
                const float *in = x + r * m->inputs;
                float *out = y + r * m->outputs;
                count = (end - r + tiles - 1) / tiles;          /* eight rows as four and four, not six and two */
                tiles--;
                BY_ROWS(count, panel_rows, m, gate, i, in, after, out, wide);
            }
        }
    }
#pragma omp barrier
}

static __attribute__((noinline, noclone)) void
multiply(const Model *model, const Matrix *m, const Matrix *gate, const float *x, long rows, enum After after,
                     float *y) {
    if (gate && !gate->weights) gate = 0;
    if (model->wide) product(m, gate, x, rows, after, y, 1);
    else product(m, gate, x, rows, after, y, 0);
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

static void embed(const Model *m, const Step *step, float *x, float *turns) {
#pragma omp for schedule(static)
    for (long r = 0; r < step->rows; r++) {
        long token = step->token[r], position = step->position[r];
        const void *table = m->embedding ? m->embedding : m->head.weights;
        long start = m->embedding ? token * m->hidden : token / PANEL * PANEL * m->hidden + token % PANEL;
        long next = m->embedding ? 1 : PANEL;                   /* a token's row is a column of the head's panel */
        for (long i = 0; i < m->hidden; i++) {
            long at = start + i * next;
            float value = m->wide ? ((const float *)table)[at] : (float)((const half *)table)[at];
            x[r * m->hidden + i] = value + (m->positions ? m->positions[position * m->hidden + i] : 0);
        }
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

INLINE void keep(void *to, long at, float value, long wide) {
    if (wide) ((float *)to)[at] = value;
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
        long position = step->position[r], in_block = position % PANEL;
        long block = step->part[step->part_of[r]].blocks[position / PANEL];
        for (long h = 0; h < m->kv_heads; h++) {
            const float *k = row + (m->heads + h) * dim, *v = k + m->kv_heads * dim;
            long at = cached(m, l, block, h);
            for (long i = 0; i < dim; i++) {
                keep(m->keys, at + i * PANEL + in_block, k[i], m->cache_wide);
                keep(m->values, at + in_block * dim + i, v[i], m->cache_wide);
            }
        }
    }
}

/* ---- attention: up to GROUP rows that share a KV head look at the cache together, so that it is read once for them */

typedef struct { const float *q[GROUP]; float *out[GROUP]; long position[GROUP]; int count; } Group;

/* Row r: its products with every cached key, from the block of the first token that any row sees. */
INLINE void score(int rows, const float *q, long dim, const void *keys, const void *soon, const void *later,
                  float *scores, long stride, long wide) {
    vec sums[ROWS][PARTS] = {};
    tile(rows, sums, q, dim, keys, PANEL, dim, wide, soon, later);
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

/* Columns c to c + 16 of the rows' outputs: the weighted sum of all values. */
INLINE void mix(int rows, const Model *m, long layer, const int32_t *blocks, long head, long block0, long block1, long c,
                const float *scores, long stride, const float *total, float *const *out, long wide) {
    vec sums[ROWS][PARTS] = {};
    for (long b = block0; b < block1; b++)
        tile(rows, sums, scores + b * PANEL, stride, number(m->values, cached(m, layer, blocks[b], head) + c, wide), m->dim,
             PANEL, wide, 0, 0);
    for (int r = 0; r < rows; r++)
        for (int p = 0; p < PARTS; p++) *(vec_unaligned *)(out[r] + c + p * LANES) = sums[r][p] / total[r];
}

INLINE void look(const Model *m, const Group *g, long layer, const int32_t *blocks, long head, float *scores, long stride,
                 long wide) {
    long dim = m->dim, last = g->position[g->count - 1], first = m->window ? g->position[0] - m->window + 1 : 0;
    long block0 = first > 0 ? first / PANEL : 0, block1 = last / PANEL + 1;
    float q[GROUP * dim], scale = 1 / sqrtf(dim), total[GROUP];
    for (int r = 0; r < g->count; r++)
        for (long i = 0; i < dim; i++) q[r * dim + i] = g->q[r][i] * scale;
    for (long b = block0; b < block1; b++) {
        long at = cached(m, layer, blocks[b], head), next = cached(m, layer, blocks[b + 1 < block1 ? b + 1 : b], head);
        const void *keys = number(m->keys, at, wide), *soon = number(m->keys, next, wide);
        const void *later = number(m->values, at, wide);
        for (int r = 0; r < g->count; r += ROWS, soon = later = 0)
            BY_ROWS(g->count - r, score, q + r * dim, dim, keys, soon, later, scores + r * stride + b * PANEL, stride, wide);
    }
    for (int r = 0; r < g->count; r++) {
        long low = m->window && g->position[r] >= m->window ? g->position[r] - m->window + 1 : 0;
        total[r] = softmax(scores + r * stride, block0 * PANEL, low, g->position[r], block1 * PANEL);
    }
    for (long c = 0; c < dim; c += PANEL)
        for (int r = 0; r < g->count; r += ROWS)
            BY_ROWS(g->count - r, mix, m, layer, blocks, head, block0, block1, c, scores + r * stride, stride, total + r,
                    g->out + r, wide);
}

/* out (rows, heads * dim). A group is made of the query heads of one KV head, of one token or of several. */
INLINE void attend(const Model *m, const Step *step, const float *qkv, long l, float *out, float *scores, long stride,
                   long wide) {
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
            look(m, &g, l, part->blocks, head, scores, stride, wide);
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
            multiply(m, &layer->qkv, 0, h, rows, STORE, qkv);
            book(spent, QKV, &last);
            place(m, layer, step, turns, qkv, l);
            book(spent, PLACE, &last);
            if (m->cache_wide) attend(m, step, qkv, l, seen, scores, stride, 1);
            else attend(m, step, qkv, l, seen, scores, stride, 0);
            book(spent, ATTEND, &last);
            if (l == m->layers - 1) rows = keep_wanted(m, step, x, seen);       /* nobody asks what the others hold */
            multiply(m, &layer->out, 0, seen, rows, ADD, x);
            book(spent, OUT, &last);
            normalise_rows(m, &layer->norm2, x, rows, h);
            book(spent, NORMS, &last);
            multiply(m, &layer->up, &layer->gate, h, rows, layer->gate.weights ? STORE : GELU, inner);
            book(spent, UP, &last);
            multiply(m, &layer->down, 0, inner, rows, ADD, x);
            book(spent, DOWN, &last);
        }
        normalise_rows(m, &m->norm, x, rows, h);
        book(spent, NORMS, &last);
        multiply(m, &m->head, 0, h, rows, STORE, logits);
        find_likeliest(logits, rows, m->head.outputs, best, token);
        book(spent, HEAD, &last);
    }
}

/* (outputs, inputs) float32 -> panels of 16 outputs, float32 or float16; the last panel is filled up with zeros. */
void pack(const float *from, long outputs, long inputs, long wide, void *to) {
#pragma omp parallel for
    for (long i = 0; i < (outputs + PANEL - 1) / PANEL; i++)
        for (long k = 0; k < inputs; k++)
            for (long j = 0; j < PANEL; j++) {
                float value = i * PANEL + j < outputs ? from[(i * PANEL + j) * inputs + k] : 0;
                keep(to, (i * inputs + k) * PANEL + j, value, wide);
            }
}
