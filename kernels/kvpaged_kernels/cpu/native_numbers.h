// Numbers of a model's dtype (FLOAT, BFLOAT16 or HALF) to fp32 and back, one and a vector at a
// time. A vector is what the processor holds in a register: VL floats.

#pragma once

#include <cstdint>
#include <cstring>

#ifdef __x86_64__
#include <immintrin.h>
#endif

#ifdef __AVX512F__
constexpr int VL = 16;
#else
constexpr int VL = 8;
#endif

typedef float Floats __attribute__((vector_size(VL * 4)));
typedef int32_t Ints __attribute__((vector_size(VL * 4)));

static inline Floats load(const float* p) {
    Floats v;
    memcpy(&v, p, sizeof v);
    return v;
}
static inline void store(float* p, Floats v) { memcpy(p, &v, sizeof v); }

// Keep a vector in a register: compilers would read it from memory once for each use.
static inline void keep(Floats& v) {
#ifdef __AVX__
    asm("" : "+v"(v));
#endif
}

#if defined(FLOAT)
typedef float Number;
static inline float to_float(Number x) { return x; }
static inline Number of_float(float x) { return x; }
static inline Floats widen(const Number* p) { return load(p); }
static inline void narrow(Number* p, Floats v) { store(p, v); }
#elif defined(BFLOAT16)
typedef uint16_t Number;
typedef uint16_t Numbers __attribute__((vector_size(VL * 2)));
static inline float to_float(Number x) {
    const uint32_t bits = uint32_t(x) << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
static inline Number of_float(float x) {  // to nearest, ties to even; NaN stays one
    uint32_t bits;
    memcpy(&bits, &x, 4);
    const uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1);
    return uint16_t((x == x ? rounded : bits | 0x400000) >> 16);
}
static inline Floats widen(const Number* p) {
    Numbers v;
    memcpy(&v, p, sizeof v);
    return (Floats)(__builtin_convertvector(v, Ints) << 16);
}
static inline void narrow(Number* p, Floats v) {
#ifdef __AVX512BF16__
    const __m256bh numbers = _mm512_cvtneps_pbh((__m512)v);
    memcpy(p, &numbers, sizeof numbers);
#else
    for (int i = 0; i < VL; i++) p[i] = of_float(v[i]);
#endif
}
#elif defined(HALF) && defined(__F16C__)
typedef uint16_t Number;
static inline float to_float(Number x) { return _cvtsh_ss(x); }
static inline Number of_float(float x) { return _cvtss_sh(x, 0); }
static inline Floats widen(const Number* p) {
#ifdef __AVX512F__
    return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#else
    return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#endif
}
static inline void narrow(Number* p, Floats v) {
#ifdef __AVX512F__
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, 0));
#else
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, 0));
#endif
}
#else
#error "no conversion for this dtype on this processor"
#endif
