// Rotary self-attention over left-aligned sequences, one sample and head at a time, in a core's caches.
//
// q, k and v come as bf16 rows of one product, (B, N, 3, H, h); inside, all is fp32. Only a sample's own tokens are computed:
// what lies behind them is neither read nor written but with zeros. Sums run in a fixed order: two runs give the same bits.
//
// n a sample's tokens  h dim of a head  R rows of a tile  _t: transposed

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

#ifdef __AVX512F__
constexpr int LANES = 16, ROWS = 8;
#else
constexpr int LANES = 8, ROWS = 4;
#endif
constexpr int64_t BLOCK = 64;  // queries whose scores are held at once
constexpr float LOG2_E = 1.44269504f, LN_2 = 0.693147181f;

typedef float Vec __attribute__((vector_size(LANES * 4), aligned(4)));
typedef int32_t IntVec __attribute__((vector_size(LANES * 4), aligned(4)));

Vec& at(float* p) { return *reinterpret_cast<Vec*>(p); }
const Vec& at(const float* p) { return *reinterpret_cast<const Vec*>(p); }
int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

float as_float(uint32_t bits) { return __builtin_bit_cast(float, bits); }

uint32_t as_bf16(float x) {  // to the nearest, halves to even
  uint32_t bits = __builtin_bit_cast(uint32_t, x);
  uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return x == x ? rounded : 0x7fc0;
}

Vec exp2_of(Vec x) {  // x <= 0; its series to 1e-7, times 2 to the whole part; NaN stays NaN
  x = x < -126.f ? Vec{} - 126.f : x;
  constexpr float SHIFT = 12582912.f;  // 1.5 x 2^23: the sum's last bits are the nearest whole number
  Vec shifted = x + SHIFT, f = x - (shifted - SHIFT);
  Vec series = f * 1.54035304e-4f + 1.33335581e-3f;
  series = series * f + 9.61812911e-3f;
  series = series * f + 5.55041087e-2f;
  series = series * f + 2.40226507e-1f;
  series = series * f + 6.93147181e-1f;
  series = series * f + 1.f;
  return (Vec)((IntVec)series + ((IntVec)shifted << 23));
}

template <int W, bool ADD>
void tile(float* c, int64_t ldc, const float* a, int64_t row, int64_t step, const float* b, int64_t ldb, int64_t k) {
  Vec sums[ROWS][W] = {};
  for (int64_t p = 0; p < k; ++p)
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
      for (int w = 0; w < W; ++w) sums[r][w] += a[r * row + p * step] * at(b + p * ldb + w * LANES);
  for (int r = 0; r < ROWS; ++r)
    for (int w = 0; w < W; ++w) {
      Vec& out = at(c + r * ldc + w * LANES);
      out = ADD ? out + sums[r][w] : sums[r][w];
    }
}

// C (m, n) = or += A (m, k) B (k, n); m in whole ROWS, n in whole LANES; A's element (i, p) stands at i * row + p * step.
template <bool ADD>
void product(float* c, int64_t ldc, const float* a, int64_t row, int64_t step, const float* b, int64_t ldb, int64_t m,
             int64_t n, int64_t k) {
  for (int64_t i = 0; i < m; i += ROWS) {
    int64_t j = 0;
    for (; j + 2 * LANES <= n; j += 2 * LANES) tile<2, ADD>(c + i * ldc + j, ldc, a + i * row, row, step, b + j, ldb, k);
    if (j < n) tile<1, ADD>(c + i * ldc + j, ldc, a + i * row, row, step, b + j, ldb, k);
  }
}

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
  int64_t n, h, wide, rows;  // wide: h in whole LANES; rows: n in whole BLOCKs
  std::vector<float> q, k, v, q_t, grad, grad_t, grad_q, grad_k, grad_v, p_t, grad_p_t;

  explicit Head(const Shape& shape) : shape(shape), h(shape.head_dim), wide(round_up(h, LANES)) {}

  void size(int64_t tokens) { n = tokens, rows = round_up(n, BLOCK); }

  // Rows in fp32: the first of each pair of columns, and from h / 2 on the second. TURN: pairs by their position's angle.
  template <bool TURN>
  void load(std::vector<float>& to, const uint16_t* from, int64_t stride, float scale, Angles angles) {
    to.assign(rows * wide, 0.f);
    for (int64_t i = 0; i < n; ++i) {
      const uint16_t* __restrict in = from + i * stride;
      float *__restrict first = to.data() + i * wide, *__restrict second = first + h / 2;
      const float *__restrict cosine = angles.cosine + i * h / 2, *__restrict sine = angles.sine + i * h / 2;
      for (int64_t c = 0; c < h / 2; ++c) {
        uint32_t pair;
        std::memcpy(&pair, in + 2 * c, 4);
        float a = as_float(pair << 16) * scale, b = as_float(pair & 0xffff0000) * scale;
        first[c] = TURN ? a * cosine[c] - b * sine[c] : a;
        second[c] = TURN ? a * sine[c] + b * cosine[c] : b;
      }
    }
  }

  // As loaded. TURN: back by the angle, which is what the gradient of turned values is to the values before.
  template <bool TURN>
  void store(uint16_t* to, int64_t stride, const std::vector<float>& from, float scale, Angles angles) {
    for (int64_t i = 0; i < n; ++i) {
      uint16_t* __restrict out = to + i * stride;
      const float *__restrict first = from.data() + i * wide, *__restrict second = first + h / 2;
      const float *__restrict cosine = angles.cosine + i * h / 2, *__restrict sine = angles.sine + i * h / 2;
      for (int64_t c = 0; c < h / 2; ++c) {
        float a = first[c] * scale, b = second[c] * scale;
        uint32_t pair = as_bf16(TURN ? a * cosine[c] + b * sine[c] : a) | as_bf16(TURN ? b * cosine[c] - a * sine[c] : b) << 16;
        std::memcpy(out + 2 * c, &pair, 4);
      }
    }
    for (int64_t i = n; i < shape.num_tokens; ++i) std::fill_n(to + i * stride, h, 0);
  }

  void transpose(std::vector<float>& to, const std::vector<float>& from) {
    to.resize(h * rows);
    for (int64_t c = 0; c < h; ++c)
      for (int64_t i = 0; i < rows; ++i) to[c * rows + i] = from[i * wide + c];
  }

  void load_qkv(const uint16_t* qkv, Angles angles) {
    int64_t stride = 3 * shape.dim();
    load<true>(q, qkv, stride, LOG2_E / std::sqrt(float(h)), angles);  // exp(x) = 2^(x log2 e)
    load<true>(k, qkv + shape.dim(), stride, 1.f, angles);
    load<false>(v, qkv + 2 * shape.dim(), stride, 1.f, angles);
    transpose(q_t, q);
    p_t.resize(rows * BLOCK);
    grad_q.resize(rows * wide);
  }

  // p_t (n, BLOCK): of a block's queries, one a column, over the keys.
  void probabilities(int64_t first, int64_t width) {
    product<false>(p_t.data(), BLOCK, k.data(), wide, 1, q_t.data() + first, rows, round_up(n, ROWS), width, h);
    for (int64_t column = 0; column < width; column += LANES) {
      float *start = p_t.data() + column, *end = start + n * BLOCK;
      Vec highest = at(start), sums = {};
      for (float* s = start; s < end; s += BLOCK) highest = at(s) > highest ? at(s) : highest;
      for (float* s = start; s < end; s += BLOCK) sums += at(s) = exp2_of(at(s) - highest);
      sums = 1.f / sums;
      for (float* s = start; s < end; s += BLOCK) at(s) *= sums;
    }
  }

  void forward(const uint16_t* qkv, Angles angles, uint16_t* out) {
    load_qkv(qkv, angles);
    for (int64_t first = 0; first < n; first += BLOCK) {
      int64_t count = std::min(BLOCK, n - first);
      probabilities(first, round_up(count, LANES));
      product<false>(grad_q.data() + first * wide, wide, p_t.data(), 1, BLOCK, v.data(), wide, round_up(count, ROWS), wide, n);
    }
    store<false>(out, shape.dim(), grad_q, 1.f, angles);
  }

  void backward(const uint16_t* qkv, Angles angles, const uint16_t* grad_out, uint16_t* grad_qkv) {
    load_qkv(qkv, angles);
    load<false>(grad, grad_out, shape.dim(), 1.f, angles);
    transpose(grad_t, grad);
    grad_p_t.resize(rows * BLOCK);
    grad_k.assign(rows * wide, 0.f);
    grad_v.assign(rows * wide, 0.f);
    int64_t keys = round_up(n, ROWS);
    for (int64_t first = 0; first < n; first += BLOCK) {
      int64_t count = std::min(BLOCK, n - first), width = round_up(count, LANES);
      probabilities(first, width);
      product<false>(grad_p_t.data(), BLOCK, v.data(), wide, 1, grad_t.data() + first, rows, keys, width, h);
      product<true>(grad_v.data(), wide, p_t.data(), BLOCK, 1, grad.data() + first * wide, wide, keys, wide, count);
      for (int64_t column = 0; column < width; column += LANES) scores_gradient(grad_p_t.data() + column, p_t.data() + column);
      product<false>(grad_q.data() + first * wide, wide, grad_p_t.data(), 1, BLOCK, k.data(), wide, round_up(count, ROWS), wide, n);
      product<true>(grad_k.data(), wide, grad_p_t.data(), BLOCK, 1, q.data() + first * wide, wide, keys, wide, count);
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
      head.size(lengths[sample]);
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
