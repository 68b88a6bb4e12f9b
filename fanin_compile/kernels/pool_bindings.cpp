// The max pooling op as a torch operator: checks, threads. Its schema is in ops_pool.py.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <string_view>

#include "pool.h"
#include "torch_outputs.h"
#include "torch_types.h"

namespace {

namespace pool = fanin::pool;
using at::IntArrayRef;
using at::Tensor;
using Signature = Tensor(const Tensor&, IntArrayRef, IntArrayRef, IntArrayRef, IntArrayRef, bool, std::string_view);

pool::Shape shape_of(const Tensor& x, IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                     bool ceil_mode) {
  const size_t dims = kernel.size();
  TORCH_CHECK_VALUE(dims >= 1 && dims <= 3 && stride.size() == dims && padding.size() == dims && dilation.size() == dims,
                    "fanin: kernel ", kernel, ", stride ", stride, ", padding ", padding, " and dilation ", dilation,
                    " must have one number for each of 1 to 3 dimensions");
  const int64_t missing = 3 - static_cast<int64_t>(dims), leading = x.dim() - static_cast<int64_t>(dims);
  TORCH_CHECK_VALUE(leading == 1 || leading == 2, "fanin: x must have ", dims + 1, " or ", dims + 2, " dimensions, got ",
                    x.sizes());
  pool::Shape s{};
  for (int64_t d = 0; d < 3; ++d) {
    const int64_t from = d - missing;
    const bool given = from >= 0;
    s.in[d] = given ? x.size(leading + from) : 1;
    s.kernel[d] = given ? kernel[from] : 1;
    s.stride[d] = given ? stride[from] : 1;
    s.before[d] = given ? padding[from] : 0;
    s.dilation[d] = given ? dilation[from] : 1;
    TORCH_CHECK_VALUE(s.kernel[d] >= 1 && s.stride[d] >= 1 && s.dilation[d] >= 1, "fanin: kernel ", s.kernel[d],
                      ", stride ", s.stride[d], " and dilation ", s.dilation[d], " must be positive");
    const int64_t reach = s.dilation[d] * (s.kernel[d] - 1) + 1, room = s.in[d] + 2 * s.before[d] - reach;
    TORCH_CHECK_VALUE(s.before[d] >= 0 && s.before[d] <= s.kernel[d] / 2, "fanin: padding ", s.before[d],
                      " must be 0 to half of the kernel's ", s.kernel[d]);
    TORCH_CHECK_VALUE(s.in[d] >= 1 && (room >= 0 || (ceil_mode && room + s.stride[d] > 0)), "fanin: kernel ", s.kernel[d],
                      " with dilation ", s.dilation[d], ", stride ", s.stride[d], " and padding ", s.before[d],
                      " does not fit an input of size ", s.in[d]);
    s.out[d] = (room + (ceil_mode ? s.stride[d] - 1 : 0)) / s.stride[d] + 1;
    // the last window begins in x or in front of it
    if (ceil_mode && (s.out[d] - 1) * s.stride[d] >= s.in[d] + s.before[d]) --s.out[d];
  }
  return s;
}

Tensor max_pool_cpu(const Tensor& x, IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                    bool ceil_mode, std::string_view activation) {
  if (x.scalar_type() != at::kFloat || fanin::format_of(x) != at::MemoryFormat::Contiguous) {
    static const auto reference = fanin::handle_of<Signature>("fanin::max_pool_reference");
    return reference.call(x, kernel, stride, padding, dilation, ceil_mode, activation);
  }
  const pool::Shape shape = shape_of(x, kernel, stride, padding, dilation, ceil_mode);
  const auto leading = x.sizes().slice(0, x.dim() - kernel.size());
  at::DimVector sizes(leading.begin(), leading.end());
  sizes.insert(sizes.end(), shape.out.end() - kernel.size(), shape.out.end());
  const fanin::Act act = fanin::act_of(activation);
  Tensor y = fanin::empty_output(sizes, x.scalar_type());
  if (y.numel() == 0) return y;
  const Tensor xc = x.contiguous();
  const pool::Op op{shape, xc.const_data_ptr<float>(), y.mutable_data_ptr<float>(), act};
  fanin::share_out(c10::multiply_integers(leading), y.numel() * shape.taps(), [&](int64_t first, int64_t last) {
    pool::run_planes(op, first, last, fanin::scratch(pool::scratch_floats(shape)));
  });
  return y;
}

// Below autograd unless a gradient is asked for; then ops_pool.py's autograd function takes over.
Tensor max_pool_autograd(c10::DispatchKeySet keys, const Tensor& x, IntArrayRef kernel, IntArrayRef stride,
                         IntArrayRef padding, IntArrayRef dilation, bool ceil_mode, std::string_view activation) {
  if (fanin::wants_grad(x)) {
    static const auto with_grad = fanin::handle_of<Signature>("fanin::max_pool_with_grad");
    return with_grad.call(x, kernel, stride, padding, dilation, ceil_mode, activation);
  }
  static const auto op = fanin::handle_of<Signature>("fanin::max_pool");
  at::AutoDispatchBelowADInplaceOrView guard;
  return op.redispatch(keys & c10::after_autograd_keyset, x, kernel, stride, padding, dilation, ceil_mode, activation);
}

}  // namespace

TORCH_LIBRARY_IMPL(fanin, CPU, m) { m.impl("max_pool", max_pool_cpu); }

TORCH_LIBRARY_IMPL(fanin, AutogradCPU, m) { m.impl("max_pool", max_pool_autograd); }
