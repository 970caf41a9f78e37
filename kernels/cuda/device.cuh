// What all kernels share: numbers in bf16, products of the matrix units, barriers of shared memory.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef unsigned long long u64;

struct __align__(16) Four { u32 a, b, c, d; };

__device__ __forceinline__ Four load_four(const void* at) {
  return *reinterpret_cast<const Four*>(at);
}

__device__ __forceinline__ u32 word_of(const Four& v, int w) {
  return w == 0 ? v.a : w == 1 ? v.b : w == 2 ? v.c : v.d;
}

__device__ __forceinline__ float of_bf16(u32 bits) { return __uint_as_float(bits << 16); }
__device__ __forceinline__ float low_of(u32 word) { return __uint_as_float(word << 16); }
__device__ __forceinline__ float high_of(u32 word) { return __uint_as_float(word & 0xffff0000); }

__device__ __forceinline__ u32 to_bf16_pair(float low, float high) {
  u32 r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

__device__ __forceinline__ u32 to_bf16(float v) { return to_bf16_pair(v, 0.0f); }
__device__ __forceinline__ float rounded(float v) { return __uint_as_float(to_bf16_pair(0.0f, v)); }

__device__ __forceinline__ void multiply(float (&acc)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0,
                                         u32 b1) {
  asm(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ u32 shared_address(const void* at) {
  return (u32)__cvta_generic_to_shared(at);
}

__device__ __forceinline__ void init_barrier(u32 barrier, u32 num_arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(num_arrivals)
               : "memory");
}

__device__ __forceinline__ void arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void wait_for(u32 barrier, u32 parity) {
  asm volatile(
      "{ .reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again; }" ::"r"(barrier), "r"(parity)
      : "memory");
}

__device__ __forceinline__ bool is_done(u32 barrier, u32 parity) {
  u32 r;
  asm volatile(
      "{ .reg .pred done;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n"
      "selp.u32 %0, 1, 0, done; }"
      : "=r"(r)
      : "r"(barrier), "r"(parity)
      : "memory");
  return r;
}

__device__ __forceinline__ void expect(u32 barrier, u32 num_bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(num_bytes)
               : "memory");
}

__device__ __forceinline__ void copy(u32 to, const u8* from, u32 num_bytes, u32 barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          to),
      "l"(from), "r"(num_bytes), "r"(barrier)
      : "memory");
}

// Into the second-level cache.
__device__ __forceinline__ void prefetch(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }

struct Ring {
  u32 at = 0, parity = 0, turn = 0;
  __device__ __forceinline__ void advance(u32 size) {
    if (++at == size) at = 0, parity ^= 1, turn++;
  }
};
