// Thread block clusters (sm_90): CTAs that run at the same time and read each other's shared memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace flashcore {

// The barrier of a cluster, in two halves: what a thread wrote before it arrived, to any memory, is seen by every thread
// that has waited.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// Where a variable in shared memory stands in CTA `rank` of the cluster.
template <typename T>
__device__ __forceinline__ T* in_cta(T* own, uint32_t rank) {
  uint64_t address;
  asm("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(reinterpret_cast<uint64_t>(own)), "r"(rank));
  return reinterpret_cast<T*>(address);
}

}  // namespace flashcore
