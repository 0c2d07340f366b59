// The plan on one CPU thread: the same steps and arithmetic as plan.cu, hence the same plan.
#include <algorithm>

#include "plan/build.h"

namespace flashcore {

namespace {

struct OneThread {
  template <class F>
  void for_each(int32_t n, F f) {
    for (int32_t i = 0; i < n; ++i) f(i);
  }

  template <class T, class Value, class F>
  T scan(int32_t n, Value value, F f) {
    T sum{};
    for (int32_t i = 0; i < n; ++i) {
      const T own = value(i);
      f(i, sum);
      sum = sum + own;
    }
    return sum;
  }

  template <class Key, class F>
  void rank(int32_t n, int32_t groups, Key key, int32_t* counter, F f) {
    for (int32_t group = 0; group < groups; ++group) {
      for (int32_t i = 0; i < n; ++i) {
        const int32_t k = key(i, group);
        if (k >= 0) f(i, group, counter[k]++);
      }
    }
  }
};

struct OneLane {
  int32_t index() const { return 0; }
  int32_t count() const { return 1; }
  bool first() const { return true; }
  bool all(bool value) const { return value; }
};

// Calls f(page) for the columns [begin, end) of a request, page ids of the pool only.
template <class F>
void each_page(const PlanParams& p, const Request& request, int32_t begin, int32_t end, F f) {
  for (int32_t column = begin; column < end; ++column) {
    const int32_t page = p.plan.kv_indices[request.page_begin + column];
    if (page >= 0 && page < p.num_pages) f(page);
  }
}

void count_pages(const PlanParams& p, const Scratch& s) {
  const auto claim = [&](int32_t r, int32_t begin, int32_t end) {
    each_page(p, request_of(p, r), begin, end, [&](int32_t page) {
      s.owner[page] = std::max(s.owner[page], p.batch - r);
      ++s.count[page];
    });
  };
  for (int32_t r = 0; r < p.batch; ++r) claim(r, 0, std::min(1, shareable_columns(p, request_of(p, r))));
  for (int32_t r = 0; r < p.batch; ++r) {
    const Request request = request_of(p, r);
    s.scattered[r] = 0;
    each_page(p, request, 0, std::min(1, shareable_columns(p, request)),
              [&](int32_t page) { s.scattered[r] = s.count[page] > 1; });
  }
  for (int32_t r = 0; r < p.batch; ++r) {
    if (s.scattered[r]) claim(r, 1, shareable_columns(p, request_of(p, r)));
  }
}

void walk(const PlanParams& p, const Scratch& s, int32_t r) {
  const OneLane lane;
  const Request request = request_of(p, r);
  Walk<OneLane> walk{p, s, lane, r, request};
  const int32_t columns = s.scattered[r] ? shareable_columns(p, request) : 0;
  int32_t column = 0;
  for (bool going = true; going; ++column) {
    const Edge edge = column < columns ? edge_of(p, s, request, column) : Edge{-1, 0};
    if (column > 0 && edge == walk.edge) continue;
    going = walk.close(column) && edge.owner >= 0;
    walk.open(column, edge);
  }
  walk.finish();
}

void forget_pages(const PlanParams& p, const Scratch& s) {
  for (int32_t r = 0; r < p.batch; ++r) {
    const Request request = request_of(p, r);
    each_page(p, request, 0, shareable_columns(p, request), [&](int32_t page) { s.owner[page] = s.count[page] = 0; });
  }
}

}  // namespace

int run_plan_cpu(const PlanParams& p) {
  OneThread team;
  Builder<OneThread> builder(p, team);
  if (builder.s.size > p.scratch_size) return 1;
  const bool share = builder.share && batch_fits(p);
  if (share) {
    count_pages(p, builder.s);
    for (int32_t r = 0; r < p.batch; ++r) walk(p, builder.s, r);
  }
  builder.build();
  if (share) forget_pages(p, builder.s);
  return 0;
}

}  // namespace flashcore
