// The ops of a step's index arithmetic, compiled at first use by step.py. State and indices are
// int64, tables int32, all contiguous. The meaning of each op stands in reference/.

#include <algorithm>
#include <cstdint>
#include <cstring>

extern "C" {

struct DecodeInputs {
  int64_t *out_token, *out_pos, *out_slot;
  int32_t *out_table, *out_seq_len, *out_q_start;
  const int64_t *token, *pos, *rope_offset;
  const int32_t* table;
  const int64_t* row_idx;
  int64_t num_rows, num_blocks, block_size;
};

void nanovllm_decode_inputs(const void* bytes) {
  DecodeInputs a;
  std::memcpy(&a, bytes, sizeof a);
  for (int64_t row = 0; row < a.num_rows; ++row) {
    const int64_t state_row = a.row_idx[row], pos = a.pos[state_row];
    const int32_t* table = a.table + state_row * a.num_blocks;
    a.out_token[row] = a.token[state_row];
    a.out_pos[row] = pos + a.rope_offset[state_row];
    a.out_slot[row] = table[pos / a.block_size] * a.block_size + pos % a.block_size;
    std::memcpy(a.out_table + row * a.num_blocks, table, a.num_blocks * sizeof(int32_t));
    a.out_seq_len[row] = (int32_t)(pos + 1);
    a.out_q_start[row] = (int32_t)row;
  }
  a.out_q_start[a.num_rows] = (int32_t)a.num_rows;
}

struct SpanInputs {
  int64_t *out_token, *out_pos, *out_slot;
  int32_t *out_table, *out_seq_len, *out_q_start;
  int64_t *out_row, *out_num, *out_last;
  const int64_t *token, *pos, *rope_offset;
  const int32_t* table;
  const int64_t *row_idx, *num_tokens, *given, *draft;  // draft: null for none
  int64_t num_rows, num_blocks, num_tokens_all, pad_row, block_size, num_drafts, each;
};

void nanovllm_span_inputs(const void* bytes) {
  SpanInputs a;
  std::memcpy(&a, bytes, sizeof a);
  int64_t t = 0;
  a.out_q_start[0] = 0;
  for (int64_t row = 0; row < a.num_rows; ++row) {
    const int64_t state_row = a.row_idx[row], first = a.pos[state_row], num = a.num_tokens[row];
    const int32_t* table = a.table + state_row * a.num_blocks;
    const auto copy_table = [&](int64_t to) {
      std::memcpy(a.out_table + to * a.num_blocks, table, a.num_blocks * sizeof(int32_t));
    };
    if (!a.each) copy_table(row);
    for (int64_t i = 0; i < num; ++i, ++t) {
      if (a.each) {
        copy_table(t);
        a.out_seq_len[t] = (int32_t)(first + i + 1);
        a.out_q_start[t] = (int32_t)t;
      }
      const int64_t pos = first + i;
      a.out_token[t] = a.given[t] < 0 ? a.token[state_row] : a.given[t];
      if (a.draft && a.given[t] == -2)  // DRAFT
        a.out_token[t] = a.draft[state_row * a.num_drafts +
                                 std::clamp<int64_t>(i - 1, 0, a.num_drafts - 1)];
      a.out_pos[t] = pos + a.rope_offset[state_row];
      a.out_slot[t] = table[pos / a.block_size] * a.block_size + pos % a.block_size;
      a.out_row[t] = state_row;
      a.out_num[t] = i + 1;
    }
    if (!a.each) {
      a.out_seq_len[row] = (int32_t)(num > 0 ? first + num : 0);
      a.out_q_start[row + 1] = (int32_t)t;
    }
    a.out_last[row] = t > 0 ? t - 1 : 0;
  }
  for (; t < a.num_tokens_all; ++t) {
    a.out_token[t] = a.given[t] < 0 ? a.token[a.pad_row] : a.given[t];
    a.out_pos[t] = a.pos[a.pad_row] + a.rope_offset[a.pad_row];
    a.out_slot[t] = t % a.block_size;
    a.out_row[t] = a.pad_row;
    a.out_num[t] = 1;
    if (!a.each) continue;
    std::memcpy(a.out_table + t * a.num_blocks, a.table + a.pad_row * a.num_blocks,
                a.num_blocks * sizeof(int32_t));
    a.out_seq_len[t] = (int32_t)(a.pos[a.pad_row] + 1);
    a.out_q_start[t] = (int32_t)t;
  }
  if (a.each) a.out_q_start[t] = (int32_t)t;
}

struct SamplingInputs {
  float* out_temperature;
  int64_t *out_seed, *out_pos;
  const int64_t* pos;
  const float* sampling;
  const int64_t *seed, *row_idx, *num;  // num: null for one token a row
  int64_t num_rows, num_fields;
};

void nanovllm_sampling_inputs(const void* bytes) {
  SamplingInputs a;
  std::memcpy(&a, bytes, sizeof a);
  for (int64_t row = 0; row < a.num_rows; ++row) {
    const int64_t state_row = a.row_idx[row];
    a.out_temperature[row] = a.sampling[state_row * a.num_fields];
    a.out_seed[row] = a.seed[state_row];
    a.out_pos[row] = a.pos[state_row] + (a.num ? a.num[row] : 1);
  }
}

struct Advance {
  int64_t *token, *pos;
  const int64_t *row_idx, *new_token, *num;  // num: null for one token a row
  int64_t num_rows, pad_row;
};

void nanovllm_advance(const void* bytes) {
  Advance a;
  std::memcpy(&a, bytes, sizeof a);
  for (int64_t row = 0; row < a.num_rows; ++row) {
    const int64_t state_row = a.row_idx[row];
    const bool is_real = state_row != a.pad_row;
    a.token[state_row] = is_real ? std::max<int64_t>(a.new_token[row], 0) : 0;  // -1: NO_TOKEN
    a.pos[state_row] = is_real ? a.pos[state_row] + (a.num ? a.num[row] : 1) : 0;
  }
}

struct Accept {
  int64_t *out, *count, *token, *pos;
  const int64_t *fed, *chosen, *num_tokens, *row_idx, *seed;  // seed: null for the model's choices
  int64_t num_rows, num_tokens_all, pad_row, num, rate;
};

static int64_t random_bits(int64_t pos, int64_t seed) {
  const int64_t mask = 0x7FFFFFFF;
  int64_t x = (pos * 40503 + (seed % 65521 + 65521) % 65521) & mask;
  x = ((x ^ (x >> 15)) * 0x2C1B3C6D) & mask;
  x = ((x ^ (x >> 12)) * 0x297A2D39) & mask;
  return x ^ (x >> 15);
}

void nanovllm_accept(const void* bytes) {
  Accept a;
  std::memcpy(&a, bytes, sizeof a);
  int64_t start = 0;
  for (int64_t row = 0; row < a.num_rows; ++row) {
    const int64_t state_row = a.row_idx[row], num = std::min(a.num_tokens[row], a.num);
    int64_t* out = a.out + row * a.num;
    for (int64_t k = 0; k < a.num; ++k) {
      out[k] = a.chosen[std::min(start + k, a.num_tokens_all - 1)];
      if (!a.seed || k + 1 >= num) continue;
      const int64_t next = a.fed[start + k + 1];
      const bool is_kept = random_bits(a.pos[state_row] + k + 1, a.seed[state_row]) < a.rate;
      out[k] = is_kept ? next : next == 0 ? 1 : next - 1;
    }
    int64_t count = 1;
    while (count < num && a.fed[start + count] == out[count - 1]) ++count;
    start += a.num_tokens[row];
    const bool is_real = state_row != a.pad_row;
    a.count[row] = count;
    a.token[state_row] = is_real ? std::max<int64_t>(out[count - 1], 0) : 0;  // -1: NO_TOKEN
    a.pos[state_row] = is_real ? a.pos[state_row] + count : 0;
  }
}

struct NextTokens {
  int64_t *out, *last;
  const int64_t *token, *pos, *row_idx, *fed;
  const int32_t *seq_len, *q_start;
  int64_t num_rows, num_tokens_all, pad_row;
};

void nanovllm_next_tokens(const void* bytes) {
  NextTokens a;
  std::memcpy(&a, bytes, sizeof a);
  const int64_t num = a.num_tokens_all;
  for (int64_t t = 0; t < num; ++t) a.out[t] = a.fed[t + 1 < num ? t + 1 : 0];
  for (int64_t row = 0; row < a.num_rows; ++row) {
    const int64_t state_row = a.row_idx[row], first = a.q_start[row];
    const int64_t before = a.seq_len[row] - (a.q_start[row + 1] - first);
    a.last[row] = std::clamp<int64_t>(first + a.pos[state_row] - before - 1, 0, num - 1);
    if (state_row != a.pad_row) a.out[a.last[row]] = a.token[state_row];
  }
}

struct DraftInputs {
  int64_t *out_token, *out_pos, *out_slot;
  int32_t *out_table, *out_seq_len, *out_q_start;
  int64_t *out_row, *out_ahead;
  const int64_t *token, *pos, *rope_offset;
  const int32_t* table;
  const int64_t* row_idx;
  int64_t num_rows, num_blocks, num, shift, mask_id, block_size, last_pos;
};

void nanovllm_draft_inputs(const void* bytes) {
  DraftInputs a;
  std::memcpy(&a, bytes, sizeof a);
  for (int64_t row = 0, x = 0; row < a.num_rows; ++row) {
    const int64_t state_row = a.row_idx[row], first = a.pos[state_row] + a.shift;
    const int32_t* table = a.table + state_row * a.num_blocks;
    for (int64_t ahead = 0; ahead < a.num; ++ahead, ++x) {
      const int64_t pos = std::clamp<int64_t>(first + ahead, 0, a.last_pos);
      a.out_token[x] = ahead == 0 ? a.token[state_row] : a.mask_id;
      a.out_pos[x] = pos + a.rope_offset[state_row];
      a.out_slot[x] = table[pos / a.block_size] * a.block_size + pos % a.block_size;
      std::memcpy(a.out_table + x * a.num_blocks, table, a.num_blocks * sizeof(int32_t));
      a.out_seq_len[x] = (int32_t)(std::clamp<int64_t>(first + a.num - 1, 0, a.last_pos) + 1);
      a.out_q_start[x] = (int32_t)x;
      a.out_row[x] = state_row;
      a.out_ahead[x] = ahead;
    }
  }
  a.out_q_start[a.num_rows * a.num] = (int32_t)(a.num_rows * a.num);
}

struct NgramPropose {
  int32_t* history;
  int64_t* draft;
  const int64_t *token, *pos, *row_idx;
  const int32_t* past;
  int64_t num_rows, num_positions, num, min_n, max_n, num_past;
};

void nanovllm_ngram_propose(const void* bytes) {
  NgramPropose a;
  std::memcpy(&a, bytes, sizeof a);
  for (int64_t row = 0; row < a.num_rows; ++row) {
    const int64_t state_row = a.row_idx[row], pos = a.pos[state_row];
    int32_t* history = a.history + state_row * a.num_positions;
    int64_t* draft = a.draft + state_row * a.num;
    std::fill(draft, draft + a.num, 0);
    if (pos >= a.num_positions) continue;
    const int32_t newest = (int32_t)a.token[state_row];
    history[pos] = newest;
    int64_t longest = 0, start = 0;
    for (int64_t end = 0; end < pos && longest < a.max_n; ++end) {
      if (history[end] != newest) continue;
      int64_t length = 1;
      while (length < a.max_n && length <= end && history[end - length] == history[pos - length])
        ++length;
      if (length > longest) longest = length, start = end + 1;
    }
    if (longest < a.min_n) longest = 0;
    int64_t from = -1;  // after an occurrence in the past, if it is longer
    for (int64_t end = 0; end < a.num_past && longest < a.max_n; ++end) {
      if (a.past[end] != newest) continue;
      int64_t length = 1;
      while (length < a.max_n && length <= end && length <= pos &&
             a.past[end - length] == history[pos - length])
        ++length;
      if (length > longest && length >= a.min_n) longest = length, from = end + 1;
    }
    if (from >= 0)
      for (int64_t k = 0; k < a.num && from + k < a.num_past && a.past[from + k] >= 0; ++k)
        draft[k] = a.past[from + k];
    else if (longest)
      for (int64_t k = 0; k < a.num; ++k) draft[k] = history[start + k % (pos + 1 - start)];
    for (int64_t k = 0; k < a.num && pos + 1 + k < a.num_positions; ++k)
      history[pos + 1 + k] = (int32_t)draft[k];
  }
}

// Row i goes from row from[i] of x to row to[i] of out; null: row i.
struct CopyRows {
  char* out;
  const char* x;
  const int64_t *to, *from;
  int64_t num, num_bytes, to_step, from_step, num_to, num_from;
};

// Returns 0 for a row that is not there.
int64_t nanovllm_copy_rows(const void* bytes) {
  CopyRows a;
  std::memcpy(&a, bytes, sizeof a);
  for (int64_t i = 0; i < a.num; ++i) {
    const int64_t to = a.to ? a.to[i] : i, from = a.from ? a.from[i] : i;
    if (to < 0 || to >= a.num_to || from < 0 || from >= a.num_from) return 0;
    std::memmove(a.out + to * a.to_step, a.x + from * a.from_step, a.num_bytes);
  }
  return 1;
}
}
