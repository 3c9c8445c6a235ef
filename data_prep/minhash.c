// The smallest of each of many hashes over the shingles of each text, as near_duplicates.py says it in numpy.
//
//     letters     L L L L L L 0 0 0 L L L L 0 0 0     all texts end to end in UTF-32, with blanks between them
//     shingles    s s s s s s s s s s s s s           one a letter: a hash of it and the three after it
//     smallest    [texts][hashes]                     min over a text's shingles of s * multiplier, modulo 2^32
//
// Four shingles at a time meet all multipliers, which stay in the first-level cache with the smallest values.

#include <stddef.h>
#include <stdint.h>

enum { AT_ONCE = 256 };

static uint32_t min(uint32_t one, uint32_t other) { return one < other ? one : other; }

// `letters` has three blanks after the last text; `mix` has four numbers, `multipliers` and each row of `smallest` `hashes`.
void minhash(const uint32_t *restrict letters, const int64_t *starts, ptrdiff_t texts, const uint32_t *mix,
             const uint32_t *restrict multipliers, ptrdiff_t hashes, uint32_t *restrict smallest) {
    uint32_t shingles[AT_ONCE];
    for (ptrdiff_t text = 0; text < texts; text++, smallest += hashes) {
        for (ptrdiff_t hash = 0; hash < hashes; hash++) smallest[hash] = UINT32_MAX;
        for (int64_t first = starts[text]; first < starts[text + 1]; first += AT_ONCE) {
            const int64_t rest = starts[text + 1] - first;
            const int count = rest < AT_ONCE ? (int)rest : AT_ONCE;
            for (int place = 0; place < count; place++) {
                const uint32_t *letter = letters + first + place;
                uint32_t mixed = letter[0] * mix[0] + letter[1] * mix[1] + letter[2] * mix[2] + letter[3] * mix[3];
                mixed = (mixed ^ mixed >> 15) * mix[1];
                shingles[place] = mixed ^ mixed >> 13;
            }
            int whole = count & ~3;
            for (int place = count; whole < count && place < whole + 4; place++) shingles[place] = shingles[count - 1];
            for (int place = 0; place < count; place += 4) {
                const uint32_t a = shingles[place], b = shingles[place + 1], c = shingles[place + 2], d = shingles[place + 3];
                for (ptrdiff_t hash = 0; hash < hashes; hash++) {
                    const uint32_t m = multipliers[hash];
                    smallest[hash] = min(smallest[hash], min(min(a * m, b * m), min(c * m, d * m)));
                }
            }
        }
    }
}
