/* The numbers of a forward pass: `number` (float, or bfloat16 with -DBFLOAT16) is what weights and the KV cache hold,
 * `operand` what matrices are multiplied by; a `vector` is what a register of the processor holds, 16 floats or 8.
 *
 * Vectors are GCC's and Clang's, so that most of this is the same for AVX-512 and AVX2.
 */
#ifndef NUMBERS_H
#define NUMBERS_H
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif
#if defined(BFLOAT16) && defined(__AVX512BF16__)
#define PRODUCT_BFLOAT16 1 /* the processor multiplies pairs of bfloat16 */
#endif

#define INLINE static inline __attribute__((always_inline))
#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
#define MIDDLE 136.0f /* what a 4-bit code of 8 is read as */

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (mask4){__VA_ARGS__})
#endif

typedef float vector __attribute__((vector_size(4 * LANES)));
typedef float eight __attribute__((vector_size(32)));
typedef float four __attribute__((vector_size(16)));
typedef float unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t mask __attribute__((vector_size(4 * LANES)));
typedef int32_t unaligned_mask __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t mask4 __attribute__((vector_size(16)));

#ifdef BFLOAT16
typedef uint16_t number;
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
typedef uint16_t unaligned_halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

INLINE vector load(const number *p) { /* a bfloat16 is the upper half of a float */
    halves h = *(const unaligned_halves *)p;
    return (vector)(__builtin_convertvector(h, mask) << 16);
}
INLINE float widen(number x) {
    uint32_t bits = (uint32_t)x << 16;
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}
INLINE number narrow(float f) { /* to the nearest, to even; a NaN stays one */
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    if (f != f) return (number)(bits >> 16 | 64);
    return (number)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
#else
typedef float number;
INLINE vector load(const number *p) { return *(const unaligned *)p; }
INLINE float widen(number x) { return x; }
INLINE number narrow(float f) { return f; }
#endif

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

INLINE vector get(const float *p) { return *(const unaligned *)p; }
INLINE vector get_some(const float *p, int64_t count) { /* minus infinity in the lanes from `count` on */
    vector x = (vector){0} - INFINITY;
    for (int64_t i = 0; i < count && i < LANES; i++) x[i] = p[i];
    return x;
}
INLINE void put(float *p, vector x) { *(unaligned *)p = x; }
INLINE vector all(float x) { return (vector){0} + x; }
INLINE vector pick(mask where, vector a, vector b) { return (vector)((where & (mask)a) | (~where & (mask)b)); }
INLINE vector greater(vector a, vector b) { return pick(a > b, a, b); }

/* Bit i says whether lane i is `bound` or more. */
INLINE uint32_t lanes_from(vector x, float bound) {
#ifdef __AVX512F__
    return _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(bound), _CMP_GE_OQ);
#elif defined(__AVX2__)
    return (uint32_t)_mm256_movemask_ps((__m256)(x >= all(bound)));
#else
    uint32_t bits = 0;
    for (int i = 0; i < LANES; i++) bits |= (uint32_t)(x[i] >= bound) << i;
    return bits;
#endif
}

/* Writes the lanes whose bit is set, one after the other, and LANES numbers at most; how many there are. */
INLINE int64_t put_lanes(float *p, vector x, uint32_t bits) {
#ifdef __AVX512F__
    put(p, (vector)_mm512_maskz_compress_ps((__mmask16)bits, (__m512)x)); /* without a branch to predict */
    return __builtin_popcount(bits);
#else
    int64_t count = 0;
    for (; bits; bits &= bits - 1) p[count++] = x[__builtin_ctz(bits)];
    return count;
#endif
}

/* Lane i of the four is the sum of lanes i, i + 4 and so on, in halves. */
INLINE four fold(vector x) {
#if LANES == 16
    union { vector whole; eight half[2]; } a = {x};
    union { eight whole; four half[2]; } b = {a.half[0] + a.half[1]};
#else
    union { eight whole; four half[2]; } b = {x};
#endif
    return b.half[0] + b.half[1];
}
INLINE float sum(vector x) {
    four f = fold(x);
    return (f[0] + f[2]) + (f[1] + f[3]);
}
INLINE four sums_of_four(vector a, vector b, vector c, vector d) { /* each added up in the order of `sum` */
    four p = fold(a), q = fold(b), r = fold(c), s = fold(d);
    four x = SHUFFLE(p, q, 0, 1, 4, 5) + SHUFFLE(p, q, 2, 3, 6, 7);
    four y = SHUFFLE(r, s, 0, 1, 4, 5) + SHUFFLE(r, s, 2, 3, 6, 7);
    return SHUFFLE(x, y, 0, 2, 4, 6) + SHUFFLE(x, y, 1, 3, 5, 7);
}

/* e to the x: Cephes' expf, two rounding steps from the exact value at most; NaN of NaN. */
INLINE vector exponential(vector given) {
    vector x = given;
    x = pick(x < all(-87.0f), all(-87.0f), pick(x > all(88.0f), all(88.0f), x));
    vector shifted = x * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: the sum's low bits are the rounded product */
    vector n = shifted - 12582912.0f;
    vector r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vector p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    vector result = (vector)((mask)p + ((mask)shifted << 23));
    return pick(given == given, result, given); /* a NaN's bits do not survive the shift */
}

#ifdef PRODUCT_BFLOAT16
typedef number operand;
#define STEP 32 /* operands of one multiplication */
INLINE vector multiply_add(vector to, const operand *x, const number *w) {
    __m512bh a = (__m512bh)_mm512_loadu_si512(x), b = (__m512bh)_mm512_loadu_si512(w);
    return (vector)_mm512_dpbf16_ps((__m512)to, a, b);
}
#define EXCESS MIDDLE /* how much more than (code - 8) times the input `multiply_add_pair` adds */
INLINE vector multiply_add_pair(vector to, const operand *x, mask pair) {
    int32_t inputs;
    memcpy(&inputs, x, sizeof inputs);
    return (vector)_mm512_dpbf16_ps((__m512)to, (__m512bh)_mm512_set1_epi32(inputs), (__m512bh)pair);
}
INLINE vector load_operands(const operand *x) { return load(x); }
#else
typedef float operand;
#define STEP LANES
INLINE vector multiply_add(vector to, const operand *x, const number *w) { return to + get(x) * load(w); }
#define EXCESS 0.0f
INLINE vector multiply_add_pair(vector to, const operand *x, mask pair) {
    vector even = (vector)(pair << 16) - MIDDLE, odd = (vector)(pair & ~0xffff) - MIDDLE; /* exact */
    return to + even * x[0] + odd * x[1];
}
INLINE vector load_operands(const operand *x) { return get(x); }
#endif

#endif
