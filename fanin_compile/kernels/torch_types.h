// What the torch bindings share: torch's types and names as the kernels' own. Includes torch headers.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <utility>

#include "linear.h"

namespace fanin {

using OptTensor = std::optional<at::Tensor>;

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

}  // namespace fanin
