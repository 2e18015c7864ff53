// Causal attention over the paged cache, one pass over keys and values where they lie; arithmetic in float32.
#pragma once
#include <vector>

#include "simd.h"
#include "team.h"

namespace cpu {

constexpr int kSplitKeys = 128;  // a decode's keys go in pieces of this many, whatever the batch, so a result does not depend on the batch
constexpr int kPanelKeys = 64;   // keys of a chunk's panel
constexpr int kChunkRows = 96;   // query rows (tokens x heads of a group) that share a panel

// What a step's attention needs besides q and the caches; as ctypes hands it over (library.py).
struct AttentionShape {
  const int32_t* query_start;   // [B + 1]
  const int32_t* context_lens;  // [B]
  const int32_t* rows;          // [B]
  const int32_t* block_tables;  // [R, max_blocks]
  int64_t max_blocks;
  int32_t num_entries;
  int32_t num_tokens;
  int32_t num_heads;
  int32_t num_kv_heads;
  int32_t head_dim;
  int32_t block_size;
  int32_t sliding_window;  // 0: none
  int32_t cache_dtype;
  float scale;
  int32_t unused;
};

// A piece of work: some query tokens of an entry and one KV head, over keys [begin, end).
struct AttentionItem {
  const int32_t* table;
  int32_t kv_head;
  int32_t first_token;  // in the step
  int32_t num_tokens;
  int32_t first_position;  // of first_token
  int32_t begin;
  int32_t end;
  int32_t partial;  // index of its partial result, or -1 where it has all keys
};

// A decode's (token, KV head) whose keys were split: its partial results lie one after another.
struct AttentionMerge {
  int32_t token;
  int32_t kv_head;
  int32_t first_partial;
  int32_t num_partials;
};

struct AttentionPlan {
  std::vector<AttentionItem> items;
  std::vector<AttentionMerge> merges;
  std::vector<float> partials;  // per partial and head of the group: head_dim sums, maximum, weight
  int group = 1;                // query heads of a KV head

  explicit AttentionPlan(const AttentionShape& shape);
};

// Shares the plan's items (and after a barrier its merges) among the team. q and out: [T, Hq, D] float32. Tokens without keys are not written.
void share_attention(Team& team, const AttentionShape& shape, AttentionPlan& plan, const float* q, const void* keys, const void* values, float* out);

}  // namespace cpu
