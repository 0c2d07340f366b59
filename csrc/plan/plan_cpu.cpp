// The plan on one CPU thread: the same steps and arithmetic as plan.cu, hence the same plan.
#include "plan/write.h"

namespace flashcore {

namespace {

struct OneThread {
  template <class F>
  void for_each(int32_t n, F f) const {
    for (int32_t i = 0; i < n; ++i) f(i);
  }

  template <class T, class Value, class F>
  T scan(int32_t n, Value value, F f) const {
    T sum{};
    for (int32_t i = 0; i < n; ++i) {
      const T own = value(i);
      f(i, sum);
      sum = sum + own;
    }
    return sum;
  }

  template <class T>
  T* beside(T* values, int32_t) const {
    return values;
  }

  template <int kUnroll, class F>
  int32_t first(int32_t begin, int32_t end, F f) const {
    while (begin < end && !f(begin)) ++begin;
    return begin < end ? begin : end;
  }

  template <class Value>
  auto sum(int32_t n, Value value) const {
    decltype(value(0)) sum{};
    for (int32_t i = 0; i < n; ++i) sum = sum + value(i);
    return sum;
  }

  bool leads() const { return true; }
};

}  // namespace

int run_plan_cpu(const PlanParams& params) {
  const PlanJob p(params);
  const Scratch s = scratch_of(p);
  if (s.size > p.scratch_size) return 1;
  OneThread team;
  Builder<OneThread> builder(p, s, team);
  if (builder.share) {
    team.for_each(p.batch, [&](int32_t r) { trace_path(p, s, team, r); });
    team.for_each(p.batch, [&](int32_t r) { walk(p, s, team, r); });
  }
  builder.build();
  const Writer writer(p, s);
  team.for_each(writer.num_tokens(), [&](int32_t t) { writer.write_token(t); });
  team.for_each(writer.num_uncut(), [&](int32_t uncut) { writer.write_uncut(uncut); });
  team.for_each(writer.num_cuts(), [&](int32_t cut) { writer.write_cut(cut); });
  team.for_each(writer.num_listed(), [&](int32_t i) { writer.write_listed(i); });
  return 0;
}

}  // namespace flashcore
