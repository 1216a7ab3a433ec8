// Fused elementwise bfloat16 kernels for 512-bit vectors (AVX-512). Each kernel reads its operands from memory once and
// writes its results once.
//
// Legend: N rows, V columns of logits, F width of a gated network, R rows of a matrix, C columns, B batch, T tokens,
// H heads, K head width.

#include <algorithm>
#include <cmath>

#include "vectors.h"

namespace {

inline __m512 load(const uint16_t* from, __mmask16 lanes) { return widen(_mm256_maskz_loadu_epi16(lanes, from)); }

inline void store(uint16_t* to, __mmask16 lanes, __m512 row) { _mm256_mask_storeu_epi16(to, lanes, narrow(row)); }

inline __m512 exp_of(__m512 x) { return exp2_of<5>(_mm512_mul_ps(x, _mm512_set1_ps(LOG2E))); }

inline __m512 sigmoid(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.0f);
    return _mm512_div_ps(one, _mm512_add_ps(one, exp_of(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

float row_max(const uint16_t* row, int64_t columns) {
    const __m512 lowest = _mm512_set1_ps(-INFINITY);
    __m512 maxima[4] = {lowest, lowest, lowest, lowest};
    for (int64_t c = 0, i = 0; c < columns; c += 16, ++i) {
        const __mmask16 lanes = first_lanes(columns - c);
        maxima[i % 4] = _mm512_mask_max_ps(maxima[i % 4], lanes, maxima[i % 4], load(row + c, lanes));
    }
    const __m512 first = _mm512_max_ps(maxima[0], maxima[1]), second = _mm512_max_ps(maxima[2], maxima[3]);
    return _mm512_reduce_max_ps(_mm512_max_ps(first, second));
}

float sum_of_exp(const uint16_t* row, int64_t columns, float maximum) {
    __m512 sum[4] = {};
    for (int64_t c = 0, i = 0; c < columns; c += 16, ++i) {
        const __mmask16 lanes = first_lanes(columns - c);
        const __m512 value = exp_of(_mm512_sub_ps(load(row + c, lanes), _mm512_set1_ps(maximum)));
        sum[i % 4] = _mm512_mask_add_ps(sum[i % 4], lanes, sum[i % 4], value);
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3])));
}

}  // namespace

extern "C" {

// For each row of logits (N,V): writes its maximum, and the logarithm of the sum of exp(logit - maximum).
void log_sum_exp(const uint16_t* logits, int64_t rows, int64_t columns, float* maxima, float* log_sums, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t n = 0; n < rows; ++n) {
        const FlushDenormals flush;
        maxima[n] = row_max(logits + n * columns, columns);
        log_sums[n] = std::log(sum_of_exp(logits + n * columns, columns, maxima[n]));
    }
}

// Replaces logits (N,V) by exp(logit - log_sums[n]) * factors[n]; null factors are 1.
void to_probs(uint16_t* logits, int64_t rows, int64_t columns, const float* log_sums, const float* factors,
              int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t n = 0; n < rows; ++n) {
        const FlushDenormals flush;
        const __m512 log_sum = _mm512_set1_ps(log_sums[n]), factor = _mm512_set1_ps(factors ? factors[n] : 1.0f);
        for (int64_t c = 0; c < columns; c += 16) {
            const __mmask16 lanes = first_lanes(columns - c);
            uint16_t* at = logits + n * columns + c;
            store(at, lanes, _mm512_mul_ps(exp_of(_mm512_sub_ps(load(at, lanes), log_sum)), factor));
        }
    }
}

// out (N,F) = silu(gate) * up, where gate and up are the halves of gate_up (N,2F).
void gate(const uint16_t* gate_up, int64_t rows, int64_t width, uint16_t* out, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t n = 0; n < rows; ++n)
        for (int64_t c = 0; c < width; c += 16) {
            const __mmask16 lanes = first_lanes(width - c);
            const uint16_t* at = gate_up + n * 2 * width + c;
            const __m512 gate = load(at, lanes), up = load(at + width, lanes);
            store(out + n * width + c, lanes, _mm512_mul_ps(_mm512_mul_ps(gate, sigmoid(gate)), up));
        }
}

// Computes the gradient of gate_up from that of out.
void gate_backward(const uint16_t* grad, const uint16_t* gate_up, int64_t rows, int64_t width,
                   uint16_t* gate_up_grad, int threads) {
    const __m512 one = _mm512_set1_ps(1.0f);
#pragma omp parallel for num_threads(threads)
    for (int64_t n = 0; n < rows; ++n)
        for (int64_t c = 0; c < width; c += 16) {
            const __mmask16 lanes = first_lanes(width - c);
            const int64_t at = n * 2 * width + c;
            const __m512 out_grad = load(grad + n * width + c, lanes);
            const __m512 gate = load(gate_up + at, lanes), up = load(gate_up + at + width, lanes);
            const __m512 sig = sigmoid(gate), silu = _mm512_mul_ps(gate, sig);
            // d silu / d gate = sig + silu * (1 - sig)
            const __m512 silu_grad = _mm512_fmadd_ps(silu, _mm512_sub_ps(one, sig), sig);
            store(gate_up_grad + at, lanes, _mm512_mul_ps(_mm512_mul_ps(out_grad, up), silu_grad));
            store(gate_up_grad + at + width, lanes, _mm512_mul_ps(out_grad, silu));
        }
}

struct Rotation {
    int64_t batch, length, heads, width;  // B, T, H, K
    int64_t x[3], angles[3];              // strides of the first three dimensions, in elements
    float direction;                      // 1, or -1 for the inverse rotation
    int32_t interleaved;                  // pairs are (2i, 2i + 1), else (i, i + K/2)
};

// Rotates pairs of features of x (B,T,H,K) by angles whose cos and sin are (B,T,H,K/2). out is contiguous.
void rotate(const Rotation* spec, const uint16_t* x, const float* cos, const float* sin, uint16_t* out, int threads) {
    const int64_t half = spec->width / 2;
    const __m512 direction = _mm512_set1_ps(spec->direction);
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < spec->batch * spec->length; ++row)
        for (int64_t h = 0; h < spec->heads; ++h) {
            const int64_t b = row / spec->length, t = row % spec->length;
            const uint16_t* from = x + b * spec->x[0] + t * spec->x[1] + h * spec->x[2];
            const int64_t angle = b * spec->angles[0] + t * spec->angles[1] + h * spec->angles[2];
            uint16_t* to = out + (row * spec->heads + h) * spec->width;
            for (int64_t c = 0; c < half; c += 16) {
                const __mmask16 lanes = first_lanes(half - c);
                const __m512 cosine = _mm512_maskz_loadu_ps(lanes, cos + angle + c);
                const __m512 sine = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, sin + angle + c), direction);
                const __m512i words = _mm512_maskz_loadu_epi32(spec->interleaved ? lanes : 0, from + 2 * c);
                const __m512 first = spec->interleaved ? (__m512)_mm512_slli_epi32(words, 16) : load(from + c, lanes);
                const __m512 second = spec->interleaved ? (__m512)_mm512_and_si512(words, _mm512_set1_epi32(0xffff0000))
                                                        : load(from + half + c, lanes);
                const __m512 new_first = _mm512_fnmadd_ps(second, sine, _mm512_mul_ps(first, cosine));
                const __m512 new_second = _mm512_fmadd_ps(first, sine, _mm512_mul_ps(second, cosine));
                if (spec->interleaved) {
                    _mm512_mask_storeu_epi32(to + 2 * c, lanes, interleave(new_first, new_second));
                } else {
                    store(to + c, lanes, new_first);
                    store(to + half + c, lanes, new_second);
                }
            }
        }
}

// to (C,R) = transpose of from (R,C), float32.
void transpose(const float* from, int64_t rows, int64_t columns, float* to, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t column = 0; column < columns; column += 16)
        for (int64_t row = 0; row < rows; row += 16) {
            alignas(64) __m512 block[16], transposed[16];
            const __mmask16 lanes = first_lanes(columns - column), row_lanes = first_lanes(rows - row);
            for (int i = 0; i < 16; ++i)
                block[i] = _mm512_maskz_loadu_ps(row + i < rows ? lanes : 0, from + (row + i) * columns + column);
            transpose_words(block, transposed);
            for (int64_t i = 0; i < std::min<int64_t>(16, columns - column); ++i)
                _mm512_mask_storeu_ps(to + (column + i) * rows + row, row_lanes, transposed[i]);
        }
}

// The same for bfloat16, in blocks of 32 x 32: the elements of two rows form words of 32 bits.
void transpose_bfloat16(const uint16_t* from, int64_t rows, int64_t columns, uint16_t* to, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t column = 0; column < columns; column += 32)
        for (int64_t row = 0; row < rows; row += 32) {
            alignas(64) __m512i pairs[2][16], transposed[2][16];
            const uint32_t lanes = first_lanes(columns - column), row_lanes = first_lanes(rows - row);
            for (int i = 0; i < 32; i += 2) {
                const uint16_t* at = from + (row + i) * columns + column;
                const __m512i even = _mm512_maskz_loadu_epi16(row + i < rows ? lanes : 0, at);
                const __m512i odd = _mm512_maskz_loadu_epi16(row + i + 1 < rows ? lanes : 0, at + columns);
                pairs[0][i / 2] = pair_words(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(even)),
                                             _mm512_cvtepu16_epi32(_mm512_castsi512_si256(odd)));
                pairs[1][i / 2] = pair_words(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(even, 1)),
                                             _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(odd, 1)));
            }
            for (int side = 0; side < 2; ++side) transpose_words(pairs[side], transposed[side]);
            for (int64_t i = 0; i < std::min<int64_t>(32, columns - column); ++i)
                _mm512_mask_storeu_epi16(to + (column + i) * rows + row, row_lanes, transposed[i / 16][i % 16]);
        }
}

// total += addend, elementwise.
void add(float* total, const uint16_t* addend, int64_t count, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < count; i += 16) {
        const __mmask16 lanes = first_lanes(count - i);
        const __m512 sum = _mm512_add_ps(_mm512_maskz_loadu_ps(lanes, total + i), load(addend + i, lanes));
        _mm512_mask_storeu_ps(total + i, lanes, sum);
    }
}

}  // extern "C"
