/* One step of a Gemma on a CPU: everything between token ids and logits, in one call. See kernels.py.

Generating is bound by memory: each step reads all weights once. So they are bfloat16 (or int8), and what they are
multiplied with stays exact: AMX multiplies bfloat16 by bfloat16 and adds in float32, and a float32 number is the sum of
three bfloat16 ones, so three products of the same weights, already loaded, give the product with float32 activations.
Without AMX the weights are widened to float32, in plain loops that the compiler vectorizes.

A token's values do not depend on what else is in the step: every sum runs in an order of its own. Batches, chunks of
prompts and shared beginnings therefore change no bit of an answer.

Layouts, in C order:
    weights       [rows / 16][columns / 2][16 rows][2]; of gate and up, 16 rows of one, then 16 of the other
    activations   [tokens / 16][columns / 32][3 summands][16 tokens][32]
    keys, values  [layer][slot][kv head][head size], float32; slot = 16 * block + place in it
*/
#define _GNU_SOURCE
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#define HAS_AMX 1
#else
#define HAS_AMX 0
#endif

enum { QKV, O, GATE_UP, DOWN, SITES };
enum { Q_PROJ, K_PROJ, V_PROJ, O_PROJ, GATE_PROJ, UP_PROJ, DOWN_PROJ, MODULES };
enum { BLOCK = 16, MOST_THREADS = 64, PHASES = 10 /* of a layer: see `work` */ };
typedef uint16_t bf16;

typedef struct { /* rows and columns are multiples of 16 and 32 */
    int32_t rows, columns;
    const void *weight;   /* bf16, or int8 where `scales` are given */
    const float *scales;  /* [rows], or NULL */
} Matrix;

typedef struct {
    Matrix site[SITES];
    const float *input_norm, *after_attention_norm, *before_mlp_norm, *after_mlp_norm, *q_norm, *k_norm; /* or NULL */
    int32_t rope;             /* which of the model's */
    int32_t window;           /* 0: all */
} Layer;

typedef struct {
    int32_t rank;
    const float *inner; /* [rank][columns] */
    const float *outer; /* [rank][rows], scaled */
} Lora;

typedef struct {
    int32_t layers, vocabulary, hidden, intermediate, heads, kv_heads, head_size;
    float eps, scale, attention_cap, final_cap, embedding_scale;
    const Layer *layer;
    const float *frequencies; /* [ropes][head_size / 2] */
    int32_t ropes;
    Matrix head;
    const bf16 *embedding; /* [vocabulary][hidden] */
    const float *norm;
    float *keys, *values;
    int64_t slots;
} Model;

typedef struct { /* one request's share of a step */
    int32_t first, count, start, wanted; /* wanted: 0 nothing, 1 the best token, 2 logits too */
    const int32_t *blocks;
    const Lora *lora; /* [layers][MODULES], or NULL */
} Rows;

typedef struct {
    int32_t tokens, rows;
    const int32_t *token; /* [tokens] */
    const Rows *row;
    int32_t *best;   /* [rows wanted] */
    float *logits;   /* [rows wanted][vocabulary]; written where wanted is 2 */
} Step;

/* --- threads ------------------------------------------------------------------------------------------------------ */

typedef struct {
    int32_t threads;
    pthread_t worker[MOST_THREADS];
    pthread_mutex_t mutex;
    pthread_cond_t work;
    int64_t turn; /* steps begun */
    int ending;
    atomic_int arrived;
    atomic_llong meetings; /* of all steps */
    atomic_int *counters; /* of each phase of a step: the next piece of its work */
    int32_t phases;
    const Model *model;
    const Step *step;
    struct Scratch *scratch;
    int amx;
} Pool;

typedef struct Scratch {
    int32_t wanted, longest, ranks;
    int32_t *row_of, *position, *wanted_token, *wanted_row; /* [tokens], [tokens], [wanted], [wanted] */
    float *turns; /* [tokens][ropes][cosines, sines] */
    float *x, *normed, *y, *inner, *scores, *best, *parts;
    bf16 *packed;
} Scratch;

static void relax(int *spins) {
    if (++*spins < 500) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    } else
        sched_yield(); /* the thread that is waited for may want this core */
}

/* All threads leave together. The count of meetings only grows: one that leaves late, in the next step even, sees it. */
static int meet(Pool *pool, int phase, long long *met) {
    if (atomic_fetch_add(&pool->arrived, 1) == pool->threads - 1) {
        atomic_store(&pool->arrived, 0);
        atomic_store(&pool->meetings, *met + 1);
    } else
        for (int spins = 0; atomic_load_explicit(&pool->meetings, memory_order_acquire) <= *met;) relax(&spins);
    ++*met;
    return phase + 1;
}

static int next_piece(Pool *pool, int phase) { return atomic_fetch_add(&pool->counters[phase], 1); }

/* --- small sums --------------------------------------------------------------------------------------------------- */

static inline float bits_to_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline uint32_t float_to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

static inline bf16 to_bf16(float value) { /* round to nearest even */
    uint32_t bits = float_to_bits(value);
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

static inline float to_float(bf16 value) { return bits_to_float((uint32_t)value << 16); }

/* exp by 2^n and a polynomial (Cephes), to two units in the last place; a loop of it becomes vector instructions. */
static inline float quick_exp(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float n = __builtin_floorf(x * 1.44269504088896341f + 0.5f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * bits_to_float((uint32_t)((int32_t)n + 127) << 23);
}

static inline float quick_tanh(float x) { return 1.0f - 2.0f / (quick_exp(2.0f * x) + 1.0f); }

static float dot(const float *a, const float *b, int n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

static void add_scaled(float *y, const float *x, float factor, int n) {
#pragma omp simd
    for (int i = 0; i < n; i++) y[i] += factor * x[i];
}

static void norm(float *out, const float *x, const float *weight, float eps, int n) {
    float factor = 1.0f / sqrtf(dot(x, x, n) / n + eps);
#pragma omp simd
    for (int i = 0; i < n; i++) out[i] = x[i] * factor * weight[i];
}

/* Split a token's float32 values into three bfloat16 summands, where the products expect them. */
static void pack(bf16 *packed, const float *x, int columns, int token) {
    bf16 *out = packed + (size_t)(token / 16) * columns * 48 + token % 16 * 32;
    for (int k = 0; k < columns; k += 32, out += 1536)
#pragma omp simd
        for (int j = 0; j < 32; j++) {
            float rest = x[k + j];
            bf16 high = to_bf16(rest);
            rest -= to_float(high);
            bf16 middle = to_bf16(rest);
            out[j] = high, out[512 + j] = middle, out[1024 + j] = to_bf16(rest - to_float(middle));
        }
}

/* --- matrix products ---------------------------------------------------------------------------------------------- */

/* Without AMX: y[token][row] for the 16 rows of a block. */
static void product_plain(float *y, int stride, const Matrix *m, int block, const float *x, int tokens) {
    int columns = m->columns;
    for (int first = 0; first < tokens; first += 8) {
        int some = tokens - first < 8 ? tokens - first : 8;
        float sums[8][16] = {{0}};
        for (int k = 0; k < columns; k += 2) {
            size_t at = (size_t)block * columns * 16 + k * 16;
            float even[16], odd[16];
            if (m->scales) {
                const int8_t *pair = (const int8_t *)m->weight + at;
                for (int row = 0; row < 16; row++) even[row] = pair[2 * row], odd[row] = pair[2 * row + 1];
            } else {
                const uint32_t *pair = (const uint32_t *)((const bf16 *)m->weight + at);
                for (int row = 0; row < 16; row++) {
                    even[row] = bits_to_float(pair[row] << 16);
                    odd[row] = bits_to_float(pair[row] & 0xffff0000u);
                }
            }
            for (int t = 0; t < some; t++) {
                const float *from = x + (size_t)(first + t) * columns + k;
#pragma omp simd
                for (int row = 0; row < 16; row++) sums[t][row] += even[row] * from[0] + odd[row] * from[1];
            }
        }
        for (int t = 0; t < some; t++)
            for (int row = 0; row < 16; row++)
                y[(size_t)(first + t) * stride + row] = m->scales ? sums[t][row] * m->scales[block * 16 + row] : sums[t][row];
    }
}

#if HAS_AMX
static void configure_tiles(void) {
    struct { uint8_t palette, start, reserved[14]; uint16_t bytes[16]; uint8_t rows[16]; } config = {0};
    config.palette = 1;
    for (int i = 0; i < 8; i++) config.bytes[i] = 64, config.rows[i] = 16;
    _tile_loadconfig(&config);
}

/* 512 int8 weights as bfloat16, which holds them exactly. */
static inline const bf16 *widen(const int8_t *weight, bf16 *wide) {
    for (int i = 0; i < 512; i += 32) {
        __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(weight + i))));
        __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(weight + i + 16))));
        _mm512_storeu_si512(wide + i, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
    return wide;
}

/* A tile of sums, [16 tokens][16 rows], to y[token][row]. */
static void put(float *y, int stride, const float *tile, int tokens, const float *scales) {
    __m512 factor = scales ? _mm512_loadu_ps(scales) : _mm512_set1_ps(1);
    for (int t = 0; t < tokens; t++)
        _mm512_storeu_ps(y + (size_t)t * stride, _mm512_mul_ps(_mm512_load_ps(tile + t * 16), factor));
}

#define WEIGHTS(number, row)                                                                     \
    _tile_loadd(number, m->scales ? widen((const int8_t *)m->weight + base[row] + k * 16, wide)  \
                                  : (const bf16 *)m->weight + base[row] + k * 16, 64)

/* `blocks` (at most 4) blocks of 16 rows, for all tokens. Each pair of sums runs over the columns in their order. */
static void product_amx(float *const *y, int stride, const Matrix *m, const int *block, int blocks, const bf16 *x,
                        int tokens) {
    int columns = m->columns, groups = (tokens + 15) / 16;
    size_t base[4], part = (size_t)columns * 48;
    _Alignas(64) float tile[256];
    _Alignas(64) bf16 wide[512];
    for (int i = 0; i < 4; i++) base[i] = (size_t)block[i < blocks ? i : 0] * columns * 16;
    int ahead = m->scales ? 1024 : 2048;
    for (int group = 0; group < groups; group += 2) {
        int two = group + 1 < groups;
        for (int half = 0; half < blocks; half += two ? 2 : 4) {
            const bf16 *from = x + group * part;
            int some = blocks - half;
            _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
            for (int k = 0; k < columns; k += 32) {
                const bf16 *now = from + k * 48;
                if (!group)
                    for (int i = half; i < blocks && i < half + (two ? 2 : 4); i++) {
                        const char *next = (const char *)m->weight + (base[i] + k * 16 ) * (m->scales ? 1 : 2) + ahead;
                        for (int line = 0; line < (m->scales ? 512 : 1024); line += 64)
                            _mm_prefetch(next + line, _MM_HINT_T0);
                    }
                if (two) { /* sums 0, 1: of the first block; 2, 3: of the second */
                    WEIGHTS(4, half);
                    if (some > 1) WEIGHTS(5, half + 1);
                    for (int s = 0; s < 3; s++) {
                        _tile_loadd(6, now + s * 512, 64);
                        _tile_loadd(7, now + part + s * 512, 64);
                        _tile_dpbf16ps(0, 6, 4);
                        _tile_dpbf16ps(1, 7, 4);
                        if (some > 1) { _tile_dpbf16ps(2, 6, 5); _tile_dpbf16ps(3, 7, 5); }
                    }
                } else {
                    _tile_loadd(5, now, 64); _tile_loadd(6, now + 512, 64); _tile_loadd(7, now + 1024, 64);
                    WEIGHTS(4, 0);
                    _tile_dpbf16ps(0, 5, 4); _tile_dpbf16ps(0, 6, 4); _tile_dpbf16ps(0, 7, 4);
                    if (blocks > 1) {
                        WEIGHTS(4, 1);
                        _tile_dpbf16ps(1, 5, 4); _tile_dpbf16ps(1, 6, 4); _tile_dpbf16ps(1, 7, 4);
                    }
                    if (blocks > 2) {
                        WEIGHTS(4, 2);
                        _tile_dpbf16ps(2, 5, 4); _tile_dpbf16ps(2, 6, 4); _tile_dpbf16ps(2, 7, 4);
                    }
                    if (blocks > 3) {
                        WEIGHTS(4, 3);
                        _tile_dpbf16ps(3, 5, 4); _tile_dpbf16ps(3, 6, 4); _tile_dpbf16ps(3, 7, 4);
                    }
                }
            }
            for (int i = 0; i < 4; i++) {
                int row = two ? half + i / 2 : i, at = group + (two ? i % 2 : 0);
                if (row >= blocks) break;
                switch (i) {
                    case 0: _tile_stored(0, tile, 64); break;
                    case 1: _tile_stored(1, tile, 64); break;
                    case 2: _tile_stored(2, tile, 64); break;
                    default: _tile_stored(3, tile, 64);
                }
                int left = tokens - at * 16;
                put(y[row] + (size_t)at * 16 * stride, stride, tile, left < 16 ? left : 16,
                    m->scales ? m->scales + block[row] * 16 : NULL);
            }
        }
    }
}
#endif

/* y[i][token * stride + row] for blocks `first` … of 16 rows; x as float32 and as summands. */
static void product(Pool *pool, float *const *y, int stride, const Matrix *m, const int *block, int blocks,
                    const float *x, const bf16 *packed, int tokens) {
#if HAS_AMX
    if (pool->amx) {
        product_amx(y, stride, m, block, blocks, packed, tokens);
        return;
    }
#endif
    (void)pool, (void)packed;
    for (int i = 0; i < blocks; i++) product_plain(y[i], stride, m, block[i], x, tokens);
}

/* --- the parts of a layer ----------------------------------------------------------------------------------------- */

static const int first_module[SITES] = {Q_PROJ, O_PROJ, GATE_PROJ, DOWN_PROJ};
static const int modules_of[SITES] = {3, 1, 2, 1};

/* Rows of a module in its site's output. */
static int width(const Model *m, int module) {
    switch (module) {
        case Q_PROJ: return m->heads * m->head_size;
        case K_PROJ: case V_PROJ: return m->kv_heads * m->head_size;
        case GATE_PROJ: case UP_PROJ: return m->intermediate;
        default: return m->hidden;
    }
}

/* What a token's adapter makes of its input to a site: A x, of each module. */
static void adapt(const Pool *pool, int layer, int site, int token, const float *x) {
    const Lora *lora = pool->step->row[pool->scratch->row_of[token]].lora;
    if (!lora) return;
    float *inner = pool->scratch->inner + (size_t)token * pool->scratch->ranks;
    for (int i = 0; i < modules_of[site]; i++) {
        const Lora *one = lora + layer * MODULES + first_module[site] + i;
        for (int r = 0; r < one->rank; r++)
            *inner++ = dot(one->inner + (size_t)r * pool->model->layer[layer].site[site].columns, x,
                           pool->model->layer[layer].site[site].columns);
    }
}

/* y[token][from, to) += B A x, counted in rows of the module; `start` is the module's first row in y. */
static void add_adapters(const Pool *pool, int layer, int site, int module, float *y, int stride, int from, int to) {
    const Step *step = pool->step;
    for (int i = 0; i < step->rows; i++) {
        const Lora *lora = step->row[i].lora;
        if (!lora) continue;
        int skipped = 0;
        for (int other = first_module[site]; other < module; other++) skipped += lora[layer * MODULES + other].rank;
        const Lora *one = lora + layer * MODULES + module;
        for (int t = step->row[i].first; t < step->row[i].first + step->row[i].count; t++) {
            const float *inner = pool->scratch->inner + (size_t)t * pool->scratch->ranks + skipped;
            for (int r = 0; r < one->rank; r++)
                add_scaled(y + (size_t)t * stride + from, one->outer + (size_t)r * width(pool->model, module) + from,
                           inner[r], to - from);
        }
    }
}

/* The input of a site for one token: float32 for adapters and plain products, summands for AMX. */
static void give(Pool *pool, int layer, int site, int token, const float *x) {
    if (pool->amx) pack(pool->scratch->packed, x, pool->model->layer[layer].site[site].columns, token);
    adapt(pool, layer, site, token, x);
}

/* A whole site, in pieces of some blocks that whoever is free takes. */
static void project(Pool *pool, int phase, int layer, int site, const float *x, float *y) {
    const Model *model = pool->model;
    const Matrix *m = &model->layer[layer].site[site];
    enum { PIECE = 8 };
    int blocks = m->rows / 16, tokens = pool->step->tokens;
    for (int piece; (piece = next_piece(pool, phase)) * PIECE < blocks;) {
        int first = piece * PIECE, last = first + PIECE < blocks ? first + PIECE : blocks;
        for (int at = first; at < last; at += 4) {
            int some = last - at < 4 ? last - at : 4, block[4];
            float *to[4];
            for (int i = 0; i < some; i++) block[i] = at + i, to[i] = y + block[i] * 16;
            product(pool, to, m->rows, m, block, some, x, pool->scratch->packed, tokens);
        }
        int start = 0;
        for (int i = 0; i < modules_of[site]; i++) {
            int module = first_module[site] + i, wide = width(model, module);
            int from = first * 16 > start ? first * 16 : start;
            int to = last * 16 < start + wide ? last * 16 : start + wide;
            if (from < to) add_adapters(pool, layer, site, module, y + start, m->rows, from - start, to - start);
            start += wide;
        }
    }
}

/* gelu(gate x) * (up x); gate and up of the same rows lie side by side. Leaves [tokens][2 * intermediate]: gate's half
of each token's row holds the result. */
static void project_gated(Pool *pool, int phase, int layer, const float *x, float *y) {
    const Matrix *m = &pool->model->layer[layer].site[GATE_UP];
    enum { PIECE = 4 };
    int pairs = m->rows / 32, half = m->rows / 2, tokens = pool->step->tokens;
    for (int piece; (piece = next_piece(pool, phase)) * PIECE < pairs;) {
        int first = piece * PIECE, last = first + PIECE < pairs ? first + PIECE : pairs;
        for (int at = first; at < last; at += 2) {
            int some = last - at < 2 ? 1 : 2, block[4];
            float *to[4];
            for (int i = 0; i < 2 * some; i++) block[i] = at * 2 + i, to[i] = y + (at + i / 2) * 16 + i % 2 * half;
            product(pool, to, m->rows, m, block, 2 * some, x, pool->scratch->packed, tokens);
        }
        add_adapters(pool, layer, GATE_UP, GATE_PROJ, y, m->rows, first * 16, last * 16);
        add_adapters(pool, layer, GATE_UP, UP_PROJ, y + half, m->rows, first * 16, last * 16);
        for (int t = 0; t < tokens; t++) {
            float *gate = y + (size_t)t * m->rows, *up = gate + half;
#pragma omp simd
            for (int n = first * 16; n < last * 16; n++) {
                float g = gate[n], inner = 0.7978845608028654f * (g + 0.044715f * g * g * g);
                gate[n] = 0.5f * g * (1.0f + quick_tanh(inner)) * up[n];
            }
        }
    }
}

/* x rotated by its position, by halves. */
static void rotate(float *x, const float *cosines, const float *sines, int half) {
#pragma omp simd
    for (int i = 0; i < half; i++) {
        float one = x[i], two = x[i + half];
        x[i] = one * cosines[i] - two * sines[i];
        x[i + half] = two * cosines[i] + one * sines[i];
    }
}

/* Queries and keys of one token normed and turned, keys and values put into the cache. */
static void remember(const Pool *pool, int number, int token, float *qkv) {
    const Model *m = pool->model;
    const Layer *layer = &m->layer[number];
    const Rows *row = &pool->step->row[pool->scratch->row_of[token]];
    int size = m->head_size, half = size / 2, position = pool->scratch->position[token];
    const float *turn = pool->scratch->turns + ((size_t)token * m->ropes + layer->rope) * size;
    for (int head = 0; head < m->heads + m->kv_heads; head++) {
        float *x = qkv + head * size;
        const float *weight = head < m->heads ? layer->q_norm : layer->k_norm;
        if (weight) norm(x, x, weight, m->eps, size);
        rotate(x, turn, turn + half, half);
    }
    size_t slot = ((size_t)number * m->slots + (size_t)row->blocks[position / BLOCK] * BLOCK + position % BLOCK);
    size_t many = (size_t)m->kv_heads * size;
    memcpy(m->keys + slot * many, qkv + m->heads * size, many * sizeof(float));
    memcpy(m->values + slot * many, qkv + (m->heads + m->kv_heads) * size, many * sizeof(float));
}

/* Attention of the queries of one token that share a key/value head; they are replaced by what they find. */
static void attend(const Pool *pool, int number, int token, int kv_head, float *qkv, float *scores) {
    const Model *m = pool->model;
    const Rows *row = &pool->step->row[pool->scratch->row_of[token]];
    int size = m->head_size, group = m->heads / m->kv_heads, position = pool->scratch->position[token];
    int window = m->layer[number].window;
    int begin = window && position >= window ? position - window + 1 : 0, length = position + 1 - begin;
    float *queries = qkv + kv_head * group * size;
    size_t many = (size_t)m->kv_heads * size, start = (size_t)number * m->slots * many + (size_t)kv_head * size;
    for (int j = 0; j < length; j++) {
        int at = begin + j;
        const float *key = m->keys + start + ((size_t)row->blocks[at / BLOCK] * BLOCK + at % BLOCK) * many;
        int g = 0;
        for (; g + 4 <= group; g += 4) { /* four sums that do not wait for each other */
            const float *q = queries + g * size;
            float sum[4], a = 0, b = 0, c = 0, d = 0;
#pragma omp simd reduction(+ : a, b, c, d)
            for (int i = 0; i < size; i++)
                a += q[i] * key[i], b += q[i + size] * key[i], c += q[i + 2 * size] * key[i], d += q[i + 3 * size] * key[i];
            sum[0] = a, sum[1] = b, sum[2] = c, sum[3] = d;
            for (int i = 0; i < 4; i++) scores[(size_t)(g + i) * length + j] = sum[i] * m->scale;
        }
        for (; g < group; g++) scores[(size_t)g * length + j] = dot(queries + g * size, key, size) * m->scale;
    }
    for (int g = 0; g < group; g++) {
        float *line = scores + (size_t)g * length, highest = -INFINITY, sum = 0;
        if (m->attention_cap)
            for (int j = 0; j < length; j++) line[j] = quick_tanh(line[j] / m->attention_cap) * m->attention_cap;
        for (int j = 0; j < length; j++) highest = line[j] > highest ? line[j] : highest;
#pragma omp simd reduction(+ : sum)
        for (int j = 0; j < length; j++) sum += line[j] = quick_exp(line[j] - highest);
        for (int j = 0; j < length; j++) line[j] /= sum;
    }
    memset(queries, 0, sizeof(float) * group * size);
    for (int j = 0; j < length; j++) {
        int at = begin + j;
        const float *value = m->values + start + ((size_t)row->blocks[at / BLOCK] * BLOCK + at % BLOCK) * many;
        for (int g = 0; g < group; g++) add_scaled(queries + g * size, value, scores[(size_t)g * length + j], size);
    }
}

/* Logits of the wanted tokens, and the best token of each; of equal ones the first. */
static void answer(Pool *pool, int phase, int thread, const float *x) {
    const Model *m = pool->model;
    Scratch *s = pool->scratch;
    enum { PIECE = 64 };
    int blocks = m->head.rows / 16, wanted = s->wanted;
    float *best = s->best + (size_t)thread * wanted * 2;
    float *part = s->parts + (size_t)thread * wanted * 64;
    for (int i = 0; i < wanted; i++) best[2 * i] = -INFINITY, best[2 * i + 1] = 0;
    for (int piece; (piece = next_piece(pool, phase)) * PIECE < blocks;) {
        int first = piece * PIECE, last = first + PIECE < blocks ? first + PIECE : blocks;
        for (int at = first; at < last; at += 4) {
            int some = last - at < 4 ? last - at : 4, block[4];
            float *to[4];
            for (int i = 0; i < some; i++) block[i] = at + i, to[i] = part + i * 16;
            product(pool, to, 64, &m->head, block, some, x, s->packed, wanted);
            int count = some * 16;
            if (at * 16 + count > m->vocabulary) count = m->vocabulary - at * 16;
            for (int i = 0; i < wanted; i++) {
                float *line = part + (size_t)i * 64, highest = -INFINITY;
                if (m->final_cap)
                    for (int n = 0; n < count; n++) line[n] = quick_tanh(line[n] / m->final_cap) * m->final_cap;
#pragma omp simd reduction(max : highest)
                for (int n = 0; n < count; n++) highest = line[n] > highest ? line[n] : highest;
                if (highest > best[2 * i]) {
                    int n = 0;
                    while (line[n] != highest) n++;
                    int32_t token = at * 16 + n;
                    best[2 * i] = highest;
                    memcpy(&best[2 * i + 1], &token, 4);
                }
                if (pool->step->row[s->wanted_row[i]].wanted == 2)
                    memcpy(pool->step->logits + (size_t)i * m->vocabulary + at * 16, line, count * sizeof(float));
            }
        }
    }
}

static void embed(const Model *m, int token, float *x) {
    const bf16 *from = m->embedding + (size_t)token * m->hidden;
    for (int i = 0; i < m->hidden; i++) x[i] = to_float(from[i]) * m->embedding_scale;
}

/* One thread's part of a step. Tokens, pieces of matrices and (token, head) are shared out as threads become free. */
static void work(Pool *pool, int thread) {
    const Model *m = pool->model;
    const Step *step = pool->step;
    Scratch *s = pool->scratch;
    long long met = atomic_load(&pool->meetings); /* no next one is counted before this thread has come to it */
    int phase = 0, tokens = step->tokens, hidden = m->hidden, wide = m->layer[0].site[QKV].rows, units = tokens * m->kv_heads;
    float *scores = s->scores + (size_t)thread * s->longest * (m->heads / m->kv_heads);
    float temporary[hidden];
#if HAS_AMX
    if (pool->amx) configure_tiles();
#endif
    for (int t; (t = next_piece(pool, phase)) < tokens;) {
        embed(m, step->token[t], s->x + (size_t)t * hidden);
        for (int i = 0, half = m->head_size / 2; i < m->ropes * half; i++) {
            float angle = (float)s->position[t] * m->frequencies[i];
            float *turn = s->turns + ((size_t)t * m->ropes + i / half) * m->head_size + i % half;
            turn[0] = cosf(angle), turn[half] = sinf(angle);
        }
        norm(s->normed + (size_t)t * hidden, s->x + (size_t)t * hidden, m->layer[0].input_norm, m->eps, hidden);
        give(pool, 0, QKV, t, s->normed + (size_t)t * hidden);
    }
    phase = meet(pool, phase, &met);
    for (int i = 0; i < m->layers; i++) {
        const Layer *layer = &m->layer[i];
        project(pool, phase, i, QKV, s->normed, s->y);
        phase = meet(pool, phase, &met);
        for (int t; (t = next_piece(pool, phase)) < tokens;) remember(pool, i, t, s->y + (size_t)t * wide);
        phase = meet(pool, phase, &met);
        for (int unit; (unit = next_piece(pool, phase)) < units;) {
            int t = units - 1 - unit; /* the longest first */
            attend(pool, i, t / m->kv_heads, t % m->kv_heads, s->y + (size_t)(t / m->kv_heads) * wide, scores);
        }
        phase = meet(pool, phase, &met);
        int found = m->heads * m->head_size;
        for (int t; (t = next_piece(pool, phase)) < tokens;) {
            memcpy(s->normed + (size_t)t * found, s->y + (size_t)t * wide, sizeof(float) * found);
            give(pool, i, O, t, s->normed + (size_t)t * found);
        }
        phase = meet(pool, phase, &met);
        project(pool, phase, i, O, s->normed, s->y);
        phase = meet(pool, phase, &met);
        for (int t; (t = next_piece(pool, phase)) < tokens;) {
            float *x = s->x + (size_t)t * hidden, *y = s->y + (size_t)t * hidden;
            if (layer->after_attention_norm) norm(y, y, layer->after_attention_norm, m->eps, hidden);
            add_scaled(x, y, 1, hidden);
            norm(s->normed + (size_t)t * hidden, x, layer->before_mlp_norm, m->eps, hidden);
            give(pool, i, GATE_UP, t, s->normed + (size_t)t * hidden);
        }
        phase = meet(pool, phase, &met);
        project_gated(pool, phase, i, s->normed, s->y);
        phase = meet(pool, phase, &met);
        for (int t; (t = next_piece(pool, phase)) < tokens;) {
            const float *gated = s->y + (size_t)t * 2 * m->intermediate;
            memcpy(s->normed + (size_t)t * m->intermediate, gated, sizeof(float) * m->intermediate);
            give(pool, i, DOWN, t, gated);
        }
        phase = meet(pool, phase, &met);
        project(pool, phase, i, DOWN, s->normed, s->y);
        phase = meet(pool, phase, &met);
        for (int t; (t = next_piece(pool, phase)) < tokens;) {
            float *x = s->x + (size_t)t * hidden, *y = s->y + (size_t)t * hidden;
            if (layer->after_mlp_norm) norm(y, y, layer->after_mlp_norm, m->eps, hidden);
            add_scaled(x, y, 1, hidden);
            if (i + 1 < m->layers) {
                norm(s->normed + (size_t)t * hidden, x, m->layer[i + 1].input_norm, m->eps, hidden);
                give(pool, i + 1, QKV, t, s->normed + (size_t)t * hidden);
            }
        }
        phase = meet(pool, phase, &met);
    }
    for (int i; (i = next_piece(pool, phase)) < s->wanted;) {
        norm(temporary, s->x + (size_t)s->wanted_token[i] * hidden, m->norm, m->eps, hidden);
        memcpy(s->normed + (size_t)i * hidden, temporary, sizeof(float) * hidden);
        if (pool->amx) pack(s->packed, temporary, hidden, i);
    }
    phase = meet(pool, phase, &met);
    if (s->wanted) answer(pool, phase, thread, s->normed);
    phase = meet(pool, phase, &met);
#if HAS_AMX
    if (pool->amx) _tile_release();
#endif
}

/* --- what Python calls -------------------------------------------------------------------------------------------- */

typedef struct { Pool *pool; int thread; } Worker;

static void *serve(void *given) {
    Worker worker = *(Worker *)given;
    free(given);
    int64_t seen = 0;
    for (;;) {
        pthread_mutex_lock(&worker.pool->mutex);
        while (worker.pool->turn == seen && !worker.pool->ending)
            pthread_cond_wait(&worker.pool->work, &worker.pool->mutex);
        seen = worker.pool->turn;
        int ending = worker.pool->ending;
        pthread_mutex_unlock(&worker.pool->mutex);
        if (ending) return NULL;
        work(worker.pool, worker.thread);
    }
}

/* Whether the processor has AMX and the system lets this process use it. */
static int may_use_amx(void) {
#if HAS_AMX
    return !syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */);
#else
    return 0;
#endif
}

void stop_threads(Pool *pool) {
    pthread_mutex_lock(&pool->mutex);
    pool->ending = 1;
    pthread_cond_broadcast(&pool->work);
    pthread_mutex_unlock(&pool->mutex);
    for (int i = 1; i < pool->threads; i++) pthread_join(pool->worker[i], NULL);
    free(pool->counters);
    free(pool);
}

/* Threads that wait for steps. NULL: no memory for them. */
Pool *start_threads(int threads, int use_amx) {
    Pool *pool = calloc(1, sizeof(Pool));
    if (!pool) return NULL;
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->work, NULL);
    pool->amx = use_amx && may_use_amx();
    pool->threads = 1;
    for (int i = 1; i < threads && i < MOST_THREADS; i++) {
        Worker *worker = malloc(sizeof(Worker));
        if (!worker) break;
        *worker = (Worker){pool, i};
        if (pthread_create(&pool->worker[i], NULL, serve, worker)) {
            free(worker);
            break;
        }
        pool->threads++;
    }
    return pool;
}

int uses_amx(const Pool *pool) { return pool->amx; }

static void *room(size_t count, size_t size, int *failed) {
    void *memory = aligned_alloc(64, (count * size + 64) / 64 * 64);
    if (!memory) *failed = 1;
    return memory;
}

/* 0, or 1 where memory is wanting; nothing has been done then. */
int run_step(Pool *pool, const Model *model, const Step *step) {
    Scratch s = {0};
    int failed = 0, tokens = step->tokens, padded = (tokens + 15) / 16 * 16, widest = model->hidden, deepest = model->hidden;
    for (int i = 0; i < SITES; i++) {
        const Matrix *site = &model->layer[0].site[i];
        widest = site->rows > widest ? site->rows : widest;
        deepest = site->columns > deepest ? site->columns : deepest;
    }
    for (int i = 0; i < step->rows; i++) {
        const Rows *row = &step->row[i];
        s.wanted += row->wanted > 0;
        s.longest = row->start + row->count > s.longest ? row->start + row->count : s.longest;
        if (row->lora)
            for (int j = 0; j < model->layers; j++)
                for (int site = 0; site < SITES; site++) {
                    int ranks = 0;
                    for (int n = 0; n < modules_of[site]; n++)
                        ranks += row->lora[j * MODULES + first_module[site] + n].rank;
                    s.ranks = ranks > s.ranks ? ranks : s.ranks;
                }
    }
    pool->phases = model->layers * PHASES + 4;
    int group = model->heads / model->kv_heads;
    s.row_of = room(tokens, sizeof(int32_t), &failed);
    s.position = room(tokens, sizeof(int32_t), &failed);
    s.wanted_token = room(s.wanted, sizeof(int32_t), &failed);
    s.wanted_row = room(s.wanted, sizeof(int32_t), &failed);
    s.turns = room((size_t)tokens * model->ropes * model->head_size, sizeof(float), &failed);
    s.x = room((size_t)tokens * model->hidden, sizeof(float), &failed);
    s.normed = room((size_t)tokens * deepest, sizeof(float), &failed);
    s.y = room((size_t)tokens * widest, sizeof(float), &failed);
    s.inner = room((size_t)tokens * s.ranks, sizeof(float), &failed);
    s.scores = room((size_t)pool->threads * s.longest * group, sizeof(float), &failed);
    s.best = room((size_t)pool->threads * s.wanted * 2, sizeof(float), &failed);
    s.parts = room((size_t)pool->threads * s.wanted * 64, sizeof(float), &failed);
    s.packed = room(pool->amx ? (size_t)padded * deepest * 3 : 1, sizeof(bf16), &failed);
    free(pool->counters);
    pool->counters = calloc(pool->phases, sizeof(atomic_int));
    if (!failed && pool->counters) {
        if (pool->amx) memset(s.packed, 0, (size_t)padded * deepest * 3 * sizeof(bf16));
        for (int i = 0, wanted = 0; i < step->rows; i++) {
            const Rows *row = &step->row[i];
            for (int t = 0; t < row->count; t++) s.row_of[row->first + t] = i, s.position[row->first + t] = row->start + t;
            if (row->wanted) s.wanted_row[wanted] = i, s.wanted_token[wanted++] = row->first + row->count - 1;
        }
        pthread_mutex_lock(&pool->mutex);
        pool->model = model, pool->step = step, pool->scratch = &s;
        pool->turn++;
        pthread_cond_broadcast(&pool->work);
        pthread_mutex_unlock(&pool->mutex);
        work(pool, 0);
        for (int i = 0; i < s.wanted; i++) {
            float highest = -INFINITY;
            int32_t chosen = 0;
            for (int thread = 0; thread < pool->threads; thread++) {
                const float *best = s.best + ((size_t)thread * s.wanted + i) * 2;
                int32_t token;
                memcpy(&token, &best[1], 4);
                if (best[0] > highest || (best[0] == highest && token < chosen)) highest = best[0], chosen = token;
            }
            step->best[i] = chosen;
        }
    } else
        failed = 1;
    void *all[] = {s.row_of, s.position, s.wanted_token, s.wanted_row, s.turns, s.x, s.normed, s.y, s.inner, s.scores, s.best, s.parts, s.packed};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
    return failed;
}
