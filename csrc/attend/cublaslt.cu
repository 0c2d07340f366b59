// Attention by cuBLASLt: S = Q K^T and O += P V as strided-batched matmuls over (request, KV head) pairs, the query
// heads of a KV head side by side in the rows, and one softmax kernel between them. cublaslt_schedule.h says how a
// batch is cut.
//
// The traffic of S and P is what this variant takes its time for: S once written and once read, P likewise, 8 bytes a
// score with S in fp16 (and Q and K as well), 12 with S in fp32. The rounding of S in fp16 weighs less than that of P
// in bf16, but two to three times as much as that of P in fp16, and it grows with the logits. An LSE takes S in fp32.
// Accumulation is fp32 throughout.
#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <set>
#include <sstream>
#include <type_traits>
#include <vector>

#include "attend/cublaslt.h"
#include "attend/cublaslt_kernels.cuh"
#include "attend/cublaslt_matmul.h"
#include "check.h"
#include "device/side_stream.h"

namespace flashcore {
namespace {

using cublaslt::Chunk;
using cublaslt::kThreads;
using cublaslt::kWarps;
using cublaslt::Unit;

// -----------------------------------------------------------------------------------------------------------------
// lanes

void check(cudaError_t error, const char* call) {
  require(error == cudaSuccess, "cublaslt", call, ": expected success, got ", cudaGetErrorString(error));
}

using SideStreams = std::array<SideStream, CublasLtSchedule::kMaxLanes - 1>;

// Calls work(stream of each lane), ordered after what `stream`, that of the first lane, holds and before what it gets
// next.
template <class Work>
void with_streams(cudaStream_t stream, int lanes, const Work& work) {
  const OnDevice<SideStreams> sides;
  check(sides.error(), "cudaGetDevice");
  const cudaEvent_t fork = sides->front().fork();
  check(cudaEventRecord(fork, stream), "cudaEventRecord");
  std::vector<cudaStream_t> streams{stream};
  for (int i = 1; i < lanes; ++i) {
    check((*sides)[i - 1].begin_after(fork), "cudaStreamWaitEvent");
    streams.push_back((*sides)[i - 1].stream());
  }
  work(streams);
  for (int i = 1; i < lanes; ++i) check((*sides)[i - 1].join(stream), "cudaStreamWaitEvent");
}

// ---------------------------------------------------------------------------------------------------------------
// matmuls

// The two products of a chunk, and where their operands lie.
struct Products {
  const CublasLtShape& shape;
  const CublasLtSchedule& schedule;
  int rows = schedule.block * shape.group;

  MatmulShape qk(int keys, int pairs) const {
    if (shape.fp32_scores) return {true, shape.dtype, DType::fp32, rows, keys, shape.head_dim, pairs};
    return {true, DType::fp16, DType::fp16, rows, keys, shape.head_dim, pairs};
  }
  MatmulShape pv(int keys, int pairs) const {
    return {false, shape.dtype, DType::fp32, rows, shape.head_dim, keys, pairs};
  }

  MatmulArg queries(const Unit& unit, int first_query) const {
    return {element(unit.q, int64_t{first_query} * shape.group * shape.head_dim), shape.head_dim,
            int64_t{schedule.qo_len} * shape.group * shape.head_dim};
  }
  MatmulArg keys(void* base, int key_begin) const {
    return {element(base, int64_t{key_begin} * shape.head_dim), shape.head_dim,
            int64_t{schedule.kv_len} * shape.head_dim};
  }
  MatmulArg scores(const Unit& unit, int keys) const { return {unit.scores, keys, int64_t{rows} * keys}; }
  // P lies over S: rows of halves, as far apart as the rows of S.
  MatmulArg probabilities(const Unit& unit, int keys) const {
    const int64_t stride = int64_t{keys} * (shape.fp32_scores ? 2 : 1);
    return {unit.scores, stride, rows * stride};
  }
  MatmulArg output(const Unit& unit, int first_query) const {
    const int64_t token = int64_t{shape.group} * shape.head_dim;
    return {unit.o + first_query % schedule.span * token, shape.head_dim, schedule.span * token};
  }

 private:
  static void* element(void* base, int64_t index) { return static_cast<uint16_t*>(base) + index; }
};

struct Workspace {
  char* data;
  int64_t matmul_bytes;  // of each lane

  Unit unit(const CublasLtSchedule& s, int index) const {
    char* lane = data + index % s.lanes * s.lane_bytes;
    return {
        .q = lane + s.q,
        .k = lane + s.k,
        .v = lane + s.v,
        .scores = lane + s.scores,
        .o = reinterpret_cast<float*>(lane + s.o),
        .max = reinterpret_cast<float*>(lane + s.max),
        .sum = reinterpret_cast<float*>(lane + s.sum),
        .first_pair = index * s.unit,
        .pairs = s.pairs_of(index),
        .qo_len = s.qo_len,
        .kv_len = s.kv_len,
        .offset = s.offset,
        .span = s.span,
        .block = s.block,
    };
  }
  void* matmul(const CublasLtSchedule& s, int lane) const {
    return data + s.lanes * s.lane_bytes + lane * matmul_bytes;
  }
};

// Calls visit(chunk) for the chunks of a block of queries.
template <class Visit>
void for_each_chunk(const CublasLtSchedule& s, bool causal, int first_query, const Visit& visit) {
  const int visible = s.visible(first_query, causal);
  for (int begin = 0; begin < visible; begin += s.chunk) {
    visit(Chunk{first_query, begin, std::min(s.chunk, visible - begin), begin == 0});
  }
}

// ---------------------------------------------------------------------------------------------------------------
// kernels

unsigned blocks(int64_t items, int per_block) { return static_cast<unsigned>((items + per_block - 1) / per_block); }

template <int kHeadDim>
void gather(const AttendParams& p, const Unit& unit, bool to_half, cudaStream_t stream) {
  const int rows = unit.kv_len + unit.qo_len * (p.num_qo_heads / p.num_kv_heads);
  const dim3 grid(rows / cublaslt::kGatherRows, unit.pairs);
  const auto kernel = to_half ? cublaslt::gather_kernel<kHeadDim, true> : cublaslt::gather_kernel<kHeadDim, false>;
  kernel<<<grid, kThreads, 0, stream>>>(p, unit);
}

void gather(const AttendParams& p, const Unit& unit, bool to_half, cudaStream_t stream) {
  switch (p.head_dim) {
    case 64:
      return gather<64>(p, unit, to_half, stream);
    case 128:
      return gather<128>(p, unit, to_half, stream);
    case 256:
      return gather<256>(p, unit, to_half, stream);
  }
  fail("cublaslt", "head_dim: expected 64, 128 or 256, got ", p.head_dim, "; use another variant");
}

template <typename Element, typename Score>
void softmax(const AttendParams& p, const Unit& unit, const Chunk& chunk, cudaStream_t stream) {
  const auto kernel = chunk.keys <= 512    ? cublaslt::softmax_kernel<Element, Score, 512>
                      : chunk.keys <= 1024 ? cublaslt::softmax_kernel<Element, Score, 1024>
                      : chunk.keys <= 2048 ? cublaslt::softmax_kernel<Element, Score, 2048>
                                           : cublaslt::softmax_kernel<Element, Score, 4096>;
  static_assert(CublasLtSchedule::kMaxChunk <= 4096);
  const int64_t rows = int64_t{unit.pairs} * unit.block * (p.num_qo_heads / p.num_kv_heads);
  kernel<<<blocks(rows, kWarps), kThreads, 0, stream>>>(p, unit, chunk);
}

template <typename Element>
void output(const AttendParams& p, const Unit& unit, int first_query, int tokens, cudaStream_t stream) {
  const int rows = tokens * (p.num_qo_heads / p.num_kv_heads), rows_per_cta = kThreads * 8 / p.head_dim;
  cublaslt::output_kernel<Element>
      <<<dim3(rows / rows_per_cta, unit.pairs), kThreads, 0, stream>>>(p, unit, first_query);
}

// A unit on its way from its pages to its part of the output.
struct Lane {
  Unit unit;
  void* matmul_workspace;
  cudaStream_t stream;
};

// Hands out the work of all lanes step by step: none waits for the host to be done with another.
template <typename Element>
void run_lanes(const AttendParams& p, const CublasLtShape& shape, const CublasLtSchedule& schedule,
               const Workspace& workspace, const std::vector<Lane>& lanes) {
  const Products products{shape, schedule};
  const auto softmax_of = shape.fp32_scores ? softmax<Element, float> : softmax<Element, __half>;
  for (const Lane& lane : lanes) {
    gather(p, lane.unit, std::is_same_v<Element, __nv_bfloat16> && !shape.fp32_scores, lane.stream);
  }
  for (int first_query = 0; first_query < schedule.qo_len; first_query += schedule.block) {
    for_each_chunk(schedule, p.causal, first_query, [&](const Chunk& chunk) {
      for (const auto& [unit, matmul_workspace, stream] : lanes) {
        run_matmul(products.qk(chunk.keys, unit.pairs),
                   {products.queries(unit, first_query), products.keys(unit.k, chunk.key_begin),
                    products.scores(unit, chunk.keys), p.sm_scale * kLog2E, 0.0f, matmul_workspace,
                    workspace.matmul_bytes, stream});
        softmax_of(p, unit, chunk, stream);
        run_matmul(products.pv(chunk.keys, unit.pairs),
                   {products.probabilities(unit, chunk.keys), products.keys(unit.v, chunk.key_begin),
                    products.output(unit, first_query), 1.0f, chunk.first ? 0.0f : 1.0f, matmul_workspace,
                    workspace.matmul_bytes, stream});
      }
    });
    const int end = first_query + schedule.block, open = first_query % schedule.span + schedule.block;
    if (open < schedule.span && end < schedule.qo_len) continue;
    for (const Lane& lane : lanes) output<Element>(p, lane.unit, end - open, open, lane.stream);
  }
}

// --------------------------------------------------------------------------------------------------------------
// planning

Algorithms parse(const std::string& lines) {
  Algorithms algorithms;
  std::istringstream stream(lines);
  for (std::string line; std::getline(stream, line);) {
    const size_t equals = line.find('=');
    if (equals != std::string::npos) algorithms[line.substr(0, equals)] = line.substr(equals + 1);
  }
  return algorithms;
}

Workspace workspace_of(const CublasLtSchedule& schedule, void* data, int64_t bytes) {
  require(bytes >= schedule.bytes(), "cublaslt", "workspace: expected at least ", schedule.bytes(), " bytes, got ",
          bytes, "; allocate what cublaslt_workspace says for the batch's longest requests");
  return {static_cast<char*>(data), (bytes - schedule.bytes()) / schedule.lanes / 256 * 256};
}

// The algorithms of the matmuls of `shape`.
Algorithms plan_matmuls(const CublasLtShape& shape, void* data, int64_t bytes, int64_t matmul_bytes,
                        const Algorithms& known, bool measure, cudaStream_t stream) {
  const CublasLtSchedule schedule(shape);
  const Workspace workspace = workspace_of(schedule, data, bytes);
  require(workspace.matmul_bytes >= matmul_bytes, "cublaslt", "workspace: expected ", matmul_bytes,
          " bytes for the matmuls of each lane, got ", workspace.matmul_bytes,
          "; allocate what cublaslt_workspace says");
  const Products products{shape, schedule};
  const Unit unit = workspace.unit(schedule, 0);
  Algorithms found;
  const auto plan = [&](const MatmulShape& matmul, const MatmulArg& a, const MatmulArg& b, const MatmulArg& d) {
    const std::string name = matmul.text();
    if (found.contains(name)) return;
    if (measure) {                           // random data: matrix units run faster on zeros
      const int64_t count = schedule.o / 2;  // everything before O, in halves
      const bool bf16 = shape.dtype == DType::bf16;
      if (bf16) cublaslt::noise_kernel<<<1024, kThreads, 0, stream>>>(static_cast<__nv_bfloat16*>(unit.q), count);
      if (!bf16) cublaslt::noise_kernel<<<1024, kThreads, 0, stream>>>(static_cast<__half*>(unit.q), count);
    }
    const MatmulArgs args{a, b, d, 1.0f, 0.0f, workspace.matmul(schedule, 0), matmul_bytes, stream};
    const std::string algorithm = plan_matmul(matmul, args, known, measure);
    if (!algorithm.empty()) found[name] = algorithm;
  };
  for (const int pairs : std::set<int>{schedule.pairs_of(0), schedule.pairs_of(schedule.num_units - 1)}) {
    for (int first_query = 0; first_query < schedule.qo_len; first_query += schedule.block) {
      for_each_chunk(schedule, shape.causal, first_query, [&](const Chunk& chunk) {
        plan(products.qk(chunk.keys, pairs), products.queries(unit, 0), products.keys(unit.k, 0),
             products.scores(unit, chunk.keys));
        plan(products.pv(chunk.keys, pairs), products.probabilities(unit, chunk.keys), products.keys(unit.v, 0),
             products.output(unit, 0));
      });
    }
  }
  return found;
}

}  // namespace

// -------------------------------------------------------------------------------------------------------------
// interface

int64_t cublaslt_workspace_bytes(const CublasLtShape& shape, int64_t matmul_bytes) {
  const CublasLtSchedule schedule(shape);
  return schedule.bytes() + schedule.lanes * ((matmul_bytes + 255) / 256 * 256);
}

std::string plan_cublaslt(const CublasLtShape& shape, void* workspace, int64_t workspace_bytes, int64_t matmul_bytes,
                          const std::string& known, bool measure, void* stream) {
  OnDevice<SideStreams>{};  // none is made in a capture
  std::string lines;
  for (const auto& [matmul, algorithm] : plan_matmuls(shape, workspace, workspace_bytes, matmul_bytes, parse(known),
                                                      measure, static_cast<cudaStream_t>(stream))) {
    lines += matmul + "=" + algorithm + "\n";
  }
  return lines;
}

int run_attend_cublaslt(const AttendParams& p) {
  const bool bf16 = p.dtype == DType::bf16;
  require(p.window_left < 0 && p.logits_soft_cap == 0.0f, "cublaslt",
          "expected neither window_left nor logits_soft_cap, got ", p.window_left, " and ", p.logits_soft_cap,
          "; use another variant");
  require(p.workspace != nullptr && p.max_qo_len > 0, "cublaslt",
          "expected a workspace and the lengths of the longest requests, got none; call cublaslt_plan first");
  require(p.fp32_scores || p.lse == nullptr, "cublaslt",
          "expected scores in fp32 for an LSE, got fp16; plan and run with fp32_scores");
  const CublasLtShape shape{p.batch,    p.max_qo_len, p.max_kv_len, p.num_kv_heads, p.num_qo_heads / p.num_kv_heads,
                            p.head_dim, p.dtype,      p.causal,     p.fp32_scores};
  const CublasLtSchedule schedule(shape);
  const Workspace workspace = workspace_of(schedule, p.workspace, p.workspace_bytes);
  with_streams(static_cast<cudaStream_t>(p.stream), schedule.lanes, [&](const std::vector<cudaStream_t>& streams) {
    for (int first = 0; first < schedule.num_units; first += schedule.lanes) {
      std::vector<Lane> lanes;
      for (int i = 0; i < std::min(schedule.lanes, schedule.num_units - first); ++i) {
        lanes.push_back({workspace.unit(schedule, first + i), workspace.matmul(schedule, i), streams[i]});
      }
      const auto run = bf16 ? run_lanes<__nv_bfloat16> : run_lanes<__half>;
      run(p, shape, schedule, workspace, lanes);
    }
  });
  return cudaGetLastError();
}

}  // namespace flashcore
