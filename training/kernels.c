/* What a LoRA step computes between its matrix products, each chain of small operations in one pass over memory.
See kernels.py. One layer, and the output layer; in bfloat16, torch multiplies where it says so; in float32,
kernels_linear.h does where the matrices are stored in bfloat16:

    hidden ─▶ norm ─▶ [q k v: torch] ─▶ rope (after q_norm, k_norm) ─▶ attention ─▶ [o: torch] ─▶ norm ─▶ + ─▶ hidden
    hidden ─▶ norm ─▶ [gate up: torch] ─▶ gelu(gate) · up ─▶ [down: torch] ─▶ norm ─▶ + ─▶ hidden
    hidden ─▶ norm ─▶ for each block of the vocabulary:
                          [logits: torch] ─▶ vocabulary_softmax ─▶ [times the block: torch] ─▶ add_rescaled

The text is compiled once for each type of element in memory: float32, or bfloat16 with -DBFLOAT16. Arithmetic is in
float32 either way. The target of the compiler chooses the form:

    processor                   vectors of         bfloat16 is rounded by   products of attention (kernels_*.h)
    AMX, AVX-512 with bfloat16  16, AVX-512        the processor            bfloat16: tiles (amx); float32: vectors
    AVX-512                     16, AVX-512        integer arithmetic       vectors
    AVX2                        8                  integer arithmetic       vectors
    Arm                         4, NEON            FEAT_BF16, or integers   vectors
    other x86-64                4, SSE             integer arithmetic       vectors

Every sum runs in an order of its own, whatever the number of threads and wherever a row lies: the same step gives the
same bits on the same form. Threads are those of the OpenMP library that torch has loaded: a second pool would compete
for the cores. Sizes of rows are multiples of 32 unless it says otherwise.
*/
#include <stdlib.h>

#include "kernels_vectors.h"

/* The form that the compiler's target has chosen, for the records of a run. */
const char *form(void) {
#if defined(__AMX_BF16__) && defined(BFLOAT16)
    return "AMX";
#elif defined(__AVX512BF16__)
    return "AVX-512 with bfloat16";
#elif defined(__AVX512F__)
    return "AVX-512";
#elif defined(__AVX2__)
    return "AVX2";
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
    return "NEON with bfloat16";
#elif defined(__ARM_NEON)
    return "NEON";
#elif defined(__AVX__)
    return "AVX";
#elif defined(__x86_64__)
    return "SSE";
#else
    return "vectors of the compiler";
#endif
}

/* --- RMSNorm, and rotary embeddings after it ---------------------------------------------------------------------- */

static inline float inverse_rms(const element *x, int size, float eps) {
    f32 sum = splat(0);
    for (int i = 0; i < size; i += LANES) sum += load(x + i) * load(x + i);
    return 1 / __builtin_sqrtf(reduce_add(sum) / size + eps);
}

/* y = x / √(mean(x²) + eps) · scale, over rows of `size`; the factor 1 / √… of each row is stored in `inverse`. */
void norm_forward(element *y, float *inverse, const element *x, const float *scale, float eps, int rows, int size) {
#pragma omp parallel for
    for (int row = 0; row < rows; row++) {
        const element *from = x + (size_t)row * size;
        element *to = y + (size_t)row * size;
        float factor = inverse[row] = inverse_rms(from, size, eps);
        for (int i = 0; i < size; i += LANES) store(to + i, load(from + i) * factor * load_f32(scale + i));
    }
}

void norm_backward(element *grad_x, const element *grad, const element *x, const float *inverse, const float *scale,
                   int rows, int size) {
#pragma omp parallel for
    for (int row = 0; row < rows; row++) {
        const element *from = x + (size_t)row * size, *g = grad + (size_t)row * size;
        element *to = grad_x + (size_t)row * size;
        f32 sum = splat(0);
        for (int i = 0; i < size; i += LANES) sum += load(g + i) * load_f32(scale + i) * load(from + i);
        float factor = inverse[row], mean = reduce_add(sum) / size * factor * factor;
        for (int i = 0; i < size; i += LANES) {
            f32 scaled = load(g + i) * load_f32(scale + i);
            store(to + i, (scaled - load(from + i) * mean) * factor);
        }
    }
}

/* Rotary embedding of each head, after its RMSNorm where there is a scale: cos and sin are [tokens][size]. */
void rope_forward(element *y, float *inverse, const element *x, const float *scale, float eps, const element *cos,
                  const element *sin, int tokens, int heads, int size) {
    int half = size / 2;
#pragma omp parallel for
    for (int row = 0; row < tokens * heads; row++) {
        const element *from = x + (size_t)row * size;
        element *to = y + (size_t)row * size;
        const element *c = cos + (size_t)(row / heads) * size, *s = sin + (size_t)(row / heads) * size;
        float factor = inverse[row] = scale ? inverse_rms(from, size, eps) : 1;
        for (int i = 0; i < half; i += LANES) {
            f32 a = load(from + i) * factor, b = load(from + half + i) * factor;
            if (scale) a *= load_f32(scale + i), b *= load_f32(scale + half + i);
            store(to + i, a * load(c + i) - b * load(s + i));
            store(to + half + i, b * load(c + half + i) + a * load(s + half + i));
        }
    }
}

void rope_backward(element *grad_x, const element *grad, const element *x, const float *inverse, const float *scale,
                   const element *cos, const element *sin, int tokens, int heads, int size) {
    int half = size / 2;
#pragma omp parallel for
    for (int row = 0; row < tokens * heads; row++) {
        const element *from = x + (size_t)row * size, *g = grad + (size_t)row * size;
        element *to = grad_x + (size_t)row * size;
        const element *c = cos + (size_t)(row / heads) * size, *s = sin + (size_t)(row / heads) * size;
        float normed[size]; /* the gradient of the normed x, times the scale */
        f32 sum = splat(0);
        for (int i = 0; i < half; i += LANES) {
            f32 p = load(g + i), q = load(g + half + i);
            f32 a = p * load(c + i) + q * load(s + half + i), b = q * load(c + half + i) - p * load(s + i);
            if (scale) {
                a *= load_f32(scale + i), b *= load_f32(scale + half + i);
                sum += b * load(from + half + i);
                sum += a * load(from + i);
            }
            store_f32(normed + i, a), store_f32(normed + half + i, b);
        }
        float factor = inverse[row], mean = reduce_add(sum) / size * factor * factor;
        for (int i = 0; i < size; i += LANES) store(to + i, (load_f32(normed + i) - load(from + i) * mean) * factor);
    }
}

/* --- gated GELU --------------------------------------------------------------------------------------------------- */

/* gelu(x) = x · sigmoid(2u) with u = √(2/π) · (x + 0.044715 x³), which is the form with tanh. */
static inline f32 twice_u(f32 x) { return x * 1.5957691216057308f * (x * x * 0.044715f + 1.0f); }

/* y = gelu(gate) · up; count: a multiple of 32. */
void gelu_forward(element *y, const element *gate, const element *up, ptrdiff_t count) {
#pragma omp parallel for
    for (ptrdiff_t i = 0; i < count; i += LANES) {
        f32 x = load(gate + i);
        store(y + i, x * sigmoid(twice_u(x)) * load(up + i));
    }
}

void gelu_backward(element *grad_gate, element *grad_up, const element *grad, const element *gate, const element *up,
                   ptrdiff_t count) {
#pragma omp parallel for
    for (ptrdiff_t i = 0; i < count; i += LANES) {
        f32 x = load(gate + i), g = load(grad + i), s = sigmoid(twice_u(x)), gelu = x * s;
        f32 slope_of_2u = 1.5957691216057308f * (x * x * 0.134145f + 1.0f);
        f32 slope = gelu * (1.0f - s) * slope_of_2u + s;
        store(grad_up + i, g * gelu);
        store(grad_gate + i, g * load(up + i) * slope);
    }
}

/* --- the output layer's softmax ----------------------------------------------------------------------------------- */

/* A line of logits becomes exp(logit - maximum), times the slope of the soft-capping. Its maximum, before the capping, and
its total grow; returned is what brings earlier sums to the new maximum. */
static inline float soften(element *line, float *maximum, float *total, float cap, int width) {
    f32 highest = splat(*maximum), sum = splat(0);
    for (int i = 0; i < width; i += LANES) highest = larger_of(highest, load(line + i));
    float most = reduce_max(highest);
    f32 before = splat(*maximum), reference = splat(most);
    if (cap) before = tanh_f32(before / cap) * cap, reference = tanh_f32(reference / cap) * cap;
    for (int i = 0; i < width; i += LANES) {
        f32 value = load(line + i), slope = splat(1);
        if (cap) {
            f32 tanh = tanh_f32(value * (1 / cap));
            slope -= tanh * tanh;
            value = tanh * cap;
        }
        value = exp_f32(value - reference);
        sum += value;
        store(line + i, value * slope);
    }
    float rescale = exp_f32(before - reference)[0];
    *total = *total * rescale + reduce_add(sum);
    *maximum = most;
    return rescale;
}

/* One block of the vocabulary, logits [tokens][width], in place; see `soften`. */
void vocabulary_softmax(element *logits, float *maximum, float *total, float *rescale, float cap, int tokens, int width) {
#pragma omp parallel for
    for (int token = 0; token < tokens; token++)
        rescale[token] = soften(logits + (size_t)token * width, &maximum[token], &total[token], cap, width);
}

/* sums[token] = sums[token] · rescale[token] + part[token]: [tokens][size]. */
void add_rescaled(float *sums, const element *part, const float *rescale, int tokens, int size) {
#pragma omp parallel for
    for (int token = 0; token < tokens; token++)
        for (int i = 0; i < size; i += LANES) {
            size_t at = (size_t)token * size + i;
            store_f32(sums + at, load_f32(sums + at) * rescale[token] + load(part + at));
        }
}

#include "kernels_attention.h"
#ifndef BFLOAT16
#include "kernels_linear.h"
#endif
