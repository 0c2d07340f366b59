// Traits and shared-memory plan of the Hopper prefill kernel; wgmma_sm90_prefill.cuh has the whole picture.
#pragma once

#include "device/mbarrier.cuh"
#include "device/tma.cuh"
#include "params.h"

namespace flashcore::prefill {

// --- Traits ----------------------------------------------------------------------------------------------------------

template <typename T_, int kHeadDim_, int kConsumers_, int kBlockKeys_, int kStages_, int kQueryBuffers_,
          bool kOverlap_, bool kSoftCap_>
struct Traits {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kConsumers = kConsumers_;  // warpgroups of 64 queries; 2 or 3
  static constexpr int kBlockKeys = kBlockKeys_;  // keys of one step
  static constexpr int kStages = kStages_;
  static constexpr int kQueryBuffers = kQueryBuffers_;
  // Whether a consumer's S of the next block and P V of this one run beside each other. Else one follows the other, and
  // S and P share registers: then there is room for a third consumer at head size 128.
  static constexpr bool kOverlap = kOverlap_;
  // Whether it looks for new maxima before it raises references: a branch, which hinders matmuls that run beside it.
  static constexpr bool kSkip = !kOverlap;
  static constexpr bool kSoftCap = kSoftCap_;

  static constexpr int kRows = 64 * kConsumers;
  static constexpr int kSlabs = kHeadDim / kSlab;
  static constexpr int kThreads = 128 * (kConsumers + 1);
  static constexpr int kProducerRegisters = kConsumers == 2 ? 40 : 32;
  static constexpr int kConsumerRegisters = kConsumers == 2 ? 232 : 160;
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

constexpr int kLoadWarps = 2;  // one cannot issue the boxes of small pages in time; a third takes issue slots

}  // namespace flashcore::prefill
