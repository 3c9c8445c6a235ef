/* Products with a frozen matrix that is stored in bfloat16, with its LoRA, and with the output layer. Arithmetic is in
float32: this is for processors that have no other. Memory gives half of what float32 weights would take.

    y = x W + (x inner) outer        forward: W = wᵀ, inner = Aᵀ, outer = (scale B)ᵀ; backward: W = w, inner = scale B, outer = A

    x [rows][depth] ─▶ panels of ROWS rows, low = x inner after them    │ barrier
    W [depth][columns] ─▶ panels of COLUMNS columns, widened, and outer │
    blocks of y ─▶ for each slice of the depth: panels of columns × panels of rows, whose sums stay in registers

A slice of a panel of columns stays in the first cache while it meets the panels of rows, which stay in the second (Goto and
van de Geijn, 2008). Threads take blocks as they become free: one that other programs hold up does not hold up the rest. Each
sum runs over the depth in its own order, so whoever computes it, the bits are the same. */

#if defined(__AVX512F__)
enum { ROWS = 12 };
#elif defined(__aarch64__)
enum { ROWS = 8 };
#else
enum { ROWS = 6 };
#endif
enum {
    COLUMNS = 2 * LANES,
    SLICE = 320,         /* of the depth: 20 KB of a panel of columns with AVX2 */
    BLOCK_ROWS = 192,    /* of y, a multiple of each ROWS */
    BLOCK_COLUMNS = 256,
    TOGETHER = 1 << 22,  /* numbers of W in panels at a time: 16 MB */
    WORD_BLOCK = 1024,        /* of the vocabulary at a time: both forms of their panels take 5 MB for 640 features */
    TOKEN_GROUP = 24,         /* at a time, a multiple of each ROWS: their logits stay in the second cache */
};

/* A word of less probability adds nothing to the gradient (Wijmans et al., 2024, "Cut your losses", section 4.3): most of Gemma's
vocabulary. tests/test_cross_entropy.py bounds what that changes. */
#define NEGLIGIBLE 1e-8f

static inline int round_up(int number, int multiple) { return (number + multiple - 1) / multiple * multiple; }
static inline int least(int a, int b) { return a < b ? a : b; }

/* to [ROWS][COLUMNS] = or += a · b: a [depth][ROWS], b rows that are `b_stride` apart: the first ones, or the chosen. */
static inline __attribute__((always_inline)) void product_tile(float *to, size_t stride, const float *a, const float *b,
                                                       size_t b_stride, const int *chosen, int depth, int add) {
    f32 sum[ROWS][2];
    UNROLLED for (int row = 0; row < ROWS; row++) {
        sum[row][0] = add ? load_f32(to + row * stride) : splat(0);
        sum[row][1] = add ? load_f32(to + row * stride + LANES) : splat(0);
    }
    for (int k = 0; k < depth; k++, a += ROWS) {
        const float *at = b + (size_t)(chosen ? chosen[k] : k) * b_stride;
        f32 left = load_f32(at), right = load_f32(at + LANES);
        UNROLLED for (int row = 0; row < ROWS; row++) sum[row][0] += a[row] * left, sum[row][1] += a[row] * right;
    }
    UNROLLED for (int row = 0; row < ROWS; row++) {
        store_f32(to + row * stride, sum[row][0]);
        store_f32(to + row * stride + LANES, sum[row][1]);
    }
}

/* The same for the first `rows` rows of `to`. */
static inline __attribute__((always_inline)) void edge_tile(float *to, size_t stride, const float *a, const float *b,
                                                    size_t b_stride, const int *chosen, int depth, int add, int rows) {
    if (rows >= ROWS) {
        product_tile(to, stride, a, b, b_stride, chosen, depth, add);
        return;
    }
    float all[ROWS * COLUMNS];
    for (int row = 0; row < rows && add; row++) memcpy(all + row * COLUMNS, to + row * stride, COLUMNS * sizeof(float));
    for (int row = add ? rows : ROWS; row < ROWS; row++) memset(all + row * COLUMNS, 0, COLUMNS * sizeof(float));
    product_tile(all, COLUMNS, a, b, b_stride, chosen, depth, add);
    for (int row = 0; row < rows; row++) memcpy(to + row * stride, all + row * COLUMNS, COLUMNS * sizeof(float));
}

/* x [rows][depth], at most ROWS rows → a panel [depth][ROWS]; zeros past the last row. */
static void pack_rows(float *panel, const float *x, size_t stride, int rows, int depth) {
    enum { STRIP = 64 }; /* of the panel, in the first cache */
    for (int begin = 0; begin < depth; begin += STRIP)
        for (int row = 0; row < ROWS; row++) {
            int end = least(begin + STRIP, depth);
            if (row < rows)
                for (int k = begin; k < end; k++) panel[k * ROWS + row] = x[row * stride + k];
            else
                for (int k = begin; k < end; k++) panel[k * ROWS + row] = 0;
        }
}

/* COLUMNS columns of W from `first` on → a panel [depth][COLUMNS]. W = w [depth][columns], or its transpose. */
static void pack_columns(float *panel, const bf16 *w, int first, int depth, int columns, int transposed) {
    if (!transposed) {
        for (int k = 0; k < depth; k++, panel += COLUMNS) {
            store_f32(panel, load_bf16(w + (size_t)k * columns + first));
            store_f32(panel + LANES, load_bf16(w + (size_t)k * columns + first + LANES));
        }
        return;
    }
    enum { STRIP = 16 };
    for (int k = 0; k < depth; k += STRIP) {
        float strip[COLUMNS][STRIP];
        for (int i = 0; i < COLUMNS; i++)
            for (int j = 0; j < STRIP; j += LANES) store_f32(strip[i] + j, load_bf16(w + (size_t)(first + i) * depth + k + j));
        for (int j = 0; j < STRIP; j++, panel += COLUMNS)
            for (int i = 0; i < COLUMNS; i++) panel[i] = strip[i][j];
    }
}

/* y = x W + low outer, and low = x inner. x [rows][depth]; low [rows][width], inner [depth][width], outer [rank][columns], of
which the first `rank` of `width` columns count and `width` is a multiple of 32; rank 0: none of them. y may be NULL. */
static void lora_product(float *y, float *low, const float *x, const bf16 *w, const float *inner, const float *outer, int rows,
                         int depth, int columns, int rank, int width, int transposed) {
    int whole = depth + rank, panels = round_up(rows, ROWS) / ROWS;
    int together = round_up(least(columns, TOGETHER / whole + BLOCK_COLUMNS - 1), BLOCK_COLUMNS);
    size_t panel = (size_t)whole * ROWS;
    float *x_panels = scratch(ROW_PANELS, panels * panel * sizeof(float));
    float *w_panels = scratch(COLUMN_PANELS, (size_t)whole * together * sizeof(float));
#pragma omp parallel
    for (int begin = 0; begin < (y ? columns : 1); begin += together) {
        int end = least(begin + together, columns), packs = begin ? 0 : panels, down = round_up(rows, BLOCK_ROWS) / BLOCK_ROWS;
#pragma omp for schedule(dynamic, 4)
        for (int task = 0; task < packs + (y ? (end - begin) / COLUMNS : 0); task++) {
            if (task < packs) {
                int first = task * ROWS, count = least(ROWS, rows - first);
                float *to = x_panels + task * panel;
                pack_rows(to, x + (size_t)first * depth, depth, count, depth);
                for (int r = 0; rank && r < width; r += COLUMNS)
                    edge_tile(low + (size_t)first * width + r, width, to, inner + r, width, NULL, depth, 0, count);
                if (rank) pack_rows(to + (size_t)depth * ROWS, low + (size_t)first * width, width, count, rank);
            } else {
                int first = begin + (task - packs) * COLUMNS;
                float *to = w_panels + (size_t)(first - begin) * whole;
                pack_columns(to, w, first, depth, columns, transposed);
                for (int r = 0; r < rank; r++)
                    memcpy(to + (size_t)(depth + r) * COLUMNS, outer + (size_t)r * columns + first, COLUMNS * sizeof(float));
            }
        }
        if (!y) continue;
#pragma omp for schedule(dynamic)
        for (int task = 0; task < down * (round_up(end - begin, BLOCK_COLUMNS) / BLOCK_COLUMNS); task++) {
            int first_row = task % down * BLOCK_ROWS, first_column = begin + task / down * BLOCK_COLUMNS;
            int last_row = least(first_row + BLOCK_ROWS, rows), last_column = least(first_column + BLOCK_COLUMNS, end);
            for (int k = 0; k < whole; k += SLICE)
                for (int column = first_column; column < last_column; column += COLUMNS)
                    for (int row = first_row; row < last_row; row += ROWS)
                        edge_tile(y + (size_t)row * columns + column, columns, x_panels + row / ROWS * panel + (size_t)k * ROWS,
                                  w_panels + (size_t)(column - begin) * whole + (size_t)k * COLUMNS, COLUMNS,
                                  NULL, least(SLICE, whole - k), k > 0, last_row - row);
        }
    }
}

/* to [rank][columns] = lowᵀ x: low [rows][width], of which the first `rank` columns count, x [rows][columns]. */
static void lora_gradient(float *to, const float *low, const float *x, int rows, int columns, int rank, int width) {
    enum { SOME = 48, WIDE = 256 };
    if (!rank) return;
#pragma omp parallel for schedule(dynamic)
    for (int begin = 0; begin < columns; begin += WIDE) {
        int wide = least(WIDE, columns - begin);
        for (int row = 0; row < rows; row += SOME) {
            int depth = least(SOME, rows - row);
            float panels[SOME * WIDE]; /* of x, copied along its rows: down a column, each number would come from afar */
            for (int k = 0; k < depth; k++)
                for (int i = 0; i < wide; i += COLUMNS)
                    memcpy(panels + i * depth + k * COLUMNS, x + (size_t)(row + k) * columns + begin + i, COLUMNS * sizeof(float));
            for (int r = 0; r < rank; r += ROWS) {
                float some_low[SOME * ROWS];
                for (int k = 0; k < depth; k++)
                    for (int i = 0; i < ROWS; i++)
                        some_low[k * ROWS + i] = r + i < rank ? low[(size_t)(row + k) * width + r + i] : 0;
                for (int i = 0; i < wide; i += COLUMNS)
                    edge_tile(to + (size_t)r * columns + begin + i, columns, some_low, panels + i * depth, COLUMNS, NULL, depth, row > 0,
                              rank - r);
            }
        }
    }
}

/* y [rows][out] = x wᵀ + low outer, low [rows][width] = x inner: w [out][in]. */
void lora_forward(float *y, float *low, const float *x, const bf16 *w, const float *inner, const float *outer, int rows, int in,
                  int out, int rank, int width) {
    lora_product(y, low, x, w, inner, outer, rows, in, out, rank, width, 1);
}

/* grad_x [rows][in] = grad w + grad_low outer, grad_low [rows][width] = grad inner; grad_a [rank][in] = grad_lowᵀ x,
grad_b [rank][out] = lowᵀ grad. grad_x may be NULL. */
void lora_backward(float *grad_x, float *grad_a, float *grad_b, float *grad_low, const float *grad, const float *x,
                   const float *low, const bf16 *w, const float *inner, const float *outer, int rows, int in, int out, int rank,
                   int width) {
    lora_product(grad_x, grad_low, grad, w, inner, outer, rows, out, in, rank, width, 0);
    lora_gradient(grad_a, grad_low, x, rows, in, rank, width);
    lora_gradient(grad_b, low, grad, rows, out, rank, width);
}

/* exp(logit - maximum) of [rows][count] → a panel [kept][ROWS], without words whose probability is negligible for all of the
rows; `words` are those that are kept. */
static int pack_likely(float *panel, int *words, const float *logits, const float *total, int rows, int count) {
    int kept = 0;
    float least_of[ROWS];
    for (int row = 0; row < rows; row++) least_of[row] = total[row] * NEGLIGIBLE;
    for (int k = 0; k < count; k++) {
        int likely = 0;
        for (int row = 0; row < ROWS; row++) {
            float value = row < rows ? logits[(size_t)row * count + k] : 0;
            panel[kept * ROWS + row] = value;
            likely |= row < rows && value > least_of[row];
        }
        words[kept] = k;
        kept += likely;
    }
    return kept;
}

/* TOKEN_GROUP tokens, of which `some` are there, and `count` words; see vocabulary_forward. `columns` and `rows` are the panels
of the words' wᵀ and w. */
static void add_words(float *mean, float *maximum, float *total, const float *x_panels, const float *columns, const float *rows,
                      float cap, int some, int depth, int count) {
    float *logits = scratch(SCORES, (size_t)TOKEN_GROUP * WORD_BLOCK * sizeof(float));
    float *weights = scratch(PROBABILITIES, (size_t)ROWS * WORD_BLOCK * sizeof(float));
    int words[WORD_BLOCK];
    for (int k = 0; k < depth; k += SLICE)
        for (int column = 0; column < count; column += COLUMNS)
            for (int row = 0; row < TOKEN_GROUP; row += ROWS)
                product_tile(logits + (size_t)row * count + column, count, x_panels + (size_t)row * depth + (size_t)k * ROWS,
                             columns + (size_t)column * depth + (size_t)k * COLUMNS, COLUMNS, NULL, least(SLICE, depth - k), k > 0);
    for (int row = 0; row < some; row++) {
        float rescale = soften(logits + (size_t)row * count, &maximum[row], &total[row], cap, count);
        for (int i = 0; mean && i < depth; i += LANES) {
            float *to = mean + (size_t)row * depth + i;
            store_f32(to, load_f32(to) * rescale);
        }
    }
    if (!mean) return;
    for (int row = 0; row < some; row += ROWS) {
        int kept = pack_likely(weights, words, logits + (size_t)row * count, total + row, least(ROWS, some - row), count);
        for (int k = 0; k < kept; k += SLICE)
            for (int column = 0; column < depth; column += COLUMNS)
                edge_tile(mean + (size_t)row * depth + column, depth, weights + (size_t)k * ROWS, rows + (size_t)column * count,
                          COLUMNS, words + k, least(SLICE, kept - k), 1, some - row);
    }
}

/* The output layer, its softmax and the gradient of its input in one pass over the vocabulary: of each token t, maximum[t]
and total[t] with log Σ exp(logit) = maximum + log(total), and mean[t] = Σ slope · exp(logit − maximum) · w: [tokens][depth].
logit = x wᵀ, or cap · tanh(x wᵀ / cap) with its slope; maximum is that of x wᵀ. w [words][depth]; maximum is -inf at first,
total and mean 0; mean may be NULL. words and depth are multiples of 32. See cross_entropy.py. */
void vocabulary_forward(float *mean, float *maximum, float *total, const float *x, const bf16 *w, float cap, int tokens,
                        int depth, int words) {
    int panels = round_up(tokens, TOKEN_GROUP) / ROWS, groups = round_up(tokens, TOKEN_GROUP) / TOKEN_GROUP;
    size_t block = (size_t)WORD_BLOCK * depth;
    float *x_panels = scratch(ROW_PANELS, (size_t)panels * ROWS * depth * sizeof(float));
    float *columns[2], *rows[2]; /* of the words at work, and of the next */
    for (int i = 0; i < 2; i++) {
        columns[i] = (float *)scratch(COLUMN_PANELS, 4 * block * sizeof(float)) + i * 2 * block;
        rows[i] = columns[i] + block;
    }
#pragma omp parallel
    for (int begin = -WORD_BLOCK; begin < words; begin += WORD_BLOCK) { /* before the first: packs alone */
        int next = begin + WORD_BLOCK, odd = next / WORD_BLOCK % 2, coming = next < words ? least(WORD_BLOCK, words - next) : 0;
        int computes = begin < 0 ? panels : groups, packs = coming / COLUMNS;
#pragma omp for schedule(dynamic)
        for (int task = 0; task < computes + packs + (mean && coming ? depth / COLUMNS : 0); task++) {
            if (task >= computes + packs) {
                int column = (task - computes - packs) * COLUMNS;
                pack_columns(rows[odd] + (size_t)column * coming, w + (size_t)next * depth, column, coming, depth, 0);
            } else if (task >= computes) {
                int word = (task - computes) * COLUMNS;
                pack_columns(columns[odd] + (size_t)word * depth, w, next + word, depth, words, 1);
            } else if (begin < 0) {
                int row = task * ROWS;
                pack_rows(x_panels + (size_t)row * depth, x + (size_t)row * depth, depth, tokens - row, depth);
            } else {
                int token = task * TOKEN_GROUP;
                add_words(mean ? mean + (size_t)token * depth : NULL, maximum + token, total + token,
                          x_panels + (size_t)token * depth, columns[!odd], rows[!odd], cap, least(TOKEN_GROUP, tokens - token),
                          depth, least(WORD_BLOCK, words - begin));
            }
        }
    }
}
