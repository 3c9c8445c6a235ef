/* AMX in plain C, for tests on processors without it: `-include` this before a file that uses its intrinsics.

Tiles are 16 rows of 64 bytes, the only shape that the kernels configure. Like the processor, it refuses to compute in a
thread that has not configured them. */
#define _GNU_SOURCE
#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define __AMX_TILE__ 1
#define __AMX_BF16__ 1

static _Thread_local struct { int configured; uint32_t row[8][16][16]; } amx;

static inline float amx_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static void amx_load(int tile, const void *from, ptrdiff_t stride) {
    if (!amx.configured) abort();
    for (int i = 0; i < 16; i++) memcpy(amx.row[tile][i], (const char *)from + i * stride, 64);
}

static void amx_store(int tile, void *to, ptrdiff_t stride) {
    if (!amx.configured) abort();
    for (int i = 0; i < 16; i++) memcpy((char *)to + i * stride, amx.row[tile][i], 64);
}

/* sum[i][j] += Σ_k a[i][2k] · b[k][2j] + a[i][2k + 1] · b[k][2j + 1]. All its memory is `amx`: sanitizers look elsewhere. */
static __attribute__((no_sanitize("address", "undefined"))) void amx_multiply(int sum, int a, int b) {
    if (!amx.configured) abort();
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 16; j++) {
            float value = amx_float(amx.row[sum][i][j]);
            for (int k = 0; k < 16; k++) {
                uint32_t x = amx.row[a][i][k], y = amx.row[b][k][j];
                value += amx_float(x << 16) * amx_float(y << 16);
                value += amx_float(x & 0xffff0000) * amx_float(y & 0xffff0000);
            }
            memcpy(&amx.row[sum][i][j], &value, 4);
        }
}

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) ((void)(config), amx.configured = 1)
#define _tile_release() ((void)(amx.configured = 0))
#define _tile_zero(tile) ((void)memset(amx.row[tile], 0, sizeof amx.row[tile]))
#define _tile_loadd amx_load
#define _tile_stored amx_store
#define _tile_dpbf16ps amx_multiply
#define syscall(...) 0 /* the system allows it */
