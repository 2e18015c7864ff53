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

// Where key or value `position` of one sequence and head lies.
template <class C>
struct Pages {
  const C* cache;
  const int32_t* table;
  int64_t block_stride;
  int head_offset, block_size, head_dim;

  Pages(const void* data, const AttentionShape& shape, const AttentionItem& item)
      : cache((const C*)data), table(item.table), block_stride(int64_t(shape.num_kv_heads) * shape.block_size * shape.head_dim),
        head_offset(item.kv_head * shape.block_size * shape.head_dim), block_size(shape.block_size), head_dim(shape.head_dim) {}
  const C* at(int position) const {
    return cache + table[position / block_size] * block_stride + head_offset + int64_t(position % block_size) * head_dim;
  }
};

constexpr int kWide = 4;  // vectors of a register tile's width

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
  for (int r = 0; r < R; ++r) {
#ifdef CPU_AVX512
    __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(sums[r][0], sums[r][1]), _mm512_unpackhi_ps(sums[r][0], sums[r][1]));
    __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(sums[r][2], sums[r][3]), _mm512_unpackhi_ps(sums[r][2], sums[r][3]));
    __m512d lo = _mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)), hi = _mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b));
    __m512 c = _mm512_add_ps(_mm512_castpd_ps(lo), _mm512_castpd_ps(hi));
    __m256 d = _mm256_add_ps(_mm512_castps512_ps256(c), _mm512_extractf32x8_ps(c, 1));
#else
    __m256 a = _mm256_add_ps(_mm256_unpacklo_ps(sums[r][0], sums[r][1]), _mm256_unpackhi_ps(sums[r][0], sums[r][1]));
    __m256 b = _mm256_add_ps(_mm256_unpacklo_ps(sums[r][2], sums[r][3]), _mm256_unpackhi_ps(sums[r][2], sums[r][3]));
    __m256d lo = _mm256_unpacklo_pd(_mm256_castps_pd(a), _mm256_castps_pd(b)), hi = _mm256_unpackhi_pd(_mm256_castps_pd(a), _mm256_castps_pd(b));
    __m256 d = _mm256_add_ps(_mm256_castpd_ps(lo), _mm256_castpd_ps(hi));
#endif
    _mm_storeu_ps(scores + size_t(r) * stride, _mm_add_ps(_mm256_castps256_ps128(d), _mm256_extractf128_ps(d, 1)));
  }
}

// out[r][d .. d + V * lanes) = sum over keys of p[r][key] * value[key], for rows [0, R)
template <int R, int V, class Row>
inline void weigh_values(const float* p, int stride, int num_keys, Row&& value, int d, float* out, int out_stride, const float* keep) {
  vf sums[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sums[r][v] = keep ? vmul(vset(keep[r]), vload(out + size_t(r) * out_stride + d + v * kLanes)) : vset(0.0f);
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
inline void weigh_all(const float* p, int stride, int num_keys, Row&& value, int head_dim, float* out, int out_stride, const float* keep) {
  int d = 0;
  for (; d + kWide * kLanes <= head_dim; d += kWide * kLanes) weigh_values<R, kWide>(p, stride, num_keys, value, d, out, out_stride, keep);
  for (; d < head_dim; d += kLanes) weigh_values<R, 1>(p, stride, num_keys, value, d, out, out_stride, keep);
}

// exp(s - maximum) in place over [0, padded); returns the sum. Entries past `count` become 0.
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
  for (int i = 0; i < count; ++i) top = std::max(top, s[i]);
  return top;
}

struct Scratch {
  std::vector<float> q, scores, keys, values, out, state;
};

template <int R, class C>
void decode_rows(const AttentionShape& shape, const AttentionItem& item, const Pages<C>& keys, const Pages<C>& values, const float* q, float* scores,
                 float* out, float* maximum, float* weight) {
  int count = item.end - item.begin, head_dim = shape.head_dim;
  for (int i = 0; i < count; i += 4) {
    const C* rows[4];
    for (int j = 0; j < 4; ++j) rows[j] = keys.at(std::min(item.begin + i + j, item.end - 1));
    dot_keys<R>(q, rows, head_dim, scores + i, kSplitKeys);
  }
  int padded = (count + kLanes - 1) / kLanes * kLanes;
  for (int r = 0; r < R; ++r) {
    maximum[r] = row_maximum(scores + r * kSplitKeys, count);
    weight[r] = softmax_weights(scores + r * kSplitKeys, count, padded, maximum[r]);
  }
  weigh_all<R>(scores, kSplitKeys, count, [&](int i) { return values.at(item.begin + i); }, head_dim, out, head_dim, nullptr);
}

template <class C>
void decode_item(const AttentionShape& shape, AttentionPlan& plan, const AttentionItem& item, const float* q, const void* key_cache,
                 const void* value_cache, float* out, Scratch& scratch) {
  int head_dim = shape.head_dim, group = plan.group;
  Pages<C> keys(key_cache, shape, item), values(value_cache, shape, item);
  scratch.q.resize(size_t(group) * head_dim);
  scratch.scores.resize(4 * kSplitKeys);
  const float* source = q + (size_t(item.first_token) * shape.num_heads + item.kv_head * group) * head_dim;
  for (int i = 0; i < group * head_dim; ++i) scratch.q[i] = source[i] * shape.scale;
  float* sums = item.partial < 0 ? out + (size_t(item.first_token) * shape.num_heads + item.kv_head * group) * head_dim
                                 : plan.partials.data() + size_t(item.partial) * group * (head_dim + 2);
  float own[4], own_weight[4];
  for (int r = 0; r < group;) {
    float *maximum = item.partial < 0 ? own : sums + size_t(group) * head_dim + r, *weight = item.partial < 0 ? own_weight : maximum + group;
    const float* rows = scratch.q.data() + size_t(r) * head_dim;
    float* target = sums + size_t(r) * head_dim;
    int step = std::min(4, group - r);
    if (step == 4) decode_rows<4>(shape, item, keys, values, rows, scratch.scores.data(), target, maximum, weight);
    else if (step == 3) decode_rows<3>(shape, item, keys, values, rows, scratch.scores.data(), target, maximum, weight);
    else if (step == 2) decode_rows<2>(shape, item, keys, values, rows, scratch.scores.data(), target, maximum, weight);
    else decode_rows<1>(shape, item, keys, values, rows, scratch.scores.data(), target, maximum, weight);
    if (item.partial < 0)
      for (int i = 0; i < step; ++i)
        for (int d = 0; d < head_dim; ++d) target[size_t(i) * head_dim + d] /= weight[i];
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

// panel[d][i] = key i's element d, for `count` <= 64 keys from `begin`; keys past the end are zero.
template <class C>
void transpose_keys(const Pages<C>& keys, int begin, int count, int head_dim, float* panel) {
  for (int i = 0; i < kPanelKeys; i += 8) {
    const C* rows[8];
    for (int j = 0; j < 8; ++j) rows[j] = keys.at(begin + std::min(i + j, count - 1));
    for (int d = 0; d < head_dim; d += 8) {
      __m256 r[8], s[8];
      for (int j = 0; j < 8; ++j) {
        if constexpr (sizeof(C) == 4) r[j] = _mm256_loadu_ps((const float*)rows[j] + d);
        else r[j] = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(rows[j] + d))), 16));
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
        _mm256_storeu_ps(panel + size_t(d + j) * kPanelKeys + i, _mm256_permute2f128_ps(r[j], r[j + 4], 0x20));
        _mm256_storeu_ps(panel + size_t(d + j + 4) * kPanelKeys + i, _mm256_permute2f128_ps(r[j], r[j + 4], 0x31));
      }
    }
  }
}

#ifdef CPU_AVX512
constexpr int kTileQ = 6, kTileV = 4;
#else
constexpr int kTileQ = 6, kTileV = 2;
#endif

// scores[r][0..64) = q[r] . panel, for R rows
template <int R>
inline void score_panel(const float* q, const float* panel, int head_dim, float* scores) {
  for (int k = 0; k < kPanelKeys; k += kTileV * kLanes) {
    vf sums[R][kTileV];
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < kTileV; ++v) sums[r][v] = vset(0.0f);
    for (int d = 0; d < head_dim; ++d) {
      vf x[kTileV];
      for (int v = 0; v < kTileV; ++v) x[v] = vload(panel + size_t(d) * kPanelKeys + k + v * kLanes);
      for (int r = 0; r < R; ++r) {
        vf weight = vset(q[size_t(r) * head_dim + d]);
        for (int v = 0; v < kTileV; ++v) sums[r][v] = vfma(weight, x[v], sums[r][v]);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < kTileV; ++v) vstore(scores + size_t(r) * kPanelKeys + k + v * kLanes, sums[r][v]);
  }
}

template <int R>
void weigh_panel(const float* p, int num_keys, const float* values, int head_dim, float* out, const float* keep) {
  auto row = [&](int i) { return values + size_t(i) * head_dim; };
  int d = 0;
  for (; d + kTileV * kLanes <= head_dim; d += kTileV * kLanes) weigh_values<R, kTileV>(p, kPanelKeys, num_keys, row, d, out, head_dim, keep);
  for (; d < head_dim; d += kLanes) weigh_values<R, 1>(p, kPanelKeys, num_keys, row, d, out, head_dim, keep);
}

// Flash attention (arXiv 2205.14135) of up to 96 query rows; row r is token r / group, head r % group.
template <class C>
void chunk_item(const AttentionShape& shape, const AttentionPlan& plan, const AttentionItem& item, const float* q, const void* key_cache,
                const void* value_cache, float* out, Scratch& s) {
  int head_dim = shape.head_dim, group = plan.group, rows = item.num_tokens * group, window = shape.sliding_window;
  Pages<C> keys(key_cache, shape, item), values(value_cache, shape, item);
  s.q.resize(size_t(rows) * head_dim);
  s.out.assign(size_t(rows) * head_dim, 0.0f);
  s.scores.resize(size_t(rows) * kPanelKeys);
  s.keys.resize(size_t(kPanelKeys) * head_dim);
  s.values.resize(size_t(kPanelKeys) * head_dim);
  s.state.assign(size_t(rows) * 3, 0.0f);
  float *maximum = s.state.data(), *weight = maximum + rows, *keep = weight + rows;
  for (int r = 0; r < rows; ++r) {
    maximum[r] = -std::numeric_limits<float>::infinity();
    const float* source = q + (size_t(item.first_token + r / group) * shape.num_heads + item.kv_head * group + r % group) * head_dim;
    for (int d = 0; d < head_dim; ++d) s.q[size_t(r) * head_dim + d] = source[d] * shape.scale;
  }
  for (int begin = item.begin; begin < item.end; begin += kPanelKeys) {
    int count = std::min(kPanelKeys, item.end - begin);
    transpose_keys(keys, begin, count, head_dim, s.keys.data());
    for (int i = 0; i < count; ++i) {
      const C* row = values.at(begin + i);
      for (int d = 0; d < head_dim; d += kLanes) vstore(s.values.data() + size_t(i) * head_dim + d, vload(row + d));
    }
    int first_row = std::max(0, begin - item.first_position) * group;  // earlier rows see none of these keys
    int r = first_row;
    for (; r + kTileQ <= rows; r += kTileQ) score_panel<kTileQ>(s.q.data() + size_t(r) * head_dim, s.keys.data(), head_dim, &s.scores[size_t(r) * kPanelKeys]);
    for (; r < rows; ++r) score_panel<1>(s.q.data() + size_t(r) * head_dim, s.keys.data(), head_dim, &s.scores[size_t(r) * kPanelKeys]);
    for (r = first_row; r < rows; ++r) {
      float* row = &s.scores[size_t(r) * kPanelKeys];
      int position = item.first_position + r / group, visible = std::min(count, position + 1 - begin);
      int hidden = window ? std::min(visible, std::max(0, position - window + 1 - begin)) : 0;  // keys that the window has left behind
      if (hidden >= visible) {
        for (int i = 0; i < kPanelKeys; ++i) row[i] = 0.0f;
        keep[r] = 1.0f;
        continue;
      }
      for (int i = 0; i < hidden; ++i) row[i] = -std::numeric_limits<float>::infinity();
      float top = std::max(maximum[r], row_maximum(row, visible));
      keep[r] = std::exp(maximum[r] - top);
      weight[r] = weight[r] * keep[r] + softmax_weights(row, visible, kPanelKeys, top);
      maximum[r] = top;
    }
    r = first_row;
    for (; r + kTileQ <= rows; r += kTileQ)
      weigh_panel<kTileQ>(&s.scores[size_t(r) * kPanelKeys], count, s.values.data(), head_dim, &s.out[size_t(r) * head_dim], keep + r);
    for (; r < rows; ++r) weigh_panel<1>(&s.scores[size_t(r) * kPanelKeys], count, s.values.data(), head_dim, &s.out[size_t(r) * head_dim], keep + r);
  }
  for (int r = 0; r < rows; ++r) {
    float* target = out + (size_t(item.first_token + r / group) * shape.num_heads + item.kv_head * group + r % group) * head_dim;
    for (int d = 0; d < head_dim; ++d) target[d] = s.out[size_t(r) * head_dim + d] / weight[r];
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
