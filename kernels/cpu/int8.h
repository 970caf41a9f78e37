// Products of codes with rows of x in int8: vectors of bytes, their sums of products, and rows of x
// that are quantized for them. Needs vectors.h.
//
// A block is 32 columns. A step is kStepBlocks blocks, so that its sums of products fill one vector
// of int32, with 4 lanes for each block. Codes and x of a step are two vectors of bytes: `low` has
// the columns 0..15 of its blocks, `high` the columns 16..31. This is how codes of 4 bits lie in
// memory.

namespace {

constexpr int kBlock = 32, kHalf = 16;
constexpr int kBytes = 4 * kLanes;
constexpr int kStepBlocks = kLanes / 4;
constexpr int kStepColumns = kStepBlocks * kBlock;

// ------------------------------------------------------------------------------------------- bytes
//
// `dot` adds to each int32 lane the products of its 4 bytes. The bytes of x are -127..127. Where
// kUnsigned, codes are 0..255, else -128..127. `dot_small` is for codes 0..63, and adds the products of
// one vector or of two.

#if LANES == 16 && defined(__AVX512BW__)
typedef __m512i Bytes;
INLINE Bytes load_bytes(const void* p) { return _mm512_loadu_si512(p); }
typedef __mmask64 SomeBytes;
INLINE SomeBytes first_bytes(int64_t n) {
  return n >= kBytes ? ~(SomeBytes)0 : ((SomeBytes)1 << std::max<int64_t>(n, 0)) - 1;
}
INLINE Bytes load_bytes(const void* p, SomeBytes some) { return _mm512_maskz_loadu_epi8(some, p); }
INLINE Bytes low_codes(Bytes v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
INLINE Bytes high_codes(Bytes v) { return low_codes(_mm512_srli_epi16(v, 4)); }
INLINE Bytes flip_sign(Bytes v) { return _mm512_xor_si512(v, _mm512_set1_epi8((char)0x80)); }
INLINE Bytes repeat16(const void* p) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p));
}
INLINE Bytes look_up(Bytes table, Bytes index) { return _mm512_shuffle_epi8(table, index); }
// the first and the second halves of blocks, from two vectors in the order of columns
INLINE void halves(Bytes& low, Bytes& high) {
  const Bytes first = low;
  low = _mm512_shuffle_i64x2(first, high, 0x88), high = _mm512_shuffle_i64x2(first, high, 0xdd);
}
#if defined(__AVX512VNNI__)
constexpr bool kUnsigned = true;
INLINE IVec dot(IVec sum, Bytes code, Bytes x) {
  return (IVec)_mm512_dpbusd_epi32((__m512i)sum, code, x);
}
INLINE IVec dot_small(IVec sum, Bytes code, Bytes x) { return dot(sum, code, x); }
#else
constexpr bool kUnsigned = false;
INLINE IVec dot_small(IVec sum, Bytes code, Bytes x) {
  return sum + (IVec)_mm512_madd_epi16(_mm512_maddubs_epi16(code, x), _mm512_set1_epi16(1));
}
INLINE IVec dot(IVec sum, Bytes code, Bytes x) {
  const Bytes negated =
      _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(code), _mm512_setzero_si512(), x);
  return dot_small(sum, _mm512_abs_epi8(code), negated);  // pairs are at most 2 * 128 * 127
}
#endif
#elif LANES == 8 && defined(__AVX2__)
typedef __m256i Bytes;
INLINE Bytes load_bytes(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
INLINE Bytes low_codes(Bytes v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
INLINE Bytes high_codes(Bytes v) { return low_codes(_mm256_srli_epi16(v, 4)); }
INLINE Bytes flip_sign(Bytes v) { return _mm256_xor_si256(v, _mm256_set1_epi8((char)0x80)); }
INLINE Bytes repeat16(const void* p) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p));
}
INLINE Bytes look_up(Bytes table, Bytes index) { return _mm256_shuffle_epi8(table, index); }
INLINE void halves(Bytes& low, Bytes& high) {
  const Bytes first = low;
  low = _mm256_permute2x128_si256(first, high, 0x20);
  high = _mm256_permute2x128_si256(first, high, 0x31);
}
#if defined(__AVXVNNI__)
constexpr bool kUnsigned = true;
INLINE IVec dot(IVec sum, Bytes code, Bytes x) {
  return (IVec)_mm256_dpbusd_avx_epi32((__m256i)sum, code, x);
}
INLINE IVec dot_small(IVec sum, Bytes code, Bytes x) { return dot(sum, code, x); }
#else
constexpr bool kUnsigned = false;
INLINE IVec dot_small(IVec sum, Bytes code, Bytes x) {
  return sum + (IVec)_mm256_madd_epi16(_mm256_maddubs_epi16(code, x), _mm256_set1_epi16(1));
}
INLINE IVec dot(IVec sum, Bytes code, Bytes x) {  // pairs are at most 2 * 128 * 127
  return dot_small(sum, _mm256_abs_epi8(code), _mm256_sign_epi8(x, code));
}
#define HAS_DOT_SMALL_BOTH
INLINE IVec dot_small(IVec sum, Bytes low, Bytes x_low, Bytes high, Bytes x_high) {
  const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(low, x_low),  // at most 4 * 63 * 127
                                         _mm256_maddubs_epi16(high, x_high));
  return sum + (IVec)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
#endif
#elif LANES == 4 && defined(__aarch64__)
typedef uint8x16_t Bytes;
INLINE Bytes load_bytes(const void* p) { return vld1q_u8((const uint8_t*)p); }
INLINE Bytes low_codes(Bytes v) { return vandq_u8(v, vdupq_n_u8(15)); }
INLINE Bytes high_codes(Bytes v) { return vshrq_n_u8(v, 4); }
INLINE Bytes flip_sign(Bytes v) { return veorq_u8(v, vdupq_n_u8(0x80)); }
INLINE Bytes repeat16(const void* p) { return load_bytes(p); }
INLINE Bytes look_up(Bytes table, Bytes index) { return vqtbl1q_u8(table, index); }
INLINE void halves(Bytes&, Bytes&) {}
constexpr bool kUnsigned = false;
INLINE IVec dot(IVec sum, Bytes code, Bytes x) {
  const int8x16_t a = vreinterpretq_s8_u8(code), b = vreinterpretq_s8_u8(x);
#if defined(__ARM_FEATURE_DOTPROD)
  return (IVec)vdotq_s32((int32x4_t)sum, a, b);
#else
  const int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(a), vget_low_s8(b)));
  const int32x4_t high = vpaddlq_s16(vmull_s8(vget_high_s8(a), vget_high_s8(b)));
  return sum + (IVec)vpaddq_s32(low, high);
#endif
}
INLINE IVec dot_small(IVec sum, Bytes code, Bytes x) { return dot(sum, code, x); }
#else
typedef uint8_t ByteVec __attribute__((vector_size(kBytes)));
typedef uint8_t ByteVecAt __attribute__((vector_size(kBytes), aligned(1), may_alias));
typedef ByteVec Bytes;
INLINE Bytes load_bytes(const void* p) { return *(const ByteVecAt*)p; }
INLINE Bytes low_codes(Bytes v) { return v & 15; }
INLINE Bytes high_codes(Bytes v) { return v >> 4; }
INLINE Bytes flip_sign(Bytes v) { return v ^ 0x80; }
INLINE Bytes repeat16(const void* p) {
  Bytes out;
  for (int i = 0; i < kBytes; i += 16) std::memcpy((char*)&out + i, p, 16);
  return out;
}
INLINE Bytes look_up(Bytes table, Bytes index) {
  Bytes out;
  for (int i = 0; i < kBytes; ++i) out[i] = table[index[i]];
  return out;
}
INLINE void halves(Bytes& low, Bytes& high) {
  char both[2 * kBytes];
  std::memcpy(both, &low, kBytes);
  std::memcpy(both + kBytes, &high, kBytes);
  for (int block = 0; block < kStepBlocks; ++block) {
    std::memcpy((char*)&low + block * kHalf, both + block * kBlock, kHalf);
    std::memcpy((char*)&high + block * kHalf, both + block * kBlock + kHalf, kHalf);
  }
}
constexpr bool kUnsigned = false;
INLINE IVec dot(IVec sum, Bytes code, Bytes x) {
  for (int lane = 0; lane < kLanes; ++lane)
    for (int i = 4 * lane; i < 4 * lane + 4; ++i)
      sum[lane] += (int32_t)(int8_t)code[i] * (int8_t)x[i];
  return sum;
}
INLINE IVec dot_small(IVec sum, Bytes code, Bytes x) { return dot(sum, code, x); }
#endif

#ifndef HAS_DOT_SMALL_BOTH
INLINE IVec dot_small(IVec sum, Bytes low, Bytes x_low, Bytes high, Bytes x_high) {
  return dot_small(dot_small(sum, low, x_low), high, x_high);
}
#endif

#if !(LANES == 16 && defined(__AVX512BW__))
struct SomeBytes {
  int64_t num;
};
INLINE SomeBytes first_bytes(int64_t n) { return {n}; }
INLINE Bytes load_bytes(const void* p, SomeBytes some) {
  if (some.num >= kBytes) return load_bytes(p);
  alignas(64) char first[kBytes] = {};
  if (some.num > 0) std::memcpy(first, p, some.num);
  return load_bytes(first);
}
#endif

// lane i of the result is lane index[i] of v
INLINE Vec permute(Vec v, IVec index) {
#if LANES == 16
  return (Vec)_mm512_permutexvar_ps((__m512i)index, (__m512)v);
#elif LANES == 8 && defined(__AVX2__)
  return (Vec)_mm256_permutevar8x32_ps((__m256)v, (__m256i)index);
#else
  Vec out;
  for (int i = 0; i < kLanes; ++i) out[i] = v[index[i]];
  return out;
#endif
}

// loads the numbers at p that `some` has, the first of kLanes; then zeros
#if LANES == 16
typedef __mmask16 SomeLanes;
INLINE SomeLanes first_lanes(int64_t n) {
  return n >= kLanes ? 0xffff : (SomeLanes)((1u << std::max<int64_t>(n, 0)) - 1);
}
INLINE Vec load_some(const float* p, SomeLanes some) {
  return (Vec)_mm512_maskz_loadu_ps(some, p);
}
#if defined(__AVX512BW__) && defined(__AVX512VL__)
#define HAS_HALF_SCALES 1  // tiles read scales in fp16
INLINE Vec load_some(const Fp16* p, SomeLanes some) {
  return (Vec)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(some, p));
}
#endif
#elif LANES == 8 && defined(__AVX2__)
typedef __m256i SomeLanes;
INLINE SomeLanes first_lanes(int64_t n) {
  const int num = (int)std::min<int64_t>(std::max<int64_t>(n, 0), kLanes);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(num), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
INLINE Vec load_some(const float* p, SomeLanes some) {
  return (Vec)_mm256_maskload_ps(p, some);
}
#else
struct SomeLanes {
  int64_t num;
};
INLINE SomeLanes first_lanes(int64_t n) { return {n}; }
INLINE Vec load_some(const float* p, SomeLanes some) {
  return some.num > 0 ? load_first(p, some.num) : Vec{};
}
#endif

#ifndef HAS_HALF_SCALES
#define HAS_HALF_SCALES 0
#endif

INLINE void put_bytes(int8_t* to, IVec v) {
#if LANES == 16
  _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8((__m512i)v));
#else
  for (int i = 0; i < kLanes; ++i) to[i] = (int8_t)v[i];
#endif
}

// ---------------------------------------------------------------------------------------- rows of x

// How rows of x are quantized: x is about scale * q with |q| <= 127, and a scale for each block, as
// in llama.cpp. The largest magnitude m of a block gives scale = m / 127, so that an element changes
// by at most m / 254.
//
// A row is its steps, and then the sums of scale * q over each group. A step is the vectors `low`,
// `high`, `scale * factor` (4 equal lanes for each block), and, if it has a bias, the sums of q in the
// lanes of `low` and `high` times bias: one vector, or two if halves of blocks are apart.
struct RowFormat {
  int64_t depth, group, num_groups;  // no groups: no sums
  bool halves_apart, has_bias;
  int bias;
  float factor;

  int64_t num_steps() const { return (depth + kStepColumns - 1) / kStepColumns; }
  int64_t step_bytes() const { return (3 + (has_bias ? halves_apart ? 2 : 1 : 0)) * kBytes; }
  int64_t sums_at() const { return num_steps() * step_bytes(); }
  int64_t bytes() const {
    return sums_at() + (num_groups + kLanes - 1) / kLanes * kLanes * (int64_t)sizeof(float);
  }
};

INLINE int32_t max_of(IVec v) {
  const auto with = [](IVec a, Vec b) { return a > (IVec)b ? a : (IVec)b; };
  if constexpr (kLanes >= 16) v = with(v, swap<8>((Vec)v));
  if constexpr (kLanes >= 8) v = with(v, swap<4>((Vec)v));
  v = with(v, swap<2>((Vec)v));
  v = with(v, swap<1>((Vec)v));
  return v[0];
}

// The sum of the 32 numbers of a block.
INLINE int32_t sum_of_block(const int8_t* q) {
#if LANES == 16
  const __m256i all = _mm256_loadu_si256((const __m256i*)q);
  const __m256i four =  // sums of 8 numbers + 128
      _mm256_sad_epu8(_mm256_xor_si256(all, _mm256_set1_epi8(-128)), _mm256_setzero_si256());
  const __m128i two =
      _mm_add_epi64(_mm256_castsi256_si128(four), _mm256_extracti128_si256(four, 1));
  return (int32_t)(_mm_cvtsi128_si64(two) + _mm_extract_epi64(two, 1)) - 128 * kBlock;
#else
  int32_t sum = 0;
  for (int i = 0; i < kBlock; ++i) sum += q[i];
  return sum;
#endif
}

// The scale of up to 32 columns, and their q at low and high. NaN and infinity make the scale NaN.
template <typename T>
INLINE float quantize_block(int8_t* low, int8_t* high, const T* x, int64_t n) {
  constexpr int kVecs = kBlock / kLanes;
  Vec v[kVecs];
  IVec most{};
  for (int i = 0; i < kVecs; ++i) {
    const int64_t left = n - i * kLanes;
    v[i] = left > 0 ? load_first(x + i * kLanes, left) : Vec{};
    const IVec magnitude = (IVec)v[i] & 0x7fffffff;  // ordered as the numbers are; NaN is largest
    most = magnitude > most ? magnitude : most;
  }
  const int32_t bits = max_of(most);
  float largest;
  std::memcpy(&largest, &bits, 4);
  const bool is_finite = bits < 0x7f800000, is_tiny = largest < 0x1p-100f;
  const Vec inverse = splat(is_finite && !is_tiny ? 127.0f / largest : 0.0f);
  for (int i = 0; i < kVecs; ++i) {
    // the low bits of the sum are the nearest integer
    IVec q = (IVec)(v[i] * inverse + 12582912.0f) - 0x4b400000;
    if (!is_finite) q = IVec{};
    const int column = i * kLanes;
    put_bytes(column < kHalf ? low + column : high + column - kHalf, q);
  }
  return is_finite ? is_tiny ? 0.0f : largest / 127.0f : NAN;
}

template <typename T>
void quantize_row(char* to, const T* x, const RowFormat& format) {
  float* sums = (float*)(to + format.sums_at());
  for (int64_t g = 0; g < (format.num_groups + kLanes - 1) / kLanes * kLanes; ++g) sums[g] = 0.0f;
  uint8_t one[kBytes];
  std::memset(one, 1, kBytes);
  const Bytes ones = load_bytes(one);
  for (int64_t column = 0; column < format.depth; column += kStepColumns, to += format.step_bytes()) {
    float scales[kLanes] = {};
    std::memset(to, 0, 2 * kBytes);
    for (int block = 0; block < kStepBlocks; ++block) {
      const int64_t first = column + block * kBlock, n = format.depth - first;
      if (n <= 0) break;
      int8_t *low = (int8_t*)to + block * kHalf, *high = low + kBytes;
      const float scale = quantize_block(low, high, x + first, n);
      for (int lane = 0; lane < 4; ++lane) scales[4 * block + lane] = scale;
    }
    store((float*)(to + 2 * kBytes), load(scales) * format.factor);
    if (!format.has_bias && format.num_groups == 0) continue;
    const IVec low = dot_small(IVec{}, ones, load_bytes(to)),
               high = dot_small(IVec{}, ones, load_bytes(to + kBytes));
    if (format.has_bias) {
      IVecAt* biases = (IVecAt*)(to + 3 * kBytes);
      biases[0] = (format.halves_apart ? low : low + high) * format.bias;
      if (format.halves_apart) biases[1] = high * format.bias;
    }
    if (format.num_groups == 0) continue;
    for (int block = 0; block < kStepBlocks; ++block) {
      const int64_t first = column + block * kBlock;
      if (first >= format.depth) break;
      int32_t of_low = 0, of_high = 0;
      for (int lane = 4 * block; lane < 4 * block + 4; ++lane)
        of_low += low[lane], of_high += high[lane];
      sums[first / format.group] += (float)of_low * scales[4 * block];
      if (first + kHalf < format.depth)
        sums[(first + kHalf) / format.group] += (float)of_high * scales[4 * block];
    }
  }
}

}  // namespace
