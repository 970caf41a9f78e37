// Products of packed weights and fp8 in fp32, and their dequantized rows. Needs tiles.h, groups.h,
// packed.h, interleaved_rows.h and int8.h.

namespace {

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

// The codes, scales, and offsets or null, of a row of weights.
struct OneRow {
  const uint8_t* code;
  const float *scale, *offset;

  // of the numbers that `to` has room for
  static int64_t floats(const Packed& at) {
    return 2 * (at.num_groups + kLanes) + (at.interleaved ? at.code_stride / 4 : 0);
  }

  // of interleaved rows `own` are the row's codes, if these have been copied
  OneRow(float* to, const Packed& at, int64_t expert, int64_t o, const char* own = nullptr)
      : scale(to) {
    float* offsets = to + at.num_groups + kLanes;
    offset = at.offset ? offsets : nullptr;
    if (at.interleaved) {
      const int64_t row = o % kInterleaved;
      const Panel panel(at, expert, o - row);
      char* codes = (char*)(offsets + at.num_groups + kLanes);
      if (own == nullptr) copy_codes(codes, panel, row, at.code_stride);
      copy_groups(to, panel.scale, at.scale_dtype, row, at.num_groups);
      if (offset) copy_groups(offsets, panel.offset, at.offset_dtype, row, at.num_groups);
      code = (const uint8_t*)(own ? own : codes);
      return;
    }
    code = (const uint8_t*)code_row(at, expert, o);
    to_floats(to, scale_row(at, expert, o), at.scale_dtype, at.num_groups);
    if (offset) to_floats(offsets, offset_row(at, expert, o), at.offset_dtype, at.num_groups);
  }
};

// Dequantizes one row of weights; out has room for whole blocks, which zeros fill.
template <typename T>
void dequantize_row(T* out, const Packed& at, const OneRow& row) {
  const float *scale = row.scale, *offset = row.offset;
  for (int64_t first = 0; first < at.depth; first += kBlock) {
    const int64_t n = std::min<int64_t>(kBlock, at.depth - first);
    float value[kBlock];
    levels_of_block(value, at, row.code, first, n);
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
  float* weight = scratch((size_t)(num_outputs * stride + OneRow::floats(at)));
  for (int64_t o = part.first; o < part.end; ++o)
    dequantize_row(weight + (o - part.first) * stride, at,
                   OneRow(weight + num_outputs * stride, at, expert, o));
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
                         !at.interleaved && (at.is_fp8 || (at.bits == 4 && at.table));
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
