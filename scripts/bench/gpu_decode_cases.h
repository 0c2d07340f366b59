// What gpu_decode_test checks and times.
#pragma once

#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "params.h"

namespace decode_test {

using flashcore::DType;

struct Level {
  int members;  // consecutive requests that share
  int keys;     // from the end of the level before
};

struct Case {
  std::string name;
  std::vector<int> kv_lens;
  int num_qo_heads = 32, num_kv_heads = 8, head_dim = 128, page_size = 64;
  DType dtype = DType::bf16;
  std::vector<Level> levels = {};  // shared prefixes, outermost first
  int window_left = -1;
  float cap = 0.0f;
  int causal = 1;
  int split_keys = 0;
  bool interleaved = false;  // K and V of a page side by side: [pages, 2, page_size, heads, head_dim]
  bool share = true;
  int run = 1;                        // pages that follow each other in the pool; the runs are permuted at random
  flashcore::SparseRows sparse = {};  // with lists: policy topk
};

inline std::vector<Case> check_cases() {
  std::vector<Case> cases;
  const std::vector<int> ragged = {1, 0, 15, 16, 17, 63, 64, 65, 127, 128, 129, 640, 1000, 2047, 3333};
  for (int page_size : {16, 32, 64, 128}) {
    for (int head_dim : {64, 128}) {
      const std::string tail = " p" + std::to_string(page_size) + " d" + std::to_string(head_dim);
      cases.push_back({.name = "ragged" + tail, .kv_lens = ragged, .head_dim = head_dim, .page_size = page_size});
      cases.push_back({.name = "ragged 9 requests share" + tail,
                       .kv_lens = {1300, 1290, 1345, 1408, 1281, 1400, 1500, 1555, 1289},
                       .head_dim = head_dim,
                       .page_size = page_size,
                       .levels = {{9, 1280}}});
    }
  }
  for (auto [q, kv] : {std::pair{8, 8}, {16, 4}, {20, 4}, {28, 4}, {64, 8}, {24, 2}, {32, 2}, {8, 1}}) {
    cases.push_back({.name = "heads " + std::to_string(q) + "/" + std::to_string(kv),
                     .kv_lens = ragged,
                     .num_qo_heads = q,
                     .num_kv_heads = kv});
    cases.push_back({.name = "heads " + std::to_string(q) + "/" + std::to_string(kv) + " share",
                     .kv_lens = {1300, 2290, 1345, 1408, 1281, 1400, 1500},
                     .num_qo_heads = q,
                     .num_kv_heads = kv,
                     .levels = {{7, 1280}}});
  }
  for (int batch : {2, 3, 4, 5, 8, 12, 16, 17, 40}) {
    cases.push_back({.name = "shared by " + std::to_string(batch),
                     .kv_lens = std::vector<int>(batch, 4096 + 77),
                     .levels = {{batch, 4096}}});
  }
  cases.push_back({.name = "tree of three levels",
                   .kv_lens = std::vector<int>(24, 8192 + 300),
                   .levels = {{24, 2048}, {8, 4096}, {4, 2048}}});
  cases.push_back({.name = "fp16", .kv_lens = ragged, .dtype = DType::fp16});
  cases.push_back({.name = "fp16 d64 share",
                   .kv_lens = std::vector<int>(12, 2100),
                   .head_dim = 64,
                   .dtype = DType::fp16,
                   .levels = {{12, 2048}}});
  cases.push_back({.name = "soft cap", .kv_lens = ragged, .cap = 2.0f});
  cases.push_back(
      {.name = "soft cap share", .kv_lens = std::vector<int>(12, 2100), .levels = {{12, 2048}}, .cap = 30.0f});
  cases.push_back({.name = "window 100", .kv_lens = ragged, .window_left = 100});
  cases.push_back({.name = "window 0", .kv_lens = ragged, .window_left = 0});
  cases.push_back({.name = "window 700 page 128", .kv_lens = ragged, .page_size = 128, .window_left = 700});
  cases.push_back({.name = "split every 256 keys", .kv_lens = ragged, .split_keys = 256});
  cases.push_back({.name = "interleaved cache", .kv_lens = ragged, .interleaved = true});
  cases.push_back({.name = "1 x 20000", .kv_lens = {20000}});
  const std::vector<std::vector<int>> few = {{1},
                                             {15},
                                             {64},
                                             {65},
                                             {129},
                                             {700, 1, 0},
                                             {0, 33},
                                             {5000, 3, 90},
                                             {17, 17, 17},
                                             {100000, 50},
                                             {3000, 2000},
                                             {640, 0, 777},
                                             {9000, 8000, 7000, 1, 2, 3, 4000, 129}};
  for (const std::vector<int>& lens : few) {
    std::string name = "few";
    for (int len : lens) name += " " + std::to_string(len);
    const int most = lens.size() > 4 ? 1 : 2;  // heads / 8 a group of 4 or 8
    for (int page_size : {16, 64, 128}) {
      cases.push_back({.name = name + " p" + std::to_string(page_size),
                       .kv_lens = lens,
                       .num_qo_heads = 32 * most,
                       .head_dim = page_size == 16 ? 64 : 128,
                       .page_size = page_size});
    }
    cases.push_back({.name = name + " window cap", .kv_lens = lens, .window_left = 60, .cap = 3.0f});
    cases.push_back({.name = name + " fp16 split", .kv_lens = lens, .dtype = DType::fp16, .split_keys = 128});
  }
  for (const auto& [batch, q] : {std::pair{16, 32},
                                 {9, 32},
                                 {16, 8},
                                 {12, 40},
                                 {4, 128},
                                 {8, 32},
                                 {7, 32},
                                 {5, 48},
                                 {3, 64},
                                 {2, 128},
                                 {8, 24}}) {
    const std::string name = " " + std::to_string(batch) + " " + std::to_string(q) + "/8";
    std::vector<int> lens(batch);
    for (int i = 0; i < batch; ++i) lens[i] = 1500 + 211 * i;
    cases.push_back({.name = "cluster" + name, .kv_lens = lens, .num_qo_heads = q, .levels = {{batch, 1024}}});
    cases.push_back({.name = "cluster tree" + name,
                     .kv_lens = lens,
                     .num_qo_heads = q,
                     .levels = {{batch, 640}, {(batch + 1) / 2, 448}}});
    cases.push_back({.name = "cluster alone" + name, .kv_lens = lens, .num_qo_heads = q});
    for (int& len : lens) len += 8192;
    cases.push_back({.name = "cluster long" + name,
                     .kv_lens = lens,
                     .num_qo_heads = q,
                     .head_dim = 64,
                     .levels = {{batch, 8192}, {(batch + 1) / 2, 448}}});
  }
  for (int batch : {2, 3, 5, 8}) {
    cases.push_back({.name = "few share " + std::to_string(batch),
                     .kv_lens = std::vector<int>(batch, 6000),
                     .levels = {{batch, 4096}}});
    cases.push_back({.name = "few share d64 " + std::to_string(batch),
                     .kv_lens = std::vector<int>(batch, 2100),
                     .num_qo_heads = 24,
                     .head_dim = 64,
                     .levels = {{batch, 1024}, {(batch + 1) / 2, 512}}});
  }
  // Long enough for lines of heads: cut anywhere, in equal pieces, not at all.
  for (const auto& [q, kv] : {std::pair{32, 8}, {28, 4}, {32, 32}, {40, 10}, {24, 3}}) {
    const std::string heads = " " + std::to_string(q) + "/" + std::to_string(kv);
    Case c{.name = "long" + heads, .num_qo_heads = q, .num_kv_heads = kv};
    for (int i = 0; i < 40; ++i) c.kv_lens.push_back(1500 + 97 * i);
    cases.push_back(c);
    cases.push_back({.name = "long pieces" + heads,
                     .kv_lens = std::vector<int>(std::max(128 / kv, 1), 4100),
                     .num_qo_heads = q,
                     .num_kv_heads = kv,
                     .page_size = 16});
    cases.push_back({.name = "long whole" + heads,
                     .kv_lens = std::vector<int>(std::max(512 / kv, 1), 1030),
                     .num_qo_heads = q,
                     .num_kv_heads = kv,
                     .head_dim = 64});
  }
  cases.push_back({.name = "many short", .kv_lens = std::vector<int>(300, 130)});
  for (int head_dim : {64, 128}) {
    for (int page_size : {16, 64}) {
      Case c{.name = "apart d" + std::to_string(head_dim) + " p" + std::to_string(page_size),
             .head_dim = head_dim,
             .page_size = page_size};
      for (int r = 0; r < 140; ++r) c.kv_lens.push_back(1900 + 37 * (r % 11) + r / 70 * 500);
      Case alone = c;
      alone.name += " alone";
      cases.push_back(alone);
      c.levels = {{140, 640}, {70, 1216}};
      cases.push_back(c);
      c.name += " fp16 cap window";
      c.dtype = DType::fp16;
      c.cap = 3.0f;
      c.window_left = 1500;
      cases.push_back(c);
    }
  }
  cases.push_back({.name = "apart 28/4",
                   .kv_lens = std::vector<int>(260, 1700),
                   .num_qo_heads = 28,
                   .num_kv_heads = 4,
                   .levels = {{260, 1024}, {52, 640}}});
  cases.push_back(
      {.name = "apart without own keys", .kv_lens = std::vector<int>(128, 2048), .levels = {{128, 1024}, {64, 1024}}});
  for (int head_dim : {64, 128}) {
    for (int prefix : {640, 5184}) {
      Case c{.name = "apart 70 over " + std::to_string(prefix) + " d" + std::to_string(head_dim),
             .head_dim = head_dim,
             .levels = {{70, prefix}}};
      for (int r = 0; r < 70; ++r) c.kv_lens.push_back(5200 + 37 * (r % 11));
      cases.push_back(c);
    }
  }
  cases.push_back({.name = "apart 35 rows of the same keys",
                   .kv_lens = std::vector<int>(1120, 700),
                   .num_qo_heads = 8,
                   .num_kv_heads = 2,
                   .levels = {{1120, 576}}});
  return cases;
}

// Small steps of random lengths, some with a common start.
inline std::vector<Case> random_cases(int count) {
  std::mt19937 random(11);
  const auto one_of = [&](std::initializer_list<int> choices) { return choices.begin()[random() % choices.size()]; };
  std::vector<Case> cases;
  for (int i = 0; i < count; ++i) {
    Case c{.name = "random " + std::to_string(i)};
    const int batch = one_of({1, 2, 3, 4, 4, 5, 7, 8, 11, 16});
    const double longest = std::log(one_of({500, 5000, 40000}));
    for (int r = 0; r < batch; ++r) {
      c.kv_lens.push_back(int(std::exp(std::uniform_real_distribution<>(0, longest)(random))));
    }
    c.num_kv_heads = one_of({8, 8, 8, 4});
    c.num_qo_heads = c.num_kv_heads * one_of({1, 2, 4, 4, 8, 16});
    c.head_dim = one_of({64, 128});
    c.page_size = one_of({16, 32, 64, 64, 128});
    if (random() % 4 == 0) c.window_left = int(random() % 3000);
    if (random() % 3 == 0) {
      const int common = 128 * (1 + int(random() % 20));
      c.levels = {{batch, common}};
      for (int& len : c.kv_lens) len += common;
    }
    cases.push_back(c);
  }
  return cases;
}

struct Timed {
  Case c;
  double peer_us;  // the best of FA3 and FlashInfer where it was measured, else 0
  double bar;      // ratio to it
};

inline std::vector<Timed> time_cases() {
  auto dense = [](int batch, int context, double peer, double bar, Case c = {}) {
    c.name = std::to_string(batch) + "x" + std::to_string(context) + c.name;
    c.kv_lens = std::vector<int>(batch, context);
    return Timed{c, peer, bar};
  };
  auto shared = [](int batch, int context, std::vector<Level> levels, double peer, double bar) {
    Case c{.name = std::to_string(batch) + "x" + std::to_string(context) + " shared"};
    for (const Level& level : levels) c.name += " " + std::to_string(level.members) + "*" + std::to_string(level.keys);
    c.kv_lens = std::vector<int>(batch, context);
    c.levels = levels;
    return Timed{c, peer, bar};
  };
  std::vector<Timed> cases = {
      dense(1, 1024, 14.4, 0.83),
      dense(1, 2048, 0, 0.83),
      dense(1, 8192, 25.2, 0.83),
      dense(1, 32768, 51.0, 0.83),
      dense(1, 131072, 142, 1.03),
      dense(2, 1024, 0, 0.83),
      dense(2, 8192, 0, 0.83),
      dense(2, 32768, 0, 0.83),
      dense(4, 1024, 0, 0.83),
      dense(4, 8192, 0, 0.83),
      dense(4, 32768, 0, 0.83),
      dense(5, 1024, 0, 0.83),
      dense(8, 1024, 22.9, 0.83),
      dense(8, 2048, 0, 0.83),
      dense(8, 8192, 80.7, 0.88),
      dense(8, 32768, 259, 0.83),
      dense(8, 131072, 991, 1.03),
      dense(9, 1024, 0, 1.03),
      dense(12, 2048, 0, 1.03),
      dense(16, 1024, 0, 1.03),
      dense(16, 2048, 0, 1.03),
      dense(16, 8192, 0, 1.03),
      dense(16, 32768, 0, 1.03),
      dense(16, 131072, 1946, 1.0),
      dense(32, 1024, 0, 1.03),
      dense(32, 8192, 0, 1.03),
      dense(64, 1024, 84.8, 0.88),
      dense(64, 2048, 0, 1.03),
      dense(64, 8192, 504, 1.03),
      dense(128, 1024, 0, 1.03),
      dense(256, 1024, 0, 1.03),
      dense(256, 2048, 505, 1.03),
      dense(1, 8192, 14.6, 1.0, {.name = " 8q/1kv", .num_qo_heads = 8, .num_kv_heads = 1}),
      dense(16, 8192, 33.9, 1.0, {.name = " 8q/1kv", .num_qo_heads = 8, .num_kv_heads = 1}),
      dense(16, 8192, 139.5, 1.0, {.name = " 64q/8kv", .num_qo_heads = 64}),
      dense(64, 8192, 254.9, 1.0, {.name = " 28q/4kv", .num_qo_heads = 28, .num_kv_heads = 4}),
      dense(32, 4096, 483.7, 1.0, {.name = " 32q/32kv", .num_kv_heads = 32}),
      dense(64, 8192, 262.9, 1.0, {.name = " d64", .head_dim = 64}),
      dense(64, 8192, 490.1, 1.0, {.name = " p16", .page_size = 16}),
      dense(64, 8192, 0, 1.0, {.name = " p32", .page_size = 32}),
      shared(4, 32768, {{4, 30720}}, 0, 0),
      shared(8, 1024, {{8, 512}}, 0, 0),
      shared(8, 2048, {{8, 1024}}, 0, 0),
      shared(8, 4096, {{8, 2048}}, 0, 0),
      shared(8, 6144, {{8, 4096}}, 0, 0),
      shared(8, 8192, {{8, 6144}}, 0, 0),
      shared(8, 10240, {{8, 8192}}, 0, 0),
      shared(6, 6144, {{6, 4096}}, 0, 0),
      shared(8, 32768, {{8, 30720}}, 0, 0),
      shared(16, 32768, {{16, 30720}}, 0, 0),
      shared(64, 8192, {{64, 5760}}, 363, 0.52),
      shared(256, 4096, {{256, 2816}}, 661, 0.57),
      shared(64, 36864, {{64, 32768}}, 1381, 0.27),
      shared(128, 9216, {{128, 8192}}, 726, 0.26),
      shared(512, 8448, {{128, 8192}}, 2904, 0.15),
      shared(128, 1280, {{128, 1024}}, 0, 0),
      shared(256, 1280, {{256, 1024}}, 0, 0),
      shared(512, 2304, {{512, 2048}}, 0, 0),
      shared(512, 8320, {{128, 8192}}, 0, 0),
      shared(512, 8576, {{128, 8192}}, 0, 0),
      shared(512, 8704, {{128, 8192}}, 0, 0),
      shared(1024, 8448, {{128, 8192}}, 0, 0),
      shared(256, 16640, {{64, 16384}}, 0, 0),
      shared(128, 33024, {{32, 32768}}, 0, 0),
      shared(16, 6144, {{16, 4096}}, 0, 0),
      shared(32, 1280, {{32, 1024}}, 0, 0),
      shared(32, 2304, {{32, 2048}}, 0, 0),
      shared(32, 16640, {{32, 16384}}, 0, 0),
      shared(64, 1280, {{64, 1024}}, 0, 0),
      shared(64, 16640, {{64, 16384}}, 0, 0),
      shared(32, 65920, {{32, 65536}}, 0, 0),
      shared(64, 65920, {{64, 65536}}, 0, 0),
      shared(64, 21504, {{64, 4096}, {8, 16384}}, 0, 0),
  };
  std::mt19937 random(3);
  Case ragged{.name = "64 ragged 256..64K"};
  for (int i = 0; i < 64; ++i) {
    ragged.kv_lens.push_back(int(256 * std::exp(std::uniform_real_distribution<>(0, std::log(256.0))(random))));
  }
  cases.push_back({ragged, 0, 1.0});
  return cases;
}

}  // namespace decode_test
