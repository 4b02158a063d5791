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

#ifdef __AVX512F__
constexpr int NT = 4, MT = 6;
#else
constexpr int NT = 2, MT = 4;
#endif

#if defined(BFLOAT16) && defined(__AVX512BF16__)
constexpr bool PAIRS = true;
#else
constexpr bool PAIRS = false;
#endif

constexpr int STEP = PAIRS ? 2 : 1, AHEAD = 4096;  // bytes asked for ahead of use
constexpr int64_t ROWS = 128;  // of x, that stay in a cache while a share of the weights passes

struct Layer {
    const Number* weight;
    const Number* bias;  // [columns], or null
    int64_t columns, inner;
};

template <int M, int N>
static void tile(const Number* x, const Layer& layer, int64_t block, Number* y) {
    const int64_t steps = layer.inner / STEP;
    const Number* w = layer.weight + block * steps * VL * STEP;
    Floats sums[M][N] = {};
    for (int64_t step = 0; step < steps; step++, w += N * VL * STEP) {
#ifdef __AVX512BF16__
        if constexpr (PAIRS) {
            __m512bh columns[N];
#pragma GCC unroll 8
            for (int n = 0; n < N; n++) {
                columns[n] = (__m512bh)_mm512_loadu_si512(w + n * VL * STEP);
                __builtin_prefetch((const char*)(w + n * VL * STEP) + AHEAD);
            }
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) {
                int32_t pair;
                memcpy(&pair, x + m * layer.inner + 2 * step, 4);
                const __m512bh row = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 8
                for (int n = 0; n < N; n++)
                    sums[m][n] = (Floats)_mm512_dpbf16_ps((__m512)sums[m][n], row, columns[n]);
            }
            continue;
        }
#endif
        Floats columns[N];
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) {
            columns[n] = widen(w + n * VL);
            __builtin_prefetch((const char*)(w + n * VL) + AHEAD);
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            const float row = to_float(x[m * layer.inner + step]);
#pragma GCC unroll 8
            for (int n = 0; n < N; n++) sums[m][n] += row * columns[n];
        }
    }
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) {
            const int64_t first = (block + n) * VL, left = layer.columns - first;
            float row[VL];
            store(row, sums[m][n]);
            Number* out = y + m * layer.columns + first;
            if (layer.bias)
                for (int i = 0; i < VL && i < left; i++) row[i] += to_float(layer.bias[first + i]);
            if (left >= VL)
                for (int i = 0; i < VL; i++) out[i] = of_float(row[i]);
            else
                for (int i = 0; i < left; i++) out[i] = of_float(row[i]);
        }
}

template <int M>
static void rows(const Number* x, const Layer& layer, int64_t block, int64_t blocks, Number* y) {
    switch (blocks) {
        case 1: return tile<M, 1>(x, layer, block, y);
        case 2: return tile<M, 2>(x, layer, block, y);
#ifdef __AVX512F__
        case 3: return tile<M, 3>(x, layer, block, y);
        case 4: return tile<M, 4>(x, layer, block, y);
#endif
    }
}

static void any_rows(
    int m, const Number* x, const Layer& layer, int64_t block, int64_t blocks, Number* y) {
    switch (m) {
        case 1: return rows<1>(x, layer, block, blocks, y);
        case 2: return rows<2>(x, layer, block, blocks, y);
        case 3: return rows<3>(x, layer, block, blocks, y);
        case 4: return rows<4>(x, layer, block, blocks, y);
#ifdef __AVX512F__
        case 5: return rows<5>(x, layer, block, blocks, y);
        case 6: return rows<6>(x, layer, block, blocks, y);
#endif
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
#pragma omp parallel num_threads(threads) if (groups > 1)
    {
        spread(first_processor);
        const int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
        const int64_t first = groups * me / all, last = groups * (me + 1) / all;
        for (int64_t part = 0; part < count; part += ROWS) {
            const int64_t stop = part + ROWS < count ? part + ROWS : count;
            for (int64_t group = first; group < last; group++) {
                const int64_t block = group * NT;
                const int64_t many = blocks - block < NT ? blocks - block : NT;
                for (int64_t row = part; row < stop;) {
                    const int64_t left = stop - row, tiles = (left + MT - 1) / MT;
                    const int m = int((left + tiles - 1) / tiles);
                    any_rows(
                        m, x + row * layer->inner, *layer, block, many, y + row * layer->columns);
                    row += m;
                }
            }
        }
    }
}
}
