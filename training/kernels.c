/* What a LoRA step does between its matrix products, each chain of small operations in one pass over memory: bfloat16
in and out, float32 inside. See kernels.py.

Every sum runs in an order of its own, whatever the number of threads and wherever a row lies: the same step gives the
same bits. Threads are those of the OpenMP library that torch has loaded: a second pool would fight for the cores.
Sizes of rows are multiples of 32 unless it says otherwise.
*/
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

typedef uint16_t bf16;
typedef __m512 Numbers; /* sixteen of them */

/* --- sixteen numbers at a time ------------------------------------------------------------------------------------ */

static inline Numbers all(float value) { return _mm512_set1_ps(value); }

static inline Numbers widen(__m256i numbers) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(numbers), 16));
}

static inline Numbers get(const bf16 *from) { return widen(_mm256_loadu_si256((const __m256i *)from)); }

static inline void put(bf16 *to, Numbers value) { _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh(value)); }

/* The first `left` of sixteen. */
static inline __mmask16 first(int left) { return left <= 0 ? 0 : left < 16 ? (1u << left) - 1 : 0xffff; }

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

/* y = x / √(mean(x²) + eps) · scale, over rows of `size`; the factor 1 / √… of each row goes to `inverse`. */
void norm_forward(bf16 *y, float *inverse, const bf16 *x, const float *scale, float eps, int rows, int size) {
#pragma omp parallel for
    for (int row = 0; row < rows; row++) {
        const bf16 *from = x + (size_t)row * size;
        bf16 *to = y + (size_t)row * size;
        Numbers factor = all(inverse[row] = norm_of(from, size, eps));
        for (int i = 0; i < size; i += 16)
            put(to + i, _mm512_mul_ps(_mm512_mul_ps(get(from + i), factor), _mm512_loadu_ps(scale + i)));
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

/* A line of raw scores becomes probabilities: softmax of scale · score, or of cap · tanh(scale · score / cap), plus bias,
which is 0 or -inf. Given grad, the gradients of the probabilities, those of the scores go to `back`. Up to `end`, a
multiple of 16, what lies past the keys becomes 0. `slopes` is room for `end` numbers. */
static inline void softmax_line(bf16 *probability, bf16 *back, float *score, const float *grad, const float *bias, float *slopes,
                                float scale, float cap, int keys, int end) {
    Numbers highest = all(-__builtin_inff()), sum = all(0), dot = all(0);
    for (int i = 0; i < end; i += 16) {
        Numbers value = _mm512_mul_ps(_mm512_loadu_ps(score + i), all(scale));
        if (cap) {
            Numbers tanh = hyperbolic_tangent(_mm512_mul_ps(value, all(1 / cap)));
            _mm512_storeu_ps(slopes + i, _mm512_fnmadd_ps(tanh, tanh, all(1)));
            value = _mm512_mul_ps(tanh, all(cap));
        }
        __mmask16 which = first(keys - i);
        value = _mm512_mask_add_ps(all(-__builtin_inff()), which, value, _mm512_maskz_loadu_ps(which, bias + i));
        highest = _mm512_max_ps(highest, value);
        _mm512_storeu_ps(score + i, value);
    }
    Numbers most = all(_mm512_reduce_max_ps(highest));
    for (int i = 0; i < end; i += 16) {
        Numbers value = exponential(_mm512_sub_ps(_mm512_loadu_ps(score + i), most));
        sum = _mm512_add_ps(sum, value);
        if (grad) dot = _mm512_fmadd_ps(value, _mm512_loadu_ps(grad + i), dot);
        _mm512_storeu_ps(score + i, value);
    }
    float part = 1 / _mm512_reduce_add_ps(sum);
    Numbers mean = all(grad ? _mm512_reduce_add_ps(dot) * part : 0);
    for (int i = 0; i < end; i += 16) {
        Numbers value = _mm512_mul_ps(_mm512_loadu_ps(score + i), all(part));
        put(probability + i, value);
        if (!grad) continue;
        Numbers change = _mm512_mul_ps(_mm512_mul_ps(value, all(scale)), _mm512_sub_ps(_mm512_loadu_ps(grad + i), mean));
        put(back + i, cap ? _mm512_mul_ps(change, _mm512_loadu_ps(slopes + i)) : change);
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

/* --- attention, on the matrix unit -------------------------------------------------------------------------------- */

#ifdef __AMX_BF16__
/* A tile of a product's right-hand side has two rows of it in each of its own: [16 pairs of rows][16 columns][2]. A panel
is 32 columns: [rows / 32][2 tiles]. */
enum { TILE = 512 /* numbers */, PANEL = 32 /* columns, and rows of a block */, CHUNK = 128 /* queries' heads at a time */ };

/* Whether the system lets this process use the unit. */
int may_use_amx(void) { return !syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */); }

static void begin_tiles(void) {
    static const struct { uint8_t palette, start, reserved[14]; uint16_t bytes[16]; uint8_t rows[16]; } config = {
        1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    _tile_loadconfig(&config);
}

/* Sixteen rows of sixteen 32-bit numbers, transposed. */
static inline void transpose(__m512i *r) {
    __m512i t[16], u[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        u[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        u[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        u[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        u[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int c = 0; c < 4; c++) {
        __m512i a = _mm512_shuffle_i32x4(u[c], u[4 + c], 0x88), b = _mm512_shuffle_i32x4(u[8 + c], u[12 + c], 0x88);
        __m512i d = _mm512_shuffle_i32x4(u[c], u[4 + c], 0xdd), e = _mm512_shuffle_i32x4(u[8 + c], u[12 + c], 0xdd);
        r[c] = _mm512_shuffle_i32x4(a, b, 0x88);
        r[8 + c] = _mm512_shuffle_i32x4(a, b, 0xdd);
        r[4 + c] = _mm512_shuffle_i32x4(d, e, 0x88);
        r[12 + c] = _mm512_shuffle_i32x4(d, e, 0xdd);
    }
}

/* A tile of a right-hand side whose columns are the rows of `w`: 16 of them, 32 numbers of each. */
static inline void tile_of_rows(bf16 *tile, const bf16 *w, size_t stride) {
    __m512i r[16];
    for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(w + i * stride);
    transpose(r);
    for (int i = 0; i < 16; i++) _mm512_store_si512(tile + i * 32, r[i]);
}

/* Two rows side by side, number by number: columns 0 to 15, and 16 to 31. */
static inline void interleave(__m512i one, __m512i other, __m512i *low, __m512i *high) {
    const __m512i first = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5,
                                           36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    *low = _mm512_permutex2var_epi16(one, first, other);
    *high = _mm512_permutex2var_epi16(one, second, other);
}

/* Panel `number` of a right-hand side of `depth` rows: w [depth][columns], or, of_rows, w [columns][depth]. */
static void pack_panel(bf16 *panel, const bf16 *w, size_t stride, int number, int depth, int of_rows) {
    if (of_rows) {
        w += (size_t)number * PANEL * stride;
        for (int k = 0; k < depth; k += 32, panel += 2 * TILE) {
            tile_of_rows(panel, w + k, stride);
            tile_of_rows(panel + TILE, w + 16 * stride + k, stride);
        }
    } else {
        w += number * PANEL;
        for (int k = 0; k < depth; k += 32, panel += 2 * TILE)
            for (int i = 0; i < 16; i++) {
                __m512i low, high;
                const bf16 *row = w + (size_t)(k + 2 * i) * stride;
                interleave(_mm512_loadu_si512(row), _mm512_loadu_si512(row + stride), &low, &high);
                _mm512_store_si512(panel + i * 32, low);
                _mm512_store_si512(panel + TILE + i * 32, high);
            }
    }
}

/* Tiles 0 to 3, 32 rows by 32 columns of sums, grow by a [32][depth] times a panel. */
static inline void add_product(const bf16 *a, size_t stride, const bf16 *panel, int depth) {
    for (int k = 0; k < depth; k += 32, panel += 2 * TILE) {
        _tile_loadd(4, a + k, stride * 2);
        _tile_loadd(6, panel, 64);
        _tile_loadd(7, panel + TILE, 64);
        _tile_loadd(5, a + 16 * stride + k, stride * 2);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
}

static inline void zero_sums(void) { _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3); }

static inline void store_sums(float *to, size_t stride) {
    _tile_stored(0, to, stride * 4);
    _tile_stored(1, to + 16, stride * 4);
    _tile_stored(2, to + 16 * stride, stride * 4);
    _tile_stored(3, to + 16 * stride + 16, stride * 4);
}

static inline void load_sums(const float *from, size_t stride) {
    _tile_loadd(0, from, stride * 4);
    _tile_loadd(1, from + 16, stride * 4);
    _tile_loadd(2, from + 16 * stride, stride * 4);
    _tile_loadd(3, from + 16 * stride + 16, stride * 4);
}

/* to[column][row] = from[row][column], of 32 rows and 16 columns. */
static inline void transpose_block(bf16 *to, size_t to_stride, const bf16 *from, size_t stride) {
    __m512i r[16];
    for (int i = 0; i < 16; i++, from += 2 * stride) {
        __m512i one = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from));
        __m512i other = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(from + stride)));
        r[i] = _mm512_or_si512(one, _mm512_slli_epi32(other, 16));
    }
    transpose(r);
    for (int i = 0; i < 16; i++) _mm512_storeu_si512(to + i * to_stride, r[i]);
}

/* Memory of a thread's own that is kept: fresh pages would cost as much as a product. */
enum { QUERIES, KEYS, VALUES, GRADS, KEY_COLUMNS, VALUE_COLUMNS, KEY_ROWS, VALUE_ROWS, QUERY_PANELS, GRAD_PANELS, SCORES,
       GRAD_SCORES, FOUND, SLOPES, PROBABILITIES, BACK, TURNED, TURNED_BACK, ROOMS };

static void *scratch(int which, size_t bytes) {
    static _Thread_local struct { void *memory; size_t bytes; } kept[ROOMS];
    if (kept[which].bytes < bytes) {
        free(kept[which].memory);
        kept[which].bytes = (bytes + 4095) / 4096 * 4096;
        kept[which].memory = aligned_alloc(4096, kept[which].bytes);
        if (!kept[which].memory) abort();
    }
    return kept[which].memory;
}

/* Queries and the keys that they may see, of packing.py's tables; offsets into those. */
typedef struct { int32_t queries, count, keys, seen, bias, sums; } Item;

typedef struct {
    const Item *item;
    const int32_t *query, *key; /* tokens */
    const float *bias;          /* of each item, [count][seen] */
    int32_t items, heads, groups, size, padding; /* padding: a token that nobody reads */
    float scale, cap;
} Attention;

static int rounded(int number) { return (number + PANEL - 1) / PANEL * PANEL; }

/* Tokens' numbers, `many` of each from `start` on; zeros after the last. */
static void gather(bf16 *to, const bf16 *from, const int32_t *token, int count, int room, size_t stride, int start, int many) {
    for (int i = 0; i < count; i++) memcpy(to + (size_t)i * many, from + token[i] * stride + start, many * sizeof(bf16));
    memset(to + (size_t)count * many, 0, (size_t)(room - count) * many * sizeof(bf16));
}

static void pack(bf16 *panels, const bf16 *w, int columns, int depth, int of_rows) {
    for (int p = 0; p < columns / PANEL; p++)
        pack_panel(panels + (size_t)p * PANEL * depth, w, of_rows ? depth : columns, p, depth, of_rows);
}

/* to [rows][columns] = a [rows][depth] times panels of `deep` rows, of which the first `depth` count. */
static void multiply(float *to, const bf16 *a, const bf16 *panels, int rows, int columns, int depth, int deep, size_t stride) {
    for (int p = 0; p < columns; p += PANEL)
        for (int row = 0; row < rows; row += PANEL) {
            zero_sums();
            add_product(a + row * stride, stride, panels + (size_t)p * deep, depth);
            store_sums(to + (size_t)row * columns + p, columns);
        }
}

/* Numbers of the item's rows, a row for each query and head of its group, to where their tokens are. */
static void scatter(bf16 *to, const float *from, const Attention *at, const int32_t *token, int group, int first_row, int rows) {
    int each = at->heads / at->groups;
    for (int row = first_row; row < first_row + rows; row++, from += at->size) {
        if (token[row / each] == at->padding) continue;
        bf16 *line = to + ((size_t)token[row / each] * at->heads + group * each + row % each) * at->size;
        for (int i = 0; i < at->size; i += 16) put(line + i, _mm512_loadu_ps(from + i));
    }
}

/* How many of the keys some query up to `last` sees. */
static int seen_by(const float *bias, int last, int seen) {
    int n = seen;
    while (n > 1 && bias[(size_t)last * seen + n - 1]) n--;
    return n;
}

/* out = softmax(query keyᵀ) value: query, out [tokens][heads][size], key, value [tokens][groups][size]. */
void attention_forward(bf16 *out, const bf16 *query, const bf16 *key, const bf16 *value, const Attention *given) {
    Attention at = *given;
    int each = at.heads / at.groups, size = at.size;
#pragma omp parallel
    {
        begin_tiles();
#pragma omp for schedule(dynamic)
        for (int task = 0; task < at.items * at.groups; task++) {
            const Item *item = &at.item[task / at.groups];
            int group = task % at.groups, rows = item->count * each, room = rounded(item->seen);
            const int32_t *queries = at.query + item->queries, *keys = at.key + item->keys;
            const float *bias = at.bias + item->bias;
            size_t whole = (size_t)room * size * sizeof(bf16);
            bf16 *q = scratch(QUERIES, (size_t)rows * size * sizeof(bf16)), *k = scratch(KEYS, whole), *v = scratch(VALUES, whole);
            bf16 *k_panels = scratch(KEY_COLUMNS, whole), *v_panels = scratch(VALUE_ROWS, whole);
            gather(q, query, queries, item->count, item->count, (size_t)at.heads * size, group * each * size, each * size);
            gather(k, key, keys, item->seen, room, (size_t)at.groups * size, group * size, size);
            gather(v, value, keys, item->seen, room, (size_t)at.groups * size, group * size, size);
            pack(k_panels, k, room, size, 1);
            pack(v_panels, v, size, room, 0);
            float *score = scratch(SCORES, (size_t)CHUNK * room * 4), *found = scratch(FOUND, (size_t)CHUNK * size * 4);
            bf16 *probability = scratch(PROBABILITIES, (size_t)CHUNK * room * sizeof(bf16));
            float *slopes = scratch(SLOPES, (size_t)room * 4);
            for (int row = 0; row < rows; row += CHUNK) {
                int some = rows - row < CHUNK ? rows - row : CHUNK;
                int seen = seen_by(bias, (row + some - 1) / each, item->seen), end = rounded(seen);
                multiply(score, q + (size_t)row * size, k_panels, some, end, size, size, size);
                for (int i = 0; i < some; i++)
                    softmax_line(probability + (size_t)i * end, NULL, score + (size_t)i * end, NULL,
                                 bias + (size_t)((row + i) / each) * item->seen, slopes, at.scale, at.cap, seen, end);
                multiply(found, probability, v_panels, some, size, end, room, end);
                scatter(out, found, &at, queries, group, row, some);
            }
        }
        _tile_release();
    }
}

/* Gradients: grad_query as query is; grad_key and grad_value in float32, zero at first. `sums` is room for both of every
item's keys, [item][group][2][seen, rounded][size]: they are added up in the items' order, whoever finds them. */
void attention_backward(bf16 *grad_query, float *grad_key, float *grad_value, float *sums, const bf16 *grad, const bf16 *query,
                        const bf16 *key, const bf16 *value, const Attention *given) {
    Attention at = *given;
    int each = at.heads / at.groups, size = at.size, wide = at.groups * size;
#pragma omp parallel
    {
        begin_tiles();
#pragma omp for schedule(dynamic)
        for (int task = 0; task < at.items * at.groups; task++) {
            const Item *item = &at.item[task / at.groups];
            int group = task % at.groups, rows = item->count * each, room = rounded(item->seen);
            const int32_t *queries = at.query + item->queries, *keys = at.key + item->keys;
            const float *bias = at.bias + item->bias;
            size_t whole = (size_t)room * size * sizeof(bf16), part = (size_t)CHUNK * size * sizeof(bf16);
            size_t square = (size_t)CHUNK * room;
            float *d_key = sums + ((size_t)item->sums * at.groups + (size_t)group * room) * 2 * size;
            float *d_value = d_key + (size_t)room * size;
            bf16 *q = scratch(QUERIES, (size_t)rows * size * sizeof(bf16)), *k = scratch(KEYS, whole), *v = scratch(VALUES, whole);
            bf16 *g = scratch(GRADS, (size_t)rows * size * sizeof(bf16));
            bf16 *k_columns = scratch(KEY_COLUMNS, whole), *v_columns = scratch(VALUE_COLUMNS, whole);
            bf16 *k_rows = scratch(KEY_ROWS, whole), *q_panels = scratch(QUERY_PANELS, part), *g_panels = scratch(GRAD_PANELS, part);
            float *score = scratch(SCORES, square * 4), *d_score = scratch(GRAD_SCORES, square * 4);
            float *found = scratch(FOUND, (size_t)CHUNK * size * 4), *slopes = scratch(SLOPES, (size_t)room * 4);
            bf16 *probability = scratch(PROBABILITIES, square * 2), *back = scratch(BACK, square * 2);
            bf16 *turned = scratch(TURNED, square * 2), *turned_back = scratch(TURNED_BACK, square * 2);
            gather(q, query, queries, item->count, item->count, (size_t)at.heads * size, group * each * size, each * size);
            gather(g, grad, queries, item->count, item->count, (size_t)at.heads * size, group * each * size, each * size);
            gather(k, key, keys, item->seen, room, (size_t)wide, group * size, size);
            gather(v, value, keys, item->seen, room, (size_t)wide, group * size, size);
            pack(k_columns, k, room, size, 1);
            pack(v_columns, v, room, size, 1);
            pack(k_rows, k, size, room, 0);
            memset(d_key, 0, (size_t)room * size * 2 * sizeof(float));
            for (int row = 0; row < rows; row += CHUNK) {
                int some = rows - row < CHUNK ? rows - row : CHUNK;
                int seen = seen_by(bias, (row + some - 1) / each, item->seen), end = rounded(seen);
                multiply(score, q + (size_t)row * size, k_columns, some, end, size, size, size);
                multiply(d_score, g + (size_t)row * size, v_columns, some, end, size, size, size);
                for (int i = 0; i < some; i++)
                    softmax_line(probability + (size_t)i * end, back + (size_t)i * end, score + (size_t)i * end,
                                 d_score + (size_t)i * end, bias + (size_t)((row + i) / each) * item->seen, slopes, at.scale,
                                 at.cap, seen, end);
                multiply(found, back, k_rows, some, size, end, room, end);
                scatter(grad_query, found, &at, queries, group, row, some);
                pack(q_panels, q + (size_t)row * size, size, some, 0);
                pack(g_panels, g + (size_t)row * size, size, some, 0);
                for (int i = 0; i < some; i += 32)
                    for (int j = 0; j < end; j += 16) {
                        transpose_block(turned + (size_t)j * some + i, some, probability + (size_t)i * end + j, end);
                        transpose_block(turned_back + (size_t)j * some + i, some, back + (size_t)i * end + j, end);
                    }
                for (int j = 0; j < end; j += PANEL)
                    for (int i = 0; i < size; i += PANEL) {
                        load_sums(d_value + (size_t)j * size + i, size);
                        add_product(turned + (size_t)j * some, some, g_panels + (size_t)i * some, some);
                        store_sums(d_value + (size_t)j * size + i, size);
                        load_sums(d_key + (size_t)j * size + i, size);
                        add_product(turned_back + (size_t)j * some, some, q_panels + (size_t)i * some, some);
                        store_sums(d_key + (size_t)j * size + i, size);
                    }
            }
        }
        _tile_release();
#pragma omp for /* each thread some of the columns */
        for (int column = 0; column < wide; column += PANEL)
            for (int n = 0; n < at.items; n++) {
                int room = rounded(at.item[n].seen), group = column / size;
                const float *from = sums + ((size_t)at.item[n].sums * at.groups + (size_t)group * room) * 2 * size + column % size;
                for (int j = 0; j < at.item[n].seen; j++, from += size) {
                    size_t to = (size_t)at.key[at.item[n].keys + j] * wide + column;
                    for (int i = 0; i < PANEL; i++) grad_key[to + i] += from[i];
                    for (int i = 0; i < PANEL; i++) grad_value[to + i] += from[(size_t)room * size + i];
                }
            }
    }
}
#else
int may_use_amx(void) { return 0; }
#endif
