// Tiles of a few rows of codes with a few rows of x in int8. Needs vectors.h, int8.h and
// matrix_tiles.h.
//
// A tile reads the codes of a few rows once for all of its rows of x. Sums of products of a step are
// integers, which are exact; they are multiplied by the scales of both and added up in fp32.

namespace {

// How a tile reads rows of weights, which have a scale for each `group` of columns.
struct Rows {
  int64_t num_steps, step_bytes, sums_at;
  int64_t code_bytes = 0;  // in a row, up to the depth
  int64_t group, num_scales, num_offsets;
  int64_t scale_advance, scale_period;  // vectors of scales begin so far apart, every so many
  int64_t prefetch;  // from a row to one that is read soon
  Bytes table{};  // of levels, if codes have one
  IVec index[4];  // of the scale of each lane, in the steps that share a vector of scales
};

// What a tile knows of codes:
//   Step(from, j, rows)  where the codes of step from + j are; steps that share a vector of scales
//                     begin with `from`
//   load              the codes of a step of one row
//   kStepBytes        about what a step takes of a row
//   kAreSmall         codes are 0..63, else those that `dot` takes
//   kHasBias          rows of x have biases, for what is added to codes to make them unsigned
template <typename Codes>
INLINE IVec multiply(IVec sum, Bytes code, Bytes x) {
  return Codes::kAreSmall ? dot_small(sum, code, x) : dot(sum, code, x);
}

// sums[t * OB + o] of TB rows of x and OB rows of weights, whose scales and offsets are numbers S. With
// kHalves scales are for 16 columns.
template <typename Codes, bool kHalves, typename S, int TB, int OB>
void tile(float* sums, const Rows& at, const char* const* x, const char* const* code,
          const void* const* scale, const void* const* offset) {
  constexpr int kSteps = kHalves ? 2 : 4;  // that share a vector of scales
  Vec acc[OB][TB] = {};
  const Codes codes(at);
  int64_t first_scale = 0, until_next = at.scale_period;
  for (int64_t first = 0; first < at.num_steps; first += kSteps) {
    const SomeLanes some = first_lanes(at.num_scales - first_scale);
    Vec scales[OB];
    for (int o = 0; o < OB; ++o) scales[o] = load_some((const S*)scale[o] + first_scale, some);
    if (--until_next == 0) first_scale += at.scale_advance, until_next = at.scale_period;
#if LANES == 8 && defined(__AVX2__)
#pragma GCC unroll 4  // the places of codes are constants then
#endif
    for (int j = 0; j < kSteps; ++j) {
      if (first + j == at.num_steps) break;
      const typename Codes::Step place(first, j, at);
      Bytes low[OB], high[OB];
      Vec low_scale[OB], high_scale[OB];
#pragma GCC unroll 8
      for (int o = 0; o < OB; ++o) {
        codes.load(low[o], high[o], code[o], place);
        for (int i = 0; i < Codes::kStepBytes; i += 64)
          __builtin_prefetch(code[o] + (first + j) * Codes::kStepBytes + at.prefetch + i, 0, 2);
        low_scale[o] = permute(scales[o], at.index[kHalves ? 2 * j : j]);
        if (kHalves) high_scale[o] = permute(scales[o], at.index[(2 * j + 1) & 3]);
      }
#pragma GCC unroll 8
      for (int t = 0; t < TB; ++t) {
        const char* from = x[t] + (first + j) * at.step_bytes;
        const Bytes x_low = load_bytes(from), x_high = load_bytes(from + kBytes);
        const Vec x_scale = load((const float*)(from + 2 * kBytes));
        IVec start{}, high_start{};
        if (Codes::kHasBias) start = *(const IVecAt*)(from + 3 * kBytes);
        if (Codes::kHasBias && kHalves) high_start = *(const IVecAt*)(from + 4 * kBytes);
#pragma GCC unroll 8
        for (int o = 0; o < OB; ++o) {
          IVec sum;
          if (kHalves) {
            sum = multiply<Codes>(start, low[o], x_low);
            const IVec of_high = multiply<Codes>(high_start, high[o], x_high);
            acc[o][t] = multiply_add(__builtin_convertvector(of_high, Vec), high_scale[o] * x_scale,
                                     acc[o][t]);
          } else if (Codes::kAreSmall) {
            sum = dot_small(start, low[o], x_low, high[o], x_high);
          } else {
            sum = dot(dot(start, low[o], x_low), high[o], x_high);
          }
          acc[o][t] =
              multiply_add(__builtin_convertvector(sum, Vec), low_scale[o] * x_scale, acc[o][t]);
        }
      }
    }
  }
  for (int64_t g = 0; g < at.num_offsets; g += kLanes) {
    const SomeLanes some = first_lanes(at.num_offsets - g);
#pragma GCC unroll 8
    for (int o = 0; o < OB; ++o) {
      const Vec offsets = load_some((const S*)offset[o] + g, some);
#pragma GCC unroll 8
      for (int t = 0; t < TB; ++t)
        acc[o][t] =
            multiply_add(offsets, load((const float*)(x[t] + at.sums_at) + g), acc[o][t]);
    }
  }
  constexpr int kSums = TB * OB, kFours = kSums / 4 * 4;
#pragma GCC unroll 8
  for (int i = 0; i < kFours; i += 4)
    store_sums(sums + i, acc[i % OB][i / OB], acc[(i + 1) % OB][(i + 1) / OB],
               acc[(i + 2) % OB][(i + 2) / OB], acc[(i + 3) % OB][(i + 3) / OB]);
#pragma GCC unroll 8
  for (int i = kFours; i < kSums; ++i) sums[i] = sum(acc[i % OB][i / OB]);
}

constexpr int kTileOutputs = kTileRows == 8 ? 4 : 2;

typedef void (*TileFunction)(float*, const Rows&, const char* const*, const char* const*,
                             const void* const*, const void* const*);

// More rows of x than `tile` has registers for with all rows of weights: halves of these in turn.
template <typename Codes, bool kHalves, typename S, int TB>
void wide_tile(float* sums, const Rows& at, const char* const* x, const char* const* code,
               const void* const* scale, const void* const* offset) {
  constexpr int OB = kTileOutputs / 2;
  for (int first = 0; first < kTileOutputs; first += OB) {
    float found[TB * OB];
    tile<Codes, kHalves, S, TB, OB>(found, at, x, code + first, scale + first, offset + first);
    for (int t = 0; t < TB; ++t)
      for (int o = 0; o < OB; ++o) sums[t * kTileOutputs + first + o] = found[t * OB + o];
  }
}

#if LANES == 4 && !defined(__aarch64__)
constexpr int kTileTokens = 4, kWideTokens = 4;
#else
constexpr int kTileTokens = 4, kWideTokens = 8;
#endif

template <typename Codes, bool kHalves, typename S, int TB>
constexpr TileFunction tile_function() {
  if constexpr (TB > kWideTokens) return nullptr;
  else if constexpr (TB <= kTileTokens) return tile<Codes, kHalves, S, TB, kTileOutputs>;
  else return wide_tile<Codes, kHalves, S, TB>;
}

template <typename Codes, bool kHalves, typename S = float>
TileFunction tile_of(int64_t num_tokens) {
  static const TileFunction of[] = {
      tile_function<Codes, kHalves, S, 1>(), tile_function<Codes, kHalves, S, 2>(),
      tile_function<Codes, kHalves, S, 3>(), tile_function<Codes, kHalves, S, 4>(),
      tile_function<Codes, kHalves, S, 5>(), tile_function<Codes, kHalves, S, 6>(),
      tile_function<Codes, kHalves, S, 7>(), tile_function<Codes, kHalves, S, 8>()};
  return of[num_tokens - 1];
}

#if HAS_MATRIX_TILES
// One of 16 rows of codes, as `TileRows` has them.
template <typename Codes>
void decode_row(uint8_t* to, const char* code, const Rows& at) {
  const Codes codes(at);
  const Bytes first = _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0),
              second = _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4);
  for (int64_t step = 0; step < at.num_steps; ++step, to += kStepBlocks * kCodeBytes) {
    const typename Codes::Step place(step, 0, at);
    Bytes low, high;
    codes.load(low, high, code, place);
    for (int i = 0; i < Codes::kStepBytes; i += 64)
      __builtin_prefetch(code + step * Codes::kStepBytes + at.prefetch + i, 0, 2);
    const Bytes two[] = {_mm512_permutex2var_epi64(low, first, high),
                         _mm512_permutex2var_epi64(low, second, high)};
    for (int i = 0; i < kStepBlocks; ++i)
      _mm256_storeu_si256((__m256i*)(to + i * kCodeBytes),
                          _mm512_extracti64x4_epi64(two[i / 2], i % 2));
  }
}
#endif

}  // namespace
