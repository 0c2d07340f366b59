// cp.async (sm_80): 16-byte copies from global to shared memory that bypass the registers and L1; prefetches to L2; the
// lane that asks the copy engine (sm_90).
#pragma once

#include <cstdint>

namespace flashcore {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Whether this lane acts for its warp, all lanes of which call. For what one lane asks of the copy engine or of an
// mbarrier within `if (elected())`, ptxas writes one instruction; within `if (lane == 0)` a loop over the lanes there
// may be, of 50 cycles.
__device__ __forceinline__ bool elected() {
  uint32_t is;
  asm volatile(
      "{\n"
      "  .reg .pred p;\n"
      "  elect.sync _|p, 0xffffffff;\n"
      "  selp.u32 %0, 1, 0, p;\n"
      "}\n"
      : "=r"(is));
  return is != 0;
}

constexpr uint64_t kEvictFirst = 0x12F0000000000000ull;  // L2 policies as createpolicy encodes them
constexpr uint64_t kEvictNormal = 0x1000000000000000ull;
constexpr uint64_t kEvictLast = 0x14F0000000000000ull;

// What each layer reads of the plan stays in L2 while the weights of a layer pass through: a number, or a struct of
// whole 16 bytes.
template <typename T>
__device__ __forceinline__ T load_kept(const T* from) {
  T x;
  if constexpr (sizeof(T) == sizeof(int32_t)) {
    asm volatile("ld.global.L2::cache_hint.s32 %0, [%1], %2;" : "=r"(x) : "l"(from), "l"(kEvictLast) : "memory");
  } else {
    static_assert(sizeof(T) % sizeof(int4) == 0 && alignof(T) == alignof(int4));
    const auto* words = reinterpret_cast<const int4*>(from);
    auto* to = reinterpret_cast<int4*>(&x);
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(T) / sizeof(int4)); ++i) {
      asm volatile("ld.global.L2::cache_hint.v4.s32 {%0, %1, %2, %3}, [%4], %5;"
                   : "=r"(to[i].x), "=r"(to[i].y), "=r"(to[i].z), "=r"(to[i].w)
                   : "l"(words + i), "l"(kEvictLast)
                   : "memory");
    }
  }
  return x;
}

// As load_kept, past L1: another kernel may have written the number while this one ran.
__device__ __forceinline__ int32_t load_kept_coherent(const int32_t* from) {
  int32_t x;
  asm volatile("ld.relaxed.gpu.global.L2::cache_hint.s32 %0, [%1], %2;"
               : "=r"(x)
               : "l"(from), "l"(kEvictLast)
               : "memory");
  return x;
}

__device__ __forceinline__ void prefetch_l2(const void* line) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(line) : "memory");
}

// Copies 16 bytes of a row of kRowBytes, or writes 16 zero bytes and reads nothing when !valid. Both addresses are
// multiples of 16. L2 fetches ahead within the row only: rows of 192 bytes would drag in a third more than they need.
template <int kRowBytes>
__device__ __forceinline__ void copy_async_16(uint32_t shared, const void* global, bool valid) {
  const int bytes = valid ? 16 : 0;
  if constexpr (kRowBytes % 128 == 0) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.cg.shared.global.L2::64B [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes)
                 : "memory");
  }
}

// As above for 8 bytes, by way of L1.
__device__ __forceinline__ void copy_async_8(uint32_t shared, const void* global, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared), "l"(global), "r"(valid ? 8 : 0)
               : "memory");
}

__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of this thread's latest groups are in flight.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace flashcore
