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
  const int64_t *row_idx, *num_tokens, *given;
  int64_t num_rows, num_blocks, num_tokens_all, pad_row, block_size;
};

void nanovllm_span_inputs(const void* bytes) {
  SpanInputs a;
  std::memcpy(&a, bytes, sizeof a);
  int64_t t = 0;
  a.out_q_start[0] = 0;
  for (int64_t row = 0; row < a.num_rows; ++row) {
    const int64_t state_row = a.row_idx[row], first = a.pos[state_row], num = a.num_tokens[row];
    const int32_t* table = a.table + state_row * a.num_blocks;
    std::memcpy(a.out_table + row * a.num_blocks, table, a.num_blocks * sizeof(int32_t));
    for (int64_t i = 0; i < num; ++i, ++t) {
      const int64_t pos = first + i;
      a.out_token[t] = a.given[t] < 0 ? a.token[state_row] : a.given[t];
      a.out_pos[t] = pos + a.rope_offset[state_row];
      a.out_slot[t] = table[pos / a.block_size] * a.block_size + pos % a.block_size;
      a.out_row[t] = state_row;
      a.out_num[t] = i + 1;
    }
    a.out_seq_len[row] = (int32_t)(num > 0 ? first + num : 0);
    a.out_q_start[row + 1] = (int32_t)t;
    a.out_last[row] = t > 0 ? t - 1 : 0;
  }
  for (; t < a.num_tokens_all; ++t) {
    a.out_token[t] = a.given[t] < 0 ? a.token[a.pad_row] : a.given[t];
    a.out_pos[t] = a.pos[a.pad_row] + a.rope_offset[a.pad_row];
    a.out_slot[t] = t % a.block_size;
    a.out_row[t] = a.pad_row;
    a.out_num[t] = 1;
  }
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
}
