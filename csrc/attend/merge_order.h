// In which order partial results are added: the same on the CPU and the GPU, for a decode step and for a mixed batch.
//
// The n-th partial result of a query, counted in the order of the plan, goes to sum n % kMergeSums, and the sums are
// added in one order. So the bits depend neither on how many warps share the work nor on the rest of the batch.
#pragma once

namespace flashcore {

constexpr int kMergeSums = 4;

constexpr float add_merge_sums(float a, float b, float c, float d) { return (a + b) + (c + d); }

}  // namespace flashcore
