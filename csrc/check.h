// Argument checks of the ops. Each message names the op, the argument, what was expected, what came and what to do.
// No torch here: ops/tensors.h describes a tensor as a TensorArg.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <span>
#include <sstream>
#include <stdexcept>
#include <string>

namespace flashcore {

enum class Scalar : int32_t {
  bf16 = 0,
  fp16 = 1,
  fp32 = 2,
  int32 = 3,
  int64 = 4,
  fp8 = 5,
  other = 6
};  // bf16..fp32: as DType

inline const char* name_of(Scalar scalar) {
  constexpr const char* kNames[] = {"bfloat16", "float16",       "float32",      "int32",
                                    "int64",    "float8_e4m3fn", "another dtype"};
  return kNames[static_cast<int32_t>(scalar)];
}

constexpr int kCpu = -1;  // TensorArg::device of a CPU tensor; CUDA tensors have their index
constexpr int64_t kAnySize = -1;

struct TensorArg {
  const char* op;
  const char* name;
  void* data;
  Scalar scalar;
  int device;
  std::span<const int64_t> sizes;
  std::span<const int64_t> strides;

  int64_t size(int dim) const { return sizes[dim]; }
  int64_t numel() const {
    int64_t n = 1;
    for (int64_t s : sizes) n *= s;
    return n;
  }
  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

template <class... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream message;
  message << "flashcore." << op << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

template <class... Parts>
void require(bool condition, const char* op, const Parts&... parts) {
  if (!condition) fail(op, parts...);
}

inline std::string shape_text(std::span<const int64_t> sizes) {
  std::ostringstream text;
  text << "[";
  for (size_t i = 0; i < sizes.size(); ++i) {
    text << (i ? ", " : "");
    if (sizes[i] == kAnySize) {
      text << "any";
    } else {
      text << sizes[i];
    }
  }
  text << "]";
  return text.str();
}

inline void require_shape(const TensorArg& arg, std::initializer_list<int64_t> expected, const char* meaning) {
  bool equal = arg.sizes.size() == expected.size();
  size_t dim = 0;
  for (int64_t size : expected) {
    if (!equal) break;
    equal = size == kAnySize || size == arg.sizes[dim];
    ++dim;
  }
  if (!equal) {
    fail(arg.op, arg.name, ": expected shape ", shape_text({expected.begin(), expected.size()}), " ", meaning, ", got ",
         shape_text(arg.sizes), "; pass tensors that agree with each other and with the plan");
  }
}

inline void require_scalar(const TensorArg& arg, std::initializer_list<Scalar> allowed) {
  std::ostringstream names;
  for (Scalar scalar : allowed) {
    if (scalar == arg.scalar) return;
    names << (names.tellp() > 0 ? " or " : "") << name_of(scalar);
  }
  fail(arg.op, arg.name, ": expected ", names.str(), ", got ", name_of(arg.scalar), "; cast the tensor");
}

inline std::string device_text(int device) { return device == kCpu ? "cpu" : "cuda:" + std::to_string(device); }

inline void require_device(const TensorArg& arg, int device) {
  if (arg.device != device) {
    fail(arg.op, arg.name, ": expected a tensor on ", device_text(device), ", got one on ", device_text(arg.device),
         "; move it there");
  }
}

inline void require_contiguous(const TensorArg& arg) {
  int64_t stride = 1;
  for (size_t dim = arg.sizes.size(); dim-- > 0;) {
    if (arg.sizes[dim] != 1 && arg.strides[dim] != stride) {
      fail(arg.op, arg.name, ": expected a contiguous tensor, got strides ", shape_text(arg.strides), " for shape ",
           shape_text(arg.sizes), "; call .contiguous() or allocate it so");
    }
    stride *= arg.sizes[dim];
    if (stride == 0) return;
  }
}

inline void require_unit_last_stride(const TensorArg& arg) {
  if (arg.strides.back() != 1) {
    fail(arg.op, arg.name, ": expected the last dimension to be contiguous, got strides ", shape_text(arg.strides),
         "; call .contiguous()");
  }
}

// A buffer whose size is a capacity: int32, contiguous, on the device, at least `count` entries.
inline void require_buffer(const TensorArg& arg, int64_t count, int device, Scalar scalar = Scalar::int32) {
  require_scalar(arg, {scalar});
  require_device(arg, device);
  require_contiguous(arg);
  if (arg.numel() < count) {
    fail(arg.op, arg.name, ": expected at least ", count, " entries, got ", arg.numel(),
         "; allocate the plan for a larger capacity");
  }
}

// Vector loads and TMA read 16 bytes at a time: the base and every stride have to be multiples of that.
inline void require_16_byte_rows(const TensorArg& arg, int64_t element_size) {
  bool aligned = reinterpret_cast<uintptr_t>(arg.data) % 16 == 0;
  for (size_t dim = 0; dim + 1 < arg.strides.size(); ++dim) {
    aligned = aligned && (arg.sizes[dim] <= 1 || arg.strides[dim] * element_size % 16 == 0);
  }
  if (!aligned) {
    fail(arg.op, arg.name, ": expected the data and every stride to be multiples of 16 bytes, got strides ",
         shape_text(arg.strides), " of ", element_size, " bytes; call .contiguous()");
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// What every op over q and a paged cache asks of them
// ---------------------------------------------------------------------------------------------------------------------

inline int64_t element_size(Scalar scalar) { return scalar == Scalar::fp32 ? 4 : 2; }

inline void require_float(const TensorArg& arg) {
  if (arg.device == kCpu) {
    require_scalar(arg, {Scalar::bf16, Scalar::fp16, Scalar::fp32});
  } else {
    require_scalar(arg, {Scalar::bf16, Scalar::fp16});
  }
}

inline void require_cache(const TensorArg& arg, const TensorArg& like, int64_t head_dim) {
  require_shape(arg, {kAnySize, kAnySize, kAnySize, head_dim}, "(pages, page_size, kv_heads, head_dim)");
  require_scalar(arg, {like.scalar});
  require_device(arg, like.device);
  require_unit_last_stride(arg);
  if (arg.device != kCpu) require_16_byte_rows(arg, element_size(arg.scalar));
}

inline void require_q(const TensorArg& q) {
  require_shape(q, {kAnySize, kAnySize, kAnySize}, "(tokens, heads, head_dim)");
  require_float(q);
  require_unit_last_stride(q);
  if (q.device != kCpu) require_16_byte_rows(q, element_size(q.scalar));
}

inline int32_t require_group(const char* op, int64_t num_qo_heads, int64_t num_kv_heads) {
  require(num_kv_heads > 0 && num_qo_heads % num_kv_heads == 0, op,
          "heads: expected the query heads to be a multiple of ", num_kv_heads, " KV heads, got ", num_qo_heads,
          "; pass q and the cache of the same layer");
  return static_cast<int32_t>(num_qo_heads / num_kv_heads);
}

}  // namespace flashcore
