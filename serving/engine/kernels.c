/* One step of a Gemma on a CPU: everything between token ids and logits, in one call. See kernels.py.

    token ids ─▶ embed ─▶ x
    each layer:
      x ─▶ rms_norm ─▶ load_input ─▶ matmul QKV ─▶ store_output ─▶ write_kv: norm and rope; keys and values to the cache
             ─▶ attend: score ─▶ softmax ─▶ weighted_sum ─▶ matmul O ─▶ store_output ─▶ rms_norm ─▶ + x
      x ─▶ rms_norm ─▶ load_input ─▶ matmul GATE_UP ─▶ store_gated: gelu(gate) · up
             ─▶ matmul DOWN ─▶ store_output ─▶ rms_norm ─▶ + x
    x of the tokens that are wanted ─▶ rms_norm ─▶ matmul head ─▶ argmax, logits

A token's adapter, if its request has one, adds to each product: lora_a makes A x of the input, add_lora_b adds B A x to
the sums before they are stored. Between two steps of the picture all threads meet (barrier).

    processor                   matmul                                            all else
    AMX, AVX-512 with bfloat16  matmul_amx: three bfloat16 summands of x, exact   vectors of 16, one register
    any other                   matmul_vectors: weights widened to float32        vectors of 16, in 1, 2 or 4 registers

Generation is bound by memory: each step reads all weights once. So they are bfloat16 (or int8), and what they are
multiplied with stays exact: AMX multiplies bfloat16 by bfloat16 and adds in float32, and a float32 number is the sum of
three bfloat16 ones, so three products of the same weights, already loaded, give the product with float32 activations.

A token's values do not depend on what else is in the step: every sum runs in an order of its own. Batches, chunks of
prompts and shared prefixes therefore change no bit of an answer.

Layouts, in C order:
    weights       [rows / 32][columns / 32][2 blocks][16][16 rows][2]; of gate and up, the blocks are 16 rows of each
    activations   [tokens / 16][columns / 32][3 summands][16 tokens][32]
    keys, values  [layer][slot][kv head][head size], float32; slot = BLOCK * block + offset in it
*/
#define _GNU_SOURCE
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#define HAS_AMX 1
#else
#define HAS_AMX 0
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

enum { QKV, O, GATE_UP, DOWN, SITES };
enum { Q_PROJ, K_PROJ, V_PROJ, O_PROJ, GATE_PROJ, UP_PROJ, DOWN_PROJ, MODULES };
enum { BLOCK = 8, MOST_THREADS = 64, PHASES = 10 /* of a layer: see `work` */, MOST_QUERIES = 4 /* at a time */ };
enum { PANEL = 16 /* tokens that are multiplied with weights at a time */, HUGE = 2 << 20 /* bytes of a page */ };
typedef uint16_t bf16;
/* 16 numbers that are computed with at once, wherever they lie: one register of AVX-512, some of others. */
typedef float f32 __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t u32 __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t i32 __attribute__((vector_size(64)));
#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (i32){__VA_ARGS__})
#endif
#define EVEN(a, b) SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30)
#define ODD(a, b) SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31)
#define UNROLLED _Pragma("GCC unroll 16")

typedef struct { /* rows and columns are multiples of 32 */
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
    const float *a; /* [rank][columns] */
    const float *b; /* [rank][rows], scaled */
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
    int64_t steps_begun;
    int ending;
    atomic_int arrived;
    atomic_llong barriers; /* of all steps */
    int32_t phases;
    const Model *model;
    const Step *step;
    struct Scratch *scratch;
    char *memory; /* of the scratch: kept, as long as no step needs more */
    size_t room;
    int amx;
} Pool;

typedef struct Scratch {
    atomic_int *counters; /* of each phase: the next piece of its work */
    int32_t wanted, longest, ranks;
    int32_t *row_of, *position, *wanted_token, *wanted_row; /* [tokens], [tokens], [wanted], [wanted] */
    float *rope_table; /* [tokens][ropes][cosines, sines] */
    float *x, *normed, *gated, *y, *low_rank, *scores, *best;
    size_t *offset; /* [threads][longest]: where keys and values lie */
    bf16 *packed, *packed_gated; /* `normed` and `gated` as summands */
    bf16 *widened;               /* [threads][piece]: int8 weights of a piece */
    size_t piece;
} Scratch;

static void spin(int *spins) {
    if (++*spins < 500) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    } else
        sched_yield(); /* the thread that is waited for may want this core */
}

/* All threads leave together. The count of barriers only grows: one that leaves late, in the next step even, sees it. */
static int barrier(Pool *pool, int phase, long long *passed) {
    if (atomic_fetch_add(&pool->arrived, 1) == pool->threads - 1) {
        atomic_store(&pool->arrived, 0);
        atomic_store(&pool->barriers, *passed + 1);
    } else
        for (int spins = 0; atomic_load_explicit(&pool->barriers, memory_order_acquire) <= *passed;) spin(&spins);
    ++*passed;
    return phase + 1;
}

static int next_piece(Pool *pool, int phase) { return atomic_fetch_add(&pool->scratch->counters[phase], 1); }

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

static inline float to_float(bf16 value) { return bits_to_float((uint32_t)value << 16); }

/* exp by 2^n and a polynomial (Cephes), to two units in the last place. */
static inline f32 exp_f32(f32 x) {
    u32 low = (u32)(x < -87.0f), high = (u32)(x > 88.0f), bits = (u32)x;
    x = (f32)((low & float_to_bits(-87.0f)) | (high & float_to_bits(88.0f)) | (bits & ~(low | high)));
    f32 scaled = x * 1.44269504088896341f + 0.5f;
    i32 whole = __builtin_convertvector(scaled, i32);
    whole += __builtin_convertvector(whole, f32) > scaled; /* the next lower one of negative numbers: true is -1 */
    f32 n = __builtin_convertvector(whole, f32);
    f32 r = x - n * 0.693359375f + n * 2.12194440e-4f;
    f32 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * (f32)((whole + 127) << 23);
}

static inline f32 tanh_f32(f32 x) { return 1.0f - 2.0f / (exp_f32(2.0f * x) + 1.0f); }

static inline float reduce_add(f32 x) {
    float lane[16];
    memcpy(lane, &x, sizeof lane);
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; i++) lane[i] += lane[i + half];
    return lane[0];
}

/* The total of each of 16 vectors: neighbours are added until one is left, in the same order for every vector. */
static inline f32 reduce_add_each(f32 *sum) {
#define ADD_NEIGHBOURS(left) \
    UNROLLED for (int i = 0; i < left; i++) sum[i] = EVEN(sum[2 * i], sum[2 * i + 1]) + ODD(sum[2 * i], sum[2 * i + 1]);
    ADD_NEIGHBOURS(8) ADD_NEIGHBOURS(4) ADD_NEIGHBOURS(2) ADD_NEIGHBOURS(1)
#undef ADD_NEIGHBOURS
    return sum[0];
}

/* The sums here have the order that their vectors give them, whatever a compiler does; n is a multiple of 16. */
static inline float dot(const float *a, const float *b, int n) {
    f32 sum[4] = {{0}}; /* that do not wait for each other */
    int i = 0;
    for (; i + 64 <= n; i += 64)
        for (int j = 0; j < 4; j++) sum[j] += *(const f32 *)(a + i + 16 * j) * *(const f32 *)(b + i + 16 * j);
    for (; i < n; i += 16) sum[0] += *(const f32 *)(a + i) * *(const f32 *)(b + i);
    return reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

static inline void add(float *y, const float *x, int n) {
    for (int i = 0; i < n; i += 16) *(f32 *)(y + i) += *(const f32 *)(x + i);
}

static inline void rms_norm(float *out, const float *x, const float *weight, float eps, int n) {
    float factor = 1.0f / sqrtf(dot(x, x, n) / n + eps);
    for (int i = 0; i < n; i += 16) *(f32 *)(out + i) = *(const f32 *)(x + i) * factor * *(const f32 *)(weight + i);
}

/* Split 16 float32 values of a token into three bfloat16 summands, where the products expect them. */
static inline void pack(bf16 *packed, int columns, int token, int column, f32 x) {
#if HAS_AMX
    bf16 *out = packed + (size_t)(token / 16) * columns * 48 + column / 32 * 1536 + token % 16 * 32 + column % 32;
    __m512 rest = (__m512)x;
    UNROLLED for (int s = 0; s < 3; s++) {
        __m256i part = (__m256i)_mm512_cvtneps_pbh(rest);
        _mm256_storeu_si256((__m256i *)(out + s * 512), part);
        rest = _mm512_sub_ps(rest, (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(part), 16));
    }
#endif
}

/* --- matrix products ---------------------------------------------------------------------------------------------- */

/* Bytes of weights that are one thread's at a time, and how far ahead of them memory is asked. */
enum { PIECE_BYTES = 640 << 10, PIECE_BYTES_OF_ONE_PANEL = 1 << 20, AHEAD = 32 << 10 };

/* What products give: of a pair of blocks of 16 rows, for a panel of tokens. */
typedef struct Sums { _Alignas(64) float of[2][PANEL][16]; } Sums;

/* Without AMX. `weights`: of the pair. */
static void matmul_vectors(Sums *sums, const Matrix *m, const void *weights, const float *x, int tokens) {
    int columns = m->columns;
    for (int block = 0; block < 2; block++)
        for (int first = 0; first < tokens; first += 8) {
            int some = tokens - first < 8 ? tokens - first : 8;
            f32 sum[8] = {{0}};
            for (int k = 0; k < columns; k += 2) {
                size_t at = (size_t)(k / 32 * 2 + block) * 512 + k % 32 * 16;
                f32 even, odd;
                if (m->scales) {
                    const int8_t *pair = (const int8_t *)weights + at;
                    for (int row = 0; row < 16; row++) even[row] = pair[2 * row], odd[row] = pair[2 * row + 1];
                } else {
                    u32 pair = *(const u32 *)((const bf16 *)weights + at);
                    even = (f32)(pair << 16), odd = (f32)(pair & 0xffff0000u);
                }
                for (int t = 0; t < some; t++) {
                    const float *from = x + (size_t)(first + t) * columns + k;
                    sum[t] += even * from[0] + odd * from[1];
                }
            }
            for (int t = 0; t < some; t++) *(f32 *)sums->of[block][first + t] = sum[t];
        }
}

#if HAS_AMX
static void configure_tiles(void) {
    struct { uint8_t palette, start, reserved[14]; uint16_t bytes[16]; uint8_t rows[16]; } config = {0};
    config.palette = 1;
    for (int i = 0; i < 8; i++) config.bytes[i] = 64, config.rows[i] = 16;
    _tile_loadconfig(&config);
}

/* int8 weights as bfloat16, which holds them exactly. Memory is asked for later ones meanwhile, up to `end`. */
static void widen(bf16 *to, const int8_t *from, size_t count, const int8_t *end) {
    for (size_t i = 0; i < count; i += 64) {
        if (from + i + AHEAD < end) _mm_prefetch((const char *)from + i + AHEAD, _MM_HINT_T1);
        for (size_t j = i; j < i + 64; j += 32) {
            __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(from + j))));
            __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(from + j + 16))));
            _mm512_storeu_si512(to + j, (__m512i)_mm512_cvtne2ps_pbh(high, low));
        }
    }
}

/* Two pairs at once, or one twice, so that what is loaded of `x` is used four times. Each sum runs over the columns in
their order, and over the summands of each 32 columns. `end`: of what memory is asked for meanwhile; NULL: of nothing. */
static void matmul_amx(Sums *one, Sums *two, const bf16 *weights, const bf16 *others, const bf16 *x, int columns,
                        const char *end) {
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    for (int k = 0; k < columns; k += 32, x += 1536, weights += 1024, others += 1024) {
        if ((const char *)others + AHEAD < end)
            for (int line = AHEAD; line < AHEAD + 2048; line += 64) {
                _mm_prefetch((const char *)weights + line, _MM_HINT_T1);
                _mm_prefetch((const char *)others + line, _MM_HINT_T1);
            }
        _tile_loadd(5, x, 64); _tile_loadd(6, x + 512, 64); _tile_loadd(7, x + 1024, 64);
#define TIMES_X(sum, block) \
    _tile_loadd(4, block, 64); _tile_dpbf16ps(sum, 5, 4); _tile_dpbf16ps(sum, 6, 4); _tile_dpbf16ps(sum, 7, 4)
        TIMES_X(0, weights); TIMES_X(1, weights + 512);
        TIMES_X(2, others); TIMES_X(3, others + 512);
#undef TIMES_X
    }
    _tile_stored(0, one->of[0], 64); _tile_stored(1, one->of[1], 64);
    _tile_stored(2, two->of[0], 64); _tile_stored(3, two->of[1], 64);
}
#endif

/* The pairs of blocks that are one thread's at a time: as many as stay in its cache while all tokens pass by, and every
thread gets as many of such pieces. */
static int pairs_of_piece(const Pool *pool, const Matrix *m, int tokens) {
    int pairs = m->rows / 32;
    size_t most = tokens > PANEL ? PIECE_BYTES : PIECE_BYTES_OF_ONE_PANEL, bytes = (size_t)pairs * m->columns * 64;
    size_t share = (bytes + pool->threads - 1) / pool->threads;
    size_t pieces = (share + most - 1) / most * pool->threads;
    return ((pairs + pieces - 1) / pieces + 1) / 2 * 2; /* they are multiplied two at a time */
}

/* All tokens times a matrix. `epilogue` gets the sums of each panel and pair. */
typedef struct {
    Pool *pool;
    int thread, layer, site;
    const Matrix *m;
    const float *x;     /* [tokens][columns] */
    const bf16 *packed; /* the same as summands */
    int tokens;
} Product;
typedef void Epilogue(const Product *, Sums *, int pair, int first, int tokens);

static void matmul(const Product *p, int phase, Epilogue *epilogue) {
    const Matrix *m = p->m;
    int pairs = m->rows / 32, most = pairs_of_piece(p->pool, m, p->tokens);
    size_t size = (size_t)m->columns * 32, bytes = size * (m->scales ? 1 : 2); /* of a pair */
    Sums sums[2];
    for (int piece; (piece = next_piece(p->pool, phase)) * most < pairs;) {
        int from = piece * most, to = from + most < pairs ? from + most : pairs;
        for (int first = 0; first < p->tokens; first += PANEL) {
            int some = p->tokens - first < PANEL ? p->tokens - first : PANEL;
            for (int pair = from; pair < to; pair += 2) {
                int both = pair + 1 < to;
                const char *weights = (const char *)m->weight + pair * bytes;
#if HAS_AMX
                if (p->pool->amx) {
                    const bf16 *one = (const bf16 *)weights, *x = p->packed + (size_t)first * m->columns * 3;
                    const char *end = first ? NULL : (const char *)m->weight + to * bytes;
                    if (m->scales) {
                        bf16 *widened = p->pool->scratch->widened + p->thread * p->pool->scratch->piece;
                        if (p->tokens > PANEL) widened += (pair - from) * size; /* kept for the next panel */
                        if (!first) widen(widened, (const int8_t *)weights, size * (1 + both), (const int8_t *)end);
                        one = widened, end = NULL;
                    }
                    matmul_amx(&sums[0], &sums[both], one, one + both * size, x, m->columns, end);
                } else
#endif
                    for (int i = 0; i <= both; i++)
                        matmul_vectors(&sums[i], m, weights + i * bytes, p->x + (size_t)first * m->columns, some);
                for (int i = 0; i <= both; i++) {
                    if (m->scales)
                        for (int block = 0; block < 2; block++)
                            for (int t = 0; t < some; t++)
                                *(f32 *)sums[i].of[block][t] *= *(const f32 *)(m->scales + (pair + i) * 32 + block * 16);
                    epilogue(p, &sums[i], pair + i, first, some);
                }
            }
        }
    }
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

/* The dot products of `x` with four rows, whose sums do not wait for each other. */
static inline void four_dots(float *out, const float *rows, const float *x, int n) {
    f32 sum[4] = {{0}};
    for (int i = 0; i < n; i += 16)
        UNROLLED for (int r = 0; r < 4; r++) sum[r] += *(const f32 *)(rows + (size_t)r * n + i) * *(const f32 *)(x + i);
    for (int r = 0; r < 4; r++) out[r] = reduce_add(sum[r]);
}

/* A x of a token's adapter, for each module of a site. */
static void lora_a(const Pool *pool, int layer, int site, int token, const float *x) {
    const Lora *lora = pool->step->row[pool->scratch->row_of[token]].lora;
    if (!lora) return;
    float *low_rank = pool->scratch->low_rank + (size_t)token * pool->scratch->ranks;
    int columns = pool->model->layer[layer].site[site].columns;
    for (int i = 0; i < modules_of[site]; i++) {
        const Lora *one = lora + layer * MODULES + first_module[site] + i;
        int r = 0;
        for (; r + 4 <= one->rank; r += 4) four_dots(low_rank + r, one->a + (size_t)r * columns, x, columns);
        for (; r < one->rank; r++) low_rank[r] = dot(one->a + (size_t)r * columns, x, columns);
        low_rank += one->rank;
    }
}

/* Add `rank` numbers of `low_rank` times as many lines of 16 to each of some tokens' 16 sums. */
static inline __attribute__((always_inline)) void accumulate_lora_b(const int tokens, float (*y)[16], const float *low_rank,
                                                                    int ranks, const float *line, int rank, int rows) {
    f32 sum[8];
    for (int t = 0; t < tokens; t++) sum[t] = *(f32 *)y[t];
    for (int r = 0; r < rank; r++, line += rows)
        UNROLLED for (int t = 0; t < tokens; t++) sum[t] += *(const f32 *)line * low_rank[(size_t)t * ranks + r];
    for (int t = 0; t < tokens; t++) *(f32 *)y[t] = sum[t];
}

/* Add B A x of the tokens' adapters to their sums: a module's rows `row` … row + 15. */
static void add_lora_b(const Product *p, float (*y)[16], int first, int tokens, int module, int row) {
    const Scratch *s = p->pool->scratch;
    if (!s->ranks) return;
    int rows = width(p->pool->model, module);
    for (int t = 0, some; t < tokens; t += some) {
#define LORA(t) p->pool->step->row[s->row_of[first + (t)]].lora
        const Lora *lora = LORA(t);
        for (some = 1; some < 8 && t + some < tokens && LORA(t + some) == lora;) some++;
#undef LORA
        if (!lora) continue;
        lora += p->layer * MODULES;
        const float *low_rank = s->low_rank + (size_t)(first + t) * s->ranks, *b = lora[module].b + row;
        for (int other = first_module[p->site]; other < module; other++) low_rank += lora[other].rank;
        if (some == 8)
            accumulate_lora_b(8, y + t, low_rank, s->ranks, b, lora[module].rank, rows);
        else
            for (int n = 0; n < some; n++)
                accumulate_lora_b(1, y + t + n, low_rank + (size_t)n * s->ranks, s->ranks, b, lora[module].rank, rows);
    }
}

/* One token's input of a site: as summands for AMX, and through its adapter's A. */
static void load_input(Pool *pool, int layer, int site, int token, const float *x) {
    int columns = pool->model->layer[layer].site[site].columns;
    if (pool->amx)
        for (int k = 0; k < columns; k += 16) pack(pool->scratch->packed, columns, token, k, *(const f32 *)(x + k));
    lora_a(pool, layer, site, token, x);
}

/* The sums, with what adapters add, to y[token][row]. */
static void store_output(const Product *p, Sums *sums, int pair, int first, int tokens) {
    for (int block = 0; block < 2; block++) {
        int row = pair * 32 + block * 16, module = first_module[p->site], start = 0;
        while (module + 1 < first_module[p->site] + modules_of[p->site] && row >= start + width(p->pool->model, module))
            start += width(p->pool->model, module++);
        add_lora_b(p, sums->of[block], first, tokens, module, row - start);
        float *y = p->pool->scratch->y + (size_t)first * p->m->rows + row;
        for (int t = 0; t < tokens; t++, y += p->m->rows) *(f32 *)y = *(f32 *)sums->of[block][t];
    }
}

/* gelu(gate x) * (up x), which the product with `down` takes. */
static void store_gated(const Product *p, Sums *sums, int pair, int first, int tokens) {
    Scratch *s = p->pool->scratch;
    int intermediate = p->pool->model->intermediate;
    add_lora_b(p, sums->of[0], first, tokens, GATE_PROJ, pair * 16);
    add_lora_b(p, sums->of[1], first, tokens, UP_PROJ, pair * 16);
    for (int t = 0; t < tokens; t++) {
        f32 gate = *(f32 *)sums->of[0][t], up = *(f32 *)sums->of[1][t];
        f32 tanh = tanh_f32(0.7978845608028654f * (gate + 0.044715f * gate * gate * gate));
        f32 y = 0.5f * gate * (1.0f + tanh) * up;
        *(f32 *)(s->gated + (size_t)(first + t) * intermediate + pair * 16) = y;
        if (p->pool->amx) pack(s->packed_gated, intermediate, first + t, pair * 16, y);
    }
}

/* Rotary embedding of a head, by halves. */
static void rope(float *x, const float *cosines, const float *sines, int half) {
#pragma omp simd
    for (int i = 0; i < half; i++) {
        float one = x[i], two = x[i + half];
        x[i] = one * cosines[i] - two * sines[i];
        x[i + half] = two * cosines[i] + one * sines[i];
    }
}

/* RMSNorm and rotary embedding of one token's queries and keys; its keys and values go to the cache. */
static void write_kv(const Pool *pool, int number, int token, float *qkv) {
    const Model *m = pool->model;
    const Layer *layer = &m->layer[number];
    const Rows *row = &pool->step->row[pool->scratch->row_of[token]];
    int size = m->head_size, half = size / 2, position = pool->scratch->position[token];
    const float *cosines = pool->scratch->rope_table + ((size_t)token * m->ropes + layer->rope) * size;
    for (int head = 0; head < m->heads + m->kv_heads; head++) {
        float *x = qkv + head * size;
        const float *weight = head < m->heads ? layer->q_norm : layer->k_norm;
        if (weight) rms_norm(x, x, weight, m->eps, size);
        rope(x, cosines, cosines + half, half);
    }
    size_t slot = ((size_t)number * m->slots + (size_t)row->blocks[position / BLOCK] * BLOCK + position % BLOCK);
    size_t kv_width = (size_t)m->kv_heads * size;
    memcpy(m->keys + slot * kv_width, qkv + m->heads * size, kv_width * sizeof(float));
    memcpy(m->values + slot * kv_width, qkv + (m->heads + m->kv_heads) * size, kv_width * sizeof(float));
}

/* The loops of attention keep 16 sums in registers. They are written once and compiled for each of the numbers of
queries that share what is loaded; `queries`, `keys` and `columns` are constants. Every sum has the same order in all. */
#define COMPILED_FOR_EACH static inline __attribute__((always_inline)) void

/* scores[g][j] of some queries and 16 / queries keys. */
COMPILED_FOR_EACH score(const int queries, const Model *m, const float *query, const size_t *offset, float *scores,
                        int line) {
    const int keys = 16 / queries;
    f32 sum[16] = {{0}};
    for (int i = 0; i < m->head_size; i += 16)
        UNROLLED for (int j = 0; j < keys; j++) {
            __builtin_prefetch(m->values + offset[j] + i); /* which are wanted next */
            UNROLLED for (int g = 0; g < queries; g++)
                sum[g * keys + j] +=
                    *(const f32 *)(query + g * m->head_size + i) * *(const f32 *)(m->keys + offset[j] + i);
        }
    f32 found = reduce_add_each(sum) * m->scale;
    for (int g = 0; g < queries; g++) memcpy(scores + (size_t)g * line, (float *)&found + g * keys, keys * sizeof(float));
}

/* Columns `i` … of the values' sum, weighted by each query's probabilities. */
COMPILED_FOR_EACH weighted_sum(const int queries, const int columns, const Pool *pool, int token, int column,
                               const size_t *offset, int length, const float *scores, int line, int i) {
    const Model *m = pool->model;
    f32 sum[16] = {{0}};
    for (int j = 0; j < length; j++)
        UNROLLED for (int c = 0; c < columns; c++)
            UNROLLED for (int g = 0; g < queries; g++)
                sum[g * columns + c] += *(const f32 *)(m->values + offset[j] + i + 16 * c) * scores[(size_t)g * line + j];
    for (int g = 0; g < queries; g++)
        for (int c = 0; c < columns; c++) {
            int at = column + g * m->head_size + i + 16 * c, all = m->heads * m->head_size;
            *(f32 *)(pool->scratch->normed + (size_t)token * all + at) = sum[g * columns + c];
            if (pool->amx) pack(pool->scratch->packed, all, token, at, sum[g * columns + c]);
        }
}

/* Attention of some queries of a token, from `column` on, to `length` keys and values at the offsets `offset`. */
COMPILED_FOR_EACH attend_queries(const int queries, const Pool *pool, int token, int column, const float *query,
                                 const size_t *offset, int length, float *scores) {
    const Model *m = pool->model;
    const int together = 16 / queries;
    int line = (length + 15) / 16 * 16, i = 0;
    for (int j = 0; j < line; j += together) score(queries, m, query, offset + j, scores + j, line);
    for (int g = 0; g < queries; g++) {
        float *weight = scores + (size_t)g * line;
        f32 most = {0}, sum = {0};
        if (m->attention_cap)
            for (int j = 0; j < line; j += 16)
                *(f32 *)(weight + j) = tanh_f32(*(f32 *)(weight + j) / m->attention_cap) * m->attention_cap;
        for (int j = length; j < line; j++) weight[j] = -INFINITY;
        most -= INFINITY;
        for (int j = 0; j < line; j += 16) {
            f32 x = *(f32 *)(weight + j);
            most = (f32)(((i32)x & (x > most)) | ((i32)most & ~(x > most)));
        }
        float highest = most[0];
        for (int n = 1; n < 16; n++) highest = most[n] > highest ? most[n] : highest;
        for (int j = 0; j < line; j += 16) sum += *(f32 *)(weight + j) = exp_f32(*(f32 *)(weight + j) - highest);
        float all = reduce_add(sum);
        for (int j = 0; j < line; j += 16) *(f32 *)(weight + j) /= all;
    }
    for (; i + 16 * together <= m->head_size; i += 16 * together)
        weighted_sum(queries, together, pool, token, column, offset, length, scores, line, i);
    for (; i < m->head_size; i += 16) weighted_sum(queries, 1, pool, token, column, offset, length, scores, line, i);
}

/* Attention of the queries of one token that share a key/value head. */
static void attend(const Pool *pool, int number, int token, int kv_head, const float *qkv, float *scores, size_t *offset) {
    const Model *m = pool->model;
    const Rows *row = &pool->step->row[pool->scratch->row_of[token]];
    int size = m->head_size, group = m->heads / m->kv_heads, position = pool->scratch->position[token];
    int window = m->layer[number].window;
    int begin = window && position >= window ? position - window + 1 : 0, length = position + 1 - begin;
    size_t kv_width = (size_t)m->kv_heads * size, start = (size_t)number * m->slots * kv_width + (size_t)kv_head * size;
    for (int j = 0; j < length; j++)
        offset[j] = start + ((size_t)row->blocks[(begin + j) / BLOCK] * BLOCK + (begin + j) % BLOCK) * kv_width;
    for (int j = length; j % 16; j++) offset[j] = offset[0]; /* scored, and given no weight */
    for (int g = 0, some; g < group; g += some) {
        int column = (kv_head * group + g) * size;
        some = group - g < 2 ? 1 : group - g < MOST_QUERIES ? 2 : MOST_QUERIES;
        if (some == MOST_QUERIES) attend_queries(MOST_QUERIES, pool, token, column, qkv + column, offset, length, scores);
        else if (some == 2) attend_queries(2, pool, token, column, qkv + column, offset, length, scores);
        else attend_queries(1, pool, token, column, qkv + column, offset, length, scores);
    }
}

/* Logits of the wanted tokens, and the best token of each; of equal ones the first. */
static void argmax(const Product *p, Sums *sums, int pair, int first, int tokens) {
    const Model *m = p->pool->model;
    const Scratch *s = p->pool->scratch;
    for (int t = 0; t < tokens; t++) {
        int i = first + t;
        float *best = s->best + ((size_t)p->thread * s->wanted + i) * 2;
        for (int block = 0; block < 2; block++) {
            float *line = sums->of[block][t], highest = -INFINITY;
            int start = pair * 32 + block * 16, count = m->vocabulary - start < 16 ? m->vocabulary - start : 16;
            if (m->final_cap) *(f32 *)line = tanh_f32(*(f32 *)line / m->final_cap) * m->final_cap;
#pragma omp simd reduction(max : highest)
            for (int n = 0; n < count; n++) highest = line[n] > highest ? line[n] : highest;
            if (highest > best[0]) {
                int32_t token = start;
                while (line[token - start] != highest) token++;
                best[0] = highest;
                memcpy(&best[1], &token, 4);
            }
            if (count > 0 && p->pool->step->row[s->wanted_row[i]].wanted == 2)
                memcpy(p->pool->step->logits + (size_t)i * m->vocabulary + start, line, count * sizeof(float));
        }
    }
}

static void embed(const Model *m, int token, float *x) {
    const bf16 *from = m->embedding + (size_t)token * m->hidden;
    for (int i = 0; i < m->hidden; i++) x[i] = to_float(from[i]) * m->embedding_scale;
}

/* Move the wanted tokens to the front; each takes the place of one that is not wanted or has moved. */
static void compact_wanted(const Pool *pool, int qkv_width) {
    Scratch *s = pool->scratch;
    int hidden = pool->model->hidden;
    for (int i = 0; i < s->wanted; i++) {
        int t = s->wanted_token[i];
        memmove(s->x + (size_t)i * hidden, s->x + (size_t)t * hidden, hidden * sizeof(float));
        memmove(s->y + (size_t)i * qkv_width, s->y + (size_t)t * qkv_width, qkv_width * sizeof(float));
        s->row_of[i] = s->row_of[t], s->position[i] = s->position[t];
    }
}

/* One thread's part of a step. Tokens, pieces of matrices and (token, head) are shared out as threads become free. */
static void work(Pool *pool, int thread) {
    const Model *m = pool->model;
    const Step *step = pool->step;
    Scratch *s = pool->scratch;
    long long passed = atomic_load(&pool->barriers); /* no next one is counted before this thread has come to it */
    int phase = 0, tokens = step->tokens, hidden = m->hidden, qkv_width = m->layer[0].site[QKV].rows;
    int units = tokens * m->kv_heads, found = m->heads * m->head_size;
    float *scores = s->scores + (size_t)thread * (s->longest + 15) * MOST_QUERIES;
    size_t *offset = s->offset + (size_t)thread * (s->longest + 15);
#if HAS_AMX
    if (pool->amx) configure_tiles();
#endif
    for (int t; (t = next_piece(pool, phase)) < tokens;) {
        embed(m, step->token[t], s->x + (size_t)t * hidden);
        for (int i = 0, half = m->head_size / 2; i < m->ropes * half; i++) {
            float angle = (float)s->position[t] * m->frequencies[i];
            float *cosines = s->rope_table + ((size_t)t * m->ropes + i / half) * m->head_size + i % half;
            cosines[0] = cosf(angle), cosines[half] = sinf(angle);
        }
        rms_norm(s->normed + (size_t)t * hidden, s->x + (size_t)t * hidden, m->layer[0].input_norm, m->eps, hidden);
        load_input(pool, 0, QKV, t, s->normed + (size_t)t * hidden);
    }
    phase = barrier(pool, phase, &passed);
    for (int i = 0; i < m->layers; i++) {
        const Layer *layer = &m->layer[i];
        Product product = {pool, thread, i, QKV, &layer->site[QKV], s->normed, s->packed, tokens};
        matmul(&product, phase, store_output);
        phase = barrier(pool, phase, &passed);
        for (int t; (t = next_piece(pool, phase)) < tokens;) write_kv(pool, i, t, s->y + (size_t)t * qkv_width);
        phase = barrier(pool, phase, &passed);
        if (i + 1 == m->layers) { /* of the last layer only what is wanted is needed any more */
            if (next_piece(pool, phase) == 0) compact_wanted(pool, qkv_width);
            phase = barrier(pool, phase, &passed);
            tokens = s->wanted, units = tokens * m->kv_heads;
        }
        for (int unit; (unit = next_piece(pool, phase)) < units;) {
            int t = units - 1 - unit; /* the longest first */
            attend(pool, i, t / m->kv_heads, t % m->kv_heads, s->y + (size_t)(t / m->kv_heads) * qkv_width, scores, offset);
        }
        phase = barrier(pool, phase, &passed);
        if (s->ranks) {
            for (int t; (t = next_piece(pool, phase)) < tokens;) lora_a(pool, i, O, t, s->normed + (size_t)t * found);
            phase = barrier(pool, phase, &passed);
        }
        product = (Product){pool, thread, i, O, &layer->site[O], s->normed, s->packed, tokens};
        matmul(&product, phase, store_output);
        phase = barrier(pool, phase, &passed);
        for (int t; (t = next_piece(pool, phase)) < tokens;) {
            float *x = s->x + (size_t)t * hidden, *y = s->y + (size_t)t * hidden;
            if (layer->after_attention_norm) rms_norm(y, y, layer->after_attention_norm, m->eps, hidden);
            add(x, y, hidden);
            rms_norm(s->normed + (size_t)t * hidden, x, layer->before_mlp_norm, m->eps, hidden);
            load_input(pool, i, GATE_UP, t, s->normed + (size_t)t * hidden);
        }
        phase = barrier(pool, phase, &passed);
        product = (Product){pool, thread, i, GATE_UP, &layer->site[GATE_UP], s->normed, s->packed, tokens};
        matmul(&product, phase, store_gated);
        phase = barrier(pool, phase, &passed);
        if (s->ranks) {
            for (int t; (t = next_piece(pool, phase)) < tokens;)
                lora_a(pool, i, DOWN, t, s->gated + (size_t)t * m->intermediate);
            phase = barrier(pool, phase, &passed);
        }
        product = (Product){pool, thread, i, DOWN, &layer->site[DOWN], s->gated, s->packed_gated, tokens};
        matmul(&product, phase, store_output);
        phase = barrier(pool, phase, &passed);
        for (int t; (t = next_piece(pool, phase)) < tokens;) {
            float *x = s->x + (size_t)t * hidden, *y = s->y + (size_t)t * hidden;
            if (layer->after_mlp_norm) rms_norm(y, y, layer->after_mlp_norm, m->eps, hidden);
            add(x, y, hidden);
            if (i + 1 < m->layers) {
                rms_norm(s->normed + (size_t)t * hidden, x, m->layer[i + 1].input_norm, m->eps, hidden);
                load_input(pool, i + 1, QKV, t, s->normed + (size_t)t * hidden);
            }
        }
        phase = barrier(pool, phase, &passed);
    }
    for (int i; (i = next_piece(pool, phase)) < s->wanted;) {
        float *x = s->normed + (size_t)i * hidden;
        rms_norm(x, s->x + (size_t)i * hidden, m->norm, m->eps, hidden);
        if (pool->amx)
            for (int k = 0; k < hidden; k += 16) pack(s->packed, hidden, i, k, *(const f32 *)(x + k));
    }
    float *best = s->best + (size_t)thread * s->wanted * 2;
    for (int i = 0; i < s->wanted; i++) best[2 * i] = -INFINITY, best[2 * i + 1] = 0;
    phase = barrier(pool, phase, &passed);
    Product product = {pool, thread, 0, 0, &m->head, s->normed, s->packed, s->wanted};
    if (s->wanted) matmul(&product, phase, argmax);
    phase = barrier(pool, phase, &passed);
#if HAS_AMX
    if (pool->amx) _tile_release();
#endif
}

/* --- what Python calls -------------------------------------------------------------------------------------------- */

typedef struct { Pool *pool; int thread; } Worker;

static void *worker_loop(void *given) {
    Worker worker = *(Worker *)given;
    free(given);
    int64_t seen = 0;
    for (;;) {
        pthread_mutex_lock(&worker.pool->mutex);
        while (worker.pool->steps_begun == seen && !worker.pool->ending)
            pthread_cond_wait(&worker.pool->work, &worker.pool->mutex);
        seen = worker.pool->steps_begun;
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
    free(pool->memory);
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
        if (pthread_create(&pool->worker[i], NULL, worker_loop, worker)) {
            free(worker);
            break;
        }
        pool->threads++;
    }
    return pool;
}

int uses_amx(const Pool *pool) { return pool->amx; }

static void *carve(char *memory, size_t *used, size_t bytes) {
    void *carved = memory ? memory + *used : NULL;
    size_t room = (bytes + 64) / 64 * 64; /* some bytes more than asked for: a sanitizer reports who touches them */
#ifdef __SANITIZE_ADDRESS__
    if (memory) {
        __asan_unpoison_memory_region(carved, room);
        __asan_poison_memory_region((char *)carved + bytes, room - bytes);
    }
#endif
    *used += room;
    return carved;
}

/* The scratch of a step in `memory`, whose size is returned; NULL: the size alone. */
static size_t layout_scratch(Scratch *s, char *memory, const Pool *pool, const Model *model, int tokens) {
    const Matrix *site = model->layer[0].site;
    size_t used = 0, most = s->longest + 15, padded = (tokens + 15) / 16 * 16; /* products take whole panels */
    size_t widest = site[QKV].rows > model->hidden ? site[QKV].rows : model->hidden;
    size_t deepest = site[O].columns > model->hidden ? site[O].columns : model->hidden;
#define CARVE(name, count) s->name = carve(memory, &used, (size_t)(count) * sizeof *s->name)
    CARVE(counters, pool->phases);
    CARVE(row_of, tokens);
    CARVE(position, tokens);
    CARVE(wanted_token, s->wanted);
    CARVE(wanted_row, s->wanted);
    CARVE(rope_table, (size_t)tokens * model->ropes * model->head_size);
    CARVE(x, tokens * (size_t)model->hidden);
    CARVE(normed, tokens * deepest);
    CARVE(gated, tokens * (size_t)model->intermediate);
    CARVE(y, tokens * widest);
    CARVE(low_rank, tokens * (size_t)s->ranks);
    CARVE(scores, pool->threads * most * MOST_QUERIES);
    CARVE(offset, pool->threads * most);
    CARVE(best, pool->threads * (size_t)s->wanted * 2);
    CARVE(packed, pool->amx ? padded * deepest * 3 : 0);
    CARVE(packed_gated, pool->amx ? padded * model->intermediate * 3 : 0);
    CARVE(widened, pool->threads * s->piece);
#undef CARVE
    return used;
}

/* Whether the scratch has `bytes`. What has been touched once costs nothing the next time. */
static int reserve(Pool *pool, size_t bytes) {
    if (bytes <= pool->room) return 1;
    free(pool->memory);
    pool->room = (bytes + HUGE - 1) / HUGE * HUGE;
    pool->memory = aligned_alloc(HUGE, pool->room);
    if (!pool->memory) pool->room = 0;
#ifdef MADV_HUGEPAGE
    else madvise(pool->memory, pool->room, MADV_HUGEPAGE);
#endif
    return pool->memory != NULL;
}

/* 0, or 1 where memory is wanting; nothing has been done then. */
int run_step(Pool *pool, const Model *model, const Step *step) {
    Scratch s = {0};
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
    for (int i = 0; i <= SITES && model->head.scales; i++) {
        const Matrix *one = i < SITES ? &model->layer[0].site[i] : &model->head;
        size_t piece = (size_t)pairs_of_piece(pool, one, i < SITES ? step->tokens : s.wanted) * one->columns * 32;
        s.piece = piece > s.piece ? piece : s.piece;
    }
    pool->phases = model->layers * PHASES + 5;
    if (!reserve(pool, layout_scratch(&s, NULL, pool, model, step->tokens))) return 1;
    layout_scratch(&s, pool->memory, pool, model, step->tokens);
    memset(s.counters, 0, pool->phases * sizeof *s.counters);
    for (int i = 0, wanted = 0; i < step->rows; i++) {
        const Rows *row = &step->row[i];
        for (int t = 0; t < row->count; t++) s.row_of[row->first + t] = i, s.position[row->first + t] = row->start + t;
        if (row->wanted) s.wanted_row[wanted] = i, s.wanted_token[wanted++] = row->first + row->count - 1;
    }
    pthread_mutex_lock(&pool->mutex);
    pool->model = model, pool->step = step, pool->scratch = &s;
    pool->steps_begun++;
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
    return 0;
}
