// Attention of a prefill chunk: flash attention over panels of 64 keys, laid out for register-tiled products.
#include "attention_rows.h"

namespace cpu {
namespace {

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

#ifdef CPU_BF16_PAIRS
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

}  // namespace

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

template void chunk_item<float>(const AttentionShape&, const AttentionPlan&, const AttentionItem&, const float*, const void*, const void*, float*,
                                Scratch&);
template void chunk_item<bf16>(const AttentionShape&, const AttentionPlan&, const AttentionItem&, const float*, const void*, const void*, float*,
                               Scratch&);

}  // namespace cpu
