// Causal softmax attention within documents and its gradients, in bfloat16, on the matrix units (AMX) of x86-64.
//
// The algorithm is FlashAttention (Dao et al. 2022, https://arxiv.org/abs/2205.14135; the backward pass loops over keys
// outside and queries inside, Dao 2023, https://arxiv.org/abs/2307.08691): scores exist only in small blocks, which
// never leave the first-level cache. Scores are computed transposed, one row per key and one lane per query. The
// softmax's maximum and sum thus run down the rows without steps across lanes, and per-query values form one vector.
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

constexpr int TOKENS = 32;           // tokens of a block: two tiles
constexpr int FORWARD_BLOCKS = 4;    // blocks of keys processed together in the forward pass
constexpr int BACKWARD_BLOCKS = 4;   // blocks of queries processed together in the backward pass
constexpr float MASKED = -INFINITY;  // score of a masked key
constexpr float LOWEST = -1e30f;     // initial value of a running maximum

// scores [2][2] of keys [2][STEPS] for queries [2][STEPS].
inline void score(Sums* scores, const Operand* keys, const Operand* queries) {
    multiply<2, 2>(scores, 2, keys, STEPS, 1, queries, STEPS, 1, STEPS, false);
}

// sums [COLUMNS][2] of queries, transposed, (+)= a [steps][COLUMNS] @ b [steps][2].
inline void sum_over_keys(Sums* sums, const Operand* a, const Operand* b, int steps, bool add) {
    for (int c = 0; c + 1 < COLUMNS; c += 2) multiply<2, 2>(sums + 2 * c, 2, a + c, 1, COLUMNS, b, 1, 2, steps, add);
    if (COLUMNS % 2) multiply<1, 2>(sums + 2 * COLUMNS - 2, 2, a + COLUMNS - 1, 1, COLUMNS, b, 1, 2, steps, add);
}

// sums [2][COLUMNS] of keys (+)= a [2][BACKWARD_BLOCKS], of which `steps` are valid, @ b [steps][COLUMNS].
inline void sum_over_queries(Sums* sums, const Operand* a, const Operand* b, int steps, bool add) {
    for (int c = 0; c + 1 < COLUMNS; c += 2)
        multiply<2, 2>(sums + c, COLUMNS, a, BACKWARD_BLOCKS, 1, b + c, 1, COLUMNS, steps, add);
    if (COLUMNS % 2)
        multiply<2, 1>(sums + COLUMNS - 1, COLUMNS, a, BACKWARD_BLOCKS, 1, b + COLUMNS - 1, 1, COLUMNS, steps, add);
}

// ---- elements ------------------------------------------------------------------------------------------------------

// Masks, in scores [2 tiles of keys][2 tiles of queries], the keys after a query and those before its document.
// `starts` holds the start of each query's document.
inline void mask_scores(Sums* scores, int key, int query, const int32_t* starts) {
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    for (int j = 0; j < 2; ++j) {
        const __m512i last = _mm512_add_epi32(lanes, _mm512_set1_epi32(query + 16 * j));
        const __m512i first = _mm512_loadu_si512(starts + 16 * j);
        for (int i = 0; i < TOKENS; ++i) {
            const __m512i index = _mm512_set1_epi32(key + i);
            const __mmask16 visible = _mm512_cmple_epi32_mask(first, index) & _mm512_cmple_epi32_mask(index, last);
            _mm512_mask_store_ps(scores[i / 16 * 2 + j].at[i % 16], ~visible, _mm512_set1_ps(MASKED));
        }
    }
}

// Copies document_starts [length] to `to`, padded to full blocks. Writes 0 if it is null.
inline void load_starts(const int32_t* document_starts, int64_t length, int64_t padded, int32_t* to) {
    for (int64_t t = 0; t < padded; ++t) to[t] = document_starts ? document_starts[std::min(t, length - 1)] : 0;
}

// ---- forward -------------------------------------------------------------------------------------------------------

// Running softmax maximum and sum of TOKENS queries, and the running weighted sums of values [COLUMNS][2].
struct Running {
    __m512 maximum[2], sum[2];
    Sums* out;
};

// Converts scores [blocks][2][2] of keys to softmax weights, as B tiles [blocks][2] with one row per key, and rescales
// the running sums.
inline void update_softmax(const Sums* scores, int blocks, float scale, Running& run, Operand* weights) {
    const __m512 scale2 = _mm512_set1_ps(scale * LOG2E);  // for exponentials to base 2
    for (int j = 0; j < 2; ++j) {
        __m512 maxima[4] = {run.maximum[j], run.maximum[j], run.maximum[j], run.maximum[j]};
        for (int tile = 0; tile < 2 * blocks; ++tile)
            for (int i = 0; i < 16; ++i)
                maxima[i % 4] = _mm512_max_ps(maxima[i % 4], _mm512_load_ps(scores[2 * tile + j].at[i]));
        const __m512 maximum = _mm512_max_ps(_mm512_max_ps(maxima[0], maxima[1]), _mm512_max_ps(maxima[2], maxima[3]));
        const __m512 offset = _mm512_mul_ps(maximum, scale2);
        // Keep the factor at most 1: before the first visible key the difference is only the rounding error of LOWEST.
        const __m512 decrease = _mm512_min_ps(_mm512_fmsub_ps(run.maximum[j], scale2, offset), _mm512_setzero_ps());
        const __m512 rescale = exp2_of<4>(decrease);
        __m512 sum[2] = {_mm512_mul_ps(run.sum[j], rescale), _mm512_setzero_ps()};
        for (int tile = 0; tile < 2 * blocks; ++tile)
            for (int i = 0; i < 16; i += 2) {
                __m512 weight[2];
                for (int odd = 0; odd < 2; ++odd) {
                    const __m512 score = _mm512_load_ps(scores[2 * tile + j].at[i + odd]);
                    weight[odd] = exp2_of<4>(_mm512_fmsub_ps(score, scale2, offset));
                    sum[odd] = _mm512_add_ps(sum[odd], weight[odd]);
                }
                void* line = weights[tile / 2 * 2 + j].at[tile % 2 * 8 + i / 2];
                _mm512_store_si512(line, interleave(weight[0], weight[1]));
            }
        for (int c = 0; c < COLUMNS; ++c)
            for (int i = 0; i < 16; ++i) {
                float* row = run.out[2 * c + j].at[i];
                _mm512_store_ps(row, _mm512_mul_ps(_mm512_load_ps(row), rescale));
            }
        run.maximum[j] = maximum;
        run.sum[j] = _mm512_add_ps(sum[0], sum[1]);
    }
}

// The buffers of one thread for heads of up to `blocks` blocks.
class ForwardPass {
  public:
    explicit ForwardPass(int64_t blocks)
        : keys_(blocks * 2 * STEPS), values_(blocks * COLUMNS), queries_(2 * STEPS), weights_(FORWARD_BLOCKS * 2),
          scores_(FORWARD_BLOCKS * 4), sums_(COLUMNS * 2), starts_(blocks * TOKENS) {}

    // Computes out and log_sums [length] (natural logarithms) for the blocks [first, last) of queries of one head.
    void run(const Rows& q, const Rows& k, const Rows& v, const int32_t* document_starts, const Rows& out,
             float* log_sums, float scale, int64_t first, int64_t last) {
        load_starts(document_starts, q.length, last * TOKENS, starts_.data());
        for (int64_t tile = starts_[first * TOKENS] / 16; tile < 2 * last; ++tile)
            load_rows(k, 16 * tile, &keys_[tile * STEPS]);
        for (int64_t block = starts_[first * TOKENS] / TOKENS; block < last; ++block)
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
        const int32_t* starts = &starts_[block * TOKENS];
        const int64_t begin = starts[0] / TOKENS;
        for (int64_t from = begin; from <= block; from += FORWARD_BLOCKS) {
            const int count = static_cast<int>(std::min<int64_t>(FORWARD_BLOCKS, block + 1 - from));
            for (int i = 0; i < count; ++i) {
                const int64_t key = from + i;
                score(&scores_[4 * i], &keys_[key * 2 * STEPS], queries_.data());
                if (key == block || TOKENS * key < starts[TOKENS - 1])
                    mask_scores(&scores_[4 * i], TOKENS * key, TOKENS * block, starts);
            }
            update_softmax(scores_.data(), count, scale, run, weights_.data());
            sum_over_keys(run.out, &values_[from * COLUMNS], weights_.data(), count, from > begin);
        }
    }

    static void finish(const Running& run, int j, int64_t t, const Rows& out, float* log_sums, float scale) {
        const __m512 inverse_sum = _mm512_div_ps(_mm512_set1_ps(1.0f), run.sum[j]);
        for (int column = 0; column < COLUMNS; ++column)
            store_columns(run.out[2 * column + j], inverse_sum, out, t, 16 * column);
        for (int i = 0; i < 16 && t + i < out.length; ++i)
            log_sums[t + i] = run.maximum[j][i] * scale + std::log(run.sum[j][i]);
    }

    std::vector<Operand> keys_, values_, queries_, weights_;
    std::vector<Sums> scores_, sums_;
    std::vector<int32_t> starts_;
};

// ---- backward ------------------------------------------------------------------------------------------------------

// Computes the softmax weights and the gradients of scores of one block of keys [2] x queries [2], from scores and
// gradients of weights (both [2][2]). `weights` and `score_grads` are A tiles [2] with one row per key;
// `score_grad_pairs` are the latter as B tiles [2].
inline void differentiate(const Sums* scores, const Sums* gradients, const float* base2, const float* deltas,
                          float scale, Operand* weights, Operand* score_grads, Operand* score_grad_pairs) {
    const __m512 scale2 = _mm512_set1_ps(scale * LOG2E);  // for exponentials to base 2
    const __m512 offset[2] = {_mm512_loadu_ps(base2), _mm512_loadu_ps(base2 + 16)};
    const __m512 delta[2] = {_mm512_loadu_ps(deltas), _mm512_loadu_ps(deltas + 16)};
    for (int tile = 0; tile < 2; ++tile)
        for (int i = 0; i < 16; i += 2) {
            __m512 weight[2][2], score_grad[2][2];
            for (int odd = 0; odd < 2; ++odd) {
                for (int j = 0; j < 2; ++j) {
                    const __m512 score = _mm512_load_ps(scores[2 * tile + j].at[i + odd]);
                    const __m512 gradient = _mm512_load_ps(gradients[2 * tile + j].at[i + odd]);
                    weight[odd][j] = exp2_of<4>(_mm512_fmsub_ps(score, scale2, offset[j]));
                    score_grad[odd][j] = _mm512_mul_ps(weight[odd][j], _mm512_sub_ps(gradient, delta[j]));
                }
                void* line = weights[BACKWARD_BLOCKS * tile].at[i + odd];
                _mm512_store_si512(line, (__m512i)_mm512_cvtne2ps_pbh(weight[odd][1], weight[odd][0]));
                line = score_grads[BACKWARD_BLOCKS * tile].at[i + odd];
                _mm512_store_si512(line, (__m512i)_mm512_cvtne2ps_pbh(score_grad[odd][1], score_grad[odd][0]));
            }
            for (int j = 0; j < 2; ++j)
                _mm512_store_si512(score_grad_pairs[j].at[8 * tile + i / 2],
                                   interleave(score_grad[0][j], score_grad[1][j]));
        }
}

// For all tokens of a head: the dot product of out with its gradient, and the base-2 logarithm of the softmax's sum.
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

// The buffers of one thread for heads of `blocks` blocks.
class BackwardPass {
  public:
    explicit BackwardPass(int64_t blocks)
        : q_columns_(blocks * 2 * STEPS), g_columns_(blocks * 2 * STEPS), q_pairs_(blocks * COLUMNS),
          g_pairs_(blocks * COLUMNS), k_rows_(2 * STEPS), v_rows_(2 * STEPS), k_transposed_(COLUMNS),
          weights_(2 * BACKWARD_BLOCKS), score_grads_(2 * BACKWARD_BLOCKS), score_grad_pairs_(2), scores_(4),
          gradients_(4), q_sums_(blocks * COLUMNS * 2), k_sums_(2 * COLUMNS), v_sums_(2 * COLUMNS),
          base2_(blocks * TOKENS), deltas_(blocks * TOKENS), starts_(blocks * TOKENS), blocks_(blocks) {}

    // Computes the gradients of q, k and v of one head from the forward pass's operands and results and the gradient of
    // `out`.
    void run(const Rows& q, const Rows& k, const Rows& v, const int32_t* document_starts, const Rows& out,
             const Rows& grad, const float* log_sums, float scale, const Rows& dq, const Rows& dk,
             const Rows& dv) {
        load_starts(document_starts, q.length, blocks_ * TOKENS, starts_.data());
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
            process_keys(key, scale);
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
    // Processes one block of keys and all blocks of queries that attend to any of it.
    void process_keys(int64_t key, float scale) {
        int64_t end = key;
        while (end < blocks_ && starts_[TOKENS * end] < TOKENS * (key + 1)) ++end;
        for (int64_t from = key; from < end; from += BACKWARD_BLOCKS) {
            const int count = static_cast<int>(std::min<int64_t>(BACKWARD_BLOCKS, end - from));
            for (int i = 0; i < count; ++i) {
                const int64_t query = from + i;
                const int32_t* starts = &starts_[TOKENS * query];
                score(scores_.data(), k_rows_.data(), &q_columns_[query * 2 * STEPS]);
                score(gradients_.data(), v_rows_.data(), &g_columns_[query * 2 * STEPS]);
                if (query == key || TOKENS * key < starts[TOKENS - 1])
                    mask_scores(scores_.data(), TOKENS * key, TOKENS * query, starts);
                differentiate(scores_.data(), gradients_.data(), &base2_[TOKENS * query], &deltas_[TOKENS * query],
                              scale, &weights_[i], &score_grads_[i], score_grad_pairs_.data());
                const bool add = key > starts[0] / TOKENS;
                sum_over_keys(&q_sums_[query * COLUMNS * 2], k_transposed_.data(), score_grad_pairs_.data(), 1, add);
            }
            sum_over_queries(v_sums_.data(), weights_.data(), &g_pairs_[from * COLUMNS], count, from > key);
            sum_over_queries(k_sums_.data(), score_grads_.data(), &q_pairs_[from * COLUMNS], count, from > key);
        }
    }

    std::vector<Operand> q_columns_, g_columns_, q_pairs_, g_pairs_, k_rows_, v_rows_, k_transposed_, weights_,
        score_grads_, score_grad_pairs_;
    std::vector<Sums> scores_, gradients_;
    std::vector<Sums> q_sums_;  // [blocks][COLUMNS][2], transposed
    std::vector<Sums> k_sums_, v_sums_;  // [2][COLUMNS]
    std::vector<float> base2_, deltas_;
    std::vector<int32_t> starts_;
    int64_t blocks_;
};

}  // namespace

// A bfloat16 tensor (B,T,H,W) with a contiguous last dimension; strides in elements.
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
    const int32_t* row(const int32_t* document_starts, int64_t b) const {
        return document_starts ? document_starts + b * length : nullptr;
    }
};

extern "C" {

// Requests permission from the kernel to use tiles in this process. Returns 0 on success.
int request_tiles() {
    constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    return static_cast<int>(syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA));
}

// document_starts (B,T) int32, non-decreasing along T, or null; log_sums (B,H,T) float32.
void forward(const Shape* shape, const View* q, const View* k, const View* v, const int32_t* document_starts,
             const View* out, float* log_sums) {
    const int64_t heads = shape->batch * shape->heads, blocks = shape->blocks(), length = shape->length;
    // With fewer heads than threads, split the queries of each head and start with those that have the most keys.
    const int64_t parts = heads >= shape->threads ? 1 : std::min<int64_t>(blocks, 4 * shape->threads / heads);
#pragma omp parallel num_threads(shape->threads)
    {
        const TileScope tiles;
        const FlushDenormals flush;
        ForwardPass pass(blocks);
#pragma omp for schedule(dynamic)
        for (int64_t unit = 0; unit < heads * parts; ++unit) {
            const int64_t head = unit / parts, part = parts - 1 - unit % parts;
            const int64_t b = head / shape->heads, h = head % shape->heads;
            pass.run(q->rows(b, h, length), k->rows(b, h, length), v->rows(b, h, length),
                     shape->row(document_starts, b), out->rows(b, h, length), log_sums + head * length,
                     shape->scale, blocks * part / parts, blocks * (part + 1) / parts);
        }
    }
}

void backward(const Shape* shape, const View* q, const View* k, const View* v, const int32_t* document_starts,
              const View* out, const View* grad, const float* log_sums, const View* dq, const View* dk,
              const View* dv) {
    const int64_t heads = shape->batch * shape->heads, length = shape->length;
#pragma omp parallel num_threads(shape->threads)
    {
        const TileScope tiles;
        const FlushDenormals flush;
        BackwardPass pass(shape->blocks());
#pragma omp for schedule(dynamic)
        for (int64_t head = 0; head < heads; ++head) {
            const int64_t b = head / shape->heads, h = head % shape->heads;
            pass.run(q->rows(b, h, length), k->rows(b, h, length), v->rows(b, h, length),
                     shape->row(document_starts, b), out->rows(b, h, length), grad->rows(b, h, length),
                     log_sums + head * length, shape->scale, dq->rows(b, h, length), dk->rows(b, h, length),
                     dv->rows(b, h, length));
        }
    }
}

}  // extern "C"
