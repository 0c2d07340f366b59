// Stand-alone check and timing of the cublaslt variant, against a double-precision reference on the GPU. Build (from
// the repository root, with the folder of cublasLt.h as CUBLAS):
//   g++ -std=c++20 -O2 -I csrc -isystem $CUBLAS -c csrc/attend/cublaslt_matmul.cpp -o cublaslt_matmul.o
//   nvcc -std=c++20 -O3 -gencode arch=compute_90,code=sm_90 --expt-relaxed-constexpr -cudart static -I csrc -I
//   scripts/bench
//        scripts/bench/gpu_cublaslt_test.cu csrc/attend/cublaslt.cu cublaslt_matmul.o -ldl -o gpu_cublaslt_test
// Run: gpu_cublaslt_test check | gpu_cublaslt_test time | gpu_cublaslt_test once (for a profiler)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "attend/cublaslt.h"
#include "gpu_common.cuh"

using namespace flashcore;

namespace {

constexpr int64_t kMatmulBytes = 32 << 20;

struct Case {
  std::string name;
  std::vector<int> q_lens, kv_lens;
  int num_qo_heads, num_kv_heads, head_dim;
  DType dtype;
  int causal;
  int page_size = 64;
  double bar = 0.0;  // TFLOPS
};

// A block of 128 threads for every `stride`-th (token, head): exact softmax in double, three passes over the keys.
template <typename T>
__global__ void reference(AttendParams p, const int* token_request, int stride, double* out, double* lse) {
  extern __shared__ double q[];
  __shared__ double buffer[128];
  const int64_t item = int64_t{blockIdx.x} * stride;
  const int token = item / p.num_qo_heads, head = item % p.num_qo_heads;
  const int kv_head = head / (p.num_qo_heads / p.num_kv_heads), r = token_request[token];
  const int32_t* pages = p.plan.kv_indices + p.plan.kv_indptr[r];
  const int num_pages = p.plan.kv_indptr[r + 1] - p.plan.kv_indptr[r];
  const int kv_len = num_pages ? (num_pages - 1) * p.page_size + p.plan.last_page_len[r] : 0;
  const int position = kv_len - p.plan.qo_indptr[r + 1] + token;
  const int visible = p.causal ? max(min(kv_len, position + 1), 0) : kv_len;
  const auto at = [&](const void* base, int64_t page_stride, int64_t token_stride, int64_t head_stride, int j) {
    return static_cast<const T*>(base) + pages[j / p.page_size] * page_stride + j % p.page_size * token_stride +
           kv_head * head_stride;
  };
  for (int d = threadIdx.x; d < p.head_dim; d += 128) {
    q[d] = float(static_cast<const T*>(p.q)[token * p.q_stride_token + head * p.q_stride_head + d]);
  }
  __syncthreads();
  const auto score = [&](int j) {
    const T* k = at(p.k, p.k_stride_page, p.k_stride_token, p.k_stride_head, j);
    double dot = 0.0;
    for (int d = 0; d < p.head_dim; ++d) dot += q[d] * double(float(k[d]));
    return dot * p.sm_scale;
  };
  double sum = 0.0;  // inputs are small enough for exp without a maximum
  for (int j = threadIdx.x; j < visible; j += 128) sum += exp(score(j));
  buffer[threadIdx.x] = sum;
  __syncthreads();
  for (int step = 64; step > 0; step /= 2) {
    if (threadIdx.x < step) buffer[threadIdx.x] += buffer[threadIdx.x + step];
    __syncthreads();
  }
  sum = buffer[0];
  double* o = q + p.head_dim;
  for (int d = threadIdx.x; d < p.head_dim; d += 128) o[d] = 0.0;
  for (int begin = 0; begin < visible; begin += 128) {
    __syncthreads();
    buffer[threadIdx.x] = begin + threadIdx.x < visible ? exp(score(begin + threadIdx.x)) : 0.0;
    __syncthreads();
    for (int d = threadIdx.x; d < p.head_dim; d += 128) {
      for (int j = begin; j < min(begin + 128, visible); ++j) {
        o[d] += buffer[j - begin] * double(float(at(p.v, p.v_stride_page, p.v_stride_token, p.v_stride_head, j)[d]));
      }
    }
  }
  for (int d = threadIdx.x; d < p.head_dim; d += 128) {
    out[int64_t{blockIdx.x} * p.head_dim + d] = sum > 0 ? o[d] / sum : 0.0;
  }
  if (threadIdx.x == 0) lse[blockIdx.x] = sum > 0 ? log2(sum) : -INFINITY;
}

// --- A case on the device --------------------------------------------------------------------------------------------

struct Problem {
  AttendParams p{};
  std::vector<void*> owned;
  std::vector<int> token_request;
  double flops = 0.0, plan_seconds = 0.0;

  template <typename T>
  T* alloc(int64_t count) {
    void* pointer;
    CUDA_CHECK(cudaMalloc(&pointer, std::max<int64_t>(count, 1) * sizeof(T)));
    owned.push_back(pointer);
    return static_cast<T*>(pointer);
  }
  template <typename T>
  T* upload(const std::vector<T>& host) {
    T* pointer = alloc<T>(host.size());
    CUDA_CHECK(cudaMemcpy(pointer, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
    return pointer;
  }
  ~Problem() {
    for (void* pointer : owned) cudaFree(pointer);
  }
};

void build(Problem& problem, const Case& c, bool fp32_scores, std::string& known) {
  const int batch = c.q_lens.size();
  std::vector<int> qo_indptr = {0}, kv_indptr = {0}, last_page_len;
  for (int r = 0; r < batch; ++r) {
    qo_indptr.push_back(qo_indptr.back() + c.q_lens[r]);
    problem.token_request.insert(problem.token_request.end(), c.q_lens[r], r);
    const int pages = (c.kv_lens[r] + c.page_size - 1) / c.page_size;
    kv_indptr.push_back(kv_indptr.back() + pages);
    last_page_len.push_back(pages ? c.kv_lens[r] - (pages - 1) * c.page_size : 0);
    const double keys = c.kv_lens[r], queries = c.q_lens[r];
    problem.flops += 4.0 * c.num_qo_heads * c.head_dim * queries * (c.causal ? keys - queries / 2 : keys);
  }
  const int num_pages = kv_indptr.back() + 1;
  std::vector<int> kv_indices(kv_indptr.back());
  std::iota(kv_indices.begin(), kv_indices.end(), 1);
  std::shuffle(kv_indices.begin(), kv_indices.end(), std::mt19937(7));

  AttendParams& p = problem.p;
  p.plan.qo_indptr = problem.upload(qo_indptr);
  p.plan.kv_indptr = problem.upload(kv_indptr);
  p.plan.kv_indices = problem.upload(kv_indices);
  p.plan.last_page_len = problem.upload(last_page_len);
  p.batch = batch;
  p.num_tokens = qo_indptr.back();
  p.num_qo_heads = c.num_qo_heads;
  p.num_kv_heads = c.num_kv_heads;
  p.head_dim = c.head_dim;
  p.page_size = c.page_size;
  p.num_pages = num_pages;
  p.sm_scale = 1.0f / std::sqrt(float(c.head_dim));
  p.causal = c.causal;
  p.window_left = -1;
  p.dtype = c.dtype;
  p.max_qo_len = *std::max_element(c.q_lens.begin(), c.q_lens.end());
  p.max_kv_len = *std::max_element(c.kv_lens.begin(), c.kv_lens.end());
  const int64_t token = int64_t{c.num_kv_heads} * c.head_dim, page = token * c.page_size;
  const int64_t q_count = int64_t{p.num_tokens} * c.num_qo_heads * c.head_dim;
  auto* q = problem.alloc<uint16_t>(q_count);
  auto* k = problem.alloc<uint16_t>(page * num_pages);
  auto* v = problem.alloc<uint16_t>(page * num_pages);
  p.q = q, p.k = k, p.v = v;
  p.q_stride_token = int64_t{c.num_qo_heads} * c.head_dim;
  p.q_stride_head = p.k_stride_head = p.v_stride_head = c.head_dim;
  p.k_stride_page = p.v_stride_page = page;
  p.k_stride_token = p.v_stride_token = token;
  const auto fill = [&](uint16_t* x, int64_t n, int seed) {
    if (c.dtype == DType::bf16) fill_random<<<2048, 256>>>(reinterpret_cast<__nv_bfloat16*>(x), n, seed);
    if (c.dtype == DType::fp16) fill_random<<<2048, 256>>>(reinterpret_cast<__half*>(x), n, seed);
  };
  fill(q, q_count, 1), fill(k, page * num_pages, 2), fill(v, page * num_pages, 3);
  CUDA_CHECK(cudaMemset(k, 0xFF, page * 2));  // page 0 is nobody's: NaN
  CUDA_CHECK(cudaMemset(v, 0xFF, page * 2));
  p.out = problem.alloc<uint16_t>(q_count);
  p.lse = fp32_scores ? problem.alloc<float>(q_count / c.head_dim) : nullptr;

  p.fp32_scores = fp32_scores;
  const CublasLtShape shape{p.batch,    p.max_qo_len, p.max_kv_len, p.num_kv_heads, p.num_qo_heads / p.num_kv_heads,
                            p.head_dim, p.dtype,      p.causal,     p.fp32_scores};
  p.workspace_bytes = cublaslt_workspace_bytes(shape, kMatmulBytes);
  p.workspace = problem.alloc<char>(p.workspace_bytes);
  CUDA_CHECK(cudaDeviceSynchronize());
  const auto begin = std::chrono::steady_clock::now();
  known += plan_cublaslt(shape, p.workspace, p.workspace_bytes, kMatmulBytes, known, true, nullptr);
  problem.plan_seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  CUDA_CHECK(cudaMemset(p.workspace, 0xFF, p.workspace_bytes));
}

// --- Check -----------------------------------------------------------------------------------------------------------

float element(uint16_t bits, DType dtype) {
  if (dtype == DType::fp16) return __half2float(__half(__half_raw{bits}));
  const uint32_t wide = uint32_t{bits} << 16;
  float x;
  std::memcpy(&x, &wide, 4);
  return x;
}

// Compares every `stride`-th (token, head); the LSE too where scores are in fp32.
bool check(const Case& c, bool fp32_scores, int stride, std::string& known) {
  Problem problem;
  build(problem, c, fp32_scores, known);
  const AttendParams& p = problem.p;
  const int64_t items = int64_t{p.num_tokens} * p.num_qo_heads, count = items * p.head_dim;
  const int64_t sampled = (items + stride - 1) / stride;
  std::vector<uint16_t> out(count), again(count);
  for (auto* result : {&out, &again}) {
    CUDA_CHECK(cudaMemset(p.out, 0xFF, count * 2));
    if (fp32_scores) CUDA_CHECK(cudaMemset(p.lse, 0xFF, items * 4));
    CUDA_CHECK(run_attend_cublaslt(p));
    CUDA_CHECK(cudaDeviceSynchronize());
    CUDA_CHECK(cudaMemcpy(result->data(), p.out, count * 2, cudaMemcpyDeviceToHost));
  }
  std::vector<float> lse(items);
  if (fp32_scores) CUDA_CHECK(cudaMemcpy(lse.data(), p.lse, items * 4, cudaMemcpyDeviceToHost));
  double* ref_out = problem.alloc<double>(sampled * p.head_dim);
  double* ref_lse = problem.alloc<double>(sampled);
  const int* requests = problem.upload(problem.token_request);
  const int shared = 2 * p.head_dim * sizeof(double);
  if (c.dtype == DType::bf16) reference<__nv_bfloat16><<<sampled, 128, shared>>>(p, requests, stride, ref_out, ref_lse);
  if (c.dtype == DType::fp16) reference<__half><<<sampled, 128, shared>>>(p, requests, stride, ref_out, ref_lse);
  CUDA_CHECK(cudaDeviceSynchronize());
  std::vector<double> expected(sampled * p.head_dim), expected_lse(sampled);
  CUDA_CHECK(cudaMemcpy(expected.data(), ref_out, expected.size() * 8, cudaMemcpyDeviceToHost));
  CUDA_CHECK(cudaMemcpy(expected_lse.data(), ref_lse, sampled * 8, cudaMemcpyDeviceToHost));

  // The rounding of the output alone is u / sqrt(3) of each element in the mean; that of P adds as much, and that of S
  // in fp16 twice as much as P's.
  const double unit = c.dtype == DType::bf16 ? 1.0 / 256 : (fp32_scores ? 1.0 : 1.5) / 2048;
  double error = 0.0, norm = 0.0, worst = 0.0, worst_lse = 0.0;
  bool finite = std::all_of(out.begin(), out.end(), [&](uint16_t x) { return std::isfinite(element(x, c.dtype)); });
  for (int64_t i = 0; i < sampled; ++i) {
    for (int d = 0; d < p.head_dim; ++d) {
      const double truth = expected[i * p.head_dim + d];
      const double difference = element(out[i * stride * p.head_dim + d], c.dtype) - truth;
      error += difference * difference;
      norm += truth * truth;
      worst = std::max(worst, std::abs(difference));
    }
    if (!fp32_scores || (std::isinf(expected_lse[i]) && lse[i * stride] == expected_lse[i])) continue;
    const double difference = std::abs(lse[i * stride] - expected_lse[i]);
    worst_lse = std::isnan(difference) ? INFINITY : std::max(worst_lse, difference);
  }
  const double relative = std::sqrt(error / std::max(norm, 1e-30));
  const bool same = out == again, good = finite && same && relative < unit && worst_lse < 1e-4;
  std::printf("%-44s %s scores error %.2e max %.1e lse %.1e plan %4.0f ms %s%s%s\n", c.name.c_str(),
              fp32_scores ? "fp32" : "fp16", relative, worst, worst_lse, problem.plan_seconds * 1e3,
              good ? "ok" : "FAILED", finite ? "" : " (not finite)", same ? "" : " (runs differ)");
  std::fflush(stdout);
  return good;
}

std::vector<Case> check_cases() {
  const std::vector<int> queries = {1, 0, 15, 16, 17, 63, 64, 65, 127, 200, 8, 40},
                         keys = {1, 0, 15, 64, 100, 1000, 65, 129, 640, 200, 3, 2500};
  std::vector<Case> cases;
  for (const DType dtype : {DType::bf16, DType::fp16}) {
    for (const int head_dim : {64, 128, 256}) {
      for (const int causal : {0, 1}) {
        const std::string name = std::string(dtype == DType::bf16 ? "bf16" : "fp16") + " d" + std::to_string(head_dim) +
                                 (causal ? " causal" : "");
        cases.push_back({name + " ragged", queries, keys, 8, 2, head_dim, dtype, causal});
        cases.push_back({name + " long prefix, page 1", {70, 3}, {5000, 2100}, 6, 2, head_dim, dtype, causal, 1});
        cases.push_back({name + " three blocks, page 5", {1500, 1024}, {1500, 1025}, 3, 3, head_dim, dtype, causal, 5});
      }
    }
  }
  return cases;
}

// --- Time ------------------------------------------------------------------------------------------------------------

std::vector<Case> time_cases() {
  const auto even = [](int batch, int len) { return std::vector<int>(batch, len); };
  return {
      {"B16 H16 S2048 D64 fp16", even(16, 2048), even(16, 2048), 16, 16, 64, DType::fp16, 0, 64, 110},
      {"B16 H16 S2048 D64 fp16 causal", even(16, 2048), even(16, 2048), 16, 16, 64, DType::fp16, 1, 64, 80},
      {"B4 32q/8kv S8192 D128 bf16 causal", even(4, 8192), even(4, 8192), 32, 8, 128, DType::bf16, 1, 64, 150},
      {"B1 32q/8kv S32768 D128 bf16 causal", even(1, 32768), even(1, 32768), 32, 8, 128, DType::bf16, 1, 64, 150},
      {"B16 H96 S4096 D128 fp16", even(16, 4096), even(16, 4096), 96, 96, 128, DType::fp16, 0, 64, 190},
  };
}

void time(const Case& c, std::string& known) {
  std::printf("%-36s bar %3.0f;", c.name.c_str(), c.bar);
  for (const bool fp32_scores : {false, true}) {
    Problem problem;
    build(problem, c, fp32_scores, known);
    AttendParams p = problem.p;
    p.lse = nullptr;
    cudaStream_t stream;
    CUDA_CHECK(cudaStreamCreate(&stream));
    p.stream = stream;
    const int repeats = problem.flops > 2e12 ? 5 : 15;
    const auto nothing = [] {};  // the inputs are larger than the L2
    const double eager = median_us(repeats, stream, [&] { CUDA_CHECK(run_attend_cublaslt(p)); }, nothing) * 1e-3;
    const Graph graph(stream, [&] { CUDA_CHECK(run_attend_cublaslt(p)); });
    const double replay = median_us(repeats, stream, [&] { graph.launch(stream); }, nothing) * 1e-3;
    std::printf(" %s scores: %8.3f ms %6.1f TFLOPS, graph %6.1f, plan %.0f ms, workspace %ld MiB;",
                fp32_scores ? "fp32" : "fp16", eager, problem.flops / eager * 1e-9, problem.flops / replay * 1e-9,
                problem.plan_seconds * 1e3, static_cast<long>(p.workspace_bytes >> 20));
  }
  std::printf("\n");
  std::fflush(stdout);
}

// One run of each case, for a profiler.
void once(const Case& c, std::string& known) {
  for (const bool fp32_scores : {false, true}) {
    Problem problem;
    build(problem, c, fp32_scores, known);
    CUDA_CHECK(run_attend_cublaslt(problem.p));
    CUDA_CHECK(cudaDeviceSynchronize());
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "check";
  if (const char* missing = cublaslt_missing()) {
    std::printf("cublaslt %s\n", missing);
    return 1;
  }
  std::printf("cublasLt %ld\n", static_cast<long>(cublaslt_version()));
  std::string known;
  bool good = true;
  if (mode == "check") {
    for (const Case& c : check_cases()) {
      good &= check(c, true, 1, known);
      good &= check(c, false, 1, known);
    }
    for (const Case& c : time_cases()) {
      for (const bool fp32_scores : {false, true}) {
        if (c.q_lens[0] <= 4096) good &= check(c, fp32_scores, 997, known);
      }
    }
    std::printf(good ? "all ok\n" : "FAILED\n");
  } else {
    for (const Case& c : time_cases()) mode == "once" ? once(c, known) : time(c, known);
  }
  return good ? 0 : 1;
}
