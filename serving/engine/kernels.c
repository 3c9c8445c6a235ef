/* One step of a Gemma on a CPU: everything between token ids and logits, in one call. See kernels.py.

    token ids ─▶ embed ─▶ x
    each layer:
      x ─▶ rms_norm ─▶ load_input ─▶ matmul QKV ─▶ store_output ─▶ write_kv: norm and rope; keys and values to the cache
             ─▶ attend: score ─▶ softmax ─▶ weighted_sum ─▶ matmul O ─▶ store_output ─▶ rms_norm ─▶ + x
      x ─▶ rms_norm ─▶ load_input ─▶ matmul GATE_UP ─▶ store_gated: gelu(gate) · up
             ─▶ matmul DOWN ─▶ store_output ─▶ rms_norm ─▶ + x
    of Gemma 4, what a model has of these:
      experts, beside the MLP: x ─▶ route ─▶ gather: the tokens of each expert together ─▶ matmul_experts, twice
             ─▶ mix: their weighted sum ─▶ rms_norm ─▶ + the MLP's
      per-layer inputs: before the layers, x ─▶ matmul PER_LAYER_MODEL ─▶ combine: + the table's
             at a layer's end, x ─▶ matmul PER_LAYER_GATE ─▶ store_per_layer: gelu(gate) · the layer's input
             ─▶ matmul PER_LAYER_PROJECTION ─▶ store_output ─▶ rms_norm ─▶ + x
    After the last layer with keys and values of its own, the tokens that are wanted go on alone.
    x of the tokens that are wanted ─▶ rms_norm ─▶ matmul head ─▶ argmax, logits

A token's adapter, if its request has one, adds to each product: lora_a makes A x of the input, add_lora_b adds B A x to
the sums before they are stored. Between two steps of the picture all threads meet (barrier).

    processor                   matmul                                            all else
    AMX, AVX-512 with bfloat16  matmul_amx: three bfloat16 summands of x, exact   vectors of 16, one register
    any other                   matmul_vectors, in tiles of 1 to 8 tokens:        vectors of 16, in 1, 2 or 4 registers
                                  widened_tile: bfloat16 as float32, exact
                                  int8_tile: int8 by x rounded to 16 bits

Generation is bound by memory: each step reads all weights once. So they are bfloat16 (or int8), and what they are
multiplied with stays exact: AMX multiplies bfloat16 by bfloat16 and adds in float32, and a float32 number is the sum of
three bfloat16 ones, so three products of the same weights, already loaded, give the product with float32 activations.
Elsewhere a bfloat16 number becomes float32 by a shift, and one token's products take less time than memory does. Two int8
by 16-bit products are one instruction of all x86-64 (AVX-512 and AVX VNNI add the sum to it); rounding to 16 bits is 256
times finer than that of the weights.

A token's values do not depend on what else is in the step: every sum runs in an order of its own. Batches, chunks of
prompts and shared prefixes therefore change no bit of an answer.

Layouts, in C order:
    weights       [rows / 32][columns / 32][2 blocks][16][16 rows][2]; of gate and up, the blocks are 16 rows of each
    activations   [tokens / 16][columns / 32][3 summands][16 tokens][32]
    keys, values  of a layer: [slot][kv head][head size], float32; slot = BLOCK * block + offset in it
*/
#define _GNU_SOURCE
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#define HAS_AMX 1
#else
#define HAS_AMX 0
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

/* Products with adapters. PER_LAYER_MODEL, which the model has once, is the first layer's. */
enum { QKV, O, GATE_UP, DOWN, PER_LAYER_GATE, PER_LAYER_PROJECTION, PER_LAYER_MODEL, SITES, NO_SITE = SITES };
enum { Q_PROJ, K_PROJ, V_PROJ, O_PROJ, GATE_PROJ, UP_PROJ, DOWN_PROJ };
enum { OF_PER_LAYER = DOWN_PROJ + 1 /* one of each of the three sites */, ROUTER = OF_PER_LAYER + 3, MODULES };
enum { BLOCK = 8, MOST_THREADS = 64, PHASES = 20 /* of a layer: see `work` */, MOST_QUERIES = 4 /* at a time */ };
enum { PANEL = 16 /* tokens that are multiplied with weights at a time */, HUGE = 2 << 20 /* bytes of a page */ };
enum { LOOKS = 500 /* of a thread that waits, before it sleeps */ };
typedef uint16_t bf16;
/* 16 numbers that are computed with at once, wherever they lie: one register of AVX-512, some of others. */
typedef float f32 __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t u32 __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t i32 __attribute__((vector_size(64)));
/* Numbers in one register of this processor; of how many tokens products keep sums in registers; sums of attention there. */
#if defined(__AVX512BW__)
#define LANES 16
#define TILE_TOKENS 8
#define SUMS 16
#elif defined(__AVX2__)
#define LANES 8
#define TILE_TOKENS 4
#define SUMS 8
#else
#define LANES 4
#define TILE_TOKENS 4
#define SUMS 8
#endif
typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t ulanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ilanes __attribute__((vector_size(4 * LANES)));
typedef int16_t shorts __attribute__((vector_size(4 * LANES)));
typedef int8_t bytes __attribute__((vector_size(2 * LANES), aligned(1), may_alias));
#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ilanes){__VA_ARGS__})
#endif
#if LANES == 16
#define EVEN(a, b) SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30)
#define ODD(a, b) SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31)
#elif LANES == 8
#define EVEN(a, b) SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14)
#define ODD(a, b) SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15)
#else
#define EVEN(a, b) SHUFFLE(a, b, 0, 2, 4, 6)
#define ODD(a, b) SHUFFLE(a, b, 1, 3, 5, 7)
#endif
#define UNROLLED _Pragma("GCC unroll 16")
#define COMPILED_FOR_EACH static inline __attribute__((always_inline)) void

typedef struct { /* rows and columns are multiples of 32; rows 0: there is none */
    int32_t rows, columns;
    const void *weight;   /* bf16, or int8 where `scales` are given */
    const float *scales;  /* [rows], or NULL */
} Matrix;

typedef struct {
    Matrix site[SITES];
    const float *input_norm, *after_attention_norm, *before_mlp_norm, *after_mlp_norm, *q_norm, *k_norm; /* or NULL */
    const float *per_layer_norm, *dense_norm, *before_experts_norm, *experts_norm;                       /* or NULL */
    const float *router_norm, *router; /* [experts][hidden], or NULL */
    const float *expert_scale;         /* [experts] */
    const Matrix *expert;              /* [experts][2]: gate and up, down */
    float *keys, *values;              /* where it borrows them, the other layer's */
    int32_t kv_heads, head_size;
    int32_t has_k, has_v;     /* neither: it borrows both; no v: values are keys */
    int32_t rope;             /* which of the model's */
    int32_t window;           /* 0: all */
    float scalar;             /* of its output */
} Layer;

typedef struct {
    int32_t rank;
    const float *a; /* [rank][columns] */
    const float *b; /* [rank][rows], scaled */
} Lora;

typedef struct {
    int32_t layers, vocabulary, hidden, heads, last_own /* layer with keys */;
    int32_t experts, active_experts, values_are_normed;
    int32_t features, padded; /* of a layer's input, and the same as a multiple of 32; 0: none */
    float eps, scale, attention_cap, final_cap, embedding_scale;
    const Layer *layer;
    const float *frequencies; /* [ropes][rope_width / 2] */
    int32_t ropes, rope_width /* the largest head's */;
    Matrix head;
    const bf16 *embedding; /* [vocabulary][hidden] */
    const float *norm, *per_layer_norm /* [padded], or NULL */;
    const int32_t *suppressed; /* tokens that are never an answer */
    int32_t suppressed_count;
} Model;

typedef struct { /* one request's share of a step */
    int32_t first, count, start, wanted; /* wanted: 0 nothing, 1 the best token, 2 logits too */
    const int32_t *blocks;
    const Lora *lora; /* [layers][MODULES], or NULL */
} Rows;

typedef struct {
    int32_t tokens, rows;
    const int32_t *token; /* [tokens] */
    const float *per_layer; /* [tokens][layers][padded], of the table; or NULL */
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
    atomic_int arrived, sleeping; /* at a barrier */
    atomic_llong barriers;        /* of all steps */
    pthread_cond_t all_arrived;
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
    int32_t rounds; /* whether products take x rounded to 16 bits */
    int32_t *row_of, *position, *wanted_token, *wanted_row; /* [tokens], [tokens], [wanted], [wanted] */
    int32_t *origin;   /* [tokens]: which of the step's */
    float *rope_table; /* [tokens][ropes][cosines, sines] */
    float *x, *normed, *gated, *y, *low_rank, *scores, *best;
    float *per_layer; /* [tokens][layers][padded] */
    /* of experts: [tokens][active] their numbers, shares and places among `gathered`; how many tokens each has; tokens'
    input of them, [tokens][hidden]; the same, gate and output of each place */
    int32_t *choice, *place, *count;
    float *share, *routed, *gathered, *expert_gated, *expert_y;
    bf16 *packed_gathered, *packed_expert;
    size_t *offset; /* [threads][longest]: where keys and values lie */
    bf16 *packed, *packed_gated; /* `normed` and `gated` as summands, or rounded: int16_t */
    bf16 *widened;               /* [threads][piece]: int8 weights of a piece */
    size_t piece;
} Scratch;

/* What a thread does between two looks at what it waits for: nothing, for some nanoseconds. */
static inline void pause_briefly(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb" ::: "memory");
#endif
}

/* All threads leave together. The count of barriers only grows: one that leaves late, in the next step even, sees it.
A thread looks for it for some microseconds and then sleeps: on a busy machine, the thread that is waited for may want
this core. Either one that falls asleep sees the new count, or the last one sees that it is about to. */
static int barrier(Pool *pool, int phase, long long *passed) {
    if (atomic_fetch_add(&pool->arrived, 1) == pool->threads - 1) {
        atomic_store(&pool->arrived, 0);
        atomic_store(&pool->barriers, *passed + 1);
        if (atomic_load(&pool->sleeping)) {
            pthread_mutex_lock(&pool->mutex);
            pthread_cond_broadcast(&pool->all_arrived);
            pthread_mutex_unlock(&pool->mutex);
        }
    } else {
        int looks = 0;
        while (atomic_load_explicit(&pool->barriers, memory_order_acquire) <= *passed && looks++ < LOOKS) pause_briefly();
        if (looks > LOOKS) {
            pthread_mutex_lock(&pool->mutex);
            atomic_fetch_add(&pool->sleeping, 1);
            while (atomic_load(&pool->barriers) <= *passed) pthread_cond_wait(&pool->all_arrived, &pool->mutex);
            atomic_fetch_sub(&pool->sleeping, 1);
            pthread_mutex_unlock(&pool->mutex);
        }
    }
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

static inline float reduce_add(lanes x) {
    float lane[LANES];
    memcpy(lane, &x, sizeof lane);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) lane[i] += lane[i + half];
    return lane[0];
}

/* The total of each of 16 registers, to the first of them: neighbours are added until each is one number, in the same order
for every register. */
static inline f32 reduce_add_each(lanes *sum) {
    f32 found;
#define ADD_NEIGHBOURS(left) \
    UNROLLED for (int i = 0; i < left; i++) sum[i] = EVEN(sum[2 * i], sum[2 * i + 1]) + ODD(sum[2 * i], sum[2 * i + 1]);
    ADD_NEIGHBOURS(8)
    ADD_NEIGHBOURS(4)
#if LANES > 4
    ADD_NEIGHBOURS(2)
#endif
#if LANES > 8
    ADD_NEIGHBOURS(1)
#endif
#undef ADD_NEIGHBOURS
    memcpy(&found, sum, sizeof found);
    return found;
}

/* The sums here have the order that their vectors give them, whatever a compiler does; n is a multiple of 16. */
static inline float dot(const float *a, const float *b, int n) {
    enum { MANY = 64 / LANES < 8 ? 64 / LANES : 8 };
    lanes sum[MANY] = {{0}}; /* that do not wait for each other */
    int i = 0;
    for (; i + MANY * LANES <= n; i += MANY * LANES)
        UNROLLED for (int j = 0; j < MANY; j++)
            sum[j] += *(const lanes *)(a + i + LANES * j) * *(const lanes *)(b + i + LANES * j);
    for (; i < n; i += LANES) sum[0] += *(const lanes *)(a + i) * *(const lanes *)(b + i);
    for (int half = MANY / 2; half; half /= 2)
        for (int j = 0; j < half; j++) sum[j] += sum[j + half];
    return reduce_add(sum[0]);
}

static inline void add(float *y, const float *x, int n) {
    for (int i = 0; i < n; i += 16) *(f32 *)(y + i) += *(const f32 *)(x + i);
}

/* `weight`: NULL: none. */
static inline void rms_norm(float *out, const float *x, const float *weight, float eps, int n) {
    float factor = 1.0f / sqrtf(dot(x, x, n) / n + eps);
    if (weight)
        for (int i = 0; i < n; i += 16) *(f32 *)(out + i) = *(const f32 *)(x + i) * factor * *(const f32 *)(weight + i);
    else
        for (int i = 0; i < n; i += 16) *(f32 *)(out + i) = *(const f32 *)(x + i) * factor;
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

/* x of int8 weights without AMX, rounded to 16 bits: of each ROUNDED columns by their largest. A token's line has all
columns, then the float32 factor of each ROUNDED of them. 127 · 32767 · ROUNDED is below 2^31. */
enum { ROUNDED = 512 };
static inline size_t rounded_line(int columns) { return columns + (columns + ROUNDED - 1) / ROUNDED * 2; }

static void round_x(int16_t *out, const float *x, int columns) {
    for (int begin = 0; begin < columns; begin += ROUNDED) {
        int end = begin + ROUNDED < columns ? begin + ROUNDED : columns;
        float largest = 1e-30f;
#pragma omp simd reduction(max : largest)
        for (int k = begin; k < end; k++) largest = fabsf(x[k]) > largest ? fabsf(x[k]) : largest;
        float factor = largest / 32767, inverse = 32767 / largest;
#pragma omp simd
        for (int k = begin; k < end; k++) out[k] = (int16_t)(int32_t)nearbyintf(x[k] * inverse);
        memcpy(out + columns + begin / ROUNDED * 2, &factor, sizeof factor);
    }
}

/* A token's whole input of a product, where products take it in another form than float32. */
static void pack_line(const Pool *pool, bf16 *packed, int columns, int token, const float *x) {
    if (pool->amx)
        for (int k = 0; k < columns; k += 16) pack(packed, columns, token, k, *(const f32 *)(x + k));
    else if (pool->scratch->rounds)
        round_x((int16_t *)packed + token * rounded_line(columns), x, columns);
}

/* How many 16-bit numbers the inputs of some tokens are then; of whole panels for AMX. */
static size_t packed_numbers(const Pool *pool, size_t tokens, size_t columns) {
    return pool->amx ? tokens * columns * 3 : pool->scratch->rounds ? tokens * rounded_line(columns) : 0;
}

/* --- matrix products ---------------------------------------------------------------------------------------------- */

/* Bytes of weights that are one thread's at a time, and how far ahead of them memory is asked. */
enum { PIECE_BYTES = 640 << 10, PIECE_BYTES_OF_ONE_PANEL = 1 << 20, AHEAD = 32 << 10 };

/* What products give: of a pair of blocks of 16 rows, for a panel of tokens. */
typedef struct Sums { _Alignas(64) float of[2][PANEL][16]; } Sums;

/* Without AMX, a tile of sums stays in registers: `wide` of them of rows, times `tokens`, constants both. Every sum runs
over the columns in their order, whatever the tile. */
#define IN_LINE(w) ((w) * LANES / 16 * 512 + (w) * LANES % 16 * 2) /* where a register's rows are among 32 columns' weights */
#define IN_SUMS(sums, w, t) ((lanes *)((sums)->of[(w) * LANES / 16][t] + (w) * LANES % 16))

/* To each sum, the products of two weights with two numbers of x, which `both` holds. */
static inline ilanes add_products(ilanes sum, shorts weights, int32_t both) {
    ilanes x = (ilanes){0} + both;
#if LANES == 16 && defined(__AVX512VNNI__)
    return (ilanes)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)weights, (__m512i)x);
#elif LANES == 16
    return sum + (ilanes)_mm512_madd_epi16((__m512i)weights, (__m512i)x);
#elif LANES == 8 && defined(__AVXVNNI__)
    return (ilanes)_mm256_dpwssd_avx_epi32((__m256i)sum, (__m256i)weights, (__m256i)x);
#elif LANES == 8
    return sum + (ilanes)_mm256_madd_epi16((__m256i)weights, (__m256i)x);
#elif defined(__SSE2__)
    return sum + (ilanes)_mm_madd_epi16((__m128i)weights, (__m128i)x);
#else
    ilanes pair = (ilanes)weights;
    return sum + (pair << 16 >> 16) * (x << 16 >> 16) + (pair >> 16) * (x >> 16);
#endif
}

/* Memory is asked for the next pair's weights while a pair is multiplied: a share of them in each pass over it. */
typedef struct { const char *weights; int pass, passes; } Next;
static inline void ask_for(const Next *next, size_t at, int bytes) {
    if (next->weights)
        for (int line = next->pass * 64; line < bytes; line += next->passes * 64)
            __builtin_prefetch(next->weights + at + line);
}

COMPILED_FOR_EACH widened_tile(const int wide, const int tokens, Sums *sums, const bf16 *weights, const float *x, int columns,
                               int r, int first, const Next *next) {
    lanes sum[4][8] = {{{0}}};
    weights += IN_LINE(r), x += (size_t)first * columns;
    for (int line = 0; line < columns; line += 32, weights += 1024, x += 32) {
        ask_for(next, (size_t)line * 64, 2048);
        for (int k = 0; k < 32; k += 2) {
            ulanes pair[4];
            UNROLLED for (int w = 0; w < wide; w++) pair[w] = *(const ulanes *)(weights + k * 16 + IN_LINE(w));
            UNROLLED for (int t = 0; t < tokens; t++) {
                const float *from = x + (size_t)t * columns + k;
                UNROLLED for (int w = 0; w < wide; w++) sum[w][t] += (lanes)(pair[w] << 16) * from[0];
                UNROLLED for (int w = 0; w < wide; w++) sum[w][t] += (lanes)(pair[w] & 0xffff0000u) * from[1];
            }
        }
    }
    for (int t = 0; t < tokens; t++)
        for (int w = 0; w < wide; w++) *IN_SUMS(sums, r + w, first + t) = sum[w][t];
}

/* int8 weights times x rounded to 16 bits (see `round_x`): sums of ROUNDED columns are exact in 32 bits. */
COMPILED_FOR_EACH int8_tile(const int wide, const int tokens, Sums *sums, const int8_t *weights, const int16_t *x, int columns,
                            int r, int first, const Next *next) {
    size_t line_of_x = rounded_line(columns);
    weights += IN_LINE(r), x += first * line_of_x;
    for (int begin = 0; begin < columns; begin += ROUNDED) {
        ilanes sum[4][8] = {{{0}}};
        for (int line = begin; line < columns && line < begin + ROUNDED; line += 32, weights += 1024) {
            ask_for(next, (size_t)line * 32, 1024);
            UNROLLED for (int k = 0; k < 32; k += 2) {
                shorts pair[4];
                UNROLLED for (int w = 0; w < wide; w++)
                    pair[w] = __builtin_convertvector(*(const bytes *)(weights + k * 16 + IN_LINE(w)), shorts);
                UNROLLED for (int t = 0; t < tokens; t++) {
                    int32_t both;
                    memcpy(&both, x + t * line_of_x + line + k, sizeof both);
                    UNROLLED for (int w = 0; w < wide; w++) sum[w][t] = add_products(sum[w][t], pair[w], both);
                }
            }
        }
        for (int t = 0; t < tokens; t++)
            for (int w = 0; w < wide; w++) {
                lanes *to = IN_SUMS(sums, r + w, first + t), before = begin ? *to : (lanes){0};
                float scale;
                memcpy(&scale, x + t * line_of_x + columns + begin / ROUNDED * 2, sizeof scale);
                *to = before + __builtin_convertvector(sum[w][t], lanes) * scale;
            }
    }
}

static void matmul_vectors(Sums *sums, const Matrix *m, const void *weights, const void *x, int tokens, const void *next_one) {
    enum { REGISTERS = 32 / LANES, WIDEST = REGISTERS < 4 ? REGISTERS : 4 };
    int wide = tokens > 2 ? 2 : WIDEST;
    Next next = {next_one, 0, REGISTERS / wide * ((tokens + TILE_TOKENS - 1) / TILE_TOKENS)};
    for (int r = 0; r < REGISTERS; r += wide)
        for (int first = 0, some; first < tokens; first += some, next.pass++) {
            some = tokens - first < TILE_TOKENS ? tokens - first : TILE_TOKENS;
#define TILE(wide, tokens) \
    case tokens: \
        if (m->scales) int8_tile(wide, tokens, sums, weights, x, m->columns, r, first, &next); \
        else widened_tile(wide, tokens, sums, weights, x, m->columns, r, first, &next); \
        break
            if (tokens <= 2)
                switch (some) { TILE(WIDEST, 1); TILE(WIDEST, 2); }
            else
                switch (some) {
                    TILE(2, 1); TILE(2, 2); TILE(2, 3); TILE(2, 4);
#if TILE_TOKENS > 4
                    TILE(2, 5); TILE(2, 6); TILE(2, 7); TILE(2, 8);
#endif
                }
#undef TILE
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
    const bf16 *packed; /* the same as summands, or rounded */
    int tokens;
    float *out;       /* [tokens][…] */
    bf16 *packed_out; /* the same as summands, or NULL */
} Product;
typedef void Epilogue(const Product *, Sums *, int pair, int first, int tokens);

static void multiply_piece(const Product *p, int piece, int most, Epilogue *epilogue) {
    const Matrix *m = p->m;
    size_t size = (size_t)m->columns * 32, bytes = size * (m->scales ? 1 : 2); /* of a pair */
    int from = piece * most, to = from + most < m->rows / 32 ? from + most : m->rows / 32;
    Sums sums[2];
    for (int first = 0; first < p->tokens; first += PANEL) {
        int some = p->tokens - first < PANEL ? p->tokens - first : PANEL;
        for (int pair = from; pair < to; pair += 2) {
            int both = pair + 1 < to;
            const char *weights = (const char *)m->weight + pair * bytes;
#if HAS_AMX
            if (p->pool->amx) {
                const bf16 *one = (const bf16 *)weights, *x = p->packed + packed_numbers(p->pool, first, m->columns);
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
                for (int i = 0; i <= both; i++) {
                    const char *next = first || pair + i + 1 >= to ? NULL : weights + (i + 1) * bytes;
                    const void *x = m->scales ? (const void *)(p->packed + packed_numbers(p->pool, first, m->columns))
                                              : (const void *)(p->x + (size_t)first * m->columns);
                    matmul_vectors(&sums[i], m, weights + i * bytes, x, some, next);
                }
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

static void matmul(const Product *p, int phase, Epilogue *epilogue) {
    int most = pairs_of_piece(p->pool, p->m, p->tokens);
    for (int piece; (piece = next_piece(p->pool, phase)) * most < p->m->rows / 32;)
        multiply_piece(p, piece, most, epilogue);
}

/* For each expert that has tokens, these times its matrix number `which`; `all`: the first expert's product. */
static void matmul_experts(const Product *all, int which, int phase, Epilogue *epilogue) {
    const Model *m = all->pool->model;
    const int32_t *count = all->pool->scratch->count;
    int before = 0, piece = next_piece(all->pool, phase);
    Product p = *all;
    for (int e = 0; e < m->experts; e++) {
        if (!count[e]) continue;
        p.m = &m->layer[p.layer].expert[2 * e + which], p.tokens = count[e];
        int most = pairs_of_piece(p.pool, p.m, p.tokens), end = before + (p.m->rows / 32 + most - 1) / most;
        for (; piece < end; piece = next_piece(p.pool, phase)) multiply_piece(&p, piece - before, most, epilogue);
        before = end;
        size_t panels = (count[e] + 15) / 16 * 16, outputs = which ? p.m->rows : p.m->rows / 2;
        p.x += panels * p.m->columns, p.out += panels * outputs;
        p.packed += packed_numbers(p.pool, panels, p.m->columns);
        if (p.packed_out) p.packed_out += packed_numbers(p.pool, panels, outputs);
    }
}

/* --- the parts of a layer ----------------------------------------------------------------------------------------- */

static const int first_module[SITES + 1] = {
    Q_PROJ, O_PROJ, GATE_PROJ, DOWN_PROJ, OF_PER_LAYER, OF_PER_LAYER + 1, OF_PER_LAYER + 2, 0,
};
static const int modules_of[SITES + 1] = {3, 1, 2, 1, 1, 1, 1, 0};

/* Rows of a module in its site's output. */
static int width(const Model *m, int number, int module) {
    const Layer *layer = &m->layer[number];
    switch (module) {
        case Q_PROJ: return m->heads * layer->head_size;
        case K_PROJ: case V_PROJ: return layer->kv_heads * layer->head_size;
        case GATE_PROJ: case UP_PROJ: return layer->site[DOWN].columns;
        case OF_PER_LAYER: return m->padded;
        case OF_PER_LAYER + 2: return layer->site[PER_LAYER_MODEL].rows;
        default: return m->hidden;
    }
}

/* The dot products of `x` with four rows, whose sums do not wait for each other. */
static inline void four_dots(float *out, const float *rows, const float *x, int n) {
    lanes sum[4][2] = {{{0}}};
    int i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES)
        UNROLLED for (int r = 0; r < 4; r++)
            UNROLLED for (int j = 0; j < 2; j++)
                sum[r][j] += *(const lanes *)(rows + (size_t)r * n + i + j * LANES) * *(const lanes *)(x + i + j * LANES);
    for (; i < n; i += LANES)
        UNROLLED for (int r = 0; r < 4; r++) sum[r][0] += *(const lanes *)(rows + (size_t)r * n + i) * *(const lanes *)(x + i);
    for (int r = 0; r < 4; r++) out[r] = reduce_add(sum[r][0] + sum[r][1]);
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
    for (int i = 0; i < 16; i += LANES) {
        lanes sum[8];
        for (int t = 0; t < tokens; t++) sum[t] = *(lanes *)(y[t] + i);
        const float *from = line + i;
        for (int r = 0; r < rank; r++, from += rows)
            UNROLLED for (int t = 0; t < tokens; t++) sum[t] += *(const lanes *)from * low_rank[(size_t)t * ranks + r];
        for (int t = 0; t < tokens; t++) *(lanes *)(y[t] + i) = sum[t];
    }
}

/* Add B A x of the tokens' adapters to their sums: a module's rows `row` … row + 15. */
static void add_lora_b(const Product *p, float (*y)[16], int first, int tokens, int module, int row) {
    const Scratch *s = p->pool->scratch;
    if (!s->ranks || p->site == NO_SITE) return;
    int rows = width(p->pool->model, p->layer, module);
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

/* One token's input of a site: as products take it, and through its adapter's A. */
static void load_input(Pool *pool, int layer, int site, int token, const float *x) {
    int columns = pool->model->layer[layer].site[site].columns;
    pack_line(pool, pool->scratch->packed, columns, token, x);
    lora_a(pool, layer, site, token, x);
}

/* The same of an input that `attend` or an epilogue made, piece by piece: as summands already. */
static void complete_input(const Pool *pool, int layer, int site, int token, const float *x, bf16 *packed) {
    if (pool->scratch->rounds) pack_line(pool, packed, pool->model->layer[layer].site[site].columns, token, x);
    lora_a(pool, layer, site, token, x);
}

/* The sums, with what adapters add, to out[token][row]. */
static void store_output(const Product *p, Sums *sums, int pair, int first, int tokens) {
    const Model *m = p->pool->model;
    for (int block = 0; block < 2; block++) {
        int row = pair * 32 + block * 16, module = first_module[p->site], start = 0;
        while (module + 1 < first_module[p->site] + modules_of[p->site] && row >= start + width(m, p->layer, module))
            start += width(m, p->layer, module++);
        add_lora_b(p, sums->of[block], first, tokens, module, row - start);
        float *out = p->out + (size_t)first * p->m->rows + row;
        for (int t = 0; t < tokens; t++, out += p->m->rows) *(f32 *)out = *(f32 *)sums->of[block][t];
    }
}

static inline f32 gelu(f32 x) {
    f32 tanh = tanh_f32(0.7978845608028654f * (x + 0.044715f * x * x * x));
    return 0.5f * x * (1.0f + tanh);
}

/* gelu(gate x) * (up x), which the product with `down` takes. */
static void store_gated(const Product *p, Sums *sums, int pair, int first, int tokens) {
    int columns = p->m->rows / 2;
    add_lora_b(p, sums->of[0], first, tokens, GATE_PROJ, pair * 16);
    add_lora_b(p, sums->of[1], first, tokens, UP_PROJ, pair * 16);
    for (int t = 0; t < tokens; t++) {
        f32 y = gelu(*(f32 *)sums->of[0][t]) * *(f32 *)sums->of[1][t];
        *(f32 *)(p->out + (size_t)(first + t) * columns + pair * 16) = y;
        if (p->pool->amx) pack(p->packed_out, columns, first + t, pair * 16, y);
    }
}

/* gelu(gate x) * the layer's input of each token, which the product with PER_LAYER_PROJECTION takes. */
static void store_per_layer(const Product *p, Sums *sums, int pair, int first, int tokens) {
    const Model *m = p->pool->model;
    const Scratch *s = p->pool->scratch;
    for (int block = 0; block < 2; block++) {
        int row = pair * 32 + block * 16;
        add_lora_b(p, sums->of[block], first, tokens, OF_PER_LAYER, row);
        for (int t = 0; t < tokens; t++) {
            const float *input = s->per_layer + ((size_t)s->origin[first + t] * m->layers + p->layer) * m->padded;
            f32 y = gelu(*(f32 *)sums->of[block][t]) * *(const f32 *)(input + row);
            *(f32 *)(p->out + (size_t)(first + t) * m->padded + row) = y;
            if (p->pool->amx) pack(p->packed_out, m->padded, first + t, row, y);
        }
    }
}

/* The layers' inputs of one token: of its embedding, through the model's projection and a norm, and of its table. */
static void combine(const Pool *pool, int token) {
    const Model *m = pool->model;
    float root = 1.0f / sqrtf((float)m->hidden);
    for (int i = 0; i < m->layers; i++) {
        size_t at = ((size_t)token * m->layers + i) * m->padded;
        float *input = pool->scratch->per_layer + at;
        for (int k = 0; k < m->padded; k += 16) *(f32 *)(input + k) *= root;
        float factor = 1.0f / sqrtf(dot(input, input, m->padded) / m->features + m->eps);
        for (int k = 0; k < m->padded; k += 16) {
            f32 normed = *(f32 *)(input + k) * factor * *(const f32 *)(m->per_layer_norm + k);
            *(f32 *)(input + k) = (normed + *(const f32 *)(pool->step->per_layer + at + k)) * 0.7071067811865476f;
        }
    }
}

/* Which experts a token's x goes to and their shares, the likeliest first; and what they get of it. */
static void route(const Pool *pool, int number, int token, const float *x) {
    const Model *m = pool->model;
    const Layer *layer = &m->layer[number];
    const Scratch *s = pool->scratch;
    const Lora *lora = pool->step->row[s->row_of[token]].lora;
    float *input = s->routed + (size_t)token * m->hidden, score[m->experts], highest = -INFINITY, all = 0, chosen = 0;
    rms_norm(input, x, layer->router_norm, m->eps, m->hidden);
    for (int e = 0; e < m->experts; e++) score[e] = dot(layer->router + (size_t)e * m->hidden, input, m->hidden);
    if (lora) {
        lora += number * MODULES + ROUTER;
        for (int r = 0; r < lora->rank; r++) {
            float low_rank = dot(lora->a + (size_t)r * m->hidden, input, m->hidden);
            for (int e = 0; e < m->experts; e++) score[e] += lora->b[(size_t)r * m->experts + e] * low_rank;
        }
    }
    for (int e = 0; e < m->experts; e++) highest = score[e] > highest ? score[e] : highest;
    for (int e = 0; e < m->experts; e++) all += score[e] = expf(score[e] - highest);
    for (int n = 0; n < m->active_experts; n++) {
        int best = 0;
        for (int e = 1; e < m->experts; e++) best = score[e] > score[best] ? e : best;
        float *share = &s->share[(size_t)token * m->active_experts + n];
        s->choice[(size_t)token * m->active_experts + n] = best;
        chosen += *share = score[best] / all, score[best] = -1;
    }
    for (int n = 0; n < m->active_experts; n++) {
        size_t at = (size_t)token * m->active_experts + n;
        s->share[at] = s->share[at] / chosen * layer->expert_scale[s->choice[at]];
    }
    rms_norm(input, x, layer->before_experts_norm, m->eps, m->hidden);
}

/* A place among `gathered` for each token and expert of its: those of an expert together, from a panel's start on. */
static void group_by_expert(const Pool *pool, int tokens) {
    const Model *m = pool->model;
    const Scratch *s = pool->scratch;
    int next[m->experts], pairs = tokens * m->active_experts, start = 0;
    memset(s->count, 0, m->experts * sizeof *s->count);
    for (int i = 0; i < pairs; i++) s->count[s->choice[i]]++;
    for (int e = 0; e < m->experts; e++) next[e] = start, start += (s->count[e] + 15) / 16 * 16;
    for (int i = 0; i < pairs; i++) s->place[i] = next[s->choice[i]]++;
}

static void gather(const Pool *pool, int token) {
    const Model *m = pool->model;
    const Scratch *s = pool->scratch;
    const float *x = s->routed + (size_t)token * m->hidden;
    for (int n = 0; n < m->active_experts; n++) {
        int place = s->place[(size_t)token * m->active_experts + n];
        memcpy(s->gathered + (size_t)place * m->hidden, x, m->hidden * sizeof(float));
        pack_line(pool, s->packed_gathered, m->hidden, place, x);
    }
}

/* Add what a token's experts make of it to what the MLP does, `y`: both normed. */
static void mix(const Pool *pool, int number, int token, float *y) {
    const Model *m = pool->model;
    const Layer *layer = &m->layer[number];
    const Scratch *s = pool->scratch;
    float *sum = s->routed + (size_t)token * m->hidden; /* its input is not needed any more */
    memset(sum, 0, m->hidden * sizeof(float));
    for (int n = 0; n < m->active_experts; n++) {
        size_t at = (size_t)token * m->active_experts + n;
        const float *one = s->expert_y + (size_t)s->place[at] * m->hidden;
        for (int k = 0; k < m->hidden; k += 16) *(f32 *)(sum + k) += *(const f32 *)(one + k) * s->share[at];
    }
    rms_norm(sum, sum, layer->experts_norm, m->eps, m->hidden);
    rms_norm(y, y, layer->dense_norm, m->eps, m->hidden);
    add(y, sum, m->hidden);
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
    const Scratch *s = pool->scratch;
    const Rows *row = &pool->step->row[s->row_of[token]];
    int size = layer->head_size, half = size / 2, position = s->position[token];
    const float *cosines = s->rope_table + ((size_t)s->origin[token] * m->ropes + layer->rope) * m->rope_width;
    size_t slot = (size_t)row->blocks[position / BLOCK] * BLOCK + position % BLOCK;
    size_t kv_width = (size_t)layer->kv_heads * size;
    if (layer->has_k) { /* values first: they may be keys before their norm */
        const float *from = qkv + (m->heads + (layer->has_v ? layer->kv_heads : 0)) * size;
        float *value = layer->values + slot * kv_width;
        if (m->values_are_normed)
            for (int head = 0; head < layer->kv_heads; head++)
                rms_norm(value + head * size, from + head * size, NULL, m->eps, size);
        else
            memcpy(value, from, kv_width * sizeof(float));
    }
    for (int head = 0; head < m->heads + (layer->has_k ? layer->kv_heads : 0); head++) {
        float *x = qkv + head * size;
        const float *weight = head < m->heads ? layer->q_norm : layer->k_norm;
        if (weight) rms_norm(x, x, weight, m->eps, size);
        rope(x, cosines, cosines + m->rope_width / 2, half);
    }
    if (layer->has_k) memcpy(layer->keys + slot * kv_width, qkv + m->heads * size, kv_width * sizeof(float));
}

/* The loops of attention keep SUMS sums in registers. They are written once and compiled for each of the numbers of
queries that share what is loaded; `queries` and `columns` are constants. Every sum has the same order in all. */

/* scores[g][j] of some queries and 16 / queries keys. */
COMPILED_FOR_EACH score(const int queries, const Model *m, const Layer *layer, const float *query, const size_t *offset,
                        float *scores, int line) {
    const float *cached = layer->keys, *wanted_next = layer->values;
    const int keys = 16 / queries, together = SUMS / queries;
    lanes all[16];
    for (int first = 0; first < keys; first += together, offset += together) {
        lanes sum[SUMS] = {{0}};
        for (int i = 0; i < layer->head_size; i += LANES)
            UNROLLED for (int j = 0; j < together; j++) {
                if (i % 16 == 0) __builtin_prefetch(wanted_next + offset[j] + i);
                UNROLLED for (int g = 0; g < queries; g++)
                    sum[g * together + j] +=
                        *(const lanes *)(query + g * layer->head_size + i) * *(const lanes *)(cached + offset[j] + i);
            }
        for (int g = 0; g < queries; g++)
            for (int j = 0; j < together; j++) all[g * keys + first + j] = sum[g * together + j];
    }
    f32 found = reduce_add_each(all) * m->scale;
    for (int g = 0; g < queries; g++) memcpy(scores + (size_t)g * line, (float *)&found + g * keys, keys * sizeof(float));
}

/* Some registers of columns, `i` …, of the values' sum, weighted by each query's probabilities. */
COMPILED_FOR_EACH weighted_sum(const int queries, const int columns, const Pool *pool, const Layer *layer, int token,
                               int column, const size_t *offset, int length, const float *scores, int line, int i) {
    const float *values = layer->values;
    lanes sum[SUMS] = {{0}};
    for (int j = 0; j < length; j++)
        UNROLLED for (int c = 0; c < columns; c++)
            UNROLLED for (int g = 0; g < queries; g++)
                sum[g * columns + c] += *(const lanes *)(values + offset[j] + i + LANES * c) * scores[(size_t)g * line + j];
    for (int g = 0; g < queries; g++)
        for (int c = 0; c < columns; c++) {
            int at = column + g * layer->head_size + i + LANES * c, all = layer->site[O].columns;
            *(lanes *)(pool->scratch->normed + (size_t)token * all + at) = sum[g * columns + c];
#if HAS_AMX
            if (pool->amx) pack(pool->scratch->packed, all, token, at, sum[g * columns + c]);
#endif
        }
}

/* Attention of some queries of a token, from `column` on, to `length` keys and values at the offsets `offset`. */
COMPILED_FOR_EACH attend_queries(const int queries, const Pool *pool, const Layer *layer, int token, int column,
                                 const float *query, const size_t *offset, int length, float *scores) {
    const Model *m = pool->model;
    const int keys = 16 / queries, columns = SUMS / queries;
    int line = (length + 15) / 16 * 16, i = 0;
    for (int j = 0; j < line; j += keys) score(queries, m, layer, query, offset + j, scores + j, line);
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
        float all = 0;
        for (int n = 0; n < 16; n++) all += sum[n];
        for (int j = 0; j < line; j += 16) *(f32 *)(weight + j) /= all;
    }
    for (; i + LANES * columns <= layer->head_size; i += LANES * columns)
        weighted_sum(queries, columns, pool, layer, token, column, offset, length, scores, line, i);
    for (; i < layer->head_size; i += LANES)
        weighted_sum(queries, 1, pool, layer, token, column, offset, length, scores, line, i);
}

/* Attention of the queries of one token that share a key/value head. */
static void attend(const Pool *pool, int number, int token, int kv_head, const float *qkv, float *scores, size_t *offset) {
    const Model *m = pool->model;
    const Layer *layer = &m->layer[number];
    const Rows *row = &pool->step->row[pool->scratch->row_of[token]];
    int size = layer->head_size, group = m->heads / layer->kv_heads, position = pool->scratch->position[token];
    int begin = layer->window && position >= layer->window ? position - layer->window + 1 : 0;
    int length = position + 1 - begin;
    size_t kv_width = (size_t)layer->kv_heads * size, start = (size_t)kv_head * size;
    for (int j = 0; j < length; j++)
        offset[j] = start + ((size_t)row->blocks[(begin + j) / BLOCK] * BLOCK + (begin + j) % BLOCK) * kv_width;
    for (int j = length; j % 16; j++) offset[j] = offset[0]; /* scored, and given no weight */
    for (int g = 0, some; g < group; g += some) {
        int column = (kv_head * group + g) * size;
        const float *query = qkv + column;
        some = group - g < 2 ? 1 : group - g < MOST_QUERIES ? 2 : MOST_QUERIES;
        if (some == MOST_QUERIES)
            attend_queries(MOST_QUERIES, pool, layer, token, column, query, offset, length, scores);
        else if (some == 2)
            attend_queries(2, pool, layer, token, column, query, offset, length, scores);
        else
            attend_queries(1, pool, layer, token, column, query, offset, length, scores);
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
            for (int n = 0; n < m->suppressed_count; n++) {
                int at = m->suppressed[n] - start;
                if (at >= 0 && at < 16) line[at] = -INFINITY;
            }
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
        s->row_of[i] = s->row_of[t], s->position[i] = s->position[t], s->origin[i] = s->origin[t];
    }
}

/* What the next layer's projections take of a token: x, normed. */
static void enter_layer(Pool *pool, int number, int token) {
    const Model *m = pool->model;
    float *normed = pool->scratch->normed + (size_t)token * m->hidden;
    rms_norm(normed, pool->scratch->x + (size_t)token * m->hidden, m->layer[number].input_norm, m->eps, m->hidden);
    load_input(pool, number, QKV, token, normed);
}

static void leave_layer(Pool *pool, int number, int token) {
    const Model *m = pool->model;
    float *x = pool->scratch->x + (size_t)token * m->hidden, scalar = m->layer[number].scalar;
    if (scalar != 1)
        for (int k = 0; k < m->hidden; k += 16) *(f32 *)(x + k) *= scalar;
    if (number + 1 < m->layers) enter_layer(pool, number + 1, token);
}

/* One thread's part of a step. Tokens, pieces of matrices and (token, head) are shared out as threads become free. */
static void work(Pool *pool, int thread) {
    const Model *m = pool->model;
    const Step *step = pool->step;
    Scratch *s = pool->scratch;
    long long passed = atomic_load(&pool->barriers); /* no next one is counted before this thread has come to it */
    int phase = 0, tokens = step->tokens, hidden = m->hidden, complete = s->ranks || s->rounds;
    float *scores = s->scores + (size_t)thread * (s->longest + 15) * MOST_QUERIES;
    size_t *offset = s->offset + (size_t)thread * (s->longest + 15);
#if HAS_AMX
    if (pool->amx) configure_tiles();
#endif
    for (int t; (t = next_piece(pool, phase)) < tokens;) {
        float *x = s->x + (size_t)t * hidden;
        embed(m, step->token[t], x);
        for (int i = 0, half = m->rope_width / 2; i < m->ropes * half; i++) {
            float angle = (float)s->position[t] * m->frequencies[i];
            float *cosines = s->rope_table + ((size_t)t * m->ropes + i / half) * m->rope_width + i % half;
            cosines[0] = cosf(angle), cosines[half] = sinf(angle);
        }
        if (m->padded)
            load_input(pool, 0, PER_LAYER_MODEL, t, x);
        else
            enter_layer(pool, 0, t);
    }
    phase = barrier(pool, phase, &passed);
    if (m->padded) {
        Product product = {pool, thread, 0, PER_LAYER_MODEL, &m->layer[0].site[PER_LAYER_MODEL], s->x, s->packed, tokens,
                           s->per_layer, NULL};
        matmul(&product, phase, store_output);
        phase = barrier(pool, phase, &passed);
        for (int t; (t = next_piece(pool, phase)) < tokens;) combine(pool, t), enter_layer(pool, 0, t);
        phase = barrier(pool, phase, &passed);
    }
    for (int i = 0; i < m->layers; i++) {
        const Layer *layer = &m->layer[i];
        int qkv_width = layer->site[QKV].rows, inner = layer->site[DOWN].columns;
        Product product = {pool, thread, i, QKV, &layer->site[QKV], s->normed, s->packed, tokens, s->y, NULL};
        matmul(&product, phase, store_output);
        phase = barrier(pool, phase, &passed);
        for (int t; (t = next_piece(pool, phase)) < tokens;) write_kv(pool, i, t, s->y + (size_t)t * qkv_width);
        phase = barrier(pool, phase, &passed);
        if (i == m->last_own) { /* of the layers from here on only what is wanted is needed */
            if (next_piece(pool, phase) == 0) compact_wanted(pool, qkv_width);
            phase = barrier(pool, phase, &passed);
            tokens = s->wanted;
        }
        for (int unit, units = tokens * layer->kv_heads; (unit = next_piece(pool, phase)) < units;) {
            int last = units - 1 - unit, t = last / layer->kv_heads; /* the longest first */
            attend(pool, i, t, last % layer->kv_heads, s->y + (size_t)t * qkv_width, scores, offset);
        }
        phase = barrier(pool, phase, &passed);
        if (complete) {
            for (int t; (t = next_piece(pool, phase)) < tokens;)
                complete_input(pool, i, O, t, s->normed + (size_t)t * layer->site[O].columns, s->packed);
            phase = barrier(pool, phase, &passed);
        }
        product = (Product){pool, thread, i, O, &layer->site[O], s->normed, s->packed, tokens, s->y, NULL};
        matmul(&product, phase, store_output);
        phase = barrier(pool, phase, &passed);
        for (int t; (t = next_piece(pool, phase)) < tokens;) {
            float *x = s->x + (size_t)t * hidden, *y = s->y + (size_t)t * hidden;
            if (layer->after_attention_norm) rms_norm(y, y, layer->after_attention_norm, m->eps, hidden);
            add(x, y, hidden);
            if (m->experts) route(pool, i, t, x);
            rms_norm(s->normed + (size_t)t * hidden, x, layer->before_mlp_norm, m->eps, hidden);
            load_input(pool, i, GATE_UP, t, s->normed + (size_t)t * hidden);
        }
        phase = barrier(pool, phase, &passed);
        product = (Product){pool, thread, i, GATE_UP, &layer->site[GATE_UP],
                            s->normed, s->packed, tokens, s->gated, s->packed_gated};
        matmul(&product, phase, store_gated);
        phase = barrier(pool, phase, &passed);
        if (complete) {
            for (int t; (t = next_piece(pool, phase)) < tokens;)
                complete_input(pool, i, DOWN, t, s->gated + (size_t)t * inner, s->packed_gated);
            phase = barrier(pool, phase, &passed);
        }
        product = (Product){pool, thread, i, DOWN, &layer->site[DOWN], s->gated, s->packed_gated, tokens, s->y, NULL};
        matmul(&product, phase, store_output);
        phase = barrier(pool, phase, &passed);
        if (m->experts) {
            if (next_piece(pool, phase) == 0) group_by_expert(pool, tokens);
            phase = barrier(pool, phase, &passed);
            for (int t; (t = next_piece(pool, phase)) < tokens;) gather(pool, t);
            phase = barrier(pool, phase, &passed);
            Product gate_up = {pool, thread, i, NO_SITE, NULL, s->gathered, s->packed_gathered, 0, s->expert_gated,
                               s->packed_expert};
            matmul_experts(&gate_up, 0, phase, store_gated);
            phase = barrier(pool, phase, &passed);
            if (s->rounds) {
                int columns = layer->expert[1].columns;
                for (int n; (n = next_piece(pool, phase)) < tokens * m->active_experts;)
                    pack_line(pool, s->packed_expert, columns, s->place[n], s->expert_gated + (size_t)s->place[n] * columns);
                phase = barrier(pool, phase, &passed);
            }
            Product down = {pool, thread, i, NO_SITE, NULL, s->expert_gated, s->packed_expert, 0, s->expert_y, NULL};
            matmul_experts(&down, 1, phase, store_output);
            phase = barrier(pool, phase, &passed);
        }
        for (int t; (t = next_piece(pool, phase)) < tokens;) {
            float *x = s->x + (size_t)t * hidden, *y = s->y + (size_t)t * hidden;
            if (m->experts) mix(pool, i, t, y);
            if (layer->after_mlp_norm) rms_norm(y, y, layer->after_mlp_norm, m->eps, hidden);
            add(x, y, hidden);
            if (m->padded)
                load_input(pool, i, PER_LAYER_GATE, t, x);
            else
                leave_layer(pool, i, t);
        }
        phase = barrier(pool, phase, &passed);
        if (!m->padded) continue;
        product = (Product){pool, thread, i, PER_LAYER_GATE, &layer->site[PER_LAYER_GATE],
                            s->x, s->packed, tokens, s->gated, s->packed_gated};
        matmul(&product, phase, store_per_layer);
        phase = barrier(pool, phase, &passed);
        if (complete) {
            for (int t; (t = next_piece(pool, phase)) < tokens;)
                complete_input(pool, i, PER_LAYER_PROJECTION, t, s->gated + (size_t)t * m->padded, s->packed_gated);
            phase = barrier(pool, phase, &passed);
        }
        product = (Product){pool, thread, i, PER_LAYER_PROJECTION, &layer->site[PER_LAYER_PROJECTION],
                            s->gated, s->packed_gated, tokens, s->y, NULL};
        matmul(&product, phase, store_output);
        phase = barrier(pool, phase, &passed);
        for (int t; (t = next_piece(pool, phase)) < tokens;) {
            float *x = s->x + (size_t)t * hidden, *y = s->y + (size_t)t * hidden;
            rms_norm(y, y, layer->per_layer_norm, m->eps, hidden);
            add(x, y, hidden);
            leave_layer(pool, i, t);
        }
        phase = barrier(pool, phase, &passed);
    }
    for (int i; (i = next_piece(pool, phase)) < s->wanted;) {
        float *x = s->normed + (size_t)i * hidden;
        rms_norm(x, s->x + (size_t)i * hidden, m->norm, m->eps, hidden);
        pack_line(pool, s->packed, hidden, i, x);
    }
    float *best = s->best + (size_t)thread * s->wanted * 2;
    for (int i = 0; i < s->wanted; i++) best[2 * i] = -INFINITY, best[2 * i + 1] = 0;
    phase = barrier(pool, phase, &passed);
    Product product = {pool, thread, 0, NO_SITE, &m->head, s->normed, s->packed, s->wanted, NULL, NULL};
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
    pthread_cond_init(&pool->all_arrived, NULL);
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
    size_t used = 0, most = s->longest + 15, padded = (tokens + 15) / 16 * 16; /* products take whole panels */
    size_t hidden = model->hidden, widest = hidden, deepest = hidden, inner = model->padded, expert = 0;
    size_t layers_inputs = (size_t)tokens * model->layers * model->padded;
    size_t pairs = (size_t)tokens * model->active_experts;
    size_t hit = pairs < (size_t)model->experts ? pairs : (size_t)model->experts;
    size_t places = (pairs + 15 * hit + 15) / 16 * 16; /* each expert's begin with a panel */
    for (int i = 0; i < model->layers; i++) {
        const Layer *layer = &model->layer[i];
        const Matrix *site = layer->site;
        if ((size_t)site[QKV].rows > widest) widest = site[QKV].rows;
        if ((size_t)site[O].columns > deepest) deepest = site[O].columns;
        if ((size_t)site[DOWN].columns > inner) inner = site[DOWN].columns;
        if (layer->expert && (size_t)layer->expert[1].columns > expert) expert = layer->expert[1].columns;
    }
#define CARVE(name, count) s->name = carve(memory, &used, (size_t)(count) * sizeof *s->name)
    CARVE(counters, pool->phases);
    CARVE(row_of, tokens);
    CARVE(position, tokens);
    CARVE(wanted_token, s->wanted);
    CARVE(wanted_row, s->wanted);
    CARVE(origin, tokens);
    CARVE(rope_table, (size_t)tokens * model->ropes * model->rope_width);
    CARVE(x, tokens * hidden);
    CARVE(normed, tokens * deepest);
    CARVE(gated, tokens * inner);
    CARVE(y, tokens * widest);
    CARVE(low_rank, tokens * (size_t)s->ranks);
    CARVE(scores, pool->threads * most * MOST_QUERIES);
    CARVE(offset, pool->threads * most);
    CARVE(best, pool->threads * (size_t)s->wanted * 2);
    CARVE(packed, packed_numbers(pool, padded, deepest));
    CARVE(packed_gated, packed_numbers(pool, padded, inner));
    CARVE(widened, pool->threads * s->piece);
    CARVE(per_layer, layers_inputs);
    if (pairs) {
        CARVE(choice, pairs);
        CARVE(place, pairs);
        CARVE(share, pairs);
        CARVE(count, model->experts);
        CARVE(routed, tokens * hidden);
        CARVE(gathered, places * hidden);
        CARVE(expert_gated, places * expert);
        CARVE(expert_y, places * hidden);
        CARVE(packed_gathered, packed_numbers(pool, places, hidden));
        CARVE(packed_expert, packed_numbers(pool, places, expert));
    }
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

/* Room for a matrix's pieces, whether few or all of the tokens are multiplied with it. */
static void reserve_piece(Scratch *s, const Pool *pool, const Matrix *m, int tokens) {
    if (!m->rows) return;
    for (int some = 1; some <= tokens; some += PANEL) {
        size_t piece = (size_t)pairs_of_piece(pool, m, some) * m->columns * 32;
        s->piece = piece > s->piece ? piece : s->piece;
        if (some > PANEL) break; /* there are two sizes of pieces */
    }
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
    s.rounds = model->head.scales && !pool->amx;
    if (model->head.scales && pool->amx) { /* int8 weights, of which a piece is widened at a time */
        reserve_piece(&s, pool, &model->head, s.wanted);
        for (int i = 0; i < model->layers; i++) {
            for (int site = 0; site < SITES; site++) reserve_piece(&s, pool, &model->layer[i].site[site], step->tokens);
            for (int which = 0; which < 2 && model->experts; which++)
                reserve_piece(&s, pool, &model->layer[i].expert[which], step->tokens);
        }
    }
    pool->phases = model->layers * PHASES + 7;
    pool->scratch = &s;
    if (!reserve(pool, layout_scratch(&s, NULL, pool, model, step->tokens))) return 1;
    layout_scratch(&s, pool->memory, pool, model, step->tokens);
    memset(s.counters, 0, pool->phases * sizeof *s.counters);
    for (int i = 0, wanted = 0; i < step->rows; i++) {
        const Rows *row = &step->row[i];
        for (int t = 0; t < row->count; t++) {
            int token = row->first + t;
            s.row_of[token] = i, s.position[token] = row->start + t, s.origin[token] = token;
        }
        if (row->wanted) s.wanted_row[wanted] = i, s.wanted_token[wanted++] = row->first + row->count - 1;
    }
    pthread_mutex_lock(&pool->mutex);
    pool->model = model, pool->step = step;
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
