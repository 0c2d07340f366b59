// Thread block clusters (sm_90): CTAs that run at the same time and read each other's shared memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "device/async_copy.cuh"

namespace flashcore {

// Clusters of a kernel with __cluster_dims__ that run at the same time, after it has been given leave to use so much
// shared memory. A cluster of 8 CTAs that fill an SM each takes a GPC with 8 SMs to spare, and not all GPUs, or parts
// of them, have many.
template <typename... Parameters>
int most_clusters(void (*kernel)(Parameters...), int threads, int shared_bytes) {
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes) != cudaSuccess) return 0;
  cudaFuncAttributes attributes;
  if (cudaFuncGetAttributes(&attributes, kernel) != cudaSuccess) return 0;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(attributes.requiredClusterWidth);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  int clusters = 0;
  return cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) == cudaSuccess ? clusters : 0;
}

// The barrier of a cluster, in two halves: what a thread wrote before it arrived, to any memory, is seen by every
// thread that has waited. Relaxed, arriving takes no fence, which is a trip to memory, and promises only that the CTA
// runs.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// Where a variable in shared memory stands in CTA `rank` of the cluster.
template <typename T>
__device__ __forceinline__ const T* in_cta(const T* own, uint32_t rank) {
  uint64_t address;
  asm("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(reinterpret_cast<uint64_t>(own)), "r"(rank));
  return reinterpret_cast<const T*>(address);
}
__device__ __forceinline__ uint32_t shared_address_in_cta(const void* own, uint32_t rank) {
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(own)), "r"(rank));
  return address;
}

// Writes to the shared memory of a CTA of the cluster; the bytes are counted at a barrier of that CTA once they are
// there. Addresses are those of shared_address_in_cta().
__device__ __forceinline__ void push(uint32_t to, float4 x, uint32_t barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
               "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w), "r"(barrier)
               : "memory");
}
__device__ __forceinline__ void push(uint32_t to, uint4 x, uint32_t barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.u32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
               "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w), "r"(barrier)
               : "memory");
}
__device__ __forceinline__ void push(uint32_t to, float x, uint32_t barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(to), "f"(x),
               "r"(barrier)
               : "memory");
}

}  // namespace flashcore
