// What the stand-alone programs share: error checks, random data, a cold L2, captured graphs and the timing loop.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#define CUDA_CHECK(call)                                                                    \
  do {                                                                                      \
    const auto error_ = static_cast<cudaError_t>(call);                                     \
    if (error_ != cudaSuccess) {                                                            \
      std::printf("%s:%d %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(error_)); \
      std::exit(1);                                                                         \
    }                                                                                       \
  } while (0)

// Nearly normal: the sum of four uniform numbers, of variance 1.
__device__ inline float random_normal(uint64_t i, uint32_t seed) {
  uint64_t x = i * 0x9E3779B97F4A7C15ull + seed * 0xD1B54A32D192ED03ull;
  x ^= x >> 32;
  x *= 0xD6E8FEB86659FD93ull;
  x ^= x >> 32;
  x *= 0xD6E8FEB86659FD93ull;
  x ^= x >> 32;
  float sum = 0.0f;
  for (int k = 0; k < 4; ++k) sum += static_cast<float>((x >> (16 * k)) & 0xFFFF) / 65536.0f - 0.5f;
  return sum * 1.7320508f;
}

template <typename T>
__global__ void fill_random(T* x, int64_t n, uint32_t seed) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < n; i += int64_t{gridDim.x} * blockDim.x) {
    x[i] = static_cast<T>(random_normal(i, seed));
  }
}

__global__ void read_all(const uint4* x, int64_t n, uint32_t* sink) {
  uint32_t sum = 0;
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < n; i += int64_t{gridDim.x} * blockDim.x) {
    sum += x[i].x ^ x[i].y ^ x[i].z ^ x[i].w;
  }
  if (sum == 0xDEADBEEF) *sink = sum;  // keeps the loads
}

// Fills the L2 with clean lines: lines that were written would be written back under the kernel that is timed.
class L2Flush {
 public:
  L2Flush() {
    CUDA_CHECK(cudaMalloc(&lines_, kBytes));
    CUDA_CHECK(cudaMemset(lines_, 0, kBytes));
  }
  ~L2Flush() { cudaFree(lines_); }
  L2Flush(const L2Flush&) = delete;
  void operator()(cudaStream_t stream) const {
    read_all<<<1024, 256, 0, stream>>>(lines_, kBytes / sizeof(uint4), reinterpret_cast<uint32_t*>(lines_));
    CUDA_CHECK(cudaGetLastError());
  }

 private:
  static constexpr int64_t kBytes = int64_t{256} << 20;
  uint4* lines_ = nullptr;
};

// What `work` launches on `stream`, captured.
class Graph {
 public:
  template <class Work>
  Graph(cudaStream_t stream, const Work& work) {
    CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    work();
    CUDA_CHECK(cudaStreamEndCapture(stream, &graph_));
    CUDA_CHECK(cudaGraphInstantiate(&exec_, graph_, 0));
  }
  ~Graph() {
    cudaGraphExecDestroy(exec_);
    cudaGraphDestroy(graph_);
  }
  Graph(const Graph&) = delete;
  void launch(cudaStream_t stream) const { CUDA_CHECK(cudaGraphLaunch(exec_, stream)); }

 private:
  cudaGraph_t graph_ = nullptr;
  cudaGraphExec_t exec_ = nullptr;
};

// Milliseconds that `work` takes on a stream.
class Timer {
 public:
  Timer() {
    CUDA_CHECK(cudaEventCreate(&begin_));
    CUDA_CHECK(cudaEventCreate(&end_));
  }
  ~Timer() {
    cudaEventDestroy(begin_);
    cudaEventDestroy(end_);
  }
  Timer(const Timer&) = delete;
  template <class Work>
  float operator()(cudaStream_t stream, const Work& work) const {
    CUDA_CHECK(cudaEventRecord(begin_, stream));
    work();
    CUDA_CHECK(cudaEventRecord(end_, stream));
    CUDA_CHECK(cudaEventSynchronize(end_));
    float ms;
    CUDA_CHECK(cudaEventElapsedTime(&ms, begin_, end_));
    return ms;
  }

 private:
  cudaEvent_t begin_, end_;
};

inline double median(std::vector<double> x) {
  std::nth_element(x.begin(), x.begin() + x.size() / 2, x.end());
  return x[x.size() / 2];
}

// Median microseconds of `work` on `stream` after three warm-up runs; `before` precedes each run, untimed.
template <class Work, class Before>
double median_us(int runs, cudaStream_t stream, const Work& work, const Before& before) {
  const Timer timer;
  std::vector<double> times;
  for (int i = 0; i < runs + 3; ++i) {
    before();
    const float ms = timer(stream, work);
    if (i >= 3) times.push_back(ms * 1e3);
  }
  return median(times);
}
