// A stream beside the caller's, for work that may run at the same time: from fork to join.
//
// In a capture it belongs to the graph until that ends: nothing else may run on it meanwhile.
#pragma once

#include <cuda_runtime.h>

#include <map>
#include <mutex>

namespace flashcore {

class SideStream {
 public:
  SideStream() {
    error_ = cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking);
    for (cudaEvent_t* event : {&fork_, &join_}) {
      if (error_ == cudaSuccess) error_ = cudaEventCreateWithFlags(event, cudaEventDisableTiming);
    }
  }
  SideStream(const SideStream&) = delete;

  cudaStream_t stream() const { return stream_; }
  // To be recorded, on another stream or by a kernel, where the work here may begin.
  cudaEvent_t fork() const { return fork_; }

  // What this stream gets from here on waits for `fork`.
  cudaError_t begin_after(cudaEvent_t fork) {
    return error_ == cudaSuccess ? cudaStreamWaitEvent(stream_, fork) : error_;
  }
  // What `stream` gets from here on waits for all that this one has.
  cudaError_t join(cudaStream_t stream) {
    const cudaError_t error = error_ == cudaSuccess ? cudaEventRecord(join_, stream_) : error_;
    return error == cudaSuccess ? cudaStreamWaitEvent(stream, join_) : error;
  }

 private:
  cudaError_t error_;  // of its making
  cudaStream_t stream_ = nullptr;
  cudaEvent_t fork_ = nullptr, join_ = nullptr;
};

// A T for each device, made where it is first asked for, and a lock: one thread at a time hands out work by it.
template <typename T>
class OnDevice {
 public:
  OnDevice() : lock_(state().mutex) {
    int device = 0;
    error_ = cudaGetDevice(&device);
    value_ = &state().values[device];
  }
  cudaError_t error() const { return error_; }
  T& operator*() const { return *value_; }
  T* operator->() const { return value_; }

 private:
  struct State {
    std::mutex mutex;
    std::map<int, T> values;
  };
  static State& state() {
    static State of_all;
    return of_all;
  }

  std::lock_guard<std::mutex> lock_;
  cudaError_t error_;
  T* value_;
};

}  // namespace flashcore
