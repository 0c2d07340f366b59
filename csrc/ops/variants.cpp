#include "ops/variants.h"

#include "check.h"
#include "ops/kernels.h"

namespace flashcore {

namespace {

int merges_all(const AttendParams&) { return static_cast<int>(Merges::all); }
int merges_none(const AttendParams&) { return static_cast<int>(Merges::none); }

struct Variant {
  const char* name;
  bool cuda;
  Run<AttendParams> decode;
  Run<AttendParams> prefill;
  MergesOf decode_merges = merges_all;
  MergesOf prefill_merges = merges_all;
  Run<SelectAttendParams> select_and_decode = nullptr;
  bool (*selects)(const SelectAttendParams&) = nullptr;

  bool built() const { return decode != nullptr || prefill != nullptr; }
  // Why a variant that was built cannot run on this machine, or nullptr.
  const char* missing() const { return prefill == run_attend_cublaslt ? cublaslt_missing() : nullptr; }
  bool available() const { return built() && missing() == nullptr; }
};

const Variant kVariants[] = {
    {"cpu", false, run_attend_cpu, run_attend_cpu},
    {"wmma_sm80", true, run_attend_wmma_sm80, run_attend_wmma_sm80},
    {"wgmma_sm90", true, run_attend_wgmma_sm90_decode, run_attend_wgmma_sm90_prefill, wgmma_sm90_decode_merges,
     merges_all, run_select_attend_wgmma_sm90_decode, wgmma_sm90_decode_selects},
    {"cublaslt", true, nullptr, run_attend_cublaslt, merges_none, merges_none},
};

}  // namespace

std::string variant_names(bool json) {
  std::string names;
  for (const Variant& variant : kVariants) {
    if (!variant.available()) continue;
    const std::string quote = json ? "\"" : "";
    names += (names.empty() ? "" : ", ") + quote + variant.name + quote;
  }
  return names;
}

std::string missing_variants() {
  std::string entries;
  for (const Variant& variant : kVariants) {
    if (!variant.built() || variant.missing() == nullptr) continue;
    entries += std::string(entries.empty() ? "" : ", ") + "\"" + variant.name + "\": \"" + variant.missing() + "\"";
  }
  return entries;
}

Kernel find_variant(const std::string& name, bool cuda, bool decode) {
  for (const Variant& variant : kVariants) {
    if (name != variant.name) continue;
    require(variant.cuda == cuda, "attend", "variant: expected one for ", cuda ? "CUDA" : "CPU", " tensors, got '",
            name, "'; choose another variant or move the tensors");
    if (!variant.built()) break;
    require(variant.missing() == nullptr, "attend", "variant: '", name, "' ", variant.missing());
    const Run<AttendParams> run = decode ? variant.decode : variant.prefill;
    require(run != nullptr, "attend", "variant: '", name, "' has no kernel for ", decode ? "decode" : "prefill",
            "; choose another variant");
    if (!decode) return {run, variant.prefill_merges, nullptr, nullptr};
    return {run, variant.decode_merges, variant.select_and_decode, variant.selects};
  }
  fail("attend", "variant: expected one of ", variant_names(false), ", got '", name,
       "'; choose one that this library was built with");
}

}  // namespace flashcore
