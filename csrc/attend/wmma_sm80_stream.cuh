// wmma_sm80: from page indices to blocks of K and V in shared memory.
#pragma once

#include "attend/wmma_sm80_tile.cuh"
#include "device/async_copy.cuh"

namespace flashcore::wmma_sm80 {

// Streams the blocks of a tile through the ring: kStages - 1 blocks are on their way while one is computed, and the
// page of a key is looked up a whole block before its copy is issued.
template <typename Element, int kHeadDim, int kKeys, int kStages>
class KeyStream {
  using Block = SwizzledTile<kHeadDim>;
  static constexpr int kStageBytes = 2 * kKeys * Block::kRowBytes;

 public:
  static constexpr int kVOffset = kKeys * Block::kRowBytes;  // from K to V of a stage

  // Looks up the first kStages blocks; __syncthreads before start().
  __device__ __forceinline__ KeyStream(const AttendParams& p, const Work& work, unsigned char* ring,
                                       KeyAddress<Element>* addresses)
      : p_(p),
        work_(work),
        begin_(work.tile.kv_begin),
        end_(work.tile.kv_end),
        ring_(shared_address(ring)),
        addresses_(addresses) {
#pragma unroll
    for (int first = 0; first < kStages * kKeys; first += kThreads) {
      const int i = first + threadIdx.x, key = begin_ + i;
      if (i < kStages * kKeys && key < end_) addresses[i] = locate(key, work.pages[key / p.page_size]);
    }
  }

  // Issues the first copies.
  __device__ __forceinline__ void start() const {
#pragma unroll
    for (int stage = 0; stage < kStages - 1; ++stage) {
      load(begin_ + stage * kKeys, stage);
      copy_async_commit();
    }
  }

  // Calls compute(first key, K in shared memory) for each block, all threads together.
  template <typename Compute>
  __device__ __forceinline__ void for_each_block(Compute&& compute) const {
    int stage = 0;
    for (int key = begin_; key < end_; key += kKeys) {
      copy_async_wait<kStages - 2>();
      __syncthreads();  // the block has arrived, its addresses are free, and so is the stage before it
      const int next_key = key + kStages * kKeys + threadIdx.x;
      const bool has_next = threadIdx.x < kKeys && next_key < end_;
      int page = 0;
      if (has_next) page = work_.pages[next_key / p_.page_size];
      load(key + (kStages - 1) * kKeys, stage == 0 ? kStages - 1 : stage - 1);
      copy_async_commit();
      compute(key, ring_ + stage * kStageBytes);
      if (has_next) addresses_[stage * kKeys + threadIdx.x] = locate(next_key, page);
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }
  }

 private:
  __device__ __forceinline__ KeyAddress<Element> locate(int key, int page) const {
    const int64_t token = key % p_.page_size, head = work_.kv_head;
    return {static_cast<const Element*>(p_.k) + page * p_.k_stride_page + token * p_.k_stride_token +
                head * p_.k_stride_head,
            static_cast<const Element*>(p_.v) + page * p_.v_stride_page + token * p_.v_stride_token +
                head * p_.v_stride_head};
  }

  // Keys past the end become zeros: a masked key has weight 0, and 0 * NaN of a stale V would not be 0.
  __device__ __forceinline__ void load(int key, int stage) const {
    if (key >= end_) return;
    const uint32_t block = ring_ + stage * kStageBytes;
    Block::template for_each_chunk<kKeys>([&](int row, int chunk) {
      const KeyAddress<Element> address = addresses_[stage * kKeys + row];
      const uint32_t to = block + Block::offset(row, chunk);
      const bool valid = key + row < end_;
      copy_async_16<Block::kRowBytes>(to, valid ? address.k + chunk * 8 : p_.k, valid);
      copy_async_16<Block::kRowBytes>(to + kVOffset, valid ? address.v + chunk * 8 : p_.v, valid);
    });
  }

  const AttendParams& p_;
  const Work& work_;
  const int begin_, end_;
  const uint32_t ring_;
  KeyAddress<Element>* const addresses_;
};

}  // namespace flashcore::wmma_sm80
