/* What a LoRA step does between its matrix products, each chain of small operations in one pass over memory: bfloat16
in and out, float32 inside. See kernels.py.

Every sum runs in an order of its own, whatever the number of threads and wherever a row lies: the same step gives the
same bits. Threads are those of the OpenMP library that torch has loaded: a second pool would fight for the cores.
Sizes of rows are multiples of 32 unless it says otherwise.
*/
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

typedef uint16_t bf16;
typedef __m512 Numbers; /* sixteen of them */

/* --- sixteen numbers at a time ------------------------------------------------------------------------------------ */

static inline Numbers all(float value) { return _mm512_set1_ps(value); }

static inline Numbers widen(__m256i numbers) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(numbers), 16));
}

static inline Numbers get(const bf16 *from) { return widen(_mm256_loadu_si256((const __m256i *)from)); }

static inline void put(bf16 *to, Numbers value) { _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh(value)); }

static inline Numbers get_some(const bf16 *from, __mmask16 which) { return widen(_mm256_maskz_loadu_epi16(which, from)); }

static inline void put_some(bf16 *to, __mmask16 which, Numbers value) {
    _mm256_mask_storeu_epi16(to, which, (__m256i)_mm512_cvtneps_pbh(value));
}

/* The first `left` of sixteen. */
static inline __mmask16 first(int left) { return left < 16 ? (1u << left) - 1 : 0xffff; }

/* exp by 2^n and a polynomial (Cephes), to two units in the last place; 0 below -87, of -inf too. */
static inline Numbers exponential(Numbers x) {
    __mmask16 normal = _mm512_cmp_ps_mask(x, all(-87), _CMP_GT_OQ);
    Numbers n = _mm512_roundscale_ps(_mm512_mul_ps(x, all(1.44269504088896341f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    Numbers r = _mm512_fnmadd_ps(n, all(-2.12194440e-4f), _mm512_fnmadd_ps(n, all(0.693359375f), x));
    Numbers p = _mm512_fmadd_ps(all(1.9875691500e-4f), r, all(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, all(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, all(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, all(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, all(5.0000001201e-1f));
    p = _mm512_fmadd_ps(_mm512_mul_ps(p, r), r, _mm512_add_ps(r, all(1)));
    return _mm512_maskz_scalef_ps(normal, p, n);
}

static inline Numbers sigmoid(Numbers x) {
    return _mm512_div_ps(all(1), _mm512_add_ps(all(1), exponential(_mm512_sub_ps(all(0), x))));
}

static inline Numbers hyperbolic_tangent(Numbers x) {
    return _mm512_fmsub_ps(all(2), sigmoid(_mm512_add_ps(x, x)), all(1));
}

/* --- RMSNorm, and rotary embeddings after it ---------------------------------------------------------------------- */

static inline float norm_of(const bf16 *x, int size, float eps) {
    Numbers sum = all(0);
    for (int i = 0; i < size; i += 16) sum = _mm512_fmadd_ps(get(x + i), get(x + i), sum);
    return 1 / __builtin_sqrtf(_mm512_reduce_add_ps(sum) / size + eps);
}

/* y = x / √(mean(x²) + eps) · scale, plus earlier where it is given, over rows of `size`; the factor 1 / √… of each row
goes to `inverse`. */
void norm_forward(bf16 *y, float *inverse, const bf16 *x, const float *scale, const bf16 *earlier, float eps, int rows,
                  int size) {
#pragma omp parallel for
    for (int row = 0; row < rows; row++) {
        const bf16 *from = x + (size_t)row * size;
        bf16 *to = y + (size_t)row * size;
        Numbers factor = all(inverse[row] = norm_of(from, size, eps));
        for (int i = 0; i < size; i += 16) {
            Numbers value = _mm512_mul_ps(_mm512_mul_ps(get(from + i), factor), _mm512_loadu_ps(scale + i));
            put(to + i, earlier ? _mm512_add_ps(value, get(earlier + (size_t)row * size + i)) : value);
        }
    }
}

void norm_backward(bf16 *grad_x, const bf16 *grad, const bf16 *x, const float *inverse, const float *scale, int rows, int size) {
#pragma omp parallel for
    for (int row = 0; row < rows; row++) {
        const bf16 *from = x + (size_t)row * size, *g = grad + (size_t)row * size;
        bf16 *to = grad_x + (size_t)row * size;
        Numbers sum = all(0), factor = all(inverse[row]);
        for (int i = 0; i < size; i += 16)
            sum = _mm512_fmadd_ps(_mm512_mul_ps(get(g + i), _mm512_loadu_ps(scale + i)), get(from + i), sum);
        Numbers mean = all(_mm512_reduce_add_ps(sum) / size * inverse[row] * inverse[row]);
        for (int i = 0; i < size; i += 16) {
            Numbers scaled = _mm512_mul_ps(get(g + i), _mm512_loadu_ps(scale + i));
            put(to + i, _mm512_mul_ps(_mm512_fnmadd_ps(get(from + i), mean, scaled), factor));
        }
    }
}

/* A head's numbers, normed where there is a scale, and turned by the token's place: cos and sin are [tokens][size]. */
void turn_forward(bf16 *y, float *inverse, const bf16 *x, const float *scale, float eps, const bf16 *cos, const bf16 *sin,
                  int tokens, int heads, int size) {
    int half = size / 2;
#pragma omp parallel for
    for (int row = 0; row < tokens * heads; row++) {
        const bf16 *from = x + (size_t)row * size;
        bf16 *to = y + (size_t)row * size;
        const bf16 *c = cos + (size_t)(row / heads) * size, *s = sin + (size_t)(row / heads) * size;
        Numbers factor = all(inverse[row] = scale ? norm_of(from, size, eps) : 1);
        for (int i = 0; i < half; i += 16) {
            Numbers a = _mm512_mul_ps(get(from + i), factor), b = _mm512_mul_ps(get(from + half + i), factor);
            if (scale) a = _mm512_mul_ps(a, _mm512_loadu_ps(scale + i)), b = _mm512_mul_ps(b, _mm512_loadu_ps(scale + half + i));
            put(to + i, _mm512_fnmadd_ps(b, get(s + i), _mm512_mul_ps(a, get(c + i))));
            put(to + half + i,
                _mm512_fmadd_ps(a, get(s + half + i), _mm512_mul_ps(b, get(c + half + i))));
        }
    }
}

void turn_backward(bf16 *grad_x, const bf16 *grad, const bf16 *x, const float *inverse, const float *scale, const bf16 *cos,
                   const bf16 *sin, int tokens, int heads, int size) {
    int half = size / 2;
#pragma omp parallel for
    for (int row = 0; row < tokens * heads; row++) {
        const bf16 *from = x + (size_t)row * size, *g = grad + (size_t)row * size;
        bf16 *to = grad_x + (size_t)row * size;
        const bf16 *c = cos + (size_t)(row / heads) * size, *s = sin + (size_t)(row / heads) * size;
        float back[size]; /* the gradient before the turn, scaled */
        Numbers sum = all(0), factor = all(inverse[row]);
        for (int i = 0; i < half; i += 16) {
            Numbers p = get(g + i), q = get(g + half + i);
            Numbers a = _mm512_fmadd_ps(q, get(s + half + i), _mm512_mul_ps(p, get(c + i)));
            Numbers b = _mm512_fnmadd_ps(p, get(s + i), _mm512_mul_ps(q, get(c + half + i)));
            if (scale) {
                a = _mm512_mul_ps(a, _mm512_loadu_ps(scale + i)), b = _mm512_mul_ps(b, _mm512_loadu_ps(scale + half + i));
                sum = _mm512_fmadd_ps(a, get(from + i), _mm512_fmadd_ps(b, get(from + half + i), sum));
            }
            _mm512_storeu_ps(back + i, a), _mm512_storeu_ps(back + half + i, b);
        }
        Numbers mean = all(_mm512_reduce_add_ps(sum) / size * inverse[row] * inverse[row]);
        for (int i = 0; i < size; i += 16)
            put(to + i, _mm512_mul_ps(_mm512_fnmadd_ps(get(from + i), mean, _mm512_loadu_ps(back + i)), factor));
    }
}

/* --- gated GELU --------------------------------------------------------------------------------------------------- */

/* gelu(x) = x · sigmoid(2u) with u = √(2/π) · (x + 0.044715 x³), which is the form with tanh. */
static inline Numbers twice_u(Numbers x) {
    Numbers square = _mm512_mul_ps(x, x);
    return _mm512_mul_ps(_mm512_mul_ps(x, all(1.5957691216057308f)), _mm512_fmadd_ps(square, all(0.044715f), all(1)));
}

/* y = gelu(gate) · up; count: a multiple of 16. */
void gelu_forward(bf16 *y, const bf16 *gate, const bf16 *up, ptrdiff_t count) {
#pragma omp parallel for
    for (ptrdiff_t i = 0; i < count; i += 16) {
        Numbers x = get(gate + i);
        put(y + i, _mm512_mul_ps(_mm512_mul_ps(x, sigmoid(twice_u(x))), get(up + i)));
    }
}

void gelu_backward(bf16 *grad_gate, bf16 *grad_up, const bf16 *grad, const bf16 *gate, const bf16 *up, ptrdiff_t count) {
#pragma omp parallel for
    for (ptrdiff_t i = 0; i < count; i += 16) {
        Numbers x = get(gate + i), g = get(grad + i), s = sigmoid(twice_u(x)), gelu = _mm512_mul_ps(x, s);
        Numbers slope = _mm512_mul_ps(all(1.5957691216057308f), _mm512_fmadd_ps(_mm512_mul_ps(x, x), all(0.134145f), all(1)));
        Numbers change = _mm512_fmadd_ps(_mm512_mul_ps(gelu, _mm512_sub_ps(all(1), s)), slope, s);
        put(grad_up + i, _mm512_mul_ps(g, gelu));
        put(grad_gate + i, _mm512_mul_ps(_mm512_mul_ps(g, get(up + i)), change));
    }
}

/* --- softmax ------------------------------------------------------------------------------------------------------ */

/* Scores of an attention's block, [heads][queries][group][keys], become probabilities in place: of scale · score, or
cap · tanh(scale · score / cap), plus bias [queries][keys], which is 0 or -inf. Given grad, the gradients of the
probabilities, they become those of the scores. keys: any number. */
void attention_softmax(bf16 *score, bf16 *grad, const float *bias, float scale, float cap, int heads, int queries, int group,
                       int keys) {
#pragma omp parallel for
    for (int row = 0; row < heads * queries * group; row++) {
        bf16 *line = score + (size_t)row * keys, *g = grad + (size_t)row * keys;
        const float *hidden = bias + (size_t)(row / group % queries) * keys;
        float values[keys + 16], slopes[cap ? keys + 16 : 1];
        Numbers highest = all(-__builtin_inff()), sum = all(0), dot = all(0);
        for (int i = 0; i < keys; i += 16) {
            __mmask16 which = first(keys - i);
            Numbers value = _mm512_mul_ps(get_some(line + i, which), all(scale));
            if (cap) {
                Numbers tanh = hyperbolic_tangent(_mm512_mul_ps(value, all(1 / cap)));
                _mm512_storeu_ps(slopes + i, _mm512_fnmadd_ps(tanh, tanh, all(1)));
                value = _mm512_mul_ps(tanh, all(cap));
            }
            value = _mm512_mask_add_ps(all(-__builtin_inff()), which, value, _mm512_maskz_loadu_ps(which, hidden + i));
            highest = _mm512_max_ps(highest, value);
            _mm512_storeu_ps(values + i, value);
        }
        Numbers most = all(_mm512_reduce_max_ps(highest));
        for (int i = 0; i < keys; i += 16) {
            Numbers value = exponential(_mm512_sub_ps(_mm512_loadu_ps(values + i), most));
            sum = _mm512_add_ps(sum, value);
            if (grad) dot = _mm512_fmadd_ps(value, get_some(g + i, first(keys - i)), dot);
            _mm512_storeu_ps(values + i, value);
        }
        float part = 1 / _mm512_reduce_add_ps(sum);
        Numbers mean = all(grad ? _mm512_reduce_add_ps(dot) * part : 0);
        for (int i = 0; i < keys; i += 16) {
            __mmask16 which = first(keys - i);
            Numbers probability = _mm512_mul_ps(_mm512_loadu_ps(values + i), all(part));
            put_some(line + i, which, probability);
            if (!grad) continue;
            Numbers back = _mm512_mul_ps(_mm512_mul_ps(probability, all(scale)), _mm512_sub_ps(get_some(g + i, which), mean));
            put_some(g + i, which, cap ? _mm512_mul_ps(back, _mm512_loadu_ps(slopes + i)) : back);
        }
    }
}

/* One block of the vocabulary passes by: logits [tokens][width] become exp(logit - maximum), times the slope of the
soft-capping, in place; maximum and total of each token grow, and `rescale` brings earlier sums to the new maximum. */
void vocabulary_softmax(bf16 *logits, float *maximum, float *total, float *rescale, float cap, int tokens, int width) {
#pragma omp parallel for
    for (int token = 0; token < tokens; token++) {
        bf16 *line = logits + (size_t)token * width;
        Numbers highest = all(maximum[token]), sum = all(0);
        for (int i = 0; i < width; i += 16) highest = _mm512_max_ps(highest, get(line + i));
        float most = _mm512_reduce_max_ps(highest); /* with soft-capping, of the logits before it */
        Numbers reference = cap ? _mm512_mul_ps(hyperbolic_tangent(all(most / cap)), all(cap)) : all(most);
        for (int i = 0; i < width; i += 16) {
            Numbers value = get(line + i), slope = all(1);
            if (cap) {
                Numbers tanh = hyperbolic_tangent(_mm512_mul_ps(value, all(1 / cap)));
                slope = _mm512_fnmadd_ps(tanh, tanh, slope);
                value = _mm512_mul_ps(tanh, all(cap));
            }
            value = exponential(_mm512_sub_ps(value, reference));
            sum = _mm512_add_ps(sum, value);
            put(line + i, cap ? _mm512_mul_ps(value, slope) : value);
        }
        Numbers before = all(maximum[token]);
        if (cap) before = _mm512_mul_ps(hyperbolic_tangent(_mm512_mul_ps(before, all(1 / cap))), all(cap));
        rescale[token] = _mm512_cvtss_f32(exponential(_mm512_sub_ps(before, reference)));
        total[token] = total[token] * rescale[token] + _mm512_reduce_add_ps(sum);
        maximum[token] = most;
    }
}

/* sums[token] = sums[token] · rescale[token] + part[token]: [tokens][size]. */
void add_rescaled(float *sums, const bf16 *part, const float *rescale, int tokens, int size) {
#pragma omp parallel for
    for (int token = 0; token < tokens; token++)
        for (int i = 0; i < size; i += 16) {
            float *to = sums + (size_t)token * size + i;
            _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_loadu_ps(to), all(rescale[token]), get(part + (size_t)token * size + i)));
        }
}
