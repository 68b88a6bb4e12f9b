// Run-time types to template arguments: with_dtype(type, [&](auto zero) { using T = decltype(zero); ... }).
#pragma once

#include <type_traits>

#include "linear.h"
#include "vec.h"

namespace fanin {

template <class F>
FANIN_INLINE decltype(auto) with_dtype(DType type, F&& f) {
  switch (type) {
    case DType::bf16: return f(bf16{});
    case DType::f16: return f(f16{});
    default: return f(float{});
  }
}

template <class F>
FANIN_INLINE decltype(auto) with_act(Act act, F&& f) {
  switch (act) {
    case Act::relu: return f(std::integral_constant<Act, Act::relu>{});
    case Act::relu6: return f(std::integral_constant<Act, Act::relu6>{});
    case Act::gelu: return f(std::integral_constant<Act, Act::gelu>{});
    case Act::gelu_tanh: return f(std::integral_constant<Act, Act::gelu_tanh>{});
    case Act::silu: return f(std::integral_constant<Act, Act::silu>{});
    case Act::hardswish: return f(std::integral_constant<Act, Act::hardswish>{});
    case Act::sigmoid: return f(std::integral_constant<Act, Act::sigmoid>{});
    case Act::tanh: return f(std::integral_constant<Act, Act::tanh>{});
    default: return f(std::integral_constant<Act, Act::none>{});
  }
}

}  // namespace fanin
