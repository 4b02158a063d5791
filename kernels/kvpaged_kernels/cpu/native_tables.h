// One token's queries over codes of fp8, made bf16 by tables.

#pragma once

#include "native_bytes.h"

#ifdef TABLE_CODE

// bf16 numbers of fp8's, without a sign: their upper and lower bytes.
struct Tables {
    alignas(64) uint8_t high[128] = {}, low[128] = {};
    constexpr Tables() {
        for (int code = 0; code < 128; code++) {
            int exponent = code >> 3, digits = code & 7;
            if (!exponent && digits) {
                for (exponent = 1; digits < 8; exponent--) digits *= 2;
                digits -= 8;
            }
            const int bits = !code ? 0 : code == 127 ? 0x7fc0 : (exponent + 120) << 7 | digits << 4;
            high[code] = uint8_t(bits >> 8), low[code] = uint8_t(bits);
        }
    }
};
static constexpr Tables TABLES;

// The numbers of 64 codes; of each 16, 8 are in the first vector and 8 in the second.
static inline void look_up(__m512i codes, __m512i (&to)[2]) {
    const __m512i high = _mm512_permutex2var_epi8(
        load_512(TABLES.high), codes, load_512(TABLES.high + 64));
    const __m512i low =
        _mm512_permutex2var_epi8(load_512(TABLES.low), codes, load_512(TABLES.low + 64));
    const __m512i sign = _mm512_and_si512(codes, _mm512_set1_epi8(char(0x80)));
    const __m512i whole = _mm512_or_si512(high, sign);
    to[0] = _mm512_unpacklo_epi8(low, whole);
    to[1] = _mm512_unpackhi_epi8(low, whole);
}

// Where numbers of 64 codes come, of 64 as they lie.
static constexpr auto FIRST = ordered<uint16_t>([](int w) { return w / 8 * 16 + w % 8; });

static inline void in_table_order(Queries& q) {
    for (int g = 0; g < GROUP; g++)
        for (int i = 0; i + 1 < Q_VECTORS; i += 2) {
            const __m512i a = load_512(&q[g][i]), b = load_512(&q[g][i + 1]);
            q[g][i] = (Floats)_mm512_permutex2var_epi16(a, FIRST, b);
            const __m512i second = _mm512_add_epi16(FIRST, _mm512_set1_epi16(8));
            q[g][i + 1] = (Floats)_mm512_permutex2var_epi16(a, second, b);
        }
}

// What the middles of channels add to the scores of a page.
static inline void score_middles(const Wide& q, const uint8_t* middles, float* to) {
    for (int g = 0; g < GROUP; g++) {
        Floats sum = {};
        for (int d = 0; d < K_ROOM; d++)
            sum += q[g][d] * of_halves(load_words(middles + 2 * d * VL));
        to[g] = total_of(sum);
    }
}

// Scores of VL tokens, before the scale; `more` is added.
static inline void score_tables(
    const Queries& q, const uint8_t* codes, int first, const float* more,
    float (*scores)[SCORES]) {
    for (int head = 0; head < GROUP; head += HEADS) {
        Floats sums[HEADS][VL];
        for (int t = 0; t < VL; t++) {
            Floats sum[HEADS] = {};
#pragma GCC unroll 4
            for (int i = 0; i < K_DIM / 64; i++) {
                __m512i x[2];
                look_up(load_512(codes + t * K_BYTES + 64 * i), x);
#pragma GCC unroll 4
                for (int h = 0; h < HEADS; h++)
#pragma GCC unroll 2
                    for (int n = 0; n < 2; n++)
                        sum[h] = (Floats)_mm512_dpbf16_ps(
                            (__m512)sum[h], (__m512bh)x[n], (__m512bh)q[head + h][2 * i + n]);
            }
            for (int h = 0; h < HEADS; h++) sums[h][t] = sum[h];
        }
        for (int h = 0; h < HEADS; h++)
            store(scores[head + h] + first, sums_of(sums[h]) + more[head + h]);
    }
}

// What a slice adds to the output; weights are rounded to bf16.
static inline void add_tables(
    const float (*scores)[SCORES], const uint8_t* codes, const uint8_t* next,
    const float* factors, Part& part) {
    uint32_t pairs[GROUP][SLICE / 2];
    for (int g = 0; g < GROUP; g++)
        for (int t = 0; t < SLICE; t += VL) {
            const __m256bh p = _mm512_cvtneps_pbh((__m512)load(scores[g] + t));
            memcpy(pairs[g] + t / 2, &p, sizeof p);
        }
    for (int d = 0; d < V_DIM; d += 32)
        for (int g = 0; g < GROUP; g += HEADS) {
            Floats out[HEADS][2];
            for (int h = 0; h < HEADS; h++)
                for (int n = 0; n < 2; n++)
                    out[h][n] = part.out[g + h][d / VL + n] * factors[g + h];
            for (int t = 0; t < SLICE; t += 2) {
                const uint8_t* from = codes + t * V_BYTES + d;
                __m512i x[2];
                look_up(_mm512_permutexvar_epi8(PAIRED, two_of(from, from + V_BYTES)), x);
                if (next && !d && !g) ask_for(next + t * K_BYTES, 2 * K_BYTES);
#pragma GCC unroll 4
                for (int h = 0; h < HEADS; h++) {
                    const __m512bh p = (__m512bh)_mm512_set1_epi32(int32_t(pairs[g + h][t / 2]));
#pragma GCC unroll 2
                    for (int n = 0; n < 2; n++)
                        out[h][n] =
                            (Floats)_mm512_dpbf16_ps((__m512)out[h][n], p, (__m512bh)x[n]);
                }
            }
            for (int h = 0; h < HEADS; h++)
                for (int n = 0; n < 2; n++) part.out[g + h][d / VL + n] = out[h][n];
        }
}
#endif
