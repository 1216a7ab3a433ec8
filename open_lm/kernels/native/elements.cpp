// What goes on between matrix products, in bfloat16 on vectors of 512 bits (AVX-512): each of these reads its operands
// from memory once and writes its results once.
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

float greatest(const uint16_t* row, int64_t columns) {
    const __m512 least = _mm512_set1_ps(-INFINITY);
    __m512 top[4] = {least, least, least, least};
    for (int64_t c = 0, i = 0; c < columns; c += 16, ++i) {
        const __mmask16 lanes = first_lanes(columns - c);
        top[i % 4] = _mm512_mask_max_ps(top[i % 4], lanes, top[i % 4], load(row + c, lanes));
    }
    return _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(top[0], top[1]), _mm512_max_ps(top[2], top[3])));
}

float sum_of_exp(const uint16_t* row, int64_t columns, float peak) {
    __m512 sum[4] = {};
    for (int64_t c = 0, i = 0; c < columns; c += 16, ++i) {
        const __mmask16 lanes = first_lanes(columns - c);
        const __m512 value = exp_of(_mm512_sub_ps(load(row + c, lanes), _mm512_set1_ps(peak)));
        sum[i % 4] = _mm512_mask_add_ps(sum[i % 4], lanes, sum[i % 4], value);
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3])));
}

}  // namespace

extern "C" {

// Of each row of logits (N,V): its greatest logit, and the logarithm of the sum of exp(logit - greatest).
void log_sums(const uint16_t* logits, int64_t rows, int64_t columns, float* peaks, float* rests, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t n = 0; n < rows; ++n) {
        const TinyIsZero tiny;
        peaks[n] = greatest(logits + n * columns, columns);
        rests[n] = std::log(sum_of_exp(logits + n * columns, columns, peaks[n]));
    }
}

// Logits (N,V) become exp(logit - sums[n]) * factors[n]; factors may be null, for 1.
void to_shares(uint16_t* logits, int64_t rows, int64_t columns, const float* sums, const float* factors, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t n = 0; n < rows; ++n) {
        const TinyIsZero tiny;
        const __m512 sum = _mm512_set1_ps(sums[n]), factor = _mm512_set1_ps(factors ? factors[n] : 1.0f);
        for (int64_t c = 0; c < columns; c += 16) {
            const __mmask16 lanes = first_lanes(columns - c);
            uint16_t* at = logits + n * columns + c;
            store(at, lanes, _mm512_mul_ps(exp_of(_mm512_sub_ps(load(at, lanes), sum)), factor));
        }
    }
}

// out (N,F) = silu(gate) * up of gate and up side by side (N,2F).
void gate(const uint16_t* both, int64_t rows, int64_t width, uint16_t* out, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t n = 0; n < rows; ++n)
        for (int64_t c = 0; c < width; c += 16) {
            const __mmask16 lanes = first_lanes(width - c);
            const uint16_t* at = both + n * 2 * width + c;
            const __m512 gate = load(at, lanes), up = load(at + width, lanes);
            store(out + n * width + c, lanes, _mm512_mul_ps(_mm512_mul_ps(gate, sigmoid(gate)), up));
        }
}

// The gradient of `both`, from that of `out`.
void gate_backward(const uint16_t* grad, const uint16_t* both, int64_t rows, int64_t width, uint16_t* of_both,
                   int threads) {
    const __m512 one = _mm512_set1_ps(1.0f);
#pragma omp parallel for num_threads(threads)
    for (int64_t n = 0; n < rows; ++n)
        for (int64_t c = 0; c < width; c += 16) {
            const __mmask16 lanes = first_lanes(width - c);
            const int64_t at = n * 2 * width + c;
            const __m512 slope = load(grad + n * width + c, lanes);
            const __m512 gate = load(both + at, lanes), up = load(both + at + width, lanes);
            const __m512 open = sigmoid(gate), silu = _mm512_mul_ps(gate, open);
            // d silu / d gate = open + silu * (1 - open)
            const __m512 steep = _mm512_fmadd_ps(silu, _mm512_sub_ps(one, open), open);
            store(of_both + at, lanes, _mm512_mul_ps(_mm512_mul_ps(slope, up), steep));
            store(of_both + at + width, lanes, _mm512_mul_ps(slope, silu));
        }
}

struct Turn {
    int64_t batch, length, heads, width;  // B, T, H, K
    int64_t x[3], angles[3];              // strides of their first three dimensions, in elements
    float sense;                          // 1, or -1 to turn back
    int32_t neighbours;                   // pairs are (2i, 2i + 1), else (i, i + K/2)
};

// Pairs of the features of x (B,T,H,K), turned by angles whose cos and sin are (B,T,H,K/2) -> out, without gaps.
void turn(const Turn* turn, const uint16_t* x, const float* cos, const float* sin, uint16_t* out, int threads) {
    const int64_t half = turn->width / 2;
    const __m512 sense = _mm512_set1_ps(turn->sense);
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < turn->batch * turn->length; ++row)
        for (int64_t h = 0; h < turn->heads; ++h) {
            const int64_t b = row / turn->length, t = row % turn->length;
            const uint16_t* from = x + b * turn->x[0] + t * turn->x[1] + h * turn->x[2];
            const int64_t angle = b * turn->angles[0] + t * turn->angles[1] + h * turn->angles[2];
            uint16_t* to = out + (row * turn->heads + h) * turn->width;
            for (int64_t c = 0; c < half; c += 16) {
                const __mmask16 lanes = first_lanes(half - c);
                const __m512 along = _mm512_maskz_loadu_ps(lanes, cos + angle + c);
                const __m512 across = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, sin + angle + c), sense);
                const __m512i words = _mm512_maskz_loadu_epi32(turn->neighbours ? lanes : 0, from + 2 * c);
                const __m512 first = turn->neighbours ? (__m512)_mm512_slli_epi32(words, 16) : load(from + c, lanes);
                const __m512 second = turn->neighbours ? (__m512)_mm512_and_si512(words, _mm512_set1_epi32(0xffff0000))
                                                       : load(from + half + c, lanes);
                const __m512 one = _mm512_fnmadd_ps(second, across, _mm512_mul_ps(first, along));
                const __m512 other = _mm512_fmadd_ps(first, across, _mm512_mul_ps(second, along));
                if (turn->neighbours) {
                    _mm512_mask_storeu_epi32(to + 2 * c, lanes, interleave(one, other));
                } else {
                    store(to + c, lanes, one);
                    store(to + half + c, lanes, other);
                }
            }
        }
}

// to (C,R) = from (R,C) transposed, of float32.
void transpose(const float* from, int64_t rows, int64_t columns, float* to, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t column = 0; column < columns; column += 16)
        for (int64_t row = 0; row < rows; row += 16) {
            alignas(64) __m512 straight[16], turned[16];
            const __mmask16 lanes = first_lanes(columns - column), seen = first_lanes(rows - row);
            for (int i = 0; i < 16; ++i)
                straight[i] = _mm512_maskz_loadu_ps(row + i < rows ? lanes : 0, from + (row + i) * columns + column);
            transpose_words(straight, turned);
            for (int64_t i = 0; i < std::min<int64_t>(16, columns - column); ++i)
                _mm512_mask_storeu_ps(to + (column + i) * rows + row, seen, turned[i]);
        }
}

// The same of bfloat16, 32 rows and columns at a time: pairs of rows are words of 32 bits.
void transpose_halves(const uint16_t* from, int64_t rows, int64_t columns, uint16_t* to, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t column = 0; column < columns; column += 32)
        for (int64_t row = 0; row < rows; row += 32) {
            alignas(64) __m512i pairs[2][16], turned[2][16];
            const uint32_t lanes = first_lanes(columns - column), seen = first_lanes(rows - row);
            for (int i = 0; i < 32; i += 2) {
                const uint16_t* at = from + (row + i) * columns + column;
                const __m512i even = _mm512_maskz_loadu_epi16(row + i < rows ? lanes : 0, at);
                const __m512i odd = _mm512_maskz_loadu_epi16(row + i + 1 < rows ? lanes : 0, at + columns);
                pairs[0][i / 2] = pair_words(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(even)),
                                             _mm512_cvtepu16_epi32(_mm512_castsi512_si256(odd)));
                pairs[1][i / 2] = pair_words(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(even, 1)),
                                             _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(odd, 1)));
            }
            for (int side = 0; side < 2; ++side) transpose_words(pairs[side], turned[side]);
            for (int64_t i = 0; i < std::min<int64_t>(32, columns - column); ++i)
                _mm512_mask_storeu_epi16(to + (column + i) * rows + row, seen, turned[i / 16][i % 16]);
        }
}

// total += more, elementwise.
void add(float* total, const uint16_t* more, int64_t count, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < count; i += 16) {
        const __mmask16 lanes = first_lanes(count - i);
        const __m512 sum = _mm512_add_ps(_mm512_maskz_loadu_ps(lanes, total + i), load(more + i, lanes));
        _mm512_mask_storeu_ps(total + i, lanes, sum);
    }
}

}  // extern "C"
