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
#include "int8.h"
#include "matrix_tiles.h"
#include "int8_tiles.h"
#include "int8_product.h"

namespace {

// ---------------------------------------------------------------------------- products of integers

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
};

bool is_integer(const Packed& at) {
  return !at.exact && !at.is_fp8 && (at.num_groups == 1 || at.group % kHalf == 0) &&
         (at.table == nullptr || (at.bits == 4 && integer_table(at.table).exists));
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

// ------------------------------------------------------------------------------- products of floats

// Numbers of fp8, but for NaN.
INLINE Vec finite_fp8(const uint8_t* p) {
  typedef int8_t Lanes __attribute__((vector_size(kLanes)));
  typedef int8_t LanesAt __attribute__((vector_size(kLanes), aligned(1), may_alias));
#if LANES == 16
  const IVec code = (IVec)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p));
#else
  const IVec code = __builtin_convertvector((Lanes) * (const LanesAt*)p, IVec);
#endif
  // sign and magnitude are in their places, and the exponent is 120 too small
  return (Vec)((UVec)(code << 20) & 0x87f00000u) * splat(0x1p120f);
}

INLINE Vec fp8_levels(const uint8_t* p) {
  const Vec value = finite_fp8(p);
  const UVec is_nan = (UVec)(((UVec)value & 0x7fffffffu) == 0x43f00000u);  // 480 is no number
  return (Vec)((UVec)value | (is_nan & 0x7fc00000u));
}

INLINE Vec byte_levels(const uint8_t* p) {
  typedef uint8_t Lanes __attribute__((vector_size(kLanes)));
  typedef uint8_t LanesAt __attribute__((vector_size(kLanes), aligned(1), may_alias));
#if LANES == 16
  const IVec code = (IVec)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
#else
  const IVec code = __builtin_convertvector((Lanes) * (const LanesAt*)p, IVec);
#endif
  return __builtin_convertvector(code, Vec);
}

// The levels of columns first .. first + n - 1, n up to 32; first is a multiple of 32.
INLINE void levels_of_block(float* to, const Packed& at, const uint8_t* row, int64_t first,
                            int64_t n) {
  if (at.bits == 4) {
    const uint8_t* code = row + first / 2;
#if LANES == 16
    const __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)code));
    const IVec low = (IVec)both & 15, high = (IVec)both >> 4;
    const Vec levels = at.table ? load(at.table) : Vec{};
    store(to, at.table ? permute(levels, low) : __builtin_convertvector(low, Vec));
    store(to + kHalf, at.table ? permute(levels, high) : __builtin_convertvector(high, Vec));
#else
    for (int i = 0; i < kHalf; ++i) {
      const int low = code[i] & 15, high = code[i] >> 4;
      to[i] = at.table ? at.table[low] : (float)low;
      to[i + kHalf] = at.table ? at.table[high] : (float)high;
    }
#endif
    return;
  }
  uint8_t code[kBlock] = {};
  const uint8_t* from = row + first;
  if (n < kBlock) std::memcpy(code, from, n), from = code;
  for (int i = 0; i < kBlock; i += kLanes) {
    if (at.is_fp8) store(to + i, fp8_levels(from + i));
    else if (!at.table) store(to + i, byte_levels(from + i));
    else
      for (int lane = 0; lane < kLanes; ++lane) to[i + lane] = at.table[from[i + lane]];
  }
}

// Dequantizes one row of weights; out has room for whole blocks, which zeros fill.
template <typename T>
void dequantize_row(T* out, const Packed& at, const uint8_t* row, const float* scale,
                    const float* offset) {
  for (int64_t first = 0; first < at.depth; first += kBlock) {
    const int64_t n = std::min<int64_t>(kBlock, at.depth - first);
    float value[kBlock];
    levels_of_block(value, at, row, first, n);
    if (at.num_groups == 1 || at.group % kHalf == 0) {
      for (int64_t half = 0; half < n; half += kHalf) {
        const int64_t g = at.num_groups == 1 ? 0 : (first + half) / at.group;
        const Vec by = splat(scale[g]), plus = splat(offset ? offset[g] : 0.0f);
        for (int64_t i = half; i < half + kHalf; i += kLanes)
          store(value + i, offset ? load(value + i) * by + plus : load(value + i) * by);
      }
    } else {
      for (int64_t i = 0; i < n; ++i) {
        const int64_t g = (first + i) / at.group;
        value[i] = value[i] * scale[g] + (offset ? offset[g] : 0.0f);
      }
    }
    for (int64_t i = n; i < kBlock; ++i) value[i] = 0.0f;
    for (int i = 0; i < kBlock; i += kLanes) store(out + first + i, load(value + i));
  }
}

// The scales, and offsets or null, of a row of weights.
struct RowScales {
  const float *scale, *offset = nullptr;

  // `to` has room for 2 * (G + kLanes) numbers
  RowScales(float* to, const Packed& at, int64_t expert, int64_t o) {
    to_floats(to, scale_row(at, expert, o), at.scale_dtype, at.num_groups);
    scale = to;
    if (!at.offset) return;
    to += at.num_groups + kLanes;
    to_floats(to, offset_row(at, expert, o), at.offset_dtype, at.num_groups);
    offset = to;
  }
};

// With few rows of x, weights are multiplied as they are read, without a copy in fp32. A unit is 32
// columns.
struct Fp8Unit {
  static constexpr int kUnitBytes = kBlock;
  typedef uint8_t Bits __attribute__((vector_size(kBlock)));
  typedef uint8_t BitsAt __attribute__((vector_size(kBlock), aligned(1), may_alias));
  Bits has_nan{};

  INLINE void load_unit(Vec* to, const uint8_t* from, const Packed&) {
    has_nan |= (Bits)(((Bits) * (const BitsAt*)from & 127) == 127);
    for (int i = 0; i < kBlock / kLanes; ++i) to[i] = finite_fp8(from + i * kLanes);
  }

  INLINE float result(float sum) const {
    uint64_t any = 0, part[kBlock / 8];
    std::memcpy(part, &has_nan, sizeof part);
    for (uint64_t one : part) any |= one;
    return any ? NAN : sum;
  }
};

struct CodeUnit {
  static constexpr int kUnitBytes = kBlock / 2;

  INLINE void load_unit(Vec* to, const uint8_t* from, const Packed& at) {
#if LANES == 16
    const __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from));
    const Vec levels = load(at.table);
    to[0] = permute(levels, (IVec)both & 15), to[1] = permute(levels, (IVec)both >> 4);
#else
    float level[kBlock];
    for (int i = 0; i < kHalf; ++i)
      level[i] = at.table[from[i] & 15], level[i + kHalf] = at.table[from[i] >> 4];
    for (int i = 0; i < kBlock / kLanes; ++i) to[i] = load(level + i * kLanes);
#endif
  }

  INLINE float result(float sum) const { return sum; }
};

// sums[t * OB + o]; x is [t, x_stride] in fp32, with zeros behind the depth
template <typename Unit, int TB, int OB>
void unit_tile(float* sums, const Packed& at, const float* x, int64_t x_stride,
               const uint8_t* const* code, const float* const* scale) {
  constexpr int kVecs = kBlock / kLanes;
  Vec total[OB][TB] = {};
  Unit unit[OB];
  const int64_t group = at.num_groups == 1 ? at.depth : at.group;
  for (int64_t g = 0; g < at.num_groups; ++g) {
    const int64_t first = g * group, end = std::min(first + group, at.depth);
    Vec acc[OB][TB] = {};
    const auto multiply = [&](const uint8_t* const* from, int64_t d) __attribute__((always_inline)) {
      Vec w[OB][kVecs];
      for (int o = 0; o < OB; ++o) unit[o].load_unit(w[o], from[o], at);
      for (int t = 0; t < TB; ++t)
        for (int i = 0; i < kVecs; ++i) {
          const Vec x_vec = load(x + t * x_stride + d + i * kLanes);
          for (int o = 0; o < OB; ++o) acc[o][t] = multiply_add(x_vec, w[o][i], acc[o][t]);
        }
    };
    const uint8_t* from[OB];
    int64_t d = first;
    for (; d + kBlock <= end; d += kBlock) {
      for (int o = 0; o < OB; ++o) {
        from[o] = code[o] + d / kBlock * Unit::kUnitBytes;
        __builtin_prefetch(from[o] + kPrefetchBytes, 0, 2);
      }
      multiply(from, d);
    }
    if (d < end) {
      uint8_t rest[OB][kBlock] = {};
      for (int o = 0; o < OB; ++o) {
        const int64_t n = Unit::kUnitBytes == kBlock ? end - d : Unit::kUnitBytes;
        std::memcpy(rest[o], code[o] + d / kBlock * Unit::kUnitBytes, n);
        from[o] = rest[o];
      }
      multiply(from, d);
    }
    for (int o = 0; o < OB; ++o)
      for (int t = 0; t < TB; ++t)
        total[o][t] = multiply_add(acc[o][t], splat(scale[o][g]), total[o][t]);
  }
  for (int t = 0; t < TB; ++t)
    for (int o = 0; o < OB; ++o) sums[t * OB + o] = unit[o].result(sum(total[o][t]));
}

// Copies the rows of all pairs to `to`, in fp32 and in the order of places; zeros fill a row.
template <typename Io>
void copy_rows(float* to, int64_t stride, const Packed& at, const Groups& groups,
               int64_t first_row) {
  const int64_t num_pairs = (int64_t)groups.pair.size(), D = at.depth;
  parallel_for(num_pairs, num_pairs * D < kMinParallel ? 1 : at.num_threads, [&](int64_t place) {
    const int64_t row = first_row + groups.pair[place] / at.x_repeats;
    const Io* from = (const Io*)at.x + row * at.x_stride;
    float* row_to = to + place * stride;
    for (int64_t d = 0; d < D; d += kLanes) store(row_to + d, load_first(from + d, D - d));
    for (int64_t d = (D + kLanes - 1) / kLanes * kLanes; d < stride; ++d) row_to[d] = 0.0f;
  });
}

template <typename Unit, typename Io>
void multiply_units(const Packed& at, const Part& part, const float* x, int64_t stride,
                    const int32_t* pair, int64_t first_pair) {
  constexpr int kOutputs = kTileOutputs;
  const int64_t expert = part.group->expert, num = part.group->num;
  const int64_t num_passes = (num + kTileTokens - 1) / kTileTokens;
  const int64_t size = at.num_groups + kLanes;
  float* scales = scratch((size_t)(kOutputs * size));
  for (int64_t o = part.first; o < part.end; o += kOutputs) {
    const int64_t num_outputs = std::min<int64_t>(kOutputs, part.end - o);
    const uint8_t* code[kOutputs];
    const float* scale[kOutputs];
    float sums[kTileTokens * kOutputs];
    for (int64_t i = 0; i < kOutputs; ++i) {
      const int64_t row = o + std::min(i, num_outputs - 1);  // a short tile repeats its last row
      code[i] = (const uint8_t*)code_row(at, expert, row);
      scale[i] = scales + i * size;
      to_floats(scales + i * size, scale_row(at, expert, row), at.scale_dtype, at.num_groups);
    }
    for (int64_t pass = 0; pass < num_passes; ++pass) {
      const int64_t token = num * pass / num_passes, end = num * (pass + 1) / num_passes;
      const auto tile = end - token == 1   ? unit_tile<Unit, 1, kOutputs>
                        : end - token == 2 ? unit_tile<Unit, 2, kOutputs>
                        : end - token == 3 ? unit_tile<Unit, 3, kOutputs>
                                           : unit_tile<Unit, 4, kOutputs>;
      tile(sums, at, x + token * stride, stride, code, scale);
      for (int64_t t = token; t < end; ++t)
        for (int64_t i = 0; i < num_outputs; ++i)
          put_result<Io>(at, first_pair + pair[t], o + i, sums[(t - token) * kOutputs + i]);
    }
  }
}

// Dequantizes the rows of a part, and multiplies the pairs of its group by them.
template <typename Io>
void multiply_dequantized(const Packed& at, const Part& part, const float* x, int64_t stride,
                          const int32_t* pair, int64_t first_pair) {
  const int64_t num_outputs = part.end - part.first, expert = part.group->expert;
  float* weight = scratch((size_t)(num_outputs * stride + 2 * (at.num_groups + kLanes)));
  for (int64_t o = part.first; o < part.end; ++o) {
    const RowScales of_row(weight + num_outputs * stride, at, expert, o);
    dequantize_row(weight + (o - part.first) * stride, at,
                   (const uint8_t*)code_row(at, expert, o), of_row.scale, of_row.offset);
  }
  const int64_t blocks = (at.depth + kBlock - 1) / kBlock * kBlock;
  const Product<Fp32Step> rows{x, stride, weight, stride, blocks};
  const auto finish = [&](const float* sums, int64_t token, int num_tokens, int64_t o, int n) {
    for (int t = 0; t < num_tokens; ++t)
      for (int i = 0; i < n; ++i)
        put_result<Io>(at, first_pair + pair[token + t], part.first + o + i, sums[t * n + i]);
  };
  for_passes<Fp32Step>(part.group->num, [&](int64_t token, int64_t num_tokens) {
    product(rows, token, num_tokens, 0, num_outputs, finish);
  });
}

// The most rows of x for which codes are decoded again for each tile of rows.
constexpr int64_t kUnitTokens = 8;

template <typename Io>
void float_product(const Packed& at) {
  const int64_t stride = row_stride<Fp32Step>((at.depth + kBlock - 1) / kBlock * kBlock);
  const bool has_units = (at.num_groups == 1 || at.group % kBlock == 0) && !at.offset &&
                         (at.is_fp8 || (at.bits == 4 && at.table));
  const int64_t chunk = outputs_at_once(at, stride * 4, 12);
  for_blocks(at.num_pairs / at.x_repeats, at.x_repeats, stride, [&](int64_t first, int64_t num) {
    const int64_t first_pair = first * at.x_repeats, num_pairs = num * at.x_repeats;
    const std::vector<int32_t> one(at.expert ? 0 : num_pairs);
    const Groups groups(at.expert ? at.expert + first_pair : one.data(), num_pairs, at.num_experts);
    float* x = scratch<kShared>((size_t)(num_pairs * stride));
    copy_rows<Io>(x, stride, at, groups, first);
    for_parts(groups, at.num_outputs, chunk, at.num_threads, [&](const Part& part) {
      const auto multiply = !has_units || (part.group->num > kUnitTokens && !at.ordered)
                                ? multiply_dequantized<Io>
                            : at.is_fp8                                 ? multiply_units<Fp8Unit, Io>
                                                                        : multiply_units<CodeUnit, Io>;
      multiply(at, part, x + part.group->first * stride, stride,
               groups.pair.data() + part.group->first, first_pair);
    });
  });
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

// Dequantizes all outputs of one expert to bf16.
extern "C" int64_t nanovllm_widen_packed(const Packed* args) {
  const Packed& at = *args;
  const int64_t blocks = (at.depth + kBlock - 1) / kBlock * kBlock;
  parallel_for(at.num_outputs, at.num_threads, [&](int64_t o) {
    float* scales = scratch((size_t)(2 * (at.num_groups + kLanes) + blocks));
    const RowScales of_row(scales, at, 0, o);
    Bf16* row = (Bf16*)(scales + 2 * (at.num_groups + kLanes));
    dequantize_row(row, at, (const uint8_t*)code_row(at, 0, o), of_row.scale, of_row.offset);
    std::memcpy((Bf16*)at.out + o * at.x_stride, row, at.depth * sizeof(Bf16));
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
    const int64_t row = at.expert[pair];
    float* scales = scratch((size_t)(2 * (at.num_groups + kLanes) + blocks));
    float* value = scales + 2 * (at.num_groups + kLanes);
    const RowScales of_row(scales, at, 0, row);
    dequantize_row(value, at, (const uint8_t*)code_row(at, 0, row), of_row.scale, of_row.offset);
    put_row(at, pair, value);
  });
  return 1;
}
