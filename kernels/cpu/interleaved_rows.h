// The layout of rows of codes that are interleaved by 16. Needs vectors.h and packed.h.
//
// Of 16 rows there are in turn 4 bytes of each, and the scales and offsets of a group of columns lie
// side by side: codes are [E, O / 16, C / 4, 16, 4], scales [E, O / 16, G, 16].

namespace {

constexpr int kInterleaved = 16;
constexpr int kQuadBytes = 4 * kInterleaved;  // 4 bytes of each row

// Where the numbers of rows o .. o + 15 begin; offset may be null.
struct Panel {
  const char *code, *scale, *offset = nullptr;

  INLINE Panel(const Packed& at, int64_t expert, int64_t o)
      : code(code_row(at, expert, o)), scale(scale_row(at, expert, o)) {
    if (at.offset) offset = offset_row(at, expert, o);
  }
};

INLINE Vec load_as(const char* p, int64_t i, int64_t dtype) {
  if (dtype == kFp16) return load((const Fp16*)p + i);
  if (dtype == kFp32) return load((const float*)p + i);
  return load((const Bf16*)p + i);
}

// The first n bytes of one of the rows; n is a multiple of 4.
inline void copy_codes(char* to, const Panel& panel, int64_t row, int64_t n) {
  for (int64_t i = 0; i < n; i += 4)
    std::memcpy(to + i, panel.code + i * kInterleaved + row * 4, 4);
}

// The scales or offsets of one of the rows.
inline void copy_groups(float* to, const char* from, int64_t dtype, int64_t row, int64_t num) {
  with_dtype(dtype, [&](auto zero) {
    for (int64_t g = 0; g < num; ++g)
      to[g] = to_float(((const decltype(zero)*)from)[g * kInterleaved + row]);
  });
}

#if LANES == 16
// Row i of the result is lane i of all rows.
INLINE void transpose(Vec* row) {
  const __m512i first = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0),
                second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  for (int turn = 0; turn < 4; ++turn) {  // each moves a bit of the row's number to the lane's
    Vec mixed[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const __m512 low = (__m512)row[i], high = (__m512)row[i + 8];
      mixed[2 * i] = (Vec)_mm512_permutex2var_ps(low, first, high);
      mixed[2 * i + 1] = (Vec)_mm512_permutex2var_ps(low, second, high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) row[i] = mixed[i];
  }
}
#endif

// The first n bytes of all rows, which are `stride` bytes apart; n is a multiple of 4.
inline void copy_all_codes(char* to, int64_t stride, const Panel& panel, int64_t n) {
  int64_t first = 0;
#if LANES == 16
  for (; first + kQuadBytes <= n; first += kQuadBytes) {
    Vec row[kInterleaved];
    for (int i = 0; i < kInterleaved; ++i) {
      const char* from = panel.code + (first + 4 * i) * kInterleaved;
      __builtin_prefetch(from + kPrefetchBytes, 0, 2);
      row[i] = load((const float*)from);
    }
    transpose(row);
    for (int i = 0; i < kInterleaved; ++i) store((float*)(to + i * stride + first), row[i]);
  }
#endif
  for (; first < n; first += 4)
    for (int i = 0; i < kInterleaved; ++i)
      std::memcpy(to + i * stride + first, panel.code + first * kInterleaved + 4 * i, 4);
}

}  // namespace
