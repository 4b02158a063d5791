// How K and V lie in a head of a sealed page, and its codes as numbers (kvpaged_kernels/sealed.py).
//
// Constants: FLOAT, BFLOAT16 or HALF, the dtype of exact numbers; K_DIM, V_DIM, multiples of 16;
// PAGE slots a page; K_FORM, V_FORM: EXACT, FP8, INT8 or INT4; K_PER tokens share a parameter of a
// channel, V_PER dimensions one of a token, multiples of 16; HEAD bytes of a head.

#pragma once

#include <cmath>

#include "native_math.h"

#ifndef __F16C__
#error "no half precision on this processor"
#endif

constexpr int EXACT = 0, FP8 = 1, INT8 = 2, INT4 = 3;
constexpr bool K_WHOLE = K_FORM >= INT8, V_WHOLE = V_FORM >= INT8;  // numbers are integers
static_assert(K_DIM % 16 == 0 && V_DIM % 16 == 0 && PAGE % 16 == 0, "vectors are whole");
static_assert(!K_WHOLE || (K_PER % 16 == 0 && PAGE % K_PER == 0), "groups of K");
static_assert(!V_WHOLE || (V_PER % 16 == 0 && V_DIM % V_PER == 0), "groups of V");

// Bytes of a token's codes, and the largest code.
constexpr int width_of(int form, int dim) {
    return form == EXACT ? dim * int(sizeof(Number)) : form == INT4 ? dim / 2 : dim;
}
constexpr int top_of(int form) { return form == INT4 ? 15 : 255; }

constexpr int K_BYTES = width_of(K_FORM, K_DIM), V_BYTES = width_of(V_FORM, V_DIM);
// Lines of parameters; keys of fp8 have one, of their channels' middles.
constexpr int K_GROUPS = K_WHOLE ? PAGE / K_PER : K_FORM == FP8;
constexpr int V_GROUPS = V_WHOLE ? V_DIM / V_PER : 0;
constexpr int V_CODES = PAGE * K_BYTES, K_PARAMS = V_CODES + PAGE * V_BYTES;
constexpr int V_PARAMS = K_PARAMS + 2 * K_DIM * K_GROUPS;
constexpr int HEAD_END = V_PARAMS + 2 * PAGE * V_GROUPS;
static_assert(HEAD == (HEAD_END + 15) / 16 * 16, "heads are as long as Python says");

typedef uint16_t Words __attribute__((vector_size(VL * 2)));
typedef uint8_t Bytes __attribute__((vector_size(VL)));

static inline Words load_words(const void* p) {
    Words v;
    memcpy(&v, p, sizeof v);
    return v;
}
static inline Bytes load_bytes(const void* p) {
    Bytes v;
    memcpy(&v, p, sizeof v);
    return v;
}
template <class To, class From>
static inline To converted(From x) {
    return __builtin_convertvector(x, To);
}

// VL numbers of fp16, and back, to nearest.
static inline Floats of_halves(Words x) {
#ifdef __AVX512F__
    return (Floats)_mm512_cvtph_ps((__m256i)x);
#else
    return (Floats)_mm256_cvtph_ps((__m128i)x);
#endif
}
static inline Words to_halves(Floats x) {
#ifdef __AVX512F__
    return (Words)_mm512_cvtps_ph((__m512)x, 0);
#else
    return (Words)_mm256_cvtps_ph((__m256)x, 0);
#endif
}

// The first scale that is not below `x`, at most fp16's largest number: numbers from 2^-14 on, or
// multiples of 2^-17 below.
static inline Ints scale_above(Floats x) {
    const Ints bits = ((Ints)x + ((1 << 20) - 1) >> 20) - (112 << 3);
    const Floats steps = x * 0x1p17f;
    const Ints below = converted<Ints>(steps);
    const Ints small = below - (Ints)(converted<Floats>(below) < steps);  // true is -1
    return x < 0x1p-14f ? small : bits;
}

// The zero point nearest to `x`.
static inline Ints zero_near(Floats x) {
    const Floats size = (Floats)((Ints)x & 0x7fffffff) * 0x1p-15f;
    const Ints bits = converted<Ints>(to_halves(size)) + 32 >> 6;
    return (bits > 127 ? Ints{} + 127 : bits) | ((Ints)(x < 0.0f) & 128);
}

// What parameters mean: a code stands for scale * code + low.
template <int FORM>
static inline void meaning_of(Words params, Floats& scale, Floats& low) {
    scale = of_halves(params >> 1 & 0x7f80);
    const Floats zero = of_halves((params & 0x80) << 8 | (params & 0x7f) << 6);
    low = scale * zero * (0x1p15f * (top_of(FORM) + 1) / 16);
}

// e4m3 (no infinities; 0x7f is NaN) as floats, and back: to nearest, ties to even, at most 448.
static inline Floats of_fp8(Bytes x) {
    const Ints bits = converted<Ints>(x), size = bits & 127;
    const Floats small = converted<Floats>(size) * 0x1p-9f;
    Ints number = size < 8 ? (Ints)small : (size << 20) + (120 << 23);
    number = size == 127 ? Ints{} + 0x7fc00000 : number;
    return (Floats)(number | (bits & 128) << 24);
}
static inline Bytes to_fp8(Floats x) {
    const Ints bits = (Ints)x, sign = (bits >> 24) & 128;
    const Ints size = bits & 0x7fffffff;
    const Floats most = Floats{} + 448.0f, positive = (Floats)size;
    const Ints number = (Ints)(positive > most ? most : positive);
    // Below 2^-6 the sum with 2^14 is rounded to multiples of 2^-9.
    const Ints small = (Ints)((Floats)number + 0x1p14f) - 0x46800000;
    const Ints large = (number + 0x7ffff + (number >> 20 & 1) >> 20) - (120 << 3);
    Ints code = number < (121 << 23) ? small : large;
    code = size > 0x7f800000 ? Ints{} + 127 : code;
    return converted<Bytes>(code | sign);
}

// Codes of a token for dimensions [d, d + VL), as numbers.
template <int FORM, int DIM>
static inline Floats codes_at(const uint8_t* token, int d) {
    if (FORM == EXACT) return widen((const Number*)token + d);
    if (FORM == FP8) return of_fp8(load_bytes(token + d));
    if (FORM == INT8) return converted<Floats>(converted<Ints>(load_bytes(token + d)));
    constexpr int PART = DIM / 4;
    if (PART % VL == 0) {
        const Ints words = converted<Ints>(load_words(token + 2 * (d % PART)));
        return converted<Floats>(words >> 4 * (d / PART) & 15);
    }
    Floats found;
    for (int i = 0; i < VL; i++) {
        const int at = 2 * ((d + i) % PART), n = (d + i) / PART;  // two nibbles a byte
        found[i] = token[at + n / 2] >> 4 * (n % 2) & 15;
    }
    return found;
}
