// One token's queries over keys as they lie: products along K, summed across vectors. Memory gives
// K and V once; there is nothing to gain by turning them.

#pragma once

#include "native_layer.h"

constexpr int SLICE = PAGE < 64 ? PAGE : 64;        // tokens scored at a time
constexpr int SCORES = (SLICE + VL - 1) / VL * VL;  // and room for them
constexpr int HEADS = GROUP % 4 == 0 ? 4 : GROUP % 3 == 0 ? 3 : GROUP % 2 == 0 ? 2 : 1;  // at a time

// Scores of `count` tokens, `row` numbers apart, into scores[GROUP][SCORES].
static inline void score(
    const Floats (*q)[K_ROOM], const Number* k, int64_t row, int count, const Layer& layer,
    float (*scores)[SCORES]) {
    for (int first = 0; first < count; first += VL) {
        const int some = count - first < VL ? count - first : VL;
        for (int head = 0; head < GROUP; head += HEADS) {
            Floats sums[HEADS][VL];
            for (int t = 0; t < VL; t++) {
                const Number* token = k + (first + (t < some ? t : some - 1)) * row;
                Floats sum[HEADS] = {};
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
                for (int h = 0; h < HEADS; h++) sums[h][t] = sum[h];
            }
            for (int h = 0; h < HEADS; h++) {
                Floats s = sums_of(sums[h]) * layer.scale;
                if (layer.softcap) s = capped(s, layer.softcap);
                store(scores[head + h] + first, s);
            }
        }
    }
}

// Add tokens to a part.
static inline void add(
    const Floats (*q)[K_ROOM], const Number* k, const Number* v, int count, const Layer& layer,
    Part& part) {
    alignas(64) float scores[GROUP][SCORES];
    score(q, k, layer.k_slot, count, layer, scores);
    for (int g = 0; g < GROUP; g++) {
        float most = part.most[g];
        for (int t = 0; t < count; t++) most = scores[g][t] > most ? scores[g][t] : most;
        for (int t = count; t < SCORES; t++) scores[g][t] = -INFINITY;
        Floats sum = {};
        for (int t = 0; t < count; t += VL) {
            Floats p = exp_of(load(scores[g] + t) - most);
            for (int i = 0; i < VL; i++) p[i] = t + i < count ? p[i] : 0.0f;
            store(scores[g] + t, p);
            sum += p;
        }
        float total = 0;
        for (int i = 0; i < VL; i++) total += sum[i];
        if (most > part.most[g]) {
            const float factor = std::exp(part.most[g] - most);
            part.sum[g] *= factor;
            for (int d = 0; d < V_ROOM; d++) part.out[g][d] *= factor;
            part.most[g] = most;
        }
        part.sum[g] += total;
    }
    for (int head = 0; head < GROUP; head += HEADS)
        for (int d = 0; d < V_ROOM; d += 4) {
            const int wide = V_ROOM - d < 4 ? V_ROOM - d : 4;
            Floats out[HEADS][4];
            for (int h = 0; h < HEADS; h++)
                for (int i = 0; i < 4; i++) out[h][i] = i < wide ? part.out[head + h][d + i] : Floats{};
            if (wide == 4 && !(V_REST && d + 4 == V_ROOM)) {
                for (int t = 0; t < count; t++) {
                    const Number* token = v + t * layer.v_slot + d * VL;
#pragma GCC unroll 4
                    for (int i = 0; i < 4; i++) {
                        const Floats x = widen(token + i * VL);
#pragma GCC unroll 4
                        for (int h = 0; h < HEADS; h++) out[h][i] += scores[head + h][t] * x;
                    }
                }
            } else {
                for (int t = 0; t < count; t++)
                    for (int i = 0; i < wide; i++) {
                        const Number* token = v + t * layer.v_slot + (d + i) * VL;
                        const bool last = V_REST && d + i + 1 == V_ROOM;
                        const Floats x = last ? rest_of(token, V_REST) : widen(token);
                        for (int h = 0; h < HEADS; h++) out[h][i] += scores[head + h][t] * x;
                    }
            }
            for (int h = 0; h < HEADS; h++)
                for (int i = 0; i < wide; i++) part.out[head + h][d + i] = out[h][i];
        }
}

// Queries of a token and a KV head, as vectors.
static void widen_queries(const Number* q, int64_t head, Floats (*wide)[K_ROOM]) {
    for (int g = 0; g < GROUP; g++, q += head) {
        for (int d = 0; d < K_VECTORS; d++) wide[g][d] = widen(q + d * VL);
        if (K_REST) wide[g][K_VECTORS] = rest_of(q + K_VECTORS * VL, K_REST);
    }
}
