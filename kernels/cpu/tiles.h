// Products of few rows of x with a matrix: out[t, o] = sum over d of x[t, d] weight[o, d]. They
// read every weight once, at the speed of memory. A result depends on its row of x and its row of
// weights alone, not on the number of rows. Needs vectors.h.

namespace {

// A step is the part of the depth that a tile multiplies at once. It defines how weights are loaded
// and multiplied by x. `Io` is the type of x, bias and out in memory, `X` the type that x is copied
// to; with kPairs the even elements of the copy come before the odd ones. One pass over the weights
// takes up to kMaxTokens tokens; if more passes are needed, each takes up to kPassTokens.

constexpr int kMaxTokens = 8;

// fp32: a step is one vector of the depth
struct Fp32Step {
  typedef float Weight;
  typedef float X;
  typedef float Io;
  static constexpr bool kPairs = false;
  static constexpr int kDepth = kLanes;
  static constexpr int kPassTokens = 4;  // Zen 4: 92 GFLOP/s a core, and 74 with passes of 8 tokens
  struct Value {
    Vec v;
  };
  static INLINE Value load_weight(const float* p) { return {load(p)}; }
  static INLINE Vec fma(Vec acc, const float* x, Value w) {
    return multiply_add(load(x), w.v, acc);
  }
};

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
struct Bf16Step {
  typedef Bf16 Weight;
  typedef Bf16 X;
  typedef Bf16 Io;
  static constexpr bool kPairs = false;
  static constexpr int kDepth = 32;
  static constexpr int kPassTokens = 8;
  struct Value {
    __m512bh v;
  };
  static INLINE Value load_weight(const Bf16* p) { return {(__m512bh)_mm512_loadu_si512(p)}; }
  static INLINE Vec fma(Vec acc, const Bf16* x, Value w) {
    return (Vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_loadu_si512(x), w.v);
  }
};
#else
// bf16: a step is one vector of pairs. A shift or a mask turns each half of a pair into an fp32
// number, so x is in fp32 with the even elements of each step before its odd ones.
struct Bf16Step {
  typedef Bf16 Weight;
  typedef float X;
  typedef Bf16 Io;
  static constexpr bool kPairs = true;
  static constexpr int kDepth = 2 * kLanes;
  static constexpr int kPassTokens = 8;
  struct Value {
    Vec even, odd;
  };
  static INLINE Value load_weight(const Bf16* p) {
    typedef uint32_t At __attribute__((vector_size(kLanes * 4), aligned(2), may_alias));
    UVec pairs = *(const At*)p;
    return {(Vec)(pairs << 16), (Vec)(pairs & 0xffff0000u)};
  }
  static INLINE Vec fma(Vec acc, const float* x, Value w) {
    return multiply_add(load(x + kLanes), w.odd, multiply_add(load(x), w.even, acc));
  }
};
#endif

// With few tokens a loop is mostly loads, and the hardware's prefetching is best. With more tokens
// it falls behind, and the rows of int8 and bf16 weights are so short that it hardly starts.
template <typename Weight>
constexpr int kPrefetchTokens = sizeof(Weight) < 4 ? 1 : 3;

// out[t, o] of TB tokens and OB outputs, with TB * OB accumulators in registers. Every weight is
// loaded once.
template <typename Step, int TB, int OB>
void skinny_tile(float* out, const typename Step::X* x, int64_t x_stride,
                 const typename Step::Weight* weight, int64_t weight_stride, int64_t depth,
                 int64_t prefetch) {
  typedef typename Step::Weight Weight;
  Vec acc[TB][OB] = {};
  int64_t d = 0;
  for (; d + Step::kDepth <= depth; d += Step::kDepth) {
    typename Step::Value w[OB];
    for (int o = 0; o < OB; ++o) {
      w[o] = Step::load_weight(weight + o * weight_stride + d);
      if (TB >= kPrefetchTokens<Weight> && d * sizeof(Weight) % 64 == 0)
        __builtin_prefetch((const char*)(weight + o * weight_stride + d) + prefetch, 0, 2);
    }
    for (int t = 0; t < TB; ++t)
      for (int o = 0; o < OB; ++o) acc[t][o] = Step::fma(acc[t][o], x + t * x_stride + d, w[o]);
  }
  if (d < depth) {
    for (int o = 0; o < OB; ++o) {
      Weight rest[Step::kDepth] = {};
      std::memcpy(rest, weight + o * weight_stride + d, (depth - d) * sizeof(Weight));
      typename Step::Value w = Step::load_weight(rest);
      for (int t = 0; t < TB; ++t) acc[t][o] = Step::fma(acc[t][o], x + t * x_stride + d, w);
    }
  }
  for (int t = 0; t < TB; ++t)
    for (int o = 0; o < OB; ++o) out[t * OB + o] = sum(acc[t][o]);
}

// outputs of a tile with num_tokens tokens: the most with all accumulators in registers
constexpr int tile_outputs(int num_tokens) {
  return kTileRows == 8 ? std::min(24 / num_tokens, 8) : std::clamp(12 / num_tokens, 1, 4);
}

// Rows of x, as steps read them, and rows of weights.
template <typename Step>
struct Product {
  const typename Step::X* x;
  int64_t x_stride;
  const typename Step::Weight* weight;
  int64_t weight_stride, depth;
};

// x_stride of rows with this depth: whole steps, and some more where the rows of a tile would else
// share few sets of the L1
template <typename Step>
constexpr int64_t row_stride(int64_t depth) {
  const int64_t size = (depth + Step::kDepth - 1) / Step::kDepth * Step::kDepth;
  return size * sizeof(typename Step::X) % 1024 ? size : size + 3 * Step::kDepth;
}

// where a step finds element d of a row of x
template <typename Step>
INLINE int64_t place(int64_t d) {
  const int64_t in_step = d % Step::kDepth;
  return Step::kPairs ? d - in_step + in_step / 2 + in_step % 2 * kLanes : d;
}

// copies a row of x to `to`, as steps read it; zeros fill the rest of the row
template <typename Step>
void copy_row(typename Step::X* to, const typename Step::Io* from, int64_t depth) {
  typedef typename Step::X X;
  const int64_t size = row_stride<Step>(depth);
  if constexpr (std::is_same_v<X, typename Step::Io>) {
    std::memcpy(to, from, depth * sizeof(X));
    std::memset((void*)(to + depth), 0, (size - depth) * sizeof(X));
  } else {
    std::memset((void*)to, 0, size * sizeof(X));
    for (int64_t d = 0; d < depth; ++d) to[place<Step>(d)] = to_float(from[d]);
  }
}

// Tokens token .. token + TB - 1 times outputs first .. end - 1. For each tile calls
// finish(sums, token, TB, o, num): sums[t * num + i] is the product of token + t and o + i.
template <typename Step, int TB, typename Finish>
void product_tiles(const Product<Step>& at, int64_t token, int64_t first, int64_t end,
                   const Finish& finish) {
  constexpr int OB = tile_outputs(TB);
  const typename Step::X* x = at.x + token * at.x_stride;
  const int64_t prefetch = OB * at.weight_stride * (int64_t)sizeof(*at.weight);
  float sums[TB * OB];
  int64_t o = first;
  for (; o + OB <= end; o += OB) {
    const typename Step::Weight* weight = at.weight + o * at.weight_stride;
    skinny_tile<Step, TB, OB>(sums, x, at.x_stride, weight, at.weight_stride, at.depth, prefetch);
    finish(sums, token, TB, o, OB);
  }
  for (; o < end; ++o) {
    skinny_tile<Step, TB, 1>(sums, x, at.x_stride, at.weight + o * at.weight_stride,
                             at.weight_stride, at.depth, 0);
    finish(sums, token, TB, o, 1);
  }
}

// the same for 1 to kMaxTokens tokens
template <typename Step, typename Finish, int TB = kMaxTokens>
void product(const Product<Step>& at, int64_t token, int64_t num_tokens, int64_t first, int64_t end,
             const Finish& finish) {
  if (num_tokens == TB) product_tiles<Step, TB>(at, token, first, end, finish);
  else if constexpr (TB > 1)
    product<Step, Finish, TB - 1>(at, token, num_tokens, first, end, finish);
}

// calls pass(token, number) for equal parts of num_tokens tokens; a second pass finds the weights
// in the cache
template <typename Step, typename Pass>
INLINE void for_passes(int64_t num_tokens, const Pass& pass) {
  const int64_t pass_tokens = num_tokens <= kMaxTokens ? kMaxTokens : Step::kPassTokens;
  const int64_t num_passes = (num_tokens + pass_tokens - 1) / pass_tokens;
  for (int64_t i = 0; i < num_passes; ++i) {
    const int64_t token = num_tokens * i / num_passes;
    pass(token, num_tokens * (i + 1) / num_passes - token);
  }
}

// outputs that a thread takes at once: a second pass finds their weights in its cache
inline int64_t chunk_outputs(int64_t row_bytes) {
  constexpr int64_t kChunkBytes = 128 << 10;
  return std::max<int64_t>(24, kChunkBytes / row_bytes / 24 * 24);
}

}  // namespace
