// Stand-alone check and timing of the Hopper decode kernel: plans on the host, kernel and merge on the GPU, against a
// double-precision reference. Build (from the repository root):
//   nvcc -std=c++20 -O3 -gencode arch=compute_90a,code=sm_90a --expt-relaxed-constexpr -cudart static -I csrc
//        scripts/bench/gpu_decode_test.cu csrc/attend/{wgmma_sm90_decode{,_few,_cluster},merge}.cu
//        csrc/plan/plan_cpu.cpp -o gpu_decode_test
// Run: gpu_decode_test check [filter] [--repeat N] [--random N] | gpu_decode_test time [filter] [--ctas N]... [--rows
// N]
//      gpu_decode_test sharing [--pack KEYS]
// Steps that two kernels can run are checked and timed with both: `cluster` and `few`, `few` and `many`; `either` is
// two launches, of which the plan decides.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "attend/wgmma_sm90_decode.h"
#include "gpu_common.cuh"
#include "params.h"

using namespace flashcore;

namespace {

// --- Cases -----------------------------------------------------------------------------------------------------------

struct Level {
  int members;  // consecutive requests that share
  int keys;     // from the end of the level before
};

struct Case {
  std::string name;
  std::vector<int> kv_lens;
  int num_qo_heads = 32, num_kv_heads = 8, head_dim = 128, page_size = 64;
  DType dtype = DType::bf16;
  std::vector<Level> levels = {};  // shared prefixes, outermost first
  int window_left = -1;
  float cap = 0.0f;
  int causal = 1;
  int split_keys = 0;
  bool interleaved = false;  // K and V of a page side by side: [pages, 2, page_size, heads, head_dim]
  bool share = true;
};

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

void build(Problem& problem, const Case& c, const Options& options, bool poison) {
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
  // Pages: shared levels first, then private ones; ids permuted at random.
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
  std::vector<int> permutation(num_pages);
  std::iota(permutation.begin(), permutation.end(), 0);
  std::shuffle(permutation.begin(), permutation.end(), std::mt19937(7));
  for (int& page : kv_indices) page = permutation[page];

  // The plan, on the host.
  const int num_tokens = qo_indptr.back();
  const int tokens_per_row = options.rows_per_tile / group;
  const int max_row_tokens = 4 * batch;
  const int max_rows = batch + (num_tokens + tokens_per_row - 1) / tokens_per_row + max_row_tokens / 2;
  // As Capacity.max_tiles in flashcore_sglang/planner/plan.py.
  const int max_tiles = c.split_keys ? 1 << 16 : max_rows * c.num_kv_heads + 4 * options.ctas;
  const int max_merge = num_tokens + max_row_tokens;
  std::vector<int> positions(num_tokens), row_tokens(max_row_tokens), tile_indptr(max_rows * c.num_kv_heads + 1),
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
             tile_indptr.data(),
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
  pp.policy = Policy::exact;
  pp.sparse.begin = kv_indices.size();
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
  p.plan.tile_indptr = problem.own(to_device(tile_indptr));
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

using Kernel = cudaError_t (*)(const decode90::Params&);

// The kernels that can run a problem, the one that is chosen first.
std::vector<std::pair<const char*, Kernel>> kernels(const AttendParams& p) {
  if (const auto params = decode90::make_params(p); decode90::fits_cluster_alone(params)) {
    if (decode90::fits_cluster(params)) return {{"cluster", decode90::run_cluster}, {"few", decode90::run_few}};
    return {{"either", decode90::run_cluster_or_few}, {"few", decode90::run_few}};
  }
  if (!decode90::are_few(decode90::make_params(p))) {
    return {{"either", decode90::run_either}, {"many", decode90::run_many}};
  }
  return {{"few", decode90::run_few}, {"many", decode90::run_many}};
}

void attend(const AttendParams& p, Kernel kernel) {
  CUDA_CHECK(kernel(decode90::make_params(p)));
  AttendParams merge = p;
  merge.merges = kernel == decode90::run_cluster_or_few ? Merges::packed : Merges::all;
  if (kernel != decode90::run_cluster) CUDA_CHECK(run_merge_cuda(merge));
}

// --- Check -----------------------------------------------------------------------------------------------------------

float element(uint16_t bits, DType dtype) {
  if (dtype == DType::bf16) {
    const uint32_t wide = uint32_t{bits} << 16;
    float x;
    std::memcpy(&x, &wide, 4);
    return x;
  }
  return __half2float(__half(__half_raw{bits}));
}

bool check(const Case& c, const Options& options) {
  Problem problem;
  build(problem, c, options, true);
  AttendParams& p = problem.params;
  const int64_t items = int64_t{p.num_tokens} * p.num_qo_heads, count = items * p.head_dim;
  std::vector<uint16_t> out(count), again(count);
  std::vector<float> lse(items);
  bool same = true;
  const auto run_once = [&](Kernel kernel, std::vector<uint16_t>& result) {
    CUDA_CHECK(cudaMemset(p.out, 0xFF, count * 2));
    CUDA_CHECK(cudaMemset(p.lse, 0xFF, items * 4));
    CUDA_CHECK(cudaMemset(p.partial_o, 0xFF, int64_t{p.plan.max_partials} * p.head_dim * 4));
    CUDA_CHECK(cudaMemset(p.partial_lse, 0xFF, int64_t{p.plan.max_partials} * 4));
    attend(p, kernel);
    CUDA_CHECK(cudaDeviceSynchronize());
    CUDA_CHECK(cudaMemcpy(result.data(), p.out, count * 2, cudaMemcpyDeviceToHost));
  };
  // Where no tile has more than 16 queries, both kernels give the same bits.
  const auto choices = kernels(p);
  const bool tall = problem.counts[kRowsPacked] > 0;
  if (choices.size() > 1 && !tall && !decode90::fits_cluster_alone(decode90::make_params(p))) {
    run_once(choices[1].second, out);
    run_once(choices[0].second, again);
    same &= out == again;
  }

  const int64_t longest = std::max(1, *std::max_element(c.kv_lens.begin(), c.kv_lens.end()));
  double* scores = problem.own(device_alloc<double>(items * longest));
  double* ref_out = problem.own(device_alloc<double>(count));
  double* ref_lse = problem.own(device_alloc<double>(items));
  int* token_request = problem.own(to_device(problem.token_request));
  if (c.dtype == DType::bf16) {
    reference<__nv_bfloat16><<<items, 128>>>(p, token_request, scores, longest, ref_out, ref_lse);
  } else {
    reference<__half><<<items, 128>>>(p, token_request, scores, longest, ref_out, ref_lse);
  }
  CUDA_CHECK(cudaDeviceSynchronize());
  std::vector<double> expected(count), expected_lse(items);
  CUDA_CHECK(cudaMemcpy(expected.data(), ref_out, count * 8, cudaMemcpyDeviceToHost));
  CUDA_CHECK(cudaMemcpy(expected_lse.data(), ref_lse, items * 8, cudaMemcpyDeviceToHost));

  // The rounding of the output alone is u / sqrt(3) of each element in the mean; P's rounding adds as much.
  const double unit = c.dtype == DType::bf16 ? 1.0 / 256 : 1.0 / 2048;
  bool all_good = true;
  for (const auto& [name, kernel] : choices) {
    for (int run = 0; run < options.repeats; ++run) {
      run_once(kernel, run == 0 ? out : again);
      same &= run == 0 || out == again;
    }
    CUDA_CHECK(cudaMemcpy(lse.data(), p.lse, items * 4, cudaMemcpyDeviceToHost));
    double error = 0.0, norm = 0.0, worst_lse = 0.0;
    bool finite = true;
    for (int64_t i = 0; i < count; ++i) {
      const double x = element(out[i], c.dtype);
      finite &= std::isfinite(x);
      error += (x - expected[i]) * (x - expected[i]);
      norm += expected[i] * expected[i];
    }
    for (int64_t i = 0; i < items; ++i) {
      if (std::isinf(expected_lse[i]) && lse[i] == expected_lse[i]) continue;
      worst_lse = std::max(worst_lse, std::abs(lse[i] - expected_lse[i]));
    }
    const double relative = std::sqrt(error / std::max(norm, 1e-30));
    const bool good = finite && same && relative < unit && worst_lse < 1e-3;
    std::printf("%-7s %-48s rows %4d tiles %5d packed %3d  error %.2e lse %.1e %s%s%s\n", name, c.name.c_str(),
                problem.counts[kNumRows], problem.counts[kNumTiles], problem.counts[kRowsPacked], relative, worst_lse,
                good ? "ok" : "FAILED", finite ? "" : " (not finite)", same ? "" : " (runs differ)");
    std::fflush(stdout);
    all_good &= good;
  }
  return all_good;
}

std::vector<Case> check_cases() {
  std::vector<Case> cases;
  const std::vector<int> ragged = {1, 0, 15, 16, 17, 63, 64, 65, 127, 128, 129, 640, 1000, 2047, 3333};
  for (int page_size : {16, 32, 64, 128}) {
    for (int head_dim : {64, 128}) {
      const std::string tail = " p" + std::to_string(page_size) + " d" + std::to_string(head_dim);
      cases.push_back({.name = "ragged" + tail, .kv_lens = ragged, .head_dim = head_dim, .page_size = page_size});
      cases.push_back({.name = "ragged 9 requests share" + tail,
                       .kv_lens = {1300, 1290, 1345, 1408, 1281, 1400, 1500, 1555, 1289},
                       .head_dim = head_dim,
                       .page_size = page_size,
                       .levels = {{9, 1280}}});
    }
  }
  for (auto [q, kv] : {std::pair{8, 8}, {16, 4}, {20, 4}, {28, 4}, {64, 8}, {24, 2}, {32, 2}, {8, 1}}) {
    cases.push_back({.name = "heads " + std::to_string(q) + "/" + std::to_string(kv),
                     .kv_lens = ragged,
                     .num_qo_heads = q,
                     .num_kv_heads = kv});
    cases.push_back({.name = "heads " + std::to_string(q) + "/" + std::to_string(kv) + " share",
                     .kv_lens = {1300, 2290, 1345, 1408, 1281, 1400, 1500},
                     .num_qo_heads = q,
                     .num_kv_heads = kv,
                     .levels = {{7, 1280}}});
  }
  for (int batch : {2, 3, 4, 5, 8, 12, 16, 17, 40}) {
    cases.push_back({.name = "shared by " + std::to_string(batch),
                     .kv_lens = std::vector<int>(batch, 4096 + 77),
                     .levels = {{batch, 4096}}});
  }
  cases.push_back({.name = "tree of three levels",
                   .kv_lens = std::vector<int>(24, 8192 + 300),
                   .levels = {{24, 2048}, {8, 4096}, {4, 2048}}});
  cases.push_back({.name = "fp16", .kv_lens = ragged, .dtype = DType::fp16});
  cases.push_back({.name = "fp16 d64 share",
                   .kv_lens = std::vector<int>(12, 2100),
                   .head_dim = 64,
                   .dtype = DType::fp16,
                   .levels = {{12, 2048}}});
  cases.push_back({.name = "soft cap", .kv_lens = ragged, .cap = 2.0f});
  cases.push_back(
      {.name = "soft cap share", .kv_lens = std::vector<int>(12, 2100), .levels = {{12, 2048}}, .cap = 30.0f});
  cases.push_back({.name = "window 100", .kv_lens = ragged, .window_left = 100});
  cases.push_back({.name = "window 0", .kv_lens = ragged, .window_left = 0});
  cases.push_back({.name = "window 700 page 128", .kv_lens = ragged, .page_size = 128, .window_left = 700});
  cases.push_back({.name = "split every 256 keys", .kv_lens = ragged, .split_keys = 256});
  cases.push_back({.name = "interleaved cache", .kv_lens = ragged, .interleaved = true});
  cases.push_back({.name = "1 x 20000", .kv_lens = {20000}});
  const std::vector<std::vector<int>> few = {{1},
                                             {15},
                                             {64},
                                             {65},
                                             {129},
                                             {700, 1, 0},
                                             {0, 33},
                                             {5000, 3, 90},
                                             {17, 17, 17},
                                             {100000, 50},
                                             {3000, 2000},
                                             {640, 0, 777},
                                             {9000, 8000, 7000, 1, 2, 3, 4000, 129}};
  for (const std::vector<int>& lens : few) {
    std::string name = "few";
    for (int len : lens) name += " " + std::to_string(len);
    const int most = lens.size() > 4 ? 1 : 2;  // heads / 8 a group of 4 or 8
    for (int page_size : {16, 64, 128}) {
      cases.push_back({.name = name + " p" + std::to_string(page_size),
                       .kv_lens = lens,
                       .num_qo_heads = 32 * most,
                       .head_dim = page_size == 16 ? 64 : 128,
                       .page_size = page_size});
    }
    cases.push_back({.name = name + " window cap", .kv_lens = lens, .window_left = 60, .cap = 3.0f});
    cases.push_back({.name = name + " fp16 split", .kv_lens = lens, .dtype = DType::fp16, .split_keys = 128});
  }
  for (const auto& [batch, q] : {std::pair{16, 32},
                                 {9, 32},
                                 {16, 8},
                                 {12, 40},
                                 {4, 128},
                                 {8, 32},
                                 {7, 32},
                                 {5, 48},
                                 {3, 64},
                                 {2, 128},
                                 {8, 24}}) {
    const std::string name = " " + std::to_string(batch) + " " + std::to_string(q) + "/8";
    std::vector<int> lens(batch);
    for (int i = 0; i < batch; ++i) lens[i] = 1500 + 211 * i;
    cases.push_back({.name = "cluster" + name, .kv_lens = lens, .num_qo_heads = q, .levels = {{batch, 1024}}});
    cases.push_back({.name = "cluster tree" + name,
                     .kv_lens = lens,
                     .num_qo_heads = q,
                     .levels = {{batch, 640}, {(batch + 1) / 2, 448}}});
    cases.push_back({.name = "cluster alone" + name, .kv_lens = lens, .num_qo_heads = q});
    for (int& len : lens) len += 8192;
    cases.push_back({.name = "cluster long" + name,
                     .kv_lens = lens,
                     .num_qo_heads = q,
                     .head_dim = 64,
                     .levels = {{batch, 8192}, {(batch + 1) / 2, 448}}});
  }
  for (int batch : {2, 3, 5, 8}) {
    cases.push_back({.name = "few share " + std::to_string(batch),
                     .kv_lens = std::vector<int>(batch, 6000),
                     .levels = {{batch, 4096}}});
    cases.push_back({.name = "few share d64 " + std::to_string(batch),
                     .kv_lens = std::vector<int>(batch, 2100),
                     .num_qo_heads = 24,
                     .head_dim = 64,
                     .levels = {{batch, 1024}, {(batch + 1) / 2, 512}}});
  }
  cases.push_back({.name = "many short", .kv_lens = std::vector<int>(300, 130)});
  return cases;
}

// Small steps of random lengths, some with a common start.
std::vector<Case> random_cases(int count) {
  std::mt19937 random(11);
  const auto one_of = [&](std::initializer_list<int> choices) { return choices.begin()[random() % choices.size()]; };
  std::vector<Case> cases;
  for (int i = 0; i < count; ++i) {
    Case c{.name = "random " + std::to_string(i)};
    const int batch = one_of({1, 2, 3, 4, 4, 5, 7, 8, 11, 16});
    const double longest = std::log(one_of({500, 5000, 40000}));
    for (int r = 0; r < batch; ++r) {
      c.kv_lens.push_back(int(std::exp(std::uniform_real_distribution<>(0, longest)(random))));
    }
    c.num_kv_heads = one_of({8, 8, 8, 4});
    c.num_qo_heads = c.num_kv_heads * one_of({1, 2, 4, 4, 8, 16});
    c.head_dim = one_of({64, 128});
    c.page_size = one_of({16, 32, 64, 64, 128});
    if (random() % 4 == 0) c.window_left = int(random() % 3000);
    if (random() % 3 == 0) {
      const int common = 128 * (1 + int(random() % 20));
      c.levels = {{batch, common}};
      for (int& len : c.kv_lens) len += common;
    }
    cases.push_back(c);
  }
  return cases;
}

// --- Time ------------------------------------------------------------------------------------------------------------

// Runs through more code than an SM's instruction caches hold, as the layers between two attentions do.
__global__ void much_code(float* x) {
  float y = *x;
#pragma unroll
  for (int i = 0; i < 12288; ++i) y = y * 1.5f + static_cast<float>(i);
  if (y == 12345.0f) *x = y;
}

// Median microseconds of captured graphs over a cold L2 and cold instruction caches, in turns.
std::vector<double> time_graphs(const std::vector<std::function<void()>>& bodies, const L2Flush& flush, int repeats) {
  static float* const x = device_alloc<float>(1);
  const cudaStream_t stream = cudaStreamPerThread;
  const Timer timer;
  std::vector<std::unique_ptr<Graph>> graphs;
  for (const auto& body : bodies) graphs.push_back(std::make_unique<Graph>(stream, body));
  std::vector<std::vector<double>> times(bodies.size());
  for (int run = 0; run < repeats + 2; ++run) {
    for (size_t i = 0; i < bodies.size(); ++i) {
      much_code<<<132, 32, 0, stream>>>(x);
      flush(stream);
      const float ms = timer(stream, [&] { graphs[i]->launch(stream); });
      if (run >= 2) times[i].push_back(ms * 1e3);
    }
  }
  std::vector<double> medians;
  for (const auto& taken : times) medians.push_back(median(taken));
  return medians;
}

struct Timed {
  Case c;
  double peer_us;  // the best of FA3 and FlashInfer where it was measured, else 0
  double bar;      // ratio to it
};

std::vector<Timed> time_cases() {
  auto dense = [](int batch, int context, double peer, double bar, Case c = {}) {
    c.name = std::to_string(batch) + "x" + std::to_string(context) + c.name;
    c.kv_lens = std::vector<int>(batch, context);
    return Timed{c, peer, bar};
  };
  auto shared = [](int batch, int context, std::vector<Level> levels, double peer, double bar) {
    Case c{.name = std::to_string(batch) + "x" + std::to_string(context) + " shared"};
    for (const Level& level : levels) c.name += " " + std::to_string(level.members) + "*" + std::to_string(level.keys);
    c.kv_lens = std::vector<int>(batch, context);
    c.levels = levels;
    return Timed{c, peer, bar};
  };
  std::vector<Timed> cases = {
      dense(1, 1024, 14.4, 0.83),
      dense(1, 2048, 0, 0.83),
      dense(1, 8192, 25.2, 0.83),
      dense(1, 32768, 51.0, 0.83),
      dense(1, 131072, 142, 1.03),
      dense(2, 1024, 0, 0.83),
      dense(2, 8192, 0, 0.83),
      dense(2, 32768, 0, 0.83),
      dense(4, 1024, 0, 0.83),
      dense(4, 8192, 0, 0.83),
      dense(4, 32768, 0, 0.83),
      dense(5, 1024, 0, 0.83),
      dense(8, 1024, 22.9, 0.83),
      dense(8, 2048, 0, 0.83),
      dense(8, 8192, 80.7, 0.88),
      dense(8, 32768, 259, 0.83),
      dense(8, 131072, 991, 1.03),
      dense(9, 1024, 0, 1.03),
      dense(12, 2048, 0, 1.03),
      dense(16, 1024, 0, 1.03),
      dense(16, 2048, 0, 1.03),
      dense(16, 8192, 0, 1.03),
      dense(16, 32768, 0, 1.03),
      dense(16, 131072, 1946, 1.0),
      dense(64, 1024, 84.8, 0.88),
      dense(64, 8192, 504, 1.03),
      dense(256, 2048, 505, 1.03),
      dense(1, 8192, 14.6, 1.0, {.name = " 8q/1kv", .num_qo_heads = 8, .num_kv_heads = 1}),
      dense(16, 8192, 33.9, 1.0, {.name = " 8q/1kv", .num_qo_heads = 8, .num_kv_heads = 1}),
      dense(16, 8192, 139.5, 1.0, {.name = " 64q/8kv", .num_qo_heads = 64}),
      dense(64, 8192, 254.9, 1.0, {.name = " 28q/4kv", .num_qo_heads = 28, .num_kv_heads = 4}),
      dense(32, 4096, 483.7, 1.0, {.name = " 32q/32kv", .num_kv_heads = 32}),
      dense(64, 8192, 262.9, 1.0, {.name = " d64", .head_dim = 64}),
      dense(64, 8192, 490.1, 1.0, {.name = " p16", .page_size = 16}),
      dense(64, 8192, 0, 1.0, {.name = " p32", .page_size = 32}),
      shared(4, 32768, {{4, 30720}}, 0, 0),
      shared(8, 1024, {{8, 512}}, 0, 0),
      shared(8, 2048, {{8, 1024}}, 0, 0),
      shared(8, 4096, {{8, 2048}}, 0, 0),
      shared(8, 6144, {{8, 4096}}, 0, 0),
      shared(8, 8192, {{8, 6144}}, 0, 0),
      shared(8, 10240, {{8, 8192}}, 0, 0),
      shared(6, 6144, {{6, 4096}}, 0, 0),
      shared(8, 32768, {{8, 30720}}, 0, 0),
      shared(16, 32768, {{16, 30720}}, 0, 0),
      shared(64, 8192, {{64, 5760}}, 363, 0.52),
      shared(256, 4096, {{256, 2816}}, 661, 0.57),
      shared(64, 36864, {{64, 32768}}, 1381, 0.27),
      shared(128, 9216, {{128, 8192}}, 726, 0.26),
      shared(512, 8448, {{128, 8192}}, 2904, 0.15),
      shared(512, 8320, {{128, 8192}}, 0, 0),
      shared(512, 8576, {{128, 8192}}, 0, 0),
      shared(512, 8704, {{128, 8192}}, 0, 0),
      shared(1024, 8448, {{128, 8192}}, 0, 0),
      shared(256, 16640, {{64, 16384}}, 0, 0),
      shared(128, 33024, {{32, 32768}}, 0, 0),
      shared(64, 65920, {{64, 65536}}, 0, 0),
      shared(64, 21504, {{64, 4096}, {8, 16384}}, 0, 0),
  };
  std::mt19937 random(3);
  Case ragged{.name = "64 ragged 256..64K"};
  for (int i = 0; i < 64; ++i) {
    ragged.kv_lens.push_back(int(256 * std::exp(std::uniform_real_distribution<>(0, std::log(256.0))(random))));
  }
  cases.push_back({ragged, 0, 1.0});
  return cases;
}

void time_case(const Timed& timed, const Options& options, const L2Flush& flush) {
  Problem problem;
  build(problem, timed.c, options, false);
  AttendParams p = problem.params;
  p.lse = nullptr;
  p.stream = cudaStreamPerThread;
  const auto choices = kernels(p);
  std::vector<std::function<void()>> bodies;
  for (const auto& [name, kernel] : choices) {
    bodies.push_back([&p, kernel] { attend(p, kernel); });
    bodies.push_back([&p, kernel] { CUDA_CHECK(kernel(decode90::make_params(p))); });
  }
  const std::vector<double> times = time_graphs(bodies, flush, 15);
  const double floor = problem.unique_bytes / 4.3e6;
  std::printf("%-34s ctas %3d  floor %7.1f", timed.c.name.c_str(), options.ctas, floor);
  for (size_t i = 0; i < choices.size(); ++i) {
    std::printf("  %s %8.1f us (attend %8.1f)", choices[i].first, times[2 * i], times[2 * i + 1]);
  }
  if (timed.peer_us > 0) std::printf("  peer %7.1f bar %.2f", timed.peer_us, timed.bar);
  std::printf("  tiles %d partials %d\n", problem.counts[kNumTiles], problem.counts[kNumPartials]);
  std::fflush(stdout);
}

// Requests over one prefix: each reads it, it is always read once, or as the plan decides.
void time_sharing(const Options& given, const L2Flush& flush) {
  const std::vector<std::pair<int, int>> heads = {{32, 8}, {28, 4}, {8, 1}};
  for (const auto& [q, kv] : heads) {
    for (int batch : {2, 4, 5, 8, 12, 16, 32, 64, 128}) {
      for (int prefix : {512, 1024, 2048, 4096, 8192, 16384}) {
        for (int own : {256, 2048}) {
          std::printf("%d/%d %3d x %5d + %4d ", q, kv, batch, prefix, own);
          for (int way : {0, 1, 2}) {
            const Case c{.name = "sharing",
                         .kv_lens = std::vector<int>(batch, prefix + own),
                         .num_qo_heads = q,
                         .num_kv_heads = kv,
                         .levels = {{batch, prefix}},
                         .share = way > 0};
            Options options = given;
            if (way == 1) options.pack_keys = 0;
            Problem problem;
            build(problem, c, options, false);
            AttendParams p = problem.params;
            p.lse = nullptr;
            p.stream = cudaStreamPerThread;
            const Kernel kernel = kernels(p)[0].second;
            std::printf(" %6.1f", time_graphs({[&] { attend(p, kernel); }}, flush, 5)[0]);
            if (way == 2) std::printf("%s", problem.counts[kRowsPacked] > 0 ? " once" : "");
          }
          std::printf("\n");
          std::fflush(stdout);
        }
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "check";
  std::string filter;
  std::vector<int> ctas;
  int random = 0;
  Options options;
  for (int i = 2; i < argc; ++i) {
    if (!std::strcmp(argv[i], "--ctas")) {
      ctas.push_back(std::atoi(argv[++i]));
    } else if (!std::strcmp(argv[i], "--rows")) {
      options.rows_per_tile = std::atoi(argv[++i]);
    } else if (!std::strcmp(argv[i], "--random")) {
      random = std::atoi(argv[++i]);
    } else if (!std::strcmp(argv[i], "--pack")) {
      options.pack_keys = std::atoi(argv[++i]);
    } else if (!std::strcmp(argv[i], "--repeat")) {
      options.repeats = std::atoi(argv[++i]);
    } else {
      filter = argv[i];
    }
  }
  if (ctas.empty()) ctas = {132, 264};
  int failures = 0;
  if (mode == "check") {
    for (int count : ctas) {
      options.ctas = count;
      for (const Case& c : random > 0 ? random_cases(random) : check_cases()) {
        if (c.name.find(filter) != std::string::npos) failures += !check(c, options);
      }
    }
    std::printf("%d failures\n", failures);
  } else if (mode == "sharing") {
    options.ctas = ctas.back();
    time_sharing(options, L2Flush());
  } else {
    const L2Flush flush;
    for (const Timed& timed : time_cases()) {
      if (timed.c.name.find(filter) == std::string::npos) continue;
      for (int count : ctas) {
        options.ctas = count;
        time_case(timed, options, flush);
      }
    }
  }
  return failures != 0;
}
