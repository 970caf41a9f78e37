// Products of rows of codes with rows of x in int8. Needs vectors.h, groups.h, packed.h, int8.h,
// interleaved_rows.h, matrix_tiles.h and int8_tiles.h.
//
// Few rows of x are multiplied in tiles, and many by the matrix unit where there is one.

namespace {

// From so many rows of x for each expert on, the matrix unit multiplies: fewer are faster without.
constexpr int64_t kMatrixRows = 12;

// How a product of integers reads weights and x.
struct IntegerProduct {
  Rows rows;
  RowFormat x;
  TileFunction (*tile_of)(int64_t num_tokens);
  int64_t row_bytes;     // of weights
  int64_t offset_group;  // columns that share an offset
  bool by_matrices = false;
  bool has_half_scales = false;  // tiles read scales and offsets in fp16
#if HAS_MATRIX_TILES
  void (*decode_row)(uint8_t*, const char*, const Rows&);
#endif

  // Scales are one for each `group` of columns, INT64_MAX: for all; they must suit `fits`.
  // Sums of x are those of the groups of offsets.
  IntegerProduct(const Packed& at, int64_t group, int64_t num_scales, int64_t offset_group,
                 int64_t num_offsets, int64_t stride) {
    rows.group = group, rows.num_scales = num_scales;
    const bool halves = group == kHalf;
    for (int i = 0; i < 4; ++i)
      for (int lane = 0; lane < kLanes; ++lane) {
        const int64_t step = halves ? i / 2 : i, half = halves ? i % 2 * kHalf : 0;
        rows.index[i][lane] = (int32_t)((step * kStepColumns + lane / 4 * kBlock + half) / group);
      }
    const int64_t columns = halves ? kShared / 2 : kShared;
    rows.scale_advance = std::max<int64_t>(1, columns / group);
    rows.scale_period = std::max<int64_t>(1, group / columns);
    x = {at.depth, offset_group, num_offsets, halves, false, 0, 1.0f};
    rows.num_offsets = num_offsets;
    this->offset_group = offset_group;
#if HAS_MATRIX_TILES
    by_matrices = at.num_pairs >= kMatrixRows * at.num_experts && !at.ordered &&
                  may_use_matrix_tiles();
#endif
    const int64_t tile_bytes = kTileOutputs * std::max<int64_t>(stride, 1);
    rows.prefetch = (kPrefetchBytes + tile_bytes - 1) / tile_bytes * tile_bytes;
    row_bytes = stride;
  }

  static constexpr int64_t kShared = 4 * kStepColumns;  // columns of a vector of scales

  static bool fits(int64_t group) {
    return group == kHalf || group % kShared == 0 || group == INT64_MAX ||
           (group % kBlock == 0 && kShared % group == 0);
  }

  // How codes are read; halves of blocks have scales of their own if x has them apart.
  template <typename Codes>
  void read_as() {
    x.has_bias = Codes::kHasBias;
    tile_of = x.halves_apart ? ::tile_of<Codes, true> : ::tile_of<Codes, false>;
#if HAS_HALF_SCALES
    if (has_half_scales) tile_of = ::tile_of<Codes, false, Fp16>;
#endif
#if HAS_MATRIX_TILES
    decode_row = ::decode_row<Codes>;
    if (by_matrices) {  // sums are those of blocks, or of halves
      x.group = x.halves_apart ? kHalf : kBlock;
      x.num_groups = x.num_groups ? (x.depth + x.group - 1) / x.group : 0;
    }
#endif
  }

  // Call it when x and the codes are known.
  void measure() {
    rows.num_steps = x.num_steps(), rows.step_bytes = x.step_bytes(), rows.sums_at = x.sums_at();
  }

  // of a buffer for the scales, and for the offsets, of a row
  int64_t scale_floats() const { return (rows.num_scales + kLanes) / kLanes * kLanes; }
};

// A row of weights: its codes, and scales and offsets as a tile reads them.
struct WeightRow {
  const char* code;
  const void *scale, *offset;
};

// Results are written so many outputs at a time.
constexpr int kOutputsAtOnce = 16;

// Multiplies the pairs of one group by outputs first .. end - 1. Row i of the group is x_row[i].
// read(expert, o, buffer) is a WeightRow; the buffer has room for `buffer_floats` numbers.
template <typename Io, typename Read>
void multiply_part(const Packed& at, const IntegerProduct& by, const Part& part,
                   const char* const* x_row, const int32_t* pair, int64_t buffer_floats,
                   const Read& read) {
  const int64_t num = part.group->num, num_passes = (num + kWideTokens - 1) / kWideTokens;
  float* buffer = scratch((size_t)(kOutputsAtOnce * buffer_floats));
  const char* code[kOutputsAtOnce];
  const void *scale[kOutputsAtOnce], *offset[kOutputsAtOnce];
  for (int64_t o = part.first; o < part.end; o += kOutputsAtOnce) {
    const int64_t num_outputs = std::min<int64_t>(kOutputsAtOnce, part.end - o);
    const int64_t num_rows = (num_outputs + kTileOutputs - 1) / kTileOutputs * kTileOutputs;
    for (int64_t i = 0; i < num_rows; ++i) {
      const int64_t row = o + std::min(i, num_outputs - 1);  // a short tile repeats its last row
      const WeightRow weight = read(part.group->expert, row, buffer + i * buffer_floats);
      code[i] = weight.code, scale[i] = weight.scale, offset[i] = weight.offset;
    }
    for (int64_t pass = 0; pass < num_passes; ++pass) {
      const int64_t token = num * pass / num_passes, end = num * (pass + 1) / num_passes;
      const TileFunction tile = by.tile_of(end - token);
      float sums[kWideTokens][kOutputsAtOnce];
      for (int64_t i = 0; i < num_rows; i += kTileOutputs) {
        float of_tile[kWideTokens * kTileOutputs];
        tile(of_tile, by.rows, x_row + token, code + i, scale + i, offset + i);
        for (int64_t t = 0; t < end - token; ++t)
          std::memcpy(sums[t] + i, of_tile + t * kTileOutputs, kTileOutputs * sizeof(float));
      }
      for (int64_t t = token; t < end; ++t)
        for (int64_t i = 0; i < num_outputs; i += kLanes)
          put_results<Io>(at, pair[t], o + i, load(sums[t - token] + i), num_outputs - i);
    }
  }
}

#if HAS_MATRIX_TILES
// Fills `rows` with 16 rows of weights from o on; `buffer` has room for `num_floats`.
struct RowFiller {
  const Packed& at;
  const IntegerProduct& by;
  int64_t buffer_floats;  // of `read`, for a row
  const int64_t unit = by.x.halves_apart ? kHalf : kBlock;  // columns that share a scale
  const int64_t num_units = (at.depth + unit - 1) / unit, stride = num_units + kLanes;

  int64_t num_floats() const {
    return at.interleaved ? kTile * at.code_stride / 4 : buffer_floats + 2 * kTile * stride;
  }

  void decode(const TileRows& rows, int64_t i, const char* code) const {
    by.decode_row(rows.code + i * kBlock, code, by.rows);
  }

  template <typename Read>
  void fill(const TileRows& rows, float* buffer, int64_t expert, int64_t o, const Read& read) const {
    const int64_t num_outputs = std::min<int64_t>(kTile, at.num_outputs - o);
    float *scales = buffer + buffer_floats, *offsets = scales + kTile * stride;
    for (int64_t i = 0; i < kTile; ++i) {
      const int64_t row = o + std::min(i, num_outputs - 1);  // a short tile repeats its last row
      const WeightRow weight = read(expert, row, buffer);
      decode(rows, i, weight.code);
      std::memcpy(scales + i * stride, weight.scale, by.rows.num_scales * sizeof(float));
      if (rows.offset)
        std::memcpy(offsets + i * stride, weight.offset, by.rows.num_offsets * sizeof(float));
    }
    spread(rows.scale, scales, stride, by.rows.num_scales, by.rows.group, unit, num_units);
    if (rows.offset)
      spread(rows.offset, offsets, stride, by.rows.num_offsets, by.offset_group, unit, num_units);
  }

  void fill_interleaved(const TileRows& rows, float* buffer, int64_t expert, int64_t o) const {
    const Panel panel(at, expert, o);
    char* codes = (char*)buffer;
    copy_all_codes(codes, at.code_stride, panel, at.code_stride);
    for (int64_t i = 0; i < kTile; ++i) decode(rows, i, codes + i * at.code_stride);
    for (int64_t u = 0; u < num_units; ++u) {
      const int64_t from = (at.num_groups == 1 ? 0 : u * unit / at.group) * kInterleaved;
      store(rows.scale + u * kTile, load_as(panel.scale, from, at.scale_dtype));
      if (rows.offset) store(rows.offset + u * kTile, load_as(panel.offset, from, at.offset_dtype));
    }
  }
};

// `multiply_part` by the matrix unit.
template <typename Io, typename Read>
void multiply_matrices(const Packed& at, const IntegerProduct& by, const Part& part,
                       const ColumnBlock* x, const int32_t* pair, int64_t buffer_floats,
                       const Read& read) {
  const int64_t num_blocks = by.rows.num_steps * kStepBlocks, num = part.group->num;
  const bool halves = by.x.halves_apart, has_offsets = by.rows.num_offsets > 0;
  const auto multiply = halves ? has_offsets ? multiply_tile<true, true> : multiply_tile<true, false>
                        : has_offsets ? multiply_tile<false, true>
                                      : multiply_tile<false, false>;
  const int64_t fitting = kColumnsBytes / (num_blocks * (int64_t)sizeof(ColumnBlock));
  const int64_t at_once = std::max<int64_t>(1, fitting) * kTile;  // rows of x
  const RowFiller filler{at, by, buffer_floats};
  const int64_t tile_floats = TileRows::floats(num_blocks);
  float* buffer = scratch((size_t)(tile_floats + filler.num_floats()));
  const TileRows rows(buffer, num_blocks, has_offsets);
  const int64_t num_scales = num_blocks * kBlock / filler.unit * kTile;
  std::memset(rows.scale, 0, (size_t)num_scales * sizeof(float));
  if (has_offsets) std::memset(rows.offset, 0, (size_t)num_scales * sizeof(float));
  const TileRegisters registers((int)filler.unit);
  for (int64_t first = 0; first < num; first += at_once) {
    const int64_t end = std::min(first + at_once, num);
    for (int64_t o = part.first; o < part.end; o += kTile) {
      const int64_t num_outputs = std::min<int64_t>(kTile, part.end - o);
      const int64_t expert = part.group->expert;
      if (at.interleaved) filler.fill_interleaved(rows, buffer + tile_floats, expert, o);
      else filler.fill(rows, buffer + tile_floats, expert, o, read);
      for (int64_t t = first; t < end; t += kTile) {
        Vec sums[kTile];
        multiply(sums, rows, x + t / kTile * num_blocks, num_blocks, by.x.has_bias);
        transpose(sums);
        for (int64_t j = 0; j < std::min<int64_t>(kTile, end - t); ++j)
          put_results<Io>(at, pair[t + j], o, sums[j], num_outputs);
      }
    }
  }
}
#endif

// Calls quantize(to, x) for all rows of x, of which each takes `x_bytes`, and for some of them at a time
// multiply(groups, x_row, pair): the groups of their pairs, and row and pair of each place.
template <typename Io, typename Quantize, typename Multiply>
void for_quantized(const Packed& at, int64_t x_bytes, const Quantize& quantize,
                   const Multiply& multiply) {
  const int64_t repeats = at.x_repeats;
  for_blocks(at.num_pairs / repeats, repeats, x_bytes / 4, [&](int64_t first, int64_t num) {
    const int64_t first_pair = first * repeats, num_pairs = num * repeats;
    char* rows = (char*)scratch<kShared>((size_t)(num * x_bytes / 4));
    parallel_for(num, num * at.depth < kMinParallel ? 1 : at.num_threads, [&](int64_t row) {
      quantize(rows + row * x_bytes, (const Io*)at.x + (first + row) * at.x_stride);
    });
    const std::vector<int32_t> one(at.expert ? 0 : num_pairs);
    const Groups groups(at.expert ? at.expert + first_pair : one.data(), num_pairs, at.num_experts);
    std::vector<const char*> x_row(num_pairs);
    std::vector<int32_t> pair(num_pairs);
    for (int64_t place = 0; place < num_pairs; ++place) {
      x_row[place] = rows + groups.pair[place] / repeats * x_bytes;
      pair[place] = (int32_t)(first_pair + groups.pair[place]);
    }
    multiply(groups, x_row.data(), pair.data());
  });
}

template <typename Io, typename Read>
void integer_product(const Packed& at, const IntegerProduct& by, int64_t buffer_floats,
                     const Read& read) {
  const int64_t chunk = outputs_at_once(at, by.row_bytes, kOutputsAtOnce);
  const auto quantize = [&](char* to, const Io* x) { quantize_row(to, x, by.x); };
  for_quantized<Io>(at, by.x.bytes(), quantize, [&](const Groups& groups, const char* const* x_row,
                                                    const int32_t* pair) {
#if HAS_MATRIX_TILES
    if (by.by_matrices) {
      const Columns columns(groups, x_row, by.x, at.num_threads);
      for_parts(groups, at.num_outputs, chunk, at.num_threads, [&](const Part& part) {
        multiply_matrices<Io>(at, by, part, columns.of(part.group), pair + part.group->first,
                              buffer_floats, read);
      });
      return;
    }
#endif
    for_parts(groups, at.num_outputs, chunk, at.num_threads, [&](const Part& part) {
      multiply_part<Io>(at, by, part, x_row + part.group->first, pair + part.group->first,
                        buffer_floats, read);
    });
  });
}

}  // namespace
