// Products of few rows of x with interleaved rows of codes. Needs vectors.h, packed.h,
// interleaved_rows.h, int8.h, int8_tiles.h and int8_product.h.
//
// The lanes of a sum are rows of weights: it is added up within a lane, and one vector of scales is
// for all of them. A row of codes alone gives sums whose lanes are parts of the depth, which cost
// more than the products of a short row.

namespace {

constexpr int kPassTokens = 8;  // the most rows of x that a tile multiplies
// Codes are one stream, which is fetched to the second-level cache, and then to the first.
constexpr int64_t kFarBytes = 16 << 10, kNearBytes = 2 << 10;

// the 4 bytes at p in all lanes
INLINE Bytes repeat4(const void* p) {
  int32_t four;
  std::memcpy(&four, p, sizeof four);
  IVec all = (four - IVec{});
  Bytes out;
  std::memcpy(&out, &all, sizeof out);
  return out;
}

// A row of x: the int8 of its blocks, in order; a scale, times the factor of the codes, and a bias for
// each block; the sums of scale * q over each group of offsets.
struct BlockRow {
  int64_t num_blocks, num_groups, group;  // blocks that share an offset; no groups: no sums
  int bias;
  float factor;

  BlockRow(const Packed& at, const RowFormat& x)
      : num_blocks(at.depth / kBlock),
        num_groups(at.offset ? at.num_groups : 0),
        group(at.num_groups == 1 ? num_blocks : at.group / kBlock),
        bias(x.has_bias ? x.bias : 0),
        factor(x.factor) {}

  int64_t scales_at() const { return num_blocks * kBlock; }
  int64_t biases_at() const { return scales_at() + num_blocks * 4; }
  int64_t sums_at() const { return biases_at() + num_blocks * 4; }
  int64_t bytes() const { return (sums_at() + num_groups * 4 + 63) / 64 * 64; }

  template <typename T>
  void quantize(char* to, const T* x) const {
    int8_t* q = (int8_t*)to;
    float *scales = (float*)(to + scales_at()), *sums = (float*)(to + sums_at());
    int32_t* biases = (int32_t*)(to + biases_at());
    std::memset((void*)sums, 0, num_groups * sizeof(float));
    for (int64_t block = 0; block < num_blocks; ++block, q += kBlock) {
      const float scale = quantize_block(q, q + kHalf, x + block * kBlock, kBlock);
      scales[block] = scale * factor;
      if (!bias && !num_groups) continue;
      const int32_t sum = sum_of_block(q);
      biases[block] = sum * bias;
      if (num_groups) sums[block / group] += (float)sum * scale;
    }
  }
};

// sums[16 * t + i] of row i of a panel
typedef void (*PanelTile)(float* sums, const Packed&, const BlockRow&, const Rows&, const Panel&,
                          const char* const* x);

template <typename Codes, int TB>
void panel_tile(float* sums, const Packed& at, const BlockRow& row, const Rows& rows,
                const Panel& panel, const char* const* x) {
  constexpr int kQuads = kBlock / 4, kCodeQuads = Codes::kStepBytes == kBytes ? kQuads / 2 : kQuads;
  const Codes codes(rows);
  for (int lane = 0; lane < kInterleaved; lane += kLanes) {
    Vec acc[TB] = {};
    const char* code = panel.code + lane * 4;
    for (int64_t block = 0, g = 0; block < row.num_blocks; ++g) {
      const Vec scales = load_as(panel.scale, g * kInterleaved + lane, at.scale_dtype);
      for (const int64_t end = block + row.group; block < end; ++block) {
        Bytes quad[kQuads];
#pragma GCC unroll 8
        for (int i = 0; i < kCodeQuads; ++i, code += kQuadBytes) {
          __builtin_prefetch(code + kFarBytes, 0, 2), __builtin_prefetch(code + kNearBytes, 0, 3);
          codes.load_quad(quad, i, load_bytes(code));
        }
#pragma GCC unroll 8
        for (int t = 0; t < TB; ++t) {
          IVec sum{}, other{};  // two short chains: an addition takes several cycles
          if (Codes::kHasBias) sum += ((const int32_t*)(x[t] + row.biases_at()))[block];
#pragma GCC unroll 8
          for (int i = 0; i < kQuads; i += 2) {
            const char* from = x[t] + block * kBlock + 4 * i;
            sum = multiply<Codes>(sum, quad[i], repeat4(from));
            other = multiply<Codes>(other, quad[i + 1], repeat4(from + 4));
          }
          sum += other;
          const Vec by = scales * ((const float*)(x[t] + row.scales_at()))[block];
          acc[t] = multiply_add(__builtin_convertvector(sum, Vec), by, acc[t]);
        }
      }
    }
    for (int64_t g = 0; g < row.num_groups; ++g) {
      const Vec offsets = load_as(panel.offset, g * kInterleaved + lane, at.offset_dtype);
#pragma GCC unroll 8
      for (int t = 0; t < TB; ++t)
        acc[t] = multiply_add(offsets, splat(((const float*)(x[t] + row.sums_at()))[g]), acc[t]);
    }
    for (int t = 0; t < TB; ++t) store(sums + t * kInterleaved + lane, acc[t]);
  }
}

template <typename Codes>
PanelTile panel_tile_of(int64_t num_tokens) {
  static const PanelTile of[] = {panel_tile<Codes, 1>, panel_tile<Codes, 2>, panel_tile<Codes, 3>,
                                 panel_tile<Codes, 4>, panel_tile<Codes, 5>, panel_tile<Codes, 6>,
                                 panel_tile<Codes, 7>, panel_tile<Codes, 8>};
  return of[num_tokens - 1];
}

// Multiplies the pairs of one group by panels, as `multiply_part` does by rows.
template <typename Io>
void multiply_panels(const Packed& at, const BlockRow& row, const Rows& rows,
                     PanelTile (*tile_of)(int64_t num_tokens), const Part& part,
                     const char* const* x_row, const int32_t* pair) {
  const int64_t num = part.group->num, num_passes = (num + kPassTokens - 1) / kPassTokens;
  for (int64_t pass = 0; pass < num_passes; ++pass) {
    const int64_t token = num * pass / num_passes, end = num * (pass + 1) / num_passes;
    const PanelTile tile = tile_of(end - token);
    for (int64_t o = part.first; o < part.end; o += kInterleaved) {
      float sums[kPassTokens * kInterleaved];
      tile(sums, at, row, rows, Panel(at, part.group->expert, o), x_row + token);
      for (int64_t t = token; t < end; ++t)
        for (int lane = 0; lane < kInterleaved; lane += kLanes)
          put_results<Io>(at, pair[t], o + lane, load(sums + (t - token) * kInterleaved + lane),
                          kLanes);
    }
  }
}

template <typename Io>
void interleaved_product(const Packed& at, const IntegerProduct& by,
                         PanelTile (*tile_of)(int64_t num_tokens)) {
  const BlockRow row(at, by.x);
  const int64_t chunk = outputs_at_once(at, by.row_bytes, kInterleaved);
  const auto quantize = [&](char* to, const Io* x) { row.quantize(to, x); };
  for_quantized<Io>(at, row.bytes(), quantize, [&](const Groups& groups, const char* const* x_row,
                                                   const int32_t* pair) {
    for_parts(groups, at.num_outputs, chunk, at.num_threads, [&](const Part& part) {
      multiply_panels<Io>(at, row, by.rows, tile_of, part, x_row + part.group->first,
                          pair + part.group->first);
    });
  });
}

}  // namespace
