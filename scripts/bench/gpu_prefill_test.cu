// Stand-alone check and timing of the Hopper prefill kernel: plans on the host, kernel and merge on the GPU, against a
// reference in fp32. Build (from the repository root):
//   nvcc -std=c++20 -O3 -gencode arch=compute_90a,code=sm_90a --expt-relaxed-constexpr -cudart static -I csrc
//        scripts/bench/gpu_prefill_test.cu csrc/attend/{wgmma_sm90_prefill,merge}.cu
//        csrc/plan/plan_cpu.cpp -o gpu_prefill_test
// Run: gpu_prefill_test check|time|whole [filter]; whole times the plans without cuts only.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "gpu_common.cuh"
#include "params.h"

using namespace flashcore;

namespace {

// --- Cases -----------------------------------------------------------------------------------------------------------

struct Case {
  std::string name;
  std::vector<int> q_lens, kv_lens;
  int num_kv_heads = 8, group = 4, head_dim = 128, page_size = 64;
  DType dtype = DType::bf16;
  bool causal = true;
  int window_left = -1;
  float cap = 0.0f;
  bool shared_prefix = false;  // every request holds the first request's pages, its last ones excepted
};

std::vector<int> repeat(int count, int x) { return std::vector<int>(count, x); }

std::vector<Case> check_cases() {
  std::vector<Case> base;
  const std::vector<int> q = {1, 63, 64, 65, 200, 33}, kv = {1, 63, 64, 65, 777, 1000};
  for (int group : {1, 4, 5, 7, 8}) {
    base.push_back({.name = "ragged, group " + std::to_string(group),
                    .q_lens = q,
                    .kv_lens = kv,
                    .num_kv_heads = 2,
                    .group = group});
  }
  for (int page : {8, 16, 32, 48, 64, 128}) {
    for (bool causal : {true, false}) {
      base.push_back({.name = "page " + std::to_string(page) + (causal ? " causal" : " full"),
                      .q_lens = {100, 7, 1, 129},
                      .kv_lens = {page * 3 + 99, page * 2, page * 5 + 1, 129},
                      .num_kv_heads = 2,
                      .page_size = page,
                      .causal = causal});
    }
  }
  for (int window : {0, 100, 333}) {
    for (bool causal : {true, false}) {
      base.push_back({.name = "window " + std::to_string(window) + (causal ? " causal" : " full"),
                      .q_lens = {300, 40, 1},
                      .kv_lens = {300, 700, 513},
                      .num_kv_heads = 2,
                      .causal = causal,
                      .window_left = window});
    }
  }
  base.push_back({.name = "soft cap", .q_lens = q, .kv_lens = kv, .num_kv_heads = 2, .cap = 5.0f});
  base.push_back({.name = "empty requests", .q_lens = {5, 0, 3, 64}, .kv_lens = {0, 10, 3, 0}, .num_kv_heads = 2});
  base.push_back({.name = "queries before all keys", .q_lens = {40, 80}, .kv_lens = {10, 70}, .num_kv_heads = 2});
  base.push_back({.name = "few long rows, cut", .q_lens = {3, 128}, .kv_lens = {9000, 8192}, .num_kv_heads = 2});
  base.push_back({.name = "many pairs, some cut", .q_lens = repeat(64, 70), .kv_lens = repeat(64, 333)});
  base.push_back({.name = "dense 2048", .q_lens = {2048}, .kv_lens = {2048}});

  std::vector<Case> cases;
  for (int head_dim : {64, 128, 256}) {
    for (DType dtype : {DType::bf16, DType::fp16}) {
      for (Case c : base) {
        c.name += " d" + std::to_string(head_dim) + (dtype == DType::bf16 ? " bf16" : " fp16");
        c.head_dim = head_dim;
        c.dtype = dtype;
        cases.push_back(c);
      }
    }
  }
  return cases;
}

std::vector<Case> time_cases() {
  const Case mha64 = {.q_lens = repeat(16, 2048),
                      .kv_lens = repeat(16, 2048),
                      .num_kv_heads = 16,
                      .group = 1,
                      .head_dim = 64,
                      .dtype = DType::fp16};
  std::vector<Case> cases = {mha64, mha64};
  cases[0].name = "b16 h16 s2048 d64 fp16 full";
  cases[0].causal = false;
  cases[1].name = "b16 h16 s2048 d64 fp16 causal";
  cases.push_back({.name = "b16 h96 s4096 d128 fp16 full",
                   .q_lens = repeat(16, 4096),
                   .kv_lens = repeat(16, 4096),
                   .num_kv_heads = 96,
                   .group = 1,
                   .dtype = DType::fp16,
                   .causal = false});
  cases.push_back({.name = "4 x 8192 causal", .q_lens = repeat(4, 8192), .kv_lens = repeat(4, 8192)});
  cases.push_back({.name = "1 x 32768 causal", .q_lens = {32768}, .kv_lens = {32768}});
  for (int prefix : {0, 8192, 32768, 122880}) {
    cases.push_back({.name = "8192 on " + std::to_string(prefix), .q_lens = {8192}, .kv_lens = {8192 + prefix}});
  }
  cases.push_back({.name = "8192 on 8192, page 16", .q_lens = {8192}, .kv_lens = {16384}, .page_size = 16});
  cases.push_back(
      {.name = "512 x 128 on 8192", .q_lens = repeat(512, 128), .kv_lens = repeat(512, 8320), .shared_prefix = true});
  cases.push_back({.name = "2 x 8192 16q/4kv d256 causal",
                   .q_lens = repeat(2, 8192),
                   .kv_lens = repeat(2, 8192),
                   .num_kv_heads = 4,
                   .head_dim = 256});
  return cases;
}

// --- Device helpers --------------------------------------------------------------------------------------------------

// One allocation for the whole run, given out from the front.
class Arena {
 public:
  template <typename T>
  T* take(int64_t count) {
    if (base_ == nullptr) CUDA_CHECK(cudaMalloc(&base_, kBytes));
    T* pointer = reinterpret_cast<T*>(base_ + used_);
    used_ += (count * int64_t{sizeof(T)} + 1023) / 1024 * 1024;
    if (used_ > kBytes) {
      std::printf("the arena is full\n");
      std::exit(1);
    }
    return pointer;
  }
  template <typename T>
  T* copy(const std::vector<T>& host) {
    T* pointer = take<T>(host.size());
    CUDA_CHECK(cudaMemcpy(pointer, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
    return pointer;
  }
  void reset() { used_ = 0; }

 private:
  static constexpr int64_t kBytes = int64_t{24} << 30;
  char* base_ = nullptr;
  int64_t used_ = 0;
};
Arena arena;

// NaN in the slots of a request's last page that hold no key.
template <typename T>
__global__ void poison_tails(AttendParams p) {
  const int last = p.plan.kv_indptr[blockIdx.x + 1] - 1;
  if (last < p.plan.kv_indptr[blockIdx.x]) return;
  const int64_t page = p.plan.kv_indices[last];
  const int row = p.num_kv_heads * p.head_dim;
  for (int i = p.plan.last_page_len[blockIdx.x] * row + threadIdx.x; i < p.page_size * row; i += blockDim.x) {
    const int64_t at = page * p.k_stride_page + i;
    static_cast<T*>(const_cast<void*>(p.k))[at] = T(NAN);
    static_cast<T*>(const_cast<void*>(p.v))[at] = T(NAN);
  }
}

__device__ float block_reduce(float x, bool maximum) {
  __shared__ float buffer[128];
  buffer[threadIdx.x] = x;
  __syncthreads();
  for (int step = 64; step > 0; step /= 2) {
    if (threadIdx.x < step) {
      const float y = buffer[threadIdx.x + step];
      buffer[threadIdx.x] = maximum ? fmaxf(buffer[threadIdx.x], y) : buffer[threadIdx.x] + y;
    }
    __syncthreads();
  }
  const float result = buffer[0];
  __syncthreads();
  return result;
}

struct Sample {
  int token, request, kv_len;
};

// Block (sample, head) of 128 threads: logits, softmax and the weighted sum of V over the request's page table.
template <typename T>
__global__ void reference(AttendParams p, const Sample* samples, float* scores, int64_t score_stride, float* out,
                          float* lse) {
  const Sample sample = samples[blockIdx.x];
  const int head = blockIdx.y, kv_head = head / (p.num_qo_heads / p.num_kv_heads);
  const int64_t item = int64_t{blockIdx.x} * gridDim.y + head;
  const int32_t* pages = p.plan.kv_indices + p.plan.kv_indptr[sample.request];
  const int position = p.plan.positions[sample.token];
  const T* q = static_cast<const T*>(p.q) + sample.token * p.q_stride_token + head * p.q_stride_head;
  float* s = scores + item * score_stride;
  float maximum = -INFINITY;
  for (int j = threadIdx.x; j < sample.kv_len; j += blockDim.x) {
    const T* k = static_cast<const T*>(p.k) + pages[j / p.page_size] * p.k_stride_page +
                 j % p.page_size * p.k_stride_token + kv_head * p.k_stride_head;
    float dot = 0.0f;
    for (int d = 0; d < p.head_dim; ++d) dot += float(q[d]) * float(k[d]);
    dot *= p.sm_scale;
    if (p.logits_soft_cap > 0) dot = p.logits_soft_cap * tanhf(dot / p.logits_soft_cap);
    const bool visible = (!p.causal || j <= position) && (p.window_left < 0 || j >= position - p.window_left);
    s[j] = visible ? dot : -INFINITY;
    maximum = fmaxf(maximum, s[j]);
  }
  maximum = block_reduce(maximum, true);
  float sum = 0.0f;
  for (int j = threadIdx.x; j < sample.kv_len; j += blockDim.x) {
    s[j] = maximum == -INFINITY ? 0.0f : expf(s[j] - maximum);
    sum += s[j];
  }
  sum = block_reduce(sum, false);
  __syncthreads();
  for (int d = threadIdx.x; d < p.head_dim; d += blockDim.x) {
    float o = 0.0f;
#pragma unroll 8
    for (int j = 0; j < sample.kv_len; ++j) {
      const float v =
          float(static_cast<const T*>(p.v)[pages[j / p.page_size] * p.v_stride_page +
                                           j % p.page_size * p.v_stride_token + kv_head * p.v_stride_head + d]);
      o += s[j] == 0.0f ? 0.0f : s[j] * v;
    }
    out[item * p.head_dim + d] = sum > 0.0f ? o / sum : 0.0f;
  }
  if (threadIdx.x == 0) lse[item] = sum > 0.0f ? (maximum + logf(sum)) * 1.44269504f : -INFINITY;
}

// --- A case on the device --------------------------------------------------------------------------------------------

struct Problem {
  AttendParams params{};
  std::vector<Sample> tokens;
  std::vector<int> counts;
  double flops = 0.0;  // of the visible (query, key) pairs
};

template <typename T>
void fill(AttendParams& p, int64_t q_count, int64_t kv_count, bool poison) {
  fill_random<<<2048, 256>>>(static_cast<T*>(const_cast<void*>(p.q)), q_count, 1);
  fill_random<<<2048, 256>>>(static_cast<T*>(const_cast<void*>(p.k)), kv_count, 2);
  fill_random<<<2048, 256>>>(static_cast<T*>(const_cast<void*>(p.v)), kv_count, 3);
  if (poison) poison_tails<T><<<p.batch, 128>>>(p);
  CUDA_CHECK(cudaDeviceSynchronize());
}

// `whole`: no row is cut along its keys; else the work is cut evenly over the CTAs.
Problem build(const Case& c, bool whole, bool poison) {
  arena.reset();
  Problem problem;
  const int batch = c.kv_lens.size(), num_qo_heads = c.num_kv_heads * c.group;
  std::vector<int> qo_indptr = {0}, kv_indptr = {0}, last_page_len, kv_indices;
  int num_pages = 0;
  for (int r = 0; r < batch; ++r) {
    const int q_len = c.q_lens[r], kv_len = c.kv_lens[r], pages = (kv_len + c.page_size - 1) / c.page_size;
    for (int i = 0; i < q_len; ++i) {
      problem.tokens.push_back({qo_indptr.back() + i, r, kv_len});
      const double position = kv_len - q_len + i;
      const double last = c.causal ? position : kv_len - 1;
      const double first = c.window_left >= 0 ? std::max(0.0, position - c.window_left) : 0.0;
      problem.flops += 4.0 * c.head_dim * num_qo_heads * std::max(0.0, last - first + 1);
    }
    const int shared = c.shared_prefix && r > 0 ? (kv_len - q_len) / c.page_size : 0;
    for (int j = 0; j < pages; ++j) kv_indices.push_back(j < shared ? kv_indices[j] : num_pages++);
    qo_indptr.push_back(qo_indptr.back() + q_len);
    kv_indptr.push_back(kv_indptr.back() + pages);
    last_page_len.push_back(pages > 0 ? kv_len - (pages - 1) * c.page_size : 0);
  }
  std::vector<int> permutation(num_pages);
  std::iota(permutation.begin(), permutation.end(), 0);
  std::shuffle(permutation.begin(), permutation.end(), std::mt19937(7));
  for (int& page : kv_indices) page = permutation[page];

  AttendParams& p = problem.params;
  CUDA_CHECK(cudaDeviceGetAttribute(&p.num_sms, cudaDevAttrMultiProcessorCount, 0));
  const int num_tokens = qo_indptr.back(), rows_per_tile = c.head_dim <= 128 ? 192 : 128;
  const int max_rows = batch + num_tokens / (rows_per_tile / c.group) + 1;
  const int max_tiles = max_rows * c.num_kv_heads + p.num_sms;
  std::vector<int> positions(num_tokens), row_tokens(1), pair_tiles(2 * max_rows * c.num_kv_heads),
      cta_indptr(p.num_sms + 1), merge_indptr(num_tokens + 1), merge_rows(2 * num_tokens), counts(kNumCounts);
  std::vector<Row> rows(max_rows);
  std::vector<Tile> tiles(max_tiles);
  std::vector<int> scratch(2 * num_pages + 64 * (batch + 1) + 16 * max_rows + 4096);
  PlanParams plan{};
  plan.plan = {qo_indptr.data(),
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
               p.num_sms,
               rows_per_tile,
               int(kv_indices.size()),
               max_rows,
               0,
               max_tiles,
               num_tokens,
               1 << 22};
  plan.scratch = scratch.data();
  plan.scratch_size = scratch.size();
  plan.batch = batch;
  plan.num_tokens = num_tokens;
  plan.num_kv_heads = c.num_kv_heads;
  plan.group = c.group;
  plan.page_size = c.page_size;
  plan.num_pages = num_pages;
  plan.causal = c.causal;
  plan.window_left = c.window_left;
  plan.policy = Policy::exact;
  plan.split_keys = whole ? 1 << 24 : 0;
  plan.sparse.begin = kv_indices.size();
  if (run_plan_cpu(plan) != 0 || counts[kOverflow]) {
    std::printf("%s: the plan overflowed\n", c.name.c_str());
    std::exit(1);
  }
  problem.counts = counts;

  p.plan = plan.plan;
  p.plan.qo_indptr = arena.copy(qo_indptr);
  p.plan.kv_indptr = arena.copy(kv_indptr);
  p.plan.kv_indices = arena.copy(kv_indices);
  p.plan.last_page_len = arena.copy(last_page_len);
  p.plan.positions = arena.copy(positions);
  p.plan.rows = arena.copy(rows);
  p.plan.row_tokens = arena.copy(row_tokens);
  p.plan.tiles = arena.copy(tiles);
  p.plan.pair_tiles = arena.copy(pair_tiles);
  p.plan.cta_indptr = arena.copy(cta_indptr);
  p.plan.merge_indptr = arena.copy(merge_indptr);
  p.plan.merge_rows = arena.copy(merge_rows);
  p.plan.counts = arena.copy(counts);
  p.plan.max_partials = std::max(1, counts[kNumPartials]);
  p.batch = batch;
  p.num_tokens = num_tokens;
  p.num_qo_heads = num_qo_heads;
  p.num_kv_heads = c.num_kv_heads;
  p.head_dim = c.head_dim;
  p.page_size = c.page_size;
  p.num_pages = num_pages;
  p.sm_scale = 1.0f / std::sqrt(float(c.head_dim));
  p.logits_soft_cap = c.cap;
  p.causal = c.causal;
  p.window_left = c.window_left;
  p.dtype = c.dtype;

  // q is a slice of a fused QKV projection.
  p.q_stride_head = p.k_stride_head = p.v_stride_head = c.head_dim;
  p.q_stride_token = int64_t{num_qo_heads + 2 * c.num_kv_heads} * c.head_dim;
  p.k_stride_token = p.v_stride_token = int64_t{c.num_kv_heads} * c.head_dim;
  p.k_stride_page = p.v_stride_page = p.k_stride_token * c.page_size;
  const int64_t q_count = num_tokens * p.q_stride_token, kv_count = num_pages * p.k_stride_page;
  p.q = arena.take<uint16_t>(q_count);
  p.k = arena.take<uint16_t>(kv_count);
  p.v = arena.take<uint16_t>(kv_count);
  p.out = arena.take<uint16_t>(int64_t{num_tokens} * num_qo_heads * c.head_dim);
  p.lse = arena.take<float>(int64_t{num_tokens} * num_qo_heads);
  p.partial_o = arena.take<float>(int64_t{p.plan.max_partials} * c.head_dim);
  p.partial_lse = arena.take<float>(p.plan.max_partials);
  if (c.dtype == DType::bf16) {
    fill<__nv_bfloat16>(p, q_count, kv_count, poison);
  } else {
    fill<__half>(p, q_count, kv_count, poison);
  }
  return problem;
}

void attend(const AttendParams& p) {
  CUDA_CHECK(run_attend_wgmma_sm90_prefill(p));
  CUDA_CHECK(run_merge_cuda(p));
}

// --- Check -----------------------------------------------------------------------------------------------------------

float element(uint16_t bits, DType dtype) {
  if (dtype == DType::fp16) return __half2float(__half(__half_raw{bits}));
  const uint32_t wide = uint32_t{bits} << 16;
  float x;
  std::memcpy(&x, &wide, 4);
  return x;
}

// Runs, then compares up to max_samples tokens with the reference. Prints what fails.
bool check(const Case& c, const Problem& problem, int max_samples) {
  const AttendParams& p = problem.params;
  const int64_t row = int64_t{p.num_qo_heads} * p.head_dim;
  CUDA_CHECK(cudaMemset(p.out, 0xFF, p.num_tokens * row * 2));
  CUDA_CHECK(cudaMemset(p.lse, 0xFF, int64_t{p.num_tokens} * p.num_qo_heads * 4));
  CUDA_CHECK(cudaMemset(p.partial_o, 0xFF, int64_t{p.plan.max_partials} * p.head_dim * 4));
  CUDA_CHECK(cudaMemset(p.partial_lse, 0xFF, int64_t{p.plan.max_partials} * 4));
  attend(p);
  CUDA_CHECK(cudaDeviceSynchronize());

  std::vector<Sample> samples;
  const int step = std::max<int>(1, problem.tokens.size() / max_samples);
  for (size_t i = 0; i < problem.tokens.size(); i += step) samples.push_back(problem.tokens[i]);
  samples.push_back(problem.tokens.back());
  const int64_t items = int64_t(samples.size()) * p.num_qo_heads;
  std::vector<uint16_t> out(items * p.head_dim);
  std::vector<float> lse(items), want_out(items * p.head_dim), want_lse(items);
  for (size_t i = 0; i < samples.size(); ++i) {
    const auto* from = static_cast<const uint16_t*>(p.out) + samples[i].token * row;
    CUDA_CHECK(cudaMemcpy(&out[i * row], from, row * 2, cudaMemcpyDeviceToHost));
    const float* lse_from = p.lse + int64_t{samples[i].token} * p.num_qo_heads;
    CUDA_CHECK(cudaMemcpy(&lse[i * p.num_qo_heads], lse_from, p.num_qo_heads * 4, cudaMemcpyDeviceToHost));
  }
  const int64_t longest = *std::max_element(c.kv_lens.begin(), c.kv_lens.end()) + 1;
  float* scores = arena.take<float>(items * longest);
  float* device_out = arena.take<float>(items * p.head_dim);
  float* device_lse = arena.take<float>(items);
  const dim3 grid(samples.size(), p.num_qo_heads);
  const Sample* device_samples = arena.copy(samples);
  if (c.dtype == DType::bf16) {
    reference<__nv_bfloat16><<<grid, 128>>>(p, device_samples, scores, longest, device_out, device_lse);
  } else {
    reference<__half><<<grid, 128>>>(p, device_samples, scores, longest, device_out, device_lse);
  }
  CUDA_CHECK(cudaMemcpy(want_out.data(), device_out, want_out.size() * 4, cudaMemcpyDeviceToHost));
  CUDA_CHECK(cudaMemcpy(want_lse.data(), device_lse, items * 4, cudaMemcpyDeviceToHost));

  // Rounding the output costs u / sqrt(3) of each element in the mean, rounding P as much again.
  const double unit = c.dtype == DType::bf16 ? 1.0 / 256 : 1.0 / 2048;
  double error = 0.0, norm = 0.0, worst_lse = 0.0;
  bool finite = true;
  for (size_t i = 0; i < want_out.size(); ++i) {
    const double x = element(out[i], c.dtype);
    finite &= std::isfinite(x);
    error += (x - want_out[i]) * (x - want_out[i]);
    norm += double(want_out[i]) * want_out[i];
  }
  for (int64_t i = 0; i < items; ++i) {
    if (lse[i] == want_lse[i]) continue;
    const double difference = std::abs(double(lse[i]) - want_lse[i]);
    worst_lse = std::isfinite(difference) ? std::max(worst_lse, difference) : INFINITY;
  }
  const double relative = std::sqrt(error / std::max(norm, 1e-30));
  const bool good = finite && relative < unit && worst_lse < 1e-3;
  if (!good) {
    std::printf("%-44s rows %5d tiles %6d partials %6d  error %.2e lse %.1e %s%s\n", c.name.c_str(),
                problem.counts[kNumRows], problem.counts[kNumTiles], problem.counts[kNumPartials], relative, worst_lse,
                "FAILED", finite ? "" : " (not finite)");
    std::fflush(stdout);
  }
  return good;
}

// --- Time ------------------------------------------------------------------------------------------------------------

struct Times {
  double cold_us, warm_us;  // medians of the first eight launches and of those after 300 ms under load
};

// Back-to-back launches. Power, not temperature, makes the difference: a GPU that was idle before runs at higher clocks
// than its power cap allows for long.
Times time_us(const AttendParams& p, int (*kernel)(const AttendParams&), double warm_ms, double timed_ms) {
  const Timer timer;
  std::vector<double> cold, warm;
  CUDA_CHECK(kernel(p));
  for (double total_ms = 0.0; total_ms < warm_ms + timed_ms || warm.size() < 5;) {
    const float ms = timer(nullptr, [&] { CUDA_CHECK(kernel(p)); });
    if (cold.size() < 8) cold.push_back(ms * 1e3);
    if (total_ms >= warm_ms) warm.push_back(ms * 1e3);
    total_ms += ms;
  }
  return {median(cold), median(warm)};
}

// Plans cut and whole, each run and checked, then timed: the kernel, and the merge that only cut rows need.
bool time_case(const Case& c, bool whole_only) {
  bool good = true;
  for (bool whole : {true, false}) {
    if (whole_only && !whole) continue;
    const Problem problem = build(c, whole, false);
    good &= check(c, problem, 6);
    const Times times = time_us(problem.params, run_attend_wgmma_sm90_prefill, 300, 150);
    const double merge_us = time_us(problem.params, run_merge_cuda, 0, 0).warm_us;
    std::printf("%-32s %-5s cold %9.1f us %7.1f TFLOPS, warm %9.1f us %7.1f TFLOPS, merge %.1f us\n", c.name.c_str(),
                whole ? "whole" : "cut", times.cold_us, problem.flops / times.cold_us * 1e-6, times.warm_us,
                problem.flops / times.warm_us * 1e-6, merge_us);
    std::fflush(stdout);
  }
  return good;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "check", filter = argc > 2 ? argv[2] : "";
  int run = 0, failed = 0;
  for (const Case& c : mode == "check" ? check_cases() : time_cases()) {
    if (c.name.find(filter) == std::string::npos) continue;
    ++run;
    bool good = true;
    if (mode == "check") {
      for (bool whole : {false, true}) good &= check(c, build(c, whole, true), 120);
    } else {
      good = time_case(c, mode == "whole");
    }
    if (!good) ++failed;
  }
  std::printf("%d cases, %d failed\n", run, failed);
  return failed != 0;
}
