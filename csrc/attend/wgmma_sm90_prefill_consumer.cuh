// A consumer warpgroup of the Hopper prefill kernel: attention of 64 of a tile's queries, tile after tile.
#pragma once

#include "attend/wgmma_sm90_prefill_softmax.cuh"
#include "attend/wgmma_sm90_prefill_steps.cuh"

namespace flashcore::prefill {

// The same in all lanes anyway; reduced, the compiler knows it, and keeps ring stages and descriptors in uniform
// registers.
__device__ __forceinline__ int uniform(int x) { return __reduce_max_sync(0xffffffff, x); }

// The fields of a job at once: one after the other, each would cost its latency.
__device__ __forceinline__ Job read_job(const Job& job) {
  return {.blocks = uniform(job.blocks),
          .q_begin = job.q_begin,
          .q_count = uniform(job.q_count),
          .packed = uniform(job.packed),
          .kv_head = job.kv_head,
          .kv_begin = uniform(job.kv_begin),
          .kv_end = uniform(job.kv_end),
          .kv_pos = job.kv_pos,
          .page_begin = job.page_begin,
          .partial = job.partial,
          .position = uniform(job.position)};
}

// Named steps of one function, not methods of a class: with these ptxas spills twice as many registers.
template <typename Tr>
__device__ void consume(const AttendParams& p, Shared<Tr>& smem) {
  constexpr int kBlockKeys = Tr::kBlockKeys;
  constexpr int kHeadDim = Tr::kHeadDim;
  // From lane 0: the compiler then knows it is the same in the warp and keeps descriptors in uniform registers.
  const int consumer = __shfl_sync(0xffffffff, threadIdx.x / 128, 0) - 1;
  const int lane = threadIdx.x % 32;
  const Group group(p.num_qo_heads / p.num_kv_heads);
  // With a soft cap the logits are already scaled when softmax sees them.
  const float softmax_scale = Tr::kSoftCap ? kLog2E : p.sm_scale * kLog2E;
  constexpr int kStages = Tr::kStages;

  float s[kBlockKeys / 2], o[kHeadDim / 2];
  uint32_t probabilities[kBlockKeys / 4];
  float factor[2];
  RowState rows;
  // A tile stays open, its last block's P V not yet issued, until S of the next tile's first block is under way.
  bool open = false;
#pragma unroll
  for (int i = 0; i < kHeadDim / 2; ++i) o[i] = 0.0f;
#pragma unroll
  for (int i = 0; i < kBlockKeys / 4; ++i) probabilities[i] = 0;
  Output output;
  uint32_t use = ~0u;        // of the rings: the last block whose P is made
  uint32_t first_use = ~0u;  // of its tile

  // Stage 0 of the rings; the others follow. One made from each stage's address takes more instructions.
  const uint64_t k_ring = wgmma_descriptor(smem.k[0]), v_ring = wgmma_descriptor(smem.v[0], kBlockKeys * 128);
  const auto turn_wait = [&] { named_barrier_sync(kOrderBarrier + consumer, 256); };
  const auto turn_pass = [&] { named_barrier_arrive(kOrderBarrier + (consumer + 1) % Tr::kConsumers, 256); };
  const auto wait_for = [&](Mbarrier(&full)[kStages], uint32_t block) {
    mbarrier_wait(&full[stage_of<kStages>(block)], parity_of<kStages>(block));
  };
  const auto release = [&](Mbarrier(&empty)[kStages], uint32_t block) {
    if (lane == 0) mbarrier_arrive(&empty[stage_of<kStages>(block)]);
  };
  const auto hand_back = [&](int count) {
    for (int i = 0; i < count; ++i) {
      const uint32_t block = use + 1 + i;
      turn_wait();
      turn_pass();
      wait_for(smem.k_full, block);
      release(smem.k_empty, block);
      wait_for(smem.v_full, block);
      release(smem.v_empty, block);
    }
  };
  const auto begin_pv = [&] {
    wgmma_fence();
    issue_pv<Tr>(o, probabilities, wgmma_advance(v_ring, stage_of<kStages>(use) * sizeof(smem.v[0])), use != first_use);
  };
  const auto end_pv = [&] {
    wgmma_wait<0>();
    wgmma_pin(o);
  };
  // The open tile's queries are done: tile number `tiles`.
  const auto finish = [&](uint32_t tiles) {
    const uint32_t slot = stage_of<kJobs>(tiles);
    output = locate_output(p.plan, smem.jobs[slot], consumer, group, p.num_qo_heads);
    mbarrier_arrive(&smem.job_done[slot]);
    finish_rows(p, rows, softmax_scale, output);
  };
  // With two buffers of queries that is done beside the next tile's first matmul; one buffer has to be handed back.
  constexpr bool kFinishLate = Tr::kQueryBuffers > 1;
  const auto close = [&](uint32_t tiles) {
    wait_for(smem.v_full, use);
    begin_pv();
    if (kFinishLate) finish(tiles);
    end_pv();
    release(smem.v_empty, use);
    write_output<Tr>(p, o, output);
  };
  if (consumer == Tr::kConsumers - 1) turn_pass();

  uint32_t tiles = 0;
  for (;; ++tiles) {
    const uint32_t buffer = stage_of<Tr::kQueryBuffers>(tiles);
    mbarrier_wait(&smem.q_full[buffer], parity_of<Tr::kQueryBuffers>(tiles));
    const Job job = read_job(smem.jobs[stage_of<kJobs>(tiles)]);
    const int blocks = job.blocks;
    if (blocks == kNoMoreJobs) break;
    const bool idle = consumer * 64 >= job.q_count * group.size;  // the row is too short for this warpgroup
    if (blocks == 0 || idle) {
      if (open) close(tiles - 1);
      open = false;
      hand_back(blocks);
      use += blocks;
      if (!idle) write_nothing<Tr>(p, locate_output(p.plan, job, consumer, group, p.num_qo_heads));
      mbarrier_arrive(&smem.job_done[stage_of<kJobs>(tiles)]);
      continue;
    }
    const int kv_begin = job.kv_begin;
    const int tail = (job.kv_end - kv_begin) - (blocks - 1) * kBlockKeys;  // keys of the last block

    const uint64_t q = wgmma_descriptor(smem.q[buffer][0][consumer * 64]);
    const auto begin_qk = [&](uint32_t block) {
      wgmma_fence();
      issue_qk<Tr>(s, q, wgmma_advance(k_ring, stage_of<kStages>(block) * sizeof(smem.k[0])));
    };
    // The consumer's turn on the tensor cores: S of a block, and P V of the one before, if there is one.
    const auto take_turn = [&](uint32_t block, bool has_p) {
      if constexpr (Tr::kOverlap) {
        turn_wait();
        wait_for(smem.k_full, block);
        begin_qk(block);
        if (has_p) wait_for(smem.v_full, use);
        begin_pv();  // without P its result is dropped: a matmul under a condition would not overlap
        turn_pass();
      } else {
        wait_for(smem.k_full, block);
        if (has_p) wait_for(smem.v_full, use);
        turn_wait();
        if (has_p) {
          begin_pv();
          end_pv();
        }
        begin_qk(block);
        turn_pass();
        if (has_p) release(smem.v_empty, use);
      }
    };
    const auto end_qk = [&](uint32_t block) {
      wgmma_wait<Tr::kOverlap ? 1 : 0>();
      wgmma_pin(s);
      release(smem.k_empty, block);
    };
    // Blocks inside [first_of_all, last_of_all] need no mask in this warp.
    int first_of_all, last_of_all;
    // `begin`: the block's first key.
    const auto logits = [&](int begin) {
      if constexpr (Tr::kSoftCap) {
        const float inner = p.sm_scale / p.logits_soft_cap;
#pragma unroll
        for (float& logit : s) logit = p.logits_soft_cap * tanh_exp2(logit * inner);
      }
      if (begin + kBlockKeys - 1 > last_of_all) mask<false>(s, rows, begin);
      if (begin < first_of_all) mask<true>(s, rows, begin);
    };

    // A block at the end that none of this warpgroup's queries sees is handed back unread; there is one at most.
    int skipped = 0;
    if (p.causal && !job.packed) {
      const int last = job.position + min(job.q_count - 1, group.token(64 * consumer + 63));
      skipped = uniform(blocks - 1 - min(max(last - kv_begin, 0) / kBlockKeys, blocks - 1));
      hand_back(skipped);
    }
    int begin = kv_begin + (blocks - 1 - skipped) * kBlockKeys;
    const uint32_t begin_use = use + 1 + skipped;
    take_turn(begin_use, open);
    if (kFinishLate && open) finish(tiles - 1);
    if (!Tr::kOverlap && open) write_output<Tr>(p, o, output);
    locate_rows(p, job, consumer, group, rows);
    first_of_all = __reduce_max_sync(0xffffffff, max(rows.first[0], rows.first[1]));
    last_of_all = __reduce_min_sync(0xffffffff, min(rows.last[0], rows.last[1]));
    end_qk(begin_use);
    logits(begin);
    raise_references<Tr>(s, rows, softmax_scale, factor);
    if constexpr (Tr::kOverlap) {
      end_pv();
      if (open) {
        release(smem.v_empty, use);
        write_output<Tr>(p, o, output);
      }
    }
    open = true;
    use = first_use = begin_use;
    if constexpr (Tr::kOverlap) {
      exponentials<Tr>(s, rows, softmax_scale, probabilities);
    } else {
      exponentials_between<Tr, false>(s, rows, softmax_scale, probabilities, o, factor);
    }
    if (skipped == 0) clear_tail<Tr>(smem, use, tail, consumer);

    for (begin -= kBlockKeys; begin >= kv_begin; begin -= kBlockKeys, ++use) {
      take_turn(use + 1, true);
      end_qk(use + 1);
      logits(begin);
      const bool moved = raise_references<Tr>(s, rows, softmax_scale, factor);
      if constexpr (Tr::kOverlap) {
        end_pv();  // it is over by now; P of this block goes where P of the last one was
        release(smem.v_empty, use);
        multiply_rows<Tr>(o, factor);
        exponentials<Tr>(s, rows, softmax_scale, probabilities);
      } else if (moved) {
        exponentials_between<Tr, true>(s, rows, softmax_scale, probabilities, o, factor);
      } else {
        exponentials_between<Tr, false>(s, rows, softmax_scale, probabilities, o, factor);
      }
    }
    if (!kFinishLate) finish(tiles);
  }
  if (open) close(tiles - 1);
}

}  // namespace flashcore::prefill
