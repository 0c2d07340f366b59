// Products by cuBLASLt: the library opened by dlopen, a handle for each device, and a plan for each shape.
#include "cublaslt_matmul.h"

#include <cublasLt.h>
#include <cuda_runtime.h>
#include <dlfcn.h>

#include <algorithm>
#include <cfloat>
#include <mutex>
#include <utility>
#include <vector>

#include "check.h"

namespace flashcore {
namespace {

constexpr int kCandidates = 64;
constexpr int kTimedRuns = 3;

// ---------------------------------------------------------------------------------------------------------------
// library

struct Library {
  decltype(&::cublasLtGetVersion) version;
  decltype(&::cublasLtGetStatusName) status_name;
  decltype(&::cublasLtCreate) create;
  decltype(&::cublasLtMatmul) matmul;
  decltype(&::cublasLtMatmulDescInit_internal) matmul_init;
  decltype(&::cublasLtMatmulDescSetAttribute) matmul_set;
  decltype(&::cublasLtMatrixLayoutInit_internal) layout_init;
  decltype(&::cublasLtMatrixLayoutSetAttribute) layout_set;
  decltype(&::cublasLtMatmulPreferenceInit_internal) preference_init;
  decltype(&::cublasLtMatmulPreferenceSetAttribute) preference_set;
  decltype(&::cublasLtMatmulAlgoGetHeuristic) heuristic;
  decltype(&::cublasLtMatmulAlgoConfigGetAttribute) algorithm_get;
  std::string missing;

  Library() {
    void* handle = nullptr;
    for (const int mode : {RTLD_LAZY | RTLD_NOLOAD, RTLD_LAZY}) {  // the copy that torch has loaded comes first
      for (const char* name : {"libcublasLt.so.13", "libcublasLt.so.12"}) {
        if (handle == nullptr) handle = dlopen(name, mode);
      }
    }
    if (handle == nullptr) {
      missing =
          "needs libcublasLt.so.13 or .12, which was not found: pip install nvidia-cublas, or put the CUDA "
          "toolkit's lib64 on LD_LIBRARY_PATH";
      return;
    }
    find(handle, "cublasLtGetVersion", version);
    find(handle, "cublasLtGetStatusName", status_name);
    find(handle, "cublasLtCreate", create);
    find(handle, "cublasLtMatmul", matmul);
    find(handle, "cublasLtMatmulDescInit_internal", matmul_init);
    find(handle, "cublasLtMatmulDescSetAttribute", matmul_set);
    find(handle, "cublasLtMatrixLayoutInit_internal", layout_init);
    find(handle, "cublasLtMatrixLayoutSetAttribute", layout_set);
    find(handle, "cublasLtMatmulPreferenceInit_internal", preference_init);
    find(handle, "cublasLtMatmulPreferenceSetAttribute", preference_set);
    find(handle, "cublasLtMatmulAlgoGetHeuristic", heuristic);
    find(handle, "cublasLtMatmulAlgoConfigGetAttribute", algorithm_get);
  }

  template <class Function>
  void find(void* handle, const char* name, Function& function) {
    function = reinterpret_cast<Function>(dlsym(handle, name));
    if (function == nullptr) missing = std::string("found a libcublasLt without ") + name + ": install a newer one";
  }
};

const Library& library() {
  static const Library library;
  return library;
}

void check(cublasStatus_t status, const char* call, const MatmulShape& shape) {
  require(status == CUBLAS_STATUS_SUCCESS, "cublaslt", call, " for ", shape.text(), ": expected success, got ",
          library().status_name(status), "; use another variant, or the libcublasLt that came with torch");
}

void check(cudaError_t error, const char* call) {
  require(error == cudaSuccess, "cublaslt", call, ": expected success, got ", cudaGetErrorString(error));
}

// -----------------------------------------------------------------------------------------------------------
// descriptors

cudaDataType_t data_type(DType dtype) {
  constexpr cudaDataType_t kTypes[] = {CUDA_R_16BF, CUDA_R_16F, CUDA_R_32F};
  return kTypes[static_cast<int>(dtype)];
}

// Descriptors of one call, on the stack: nothing is allocated.
struct Descriptors {
  cublasLtMatmulDescOpaque_t matmul;
  cublasLtMatrixLayoutOpaque_t a, b, d;

  Descriptors(const MatmulShape& shape, const MatmulArgs& args) {
    const Library& lt = library();
    check(lt.matmul_init(&matmul, sizeof(matmul), CUBLAS_COMPUTE_32F, CUDA_R_32F), "cublasLtMatmulDescInit", shape);
    const cublasOperation_t operation = shape.transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N;
    check(lt.matmul_set(&matmul, CUBLASLT_MATMUL_DESC_TRANSB, &operation, sizeof(operation)),
          "cublasLtMatmulDescSetAttribute", shape);
    layout(a, shape, shape.input, shape.rows, shape.inner, args.a);
    layout(b, shape, shape.input, shape.transpose_b ? shape.cols : shape.inner,
           shape.transpose_b ? shape.inner : shape.cols, args.b);
    layout(d, shape, shape.output, shape.rows, shape.cols, args.d);
  }

 private:
  static void layout(cublasLtMatrixLayoutOpaque_t& layout, const MatmulShape& shape, DType dtype, uint64_t rows,
                     uint64_t cols, const MatmulArg& arg) {
    const Library& lt = library();
    const cublasLtOrder_t order = CUBLASLT_ORDER_ROW;
    check(lt.layout_init(&layout, sizeof(layout), data_type(dtype), rows, cols, arg.row_stride),
          "cublasLtMatrixLayoutInit", shape);
    check(lt.layout_set(&layout, CUBLASLT_MATRIX_LAYOUT_ORDER, &order, sizeof(order)),
          "cublasLtMatrixLayoutSetAttribute(order)", shape);
    check(lt.layout_set(&layout, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &shape.count, sizeof(shape.count)),
          "cublasLtMatrixLayoutSetAttribute(batch count)", shape);
    check(lt.layout_set(&layout, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &arg.batch_stride,
                        sizeof(arg.batch_stride)),
          "cublasLtMatrixLayoutSetAttribute(batch stride)", shape);
  }
};

// ---------------------------------------------------------------------------------------------------------------
// devices

struct Planned {
  cublasLtMatmulAlgo_t algorithm;
  std::string configuration;  // empty: the heuristic's first, which nobody has measured
};

struct Device {
  cublasLtHandle_t handle = nullptr;
  std::map<MatmulShape, Planned> plans;
};

std::mutex g_mutex;  // of the map and of the plans in it

int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

// The current device with its handle; g_mutex is held.
Device& device_of(const MatmulShape& shape) {
  static std::map<int, Device> devices;
  Device& device = devices[current_device()];
  if (device.handle == nullptr) check(library().create(&device.handle), "cublasLtCreate", shape);
  return device;
}

cublasStatus_t matmul(cublasLtHandle_t handle, const Descriptors& desc, const MatmulArgs& args,
                      const cublasLtMatmulAlgo_t& algorithm) {
  return library().matmul(handle, const_cast<cublasLtMatmulDescOpaque_t*>(&desc.matmul), &args.alpha, args.a.data,
                          const_cast<cublasLtMatrixLayoutOpaque_t*>(&desc.a), args.b.data,
                          const_cast<cublasLtMatrixLayoutOpaque_t*>(&desc.b), &args.beta, args.d.data,
                          const_cast<cublasLtMatrixLayoutOpaque_t*>(&desc.d), args.d.data,
                          const_cast<cublasLtMatrixLayoutOpaque_t*>(&desc.d), &algorithm, args.workspace,
                          static_cast<size_t>(args.workspace_bytes), static_cast<cudaStream_t>(args.stream));
}

// ----------------------------------------------------------------------------------------------------------------
// tuning

// What tells a candidate from the others: "id.tile.splitk.reduction.swizzle.custom.stages.inner.cluster".
std::string configuration(const cublasLtMatmulAlgo_t& algorithm) {
  constexpr std::pair<cublasLtMatmulAlgoConfigAttributes_t, size_t> kAttributes[] = {
      {CUBLASLT_ALGO_CONFIG_ID, 4},
      {CUBLASLT_ALGO_CONFIG_TILE_ID, 4},
      {CUBLASLT_ALGO_CONFIG_SPLITK_NUM, 4},
      {CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME, 4},
      {CUBLASLT_ALGO_CONFIG_CTA_SWIZZLING, 4},
      {CUBLASLT_ALGO_CONFIG_CUSTOM_OPTION, 4},
      {CUBLASLT_ALGO_CONFIG_STAGES_ID, 4},
      {CUBLASLT_ALGO_CONFIG_INNER_SHAPE_ID, 2},
      {CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID, 2},
  };
  std::string text;
  for (const auto& [attribute, size] : kAttributes) {
    uint32_t value = 0;  // little-endian: a 2-byte attribute fills its low half
    size_t written = 0;
    // An attribute that an algorithm does not have stays 0.
    (void)library().algorithm_get(&algorithm, attribute, &value, size, &written);
    text += (text.empty() ? "" : ".") + std::to_string(value);
  }
  return text;
}

std::vector<cublasLtMatmulAlgo_t> candidates(cublasLtHandle_t handle, const MatmulShape& shape, const Descriptors& desc,
                                             int64_t workspace_bytes) {
  const Library& lt = library();
  cublasLtMatmulPreferenceOpaque_t preference;
  check(lt.preference_init(&preference, sizeof(preference)), "cublasLtMatmulPreferenceInit", shape);
  const auto bytes = static_cast<uint64_t>(workspace_bytes);
  check(lt.preference_set(&preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &bytes, sizeof(bytes)),
        "cublasLtMatmulPreferenceSetAttribute(workspace)", shape);
  cublasLtMatmulHeuristicResult_t results[kCandidates];
  int found = 0;
  Descriptors copy = desc;
  check(
      lt.heuristic(handle, &copy.matmul, &copy.a, &copy.b, &copy.d, &copy.d, &preference, kCandidates, results, &found),
      "cublasLtMatmulAlgoGetHeuristic", shape);
  std::vector<cublasLtMatmulAlgo_t> algorithms;
  for (int i = 0; i < found; ++i) {
    if (results[i].state == CUBLAS_STATUS_SUCCESS) algorithms.push_back(results[i].algo);
  }
  require(!algorithms.empty(), "cublaslt", shape.text(),
          ": expected an algorithm, got none from the heuristic; use "
          "another variant");
  return algorithms;
}

class Timer {
 public:
  Timer() {
    check(cudaEventCreate(&begin_), "cudaEventCreate");
    check(cudaEventCreate(&end_), "cudaEventCreate");
  }
  Timer(const Timer&) = delete;
  Timer& operator=(const Timer&) = delete;
  ~Timer() {
    cudaEventDestroy(begin_);
    cudaEventDestroy(end_);
  }

  // Milliseconds of kTimedRuns runs after one that warms up; FLT_MAX where the algorithm refuses.
  float time(cublasLtHandle_t handle, const Descriptors& desc, const MatmulArgs& args,
             const cublasLtMatmulAlgo_t& algorithm) const {
    const auto stream = static_cast<cudaStream_t>(args.stream);
    if (matmul(handle, desc, args, algorithm) != CUBLAS_STATUS_SUCCESS) return FLT_MAX;
    check(cudaEventRecord(begin_, stream), "cudaEventRecord");
    for (int run = 0; run < kTimedRuns; ++run) {
      if (matmul(handle, desc, args, algorithm) != CUBLAS_STATUS_SUCCESS) return FLT_MAX;
    }
    check(cudaEventRecord(end_, stream), "cudaEventRecord");
    check(cudaEventSynchronize(end_), "cudaEventSynchronize");
    float milliseconds = 0.0f;
    check(cudaEventElapsedTime(&milliseconds, begin_, end_), "cudaEventElapsedTime");
    return milliseconds;
  }

 private:
  cudaEvent_t begin_ = nullptr, end_ = nullptr;
};

}  // namespace

// -------------------------------------------------------------------------------------------------------------
// interface

const char* cublaslt_missing() { return library().missing.empty() ? nullptr : library().missing.c_str(); }

int64_t cublaslt_version() { return cublaslt_missing() ? 0 : static_cast<int64_t>(library().version()); }

std::string MatmulShape::text() const {
  constexpr const char* kNames[] = {"bf16", "fp16", "fp32"};
  return std::string(kNames[static_cast<int>(input)]) + "-" + kNames[static_cast<int>(output)] +
         (transpose_b ? "-nt-" : "-nn-") + std::to_string(rows) + "x" + std::to_string(cols) + "x" +
         std::to_string(inner) + "x" + std::to_string(count);
}

std::string plan_matmul(const MatmulShape& shape, const MatmulArgs& args, const Algorithms& known, bool measure) {
  require(cublaslt_missing() == nullptr, "cublaslt", library().missing);
  const std::lock_guard lock(g_mutex);
  Device& device = device_of(shape);
  if (const auto planned = device.plans.find(shape); planned != device.plans.end()) {
    if (!measure || !planned->second.configuration.empty()) return planned->second.configuration;
  }
  const Descriptors desc(shape, args);
  const std::vector<cublasLtMatmulAlgo_t> algorithms = candidates(device.handle, shape, desc, args.workspace_bytes);
  if (const auto entry = known.find(shape.text()); entry != known.end()) {
    const auto same = std::find_if(algorithms.begin(), algorithms.end(),
                                   [&](const auto& algorithm) { return configuration(algorithm) == entry->second; });
    if (same != algorithms.end()) {
      device.plans[shape] = {*same, entry->second};
      return entry->second;
    }
  }
  if (!measure) {
    device.plans[shape] = {algorithms.front(), ""};
    return "";
  }
  const Timer timer;
  float best = FLT_MAX;
  const cublasLtMatmulAlgo_t* fastest = nullptr;
  for (const cublasLtMatmulAlgo_t& algorithm : algorithms) {
    const float milliseconds = timer.time(device.handle, desc, args, algorithm);
    if (milliseconds < best) {
      best = milliseconds;
      fastest = &algorithm;
    }
  }
  require(fastest != nullptr, "cublaslt", shape.text(), ": expected one of ", algorithms.size(),
          " candidates to run, none did; use another variant");
  device.plans[shape] = {*fastest, configuration(*fastest)};
  return device.plans[shape].configuration;
}

void run_matmul(const MatmulShape& shape, const MatmulArgs& args) {
  cublasLtHandle_t handle;
  cublasLtMatmulAlgo_t algorithm;
  {
    const std::lock_guard lock(g_mutex);
    Device& device = device_of(shape);
    const auto planned = device.plans.find(shape);
    require(
        planned != device.plans.end(), "cublaslt", shape.text(),
        ": expected a planned product, got one that was not; call cublaslt_plan with this batch's longest requests");
    handle = device.handle;
    algorithm = planned->second.algorithm;
  }
  check(matmul(handle, Descriptors(shape, args), args, algorithm), "cublasLtMatmul", shape);
}

}  // namespace flashcore
