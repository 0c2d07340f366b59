// The pages that each sparse request and KV head reads: scored, the best chosen, listed in the order of the sequence.
//
// score(page) = max over the query heads g of the group of  q_g . mean + std_weight * |q_g| . deviation
//
// Grid (KV heads, requests), 256 threads; a CTA scores the middle pages of its request, 8 channels a lane, finds the
// score of the last page that still fits the budget by a radix select over the scores' bits (four rounds of 256
// counts), and writes the list by a prefix sum over the columns: no sort, and ties go to the lower column. Shared
// memory: q and std_weight * |q| of the group in fp32.
#include <cuda_runtime.h>

#include <algorithm>
#include <bit>

#include "plan/cta.cuh"
#include "summary/element.cuh"

namespace flashcore {

namespace {

constexpr int kThreads = 256;
constexpr int kRadixBits = 8;
constexpr int kBuckets = 1 << kRadixBits;
static_assert(kBuckets == kThreads);

// q and std_weight * |q| of one query head.
struct SharedQuery {
  float* q;  // [group, 2, head_dim]
  int32_t head_dim;

  __device__ const float* value(int32_t g) const { return q + 2 * g * head_dim; }
  __device__ const float* weighted(int32_t g) const { return q + (2 * g + 1) * head_dim; }
};

template <class T>
__device__ void load_query(const SelectParams& p, int32_t r, int32_t kv_head, int32_t group, float* shared) {
  const T* q =
      static_cast<const T*>(p.q) + p.plan.qo_indptr[r] * p.q_stride_token + int64_t{kv_head} * group * p.q_stride_head;
  for (int32_t i = threadIdx.x; i < group * p.head_dim; i += kThreads) {
    const int32_t g = i / p.head_dim, c = i % p.head_dim;
    const float value = static_cast<float>(q[g * p.q_stride_head + c]);
    shared[2 * g * p.head_dim + c] = value;
    shared[(2 * g + 1) * p.head_dim + c] = __fmul_rn(p.std_weight, fabsf(value));
  }
  __syncthreads();
}

// `lanes` threads, a power of two, score a page together; those beyond the head's channels add zeros.
template <class T>
__device__ void score_pages(const SelectParams& p, const Choice& choice, int32_t kv_head, const SharedQuery& query,
                            int32_t group, int32_t lanes, float* scores) {
  const int32_t lane = threadIdx.x % lanes, channel = lane * kBlock, pages_at_once = kThreads / lanes;
  const bool has_channels = channel < p.head_dim;
  const int64_t deviations = int64_t{p.num_kv_heads} * p.head_dim;
  // Every thread of a warp takes every turn, so that the shuffles below are whole.
  const int32_t turns = (choice.middle_end - choice.middle_begin + pages_at_once - 1) / pages_at_once;
  for (int32_t turn = 0; turn < turns; ++turn) {
    const int32_t column = choice.middle_begin + turn * pages_at_once + threadIdx.x / lanes;
    const bool scores_page = column < choice.middle_end;
    float mean[kBlock] = {}, deviation[kBlock] = {};
    if (scores_page && has_channels) {
      const T* summary = static_cast<const T*>(p.summaries) +
                         (int64_t{choice.table[column]} * 2 * p.num_kv_heads + kv_head) * p.head_dim + channel;
      load_block(summary, mean);
      load_block(summary + deviations, deviation);
    }
    float best = -INFINITY;
    for (int32_t g = 0; g < group; ++g) {
      float sum = 0.0f;
      if (has_channels) {
        const float* q = query.value(g) + channel;
        const float* weighted = query.weighted(g) + channel;
        for (int i = 0; i < kBlock; ++i) {
          sum = __fadd_rn(sum, __fmul_rn(q[i], mean[i]));
          sum = __fadd_rn(sum, __fmul_rn(weighted[i], deviation[i]));
        }
      }
      for (int32_t half = lanes / 2; half > 0; half /= 2) sum = __fadd_rn(sum, __shfl_xor_sync(~0u, sum, half));
      best = fmaxf(best, sum);
    }
    if (scores_page && lane == 0) scores[column] = best;
  }
  __syncthreads();
}

// The key of the `count`-th best middle page, and how many pages of just that key are among the best.
struct Threshold {
  uint32_t key;
  int32_t ties;
};

__device__ Threshold find_threshold(const Choice& choice, const float* scores) {
  __shared__ int32_t histogram[kBuckets];
  __shared__ Threshold found;
  uint32_t prefix = 0, known = 0;
  int32_t wanted = choice.count;
  for (int32_t shift = 32 - kRadixBits; shift >= 0; shift -= kRadixBits) {
    histogram[threadIdx.x] = 0;
    __syncthreads();
    for (int32_t c = choice.middle_begin + threadIdx.x; c < choice.middle_end; c += kThreads) {
      const uint32_t key = sort_key(scores[c]);
      if ((key & known) == prefix) atomicAdd(histogram + (key >> shift) % kBuckets, 1);
    }
    __syncthreads();
    // A warp looks for the bucket from the top in which the wanted page is: 8 buckets a lane.
    if (threadIdx.x < kWarp) {
      constexpr int32_t kEach = kBuckets / kWarp;
      const int32_t top = kBuckets - 1 - static_cast<int32_t>(threadIdx.x) * kEach;
      int64_t own = 0;
      for (int32_t i = 0; i < kEach; ++i) own += histogram[top - i];
      int32_t above = static_cast<int32_t>(warp_scan(own) - own);
      for (int32_t i = 0; i < kEach; ++i) {
        const int32_t here = histogram[top - i];
        if (above < wanted && wanted <= above + here) {
          found = {prefix | static_cast<uint32_t>(top - i) << shift, wanted - above};
        }
        above += here;
      }
    }
    __syncthreads();
    prefix = found.key;
    wanted = found.ties;
    known |= (kBuckets - 1u) << shift;
    __syncthreads();
  }
  return {prefix, wanted};
}

struct Passed {
  int32_t better, ties;

  __device__ Passed operator+(const Passed& other) const { return {better + other.better, ties + other.ties}; }
};

__device__ void write_list(const SelectParams& p, const Choice& choice, const float* scores, Threshold threshold) {
  __shared__ Cta<kThreads>::Shared shared;
  Cta<kThreads> cta{shared};
  const auto passed = [&](int32_t i) {
    const uint32_t key = sort_key(scores[choice.middle_begin + i]);
    return Passed{key > threshold.key, key == threshold.key};
  };
  cta.for_each(p.sink_pages, [&](int32_t c) { choice.list[c] = choice.table[c]; });
  cta.scan<Passed>(choice.middle_end - choice.middle_begin, passed, [&](int32_t i, Passed before) {
    const Passed own = passed(i);
    if (!own.better && !(own.ties && before.ties < threshold.ties)) return;
    const int32_t at = p.sink_pages + before.better + min(before.ties, threshold.ties);
    choice.list[at] = choice.table[choice.middle_begin + i];
  });
  cta.for_each(p.recent_pages, [&](int32_t i) {
    choice.list[p.sink_pages + choice.count + i] = choice.table[choice.pages - p.recent_pages + i];
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads) select_kernel(SelectParams p, int32_t lanes) {
  extern __shared__ float shared_query[];
  const int32_t kv_head = blockIdx.x, r = blockIdx.y, group = p.num_qo_heads / p.num_kv_heads;
  if (!selects(p, r)) return;
  const Choice choice(p, r, kv_head);
  float* scores = p.scores + (int64_t{r} * p.num_kv_heads + kv_head) * p.max_columns;
  load_query<T>(p, r, kv_head, group, shared_query);
  score_pages<T>(p, choice, kv_head, {shared_query, p.head_dim}, group, lanes, scores);
  write_list(p, choice, scores, find_threshold(choice, scores));
}

}  // namespace

int run_select_cuda(const SelectParams& p) {
  if (p.batch == 0) return 0;
  const int32_t lanes = static_cast<int32_t>(std::bit_ceil(static_cast<uint32_t>(p.head_dim / kBlock)));
  if (p.dtype == DType::fp32 || p.head_dim % kBlock != 0 || lanes > kWarp) return cudaErrorInvalidValue;
  const size_t shared = sizeof(float) * 2 * (p.num_qo_heads / p.num_kv_heads) * p.head_dim;
  if (shared > 48 * 1024) return cudaErrorInvalidValue;
  const auto kernel = p.dtype == DType::bf16 ? select_kernel<__nv_bfloat16> : select_kernel<__half>;
  kernel<<<dim3(p.num_kv_heads, p.batch), kThreads, shared, static_cast<cudaStream_t>(p.stream)>>>(p, lanes);
  return cudaGetLastError();
}

}  // namespace flashcore
