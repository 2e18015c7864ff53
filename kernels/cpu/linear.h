// Integer linear layers: weights in tiles of 16 output features, activations quantised to int8 in groups of 32.
//
// y[t, r] = sum over groups g of  scale[r, g] * s[t, g] * sum_k q[r, k] x[t, k]  +  minimum[r, g] * s[t, g] * sum_k x[t, k]
// with w = scale * q + minimum (GGUF's Q4_1 and, with minimum = -zero * scale, Q4_0 and Q8_0) and activation = s * x. Integer sums are exact, and a
// token's result does not depend on which tokens are beside it.
#pragma once
#include <cstddef>
#include <cstdlib>

#include "simd.h"
#include "team.h"

namespace cpu {

constexpr int kGroup = 32;       // input features that share a scale
constexpr int kTileRows = 16;    // output features of a tile
constexpr int kBlockTokens = 16; // tokens of an activation block

// Bytes of one group of a tile: float16 scales (and minima) of 16 rows, then the quants. For 4 bits, byte i of 64-byte line j holds, for row
// i / 4, feature 4 j + i % 4 (low nibble) and feature 16 + 4 j + i % 4 (high); for 8 bits line j of 8 holds feature 4 j + i % 4, plus 128.
enum Format : int32_t { kInt4Min = 0, kInt4 = 1, kInt8 = 2 };
constexpr int kGroupBytes[] = {32 + 32 + 256, 32 + 256, 32 + 512};

// 16 tokens of one group.
struct alignas(64) ActGroup {
  int8_t x[kBlockTokens][kGroup];
  float scale[kBlockTokens];
  float scaled_sum[kBlockTokens];  // scale * sum of x
  int32_t offset[kBlockTokens];    // -128 * sum of x
};

struct Tile {
  const uint8_t* data;
  int32_t format;
  int32_t first_row;
  int32_t num_rows;  // 16, fewer in the last tile of a part
  int32_t unused;
};

// As ctypes hands it over (linear.py).
struct Linear {
  const Tile* tiles;
  const float* bias;  // or null
  int32_t num_tiles;
  int32_t in_features;
  int32_t out_features;
  int32_t unused;
};

// Scratch memory that a thread keeps between its calls, so that large steps do not fault their pages in anew; contents are arbitrary.
class Workspace {
 public:
  ~Workspace() {
    for (void* data : data_) std::free(data);
  }
  template <class T>
  T* get(int slot, size_t count) {
    size_t bytes = (count * sizeof(T) + 4095) / 4096 * 4096;
    if (bytes > size_[slot] || size_[slot] > kKeptBytes) {
      std::free(data_[slot]);
      data_[slot] = std::aligned_alloc(4096, std::max<size_t>(bytes, 4096));
      if (!data_[slot]) std::abort();  // out of memory
      size_[slot] = bytes;
    }
    return (T*)data_[slot];
  }

 private:
  static constexpr size_t kKeptBytes = 32 << 20;  // a larger one is given back at the next call
  void* data_[6] = {};
  size_t size_[6] = {};
};

// A step of at most kPreciseTokens quantises each activation in two terms, x = s1 q1 + s2 q2 with q2 the rest of q1, as two rows whose products
// are added: 15 bits instead of 7, for twice the multiplications. One token is bound by the weights' bytes, so there it costs nothing.
constexpr int kPreciseTokens = 64;
inline int num_terms(int num_tokens) { return num_tokens <= kPreciseTokens ? 2 : 1; }

inline size_t act_groups(int num_tokens, int in_features) {
  return size_t((num_tokens * num_terms(num_tokens) + kBlockTokens - 1) / kBlockTokens) * (in_features / kGroup);
}

// Quantises 32 floats into `out`, as row `t` of its block, or with two terms as rows t and t + 1.
void quantize_group(const float* x, ActGroup* out, int t, int terms);

// Quantises the in_features floats of `token` into its block of `acts`.
inline void quantize_row(const float* x, int in_features, ActGroup* acts, int token, int terms) {
  int groups = in_features / kGroup, row = token * terms;
  ActGroup* block = acts + size_t(row / kBlockTokens) * groups;
  for (int g = 0; g < groups; ++g) quantize_group(x + g * kGroup, block + g, row % kBlockTokens, terms);
}

// Adds the products of a token's two terms: values[t] = values[2 t] + values[2 t + 1].
inline void add_terms(float (*values)[kTileRows], int num_tokens) {
  for (int t = 0; t < num_tokens; ++t)
    for (int r = 0; r < kTileRows; r += kLanes) vstore(values[t] + r, vadd(vload(values[2 * t] + r), vload(values[2 * t + 1] + r)));
}

// out[t][0..16) for tokens [0, num_tokens <= 16) of the block at `acts`. fresh: the weights come from memory, not from a cache.
void tile_product(const Tile& tile, const ActGroup* acts, int groups, int num_tokens, bool fresh, float (*out)[kTileRows]);

// How many tiles a thread takes at once: few enough to stay in a first-level cache beside a block of activations where tokens are many.
inline int tile_piece(const Team& team, int num_tiles, int groups, int num_tokens) {
  int cached = std::max(1, 20480 / (groups * kGroupBytes[kInt4Min]));
  return std::min(team.piece(num_tiles, 6), num_tokens > kBlockTokens ? cached : 8);
}

// target[r] = values[r] + bias[r] (+ target[r]) for a tile's rows.
template <bool kAdd, class T>
inline void store_tile_row(const Tile& tile, const float* values, const float* bias, T* target) {
  if (tile.num_rows == kTileRows) {
    for (int r = 0; r < kTileRows; r += kLanes) {
      vf x = vload(values + r);
      if (bias) x = vadd(x, vload(bias + tile.first_row + r));
      if (kAdd) x = vadd(x, vload(target + r));
      vstore(target + r, x);
    }
    return;
  }
  for (int r = 0; r < tile.num_rows; ++r) {
    from_float(values[r] + (bias ? bias[tile.first_row + r] : 0.0f) + (kAdd ? to_float(target[r]) : 0.0f), target + r);
  }
}

// All tiles of `linear` for all tokens, shared by the team; epilogue(tile, first_token, num_tokens, values) sees each result once.
template <class Epilogue>
void share_tiles(Team& team, const Linear& linear, const ActGroup* acts, int num_tokens, Epilogue&& epilogue) {
  int groups = linear.in_features / kGroup, terms = num_terms(num_tokens), num_rows = num_tokens * terms;
  team.share(linear.num_tiles, tile_piece(team, linear.num_tiles, groups, num_rows), [&](int begin, int end) {
    alignas(64) float values[kBlockTokens][kTileRows];
    for (int first = 0; first < num_rows; first += kBlockTokens) {
      int count = std::min(kBlockTokens, num_rows - first);
      const ActGroup* block = acts + size_t(first / kBlockTokens) * groups;
      for (int i = begin; i < end; ++i) {
        tile_product(linear.tiles[i], block, groups, count, first == 0, values);
        if (terms == 2) add_terms(values, count / 2);
        epilogue(linear.tiles[i], first / terms, count / terms, values);
      }
    }
  });
}

}  // namespace cpu
