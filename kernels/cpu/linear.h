// Products of few rows of x with weights in fp32, bf16 or int8. Needs vectors.h, threads.h, tiles.h
// and panels.h.

namespace {

struct Linear {
  char* out;           // [T, O], contiguous
  const char* x;       // [T, D]
  const char* weight;  // [O, D]
  const char* bias;    // [O] or null
  const float* scale;  // [O]: factors of the outputs of int8 weights, or null
  int64_t num_tokens, num_outputs, depth;
  int64_t x_stride, weight_stride;
  int64_t dtype;
  int64_t ordered;  // a row's sums are the same among any number of rows
  int64_t num_threads;
};

INLINE Vec load(const int8_t* p) {
#if LANES == 16
  return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
  return (Vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#endif
  typedef int8_t Bytes __attribute__((vector_size(kLanes)));
  typedef int8_t BytesAt __attribute__((vector_size(kLanes), aligned(1), may_alias));
  return __builtin_convertvector(__builtin_convertvector((Bytes) * (const BytesAt*)p, IVec), Vec);
}

// int8, widened in registers: integers are multiplied by x, and the sums are scaled at the end
template <typename T>
struct Int8Step {
  typedef int8_t Weight;
  typedef float X;
  typedef T Io;
  static constexpr bool kPairs = false;
  static constexpr int kDepth = kLanes;
  static constexpr int kPassTokens = 8;
  struct Value {
    Vec v;
  };
  static INLINE Value load_weight(const int8_t* p) { return {load(p)}; }
  static INLINE Vec fma(Vec acc, const float* x, Value w) {
    return multiply_add(load(x), w.v, acc);
  }
};

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
// bf16 represents every int8 exactly, and its product takes two elements at once
template <>
struct Int8Step<Bf16> {
  typedef int8_t Weight;
  typedef Bf16 X;
  typedef Bf16 Io;
  static constexpr bool kPairs = false;
  static constexpr int kDepth = 32;
  static constexpr int kPassTokens = 8;
  typedef Bf16Step::Value Value;
  static INLINE Value load_weight(const int8_t* p) {
    return {_mm512_cvtne2ps_pbh((__m512)load(p + kLanes), (__m512)load(p))};
  }
  static INLINE Vec fma(Vec acc, const Bf16* x, Value w) { return Bf16Step::fma(acc, x, w); }
};
#endif

template <typename Step>
void linear(const Linear& at) {
  typedef typename Step::X X;
  typedef typename Step::Io Io;
  typedef typename Step::Weight Weight;
  const int64_t x_stride = row_stride<Step>(at.depth);
  X* x = (X*)scratch<kShared>((size_t)at.num_tokens * x_stride * sizeof(X) / 4);
  for (int64_t t = 0; t < at.num_tokens; ++t)
    copy_row<Step>(x + t * x_stride, (const Io*)at.x + t * at.x_stride, at.depth);
  const Product<Step> weights{x, x_stride, (const Weight*)at.weight, at.weight_stride, at.depth};
  const auto finish = [&](const float* sums, int64_t token, int num_tokens, int64_t o, int num) {
    Io* out = (Io*)at.out + token * at.num_outputs + o;
    for (int i = 0; i < num; ++i) {
      const float bias = at.bias ? to_float(((const Io*)at.bias)[o + i]) : 0.0f;
      const float scale = std::is_same_v<Weight, int8_t> ? at.scale[o + i] : 1.0f;
      for (int t = 0; t < num_tokens; ++t)
        put(out + t * at.num_outputs + i, sums[t * num + i] * scale + bias);
    }
  };
  const int64_t chunk = chunk_outputs(at.depth * (int64_t)sizeof(Weight));
  parallel_for((at.num_outputs + chunk - 1) / chunk, at.num_threads, [&](int64_t item) {
    const int64_t first = item * chunk, end = std::min(first + chunk, at.num_outputs);
    for_passes<Step>(at.num_tokens, [&](int64_t token, int64_t num_tokens) {
      product(weights, token, num_tokens, first, end, finish);
    });
  });
}

// fp32 with more tokens: limited by arithmetic. Tokens run along vectors and weights are broadcast
// from memory, so that only x is rearranged: out^T[O, T] = weight[O, D] x^T[D, T]. int8 weights are
// widened one block at a time. With fewer tokens than kPanelTokens linear_rows is faster.
constexpr int64_t kPanelTokens = kLanes == 16 ? 11 : 17;
constexpr int64_t kPanelTokensInt8 = kLanes == 16 ? 25 : 33;
constexpr int64_t kBlockTokens = 10 * kPanel;  // tokens that a thread multiplies by its weights
constexpr int64_t kBlockDepth = 192;           // a panel of x^T of this depth stays in the L1
constexpr int64_t kMaxBlockOutputs = 64;
constexpr int64_t kPackDepth = 64;

// out[RB, NV vectors] = weight[RB, depth] x[depth, NV vectors], added to out if `add`. A sum takes
// every kPhases-th element of the depth, so that few rows still have as many sums as products are
// in flight.
template <int RB, int NV, int kPhases>
INLINE void multiply_weight_tile(float* out, int64_t out_stride, const float* weight,
                                 int64_t weight_stride, const float* x, int64_t x_stride,
                                 int64_t depth, bool add) {
  constexpr int kLine = 16;
  Vec acc[RB][NV][kPhases] = {};
  const auto multiply = [&](int64_t d, int phase) __attribute__((always_inline)) {
    Vec x_vec[NV];
    for (int n = 0; n < NV; ++n) x_vec[n] = load(x + d * x_stride + n * kLanes);
    for (int r = 0; r < RB; ++r) {
      const Vec w = splat(weight[r * weight_stride + d]);
      for (int n = 0; n < NV; ++n) acc[r][n][phase] += w * x_vec[n];
    }
  };
  int64_t d = 0;
  for (; d + kLine <= depth; d += kLine) {
    // the next rows
    for (int r = 0; r < RB; ++r) __builtin_prefetch(weight + (RB + r) * weight_stride + d, 0, 2);
    for (int i = 0; i < kLine; i += kPhases)
      for (int phase = 0; phase < kPhases; ++phase) multiply(d + i + phase, phase);
  }
  for (; d < depth; ++d) multiply(d, 0);
  for (int r = 0; r < RB; ++r)
    for (int n = 0; n < NV; ++n) {
      float* to = out + r * out_stride + n * kLanes;
      Vec sum = acc[r][n][0];
      for (int phase = 1; phase < kPhases; ++phase) sum += acc[r][n][phase];
      store(to, add ? load(to) + sum : sum);
    }
}

// With one vector of tokens, 4 rows with two sums each are faster than 8 rows: rows are often 4 KiB
// apart, and a set of the L1 holds 8 such lines (Zen 4). With two vectors 8 rows are faster.
template <int NV, int RB = NV == 1 ? 4 : kTileRows, int kPhases = NV == 1 ? 2 : 1>
void multiply_weights(float* out, int64_t out_stride, const float* weight, int64_t weight_stride,
                      const float* x, int64_t x_stride, int64_t num_rows, int64_t depth, bool add) {
  int64_t row = 0;
  for (; row + RB <= num_rows; row += RB)
    multiply_weight_tile<RB, NV, kPhases>(out + row * out_stride, out_stride,
                                          weight + row * weight_stride, weight_stride, x, x_stride,
                                          depth, add);
  for (; row < num_rows; ++row)
    multiply_weight_tile<1, NV, kPhases>(out + row * out_stride, out_stride,
                                         weight + row * weight_stride, weight_stride, x, x_stride,
                                         depth, add);
}

template <typename T>
INLINE void widen(T* out, const int8_t* in, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, load(in + i));
  for (; i < n; ++i) put(out + i, (float)in[i]);
}

template <typename Weight>
void linear_by_panels(const Linear& at) {
  constexpr bool kWidened = std::is_same_v<Weight, int8_t>;
  const int64_t D = at.depth, O = at.num_outputs;
  const Weight* weight = (const Weight*)at.weight;
  const float* bias = (const float*)at.bias;
  int64_t block_outputs = kMaxBlockOutputs;  // fewer if threads would be idle
  while (block_outputs > 16 && O / block_outputs < 4 * at.num_threads) block_outputs /= 2;
  const int64_t num_blocks = (O + block_outputs - 1) / block_outputs;
  for (int64_t first_token = 0; first_token < at.num_tokens; first_token += kBlockTokens) {
    const int64_t T = std::min(kBlockTokens, at.num_tokens - first_token);
    const float* x = (const float*)at.x + first_token * at.x_stride;
    const int64_t num_vecs = (T + kLanes - 1) / kLanes, num_panels = (num_vecs + 2) / 3;
    const int64_t panel_tokens = (num_vecs + num_panels - 1) / num_panels *
                                 kLanes;  // equal panels: 4 vectors are 2 + 2, not 3 + 1
    const int64_t num_packs = (D + kPackDepth - 1) / kPackDepth;
    const int64_t sums_stride = num_panels * panel_tokens;
    float* packed = scratch<kShared>((size_t)(num_panels * panel_tokens * D));  // [panel, D, token]
    parallel_for(num_panels * num_packs, at.num_threads, [&](int64_t item) {
      const int64_t panel = item / num_packs, d_first = item % num_packs * kPackDepth,
                    d_end = std::min(d_first + kPackDepth, D);
      float* to = packed + panel * panel_tokens * D;
      for (int64_t m = 0; m < panel_tokens; ++m) {
        const int64_t token = panel * panel_tokens + m;
        for (int64_t d = d_first; d < d_end; ++d)
          to[d * panel_tokens + m] = token < T ? x[token * at.x_stride + d] : 0.0f;
      }
    });
    parallel_for(num_blocks, at.num_threads, [&](int64_t item) {
      const int64_t first = item * block_outputs, num_rows = std::min(block_outputs, O - first);
      float* sums =
          scratch((size_t)(block_outputs * (kBlockTokens + kBlockDepth)));  // [O, T] of the block
      float* widened = sums + block_outputs * kBlockTokens;
      // with one panel, whole rows of weights are read, which the hardware prefetches well
      const int64_t block_depth = num_panels == 1 && !kWidened ? D : kBlockDepth;
      for (int64_t d = 0; d < D; d += block_depth) {
        const int64_t depth = std::min(block_depth, D - d);
        const float* block;
        int64_t block_stride;
        if constexpr (kWidened) {
          for (int64_t row = 0; row < num_rows; ++row)
            widen(widened + row * kBlockDepth, weight + (first + row) * at.weight_stride + d,
                  depth);
          block = widened, block_stride = kBlockDepth;
        } else {
          block = weight + first * at.weight_stride + d, block_stride = at.weight_stride;
        }
        for (int64_t token = 0; token < T; token += panel_tokens) {
          const int64_t panel_vecs = (std::min(panel_tokens, T - token) + kLanes - 1) / kLanes;
          const auto multiply = panel_vecs == 3   ? multiply_weights<3>
                                : panel_vecs == 2 ? multiply_weights<2>
                                                  : multiply_weights<1>;
          multiply(sums + token, sums_stride, block, block_stride,
                   packed + token * D + d * panel_tokens, panel_tokens, num_rows, depth, d > 0);
        }
      }
      for (int64_t token = 0; token < T; ++token) {
        float* out = (float*)at.out + (first_token + token) * O + first;
        for (int64_t o = 0; o < num_rows; ++o)
          out[o] = sums[o * sums_stride + token] * (kWidened ? at.scale[first + o] : 1.0f) +
                   (bias ? bias[first + o] : 0.0f);
      }
    });
  }
}

}  // namespace

// The most tokens for which `linear` is faster than F.linear, as measured. In fp32 with vectors of
// 16 panels are twice as fast for any number, except on Intel's machines with matrix units (AMX),
// where F.linear reaches 0.9 of the peak from 128 tokens on. In bf16 these use F.linear's library.
extern "C" int64_t nanovllm_small_m_linear_max_tokens(int64_t dtype) {
#if LANES == 16 && defined(__AMX_BF16__)
  if (dtype == kFp32) return 96;
#elif LANES == 16
  if (dtype == kFp32) return INT64_MAX;
#endif
#if LANES == 16 && !defined(__AMX_BF16__)
  if (dtype == kBf16) return 32;
#endif
  return dtype == kFp16 ? 0 : 16;
}

extern "C" void nanovllm_small_m_linear(const Linear* args) {
  const bool by_panels = args->num_tokens >= kPanelTokens && !args->ordered;
  if (args->dtype == kFp32 && by_panels) linear_by_panels<float>(*args);
  else if (args->dtype == kFp32) linear<Fp32Step>(*args);
  else linear<Bf16Step>(*args);
}

// int8 weights; `dtype` is that of x, bias and out, fp32 or bf16
extern "C" void nanovllm_linear_int8(const Linear* args) {
  const bool by_panels = args->num_tokens >= kPanelTokensInt8 && !args->ordered;
  if (args->dtype == kFp32 && by_panels) linear_by_panels<int8_t>(*args);
  else if (args->dtype == kFp32) linear<Int8Step<float>>(*args);
  else linear<Int8Step<Bf16>>(*args);
}

struct Widen {
  char* out;         // [O, D] bf16, contiguous
  const int8_t* in;  // [O, D]
  int64_t num_rows, size, in_stride;
  int64_t num_threads;
};

extern "C" void nanovllm_widen_int8(const Widen* args) {
  const Widen& at = *args;
  parallel_for(at.num_rows, at.num_rows * at.size < kMinParallel ? 1 : at.num_threads,
               [&](int64_t row) {
                 widen((Bf16*)at.out + row * at.size, at.in + row * at.in_stride, at.size);
               });
}
