#include "attention.h"

#include <limits>

namespace cpu {

AttentionPlan::AttentionPlan(const AttentionShape& shape) : group(shape.num_heads / shape.num_kv_heads) {
  int chunk_tokens = std::max(1, kChunkRows / group), num_partials = 0;
  for (int entry = shape.num_entries - 1; entry >= 0; --entry) {  // chunks first: they take longest
    int start = shape.query_start[entry], length = shape.query_start[entry + 1] - start, context = shape.context_lens[entry];
    if (context <= 0 || length <= 0) continue;
    const int32_t* table = shape.block_tables + shape.rows[entry] * shape.max_blocks;
    for (int last = length; last > 0; last -= chunk_tokens) {
      int first = std::max(0, last - chunk_tokens), position = context - length + first;
      int oldest = shape.sliding_window ? std::max(0, position - shape.sliding_window + 1) : 0, end = context - length + last;
      for (int head = 0; head < shape.num_kv_heads; ++head) {
        AttentionItem item{table, head, start + first, last - first, position, oldest, end, -1};
        if (length > 1 || end - oldest <= kSplitKeys) {
          items.push_back(item);
          continue;
        }
        int pieces = (end - oldest + kSplitKeys - 1) / kSplitKeys;
        merges.push_back({start, head, num_partials, pieces});
        for (int i = 0; i < pieces; ++i) {
          item.begin = oldest + i * kSplitKeys;
          item.end = std::min(end, item.begin + kSplitKeys);
          item.partial = num_partials++;
          items.push_back(item);
        }
      }
    }
  }
  partials.resize(size_t(num_partials) * group * (shape.head_dim + 2));
}

namespace {

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

#if defined(CPU_AVX512) && defined(__AVX512BF16__)
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

struct Scratch {
  std::vector<float> q, scores, keys, values, out, state;  // keys and values: panels of Element (4 bytes either way)
};

// Whether decodes with such caches use bfloat16 pairs.
template <class C>
inline bool uses_pairs(int head_dim) {
#if defined(CPU_AVX512) && defined(__AVX512BF16__)
  return sizeof(C) == 2 && head_dim % 32 == 0;
#else
  return false && head_dim;
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
#if defined(CPU_AVX512) && defined(__AVX512BF16__)
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
#if defined(CPU_AVX512) && defined(__AVX512BF16__)
    if (pairs) {
      for (int d = 0; d < head_dim; d += 32) weigh_pairs<R>((const uint32_t*)scores, kSplitKeys, count, values, offsets, d, out, head_dim);
      return;
    }
#endif
  }
  weigh_all<R>(scores, kSplitKeys, count, [&](int i) { return values + offsets[i]; }, head_dim, out, head_dim);
}

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

void merge(const AttentionShape& shape, const AttentionPlan& plan, const AttentionMerge& merge, float* out) {
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

// What a chunk's products are made of: floats, or where cache and CPU are made for it pairs of bfloat16 (vdpbf16ps), which do twice as much.
template <class C>
struct Element {
  using Type = float;
  static constexpr int kPack = 1;
  static vf multiply_add(vf sum, const float* b, float a) { return vfma(vset(a), vload(b), sum); }
  static void narrow(const float* x, int count, float scale, float* out) {
    for (int i = 0; i < count; i += kLanes) vstore(out + i, vmul(vload(x + i), vset(scale)));
  }
  static void load8(const C* x, __m256* out) {
    if constexpr (sizeof(C) == 4) *out = _mm256_loadu_ps((const float*)x);
    else *out = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)x)), 16));
  }
  // values[key][d]
  static void lay_values(const C* const* rows, int head_dim, float* panel) {
    for (int i = 0; i < kPanelKeys; ++i)
      for (int d = 0; d < head_dim; d += kLanes) vstore(panel + size_t(i) * head_dim + d, rows[i] ? vload(rows[i] + d) : vset(0.0f));
  }
};

#if defined(CPU_AVX512) && defined(__AVX512BF16__)
template <>
struct Element<bf16> {
  using Type = uint32_t;
  static constexpr int kPack = 2;
  static vf multiply_add(vf sum, const uint32_t* b, uint32_t a) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(b), (__m512bh)_mm512_set1_epi32(int(a)));
  }
  static void narrow(const float* x, int count, float scale, uint32_t* out) {
    for (int i = 0; i < count; i += kLanes) vstore((bf16*)out + i, vmul(vload(x + i), vset(scale)));
  }
  static void load8(const bf16* x, __m256* out) { *out = _mm256_loadu_ps((const float*)x); }
  // values[key / 2][d]: the pair of two keys
  static void lay_values(const bf16* const* rows, int head_dim, uint32_t* panel) {
    for (int i = 0; i < kPanelKeys; i += 2) {
      for (int d = 0; d < head_dim; d += 16) {
        __m512i even = rows[i] ? _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(rows[i] + d))) : _mm512_setzero_si512();
        __m512i odd = rows[i + 1] ? _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(rows[i + 1] + d))) : _mm512_setzero_si512();
        _mm512_storeu_si512(panel + size_t(i / 2) * head_dim + d, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
      }
    }
  }
};
#endif

// panel[d][key] = element d of each of 64 keys; rows that are null give zeros.
template <class C>
void lay_keys(const C* const* rows, int elements, typename Element<C>::Type* panel) {
  constexpr int kStep = 8 * Element<C>::kPack;
  for (int i = 0; i < kPanelKeys; i += 8) {
    for (int d = 0; d < elements; d += 8) {
      __m256 r[8], s[8];
      for (int j = 0; j < 8; ++j) {
        if (rows[i + j]) Element<C>::load8(rows[i + j] + d / 8 * kStep, &r[j]);
        else r[j] = _mm256_setzero_ps();
      }
      for (int j = 0; j < 4; ++j) {
        s[2 * j] = _mm256_unpacklo_ps(r[2 * j], r[2 * j + 1]);
        s[2 * j + 1] = _mm256_unpackhi_ps(r[2 * j], r[2 * j + 1]);
      }
      for (int j = 0; j < 2; ++j) {
        r[4 * j] = _mm256_shuffle_ps(s[4 * j], s[4 * j + 2], 0x44);
        r[4 * j + 1] = _mm256_shuffle_ps(s[4 * j], s[4 * j + 2], 0xEE);
        r[4 * j + 2] = _mm256_shuffle_ps(s[4 * j + 1], s[4 * j + 3], 0x44);
        r[4 * j + 3] = _mm256_shuffle_ps(s[4 * j + 1], s[4 * j + 3], 0xEE);
      }
      for (int j = 0; j < 4; ++j) {
        _mm256_storeu_ps((float*)panel + size_t(d + j) * kPanelKeys + i, _mm256_permute2f128_ps(r[j], r[j + 4], 0x20));
        _mm256_storeu_ps((float*)panel + size_t(d + j + 4) * kPanelKeys + i, _mm256_permute2f128_ps(r[j], r[j + 4], 0x31));
      }
    }
  }
}

#ifdef CPU_AVX512
constexpr int kTileQ = 6, kTileV = 4;
#else
constexpr int kTileQ = 6, kTileV = 2;
#endif

// c[r][0 .. V lanes) = keep[r] * c[r] + sum over i < depth of a[r][i] * b[i], for rows [0, R); without keep, c is not read.
template <class C, int R, int V>
inline void product(const typename Element<C>::Type* a, int a_stride, const typename Element<C>::Type* b, int b_stride, int depth, float* c,
                    int c_stride, const float* keep) {
  vf sums[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sums[r][v] = keep ? vmul(vset(keep[r]), vload(c + size_t(r) * c_stride + v * kLanes)) : vset(0.0f);
  for (int i = 0; i < depth; ++i)
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) sums[r][v] = Element<C>::multiply_add(sums[r][v], b + size_t(i) * b_stride + v * kLanes, a[size_t(r) * a_stride + i]);
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) vstore(c + size_t(r) * c_stride + v * kLanes, sums[r][v]);
}

// The same over all of `width` columns and rows [first, rows).
template <class C>
void product_all(const typename Element<C>::Type* a, int a_stride, const typename Element<C>::Type* b, int width, int depth, float* c, int first,
                 int rows, const float* keep) {
  for (int column = 0; column < width;) {
    bool wide = column + kTileV * kLanes <= width;
    for (int r = first; r < rows;) {
      const auto* x = a + size_t(r) * a_stride;
      float* target = c + size_t(r) * width + column;
      const float* kept = keep ? keep + r : nullptr;
      bool tall = r + kTileQ <= rows;
      if (wide && tall) product<C, kTileQ, kTileV>(x, a_stride, b + column, width, depth, target, width, kept);
      else if (wide) product<C, 1, kTileV>(x, a_stride, b + column, width, depth, target, width, kept);
      else if (tall) product<C, kTileQ, 1>(x, a_stride, b + column, width, depth, target, width, kept);
      else product<C, 1, 1>(x, a_stride, b + column, width, depth, target, width, kept);
      r += tall ? kTileQ : 1;
    }
    column += wide ? kTileV * kLanes : kLanes;
  }
}

// Flash attention (arXiv 2205.14135) of up to 96 query rows; row r is token r / group, head r % group.
template <class C>
void chunk_item(const AttentionShape& shape, const AttentionPlan& plan, const AttentionItem& item, const float* q, const void* key_cache,
                const void* value_cache, float* out, Scratch& s) {
  using Type = typename Element<C>::Type;
  constexpr int kPack = Element<C>::kPack;
  int head_dim = shape.head_dim, group = plan.group, rows = item.num_tokens * group, window = shape.sliding_window, elements = head_dim / kPack;
  s.q.resize(size_t(rows) * elements);
  s.out.assign(size_t(rows) * head_dim, 0.0f);
  s.scores.resize(size_t(rows) * kPanelKeys);
  s.keys.resize(size_t(kPanelKeys) * elements);
  s.values.resize(size_t(kPanelKeys) * elements);
  s.state.assign(size_t(rows) * 3, 0.0f);
  Type *packed_q = (Type*)s.q.data(), *keys = (Type*)s.keys.data(), *values = (Type*)s.values.data();
  float *scores = s.scores.data(), *maximum = s.state.data(), *weight = maximum + rows, *keep = weight + rows;
  for (int r = 0; r < rows; ++r) {
    maximum[r] = -std::numeric_limits<float>::infinity();
    const float* source = q + (size_t(item.first_token + r / group) * shape.num_heads + item.kv_head * group + r % group) * head_dim;
    Element<C>::narrow(source, head_dim, shape.scale, packed_q + size_t(r) * elements);
  }
  for (int begin = item.begin; begin < item.end; begin += kPanelKeys) {
    int count = std::min(kPanelKeys, item.end - begin);
    int64_t offsets[kPanelKeys];
    const C *key_rows[kPanelKeys] = {}, *value_rows[kPanelKeys] = {};
    find_rows(shape, item, begin, count, offsets);
    for (int i = 0; i < count; ++i) {
      key_rows[i] = (const C*)key_cache + offsets[i];
      value_rows[i] = (const C*)value_cache + offsets[i];
    }
    lay_keys(key_rows, elements, keys);
    Element<C>::lay_values(value_rows, head_dim, values);
    int first_row = std::max(0, begin - item.first_position) * group;  // earlier rows see none of these keys
    product_all<C>(packed_q, elements, keys, kPanelKeys, elements, scores, first_row, rows, nullptr);
    for (int r = first_row; r < rows; ++r) {
      float* row = scores + size_t(r) * kPanelKeys;
      int position = item.first_position + r / group, visible = std::min(count, position + 1 - begin);
      int hidden = window ? std::min(visible, std::max(0, position - window + 1 - begin)) : 0;  // keys that the window has left behind
      if (hidden >= visible) {
        for (int i = 0; i < kPanelKeys; ++i) row[i] = 0.0f;
        keep[r] = 1.0f;
      } else {
        for (int i = 0; i < hidden; ++i) row[i] = -std::numeric_limits<float>::infinity();
        float top = std::max(maximum[r], row_maximum(row, visible));
        keep[r] = std::exp(maximum[r] - top);
        weight[r] = weight[r] * keep[r] + softmax_weights(row, visible, kPanelKeys, top);
        maximum[r] = top;
      }
      Element<C>::narrow(row, kPanelKeys, 1.0f, (Type*)row);  // in place: the packed row is no longer than the floats
    }
    product_all<C>((const Type*)scores, kPanelKeys, values, head_dim, kPanelKeys / kPack, s.out.data(), first_row, rows, keep);
  }
  for (int r = 0; r < rows; ++r) {
    float* target = out + (size_t(item.first_token + r / group) * shape.num_heads + item.kv_head * group + r % group) * head_dim;
    for (int d = 0; d < head_dim; d += kLanes) vstore(target + d, vdiv(vload(&s.out[size_t(r) * head_dim + d]), vset(weight[r])));
  }
}

template <class C>
void share_items(Team& team, const AttentionShape& shape, AttentionPlan& plan, const float* q, const void* keys, const void* values, float* out) {
  thread_local Scratch scratch;
  team.share(int(plan.items.size()), 1, [&](int begin, int end) {
    for (int i = begin; i < end; ++i) {
      const AttentionItem& item = plan.items[i];
      if (item.num_tokens == 1 && item.end - item.begin <= kSplitKeys) decode_item<C>(shape, plan, item, q, keys, values, out, scratch);
      else chunk_item<C>(shape, plan, item, q, keys, values, out, scratch);
    }
  });
  if (plan.merges.empty()) return;
  team.barrier();
  team.share(int(plan.merges.size()), 1, [&](int begin, int end) {
    for (int i = begin; i < end; ++i) merge(shape, plan, plan.merges[i], out);
  });
}

// Widens q where it is bfloat16, and narrows the result likewise.
template <class T>
void attention(const AttentionShape& shape, const T* q, const void* keys, const void* values, T* out, int num_threads) {
  AttentionPlan plan(shape);
  size_t count = size_t(shape.num_tokens) * shape.num_heads * shape.head_dim;
  std::vector<float> wide, result(count, 0.0f);
  const float* source;
  if constexpr (sizeof(T) == 4) {
    source = q;
  } else {
    wide.resize(count);
    for (size_t i = 0; i < count; i += kLanes) vstore(wide.data() + i, vload(q + i));
    source = wide.data();
  }
  run_team(num_threads, [&](Team& team, int) {
    if (shape.cache_dtype == kFloat32) share_items<float>(team, shape, plan, source, keys, values, result.data());
    else share_items<bf16>(team, shape, plan, source, keys, values, result.data());
  });
  for (size_t i = 0; i < count; i += kLanes) vstore(out + i, vload(result.data() + i));
}

}  // namespace

void share_attention(Team& team, const AttentionShape& shape, AttentionPlan& plan, const float* q, const void* keys, const void* values, float* out) {
  if (shape.cache_dtype == kFloat32) share_items<float>(team, shape, plan, q, keys, values, out);
  else share_items<bf16>(team, shape, plan, q, keys, values, out);
}

}  // namespace cpu

// q and out [T, Hq, D] of dtype; tokens that no entry owns give zeros.
extern "C" void cpu_attention(const cpu::AttentionShape* shape, const void* q, const void* keys, const void* values, void* out, int32_t dtype,
                              int32_t num_threads) {
  if (dtype == cpu::kFloat32) cpu::attention(*shape, (const float*)q, keys, values, (float*)out, num_threads);
  else cpu::attention(*shape, (const cpu::bf16*)q, keys, values, (cpu::bf16*)out, num_threads);
}
