// Integer linear layers: weights in tiles of 16 output features, activations quantised to int8 in groups of 32.
//
// y[t, r] = sum over groups g of  scale[r, g] * s[t, g] * sum_k q[r, k] x[t, k]  +  minimum[r, g] * s[t, g] * sum_k x[t, k]
// with w = scale * q + minimum (GGUF's Q4_1 and, with minimum = -zero * scale, Q4_0 and Q8_0) and activation = s * x. Integer sums are exact, and a
// token's result does not depend on which tokens are beside it, but for the choice of extra groups (below) in a large step's blocks of 16.
#pragma once
#include <cstddef>
#include <cstdlib>
#include <vector>

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
  void* data_[8] = {};
  size_t size_[8] = {};
};

// A step of at most kPreciseTokens quantises each activation in two terms, x = s1 q1 + s2 q2 with q2 the rest of q1, as two rows whose products
// are added: 15 bits instead of 7, for twice the multiplications. One token is bound by the weights' bytes, so there it costs nothing.
constexpr int kPreciseTokens = 64;
inline int num_terms(int num_tokens) { return num_tokens <= kPreciseTokens ? 2 : 1; }

// In a larger step one group in 16 of each block of tokens has its second term nonetheless: those with the largest scales, whose rounding is most of
// the error, since a few features of a residual stream are far larger than the rest (SmolLM2's inputs of qkv and gate-up: 2 of 18 groups hold 74 and
// 56 % of it). Greedy agreement with float32 rises from 97.0 to 98.8 % for a tenth more products.
inline int num_extra_groups(int num_tokens, int groups) { return num_terms(num_tokens) == 2 ? 0 : (groups + 15) / 16; }

// A step's activations, as blocks of 16 rows: a block's groups in order, then its extra groups.
struct Acts {
  ActGroup* data;
  int32_t* extra_index;  // [blocks][extras]: which group each is the second term of
  int groups, extras;

  ActGroup* block(int index) const { return data + size_t(index) * (groups + extras); }
  int32_t* block_extra(int index) const { return extra_index + size_t(index) * extras; }
};

inline int num_blocks(int num_tokens) { return (num_tokens * num_terms(num_tokens) + kBlockTokens - 1) / kBlockTokens; }

// Room for the activations of a step, in two slots of a workspace.
inline Acts make_acts(Workspace& workspace, int slot, int num_tokens, int max_features) {
  int groups = max_features / kGroup, extras = num_extra_groups(num_tokens, groups), blocks = num_blocks(num_tokens);
  return {workspace.get<ActGroup>(slot, size_t(blocks) * (groups + extras)), workspace.get<int32_t>(slot + 1, size_t(blocks) * extras), groups, extras};
}

// The same room for fewer features.
inline Acts narrowed(const Acts& acts, int num_tokens, int in_features) {
  int groups = in_features / kGroup;
  return {acts.data, acts.extra_index, groups, acts.extras ? num_extra_groups(num_tokens, groups) : 0};
}

// Quantises 32 floats into `out`, as row `t` of its block, or with two terms as rows t and t + 1.
void quantize_group(const float* x, ActGroup* out, int t, int terms);

// Quantises the rows [num_tokens <= 16, groups * 32] of block `index` of a large step, extra groups included.
void quantize_block(const float* x, int num_tokens, const Acts& acts, int index);

// Quantises all tokens of a step, shared by the team; make_rows(first, count, rows) fills `count` rows of floats.
template <class MakeRows>
void share_quantize(Team& team, const Acts& acts, int num_tokens, MakeRows&& make_rows) {
  int width = acts.groups * kGroup, terms = num_terms(num_tokens), blocks = num_blocks(num_tokens);
  thread_local std::vector<float> rows;
  if (terms == 1) {
    team.share(blocks, team.piece(blocks, 4), [&](int begin, int end) {
      rows.resize(size_t(width) * kBlockTokens);
      for (int i = begin; i < end; ++i) {
        int first = i * kBlockTokens, count = std::min(kBlockTokens, num_tokens - first);
        make_rows(first, count, rows.data());
        quantize_block(rows.data(), count, acts, i);
      }
    });
    return;
  }
  team.share(num_tokens, team.piece(num_tokens, 4), [&](int begin, int end) {
    rows.resize(width);
    for (int t = begin; t < end; ++t) {
      make_rows(t, 1, rows.data());
      ActGroup* block = acts.block(t * terms / kBlockTokens);
      for (int g = 0; g < acts.groups; ++g) quantize_group(rows.data() + g * kGroup, block + g, t * terms % kBlockTokens, terms);
    }
  });
}

// Adds the products of a token's two terms: values[t] = values[2 t] + values[2 t + 1].
inline void add_terms(float (*values)[kTileRows], int num_tokens) {
  for (int t = 0; t < num_tokens; ++t)
    for (int r = 0; r < kTileRows; r += kLanes) vstore(values[t] + r, vadd(vload(values[2 * t] + r), vload(values[2 * t + 1] + r)));
}

// out[t][0..16) for rows [0, num_rows <= 16) of block `index`. fresh: the weights come from memory, not from a cache.
void tile_product(const Tile& tile, const Acts& acts, int index, int num_rows, bool fresh, float (*out)[kTileRows]);

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
void share_tiles(Team& team, const Linear& linear, const Acts& acts, int num_tokens, Epilogue&& epilogue) {
  int terms = num_terms(num_tokens), num_rows = num_tokens * terms;
  team.share(linear.num_tiles, tile_piece(team, linear.num_tiles, acts.groups, num_rows), [&](int begin, int end) {
    alignas(64) float values[kBlockTokens][kTileRows];
    for (int first = 0; first < num_rows; first += kBlockTokens) {
      int count = std::min(kBlockTokens, num_rows - first);
      for (int i = begin; i < end; ++i) {
        tile_product(linear.tiles[i], acts, first / kBlockTokens, count, first == 0, values);
        if (terms == 2) add_terms(values, count / 2);
        epilogue(linear.tiles[i], first / terms, count / terms, values);
      }
    }
  });
}

}  // namespace cpu
