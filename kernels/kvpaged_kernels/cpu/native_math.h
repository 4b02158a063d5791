// Vectors: sums across, e^x, and a transposition.

#pragma once

#include "native_numbers.h"

// Every second number of two vectors, from the first or from the second on.
static inline Floats even_of(Floats a, Floats b) {
#ifdef __AVX512F__
    return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
#else
    return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14);
#endif
}
static inline Floats odd_of(Floats a, Floats b) {
#ifdef __AVX512F__
    return __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#else
    return __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
#endif
}

// The sum of each of VL vectors, as one vector.
static inline Floats sums_of(Floats* v) {
#pragma GCC unroll 8
    for (int count = VL; count > 1; count /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < count / 2; i++)
            v[i] = even_of(v[2 * i], v[2 * i + 1]) + odd_of(v[2 * i], v[2 * i + 1]);
    return v[0];
}

// The sum of a vector's numbers, and the greatest of those that are not NaN, or any.
static inline float total_of(Floats v) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)v);
#else
    float sum = 0;
    for (int i = 0; i < VL; i++) sum += v[i];
    return sum;
#endif
}
static inline float greatest(Floats v) {
#ifdef __AVX512F__
    return _mm512_reduce_max_ps((__m512)v);
#else
    float most = v[0];
    for (int i = 1; i < VL; i++) most = v[i] > most ? v[i] : most;
    return most;
#endif
}

// VL vectors as rows of a square, turned over its diagonal: even and odd columns are parted, as
// often as it takes for a vector to hold one column.
static inline void transpose(Floats* v) {
    Floats other[VL];
#pragma GCC unroll 4
    for (int turn = 1; turn < VL; turn *= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < VL / 2; i++) {
            other[i] = even_of(v[2 * i], v[2 * i + 1]);
            other[i + VL / 2] = odd_of(v[2 * i], v[2 * i + 1]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < VL; i++) v[i] = other[i];
    }
}

// e^x to 2 units in the last place (Cephes); x below -87 gives about 1e-38. NaN stays NaN, whatever
// its lowest bits are: these would count as an exponent.
static inline Floats exp_of(Floats given) {
    const Floats least = Floats{} - 87.0f, most = Floats{} + 88.0f;
    Floats x = given < least ? least : given;
    x = x > most ? most : x;
    const Floats shifted = x * 1.44269504f + 12582912.0f;  // rounds in the lowest bits
    const Floats n = shifted - 12582912.0f;
    const Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return given == given ? (Floats)((Ints)p + ((Ints)shifted << 23)) : given;
}

// softcap * tanh(x / softcap). Below 0.625 of the cap tanh is a polynomial (Cephes): e^x there
// would lose as many digits as x is below the cap.
static inline Floats capped(Floats x, float softcap) {
    const Floats part = x * (1 / softcap), square = part * part;
    Floats p = square * -5.70498872745e-3f + 2.06390887954e-2f;
    p = p * square - 5.37397155531e-2f;
    p = p * square + 1.33314422036e-1f;
    p = p * square - 3.33332819422e-1f;
    const Floats far = softcap - 2 * softcap / (exp_of(part + part) + 1.0f);
    return square < 0.390625f ? p * square * x + x : far;
}

static inline Floats rest_of(const Number* p, int count) {
    Number room[VL] = {};
    memcpy(room, p, count * sizeof(Number));
    return widen(room);
}
