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

struct Turns {  // by position, of each column: cosine, and the sine by which its pair's other column comes in
  Matrix cosine, sine;

  Turns(const float* rotary, int64_t num_positions, int64_t num_tokens, int64_t h)
      : cosine(num_tokens, round_up(h, LANES)), sine(cosine) {
    for (int64_t i = 0; i < num_tokens; ++i)
      for (int64_t c = 0; c < h; ++c) {
        int64_t angle = i * (h / 2) + c / 2;
        cosine.row(i)[c] = rotary[angle];
        sine.row(i)[c] = (c % 2 ? 1 : -1) * rotary[num_positions * (h / 2) + angle];
      }
  }
};

// Scratch of one thread for one sample and head. Rows and columns beyond n and h are zeros.
struct Head {
  const Shape& shape;
  const Turns& turns;
  int64_t n = 0, h, wide;  // wide: h in whole LANES
  Halves q, k, v, grad, weights_t, grad_s_t;
  Matrix scores_t, grad_p_t, out, grad_k, grad_v;
  Matrix inverse_sums;  // of a block's queries' weights

  Head(const Shape& shape, const Turns& turns)
      : Head(shape, turns, round_up(shape.num_tokens, BLOCK), round_up(shape.head_dim, LANES)) {}
  Head(const Shape& shape, const Turns& turns, int64_t most, int64_t wide)
      : shape(shape), turns(turns), h(shape.head_dim), wide(wide), q(most, wide), k(most, wide), v(most, wide), grad(BLOCK, wide),
        weights_t(most, BLOCK), grad_s_t(most, BLOCK), scores_t(most, BLOCK), grad_p_t(most, BLOCK), out(most, wide),
        grad_k(most, wide), grad_v(most, wide), inverse_sums(1, BLOCK) {}

  int64_t rows() const { return round_up(n, BLOCK); }
  int64_t pairs() const { return (n + 1) / 2; }

  // A head's columns from `c` on, zeros beyond it.
  Vec load_columns(const uint16_t* from, int64_t c) const {
    if (c + LANES <= h) return load_bf16(from + c);
    uint16_t part[LANES] = {};
    std::memcpy(part, from + c, (h - c) * 2);
    return load_bf16(part);
  }

  void store_columns(uint16_t* to, int64_t c, const Vec& x) const {
    if (c + LANES <= h) return store_bf16(to + c, x);
    Bf16Vec part = as_bf16(x);
    std::memcpy(to + c, &part, (h - c) * 2);
  }

  // Each pair of columns turned by its position's angle; BACK: as far the other way, as gradients of turned values are.
  template <bool BACK>
  Vec turned(const Vec& x, int64_t position, int64_t c) {
    Vec sine = at(turns.sine.row(position) + c);
    return x * at(turns.cosine.row(position) + c) + swap_pairs(x) * (BACK ? -sine : sine);
  }

  template <bool TURN>
  void load(Halves& to, const uint16_t* from, float scale) {
    for (int64_t i = 0; i < n; ++i)
      for (int64_t c = 0; c < wide; c += LANES) {
        Vec x = load_columns(from + i * 3 * shape.dim(), c);
        store_bf16(to.row(i) + c, TURN ? turned<false>(x * scale, i, c) : x);
      }
    to.clear(n, rows());
  }

  template <bool TURN>
  void store(uint16_t* to, int64_t stride, Matrix& from, float scale) {
    for (int64_t i = 0; i < n; ++i)
      for (int64_t c = 0; c < wide; c += LANES) {
        Vec x = at(from.row(i) + c) * scale;
        store_columns(to + i * stride, c, TURN ? turned<true>(x, i, c) : x);
      }
    for (int64_t i = n; i < shape.num_tokens; ++i) std::fill_n(to + i * stride, h, 0);
  }

  void load_qkv(const uint16_t* qkv) {
    load<true>(q, qkv, LOG2_E / std::sqrt(float(h)));  // exp(x) = 2^(x log2 e)
    load<true>(k, qkv + shape.dim(), 1.f);
    load<false>(v, qkv + 2 * shape.dim(), 1.f);
    q.flip(rows());
    v.pack(rows());
  }

  // Of a block's queries, one a column, over the keys: (n, BLOCK), A across times B, flipped.
  void over_keys(Matrix& to, Halves& a, const uint32_t* b, int64_t ldb, int64_t width) {
    product<false>(to.row(0), BLOCK, a.across.data(), wide / 2, 1, b, ldb, round_up(n, ROWS), width, wide / 2);
  }

  // 2^(score - the highest) in bf16, and 1 / the sum of what bf16 made of them: what is rounded still sums to 1.
  template <bool BACKWARD>
  void weigh(int64_t first, int64_t width) {
    over_keys(scores_t, k, q.flipped.data() + first, rows(), width);
    for (int64_t column = 0; column < width; column += LANES) {
      float *start = scores_t.row(0) + column, *end = start + n * BLOCK;
      Vec highest = at(start), sums = {};
      for (float* s = start; s < end; s += BLOCK) highest = at(s) > highest ? at(s) : highest;
      for (int64_t i = 0; i < n; i += 2)
        sums += store_pair<BACKWARD>(weights_t, i, column, exp2_of(at(start + i * BLOCK) - highest),
                                     i + 1 < n ? exp2_of(at(start + (i + 1) * BLOCK) - highest) : Vec{});
      at(inverse_sums.row(0) + column) = 1.f / sums;
    }
  }

  // Of keys i and i + 1, down, and across where it is asked for; what bf16 made of both, added.
  template <bool ACROSS>
  Vec store_pair(Halves& to, int64_t i, int64_t column, const Vec& upper, const Vec& lower) {
    Pairs up = __builtin_convertvector(as_bf16(upper), Pairs), low = __builtin_convertvector(as_bf16(lower), Pairs) << 16;
    at(to.down.data() + i / 2 * BLOCK + column) = up | low;
    if (ACROSS) store_bf16(to.row(i) + column, upper), store_bf16(to.row(i + 1) + column, lower);
    return (Vec)(up << 16) + (Vec)low;
  }

  // Of a block's queries: the sum over the keys of what belongs to each.
  void over_queries(int64_t first, int64_t count, Halves& weights_t, Halves& of_keys) {
    product<false>(out.row(first), wide, weights_t.down.data(), 1, BLOCK, of_keys.down.data(), wide, round_up(count, ROWS), wide, pairs());
  }

  // Onto the keys: the sum over a block's queries.
  void add_to_keys(Matrix& to, Halves& weights_t, const uint32_t* of_queries, int64_t count) {
    product<true>(to.row(0), wide, weights_t.across.data(), BLOCK / 2, 1, of_queries, wide, round_up(n, ROWS), wide, (count + 1) / 2);
  }

  void forward(const uint16_t* qkv, uint16_t* result) {
    load_qkv(qkv);
    for (int64_t first = 0; first < n; first += BLOCK) {
      int64_t count = std::min(BLOCK, n - first);
      weigh<false>(first, round_up(count, LANES));
      over_queries(first, count, weights_t, v);
      for (int64_t i = 0; i < count; ++i)
        for (int64_t c = 0; c < wide; c += LANES) at(out.row(first + i) + c) *= inverse_sums.row(0)[i];
    }
    store<false>(result, shape.dim(), out, 1.f);
  }

  void backward(const uint16_t* qkv, const uint16_t* grad_out, uint16_t* grad_qkv) {
    load_qkv(qkv);
    q.pack(rows()), k.pack(rows());
    std::fill_n(grad_k.row(0), round_up(n, ROWS) * wide, 0.f);
    std::fill_n(grad_v.row(0), round_up(n, ROWS) * wide, 0.f);
    for (int64_t first = 0; first < n; first += BLOCK) {
      int64_t count = std::min(BLOCK, n - first), width = round_up(count, LANES);
      weigh<true>(first, width);
      load_gradient(grad_out + first * shape.dim(), count);
      over_keys(grad_p_t, v, grad.flipped.data(), BLOCK, width);
      add_to_keys(grad_v, weights_t, grad.down.data(), count);
      for (int64_t column = 0; column < width; column += LANES) scores_gradient(column);
      over_queries(first, count, grad_s_t, k);
      add_to_keys(grad_k, grad_s_t, q.down.data() + first / 2 * wide, count);
    }
    int64_t stride = 3 * shape.dim();
    store<true>(grad_qkv, stride, out, 1.f / std::sqrt(float(h)));
    store<true>(grad_qkv + shape.dim(), stride, grad_k, LN_2);  // q was times log2 e
    store<false>(grad_qkv + 2 * shape.dim(), stride, grad_v, 1.f);
  }

  // Flipped as it is; down over the sums of the weights, which then need not be divided by them for the values' gradient.
  void load_gradient(const uint16_t* from, int64_t count) {
    for (int64_t i = 0; i < count; ++i)
      for (int64_t c = 0; c < wide; c += LANES) store_bf16(grad.row(i) + c, load_columns(from + i * shape.dim(), c));
    grad.clear(count, BLOCK);
    grad.flip(BLOCK);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t c = 0; c < wide; c += LANES) store_bf16(grad.row(i) + c, load_bf16(grad.row(i) + c) * inverse_sums.row(0)[i]);
    grad.pack(BLOCK);
  }

  // Of a softmax p, which is w / sum: p (g - the sum of p g).
  void scores_gradient(int64_t column) {
    const float* g = grad_p_t.row(0) + column;
    Vec dots = {}, inverse = at(inverse_sums.row(0) + column);
    for (int64_t j = 0; j < n; ++j) dots += load_bf16(weights_t.row(j) + column) * at(g + j * BLOCK);
    dots *= inverse;
    for (int64_t j = 0; j < n; j += 2) {
      auto gradient = [&](int64_t key) { return load_bf16(weights_t.row(key) + column) * inverse * (at(g + key * BLOCK) - dots); };
      store_pair<true>(grad_s_t, j, column, gradient(j), j + 1 < n ? gradient(j + 1) : Vec{});
    }
  }
};

template <typename Work>
void each_head(const Shape& shape, const float* rotary, int64_t num_positions, const int64_t* lengths, int64_t num_samples,
               int num_threads, const Work& work) {
  Turns turns(rotary, num_positions, shape.num_tokens, shape.head_dim);
#pragma omp parallel num_threads(num_threads)
  {
    Head head(shape, turns);
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
  each_head(shape, rotary, num_positions, lengths, num_samples, num_threads, [&](Head& head, int64_t sample, int64_t i) {
    int64_t row = sample * num_tokens * shape.dim(), column = i * head_dim;
    head.forward(qkv + 3 * row + column, out + row + column);
  });
}

extern "C" void attend_backward(const uint16_t* qkv, const float* rotary, const int64_t* lengths, const uint16_t* grad_out,
                                uint16_t* grad_qkv, int64_t num_positions, int64_t num_samples, int64_t num_tokens, int64_t num_heads,
                                int64_t head_dim, int num_threads) {
  Shape shape{num_tokens, num_heads, head_dim};
  each_head(shape, rotary, num_positions, lengths, num_samples, num_threads, [&](Head& head, int64_t sample, int64_t i) {
    int64_t row = sample * num_tokens * shape.dim(), column = i * head_dim;
    head.backward(qkv + 3 * row + column, grad_out + row + column, grad_qkv + 3 * row + column);
  });
}
