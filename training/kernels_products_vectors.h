/* Matrix products of attention in vectors, float32: tiles of TILE_ROWS rows and a panel's columns, whose sums stay in
registers. kernels_products_amx.h has the same functions. */

typedef float operand;
/* A panel is PANEL columns of a product's right-hand side: [rows][PANEL]. A tile's sums, two vectors for each of its rows, are
16 vectors where the processor has 32 registers and 8 where it has 16: enough that no multiplication waits for another. */
#if LANES == 16 || defined(__aarch64__)
enum { PANEL = 2 * LANES, TILE_ROWS = 8 };
#else
enum { PANEL = 2 * LANES, TILE_ROWS = 4 };
#endif

int can_run(void) { return 1; }
static void begin_products(void) {}
static void end_products(void) {}
static inline void store_operand(operand *to, f32 x) { store_f32(to, x); }

/* w [columns][depth] → panels of its transpose. */
static void pack_transposed(operand *panels, const operand *w, int columns, int depth) {
    for (int first = 0; first < columns; first += PANEL, w += (size_t)PANEL * depth)
        for (int k = 0; k < depth; k++, panels += PANEL)
            for (int i = 0; i < PANEL; i++) panels[i] = w[(size_t)i * depth + k];
}

/* w [depth][columns] → panels. */
static void pack(operand *panels, const operand *w, int columns, int depth) {
    for (int first = 0; first < columns; first += PANEL)
        for (int k = 0; k < depth; k++, panels += PANEL)
            memcpy(panels, w + (size_t)k * columns + first, PANEL * sizeof(operand));
}

/* to [TILE_ROWS][PANEL] = or += a · panel. a's number in `row` and `k` stands at row · row_stride + k · k_stride. */
static inline __attribute__((always_inline)) void tile(float *to, size_t stride, const operand *a, size_t row_stride,
                                                       size_t k_stride, const operand *panel, int depth, int add) {
    f32 sum[TILE_ROWS][2];
    UNROLLED for (int row = 0; row < TILE_ROWS; row++) {
        sum[row][0] = add ? load_f32(to + row * stride) : splat(0);
        sum[row][1] = add ? load_f32(to + row * stride + LANES) : splat(0);
    }
    for (int k = 0; k < depth; k++, a += k_stride, panel += PANEL) {
        f32 left = load_f32(panel), right = load_f32(panel + LANES);
        UNROLLED for (int row = 0; row < TILE_ROWS; row++) {
            float x = a[row * row_stride];
            sum[row][0] += x * left, sum[row][1] += x * right;
        }
    }
    UNROLLED for (int row = 0; row < TILE_ROWS; row++) {
        store_f32(to + row * stride, sum[row][0]);
        store_f32(to + row * stride + LANES, sum[row][1]);
    }
}

/* to [rows][columns] = a [rows][depth] times panels of `panel_rows` rows, of which the first `depth` count. */
static void multiply(float *to, const operand *a, const operand *panels, int rows, int columns, int depth, int panel_rows) {
    for (int column = 0; column < columns; column += PANEL)
        for (int row = 0; row < rows; row += TILE_ROWS)
            tile(to + (size_t)row * columns + column, columns, a + (size_t)row * depth, depth, 1,
                 panels + (size_t)column * panel_rows, depth, 0);
}

/* to [rows][columns] += aᵀ times panels of `depth` rows: a [depth][rows]. */
static void add_transposed_product(float *to, const operand *a, const operand *panels, int rows, int columns, int depth) {
    for (int column = 0; column < columns; column += PANEL)
        for (int row = 0; row < rows; row += TILE_ROWS)
            tile(to + (size_t)row * columns + column, columns, a + row, 1, rows, panels + (size_t)column * depth, depth, 1);
}
