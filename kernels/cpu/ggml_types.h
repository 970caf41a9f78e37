// The types of blocks of codes in GGUF files: how their codes and scales are read. Needs vectors.h
// and int8.h; reference/ggml.py has the layout of each type.

namespace {

// 16 columns, on any machine
typedef uint8_t Sixteen __attribute__((vector_size(16)));
typedef uint8_t SixteenAt __attribute__((vector_size(16), aligned(1), may_alias));
INLINE Sixteen load16(const uint8_t* p) { return *(const SixteenAt*)p; }

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
#elif LANES == 8 && defined(__AVX2__)
  for (int i = 0; i < n; i += kLanes) {
    const IVec wide = (IVec)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(byte + i)));
    store(to + i, __builtin_convertvector(wide + plus, Vec) * by);
  }
#else
  for (int i = 0; i < n; ++i) to[i] = (float)(byte[i] + plus) * by;
#endif
}

// Four words, as 16 bytes of 6 bits or less.
typedef uint32_t Words __attribute__((vector_size(16)));

INLINE uint32_t word_at(const uint8_t* p) {
  uint32_t word;
  std::memcpy(&word, p, 4);
  return word;
}

#if LANES == 8 && defined(__AVX2__)
// The bits of a mask in 16 bytes moved to the right by one number of bits, and by another one, each
// as a half; negative numbers move to the left.
INLINE Bytes two_shifts(const uint8_t* from, int first, int second, int mask) {
  const Bytes both = repeat16(from);
  const int a = std::abs(first), b = std::abs(second);
  const __m256i by = _mm256_setr_epi32(a, a, a, a, b, b, b, b);
  const bool is_right = first > 0 || second > 0;
  const Bytes moved = is_right ? _mm256_srlv_epi32(both, by) : _mm256_sllv_epi32(both, by);
  return _mm256_and_si256(moved, _mm256_set1_epi8((char)mask));
}

INLINE Bytes either(Bytes a, Bytes b) { return _mm256_or_si256(a, b); }
#endif

// The types. `sixteen` has the codes of columns 16 c .. 16 c + 15 of a block, and `read_scales`
// writes the scales, and the offsets if it has some, of its groups. The level is code + kBias. With
// AVX2, `load` has the codes of step 2 * part + odd of a block of 256 columns.

struct Q6K {
  static constexpr int kColumns = 256, kBlockBytes = 210, kGroup = 16, kBias = -32;
  static constexpr bool kHasOffsets = false;

  static INLINE Sixteen sixteen(const uint8_t* block, int c) {
    const int part = c / 8, in_part = c % 8;
    const Sixteen low = load16(block + part * 64 + in_part % 4 * 16) >> (in_part / 4 * 4);
    const Sixteen high = load16(block + 128 + part * 32 + c % 2 * 16) >> (in_part / 2 * 2);
    return (low & 15) | ((high & 3) << 4);
  }

#if LANES == 8 && defined(__AVX2__)
  static INLINE void load(Bytes& low, Bytes& high, const uint8_t* block, int part, int odd) {
    const uint8_t *four = block + part * 64, *two = block + 128 + part * 32;
    const int right = odd ? 0 : -4;
    low = _mm256_set_m128i((__m128i)load16(four + 32), (__m128i)load16(four));
    high = _mm256_set_m128i((__m128i)load16(four + 48), (__m128i)load16(four + 16));
    low = either(odd ? high_codes(low) : low_codes(low), two_shifts(two, right, right + 2, 48));
    high = either(odd ? high_codes(high) : low_codes(high),
                  two_shifts(two + 16, right, right + 2, 48));
  }
#endif

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

#if LANES == 8 && defined(__AVX2__)
  static INLINE void load(Bytes& low, Bytes& high, const uint8_t* block, int part, int odd) {
    const int s = 2 * part + odd, right = 2 * s - 4;
    const uint8_t *four = block + 48 + s * 32, *one = block + 16;
    low = either(two_shifts(four, 0, 4, 15), two_shifts(one, right, right + 1, 16));
    high = either(two_shifts(four + 16, 0, 4, 15), two_shifts(one + 16, right, right + 1, 16));
  }
#endif

  static INLINE void read_scales(float* scale, float* offset, const uint8_t* block) {
    const uint32_t first = word_at(block + 4), second = word_at(block + 8),
                   third = word_at(block + 12);
    const Words low = Words{first, third, second, third >> 4} &
                      Words{0x3f3f3f3f, 0x0f0f0f0f, 0x3f3f3f3f, 0x0f0f0f0f};
    const Words words = low | ((Words{0, first, 0, second} >> 2) & 0x30303030);
    scaled_bytes(scale, (const int8_t*)&words, 8, 0, half_at(block));
    scaled_bytes(offset, (const int8_t*)&words + 8, 8, 0, -half_at(block + 2));
  }
};

struct Q2K {
  static constexpr int kColumns = 256, kBlockBytes = 84, kGroup = 16, kBias = 0;
  static constexpr bool kHasOffsets = true;

  static INLINE Sixteen sixteen(const uint8_t* block, int c) {
    return (load16(block + 16 + c / 8 * 32 + c % 2 * 16) >> (c % 8 / 2 * 2)) & 3;
  }

#if LANES == 8 && defined(__AVX2__)
  static INLINE void load(Bytes& low, Bytes& high, const uint8_t* block, int part, int odd) {
    const uint8_t* two = block + 16 + part * 32;
    const int right = 4 * odd;
    low = two_shifts(two, right, right + 2, 3), high = two_shifts(two + 16, right, right + 2, 3);
  }
#endif

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

#if LANES == 8 && defined(__AVX2__)
  static INLINE void load(Bytes& low, Bytes& high, const uint8_t* block, int part, int odd) {
    const uint8_t* two = block + 32 + part * 32;
    const int right = 4 * odd;
    const __m256i to_one = _mm256_add_epi32(_mm256_set1_epi32(4 * part + 2 * odd),
                                            _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1));
    const auto third = [&](const uint8_t* from) {
      const Bytes bit = _mm256_srlv_epi32(repeat16(from), to_one);
      return _mm256_slli_epi16(_mm256_and_si256(bit, _mm256_set1_epi8(1)), 2);
    };
    low = either(two_shifts(two, right, right + 2, 3), third(block));
    high = either(two_shifts(two + 16, right, right + 2, 3), third(block + 16));
  }
#endif

  static INLINE void read_scales(float* scale, float*, const uint8_t* block) {
    const uint32_t first = word_at(block + 96), second = word_at(block + 100),
                   high = word_at(block + 104);
    const Words low = Words{first, second, first >> 4, second >> 4} & 0x0f0f0f0f;
    const Words words = low | ((Words{high, high >> 2, high >> 4, high >> 6} & 0x03030303) << 4);
    scaled_bytes(scale, (const int8_t*)&words, 16, -32, half_at(block + 108));
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

}  // namespace
