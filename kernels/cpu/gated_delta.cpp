// The gated delta rule of decode steps, compiled at first use by gated_delta.py. kernels.cpp
// describes how arguments are passed, and reference/gated_delta.py has the meaning of the op.
//
// R rows | W taps | G key heads | V value heads | H key size | I value size | P = V * I
// C = 2 * G * H + P channels

#include "vectors.h"

namespace {

struct GatedDeltaStep {
  char* out;             // [R, P]
  const char* qkv;       // [R, C]
  const char* z;         // [R, P]
  const char* ba;        // [R, 2V]
  const char* conv;      // [C, W]
  const float* a_log;    // [V]
  const float* dt_bias;  // [V]
  const char* norm;      // [I]
  char* conv_state;      // [X, W, C]
  char* state;           // [X, V, H, I]
  const int32_t* seq_len;  // [R]
  const int64_t* from;     // [R]
  const bool* is_new;      // [R]
  const int64_t* to;       // [R]
  int64_t num_rows, num_taps, key_heads, value_heads, key_size, value_size;
  int64_t qkv_stride, z_stride, ba_stride, dtype, state_dtype, num_threads;
  double eps, norm_eps;
};

template <typename T>
INLINE float rounded(float x) {
  T lane;
  put(&lane, x);
  return to_float(lane);
}

INLINE float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

// The results of the convolution of `num` channels of a row, from the `first` on, and the state
// after it: the input of position p is at p % W. No other work reads or writes these channels.
template <typename T>
void convolve(const GatedDeltaStep& at, int64_t row, int64_t first, int64_t num, float* to) {
  const int64_t W = at.num_taps, pos = at.seq_len[row] - 1;
  const int64_t C = 2 * at.key_heads * at.key_size + at.value_heads * at.value_size;
  const T *x = (const T*)at.qkv + row * at.qkv_stride, *weight = (const T*)at.conv;
  const T* old_state = (const T*)at.conv_state + at.from[row] * W * C;
  T* new_state = (T*)at.conv_state + at.to[row] * W * C;
  for (int64_t c = first; c < first + num; ++c) {
    float total = to_float(x[c]) * to_float(weight[c * W + W - 1]);
    for (int64_t shift = 1; shift < W && shift <= pos; ++shift) {
      const int64_t place = (pos - shift) % W * C + c;
      const T kept = old_state[place];
      new_state[place] = kept;
      total += to_float(kept) * to_float(weight[c * W + W - 1 - shift]);
    }
    new_state[pos % W * C + c] = x[c];
    total = rounded<T>(total);
    to[c - first] = rounded<T>(total * sigmoid(total));
  }
}

// x times `factor` and divided by its length
void normalize(float* x, int64_t num, float factor, float eps) {
  float squares = 0.0f;
  for (int64_t h = 0; h < num; ++h) squares += x[h] * x[h];
  factor /= std::sqrt(squares + eps);
  for (int64_t h = 0; h < num; ++h) x[h] *= factor;
}

// One value head: o = S'^T q for S' = decay * S + k (x) beta * (v - (decay * S)^T k)
template <typename S>
void advance(const S* old_state, S* new_state, bool is_new, int64_t H, int64_t I, float decay,
             float beta, const float* q, const float* k, const float* v, float* delta, float* o) {
  for (int64_t i = 0; i < I; i += kLanes) store(delta + i, Vec{}), store(o + i, Vec{});
  for (int64_t h = 0; h < H && !is_new; ++h)
    for (int64_t i = 0; i < I; i += kLanes)
      store(delta + i, multiply_add(load_first(old_state + h * I + i, I - i), splat(k[h]),
                                    load(delta + i)));
  for (int64_t i = 0; i < I; i += kLanes)
    store(delta + i, (load_first(v + i, I - i) - load(delta + i) * decay) * beta);
  for (int64_t h = 0; h < H; ++h)
    for (int64_t i = 0; i < I; i += kLanes) {
      Vec s{};
      if (!is_new) s = load_first(old_state + h * I + i, I - i) * decay;
      s = multiply_add(load(delta + i), splat(k[h]), s);
      store_first(new_state + h * I + i, s, I - i);
      store(o + i, multiply_add(s, splat(q[h]), load(o + i)));
    }
}

// The norm of o times silu(z), for one value head of a row
template <typename T>
void finish(const GatedDeltaStep& at, int64_t row, int64_t head, float* o) {
  const int64_t I = at.value_size, P = at.value_heads * I;
  const T *z = (const T*)at.z + row * at.z_stride + head * I, *norm = (const T*)at.norm;
  T* out = (T*)at.out + row * P + head * I;
  float squares = 0.0f;
  for (int64_t i = 0; i < I; ++i) o[i] = rounded<T>(o[i]), squares += o[i] * o[i];
  const float factor = 1.0f / std::sqrt(squares / (float)I + (float)at.eps);
  for (int64_t i = 0; i < I; ++i) {
    const float gate = to_float(z[i]);
    const float normed = rounded<T>(rounded<T>(o[i] * factor) * to_float(norm[i]));
    put(out + i, normed * (gate * sigmoid(gate)));
  }
}

// All value heads of a key head of a row
template <typename T, typename S>
void key_head(const GatedDeltaStep& at, int64_t row, int64_t group) {
  const int64_t H = at.key_size, I = at.value_size, V = at.value_heads;
  const int64_t keys = at.key_heads * H, repeats = V / at.key_heads;
  const int64_t padded = (I + kLanes - 1) / kLanes * kLanes;
  float *q = scratch((size_t)(2 * H + 3 * padded)), *k = q + H, *v = k + H;
  float *delta = v + padded, *o = delta + padded;
  convolve<T>(at, row, group * H, H, q);
  convolve<T>(at, row, keys + group * H, H, k);
  normalize(q, H, 1.0f / std::sqrt((float)H), (float)at.norm_eps);
  normalize(k, H, 1.0f, (float)at.norm_eps);
  const T* ba = (const T*)at.ba + row * at.ba_stride;
  for (int64_t head = group * repeats; head < (group + 1) * repeats; ++head) {
    convolve<T>(at, row, 2 * keys + head * I, I, v);
    const float a = to_float(ba[V + head]) + at.dt_bias[head];
    const float rate = std::max(a, 0.0f) + std::log1p(std::exp(-std::abs(a)));
    const float decay = std::exp(-std::exp(at.a_log[head]) * rate);
    const int64_t size = H * I;
    const S* old_state = (const S*)at.state + (at.from[row] * V + head) * size;
    S* new_state = (S*)at.state + (at.to[row] * V + head) * size;
    advance(old_state, new_state, at.is_new[row], H, I, decay, sigmoid(to_float(ba[head])), q, k, v,
            delta, o);
    finish<T>(at, row, head, o);
  }
}

}  // namespace

extern "C" void nanovllm_gated_delta_step(const GatedDeltaStep* args) {
  const GatedDeltaStep& at = *args;
  const int64_t num = at.num_rows * at.value_heads * at.key_size * at.value_size;
  with_dtype(at.dtype, [&](auto zero) {
    with_dtype(at.state_dtype, [&](auto state_zero) {
      parallel_for(at.num_rows * at.key_heads, num < kMinParallel ? 1 : at.num_threads,
                   [&](int64_t item) {
                     key_head<decltype(zero), decltype(state_zero)>(at, item / at.key_heads,
                                                                    item % at.key_heads);
                   });
    });
  });
}
