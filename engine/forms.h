/* How numbers are kept, and how they become float32 again: what engine/native.c stands on.

   A PANEL holds 16 outputs of a matrix, input after input: 16 numbers side by side are what one instruction, or two,
   or four, multiply. Decoding reads every weight for every token, so fewer bytes are less time; and a checkpoint that
   was quantised or rounded once holds no more than those few bytes, however wide its files are. pack() finds out. */

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX__)
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
#define SET 32            /* inputs that share a scale, as in llama.cpp's Q8_0 and Q4_1 */
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float vec_unaligned __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef _Float16 half;

/* How numbers are kept; engine/native.py has the same names in the same order. INT8: scale * q, q from -127 to 127.
   INT4: least + scale * q, q from 0 to 15. Scale and least are float16, one each for SET inputs of an output. */
enum Form { FLOAT32, FLOAT16, BFLOAT16, INT8, INT4 };

INLINE vec splat(float x) { return x - (vec){}; }

INLINE const char *number(const void *numbers, long i, enum Form form) {
    return (const char *)numbers + i * (form == FLOAT32 ? 4 : 2);
}

INLINE vec load(const void *weights, long i, enum Form form) {
    if (form == FLOAT32) return *(const vec_unaligned *)((const float *)weights + i);
    if (form == BFLOAT16) {                                     /* the upper half of a float32 */
        typedef uint16_t uvec __attribute__((vector_size(2 * LANES), aligned(2)));
        return (vec)(__builtin_convertvector(*(const uvec *)((const uint16_t *)weights + i), ivec) << 16);
    }
#if defined(__AVX512F__)
    return (vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)((const half *)weights + i)));
#elif defined(__F16C__)
    return (vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)((const half *)weights + i)));
#else
    typedef half hvec __attribute__((vector_size(2 * LANES), aligned(2)));
    return __builtin_convertvector(*(const hvec *)((const half *)weights + i), vec);
#endif
}

/* As many bytes as numbers. GCC 12 takes __builtin_convertvector apart byte by byte, hence the intrinsics. */
INLINE ivec bytes(const char *from, int with_sign) {
#if defined(__AVX512F__)
    const __m128i b = _mm_loadu_si128((const __m128i *)from);
    return (ivec)(with_sign ? _mm512_cvtepi8_epi32(b) : _mm512_cvtepu8_epi32(b));
#elif defined(__AVX2__)
    const __m128i b = _mm_loadl_epi64((const __m128i *)from);
    return (ivec)(with_sign ? _mm256_cvtepi8_epi32(b) : _mm256_cvtepu8_epi32(b));
#else
    ivec wide;
    for (int i = 0; i < LANES; i++) wide[i] = with_sign ? ((const int8_t *)from)[i] : ((const uint8_t *)from)[i];
    return wide;
#endif
}

/* Bytes that a panel takes for so many inputs (INT8, INT4: a multiple of SET). */
INLINE long bytes_of(enum Form form, long inputs) {
    const long each[] = {[FLOAT32] = 64, [FLOAT16] = 32, [BFLOAT16] = 32, [INT8] = 17, [INT4] = 10};
    return inputs * each[form];
}

/* Scales, then what is scaled: 16 bytes for an input (INT8), or for two of them, the first in the lower bits (INT4). */
INLINE void unpack(const char *panel, long inputs, enum Form form, float *to) {
    for (; inputs > 0; inputs -= SET, panel += bytes_of(form, SET), to += SET * PANEL)
        for (int p = 0; p < PARTS; p++) {
            vec scale = load(panel, p * LANES, FLOAT16), least = load(panel, PANEL + p * LANES, FLOAT16);
            const char *q = panel + PANEL * (form == INT4 ? 4 : 2) + p * LANES;
            float *out = to + p * LANES;
#pragma GCC unroll 4
            for (int k = 0; k < SET; k += form == INT4 ? 2 : 1, q += PANEL) {
                if (p == 0) __builtin_prefetch(q + AHEAD);
                if (form == INT8) {
                    *(vec *)(out + k * PANEL) = scale * __builtin_convertvector(bytes(q, 1), vec);
                } else {
                    const ivec two = bytes(q, 0);
                    *(vec *)(out + k * PANEL) = least + scale * __builtin_convertvector(two & 15, vec);
                    *(vec *)(out + (k + 1) * PANEL) = least + scale * __builtin_convertvector(two >> 4, vec);
                }
            }
        }
}

/* ---- keeping them */

INLINE float from_bfloat16(uint16_t kept) {
    uint32_t bits = (uint32_t)kept << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE uint16_t to_bfloat16(float value) {                      /* to the nearest, halves to even */
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

/* The scale and least of SET inputs that lie side by side, as llama.cpp chooses them; what it once rounded comes back
   as it was. */
static void scale_of(const float *x, enum Form form, half *scale, half *least) {
    float low = x[0], high = x[0];
    for (int k = 1; k < SET; k++) {
        low = x[k] < low ? x[k] : low;
        high = x[k] > high ? x[k] : high;
    }
    *least = form == INT4 ? low : 0;
    *scale = form == INT4 ? (high - low) / 15 : (high > -low ? high : -low) / 127;
}

/* Keep one output's next inputs, up to SET of them, as the j-th of its panel. Whether they came back as they were. */
INLINE long pack_set(const float *x, long count, enum Form form, char *set, long j) {
    long same = 1;
    half scale = 0, least = 0;
    if (form == INT8 || form == INT4) {
        scale_of(x, form, &scale, &least);
        ((half *)set)[j] = scale;
        if (form == INT4) ((half *)set)[PANEL + j] = least;
    }
    const float up = scale, from = least, per = up ? 1 / up : 0, low = form == INT4 ? 0 : -127, high = form == INT4 ? 15 : 127;
    uint8_t *q = (uint8_t *)set + PANEL * (form == INT4 ? 4 : 2) + j;
    for (long k = 0; k < count; k++) {
        float kept = x[k];
        if (form == FLOAT32) ((float *)set)[k * PANEL + j] = kept;
        if (form == FLOAT16) kept = (float)(((half *)set)[k * PANEL + j] = x[k]);
        if (form == BFLOAT16) kept = from_bfloat16(((uint16_t *)set)[k * PANEL + j] = to_bfloat16(x[k]));
        if (form == INT8 || form == INT4) {
            float whole = rintf((x[k] - from) * per);
            whole = whole >= low ? (whole <= high ? whole : high) : low;        /* NaN: low */
            const int8_t steps = whole;
            if (form == INT8) q[k * PANEL] = steps;
            else q[k / 2 * PANEL] = k % 2 ? q[k / 2 * PANEL] | steps << 4 : steps;
            kept = from + up * steps;
        }
        same &= kept == x[k];
    }
    return same;
}

/* Bytes that a matrix takes. */
long kept_bytes(long outputs, long inputs, enum Form form) {
    return (outputs + PANEL - 1) / PANEL * bytes_of(form, inputs);
}

INLINE long pack_as(const float *from, long outputs, long inputs, enum Form form, long exactly, char *to) {
    long same = 1;
#pragma omp parallel for reduction(& : same)
    for (long o = 0; o < (outputs + PANEL - 1) / PANEL * PANEL; o++)
        for (long k = 0; k < inputs && (same || !exactly); k += SET) {
            const float none[SET] = {}, *x = o < outputs ? from + o * inputs + k : none;
            char *set = to + o / PANEL * bytes_of(form, inputs) + bytes_of(form, k);
            same &= pack_set(x, inputs - k < SET ? inputs - k : SET, form, set, o % PANEL);
        }
    return same;
}

/* (outputs, inputs) float32 -> panels of 16 outputs; the last panel is filled up with zeros. Whether every number was
   kept as it is; with `exactly`, what cannot be is given up at the first that is not. */
long pack(const float *from, long outputs, long inputs, enum Form form, long exactly, char *to) {
    if ((form == INT8 || form == INT4) && inputs % SET) return 0;
    switch (form) {
    case FLOAT32: return pack_as(from, outputs, inputs, FLOAT32, exactly, to);
    case FLOAT16: return pack_as(from, outputs, inputs, FLOAT16, exactly, to);
    case BFLOAT16: return pack_as(from, outputs, inputs, BFLOAT16, exactly, to);
    case INT8: return pack_as(from, outputs, inputs, INT8, exactly, to);
    default: return pack_as(from, outputs, inputs, INT4, exactly, to);
    }
}
