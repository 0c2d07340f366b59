// attend on one instruction set. attend_cpu.cpp includes this file once for each, inside a namespace and a target
// pragma of its own, after defining FLASHCORE_VECTOR_BYTES; hence no include guard.
//
//   for each tile of the CTA:  S = Q K^T,  P = 2^(S log2e - max),  O = O 2^(old max - max) + P V,  block by block
//
// All packed queries of a tile share a block of keys: it is fetched from its pages and widened to fp32 once.
// Register tiles: kRows queries x kLanes / kRows keys for Q K^T, kRows queries x kVectors vectors of the head for P V.
// Method: FlashAttention-2's online softmax (arXiv:2307.08691), all of it in fp32.

constexpr int kLanes = FLASHCORE_VECTOR_BYTES / sizeof(float);
typedef float Vector __attribute__((vector_size(FLASHCORE_VECTOR_BYTES)));
typedef int32_t IntVector __attribute__((vector_size(FLASHCORE_VECTOR_BYTES)));
typedef uint32_t UintVector __attribute__((vector_size(FLASHCORE_VECTOR_BYTES)));
typedef uint16_t HalfVector __attribute__((vector_size(FLASHCORE_VECTOR_BYTES / 2)));

// As many queries as leave four keys a register tile; rows that are left over take half of that, and so on.
constexpr int kMaxRows = kLanes / 4;

// ---------------------------------------------------------------------------------------------------------------------
// Vectors
// ---------------------------------------------------------------------------------------------------------------------

inline Vector load(const float* from) {
  Vector value;
  __builtin_memcpy(&value, from, sizeof(value));
  return value;
}

inline UintVector load_halves(const void* from) {
  HalfVector bits;
  __builtin_memcpy(&bits, from, sizeof(bits));
  return __builtin_convertvector(bits, UintVector);
}

inline Vector load(const Bf16* from) { return (Vector)(load_halves(from) << 16); }

inline Vector load(const Fp16* from) {
  const UintVector bits = load_halves(from);
  const UintVector magnitude = (bits & 0x7fff) << 13;
  // The exponents of the two formats differ by 112, also for denormals; infinity and NaN keep the largest exponent.
  const UintVector finite = (UintVector)((Vector)magnitude * 0x1p112f);
  const UintVector special = magnitude | 0x7f800000;
  return (Vector)((magnitude >= 0x0f800000 ? special : finite) | ((bits & 0x8000) << 16));
}

inline void store(float* to, Vector value) { __builtin_memcpy(to, &value, sizeof(value)); }

// Lanes whose number has `kBit` set come from y, the others from x.
template <int kBit, int... kLane>
inline Vector blend(Vector x, Vector y, std::integer_sequence<int, kLane...>) {
  return __builtin_shuffle(x, y, IntVector{(kLane & kBit ? kLanes + kLane : kLane)...});
}

template <int kBit, int... kLane>
inline Vector swap_lanes(Vector x, std::integer_sequence<int, kLane...>) {
  return __builtin_shuffle(x, IntVector{(kLane ^ kBit)...});
}

// Lane i of the result is the sum over the lanes of sums[i]: kLanes horizontal sums in log2(kLanes) rounds.
template <int kBit = kLanes / 2>
inline Vector sum_each(Vector* sums) {
  constexpr auto kAll = std::make_integer_sequence<int, kLanes>{};
#pragma GCC unroll 8
  for (int i = 0; i < kBit; ++i) {
    const Vector x = sums[i], y = sums[i + kBit];
    sums[i] = blend<kBit>(x, y, kAll) + swap_lanes<kBit>(blend<kBit>(y, x, kAll), kAll);
  }
  if constexpr (kBit > 1) return sum_each<kBit / 2>(sums);
  return sums[0];
}

inline float max_lane(Vector x) {
  float max = x[0];
  for (int i = 1; i < kLanes; ++i) max = x[i] > max ? x[i] : max;
  return max;
}

inline float sum_lanes(Vector x) {
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += x[i];
  return sum;
}

// 2^x for x <= 126, 0 below -126. The Taylor series of 2^f on [-1/2, 1/2] is good to 2e-7 with seven terms.
inline Vector exp2(Vector x) {
  constexpr float kRound = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
  constexpr int32_t kRoundBits = 0x4b400000;
  const Vector shifted = x + kRound;
  const Vector f = x - (shifted - kRound);
  const IntVector exponent = ((IntVector)shifted - kRoundBits) << 23;
  Vector series = f * 1.5403530e-4f + 1.3333558e-3f;
  series = series * f + 9.6181291e-3f;
  series = series * f + 5.5504109e-2f;
  series = series * f + 2.4022651e-1f;
  series = series * f + 6.9314718e-1f;
  series = series * f + 1.f;
  const Vector zero = {};
  return x < -126.f ? zero : (Vector)((IntVector)series + exponent);
}

inline Vector tanh(Vector x) {
  const Vector bound = Vector{} + 40.f;
  const Vector power = exp2((x > bound ? bound : (x < -bound ? -bound : x)) * (2 * kLog2E));
  return (power - 1.f) / (power + 1.f);
}

// ---------------------------------------------------------------------------------------------------------------------
// A block of keys
// ---------------------------------------------------------------------------------------------------------------------

// Scratch of one tile, all fp32: m packed queries, a block of keys.
struct Workspace {
  float* q;      // [m, head_dim]
  float* k;      // [kBlock, head_dim]
  float* v;      // [kBlock, head_dim]
  float* p;      // [kMaxRows, kBlock] logits, then weights
  float* o;      // [m, head_dim] not yet divided by sum
  float* max;    // [m] of the logits, in units of log2
  float* sum;    // [m]
  int* visible;  // [m, 2] keys of the row that the query sees

  Workspace(std::vector<float>& buffer, int m, int head_dim) {
    constexpr size_t kAlign = 16;  // floats of a cache line
    const size_t floats = 2 * m * head_dim + 2 * kBlock * head_dim + kMaxRows * kBlock + 4 * m;
    if (buffer.size() < floats + kAlign) buffer.resize(floats + kAlign);
    const size_t misaligned = reinterpret_cast<uintptr_t>(buffer.data()) / sizeof(float) % kAlign;
    q = buffer.data() + (kAlign - misaligned);
    k = q + m * head_dim;
    v = k + kBlock * head_dim;
    o = v + kBlock * head_dim;
    p = o + m * head_dim;
    max = p + kMaxRows * kBlock;
    sum = max + m;
    visible = reinterpret_cast<int*>(sum + m);
  }
};

template <int kHeadDim, class T>
inline void widen(const T* from, float* to) {
#pragma GCC unroll 8
  for (int d = 0; d < kHeadDim; d += kLanes) store(to + d, load(from + d));
}

// Where the keys of a row lie for one KV head.
template <class T>
struct Keys {
  const T* k;
  const T* v;
  const int* pages;
  const AttendParams& params;

  Keys(const AttendParams& params, const Row& row, int kv_head)
      : k(static_cast<const T*>(params.k) + kv_head * params.k_stride_head),
        v(static_cast<const T*>(params.v) + kv_head * params.v_stride_head),
        pages(params.plan.kv_indices + row.page_begin + static_cast<int64_t>(kv_head) * row.head_stride),
        params(params) {}

  // Calls visit(j, K row, V row) for keys begin + j, 0 <= j < count.
  template <class Visit>
  inline void for_each(int begin, int count, Visit visit) const {
    int column = begin / params.page_size, offset = begin % params.page_size;
    for (int j = 0; j < count; ++column, offset = 0) {
      const int64_t page = pages[column];
      const T* k_row = k + page * params.k_stride_page + offset * params.k_stride_token;
      const T* v_row = v + page * params.v_stride_page + offset * params.v_stride_token;
      for (const int end = std::min(count, j + params.page_size - offset); j < end; ++j) {
        visit(j, k_row, v_row);
        k_row += params.k_stride_token;
        v_row += params.v_stride_token;
      }
    }
  }
};

template <int kHeadDim, class T>
void fetch_block(const Keys<T>& keys, int begin, int count, Workspace& work) {
  keys.for_each(begin, count, [&](int j, const T* k, const T* v) {
    widen<kHeadDim>(k, work.k + j * kHeadDim);
    widen<kHeadDim>(v, work.v + j * kHeadDim);
  });
}

// The rows of a KV head lie too far apart for the hardware to foresee the next one.
template <int kHeadDim, class T>
void prefetch_block(const Keys<T>& keys, int begin, int count) {
  keys.for_each(begin, count, [&](int, const T* k, const T* v) {
    constexpr int kLine = 64 / sizeof(T);
    for (int d = 0; d < kHeadDim; d += kLine) {
      __builtin_prefetch(k + d);
      __builtin_prefetch(v + d);
    }
  });
}

// p[r, j] = q[r] . k[j] for kRows queries and kLanes / kRows keys.
template <int kRows, int kHeadDim>
inline void dot_tile(const float* q, const float* k, float* p) {
  constexpr int kKeys = kLanes / kRows;
  Vector sums[kLanes] = {};
  for (int d = 0; d < kHeadDim; d += kLanes) {
    Vector k_part[kKeys];
#pragma GCC unroll 16
    for (int j = 0; j < kKeys; ++j) k_part[j] = load(k + j * kHeadDim + d);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const Vector q_part = load(q + r * kHeadDim + d);
#pragma GCC unroll 16
      for (int j = 0; j < kKeys; ++j) sums[r * kKeys + j] += q_part * k_part[j];
    }
  }
  const Vector dots = sum_each(sums);
  float lanes[kLanes];
  store(lanes, dots);
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) __builtin_memcpy(p + r * kBlock, lanes + r * kKeys, kKeys * sizeof(float));
}

// o[r] = o[r] * scale[r] + sum_j p[r, j] v[j] for kRows queries and kVectors vectors of the head.
template <int kRows, int kVectors, int kHeadDim>
inline void weighted_sum_tile(const float* p, const float* v, int keys, const float* scale, float* o) {
  Vector sums[kRows][kVectors];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) sums[r][i] = load(o + r * kHeadDim + i * kLanes) * scale[r];
  }
  for (int j = 0; j < keys; ++j) {
    Vector v_part[kVectors];
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) v_part[i] = load(v + j * kHeadDim + i * kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const float weight = p[r * kBlock + j];
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; ++i) sums[r][i] += weight * v_part[i];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) store(o + r * kHeadDim + i * kLanes, sums[r][i]);
  }
}

// Logits of one query become weights; returns what its earlier output has to be multiplied with.
inline float softmax_step(const AttendParams& params, float* p, int first, int last, float& row_max, float& row_sum) {
  const float scale = params.logits_soft_cap > 0 ? params.sm_scale / params.logits_soft_cap : params.sm_scale * kLog2E;
  for (int j = 0; j < kBlock; j += kLanes) {
    Vector logits = load(p + j) * scale;
    if (params.logits_soft_cap > 0) logits = tanh(logits) * (params.logits_soft_cap * kLog2E);
    store(p + j, logits);
  }
  for (int j = 0; j < first; ++j) p[j] = kNoKeys;
  for (int j = last; j < kBlock; ++j) p[j] = kNoKeys;
  Vector max = load(p);
  for (int j = kLanes; j < kBlock; j += kLanes) {
    const Vector next = load(p + j);
    max = next > max ? next : max;
  }
  const float new_max = std::max(row_max, max_lane(max));
  Vector sum = {};
  for (int j = 0; j < kBlock; j += kLanes) {
    const Vector weights = exp2(load(p + j) - new_max);
    sum += weights;
    store(p + j, weights);
  }
  const float rescale = std::exp2(row_max - new_max);  // the first block has nothing to rescale: 2^-inf = 0
  row_max = new_max;
  row_sum = row_sum * rescale + sum_lanes(sum);
  return rescale;
}

template <int kRows, int kHeadDim>
inline void attend_rows(const AttendParams& params, Workspace& work, int m, int begin, int keys) {
  bool any = false;
  int first[kRows], last[kRows];
  for (int r = 0; r < kRows; ++r) {
    first[r] = std::clamp(work.visible[2 * (m + r)] - begin, 0, keys);
    last[r] = std::clamp(work.visible[2 * (m + r) + 1] - begin, 0, keys);
    any = any || first[r] < last[r];
  }
  if (!any) return;

  constexpr int kKeys = kLanes / kRows;
  for (int j = 0; j < keys; j += kKeys) {
    dot_tile<kRows, kHeadDim>(work.q + m * kHeadDim, work.k + j * kHeadDim, work.p + j);
  }
  float rescale[kRows];
  for (int r = 0; r < kRows; ++r) {
    float* p = work.p + r * kBlock;
    if (first[r] < last[r]) {
      rescale[r] = softmax_step(params, p, first[r], last[r], work.max[m + r], work.sum[m + r]);
    } else {
      rescale[r] = 1.f;
      std::fill(p, p + kBlock, 0.f);
    }
  }
  constexpr int kHeadVectors = kHeadDim / kLanes;
  constexpr int kVectors = kLanes < 16 ? 2 : kHeadVectors % 4 == 0 ? 4 : 3;
  for (int i = 0; i < kHeadVectors; i += kVectors) {
    const int d = i * kLanes;
    weighted_sum_tile<kRows, kVectors, kHeadDim>(work.p, work.v + d, keys, rescale, work.o + m * kHeadDim + d);
  }
}

template <int kHeadDim, int kRows = kMaxRows>
inline int attend_block(const AttendParams& params, Workspace& work, int m, int rows, int begin, int keys) {
  for (; m + kRows <= rows; m += kRows) attend_rows<kRows, kHeadDim>(params, work, m, begin, keys);
  if constexpr (kRows > 1) return attend_block<kHeadDim, kRows / 2>(params, work, m, rows, begin, keys);
  return m;
}

// ---------------------------------------------------------------------------------------------------------------------
// A tile
// ---------------------------------------------------------------------------------------------------------------------

template <class T, int kHeadDim>
void attend_tile(const AttendParams& params, const Tile& tile, std::vector<float>& buffer) {
  const Plan& plan = params.plan;
  const int group = params.num_qo_heads / params.num_kv_heads;
  const Row& row = plan.rows[tile.pair / params.num_kv_heads];
  const int kv_head = tile.pair % params.num_kv_heads;
  const int rows = row.q_count * group;
  Workspace work(buffer, rows, kHeadDim);

  // Queries, and the keys between first and last that any of them sees.
  int first = tile.kv_end, last = tile.kv_begin;
  for (int m = 0; m < rows; ++m) {
    const int64_t token = token_of(plan, row, m / group);
    const int64_t head = kv_head * group + m % group;
    const T* q = static_cast<const T*>(params.q) + token * params.q_stride_token + head * params.q_stride_head;
    widen<kHeadDim>(q, work.q + m * kHeadDim);
    work.max[m] = kNoKeys;
    work.sum[m] = 0;
    const int position = plan.positions[token] - row.kv_pos;
    const int begin = params.window_left < 0 ? 0 : position - params.window_left;
    const int end = params.causal ? position + 1 : tile.kv_end;
    work.visible[2 * m] = begin;
    work.visible[2 * m + 1] = end;
    first = std::min(first, begin);
    last = std::max(last, end);
  }
  std::fill(work.o, work.o + rows * kHeadDim, 0.f);
  first = tile.kv_begin + std::max(first - tile.kv_begin, 0) / kBlock * kBlock;  // whatever the queries beside one see
  last = std::min(last, tile.kv_end);

  const Keys<T> all_keys(params, row, kv_head);
  for (int begin = first; begin < last; begin += kBlock) {
    const int keys = std::min(kBlock, last - begin), next = begin + keys;
    fetch_block<kHeadDim>(all_keys, begin, keys, work);
    prefetch_block<kHeadDim>(all_keys, next, std::clamp(last - next, 0, kBlock));
    attend_block<kHeadDim>(params, work, 0, rows, begin, keys);
  }

  for (int m = 0; m < rows; ++m) {
    const float scale = work.sum[m] > 0 ? 1 / work.sum[m] : 0.f;
    const float lse = work.sum[m] > 0 ? work.max[m] + std::log2(work.sum[m]) : kNoKeys;
    const float* o = work.o + m * kHeadDim;
    if (tile.partial >= 0) {
      const int64_t partial = tile.partial + m;
      for (int d = 0; d < kHeadDim; ++d) params.partial_o[partial * kHeadDim + d] = o[d] * scale;
      params.partial_lse[partial] = lse;
    } else {
      const int64_t token = token_of(plan, row, m / group);
      const int64_t out_row = token * params.num_qo_heads + kv_head * group + m % group;
      T* out = static_cast<T*>(params.out) + out_row * kHeadDim;
      for (int d = 0; d < kHeadDim; ++d) out[d] = from_float<T>(o[d] * scale);
      if (params.lse) params.lse[out_row] = lse;
    }
  }
}

template <class T, int kHeadDim>
void attend_cta(const AttendParams& params, int cta) {
  thread_local std::vector<float> buffer;
  for (int i = params.plan.cta_indptr[cta]; i < params.plan.cta_indptr[cta + 1]; ++i) {
    attend_tile<T, kHeadDim>(params, params.plan.tiles[i], buffer);
  }
}

template <class T>
AttendCta attend_cta_of(int head_dim) {
  switch (head_dim) {
    case 64:
      return attend_cta<T, 64>;
    case 96:
      return attend_cta<T, 96>;
    case 128:
      return attend_cta<T, 128>;
    case 256:
      return attend_cta<T, 256>;
    default:
      return nullptr;
  }
}

inline AttendCta attend_cta_of(DType dtype, int head_dim) {
  switch (dtype) {
    case DType::bf16:
      return attend_cta_of<Bf16>(head_dim);
    case DType::fp16:
      return attend_cta_of<Fp16>(head_dim);
    case DType::fp32:
      return attend_cta_of<float>(head_dim);
  }
  return nullptr;
}
