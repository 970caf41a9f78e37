// Products of a panel of columns, in fp32. Needs vectors.h and tiles.h.

namespace {

// C[RB, NV vectors] = start + A[RB, depth] B[depth, NV vectors]; start is 0 or factors * C
// (one factor per column)
enum class Start { kZero, kScale };

template <int RB, int NV, Start kStart>
INLINE void multiply_tile(float* c, int64_t c_stride, const float* a, int64_t a_stride_row,
                          int64_t a_stride_depth, const float* b, int64_t b_stride, int64_t depth,
                          const float* factors) {
  Vec acc[RB][NV];
  for (int r = 0; r < RB; ++r)
    for (int n = 0; n < NV; ++n) {
      acc[r][n] = kStart == Start::kZero ? Vec{} : load(c + r * c_stride + n * kLanes);
      if (kStart == Start::kScale) acc[r][n] *= load(factors + n * kLanes);
    }
  for (int64_t d = 0; d < depth; ++d) {
    Vec b_vec[NV];
    for (int n = 0; n < NV; ++n) b_vec[n] = load(b + d * b_stride + n * kLanes);
    for (int r = 0; r < RB; ++r) {
      Vec a_vec = splat(a[r * a_stride_row + d * a_stride_depth]);
      for (int n = 0; n < NV; ++n) acc[r][n] = multiply_add(a_vec, b_vec[n], acc[r][n]);
    }
  }
  for (int r = 0; r < RB; ++r)
    for (int n = 0; n < NV; ++n) store(c + r * c_stride + n * kLanes, acc[r][n]);
}

// the same for any number of rows; columns are a multiple of a vector, at most kPanel
constexpr int kPanel = 3 * kLanes;

template <Start kStart, int NV>
void multiply_rows(float* c, int64_t c_stride, const float* a, int64_t a_stride_row,
                   int64_t a_stride_depth, const float* b, int64_t b_stride, int64_t num_rows,
                   int64_t depth, const float* factors) {
  int64_t row = 0;
  for (; row + kTileRows <= num_rows; row += kTileRows)
    multiply_tile<kTileRows, NV, kStart>(c + row * c_stride, c_stride, a + row * a_stride_row,
                                         a_stride_row, a_stride_depth, b, b_stride, depth, factors);
  for (; row < num_rows; ++row)
    multiply_tile<1, NV, kStart>(c + row * c_stride, c_stride, a + row * a_stride_row, a_stride_row,
                                 a_stride_depth, b, b_stride, depth, factors);
}

template <Start kStart>
void multiply_panel(float* c, int64_t c_stride, const float* a, int64_t a_stride_row,
                    int64_t a_stride_depth, const float* b, int64_t b_stride, int64_t num_rows,
                    int64_t depth, int64_t num_columns, const float* factors) {
  const int64_t num_vecs = (num_columns + kLanes - 1) / kLanes;
  auto rows = num_vecs >= 3   ? multiply_rows<kStart, 3>
              : num_vecs == 2 ? multiply_rows<kStart, 2>
                              : multiply_rows<kStart, 1>;
  rows(c, c_stride, a, a_stride_row, a_stride_depth, b, b_stride, num_rows, depth, factors);
}

}  // namespace
