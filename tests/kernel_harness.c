/* Calls each training kernel with numbers of its own and prints what they give: compiled for another processor and run in
an emulator, the output has to be that of this one. Include path: the folder of kernels.c. */
#include <stdio.h>

#include "kernels.c"

enum { TOKENS = 96, HEADS = 4, SIZE = 64, WIDTH = HEADS * SIZE, ALL = TOKENS * WIDTH };

static uint32_t state = 1;

static float next(void) { /* -2 … 2, which bfloat16 holds exactly */
    state = state * 1664525 + 1013904223;
    return (int)(state >> 24) / 64.0f - 2;
}

static float to_float(const element *x) {
    float lane[LANES];
    store_f32(lane, load(x));
    return lane[0];
}

static element x[ALL + LANES], y[ALL + LANES], g[ALL + LANES], up[ALL + LANES], cosines[ALL], sines[ALL], out[ALL + LANES],
    out2[ALL + LANES];
static float scale[WIDTH], inverse[ALL], maximum[TOKENS], total[TOKENS], rescale[TOKENS], sums[ALL], grad_key[ALL],
    grad_value[ALL], partial[4 * ALL], bias[TOKENS * TOKENS];

static void fill(element *to) {
    for (int i = 0; i < ALL; i += LANES) {
        float lane[LANES];
        for (int j = 0; j < LANES; j++) lane[j] = next();
        store(to + i, load_f32(lane));
    }
}

static void print(const char *name, const element *from) {
    for (int i = 0; i < ALL; i += 7) printf("%s %.9g\n", name, to_float(from + i));
}

static void print_f32(const char *name, const float *from, int count) {
    for (int i = 0; i < count; i += 7) printf("%s %.9g\n", name, from[i]);
}

int main(void) {
    fill(x), fill(y), fill(g), fill(up), fill(cosines), fill(sines);
    for (int i = 0; i < WIDTH; i++) scale[i] = next();
    norm_forward(out, inverse, x, scale, 1e-6f, TOKENS, WIDTH), print("norm", out);
    norm_backward(out, g, x, inverse, scale, TOKENS, WIDTH), print("norm_backward", out);
    rope_forward(out, inverse, x, scale, 1e-6f, cosines, sines, TOKENS, HEADS, SIZE), print("rope", out);
    rope_backward(out, g, x, inverse, scale, cosines, sines, TOKENS, HEADS, SIZE), print("rope_backward", out);
    gelu_forward(out, x, up, ALL), print("gelu", out);
    gelu_backward(out, out2, g, x, up, ALL), print("gelu_gate", out), print("gelu_up", out2);
    for (int cap = 0; cap < 6; cap += 5) {
        for (int i = 0; i < TOKENS; i++) maximum[i] = -__builtin_inff(), total[i] = 0;
        memcpy(out, x, sizeof out);
        vocabulary_softmax(out, maximum, total, rescale, cap, TOKENS, WIDTH);
        print("softmax", out), print_f32("total", total, TOKENS);
        add_rescaled(sums, out, rescale, TOKENS, WIDTH), print_f32("rescaled", sums, ALL);
        int32_t token[TOKENS];
        for (int i = 0; i < TOKENS; i++) token[i] = i;
        for (int i = 0; i < TOKENS * TOKENS; i++) bias[i] = i % TOKENS <= i / TOKENS ? 0 : -__builtin_inff();
        Item item = {0, TOKENS, 0, TOKENS, 0, 0};
        Attention at = {&item, token, token, bias, 1, HEADS, 2, SIZE, -1, 0.2f, cap};
        attention_forward(out, x, y, up, &at), print("attention", out);
        memset(grad_key, 0, sizeof grad_key), memset(grad_value, 0, sizeof grad_value);
        attention_backward(out, grad_key, grad_value, partial, g, x, y, up, &at), print("attention_backward", out);
        print_f32("grad_key", grad_key, ALL / 2), print_f32("grad_value", grad_value, ALL / 2);
#ifndef BFLOAT16
        enum { DEPTH = 64, WORDS_HERE = 1024 + 96 };
        static bf16 words[WORDS_HERE * DEPTH];
        for (int i = 0; i < WORDS_HERE * DEPTH; i += LANES) store_bf16(words + i, load_f32(x + i % ALL));
        for (int i = 0; i < TOKENS; i++) maximum[i] = -__builtin_inff(), total[i] = 0;
        memset(sums, 0, sizeof sums);
        vocabulary_forward(sums, maximum, total, y, words, cap, TOKENS - 3, DEPTH, WORDS_HERE);
        print_f32("vocabulary", sums, (TOKENS - 3) * DEPTH), print_f32("vocabulary_total", total, TOKENS - 3);
#endif
    }
#ifndef BFLOAT16
    enum { IN = 96, OUT = 64, RANK = 3, ROOM = 32 };
    static bf16 matrix[IN * OUT];
    for (int i = 0; i < IN * OUT; i += LANES) store_bf16(matrix + i, load_f32(up + i));
    lora_forward(out, sums, x, matrix, y, g, TOKENS - 3, IN, OUT, RANK, ROOM), print_f32("lora", out, (TOKENS - 3) * OUT);
    lora_backward(out, grad_key, grad_value, partial, x, y, sums, matrix, g, up, TOKENS - 3, IN, OUT, RANK, ROOM);
    print_f32("lora_backward", out, (TOKENS - 3) * IN), print_f32("grad_a", grad_key, RANK * IN);
    print_f32("grad_b", grad_value, RANK * OUT);
#endif
    return 0;
}
