// Halves to the bit; and the arithmetic of every level that this processor runs, against double precision.
#include "../levels.h"
#include "check.h"

namespace {

using namespace dvit;

// Every half is its own nearest; between two neighbours the nearer is taken, of the middle the even one.
template <class T>
void check_rounding(uint32_t infinity) {
  for (uint32_t bits = 0; bits < infinity; ++bits)
    for (const uint32_t sign : {0u, 0x8000u}) {
      const T half = {static_cast<uint16_t>(bits | sign)}, next = {static_cast<uint16_t>((bits + 1) | sign)};
      const float low = to_float(half), high = to_float(next);
      CHECK(from_float<T>(low).bits == half.bits);
      if (bits + 1 == infinity) continue;
      const float middle = static_cast<float>((double{low} + double{high}) / 2);
      CHECK(from_float<T>(middle).bits == (bits & 1 ? next : half).bits);
      CHECK(from_float<T>(std::nextafterf(middle, low)).bits == half.bits);
      CHECK(from_float<T>(std::nextafterf(middle, high)).bits == next.bits);
    }
  CHECK(from_float<T>(INFINITY).bits == infinity && from_float<T>(-INFINITY).bits == (infinity | 0x8000u));
  CHECK(from_float<T>(3.4e38f).bits == infinity);
  CHECK(std::isinf(to_float(T{static_cast<uint16_t>(infinity)})));
  CHECK(std::isnan(to_float(from_float<T>(NAN))) && std::isnan(to_float(T{static_cast<uint16_t>(infinity + 1)})));
}

void check_gelu(const Rows &rows) {
  for (int i = -120000; i <= 120000; ++i) {
    const double x = static_cast<float>(i * 1e-4), right = 0.5 * x * std::erfc(-x / std::sqrt(2.0));
    float y = static_cast<float>(x);
    rows.gelu(DVIT_FLOAT32, &y, 1);
    CHECK(std::fabs(y - right) <= 3e-7 * std::fmax(1, std::fabs(x)));  // 3.6e-7 is what PyTorch has in float32
  }
  float odd[] = {NAN, INFINITY, 1e30f, 0.0f};
  rows.gelu(DVIT_FLOAT32, odd, 4);
  CHECK(std::isnan(odd[0]) && odd[1] == INFINITY && odd[2] == 1e30f && odd[3] == 0);
}

void check_normalise(const Rows &rows) {
  for (const int c : {4, 18, 64, 96, 383, 384}) {
    const std::vector<float> x = random_values(c, c);
    std::vector<float> y(c);
    for (const float shift : {0.0f, 50.0f}) {
      std::vector<float> moved = x;
      double sum = 0, squares = 0;
      for (float &v : moved) sum += v += shift;
      for (const float v : moved) squares += (v - sum / c) * (v - sum / c);
      rows.normalise(DVIT_FLOAT32, moved.data(), c, 1e-5f, y.data());
      for (int i = 0; i < c; ++i)
        CHECK(std::fabs(y[i] - (moved[i] - sum / c) / std::sqrt(squares / c + 1e-5)) < 1e-6 * (4 + shift));
    }
  }
}

void check_linear(const Rows &rows) {
  for (const auto &[in, out] : {std::pair<int, int>{1, 1}, {48, 33}, {96, 64}, {100, 70}}) {
    const int wide = round_up(out, rows.panel), stride = in + 3;
    const auto a = random_values(rows.block * stride, 1), w = random_values(out * in, 2), bias = random_values(out, 3);
    std::vector<float> packed(wide * in), y(rows.block * wide);
    for (int first = 0; first < out; first += rows.panel)
      rows.pack(DVIT_FLOAT32, w.data(), first, out, in, &packed[first * in]);
    rows.linear(a.data(), stride, in, packed.data(), bias.data(), out, y.data(), wide);
    for (int r = 0; r < rows.block; ++r)
      for (int j = 0; j < out; ++j) {
        double right = bias[j];
        for (int k = 0; k < in; ++k) right += double{a[r * stride + k]} * w[j * in + k];
        CHECK(std::fabs(y[r * wide + j] - right) < 3e-5);
      }
  }
}

}  // namespace

int main() {
  check_rounding<Float16>(0x7c00);
  check_rounding<BFloat16>(0x7f80);
  for (const Rows *rows : levels_here()) {
    check_gelu(*rows);
    check_normalise(*rows);
    check_linear(*rows);
    std::printf("rows: %d at a time, %d columns: right\n", rows->block, rows->panel);
  }
}
