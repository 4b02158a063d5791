// Bytes from one place to another, summed on the way: pages to records and back, in one pass over
// memory. The sum is that of reference/checksum.py, of the words as they are written.

#include <cstdint>
#include <cstring>

namespace {

struct Block {
    char *to;            // null: sum only
    const char *from;
    int64_t layers, heads, pages, words;
    int64_t to_layer, to_head, to_page;        // bytes from one to the next
    int64_t from_layer, from_head, from_page;
    const int32_t *factors;  // of the first head's words, then the next one's; null: copy only
    int64_t *sums;           // added to
    int64_t sums_page, sums_layer;             // numbers from one to the next
};

// Unsigned, for it wraps.
uint64_t copy_sum(int32_t *to, const int32_t *from, const int32_t *factors, int64_t words) {
    uint64_t sum = 0;
    for (int64_t i = 0; i < words; i++) {
        int32_t word = from[i];
        to[i] = word;
        sum += uint64_t(int64_t(word) * factors[i]);
    }
    return sum;
}

uint64_t sum_only(const int32_t *from, const int32_t *factors, int64_t words) {
    uint64_t sum = 0;
    for (int64_t i = 0; i < words; i++) sum += uint64_t(int64_t(from[i]) * factors[i]);
    return sum;
}

}  // namespace

extern "C" void copy_block(const Block *block) {
    const Block &b = *block;
    for (int64_t layer = 0; layer < b.layers; layer++)
        for (int64_t page = 0; page < b.pages; page++) {
            uint64_t sum = 0;
            for (int64_t head = 0; head < b.heads; head++) {
                const char *from =
                    b.from + layer * b.from_layer + head * b.from_head + page * b.from_page;
                char *to = nullptr;
                if (b.to) to = b.to + layer * b.to_layer + head * b.to_head + page * b.to_page;
                if (!b.factors) {
                    std::memcpy(to, from, 4 * b.words);
                    continue;
                }
                auto *words = reinterpret_cast<const int32_t *>(from);
                const int32_t *factors = b.factors + head * b.words;
                sum += to ? copy_sum(reinterpret_cast<int32_t *>(to), words, factors, b.words)
                          : sum_only(words, factors, b.words);
            }
            if (b.factors) {
                int64_t &into = b.sums[page * b.sums_page + layer * b.sums_layer];
                into = int64_t(uint64_t(into) + sum);
            }
        }
}
