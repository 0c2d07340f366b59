// Traits and shared-memory plan of the Hopper prefill kernel; wgmma_sm90_prefill.cuh has the whole picture.
#pragma once

#include "device/mbarrier.cuh"
#include "device/tma.cuh"
#include "params.h"

namespace flashcore::prefill {

// --- Traits ----------------------------------------------------------------------------------------------------------

template <typename T_, int kHeadDim_, int kConsumers_, int kBlockKeys_, int kStages_, int kQueryBuffers_,
          bool kOrdered_, bool kSoftCap_, bool kPacked_ = false>
struct Traits {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kConsumers = kConsumers_;  // warpgroups of 64 queries; 2 or 3
  static constexpr int kBlockKeys = kBlockKeys_;  // keys of one step
  static constexpr int kStages = kStages_;
  static constexpr int kQueryBuffers = kQueryBuffers_;
  static constexpr bool kOrdered = kOrdered_;  // consumers issue their matmuls in turn, so that softmaxes are staggered
  static constexpr bool kSoftCap = kSoftCap_;
  static constexpr bool kPacked = kPacked_;  // for packed rows only

  static constexpr int kRows = 64 * kConsumers;
  static constexpr int kSlabs = kHeadDim / kSlab;
  static constexpr int kThreads = 128 * (kConsumers + 1);
  static constexpr int kProducerRegisters = kConsumers == 2 ? 40 : 32;
  static constexpr int kConsumerRegisters = kConsumers == 2 ? 232 : 160;
  // Which maxima become the reference of their row. One that does has a P of 1, which 16 bits hold and do not round.
  // Where softmax takes longer than the matmuls (D64) all do: in code without a branch that costs nothing, as the
  // products hide behind the exponentials. Packed rows pay 2 to 4 % for it, beside memory that is busy with the others.
  // Elsewhere it would cost 6 to 10 % of the time, and rows of many keys have those alone whose P could exceed
  // 2^kRescaleLog2, rows of few keys, whose errors are the largest, those of more than a share of the row's sum.
  static constexpr bool kLazy = kHeadDim > 64 && !kPacked;
  static constexpr int kFewKeys = 1024;
  static constexpr float kShareOfFew = 1.0f / 256.0f, kRescaleLog2 = 8.0f;
};

// --- Shared memory plan ----------------------------------------------------------------------------------------------

// A tile as those that load its keys and the consumers need it.
struct alignas(16) Job {
  int32_t blocks;  // steps of kBlockKeys keys; kNoMoreJobs ends the kernel
  int32_t q_begin, q_count, packed;
  int32_t kv_head, kv_begin, kv_end, kv_pos;
  int32_t page_begin;
  int32_t partial;
  int32_t position;  // of the first query, counted from the row's first key; the others follow unless packed
};
constexpr int32_t kNoMoreJobs = -1;
constexpr int kJobs = 2;  // the one at work and the next one

template <typename Tr>
struct alignas(1024) Shared {
  typename Tr::T q[Tr::kQueryBuffers][Tr::kSlabs][Tr::kRows][kSlab];
  typename Tr::T k[Tr::kStages][Tr::kSlabs][Tr::kBlockKeys][kSlab];
  typename Tr::T v[Tr::kStages][Tr::kSlabs][Tr::kBlockKeys][kSlab];
  Job jobs[kJobs];
  Mbarrier job_full[kJobs], job_done[kJobs];  // done: nobody reads the job or its Q any more
  Mbarrier q_full[Tr::kQueryBuffers];         // the job is complete, too
  Mbarrier k_full[Tr::kStages], k_empty[Tr::kStages];
  Mbarrier v_full[Tr::kStages], v_empty[Tr::kStages];
};

// The stage and the parity of use number `use` of a ring: one counter is one register where a cursor takes two.
template <int kStages>
__device__ __forceinline__ uint32_t stage_of(uint32_t use) {
  return use % kStages;
}

template <int kStages>
__device__ __forceinline__ uint32_t parity_of(uint32_t use) {
  return use / kStages % 2;
}

// Named barriers; 0 is __syncthreads.
constexpr int kTailBarrier = 1;   // + consumer: its own warps
constexpr int kOrderBarrier = 4;  // + consumer: its turn to issue matmuls

constexpr int kLoadWarps = 3;  // small pages mean many boxes, more than one thread can issue in time

}  // namespace flashcore::prefill
