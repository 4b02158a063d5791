// y = x w^T + bias for few rows of x, at the speed at which memory gives the weights.
//
// Weights lie as the inner loop reads them, one stream a thread: groups of NT blocks of VL columns
// (outputs), the last group of those that are left. Within a group, for each step of the sum a
// vector a block; a step is one element of the sum, or two where the processor multiplies pairs of
// bf16 (PAIRS):
//
//     [groups][steps][blocks of the group][VL columns][elements of a step]
//
// MT rows of x at most meet each vector while it is in a register; more rows are more passes over a
// group, which is in a cache by then.

#include "native_numbers.h"
#include "native_threads.h"

// Groups of NT blocks. M rows of x times the blocks of `groups_for(M)` groups are sums in
// registers, of which as many must be under way as the multipliers take cycles for one: 8 to 12
// with AVX2.
#ifdef __AVX512F__
constexpr int NT = 4, MT = 6;
constexpr int groups_for(int) { return 1; }
#else
constexpr int NT = 2, MT = 6;
constexpr int groups_for(int rows) { return rows == 1 ? 4 : rows == 2 ? 3 : rows == 3 ? 2 : 1; }
#endif

#if defined(BFLOAT16) && defined(__AVX512BF16__)
constexpr bool PAIRS = true;
#else
constexpr bool PAIRS = false;
#endif

constexpr int STEP = PAIRS ? 2 : 1;
constexpr int64_t AHEAD = 4096 / sizeof(Number);  // numbers between what is asked for and used
constexpr int LINE = 64 / sizeof(Number);         // numbers that memory gives at once
constexpr int64_t STAY = 512 * 1024;  // bytes of x in a core's cache while weights pass
constexpr int64_t FAR = 64;           // rows a thread from which threads have rows of their own
// Steps that are summed one after another, at most: a sum of n is off by up to n roundings. Numbers
// of 16 bits are rounded by more than that in the end.
constexpr int64_t CHAIN = sizeof(Number) == 4 ? 192 : int64_t(1) << 62;

struct Layer {
    const Number* weight;
    const Number* bias;  // [columns], or null
    int64_t columns, inner;
};

// Where a tile reads: weights, of groups that are `group` numbers apart, and what memory is asked
// for once in `tiles` steps, after `wait` of them.
struct Reader {
    const Number *w, *next;
    int64_t group;
    int tiles, wait;
};

// What steps [from, to) add to the sums of a tile. Inlined, or the sums would go through memory.
template <int M, int N, int G>
__attribute__((always_inline)) static inline void add_steps(
    const Number* x, int64_t inner, int64_t from, int64_t to, Reader& reader,
    Floats (&sums)[M][G][N]) {
    const int64_t group = reader.group;
    const Number *w = reader.w, *next = reader.next;
    int wait = reader.wait;
    for (int64_t step = from; step < to; step++, w += N * VL * STEP) {
        if (--wait == 0) {
            wait = reader.tiles;
#pragma GCC unroll 8
            for (int i = 0; i < G * N; i++)
                if (i % N * VL * STEP % LINE == 0)
                    __builtin_prefetch(next + i / N * group + i % N * VL * STEP, 0, 2);
            next += N * VL * STEP;
        }
#ifdef __AVX512BF16__
        if constexpr (PAIRS) {
            __m512bh columns[G][N];
#pragma GCC unroll 8
            for (int i = 0; i < G * N; i++)
                columns[i / N][i % N] =
                    (__m512bh)_mm512_loadu_si512(w + i / N * group + i % N * VL * STEP);
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) {
                int32_t pair;
                memcpy(&pair, x + m * inner + 2 * step, 4);
                const __m512bh row = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 8
                for (int i = 0; i < G * N; i++) {
                    Floats& sum = sums[m][i / N][i % N];
                    sum = (Floats)_mm512_dpbf16_ps((__m512)sum, row, columns[i / N][i % N]);
                }
            }
            continue;
        }
#endif
        Floats columns[G][N];
#pragma GCC unroll 8
        for (int i = 0; i < G * N; i++) {
            columns[i / N][i % N] = widen(w + i / N * group + i % N * VL);
            if (M > 1) keep(columns[i / N][i % N]);
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            const float row = to_float(x[m * inner + step]);
#pragma GCC unroll 8
            for (int i = 0; i < G * N; i++) sums[m][i / N][i % N] += row * columns[i / N][i % N];
        }
    }
    reader.w = w, reader.next = next, reader.wait = wait;
}

// M rows by N blocks of each of G groups, from `block` on. The `tiles` tiles of a group ask memory,
// a part each, for what follows it: at `ahead`, from here on where there is one tile.
template <int M, int N, int G>
static void tile(
    const Number* x, const Layer& layer, int64_t block, Number* y, int64_t ahead, int tiles) {
    const int64_t steps = layer.inner / STEP;
    const Number* w = layer.weight + block * steps * VL * STEP;
    Reader reader{w, w + ahead, N * steps * VL * STEP, tiles, 1};
    Floats all[M][G][N] = {};
    const int64_t chains = (steps - 1) / CHAIN + 1;
    for (int64_t chain = 0; chain < chains; chain++) {
        const int64_t from = steps * chain / chains, to = steps * (chain + 1) / chains;
        Floats sums[M][G][N] = {};
        add_steps(x, layer.inner, from, to, reader, sums);
        for (int m = 0; m < M; m++)
            for (int i = 0; i < G * N; i++) all[m][i / N][i % N] += sums[m][i / N][i % N];
    }
    for (int m = 0; m < M; m++)
        for (int i = 0; i < G * N; i++) {
            const int64_t first = (block + i) * VL, left = layer.columns - first;
            Number* out = y + m * layer.columns + first;
            Floats sum = all[m][i / N][i % N];
            if (left >= VL) {
                if (layer.bias) sum += widen(layer.bias + first);
                narrow(out, sum);
            } else
                for (int j = 0; j < left; j++)
                    out[j] = of_float(sum[j] + (layer.bias ? to_float(layer.bias[first + j]) : 0));
        }
}

// `blocks`: those of one group, or of `groups_for(M)` whole ones.
template <int M>
static void rows(
    const Number* x, const Layer& layer, int64_t block, int64_t blocks, Number* y, int64_t ahead,
    int tiles) {
    constexpr int G = groups_for(M);
    if (G > 1 && blocks == G * NT) return tile<M, NT, G>(x, layer, block, y, ahead, tiles);
    switch (blocks) {
        case 1: return tile<M, 1, 1>(x, layer, block, y, ahead, tiles);
        case 2: return tile<M, 2, 1>(x, layer, block, y, ahead, tiles);
#ifdef __AVX512F__
        case 3: return tile<M, 3, 1>(x, layer, block, y, ahead, tiles);
        case 4: return tile<M, 4, 1>(x, layer, block, y, ahead, tiles);
#endif
    }
}

static void any_rows(
    int m, const Number* x, const Layer& layer, int64_t block, int64_t blocks, Number* y,
    int64_t ahead, int tiles) {
    switch (m) {
        case 1: return rows<1>(x, layer, block, blocks, y, ahead, tiles);
        case 2: return rows<2>(x, layer, block, blocks, y, ahead, tiles);
        case 3: return rows<3>(x, layer, block, blocks, y, ahead, tiles);
        case 4: return rows<4>(x, layer, block, blocks, y, ahead, tiles);
        case 5: return rows<5>(x, layer, block, blocks, y, ahead, tiles);
        case 6: return rows<6>(x, layer, block, blocks, y, ahead, tiles);
    }
}

// Rows [start, stop) by groups [group, last).
static void share(
    const Number* x, const Layer& layer, Number* y, int64_t start, int64_t stop, int64_t group,
    int64_t last) {
    const int64_t blocks = (layer.columns + VL - 1) / VL, count = stop - start;
    const int64_t together = groups_for(int(count < MT ? count : MT));
    const int tiles = int((count + MT - 1) / MT);
    while (group < last) {
        const int64_t block = group * NT, whole = blocks / NT - group;
        const int64_t some = last - group < whole ? last - group : whole;
        const int64_t now = some < together ? 1 : together;
        const int64_t many = blocks - block < now * NT ? blocks - block : now * NT;
        const int64_t all_of = now * NT * layer.inner * VL;  // numbers
        group += now;
        for (int t = 0; t < tiles; t++) {
            const int64_t row = start + count * t / tiles;
            const int m = int(start + count * (t + 1) / tiles - row);
            const int64_t ahead = tiles == 1 ? AHEAD : all_of + all_of * t / tiles;
            any_rows(
                m, x + row * layer.inner, layer, block, many, y + row * layer.columns, ahead,
                tiles);
        }
    }
}

extern "C" {

int columns_of_block() { return VL; }
int blocks_of_group() { return NT; }
int elements_of_step() { return STEP; }

// x: [count, inner], y: [count, columns], rows side by side.
void linear(const Layer* layer, const Number* x, Number* y, int64_t count, int threads) {
    const int first_processor = processor();
    const int64_t blocks = (layer->columns + VL - 1) / VL, groups = (blocks + NT - 1) / NT;
    const int64_t stay = STAY / (layer->inner * int64_t(sizeof(Number))) / MT * MT;
    const int64_t most = stay < MT ? MT : stay;
#pragma omp parallel num_threads(threads) if (groups > 1)
    {
        spread(first_processor);
        const int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
        // Few rows: weights pass once in all, a share each. Many: threads have rows of their own.
        const bool apart = count >= FAR * all;
        const int64_t top = apart ? count * me / all : 0;
        const int64_t bottom = apart ? count * (me + 1) / all : count;
        const int64_t parts = (bottom - top + most - 1) / most;
        for (int64_t part = 0; part < parts; part++) {
            const int64_t start = top + (bottom - top) * part / parts;
            const int64_t stop = top + (bottom - top) * (part + 1) / parts;
            if (apart)
                share(x, *layer, y, start, stop, 0, groups);
            else
                share(x, *layer, y, start, stop, groups * me / all, groups * (me + 1) / all);
        }
    }
}
}
