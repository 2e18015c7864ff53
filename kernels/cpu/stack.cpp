// All decoder layers of a step in one parallel region: what one token costs is then the weights' bytes, not calls and thread wake-ups.
//
// A layer: norm and quantise | qkv | rope, store | attention | quantise | output projection, added | norm and quantise | gate-up, silu, quantise |
// down, added; a barrier at each bar. The residual stream and everything between is float32; only the cache has its own dtype.
#include <memory>
#include <vector>

#include "attention.h"
#include "elementwise.h"
#include "linear.h"

namespace cpu {

struct Layer {
  const Linear* qkv;
  const Linear* output;
  const Linear* gate_up;  // gate rows, then up rows
  const Linear* down;
  const float* attention_norm;
  const float* mlp_norm;
  const float* q_norm;  // or null
  const float* k_norm;
  void* keys;
  void* values;
  int32_t sliding_window;  // 0: none
  int32_t unused;
};

namespace {

template <class T>
class Stack {
 public:
  Stack(const Layer* layers, int num_layers, const RopeShape& rope, const AttentionShape& attention, T* hidden)
      : layers_(layers), num_layers_(num_layers), rope_(rope), attention_(attention), hidden_(hidden), tokens_(rope.num_tokens),
        width_(layers[0].qkv->in_features), qkv_width_(layers[0].qkv->out_features), heads_width_(rope.num_heads * rope.head_dim),
        inner_(layers[0].down->in_features), terms_(num_terms(rope.num_tokens)) {
    thread_local Workspace workspace;
    residual_ = workspace.get<float>(0, size_t(tokens_) * width_);
    qkv_ = workspace.get<float>(1, size_t(tokens_) * qkv_width_);
    q_ = workspace.get<float>(2, size_t(tokens_) * heads_width_);
    context_ = workspace.get<float>(3, size_t(tokens_) * heads_width_);
    std::memset(context_, 0, size_t(tokens_) * heads_width_ * sizeof(float));  // what no entry owns stays zero
    acts_ = make_acts(workspace, 4, tokens_, std::max(width_, heads_width_));
    inner_acts_ = make_acts(workspace, 6, tokens_, inner_);
    inner_acts_.extras = 0;  // they are quantised a group at a time, and no few of their groups stand out (12 % of them hold 32 % of the error)
    for (int i = 0; i < num_layers; ++i) plan(layers[i].sliding_window);
  }

  void run(int num_threads) {
    run_team(num_threads, [&](Team& team, int) {
      team.share(tokens_, team.piece(tokens_, 4), [&](int begin, int end) {
        for (size_t i = size_t(begin) * width_; i < size_t(end) * width_; i += kLanes) vstore(residual_ + i, vload(hidden_ + i));
      });
      team.barrier();
      for (int i = 0; i < num_layers_; ++i) layer(team, layers_[i]);
      team.share(tokens_, team.piece(tokens_, 4), [&](int begin, int end) {
        for (size_t i = size_t(begin) * width_; i < size_t(end) * width_; i += kLanes) vstore(hidden_ + i, vload(residual_ + i));
      });
    });
  }

 private:
  AttentionPlan& plan(int window) {
    for (auto& [known, plan] : plans_)
      if (known == window) return *plan;
    AttentionShape shape = attention_;
    shape.sliding_window = window;
    plans_.emplace_back(window, std::make_unique<AttentionPlan>(shape));
    return *plans_.back().second;
  }

  void norm(Team& team, const float* weight) {
    share_quantize(team, narrowed(acts_, tokens_, width_), tokens_, [&](int first, int count, float* rows) {
      for (int t = 0; t < count; ++t) norm_row(residual_ + size_t(first + t) * width_, weight, width_, rope_.eps, rows + size_t(t) * width_);
    });
    team.barrier();
  }

  template <bool kAdd>
  void project(Team& team, const Linear& linear, const Acts& acts, float* out) {
    share_tiles(team, linear, narrowed(acts, tokens_, linear.in_features), tokens_, [&](const Tile& tile, int first, int count, const float (*values)[kTileRows]) {
      for (int t = 0; t < count; ++t) {
        store_tile_row<kAdd>(tile, values[t], linear.bias, out + size_t(first + t) * linear.out_features + tile.first_row);
      }
    });
    team.barrier();
  }

  // 32 features of the gate and their partners of up, multiplied and quantised as one group of the down projection's input.
  void gate_up(Team& team, const Linear& linear) {
    Acts acts = narrowed(acts_, tokens_, width_);
    int groups = acts.groups, pairs = inner_ / kGroup, num_rows = tokens_ * terms_;
    team.share(pairs, std::max(1, tile_piece(team, linear.num_tiles, groups, num_rows) / 4), [&](int begin, int end) {
      alignas(64) float gate[kBlockTokens][kTileRows], up[kBlockTokens][kTileRows], row[kBlockTokens][kGroup];
      for (int first = 0; first < num_rows; first += kBlockTokens) {
        int rows = std::min(kBlockTokens, num_rows - first), count = rows / terms_;
        for (int pair = begin; pair < end; ++pair) {
          for (int half = 0; half < 2; ++half) {
            const Tile *g = linear.tiles + 2 * pair + half, *u = g + inner_ / kTileRows;
            tile_product(*g, acts, first / kBlockTokens, rows, first == 0, gate);
            tile_product(*u, acts, first / kBlockTokens, rows, first == 0, up);
            if (terms_ == 2) {
              add_terms(gate, count);
              add_terms(up, count);
            }
            for (int t = 0; t < count; ++t) {
              for (int r = 0; r < kTileRows; r += kLanes) {
                vf a = vload(gate[t] + r), b = vload(up[t] + r);
                if (linear.bias) {
                  a = vadd(a, vload(linear.bias + g->first_row + r));
                  b = vadd(b, vload(linear.bias + u->first_row + r));
                }
                vstore(row[t] + half * kTileRows + r, vmul(vsilu(a), b));
              }
            }
          }
          ActGroup* out = inner_acts_.block(first / kBlockTokens) + pair;
          for (int t = 0; t < count; ++t) quantize_group(row[t], out, t * terms_, terms_);
        }
      }
    });
    team.barrier();
  }

  void layer(Team& team, const Layer& layer) {
    norm(team, layer.attention_norm);
    project<false>(team, *layer.qkv, acts_, qkv_);
    RopeShape rope = rope_;
    rope.q_norm = layer.q_norm;
    rope.k_norm = layer.k_norm;
    team.share(tokens_, team.piece(tokens_, 4), [&](int begin, int end) {
      for (int t = begin; t < end; ++t)
        rope_token(rope, t, qkv_ + size_t(t) * qkv_width_, q_ + size_t(t) * heads_width_, layer.keys, layer.values);
    });
    team.barrier();
    AttentionShape shape = attention_;
    shape.sliding_window = layer.sliding_window;
    share_attention(team, shape, plan(layer.sliding_window), q_, layer.keys, layer.values, context_);
    team.barrier();
    share_quantize(team, narrowed(acts_, tokens_, heads_width_), tokens_, [&](int first, int count, float* rows) {
      std::memcpy(rows, context_ + size_t(first) * heads_width_, size_t(count) * heads_width_ * sizeof(float));
    });
    team.barrier();
    project<true>(team, *layer.output, acts_, residual_);
    norm(team, layer.mlp_norm);
    gate_up(team, *layer.gate_up);
    project<true>(team, *layer.down, inner_acts_, residual_);
  }

  const Layer* layers_;
  int num_layers_;
  RopeShape rope_;
  AttentionShape attention_;
  T* hidden_;
  int tokens_, width_, qkv_width_, heads_width_, inner_, terms_;
  float *residual_, *qkv_, *q_, *context_;
  Acts acts_, inner_acts_;
  std::vector<std::pair<int, std::unique_ptr<AttentionPlan>>> plans_;
};

}  // namespace
}  // namespace cpu

// hidden [T, H] of dtype, replaced by the residual stream after the last layer.
extern "C" void cpu_stack(const cpu::Layer* layers, int32_t num_layers, const cpu::RopeShape* rope, const cpu::AttentionShape* attention, void* hidden,
                          int32_t dtype, int32_t num_threads) {
  if (dtype == cpu::kFloat32) cpu::Stack<float>(layers, num_layers, *rope, *attention, (float*)hidden).run(num_threads);
  else cpu::Stack<cpu::bf16>(layers, num_layers, *rope, *attention, (cpu::bf16*)hidden).run(num_threads);
}
