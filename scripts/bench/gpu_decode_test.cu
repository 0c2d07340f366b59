// Stand-alone check and timing of the Hopper decode kernel: plans on the host, kernel and merge on the GPU, against a
// double-precision reference. Build (from the repository root):
//   nvcc -std=c++20 -O3 -gencode arch=compute_90a,code=sm_90a --expt-relaxed-constexpr -cudart static -I csrc
//        scripts/bench/gpu_decode_test.cu csrc/attend/{wgmma_sm90_decode{,_few,_cluster,_packed},merge}.cu
//        csrc/plan/plan_cpu.cpp -o gpu_decode_test
// Run: gpu_decode_test check [filter] [--repeat N] [--random N]
//      gpu_decode_test time [filter] [--ctas N]... [--rows N]
//      gpu_decode_test sharing [--pack KEYS] [--ctas N]
// Cases: gpu_decode_cases.h; a case on the device: gpu_decode_problem.cuh.
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
#include <string>
#include <vector>

#include "attend/wgmma_sm90_decode.h"
#include "gpu_common.cuh"
#include "gpu_decode_cases.h"
#include "gpu_decode_problem.cuh"
#include "gpu_time.cuh"
#include "params.h"

using namespace flashcore;
using namespace decode_test;

namespace {

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
  const auto run_once = [&](const decode90::Way& way, std::vector<uint16_t>& result) {
    CUDA_CHECK(cudaMemset(p.out, 0xFF, count * 2));
    CUDA_CHECK(cudaMemset(p.lse, 0xFF, items * 4));
    CUDA_CHECK(cudaMemset(p.partial_o, 0xFF, int64_t{p.plan.max_partials} * p.head_dim * 4));
    CUDA_CHECK(cudaMemset(p.partial_lse, 0xFF, int64_t{p.plan.max_partials} * 4));
    attend(p, way);
    CUDA_CHECK(cudaDeviceSynchronize());
    CUDA_CHECK(cudaMemcpy(result.data(), p.out, count * 2, cudaMemcpyDeviceToHost));
  };
  // Where no tile has more than 16 queries and cuts are the plan's, both kernels give the same bits.
  const auto choices = ways(p);
  const bool tall = problem.counts[kRowsPacked] > 0;
  if (!tall && choices.size() > 1 && choices[0].second.merges == Merges::all) {
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
  for (const auto& [name, way] : choices) {
    for (int run = 0; run < options.repeats; ++run) {
      run_once(way, run == 0 ? out : again);
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

// --- Time ------------------------------------------------------------------------------------------------------------

void time_case(const Timed& timed, const Options& options, const L2Flush& flush) {
  Problem problem;
  build(problem, timed.c, options, false);
  AttendParams p = problem.params;
  p.lse = nullptr;
  p.stream = cudaStreamPerThread;
  const auto choices = ways(p);
  std::vector<std::function<void()>> bodies;
  for (const auto& [name, way] : choices) {
    bodies.push_back([&p, way = way] { attend(p, way); });
    bodies.push_back([&p, way = way] { CUDA_CHECK(way.run(decode90::make_params(p))); });
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
            const decode90::Way chosen = ways(p)[0].second;
            std::printf(" %6.1f", time_graphs({[&] { attend(p, chosen); }}, flush, 5)[0]);
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
