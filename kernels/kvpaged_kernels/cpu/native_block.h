// A block of keys and values, and what multiplies it: MT lines and NV vectors at a time.
//
// Sums go in steps: of one number, or, where the processor multiplies pairs of bf16 (two at the
// cost of one in fp32), of two: of K's dimensions in scores, of tokens in what V adds. A unit is
// what a step takes of a line: a float, or a pair. In pairs, queries are as they were given and
// weights are rounded to bf16, as a model's own passes round them; sums are fp32 in both.

#pragma once

#include <memory>
#include <vector>

#include "native_layer.h"

#ifdef __AVX512F__
constexpr int NV = 4;
#else
constexpr int NV = 2;
#endif
constexpr int MT = 6;
constexpr int BLOCK = 64;                                    // tokens
constexpr int TOKENS = GROUP < 96 ? 96 / GROUP : 1;          // queries at a time
constexpr int LINES = TOKENS * GROUP, WIDE = NV * VL;

#if defined(BFLOAT16) && defined(__AVX512BF16__) && K_DIM % 2 == 0
constexpr int STEP = 2;
typedef uint32_t Unit;

static inline Floats multiplied(Floats sum, Unit line, Floats columns) {
    const __m512bh row = (__m512bh)_mm512_set1_epi32(int32_t(line));
    return (Floats)_mm512_dpbf16_ps((__m512)sum, row, (__m512bh)columns);
}
#else
constexpr int STEP = 1;
typedef float Unit;

static inline Floats multiplied(Floats sum, Unit line, Floats columns) {
    return sum + line * columns;
}
#endif

constexpr int K_STEPS = K_DIM / STEP;                       // of a score
constexpr int K_UNITS = (K_STEPS + VL - 1) / VL * VL;       // with what fills vectors
constexpr int K_FULL = K_STEPS / VL, K_OVER = K_STEPS % VL;  // whole vectors, and what is left

struct Room {
    alignas(64) Unit q[LINES * K_UNITS];
    alignas(64) Unit k[BLOCK * K_UNITS];         // [BLOCK / WIDE][K_UNITS][WIDE]
    alignas(64) Unit v[BLOCK / STEP * V_WIDTH];  // [BLOCK / STEP][V_WIDTH]
    alignas(64) float scores[LINES * BLOCK];
    alignas(64) Unit pairs[STEP == 2 ? LINES * BLOCK / 2 : 1];
    alignas(64) float out[LINES * V_WIDTH];
    float most[LINES], sum[LINES], factor[LINES];

    // [BLOCK / STEP]; floats take the place of their scores.
    Unit* weights_of(int line) {
        return STEP == 2 ? pairs + line * (BLOCK / 2) : (Unit*)scores + line * BLOCK;
    }
};

// Rooms of a team, kept by the thread that calls it. Made before the team starts: what is thrown in
// one of its threads ends the process.
typedef std::vector<std::unique_ptr<Room>> Rooms;

static const Rooms& rooms_for(size_t threads) {
    static thread_local Rooms rooms;
    while (rooms.size() < threads) rooms.emplace_back(new Room);
    return rooms;
}

static inline Floats load_units(const Unit* p) {
    Floats v;
    memcpy(&v, p, sizeof v);
    return v;
}

#if defined(BFLOAT16) && defined(__AVX512BF16__) && K_DIM % 2 == 0
// A key's units [vector * VL, (vector + 1) * VL), zeros behind its last.
static inline Floats units_of(const Number* p, int vector) {
    Unit room[VL] = {};
    memcpy(room, p + vector * VL * 2, (vector < K_FULL ? VL : K_OVER) * sizeof(Unit));
    return load_units(room);
}

static inline void set_query(Unit* to, const Number* q, float) {
    memset(to, 0, K_UNITS * sizeof(Unit));
    memcpy(to, q, K_DIM * sizeof(Number));
}

static inline void store_weights(Unit* to, int t, Floats weights) {
    const __m256bh narrow = _mm512_cvtneps_pbh((__m512)weights);
    memcpy(to + t / 2, &narrow, sizeof narrow);
}

// Numbers of two tokens side by side; of the last alone, beside zeros.
static inline void pair_values(const Number* a, const Number* b, Unit* to) {
    Number last[2][V_WIDTH] = {};
    if (V_REST) {
        memcpy(last[0], a, V_DIM * sizeof(Number));
        if (b) memcpy(last[1], b, V_DIM * sizeof(Number));
        a = last[0], b = b ? last[1] : b;
    }
    for (int d = 0; d < V_WIDTH; d += VL) {
        __m512i pair = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(a + d)));
        if (b) {
            const __m512i high =
                _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(b + d)));
            pair = _mm512_or_si512(pair, _mm512_slli_epi32(high, 16));
        }
        _mm512_storeu_si512(to + d, pair);
    }
}
#else
static inline Floats units_of(const Number* p, int vector) {
    return vector < K_FULL ? widen(p + vector * VL) : rest_of(p + vector * VL, K_OVER);
}

static inline void set_query(Unit* to, const Number* q, float scale) {
    for (int d = 0; d < K_UNITS / VL; d++) store(to + d * VL, units_of(q, d) * scale);
}

static inline void store_weights(Unit* to, int t, Floats weights) { store(to + t, weights); }

static inline void pair_values(const Number* a, const Number*, Unit* to) {
    for (int d = 0; d < V_VECTORS; d++) store(to + d * VL, widen(a + d * VL));
    if (V_REST) store(to + V_VECTORS * VL, rest_of(a + V_VECTORS * VL, V_REST));
}
#endif

// Where each token of a block has K and V; behind the last, V is null.
struct Tokens {
    const Number *keys[BLOCK], *values[BLOCK + 1];
};

// `count` tokens: K turned, V as it is.
static void fill(const Tokens& from, int count, Room& room) {
    for (int t = 0; t < count; t += STEP)
        pair_values(from.values[t], from.values[t + 1], room.v + t / STEP * V_WIDTH);
    for (int t = 0; t < count; t += VL) {
        Unit* to = room.k + t / WIDE * WIDE * K_UNITS + t % WIDE;
        for (int d = 0; d < K_UNITS / VL; d++) {
            Floats square[VL];
            for (int i = 0; i < VL; i++)
                square[i] = units_of(from.keys[t + i < count ? t + i : count - 1], d);
            transpose(square);
            for (int i = 0; i < VL; i++)
                memcpy(to + (d * VL + i) * WIDE, square + i, sizeof square[i]);
        }
    }
}

// `count` tokens from position `first` on.
static void gather(
    const Layer& layer, const int32_t* pages, int64_t head, int64_t first, int count, Room& room) {
    Tokens tokens;
    for (int t = 0; t < count; t++) {
        const int64_t entry = pages[(first + t) / PAGE], slot = (first + t) % PAGE;
        tokens.keys[t] = layer.key(entry, head, slot);
        tokens.values[t] = layer.value(entry, head, slot);
    }
    tokens.values[count] = nullptr;
    fill(tokens, count, room);
}

template <int M>
static void score_lines(const Unit* q, const Unit* k, float* scores) {
    Floats sums[M][NV] = {};
    for (int d = 0; d < K_STEPS; d++, k += WIDE) {
        Floats columns[NV];
#pragma GCC unroll 4
        for (int n = 0; n < NV; n++) {
            columns[n] = load_units(k + n * VL);
            keep(columns[n]);
        }
#pragma GCC unroll 6
        for (int m = 0; m < M; m++)
#pragma GCC unroll 4
            for (int n = 0; n < NV; n++)
                sums[m][n] = multiplied(sums[m][n], q[m * K_UNITS + d], columns[n]);
    }
    for (int m = 0; m < M; m++)
        for (int n = 0; n < NV; n++) store(scores + m * BLOCK + n * VL, sums[m][n]);
}

template <int M, int N>
static void add_lines(
    const Unit* weights, const Unit* v, int count, const float* factor, float* out) {
    Floats sums[M][N];
#pragma GCC unroll 6
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) sums[m][n] = load(out + m * V_WIDTH + n * VL) * factor[m];
    for (int t = 0; t < (count + STEP - 1) / STEP; t++, v += V_WIDTH) {
        Floats columns[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) {
            columns[n] = load_units(v + n * VL);
            keep(columns[n]);
        }
#pragma GCC unroll 6
        for (int m = 0; m < M; m++)
#pragma GCC unroll 4
            for (int n = 0; n < N; n++)
                sums[m][n] = multiplied(sums[m][n], weights[m * (BLOCK / STEP) + t], columns[n]);
    }
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) store(out + m * V_WIDTH + n * VL, sums[m][n]);
}
