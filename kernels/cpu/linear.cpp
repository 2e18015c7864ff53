#include "linear.h"

namespace cpu {

namespace {

void quantize_term(const float* x, ActGroup* out, int t) {
#ifdef CPU_AVX512
  __m512 a = _mm512_loadu_ps(x), b = _mm512_loadu_ps(x + 16);
  float largest = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(a), _mm512_abs_ps(b)));
  float scale = largest / 127.0f;
  __m512 inverse = _mm512_set1_ps(scale > 0.0f ? 1.0f / scale : 0.0f);
  __m512i qa = _mm512_cvtps_epi32(_mm512_mul_ps(a, inverse)), qb = _mm512_cvtps_epi32(_mm512_mul_ps(b, inverse));
  int32_t sum = _mm512_reduce_add_epi32(_mm512_add_epi32(qa, qb));
  _mm_store_si128((__m128i*)out->x[t], _mm512_cvtsepi32_epi8(qa));
  _mm_store_si128((__m128i*)(out->x[t] + 16), _mm512_cvtsepi32_epi8(qb));
#else
  vf largest_lanes = vset(0.0f);
  for (int i = 0; i < kGroup; i += kLanes) largest_lanes = vmax(largest_lanes, vabs(vload(x + i)));
  float scale = vmaximum(largest_lanes) / 127.0f;
  __m256 inverse = _mm256_set1_ps(scale > 0.0f ? 1.0f / scale : 0.0f);
  __m256i q[4], total = _mm256_setzero_si256();
  for (int i = 0; i < 4; ++i) {
    q[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 8 * i), inverse));
    total = _mm256_add_epi32(total, q[i]);
  }
  __m128i half = _mm_add_epi32(_mm256_castsi256_si128(total), _mm256_extracti128_si256(total, 1));
  half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4E));
  int32_t sum = _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xB1)));
  __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
  _mm256_store_si256((__m256i*)out->x[t], _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
#endif
  out->scale[t] = scale;
  out->scaled_sum[t] = scale * float(sum);
  out->offset[t] = -128 * sum;
}

}  // namespace

void quantize_group(const float* x, ActGroup* out, int t, int terms) {
  quantize_term(x, out, t);
  if (terms == 1) return;
  alignas(64) float rest[kGroup];
  for (int i = 0; i < kGroup; ++i) rest[i] = x[i] - out->scale[t] * float(out->x[t][i]);
  quantize_term(rest, out, t + 1);
}

void quantize_block(const float* x, int num_tokens, const Acts& acts, int index) {
  int groups = acts.groups, width = groups * kGroup;
  ActGroup* block = acts.block(index);
  int32_t* extra = acts.block_extra(index);
  thread_local std::vector<float> error;  // of each group, but for a factor; -1 once chosen
  error.assign(groups, 0.0f);
  for (int g = 0; g < groups; ++g) {
    for (int t = 0; t < num_tokens; ++t) {
      quantize_term(x + size_t(t) * width + g * kGroup, block + g, t);
      error[g] += block[g].scale[t] * block[g].scale[t];
    }
  }
  for (int e = 0; e < acts.extras; ++e) {
    int g = int(std::max_element(error.begin(), error.end()) - error.begin());
    error[g] = -1.0f;
    extra[e] = g;
    alignas(64) float rest[kGroup];
    for (int t = 0; t < num_tokens; ++t) {
      const float* row = x + size_t(t) * width + g * kGroup;
      for (int i = 0; i < kGroup; ++i) rest[i] = row[i] - block[g].scale[t] * float(block[g].x[t][i]);
      quantize_term(rest, block + groups + e, t);
    }
  }
}

namespace {

// The groups of one block of rows: those of the weights in order, then the extra ones.
struct Groups {
  const ActGroup* acts;
  const int32_t* extra;
  int in_order, count;
  size_t weight_group(int g) const { return g < in_order ? g : extra[g - in_order]; }
};

#if defined(CPU_AVX512) && defined(__AVX512VNNI__)
// sum += u8 weights . the four s8 at x, in each lane. As assembly because gcc spends a register and an instruction on the broadcast.
inline void dot_broadcast(__m512i& sum, __m512i weights, const void* x) {
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(weights), "m"(*(const int32_t*)x));
}

// Tokens [first, first + N) of a block against one tile: u8 weights in 8 registers, s8 activations broadcast from memory (vpdpbusd).
template <int N, int F>
void tile_kernel(const uint8_t* tile, const Groups& part, int first, bool fresh, float (*out)[kTileRows]) {
  __m512 sums[N];
#pragma GCC unroll 16
  for (int t = 0; t < N; ++t) sums[t] = _mm512_setzero_ps();
  const __m512i low = _mm512_set1_epi8(0x0F);
  const ActGroup* act = part.acts;
  for (int g = 0; g < part.count; ++g, ++act) {
    const uint8_t* w = tile + part.weight_group(g) * kGroupBytes[F];
    const uint8_t* quants = w + (F == kInt4Min ? 64 : 32);
    if (fresh) {  // a stream from memory: the hardware prefetcher stops at 4 KiB pages
      for (int line = 0; line < kGroupBytes[F]; line += 64) _mm_prefetch((const char*)w + 2048 + line, _MM_HINT_T0);
    }
    __m512 scale = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)w)), minimum;
    if (F == kInt4Min) minimum = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(w + 32)));
    __m512i q[8];
#pragma GCC unroll 8
    for (int j = 0; j < (F == kInt8 ? 8 : 4); ++j) {
      __m512i bytes = _mm512_loadu_si512(quants + 64 * j);
      q[j] = F == kInt8 ? bytes : _mm512_and_si512(bytes, low);
      if (F != kInt8) q[j + 4] = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), low);
    }
    const char* x = (const char*)act->x[first];
    const float *factors = act->scale + first, *scaled_sums = act->scaled_sum + first;
    const int32_t* offsets = act->offset + first;
    // Four tokens at a time, feature by feature: four chains of vpdpbusd hide its latency within the scheduler's reach.
    constexpr int kChains = N < 4 ? N : 4;
#pragma GCC unroll 4
    for (int t = 0; t < N; t += kChains) {
      __m512i dot[kChains];
#pragma GCC unroll 4
      for (int c = 0; c < kChains; ++c) {
        dot[c] = F == kInt4Min ? _mm512_setzero_si512() : _mm512_set1_epi32(offsets[t + c]);
        if (F == kInt4) dot[c] = _mm512_srai_epi32(dot[c], 4);
      }
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) {
#pragma GCC unroll 4
        for (int c = 0; c < kChains; ++c) dot_broadcast(dot[c], q[j], x + (t + c) * kGroup + 4 * j);
      }
#pragma GCC unroll 4
      for (int c = 0; c < kChains; ++c) {
        __m512& sum = sums[t + c];
        sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[c]), _mm512_mul_ps(scale, _mm512_set1_ps(factors[t + c])), sum);
        if (F == kInt4Min) sum = _mm512_fmadd_ps(minimum, _mm512_set1_ps(scaled_sums[t + c]), sum);
      }
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < N; ++t) _mm512_store_ps(out[first + t], sums[t]);
}

#else
// The dot product of u8 (biased) weights with s8 activations over one group, in 32-bit lanes.
template <int F>
inline __m256i group_dot(const __m256i* q, const int32_t* x, int32_t offset) {
#ifdef __AVXVNNI__
  __m256i dot = F == kInt4Min ? _mm256_setzero_si256() : _mm256_set1_epi32(F == kInt4 ? offset >> 4 : offset);
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) dot = _mm256_dpbusd_avx_epi32(dot, q[j], _mm256_set1_epi32(x[j]));
  return dot;
#else
  const __m256i ones = _mm256_set1_epi16(1);
  if (F == kInt8) {  // vpmaddubsw saturates at 16 bits: |w| * sign(x, w) stays within 2 * 128 * 127
    __m256i dot = _mm256_setzero_si256();
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(q[j]), _mm256_sign_epi8(_mm256_set1_epi32(x[j]), q[j]));
      dot = _mm256_add_epi32(dot, _mm256_madd_epi16(pairs, ones));
    }
    return dot;
  }
  __m256i pairs = _mm256_maddubs_epi16(q[0], _mm256_set1_epi32(x[0]));  // 8 * 2 * 15 * 127 fits 16 bits
#pragma GCC unroll 8
  for (int j = 1; j < 8; ++j) pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(q[j], _mm256_set1_epi32(x[j])));
  __m256i dot = _mm256_madd_epi16(pairs, ones);
  return F == kInt4 ? _mm256_add_epi32(dot, _mm256_set1_epi32(offset >> 4)) : dot;
#endif
}

template <int N, int F>
void tile_kernel(const uint8_t* tile, const Groups& part, int first, bool fresh, float (*out)[kTileRows]) {
  const __m256i low = _mm256_set1_epi8(0x0F);
  for (int half = 0; half < 2; ++half) {
    const ActGroup* act = part.acts;
    __m256 sums[N];
#pragma GCC unroll 4
    for (int t = 0; t < N; ++t) sums[t] = _mm256_setzero_ps();
    for (int g = 0; g < part.count; ++g, ++act) {
      const uint8_t* w = tile + part.weight_group(g) * kGroupBytes[F];
      const uint8_t* quants = w + (F == kInt4Min ? 64 : 32) + 32 * half;
      if (fresh && half == 0) {
        for (int line = 0; line < kGroupBytes[F]; line += 64) _mm_prefetch((const char*)w + 2048 + line, _MM_HINT_T0);
      }
      __m256 scale = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(w + 16 * half))), minimum;
      if (F == kInt4Min) minimum = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(w + 32 + 16 * half)));
      __m256i q[8];
#pragma GCC unroll 8
      for (int j = 0; j < (F == kInt8 ? 8 : 4); ++j) {
        __m256i bytes = _mm256_loadu_si256((const __m256i*)(quants + 64 * j));
        q[j] = F == kInt8 ? bytes : _mm256_and_si256(bytes, low);
        if (F != kInt8) q[j + 4] = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), low);
#ifndef __AVXVNNI__
        if (F == kInt8) q[j] = _mm256_xor_si256(q[j], _mm256_set1_epi8(int8_t(0x80)));
#endif
      }
#pragma GCC unroll 4
      for (int t = 0; t < N; ++t) {
        __m256i dot = group_dot<F>(q, (const int32_t*)act->x[first + t], act->offset[first + t]);
        sums[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), _mm256_mul_ps(scale, _mm256_set1_ps(act->scale[first + t])), sums[t]);
        if (F == kInt4Min) sums[t] = _mm256_fmadd_ps(minimum, _mm256_set1_ps(act->scaled_sum[first + t]), sums[t]);
      }
    }
#pragma GCC unroll 4
    for (int t = 0; t < N; ++t) _mm256_storeu_ps(out[first + t] + 8 * half, sums[t]);
  }
}
#endif

template <int F>
void tile_format(const uint8_t* w, const Groups& part, int num_tokens, bool fresh, float (*out)[kTileRows]) {
  int first = 0;
  while (first < num_tokens) {
    int rest = num_tokens - first;
#if defined(CPU_AVX512) && defined(__AVX512VNNI__)
    if (rest >= 16) { tile_kernel<16, F>(w, part, first, fresh && first == 0, out); first += 16; continue; }
    if (rest >= 8) { tile_kernel<8, F>(w, part, first, fresh && first == 0, out); first += 8; continue; }
#endif
    if (rest >= 4) { tile_kernel<4, F>(w, part, first, fresh && first == 0, out); first += 4; }
    else if (rest >= 2) { tile_kernel<2, F>(w, part, first, fresh && first == 0, out); first += 2; }
    else { tile_kernel<1, F>(w, part, first, fresh && first == 0, out); first += 1; }
  }
}

template <class T>
void linear(const Linear& layer, const T* x, T* out, int num_tokens, int num_threads) {
  int width = layer.in_features;
  thread_local Workspace workspace;
  Acts acts = make_acts(workspace, 0, num_tokens, width);
  run_team(num_threads, [&](Team& team, int) {
    share_quantize(team, acts, num_tokens, [&](int first, int count, float* rows) {
      for (int i = 0; i < count * width; i += kLanes) vstore(rows + i, vload(x + size_t(first) * width + i));
    });
    team.barrier();
    share_tiles(team, layer, acts, num_tokens, [&](const Tile& tile, int first, int count, const float (*values)[kTileRows]) {
      for (int t = 0; t < count; ++t) {
        store_tile_row<false>(tile, values[t], layer.bias, out + size_t(first + t) * layer.out_features + tile.first_row);
      }
    });
  });
}

}  // namespace

void tile_product(const Tile& tile, const Acts& acts, int index, int num_rows, bool fresh, float (*out)[kTileRows]) {
  Groups part{acts.block(index), acts.block_extra(index), acts.groups, acts.groups + acts.extras};
  if (tile.format == kInt4Min) tile_format<kInt4Min>(tile.data, part, num_rows, fresh, out);
  else if (tile.format == kInt4) tile_format<kInt4>(tile.data, part, num_rows, fresh, out);
  else tile_format<kInt8>(tile.data, part, num_rows, fresh, out);
}

}  // namespace cpu

extern "C" void cpu_linear(const cpu::Linear* layer, const void* x, void* out, int32_t dtype, int32_t num_tokens, int32_t num_threads) {
  if (dtype == cpu::kFloat32) cpu::linear(*layer, (const float*)x, (float*)out, num_tokens, num_threads);
  else cpu::linear(*layer, (const cpu::bf16*)x, (cpu::bf16*)out, num_tokens, num_threads);
}
