// The ops of step.py, compiled at first use by cpu_step.py. State and indices are int64, tables int32, all contiguous.

#include <cstdint>
#include <cstring>

extern "C" {

struct DecodeInputs {
  int64_t *out_token, *out_pos, *out_slot;
  int32_t *out_table, *out_seq_len, *out_q_start;
  const int64_t *token, *pos;
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
    a.out_pos[row] = pos;
    a.out_slot[row] = table[pos / a.block_size] * a.block_size + pos % a.block_size;
    std::memcpy(a.out_table + row * a.num_blocks, table, a.num_blocks * sizeof(int32_t));
    a.out_seq_len[row] = (int32_t)(pos + 1);
    a.out_q_start[row] = (int32_t)row;
  }
  a.out_q_start[a.num_rows] = (int32_t)a.num_rows;
}

struct SamplingInputs {
  float* out_temperature;
  int64_t *out_seed, *out_pos;
  const int64_t* pos;
  const float* sampling;
  const int64_t *seed, *row_idx;
  int64_t num_rows, num_fields;
};

void nanovllm_sampling_inputs(const void* bytes) {
  SamplingInputs a;
  std::memcpy(&a, bytes, sizeof a);
  for (int64_t row = 0; row < a.num_rows; ++row) {
    const int64_t state_row = a.row_idx[row];
    a.out_temperature[row] = a.sampling[state_row * a.num_fields];
    a.out_seed[row] = a.seed[state_row];
    a.out_pos[row] = a.pos[state_row] + 1;
  }
}

struct Advance {
  int64_t *token, *pos;
  const int64_t *row_idx, *new_token;
  int64_t num_rows, pad_row;
};

void nanovllm_advance(const void* bytes) {
  Advance a;
  std::memcpy(&a, bytes, sizeof a);
  for (int64_t row = 0; row < a.num_rows; ++row) {
    const int64_t state_row = a.row_idx[row];
    const bool is_real = state_row != a.pad_row;
    a.token[state_row] = is_real ? a.new_token[row] : 0;
    a.pos[state_row] = is_real ? a.pos[state_row] + 1 : 0;
  }
}
}
