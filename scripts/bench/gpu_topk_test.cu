// Stand-alone check and timing of decode under policy topk: select, attend and merge against the one kernel that does
// all three for a request (wgmma_sm90_decode_topk.cuh). Both must give the same lists and the same bits. Build (from
// the repository root):
//   nvcc -std=c++20 -O3 -gencode arch=compute_90a,code=sm_90a --expt-relaxed-constexpr -cudart static -I csrc
//        scripts/bench/gpu_topk_test.cu csrc/attend/{wgmma_sm90_decode{,_few,_cluster,_topk},merge}.cu
//        csrc/summary/{select,score_bf16,score_fp16,store}.cu csrc/plan/plan_cpu.cpp -o gpu_topk_test
// Run: gpu_topk_test check | time
#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "attend/wgmma_sm90_decode.h"
#include "device/dependent_launch.cuh"
#include "gpu_decode_problem.cuh"
#include "gpu_time.cuh"
#include "params.h"

using namespace flashcore;
using namespace decode_test;

namespace {

struct Topk {
  std::string name;
  int kv_len;
  int budget;  // pages
  int group = 4;
  int head_dim = 128;
  DType dtype = DType::bf16;
  bool fp8 = false;
  SummaryKind kind = SummaryKind::mean_std;
  GroupReduction reduction = GroupReduction::max;
  int page_size = 64;
  int sinks = 1, recent = 2;
  int run = 1;       // pages that follow each other
  int constant = 0;  // 1: all summaries are the same, so that ties decide
};

struct Run {
  Problem problem;
  SelectAttendParams params{};
  StoreParams store{};
  int32_t* lists;
  int64_t num_lists;

  explicit Run(const Topk& t) {
    Case c{.name = t.name,
           .kv_lens = {t.kv_len},
           .num_qo_heads = 8 * t.group,
           .num_kv_heads = 8,
           .head_dim = t.head_dim,
           .page_size = t.page_size,
           .dtype = t.dtype,
           .run = t.run};
    c.sparse = {.sink_pages = t.sinks, .recent_pages = t.recent, .budget_pages = t.budget, .list_pages = t.budget};
    build(problem, c, Options{}, false);
    AttendParams& p = problem.params;
    SelectParams& s = params.select;
    s.plan = p.plan;
    const int vectors = t.kind == SummaryKind::mean ? 1 : 2;
    s.pages.summaries = {problem.own(device_alloc<uint16_t>(int64_t{p.num_pages} * 8 * vectors * t.head_dim)), t.kind,
                         t.fp8};
    s.pages.k = p.k;
    s.pages.kv_indptr = p.plan.kv_indptr;
    s.pages.kv_indices = p.plan.kv_indices;
    s.pages.last_page_len = p.plan.last_page_len;
    s.pages.k_stride_page = p.k_stride_page;
    s.pages.k_stride_token = p.k_stride_token;
    s.pages.k_stride_head = p.k_stride_head;
    s.pages.batch = 1;
    const int pages = std::max(1, (t.kv_len + t.page_size - 1) / t.page_size);
    s.pages.max_columns = pages;
    s.pages.num_kv_heads = 8;
    s.pages.head_dim = t.head_dim;
    s.pages.page_size = t.page_size;
    s.pages.num_pages = p.num_pages;
    s.pages.dtype = t.dtype;
    store.pages = s.pages;
    store.pages.first_page = problem.own(to_device(std::vector<int32_t>{0}));
    CUDA_CHECK(run_store_cuda(store));
    store.pages.first_page = nullptr;
    const int64_t channels = int64_t{8} * t.head_dim;
    uint16_t* fresh = problem.own(device_alloc<uint16_t>(2 * channels));
    fill_random<<<1, 256>>>((__half*)fresh, 2 * channels, 3);
    std::vector<int32_t> table(pages);
    CUDA_CHECK(cudaMemcpy(table.data(), p.plan.kv_indices, table.size() * 4, cudaMemcpyDeviceToHost));
    const int64_t slot = int64_t{table.back()} * t.page_size + (t.kv_len - 1) % t.page_size;
    store.tokens = {.k = fresh,
                    .v = fresh + channels,
                    .slots = problem.own(to_device(std::vector<int64_t>{slot})),
                    .k_stride_token = channels,
                    .k_stride_head = t.head_dim,
                    .v_stride_token = channels,
                    .v_stride_head = t.head_dim};
    store.v = const_cast<void*>(p.v);
    store.v_stride_page = p.v_stride_page;
    store.v_stride_token = p.v_stride_token;
    store.v_stride_head = p.v_stride_head;
    if (t.constant) {
      CUDA_CHECK(
          cudaMemset(s.pages.summaries.data, 0, int64_t{p.num_pages} * 8 * vectors * t.head_dim * (t.fp8 ? 1 : 2)));
    }
    s.q = p.q;
    s.scores = problem.own(device_alloc<float>(8 * s.pages.max_columns));
    s.q_stride_token = p.q_stride_token;
    s.q_stride_head = p.q_stride_head;
    s.group_reduction = t.reduction;
    s.std_weight = 0.5f;
    s.sm_scale = p.sm_scale;
    s.mass_share = 65536;
    s.num_qo_heads = p.num_qo_heads;
    s.sparse = problem.sparse;
    s.num_sms = p.num_sms;
    params.attend = p;
    num_lists = int64_t{8} * t.budget;
    lists = p.plan.kv_indices + problem.sparse.begin;
    CUDA_CHECK(cudaDeviceSynchronize());
  }
  void on(cudaStream_t stream) { params.attend.stream = params.select.pages.stream = store.pages.stream = stream; }
  void apart() const {
    CUDA_CHECK(run_select_cuda(params.select));
    AttendParams p = params.attend;
    p.lists_begin = problem.sparse.begin;
    attend(p, decode90::way_of(decode90::make_params(p)));
  }
  void together() const { CUDA_CHECK(run_select_attend_wgmma_sm90_decode(params)); }
};

bool check(const Topk& t) {
  Run run(t);
  if (!wgmma_sm90_decode_selects(run.params)) {
    std::printf("%-40s is not served FAILED\n", t.name.c_str());
    return false;
  }
  const AttendParams& p = run.params.attend;
  const int64_t count = int64_t{p.num_qo_heads} * p.head_dim;
  std::vector<uint16_t> out[3];
  std::vector<float> lse[3];
  std::vector<int32_t> lists[3];
  for (int i = 0; i < 3; ++i) {
    CUDA_CHECK(cudaMemset(p.out, 0xFF, count * 2));
    CUDA_CHECK(cudaMemset(p.lse, 0xFF, p.num_qo_heads * 4));
    CUDA_CHECK(cudaMemset(run.lists, 0xFF, run.num_lists * 4));
    i == 0 ? run.apart() : run.together();
    CUDA_CHECK(cudaDeviceSynchronize());
    out[i].resize(count);
    lse[i].resize(p.num_qo_heads);
    lists[i].resize(run.num_lists);
    CUDA_CHECK(cudaMemcpy(out[i].data(), p.out, count * 2, cudaMemcpyDeviceToHost));
    CUDA_CHECK(cudaMemcpy(lse[i].data(), p.lse, p.num_qo_heads * 4, cudaMemcpyDeviceToHost));
    CUDA_CHECK(cudaMemcpy(lists[i].data(), run.lists, run.num_lists * 4, cudaMemcpyDeviceToHost));
  }
  int64_t other = 0, other_lists = 0;
  for (int64_t i = 0; i < count; ++i) other += out[0][i] != out[1][i] || out[0][i] != out[2][i];
  for (int64_t i = 0; i < run.num_lists; ++i) other_lists += lists[0][i] != lists[1][i] || lists[0][i] != lists[2][i];
  const bool same_lse = !std::memcmp(lse[0].data(), lse[1].data(), lse[0].size() * 4);
  const bool good = other == 0 && other_lists == 0 && same_lse;
  std::printf("%-40s %s: %ld of %ld outputs, %ld of %ld list entries differ, lse %s\n", t.name.c_str(),
              good ? "ok" : "FAILED", other, count, other_lists, run.num_lists, same_lse ? "same" : "differs");
  std::fflush(stdout);
  return good;
}

std::vector<Topk> topk_cases() {
  std::vector<Topk> cases;
  for (int len : {131072, 131071, 130000, 32768, 70001, 4097, 4160, 4161, 4096, 4095, 1000, 64, 1, 65600, 65700}) {
    cases.push_back({.name = "1 x " + std::to_string(len), .kv_len = len, .budget = 64});
  }
  for (int run : {2, 40, 100, 4096}) {
    cases.push_back({.name = "runs of " + std::to_string(run), .kv_len = 131000, .budget = 64, .run = run});
  }
  for (int group : {1, 2, 3, 5, 7, 8}) {
    cases.push_back({.name = "group " + std::to_string(group), .kv_len = 50000, .budget = 64, .group = group});
  }
  for (int budget : {4, 5, 16, 98, 99, 100, 200, 614, 2000}) {
    cases.push_back({.name = "budget " + std::to_string(budget), .kv_len = 131000, .budget = budget});
  }
  for (auto kind : {SummaryKind::mean_std, SummaryKind::min_max, SummaryKind::mean}) {
    for (auto reduction : {GroupReduction::max, GroupReduction::mean, GroupReduction::logsumexp}) {
      for (bool fp8 : {false, true}) {
        for (int dim : {64, 128}) {
          for (auto dtype : {DType::bf16, DType::fp16}) {
            if (kind == SummaryKind::mean && fp8 && dim == 64) continue;  // 64 bytes: not served
            cases.push_back({.name = "kind " + std::to_string(int(kind)) + " reduction " +
                                     std::to_string(int(reduction)) + (fp8 ? " fp8" : "") + " d" + std::to_string(dim) +
                                     (dtype == DType::fp16 ? " fp16" : ""),
                             .kv_len = 60033,
                             .budget = 40,
                             .head_dim = dim,
                             .dtype = dtype,
                             .fp8 = fp8,
                             .kind = kind,
                             .reduction = reduction});
          }
        }
      }
    }
  }
  for (int page : {16, 32, 128}) {
    cases.push_back({.name = "page " + std::to_string(page), .kv_len = 30001, .budget = 64, .page_size = page});
  }
  cases.push_back({.name = "sinks 0, recent 1", .kv_len = 50000, .budget = 64, .sinks = 0, .recent = 1});
  cases.push_back({.name = "sinks 9, recent 20", .kv_len = 50000, .budget = 64, .sinks = 9, .recent = 20});
  cases.push_back({.name = "ties", .kv_len = 100000, .budget = 64, .constant = 1});
  return cases;
}

// Stands for what a layer runs before its keys are stored; launched, and allowing others, as SGLang's rotary embedding.
__global__ void rotary(uint16_t* q, int count) {
  wait_for_primary();
  for (int i = threadIdx.x; i < count; i += blockDim.x) q[i] = q[i] + 0;
  allow_dependents();
}

void time(const L2Flush& flush) {
  for (const Topk& t : {Topk{.name = "1 x 128K, 4096", .kv_len = 131000, .budget = 64},
                        {.name = "1 x 128K, 4096, in a row", .kv_len = 131000, .budget = 64, .run = 4096},
                        {.name = "1 x 128K, 4096 (fp8)", .kv_len = 131000, .budget = 64, .fp8 = true},
                        {.name = "1 x 32K, 2048, in a row", .kv_len = 32700, .budget = 32, .run = 4096},
                        {.name = "1 x 32K, 2048", .kv_len = 32700, .budget = 32},
                        {.name = "1 x 128K, 30 %", .kv_len = 131000, .budget = 614},
                        {.name = "1 x 4000, below the budget", .kv_len = 4000, .budget = 64},
                        {.name = "1 x 1000, below the budget", .kv_len = 1000, .budget = 64}}) {
    Run run(t);
    run.on(cudaStreamPerThread);
    run.params.attend.lse = nullptr;
    const auto exact = [&] {
      const AttendParams& p = run.params.attend;
      attend(p, decode90::way_of(decode90::make_params(p)));
    };
    const auto rotate = [&] {
      CUDA_CHECK(launch_dependent(rotary, 1, 1024, cudaStreamPerThread,
                                  static_cast<uint16_t*>(const_cast<void*>(run.params.attend.q)), 32 * 128));
    };
    const auto store = [&] {
      rotate();
      CUDA_CHECK(run_store_cuda(run.store));
    };
    const auto alone = [&] {
      rotate();
      run.params.tokens = run.store.tokens;
      run.params.early = 1;
      run.together();
      run.params.tokens = {};
      run.params.early = 0;
    };
    const auto times = time_graphs({[&] { run.apart(); }, [&] { run.together(); }, exact,
                                    [&] { CUDA_CHECK(run_select_cuda(run.params.select)); }, store,
                                    [&] {
                                      store();
                                      run.apart();
                                    },
                                    [&] {
                                      store();
                                      run.together();
                                    },
                                    alone},
                                   flush, 25);
    std::printf(
        "%-28s apart %6.2f together %6.2f attend alone %6.2f select %6.2f | store %6.2f and apart %6.2f together %6.2f "
        "storing %6.2f\n",
        t.name.c_str(), times[0], times[1], times[2], times[3], times[4], times[5], times[6], times[7]);
    std::fflush(stdout);
  }
}

}  // namespace

int main(int argc, char** argv) {
  int failures = 0;
  if (argc > 1 && !std::strcmp(argv[1], "time")) {
    time(L2Flush());
  } else {
    for (const Topk& t : topk_cases()) failures += !check(t);
    std::printf("%d failures\n", failures);
  }
  return failures != 0;
}
