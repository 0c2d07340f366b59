// The kernels that this library may hold, as weak symbols: one that was left out of the build is a null pointer, so a
// CPU-only build is the same source, and what was built can be listed.
#pragma once

#include <cstdint>
#include <string>

#include "attend/cublaslt.h"
#include "params.h"

namespace flashcore {

#define FLASHCORE_WEAK(name, Params) int name(const Params&) __attribute__((weak))
FLASHCORE_WEAK(run_page_table_cuda, PageTableParams);
FLASHCORE_WEAK(run_page_table_cpu, PageTableParams);
FLASHCORE_WEAK(run_plan_cuda, PlanParams);
FLASHCORE_WEAK(run_plan_cpu, PlanParams);
FLASHCORE_WEAK(run_store_cuda, StoreParams);
FLASHCORE_WEAK(run_store_cpu, StoreParams);
FLASHCORE_WEAK(run_select_cuda, SelectParams);
FLASHCORE_WEAK(run_select_cpu, SelectParams);
FLASHCORE_WEAK(run_attend_wmma_sm80, AttendParams);
FLASHCORE_WEAK(run_attend_wgmma_sm90_decode, AttendParams);
FLASHCORE_WEAK(wgmma_sm90_decode_merges, AttendParams);
FLASHCORE_WEAK(run_select_attend_wgmma_sm90_decode, SelectAttendParams);
bool wgmma_sm90_decode_selects(const SelectAttendParams&) __attribute__((weak));
FLASHCORE_WEAK(run_attend_wgmma_sm90_prefill, AttendParams);
FLASHCORE_WEAK(run_attend_cublaslt, AttendParams);
FLASHCORE_WEAK(run_attend_cpu, AttendParams);
FLASHCORE_WEAK(run_merge_cuda, AttendParams);
FLASHCORE_WEAK(run_merge_cpu, AttendParams);
#undef FLASHCORE_WEAK
const char* cublaslt_missing() __attribute__((weak));
int64_t cublaslt_version() __attribute__((weak));
int64_t cublaslt_workspace_bytes(const CublasLtShape&, int64_t) __attribute__((weak));
std::string plan_cublaslt(const CublasLtShape&, void*, int64_t, int64_t, const std::string&, bool, void*)
    __attribute__((weak));

}  // namespace flashcore
