/* Matrix products of attention on AMX, bfloat16 times bfloat16 added up in float32. kernels_products_vectors.h has the same
functions, and tests run these on processors without AMX by tests/amx_emulation.h. */
#include <sys/syscall.h>
#include <unistd.h>

typedef bf16 operand;
/* A tile of a product's right-hand side has two rows of it in each of its own: [16 pairs of rows][16 columns][2]. A panel
is 32 columns: [rows / 32][2 tiles]. */
enum { TILE = 512 /* numbers */, PANEL = 32 /* columns, and rows of a block */ };

/* Whether the system lets this process use the unit. */
int can_run(void) { return !syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */); }

static void begin_products(void) {
    static const struct { uint8_t palette, start, reserved[14]; uint16_t bytes[16]; uint8_t rows[16]; } config = {
        1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    _tile_loadconfig(&config);
}

static void end_products(void) { _tile_release(); }

static inline void store_operand(operand *to, f32 x) { store_bf16(to, x); }

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

/* w [columns][depth] → panels of its transpose. */
static void pack_transposed(operand *panels, const operand *w, int columns, int depth) {
    for (int first = 0; first < columns; first += PANEL, w += (size_t)PANEL * depth)
        for (int k = 0; k < depth; k += 32, panels += 2 * TILE) {
            tile_of_rows(panels, w + k, depth);
            tile_of_rows(panels + TILE, w + 16 * depth + k, depth);
        }
}

/* w [depth][columns] → panels. */
static void pack(operand *panels, const operand *w, int columns, int depth) {
    for (int first = 0; first < columns; first += PANEL)
        for (int k = 0; k < depth; k += 32, panels += 2 * TILE)
            for (int i = 0; i < 16; i++) {
                __m512i low, high;
                const operand *row = w + (size_t)(k + 2 * i) * columns + first;
                interleave(_mm512_loadu_si512(row), _mm512_loadu_si512(row + columns), &low, &high);
                _mm512_store_si512(panels + i * 32, low);
                _mm512_store_si512(panels + TILE + i * 32, high);
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

/* to [rows][columns] = a [rows][depth] times panels of `panel_rows` rows, of which the first `depth` count. */
static void multiply(float *to, const operand *a, const operand *panels, int rows, int columns, int depth, int panel_rows) {
    for (int column = 0; column < columns; column += PANEL)
        for (int row = 0; row < rows; row += 32) {
            zero_sums();
            add_product(a + (size_t)row * depth, depth, panels + (size_t)column * panel_rows, depth);
            store_sums(to + (size_t)row * columns + column, columns);
        }
}

/* to [rows][columns] += aᵀ times panels of `depth` rows: a [depth][rows]. */
static void add_transposed_product(float *to, const operand *a, const operand *panels, int rows, int columns, int depth) {
    operand *transposed = scratch(TRANSPOSED, (size_t)rows * depth * sizeof(operand));
    for (int k = 0; k < depth; k += 32)
        for (int row = 0; row < rows; row += 16)
            transpose_block(transposed + (size_t)row * depth + k, depth, a + (size_t)k * rows + row, rows);
    for (int row = 0; row < rows; row += 32)
        for (int column = 0; column < columns; column += PANEL) {
            load_sums(to + (size_t)row * columns + column, columns);
            add_product(transposed + (size_t)row * depth, depth, panels + (size_t)column * depth, depth);
            store_sums(to + (size_t)row * columns + column, columns);
        }
}
