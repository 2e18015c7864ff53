#include "attention.h"

#include "attention_rows.h"

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
    for (int i = begin; i < end; ++i) merge_partials(shape, plan, plan.merges[i], out);
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
