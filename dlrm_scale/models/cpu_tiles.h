// What our kernels for CPUs share: vectors of fp32, bf16, and products of small matrices that stay in a core's caches.
//
// A matrix in bf16 is held as pairs of 32 bits, in one of two ways:
//   across (rows, columns / 2): neighbours in a row, as memory holds it
//   down (rows / 2, columns):   neighbours in a column
// A product's left matrix is across, or the transposed one's down; its right matrix is down.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

#ifdef __AVX512F__
constexpr int LANES = 16, ROWS = 8;
#else
constexpr int LANES = 8, ROWS = 4;
#endif

typedef float Vec __attribute__((vector_size(LANES * 4), aligned(4)));
typedef float Quad __attribute__((vector_size(16), aligned(4)));
typedef uint32_t Four __attribute__((vector_size(16), aligned(4)));
typedef int32_t IntVec __attribute__((vector_size(LANES * 4), aligned(4)));
typedef uint32_t Pairs __attribute__((vector_size(LANES * 4), aligned(4)));
typedef uint64_t Longs __attribute__((vector_size(LANES * 4), aligned(4)));
typedef uint16_t Bf16Vec __attribute__((vector_size(LANES * 2), aligned(2)));

Vec& at(float* p) { return *reinterpret_cast<Vec*>(p); }
const Vec& at(const float* p) { return *reinterpret_cast<const Vec*>(p); }
Pairs& at(uint32_t* p) { return *reinterpret_cast<Pairs*>(p); }
const Pairs& at(const uint32_t* p) { return *reinterpret_cast<const Pairs*>(p); }
int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

float as_float(uint32_t bits) { return __builtin_bit_cast(float, bits); }

Vec load_bf16(const uint16_t* p) {
  return (Vec)(__builtin_convertvector(*reinterpret_cast<const Bf16Vec*>(p), Pairs) << 16);
}

Bf16Vec as_bf16(const Vec& x) {  // to the nearest, halves to even
#ifdef __AVX512BF16__
  return (Bf16Vec)_mm512_cvtneps_pbh((__m512)x);
#else
  Pairs bits = (Pairs)x, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  rounded = x == x ? rounded : Pairs{} + 0x7fc0;
  return __builtin_convertvector(rounded, Bf16Vec);
#endif
}

void store_bf16(uint16_t* p, const Vec& x) { *reinterpret_cast<Bf16Vec*>(p) = as_bf16(x); }

Vec swap_pairs(const Vec& x) { return (Vec)((Longs)x << 32 | (Longs)x >> 32); }  // neighbours

float sum_of(const Vec& x) {
  Quad sums = {};
  for (int i = 0; i < LANES; i += 4) sums += *reinterpret_cast<const Quad*>(reinterpret_cast<const float*>(&x) + i);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
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

Vec multiply_add(const Vec& sums, uint32_t a, const Pairs& b) {  // both products of a pair
#ifdef __AVX512BF16__
  return (Vec)_mm512_dpbf16_ps((__m512)sums, (__m512bh)_mm512_set1_epi32(a), (__m512bh)b);
#else
  return sums + as_float(a << 16) * (Vec)(b << 16) + as_float(a & 0xffff0000) * (Vec)(b & 0xffff0000);
#endif
}

// All loops over the tile are unrolled, or GCC leaves its sums in memory.
template <int W, bool ADD>
void tile(float* c, int64_t ldc, const uint32_t* a, int64_t row, int64_t step, const uint32_t* b, int64_t ldb, int64_t k) {
  Vec sums[ROWS][W];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
    for (int w = 0; w < W; ++w) sums[r][w] = ADD ? at(c + r * ldc + w * LANES) : Vec{};
  for (int64_t p = 0; p < k; ++p)
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
      for (int w = 0; w < W; ++w) sums[r][w] = multiply_add(sums[r][w], a[r * row + p * step], at(b + p * ldb + w * LANES));
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
    for (int w = 0; w < W; ++w) at(c + r * ldc + w * LANES) = sums[r][w];
}

// C (m, n) = or += A (m, k) B (k, n), k in pairs; m in whole ROWS, n in whole LANES; A's pair (i, p) stands at i * row + p * step.
template <bool ADD>
void product(float* c, int64_t ldc, const uint32_t* a, int64_t row, int64_t step, const uint32_t* b, int64_t ldb, int64_t m, int64_t n,
             int64_t k) {
  for (int64_t i = 0; i < m; i += ROWS) {
    int64_t j = 0;
    for (; j + 2 * LANES <= n; j += 2 * LANES) tile<2, ADD>(c + i * ldc + j, ldc, a + i * row, row, step, b + j, ldb, k);
    if (j < n) tile<1, ADD>(c + i * ldc + j, ldc, a + i * row, row, step, b + j, ldb, k);
  }
}

// Memory that starts with a cache line, so that no vector of a row in whole LANES reaches over two.
template <typename T>
struct Aligned {
  using value_type = T;
  static constexpr std::align_val_t LINE{64};
  Aligned() = default;
  template <typename U>
  Aligned(const Aligned<U>&) {}
  T* allocate(size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), LINE)); }
  void deallocate(T* values, size_t) { ::operator delete(values, LINE); }
  bool operator==(const Aligned&) const { return true; }
  bool operator!=(const Aligned&) const { return false; }
};

template <typename T>
using Values = std::vector<T, Aligned<T>>;

struct Matrix {  // of fp32
  int64_t columns;
  Values<float> values;
  Matrix(int64_t rows, int64_t columns) : columns(columns), values(rows * columns) {}
  float* row(int64_t i) { return values.data() + i * columns; }
  const float* row(int64_t i) const { return values.data() + i * columns; }
};

struct Halves {  // a matrix of bf16; columns in whole LANES
  int64_t columns;
  Values<uint32_t> across, down, flipped;  // flipped: of the transposed matrix, down
  Halves(int64_t rows, int64_t columns)
      : columns(columns), across(rows * columns / 2), down(rows * columns / 2), flipped(rows * columns / 2) {}
  uint16_t* row(int64_t i) { return reinterpret_cast<uint16_t*>(across.data()) + i * columns; }
  void load(const uint16_t* from, int64_t rows) { std::memcpy(across.data(), from, rows * columns * 2); }
  void clear(int64_t from, int64_t to) {
    if (from < to) std::memset(row(from), 0, (to - from) * columns * 2);
  }

  void pack(int64_t rows) {  // down, from across
    for (int64_t i = 0; i < rows / 2; ++i) {
      const uint32_t *__restrict upper = across.data() + i * columns, *__restrict lower = upper + columns / 2;
      uint32_t* __restrict out = down.data() + i * columns;
      for (int64_t c = 0; c < columns / 2; ++c) {
        out[2 * c] = (upper[c] & 0xffff) | lower[c] << 16;
        out[2 * c + 1] = upper[c] >> 16 | (lower[c] & 0xffff0000);
      }
    }
  }

  // flipped, from across, rows in whole fours. By 4 x 4, since GCC's own way, of strided loads, is slower than the products.
  void flip(int64_t rows) {
    for (int64_t i = 0; i < rows; i += 4)
      for (int64_t c = 0; c < columns / 2; c += 4) {
        const uint32_t* in = across.data() + i * columns / 2 + c;
        auto from = [&](int64_t r) { return *reinterpret_cast<const Four*>(in + r * columns / 2); };
        auto to = [&](int64_t r) -> Four& { return *reinterpret_cast<Four*>(flipped.data() + (c + r) * rows + i); };
        Four upper02 = firsts(from(0), from(2)), lower02 = lasts(from(0), from(2));
        Four upper13 = firsts(from(1), from(3)), lower13 = lasts(from(1), from(3));
        to(0) = firsts(upper02, upper13), to(1) = lasts(upper02, upper13);
        to(2) = firsts(lower02, lower13), to(3) = lasts(lower02, lower13);
      }
  }

  static Four firsts(const Four& a, const Four& b) { return Four{a[0], b[0], a[1], b[1]}; }
  static Four lasts(const Four& a, const Four& b) { return Four{a[2], b[2], a[3], b[3]}; }
};

}  // namespace
