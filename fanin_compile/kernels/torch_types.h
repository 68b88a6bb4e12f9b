// What the torch bindings share: torch's types and names as the kernels' own, threads. Includes torch headers.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>

#include <optional>
#include <string_view>
#include <utility>

#include "linear.h"

namespace fanin {

using OptTensor = std::optional<at::Tensor>;

template <class Signature>
c10::TypedOperatorHandle<Signature> handle_of(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

inline bool requires_grad(const at::Tensor& t) { return t.requires_grad(); }
inline bool requires_grad(const OptTensor& t) { return t && t->requires_grad(); }

// Whether autograd has work with any of these tensors.
template <class... T>
bool wants_grad(const T&... tensors) { return at::GradMode::is_enabled() && (requires_grad(tensors) || ...); }

// channels_last only where x is not contiguous as well
inline at::MemoryFormat format_of(const at::Tensor& x) {
  return x.is_contiguous() ? at::MemoryFormat::Contiguous : x.suggest_memory_format();
}

// x as [batch, in] with unit column stride; a copy only where no such view exists
inline at::Tensor as_matrix(const at::Tensor& x) {
  if (x.dim() == 2 ? x.stride(1) == 1 || x.size(1) <= 1 : x.is_contiguous()) return x;
  return x.contiguous();
}

inline std::optional<DType> dtype_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat: return DType::f32;
    case at::kBFloat16: return DType::bf16;
    case at::kHalf: return DType::f16;
    default: return std::nullopt;
  }
}

inline Act act_of(std::string_view name) {
  static constexpr std::pair<std::string_view, Act> table[] = {
      {"none", Act::none}, {"relu", Act::relu}, {"relu6", Act::relu6},
      {"gelu", Act::gelu}, {"gelu_tanh", Act::gelu_tanh}, {"silu", Act::silu},
      {"hardswish", Act::hardswish}, {"sigmoid", Act::sigmoid}, {"tanh", Act::tanh}};
  for (const auto& [key, act] : table)
    if (key == name) return act;
  TORCH_CHECK_VALUE(false, "fanin: unknown activation '", name, "'");
}

// part(first, last) over items, one part for each thread; `work`, in multiply-adds or the like, tells whether threads pay.
template <class F>
void share_out(int64_t items, int64_t work, const F& part) {
  constexpr int64_t kWorthThreads = 1 << 16;
  const int64_t threads = at::get_num_threads();
  if (work < kWorthThreads || threads == 1) part(0, items);
  else at::parallel_for(0, items, (items + threads - 1) / threads, part);
}

}  // namespace fanin
