// Products of codes with rows of x in int8 by a matrix unit (AMX), for any number of rows of x. Needs
// groups.h, int8.h and interleaved_rows.h.
//
// The unit multiplies 16 rows of codes by 16 rows of x, in a block of 32 columns or in one of its
// halves: as many as share a scale. Integers are exact, and each lane adds up its blocks in their
// order. So a result does not depend on the other rows of x.

#if LANES == 16 && defined(__AVX512BW__) && defined(__AVX512VNNI__) && defined(__AMX_INT8__) && \
    defined(__linux__)
#define HAS_MATRIX_TILES 1
#include <sys/syscall.h>
#include <unistd.h>
#else
#define HAS_MATRIX_TILES 0
#endif

namespace {

#if HAS_MATRIX_TILES

constexpr int kTile = 16;                 // rows of codes, and rows of x
constexpr int64_t kCodeBytes = kTile * kBlock;  // of a block of 16 rows
constexpr int64_t kColumnsBytes = 1 << 20;  // of x, which stay in a cache for all codes of a part

// A block of 16 rows of x, which are the columns of a product.
struct alignas(64) ColumnBlock {
  uint32_t x[kBlock / 4][kTile];  // 4 numbers of each row
  float scale[kTile];
  int32_t bias[2][kTile];  // of halves of the block, or the first one of the whole block
  float sum[2][kTile];
};

// True if the system lets this process use the unit's registers.
inline bool may_use_matrix_tiles() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  static const bool may = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return may;
}

// The unit's registers, as long as this lives: 0 to 3 for results, 4 for codes and 5 for x.
struct TileRegisters {
  struct alignas(64) Config {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t column_bytes[16] = {};
    uint8_t rows[16] = {};
  };

  explicit TileRegisters(int num_columns) {
    Config config;
    for (int i = 0; i < 4; ++i) config.column_bytes[i] = 4 * kTile, config.rows[i] = kTile;
    config.column_bytes[4] = (uint16_t)num_columns, config.rows[4] = kTile;
    config.column_bytes[5] = 4 * kTile, config.rows[5] = (uint8_t)(num_columns / 4);
    _tile_loadconfig(&config);
  }
  ~TileRegisters() { _tile_release(); }
};

// Copies up to 16 quantized rows of x to blocks.
inline void copy_columns(ColumnBlock* to, const char* const* x_row, int num,
                         const RowFormat& format) {
  const int64_t num_steps = format.num_steps(), units = format.halves_apart ? 2 : 1;
  std::memset((void*)to, 0, num_steps * kStepBlocks * sizeof(ColumnBlock));
  for (int t = 0; t < num; ++t) {
    const float* sums = (const float*)(x_row[t] + format.sums_at());
    for (int64_t block = 0; block < num_steps * kStepBlocks; ++block) {
      ColumnBlock& at = to[block];
      const char* step = x_row[t] + block / kStepBlocks * format.step_bytes();
      const int64_t in_step = block % kStepBlocks * kHalf;  // in bytes of each vector of the step
      uint32_t word[kBlock / 4];
      std::memcpy(word, step + in_step, kHalf);
      std::memcpy(word + kHalf / 4, step + kBytes + in_step, kHalf);
      for (int i = 0; i < kBlock / 4; ++i) at.x[i][t] = word[i];
      std::memcpy(&at.scale[t], step + 2 * kBytes + in_step, sizeof(float));
      for (int64_t i = 0; i < units; ++i) {
        const int64_t unit = block * units + i;
        if (unit < format.num_groups) at.sum[i][t] = sums[unit];
        if (!format.has_bias) continue;
        int32_t bias[4];
        std::memcpy(bias, step + (3 + i) * kBytes + in_step, sizeof bias);
        at.bias[i][t] = bias[0] + bias[1] + bias[2] + bias[3];
      }
    }
  }
}

// The rows of x of all groups of pairs, 16 at a time.
class Columns {
 public:
  Columns(const Groups& groups, const char* const* x_row, const RowFormat& format,
          int64_t num_threads)
      : groups_(groups), num_blocks_(format.num_steps() * kStepBlocks) {
    struct Sixteen {
      const char* const* x_row;
      int num;
    };
    std::vector<Sixteen> all;
    for (const Groups::Group& group : groups.groups) {
      first_.push_back((int64_t)all.size());
      for (int64_t i = 0; i < group.num; i += kTile)
        all.push_back({x_row + group.first + i, (int)std::min<int64_t>(kTile, group.num - i)});
    }
    const int64_t num = (int64_t)all.size(), num_bytes = num_blocks_ * (int64_t)sizeof(ColumnBlock);
    blocks_ = (ColumnBlock*)scratch<kShared, Columns>((size_t)(num * num_bytes / 4));
    parallel_for(num, num * num_bytes < 4 * kMinParallel ? 1 : num_threads, [&](int64_t i) {
      copy_columns(blocks_ + i * num_blocks_, all[i].x_row, all[i].num, format);
    });
  }

  const ColumnBlock* of(const Groups::Group* group) const {
    return blocks_ + first_[group - groups_.groups.data()] * num_blocks_;
  }

 private:
  const Groups& groups_;
  int64_t num_blocks_;
  std::vector<int64_t> first_;
  ColumnBlock* blocks_;
};

// 16 rows of codes as the unit reads them, with their scales and offsets for each block or half.
struct TileRows {
  uint8_t* code;          // [num_blocks, 16, 32]
  float *scale, *offset;  // [num_blocks, units, 16]; offset may be null

  static int64_t floats(int64_t num_blocks) {
    return num_blocks * (kCodeBytes / 4 + 2 * 2 * kTile);
  }

  TileRows(float* buffer, int64_t num_blocks, bool has_offsets) {
    code = (uint8_t*)buffer;
    scale = buffer + num_blocks * kCodeBytes / 4;
    offset = has_offsets ? scale + num_blocks * 2 * kTile : nullptr;
  }
};

// Numbers of 16 rows for each block or half of one, from those of groups of columns: `unit` columns
// share one in the result. Row i is at from + i * stride and is replaced; to is [num_units, 16].
inline void spread(float* to, float* from, int64_t stride, int64_t num_groups, int64_t group,
                   int64_t unit, int64_t num_units) {
  if (group != unit)
    for (int i = 0; i < kTile; ++i) {
      float* row = from + i * stride;
      for (int64_t u = num_units - 1; u >= 0; --u)
        row[u] = row[num_groups == 1 ? 0 : std::min(u * unit / group, num_groups - 1)];
    }
  for (int64_t u = 0; u < num_units; u += kTile) {
    Vec row[kTile];
    const SomeLanes some = first_lanes(num_units - u);
    for (int i = 0; i < kTile; ++i) row[i] = load_some(from + i * stride + u, some);
    transpose(row);
    for (int i = 0; i < std::min<int64_t>(kTile, num_units - u); ++i)
      store(to + (u + i) * kTile, row[i]);
  }
}

// sums[o]: lanes are 16 rows of x
template <bool kHalves, bool kOffsets>
void multiply_tile(Vec* sums, const TileRows& rows, const ColumnBlock* x, int64_t num_blocks,
                   bool has_bias) {
  constexpr int kUnits = kHalves ? 2 : 1, kAhead = 2, kBuffers = 4;
  alignas(64) int32_t found[kBuffers][kTile][kTile];
  Vec acc[kTile] = {};
  const int64_t num_units = num_blocks * kUnits;
  for (int64_t i = 0; i < num_units + kAhead; ++i) {
    if (i < num_units) {
      const int64_t block = i / kUnits, half = i % kUnits;
      const ColumnBlock& of_x = x[block];
      _tile_loadd(4, rows.code + block * kCodeBytes + half * kHalf, kBlock);
      _tile_loadd(5, of_x.x[half * kHalf / 4], 4 * kTile);
      _tile_zero(0);
      if (has_bias) _tile_loadd(0, of_x.bias[half], 0);  // equal in all rows
      _tile_dpbusd(0, 4, 5);
      _tile_stored(0, found[i % kBuffers], 4 * kTile);
    }
    // the unit and the vectors work at the same time
    const int64_t unit = i - kAhead;
    if (unit < 0) continue;
    const ColumnBlock& of_x = x[unit / kUnits];
    const float* scale = rows.scale + unit * kTile;
    const float* offset = kOffsets ? rows.offset + unit * kTile : nullptr;
    const Vec x_scale = load(of_x.scale), x_sum = load(of_x.sum[unit % kUnits]);
#pragma GCC unroll 16
    for (int o = 0; o < kTile; ++o) {
      const IVec sum = *(const IVecAt*)found[unit % kBuffers][o];
      acc[o] = multiply_add(__builtin_convertvector(sum, Vec), splat(scale[o]) * x_scale, acc[o]);
      if (kOffsets) acc[o] = multiply_add(splat(offset[o]), x_sum, acc[o]);
    }
  }
#pragma GCC unroll 16
  for (int o = 0; o < kTile; ++o) sums[o] = acc[o];
}

#endif

}  // namespace
