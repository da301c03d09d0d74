// RMSNorm(RMSNorm(GELU(S W1 + b1)) W2 + b2) with W1 and W2 of each sample, forward and backward, one sample at a time.
//
// Tokens and weights are bf16, and so is what products take; sums, biases, GELU and norms are fp32. A block of tokens goes through
// all of it in a core's caches; the backward pass makes the hidden tokens anew. Sums run in a fixed order: two runs give the same bits.
//
// B samples  N tokens  d token dim  K hidden width, both in whole LANES

#include "cpu_tiles.h"

namespace {

constexpr int64_t BLOCK = 64;  // tokens that are worked on at once

struct Shape {
  int64_t num_samples, num_tokens, dim, hidden;
  float eps;
};

struct Shared {  // bias and scale of the inner norm (K,), of the outer one (d,)
  const float *bias1, *scale1, *bias2, *scale2;
};

struct Gelu {
  Vec value, slope;
};

// x times the normal distribution at x, which is 1 - tail for x >= 0: its error function by Abramowitz and Stegun, 7.1.26, to 1.5e-7.
Gelu gelu(Vec x) {
  constexpr float LOG2_E_HALF = 0.721347520f, INVERSE_SQRT2 = 0.707106781f, INVERSE_SQRT_2PI = 0.398942280f;
  Vec size = x < 0.f ? -x : x, bell = exp2_of(-LOG2_E_HALF * x * x);
  Vec t = 1.f / (1.f + 0.3275911f * INVERSE_SQRT2 * size);
  Vec series = t * 1.061405429f - 1.453152027f;
  series = series * t + 1.421413741f;
  series = series * t - 0.284496736f;
  series = series * t + 0.254829592f;
  Vec tail = 0.5f * series * t * bell, part = x < 0.f ? tail : 1.f - tail;
  return {x * part, part + x * bell * INVERSE_SQRT_2PI};
}

// Scratch of one thread for one sample.
struct Sample {
  const Shape& shape;
  const Shared& shared;
  const int64_t d, K;
  Halves x, weight1, weight2, hidden, grad_out, grad_before;
  Matrix activated, slope, out, grad_hidden, grad_weight1, grad_weight2;
  float factor1[BLOCK], factor2[BLOCK];  // of the norms, one a token

  Sample(const Shape& shape, const Shared& shared)
      : shape(shape), shared(shared), d(shape.dim), K(shape.hidden),
        x(BLOCK, d), weight1(d, K), weight2(K, d), hidden(BLOCK, K), grad_out(BLOCK, d), grad_before(BLOCK, K),
        activated(BLOCK, K), slope(BLOCK, K), out(BLOCK, d), grad_hidden(BLOCK, K), grad_weight1(d, K), grad_weight2(K, d) {}

  void load_weights(const uint16_t* w1, const uint16_t* w2) {
    weight1.load(w1, d), weight1.pack(d);
    weight2.load(w2, K), weight2.pack(K);
  }

  // `activated`, `slope` and `hidden` of a block of tokens, and `out`, what the outer norm takes; rows beyond `count` are not zeros
  // but in `x` and `hidden`.
  void forward_block(const uint16_t* tokens, int64_t count) {
    int64_t rows = round_up(count, ROWS);
    x.load(tokens, count), x.clear(count, rows);
    product<false>(activated.row(0), K, x.across.data(), d / 2, 1, weight1.down.data(), K, rows, K, d / 2);
    for (int64_t i = 0; i < count; ++i) {
      float *row = activated.row(i), *slopes = slope.row(i);
      Vec squares = {};
      for (int64_t c = 0; c < K; c += LANES) {
        Gelu g = gelu(at(row + c) + at(shared.bias1 + c));
        at(row + c) = g.value, at(slopes + c) = g.slope;
        squares += g.value * g.value;
      }
      factor1[i] = factor(squares, K);
      for (int64_t c = 0; c < K; c += LANES) store_bf16(hidden.row(i) + c, at(row + c) * factor1[i] * at(shared.scale1 + c));
    }
    hidden.clear(count, rows);
    product<false>(out.row(0), d, hidden.across.data(), K / 2, 1, weight2.down.data(), d, rows, d, K / 2);
    for (int64_t i = 0; i < count; ++i) {
      Vec squares = {};
      for (int64_t c = 0; c < d; c += LANES) {
        Vec& value = at(out.row(i) + c);
        value += at(shared.bias2 + c);
        squares += value * value;
      }
      factor2[i] = factor(squares, d);
    }
  }

  float factor(Vec squares, int64_t columns) { return 1.f / std::sqrt(sum_of(squares) / columns + shape.eps); }

  void forward(const uint16_t* tokens, uint16_t* result) {
    for (int64_t first = 0; first < shape.num_tokens; first += BLOCK) {
      int64_t count = std::min(BLOCK, shape.num_tokens - first);
      forward_block(tokens + first * d, count);
      for (int64_t i = 0; i < count; ++i)
        for (int64_t c = 0; c < d; c += LANES)
          store_bf16(result + (first + i) * d + c, at(out.row(i) + c) * factor2[i] * at(shared.scale2 + c));
    }
  }

  // sums: gradients of bias1, scale1, bias2 and scale2, one behind the other.
  void backward(const uint16_t* tokens, const uint16_t* grad, uint16_t* grad_tokens, uint16_t* grad_w1, uint16_t* grad_w2, float* sums) {
    weight1.flip(d), weight2.flip(K);
    std::fill_n(sums, 2 * K + 2 * d, 0.f);
    for (int64_t first = 0; first < shape.num_tokens; first += BLOCK) {
      int64_t count = std::min(BLOCK, shape.num_tokens - first), rows = round_up(count, ROWS);
      forward_block(tokens + first * d, count);
      norm_gradient(grad_out, out, factor2, shared.scale2, count, sums + 2 * K, sums + 2 * K + d,
                    [&](int64_t i, int64_t c) { return load_bf16(grad + (first + i) * d + c); }, [](int64_t, int64_t) { return 1.f; });
      grad_out.clear(count, rows);
      product<false>(grad_hidden.row(0), K, grad_out.across.data(), d / 2, 1, weight2.flipped.data(), K, rows, K, d / 2);
      norm_gradient(grad_before, activated, factor1, shared.scale1, count, sums, sums + K,
                    [&](int64_t i, int64_t c) { return at(grad_hidden.row(i) + c); },
                    [&](int64_t i, int64_t c) { return at(slope.row(i) + c); });
      grad_before.clear(count, rows);
      // into `out`, which is done with
      product<false>(out.row(0), d, grad_before.across.data(), K / 2, 1, weight1.flipped.data(), d, rows, d, K / 2);
      for (int64_t i = 0; i < count; ++i)
        for (int64_t c = 0; c < d; c += LANES) store_bf16(grad_tokens + (first + i) * d + c, at(out.row(i) + c));
      x.pack(rows), hidden.pack(rows), grad_out.pack(rows), grad_before.pack(rows);
      first ? weight_gradients<true>(rows) : weight_gradients<false>(rows);
    }
    for (int64_t c = 0; c < d * K; c += LANES) {
      store_bf16(grad_w1 + c, at(grad_weight1.row(0) + c));
      store_bf16(grad_w2 + c, at(grad_weight2.row(0) + c));
    }
  }

  template <bool ADD>
  void weight_gradients(int64_t rows) {
    product<ADD>(grad_weight1.row(0), K, x.down.data(), 1, d, grad_before.down.data(), K, d, K, rows / 2);
    product<ADD>(grad_weight2.row(0), d, hidden.down.data(), 1, K, grad_out.down.data(), d, K, d, rows / 2);
  }

  // Of a norm's result s n, n being its factor f times what it takes: f (g s - n mean(g s n)), times `slope`, to bf16; sums for bias and scale.
  template <typename Grad, typename Slope>
  static void norm_gradient(Halves& to, Matrix& values, const float* factors, const float* scale, int64_t count, float* of_bias,
                            float* of_scale, const Grad& grad, const Slope& slope_at) {
    for (int64_t i = 0; i < count; ++i) {
      Vec dots = {};
      for (int64_t c = 0; c < values.columns; c += LANES) {
        Vec &normed = at(values.row(i) + c), g = grad(i, c);
        normed *= factors[i];
        at(of_scale + c) += g * normed;
        dots += g * at(scale + c) * normed;
      }
      float mean = sum_of(dots) / values.columns;
      for (int64_t c = 0; c < values.columns; c += LANES) {
        Vec before = factors[i] * (grad(i, c) * at(scale + c) - at(values.row(i) + c) * mean) * slope_at(i, c);
        at(of_bias + c) += before;
        store_bf16(to.row(i) + c, before);
      }
    }
  }
};

template <typename Work>
void each_sample(const Shape& shape, const Shared& shared, int num_threads, const Work& work) {
#pragma omp parallel num_threads(num_threads)
  {
    Sample sample(shape, shared);
#pragma omp for schedule(dynamic, 4)
    for (int64_t i = 0; i < shape.num_samples; ++i) work(sample, i);
  }
}

}  // namespace

// tokens, out (B, N, d), weight1 (B, d, K), weight2 (B, K, d), bias1 and scale1 (K,), bias2 and scale2 (d,).
extern "C" void pffn_forward(const uint16_t* tokens, const uint16_t* weight1, const float* bias1, const float* scale1,
                             const uint16_t* weight2, const float* bias2, const float* scale2, uint16_t* out, int64_t num_samples,
                             int64_t num_tokens, int64_t dim, int64_t hidden, float eps, int num_threads) {
  Shape shape{num_samples, num_tokens, dim, hidden, eps};
  each_sample(shape, {bias1, scale1, bias2, scale2}, num_threads, [&](Sample& sample, int64_t i) {
    sample.load_weights(weight1 + i * dim * hidden, weight2 + i * dim * hidden);
    sample.forward(tokens + i * num_tokens * dim, out + i * num_tokens * dim);
  });
}

// sums (B, 2 K + 2 d): each sample's gradients of bias1, scale1, bias2 and scale2.
extern "C" void pffn_backward(const uint16_t* tokens, const uint16_t* weight1, const float* bias1, const float* scale1,
                              const uint16_t* weight2, const float* bias2, const float* scale2, const uint16_t* grad,
                              uint16_t* grad_tokens, uint16_t* grad_weight1, uint16_t* grad_weight2, float* sums, int64_t num_samples,
                              int64_t num_tokens, int64_t dim, int64_t hidden, float eps, int num_threads) {
  Shape shape{num_samples, num_tokens, dim, hidden, eps};
  each_sample(shape, {bias1, scale1, bias2, scale2}, num_threads, [&](Sample& sample, int64_t i) {
    int64_t first = i * num_tokens * dim, weights = i * dim * hidden;
    sample.load_weights(weight1 + weights, weight2 + weights);
    sample.backward(tokens + first, grad + first, grad_tokens + first, grad_weight1 + weights, grad_weight2 + weights,
                    sums + i * 2 * (hidden + dim));
  });
}
