/* Vectors of float32 as wide as the target's registers, and elements in memory that are float32 or bfloat16. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

typedef uint16_t bf16;
#ifdef BFLOAT16
typedef bf16 element;
#else
typedef float element;
#endif

typedef float f32 __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t u32 __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t u16 __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

#define UNROLLED _Pragma("GCC unroll 16")

static inline f32 splat(float value) { return value - (f32){0}; }

static inline f32 load_f32(const float *from) { return *(const f32 *)from; }
static inline void store_f32(float *to, f32 x) { *(f32 *)to = x; }

/* Intrinsics stand where GCC 12 makes several instructions of a vector expression for which the processor has one: on
AVX-512, bfloat16 rotary embeddings took 1.6 times and the output layer's softmax twice as long without them. */

static inline f32 load_bf16(const bf16 *from) {
#if defined(__AVX512F__)
    return (f32)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from)), 16);
#elif defined(__AVX2__)
    return (f32)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from)), 16);
#else
    return (f32)(__builtin_convertvector(*(const u16 *)from, u32) << 16);
#endif
}

/* Rounds to nearest, ties to even. In integers, NaN stays NaN, as no arithmetic makes one that has all its bits set. */
static inline void store_bf16(bf16 *to, f32 x) {
#if defined(__AVX512BF16__)
    _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh((__m512)x));
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
    vst1_bf16((bfloat16_t *)to, vcvt_bf16_f32((float32x4_t)x));
#else
    u32 rounded = ((u32)x + 0x7fff + ((u32)x >> 16 & 1)) >> 16;
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i *)to, _mm512_cvtepi32_epi16((__m512i)rounded));
#elif defined(__AVX2__)
    __m256i wide = (__m256i)rounded;
    _mm_storeu_si128((__m128i *)to, _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1)));
#else
    *(u16 *)to = __builtin_convertvector(rounded, u16);
#endif
#endif
}

static inline f32 load(const element *from) {
#ifdef BFLOAT16
    return load_bf16(from);
#else
    return load_f32(from);
#endif
}

static inline void store(element *to, f32 x) {
#ifdef BFLOAT16
    store_bf16(to, x);
#else
    store_f32(to, x);
#endif
}

/* The first `count` numbers, then -inf: nothing past them is read. */
static inline f32 load_first(const float *from, int count) {
    if (count >= LANES) return load_f32(from);
    float lane[LANES];
    for (int i = 0; i < LANES; i++) lane[i] = i < count ? from[i] : -__builtin_inff();
    return load_f32(lane);
}

static inline f32 larger_of(f32 a, f32 b) {
#if defined(__AVX512F__)
    return (f32)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX__)
    return (f32)_mm256_max_ps((__m256)a, (__m256)b);
#else
    u32 greater = (u32)(a > b);
    return (f32)(((u32)a & greater) | ((u32)b & ~greater));
#endif
}

/* Halves are added until one number is left: an order that does not depend on the compiler. */
static inline float reduce_add(f32 x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)x);
#else
    float lane[LANES];
    store_f32(lane, x);
    for (int half = LANES / 2; half; half /= 2)
        UNROLLED for (int i = 0; i < half; i++) lane[i] += lane[i + half];
    return lane[0];
#endif
}

static inline float reduce_max(f32 x) {
    float highest = x[0];
    for (int i = 1; i < LANES; i++) highest = x[i] > highest ? x[i] : highest;
    return highest;
}

/* exp by 2^n and a polynomial (Cephes), to two units in the last place; 0 below -87, of -inf too. Above 88 it is inf or
exp(88), whichever is quicker: nothing here tells them apart. */
static inline f32 exp_f32(f32 x) {
#if defined(__AVX512F__)
    f32 n = (f32)_mm512_roundscale_ps((__m512)(x * 1.44269504088896341f), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    const float to_integer = 12582912; /* 1.5 · 2^23: after adding it, the lowest bits hold the nearest integer */
    u32 tiny = (u32)(x < -87.0f);
    x = -larger_of(splat(-88), -x); /* NaN stays NaN: of unordered numbers, it is the second */
    f32 shifted = x * 1.44269504088896341f + to_integer, n = shifted - to_integer;
#endif
    f32 r = x - n * 0.693359375f + n * 2.12194440e-4f;
    f32 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + (r + 1.0f);
#if defined(__AVX512F__)
    __mmask16 tiny = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-87), _CMP_LT_OQ);
    return (f32)_mm512_maskz_scalef_ps(~tiny, (__m512)p, (__m512)n);
#else
    f32 power = (f32)(((u32)shifted << 23) + (127u << 23));
    return (f32)((u32)(p * power) & ~tiny);
#endif
}

static inline f32 sigmoid(f32 x) { return 1.0f / (1.0f + exp_f32(-x)); }

static inline f32 tanh_f32(f32 x) { return 2.0f * sigmoid(x + x) - 1.0f; }
