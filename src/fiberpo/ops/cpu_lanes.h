// Vectors of the widest registers there are: arithmetic by the compiler's vector extension, masks
// by AVX-512 where the target has it and by vectors of integers elsewhere.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512DQ__)
#define FIBERPO_BYTES 64
#elif defined(__AVX__)
#define FIBERPO_BYTES 32
#else
#define FIBERPO_BYTES 16
#endif

#define FIBERPO_INLINE inline __attribute__((always_inline))
#define FIBERPO_STEP __attribute__((always_inline))

namespace {

typedef float vf __attribute__((vector_size(FIBERPO_BYTES)));
typedef double vd __attribute__((vector_size(FIBERPO_BYTES)));
typedef int32_t vi __attribute__((vector_size(FIBERPO_BYTES)));
typedef int64_t vl __attribute__((vector_size(FIBERPO_BYTES)));
typedef float half __attribute__((vector_size(FIBERPO_BYTES / 2)));
constexpr int64_t F = FIBERPO_BYTES / 4, D = FIBERPO_BYTES / 8;

FIBERPO_INLINE vf splat(float x) { return x - vf{}; }
FIBERPO_INLINE vd splat(double x) { return x - vd{}; }

// sel(m, a, b): a where m. most, least: the second argument where either is NaN.
#if FIBERPO_BYTES == 64
typedef __mmask16 mf;
typedef __mmask8 md;
FIBERPO_INLINE mf every() { return 0xffff; }
FIBERPO_INLINE mf lt(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
FIBERPO_INLINE mf le(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
FIBERPO_INLINE mf eq(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
FIBERPO_INLINE md lt(vd a, vd b) { return _mm512_cmp_pd_mask(a, b, _CMP_LT_OQ); }
FIBERPO_INLINE md le(vd a, vd b) { return _mm512_cmp_pd_mask(a, b, _CMP_LE_OQ); }
FIBERPO_INLINE md eq(vd a, vd b) { return _mm512_cmp_pd_mask(a, b, _CMP_EQ_OQ); }
FIBERPO_INLINE vf sel(mf m, vf a, vf b) { return _mm512_mask_blend_ps(m, b, a); }
FIBERPO_INLINE vd sel(md m, vd a, vd b) { return _mm512_mask_blend_pd(m, b, a); }
FIBERPO_INLINE mf signed_bit(vf x) {
    return _mm512_cmplt_epi32_mask((__m512i)x, _mm512_setzero_si512());
}
FIBERPO_INLINE mf no(mf m) { return (mf)~m; }
FIBERPO_INLINE md no(md m) { return (md)~m; }
FIBERPO_INLINE vf most(vf a, vf b) { return _mm512_max_ps(a, b); }
FIBERPO_INLINE vf least(vf a, vf b) { return _mm512_min_ps(a, b); }
FIBERPO_INLINE vd most(vd a, vd b) { return _mm512_max_pd(a, b); }
FIBERPO_INLINE vd least(vd a, vd b) { return _mm512_min_pd(a, b); }
#else
typedef vi mf;
typedef vl md;
FIBERPO_INLINE mf every() { return ~mf{}; }
FIBERPO_INLINE mf lt(vf a, vf b) { return a < b; }
FIBERPO_INLINE mf le(vf a, vf b) { return a <= b; }
FIBERPO_INLINE mf eq(vf a, vf b) { return a == b; }
FIBERPO_INLINE md lt(vd a, vd b) { return a < b; }
FIBERPO_INLINE md le(vd a, vd b) { return a <= b; }
FIBERPO_INLINE md eq(vd a, vd b) { return a == b; }
FIBERPO_INLINE vf sel(mf m, vf a, vf b) { return m ? a : b; }
FIBERPO_INLINE vd sel(md m, vd a, vd b) { return m ? a : b; }
FIBERPO_INLINE mf signed_bit(vf x) { return (vi)x < 0; }
FIBERPO_INLINE mf no(mf m) { return ~m; }
FIBERPO_INLINE md no(md m) { return ~m; }
#if FIBERPO_BYTES == 32
FIBERPO_INLINE vf most(vf a, vf b) { return _mm256_max_ps(a, b); }
FIBERPO_INLINE vf least(vf a, vf b) { return _mm256_min_ps(a, b); }
FIBERPO_INLINE vd most(vd a, vd b) { return _mm256_max_pd(a, b); }
FIBERPO_INLINE vd least(vd a, vd b) { return _mm256_min_pd(a, b); }
#else
FIBERPO_INLINE vf most(vf a, vf b) { return a > b ? a : b; }
FIBERPO_INLINE vf least(vf a, vf b) { return a < b ? a : b; }
FIBERPO_INLINE vd most(vd a, vd b) { return a > b ? a : b; }
FIBERPO_INLINE vd least(vd a, vd b) { return a < b ? a : b; }
#endif
#endif

FIBERPO_INLINE vd absolute(vd x) {
    return (vd)((vl)x & std::numeric_limits<int64_t>::max());
}
FIBERPO_INLINE vf absolute(vf x) {
    return (vf)((vi)x & std::numeric_limits<int32_t>::max());
}

// The first `left` lanes.
#if FIBERPO_BYTES == 64
FIBERPO_INLINE mf head(vf, int64_t left) { return (mf)(left >= F ? 0xffff : (1 << left) - 1); }
FIBERPO_INLINE md head(vd, int64_t left) { return (md)(left >= D ? 0xff : (1 << left) - 1); }
#else
FIBERPO_INLINE mf head(vf, int64_t left) {
    vi lane;
    for (int i = 0; i < F; i++)
        lane[i] = i;
    return lane < (int32_t)(left < F ? left : F) - vi{};
}
FIBERPO_INLINE md head(vd, int64_t left) {
    vl lane;
    for (int i = 0; i < D; i++)
        lane[i] = i;
    return lane < left - vl{};
}
#endif

// Unaligned loads and stores. Those with `left` touch that many lanes where fewer are left than
// there are; the other lanes are read as 0. What was written shortly before is read `back`: a
// masked load waits for every store in its range, those of other rows too.
template <class V, class T> FIBERPO_INLINE V back(const T *p, int64_t left) {
    V v = {};
    const int64_t lanes = sizeof(V) / sizeof(T);
    std::memcpy(&v, p, left < lanes ? left * sizeof(T) : sizeof v);
    return v;
}
template <class V, class T> FIBERPO_INLINE void write(T *p, V v, int64_t left) {
    const int64_t lanes = sizeof(V) / sizeof(T);
    if (left < lanes)
        std::memcpy(p, &v, left * sizeof(T));
    else
        std::memcpy(p, &v, sizeof v);
}
FIBERPO_INLINE vf get(const float *p) {
    vf v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
FIBERPO_INLINE void put(float *p, vf v) { std::memcpy(p, &v, sizeof v); }
#if FIBERPO_BYTES == 64
FIBERPO_INLINE vf get(const float *p, int64_t left) {
    return _mm512_maskz_loadu_ps(head(vf{}, left), p);
}
FIBERPO_INLINE vd load(const double *p, int64_t left) {
    return _mm512_maskz_loadu_pd(head(vd{}, left), p);
}
FIBERPO_INLINE vd load(const float *p, int64_t left) {
    if (left >= D)
        return __builtin_convertvector(back<half>(p, D), vd);
    return _mm512_cvtps_pd(_mm512_castps512_ps256(get(p, left)));
}
#else
FIBERPO_INLINE vf get(const float *p, int64_t left) { return back<vf>(p, left); }
FIBERPO_INLINE vd load(const double *p, int64_t left) { return back<vd>(p, left); }
FIBERPO_INLINE vd load(const float *p, int64_t left) {
    return __builtin_convertvector(back<half>(p, left), vd);
}
#endif
FIBERPO_INLINE vd load_back(const double *p, int64_t left) { return back<vd>(p, left); }
FIBERPO_INLINE vd load_back(const float *p, int64_t left) {
    return __builtin_convertvector(back<half>(p, left), vd);
}
FIBERPO_INLINE void store(double *p, vd v, int64_t left) { write(p, v, left); }
FIBERPO_INLINE void store(float *p, vd v, int64_t left) {
    write(p, __builtin_convertvector(v, half), left);
}

// Sums of all lanes in a fixed order; `widened` adds the halves of a float32 vector in float64.
FIBERPO_INLINE double total(vd v) {
    for (int step = D / 2; step; step /= 2)
        for (int i = 0; i < step; i++)
            v[i] += v[i + step];
    return v[0];
}
FIBERPO_INLINE vd widened(vf v) {
    half h[2];
    std::memcpy(h, &v, sizeof v);
    return __builtin_convertvector(h[0], vd) + __builtin_convertvector(h[1], vd);
}

// What a T can hold of x.
template <class T> FIBERPO_INLINE vd rounded(vd x) { return x; }
template <> FIBERPO_INLINE vd rounded<float>(vd x) {
    return __builtin_convertvector(__builtin_convertvector(x, half), vd);
}

// The float32 before f; the largest that is not above x; the smallest that is not below.
FIBERPO_INLINE float before(float f) {
    int32_t bits;
    std::memcpy(&bits, &f, sizeof f);
    bits = f == 0 ? INT32_MIN + 1 : bits + (f > 0 ? -1 : 1);
    std::memcpy(&f, &bits, sizeof f);
    return f;
}
FIBERPO_INLINE float below(double x) {
    const float f = (float)x;
    return f > x ? before(f) : f;
}
FIBERPO_INLINE float above(double x) { return -below(-x); }

// exp: 2^n times a polynomial in the rest. n - 1 + bias is read off the low bits of a sum with
// 1.5 * 2^23 (2^52), so that the polynomial is that of 2 exp. Relative error 1e-7 and 4e-16;
// 0 and inf beyond the range of normal numbers, exactly 1 at 0, NaN at NaN.
constexpr float LEAST_F = -87.3f, MOST_F = 88.9f;
FIBERPO_INLINE vf exponential_inside(vf x) {  // of LEAST_F to MOST_F
    vf t = x * splat(1.44269504f) + splat(12582912.0f + 126);
    vf n = t - splat(12582912.0f + 126);
    vf r = x - n * splat(0.693359375f) + n * splat(2.12194440e-4f);
    vf p = splat(2 * 0.00138145f);
    p = p * r + splat(2 * 0.00836875f);
    p = p * r + splat(2 * 0.04166839f);
    p = p * r + splat(2 * 0.1666652f);
    p = p * r + splat(2 * 0.49999993f);
    p = p * r + splat(2.0f);
    p = p * r + splat(2.0f);
    return p * (vf)((vi)t << 23);
}
FIBERPO_INLINE vf exponential(vf x) {
    return exponential_inside(least(splat(MOST_F), most(splat(LEAST_F), x)));
}
FIBERPO_INLINE vd exponential(vd x) {
    const double magic = 6755399441055744.0 + 1022;
    x = least(splat(709.9), most(splat(-708.7), x));
    vd t = x * splat(1.44269504088896338700) + splat(magic);
    vd n = t - splat(magic);
    vd r = x - n * splat(6.93147180369123816490e-01) - n * splat(1.90821492927058770002e-10);
    vd p = splat(2.0 / 6227020800);
    for (double c : {2.0 / 479001600, 2.0 / 39916800, 2.0 / 3628800, 2.0 / 362880, 2.0 / 40320,
                     2.0 / 5040, 2.0 / 720, 2.0 / 120, 2.0 / 24, 2.0 / 6, 1.0, 2.0, 2.0})
        p = p * r + splat(c);
    return p * (vd)((vl)t << 52);
}

}  // namespace
