// Prefill on Hopper: attention of query tiles over a paged KV cache with wgmma and TMA.
//
// What:  one tile is up to 64 * kConsumers packed queries (tokens x group) of one KV head against keys
//        [kv_begin, kv_end) of its row. O = softmax(Q K^T * sm_scale) V, softmax online in base 2.
// Grid:  one persistent CTA an SM. When no row is cut along its keys the CTAs take (row, head) pairs from a shared
//        cursor, a KV head's rows from the last to the first: longest first under a causal mask, and CTAs that run
//        together read the same keys from L2. When rows are cut, CTA c takes the plan's tiles of CTA c.
// Block: one producer warpgroup (one warp issues TMA, one box a page) and kConsumers warpgroups of 64 queries each.
// Smem:  kQueryBuffers tiles of Q, rings of kStages blocks of K and of V, all under the 128-byte swizzle.
// Maths: S of block n - 1 and O += P V of block n run on the tensor cores while the softmax of block n - 1 waits for S
//        only; P stays in registers. O is rescaled only when a row's maximum has grown by more than 2^8.
// After: FlashAttention-3 (Shah et al., 2024) for the warp specialisation, the overlap inside a warpgroup and the order
//        between warpgroups; FlashAttention-4 for the conditional rescale; FlashInfer (Ye et al., 2025) for CSR rows.
#pragma once

#include <cuda_runtime.h>

#include "device/math.cuh"
#include "device/mbarrier.cuh"
#include "device/mma_sm80.cuh"
#include "device/tma.cuh"
#include "device/wgmma.cuh"
#include "params.h"

namespace flashcore::prefill {

// --- Traits ----------------------------------------------------------------------------------------------------------

template <typename T_, int kHeadDim_, int kConsumers_, int kBlockKeys_, int kStages_, int kQueryBuffers_, bool kOrdered_,
          bool kQueryInRegisters_, bool kSoftCap_>
struct Traits {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kConsumers = kConsumers_;  // warpgroups of 64 queries
  static constexpr int kBlockKeys = kBlockKeys_;  // keys of one step
  static constexpr int kStages = kStages_;
  static constexpr int kQueryBuffers = kQueryBuffers_;
  static constexpr bool kOrdered = kOrdered_;  // consumers issue their matmuls in turn, so that softmaxes are staggered
  static constexpr bool kQueryInRegisters = kQueryInRegisters_;
  static constexpr bool kSoftCap = kSoftCap_;

  static constexpr int kRows = 64 * kConsumers;
  static constexpr int kSlabs = kHeadDim / kSlab;
  static constexpr int kThreads = 128 * (kConsumers + 1);
  static constexpr int kProducerRegisters = kConsumers == 2 ? 40 : kConsumers == 3 ? 32 : 24;
  static constexpr int kConsumerRegisters = kConsumers == 2 ? 232 : kConsumers == 3 ? 160 : 120;
  static constexpr uint32_t kQueryBytes = kRows * kHeadDim * sizeof(T);
  static constexpr uint32_t kBlockBytes = kBlockKeys * kHeadDim * sizeof(T);
  static constexpr float kRescaleLog2 = 8.0f;  // P stays below 2^8, well inside fp16
};

// --- Shared memory plan ----------------------------------------------------------------------------------------------

// A tile as the consumers need it.
struct Job {
  int32_t blocks;  // steps of kBlockKeys keys; kNoMoreJobs ends the kernel
  int32_t q_begin, q_count, packed;
  int32_t kv_head, kv_begin, kv_end, kv_pos;
  int32_t partial;
};
constexpr int32_t kNoMoreJobs = -1;

template <typename Tr>
struct alignas(1024) Shared {
  typename Tr::T q[Tr::kQueryBuffers][Tr::kSlabs][Tr::kRows][kSlab];
  typename Tr::T k[Tr::kStages][Tr::kSlabs][Tr::kBlockKeys][kSlab];
  typename Tr::T v[Tr::kStages][Tr::kSlabs][Tr::kBlockKeys][kSlab];
  Job jobs[Tr::kQueryBuffers];
  int next_tile[2];  // from the producer's first warp to its others
  Mbarrier q_full[Tr::kQueryBuffers], q_empty[Tr::kQueryBuffers];
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
constexpr int kProducerBarrier = 1;
constexpr int kTailBarrier = 2;   // all consumers
constexpr int kOrderBarrier = 3;  // + consumer: its turn to issue matmuls

constexpr int kProducerWarps = 4;  // small pages mean many boxes, more than one thread can issue in time

// --- Which tile next -------------------------------------------------------------------------------------------------

class TileSchedule {
 public:
  __device__ explicit TileSchedule(const AttendParams& p) : p_(p), next_(blockIdx.x), range_(blockIdx.x) {
    if (!whole() && range_ < p.plan.num_ctas) next_ = p.plan.cta_indptr[range_];
  }

  // The next tile, or -1; called by one whole warp.
  __device__ int take() {
    const Plan& plan = p_.plan;
    if (whole()) {
      const int num_tiles = plan.counts[kNumTiles], num_rows = plan.counts[kNumRows];
      const int rank = __shfl_sync(0xffffffff, next_, 0);
      if (rank >= num_tiles) return -1;
      // Asked one tile ahead, so that the latency is hidden. Who takes a tile asks once: the last one to ask wraps the
      // cursor to 0, ready for the next launch.
      if (threadIdx.x % 32 == 0) {
        next_ = gridDim.x + atomicInc(reinterpret_cast<unsigned*>(plan.counts + kNextTile), num_tiles - 1);
      }
      const int head = rank / num_rows;
      const int row = num_rows - 1 - (rank - head * num_rows);
      return row * p_.num_kv_heads + head;
    }
    for (; range_ < plan.num_ctas; range_ += gridDim.x) {
      if (next_ < plan.cta_indptr[range_ + 1]) return next_++;
      if (range_ + gridDim.x < plan.num_ctas) next_ = plan.cta_indptr[range_ + gridDim.x];
    }
    return -1;
  }

 private:
  // No row is cut along its keys: tile and (row, head) pair are the same.
  __device__ bool whole() const {
    return p_.plan.counts[kNumTiles] == p_.plan.counts[kNumRows] * p_.num_kv_heads;
  }

  const AttendParams& p_;
  int next_, range_;
};

// --- Producer --------------------------------------------------------------------------------------------------------

struct Maps {
  CUtensorMap q, q_token, k, v;  // q_token: boxes of one token, for rows whose tokens are scattered
  int32_t box_keys;              // keys of a box of k and v; divides page_size and kBlockKeys
};

// One thread: tells the consumers about a tile and fetches its queries.
template <typename Tr>
__device__ void load_query(const AttendParams& p, const Maps& maps, Shared<Tr>& smem, uint32_t buffer, const Tile& tile,
                           int row_index, int kv_head, int blocks) {
  const Row row = p.plan.rows[row_index];
  const bool packed = row.flags & kPacked;
  smem.jobs[buffer] = Job{blocks,        row.q_begin, row.q_count, packed,      kv_head,
                          tile.kv_begin, tile.kv_end, row.kv_pos,  tile.partial};
  const int group = p.num_qo_heads / p.num_kv_heads;
  const int tokens = blocks == 0 ? 0 : packed ? row.q_count : Tr::kRows / group;
  Mbarrier* const full = &smem.q_full[buffer];
  mbarrier_arrive_expect_tx(full, tokens * group * Tr::kHeadDim * sizeof(typename Tr::T));
  if (tokens == 0) return;
#pragma unroll 1
  for (int slab = 0; slab < Tr::kSlabs; ++slab) {
    if (!packed) {
      tma_load_query(smem.q[buffer][slab][0], &maps.q, full, row.q_begin, slab, kv_head, kEvictFirst);
      continue;
    }
#pragma unroll 1
    for (int i = 0; i < tokens; ++i) {
      const int token = p.plan.row_tokens[row.q_begin + i];
      tma_load_query(smem.q[buffer][slab][i * group], &maps.q_token, full, token, slab, kv_head, kEvictFirst);
    }
  }
}

// The producer's warps fetch Q of each tile and, dealing its boxes among them, its blocks of K and V, last block first.
template <typename Tr>
__device__ void produce(const AttendParams& p, const Maps& maps, Shared<Tr>& smem) {
  constexpr int kBlockKeys = Tr::kBlockKeys;
  const Plan& plan = p.plan;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  // A block is loaded in (keys / box_keys) * kSlabs boxes; this warp issues numbers warp, warp + kProducerWarps, ...
  const int boxes = kBlockKeys / maps.box_keys * Tr::kSlabs;
  const int own_boxes = (boxes - warp + kProducerWarps - 1) / kProducerWarps;
  uint32_t kv_use = 0;  // of V; K runs one block ahead
  TileSchedule schedule(p);

  for (uint32_t tiles = 0;; ++tiles) {
    int& next_tile = smem.next_tile[tiles % 2];
    if (warp == 0) {
      const int taken = schedule.take();
      if (lane == 0) next_tile = taken;
    }
    named_barrier_sync(kProducerBarrier, 32 * kProducerWarps);
    const int t = next_tile;
    const uint32_t buffer = stage_of<Tr::kQueryBuffers>(tiles);
    const uint32_t buffer_parity = parity_of<Tr::kQueryBuffers>(tiles) ^ 1;
    if (t < 0) {
      if (warp == 0) {
        mbarrier_wait(&smem.q_empty[buffer], buffer_parity);
        if (lane == 0) {
          smem.jobs[buffer].blocks = kNoMoreJobs;
          mbarrier_arrive(&smem.q_full[buffer]);
        }
      }
      return;
    }
    const Tile tile = plan.tiles[t];
    const int row_index = tile.pair / p.num_kv_heads;
    const int kv_head = tile.pair - row_index * p.num_kv_heads;
    const int32_t* pages = plan.kv_indices + plan.rows[row_index].page_begin;
    pages += static_cast<int64_t>(kv_head) * plan.rows[row_index].head_stride;
    const int blocks = (tile.kv_end - tile.kv_begin + kBlockKeys - 1) / kBlockKeys;

    // The page of this lane's box of a block, and the token in it. A box without keys lies outside the cache: TMA
    // writes zeros.
    const auto locate = [&](int block, int& page, int& token) {
      const int box = warp + lane * kProducerWarps;
      const int key = tile.kv_begin + block * kBlockKeys + box / Tr::kSlabs * maps.box_keys;
      const int column = key / p.page_size;
      token = key - column * p.page_size;
      page = lane < own_boxes && key < tile.kv_end ? pages[column] : p.num_pages;
    };
    const auto load = [&](auto& ring, const CUtensorMap& map, Mbarrier* full, Mbarrier* empty, uint32_t use, int page,
                          int token) {
      const uint32_t stage = stage_of<Tr::kStages>(use);
      mbarrier_wait(&empty[stage], parity_of<Tr::kStages>(use) ^ 1);
      if (lane == 0) mbarrier_arrive_expect_tx(&full[stage], own_boxes * maps.box_keys * kSlab * sizeof(typename Tr::T));
#pragma unroll 1
      for (int i = 0; i < own_boxes; ++i) {
        const int box_page = __shfl_sync(0xffffffff, page, i);
        const int box_token = __shfl_sync(0xffffffff, token, i);
        const int box = warp + i * kProducerWarps;
        const int slab = box % Tr::kSlabs, key = box / Tr::kSlabs * maps.box_keys;
        if (lane == 0) {
          tma_load_cache(ring[stage][slab][key], &map, &full[stage], box_token, slab, kv_head, box_page, kEvictNormal);
        }
      }
      __syncwarp();
    };
    const auto load_k = [&](uint32_t use, int page, int token) {
      load(smem.k, maps.k, smem.k_full, smem.k_empty, use, page, token);
    };
    const auto load_v = [&](uint32_t use, int page, int token) {
      load(smem.v, maps.v, smem.v_full, smem.v_empty, use, page, token);
    };

    // In the order of use: K of a block, then V of the block before it.
    int page, token;
    if (blocks > 0) {
      locate(blocks - 1, page, token);
      load_k(kv_use, page, token);
    }

    if (warp == 0) {
      mbarrier_wait(&smem.q_empty[buffer], buffer_parity);
      if (lane == 0) load_query(p, maps, smem, buffer, tile, row_index, kv_head, blocks);
      __syncwarp();
    }
    if (blocks == 0) continue;

    for (int block = blocks - 2; block >= 0; --block, ++kv_use) {
      int next_page, next_token;
      locate(block, next_page, next_token);
      load_k(kv_use + 1, next_page, next_token);
      load_v(kv_use, page, token);
      page = next_page;
      token = next_token;
    }
    load_v(kv_use++, page, token);
  }
}

// --- Consumers -------------------------------------------------------------------------------------------------------

// S = Q K^T for 64 queries; asynchronous.
template <typename Tr>
__device__ __forceinline__ void issue_qk(float (&s)[Tr::kBlockKeys / 2], uint64_t q, uint64_t k) {
  using Mma = Wgmma<Tr::kBlockKeys, typename Tr::T>;
#pragma unroll
  for (int step = 0; step < Tr::kHeadDim / 16; ++step) {
    const uint64_t a = wgmma_advance(q, step / 4 * Tr::kRows * 128 + step % 4 * 32);
    const uint64_t b = wgmma_advance(k, step / 4 * Tr::kBlockKeys * 128 + step % 4 * 32);
    Mma::template ss<0, 0>(s, a, b, step > 0);
  }
  wgmma_commit();
}

// The same with Q in registers, which spares shared memory a third of its reads.
template <typename Tr>
__device__ __forceinline__ void issue_qk(float (&s)[Tr::kBlockKeys / 2], const uint32_t (&q)[Tr::kHeadDim / 16][4],
                                         uint64_t k) {
  using Mma = Wgmma<Tr::kBlockKeys, typename Tr::T>;
#pragma unroll
  for (int step = 0; step < Tr::kHeadDim / 16; ++step) {
    Mma::template rs<0>(s, q[step], wgmma_advance(k, step / 4 * Tr::kBlockKeys * 128 + step % 4 * 32), step > 0);
  }
  wgmma_commit();
}

// This warp's 16 queries as A operands.
template <typename Tr>
__device__ __forceinline__ void load_query_registers(uint32_t (&q)[Tr::kHeadDim / 16][4],
                                                     const typename Tr::T (&tile)[Tr::kSlabs][Tr::kRows][kSlab]) {
  const int row = (threadIdx.x - 128) / 32 * 16 + threadIdx.x % 16;
#pragma unroll
  for (int step = 0; step < Tr::kHeadDim / 16; ++step) {
    const int chunk = step % 4 * 2 + threadIdx.x % 32 / 16;
    load_matrix_x4(q[step], shared_address(&tile[step / 4][row][(chunk ^ row % 8) * 8]));
  }
}

// O += P V; asynchronous.
template <typename Tr>
__device__ __forceinline__ void issue_pv(float (&o)[Tr::kHeadDim / 2], const uint32_t (&p)[Tr::kBlockKeys / 4],
                                         uint64_t v) {
  using Mma = Wgmma<Tr::kHeadDim, typename Tr::T>;
#pragma unroll
  for (int step = 0; step < Tr::kBlockKeys / 16; ++step) {
    Mma::template rs<1>(o, p + 4 * step, wgmma_advance(v, step * 16 * 128), true);
  }
  wgmma_commit();
}

// The two rows a thread holds: which keys they see, and their running softmax.
struct RowState {
  int32_t first[2], last[2];  // visible keys of the row, inclusive
  float reference[2];         // the maximum logit P is relative to, in units of the raw logits
  float sum[2];               // of this thread's columns
};

// Sets logits of keys outside [first, last] to -inf. `begin`: the first key of the block.
template <int kElements>
__device__ __forceinline__ void mask(float (&s)[kElements], const RowState& rows, int begin) {
  const int column = begin + threadIdx.x % 4 * 2;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int last = rows.last[i] - column, first = rows.first[i] - column;
#pragma unroll
    for (int j = 0; j < kElements / 4; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& logit = s[4 * j + 2 * i + e];
        if (8 * j + e > last || 8 * j + e < first) logit = -INFINITY;
      }
    }
  }
}

// Turns logits into P relative to the row's reference. Returns whether the reference moved; then O * factor[i] is due.
template <typename Tr>
__device__ __forceinline__ bool softmax(float (&s)[Tr::kBlockKeys / 2], RowState& rows, float scale_log2,
                                        float (&factor)[2]) {
  constexpr int kElements = Tr::kBlockKeys / 2;
  float maximum[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float even = s[2 * i], odd = s[2 * i + 1];
#pragma unroll
    for (int j = 1; j < kElements / 4; ++j) {
      even = fmaxf(even, s[4 * j + 2 * i]);
      odd = fmaxf(odd, s[4 * j + 2 * i + 1]);
    }
    maximum[i] = fmaxf(even, odd);
    maximum[i] = fmaxf(maximum[i], __shfl_xor_sync(0xffffffff, maximum[i], 1));
    maximum[i] = fmaxf(maximum[i], __shfl_xor_sync(0xffffffff, maximum[i], 2));
  }
  // With no key seen yet the reference is -inf: any finite maximum exceeds it; -inf - -inf is NaN and compares false.
  const bool grown = (maximum[0] - rows.reference[0]) * scale_log2 > Tr::kRescaleLog2 ||
                     (maximum[1] - rows.reference[1]) * scale_log2 > Tr::kRescaleLog2;
  const bool moved = __any_sync(0xffffffff, grown);
  if (moved) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float reference = fmaxf(rows.reference[i], maximum[i]);
      factor[i] = reference == -INFINITY ? 1.0f : exp2_fast((rows.reference[i] - reference) * scale_log2);
      rows.sum[i] *= factor[i];
      rows.reference[i] = reference;
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float offset = rows.reference[i] == -INFINITY ? 0.0f : rows.reference[i] * scale_log2;
    float even = 0.0f, odd = 0.0f;
#pragma unroll
    for (int j = 0; j < kElements / 4; ++j) {
      float& a = s[4 * j + 2 * i];
      float& b = s[4 * j + 2 * i + 1];
      a = exp2_fast(fmaf(a, scale_log2, -offset));
      b = exp2_fast(fmaf(b, scale_log2, -offset));
      even += a;
      odd += b;
    }
    rows.sum[i] += even + odd;
  }
  return moved;
}

// Lane q of four holds word q of four columns' chunks; afterwards it holds the four words of chunk q.
__device__ __forceinline__ void transpose_quad(uint32_t (&words)[4]) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool upper = threadIdx.x & bit;
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      uint32_t& a = words[bit == 1 ? 2 * pair : pair];
      uint32_t& b = words[bit == 1 ? 2 * pair + 1 : pair + 2];
      const uint32_t received = __shfl_xor_sync(0xffffffff, upper ? a : b, bit);
      (upper ? a : b) = received;
    }
  }
}

// P is 0 for keys beyond the last, but what a page holds there may be NaN, and 0 * NaN is NaN: the consumers together
// write zeros to the rows of V from `tail` to the end of its box.
template <typename Tr>
__device__ __forceinline__ void clear_tail(Shared<Tr>& smem, uint32_t use, int tail) {
  const int end = min((tail + 63) / 64 * 64, Tr::kBlockKeys);  // boxes are at most 64 keys
  if (tail >= end) return;
  constexpr int kChunks = Tr::kSlabs * 8;  // 16-byte chunks of a key
  constexpr int kConsumerThreads = Tr::kThreads - 128;
  const uint32_t stage = stage_of<Tr::kStages>(use);
  mbarrier_wait(&smem.v_full[stage], parity_of<Tr::kStages>(use));
  for (int i = threadIdx.x - 128; i < (end - tail) * kChunks; i += kConsumerThreads) {
    auto& row = smem.v[stage][i / 8 % Tr::kSlabs][tail + i / kChunks];
    reinterpret_cast<uint4*>(row)[i % 8] = uint4{0, 0, 0, 0};
  }
  fence_proxy_async();
  named_barrier_sync(kTailBarrier, kConsumerThreads);
}

// O / sum and the LSE of a thread's two rows.
template <typename Tr>
__device__ __forceinline__ void write_output(const AttendParams& p, const float (&o)[Tr::kHeadDim / 2],
                                             const RowState& rows, const int (&out_row)[2], bool partial,
                                             float softmax_scale) {
  using T = typename Tr::T;
  const int quad = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float sum = rows.sum[i];
    sum += __shfl_xor_sync(0xffffffff, sum, 1);
    sum += __shfl_xor_sync(0xffffffff, sum, 2);
    const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
    const float lse = sum == 0.0f ? -INFINITY : rows.reference[i] * softmax_scale + log2f(sum);
    const bool valid = out_row[i] >= 0;
    const int64_t element = static_cast<int64_t>(out_row[i]) * Tr::kHeadDim;
    float* const lse_out = partial ? p.partial_lse : p.lse;
    if (valid && quad == 0 && lse_out != nullptr) lse_out[out_row[i]] = lse;
    if (partial) {
      float2* const out = reinterpret_cast<float2*>(p.partial_o + element) + quad;
#pragma unroll
      for (int j = 0; j < Tr::kHeadDim / 8; ++j) {
        if (valid) out[4 * j] = float2{o[4 * j + 2 * i] * inverse, o[4 * j + 2 * i + 1] * inverse};
      }
    } else {
      uint4* const out = reinterpret_cast<uint4*>(static_cast<T*>(p.out) + element) + quad;
#pragma unroll
      for (int j = 0; j < Tr::kHeadDim / 32; ++j) {
        uint32_t words[4];
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          const int at = 16 * j + 4 * w + 2 * i;
          words[w] = pack2<T>(o[at] * inverse, o[at + 1] * inverse);
        }
        transpose_quad(words);
        if (valid) out[4 * j] = uint4{words[0], words[1], words[2], words[3]};
      }
    }
  }
}

template <typename Tr>
__device__ void consume(const AttendParams& p, Shared<Tr>& smem) {
  using T = typename Tr::T;
  constexpr int kBlockKeys = Tr::kBlockKeys;
  constexpr int kHeadDim = Tr::kHeadDim;
  const Plan& plan = p.plan;
  // From lane 0: the compiler then knows it is the same in the warp and keeps descriptors in uniform registers.
  const int consumer = __shfl_sync(0xffffffff, threadIdx.x / 128, 0) - 1;
  const int lane = threadIdx.x % 32;
  const int group = p.num_qo_heads / p.num_kv_heads;
  const float log2_scale = p.sm_scale * kLog2E;
  // With a soft cap the logits are already scaled when softmax sees them.
  const float softmax_scale = Tr::kSoftCap ? kLog2E : log2_scale;
  constexpr int kStages = Tr::kStages;
  uint32_t use = 0;  // of the rings, the block whose V is next

  const auto turn_wait = [&] {
    if constexpr (Tr::kOrdered) named_barrier_sync(kOrderBarrier + consumer, 256);
  };
  const auto turn_pass = [&] {
    if constexpr (Tr::kOrdered) named_barrier_arrive(kOrderBarrier + (consumer + 1) % Tr::kConsumers, 256);
  };
  const auto release = [&](Mbarrier& empty) {
    if (lane == 0) mbarrier_arrive(&empty);
  };
  if (consumer == Tr::kConsumers - 1) turn_pass();

  for (uint32_t tiles = 0;; ++tiles) {
    const uint32_t buffer = stage_of<Tr::kQueryBuffers>(tiles);
    mbarrier_wait(&smem.q_full[buffer], parity_of<Tr::kQueryBuffers>(tiles));
    const Job& job = smem.jobs[buffer];
    const int blocks = job.blocks;
    if (blocks == kNoMoreJobs) return;
    const int kv_begin = job.kv_begin;
    const int tail = (job.kv_end - kv_begin) - (blocks - 1) * kBlockKeys;  // keys of the last block
    const bool partial = job.partial >= 0;

    RowState rows;
    int out_row[2];  // of partial_o when partial, else of out; -1: a packed query beyond the row
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int query = threadIdx.x % 128 / 32 * 16 + consumer * 64 + lane / 4 + 8 * i;
      const int index = query / group;
      rows.first[i] = kv_begin;
      rows.last[i] = job.kv_end - 1;
      rows.reference[i] = -INFINITY;
      rows.sum[i] = 0.0f;
      out_row[i] = -1;
      if (index < job.q_count) {
        const int token = job.packed ? plan.row_tokens[job.q_begin + index] : job.q_begin + index;
        const int head = job.kv_head * group + query - index * group;
        out_row[i] = partial ? job.partial + query : token * p.num_qo_heads + head;
        if (p.causal || p.window_left >= 0) {
          const int position = plan.positions[token] - job.kv_pos;
          if (p.causal) rows.last[i] = min(rows.last[i], position);
          if (p.window_left >= 0) rows.first[i] = max(rows.first[i], position - p.window_left);
        }
      }
    }
    // Blocks inside [first_of_all, last_of_all] need no mask in this warp.
    const int first_of_all = __reduce_max_sync(0xffffffff, max(rows.first[0], rows.first[1]));
    const int last_of_all = __reduce_min_sync(0xffffffff, min(rows.last[0], rows.last[1]));

    float s[kBlockKeys / 2], o[kHeadDim / 2];
    uint32_t probabilities[kBlockKeys / 4];
    float factor[2];
#pragma unroll
    for (float& x : o) x = 0.0f;

    uint32_t q_registers[kHeadDim / 16][4];
    if constexpr (Tr::kQueryInRegisters) {
      load_query_registers<Tr>(q_registers, smem.q[buffer]);
      __syncwarp();
      release(smem.q_empty[buffer]);
    }
    const uint64_t q = wgmma_descriptor(smem.q[buffer][0][consumer * 64]);
    const auto begin_qk = [&](uint32_t k_use) {
      mbarrier_wait(&smem.k_full[stage_of<kStages>(k_use)], parity_of<kStages>(k_use));
      wgmma_fence();
      const uint64_t k = wgmma_descriptor(smem.k[stage_of<kStages>(k_use)]);
      if constexpr (Tr::kQueryInRegisters) {
        issue_qk<Tr>(s, q_registers, k);
      } else {
        issue_qk<Tr>(s, q, k);
      }
    };
    const auto begin_pv = [&] {
      mbarrier_wait(&smem.v_full[stage_of<kStages>(use)], parity_of<kStages>(use));
      wgmma_fence();
      issue_pv<Tr>(o, probabilities, wgmma_descriptor(smem.v[stage_of<kStages>(use)], kBlockKeys * 128));
    };
    // `begin`: the block's first key.
    const auto logits_to_p = [&](int begin) {
      if constexpr (Tr::kSoftCap) {
        const float inner = p.sm_scale / p.logits_soft_cap;
#pragma unroll
        for (float& logit : s) logit = p.logits_soft_cap * tanh_exp2(logit * inner);
      }
      if (begin < first_of_all || begin + kBlockKeys - 1 > last_of_all) mask(s, rows, begin);
      return softmax<Tr>(s, rows, softmax_scale, factor);
    };
    const auto pack_p = [&] {
#pragma unroll
      for (int i = 0; i < kBlockKeys / 4; ++i) probabilities[i] = pack2<T>(s[2 * i], s[2 * i + 1]);
    };

    if (blocks > 0) {
      // Blocks at the end that none of this warpgroup's queries sees: handed back unread.
      int skipped = 0;
      if (p.causal && !job.packed) {
        const int index = min(job.q_count - 1, (64 * consumer + 63) / group);
        const int last = plan.positions[job.q_begin + index] - job.kv_pos;
        // Equal in all lanes anyway; reduced, the compiler knows, and keeps ring stages in uniform registers.
        skipped = __reduce_max_sync(0xffffffff, blocks - 1 - min(max(last - kv_begin, 0) / kBlockKeys, blocks - 1));
        if (skipped > 0) clear_tail<Tr>(smem, use, tail);
        for (int i = 0; i < skipped; ++i, ++use) {
          turn_wait();
          turn_pass();
          mbarrier_wait(&smem.k_full[stage_of<kStages>(use)], parity_of<kStages>(use));
          release(smem.k_empty[stage_of<kStages>(use)]);
          mbarrier_wait(&smem.v_full[stage_of<kStages>(use)], parity_of<kStages>(use));
          release(smem.v_empty[stage_of<kStages>(use)]);
        }
      }
      int begin = kv_begin + (blocks - 1 - skipped) * kBlockKeys;
      begin_qk(use);
      wgmma_wait<0>();
      wgmma_pin(s);
      release(smem.k_empty[stage_of<kStages>(use)]);
      logits_to_p(begin);
      pack_p();
      if (skipped == 0) clear_tail<Tr>(smem, use, tail);

      for (begin -= kBlockKeys; begin >= kv_begin; begin -= kBlockKeys, ++use) {
        turn_wait();
        begin_qk(use + 1);
        begin_pv();
        turn_pass();
        wgmma_wait<1>();
        wgmma_pin(s);
        release(smem.k_empty[stage_of<kStages>(use + 1)]);
        const bool moved = logits_to_p(begin);
        // The wait stands in both branches, because a branch is what ptxas will not move it across: above the
        // exponentials it would leave nothing to overlap with P V.
        if (moved) {
          wgmma_wait<0>();
          wgmma_pin(o);
#pragma unroll
          for (int i = 0; i < kHeadDim / 2; ++i) o[i] *= factor[i / 2 % 2];
        } else {
          wgmma_wait<0>();
          wgmma_pin(o);
        }
        wgmma_pin(s);  // packing it any earlier would need a second set of registers for P
        release(smem.v_empty[stage_of<kStages>(use)]);
        pack_p();
      }
      if constexpr (!Tr::kQueryInRegisters) release(smem.q_empty[buffer]);
      begin_pv();
      wgmma_wait<0>();
      wgmma_pin(o);
      release(smem.v_empty[stage_of<kStages>(use)]);
      ++use;
    } else if constexpr (!Tr::kQueryInRegisters) {
      __syncwarp();
      release(smem.q_empty[buffer]);
    }
    write_output<Tr>(p, o, rows, out_row, partial, softmax_scale);
  }
}

// --- Kernel ----------------------------------------------------------------------------------------------------------

template <typename Tr>
__global__ void __launch_bounds__(Tr::kThreads, 1)
    prefill_kernel(const __grid_constant__ AttendParams p, const __grid_constant__ Maps maps) {
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  Shared<Tr>& smem = *reinterpret_cast<Shared<Tr>*>(shared_bytes);
  if (threadIdx.x == 0) {
    constexpr int kConsumerWarps = 4 * Tr::kConsumers;
    for (int i = 0; i < Tr::kQueryBuffers; ++i) {
      mbarrier_init(&smem.q_full[i], 1);
      mbarrier_init(&smem.q_empty[i], kConsumerWarps);
    }
    for (int i = 0; i < Tr::kStages; ++i) {
      mbarrier_init(&smem.k_full[i], kProducerWarps);
      mbarrier_init(&smem.k_empty[i], kConsumerWarps);
      mbarrier_init(&smem.v_full[i], kProducerWarps);
      mbarrier_init(&smem.v_empty[i], kConsumerWarps);
    }
    mbarrier_init_fence();
  }
  __syncthreads();

  if (threadIdx.x < 128) {
    warpgroup_lower_registers<Tr::kProducerRegisters>();
    produce<Tr>(p, maps, smem);
  } else {
    warpgroup_raise_registers<Tr::kConsumerRegisters>();
    consume<Tr>(p, smem);
  }
}

// --- Launcher --------------------------------------------------------------------------------------------------------

template <typename Tr>
cudaError_t launch(const AttendParams& p) {
  const int group = p.num_qo_heads / p.num_kv_heads;
  const int box_keys = p.page_size % 64 == 0 && Tr::kBlockKeys % 64 == 0 ? 64
                       : p.page_size % 32 == 0 && Tr::kBlockKeys % 32 == 0 ? 32
                       : p.page_size % 16 == 0                             ? 16
                       : p.page_size % 8 == 0                              ? 8
                                                                           : 0;
  if (box_keys == 0 || p.plan.rows_per_tile > Tr::kRows) return cudaErrorNotSupported;

  const Queries queries{p.q,         p.dtype,          p.head_dim,       p.num_kv_heads, group,
                        p.num_tokens, p.q_stride_token, p.q_stride_head};
  PagedCache cache{p.k,          p.dtype,         p.head_dim,       p.page_size,    p.num_kv_heads,
                   p.num_pages, p.k_stride_page, p.k_stride_token, p.k_stride_head};
  Maps maps;
  maps.box_keys = box_keys;
  cudaError_t error = make_query_map(&maps.q, queries, Tr::kRows / group);
  if (error == cudaSuccess) error = make_query_map(&maps.q_token, queries, 1);
  if (error == cudaSuccess) error = make_cache_map(&maps.k, cache, box_keys, 1);
  cache.base = p.v;
  cache.stride_page = p.v_stride_page;
  cache.stride_token = p.v_stride_token;
  cache.stride_head = p.v_stride_head;
  if (error == cudaSuccess) error = make_cache_map(&maps.v, cache, box_keys, 1);
  if (error != cudaSuccess) return error;

  constexpr int kSharedBytes = sizeof(Shared<Tr>);
  error = cudaFuncSetAttribute(prefill_kernel<Tr>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return error;
  prefill_kernel<Tr><<<p.num_sms, Tr::kThreads, kSharedBytes, static_cast<cudaStream_t>(p.stream)>>>(p, maps);
  return cudaGetLastError();
}

}  // namespace flashcore::prefill
