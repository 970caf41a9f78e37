// Norms, activations and RoPE of rows. They round where reference/ rounds. Needs vectors.h and
// threads.h.

namespace {

template <typename T>
INLINE float inverse_rms(const T* x, int64_t n, double eps) {
  Vec squares{};
  for (int64_t i = 0; i < n; i += kLanes) {
    Vec v = load_first(x + i, n - i);
    squares = multiply_add(v, v, squares);
  }
  return 1.0f / std::sqrt(sum(squares) / (float)n + (float)eps);
}

template <typename T>
INLINE Vec scaled(Vec x, float factor, const T* weight, int64_t n) {
  return rounded_to<T>(rounded_to<T>(x * factor) * load_first(weight, n));
}

struct RmsNorm {
  char *out, *residual_out;           // [T, D]; residual_out only with a residual
  const char *x, *residual, *weight;  // [T, D], [T, D] or null, [D]
  int64_t num_tokens, size;
  int64_t dtype, num_threads;
  double eps;
};

struct SiluMul {
  char* out;            // [T, F]
  const char* gate_up;  // [T, 2F]
  int64_t num_tokens, size;
  int64_t dtype, num_threads;
};

struct QkNormRopeStore {
  char* q_out;                  // [T, N, H]
  const char* qkv;              // [T, (N + 2K) H]
  const char *q_norm, *k_norm;  // [H] or null
  const float* cos_sin;         // [M, H]
  const char *pos, *slot;       // [T]
  char *k_cache, *v_cache;      // [C, B, K, H]
  int64_t qkv_stride, cos_sin_stride;
  int64_t k_stride_C, k_stride_B, k_stride_K;
  int64_t v_stride_C, v_stride_B, v_stride_K;
  int64_t num_tokens, num_heads, num_kv_heads, head_dim, block_size;
  int64_t pos_bytes, slot_bytes;
  int64_t dtype, num_threads;
  double eps;
};

INLINE int64_t index_at(const char* p, int64_t bytes, int64_t i) {
  return bytes == 8 ? ((const int64_t*)p)[i] : ((const int32_t*)p)[i];
}

// out = rope(norm(x)), which rotates the halves x1 and x2 of a head
template <typename T>
void norm_rope(T* out, const T* x, const T* weight, const float* cos_sin, int64_t H, double eps) {
  const int64_t half = H / 2;
  const float factor = weight ? inverse_rms(x, H, eps) : 1.0f;
  for (int64_t i = 0; i < half; i += kLanes) {
    const int64_t n = half - i;
    Vec x1 = load_first(x + i, n), x2 = load_first(x + half + i, n);
    if (weight)
      x1 = scaled(x1, factor, weight + i, n), x2 = scaled(x2, factor, weight + half + i, n);
    const Vec cos = load_first(cos_sin + i, n), sin = load_first(cos_sin + half + i, n);
    store_first(out + i, x1 * cos - x2 * sin, n);
    store_first(out + half + i, x2 * cos + x1 * sin, n);
  }
}

template <typename T>
void qk_norm_rope_store_token(const QkNormRopeStore& at, int64_t token) {
  const int64_t H = at.head_dim, N = at.num_heads, K = at.num_kv_heads;
  const T* qkv = (const T*)at.qkv + token * at.qkv_stride;
  const float* cos_sin = at.cos_sin + index_at(at.pos, at.pos_bytes, token) * at.cos_sin_stride;
  for (int64_t n = 0; n < N; ++n)
    norm_rope((T*)at.q_out + (token * N + n) * H, qkv + n * H, (const T*)at.q_norm, cos_sin, H,
              at.eps);
  const int64_t slot = index_at(at.slot, at.slot_bytes, token), block = slot / at.block_size,
                offset = slot % at.block_size;
  T* k_out = (T*)at.k_cache + block * at.k_stride_C + offset * at.k_stride_B;
  T* v_out = (T*)at.v_cache + block * at.v_stride_C + offset * at.v_stride_B;
  for (int64_t k = 0; k < K; ++k) {
    norm_rope(k_out + k * at.k_stride_K, qkv + (N + k) * H, (const T*)at.k_norm, cos_sin, H,
              at.eps);
    const T* v = qkv + (N + K + k) * H;
    for (int64_t i = 0; i < H; i += kLanes)
      store_first(v_out + k * at.v_stride_K + i, load_first(v + i, H - i), H - i);
  }
}

}  // namespace

extern "C" void nanovllm_rms_norm(const RmsNorm* args) {
  const RmsNorm& at = *args;
  const int64_t D = at.size;
  with_dtype(at.dtype, [&](auto zero) {
    typedef decltype(zero) T;
    parallel_for(
        at.num_tokens, at.num_tokens * D < kMinParallel ? 1 : at.num_threads, [&](int64_t token) {
          const T *x = (const T*)at.x + token * D, *weight = (const T*)at.weight;
          T* out = (T*)at.out + token * D;
          if (at.residual) {
            const T* residual = (const T*)at.residual + token * D;
            T* sum = (T*)at.residual_out + token * D;
            for (int64_t d = 0; d < D; d += kLanes)
              store_first(sum + d, load_first(x + d, D - d) + load_first(residual + d, D - d),
                          D - d);
            x = sum;
          }
          const float factor = inverse_rms(x, D, at.eps);
          for (int64_t d = 0; d < D; d += kLanes)
            store_first(out + d, scaled(load_first(x + d, D - d), factor, weight + d, D - d),
                        D - d);
        });
  });
}

extern "C" void nanovllm_silu_mul(const SiluMul* args) {
  const SiluMul& at = *args;
  const int64_t F = at.size;
  with_dtype(at.dtype, [&](auto zero) {
    typedef decltype(zero) T;
    parallel_for(at.num_tokens, at.num_tokens * F < kMinParallel ? 1 : at.num_threads,
                 [&](int64_t token) {
                   const T *gate = (const T*)at.gate_up + token * 2 * F, *up = gate + F;
                   T* out = (T*)at.out + token * F;
                   for (int64_t f = 0; f < F; f += kLanes) {
                     const Vec g = load_first(gate + f, F - f), u = load_first(up + f, F - f);
                     store_first(out + f, silu<T>(g) * u, F - f);
                   }
                 });
  });
}

extern "C" void nanovllm_qk_norm_rope_store(const QkNormRopeStore* args) {
  const QkNormRopeStore& at = *args;
  const int64_t size = at.num_tokens * (at.num_heads + 2 * at.num_kv_heads) * at.head_dim;
  with_dtype(at.dtype, [&](auto zero) {
    typedef decltype(zero) T;
    parallel_for(at.num_tokens, size < kMinParallel ? 1 : at.num_threads,
                 [&](int64_t token) { qk_norm_rope_store_token<T>(at, token); });
  });
}
