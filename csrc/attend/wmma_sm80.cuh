// Attention over a plan with the warp-wide tensor-core instructions of sm_80 (mma.sync), for every GPU since Ampere.
//
// Grid: plan.num_ctas persistent CTAs, CTA c takes tiles cta_indptr[c]..cta_indptr[c + 1]. Block: 4 warps, two CTAs an SM.
// Shared memory: a ring of (K, V) stages filled by cp.async, the addresses of the keys to come, one RowInfo a query, and
// Q. Rows of K, V and Q are XOR-swizzled in 16-byte chunks so that ldmatrix meets no bank conflict.
//
//   S = Q K^T;  P = 2^(scale S - m);  O = O 2^(m_old - m) + P V;  l = l 2^(m_old - m) + sum(P);  out = O / l
//
// P never leaves the registers: the accumulators of QK^T, packed to 16 bits, are the A operand of PV. Two shapes of tile:
//   tall   each warp owns 16 * kMTiles packed queries and walks all keys. 32 queries a warp halve the shared-memory reads
//          of K and V for each product, which bound the 16-query form.
//   short  at most 16 packed queries (decode): all warps hold them, each takes 16 keys of every block, and their
//          (O, m, l) are merged in shared memory at the end.
// Keys are found through an address table in shared memory, written one block ahead of the copies that read it, so
// page sizes differ in nothing but the contents of that table.
//
// Method: FlashAttention-2 (Dao, 2023); the lazy rescale of O is FlashAttention-4's.
#pragma once

#include <cuda_runtime.h>

#include <bit>
#include <climits>

#include "device/async_copy.cuh"
#include "device/math.cuh"
#include "device/mma_sm80.cuh"
#include "params.h"

namespace flashcore::wmma_sm80 {

// ---------------------------------------------------------------------------------------------------------- traits

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kShortRows = 16;
constexpr int kRingBytes = 96 * 1024;  // K and V stages, and Q of a tall tile: two CTAs fit the 227 KB of Hopper

template <typename Element_, int kHeadDim_, int kMTiles_>
struct Traits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kMTiles = kMTiles_;                    // 16-row tiles of a warp in a tall tile
  static constexpr int kRows = 16 * kMTiles * kWarps;         // packed queries of a tall tile
  static constexpr int kQBytes = kRows * kHeadDim * 2;
  static constexpr bool kQInRegisters = kMTiles * kHeadDim <= 128;  // beside O and S they still fit 255
  // Keys of a block: a tall tile's S must fit the registers beside O; a short tile wants blocks worth their barrier.
  static constexpr int kTallKeys = kHeadDim <= 128 ? 64 : 32;
  static constexpr int kShortKeys = kHeadDim <= 64 ? 128 : kTallKeys;
  static constexpr int kTallStages = (kRingBytes - kQBytes) / (kTallKeys * kHeadDim * 4);
  static constexpr int kShortStages = kRingBytes / (kShortKeys * kHeadDim * 4);
  static constexpr int kMaxStreamKeys = kTallStages * kTallKeys > kShortStages * kShortKeys ? kTallStages * kTallKeys
                                                                                            : kShortStages * kShortKeys;
  // Short tiles: at least 16 keys a warp; a block with less for each deals the head dimension of V to the other warps.
  static constexpr int kKeyWarps = kShortKeys / 16 < kWarps ? kShortKeys / 16 : kWarps;
  static constexpr int kDimWarps = kWarps / kKeyWarps;
  static_assert(kTallStages >= 2 && kKeyWarps * kDimWarps == kWarps && kHeadDim % 32 == 0 && kRows <= kThreads);
};

// A [rows, kHeadDim] tile of 16-bit elements in shared memory. Rows of 8n chunks all start in the same bank, so eight
// chunks trade places; with 12 chunks (96 dims) every other row does, and four suffice.
template <int kHeadDim>
struct SwizzledTile {
  static constexpr int kChunks = kHeadDim / 8;
  static constexpr int kRowBytes = kHeadDim * 2;
  static constexpr int kPeriod = kChunks % 8 == 0 ? 8 : 4;

  static __device__ __forceinline__ uint32_t offset(int row, int chunk) {
    const int mix = kPeriod == 8 ? row & 7 : (row >> 1) & 3;
    return row * kRowBytes + (chunk ^ mix) * 16;
  }

  // Deals the chunks of the first kRows rows to the threads: visit(row, chunk). Each thread keeps its chunk, and its rows
  // lie a constant apart.
  template <int kRows, typename Visit>
  static __device__ __forceinline__ void for_each_chunk(Visit&& visit) {
    constexpr int kPassRows = std::bit_floor(static_cast<unsigned>(kThreads / kChunks));
    const int row = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
    if (row >= kPassRows) return;
#pragma unroll
    for (int pass = 0; pass < kRows; pass += kPassRows) visit(row + pass, chunk);
  }
};

// Where one lane points ldmatrix: at (row, chunk) of a tile, then 8n rows and 16n dims on, both known at compile time.
// The dims in a period only flip address bits, those that the tile's alignment leaves to the chunk.
template <int kHeadDim>
struct FragmentPointer {
  using Tile = SwizzledTile<kHeadDim>;
  uint32_t offset;

  __device__ __forceinline__ FragmentPointer(int row, int chunk) : offset(Tile::offset(row, chunk)) {}
  __device__ __forceinline__ uint32_t at(uint32_t tile, int rows, int dims) const {
    constexpr int kPeriodBytes = Tile::kPeriod * 16;
    return ((tile + offset) ^ (2 * dims % kPeriodBytes)) + 2 * dims / kPeriodBytes * kPeriodBytes +
           rows * Tile::kRowBytes;
  }
};

// -------------------------------------------------------------------------------------------------- shared memory plan

template <typename Element>
struct KeyAddress {
  const Element* k;  // the key's row of the KV head
  const Element* v;
};

// One packed query of a tile.
struct RowInfo {
  int64_t q_offset;  // elements from q; -1: padding
  int32_t position;  // of the token, counted from the row's first key
  int32_t out_row;   // token * num_qo_heads + head
};

// A tile and its row. Read one tile ahead: two dependent loads that nobody waits for.
struct Work {
  Tile tile;
  Row row;
  int kv_head;
  int num_rows;  // packed queries
};

template <class Traits>
struct SharedMemory {
  alignas(1024) unsigned char ring[kRingBytes];
  KeyAddress<typename Traits::Element> addresses[Traits::kMaxStreamKeys];  // of one block a stage
  RowInfo rows[Traits::kRows];
  Work work[2];  // this tile's and the next one's
};

// Short tiles leave the accumulators of each warp in the ring; the pad spreads the rows of a fragment over the banks.
template <class Traits>
struct WarpResults {
  static constexpr int kStride = Traits::kHeadDim + 8;
  float o[Traits::kKeyWarps][kShortRows][kStride];
  float max[Traits::kKeyWarps][kShortRows];
  float sum[Traits::kKeyWarps][kShortRows];
};

// -------------------------------------------------------------------------------------------------------- tile and keys

__device__ __forceinline__ Work read_work(const AttendParams& p, int index) {
  Work work;
  work.tile = p.plan.tiles[index];
  work.row = p.plan.rows[work.tile.pair / p.num_kv_heads];
  work.kv_head = work.tile.pair % p.num_kv_heads;
  work.num_rows = work.row.q_count * (p.num_qo_heads / p.num_kv_heads);
  return work;
}

__device__ __forceinline__ RowInfo describe_row(const AttendParams& p, const Work& work, int m) {
  if (m >= work.num_rows) return {-1, 0, 0};
  const int group = p.num_qo_heads / p.num_kv_heads;
  const int index = work.row.q_begin + m / group;
  const int token = work.row.flags & kPacked ? p.plan.row_tokens[index] : index;
  const int head = work.kv_head * group + m % group;
  return {token * p.q_stride_token + head * p.q_stride_head, p.plan.positions[token] - work.row.kv_pos,
          token * p.num_qo_heads + head};
}

// Keys [first, last] are visible to a query.
struct Visible {
  int first, last;

  __device__ __forceinline__ Visible(const AttendParams& p, const Work& work, int position) {
    first = p.window_left < 0 ? 0 : position - p.window_left;
    last = min(p.causal ? position : INT_MAX, work.tile.kv_end - 1);
  }
};

// What a warp's queries see together: nothing outside `any`, and no mask is needed inside `all`.
template <int kRows>
struct WarpVisible {
  int any_first, any_last, all_first, all_last;

  __device__ __forceinline__ WarpVisible(const AttendParams& p, const Work& work, const RowInfo* rows) {
    any_first = all_last = INT_MAX;
    all_first = any_last = INT_MIN;
    const int lane = threadIdx.x % 32;
    if (lane < kRows && rows[lane].q_offset >= 0) {
      const Visible visible(p, work, rows[lane].position);
      any_first = all_first = visible.first;
      any_last = all_last = visible.last;
    }
    any_first = __reduce_min_sync(~0u, any_first);
    any_last = __reduce_max_sync(~0u, any_last);
    all_first = __reduce_max_sync(~0u, all_first);
    all_last = __reduce_min_sync(~0u, all_last);
  }
  __device__ __forceinline__ bool skips(int begin, int end) const { return begin > any_last || end <= any_first; }
  __device__ __forceinline__ bool masks(int begin, int end) const { return begin < all_first || end - 1 > all_last; }
};

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
      : p_(p), begin_(work.tile.kv_begin), end_(work.tile.kv_end), kv_head_(work.kv_head),
        ring_(shared_address(ring)), addresses_(addresses),
        pages_(p.plan.kv_indices + work.row.page_begin + int64_t{work.kv_head} * work.row.head_stride) {
#pragma unroll
    for (int first = 0; first < kStages * kKeys; first += kThreads) {
      const int i = first + threadIdx.x, key = begin_ + i;
      if (i < kStages * kKeys && key < end_) addresses[i] = locate(key, pages_[key / p.page_size]);
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
      if (has_next) page = pages_[next_key / p_.page_size];
      load(key + (kStages - 1) * kKeys, stage == 0 ? kStages - 1 : stage - 1);
      copy_async_commit();
      compute(key, ring_ + stage * kStageBytes);
      if (has_next) addresses_[stage * kKeys + threadIdx.x] = locate(next_key, page);
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }
  }

 private:
  __device__ __forceinline__ KeyAddress<Element> locate(int key, int page) const {
    const int64_t token = key % p_.page_size, head = kv_head_;
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
  const int begin_, end_, kv_head_;
  const uint32_t ring_;
  KeyAddress<Element>* const addresses_;
  const int32_t* const pages_;
};

// ------------------------------------------------------------------------------------------------------ online softmax

// O, the running maximum m and this lane's part of the sum l for 16 * kM queries and 8 * kN dims.
template <int kM, int kN>
struct Accumulator {
  // m only follows the true maximum once that is 2^kSlack ahead: P stays below 2^kSlack, exact enough in 16 bits and
  // far from overflow, and blocks that raise the maximum a little cost no pass over O.
  static constexpr float kSlack = 8.0f;
  static constexpr float kLowest = -1e30f;  // finite, so that a query that saw no key yet makes no inf - inf

  float o[kM][kN][4];
  float max[kM][2], sum[kM][2];

  __device__ __forceinline__ Accumulator() {
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int j = 0; j < kN; ++j) o[i][j][0] = o[i][j][1] = o[i][j][2] = o[i][j][3] = 0.0f;
      max[i][0] = max[i][1] = kLowest;
      sum[i][0] = sum[i][1] = 0.0f;
    }
  }

  // Turns logits s into weights 2^(scale * s - m) and accounts for them in m, l and O.
  template <int kS>
  __device__ __forceinline__ void weigh(float (&s)[kM][kS][4], float scale) {
    float top[kM][2];
    bool grows = false;
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        top[i][r] = fmaxf(s[i][0][2 * r], s[i][0][2 * r + 1]);
#pragma unroll
        for (int j = 1; j < kS; ++j) top[i][r] = fmaxf(top[i][r], fmaxf(s[i][j][2 * r], s[i][j][2 * r + 1]));
        grows |= top[i][r] * scale > max[i][r] + kSlack;
      }
    }
    if (__any_sync(~0u, grows)) rescale(top, scale);
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int j = 0; j < kS; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          s[i][j][e] = exp2_fast(fmaf(s[i][j][e], scale, -max[i][e / 2]));
          sum[i][e / 2] += s[i][j][e];
        }
      }
    }
  }

  // Adds up the lanes that share a row.
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        sum[i][r] += __shfl_xor_sync(~0u, sum[i][r], 1);
        sum[i][r] += __shfl_xor_sync(~0u, sum[i][r], 2);
      }
    }
  }

 private:
  __device__ __forceinline__ void rescale(const float (&top)[kM][2], float scale) {
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float row_top = fmaxf(top[i][r], __shfl_xor_sync(~0u, top[i][r], 1));
        row_top = fmaxf(row_top, __shfl_xor_sync(~0u, row_top, 2));
        const float new_max = fmaxf(max[i][r], row_top * scale);
        const float factor = exp2_fast(max[i][r] - new_max);
        max[i][r] = new_max;
        sum[i][r] *= factor;
#pragma unroll
        for (int j = 0; j < kN; ++j) {
          o[i][j][2 * r] *= factor;
          o[i][j][2 * r + 1] *= factor;
        }
      }
    }
  }
};

// -------------------------------------------------------------------------------------------------------- matrix products

// S = Q K^T for 16 * kM queries and 8 * kS keys; load_q(q, dim) gives the A operand of 16 dims.
template <class Traits, int kM, int kS, typename LoadQ>
__device__ __forceinline__ void multiply_qk(float (&s)[kM][kS][4], LoadQ&& load_q,
                                            const FragmentPointer<Traits::kHeadDim>& pointer, uint32_t k) {
#pragma unroll
  for (int i = 0; i < kM; ++i) {
#pragma unroll
    for (int j = 0; j < kS; ++j) s[i][j][0] = s[i][j][1] = s[i][j][2] = s[i][j][3] = 0.0f;
  }
#pragma unroll
  for (int dim = 0; dim < Traits::kHeadDim; dim += 16) {
    uint32_t q[kM][4];
    load_q(q, dim);
#pragma unroll
    for (int j = 0; j < kS; j += 2) {
      uint32_t b[4];
      load_matrix_x4(b, pointer.at(k, 8 * j, dim));
#pragma unroll
      for (int i = 0; i < kM; ++i) {
        mma_m16n8k16<typename Traits::Element>(s[i][j], q[i], b[0], b[1]);
        mma_m16n8k16<typename Traits::Element>(s[i][j + 1], q[i], b[2], b[3]);
      }
    }
  }
}

// O += P V for 8 * kS keys and 8 * kN dims.
template <class Traits, int kM, int kS, int kN>
__device__ __forceinline__ void multiply_pv(float (&o)[kM][kN][4], const float (&s)[kM][kS][4],
                                            const FragmentPointer<Traits::kHeadDim>& pointer, uint32_t v) {
  using Element = typename Traits::Element;
#pragma unroll
  for (int j = 0; j < kS; j += 2) {
    uint32_t weights[kM][4];
#pragma unroll
    for (int i = 0; i < kM; ++i) {
      weights[i][0] = pack2<Element>(s[i][j][0], s[i][j][1]);
      weights[i][1] = pack2<Element>(s[i][j][2], s[i][j][3]);
      weights[i][2] = pack2<Element>(s[i][j + 1][0], s[i][j + 1][1]);
      weights[i][3] = pack2<Element>(s[i][j + 1][2], s[i][j + 1][3]);
    }
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      uint32_t b[4];
      load_matrix_x4_transposed(b, pointer.at(v, 8 * j, 8 * n));
#pragma unroll
      for (int i = 0; i < kM; ++i) {
        mma_m16n8k16<Element>(o[i][n], weights[i], b[0], b[1]);
        mma_m16n8k16<Element>(o[i][n + 1], weights[i], b[2], b[3]);
      }
    }
  }
}

// Soft cap and masks: from raw products to what the softmax scales. `rows` are those of the warp, `key` the first key.
template <int kM, int kS>
__device__ __forceinline__ void shape_logits(const AttendParams& p, const Work& work, const RowInfo* rows, int key,
                                             bool masked, float (&s)[kM][kS][4]) {
  const int lane = threadIdx.x % 32;
  if (p.logits_soft_cap > 0.0f) {
    const float inner = p.sm_scale / p.logits_soft_cap;
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int j = 0; j < kS; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) s[i][j][e] = tanh_exp2(s[i][j][e] * inner);
      }
    }
  }
  if (!masked) return;
#pragma unroll
  for (int i = 0; i < kM; ++i) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const Visible visible(p, work, rows[16 * i + 8 * r + lane / 4].position);
#pragma unroll
      for (int j = 0; j < kS; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int at = key + 8 * j + 2 * (lane % 4) + e;
          if (at < visible.first || at > visible.last) s[i][j][2 * r + e] = -INFINITY;
        }
      }
    }
  }
}

__device__ __forceinline__ float softmax_scale(const AttendParams& p) {
  return (p.logits_soft_cap > 0.0f ? p.logits_soft_cap : p.sm_scale) * kLog2E;
}

// ------------------------------------------------------------------------------------------------------------- output

// Stores elements dim, dim + 1 for dim = first, first + step, ... of packed query m; value(i) gives the i-th pair.
template <class Traits, int kPairs, typename Value>
__device__ __forceinline__ void store_row(const AttendParams& p, const Work& work, int m, int out_row, int first, int step,
                                          Value&& value) {
  if (work.tile.partial >= 0) {
    float* out = p.partial_o + int64_t{work.tile.partial + m} * Traits::kHeadDim + first;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) *reinterpret_cast<float2*>(out + i * step) = value(i);
  } else {
    auto* out = static_cast<typename Traits::Element*>(p.out) + int64_t{out_row} * Traits::kHeadDim + first;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const float2 pair = value(i);
      *reinterpret_cast<uint32_t*>(out + i * step) = pack2<typename Traits::Element>(pair.x, pair.y);
    }
  }
}

// A query that saw no key has sum 0: out 0, lse -inf.
__device__ __forceinline__ void store_lse(const AttendParams& p, const Work& work, int m, int out_row, float max,
                                          float sum) {
  const float lse = sum > 0.0f ? max + log2f(sum) : -INFINITY;
  if (work.tile.partial >= 0) {
    p.partial_lse[work.tile.partial + m] = lse;
  } else if (p.lse != nullptr) {
    p.lse[out_row] = lse;
  }
}

// ------------------------------------------------------------------------------------------------------------- kernel

template <class Traits>
__device__ __forceinline__ void attend_tall(const AttendParams& p, const Work& work, SharedMemory<Traits>& shared,
                                            Work* next, int next_index) {
  using Element = typename Traits::Element;
  constexpr int kDim = Traits::kHeadDim, kM = Traits::kMTiles, kKeys = Traits::kTallKeys, kWarpRows = 16 * kM;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  using Keys = KeyStream<Element, kDim, kKeys, Traits::kTallStages>;
  const Keys keys(p, work, shared.ring, shared.addresses);
  if (threadIdx.x < Traits::kRows) shared.rows[threadIdx.x] = describe_row(p, work, threadIdx.x);
  __syncthreads();

  const uint32_t q_tile = shared_address(shared.ring) + kRingBytes - Traits::kQBytes;
  if (work.tile.kv_begin < work.tile.kv_end) {  // Q travels with the first block
    SwizzledTile<kDim>::template for_each_chunk<Traits::kRows>([&](int row, int chunk) {
      const int64_t from = shared.rows[row].q_offset;
      const auto* q = static_cast<const Element*>(p.q) + (from < 0 ? 0 : from + chunk * 8);
      copy_async_16<kDim * 2>(q_tile + SwizzledTile<kDim>::offset(row, chunk), q, from >= 0);
    });
  }
  keys.start();
  if (next != nullptr && threadIdx.x == 0) *next = read_work(p, next_index);

  const RowInfo* rows = shared.rows + warp * kWarpRows;
  const WarpVisible<kWarpRows> visible(p, work, rows);
  const FragmentPointer<kDim> q_pointer(lane % 16, lane / 16);  // V's too
  const FragmentPointer<kDim> k_pointer(lane % 8 + lane / 16 * 8, lane / 8 % 2);
  const uint32_t q_warp = q_tile + warp * kWarpRows * SwizzledTile<kDim>::kRowBytes;
  const float scale = softmax_scale(p);

  uint32_t q_registers[Traits::kQInRegisters ? kDim / 16 : 1][kM][4];
  auto load_q = [&](uint32_t(&q)[kM][4], int dim) {
#pragma unroll
    for (int i = 0; i < kM; ++i) load_matrix_x4(q[i], q_pointer.at(q_warp, 16 * i, dim));
  };
  auto take_q = [&](uint32_t(&q)[kM][4], int dim) {
    if constexpr (Traits::kQInRegisters) {
#pragma unroll
      for (int i = 0; i < kM; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) q[i][e] = q_registers[dim / 16][i][e];
      }
    } else {
      load_q(q, dim);
    }
  };

  Accumulator<kM, kDim / 8> result;
  keys.for_each_block([&](int key, uint32_t block) {
    if constexpr (Traits::kQInRegisters) {
      if (key == work.tile.kv_begin) {
#pragma unroll
        for (int dim = 0; dim < kDim; dim += 16) load_q(q_registers[dim / 16], dim);
      }
    }
    if (visible.skips(key, key + kKeys)) return;
    float s[kM][kKeys / 8][4];
    multiply_qk<Traits>(s, take_q, k_pointer, block);
    shape_logits(p, work, rows, key, visible.masks(key, key + kKeys), s);
    result.weigh(s, scale);
    multiply_pv<Traits>(result.o, s, q_pointer, block + Keys::kVOffset);
  });

  result.finish();
#pragma unroll
  for (int i = 0; i < kM; ++i) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = 16 * i + 8 * r + lane / 4, m = warp * kWarpRows + row;
      if (m >= work.num_rows) continue;
      const int out_row = rows[row].out_row;
      const float sum = result.sum[i][r], normalise = sum > 0.0f ? 1.0f / sum : 0.0f;
      store_row<Traits, kDim / 8>(p, work, m, out_row, 2 * (lane % 4), 8, [&](int n) {
        return make_float2(result.o[i][n][2 * r] * normalise, result.o[i][n][2 * r + 1] * normalise);
      });
      if (lane % 4 == 0) store_lse(p, work, m, out_row, result.max[i][r], sum);
    }
  }
}

template <class Traits>
__device__ __forceinline__ void attend_short(const AttendParams& p, const Work& work, SharedMemory<Traits>& shared,
                                             Work* next, int next_index) {
  using Element = typename Traits::Element;
  constexpr int kDim = Traits::kHeadDim, kWarpDims = kDim / Traits::kDimWarps;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  constexpr int kWarpKeys = Traits::kShortKeys / Traits::kKeyWarps;
  const int warp_key = warp % Traits::kKeyWarps * kWarpKeys, dim_begin = warp / Traits::kKeyWarps * kWarpDims;

  using Keys = KeyStream<Element, kDim, Traits::kShortKeys, Traits::kShortStages>;
  const Keys keys(p, work, shared.ring, shared.addresses);
  if (threadIdx.x < kShortRows) shared.rows[threadIdx.x] = describe_row(p, work, threadIdx.x);
  __syncthreads();
  keys.start();
  if (next != nullptr && threadIdx.x == 0) *next = read_work(p, next_index);

  // Q is read once and is small: it goes straight to the registers of the A operand.
  uint32_t q_registers[kDim / 16][1][4];
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const int64_t from = shared.rows[lane / 4 + e % 2 * 8].q_offset;
    const auto* q = reinterpret_cast<const uint32_t*>(static_cast<const Element*>(p.q) + max(from, int64_t{0}));
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i) {
      q_registers[i][0][e] = from < 0 ? 0 : q[8 * i + e / 2 * 4 + lane % 4];
    }
  }
  auto take_q = [&](uint32_t(&q)[1][4], int dim) {
#pragma unroll
    for (int e = 0; e < 4; ++e) q[0][e] = q_registers[dim / 16][0][e];
  };

  const WarpVisible<kShortRows> visible(p, work, shared.rows);
  const FragmentPointer<kDim> k_pointer(warp_key + lane % 8 + lane / 16 * 8, lane / 8 % 2);
  const FragmentPointer<kDim> v_pointer(warp_key + lane % 16, dim_begin / 8 + lane / 16);
  const float scale = softmax_scale(p);

  Accumulator<1, kWarpDims / 8> result;
  keys.for_each_block([&](int key, uint32_t block) {
    key += warp_key;
    if (visible.skips(key, key + kWarpKeys)) return;
    float s[1][kWarpKeys / 8][4];
    multiply_qk<Traits>(s, take_q, k_pointer, block);
    shape_logits(p, work, shared.rows, key, visible.masks(key, key + kWarpKeys), s);
    result.weigh(s, scale);
    multiply_pv<Traits>(result.o, s, v_pointer, block + Keys::kVOffset);
  });

  result.finish();
  auto& results = *reinterpret_cast<WarpResults<Traits>*>(shared.ring);
  static_assert(sizeof(results) <= kRingBytes);
  __syncthreads();  // every warp is done with the ring
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int m = 8 * r + lane / 4;
#pragma unroll
    for (int n = 0; n < kWarpDims / 8; ++n) {
      *reinterpret_cast<float2*>(&results.o[warp_key / kWarpKeys][m][dim_begin + 8 * n + 2 * (lane % 4)]) =
          make_float2(result.o[0][n][2 * r], result.o[0][n][2 * r + 1]);
    }
    if (dim_begin == 0 && lane % 4 == 0) {
      results.max[warp_key / kWarpKeys][m] = result.max[0][r];
      results.sum[warp_key / kWarpKeys][m] = result.sum[0][r];
    }
  }
  __syncthreads();

  constexpr int kRowThreads = kThreads / kShortRows;
  const int m = threadIdx.x / kRowThreads;
  if (m >= work.num_rows) return;
  float top = results.max[0][m], sum = 0.0f, factor[Traits::kKeyWarps];
#pragma unroll
  for (int w = 1; w < Traits::kKeyWarps; ++w) top = fmaxf(top, results.max[w][m]);
#pragma unroll
  for (int w = 0; w < Traits::kKeyWarps; ++w) {
    factor[w] = exp2_fast(results.max[w][m] - top);
    sum += factor[w] * results.sum[w][m];
  }
  const int out_row = shared.rows[m].out_row;
  const float normalise = sum > 0.0f ? 1.0f / sum : 0.0f;
  const int first_dim = 2 * (threadIdx.x % kRowThreads);
  store_row<Traits, kDim / (2 * kRowThreads)>(p, work, m, out_row, first_dim, 2 * kRowThreads, [&](int i) {
    float2 pair = make_float2(0.0f, 0.0f);
#pragma unroll
    for (int w = 0; w < Traits::kKeyWarps; ++w) {
      const float2 o = *reinterpret_cast<const float2*>(&results.o[w][m][first_dim + i * 2 * kRowThreads]);
      pair.x += factor[w] * o.x;
      pair.y += factor[w] * o.y;
    }
    return make_float2(pair.x * normalise, pair.y * normalise);
  });
  if (threadIdx.x % kRowThreads == 0) store_lse(p, work, m, out_row, top, sum);
}

template <class Traits>
__global__ void __launch_bounds__(kThreads, 2) attend_kernel(const __grid_constant__ AttendParams p) {
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<SharedMemory<Traits>*>(memory);
  int index = p.plan.cta_indptr[blockIdx.x];
  const int end = p.plan.cta_indptr[blockIdx.x + 1];
  if (threadIdx.x == 0 && index < end) shared.work[index % 2] = read_work(p, index);
  for (; index < end; ++index) {
    __syncthreads();  // the tile before is done with shared memory, and `work` has arrived
    const Work& work = shared.work[index % 2];
    Work* next = index + 1 < end ? &shared.work[(index + 1) % 2] : nullptr;
    if (work.num_rows <= kShortRows) {
      attend_short<Traits>(p, work, shared, next, index + 1);
    } else {
      attend_tall<Traits>(p, work, shared, next, index + 1);
    }
  }
}

// ----------------------------------------------------------------------------------------------------------- launcher

template <class Traits>
int launch(const AttendParams& p) {
  constexpr int kBytes = sizeof(SharedMemory<Traits>);
  const auto kernel = attend_kernel<Traits>;
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (status != cudaSuccess) return status;
  kernel<<<p.plan.num_ctas, kThreads, kBytes, static_cast<cudaStream_t>(p.stream)>>>(p);
  return cudaGetLastError();
}

template <typename Element, int kHeadDim>
int launch_rows(const AttendParams& p) {
  if (p.plan.rows_per_tile <= 64) return launch<Traits<Element, kHeadDim, 1>>(p);
  if constexpr (kHeadDim <= 128) {  // 32 queries x 256 dims would need every register of a warp for O alone
    if (p.plan.rows_per_tile <= 128) return launch<Traits<Element, kHeadDim, 2>>(p);
  }
  return cudaErrorInvalidValue;
}

// Instantiated in one file a head size, wmma_sm80_d*.cu.
template <int kHeadDim>
int run(const AttendParams& p) {
  if (p.dtype == DType::bf16) return launch_rows<__nv_bfloat16, kHeadDim>(p);
  if (p.dtype == DType::fp16) return launch_rows<__half, kHeadDim>(p);
  return cudaErrorInvalidValue;
}

}  // namespace flashcore::wmma_sm80
