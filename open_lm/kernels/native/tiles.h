// Tiles of the matrix units (AMX), 1024 bytes each, and functions that load rows of a head into tiles and store them.
//
// Heads have width HEAD_WIDTH. There are three kinds of tiles:
//   A  16 rows x 32 columns of bfloat16, row by row
//   B  32 rows x 16 columns of bfloat16, in pairs of rows: 16 lines of 16 x (even row, odd row)
//   C  16 rows x 16 columns of float32
// Transposing 16 x 16 words of 32 bits turns an A tile of a matrix into a B tile of its transpose.
//
// Legend: W head width.

#pragma once

#include <algorithm>
#include <cstdint>

#include "vectors.h"

namespace {  // one process loads libraries for several head widths

constexpr int W = HEAD_WIDTH;
constexpr int STEPS = (W + 31) / 32;    // tiles of a head as the inner dimension of a product
constexpr int COLUMNS = (W + 15) / 16;  // tiles of a head as an outer dimension of a product

struct alignas(64) Operand { uint16_t at[16][32]; };
struct alignas(64) Sums { float at[16][16]; };

// The rows of one head: W bfloat16 values per token, `stride` elements apart.
struct Rows {
    uint16_t* first;
    int64_t stride, length;
    uint16_t* token(int64_t t) const { return first + t * stride; }
};

struct alignas(64) TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Configures full tiles in this thread for the lifetime of the object. Other libraries use tiles in the same threads.
class TileScope {
  public:
    TileScope() {
        const TileShapes full;
        _tile_storeconfig(&saved_);
        _tile_loadconfig(&full);
    }
    ~TileScope() { _tile_loadconfig(&saved_); }

  private:
    TileShapes saved_;
};

// sums[m][n] (+)= a[m][:] @ b[:][n] for M x N tiles (M and N are 1 or 2), over `steps` tiles. The other numbers are the
// strides in tiles.
template <int M, int N>
inline void multiply(Sums* sums, int sums_row, const Operand* a, int a_row, int a_step, const Operand* b,
                     int b_column, int b_step, int steps, bool add) {
    if (add) {
        _tile_loadd(0, sums, 64);
        if (N > 1) _tile_loadd(1, sums + 1, 64);
        if (M > 1) _tile_loadd(2, sums + sums_row, 64);
        if (M > 1 && N > 1) _tile_loadd(3, sums + sums_row + 1, 64);
    } else {
        _tile_zero(0);
        if (N > 1) _tile_zero(1);
        if (M > 1) _tile_zero(2);
        if (M > 1 && N > 1) _tile_zero(3);
    }
    for (int s = 0; s < steps; ++s) {
        _tile_loadd(4, a + s * a_step, 64);
        _tile_loadd(6, b + s * b_step, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (N > 1) {
            _tile_loadd(7, b + s * b_step + b_column, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (M > 1) {
            _tile_loadd(5, a + s * a_step + a_row, 64);
            _tile_dpbf16ps(2, 5, 6);
            if (N > 1) _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums, 64);
    if (N > 1) _tile_stored(1, sums + 1, 64);
    if (M > 1) _tile_stored(2, sums + sums_row, 64);
    if (M > 1 && N > 1) _tile_stored(3, sums + sums_row + 1, 64);
}

// Mask of the lanes of a row of W elements from `column` on, at most `lanes`.
inline uint32_t lanes_from(int column, int lanes) { return first_lanes(std::min(W - column, lanes)); }

// Loads 16 tokens from `t` on into A tiles [STEPS], one row per token.
inline void load_rows(const Rows& rows, int64_t t, Operand* to) {
    for (int step = 0; step < STEPS; ++step)
        for (int i = 0; i < 16; ++i) {
            uint32_t lanes = t + i < rows.length ? lanes_from(32 * step, 32) : 0;
            __m512i row = _mm512_maskz_loadu_epi16(lanes, rows.token(t + i) + 32 * step);
            _mm512_store_si512(to[step].at[i], row);
        }
}

// Loads 16 tokens from `t` on into B tiles [STEPS], one column per token.
inline void load_columns(const Rows& rows, int64_t t, Operand* to) {
    Operand row_tiles[STEPS];
    load_rows(rows, t, row_tiles);
    for (int step = 0; step < STEPS; ++step) transpose_words(&row_tiles[step], &to[step]);
}

// Loads 32 tokens from `t` on into B tiles [COLUMNS], one row per token.
inline void load_pairs(const Rows& rows, int64_t t, Operand* to) {
    for (int column = 0; column < COLUMNS; ++column)
        for (int i = 0; i < 16; ++i) {
            const uint16_t lanes = lanes_from(16 * column, 16);
            __m512i half[2];
            for (int odd = 0; odd < 2; ++odd) {
                const int64_t token = t + 2 * i + odd;
                const __mmask16 valid = token < rows.length ? lanes : 0;
                half[odd] = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(valid, rows.token(token) + 16 * column));
            }
            _mm512_store_si512(to[column].at[i], pair_words(half[0], half[1]));
        }
}

// Loads 32 tokens from `t` on into A tiles [COLUMNS], one column per token.
inline void load_transposed(const Rows& rows, int64_t t, Operand* to) {
    Operand pairs[COLUMNS];
    load_pairs(rows, t, pairs);
    for (int column = 0; column < COLUMNS; ++column) transpose_words(&pairs[column], &to[column]);
}

// Stores sums (16 tokens x 16 columns of W) times `factor` as rows of bfloat16 from token `t` on.
inline void store_rows(const Sums& sums, __m512 factor, const Rows& to, int64_t t, int column) {
    const __mmask16 lanes = lanes_from(column, 16);
    for (int i = 0; i < 16 && t + i < to.length; ++i) {
        const __m512 row = _mm512_mul_ps(_mm512_load_ps(sums.at[i]), factor);
        _mm256_mask_storeu_epi16(to.token(t + i) + column, lanes, narrow(row));
    }
}

// Stores sums (16 columns of W x 16 tokens) times each token's `factor` as rows of bfloat16 from token `t` on.
inline void store_columns(const Sums& sums, __m512 factor, const Rows& to, int64_t t, int column) {
    Sums scaled, rows;
    for (int i = 0; i < 16; ++i) _mm512_store_ps(scaled.at[i], _mm512_mul_ps(_mm512_load_ps(sums.at[i]), factor));
    transpose_words(&scaled, &rows);
    store_rows(rows, _mm512_set1_ps(1.0f), to, t, column);
}

}  // namespace
