// Products of blocks of codes as GGUF files store them, compiled at first use by ggml.py.
// kernels.cpp describes how arguments are passed, and reference/ggml.py has the meaning and the
// layout of each type of block. Rows of x are quantized to int8: see int8.h.
//
// T tokens | K experts per token | P = T * K pairs | E experts | O outputs | D depth

#include "vectors.h"
#include "groups.h"
#include "packed.h"
#include "interleaved_rows.h"
#include "int8.h"
#include "matrix_tiles.h"
#include "int8_tiles.h"
#include "int8_product.h"
#include "ggml_types.h"

namespace {

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

// The codes of a type in the steps of a tile.
template <typename Type>
struct BlockCodes {
  static constexpr bool kHasBias = Type::kBias != 0, kAreSmall = true;
  static constexpr int kStepBytes = Type::kBlockBytes * kStepColumns / Type::kColumns;

  struct Step {
    int64_t first_byte;  // of the first block
    int first;           // the step's first 16 columns in that block
    int part, odd;       // with AVX2, of a block of 256 columns: its step is 2 * part + odd
    int num;             // blocks of 32 columns that the row has
    INLINE Step(int64_t from, int j, const Rows& at)
        : first_byte((from + j) * kStepColumns / Type::kColumns * Type::kBlockBytes),
          first((int)((from + j) * kStepColumns % Type::kColumns) / kHalf),
          part(Type::kGroup == kHalf ? (int)(from / 2 % 2) : j / 2),
          odd(j % 2),
          num((int)std::min<int64_t>(kStepBlocks,
                                     (at.code_bytes - first_byte) / Type::kBlockBytes)) {}
  };

  INLINE explicit BlockCodes(const Rows&) {}

  INLINE void load(Bytes& low, Bytes& high, const char* row, const Step& at) const {
    const uint8_t* block = (const uint8_t*)row + at.first_byte;
#if LANES == 8 && defined(__AVX2__)
    if constexpr (Type::kColumns > kBlock) return Type::load(low, high, block, at.part, at.odd);
#endif
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

// The real values of a row of blocks.
template <typename Type>
void read_row(float* to, const uint8_t* block, int64_t num_blocks) {
  constexpr int kGroups = Type::kColumns / Type::kGroup;
  for (; num_blocks > 0; --num_blocks, block += Type::kBlockBytes) {
    float scale[kGroups], offset[kGroups] = {};
    Type::read_scales(scale, offset, block);
    for (int c = 0; c < Type::kColumns / kHalf; ++c, to += kHalf) {
      const Sixteen code = Type::sixteen(block, c);
      const int group = c * kHalf / Type::kGroup;
      for (int i = 0; i < kHalf; ++i)
        to[i] = (float)(code[i] + Type::kBias) * scale[group] + offset[group];
    }
  }
}

template <typename Type>
void look_up(const Packed& at) {
  parallel_for(at.num_pairs, at.num_pairs * at.depth < kMinParallel ? 1 : at.num_threads,
               [&](int64_t pair) {
    float* value = scratch((size_t)(at.depth + kLanes));
    read_row<Type>(value, (const uint8_t*)code_row(at, 0, at.expert[pair]),
                   at.depth / Type::kColumns);
    put_row(at, pair, value);
  });
}

// Calls work(type) with the type of a number in GGUF files. False for another number.
template <typename Work>
bool with_type(int64_t number, const Work& work) {
  switch (number) {
    case 6: return work(Q5<false>{}), true;
    case 7: return work(Q5<true>{}), true;
    case 10: return work(Q2K{}), true;
    case 11: return work(Q3K{}), true;
    case 13: return work(Q5K{}), true;
    case 14: return work(Q6K{}), true;
    default: return false;
  }
}

}  // namespace

// Reads the rows that `expert` names, [P, depth] in `dtype`. `bits` is the type's number in GGUF
// files. Returns 0, and does nothing, if a row is not below num_outputs, or for another type.
extern "C" int64_t nanovllm_ggml_lookup(const Packed* args) {
  const Packed& at = *args;
  if (!are_valid(at.expert, at.num_pairs, 0, at.num_outputs)) return 0;
  return with_type(at.bits, [&](auto type) { look_up<decltype(type)>(at); });
}

// `bits` is the type's number in GGUF files. Returns 0, and does nothing, if an expert's id is not
// below num_experts, or for another type.
extern "C" int64_t nanovllm_ggml_linear(const Packed* args) {
  const Packed& at = *args;
  if (at.expert && !are_valid(at.expert, at.num_pairs, 0, at.num_experts)) return 0;
  return with_type(at.bits, [&](auto type) {
    if (at.dtype == kFp32) multiply_blocks<float, decltype(type)>(at);
    else multiply_blocks<Bf16, decltype(type)>(at);
  });
}
