// Masks of tokens, and drawing tokens. Needs vectors.h and threads.h.

namespace {

struct TokenBitmask {
  void* out;
  const void* logits;
  const int32_t* allowed;
  const int64_t* row;
  int64_t num_rows, vocab_size, row_stride, num_words, dtype, num_threads;
};

// Most rows of a batch allow every token and most words of a mask forbid all or allow all, so words
// and not tokens are the unit of work.
template <typename T>
void keep_row(T* out, const T* logits, const int32_t* allowed, int64_t vocab_size, T minus_inf) {
  for (int64_t first = 0; first < vocab_size; first += 32) {
    const uint32_t word = (uint32_t)allowed[first / 32];
    const int64_t num = std::min<int64_t>(32, vocab_size - first);
    if (word == 0xFFFFFFFFu) {
      std::memcpy(out + first, logits + first, num * sizeof(T));
    } else if (word == 0) {
      std::fill_n(out + first, num, minus_inf);
    } else {
      for (int64_t bit = 0; bit < num; ++bit)
        out[first + bit] = word >> bit & 1 ? logits[first + bit] : minus_inf;
    }
  }
}

}  // namespace

extern "C" void nanovllm_apply_token_bitmask(const TokenBitmask* args) {
  const TokenBitmask& at = *args;
  const int64_t V = at.vocab_size;
  parallel_for(at.num_rows, at.num_rows * V < kMinParallel ? 1 : at.num_threads, [&](int64_t r) {
    const int32_t* allowed = at.allowed + at.row[r] * at.num_words;
    if (at.dtype == 0) {
      keep_row<float>((float*)at.out + r * V, (const float*)at.logits + r * at.row_stride, allowed,
                      V, -INFINITY);
    } else {  // bit patterns of -inf in bf16 and in fp16
      keep_row<uint16_t>((uint16_t*)at.out + r * V, (const uint16_t*)at.logits + r * at.row_stride,
                         allowed, V, at.dtype == 1 ? 0xFF80 : 0xFC00);
    }
  });
}

// The hash of reference/ in 32-bit arithmetic, which wraps where the reference masks bits.
namespace {

template <typename U>
INLINE U keyed_hash32(U x, uint32_t key) {
  x = ((x ^ (x >> 16)) * 0x21F0AAADu) ^ key;
  x = (x ^ (x >> 15)) * 0x735A2D97u;
  return x ^ (x >> 15);
}

INLINE uint32_t hash32(uint32_t x) { return keyed_hash32(x, 0); }

struct Sample {
  const void* logits;
  const float* temperature;
  const int64_t *seed, *pos;
  int64_t* token;
  float* best;              // written unless it is null
  const int64_t* token_of;  // [V]: the tokens of the columns, ascending; null: from first_token on
  int64_t num_rows, vocab_size, row_stride, first_token, dtype, num_threads;

  int64_t token_at(int64_t column) const {
    return token_of ? token_of[column] : first_token + column;
  }
};

struct Best {
  float score = -INFINITY;
  int64_t token = -1;  // NO_TOKEN of reference/: no score above -inf, as in a row of NaN
};

// The smallest of equally likely tokens wins, so chunks are searched and merged in ascending order
// with >.
template <typename T>
Best best_of(const Sample& at, int64_t row, int64_t begin, int64_t end, uint32_t key,
             uint32_t second) {
  Best best;
  const T* logits = (const T*)at.logits + row * at.row_stride;
  const float temperature = at.temperature[row];
  const bool greedy = temperature == 0.0f;
  for (int64_t v = begin; v < end; v += kLanes) {
    alignas(64) float score[kLanes];
    alignas(64) uint32_t bits[kLanes];
    Vec scaled = load_first(logits + v, end - v);
    IVec possible;
    if (greedy) {
      possible = scaled > best.score;
    } else {
      scaled = scaled / temperature;
      UVec token;
      if (at.token_of)
        for (int lane = 0; lane < kLanes; ++lane)
          token[lane] = (uint32_t)at.token_of[std::min(v + lane, end - 1)];
      else
        for (int lane = 0; lane < kLanes; ++lane)
          token[lane] = (uint32_t)(at.first_token + v + lane);
      UVec mantissa = keyed_hash32(token ^ key, second) >> 9;
      // Noise above d needs 1 - u < exp(-d) <= 2^-floor(d / ln 2). This integer test avoids nearly
      // all logarithms.
      Vec doublings = (splat(best.score) - scaled) * 1.442695f;
      doublings = doublings > 0.0f ? doublings : splat(0.0f);
      doublings = doublings < 23.0f ? doublings : splat(23.0f);
      UVec room = (UVec{} + (1u << 23)) >> __builtin_convertvector(doublings, UVec);
      possible = (IVec)((0x7FFFFFu - mantissa) <= room);
      std::memcpy(bits, &mantissa, sizeof bits);
    }
    bool any = false;
    for (int lane = 0; lane < kLanes; ++lane) any |= possible[lane] != 0;
    if (!any) continue;
    std::memcpy(score, &scaled, sizeof score);
    for (int64_t lane = 0; lane < std::min<int64_t>(kLanes, end - v); ++lane) {
      float noisy = score[lane];
      if (!greedy) noisy -= std::log(-std::log(((float)bits[lane] + 0.5f) * 0x1p-23f));
      if (noisy > best.score) best = {noisy, at.token_at(v + lane)};
    }
  }
  return best;
}

}  // namespace

extern "C" void nanovllm_sample(const Sample* args) {
  const Sample& at = *args;
  constexpr int64_t kChunk = 8192;
  // a rank without tokens has one empty chunk
  const int64_t num_chunks = std::max<int64_t>(1, (at.vocab_size + kChunk - 1) / kChunk),
                num_tasks = at.num_rows * num_chunks;
  std::vector<Best> best(num_tasks);
  with_dtype(at.dtype, [&](auto zero) {
    typedef decltype(zero) T;
    parallel_for(num_tasks, at.num_rows * at.vocab_size < kMinParallel ? 1 : at.num_threads,
                 [&](int64_t task) {
                   const int64_t row = task / num_chunks, begin = task % num_chunks * kChunk;
                   const uint64_t seed = (uint64_t)at.seed[row];
                   const uint32_t low = hash32((uint32_t)seed),
                                  high = hash32((uint32_t)(seed >> 32));
                   const uint32_t key = hash32(low ^ hash32(high ^ hash32((uint32_t)at.pos[row])));
                   best[task] = best_of<T>(at, row, begin, std::min(begin + kChunk, at.vocab_size),
                                           key, hash32(key ^ 0x5BD1E995u));
                 });
  });
  for (int64_t row = 0; row < at.num_rows; ++row) {
    Best winner = best[row * num_chunks];
    for (int64_t chunk = 1; chunk < num_chunks; ++chunk)
      if (best[row * num_chunks + chunk].score > winner.score)
        winner = best[row * num_chunks + chunk];
    at.token[row] = winner.token;
    if (at.best) at.best[row] = winner.score;
  }
}
