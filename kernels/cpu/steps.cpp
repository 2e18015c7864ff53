// A step's bookkeeping in one call each: inputs from the rows, host diffs into the rows, sampled tokens into the rows (ops.py).
#include <cstdint>

namespace cpu {

// As ctypes hands them over (library.py). Params are [R, num_params]; columns are named in ops.py.
struct Rows {
  int32_t* params;
  int32_t* block_tables;  // [R, max_blocks]
  int64_t max_blocks;
  int32_t num_params;
  int32_t last_id, num_tokens, output_index;  // columns
};

struct Step {
  const int32_t* rows;          // [B]
  const int32_t* samples;       // [B]
  const int32_t* chunk_starts;  // [B - num_decodes]
  const int32_t* chunk_lens;
  const int32_t* chunk_ids;
  int32_t num_entries;
  int32_t num_decodes;
  int32_t num_tokens;
  int32_t block_size;
};

struct Batch {
  int32_t* input_ids;     // [T]
  int32_t* positions;     // [T]
  int64_t* slot_mapping;  // [T]
  int32_t* query_start;   // [B + 1]
  int32_t* context_lens;  // [B]
  int32_t* rows;          // [B]
  int64_t* logit_index;   // [B]
};

namespace {

void put(const Rows& state, const Step& step, const Batch& batch, int token, int32_t row, int32_t id, int32_t position) {
  batch.input_ids[token] = id;
  batch.positions[token] = position;
  int64_t block = state.block_tables[row * state.max_blocks + position / step.block_size];
  batch.slot_mapping[token] = block * step.block_size + position % step.block_size;
}

void put_nothing(const Batch& batch, int token) {
  batch.input_ids[token] = 0;
  batch.positions[token] = 0;
  batch.slot_mapping[token] = -1;
}

}  // namespace
}  // namespace cpu

using namespace cpu;

extern "C" void cpu_prepare_inputs(const Rows* state, const Step* step, const Batch* batch) {
  int token = 0;
  batch->query_start[0] = 0;
  for (int i = 0; i < step->num_entries; ++i) {
    int32_t row = step->rows[i], start, length;
    const int32_t* params = state->params + int64_t(row) * state->num_params;
    batch->rows[i] = row;
    if (i < step->num_decodes) {
      start = params[state->num_tokens] - 1;
      length = 1;
      if (start < 0) put_nothing(*batch, token);
      else put(*state, *step, *batch, token, row, params[state->last_id], start);
      ++token;
    } else {
      start = step->chunk_starts[i - step->num_decodes];
      length = step->chunk_lens[i - step->num_decodes];
      for (int j = 0; j < length; ++j, ++token) put(*state, *step, *batch, token, row, step->chunk_ids[token - step->num_decodes], start + j);
    }
    batch->query_start[i + 1] = token;
    batch->context_lens[i] = length > 0 ? start + length : 0;
    batch->logit_index[i] = batch->context_lens[i] > 0 ? token - 1 : 0;
  }
  for (; token < step->num_tokens; ++token) put_nothing(*batch, token);
}

// params [num_rows, num_params]; blocks [num_blocks, 3]: row, index, block.
extern "C" void cpu_apply_updates(const Rows* state, const int32_t* rows, const int32_t* params, int32_t num_rows, const int32_t* blocks,
                                  int32_t num_blocks) {
  for (int i = 0; i < num_rows; ++i) {
    int32_t* target = state->params + int64_t(rows[i]) * state->num_params;
    for (int j = 0; j < state->num_params; ++j) target[j] = params[int64_t(i) * state->num_params + j];
  }
  for (int i = 0; i < num_blocks; ++i, blocks += 3) state->block_tables[blocks[0] * state->max_blocks + blocks[1]] = blocks[2];
}

// output_counts [R, vocab] or null.
extern "C" void cpu_commit_sampled(const Rows* state, const Step* step, const int32_t* context_lens, const int32_t* token_ids, int32_t* output_counts,
                                   int64_t vocab) {
  for (int i = 0; i < step->num_entries; ++i) {
    if (step->samples[i] <= 0) continue;
    int32_t* params = state->params + int64_t(step->rows[i]) * state->num_params;
    params[state->last_id] = token_ids[i];
    params[state->num_tokens] = context_lens[i] + 1;
    params[state->output_index] += 1;
    if (output_counts) output_counts[step->rows[i] * vocab + token_ids[i]] += 1;
  }
}
