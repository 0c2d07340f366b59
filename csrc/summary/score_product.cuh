// The scores of one unit: a product on tensor cores, and its reduction over the query heads of each request.
//
// Product m16n8k16: 16 pages by 8 slots of query heads. A summary's two vectors are two sums, of the queries in two
//         forms. What a score comes to does not depend on who else is in a product, so requests get the same scores
//         alone and together.
// Warp    lane l owns 8 channels (l % 4) of each 32 of the pages l / 4 and l / 4 + 8, and of the query head in slot
//         l / 4. These are its parts of A and B in two steps of the product: channels may stand in any order, as long
//         as it is one. A lane reads what it has copied itself: no barrier.
#pragma once

#include <algorithm>
#include <type_traits>

#include "device/async_copy.cuh"
#include "device/mma_sm80.cuh"
#include "summary/element.cuh"
#include "summary/score_units.cuh"

namespace flashcore::score {

constexpr int kRingBytes = 96 * 1024;  // of a CTA
constexpr int kLanes = 4;              // that have the channels of one page

// T: of queries and keys. S: of summaries. kChunks: of 32 channels that hold one vector.
template <class T_, class S_, int kChunks_, int kVectors_>
struct Traits {
  using T = T_;
  using S = S_;
  static constexpr int kChunks = kChunks_, kVectors = kVectors_;
  static constexpr uint32_t kSummaryBytes = kVectors * kChunks * 32 * sizeof(S);
  using Stage = Block<S>[kVectors][kChunks][2][kWarp];
  static constexpr int kWarps = sizeof(Stage) > 8192 ? 2 : 4;
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kStages = std::min<int>(kRingBytes / kWarps / sizeof(Stage), 8);
  using Ring = Stage[kStages];
};

// What vector 0 or 1 of a summary is multiplied with, for a pair of 16-bit floats (query_form, rules.h).
template <SummaryKind kKind>
__device__ uint32_t query_form_of_pair(int vector, uint32_t pair) {
  if constexpr (kKind == SummaryKind::min_max) {
    uint32_t negative;  // all bits of those that are
    asm("prmt.b32 %0, %1, %1, 0xbb99;" : "=r"(negative) : "r"(pair));
    return pair & (vector == 0 ? negative : ~negative);
  }
  return vector == 0 ? pair : pair & 0x7fff7fffu;
}

// Pairs of T, as tensor cores take them.
template <class T, class S>
__device__ void to_words(const Block<S>& block, uint32_t (&words)[4]) {
  if constexpr (std::is_same_v<T, S>) {
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = block.words[i];
  } else {
    float values[kBlock];
    unpack(block, values);
    Block<T> wide;
    store_block(reinterpret_cast<T*>(&wide), values);  // exact
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = wide.words[i];
  }
}

// A lane's part of B: its channels of one query head, in the forms that the vectors are multiplied with.
template <class Traits>
struct Queries {
  uint32_t form[Traits::kVectors][Traits::kChunks][4];

  __device__ void load(const SelectParams& p, const Slots& slots, const Members& members, int32_t kv_head,
                       int32_t product) {
    using T = typename Traits::T;
    const int32_t lane = threadIdx.x % kWarp, slot = product * kSlots + lane / kLanes;
    const int32_t member = slots.member(slot), head = slots.head(slot);
    const int64_t token = __shfl_sync(~0u, members.token, member);
    const T* q = static_cast<const T*>(p.q) + token * p.q_stride_token +
                 (kv_head * slots.group + head) * p.q_stride_head + lane % kLanes * kBlock;
    const bool exists = member < members.count && head < slots.group;
    Block<T> blocks[Traits::kChunks];
#pragma unroll
    for (int c = 0; c < Traits::kChunks; ++c) {
      const int32_t channel = (c * kLanes + lane % kLanes) * kBlock;
      blocks[c] = exists && channel < p.pages.head_dim ? load_block(q + c * kLanes * kBlock) : Block<T>{};
    }
    shape(blocks, p.pages.summaries.kind);
  }

  // Those of one request, from rows of all channels that lie `stride` apart.
  __device__ void load_rows(const typename Traits::T* rows, int32_t stride, int32_t heads, SummaryKind kind) {
    using T = typename Traits::T;
    const int32_t lane = threadIdx.x % kWarp, head = lane / kLanes;
    Block<T> blocks[Traits::kChunks];
#pragma unroll
    for (int c = 0; c < Traits::kChunks; ++c) {
      const T* block = rows + head * stride + (c * kLanes + lane % kLanes) * kBlock;
      blocks[c] = head < heads ? load_block(block) : Block<T>{};
    }
    shape(blocks, kind);
  }

 private:
  __device__ void shape(const Block<typename Traits::T> (&blocks)[Traits::kChunks], SummaryKind kind) {
    if (kind == SummaryKind::min_max) {
      shape<SummaryKind::min_max>(blocks);
    } else {
      shape<SummaryKind::mean_std>(blocks);  // of which kind mean has the first vector
    }
  }
  template <SummaryKind kKind>
  __device__ void shape(const Block<typename Traits::T> (&blocks)[Traits::kChunks]) {
#pragma unroll
    for (int c = 0; c < Traits::kChunks; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int vector = 0; vector < Traits::kVectors; ++vector) {
          form[vector][c][i] = query_form_of_pair<kKind>(vector, blocks[c].words[i]);
        }
      }
    }
  }
};

template <class Traits>
struct Scorer {
  using S = typename Traits::S;
  using T = typename Traits::T;
  using Stage = typename Traits::Stage;
  static constexpr int kVectors = Traits::kVectors, kChunks = Traits::kChunks;
  using Sums = float[4];  // pages l / 4 and l / 4 + 8 (halves) by slots 2 * (l % 4) and the next one

  const SelectParams& p;
  const Slots slots;
  const ScoreRule rule;
  const int32_t lane;
  const uint32_t head_bytes, page_bytes;

  __device__ Scorer(const SelectParams& p, const Slots& slots)
      : p(p),
        slots(slots),
        rule(p),
        lane(threadIdx.x % kWarp),
        head_bytes(kVectors * p.pages.head_dim * sizeof(S)),
        page_bytes(p.pages.num_kv_heads * head_bytes) {}

  // The page of this lane's number in a unit.
  __device__ int32_t load_id(int32_t table, const Place& at) const {
    return p.plan.kv_indices[table + min(at.column + lane % kPages, at.end - 1)];
  }

  __device__ void copy_summaries(int32_t ids, int32_t kv_head, Stage& stage) const {
    const int32_t dim = p.pages.head_dim, channel = lane % kLanes * kBlock;
    const auto* summaries = static_cast<const unsigned char*>(p.pages.summaries.data) + kv_head * head_bytes;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t page = __shfl_sync(~0u, ids, half * (kPages / 2) + lane / kLanes);
      const auto* summary = reinterpret_cast<const S*>(summaries + uint64_t{page} * page_bytes) + channel;
#pragma unroll
      for (int vector = 0; vector < kVectors; ++vector) {
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
          const uint32_t to = shared_address(&stage[vector][c][half][lane]);
          const bool exists = c * kLanes * kBlock + channel < dim;
          if constexpr (sizeof(Block<S>) == 16) {
            copy_async_16<128>(to, summary + vector * dim + c * kLanes * kBlock, exists);
          } else {
            copy_async_8(to, summary + vector * dim + c * kLanes * kBlock, exists);
          }
        }
      }
    }
  }

  // Scores a unit, whose summaries are there when at most kPending of the latest copies are on their way, for the
  // members. `queries` are those of the first product if they are `there`.
  template <int kPending>
  __device__ void score(const Place& at, const Members& members, const Stage& stage, Queries<Traits>& queries,
                        bool there) const {
    const int32_t products = slots.products(members.count);
    float before[2];  // what the slots before have given a request with more heads than a product has
#pragma unroll 1
    for (int32_t product = 0; product < products; ++product) {
      if (!there || product > 0) queries.load(p, slots, members, at.kv_head, product);
      copy_async_wait<kPending>();
      Sums sums;
      multiply([&](int vector, int c, int half) { return stage[vector][c][half][lane]; }, queries, sums);
      if (rule.reduction == GroupReduction::max) {
        finish<GroupReduction::max>(at, members, product, sums, before);
      } else if (rule.reduction == GroupReduction::mean) {
        finish<GroupReduction::mean>(at, members, product, sums, before);
      } else {
        finish<GroupReduction::logsumexp>(at, members, product, sums, before);
      }
    }
  }

  // This lane's part of the summaries of a unit, from shared memory, where they lie side by side under the 128-byte
  // swizzle. All channels of all chunks exist.
  using Part = Block<S>[kVectors][kChunks][2];
  __device__ void load_part(const unsigned char* rows, Part& part) const {
    constexpr uint32_t kBytes = Traits::kSummaryBytes;
#pragma unroll
    for (int vector = 0; vector < kVectors; ++vector) {
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const uint32_t at =
            lane / kLanes * kBytes + ((vector * kChunks + c) * kLanes + lane % kLanes) * sizeof(Block<S>);
        const unsigned char* block = rows + (at ^ (at / 128 % 8 * 16));
        static_assert(kPages / 2 * kBytes % 1024 == 0);  // the other half is swizzled alike
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          part[vector][c][half] = *reinterpret_cast<const Block<S>*>(block + half * (kPages / 2) * kBytes);
        }
      }
    }
  }

  // The scores of pages l / 4 (x) and l / 4 + 8 (y) of a unit, for one request of at most kSlots query heads.
  __device__ float2 score_part(const Part& part, const Queries<Traits>& queries) const {
    Sums sums;
    multiply([&](int vector, int c, int half) { return part[vector][c][half]; }, queries, sums);
    if (rule.reduction == GroupReduction::max) {
      reduce<GroupReduction::max>(lane % kLanes * 2, sums);
    } else if (rule.reduction == GroupReduction::mean) {
      reduce<GroupReduction::mean>(lane % kLanes * 2, sums);
    } else {
      reduce<GroupReduction::logsumexp>(lane % kLanes * 2, sums);
    }
    const int32_t first = lane / kLanes * kLanes;  // which has the request's first slot
    return {__shfl_sync(~0u, sums[0], first), __shfl_sync(~0u, sums[2], first)};
  }

 private:
  // What each page of a unit gets from each slot of a product; block(vector, c, half): this lane's part of the
  // summaries.
  template <class BlockOf>
  __device__ void multiply(const BlockOf& block, const Queries<Traits>& queries, Sums& sums) const {
    float sum[kVectors][2][4] = {};  // two chains of products each: the latency of one would show
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
#pragma unroll
      for (int vector = 0; vector < kVectors; ++vector) {
        uint32_t low[4], high[4];
        to_words<T>(block(vector, c, 0), low);
        to_words<T>(block(vector, c, 1), high);
        const auto& q = queries.form[vector][c];
        mma_m16n8k16<T>(sum[vector][0], {low[0], high[0], low[1], high[1]}, q[0], q[1]);
        mma_m16n8k16<T>(sum[vector][1], {low[2], high[2], low[3], high[3]}, q[2], q[3]);
      }
    }
#pragma unroll
    for (int vector = 0; vector < kVectors; ++vector) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[vector][0][i] = add(sum[vector][0][i], sum[vector][1][i]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sums[i] = kVectors == 2 ? rule.join(sum[0][0][i], sum[kVectors - 1][0][i]) : sum[0][0][i];
    }
  }

  // In the first two slots that a lane has of a request, what its slots in this product come to, for each half.
  template <GroupReduction kReduction>
  __device__ void reduce(int32_t slot, Sums& sums) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool exists = slots.head(slot + i % 2) < slots.group;
      sums[i] = exists ? rule.of_head<kReduction>(sums[i]) : rule.nothing<kReduction>();
    }
    if (slots.heads() == 1) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float score = rule.combine<kReduction>(sums[2 * half], sums[2 * half + 1]);
      if (slots.heads() > 2) score = rule.combine<kReduction>(score, __shfl_xor_sync(~0u, score, 1));
      if (slots.heads() > 4) score = rule.combine<kReduction>(score, __shfl_xor_sync(~0u, score, 2));
      sums[2 * half] = score;
    }
  }

  // Reduces the slots of each request of a product and stores the scores of those that are complete.
  template <GroupReduction kReduction>
  __device__ void finish(const Place& at, const Members& members, int32_t product, Sums& sums,
                         float (&before)[2]) const {
    const int32_t slot = product * kSlots + lane % kLanes * 2;
    reduce<kReduction>(slot, sums);
    if (slots.heads() > 1) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (slots.head(product * kSlots) > 0) {
          sums[2 * half] = rule.combine<kReduction>(before[half], sums[2 * half]);
        }
        before[half] = sums[2 * half];
      }
    }
    const int32_t last = max(slots.heads() - kSlots, 0);  // slot of a request with which its last product begins
    const int32_t column = at.column + lane / kLanes;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (i > 0 && slots.heads() > 1) break;
      const int32_t member = slots.member(slot + i);
      const int32_t request = __shfl_sync(~0u, members.request, member);
      if (slots.head(slot + i) != last || member >= members.count) continue;
      float* scores = scores_of(p, request, at.kv_head);
      if (column < at.end) scores[column] = sums[i];
      if (column + kPages / 2 < at.end) scores[column + kPages / 2] = sums[i + 2];
    }
  }
};

}  // namespace flashcore::score
