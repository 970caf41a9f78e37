// The arguments of products of packed weights, and how their rows are read and results are written.
// Needs vectors.h.
//
// T tokens | K experts per token | P = T * K pairs | E experts | O outputs | D depth
// G groups of columns | C bytes of codes in a row

namespace {

constexpr int64_t kPrefetchBytes = 8 << 10;  // so far ahead that memory answers in time

struct Packed {
  char* out;              // [T, K, O]; for nanovllm_widen_packed [O, x_stride] in bf16
  const char* x;          // row p / x_repeats, `x_stride` apart, belongs to pair p
  const int32_t* expert;  // [T, K]; null: one expert
  const char* code;       // [E, O, C]
  const char* scale;      // [E, O, G]; of fp8 [E, O / block_rows, G]
  const char* offset;     // [E, O, G] or null
  const float* table;     // 2^bits levels or null
  const char* bias;       // [O] or null
  const char* residual;   // [T, O] or null
  int64_t num_pairs, x_repeats, num_experts, num_outputs, depth, x_stride;
  int64_t code_stride_E, code_stride, scale_stride_E, scale_stride, offset_stride_E, offset_stride;
  int64_t num_groups, group, block_rows, bits, is_fp8, exact;
  int64_t scale_dtype, offset_dtype, dtype, num_threads;
  int64_t ordered;  // a row's sums are the same among any number of rows
  int64_t interleaved;  // rows of weights are as interleaved_rows.h describes
};

template <typename F>
INLINE void with_io(int64_t dtype, F&& f) {
  if (dtype == kFp32) f(float{});
  else f(Bf16{});
}

INLINE int64_t bytes_of(int64_t dtype) { return dtype == kFp32 ? 4 : 2; }

inline void to_floats(float* out, const char* in, int64_t dtype, int64_t n) {
#if LANES == 16 && defined(__AVX512BW__) && defined(__AVX512VL__)
  if (dtype == kFp16) {
    for (int64_t i = 0; i < n; i += kLanes) {
      const __mmask16 some = n - i >= kLanes ? 0xffff : (__mmask16)((1u << (n - i)) - 1);
      const __m256i halves = _mm256_maskz_loadu_epi16(some, (const uint16_t*)in + i);
      _mm512_mask_storeu_ps(out + i, some, _mm512_cvtph_ps(halves));
    }
    return;
  }
#endif
  with_dtype(dtype, [&](auto zero) {
    typedef decltype(zero) T;
    const T* from = (const T*)in;
    if (n < kLanes) return store_first(out, load_first(from, n), n);
    for (int64_t i = 0; i + kLanes <= n; i += kLanes) store(out + i, load(from + i));
    if (n % kLanes) store(out + n - kLanes, load(from + n - kLanes));  // overlaps the one before
  });
}

INLINE const char* row_of(const char* rows, int64_t stride_E, int64_t stride, int64_t expert,
                          int64_t o, int64_t dtype) {
  return rows + (expert * stride_E + o * stride) * bytes_of(dtype);
}

INLINE const char* scale_row(const Packed& at, int64_t expert, int64_t o) {
  const int64_t row = at.block_rows == 1 ? o : o / at.block_rows;
  return row_of(at.scale, at.scale_stride_E, at.scale_stride, expert, row, at.scale_dtype);
}

INLINE const char* offset_row(const Packed& at, int64_t expert, int64_t o) {
  return row_of(at.offset, at.offset_stride_E, at.offset_stride, expert, o, at.offset_dtype);
}

INLINE const char* code_row(const Packed& at, int64_t expert, int64_t o) {
  return at.code + expert * at.code_stride_E + o * at.code_stride;
}

// Outputs that a thread takes at once: some 128 KiB, which stay in its cache for all passes over
// tokens, and fewer if threads would be idle.
inline int64_t outputs_at_once(const Packed& at, int64_t row_bytes, int64_t multiple) {
  const int64_t fair = at.num_outputs / (4 * at.num_threads);
  const int64_t most = std::max<int64_t>(multiple, std::min(fair, (128 << 10) / row_bytes));
  return most / multiple * multiple;
}

// Writes a sum as the result of output o of a pair.
template <typename Io>
INLINE void put_result(const Packed& at, int64_t pair, int64_t o, float sum) {
  const int64_t place = pair * at.num_outputs + o;
  if (at.bias) sum += to_float(((const Io*)at.bias)[o]);
  Io rounded;
  put(&rounded, sum);
  if (at.residual) put(&rounded, to_float(rounded) + to_float(((const Io*)at.residual)[place]));
  ((Io*)at.out)[place] = rounded;
}

// Writes a row of `depth` numbers that was looked up for a pair. `row` has room for whole vectors.
inline void put_row(const Packed& at, int64_t pair, const float* row) {
  with_io(at.dtype, [&](auto zero) {
    typedef decltype(zero) Io;
    Io* to = (Io*)at.out + pair * at.depth;
    for (int64_t d = 0; d < at.depth; d += kLanes)
      store_first(to + d, load(row + d), at.depth - d);
  });
}

// Writes sums as the results of the first `num` outputs, at most kLanes, of a pair from o on.
template <typename Io>
INLINE void put_results(const Packed& at, int64_t pair, int64_t o, Vec sum, int64_t num) {
  const int64_t place = pair * at.num_outputs + o;
  Io* to = (Io*)at.out + place;
  if (at.bias) sum += load_first((const Io*)at.bias + o, num);
  if (at.residual) sum = rounded_to<Io>(sum) + load_first((const Io*)at.residual + place, num);
  store_first(to, sum, num);
}

}  // namespace
