// One token's queries over keys as they lie: products along K, summed across vectors. Memory gives
// K and V once; there is nothing to gain by turning them.

#pragma once

#include "native_layer.h"

constexpr int SLICE = PAGE < 64 ? PAGE : 64;        // tokens scored at a time
constexpr int SCORES = (SLICE + VL - 1) / VL * VL;  // and room for them
// Query heads at a time.
constexpr int HEADS = GROUP % 4 == 0 ? 4 : GROUP % 3 == 0 ? 3 : GROUP % 2 == 0 ? 2 : 1;

#if defined(BFLOAT16) && defined(__AVX512BF16__) && K_DIM % 32 == 0 && V_DIM % 32 == 0
constexpr bool PAIRS = true;  // two numbers of bf16 are multiplied at the cost of one
#else
constexpr bool PAIRS = false;
#endif

// A query of a token and a KV head: vectors of floats, or of pairs.
constexpr int Q_VECTORS = PAIRS ? K_DIM / VL / 2 : K_ROOM;
typedef Floats Queries[GROUP][Q_VECTORS];

// What a vector of a key adds to the sums of HEADS queries.
static inline void add_products(
    const Queries& q, const Number* token, int head, Floats (&sum)[HEADS]) {
#if defined(__AVX512BF16__) && defined(BFLOAT16)
    if (PAIRS) {
#pragma GCC unroll 16
        for (int d = 0; d < Q_VECTORS; d++) {
            const __m512bh x = (__m512bh)_mm512_loadu_si512(token + 2 * d * VL);
#pragma GCC unroll 4
            for (int h = 0; h < HEADS; h++)
                sum[h] = (Floats)_mm512_dpbf16_ps((__m512)sum[h], x, (__m512bh)q[head + h][d]);
        }
        return;
    }
#endif
#pragma GCC unroll 16
    for (int d = 0; d < K_VECTORS; d++) {
        const Floats x = widen(token + d * VL);
#pragma GCC unroll 4
        for (int h = 0; h < HEADS; h++) sum[h] += q[head + h][d] * x;
    }
    if (K_REST) {
        const Floats x = rest_of(token + K_VECTORS * VL, K_REST);
        for (int h = 0; h < HEADS; h++) sum[h] += q[head + h][K_VECTORS] * x;
    }
}

// Scores of `count` tokens from `k` on, into scores[GROUP][SCORES], those behind them -inf. Memory
// is asked for the values meanwhile.
static inline void score(
    const Queries& q, const Number* k, const Number* v, int count, const Layer& layer,
    float (*scores)[SCORES]) {
    for (int first = 0; first < count; first += VL) {
        const int some = count - first < VL ? count - first : VL;
        for (int t = 0; t < some; t++)
            for (int d = 0; d < V_DIM; d += 64 / int(sizeof(Number)))
                __builtin_prefetch(v + (first + t) * layer.v_slot + d);
        for (int head = 0; head < GROUP; head += HEADS) {
            Floats sums[HEADS][VL];
            for (int t = 0; t < VL; t++) {
                Floats sum[HEADS] = {};
                const int at = first + (t < some ? t : some - 1);
                add_products(q, k + at * layer.k_slot, head, sum);
                for (int h = 0; h < HEADS; h++) sums[h][t] = sum[h];
            }
            for (int h = 0; h < HEADS; h++) {
                Floats s = sums_of(sums[h]) * layer.scale;
                if (layer.softcap) s = capped(s, layer.softcap);
                store(scores[head + h] + first, s);
            }
        }
    }
    const int end = (count + VL - 1) / VL * VL;
    for (int g = 0; g < GROUP; g++)
        for (int t = count; t < end; t++) scores[g][t] = -INFINITY;
}

// Have memory get a key ready.
static inline void ask_for(const Number* key) {
    for (int d = 0; d < K_DIM; d += 64 / int(sizeof(Number))) __builtin_prefetch(key + d);
}

// Scores as weights e^(score - most), in their place; what was there before counts by `factor`.
static inline void weigh_few(float* scores, int count, float& most, float& sum, float& factor) {
    Floats top = load(scores);
    for (int t = VL; t < count; t += VL) {
        const Floats x = load(scores + t);
        top = x > top ? x : top;
    }
    const float before = most, now = greatest(top);
    if (now > most) most = now;
    const Floats none = {};
    Floats total = {};
    for (int t = 0; t < count; t += VL) {
        const Floats x = load(scores + t);
        const Floats p = x == -INFINITY ? none : exp_of(x - most);
        store(scores + t, p);
        total += p;
    }
    factor = most > before ? std::exp(before - most) : 1;
    sum = sum * factor + total_of(total);
}

#if defined(BFLOAT16) && defined(__AVX512BF16__)
// Numbers of two tokens side by side: VL dimensions from the low or the high half of vectors.
static inline __m512bh paired(__m512i a, __m512i b, int half) {
    alignas(64) static const uint16_t order[2][32] = {
        {0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39,
         8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47},
        {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
         24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63}};
    return (__m512bh)_mm512_permutex2var_epi16(a, _mm512_load_si512(order[half]), b);
}

// out[HEADS][W] += weights V for dimensions [0, W * VL) of `v`; weights are rounded to bf16.
template <int W>
static inline void add_values(
    const float (*scores)[SCORES], const Number* v, int count, const Layer& layer,
    const Number* next, Floats (&out)[HEADS][W]) {
    uint32_t pairs[HEADS][SCORES / 2];
    for (int h = 0; h < HEADS; h++)
        for (int t = 0; t < count; t += VL) {
            const __m256bh p = _mm512_cvtneps_pbh((__m512)load(scores[h] + t));
            memcpy(pairs[h] + t / 2, &p, sizeof p);
        }
    for (int t = 0; t < count; t += 2) {
        const Number* token = v + t * layer.v_slot;
        const bool two = t + 1 < count;
        if (next) {
            ask_for(next + t * layer.k_slot);
            if (two) ask_for(next + (t + 1) * layer.k_slot);
        }
#pragma GCC unroll 4
        for (int i = 0; i < W; i += 2) {
            const __m512i a = _mm512_loadu_si512(token + i * VL);
            const __m512i b = two ? _mm512_loadu_si512(token + layer.v_slot + i * VL) : __m512i{};
            const __m512bh low = paired(a, b, 0), high = paired(a, b, 1);
#pragma GCC unroll 4
            for (int h = 0; h < HEADS; h++) {
                const __m512bh p = (__m512bh)_mm512_set1_epi32(int32_t(pairs[h][t / 2]));
                out[h][i] = (Floats)_mm512_dpbf16_ps((__m512)out[h][i], p, low);
                out[h][i + 1] = (Floats)_mm512_dpbf16_ps((__m512)out[h][i + 1], p, high);
            }
        }
    }
}
#endif

// Dimensions [d, d + W) vectors of what tokens add to the output of HEADS queries from `head` on.
template <int W>
static inline void add_some(
    const float (*scores)[SCORES], const Number* v, int count, const Layer& layer, int head, int d,
    const float* factors, const Number* next, Part& part) {
    Floats out[HEADS][W];
    for (int h = 0; h < HEADS; h++)
        for (int i = 0; i < W; i++) out[h][i] = part.out[head + h][d + i] * factors[head + h];
#if defined(BFLOAT16) && defined(__AVX512BF16__)
    if constexpr (PAIRS && W % 2 == 0)
        add_values<W>(scores + head, v + d * VL, count, layer, next, out);
    else
#endif
        for (int t = 0; t < count; t++) {
            const Number* token = v + t * layer.v_slot + d * VL;
            if (next) ask_for(next + t * layer.k_slot);
#pragma GCC unroll 4
            for (int i = 0; i < W; i++) {
                const bool last = V_REST && d + i + 1 == V_ROOM;
                const Floats x = last ? rest_of(token + i * VL, V_REST) : widen(token + i * VL);
#pragma GCC unroll 4
                for (int h = 0; h < HEADS; h++) out[h][i] += scores[head + h][t] * x;
            }
        }
    for (int h = 0; h < HEADS; h++)
        for (int i = 0; i < W; i++) part.out[head + h][d + i] = out[h][i];
}

// Add weighted values to a part.
static inline void add_weighted(
    const float (*scores)[SCORES], const Number* v, int count, const Layer& layer,
    const float* factors, const Number* next, Part& part) {
    for (int head = 0; head < GROUP; head += HEADS) {
        int d = 0;
        for (; d + 4 <= V_ROOM; d += 4, next = nullptr)
            add_some<4>(scores, v, count, layer, head, d, factors, next, part);
        for (; d + 2 <= V_ROOM; d += 2, next = nullptr)
            add_some<2>(scores, v, count, layer, head, d, factors, next, part);
        for (; d < V_ROOM; d++, next = nullptr)
            add_some<1>(scores, v, count, layer, head, d, factors, next, part);
    }
}

// Add tokens to a part. Memory is asked for what comes next, keys from `next` on, if there is any.
static inline void add(
    const Queries& q, const Number* k, const Number* v, int count, const Layer& layer,
    const Number* next, Part& part) {
    alignas(64) float scores[GROUP][SCORES];
    float factors[GROUP];
    score(q, k, v, count, layer, scores);
    for (int g = 0; g < GROUP; g++)
        weigh_few(scores[g], count, part.most[g], part.sum[g], factors[g]);
    add_weighted(scores, v, count, layer, factors, next, part);
}

// Queries of a token and a KV head, as vectors.
static void widen_queries(const Number* q, int64_t head, Queries& wide) {
    for (int g = 0; g < GROUP; g++, q += head) {
        if (PAIRS) {
            memcpy(wide[g], q, sizeof wide[g]);
            continue;
        }
        for (int d = 0; d < K_VECTORS; d++) wide[g][d] = widen(q + d * VL);
        if (K_REST) wide[g][K_VECTORS] = rest_of(q + K_VECTORS * VL, K_REST);
    }
}
