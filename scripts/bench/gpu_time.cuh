// Captured graphs timed in turns, as between the layers of a model: with a cold L2 and cold instruction caches.
#pragma once

#include <cuda_runtime.h>

#include <functional>
#include <memory>
#include <vector>

#include "gpu_common.cuh"

// Runs through more code than an SM's instruction caches hold, as the layers between two attentions do.
__global__ void much_code(float* x) {
  float y = *x;
#pragma unroll
  for (int i = 0; i < 12288; ++i) y = y * 1.5f + static_cast<float>(i);
  if (y == 12345.0f) *x = y;
}

// Median microseconds of captured graphs over a cold L2 and cold instruction caches, in turns.
inline std::vector<double> time_graphs(const std::vector<std::function<void()>>& bodies, const L2Flush& flush,
                                       int repeats) {
  static float* const x = [] {
    float* pointer;
    CUDA_CHECK(cudaMalloc(&pointer, sizeof(float)));
    return pointer;
  }();
  const cudaStream_t stream = cudaStreamPerThread;
  const Timer timer;
  std::vector<std::unique_ptr<Graph>> graphs;
  for (const auto& body : bodies) graphs.push_back(std::make_unique<Graph>(stream, body));
  std::vector<std::vector<double>> times(bodies.size());
  for (int run = 0; run < repeats + 2; ++run) {
    for (size_t i = 0; i < bodies.size(); ++i) {
      much_code<<<132, 32, 0, stream>>>(x);
      flush(stream);
      const float ms = timer(stream, [&] { graphs[i]->launch(stream); });
      if (run >= 2) times[i].push_back(ms * 1e3);
    }
  }
  std::vector<double> medians;
  for (const auto& taken : times) medians.push_back(median(taken));
  return medians;
}
