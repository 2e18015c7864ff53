// Weights into the tiles of linear.h: from GGUF blocks as they are, or quantised from float32.
#include <vector>

#include "linear.h"

namespace cpu {
namespace {

enum Source : int32_t { kQ4_0 = 0, kQ4_1 = 1, kQ8_0 = 2, kQ4_K = 3, kToInt8 = 4, kToInt4 = 5, kQ5_0 = 6 };

uint16_t to_half(float x) { return uint16_t(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT)); }
float from_half(uint16_t x) { return _cvtsh_ss(x); }
uint16_t read_half(const uint8_t* p) { return uint16_t(p[0] | p[1] << 8); }

// One group of one row, unpacked.
struct Group {
  uint16_t scale = 0, minimum = 0;  // float16
  uint8_t q[kGroup] = {};           // 0-15, or 0-255 with 128 as zero
};

void nibbles(const uint8_t* bytes, uint8_t* q) {
  for (int i = 0; i < 16; ++i) {
    q[i] = bytes[i] & 15;
    q[i + 16] = bytes[i] >> 4;
  }
}

void q4_k_group(const uint8_t* block, int index, Group* out) {  // block_q4_K of ggml: d, dmin, 12 bytes of 6-bit scales and minima, 128 of nibbles
  const uint8_t* s = block + 4;
  int scale, minimum;
  if (index < 4) {
    scale = s[index] & 63;
    minimum = s[index + 4] & 63;
  } else {
    scale = (s[index + 4] & 15) | ((s[index - 4] >> 6) << 4);
    minimum = (s[index + 4] >> 4) | ((s[index] >> 6) << 4);
  }
  out->scale = to_half(from_half(read_half(block)) * float(scale));
  out->minimum = to_half(-from_half(read_half(block + 2)) * float(minimum));
  const uint8_t* bytes = block + 16 + 32 * (index / 2);
  for (int i = 0; i < kGroup; ++i) out->q[i] = index % 2 ? bytes[i] >> 4 : bytes[i] & 15;
}

void float_group(const float* w, bool eight_bits, Group* out) {
  float low = w[0], high = w[0];
  for (int i = 1; i < kGroup; ++i) {
    low = std::min(low, w[i]);
    high = std::max(high, w[i]);
  }
  if (eight_bits) {
    out->scale = to_half(std::max(-low, high) / 127.0f);
  } else {
    low = std::min(low, 0.0f);  // as GGUF's K quants: zero stays within the range
    out->scale = to_half((std::max(high, 0.0f) - low) / 15.0f);
    out->minimum = to_half(low);
  }
  float scale = from_half(out->scale), inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
  float zero = eight_bits ? 128.0f : -from_half(out->minimum) * inverse, top = eight_bits ? 255.0f : 15.0f;
  for (int i = 0; i < kGroup; ++i) out->q[i] = uint8_t(std::min(std::max(std::nearbyint(w[i] * inverse + zero), 0.0f), top));
}

Group read_group(Source source, const uint8_t* row, int g) {
  Group group;
  switch (source) {
    case kQ4_0:
      group.scale = read_half(row + 18 * g);
      nibbles(row + 18 * g + 2, group.q);
      break;
    case kQ4_1:
      group.scale = read_half(row + 20 * g);
      group.minimum = read_half(row + 20 * g + 2);
      nibbles(row + 20 * g + 4, group.q);
      break;
    case kQ8_0:
      group.scale = read_half(row + 34 * g);
      for (int i = 0; i < kGroup; ++i) group.q[i] = row[34 * g + 2 + i] ^ 0x80;
      break;
    case kQ5_0:  // five bits less 16 fit eight bits as they are
      group.scale = read_half(row + 22 * g);
      nibbles(row + 22 * g + 6, group.q);
      for (int i = 0; i < kGroup; ++i) group.q[i] = uint8_t((group.q[i] | (row[22 * g + 2 + i / 8] >> (i % 8) & 1) << 4) + 112);
      break;
    case kQ4_K:
      q4_k_group(row + 144 * (g / 8), g % 8, &group);
      break;
    case kToInt8:
    case kToInt4:
      float_group((const float*)row + kGroup * g, source == kToInt8, &group);
      break;
  }
  return group;
}

constexpr Format kFormatOf[] = {kInt4, kInt4Min, kInt8, kInt4Min, kInt8, kInt4Min, kInt8};

void write_group(Format format, const Group* rows, uint8_t* out) {
  for (int r = 0; r < kTileRows; ++r) std::memcpy(out + 2 * r, &rows[r].scale, 2);
  out += 32;
  if (format == kInt4Min) {
    for (int r = 0; r < kTileRows; ++r) std::memcpy(out + 2 * r, &rows[r].minimum, 2);
    out += 32;
  }
  for (int r = 0; r < kTileRows; ++r) {
    uint32_t words[8];  // four features each
    std::memcpy(words, rows[r].q, kGroup);
    for (int j = 0; j < (format == kInt8 ? 8 : 4); ++j) {
      uint32_t word = format == kInt8 ? words[j] : words[j] | words[j + 4] << 4;
      std::memcpy(out + 64 * j + 4 * r, &word, 4);
    }
  }
}

}  // namespace
}  // namespace cpu

// Bytes of the tiles of a packed weight.
extern "C" int64_t cpu_packed_bytes(int32_t source, int64_t num_rows, int64_t in_features) {
  return (num_rows + cpu::kTileRows - 1) / cpu::kTileRows * (in_features / cpu::kGroup) * cpu::kGroupBytes[cpu::kFormatOf[source]];
}

extern "C" int32_t cpu_packed_format(int32_t source) { return cpu::kFormatOf[source]; }

// Rows of `row_bytes` each (blocks, or float32) into tiles at `out`; rows past the last are zero.
extern "C" void cpu_pack(int32_t source, const void* data, int64_t row_bytes, int64_t num_rows, int64_t in_features, void* out, int32_t num_threads) {
  using namespace cpu;
  Format format = kFormatOf[source];
  int64_t groups = in_features / kGroup, tiles = (num_rows + kTileRows - 1) / kTileRows;
#pragma omp parallel for num_threads(num_threads) schedule(static)
  for (int64_t tile = 0; tile < tiles; ++tile) {
    uint8_t* target = (uint8_t*)out + tile * groups * kGroupBytes[format];
    for (int64_t g = 0; g < groups; ++g, target += kGroupBytes[format]) {
      Group rows[kTileRows];
      for (int r = 0; r < kTileRows; ++r) {
        int64_t row = tile * kTileRows + r;
        if (row < num_rows) rows[r] = read_group(Source(source), (const uint8_t*)data + row * row_bytes, int(g));
        else if (format == kInt8) std::memset(rows[r].q, 128, kGroup);
      }
      write_group(format, rows, target);
    }
  }
}
