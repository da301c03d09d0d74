// Rotary self-attention over left-aligned sequences, one sample and head at a time, in a core's caches.
//
// q, k and v come as bf16 rows of one product, (B, N, 3, H, h). Products take bf16; scores, softmax and sums are fp32. Only a sample's own
// tokens are computed: what lies behind them is neither read nor written but with zeros. Sums run in a fixed order: two runs give the
// same bits.
//
// n a sample's tokens  h dim of a head  R rows of a tile  _t: transposed

#include "cpu_tiles.h"

namespace {

constexpr int64_t BLOCK = 64;  // queries whose scores are held at once
constexpr float LOG2_E = 1.44269504f, LN_2 = 0.693147181f;

struct Shape {
  int64_t num_tokens, num_heads, head_dim;
  int64_t dim() const { return num_heads * head_dim; }
};

struct Angles {  // (positions, h / 2) each
  const float *cosine, *sine;
};

// Scratch of one thread for one sample and head. Rows and columns beyond n and h are zeros.
struct Head {
  const Shape& shape;
  int64_t n = 0, h, wide;  // wide: h in whole LANES
  Halves q, k, v, grad, p_t, grad_s_t;
  Matrix probabilities_t, grad_p_t, grad_q, grad_k, grad_v;

  explicit Head(const Shape& shape) : Head(shape, round_up(shape.num_tokens, BLOCK), round_up(shape.head_dim, LANES)) {}
  Head(const Shape& shape, int64_t most, int64_t wide)
      : shape(shape), h(shape.head_dim), wide(wide), q(most, wide), k(most, wide), v(most, wide), grad(most, wide), p_t(most, BLOCK),
        grad_s_t(most, BLOCK), probabilities_t(most, BLOCK), grad_p_t(most, BLOCK), grad_q(most, wide), grad_k(most, wide),
        grad_v(most, wide) {}

  int64_t rows() const { return round_up(n, BLOCK); }
  int64_t pairs() const { return (n + 1) / 2; }

  // TURN: each pair of columns by its position's angle.
  template <bool TURN>
  void load(Halves& to, const uint16_t* from, int64_t stride, float scale, Angles angles) {
    for (int64_t i = 0; i < n; ++i) {
      const uint16_t* __restrict in = from + i * stride;
      uint32_t* __restrict out = to.across.data() + i * wide / 2;
      const float *__restrict cosine = angles.cosine + i * h / 2, *__restrict sine = angles.sine + i * h / 2;
      for (int64_t c = 0; c < h / 2; ++c) {
        uint32_t pair;
        std::memcpy(&pair, in + 2 * c, 4);
        float a = as_float(pair << 16) * scale, b = as_float(pair & 0xffff0000) * scale;
        out[c] = TURN ? as_bf16(a * cosine[c] - b * sine[c]) | as_bf16(a * sine[c] + b * cosine[c]) << 16 : pair;
      }
    }
    to.clear(n, rows());
  }

  // TURN: back by the angle, which is what the gradient of turned values is to the values before.
  template <bool TURN>
  void store(uint16_t* to, int64_t stride, Matrix& from, float scale, Angles angles) {
    for (int64_t i = 0; i < n; ++i) {
      uint16_t* __restrict out = to + i * stride;
      const float* __restrict in = from.row(i);
      const float *__restrict cosine = angles.cosine + i * h / 2, *__restrict sine = angles.sine + i * h / 2;
      for (int64_t c = 0; c < h / 2; ++c) {
        float a = in[2 * c] * scale, b = in[2 * c + 1] * scale;
        uint32_t pair = as_bf16(TURN ? a * cosine[c] + b * sine[c] : a) | as_bf16(TURN ? b * cosine[c] - a * sine[c] : b) << 16;
        std::memcpy(out + 2 * c, &pair, 4);
      }
    }
    for (int64_t i = n; i < shape.num_tokens; ++i) std::fill_n(to + i * stride, h, 0);
  }

  void load_qkv(const uint16_t* qkv, Angles angles) {
    int64_t stride = 3 * shape.dim();
    load<true>(q, qkv, stride, LOG2_E / std::sqrt(float(h)), angles);  // exp(x) = 2^(x log2 e)
    load<true>(k, qkv + shape.dim(), stride, 1.f, angles);
    load<false>(v, qkv + 2 * shape.dim(), stride, 1.f, angles);
    q.flip(rows());
    v.pack(rows());
  }

  // Of a block's queries, one a column, over the keys: (n, BLOCK), A across times B flipped.
  void over_keys(Matrix& scores_t, Halves& a, Halves& b, int64_t first, int64_t width) {
    product<false>(scores_t.row(0), BLOCK, a.across.data(), wide / 2, 1, b.flipped.data() + first, rows(), round_up(n, ROWS), width, wide / 2);
  }

  void probabilities(int64_t first, int64_t width) {
    over_keys(probabilities_t, k, q, first, width);
    for (int64_t column = 0; column < width; column += LANES) {
      float *start = probabilities_t.row(0) + column, *end = start + n * BLOCK;
      Vec highest = at(start), sums = {};
      for (float* s = start; s < end; s += BLOCK) highest = at(s) > highest ? at(s) : highest;
      for (float* s = start; s < end; s += BLOCK) sums += at(s) = exp2_of(at(s) - highest);
      sums = 1.f / sums;
      for (float* s = start; s < end; s += BLOCK) at(s) *= sums;
    }
    round_to(p_t, probabilities_t, width);
  }

  // (n, width) to bf16, across and down.
  void round_to(Halves& to, Matrix& from, int64_t width) {
    std::fill_n(from.row(n), n % 2 * BLOCK, 0.f);
    for (int64_t i = 0; i < n; i += 2)
      for (int64_t c = 0; c < width; c += LANES) {
        Bf16Vec upper = as_bf16(at(from.row(i) + c)), lower = as_bf16(at(from.row(i + 1) + c));
        *reinterpret_cast<Bf16Vec*>(to.row(i) + c) = upper, *reinterpret_cast<Bf16Vec*>(to.row(i + 1) + c) = lower;
        Pairs& down = *reinterpret_cast<Pairs*>(to.down.data() + i / 2 * BLOCK + c);
        down = __builtin_convertvector(upper, Pairs) | __builtin_convertvector(lower, Pairs) << 16;
      }
  }

  // Of a block's queries: the sum over the keys of what belongs to each.
  void over_queries(Matrix& to, int64_t first, int64_t count, Halves& weights_t, Halves& of_keys) {
    product<false>(to.row(first), wide, weights_t.down.data(), 1, BLOCK, of_keys.down.data(), wide, round_up(count, ROWS), wide, pairs());
  }

  // Onto the keys: the sum over a block's queries.
  void add_to_keys(Matrix& to, Halves& weights_t, Halves& of_queries, int64_t first, int64_t count) {
    product<true>(to.row(0), wide, weights_t.across.data(), BLOCK / 2, 1, of_queries.down.data() + first / 2 * wide, wide,
                  round_up(n, ROWS), wide, (count + 1) / 2);
  }

  void forward(const uint16_t* qkv, Angles angles, uint16_t* out) {
    load_qkv(qkv, angles);
    for (int64_t first = 0; first < n; first += BLOCK) {
      int64_t count = std::min(BLOCK, n - first);
      probabilities(first, round_up(count, LANES));
      over_queries(grad_q, first, count, p_t, v);
    }
    store<false>(out, shape.dim(), grad_q, 1.f, angles);
  }

  void backward(const uint16_t* qkv, Angles angles, const uint16_t* grad_out, uint16_t* grad_qkv) {
    load_qkv(qkv, angles);
    load<false>(grad, grad_out, shape.dim(), 1.f, angles);
    grad.flip(rows()), grad.pack(rows()), q.pack(rows()), k.pack(rows());
    std::fill_n(grad_k.row(0), round_up(n, ROWS) * wide, 0.f);
    std::fill_n(grad_v.row(0), round_up(n, ROWS) * wide, 0.f);
    for (int64_t first = 0; first < n; first += BLOCK) {
      int64_t count = std::min(BLOCK, n - first), width = round_up(count, LANES);
      probabilities(first, width);
      over_keys(grad_p_t, v, grad, first, width);
      add_to_keys(grad_v, p_t, grad, first, count);
      for (int64_t column = 0; column < width; column += LANES)
        scores_gradient(grad_p_t.row(0) + column, probabilities_t.row(0) + column);
      round_to(grad_s_t, grad_p_t, width);
      over_queries(grad_q, first, count, grad_s_t, k);
      add_to_keys(grad_k, grad_s_t, q, first, count);
    }
    int64_t stride = 3 * shape.dim();
    store<true>(grad_qkv, stride, grad_q, 1.f / std::sqrt(float(h)), angles);
    store<true>(grad_qkv + shape.dim(), stride, grad_k, LN_2, angles);  // q was times log2 e
    store<false>(grad_qkv + 2 * shape.dim(), stride, grad_v, 1.f, angles);
  }

  // Of a softmax: p (g - the sum of p g), in the place of g.
  void scores_gradient(float* g, const float* p) {
    Vec sums = {};
    for (int64_t j = 0; j < n * BLOCK; j += BLOCK) sums += at(p + j) * at(g + j);
    for (int64_t j = 0; j < n * BLOCK; j += BLOCK) at(g + j) = at(p + j) * (at(g + j) - sums);
  }
};

template <typename Work>
void each_head(const Shape& shape, const int64_t* lengths, int64_t num_samples, int num_threads, const Work& work) {
#pragma omp parallel num_threads(num_threads)
  {
    Head head(shape);
#pragma omp for schedule(dynamic, 4)
    for (int64_t sample = 0; sample < num_samples; ++sample) {
      head.n = lengths[sample];
      for (int64_t i = 0; i < shape.num_heads; ++i) work(head, sample, i);
    }
  }
}

}  // namespace

// qkv (B, N, 3 H h), rotary (2, positions, h / 2) cosines and sines, lengths (B,), out (B, N, H h).
extern "C" void attend_forward(const uint16_t* qkv, const float* rotary, const int64_t* lengths, uint16_t* out, int64_t num_positions,
                               int64_t num_samples, int64_t num_tokens, int64_t num_heads, int64_t head_dim, int num_threads) {
  Shape shape{num_tokens, num_heads, head_dim};
  Angles angles{rotary, rotary + num_positions * head_dim / 2};
  each_head(shape, lengths, num_samples, num_threads, [&](Head& head, int64_t sample, int64_t i) {
    int64_t row = sample * num_tokens * shape.dim(), column = i * head_dim;
    head.forward(qkv + 3 * row + column, angles, out + row + column);
  });
}

extern "C" void attend_backward(const uint16_t* qkv, const float* rotary, const int64_t* lengths, const uint16_t* grad_out,
                                uint16_t* grad_qkv, int64_t num_positions, int64_t num_samples, int64_t num_tokens, int64_t num_heads,
                                int64_t head_dim, int num_threads) {
  Shape shape{num_tokens, num_heads, head_dim};
  Angles angles{rotary, rotary + num_positions * head_dim / 2};
  each_head(shape, lengths, num_samples, num_threads, [&](Head& head, int64_t sample, int64_t i) {
    int64_t row = sample * num_tokens * shape.dim(), column = i * head_dim;
    head.backward(qkv + 3 * row + column, angles, grad_out + row + column, grad_qkv + 3 * row + column);
  });
}
