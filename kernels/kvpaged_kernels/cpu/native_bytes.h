// One token's queries over codes of integers, which are multiplied as they are.
//
// K's scales go into the queries, once a group of tokens, V's into the weights, and both become
// integers of 15 bits, two bytes, relative to the largest; sums of products of bytes (VNNI) are
// exact. What code 0 stands for adds one number a query.

#pragma once

#include "native_sealed.h"

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__)
#define BYTE_CODE
#endif
#if defined(BYTE_CODE) && !defined(FLOAT)
constexpr bool BYTE_PRODUCTS = true;
#else
constexpr bool BYTE_PRODUCTS = false;
#endif
#if defined(BYTE_CODE) && defined(__AVX512BF16__)
#define TABLE_CODE
#endif
constexpr bool K_BYTEWISE =
    BYTE_PRODUCTS && ((K_FORM == INT8 && K_DIM % 64 == 0) ||
                      (K_FORM == INT4 && (K_DIM == 64 || K_DIM % 128 == 0)));
constexpr bool V_BYTEWISE = BYTE_PRODUCTS && V_WHOLE && V_DIM % 64 == 0;
constexpr bool K_TABLES = PAIRS && BYTE_PRODUCTS && K_FORM == FP8 && K_DIM % 64 == 0;
constexpr bool V_TABLES = PAIRS && BYTE_PRODUCTS && V_FORM == FP8 && V_DIM % 64 == 0;

// Have memory get bytes ready.
static inline void ask_for(const uint8_t* bytes, int count) {
    for (int i = 0; i < count; i += 64) __builtin_prefetch(bytes + i);
}

constexpr int SHARE = K_PER < SLICE ? K_PER : SLICE;  // tokens of a slice that share parameters

#ifdef BYTE_CODE

typedef Floats Wide[GROUP][K_ROOM];  // queries as floats

constexpr float MOST_WHOLE = 127 * 128;

static inline Ints products(Ints sum, __m512i codes, __m512i numbers) {
    return (Ints)_mm512_dpbusd_epi32((__m512i)sum, codes, numbers);
}

static inline __m512i load_512(const void* p) { return _mm512_loadu_si512(p); }
static inline __m512i two_of(const uint8_t* a, const uint8_t* b) {  // 32 bytes of each
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)a)),
                              _mm256_loadu_si256((const __m256i*)b), 1);
}

// Indices of bytes or words into one or two vectors.
template <class T>
struct Order {
    alignas(64) T at[64 / sizeof(T)] = {};
    operator __m512i() const { return _mm512_load_si512(at); }
};
template <class T, class Rule>
constexpr Order<T> ordered(Rule rule) {
    Order<T> order;
    for (int i = 0; i < int(64 / sizeof(T)); i++) order.at[i] = T(rule(i));
    return order;
}

// Where the number `n` of 64 is after they were packed into bytes, quarters of vectors apart.
constexpr int packed_at(int n) { return n % 16 / 4 * 16 + n / 16 * 4 + n % 4; }
static constexpr auto UNPACKED_ORDER = ordered<uint8_t>(packed_at);

// 64 integers of 15 bits, `x` times `factor`, as two bytes each: hi * 128 + lo, as packed.
static inline void split(const Floats* x, float factor, __m512i& hi, __m512i& lo) {
    __m512i words[2], high[2];
    for (int i = 0; i < 2; i++) {
        words[i] = _mm512_packs_epi32(_mm512_cvtps_epi32((__m512)(x[2 * i] * factor)),
                                      _mm512_cvtps_epi32((__m512)(x[2 * i + 1] * factor)));
        high[i] = _mm512_srai_epi16(_mm512_add_epi16(words[i], _mm512_set1_epi16(64)), 7);
        words[i] = _mm512_sub_epi16(words[i], _mm512_slli_epi16(high[i], 7));
    }
    hi = _mm512_packs_epi16(high[0], high[1]);
    lo = _mm512_packs_epi16(words[0], words[1]);
}

// The same, in order, into memory.
static inline void split_to(const Floats* x, float factor, int8_t* hi, int8_t* lo) {
    __m512i high, low;
    split(x, factor, high, low);
    _mm512_storeu_si512(hi, _mm512_permutexvar_epi8(UNPACKED_ORDER, high));
    _mm512_storeu_si512(lo, _mm512_permutexvar_epi8(UNPACKED_ORDER, low));
}

// Sums of products go 4 codes a lane. A vector holds the codes of a token, the low nibbles of one
// or the high, or, of 4 bits and 64 wide, those of two tokens.
constexpr int TOGETHER = K_FORM == INT4 && K_DIM == 64 ? 2 : 1;
constexpr int K_LOADS = K_BYTES * TOGETHER / 64 ? K_BYTES * TOGETHER / 64 : 1;
constexpr int K_OPERANDS = K_LOADS * (K_FORM == INT4 ? 2 : 1);

struct ByteQueries {
    __m512i hi[GROUP][K_OPERANDS], lo[GROUP][K_OPERANDS];
    float unit[GROUP], low[GROUP];  // what a sum of products is times, and what is added
};

// Of 64 wide, byte 2 i + e of a token's codes: dimension i + 32 e and, in the high nibble, 16 on,
// which are packed 4 bytes on. Of wider ones, dimensions i and i + dim / 2, and dim / 4 on.
static constexpr auto NIBBLES_64 =
    ordered<uint8_t>([](int b) { return packed_at(b % 32 / 2 + b % 2 * 32); });
static constexpr auto NIBBLES = ordered<uint8_t>([](int b) { return b / 2 + b % 2 * 64; });

// A query's bytes in the order of codes.
static inline void in_code_order(const Floats* q, float factor, __m512i* hi, __m512i* lo) {
    if constexpr (K_DIM == 64) {
        __m512i high, low;
        split(q, factor, high, low);
        if (K_FORM == INT8) {
            hi[0] = _mm512_permutexvar_epi8(UNPACKED_ORDER, high);
            lo[0] = _mm512_permutexvar_epi8(UNPACKED_ORDER, low);
            return;
        }
        const __m512i second = _mm512_add_epi8(NIBBLES_64, _mm512_set1_epi8(4));
        hi[0] = _mm512_permutexvar_epi8(NIBBLES_64, high);
        lo[0] = _mm512_permutexvar_epi8(NIBBLES_64, low);
        hi[1] = _mm512_permutexvar_epi8(second, high);
        lo[1] = _mm512_permutexvar_epi8(second, low);
        return;
    }
    alignas(64) int8_t bytes[2][K_DIM + 64];
    for (int d = 0; d < K_DIM; d += 64)
        split_to(q + d / VL, factor, bytes[0] + d, bytes[1] + d);
    for (int side = 0; side < 2; side++)
        for (int i = 0; i < K_OPERANDS; i++) {
            __m512i& to = side ? lo[i] : hi[i];
            const int8_t* from = bytes[side] + 64 * i;
            to = load_512(from);
            if (K_FORM == INT8) continue;
            from = bytes[side] + i / 2 * 32 + i % 2 * (K_DIM / 4);
            to = _mm512_permutex2var_epi8(load_512(from), NIBBLES, load_512(from + K_DIM / 2));
        }
}

static inline void prepare(
    const Wide& q, const uint8_t* params, ByteQueries& to) {
    Floats scale[K_ROOM], low[K_ROOM];
    for (int d = 0; d < K_ROOM; d++)
        meaning_of<K_FORM>(load_words(params + 2 * d * VL), scale[d], low[d]);
    for (int g = 0; g < GROUP; g++) {
        Floats scaled[K_ROOM], sum = {}, most = {};
        for (int d = 0; d < K_ROOM; d++) {
            scaled[d] = q[g][d] * scale[d];
            sum += q[g][d] * low[d];
            const Floats size = (Floats)((Ints)scaled[d] & 0x7fffffff);
            most = size > most ? size : most;
        }
        const float top = greatest(most), inverse = top > 0 ? MOST_WHOLE / top : 0;
        to.unit[g] = top / MOST_WHOLE;
        to.low[g] = total_of(sum);
        in_code_order(scaled, inverse, to.hi[g], to.lo[g]);
    }
}

// Two vectors side by side, summed in pairs: of numbers, of twos of them, of fours.
static inline Ints fold_1(Ints a, Ints b) {
    return (Ints)_mm512_unpacklo_epi32((__m512i)a, (__m512i)b) +
           (Ints)_mm512_unpackhi_epi32((__m512i)a, (__m512i)b);
}
static inline Ints fold_2(Ints a, Ints b) {
    return (Ints)_mm512_unpacklo_epi64((__m512i)a, (__m512i)b) +
           (Ints)_mm512_unpackhi_epi64((__m512i)a, (__m512i)b);
}
static inline Ints fold_4(Ints a, Ints b) {
    return (Ints)_mm512_shuffle_i64x2((__m512i)a, (__m512i)b, 0x88) +
           (Ints)_mm512_shuffle_i64x2((__m512i)a, (__m512i)b, 0xdd);
}

// The sums across of VL / EACH vectors, each of EACH tokens. Shuffles within quarters of a vector
// are cheaper than such as cross them.
template <int EACH>
static inline Ints whole_sums(const Ints* v) {
    Ints four[VL / EACH / 4];
#pragma GCC unroll 4
    for (int i = 0; i < VL / EACH / 4; i++)
        four[i] = fold_2(fold_1(v[4 * i], v[4 * i + 1]), fold_1(v[4 * i + 2], v[4 * i + 3]));
    if constexpr (EACH == 1)
        return fold_4(fold_4(four[0], four[1]), fold_4(four[2], four[3]));
    const __m512i order =
        _mm512_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
    return (Ints)_mm512_permutexvar_epi32(order, (__m512i)fold_4(four[0], four[1]));
}

// Scores of VL tokens, before the scale.
static inline void score_bytes(
    const ByteQueries& q, const uint8_t* codes, int first, float (*scores)[SCORES]) {
    for (int head = 0; head < GROUP; head += HEADS) {
        Ints sums[HEADS][VL / TOGETHER];
        for (int t = 0; t < VL / TOGETHER; t++) {
            Ints sum[HEADS] = {};
            __m512i operands[K_OPERANDS];
            for (int i = 0; i < K_LOADS; i++) {
                const __m512i x = load_512(codes + t * TOGETHER * K_BYTES + 64 * i);
                if (K_FORM == INT8) {
                    operands[i] = x;
                    continue;
                }
                const __m512i nibble = _mm512_set1_epi8(15);
                operands[2 * i] = _mm512_and_si512(x, nibble);
                operands[2 * i + 1] = _mm512_and_si512(_mm512_srli_epi16(x, 4), nibble);
            }
#pragma GCC unroll 4
            for (int h = 0; h < HEADS; h++) {
#pragma GCC unroll 8
                for (int i = 0; i < K_OPERANDS; i++)
                    sum[h] = products(sum[h], operands[i], q.hi[head + h][i]);
                sum[h] <<= 7;
#pragma GCC unroll 8
                for (int i = 0; i < K_OPERANDS; i++)
                    sum[h] = products(sum[h], operands[i], q.lo[head + h][i]);
                sums[h][t] = sum[h];
            }
        }
        for (int h = 0; h < HEADS; h++) {
            const Floats sum = converted<Floats>(whole_sums<TOGETHER>(sums[h]));
            store(scores[head + h] + first, sum * q.unit[head + h] + q.low[head + h]);
        }
    }
}

static constexpr auto EVEN = ordered<uint8_t>([](int b) { return b % 4 * 32 + b / 4 * 2; });
// Of 32 codes of two tokens: pairs, 4 of the first 16 and 4 of the second by turns.
static constexpr auto PAIRED = ordered<uint8_t>(
    [](int b) { return b % 2 * 32 + b % 16 / 8 * 16 + b / 16 * 4 + b % 8 / 2; });

// Codes of 4 tokens from `codes` on, for two vectors of dimensions: 4 tokens a lane.
static inline void four_tokens(const uint8_t* codes, int part, __m512i (&to)[2]) {
    if (V_FORM == INT4) {  // `part`: of 16 words, the low bytes or the high
        const uint8_t* from = codes + part / 2 * 32;
        __m512i a, b;
        if (V_DIM == 64)
            a = load_512(from), b = load_512(from + 64);
        else
            a = two_of(from, from + V_BYTES), b = two_of(from + 2 * V_BYTES, from + 3 * V_BYTES);
        const __m512i order = _mm512_add_epi8(EVEN, _mm512_set1_epi8(char(part % 2)));
        const __m512i x = _mm512_permutex2var_epi8(a, order, b);
        const __m512i nibble = _mm512_set1_epi8(15);
        to[0] = _mm512_and_si512(x, nibble);
        to[1] = _mm512_and_si512(_mm512_srli_epi16(x, 4), nibble);
        return;
    }
    const uint8_t* from = codes + part * 32;
    const __m512i a = _mm512_permutexvar_epi8(PAIRED, two_of(from, from + V_BYTES));
    const __m512i b =
        _mm512_permutexvar_epi8(PAIRED, two_of(from + 2 * V_BYTES, from + 3 * V_BYTES));
    to[0] = _mm512_unpacklo_epi16(a, b);
    to[1] = _mm512_unpackhi_epi16(a, b);
}

// Which vectors of the output they are.
static inline int vector_of(int part, int n) {
    if (V_FORM == INT8) return 2 * part + n;
    return part / 2 + (part % 2 * 2 + n) * (V_DIM / 64);
}

struct ByteWeights {
    alignas(64) int8_t hi[GROUP][64], lo[GROUP][64];
    float unit[GROUP], low[GROUP];
};

static inline void weigh_bytes(
    const float (*scores)[SCORES], const uint8_t* params, ByteWeights& to) {
    Floats scale[SLICE / VL], low[SLICE / VL];
    for (int t = 0; t < SLICE / VL; t++)
        meaning_of<V_FORM>(load_words(params + 2 * t * VL), scale[t], low[t]);
    for (int g = 0; g < GROUP; g++) {
        Floats weights[64 / VL] = {}, sum = {}, most = {};
        for (int t = 0; t < SLICE / VL; t++) {
            const Floats p = load(scores[g] + t * VL);
            weights[t] = p * scale[t];
            sum += p * low[t];
            most = weights[t] > most ? weights[t] : most;
        }
        const float top = greatest(most), inverse = top > 0 ? MOST_WHOLE / top : 0;
        to.unit[g] = top / MOST_WHOLE;
        to.low[g] = total_of(sum);
        split_to(weights, inverse, to.hi[g], to.lo[g]);
    }
}

static inline __m512i four_of(const int8_t* p) {
    int32_t number;
    memcpy(&number, p, 4);
    return _mm512_set1_epi32(number);
}

// What a slice adds to the output.
static inline void add_bytes(
    const float (*scores)[SCORES], const uint8_t* head, int slot, const uint8_t* next,
    const float* factors, Part& part) {
    constexpr int GROUPS = V_GROUPS ? V_GROUPS : 1;
    ByteWeights weights[GROUPS];
    for (int i = 0; i < GROUPS; i++)
        weigh_bytes(scores, head + V_PARAMS + 2 * (i * PAGE + slot), weights[i]);
    const uint8_t* codes = head + V_CODES + slot * V_BYTES;
    for (int pair = 0; pair < V_DIM / 32; pair++) {
        const int vectors[2] = {vector_of(pair, 0), vector_of(pair, 1)};
        const ByteWeights* own[2] = {
            weights + vectors[0] * VL / V_PER, weights + vectors[1] * VL / V_PER};
        for (int g = 0; g < GROUP; g += HEADS) {
            Ints hi[HEADS][2] = {}, lo[HEADS][2] = {};
            for (int t = 0; t < SLICE; t += 4) {
                __m512i four[2];
                four_tokens(codes + t * V_BYTES, pair, four);
                if (next && !pair && !g) ask_for(next + t * K_BYTES, 4 * K_BYTES);
#pragma GCC unroll 4
                for (int h = 0; h < HEADS; h++)
#pragma GCC unroll 2
                    for (int n = 0; n < 2; n++) {
                        hi[h][n] = products(hi[h][n], four[n], four_of(own[n]->hi[g + h] + t));
                        lo[h][n] = products(lo[h][n], four[n], four_of(own[n]->lo[g + h] + t));
                    }
            }
            for (int h = 0; h < HEADS; h++)
                for (int n = 0; n < 2; n++) {
                    Floats& out = part.out[g + h][vectors[n]];
                    const Floats sum = converted<Floats>((hi[h][n] << 7) + lo[h][n]);
                    out = out * factors[g + h] + sum * own[n]->unit[g + h] + own[n]->low[g + h];
                }
        }
    }
}
#endif
