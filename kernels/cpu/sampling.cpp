// Drawing one id a row where no filter is on: argmax of logits, or of logits / temperature + Gumbel noise (philox.py, reference_sampling.py).
#include <algorithm>
#include <limits>
#include <vector>

#include "simd.h"
#include "team.h"

namespace cpu {

// As ctypes hands it over (library.py).
struct DrawShape {
  const int32_t* rows;    // [B] of params
  const int32_t* params;  // [R, num_params]
  int64_t vocab;
  int32_t num_rows;
  int32_t num_params;
  int32_t seed_low, seed_high, output_index, temperature;  // columns
};

namespace {

constexpr int kNoiseLanes = 256;  // philox.NOISE_LANES: id v takes word (v / lanes) % 4 of counter v / (4 lanes) * lanes + v % lanes

struct Words {
  uint32_t word[4];
};

// Philox4x32-10 with counter (counter, output_index, 0, 0).
inline Words philox(uint32_t counter, uint32_t output_index, uint32_t key0, uint32_t key1) {
  uint32_t c0 = counter, c1 = output_index, c2 = 0, c3 = 0;
  for (int round = 0; round < 10; ++round) {
    uint64_t p0 = uint64_t(c0) * 0xD2511F53u, p1 = uint64_t(c2) * 0xCD9E8D57u;
    uint32_t n0 = uint32_t(p1 >> 32) ^ c1 ^ key0, n2 = uint32_t(p0 >> 32) ^ c3 ^ key1;
    c1 = uint32_t(p1);
    c3 = uint32_t(p0);
    c0 = n0;
    c2 = n2;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// log x for normal x > 0, absolute error below 1e-7, in a form that vectorises.
inline double fast_log(double x) {
  int64_t bits;
  std::memcpy(&bits, &x, 8);
  int64_t shifted = bits - 0x3FE6A09E667F3BCDLL;  // sqrt(1/2): mantissa in [sqrt(1/2), sqrt(2))
  int64_t exponent = shifted >> 52;
  int64_t mantissa_bits = bits - (exponent << 52);
  double m;
  std::memcpy(&m, &mantissa_bits, 8);
  double s = (m - 1.0) / (m + 1.0), z = s * s;
  double series = 1.0 + z * (1.0 / 3 + z * (1.0 / 5 + z * (1.0 / 7 + z * (1.0 / 9))));
  int64_t magic = exponent + 0x4338000000000000LL;  // exponent as a double, by adding it to 1.5 * 2^52
  double e;
  std::memcpy(&e, &magic, 8);
  return (e - 6755399441055744.0) * 0.693147180559945309417 + 2.0 * s * series;
}

inline double uniform(uint32_t word) { return (double(word) + 0.5) * 0x1p-32; }

template <class T>
float largest(const T* x, int64_t begin, int64_t end) {
  vf top = vset(-std::numeric_limits<float>::infinity());
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) top = vmax(vload(x + i), top);
  float best = vmaximum(top);
  for (; i < end; ++i) best = std::max(best, to_float(x[i]));
  return best;
}

template <class T>
int32_t first_at_least(const T* x, int64_t begin, int64_t end, float value) {
  for (int64_t i = begin; i < end; ++i)
    if (to_float(x[i]) >= value) return int32_t(i);
  return int32_t(begin);  // only NaN logits come here
}

struct Best {
  float score = -std::numeric_limits<float>::infinity();
  int32_t id = 0;
};

constexpr int kSpan = 4096;    // ids of a piece of work, a multiple of 4 kNoiseLanes
constexpr float kSlack = 1e-4f;  // more than fast_log and its float32 roundings may err, relative to 1 + |score|

template <class T>
Best draw_span(const T* logits, int64_t begin, int64_t end, float temperature, uint32_t low, uint32_t high, uint32_t output_index) {
  Best best;
  if (!(temperature > 0.0f)) {
    best.score = largest(logits, begin, end);
    best.id = first_at_least(logits, begin, end, best.score);
    return best;
  }
  alignas(64) uint32_t words[kSpan];
  alignas(64) float scores[kSpan];
  int count = int(end - begin);
  for (int group = 0; group < count; group += 4 * kNoiseLanes) {
    uint32_t first = uint32_t(begin + group) / 4;
#pragma omp simd
    for (int i = 0; i < kNoiseLanes; ++i) {
      Words found = philox(first + uint32_t(i), output_index, low, high);
      for (int w = 0; w < 4; ++w) words[group + w * kNoiseLanes + i] = found.word[w];
    }
  }
#pragma omp simd
  for (int i = 0; i < count; ++i) scores[i] = float(-fast_log(-fast_log((double(int64_t(words[i])) + 0.5) * 0x1p-32)));
  for (int i = 0; i < count; ++i) scores[i] += to_float(logits[begin + i]) / temperature;
  float top = largest(scores, 0, count), bar = top - kSlack * (1.0f + std::abs(top));
  for (int i = 0; i < count; ++i) {
    if (!(scores[i] >= bar)) continue;
    float noise = float(-std::log(-std::log(uniform(words[i]))));
    float exact = to_float(logits[begin + i]) / temperature + noise;
    if (exact > best.score) best = {exact, int32_t(begin + i)};
  }
  return best;
}

template <class T>
void draw(const DrawShape& shape, const T* logits, int32_t* out, int num_threads) {
  int spans = int((shape.vocab + kSpan - 1) / kSpan);
  std::vector<Best> found(size_t(shape.num_rows) * spans);
  run_team(num_threads, [&](Team& team, int) {
    team.share(int(found.size()), 1, [&](int first, int last) {
      for (int i = first; i < last; ++i) {
        int row = i / spans;
        int64_t begin = int64_t(i % spans) * kSpan, end = std::min(shape.vocab, begin + kSpan);
        const int32_t* params = shape.params + int64_t(shape.rows[row]) * shape.num_params;
        float temperature;
        std::memcpy(&temperature, params + shape.temperature, 4);
        found[i] = draw_span(logits + row * shape.vocab, begin, end, temperature, uint32_t(params[shape.seed_low]), uint32_t(params[shape.seed_high]),
                             uint32_t(params[shape.output_index]));
      }
    });
  });
  for (int row = 0; row < shape.num_rows; ++row) {
    Best best = found[size_t(row) * spans];
    for (int i = 1; i < spans; ++i)
      if (found[size_t(row) * spans + i].score > best.score) best = found[size_t(row) * spans + i];
    out[row] = best.id;
  }
}

}  // namespace
}  // namespace cpu

// logits [B, vocab] of dtype; out [B].
extern "C" void cpu_draw(const cpu::DrawShape* shape, const void* logits, int32_t* out, int32_t dtype, int32_t num_threads) {
  if (dtype == cpu::kFloat32) cpu::draw(*shape, (const float*)logits, out, num_threads);
  else cpu::draw(*shape, (const cpu::bf16*)logits, out, num_threads);
}

// The noise's random words and a batch's noise itself, for tests.
extern "C" void cpu_philox(const int32_t* ids, int32_t count, uint32_t output_index, uint32_t low, uint32_t high, uint32_t* out) {
  for (int i = 0; i < count; ++i) {
    uint32_t id = uint32_t(ids[i]), lanes = cpu::kNoiseLanes;
    out[i] = cpu::philox(id / (4 * lanes) * lanes + id % lanes, output_index, low, high).word[id / lanes % 4];
  }
}
