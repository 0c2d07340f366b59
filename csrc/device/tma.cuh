// The bulk tensor copy engine (TMA) over a paged KV cache.
//
// A cache [pages, page_size, heads, head_dim] of any strides is described as five dimensions, innermost first:
//     (64 elements = 128 bytes, token of the page, slab of 64 elements in head_dim, head, page)
// so that one box lands in shared memory as [slabs][tokens][128 bytes] under the 128-byte swizzle: 16-byte chunk c of
// row r stands at chunk c ^ (r % 8). Both wgmma (K: K-major, V: MN-major) and ldmatrix read that without conflicts.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "device/mbarrier.cuh"
#include "params.h"

namespace flashcore {

constexpr int kSlab = 64;  // elements of a 128-byte row

// --- Host: tensor maps -----------------------------------------------------------------------------------------------

struct PagedCache {
  const void* base;
  DType dtype;                         // bf16 or fp16
  int head_dim, page_size, num_heads;  // head_dim a multiple of 64
  int64_t num_pages;
  int64_t stride_page, stride_token, stride_head;  // in elements; multiples of 8, base 16-byte aligned
};

// Encodes a map of 16-bit elements in boxes of 128-byte rows; strides (of dimensions 1 to 4) in elements.
inline cudaError_t make_map(CUtensorMap* map, const void* base, DType dtype, const cuuint64_t (&sizes)[5],
                            const int64_t (&strides)[4], const cuuint32_t (&box)[5]) {
  // The driver is reached through the runtime, so that nothing links against libcuda.
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function) : nullptr;
  }();
  if (encode == nullptr) return cudaErrorCallRequiresNewerDriver;

  cuuint64_t bytes[4];
  for (int i = 0; i < 4; ++i) bytes[i] = static_cast<cuuint64_t>(strides[i]) * 2;
  const cuuint32_t element_strides[5] = {1, 1, 1, 1, 1};
  const auto type = dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUresult result =
      encode(map, type, 5, const_cast<void*>(base), sizes, bytes, box, element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// The map for boxes of box_tokens tokens (of one page and head) x box_slabs * 64 elements.
inline cudaError_t make_cache_map(CUtensorMap* map, const PagedCache& cache, int box_tokens, int box_slabs) {
  return make_map(map, cache.base, cache.dtype,
                  {kSlab, static_cast<cuuint64_t>(cache.page_size), static_cast<cuuint64_t>(cache.head_dim / kSlab),
                   static_cast<cuuint64_t>(cache.num_heads), static_cast<cuuint64_t>(cache.num_pages)},
                  {cache.stride_token, kSlab, cache.stride_head, cache.stride_page},
                  {kSlab, static_cast<cuuint32_t>(box_tokens), static_cast<cuuint32_t>(box_slabs), 1, 1});
}

// Those of K and V.
inline cudaError_t make_cache_maps(CUtensorMap* k_map, CUtensorMap* v_map, const AttendParams& p, int box_tokens,
                                   int box_slabs) {
  PagedCache cache{p.k,         p.dtype,         p.head_dim,       p.page_size,    p.num_kv_heads,
                   p.num_pages, p.k_stride_page, p.k_stride_token, p.k_stride_head};
  const cudaError_t error = make_cache_map(k_map, cache, box_tokens, box_slabs);
  if (error != cudaSuccess) return error;
  cache.base = p.v;
  cache.stride_page = p.v_stride_page;
  cache.stride_token = p.v_stride_token;
  cache.stride_head = p.v_stride_head;
  return make_cache_map(v_map, cache, box_tokens, box_slabs);
}

struct Queries {
  const void* base;
  DType dtype;
  int head_dim, num_kv_heads, group;
  int64_t num_tokens, stride_token, stride_head;  // as PagedCache
};

// The map for boxes of box_tokens tokens x the query heads of one KV head x 64 elements: a slab of packed queries.
inline cudaError_t make_query_map(CUtensorMap* map, const Queries& q, int box_tokens) {
  return make_map(map, q.base, q.dtype,
                  {kSlab, static_cast<cuuint64_t>(q.group), static_cast<cuuint64_t>(q.num_tokens),
                   static_cast<cuuint64_t>(q.head_dim / kSlab), static_cast<cuuint64_t>(q.num_kv_heads)},
                  {q.stride_head, q.stride_token, kSlab, q.stride_head * q.group},
                  {kSlab, static_cast<cuuint32_t>(q.group), static_cast<cuuint32_t>(box_tokens), 1, 1});
}

// The map for boxes of box_pages summaries of one KV head, each of a multiple of 128 bytes: slabs of 128 bytes, heads,
// pages.
inline cudaError_t make_summary_map(CUtensorMap* map, const void* base, int64_t summary_bytes, int num_heads,
                                    int64_t num_pages, int box_pages) {
  const int64_t slabs = summary_bytes / 128, page = num_heads * slabs * kSlab;
  return make_map(map, base, DType::bf16,  // anything of 16 bits
                  {kSlab, static_cast<cuuint64_t>(slabs), static_cast<cuuint64_t>(num_heads),
                   static_cast<cuuint64_t>(num_pages), 1},
                  {kSlab, slabs * kSlab, page, page},
                  {kSlab, static_cast<cuuint32_t>(slabs), 1, static_cast<cuuint32_t>(box_pages), 1});
}

// --- Device ----------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void prefetch_tensor_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Loads the box at (element 0, token, slab, head, page) to `destination` (1024-byte aligned, or at least at a multiple
// of 8 rows); its bytes complete on `barrier`.
__device__ __forceinline__ void tma_load_cache(void* destination, const CUtensorMap* map, Mbarrier* barrier, int token,
                                               int slab, int head, int page, uint64_t l2_policy) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(shared_address(destination)),
      "l"(map), "r"(shared_address(barrier)), "r"(0), "r"(token), "r"(slab), "r"(head), "r"(page), "l"(l2_policy)
      : "memory");
}

// Loads the box of queries at (element 0, query head 0, token, slab, KV head).
__device__ __forceinline__ void tma_load_query(void* destination, const CUtensorMap* map, Mbarrier* barrier, int token,
                                               int slab, int kv_head, uint64_t l2_policy) {
  tma_load_cache(destination, map, barrier, 0, token, slab, kv_head, l2_policy);
}

// Loads the box of summaries at (element 0, slab 0, KV head, page).
__device__ __forceinline__ void tma_load_summaries(void* destination, const CUtensorMap* map, Mbarrier* barrier,
                                                   int kv_head, int page, uint64_t l2_policy) {
  tma_load_cache(destination, map, barrier, 0, kv_head, page, 0, l2_policy);
}

// Copies `bytes` (a multiple of 16, as both addresses are) that lie side by side; they complete on `barrier`.
__device__ __forceinline__ void bulk_load(void* destination, const void* source, uint32_t bytes, Mbarrier* barrier,
                                          uint64_t l2_policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
          "r"(shared_address(destination)),
      "l"(source), "r"(bytes), "r"(shared_address(barrier)), "l"(l2_policy)
      : "memory");
}

}  // namespace flashcore
