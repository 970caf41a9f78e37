// Products of blocks of codes as GGUF files store them, compiled at first use by ggml.py.
// kernels.cpp describes how arguments are passed, and reference/ggml.py has the meaning and the
// layout of each type of block. Rows of x are quantized to int8: see int8.h.
//
// T tokens | K experts per token | P = T * K pairs | E experts | O outputs | D depth

#include "vectors.h"
#include "groups.h"
#include "packed.h"
#include "int8.h"
#include "matrix_tiles.h"
#include "int8_tiles.h"
#include "int8_product.h"

namespace {

// 16 columns, on any machine
typedef uint8_t Sixteen __attribute__((vector_size(16)));
typedef uint8_t SixteenAt __attribute__((vector_size(16), aligned(1), may_alias));
INLINE Sixteen load16(const uint8_t* p) { return *(const SixteenAt*)p; }

// Bytes of a step from its blocks, 16 columns of each.
INLINE Bytes joined(const Sixteen* of_block) {
#if LANES == 16 && defined(__AVX512BW__)
  const __m256i first = _mm256_set_m128i((__m128i)of_block[1], (__m128i)of_block[0]),
                second = _mm256_set_m128i((__m128i)of_block[3], (__m128i)of_block[2]);
  return _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
#elif LANES == 8 && defined(__AVX2__)
  return _mm256_set_m128i((__m128i)of_block[1], (__m128i)of_block[0]);
#elif LANES == 4 && defined(__aarch64__)
  return (Bytes)of_block[0];
#else
  Bytes out;
  std::memcpy(&out, of_block, kBytes);
  return out;
#endif
}

INLINE float half_at(const uint8_t* p) {
  Fp16 number;
  std::memcpy(&number, p, 2);
#if defined(__AVX2__) && defined(__F16C__)
  return _cvtsh_ss(number.bits);
#else
  return to_float(number);
#endif
}

// to[i] = (byte[i] + plus) * by
INLINE void scaled_bytes(float* to, const int8_t* byte, int n, int plus, float by) {
#if LANES == 16 && defined(__AVX512BW__) && defined(__AVX512VL__)
  const __mmask16 some = (__mmask16)((1u << n) - 1);
  const IVec wide = (IVec)_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(some, byte)) + plus;
  _mm512_mask_storeu_ps(to, some, (__m512)(__builtin_convertvector(wide, Vec) * by));
  return;
#endif
  for (int i = 0; i < n; i += 4)
    for (int j = i; j < i + 4; ++j) to[j] = (float)(byte[j] + plus) * by;
}

INLINE uint32_t word_at(const uint8_t* p) {
  uint32_t word;
  std::memcpy(&word, p, 4);
  return word;
}

// The types. `sixteen` has the codes of columns 16 c .. 16 c + 15 of a block, and `read_scales`
// writes the scales, and the offsets if it has some, of its groups. The level is code + kBias.

struct Q6K {
  static constexpr int kColumns = 256, kBlockBytes = 210, kGroup = 16, kBias = -32;
  static constexpr bool kHasOffsets = false;

  static INLINE Sixteen sixteen(const uint8_t* block, int c) {
    const int part = c / 8, in_part = c % 8;
    const Sixteen low = load16(block + part * 64 + in_part % 4 * 16) >> (in_part / 4 * 4);
    const Sixteen high = load16(block + 128 + part * 32 + c % 2 * 16) >> (in_part / 2 * 2);
    return (low & 15) | ((high & 3) << 4);
  }

  static INLINE void read_scales(float* scale, float*, const uint8_t* block) {
    scaled_bytes(scale, (const int8_t*)block + 192, 16, 0, half_at(block + 208));
  }
};

struct Q5K {
  static constexpr int kColumns = 256, kBlockBytes = 176, kGroup = 32, kBias = 0;
  static constexpr bool kHasOffsets = true;

  static INLINE Sixteen sixteen(const uint8_t* block, int c) {
    const Sixteen low = load16(block + 48 + c / 4 * 32 + c % 2 * 16) >> (c / 2 % 2 * 4);
    const Sixteen high = load16(block + 16 + c % 2 * 16) >> (c / 2);
    return (low & 15) | ((high & 1) << 4);
  }

  static INLINE void read_scales(float* scale, float* offset, const uint8_t* block) {
    const uint32_t first = word_at(block + 4), second = word_at(block + 8),
                   third = word_at(block + 12);
    const uint32_t words[4] = {
        first & 0x3f3f3f3f, (third & 0x0f0f0f0f) | ((first >> 2) & 0x30303030),
        second & 0x3f3f3f3f, ((third >> 4) & 0x0f0f0f0f) | ((second >> 2) & 0x30303030)};
    scaled_bytes(scale, (const int8_t*)words, 8, 0, half_at(block));
    scaled_bytes(offset, (const int8_t*)(words + 2), 8, 0, -half_at(block + 2));
  }
};

struct Q2K {
  static constexpr int kColumns = 256, kBlockBytes = 84, kGroup = 16, kBias = 0;
  static constexpr bool kHasOffsets = true;

  static INLINE Sixteen sixteen(const uint8_t* block, int c) {
    return (load16(block + 16 + c / 8 * 32 + c % 2 * 16) >> (c % 8 / 2 * 2)) & 3;
  }

  static INLINE void read_scales(float* scale, float* offset, const uint8_t* block) {
    const Sixteen both = load16(block), low = both & 15, high = both >> 4;
    scaled_bytes(scale, (const int8_t*)&low, 16, 0, half_at(block + 80));
    scaled_bytes(offset, (const int8_t*)&high, 16, 0, -half_at(block + 82));
  }
};

struct Q3K {
  static constexpr int kColumns = 256, kBlockBytes = 110, kGroup = 16, kBias = -4;
  static constexpr bool kHasOffsets = false;

  static INLINE Sixteen sixteen(const uint8_t* block, int c) {
    const Sixteen low = load16(block + 32 + c / 8 * 32 + c % 2 * 16) >> (c % 8 / 2 * 2);
    const Sixteen high = load16(block + c % 2 * 16) >> (c / 2);
    return (low & 3) | ((high & 1) << 2);
  }

  static INLINE void read_scales(float* scale, float*, const uint8_t* block) {
    const uint32_t first = word_at(block + 96), second = word_at(block + 100),
                   high = word_at(block + 104);
    const auto two = [&](int shift) { return ((high >> shift) & 0x03030303) << 4; };
    const uint32_t words[4] = {
        (first & 0x0f0f0f0f) | two(0), (second & 0x0f0f0f0f) | two(2),
        ((first >> 4) & 0x0f0f0f0f) | two(4), ((second >> 4) & 0x0f0f0f0f) | two(6)};
    scaled_bytes(scale, (const int8_t*)words, 16, -32, half_at(block + 108));
  }
};

// 16 where a bit is set
INLINE Sixteen fifth_bits(const uint8_t* two_bytes) {
  const Sixteen bit = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
  Sixteen spread;
#if defined(__AVX2__)
  uint16_t both;
  std::memcpy(&both, two_bytes, 2);
  const __m128i of_byte = _mm_set_epi8(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
  spread = (Sixteen)_mm_shuffle_epi8(_mm_set1_epi16((int16_t)both), of_byte);
#elif defined(__aarch64__)
  spread = (Sixteen)vcombine_u8(vdup_n_u8(two_bytes[0]), vdup_n_u8(two_bytes[1]));
#else
  for (int i = 0; i < 16; ++i) spread[i] = two_bytes[i / 8];
#endif
  return (Sixteen)((spread & bit) != 0) & 16;
}

template <bool kHasMinimum>
struct Q5 {
  static constexpr int kColumns = 32, kBlockBytes = kHasMinimum ? 24 : 22, kGroup = 32;
  static constexpr int kBias = kHasMinimum ? 0 : -16;
  static constexpr bool kHasOffsets = kHasMinimum;

  static INLINE Sixteen sixteen(const uint8_t* block, int c) {
    const uint8_t* high = block + (kHasMinimum ? 4 : 2);
    return ((load16(high + 4) >> (4 * c)) & 15) | fifth_bits(high + 2 * c);
  }

  static INLINE void read_scales(float* scale, float* offset, const uint8_t* block) {
    *scale = half_at(block);
    if (kHasMinimum) *offset = half_at(block + 2);
  }
};

// The codes of a type in the steps of a tile.
template <typename Type>
struct BlockCodes {
  static constexpr bool kHasBias = Type::kBias != 0, kAreSmall = true;
  static constexpr int kStepBytes = Type::kBlockBytes * kStepColumns / Type::kColumns;

  struct Step {
    int64_t first_byte;  // of the first block
    int first;           // the step's first 16 columns in that block
    int num;             // blocks of 32 columns that the row has
    INLINE Step(int64_t step, const Rows& at)
        : first_byte(step * kStepColumns / Type::kColumns * Type::kBlockBytes),
          first((int)(step * kStepColumns % Type::kColumns) / kHalf),
          num((int)std::min<int64_t>(kStepBlocks,
                                     (at.code_bytes - first_byte) / Type::kBlockBytes)) {}
  };

  INLINE explicit BlockCodes(const Rows&) {}

  INLINE void load(Bytes& low, Bytes& high, const char* row, const Step& at) const {
    const uint8_t* block = (const uint8_t*)row + at.first_byte;
#if LANES == 16 && defined(__AVX512BW__)
    if constexpr (std::is_same_v<Type, Q6K>) return load_q6_k(low, high, block, at.first / 8);
    if constexpr (std::is_same_v<Type, Q5K>) return load_q5_k(low, high, block, at.first / 8);
#endif
    Sixteen first[kStepBlocks] = {}, second[kStepBlocks] = {};
    for (int i = 0; i < kStepBlocks; ++i) {
      if (Type::kColumns > kBlock) {
        first[i] = Type::sixteen(block, at.first + 2 * i);
        second[i] = Type::sixteen(block, at.first + 2 * i + 1);
      } else if (i < at.num) {
        first[i] = Type::sixteen(block + i * Type::kBlockBytes, 0);
        second[i] = Type::sixteen(block + i * Type::kBlockBytes, 1);
      }
    }
    low = joined(first), high = joined(second);
  }

#if LANES == 16 && defined(__AVX512BW__)
  // 128 columns of a block at once
  static INLINE void load_q6_k(Bytes& low, Bytes& high, const uint8_t* block, int part) {
    const __m512i both = _mm512_loadu_si512(block + 64 * part);
    const __m512i two = _mm512_broadcast_i64x4(
        _mm256_loadu_si256((const __m256i*)(block + 128 + 32 * part)));
    const __m512i left = _mm512_set_epi64(0x200000002, 0x200000002, 0x200000002, 0x200000002,
                                          0x400000004, 0x400000004, 0x400000004, 0x400000004);
    const __m512i right = _mm512_set_epi64(0x200000002, 0x200000002, 0x200000002, 0x200000002, 0, 0,
                                           0, 0);
    const __m512i mask = _mm512_set1_epi8(0x30);
    low = _mm512_or_si512(low_codes(both), _mm512_and_si512(_mm512_sllv_epi32(two, left), mask));
    high = _mm512_or_si512(high_codes(both), _mm512_and_si512(_mm512_srlv_epi32(two, right), mask));
    halves(low, high);
  }

  static INLINE void load_q5_k(Bytes& low, Bytes& high, const uint8_t* block, int part) {
    const __m512i both = _mm512_loadu_si512(block + 48 + 64 * part);
    const __m512i first = low_codes(both), second = high_codes(both);
    const __m512i of_low = _mm512_set_epi64(13, 12, 5, 4, 9, 8, 1, 0),
                  of_high = _mm512_set_epi64(15, 14, 7, 6, 11, 10, 3, 2);
    const __m512i shift = _mm512_add_epi32(
        _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0),
        _mm512_set1_epi32(4 * part));
    const __m512i one = _mm512_set1_epi8(1);
    const auto fifth = [&](const uint8_t* from) {
      const __m512i bits = _mm512_srlv_epi32(repeat16(from), shift);
      return _mm512_slli_epi16(_mm512_and_si512(bits, one), 4);
    };
    low = _mm512_or_si512(_mm512_permutex2var_epi64(first, of_low, second), fifth(block + 16));
    high = _mm512_or_si512(_mm512_permutex2var_epi64(first, of_high, second), fifth(block + 32));
  }
#endif
};

template <typename Io, typename Type>
void multiply_blocks(const Packed& at) {
  const int64_t num_blocks = at.depth / Type::kColumns, num_groups = at.depth / Type::kGroup;
  constexpr int kPerBlock = Type::kColumns / Type::kGroup;
  IntegerProduct by(at, Type::kGroup, num_groups, Type::kGroup,
                    Type::kHasOffsets ? num_groups : 0, at.code_stride);
  by.read_as<BlockCodes<Type>>();
  by.x.bias = Type::kBias;
  by.rows.code_bytes = num_blocks * Type::kBlockBytes;
  by.measure();
  const int64_t size = by.scale_floats();
  integer_product<Io>(at, by, 2 * size, [&](int64_t expert, int64_t o, float* buffer) {
    const char* row = code_row(at, expert, o);
    for (int64_t block = 0; block < num_blocks; ++block)
      Type::read_scales(buffer + block * kPerBlock, buffer + size + block * kPerBlock,
                        (const uint8_t*)row + block * Type::kBlockBytes);
    return WeightRow{row, buffer, buffer + size};
  });
}

template <typename Io>
bool multiply_type(const Packed& at) {
  switch (at.bits) {
    case 6: return multiply_blocks<Io, Q5<false>>(at), true;
    case 7: return multiply_blocks<Io, Q5<true>>(at), true;
    case 10: return multiply_blocks<Io, Q2K>(at), true;
    case 11: return multiply_blocks<Io, Q3K>(at), true;
    case 13: return multiply_blocks<Io, Q5K>(at), true;
    case 14: return multiply_blocks<Io, Q6K>(at), true;
    default: return false;
  }
}

}  // namespace

// `bits` is the type's number in GGUF files. Returns 0, and does nothing, if an expert's id is not
// below num_experts, or for another type.
extern "C" int64_t nanovllm_ggml_linear(const Packed* args) {
  const Packed& at = *args;
  if (at.expert && !are_valid(at.expert, at.num_pairs, 0, at.num_experts)) return 0;
  return at.dtype == kFp32 ? multiply_type<float>(at) : multiply_type<Bf16>(at);
}
