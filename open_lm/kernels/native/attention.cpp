// Causal softmax attention inside documents and its gradients, in bfloat16, on the matrix units (AMX) of x86-64.
//
// The way through memory is FlashAttention's (Dao et al. 2022, https://arxiv.org/abs/2205.14135; going back with keys
// outside and queries inside, Dao 2023, https://arxiv.org/abs/2307.08691): scores exist in small blocks alone, which
// never leave the first-level cache. They are computed transposed, a row for each key and a lane for each query: the
// softmax's maximum and sum go down the rows with no step across lanes, and what belongs to a query is one vector.
//
// Compiled for one head width, HEAD_WIDTH. Legend: B batch, T tokens, H heads, W head width. A, B and C are tiles, see
// tiles.h.

#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "tiles.h"

namespace {

constexpr int TOKENS = 32;          // tokens of a block, two tiles
constexpr int FORWARD_BLOCKS = 4;   // blocks of keys whose scores are held at once, going forward
constexpr int BACKWARD_BLOCKS = 4;  // blocks of queries that a block of keys takes at once, going back
constexpr float NEVER = -INFINITY;  // score of a key that may not be seen
constexpr float LOWEST = -1e30f;    // where a running maximum starts

// scores [2][2] of keys [2][STEPS] for queries [2][STEPS].
inline void score(Sums* scores, const Operand* keys, const Operand* queries) {
    multiply<2, 2>(scores, 2, keys, STEPS, 1, queries, STEPS, 1, STEPS, false);
}

// sums [COLUMNS][2] of queries, transposed, (+)= a [steps][COLUMNS] @ b [steps][2].
inline void sum_over_keys(Sums* sums, const Operand* a, const Operand* b, int steps, bool add) {
    for (int c = 0; c + 1 < COLUMNS; c += 2) multiply<2, 2>(sums + 2 * c, 2, a + c, 1, COLUMNS, b, 1, 2, steps, add);
    if (COLUMNS % 2) multiply<1, 2>(sums + 2 * COLUMNS - 2, 2, a + COLUMNS - 1, 1, COLUMNS, b, 1, 2, steps, add);
}

// sums [2][COLUMNS] of keys (+)= a [2][BACKWARD_BLOCKS], of which `steps` are there, @ b [steps][COLUMNS].
inline void sum_over_queries(Sums* sums, const Operand* a, const Operand* b, int steps, bool add) {
    for (int c = 0; c + 1 < COLUMNS; c += 2)
        multiply<2, 2>(sums + c, COLUMNS, a, BACKWARD_BLOCKS, 1, b + c, 1, COLUMNS, steps, add);
    if (COLUMNS % 2)
        multiply<2, 1>(sums + COLUMNS - 1, COLUMNS, a, BACKWARD_BLOCKS, 1, b + COLUMNS - 1, 1, COLUMNS, steps, add);
}

// ---- elements ------------------------------------------------------------------------------------------------------

// Hides from scores [2 tiles of keys][2 tiles of queries] the keys that come after a query or before its document.
// `document` holds the first token of each of these queries' documents.
inline void hide(Sums* scores, int key, int query, const int32_t* document) {
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    for (int j = 0; j < 2; ++j) {
        const __m512i last = _mm512_add_epi32(lanes, _mm512_set1_epi32(query + 16 * j));
        const __m512i first = _mm512_loadu_si512(document + 16 * j);
        for (int i = 0; i < TOKENS; ++i) {
            const __m512i here = _mm512_set1_epi32(key + i);
            const __mmask16 seen = _mm512_cmple_epi32_mask(first, here) & _mm512_cmple_epi32_mask(here, last);
            _mm512_mask_store_ps(scores[i / 16 * 2 + j].at[i % 16], ~seen, _mm512_set1_ps(NEVER));
        }
    }
}

// The first token of each token's document, up to a whole block: from `first_tokens` [length], or 0 where it is null.
inline void load_documents(const int32_t* first_tokens, int64_t length, int64_t padded, int32_t* to) {
    for (int64_t t = 0; t < padded; ++t) to[t] = first_tokens ? first_tokens[std::min(t, length - 1)] : 0;
}

// ---- forward -------------------------------------------------------------------------------------------------------

// Running maximum and sum of the softmax of TOKENS queries, and the values' sums [COLUMNS][2] as they are so far.
struct Running {
    __m512 maximum[2], sum[2];
    Sums* out;
};

// Weights of `blocks` blocks of keys from their scores [blocks][2][2]: B tiles [blocks][2], a row for each key.
inline void soften(const Sums* scores, int blocks, float scale, Running& run, Operand* weights) {
    const __m512 by = _mm512_set1_ps(scale * LOG2E);
    for (int j = 0; j < 2; ++j) {
        __m512 top[4] = {run.maximum[j], run.maximum[j], run.maximum[j], run.maximum[j]};
        for (int tile = 0; tile < 2 * blocks; ++tile)
            for (int i = 0; i < 16; ++i)
                top[i % 4] = _mm512_max_ps(top[i % 4], _mm512_load_ps(scores[2 * tile + j].at[i]));
        const __m512 maximum = _mm512_max_ps(_mm512_max_ps(top[0], top[1]), _mm512_max_ps(top[2], top[3]));
        const __m512 offset = _mm512_mul_ps(maximum, by);
        // At most 1, also where no key was seen yet and LOWEST's rounding is all that is left.
        const __m512 fall = _mm512_min_ps(_mm512_fmsub_ps(run.maximum[j], by, offset), _mm512_setzero_ps());
        const __m512 shrink = exp2_of<4>(fall);
        __m512 sum[2] = {_mm512_mul_ps(run.sum[j], shrink), _mm512_setzero_ps()};
        for (int tile = 0; tile < 2 * blocks; ++tile)
            for (int i = 0; i < 16; i += 2) {
                __m512 weight[2];
                for (int odd = 0; odd < 2; ++odd) {
                    const __m512 score = _mm512_load_ps(scores[2 * tile + j].at[i + odd]);
                    weight[odd] = exp2_of<4>(_mm512_fmsub_ps(score, by, offset));
                    sum[odd] = _mm512_add_ps(sum[odd], weight[odd]);
                }
                void* line = weights[tile / 2 * 2 + j].at[tile % 2 * 8 + i / 2];
                _mm512_store_si512(line, interleave(weight[0], weight[1]));
            }
        for (int c = 0; c < COLUMNS; ++c)
            for (int i = 0; i < 16; ++i) {
                float* row = run.out[2 * c + j].at[i];
                _mm512_store_ps(row, _mm512_mul_ps(_mm512_load_ps(row), shrink));
            }
        run.maximum[j] = maximum;
        run.sum[j] = _mm512_add_ps(sum[0], sum[1]);
    }
}

// What one thread needs for heads of up to `blocks` blocks.
class ForwardPass {
  public:
    explicit ForwardPass(int64_t blocks)
        : keys_(blocks * 2 * STEPS), values_(blocks * COLUMNS), queries_(2 * STEPS), weights_(FORWARD_BLOCKS * 2),
          scores_(FORWARD_BLOCKS * 4), sums_(COLUMNS * 2), documents_(blocks * TOKENS) {}

    // The blocks [first, last) of queries of one head -> out, log_sums [length] (natural logarithms).
    void run(const Rows& q, const Rows& k, const Rows& v, const int32_t* first_tokens, const Rows& out,
             float* log_sums, float scale, int64_t first, int64_t last) {
        load_documents(first_tokens, q.length, last * TOKENS, documents_.data());
        for (int64_t tile = documents_[first * TOKENS] / 16; tile < 2 * last; ++tile)
            load_rows(k, 16 * tile, &keys_[tile * STEPS]);
        for (int64_t block = documents_[first * TOKENS] / TOKENS; block < last; ++block)
            load_transposed(v, TOKENS * block, &values_[block * COLUMNS]);
        for (int64_t block = first; block < last; ++block) {
            Running run{{}, {}, sums_.data()};
            for (int j = 0; j < 2; ++j) {
                load_columns(q, TOKENS * block + 16 * j, &queries_[j * STEPS]);
                run.maximum[j] = _mm512_set1_ps(LOWEST);
                run.sum[j] = _mm512_setzero_ps();
            }
            attend(block, scale, run);
            for (int j = 0; j < 2; ++j) finish(run, j, TOKENS * block + 16 * j, out, log_sums, scale);
        }
    }

  private:
    void attend(int64_t block, float scale, Running& run) {
        const int32_t* document = &documents_[block * TOKENS];
        const int64_t begin = document[0] / TOKENS;
        for (int64_t from = begin; from <= block; from += FORWARD_BLOCKS) {
            const int held = static_cast<int>(std::min<int64_t>(FORWARD_BLOCKS, block + 1 - from));
            for (int i = 0; i < held; ++i) {
                const int64_t key = from + i;
                score(&scores_[4 * i], &keys_[key * 2 * STEPS], queries_.data());
                if (key == block || TOKENS * key < document[TOKENS - 1])
                    hide(&scores_[4 * i], TOKENS * key, TOKENS * block, document);
            }
            soften(scores_.data(), held, scale, run, weights_.data());
            sum_over_keys(run.out, &values_[from * COLUMNS], weights_.data(), held, from > begin);
        }
    }

    static void finish(const Running& run, int j, int64_t t, const Rows& out, float* log_sums, float scale) {
        const __m512 share = _mm512_div_ps(_mm512_set1_ps(1.0f), run.sum[j]);
        for (int column = 0; column < COLUMNS; ++column)
            store_columns(run.out[2 * column + j], share, out, t, 16 * column);
        for (int i = 0; i < 16 && t + i < out.length; ++i)
            log_sums[t + i] = run.maximum[j][i] * scale + std::log(run.sum[j][i]);
    }

    std::vector<Operand> keys_, values_, queries_, weights_;
    std::vector<Sums> scores_, sums_;
    std::vector<int32_t> documents_;
};

// ---- backward ------------------------------------------------------------------------------------------------------

// Weights and the scores' gradients of one block of keys [2] x queries [2], from scores and the weights' gradients
// (both [2][2]): `weights` and `slopes` as A tiles [2], a row for each key, and the latter as B tiles [2] as well.
inline void differentiate(const Sums* scores, const Sums* gradients, const float* base2, const float* deltas,
                          float scale, Operand* weights, Operand* slopes, Operand* slope_pairs) {
    const __m512 by = _mm512_set1_ps(scale * LOG2E);
    const __m512 offset[2] = {_mm512_loadu_ps(base2), _mm512_loadu_ps(base2 + 16)};
    const __m512 delta[2] = {_mm512_loadu_ps(deltas), _mm512_loadu_ps(deltas + 16)};
    for (int tile = 0; tile < 2; ++tile)
        for (int i = 0; i < 16; i += 2) {
            __m512 weight[2][2], slope[2][2];
            for (int odd = 0; odd < 2; ++odd) {
                for (int j = 0; j < 2; ++j) {
                    const __m512 score = _mm512_load_ps(scores[2 * tile + j].at[i + odd]);
                    const __m512 gradient = _mm512_load_ps(gradients[2 * tile + j].at[i + odd]);
                    weight[odd][j] = exp2_of<4>(_mm512_fmsub_ps(score, by, offset[j]));
                    slope[odd][j] = _mm512_mul_ps(weight[odd][j], _mm512_sub_ps(gradient, delta[j]));
                }
                void* line = weights[BACKWARD_BLOCKS * tile].at[i + odd];
                _mm512_store_si512(line, (__m512i)_mm512_cvtne2ps_pbh(weight[odd][1], weight[odd][0]));
                line = slopes[BACKWARD_BLOCKS * tile].at[i + odd];
                _mm512_store_si512(line, (__m512i)_mm512_cvtne2ps_pbh(slope[odd][1], slope[odd][0]));
            }
            for (int j = 0; j < 2; ++j)
                _mm512_store_si512(slope_pairs[j].at[8 * tile + i / 2], interleave(slope[0][j], slope[1][j]));
        }
}

// A row's product with its gradient, and the logarithm of its softmax's sum to base 2, for all tokens of a head.
inline void row_constants(const Rows& out, const Rows& grad, const float* log_sums, int64_t padded, float* base2,
                          float* deltas) {
    for (int64_t t = 0; t < padded; ++t) {
        __m512 sum = _mm512_setzero_ps();
        for (int column = 0; t < out.length && column < W; column += 16) {
            const __mmask16 lanes = lanes_from(column, 16);
            const __m512 value = widen(_mm256_maskz_loadu_epi16(lanes, out.token(t) + column));
            sum = _mm512_fmadd_ps(value, widen(_mm256_maskz_loadu_epi16(lanes, grad.token(t) + column)), sum);
        }
        deltas[t] = _mm512_reduce_add_ps(sum);
        base2[t] = t < out.length ? log_sums[t] * LOG2E : 0.0f;
    }
}

// What one thread needs for heads of `blocks` blocks.
class BackwardPass {
  public:
    explicit BackwardPass(int64_t blocks)
        : q_columns_(blocks * 2 * STEPS), g_columns_(blocks * 2 * STEPS), q_pairs_(blocks * COLUMNS),
          g_pairs_(blocks * COLUMNS), k_rows_(2 * STEPS), v_rows_(2 * STEPS), k_transposed_(COLUMNS),
          weights_(2 * BACKWARD_BLOCKS), slopes_(2 * BACKWARD_BLOCKS), slope_pairs_(2), scores_(4), gradients_(4),
          q_sums_(blocks * COLUMNS * 2), k_sums_(2 * COLUMNS), v_sums_(2 * COLUMNS), base2_(blocks * TOKENS),
          deltas_(blocks * TOKENS), documents_(blocks * TOKENS), blocks_(blocks) {}

    // One head: from what the forward pass took and gave, and the gradients of `out`, the gradients of q, k and v.
    void run(const Rows& q, const Rows& k, const Rows& v, const int32_t* first_tokens, const Rows& out,
             const Rows& grad, const float* log_sums, float scale, const Rows& dq, const Rows& dk,
             const Rows& dv) {
        load_documents(first_tokens, q.length, blocks_ * TOKENS, documents_.data());
        row_constants(out, grad, log_sums, blocks_ * TOKENS, base2_.data(), deltas_.data());
        for (int64_t tile = 0; tile < 2 * blocks_; ++tile) {
            load_columns(q, 16 * tile, &q_columns_[tile * STEPS]);
            load_columns(grad, 16 * tile, &g_columns_[tile * STEPS]);
        }
        for (int64_t block = 0; block < blocks_; ++block) {
            load_pairs(q, TOKENS * block, &q_pairs_[block * COLUMNS]);
            load_pairs(grad, TOKENS * block, &g_pairs_[block * COLUMNS]);
        }
        const __m512 factor = _mm512_set1_ps(scale), one = _mm512_set1_ps(1.0f);
        for (int64_t key = 0; key < blocks_; ++key) {
            for (int i = 0; i < 2; ++i) {
                load_rows(k, TOKENS * key + 16 * i, &k_rows_[i * STEPS]);
                load_rows(v, TOKENS * key + 16 * i, &v_rows_[i * STEPS]);
            }
            load_transposed(k, TOKENS * key, k_transposed_.data());
            go_back(key, scale);
            for (int tile = 0; tile < 2 * COLUMNS; ++tile) {
                const int64_t t = TOKENS * key + tile / COLUMNS * 16;
                store_rows(k_sums_[tile], factor, dk, t, tile % COLUMNS * 16);
                store_rows(v_sums_[tile], one, dv, t, tile % COLUMNS * 16);
            }
        }
        for (int64_t tile = 0; tile < blocks_ * COLUMNS * 2; ++tile) {
            const int64_t t = tile / (2 * COLUMNS) * TOKENS + tile % 2 * 16;
            store_columns(q_sums_[tile], factor, dq, t, tile / 2 % COLUMNS * 16);
        }
    }

  private:
    // One block of keys and all blocks of queries that see any of it.
    void go_back(int64_t key, float scale) {
        int64_t end = key;
        while (end < blocks_ && documents_[TOKENS * end] < TOKENS * (key + 1)) ++end;
        for (int64_t from = key; from < end; from += BACKWARD_BLOCKS) {
            const int held = static_cast<int>(std::min<int64_t>(BACKWARD_BLOCKS, end - from));
            for (int i = 0; i < held; ++i) {
                const int64_t query = from + i;
                const int32_t* document = &documents_[TOKENS * query];
                score(scores_.data(), k_rows_.data(), &q_columns_[query * 2 * STEPS]);
                score(gradients_.data(), v_rows_.data(), &g_columns_[query * 2 * STEPS]);
                if (query == key || TOKENS * key < document[TOKENS - 1])
                    hide(scores_.data(), TOKENS * key, TOKENS * query, document);
                differentiate(scores_.data(), gradients_.data(), &base2_[TOKENS * query], &deltas_[TOKENS * query],
                              scale, &weights_[i], &slopes_[i], slope_pairs_.data());
                const bool add = key > document[0] / TOKENS;
                sum_over_keys(&q_sums_[query * COLUMNS * 2], k_transposed_.data(), slope_pairs_.data(), 1, add);
            }
            sum_over_queries(v_sums_.data(), weights_.data(), &g_pairs_[from * COLUMNS], held, from > key);
            sum_over_queries(k_sums_.data(), slopes_.data(), &q_pairs_[from * COLUMNS], held, from > key);
        }
    }

    std::vector<Operand> q_columns_, g_columns_, q_pairs_, g_pairs_, k_rows_, v_rows_, k_transposed_, weights_,
        slopes_, slope_pairs_;
    std::vector<Sums> scores_, gradients_;
    std::vector<Sums> q_sums_;  // [blocks][COLUMNS][2], transposed
    std::vector<Sums> k_sums_, v_sums_;  // [2][COLUMNS]
    std::vector<float> base2_, deltas_;
    std::vector<int32_t> documents_;
    int64_t blocks_;
};

}  // namespace

// A (B,T,H,W) tensor of bfloat16 whose last dimension is contiguous; strides in elements.
struct View {
    uint16_t* data;
    int64_t batch_stride, token_stride, head_stride;
    Rows rows(int64_t b, int64_t h, int64_t length) const {
        return {data + b * batch_stride + h * head_stride, token_stride, length};
    }
};

struct Shape {
    int64_t batch, length, heads;
    int32_t threads;
    float scale;
    int64_t blocks() const { return (length + TOKENS - 1) / TOKENS; }
    const int32_t* row(const int32_t* first_tokens, int64_t b) const {
        return first_tokens ? first_tokens + b * length : nullptr;
    }
};

extern "C" {

// Asks the system for the use of tiles by this process; 0 if they may be used.
int allow_tiles() {
    constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    return static_cast<int>(syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA));
}

// first_tokens (B,T) int32, never falling along T, or null; log_sums (B,H,T) float32.
void forward(const Shape* shape, const View* q, const View* k, const View* v, const int32_t* first_tokens,
             const View* out, float* log_sums) {
    const int64_t heads = shape->batch * shape->heads, blocks = shape->blocks(), length = shape->length;
    // Where there are fewer heads than threads, the queries of each are shared out, those with most keys first.
    const int64_t parts = heads >= shape->threads ? 1 : std::min<int64_t>(blocks, 4 * shape->threads / heads);
#pragma omp parallel num_threads(shape->threads)
    {
        const FullTiles tiles;
        const TinyIsZero tiny;
        ForwardPass pass(blocks);
#pragma omp for schedule(dynamic)
        for (int64_t unit = 0; unit < heads * parts; ++unit) {
            const int64_t head = unit / parts, part = parts - 1 - unit % parts;
            const int64_t b = head / shape->heads, h = head % shape->heads;
            pass.run(q->rows(b, h, length), k->rows(b, h, length), v->rows(b, h, length), shape->row(first_tokens, b),
                     out->rows(b, h, length), log_sums + head * length, shape->scale, blocks * part / parts,
                     blocks * (part + 1) / parts);
        }
    }
}

void backward(const Shape* shape, const View* q, const View* k, const View* v, const int32_t* first_tokens,
              const View* out, const View* grad, const float* log_sums, const View* dq, const View* dk,
              const View* dv) {
    const int64_t heads = shape->batch * shape->heads, length = shape->length;
#pragma omp parallel num_threads(shape->threads)
    {
        const FullTiles tiles;
        const TinyIsZero tiny;
        BackwardPass pass(shape->blocks());
#pragma omp for schedule(dynamic)
        for (int64_t head = 0; head < heads; ++head) {
            const int64_t b = head / shape->heads, h = head % shape->heads;
            pass.run(q->rows(b, h, length), k->rows(b, h, length), v->rows(b, h, length), shape->row(first_tokens, b),
                     out->rows(b, h, length), grad->rows(b, h, length), log_sums + head * length, shape->scale,
                     dq->rows(b, h, length), dk->rows(b, h, length), dv->rows(b, h, length));
        }
    }
}

}  // extern "C"
