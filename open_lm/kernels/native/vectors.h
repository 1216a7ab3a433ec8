// Helpers for 512-bit vectors: bfloat16 in memory, float32 in registers.

#pragma once

#include <immintrin.h>

#include <cstdint>

constexpr float LOG2E = 1.4426950408889634f;

// Flushes denormals to zero in this thread for the lifetime of the object. Denormals are a hundred times as slow.
class FlushDenormals {
  public:
    FlushDenormals() { _mm_setcsr(saved_ | 0x8040); }  // flush to zero, denormals are zero
    ~FlushDenormals() { _mm_setcsr(saved_); }

  private:
    const unsigned saved_ = _mm_getcsr();
};

// Mask of the first `count` lanes: none if count < 1, all if count >= 32.
inline uint32_t first_lanes(int64_t count) { return count >= 32 ? ~0u : count <= 0 ? 0u : (1u << count) - 1; }

// Conversion of 16 bfloat16 values to float32, and back with rounding.
inline __m512 widen(__m256i row) { return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(row), 16); }
inline __m256i narrow(__m512 row) { return (__m256i)_mm512_cvtneps_pbh(row); }

// 2^x: 2^-126 or 0 below -126, infinity from 128 on, NaN for NaN. The polynomials are minimax approximations on
// [-0.5, 0.5]; their relative error is 2.6e-6 for DEGREE 4 and 7.5e-8 for DEGREE 5.
template <int DEGREE>
inline __m512 exp2_of(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-126.0f), x);  // max_ps returns its second operand if either is NaN
    const __m512 integer = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 fraction = _mm512_sub_ps(x, integer);  // in [-0.5, 0.5]
    constexpr float COEFFICIENTS[2][6] = {
        {0.9999992614f, 0.6931218147f, 0.2402474484f, 0.05591786029f, 0.009570101592f},
        {1.000000072f, 0.6931469671f, 0.2402211972f, 0.05550713274f, 0.009675541332f, 0.001327647168f},
    };
    __m512 y = _mm512_set1_ps(COEFFICIENTS[DEGREE - 4][DEGREE]);
    for (int i = DEGREE - 1; i >= 0; --i) y = _mm512_fmadd_ps(y, fraction, _mm512_set1_ps(COEFFICIENTS[DEGREE - 4][i]));
    return _mm512_scalef_ps(y, integer);
}

// Combines the low 16 bits of the words of both operands: `even` in the lower half of a word, `odd` in the upper.
inline __m512i pair_words(__m512i even, __m512i odd) { return _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)); }

// The same for two rows of float32, rounded to bfloat16.
inline __m512i interleave(__m512 even, __m512 odd) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                           6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
}

// Transposes 16 x 16 words of 32 bits.
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

