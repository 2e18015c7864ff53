// Attention of one query token: scores of up to 128 keys, softmax, weighted values, each key and value read once.
#include "attention_rows.h"

namespace cpu {
namespace {

template <class C>
inline void prefetch_row(const C* row, int head_dim) {
  for (int d = 0; d < head_dim; d += 64 / int(sizeof(C))) _mm_prefetch((const char*)(row + d), _MM_HINT_T0);
}

constexpr int kWide = 4;    // vectors of a register tile's width
constexpr int kAhead = 16;  // keys

// The sums of four vectors.
inline __m128 sum4(const vf* x) {
#ifdef CPU_AVX512
  __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
  __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
  __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)), high = _mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b));
  __m512 c = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
  __m256 d = _mm256_add_ps(_mm512_castps512_ps256(c), _mm512_extractf32x8_ps(c, 1));
#else
  __m256 a = _mm256_add_ps(_mm256_unpacklo_ps(x[0], x[1]), _mm256_unpackhi_ps(x[0], x[1]));
  __m256 b = _mm256_add_ps(_mm256_unpacklo_ps(x[2], x[3]), _mm256_unpackhi_ps(x[2], x[3]));
  __m256d low = _mm256_unpacklo_pd(_mm256_castps_pd(a), _mm256_castps_pd(b)), high = _mm256_unpackhi_pd(_mm256_castps_pd(a), _mm256_castps_pd(b));
  __m256 d = _mm256_add_ps(_mm256_castpd_ps(low), _mm256_castpd_ps(high));
#endif
  return _mm_add_ps(_mm256_castps256_ps128(d), _mm256_extractf128_ps(d, 1));
}

// scores[r][0..4) = q rows [0, R) . 4 keys
template <int R, class C>
inline void dot_keys(const float* q, const C* const* keys, int head_dim, float* scores, int stride) {
  vf sums[R][4];
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < 4; ++i) sums[r][i] = vset(0.0f);
  for (int d = 0; d < head_dim; d += kLanes) {
    vf k[4];
    for (int i = 0; i < 4; ++i) k[i] = vload(keys[i] + d);
    for (int r = 0; r < R; ++r) {
      vf x = vload(q + size_t(r) * head_dim + d);
      for (int i = 0; i < 4; ++i) sums[r][i] = vfma(x, k[i], sums[r][i]);
    }
  }
  for (int r = 0; r < R; ++r) _mm_storeu_ps(scores + size_t(r) * stride, sum4(sums[r]));
}

// out[r][d .. d + V * lanes) = sum over keys of p[r][key] * value[key], for rows [0, R)
template <int R, int V, class Row>
inline void weigh_values(const float* p, int stride, int num_keys, Row&& value, int d, float* out, int out_stride) {
  vf sums[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sums[r][v] = vset(0.0f);
  for (int i = 0; i < num_keys; ++i) {
    auto row = value(i) + d;
    vf x[V];
    for (int v = 0; v < V; ++v) x[v] = vload(row + v * kLanes);
    for (int r = 0; r < R; ++r) {
      vf weight = vset(p[size_t(r) * stride + i]);
      for (int v = 0; v < V; ++v) sums[r][v] = vfma(weight, x[v], sums[r][v]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) vstore(out + size_t(r) * out_stride + d + v * kLanes, sums[r][v]);
}

template <int R, class Row>
inline void weigh_all(const float* p, int stride, int num_keys, Row&& value, int head_dim, float* out, int out_stride) {
  int d = 0;
  for (; d + kWide * kLanes <= head_dim; d += kWide * kLanes) weigh_values<R, kWide>(p, stride, num_keys, value, d, out, out_stride);
  for (; d < head_dim; d += kLanes) weigh_values<R, 1>(p, stride, num_keys, value, d, out, out_stride);
}

#ifdef CPU_BF16_PAIRS
inline __m512bh load_pairs(const void* p) { return (__m512bh)_mm512_loadu_si512(p); }

// dot_keys in bfloat16 pairs, for a head size that 32 divides.
template <int R>
inline void dot_keys(const bf16* q, const bf16* const* keys, int head_dim, float* scores, int stride) {
  vf sums[R][4];
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < 4; ++i) sums[r][i] = vset(0.0f);
  for (int d = 0; d < head_dim; d += 32) {
    __m512bh k[4];
    for (int i = 0; i < 4; ++i) k[i] = load_pairs(keys[i] + d);
    for (int r = 0; r < R; ++r) {
      __m512bh x = load_pairs(q + size_t(r) * head_dim + d);
      for (int i = 0; i < 4; ++i) sums[r][i] = _mm512_dpbf16_ps(sums[r][i], x, k[i]);
    }
  }
  for (int r = 0; r < R; ++r) _mm_storeu_ps(scores + size_t(r) * stride, sum4(sums[r]));
}

// weigh_values in bfloat16, for 32 elements from d on. Row r of p holds the weights of keys 2 i and 2 i + 1 at element i.
template <int R>
inline void weigh_pairs(const uint32_t* p, int stride, int num_keys, const bf16* values, const int64_t* offsets, int d, float* out, int out_stride) {
  vf low[R], high[R];
  for (int r = 0; r < R; ++r) low[r] = high[r] = vset(0.0f);
  for (int i = 0; i < num_keys; i += 2) {
    __m512i even = _mm512_loadu_si512(values + offsets[i] + d);
    __m512i odd = i + 1 < num_keys ? _mm512_loadu_si512(values + offsets[i + 1] + d) : _mm512_setzero_si512();
    __m512bh x = (__m512bh)_mm512_unpacklo_epi16(even, odd), y = (__m512bh)_mm512_unpackhi_epi16(even, odd);
    for (int r = 0; r < R; ++r) {
      __m512bh weights = (__m512bh)_mm512_set1_epi32(int(p[size_t(r) * stride + i / 2]));
      low[r] = _mm512_dpbf16_ps(low[r], weights, x);
      high[r] = _mm512_dpbf16_ps(high[r], weights, y);
    }
  }
  for (int r = 0; r < R; ++r) {  // 128-bit lanes of `low` and `high` alternate
    __m512 first = _mm512_shuffle_f32x4(low[r], high[r], 0x44), second = _mm512_shuffle_f32x4(low[r], high[r], 0xEE);
    vstore(out + size_t(r) * out_stride + d, _mm512_shuffle_f32x4(first, first, 0xD8));
    vstore(out + size_t(r) * out_stride + d + 16, _mm512_shuffle_f32x4(second, second, 0xD8));
  }
}
#endif

// Whether decodes with such caches use bfloat16 pairs.
template <class C>
inline bool uses_pairs(int head_dim) {
#ifdef CPU_BF16_PAIRS
  return sizeof(C) == 2 && head_dim % 32 == 0;
#else
  return sizeof(C) == 0 && head_dim;
#endif
}

// R query rows (scaled; bfloat16 where pairs are used) of one decode over its keys: weighted sums of values, and each row's maximum and weight.
template <int R, class C>
void decode_rows(const AttentionShape& shape, const int64_t* offsets, int count, const C* keys, const C* values, const float* q, float* scores,
                 float* out, float* maximum, float* weight) {
  int head_dim = shape.head_dim;
  bool pairs = uses_pairs<C>(head_dim);
  for (int i = 0; i < count; i += 4) {
    const C* rows[4];
    for (int j = 0; j < 4; ++j) {
      rows[j] = keys + offsets[std::min(i + j, count - 1)];
      prefetch_row(keys + offsets[std::min(i + j + kAhead, count - 1)], head_dim);  // blocks lie apart: hardware sees no stream
      prefetch_row(values + offsets[std::min(i + j, count - 1)], head_dim);
    }
    if constexpr (sizeof(C) == 2) {
#ifdef CPU_BF16_PAIRS
      if (pairs) {
        dot_keys<R>((const bf16*)q, rows, head_dim, scores + i, kSplitKeys);
        continue;
      }
#endif
    }
    dot_keys<R>(q, rows, head_dim, scores + i, kSplitKeys);
  }
  int padded = (count + kLanes - 1) / kLanes * kLanes;
  for (int r = 0; r < R; ++r) {
    float* row = scores + r * kSplitKeys;
    maximum[r] = row_maximum(row, count);
    weight[r] = softmax_weights(row, count, padded, maximum[r]);
    if (pairs)
      for (int i = 0; i < padded; i += kLanes) vstore((bf16*)row + i, vload(row + i));  // in place: never ahead of what is still to be read
  }
  if constexpr (sizeof(C) == 2) {
#ifdef CPU_BF16_PAIRS
    if (pairs) {
      for (int d = 0; d < head_dim; d += 32) weigh_pairs<R>((const uint32_t*)scores, kSplitKeys, count, values, offsets, d, out, head_dim);
      return;
    }
#endif
  }
  weigh_all<R>(scores, kSplitKeys, count, [&](int i) { return values + offsets[i]; }, head_dim, out, head_dim);
}

}  // namespace

template <class C>
void decode_item(const AttentionShape& shape, AttentionPlan& plan, const AttentionItem& item, const float* q, const void* key_cache,
                 const void* value_cache, float* out, Scratch& scratch) {
  int head_dim = shape.head_dim, group = plan.group, count = item.end - item.begin;
  bool pairs = uses_pairs<C>(head_dim);
  const C *keys = (const C*)key_cache, *values = (const C*)value_cache;
  int64_t offsets[kSplitKeys];
  find_rows(shape, item, item.begin, count, offsets);
  scratch.q.resize(size_t(group) * head_dim);
  scratch.scores.resize(4 * kSplitKeys);
  const float* source = q + (size_t(item.first_token) * shape.num_heads + item.kv_head * group) * head_dim;
  for (int i = 0; i < group * head_dim; i += kLanes) {
    vf scaled = vmul(vload(source + i), vset(shape.scale));
    if (pairs) vstore((bf16*)scratch.q.data() + i, scaled);
    else vstore(scratch.q.data() + i, scaled);
  }
  float* sums = item.partial < 0 ? out + (size_t(item.first_token) * shape.num_heads + item.kv_head * group) * head_dim
                                 : plan.partials.data() + size_t(item.partial) * group * (head_dim + 2);
  float own[4], own_weight[4];
  for (int r = 0; r < group;) {
    float *maximum = item.partial < 0 ? own : sums + size_t(group) * head_dim + r, *weight = item.partial < 0 ? own_weight : maximum + group;
    const float* rows = pairs ? (const float*)((const bf16*)scratch.q.data() + size_t(r) * head_dim) : scratch.q.data() + size_t(r) * head_dim;
    float *target = sums + size_t(r) * head_dim, *scores = scratch.scores.data();
    int step = std::min(4, group - r);
    if (step == 4) decode_rows<4>(shape, offsets, count, keys, values, rows, scores, target, maximum, weight);
    else if (step == 3) decode_rows<3>(shape, offsets, count, keys, values, rows, scores, target, maximum, weight);
    else if (step == 2) decode_rows<2>(shape, offsets, count, keys, values, rows, scores, target, maximum, weight);
    else decode_rows<1>(shape, offsets, count, keys, values, rows, scores, target, maximum, weight);
    if (item.partial < 0) {
      for (int i = 0; i < step; ++i) {
        vf inverse = vset(1.0f / weight[i]);
        for (int d = 0; d < head_dim; d += kLanes) vstore(target + size_t(i) * head_dim + d, vmul(vload(target + size_t(i) * head_dim + d), inverse));
      }
    }
    r += step;
  }
}

template void decode_item<float>(const AttentionShape&, AttentionPlan&, const AttentionItem&, const float*, const void*, const void*, float*, Scratch&);
template void decode_item<bf16>(const AttentionShape&, AttentionPlan&, const AttentionItem&, const float*, const void*, const void*, float*, Scratch&);

void merge_partials(const AttentionShape& shape, const AttentionPlan& plan, const AttentionMerge& merge, float* out) {
  int head_dim = shape.head_dim, group = plan.group;
  size_t stride = size_t(group) * (head_dim + 2);
  const float* first = plan.partials.data() + merge.first_partial * stride;
  for (int r = 0; r < group; ++r) {
    float top = -std::numeric_limits<float>::infinity(), total = 0.0f;
    for (int i = 0; i < merge.num_partials; ++i) top = std::max(top, first[i * stride + size_t(group) * head_dim + r]);
    float* target = out + (size_t(merge.token) * shape.num_heads + merge.kv_head * group + r) * head_dim;
    for (int d = 0; d < head_dim; ++d) target[d] = 0.0f;
    for (int i = 0; i < merge.num_partials; ++i) {
      const float* part = first + i * stride;
      float factor = std::exp(part[size_t(group) * head_dim + r] - top);
      total += factor * part[size_t(group) * (head_dim + 1) + r];
      for (int d = 0; d < head_dim; ++d) target[d] += factor * part[size_t(r) * head_dim + d];
    }
    for (int d = 0; d < head_dim; ++d) target[d] /= total;
  }
}

}  // namespace cpu
