// Kernels for layers with experts, compiled at first use by experts.py. kernels.cpp describes how
// arguments are passed, and reference/ has the meaning of each op.
//
// T tokens | K experts per token | P = T * K pairs of a token and one of its experts | E experts
// D hidden | F expert width | O outputs
//
// A sum never depends on the other tokens of a call.

#include "vectors.h"
#include "tiles.h"
#include "groups.h"

namespace {

struct TopkSoftmax {
  float* weight;       // [T, K]
  int32_t* expert;     // [T, K]
  const char* logits;  // [T, E]
  int64_t num_tokens, num_experts, top_k, normalize, logits_stride;
  int64_t dtype, num_threads;
};

struct Experts {
  char* out;              // [T, D]
  const char* x;          // [T, D]
  const float* weight;    // [T, K]
  const int32_t* expert;  // [T, K]; negative for experts that are elsewhere, if any may be
  const char* gate_up;    // [E, 2F, D]
  const char* down;       // [E, D, F]
  const char* residual;   // [T, D] or null
  int64_t num_tokens, num_chosen, num_experts, size, inner_size, is_expert_parallel;
  int64_t dtype, num_threads;
};

struct ExpertLinear {
  char* out;              // [T, K, O]
  const char* x;          // [P / x_repeats, D]: row p / x_repeats belongs to pair p
  const int32_t* expert;  // [T, K]
  const char* weight;     // [E, O, D]
  int64_t num_pairs, x_repeats, num_experts, num_outputs, depth;
  int64_t dtype, num_threads;
};

// ------------------------------------------------------------------------------------------- topk_softmax

template <typename T>
void topk_softmax_token(const TopkSoftmax& at, int64_t token) {
  const int64_t E = at.num_experts, K = at.top_k;
  const T* logits = (const T*)at.logits + token * at.logits_stride;
  float* weight = at.weight + token * K;
  int32_t* expert = at.expert + token * K;
  float largest = -INFINITY;
  for (int64_t e = 0; e < E; ++e) largest = std::max(largest, to_float(logits[e]));
  // If a logit is NaN or the largest is infinite, all probabilities are NaN. None is larger than
  // another then, so the first K experts are chosen.
  float* prob = scratch((size_t)E);
  float total = 0.0f;
  for (int64_t e = 0; e < E; ++e) total += prob[e] = std::exp(to_float(logits[e]) - largest);
  // `weight` and `expert` hold the best so far, in order; an equal one with a larger id comes later
  for (int64_t e = 0; e < E; ++e) {
    const float candidate = prob[e] / total;
    if (e >= K && !(candidate > weight[K - 1])) continue;
    int64_t k = std::min(e, K - 1);
    for (; k > 0 && candidate > weight[k - 1]; --k)
      weight[k] = weight[k - 1], expert[k] = expert[k - 1];
    weight[k] = candidate, expert[k] = (int32_t)e;
  }
  if (!at.normalize) return;
  float sum = 0.0f;
  for (int64_t k = 0; k < K; ++k) sum += weight[k];
  for (int64_t k = 0; k < K; ++k) weight[k] /= sum;
}

// Copies the rows of all pairs to `to`, in the order of places; row p / repeats belongs to pair p.
template <typename Step>
void copy_pairs(typename Step::X* to, const Groups& groups, const typename Step::Io* x,
                int64_t repeats, int64_t depth, int64_t num_threads) {
  const int64_t num_pairs = (int64_t)groups.pair.size(), stride = row_stride<Step>(depth);
  parallel_for(num_pairs, num_pairs * depth < kMinParallel ? 1 : num_threads, [&](int64_t place) {
    copy_row<Step>(to + place * stride, x + groups.pair[place] / repeats * depth, depth);
  });
}

// ---------------------------------------------------------------------------------------- products

// The sums of a tile go to out[token, o]; `first_token` and `first_output` are at out's start.
struct PutSums {
  float* out;
  int64_t stride, first_token, first_output;

  INLINE void operator()(const float* sums, int64_t token, int num_tokens, int64_t o, int n) const {
    for (int t = 0; t < num_tokens; ++t)
      for (int i = 0; i < n; ++i)
        out[(token - first_token + t) * stride + o - first_output + i] = sums[t * n + i];
  }
};

// Writes silu(gate) * up of `num` tokens and a part of the outputs, as steps of the next product
// read them. gate and up are [token, row_size], the results are [token, stride].
template <typename Step>
void put_inner(typename Step::X* to, int64_t stride, const float* gate, const float* up,
               int64_t row_size, const Part& part, int64_t num) {
  typedef typename Step::Io Io;
  for (int64_t t = 0; t < num; ++t, to += stride, gate += row_size, up += row_size)
    for (int64_t f = part.first; f < part.end; f += kLanes) {
      const int64_t i = f - part.first, n = std::min<int64_t>(part.end - f, kLanes);
      const Vec rounded = silu<Io>(rounded_to<Io>(load(gate + i))) * rounded_to<Io>(load(up + i));
      if constexpr (Step::kPairs) {
        const Vec product = rounded_to<Io>(rounded);
        for (int64_t lane = 0; lane < n; ++lane) to[place<Step>(f + lane)] = product[lane];
      } else {
        store_first(to + f, rounded, n);
      }
    }
}

// inner = silu(gate) * up for all pairs, in the order of places
template <typename Step>
void multiply_gate_up(const Experts& at, const Groups& groups, const typename Step::X* x,
                      typename Step::X* inner, int64_t num_threads) {
  typedef typename Step::Weight Weight;
  const int64_t D = at.size, F = at.inner_size;
  const int64_t x_stride = row_stride<Step>(D), stride = row_stride<Step>(F);
  const int64_t chunk = chunk_outputs(2 * D * (int64_t)sizeof(Weight));  // of gate, and of up
  const int64_t row_size = (chunk + kLanes - 1) / kLanes * kLanes;
  for_parts(groups, F, chunk, num_threads, [&](const Part& part) {
    float *gate = scratch((size_t)(2 * kMaxTokens * row_size)), *up = gate + kMaxTokens * row_size;
    const Weight* weight = (const Weight*)at.gate_up + part.group->expert * 2 * F * D;
    const typename Step::X* rows = x + part.group->first * x_stride;
    const Product<Step> gates{rows, x_stride, weight, D, D};
    const Product<Step> ups{rows, x_stride, weight + F * D, D, D};
    for_passes<Step>(part.group->num, [&](int64_t token, int64_t num) {
      product(gates, token, num, part.first, part.end, PutSums{gate, row_size, token, part.first});
      product(ups, token, num, part.first, part.end, PutSums{up, row_size, token, part.first});
      typename Step::X* to = inner + (part.group->first + token) * stride;
      put_inner<Step>(to, stride, gate, up, row_size, part, num);
      if (part.end == F)
        for (int64_t t = 0; t < num; ++t)
          for (int64_t f = F; f < stride; ++f) to[t * stride + place<Step>(f)] = {};
    });
  });
}

// out = residual + the sums over k of weight * (inner times down), for some columns of some tokens.
// The products y are [place, column].
template <typename T>
void add_chosen(const Experts& at, const Groups& groups, const float* y, int64_t y_stride,
                int64_t first_token, int64_t first, int64_t end) {
  const int64_t K = at.num_chosen, num_tokens = (int64_t)groups.place_of.size() / K;
  for (int64_t t = 0; t < num_tokens; ++t) {
    const float* weight = at.weight + (first_token + t) * K;
    const int32_t* place = groups.place_of.data() + t * K;
    const int64_t row = (first_token + t) * at.size;
    for (int64_t d = first; d < end; d += kLanes) {
      Vec sum{};
      for (int64_t k = 0; k < K; ++k)
        if (place[k] >= 0)
          sum = multiply_add(splat(weight[k]), load(y + place[k] * y_stride + d - first), sum);
      if (at.residual)
        sum = rounded_to<T>(sum) + load_first((const T*)at.residual + row + d, end - d);
      store_first((T*)at.out + row + d, sum, end - d);
    }
  }
}

// Columns of the result that a thread takes at once, for all experts, and fewer if threads would be
// idle. Tiles have 8, 6, 4 or 3 outputs.
constexpr int64_t kColumns = 48, kFewColumns = 16;

template <typename Step>
void multiply_down(const Experts& at, const Groups& groups, const typename Step::X* inner,
                   int64_t first_token, int64_t num_threads) {
  typedef typename Step::Weight Weight;
  const int64_t D = at.size, F = at.inner_size, stride = row_stride<Step>(F);
  const int64_t columns = D / kColumns < 8 * num_threads ? kFewColumns : kColumns;
  parallel_for((D + columns - 1) / columns, num_threads, [&](int64_t item) {
    const int64_t first = item * columns, end = std::min(first + columns, D);
    float* y = scratch(groups.pair.size() * columns);
    for (const Groups::Group& group : groups.groups) {
      const Weight* weight = (const Weight*)at.down + group.expert * D * F;
      const Product<Step> down{inner + group.first * stride, stride, weight, F, F};
      const PutSums put_sums{y + group.first * columns, columns, 0, first};
      for_passes<Step>(group.num, [&](int64_t token, int64_t num) {
        product(down, token, num, first, end, put_sums);
      });
    }
    add_chosen<typename Step::Io>(at, groups, y, columns, first_token, first, end);
  });
}

template <typename Step>
void experts(const Experts& at) {
  typedef typename Step::X X;
  typedef typename Step::Io Io;
  const int64_t D = at.size, F = at.inner_size, K = at.num_chosen;
  for_blocks(at.num_tokens, K, D + F, [&](int64_t first, int64_t num) {
    const Groups groups(at.expert + first * K, num * K, at.num_experts);
    const int64_t num_threads = num * K * D * F < kMinParallel ? 1 : at.num_threads;
    const int64_t x_size = num * K * row_stride<Step>(D),
                  inner_size = num * K * row_stride<Step>(F);
    X* x = (X*)scratch<kShared>((size_t)(x_size + inner_size) * sizeof(X) / sizeof(float));
    copy_pairs<Step>(x, groups, (const Io*)at.x + first * D, K, D, num_threads);
    multiply_gate_up<Step>(at, groups, x, x + x_size, num_threads);
    multiply_down<Step>(at, groups, x + x_size, first, num_threads);
  });
}

template <typename Step>
void expert_linear(const ExpertLinear& at) {
  typedef typename Step::X X;
  typedef typename Step::Io Io;
  typedef typename Step::Weight Weight;
  const int64_t D = at.depth, O = at.num_outputs, repeats = at.x_repeats;
  const int64_t stride = row_stride<Step>(D);
  const int64_t chunk = chunk_outputs(D * (int64_t)sizeof(Weight));
  for_blocks(at.num_pairs / repeats, repeats, D, [&](int64_t first, int64_t num) {
    const int64_t first_pair = first * repeats, num_pairs = num * repeats;
    const Groups groups(at.expert + first_pair, num_pairs, at.num_experts);
    const int64_t num_threads = num_pairs * D * O < kMinParallel ? 1 : at.num_threads;
    X* x = (X*)scratch<kShared>((size_t)(num_pairs * stride) * sizeof(X) / sizeof(float));
    copy_pairs<Step>(x, groups, (const Io*)at.x + first * D, repeats, D, num_threads);
    for_parts(groups, O, chunk, num_threads, [&](const Part& part) {
      const Groups::Group& group = *part.group;
      const Weight* weight = (const Weight*)at.weight + group.expert * O * D;
      const auto finish = [&](const float* sums, int64_t token, int num_tokens, int64_t o, int n) {
        for (int t = 0; t < num_tokens; ++t) {
          const int64_t pair = first_pair + groups.pair[group.first + token + t];
          for (int i = 0; i < n; ++i) put((Io*)at.out + pair * O + o + i, sums[t * n + i]);
        }
      };
      const Product<Step> rows{x + group.first * stride, stride, weight, D, D};
      for_passes<Step>(group.num, [&](int64_t token, int64_t num_tokens) {
        product(rows, token, num_tokens, part.first, part.end, finish);
      });
    });
  });
}

}  // namespace

extern "C" void nanovllm_topk_softmax(const TopkSoftmax* args) {
  with_dtype(args->dtype, [&](auto zero) {
    const int64_t num_logits = args->num_tokens * args->num_experts;
    parallel_for(args->num_tokens, num_logits < kMinParallel ? 1 : args->num_threads,
                 [&](int64_t token) { topk_softmax_token<decltype(zero)>(*args, token); });
  });
}

// The next two return 0, and do nothing, if an expert's id is not below num_experts.
extern "C" int64_t nanovllm_experts(const Experts* args) {
  const int64_t num_pairs = args->num_tokens * args->num_chosen;
  if (!are_valid(args->expert, num_pairs, args->is_expert_parallel ? -1 : 0, args->num_experts)) return 0;
  if (args->dtype == kFp32) experts<Fp32Step>(*args);
  else experts<Bf16Step>(*args);
  return 1;
}

extern "C" int64_t nanovllm_expert_linear(const ExpertLinear* args) {
  if (!are_valid(args->expert, args->num_pairs, 0, args->num_experts)) return 0;
  if (args->dtype == kFp32) expert_linear<Fp32Step>(*args);
  else expert_linear<Bf16Step>(*args);
  return 1;
}
