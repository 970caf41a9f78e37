// Products of weights in codes of 4 and 8 bits or in fp8, compiled at first use by packed.py.
// kernels.cpp describes how arguments are passed, and reference/packed.py has the meaning.
//
// T tokens | K experts per token | P = T * K pairs | E experts | O outputs | D depth
// G groups of columns | C bytes of codes in a row
//
// Where codes are small integers times a scale, rows of x are quantized to int8 (see int8.h) and
// multiplied as integers. Else, and if `exact`, some rows of weights at a time are dequantized to
// fp32 for a product in fp32. A result depends on its row of x and its row of weights alone, and where
// there is a matrix unit on whether it multiplies (see kMatrixRows).

#include "vectors.h"
#include "tiles.h"
#include "groups.h"
#include "packed.h"
#include "interleaved_rows.h"
#include "int8.h"
#include "matrix_tiles.h"
#include "int8_tiles.h"
#include "int8_product.h"
#include "interleaved.h"
#include "packed_floats.h"

namespace {

// A table whose levels are `factor` times integers of int8.
struct IntegerTable {
  bool exists = false;
  float factor = 1.0f;
  int shift = 0;  // added to levels where codes are unsigned
  alignas(16) uint8_t level[16];

  explicit IntegerTable(const float* table) {
    float largest = 0.0f, smallest = 0.0f;
    for (int i = 0; i < 16; ++i) {
      if (!(std::fabs(table[i]) < INFINITY)) return;
      largest = std::max(largest, std::fabs(table[i])), smallest = std::min(smallest, table[i]);
    }
    if (largest == 0.0f) return;
    for (int most = 1; most <= 127 && !exists; ++most) {
      factor = largest / (float)most;
      exists = true;
      for (int i = 0; i < 16 && exists; ++i)
        exists = std::fabs(std::nearbyint(table[i] / factor) * factor - table[i]) <=
                 largest * 0x1p-22f;
    }
    shift = kUnsigned ? -(int)std::nearbyint(smallest / factor) : 0;
    for (int i = 0; i < 16; ++i)
      level[i] = (uint8_t)((int)std::nearbyint(table[i] / factor) + shift);
  }
};

// The search is repeated only for another table.
const IntegerTable& integer_table(const float* table) {
  thread_local float last[16] = {};
  thread_local IntegerTable found(last);
  if (std::memcmp(last, table, sizeof last) != 0) {
    std::memcpy(last, table, sizeof last);
    found = IntegerTable(table);
  }
  return found;
}

// Codes of 4 bits, with a table or without.
template <bool kTable>
struct Codes4 {
  static constexpr bool kHasBias = kTable && kUnsigned, kAreSmall = !kTable;
  static constexpr int kStepBytes = kBytes;
  Bytes table;

  struct Step {
    int64_t first_byte;
    SomeBytes some;
    INLINE Step(int64_t from, int j, const Rows& at)
        : first_byte((from + j) * kStepBytes), some(first_bytes(at.code_bytes - first_byte)) {}
  };

  INLINE explicit Codes4(const Rows& at) : table(at.table) {}

  INLINE void load(Bytes& low, Bytes& high, const char* row, const Step& at) const {
    const Bytes both = load_bytes(row + at.first_byte, at.some);
    low = low_codes(both), high = high_codes(both);
    if (kTable) low = look_up(table, low), high = look_up(table, high);
  }

  // Quads of columns i and i + 4 of a block.
  INLINE void load_quad(Bytes* quad, int i, Bytes both) const {
    quad[i] = low_codes(both), quad[i + 4] = high_codes(both);
    if (kTable) quad[i] = look_up(table, quad[i]), quad[i + 4] = look_up(table, quad[i + 4]);
  }
};

struct Codes8 {
  static constexpr bool kHasBias = !kUnsigned, kAreSmall = false;
  static constexpr int kStepBytes = 2 * kBytes;

  struct Step {
    int64_t first_byte;
    SomeBytes some, others;
    INLINE Step(int64_t from, int j, const Rows& at)
        : first_byte((from + j) * kStepBytes),
          some(first_bytes(at.code_bytes - first_byte)),
          others(first_bytes(at.code_bytes - first_byte - kBytes)) {}
  };

  INLINE explicit Codes8(const Rows&) {}

  INLINE void load(Bytes& low, Bytes& high, const char* row, const Step& at) const {
    low = load_bytes(row + at.first_byte, at.some);
    high = load_bytes(row + at.first_byte + kBytes, at.others);
    halves(low, high);
    if (!kUnsigned) low = flip_sign(low), high = flip_sign(high);
  }

  INLINE void load_quad(Bytes* quad, int i, Bytes codes) const {
    quad[i] = kUnsigned ? codes : flip_sign(codes);
  }
};

bool is_integer(const Packed& at) {
  return !at.exact && !at.is_fp8 && (at.num_groups == 1 || at.group % kHalf == 0) &&
         (at.table == nullptr || (at.bits == 4 && integer_table(at.table).exists));
}

bool can_interleave(const Packed& at) {
  return !at.is_fp8 && at.num_outputs % kInterleaved == 0 && at.depth % kBlock == 0 &&
         (at.num_groups == 1 || at.group % kBlock == 0);
}

// are_stored: a tile can read the scales as they are stored, but for their dtype.
IntegerProduct product_of(const Packed& at, int64_t group, int64_t num_scales, bool are_stored) {
  IntegerProduct by(at, group, num_scales, at.num_groups == 1 ? INT64_MAX : at.group,
                    at.offset ? at.num_groups : 0, at.code_stride);
  const bool is_half = at.scale_dtype == kFp16 && (!at.offset || at.offset_dtype == kFp16);
  by.has_half_scales = HAS_HALF_SCALES && is_half && are_stored && !by.x.halves_apart && !by.by_matrices;
  if (at.bits == 8) {
    by.read_as<Codes8>();
    by.x.bias = 128;
  } else if (at.table) {
    const IntegerTable& table = integer_table(at.table);
    by.rows.table = repeat16(table.level);
    by.read_as<Codes4<true>>();
    by.x.bias = -table.shift, by.x.factor = table.factor;
  } else {
    by.read_as<Codes4<false>>();
  }
  by.rows.code_bytes = at.bits == 8 ? at.depth : (at.depth + kBlock - 1) / kBlock * (kBlock / 2);
  by.measure();
  return by;
}

template <typename Io>
void multiply_integers(const Packed& at) {
  int64_t group = at.num_groups == 1 ? INT64_MAX : at.group, num_scales = at.num_groups;
  const bool fits = IntegerProduct::fits(group);
  if (!fits) {  // scales are repeated for each block, or for each half
    group = at.group % kBlock == 0 ? kBlock : kHalf;
    num_scales = (at.depth + group - 1) / group;
  }
  const IntegerProduct by = product_of(at, group, num_scales, fits);
  if (at.interleaved && !by.by_matrices) {
    const auto tile_of = at.bits == 8 ? panel_tile_of<Codes8>
                         : at.table   ? panel_tile_of<Codes4<true>>
                                      : panel_tile_of<Codes4<false>>;
    return interleaved_product<Io>(at, by, tile_of);
  }
  const int64_t scale_floats = by.scale_floats(), group_floats = at.num_groups + kLanes;
  const auto read = [&](int64_t expert, int64_t o, float* buffer) {
    WeightRow row{code_row(at, expert, o), scale_row(at, expert, o), nullptr};
    if (at.offset) row.offset = offset_row(at, expert, o);
    if (by.has_half_scales) return row;
    float *stored = buffer + scale_floats, *offsets = stored + group_floats;
    if (!fits || at.scale_dtype != kFp32) {
      to_floats(fits ? buffer : stored, (const char*)row.scale, at.scale_dtype, at.num_groups);
      if (!fits)
        for (int64_t i = 0; i < num_scales; ++i) buffer[i] = stored[i * group / at.group];
      row.scale = buffer;
    }
    if (at.offset && at.offset_dtype != kFp32) {
      to_floats(offsets, (const char*)row.offset, at.offset_dtype, at.num_groups);
      row.offset = offsets;
    }
    return row;
  };
  integer_product<Io>(at, by, scale_floats + 2 * group_floats, read);
}

}  // namespace

// Returns 0, and does nothing, if an expert's id is not below num_experts.
extern "C" int64_t nanovllm_packed_linear(const Packed* args) {
  const Packed& at = *args;
  if (at.expert && !are_valid(at.expert, at.num_pairs, 0, at.num_experts)) return 0;
  with_io(at.dtype, [&](auto zero) {
    typedef decltype(zero) Io;
    if (is_integer(at)) multiply_integers<Io>(at);
    else float_product<Io>(at);
  });
  return 1;
}

// 1 if nanovllm_packed_linear with these weights quantizes its inputs
extern "C" int64_t nanovllm_packed_is_integer(const Packed* args) {
  return is_integer(*args);
}

// 1 if these rows can be interleaved, and are then multiplied faster: measured with AVX-512 and VNNI
extern "C" int64_t nanovllm_packed_is_faster_interleaved(const Packed* args) {
  return LANES == 16 && kUnsigned && is_integer(*args) && can_interleave(*args);
}

// Dequantizes all outputs of one expert to bf16.
extern "C" int64_t nanovllm_widen_packed(const Packed* args) {
  const Packed& at = *args;
  const int64_t blocks = (at.depth + kBlock - 1) / kBlock * kBlock;
  const int64_t together = at.interleaved ? kInterleaved : 1;
  const int64_t code_floats = at.interleaved ? kInterleaved * at.code_stride / 4 : 0;
  parallel_for(at.num_outputs / together, at.num_threads, [&](int64_t item) {
    float* buffer = scratch((size_t)(code_floats + OneRow::floats(at) + blocks));
    float* of_row = buffer + code_floats;
    Bf16* value = (Bf16*)(of_row + OneRow::floats(at));
    const char* codes = at.interleaved ? (const char*)buffer : nullptr;
    if (codes) copy_all_codes((char*)buffer, at.code_stride, Panel(at, 0, item * together), at.code_stride);
    for (int64_t i = 0; i < together; ++i) {
      const int64_t o = item * together + i;
      dequantize_row(value, at, OneRow(of_row, at, 0, o, codes ? codes + i * at.code_stride : nullptr));
      std::memcpy((Bf16*)at.out + o * at.x_stride, value, at.depth * sizeof(Bf16));
    }
  });
  return 1;
}

// Dequantizes the rows that `expert` names, [P, depth] in `dtype`. Returns 0, and does nothing, if
// one is not below num_outputs.
extern "C" int64_t nanovllm_packed_lookup(const Packed* args) {
  const Packed& at = *args;
  if (!are_valid(at.expert, at.num_pairs, 0, at.num_outputs)) return 0;
  const int64_t blocks = (at.depth + kBlock - 1) / kBlock * kBlock;
  const int64_t num_threads = at.num_pairs * at.depth < kMinParallel ? 1 : at.num_threads;
  parallel_for(at.num_pairs, num_threads, [&](int64_t pair) {
    float* buffer = scratch((size_t)(OneRow::floats(at) + blocks));
    float* value = buffer + OneRow::floats(at);
    dequantize_row(value, at, OneRow(buffer, at, 0, at.expert[pair]));
    put_row(at, pair, value);
  });
  return 1;
}
