// Norms and rotary embedding of one row or head, shared by the single operations and by the decoder stack.
#pragma once
#include "simd.h"

namespace cpu {

// out = x / sqrt(mean(x^2) + eps) * weight, in float32, rounded once. `weight` is float32. out may be x.
template <class T, class U>
inline void norm_row(const T* x, const float* weight, int width, float eps, U* out) {
  vf squares = vset(0.0f);
  int i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    vf v = vload(x + i);
    squares = vfma(v, v, squares);
  }
  float total = vsum(squares);
  for (; i < width; ++i) total += to_float(x[i]) * to_float(x[i]);
  float factor = 1.0f / std::sqrt(total / float(width) + eps);
  for (i = 0; i + kLanes <= width; i += kLanes) vstore(out + i, vmul(vmul(vload(x + i), vset(factor)), vload(weight + i)));
  for (; i < width; ++i) from_float(to_float(x[i]) * factor * weight[i], out + i);
}

// What rope_store_kv needs besides data; as ctypes hands it over (library.py).
struct RopeShape {
  const float* cos_sin;         // [max_position, width]: cos, then sin
  const int32_t* positions;     // [T]
  const int64_t* slot_mapping;  // [T]; negative is not stored
  const float* q_norm;          // [D] or null
  const float* k_norm;
  int32_t num_tokens;
  int32_t num_heads;
  int32_t num_kv_heads;
  int32_t head_dim;
  int32_t width;  // rotary width
  int32_t block_size;
  int32_t cache_dtype;
  float eps;
};

// Rotates x [D] float32 in place: halves of the first `width` against each other (arXiv 2104.09864).
inline void rotate_head(float* x, const float* cos_sin, int width) {
  int half = width / 2, i = 0;
  const float *cosines = cos_sin, *sines = cos_sin + half;
  for (; i + kLanes <= half; i += kLanes) {
    vf a = vload(x + i), b = vload(x + half + i), c = vload(cosines + i), s = vload(sines + i);
    vstore(x + i, vsub(vmul(a, c), vmul(b, s)));
    vstore(x + half + i, vfma(a, s, vmul(b, c)));
  }
  for (; i < half; ++i) {
    float a = x[i], b = x[half + i];
    x[i] = a * cosines[i] - b * sines[i];
    x[half + i] = b * cosines[i] + a * sines[i];
  }
}

// One token's qkv: q heads into q_out, K and V into their slot of the caches.
template <class T, class U>
void rope_token(const RopeShape& shape, int token, const T* qkv, U* q_out, void* key_cache, void* value_cache);

extern template void rope_token(const RopeShape&, int, const float*, float*, void*, void*);

}  // namespace cpu
