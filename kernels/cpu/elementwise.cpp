#include "elementwise.h"

#include "team.h"

namespace cpu {
namespace {

constexpr int kMaxHead = 512;

template <class T, class C>
void store_head(const T* x, C* out, int head_dim) {
  for (int d = 0; d < head_dim; ++d) from_float(to_float(x[d]), out + d);
}

template <class T>
void load_head(const T* x, const float* norm, float eps, int head_dim, float* out) {
  if (norm) norm_row(x, norm, head_dim, eps, out);
  else
    for (int d = 0; d < head_dim; ++d) out[d] = to_float(x[d]);
}

template <class T>
void rms_norm(const T* x, const float* weight, T* out, int num_rows, int width, float eps, int num_threads) {
  auto row = [&](int i) { norm_row(x + size_t(i) * width, weight, width, eps, out + size_t(i) * width); };
  if (num_rows * width < 32768) num_threads = 1;  // a parallel region costs more
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1)
  for (int i = 0; i < num_rows; ++i) row(i);
}

template <class T>
void add_rms_norm(const T* x, T* residual, const float* weight, T* out, int num_rows, int width, float eps, int num_threads) {
  if (num_rows * width < 32768) num_threads = 1;
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1)
  for (int i = 0; i < num_rows; ++i) {
    const T* source = x + size_t(i) * width;
    T* sum = residual + size_t(i) * width;
    int j = 0;
    for (; j + kLanes <= width; j += kLanes) vstore(sum + j, vadd(vload(sum + j), vload(source + j)));
    for (; j < width; ++j) from_float(to_float(sum[j]) + to_float(source[j]), sum + j);
    norm_row(sum, weight, width, eps, out + size_t(i) * width);
  }
}

template <class T>
void silu_mul(const T* gate_up, T* out, int num_rows, int width, int num_threads) {
  if (num_rows * width < 16384) num_threads = 1;
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1)
  for (int i = 0; i < num_rows; ++i) {
    const T *gate = gate_up + size_t(i) * 2 * width, *up = gate + width;
    T* target = out + size_t(i) * width;
    int j = 0;
    for (; j + kLanes <= width; j += kLanes) vstore(target + j, vmul(vsilu(vload(gate + j)), vload(up + j)));
    for (; j < width; ++j) from_float(silu(to_float(gate[j])) * to_float(up[j]), target + j);
  }
}

template <class T>
void rope_store(const RopeShape& shape, const T* qkv, T* q, void* keys, void* values, int num_threads) {
  size_t stride = size_t(shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim, q_stride = size_t(shape.num_heads) * shape.head_dim;
  if (shape.num_tokens < 16) num_threads = 1;
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1)
  for (int t = 0; t < shape.num_tokens; ++t) rope_token(shape, t, qkv + t * stride, q + t * q_stride, keys, values);
}

}  // namespace

template <class T, class U>
void rope_token(const RopeShape& shape, int token, const T* qkv, U* q_out, void* key_cache, void* value_cache) {
  int head_dim = shape.head_dim;
  const float* angles = shape.cos_sin + int64_t(shape.positions[token]) * shape.width;
  float head[kMaxHead];
  for (int h = 0; h < shape.num_heads; ++h, qkv += head_dim, q_out += head_dim) {
    load_head(qkv, shape.q_norm, shape.eps, head_dim, head);
    rotate_head(head, angles, shape.width);
    store_head(head, q_out, head_dim);
  }
  int64_t slot = shape.slot_mapping[token];
  if (slot < 0) return;
  for (int h = 0; h < shape.num_kv_heads; ++h, qkv += head_dim) {
    int64_t at = ((slot / shape.block_size * shape.num_kv_heads + h) * shape.block_size + slot % shape.block_size) * head_dim;
    const T* value = qkv + size_t(shape.num_kv_heads) * head_dim;
    load_head(qkv, shape.k_norm, shape.eps, head_dim, head);
    rotate_head(head, angles, shape.width);
    if (shape.cache_dtype == kFloat32) {
      store_head(head, (float*)key_cache + at, head_dim);
      store_head(value, (float*)value_cache + at, head_dim);
    } else {
      store_head(head, (bf16*)key_cache + at, head_dim);
      store_head(value, (bf16*)value_cache + at, head_dim);
    }
  }
}

template void rope_token(const RopeShape&, int, const float*, float*, void*, void*);

}  // namespace cpu

using namespace cpu;

extern "C" void cpu_rms_norm(const void* x, const float* weight, void* out, int32_t rows, int32_t width, float eps, int32_t dtype, int32_t threads) {
  if (dtype == kFloat32) rms_norm((const float*)x, weight, (float*)out, rows, width, eps, threads);
  else rms_norm((const bf16*)x, weight, (bf16*)out, rows, width, eps, threads);
}

extern "C" void cpu_add_rms_norm(const void* x, void* residual, const float* weight, void* out, int32_t rows, int32_t width, float eps, int32_t dtype,
                                 int32_t threads) {
  if (dtype == kFloat32) add_rms_norm((const float*)x, (float*)residual, weight, (float*)out, rows, width, eps, threads);
  else add_rms_norm((const bf16*)x, (bf16*)residual, weight, (bf16*)out, rows, width, eps, threads);
}

extern "C" void cpu_silu_mul(const void* gate_up, void* out, int32_t rows, int32_t width, int32_t dtype, int32_t threads) {
  if (dtype == kFloat32) silu_mul((const float*)gate_up, (float*)out, rows, width, threads);
  else silu_mul((const bf16*)gate_up, (bf16*)out, rows, width, threads);
}

// qkv [T, (Hq + 2 Hkv) D] and q [T, Hq, D] of dtype.
extern "C" void cpu_rope_store_kv(const RopeShape* shape, const void* qkv, void* q, void* keys, void* values, int32_t dtype, int32_t threads) {
  if (dtype == kFloat32) rope_store(*shape, (const float*)qkv, (float*)q, keys, values, threads);
  else rope_store(*shape, (const bf16*)qkv, (bf16*)q, keys, values, threads);
}
