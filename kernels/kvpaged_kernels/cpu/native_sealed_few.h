// One token's queries over a sealed page, SLICE tokens at a time: as its codes are, where the
// processor can and numbers are not fp32 (native_bytes.h, native_tables.h), else unpacked before.

#pragma once

#include "native_tables.h"

// Queries as exact pages want them, as floats, and in the order that numbers of fp8 come.
struct FewQueries {
    Queries plain, turned;
    Floats wide[GROUP][K_ROOM];
};

static void prepare_queries(const Number* q, int64_t head, FewQueries& to) {
    widen_queries(q, head, to.plain);
    if (K_BYTEWISE || K_TABLES)
        for (int g = 0; g < GROUP; g++)
            for (int d = 0; d < K_ROOM; d++) to.wide[g][d] = widen(q + g * head + d * VL);
#ifdef TABLE_CODE
    if constexpr (K_TABLES) {
        memcpy(to.turned, to.plain, sizeof to.plain);
        in_table_order(to.turned);
    }
#endif
}

// Scores of a slice of a sealed head, from `slot` on. `inner`: the layer, but tokens side by side.
static inline void score_slice(
    const FewQueries& q, const uint8_t* head, int slot, const Layer& inner,
    float (*scores)[SCORES]) {
    const uint8_t *codes = head + slot * K_BYTES, *v = head + V_CODES + slot * V_BYTES;
    if constexpr (!K_BYTEWISE && !K_TABLES) {
        if (K_FORM == EXACT) {
            score(q.plain, (const Number*)codes, (const Number*)v, SLICE, inner, scores);
            return;
        }
        alignas(64) Number k[SLICE * K_DIM];
        unpack_k(head, slot, SLICE, k);
        score(q.plain, k, (const Number*)v, SLICE, inner, scores);
        return;
    }
#ifdef BYTE_CODE
    float middles[GROUP];
#ifdef TABLE_CODE
    if constexpr (K_TABLES) score_middles(q.wide, head + K_PARAMS, middles);
#endif
    for (int t = 0; t < SLICE; t += SHARE) {
        ByteQueries bytes;
        if constexpr (K_BYTEWISE)
            prepare(q.wide, head + K_PARAMS + 2 * ((slot + t) / K_PER * K_DIM), bytes);
        for (int i = t; i < t + SHARE; i += VL) {
            ask_for(v + i * V_BYTES, VL * V_BYTES);
            if constexpr (K_BYTEWISE) score_bytes(bytes, codes + i * K_BYTES, i, scores);
#ifdef TABLE_CODE
            if constexpr (K_TABLES) score_tables(q.turned, codes + i * K_BYTES, i, middles, scores);
#endif
        }
    }
#endif
    for (int g = 0; g < GROUP; g++)
        for (int t = 0; t < SLICE; t += VL) {
            Floats s = load(scores[g] + t) * inner.scale;
            if (inner.softcap) s = capped(s, inner.softcap);
            store(scores[g] + t, s);
        }
}

// Add a slice of a sealed head; of its first tokens, `hidden` are not seen. Memory is asked for
// what comes next, the codes of K from `next` on, if there is any.
static inline void add_slice(
    const FewQueries& q, const uint8_t* head, int slot, int hidden, const Layer& inner,
    const uint8_t* next, Part& part) {
    alignas(64) float scores[GROUP][SCORES];
    float factors[GROUP];
    score_slice(q, head, slot, inner, scores);
    for (int g = 0; g < GROUP; g++) {
        for (int t = 0; t < hidden; t++) scores[g][t] = -INFINITY;
        weigh_few(scores[g], SLICE, part.most[g], part.sum[g], factors[g]);
    }
    const uint8_t* codes = head + V_CODES + slot * V_BYTES;
#ifdef BYTE_CODE
    if constexpr (V_BYTEWISE) {
        add_bytes(scores, head, slot, next, factors, part);
        return;
    }
#ifdef TABLE_CODE
    if constexpr (V_TABLES) {
        add_tables(scores, codes, next, factors, part);
        return;
    }
#endif
#endif
    if (V_FORM == EXACT) {
        add_weighted(scores, (const Number*)codes, SLICE, inner, factors, nullptr, part);
        return;
    }
    alignas(64) Number v[SLICE * V_DIM];
    unpack_v(head, slot, SLICE, v);
    add_weighted(scores, v, SLICE, inner, factors, nullptr, part);
}
