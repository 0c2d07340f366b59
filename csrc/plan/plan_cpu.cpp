// The plan on one CPU thread: the same steps and arithmetic as plan.cu, hence the same plan.
#include "plan/write.h"

namespace flashcore {

namespace {

struct OneThread {
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
  const Found found = found_of(p);
  const Sums sums = sums_of(p, p.scratch + found.size);
  if (found.size + sums.size > p.scratch_size) return 1;
  OneThread team;
  if (shares_pages(p)) {
    const auto shareable = [&](int32_t i) { return shareable_of(p, request_of(p, i), batch_fits(p)); };
    const auto path = [&](int32_t round, int32_t i) { return found.paths[i * kMaxLevels + round]; };
    for (int32_t r = 0; r < p.batch; ++r) trace_path(p, found, team, r, shareable);
    for (int32_t r = 0; r < p.batch; ++r) walk(p, found, team, r, path, [](int32_t, int32_t) { return true; });
  }
  if (shares_scores(p)) {
    const auto scored = [&](int32_t round, int32_t i) { return found.scored[i * kMaxLevels + round]; };
    for (int32_t r = 0; r < p.batch; ++r) place_stretches(p, team, r, scored);
  }
  const Totals totals = Builder<OneThread>(p, found, sums, team).build();
  Writer(p, found, sums, totals).write([](int32_t n, const auto& item) {
    for (int32_t i = 0; i < n; ++i) item(i);
  });
  return 0;
}

}  // namespace flashcore
