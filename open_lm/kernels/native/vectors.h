// Vectors of 512 bits: bfloat16 in memory, float32 in registers.

#pragma once

#include <immintrin.h>

#include <cstdint>

constexpr float LOG2E = 1.4426950408889634f;

// As long as it lives, results of this thread below 2^-126 are 0: a processor takes a hundred times as long for them.
class TinyIsZero {
  public:
    TinyIsZero() { _mm_setcsr(before_ | 0x8040); }  // flush to zero, denormals are zero
    ~TinyIsZero() { _mm_setcsr(before_); }

  private:
    const unsigned before_ = _mm_getcsr();
};

// The first `count` lanes: none below 1, all from 32 on.
inline uint32_t first_lanes(int64_t count) { return count >= 32 ? ~0u : count <= 0 ? 0u : (1u << count) - 1; }

// 16 bfloat16 as float32, and rounded back.
inline __m512 widen(__m256i row) { return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(row), 16); }
inline __m256i narrow(__m512 row) { return (__m256i)_mm512_cvtneps_pbh(row); }

// 2^x: 2^-126 or 0 for all below -126, infinite from 128 on, NaN of NaN. The polynomials have the least greatest relative
// error in [-0.5, 0.5]: 2.6e-6 of DEGREE 4, 7.5e-8 of 5.
template <int DEGREE>
inline __m512 exp2_of(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-126.0f), x);  // the second of them where either is NaN
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 rest = _mm512_sub_ps(x, whole);  // in [-0.5, 0.5]
    constexpr float TERMS[2][6] = {
        {0.9999992614f, 0.6931218147f, 0.2402474484f, 0.05591786029f, 0.009570101592f},
        {1.000000072f, 0.6931469671f, 0.2402211972f, 0.05550713274f, 0.009675541332f, 0.001327647168f},
    };
    __m512 y = _mm512_set1_ps(TERMS[DEGREE - 4][DEGREE]);
    for (int i = DEGREE - 1; i >= 0; --i) y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(TERMS[DEGREE - 4][i]));
    return _mm512_scalef_ps(y, whole);
}

// Words of 32 bits from the 16 bits in the words of both: `even` in the lower half, `odd` in the upper.
inline __m512i pair_words(__m512i even, __m512i odd) { return _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)); }

// The same from two rows of float32, rounded to bfloat16.
inline __m512i interleave(__m512 even, __m512 odd) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                           6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
}

// 16 x 16 words of 32 bits.
inline void transpose_words(const void* from, void* to) {
    const __m512i* in = static_cast<const __m512i*>(from);
    __m512i* out = static_cast<__m512i*>(to);
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_epi32(in[i], in[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32(in[i], in[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
        b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
        b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
        b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        a[i] = _mm512_shuffle_i32x4(b[i], b[i + 4], 0x88);
        a[i + 4] = _mm512_shuffle_i32x4(b[i], b[i + 4], 0xdd);
        a[i + 8] = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0x88);
        a[i + 12] = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; ++i) {
        out[i] = _mm512_shuffle_i32x4(a[i], a[i + 8], 0x88);
        out[i + 8] = _mm512_shuffle_i32x4(a[i], a[i + 8], 0xdd);
    }
}

