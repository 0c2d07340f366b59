// The variants of attend that this library holds, by the names that configs use.
#pragma once

#include <string>

#include "params.h"

namespace flashcore {

template <class Params>
using Run = int (*)(const Params&);

// What a kernel leaves for the merge: a Merges.
using MergesOf = int (*)(const AttendParams&);

// What computes one phase.
struct Kernel {
  Run<AttendParams> run;
  MergesOf merges;
  // Decode: one launch for selection, attention and merge, and which layers it serves; or nullptr.
  Run<SelectAttendParams> select_and_run;
  bool (*selects)(const SelectAttendParams&);
};

// Raises, saying why, where the variant is unknown, not built, for the other device or cannot run here.
Kernel find_variant(const std::string& name, bool cuda, bool decode);

// Those that can run on this machine: a, b, c; quoted for JSON.
std::string variant_names(bool json);

// Built, but without what they need at run time: "name": "why", as JSON.
std::string missing_variants();

}  // namespace flashcore
