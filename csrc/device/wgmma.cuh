// wgmma: matrix products of a warpgroup (four warps), D[64, N] += A[64, 16] * B[16, N], bf16 or fp16 into fp32.
//
// B, and A unless it is in registers, are read from shared memory under the 128-byte swizzle, as TMA writes it: rows of
// 64 elements (128 bytes), 8 rows to an atom of 1024 bytes. An operand whose rows run along the matrices' inner
// dimension is K-major; one whose rows run along M or N is MN-major ("transposed").
//
// Accumulator: thread t of the warpgroup holds, for row = 16 * (t / 32) + (t % 32) / 4 and column = 8 * i + 2 * (t %
// 4), d[4i], d[4i+1] = D[row][column, column + 1] and d[4i+2], d[4i+3] = D[row + 8][column, column + 1]. The A operand
// in registers has the same shape: its four registers for a step of 16 are d[8k .. 8k+7] packed in pairs.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "device/mbarrier.cuh"

namespace flashcore {

// --- Descriptors of operands in shared memory ------------------------------------------------------------------------

// `atom_stride`: bytes between atoms of 8 rows. `slab_stride`: MN-major operands wider than 64 only, bytes from one
// slab of 64 columns to the next. `operand` is 1024-byte aligned; steps of 16 along the inner dimension are added
// later.
__device__ __forceinline__ uint64_t wgmma_descriptor(const void* operand, uint32_t slab_stride = 0,
                                                     uint32_t atom_stride = 1024) {
  constexpr uint64_t kSwizzle128 = 1ull << 62;
  return kSwizzle128 | static_cast<uint64_t>(atom_stride >> 4) << 32 | static_cast<uint64_t>(slab_stride >> 4) << 16 |
         (shared_address(operand) & 0x3FFFF) >> 4;
}

__device__ __forceinline__ uint64_t wgmma_advance(uint64_t descriptor, uint32_t bytes) {
  return descriptor + (bytes >> 4);
}

// --- Ordering --------------------------------------------------------------------------------------------------------

// Before the first wgmma, and whenever registers it reads or accumulates into were written by other instructions.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Returns when at most kPending committed groups are unfinished.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving accesses of registers that a running wgmma owns across this point.
template <int kRegisters>
__device__ __forceinline__ void wgmma_pin(float (&registers)[kRegisters]) {
#pragma unroll
  for (int i = 0; i < kRegisters; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

// --- Roles of warpgroups ---------------------------------------------------------------------------------------------

template <int kRegisters>
__device__ __forceinline__ void warpgroup_raise_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void warpgroup_lower_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Barrier `id` (1..15) among `threads` threads: sync waits for the others, arrive does not.
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// --- The instruction -------------------------------------------------------------------------------------------------

// Wgmma<N, T>::ss multiplies A and B from shared memory, ::rs takes A from registers. `accumulate` false: D = A * B.
// kTransposeA / kTransposeB: the operand is MN-major.
template <int kN, typename T>
struct Wgmma;

// Register lists: R(i) names eight operands, L(n) the first n; E(n) passes them.
#define FLASHCORE_R0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define FLASHCORE_R1 "%8, %9, %10, %11, %12, %13, %14, %15"
#define FLASHCORE_R2 "%16, %17, %18, %19, %20, %21, %22, %23"
#define FLASHCORE_R3 "%24, %25, %26, %27, %28, %29, %30, %31"
#define FLASHCORE_R4 "%32, %33, %34, %35, %36, %37, %38, %39"
#define FLASHCORE_R5 "%40, %41, %42, %43, %44, %45, %46, %47"
#define FLASHCORE_R6 "%48, %49, %50, %51, %52, %53, %54, %55"
#define FLASHCORE_R7 "%56, %57, %58, %59, %60, %61, %62, %63"
#define FLASHCORE_R8 "%64, %65, %66, %67, %68, %69, %70, %71"
#define FLASHCORE_R9 "%72, %73, %74, %75, %76, %77, %78, %79"
#define FLASHCORE_R10 "%80, %81, %82, %83, %84, %85, %86, %87"
#define FLASHCORE_R11 "%88, %89, %90, %91, %92, %93, %94, %95"
#define FLASHCORE_R12 "%96, %97, %98, %99, %100, %101, %102, %103"
#define FLASHCORE_R13 "%104, %105, %106, %107, %108, %109, %110, %111"
#define FLASHCORE_R14 "%112, %113, %114, %115, %116, %117, %118, %119"
#define FLASHCORE_R15 "%120, %121, %122, %123, %124, %125, %126, %127"
#define FLASHCORE_L4 "%0, %1, %2, %3"
#define FLASHCORE_L8 FLASHCORE_R0
#define FLASHCORE_L16 FLASHCORE_L8 ", " FLASHCORE_R1
#define FLASHCORE_L24 FLASHCORE_L16 ", " FLASHCORE_R2
#define FLASHCORE_L32 FLASHCORE_L24 ", " FLASHCORE_R3
#define FLASHCORE_L40 FLASHCORE_L32 ", " FLASHCORE_R4
#define FLASHCORE_L48 FLASHCORE_L40 ", " FLASHCORE_R5
#define FLASHCORE_L56 FLASHCORE_L48 ", " FLASHCORE_R6
#define FLASHCORE_L64 FLASHCORE_L56 ", " FLASHCORE_R7
#define FLASHCORE_L72 FLASHCORE_L64 ", " FLASHCORE_R8
#define FLASHCORE_L80 FLASHCORE_L72 ", " FLASHCORE_R9
#define FLASHCORE_L88 FLASHCORE_L80 ", " FLASHCORE_R10
#define FLASHCORE_L96 FLASHCORE_L88 ", " FLASHCORE_R11
#define FLASHCORE_L104 FLASHCORE_L96 ", " FLASHCORE_R12
#define FLASHCORE_L112 FLASHCORE_L104 ", " FLASHCORE_R13
#define FLASHCORE_L120 FLASHCORE_L112 ", " FLASHCORE_R14
#define FLASHCORE_L128 FLASHCORE_L120 ", " FLASHCORE_R15
#define FLASHCORE_E4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define FLASHCORE_E8(i) FLASHCORE_E4(i), FLASHCORE_E4(i + 4)
#define FLASHCORE_E16(i) FLASHCORE_E8(i), FLASHCORE_E8(i + 8)
#define FLASHCORE_E32(i) FLASHCORE_E16(i), FLASHCORE_E16(i + 16)
#define FLASHCORE_E40(i) FLASHCORE_E32(i), FLASHCORE_E8(i + 32)
#define FLASHCORE_E48(i) FLASHCORE_E32(i), FLASHCORE_E16(i + 32)
#define FLASHCORE_E64(i) FLASHCORE_E32(i), FLASHCORE_E32(i + 32)
#define FLASHCORE_E80(i) FLASHCORE_E64(i), FLASHCORE_E16(i + 64)
#define FLASHCORE_E88(i) FLASHCORE_E80(i), FLASHCORE_E8(i + 80)
#define FLASHCORE_E96(i) FLASHCORE_E64(i), FLASHCORE_E32(i + 64)
#define FLASHCORE_E128(i) FLASHCORE_E64(i), FLASHCORE_E64(i + 64)

// o0..o6: the numbers of the operands behind the accumulators.
#define FLASHCORE_WGMMA(N, REGS, T, TYPE, o0, o1, o2, o3, o4, o5, o6)                                                 \
  template <>                                                                                                         \
  struct Wgmma<N, T> {                                                                                                \
    template <int kTransposeA, int kTransposeB>                                                                       \
    static __device__ __forceinline__ void ss(float (&d)[REGS], uint64_t a, uint64_t b, bool accumulate) {            \
      asm volatile(                                                                                                   \
          "{\n"                                                                                                       \
          "  .reg .pred p;\n"                                                                                         \
          "  setp.ne.b32 p, %" o2                                                                                     \
          ", 0;\n"                                                                                                    \
          "  wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" FLASHCORE_L##REGS                    \
          "}, %" o0 ", %" o1 ", p, 1, 1, %" o3 ", %" o4                                                               \
          ";\n"                                                                                                       \
          "}\n"                                                                                                       \
          : FLASHCORE_E##REGS(0)                                                                                      \
          : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(kTransposeA), "n"(kTransposeB));                   \
    }                                                                                                                 \
    template <int kTransposeB>                                                                                        \
    static __device__ __forceinline__ void rs(float (&d)[REGS], const uint32_t* a, uint64_t b, bool accumulate) {     \
      asm volatile(                                                                                                   \
          "{\n"                                                                                                       \
          "  .reg .pred p;\n"                                                                                         \
          "  setp.ne.b32 p, %" o5                                                                                     \
          ", 0;\n"                                                                                                    \
          "  wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" FLASHCORE_L##REGS                    \
          "}, {%" o0 ", %" o1 ", %" o2 ", %" o3 "}, %" o4 ", p, 1, 1, %" o6                                           \
          ";\n"                                                                                                       \
          "}\n"                                                                                                       \
          : FLASHCORE_E##REGS(0)                                                                                      \
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)), "n"(kTransposeB)); \
    }                                                                                                                 \
  };
#define FLASHCORE_WGMMA_TYPES(N, REGS, ...)                    \
  FLASHCORE_WGMMA(N, REGS, __nv_bfloat16, "bf16", __VA_ARGS__) \
  FLASHCORE_WGMMA(N, REGS, __half, "f16", __VA_ARGS__)

FLASHCORE_WGMMA_TYPES(8, 4, "4", "5", "6", "7", "8", "9", "10")
FLASHCORE_WGMMA_TYPES(16, 8, "8", "9", "10", "11", "12", "13", "14")
FLASHCORE_WGMMA_TYPES(32, 16, "16", "17", "18", "19", "20", "21", "22")
FLASHCORE_WGMMA_TYPES(64, 32, "32", "33", "34", "35", "36", "37", "38")
FLASHCORE_WGMMA_TYPES(80, 40, "40", "41", "42", "43", "44", "45", "46")
FLASHCORE_WGMMA_TYPES(96, 48, "48", "49", "50", "51", "52", "53", "54")
FLASHCORE_WGMMA_TYPES(128, 64, "64", "65", "66", "67", "68", "69", "70")
FLASHCORE_WGMMA_TYPES(160, 80, "80", "81", "82", "83", "84", "85", "86")
FLASHCORE_WGMMA_TYPES(176, 88, "88", "89", "90", "91", "92", "93", "94")
FLASHCORE_WGMMA_TYPES(192, 96, "96", "97", "98", "99", "100", "101", "102")
FLASHCORE_WGMMA_TYPES(256, 128, "128", "129", "130", "131", "132", "133", "134")

#undef FLASHCORE_WGMMA
#undef FLASHCORE_WGMMA_TYPES

}  // namespace flashcore
