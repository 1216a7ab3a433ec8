// Float32 kernels for the evaluation of many short prompts, for 512-bit vectors (AVX-512).
//
// Legend: N tokens of all sequences, H heads, K head width, R hidden states, C columns of a tile of logits.

#include <algorithm>
#include <cmath>
#include <vector>

#include "vectors.h"

namespace {

// Constants for heads of WIDTH features; 0 means that the width is known only at run time. Accumulators must fit
// the 32 registers.
template <int WIDTH>
struct Block {
    static constexpr int QUERIES = WIDTH == 8 || WIDTH == 16 ? 8 : 4;  // queries that share loads
    static constexpr int VECTORS = WIDTH ? (WIDTH + 15) / 16 : 4;      // vectors of a value that are summed together
};

inline __m512 exp_of(__m512 x) { return exp2_of<5>(_mm512_mul_ps(x, _mm512_set1_ps(LOG2E))); }

float max_of(const float* values, int64_t count) {
    __m512 maximum = _mm512_set1_ps(-INFINITY);
    for (int64_t i = 0; i < count; i += 16) {
        const __mmask16 lanes = first_lanes(count - i);
        maximum = _mm512_mask_max_ps(maximum, lanes, maximum, _mm512_maskz_loadu_ps(lanes, values + i));
    }
    return _mm512_reduce_max_ps(maximum);
}

// Replaces QUERIES rows of scores, `stride` apart, by exp(score - maximum of the row), and writes 1 / their sums. The
// rows are computed together because the operations of one wait for each other. count is a multiple of 16: loads do not
// wait for earlier stores only if both are of full vectors.
template <int QUERIES>
void softmax_terms(float* scores, int64_t stride, int64_t count, float (&factors)[QUERIES]) {
    __m512 maxima[QUERIES], sums[QUERIES] = {};
    for (int r = 0; r < QUERIES; ++r) maxima[r] = _mm512_set1_ps(-INFINITY);
    for (int64_t i = 0; i < count; i += 16)
        for (int r = 0; r < QUERIES; ++r)
            maxima[r] = _mm512_max_ps(maxima[r], _mm512_loadu_ps(scores + r * stride + i));
    for (int r = 0; r < QUERIES; ++r) maxima[r] = _mm512_set1_ps(_mm512_reduce_max_ps(maxima[r]));
    for (int64_t i = 0; i < count; i += 16)
        for (int r = 0; r < QUERIES; ++r) {
            float* at = scores + r * stride + i;
            const __m512 term = exp_of(_mm512_sub_ps(_mm512_loadu_ps(at), maxima[r]));
            sums[r] = _mm512_add_ps(sums[r], term);
            _mm512_storeu_ps(at, term);
        }
    for (int r = 0; r < QUERIES; ++r) factors[r] = 1.0f / _mm512_reduce_add_ps(sums[r]);
}

float sum_of_exp(const float* values, int64_t count, float maximum) {
    __m512 sums[2] = {};
    for (int64_t i = 0, k = 0; i < count; i += 16, ++k) {
        const __mmask16 lanes = first_lanes(count - i);
        const __m512 term = exp_of(_mm512_sub_ps(_mm512_maskz_loadu_ps(lanes, values + i), _mm512_set1_ps(maximum)));
        sums[k % 2] = _mm512_mask_add_ps(sums[k % 2], lanes, sums[k % 2], term);
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(sums[0], sums[1]));
}

struct Attention {
    int64_t tokens, heads, width;                // N, H, K
    int64_t queries[2], keys[2], values[2];      // strides of tokens and heads, in elements
};

// The width of a head as a constant if the kernels are compiled for it, else that of the arguments.
template <int WIDTH>
inline int64_t width_of(const Attention& spec) {
    return WIDTH ? WIDTH : spec.width;
}

// Writes the products of QUERIES queries (rows of K elements) with the keys of tokens [first, last), of which `keys`
// (K,N) is the transpose, to rows of `stride` elements.
template <int WIDTH>
void multiply_keys(const float* queries, const float* keys, const Attention& spec, int64_t first, int64_t last,
                   float* scores, int64_t stride) {
    constexpr int QUERIES = Block<WIDTH>::QUERIES;
    const int64_t width = width_of<WIDTH>(spec);
    for (int64_t n = first; n < last; n += 16) {
        __m512 sums[QUERIES] = {};
        for (int64_t c = 0; c < width; ++c) {
            const __m512 key = _mm512_loadu_ps(keys + c * spec.tokens + n);
            for (int i = 0; i < QUERIES; ++i)
                sums[i] = _mm512_fmadd_ps(_mm512_set1_ps(queries[i * width + c]), key, sums[i]);
        }
        for (int i = 0; i < QUERIES; ++i) _mm512_storeu_ps(scores + i * stride + n - first, sums[i]);
    }
}

// Adds the values (rows of `width` elements, `step` apart) of tokens [first, last), weighted for each query.
template <int QUERIES, int VECTORS>
void add_values(const float* weights, int64_t stride, const float* values, int64_t step, int64_t width, int64_t first,
                int64_t last, __m512 (&sums)[QUERIES][VECTORS]) {
    __mmask16 lanes[VECTORS];
    for (int v = 0; v < VECTORS; ++v) lanes[v] = first_lanes(width - 16 * v);
    for (int64_t n = first; n < last; ++n)
        for (int v = 0; v < VECTORS; ++v) {
            const __m512 value = _mm512_maskz_loadu_ps(lanes[v], values + n * step + 16 * v);
            for (int i = 0; i < QUERIES; ++i)
                sums[i][v] = _mm512_fmadd_ps(_mm512_set1_ps(weights[i * stride + n - first]), value, sums[i][v]);
        }
}

// The tokens of a piece, and the ranges of earlier tokens that all of them see.
struct Piece {
    int64_t first, last, num_ranges;
    const int64_t* ranges;
    int64_t seen;  // tokens of the ranges

    // Calls visit(first, last, offset) for each range, and for the tokens of the piece before `end`.
    template <typename Visit>
    void visit_keys(int64_t end, Visit visit) const {
        int64_t offset = 0;
        for (int64_t r = 0; r < num_ranges; ++r) {
            visit(ranges[2 * r], ranges[2 * r + 1], offset);
            offset += ranges[2 * r + 1] - ranges[2 * r];
        }
        visit(first, end, offset);
    }
};

// Computes the attention of one head for a piece. keys (K,N) and values are those of the head.
template <int WIDTH>
void attend(const Attention& spec, const Piece& piece, const float* queries, const float* keys, const float* values,
            float* out) {
    constexpr int QUERIES = Block<WIDTH>::QUERIES, VECTORS = Block<WIDTH>::VECTORS;
    const int64_t width = width_of<WIDTH>(spec), stride = piece.seen + piece.last - piece.first + 16;
    const float scale = 1.0f / std::sqrt(static_cast<float>(width));
    thread_local std::vector<float> block, scores;
    block.resize(QUERIES * width);
    scores.resize(QUERIES * stride);
    for (int64_t n = piece.first; n < piece.last; n += QUERIES) {
        const int64_t count = std::min<int64_t>(QUERIES, piece.last - n), end = n + count;
        for (int64_t i = 0; i < QUERIES; ++i)
            for (int64_t c = 0; c < width; ++c)
                block[i * width + c] = i < count ? queries[(n + i) * spec.queries[0] + c] * scale : 0;
        piece.visit_keys(end, [&](int64_t first, int64_t last, int64_t offset) {
            multiply_keys<WIDTH>(block.data(), keys, spec, first, last, scores.data() + offset, stride);
        });
        const int64_t padded = (piece.seen + end - piece.first + 15) / 16 * 16;
        for (int64_t i = 0; i < QUERIES; ++i) {  // hide later tokens of the block, and padding
            float* row = scores.data() + i * stride;
            std::fill(row + piece.seen + std::min(n + i + 1, end) - piece.first, row + padded, -INFINITY);
        }
        float factors[QUERIES];
        softmax_terms(scores.data(), stride, padded, factors);
        for (int64_t c = 0; c < width; c += 16 * VECTORS) {
            __m512 sums[QUERIES][VECTORS] = {};
            const int64_t columns = std::min<int64_t>(width - c, 16 * VECTORS);
            piece.visit_keys(end, [&](int64_t first, int64_t last, int64_t offset) {
                add_values(scores.data() + offset, stride, values + c, spec.values[0], columns, first, last, sums);
            });
            for (int64_t i = 0; i < count; ++i)
                for (int v = 0; 16 * v < columns; ++v)
                    _mm512_mask_storeu_ps(out + (n + i) * spec.heads * width + c + 16 * v,
                                          first_lanes(columns - 16 * v),
                                          _mm512_mul_ps(sums[i][v], _mm512_set1_ps(factors[i])));
        }
    }
}

}  // namespace

extern "C" {

// Computes attention, with scores scaled by 1/sqrt(K), for the pieces of a sequence. Each token of a piece sees the
// tokens of the piece's ranges, the earlier tokens of the piece, and itself.
//
// queries, keys and values are (N,H,K) with any strides of tokens and heads; `transposed` is scratch for (H,K,N) and 16
// more elements; out (N,H,K) is contiguous. A row of pieces (P,4) has the first token of a piece, the one after its
// last, the first of its ranges (M,2), and the one after the last.
void prefix_attention(const Attention* spec, const float* queries, const float* keys, const float* values,
                      float* transposed, const int64_t* pieces, int64_t num_pieces, const int64_t* ranges, float* out,
                      int threads) {
    const int64_t tokens = spec->tokens, heads = spec->heads, width = spec->width;
    const auto attend_head = width == 8 ? attend<8> : width == 16 ? attend<16> : width == 32 ? attend<32> : attend<0>;
#pragma omp parallel num_threads(threads)
    {
        const FlushDenormals flush;
#pragma omp for collapse(2)
        for (int64_t h = 0; h < heads; ++h)
            for (int64_t first = 0; first < tokens; first += 64)
                for (int64_t c = 0; c < width; ++c)
                    for (int64_t n = first; n < std::min(first + 64, tokens); ++n)
                        transposed[(h * width + c) * tokens + n] = keys[n * spec->keys[0] + h * spec->keys[1] + c];
#pragma omp for collapse(2) schedule(dynamic, 4)
        for (int64_t p = 0; p < num_pieces; ++p)
            for (int64_t h = 0; h < heads; ++h) {
                const int64_t* row = pieces + 4 * p;
                Piece piece{row[0], row[1], row[3] - row[2], ranges + 2 * row[2], 0};
                for (int64_t r = 2 * row[2]; r < 2 * row[3]; r += 2) piece.seen += ranges[r + 1] - ranges[r];
                attend_head(*spec, piece, queries + h * spec->queries[1], transposed + h * width * tokens,
                       values + h * spec->values[1], out + h * width);
            }
    }
}

struct Rotation {
    int64_t batch, length, heads, width;  // B, T, H, K
    int64_t x[3], angles[3];              // strides of the first three dimensions, in elements
};

// Rotates the pairs (i, i + K/2) of features of x (B,T,H,K) by angles whose cos and sin are (B,T,H,K/2). out is
// contiguous.
void rotate_halves(const Rotation* spec, const float* x, const float* cos, const float* sin, float* out, int threads) {
    const int64_t half = spec->width / 2;
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < spec->batch * spec->length; ++row)
        for (int64_t h = 0; h < spec->heads; ++h) {
            const int64_t b = row / spec->length, t = row % spec->length;
            const float* from = x + b * spec->x[0] + t * spec->x[1] + h * spec->x[2];
            const int64_t angle = b * spec->angles[0] + t * spec->angles[1] + h * spec->angles[2];
            float* to = out + (row * spec->heads + h) * spec->width;
            for (int64_t c = 0; c < half; c += 16) {
                const __mmask16 lanes = first_lanes(half - c);
                const __m512 cosine = _mm512_maskz_loadu_ps(lanes, cos + angle + c);
                const __m512 sine = _mm512_maskz_loadu_ps(lanes, sin + angle + c);
                const __m512 first = _mm512_maskz_loadu_ps(lanes, from + c);
                const __m512 second = _mm512_maskz_loadu_ps(lanes, from + half + c);
                const __m512 new_first = _mm512_fnmadd_ps(second, sine, _mm512_mul_ps(first, cosine));
                const __m512 new_second = _mm512_fmadd_ps(first, sine, _mm512_mul_ps(second, cosine));
                _mm512_mask_storeu_ps(to + c, lanes, new_first);
                _mm512_mask_storeu_ps(to + half + c, lanes, new_second);
            }
        }
}

// Continues the softmax statistics of R rows with a tile of their logits (R,C), whose first column is `first`: the
// maximum, its first column, and the sum of exp(logit - maximum). Also copies the logits of the columns `targets`,
// which are targets[starts[r]] to targets[starts[r + 1] - 1] for row r.
void add_scores(const float* logits, int64_t rows, int64_t columns, int64_t first, float* maxima, int64_t* tokens,
                float* sums, const int64_t* starts, const int64_t* targets, float* target_logits, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t r = 0; r < rows; ++r) {
        const FlushDenormals flush;
        const float* row = logits + r * columns;
        const float tile_max = max_of(row, columns);
        if (tile_max > maxima[r]) {
            sums[r] *= std::exp(maxima[r] - tile_max);
            maxima[r] = tile_max;
            tokens[r] = first + (std::find(row, row + columns, tile_max) - row);
        }
        sums[r] += sum_of_exp(row, columns, maxima[r]);
        for (int64_t i = starts[r]; i < starts[r + 1]; ++i)
            if (targets[i] >= first && targets[i] < first + columns) target_logits[i] = row[targets[i] - first];
    }
}

}  // extern "C"
