/* Attention of packed rows, forward and backward; packing.py makes the tables of what attends to what.

    item = some queries of a segment and all keys that they may see; a task = (item, key/value head):

    q, k, v ─▶ gather ─▶ q [rows][size]  kᵀ, v as panels of a product's right-hand side
               for each CHUNK of rows:  score = q kᵀ ─▶ softmax_line ─▶ probability ─▶ probability v ─▶ scatter ─▶ out
    backward:  score, d_probability = grad vᵀ ─▶ softmax_line ─▶ probability, d_score
               d_q = d_score k ─▶ scatter;  d_k += d_scoreᵀ q, d_v += probabilityᵀ grad, added up item by item at the end
*/

/* Memory of each thread that stays allocated: fresh pages would cost as much as a product. */
enum { QUERIES, KEYS, VALUES, GRADS, KEY_COLUMNS, VALUE_COLUMNS, KEY_ROWS, VALUE_ROWS, QUERY_PANELS, GRAD_PANELS, SCORES,
       GRAD_SCORES, PRODUCT, SLOPES, PROBABILITIES, GRAD_LOGITS, TRANSPOSED, ROW_PANELS, COLUMN_PANELS, BUFFERS };

static void *scratch(int which, size_t bytes) {
    static _Thread_local struct { void *memory; size_t bytes; } buffer[BUFFERS];
    if (buffer[which].bytes < bytes) {
        free(buffer[which].memory);
        buffer[which].bytes = (bytes + 4095) / 4096 * 4096;
        buffer[which].memory = aligned_alloc(4096, buffer[which].bytes);
        if (!buffer[which].memory) abort();
    }
    return buffer[which].memory;
}

#if defined(__AMX_BF16__) && defined(BFLOAT16)
#include "kernels_products_amx.h"
#else
#include "kernels_products_vectors.h"
#endif

enum { CHUNK = 128 /* rows at a time: a query's heads that share a key/value head are as many rows */ };

/* Queries and the keys that they may see; offsets into the tables. */
typedef struct { int32_t queries, count, keys, seen, bias, sums; } Item;

typedef struct {
    const Item *item;
    const int32_t *query, *key; /* tokens */
    const float *bias;          /* of each item, [count][seen]: 0 or -inf */
    int32_t items, heads, groups, size, padding; /* padding: a token whose output nobody reads */
    float scale, cap;
} Attention;

static int rounded(int number) { return (number + 31) / 32 * 32; }

/* A line of raw scores becomes probabilities: softmax of scale · score, or of cap · tanh(scale · score / cap), plus bias.
Given the gradients of the probabilities, those of the scores are stored in `grad_score`. Up to `end`, a multiple of 32,
what lies past the keys becomes 0. `slopes` is room for `end` numbers. */
static inline void softmax_line(operand *probability, operand *grad_score, float *score, const float *grad, const float *bias,
                                float *slopes, float scale, float cap, int keys, int end) {
    f32 highest = splat(-__builtin_inff()), sum = splat(0), dot = splat(0);
    for (int i = 0; i < end; i += LANES) {
        f32 value = load_f32(score + i) * scale;
        if (cap) {
            f32 tanh = tanh_f32(value * (1 / cap));
            store_f32(slopes + i, 1.0f - tanh * tanh);
            value = tanh * cap;
        }
        value += load_first(bias + i, keys - i);
        highest = larger_of(highest, value);
        store_f32(score + i, value);
    }
    float most = reduce_max(highest);
    for (int i = 0; i < end; i += LANES) {
        f32 value = exp_f32(load_f32(score + i) - most);
        sum += value;
        if (grad) dot += value * load_f32(grad + i);
        store_f32(score + i, value);
    }
    float part = 1 / reduce_add(sum), mean = grad ? reduce_add(dot) * part : 0;
    for (int i = 0; i < end; i += LANES) {
        f32 value = load_f32(score + i) * part;
        store_operand(probability + i, value);
        if (!grad) continue;
        f32 change = value * scale * (load_f32(grad + i) - mean);
        if (cap) change *= load_f32(slopes + i);
        store_operand(grad_score + i, change);
    }
}

/* `width` numbers of each token from `start` on; zeros after the last, up to `room` tokens. */
static void gather(operand *to, const element *from, const int32_t *token, int count, int room, size_t stride, int start,
                   int width) {
    for (int i = 0; i < count; i++, to += width) {
        const element *line = from + token[i] * stride + start;
        if (sizeof(operand) == sizeof(element)) memcpy(to, line, width * sizeof(operand));
        else for (int j = 0; j < width; j += LANES) store_operand(to + j, load(line + j));
    }
    memset(to, 0, (size_t)(room - count) * width * sizeof(operand));
}

/* Rows of an item, one for each query and head of its group, to where their tokens are. */
static void scatter(element *to, const float *from, const Attention *at, const int32_t *token, int group, int first_row,
                    int rows) {
    int each = at->heads / at->groups;
    for (int row = first_row; row < first_row + rows; row++, from += at->size) {
        if (token[row / each] == at->padding) continue;
        element *line = to + ((size_t)token[row / each] * at->heads + group * each + row % each) * at->size;
        for (int i = 0; i < at->size; i += LANES) store(line + i, load_f32(from + i));
    }
}

/* How many of the keys some query up to `last` sees. */
static int seen_by(const float *bias, int last, int seen) {
    int n = seen;
    while (n > 1 && bias[(size_t)last * seen + n - 1]) n--;
    return n;
}

/* out = softmax(query keyᵀ) value: query, out [tokens][heads][size], key, value [tokens][groups][size]. */
void attention_forward(element *out, const element *query, const element *key, const element *value, const Attention *given) {
    Attention at = *given;
    int each = at.heads / at.groups, size = at.size;
#pragma omp parallel
    {
        begin_products();
#pragma omp for schedule(dynamic)
        for (int task = 0; task < at.items * at.groups; task++) {
            const Item *item = &at.item[task / at.groups];
            int group = task % at.groups, rows = item->count * each, room = rounded(item->seen);
            const int32_t *queries = at.query + item->queries, *keys = at.key + item->keys;
            const float *bias = at.bias + item->bias;
            size_t whole = (size_t)room * size * sizeof(operand);
            operand *q = scratch(QUERIES, (size_t)rows * size * sizeof(operand)), *k = scratch(KEYS, whole);
            operand *v = scratch(VALUES, whole), *k_columns = scratch(KEY_COLUMNS, whole), *v_rows = scratch(VALUE_ROWS, whole);
            gather(q, query, queries, item->count, item->count, (size_t)at.heads * size, group * each * size, each * size);
            gather(k, key, keys, item->seen, room, (size_t)at.groups * size, group * size, size);
            gather(v, value, keys, item->seen, room, (size_t)at.groups * size, group * size, size);
            pack_transposed(k_columns, k, room, size);
            pack(v_rows, v, size, room);
            float *score = scratch(SCORES, (size_t)CHUNK * room * 4), *product = scratch(PRODUCT, (size_t)CHUNK * size * 4);
            operand *probability = scratch(PROBABILITIES, (size_t)CHUNK * room * sizeof(operand));
            float *slopes = scratch(SLOPES, (size_t)room * 4);
            for (int row = 0; row < rows; row += CHUNK) {
                int some = rows - row < CHUNK ? rows - row : CHUNK;
                int seen = seen_by(bias, (row + some - 1) / each, item->seen), end = rounded(seen);
                multiply(score, q + (size_t)row * size, k_columns, some, end, size, size);
                for (int i = 0; i < some; i++)
                    softmax_line(probability + (size_t)i * end, NULL, score + (size_t)i * end, NULL,
                                 bias + (size_t)((row + i) / each) * item->seen, slopes, at.scale, at.cap, seen, end);
                multiply(product, probability, v_rows, some, size, end, room);
                scatter(out, product, &at, queries, group, row, some);
            }
        }
        end_products();
    }
}

/* Gradients: grad_query as query is; grad_key and grad_value in float32, zero at first. `sums` is room for both of every
item's keys, [item][group][2][seen, rounded][size]: they are added up in the items' order, whoever computes them. */
void attention_backward(element *grad_query, float *grad_key, float *grad_value, float *sums, const element *grad,
                        const element *query, const element *key, const element *value, const Attention *given) {
    Attention at = *given;
    int each = at.heads / at.groups, size = at.size, width = at.groups * size;
#pragma omp parallel
    {
        begin_products();
#pragma omp for schedule(dynamic)
        for (int task = 0; task < at.items * at.groups; task++) {
            const Item *item = &at.item[task / at.groups];
            int group = task % at.groups, rows = item->count * each, room = rounded(item->seen);
            const int32_t *queries = at.query + item->queries, *keys = at.key + item->keys;
            const float *bias = at.bias + item->bias;
            size_t whole = (size_t)room * size * sizeof(operand), part = (size_t)CHUNK * size * sizeof(operand);
            size_t square = (size_t)CHUNK * room;
            float *d_key = sums + ((size_t)item->sums * at.groups + (size_t)group * room) * 2 * size;
            float *d_value = d_key + (size_t)room * size;
            operand *q = scratch(QUERIES, (size_t)rows * size * sizeof(operand));
            operand *g = scratch(GRADS, (size_t)rows * size * sizeof(operand));
            operand *k = scratch(KEYS, whole), *v = scratch(VALUES, whole), *k_rows = scratch(KEY_ROWS, whole);
            operand *k_columns = scratch(KEY_COLUMNS, whole), *v_columns = scratch(VALUE_COLUMNS, whole);
            operand *q_panels = scratch(QUERY_PANELS, part), *g_panels = scratch(GRAD_PANELS, part);
            float *score = scratch(SCORES, square * 4), *d_probability = scratch(GRAD_SCORES, square * 4);
            float *product = scratch(PRODUCT, (size_t)CHUNK * size * 4), *slopes = scratch(SLOPES, (size_t)room * 4);
            operand *probability = scratch(PROBABILITIES, square * sizeof(operand));
            operand *d_score = scratch(GRAD_LOGITS, square * sizeof(operand));
            gather(q, query, queries, item->count, item->count, (size_t)at.heads * size, group * each * size, each * size);
            gather(g, grad, queries, item->count, item->count, (size_t)at.heads * size, group * each * size, each * size);
            gather(k, key, keys, item->seen, room, (size_t)width, group * size, size);
            gather(v, value, keys, item->seen, room, (size_t)width, group * size, size);
            pack_transposed(k_columns, k, room, size);
            pack_transposed(v_columns, v, room, size);
            pack(k_rows, k, size, room);
            memset(d_key, 0, (size_t)room * size * 2 * sizeof(float));
            for (int row = 0; row < rows; row += CHUNK) {
                int some = rows - row < CHUNK ? rows - row : CHUNK;
                int seen = seen_by(bias, (row + some - 1) / each, item->seen), end = rounded(seen);
                multiply(score, q + (size_t)row * size, k_columns, some, end, size, size);
                multiply(d_probability, g + (size_t)row * size, v_columns, some, end, size, size);
                for (int i = 0; i < some; i++)
                    softmax_line(probability + (size_t)i * end, d_score + (size_t)i * end, score + (size_t)i * end,
                                 d_probability + (size_t)i * end, bias + (size_t)((row + i) / each) * item->seen, slopes,
                                 at.scale, at.cap, seen, end);
                multiply(product, d_score, k_rows, some, size, end, room);
                scatter(grad_query, product, &at, queries, group, row, some);
                pack(q_panels, q + (size_t)row * size, size, some);
                pack(g_panels, g + (size_t)row * size, size, some);
                add_transposed_product(d_value, probability, g_panels, end, size, some);
                add_transposed_product(d_key, d_score, q_panels, end, size, some);
            }
        }
        end_products();
#pragma omp for /* each thread some of the columns */
        for (int column = 0; column < width; column += 32)
            for (int n = 0; n < at.items; n++) {
                int room = rounded(at.item[n].seen), group = column / size;
                const float *from = sums + ((size_t)at.item[n].sums * at.groups + (size_t)group * room) * 2 * size;
                from += column % size;
                for (int j = 0; j < at.item[n].seen; j++, from += size) {
                    size_t to = (size_t)at.key[at.item[n].keys + j] * width + column;
                    for (int i = 0; i < 32; i++) grad_key[to + i] += from[i];
                    for (int i = 0; i < 32; i++) grad_value[to + i] += from[(size_t)room * size + i];
                }
            }
    }
}
