// Programmatic dependent launch (sm_90): a kernel that begins while the one before it in the stream still runs.
//
// The second kernel is launched by launch_dependent; the first lets it begin by allow_dependents(), and whatever the
// second does before wait_for_primary() overlaps with the first. A thread of the second must wait, even of a kernel
// that has nothing to do: what comes after it relies on both being over. In a chain the same holds for what is older: a
// kernel that lets the next one begin behind its own wait (score) promises that all before it is over, and those that
// let it begin at once (select) pass that promise on. Who leaves beside a branch of its own need not wait: what comes
// behind the join waits for both.
#pragma once

#include <cuda_runtime.h>

namespace flashcore {

__device__ __forceinline__ void allow_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// All of the first kernel's writes are visible on return.
__device__ __forceinline__ void wait_for_primary() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// For the CTAs of a kernel that has nothing to do: one stays, so that the kernel does not end before the first one.
__device__ __forceinline__ void wait_in_one_cta() {
  if (blockIdx.x == 0) wait_for_primary();
}

// Whether the current device knows dependent launches; the others run one kernel after the other.
inline bool has_dependent_launch() {
  static const bool known = [] {
    int device = 0, major = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    return major >= 9;
  }();
  return known;
}

// kernel<<<ctas, threads, shared_bytes, stream>>>(arguments...) with an attribute, where the device knows it.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_with(cudaLaunchAttribute attribute, void (*kernel)(Parameters...), dim3 ctas, int threads,
                        int shared_bytes, cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = ctas;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = has_dependent_launch() ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

// Launches kernel<<<ctas, threads, shared_bytes, stream>>>(arguments...) so that it may begin before its predecessor
// ends.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_dependent_grid(void (*kernel)(Parameters...), dim3 ctas, int threads, int shared_bytes,
                                  cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  return launch_with(attribute, kernel, ctas, threads, shared_bytes, stream, arguments...);
}

// Launches the kernel and records `allowed`, which is over once each CTA has allowed its dependents or ended: for a
// branch that begins beside the kernel (sm_90).
template <typename... Parameters, typename... Arguments>
cudaError_t launch_recording(cudaEvent_t allowed, void (*kernel)(Parameters...), int ctas, int threads,
                             int shared_bytes, cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticEvent;
  attribute.val.programmaticEvent.event = allowed;
  return launch_with(attribute, kernel, dim3(ctas), threads, shared_bytes, stream, arguments...);
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch_dependent_shared(void (*kernel)(Parameters...), int ctas, int threads, int shared_bytes,
                                    cudaStream_t stream, const Arguments&... arguments) {
  return launch_dependent_grid(kernel, dim3(ctas), threads, shared_bytes, stream, arguments...);
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch_dependent(void (*kernel)(Parameters...), int ctas, int threads, cudaStream_t stream,
                             const Arguments&... arguments) {
  return launch_dependent_shared(kernel, ctas, threads, 0, stream, arguments...);
}

}  // namespace flashcore
