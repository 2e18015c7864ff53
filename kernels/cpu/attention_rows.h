// What decode and chunk attention share: where rows lie, softmax, scratch, and whether bfloat16 products exist.
#pragma once
#include <limits>

#include "attention.h"

#if defined(CPU_AVX512) && defined(__AVX512BF16__)
#define CPU_BF16_PAIRS 1  // vdpbf16ps: twice the products of float32
#endif

namespace cpu {

// Where the keys (and, in the other cache, the values) of positions [begin, begin + count) lie, in elements from the cache's start.
inline void find_rows(const AttentionShape& shape, const AttentionItem& item, int begin, int count, int64_t* offsets) {
  int64_t block_stride = int64_t(shape.num_kv_heads) * shape.block_size * shape.head_dim;
  int64_t head_offset = int64_t(item.kv_head) * shape.block_size * shape.head_dim;
  int block = begin / shape.block_size, within = begin % shape.block_size;
  for (int i = 0; i < count; ++block, within = 0) {
    int64_t at = item.table[block] * block_stride + head_offset;
    for (; within < shape.block_size && i < count; ++within) offsets[i++] = at + int64_t(within) * shape.head_dim;
  }
}

// exp(s - maximum) in place over [0, padded); returns the sum. Entries past `count` become next to nothing (1e-38).
inline float softmax_weights(float* s, int count, int padded, float maximum) {
  for (int i = count; i < padded; ++i) s[i] = -std::numeric_limits<float>::infinity();
  vf sum = vset(0.0f), top = vset(maximum);
  for (int i = 0; i < padded; i += kLanes) {
    vf e = vexp(vsub(vload(s + i), top));
    vstore(s + i, e);
    sum = vadd(sum, e);
  }
  return vsum(sum);
}

inline float row_maximum(const float* s, int count) {
  float top = -std::numeric_limits<float>::infinity();
  int i = 0;
  if (count >= kLanes) {
    vf lanes = vload(s);
    for (i = kLanes; i + kLanes <= count; i += kLanes) lanes = vmax(lanes, vload(s + i));
    top = vmaximum(lanes);
  }
  for (; i < count; ++i) top = std::max(top, s[i]);
  return top;
}

struct Scratch {
  std::vector<float> q, scores, keys, values, out, state;  // keys and values: panels of Element (4 bytes either way)
};

// One item of the plan, for caches of element type C (float or bf16).
template <class C>
void decode_item(const AttentionShape& shape, AttentionPlan& plan, const AttentionItem& item, const float* q, const void* keys, const void* values,
                 float* out, Scratch& scratch);
template <class C>
void chunk_item(const AttentionShape& shape, const AttentionPlan& plan, const AttentionItem& item, const float* q, const void* keys,
                const void* values, float* out, Scratch& scratch);

// Weighs the partial results of a split decode.
void merge_partials(const AttentionShape& shape, const AttentionPlan& plan, const AttentionMerge& merge, float* out);

}  // namespace cpu
