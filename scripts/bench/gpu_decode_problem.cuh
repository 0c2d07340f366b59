// A case of gpu_decode_test on the device: plan, tensors, the reference, and the ways to run it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#include "attend/wgmma_sm90_decode.h"
#include "gpu_common.cuh"
#include "gpu_decode_cases.h"
#include "params.h"

namespace decode_test {

using namespace flashcore;

struct Options {
  int ctas = 264;
  int rows_per_tile = 128;
  int pack_keys = 0;  // flashcore_sglang/variants.py has what is chosen
  int repeats = 2;    // runs of a check, which must agree bit by bit
};

// --- Device helpers --------------------------------------------------------------------------------------------------

// NaN in the slots of a request's last page that hold no key.
__global__ void poison_tails(AttendParams p) {
  const int r = blockIdx.x;
  const int last = p.plan.kv_indptr[r + 1] - 1;
  if (last < p.plan.kv_indptr[r]) return;
  const int page = p.plan.kv_indices[last];
  for (int j = p.plan.last_page_len[r]; j < p.page_size; ++j) {
    for (int i = threadIdx.x; i < p.num_kv_heads * p.head_dim; i += blockDim.x) {
      const int h = i / p.head_dim, d = i % p.head_dim;
      ((uint16_t*)p.k)[page * p.k_stride_page + j * p.k_stride_token + h * p.k_stride_head + d] = 0x7FFF;
      ((uint16_t*)p.v)[page * p.v_stride_page + j * p.v_stride_token + h * p.v_stride_head + d] = 0x7FFF;
    }
  }
}

__device__ double block_reduce(double x, bool maximum) {
  __shared__ double buffer[128];
  buffer[threadIdx.x] = x;
  __syncthreads();
  for (int step = 64; step > 0; step /= 2) {
    if (threadIdx.x < step) {
      const double y = buffer[threadIdx.x + step];
      buffer[threadIdx.x] = maximum ? fmax(buffer[threadIdx.x], y) : buffer[threadIdx.x] + y;
    }
    __syncthreads();
  }
  const double result = buffer[0];
  __syncthreads();
  return result;
}

// One block of 128 threads a (token, head): two passes over the request's page table, all in double.
template <typename T>
__global__ void reference(AttendParams p, const int* token_request, double* scores, int64_t score_stride, double* out,
                          double* lse) {
  const int item = blockIdx.x;
  const int token = item / p.num_qo_heads, head = item % p.num_qo_heads;
  const int kv_head = head / (p.num_qo_heads / p.num_kv_heads);
  const int r = token_request[token];
  const int32_t* pages = p.plan.kv_indices + p.plan.kv_indptr[r];
  const int num_pages = p.plan.kv_indptr[r + 1] - p.plan.kv_indptr[r];
  const int kv_len = num_pages ? (num_pages - 1) * p.page_size + p.plan.last_page_len[r] : 0;
  const int position = p.plan.positions[token];
  const T* q = static_cast<const T*>(p.q) + token * p.q_stride_token + head * p.q_stride_head;
  double* s = scores + blockIdx.x * score_stride;
  double maximum = -INFINITY;
  for (int j = threadIdx.x; j < kv_len; j += blockDim.x) {
    const T* k = static_cast<const T*>(p.k) + pages[j / p.page_size] * p.k_stride_page +
                 j % p.page_size * p.k_stride_token + kv_head * p.k_stride_head;
    double dot = 0.0;
    for (int d = 0; d < p.head_dim; ++d) dot += double(float(q[d])) * double(float(k[d]));
    dot *= p.sm_scale;
    if (p.logits_soft_cap > 0) dot = p.logits_soft_cap * tanh(dot / p.logits_soft_cap);
    const bool visible = (!p.causal || j <= position) && (p.window_left < 0 || j >= position - p.window_left);
    s[j] = visible ? dot : -INFINITY;
    maximum = fmax(maximum, s[j]);
  }
  maximum = block_reduce(maximum, true);
  double sum = 0.0;
  for (int j = threadIdx.x; j < kv_len; j += blockDim.x) {
    s[j] = maximum == -INFINITY ? 0.0 : exp(s[j] - maximum);
    sum += s[j];
  }
  sum = block_reduce(sum, false);
  __syncthreads();
  for (int d = threadIdx.x; d < p.head_dim; d += blockDim.x) {
    double o = 0.0;
    for (int j = 0; j < kv_len; ++j) {
      if (s[j] == 0.0) continue;
      const T* v = static_cast<const T*>(p.v) + pages[j / p.page_size] * p.v_stride_page +
                   j % p.page_size * p.v_stride_token + kv_head * p.v_stride_head;
      o += s[j] * double(float(v[d]));
    }
    out[int64_t{item} * p.head_dim + d] = sum > 0 ? o / sum : 0.0;
  }
  if (threadIdx.x == 0) lse[item] = sum > 0 ? (maximum + log(sum)) * 1.4426950408889634 : -INFINITY;
}

template <typename T>
T* device_alloc(int64_t count) {
  T* pointer;
  CUDA_CHECK(cudaMalloc(&pointer, std::max<int64_t>(count, 1) * sizeof(T)));
  return pointer;
}

template <typename T>
T* to_device(const std::vector<T>& host) {
  T* pointer = device_alloc<T>(host.size());
  CUDA_CHECK(cudaMemcpy(pointer, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
  return pointer;
}

// --- A case on the device --------------------------------------------------------------------------------------------

struct Problem {
  AttendParams params{};
  SparseRows sparse{};
  std::vector<void*> owned;
  std::vector<int> token_request;
  int64_t unique_bytes = 0, dense_bytes = 0;
  int counts[kNumCounts];

  template <typename T>
  T* own(T* pointer) {
    owned.push_back((void*)pointer);
    return pointer;
  }
  ~Problem() {
    for (void* pointer : owned) cudaFree(pointer);
  }
};

inline void build(Problem& problem, const Case& c, const Options& options, bool poison) {
  const int batch = c.kv_lens.size();
  const int group = c.num_qo_heads / c.num_kv_heads;
  std::vector<int> qo_indptr = {0}, kv_indptr = {0}, last_page_len, kv_indices;
  for (int r = 0; r < batch; ++r) {
    qo_indptr.push_back(r + 1);
    problem.token_request.push_back(r);
    const int pages = (c.kv_lens[r] + c.page_size - 1) / c.page_size;
    kv_indptr.push_back(kv_indptr.back() + pages);
    last_page_len.push_back(pages ? c.kv_lens[r] - (pages - 1) * c.page_size : 0);
  }
  // Pages: shared levels first, then private ones; runs of ids permuted at random.
  int num_pages = 0;
  kv_indices.assign(kv_indptr.back(), -1);
  int first_column = 0;
  for (const Level& level : c.levels) {
    const int columns = level.keys / c.page_size;
    for (int r = 0; r < batch; ++r) {
      for (int j = first_column; j < first_column + columns && j < kv_indptr[r + 1] - kv_indptr[r]; ++j) {
        const int lead = r / level.members * level.members;
        kv_indices[kv_indptr[r] + j] = r == lead ? num_pages++ : kv_indices[kv_indptr[lead] + j];
      }
    }
    first_column += columns;
  }
  for (int& page : kv_indices) {
    if (page < 0) page = num_pages++;
  }
  const int entries = kv_indices.size();
  num_pages = (num_pages + c.run - 1) / c.run * c.run;
  std::vector<int> permutation(num_pages / c.run);
  std::iota(permutation.begin(), permutation.end(), 0);
  std::shuffle(permutation.begin(), permutation.end(), std::mt19937(7));
  for (int& page : kv_indices) page = permutation[page / c.run] * c.run + page % c.run;
  kv_indices.resize(entries + batch * c.num_kv_heads * c.sparse.list_pages);

  // The plan, on the host.
  const int num_tokens = qo_indptr.back();
  const int tokens_per_row = options.rows_per_tile / group;
  const int max_row_tokens = 4 * batch;
  const int max_rows = batch + (num_tokens + tokens_per_row - 1) / tokens_per_row + max_row_tokens / 2;
  // As Capacity.max_tiles in flashcore_sglang/planner/plan.py.
  const int max_tiles = c.split_keys ? 1 << 16 : max_rows * c.num_kv_heads + 3 * options.ctas;
  const int max_merge = num_tokens + max_row_tokens;
  std::vector<int> positions(num_tokens), row_tokens(max_row_tokens), pair_tiles(2 * max_rows * c.num_kv_heads),
      cta_indptr(options.ctas + 1), merge_indptr(num_tokens + 1), merge_rows(2 * max_merge), counts(kNumCounts);
  std::vector<Row> rows(max_rows);
  std::vector<Tile> tiles(max_tiles);
  std::vector<int> scratch(2 * num_pages + 64 * (batch + 1) + 16 * max_rows + 4096);
  PlanParams pp{};
  pp.plan = {qo_indptr.data(),
             kv_indptr.data(),
             kv_indices.data(),
             last_page_len.data(),
             positions.data(),
             rows.data(),
             row_tokens.data(),
             tiles.data(),
             pair_tiles.data(),
             cta_indptr.data(),
             merge_indptr.data(),
             merge_rows.data(),
             nullptr,  // stretches are policy topk's
             counts.data(),
             options.ctas,
             options.rows_per_tile,
             int(kv_indices.size()),
             max_rows,
             max_row_tokens,
             max_tiles,
             max_merge,
             1 << 22};
  pp.scratch = scratch.data();
  pp.scratch_size = scratch.size();
  pp.batch = batch;
  pp.num_tokens = num_tokens;
  pp.num_kv_heads = c.num_kv_heads;
  pp.group = group;
  pp.page_size = c.page_size;
  pp.num_pages = num_pages;
  pp.causal = c.causal;
  pp.window_left = c.window_left;
  pp.policy = c.sparse.list_pages > 0 ? Policy::topk : Policy::exact;
  pp.sparse = c.sparse;
  pp.sparse.begin = entries;
  pp.share = c.share;
  pp.pack_keys = options.pack_keys;
  pp.split_keys = c.split_keys;
  if (run_plan_cpu(pp) != 0 || counts[kOverflow]) {
    std::printf("%s: the plan overflowed\n", c.name.c_str());
    std::exit(1);
  }
  std::copy(counts.begin(), counts.end(), problem.counts);

  AttendParams& p = problem.params;
  p.plan = pp.plan;
  p.plan.qo_indptr = problem.own(to_device(qo_indptr));
  p.plan.kv_indptr = problem.own(to_device(kv_indptr));
  p.plan.kv_indices = problem.own(to_device(kv_indices));
  p.plan.last_page_len = problem.own(to_device(last_page_len));
  p.plan.positions = problem.own(to_device(positions));
  p.plan.rows = problem.own(to_device(rows));
  p.plan.row_tokens = problem.own(to_device(row_tokens));
  p.plan.tiles = problem.own(to_device(tiles));
  p.plan.pair_tiles = problem.own(to_device(pair_tiles));
  p.plan.cta_indptr = problem.own(to_device(cta_indptr));
  p.plan.merge_indptr = problem.own(to_device(merge_indptr));
  p.plan.merge_rows = problem.own(to_device(merge_rows));
  p.plan.counts = problem.own(to_device(counts));
  p.plan.max_partials = std::max(64 * 160, counts[kNumPartials]);
  p.batch = batch;
  p.num_tokens = num_tokens;
  p.num_qo_heads = c.num_qo_heads;
  p.num_kv_heads = c.num_kv_heads;
  p.head_dim = c.head_dim;
  p.page_size = c.page_size;
  p.num_pages = num_pages;
  p.sm_scale = 1.0f / std::sqrt(float(c.head_dim));
  p.logits_soft_cap = c.cap;
  p.causal = c.causal;
  p.window_left = c.window_left;
  p.dtype = c.dtype;
  p.decode = 1;
  p.free_cuts = c.split_keys == 0;
  problem.sparse = pp.sparse;
  CUDA_CHECK(cudaDeviceGetAttribute(&p.num_sms, cudaDevAttrMultiProcessorCount, 0));

  const int64_t token = int64_t{c.num_kv_heads} * c.head_dim;
  const int64_t page = token * c.page_size;
  const int64_t q_count = int64_t{num_tokens} * c.num_qo_heads * c.head_dim;
  uint16_t* q = problem.own(device_alloc<uint16_t>(q_count));
  uint16_t* kv = problem.own(device_alloc<uint16_t>(2 * page * num_pages));
  p.q = q;
  p.k = kv;
  p.v = kv + (c.interleaved ? page : page * num_pages);
  p.q_stride_token = int64_t{c.num_qo_heads} * c.head_dim;
  p.q_stride_head = c.head_dim;
  p.k_stride_page = p.v_stride_page = c.interleaved ? 2 * page : page;
  p.k_stride_token = p.v_stride_token = token;
  p.k_stride_head = p.v_stride_head = c.head_dim;
  if (c.dtype == DType::bf16) {
    fill_random<<<2048, 256>>>((__nv_bfloat16*)q, q_count, 1);
    fill_random<<<2048, 256>>>((__nv_bfloat16*)kv, 2 * page * num_pages, 2);
  } else {
    fill_random<<<2048, 256>>>((__half*)q, q_count, 1);
    fill_random<<<2048, 256>>>((__half*)kv, 2 * page * num_pages, 2);
  }
  if (poison && batch) poison_tails<<<batch, 128>>>(p);
  p.out = problem.own(device_alloc<uint16_t>(q_count));
  p.lse = problem.own(device_alloc<float>(q_count / c.head_dim));
  p.partial_o = problem.own(device_alloc<float>(int64_t{p.plan.max_partials} * c.head_dim));
  p.partial_lse = problem.own(device_alloc<float>(p.plan.max_partials));
  CUDA_CHECK(cudaDeviceSynchronize());
  problem.unique_bytes = 2 * 2 * page * num_pages;
  for (int len : c.kv_lens) problem.dense_bytes += 2 * 2 * token * len;
}

using NamedWay = std::pair<const char*, decode90::Way>;

// The ways to run a problem, the one that is chosen first.
inline std::vector<NamedWay> ways(const AttendParams& p) {
  using namespace decode90;
  const NamedWay few{"few", {run_few, Merges::all}}, many{"many", {run_many, Merges::all}};
  const Way chosen = way_of(make_params(p));
  if (chosen.run == run_cluster) return {{"cluster", chosen}, few};
  if (chosen.run == run_cluster_or_few) return {{"either", chosen}, few};
  if (chosen.run == run_either) return {{"either", chosen}, many};
  if (are_apart(make_params(p))) return {{"apart", chosen}};
  return {few, many};
}

inline void attend(AttendParams p, const decode90::Way& way) {
  CUDA_CHECK(way.run(decode90::make_params(p)));
  p.merges = way.merges;
  if (way.merges != Merges::none) CUDA_CHECK(run_merge_cuda(p));
}

}  // namespace decode_test
