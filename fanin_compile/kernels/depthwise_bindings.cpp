// The depthwise convolution op as a torch operator: checks, memory formats, threads. Its schema is in ops_depthwise.py.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/unsqueeze.h>
#include <torch/library.h>

#include <string_view>

#include "depthwise.h"
#include "torch_outputs.h"
#include "torch_types.h"

namespace {

namespace depthwise = fanin::depthwise;
using at::IntArrayRef;
using at::Tensor;
using fanin::OptTensor;
using fanin::format_of;
using Signature = Tensor(const Tensor&, const Tensor&, const OptTensor&, IntArrayRef, IntArrayRef, IntArrayRef,
                         std::string_view, const OptTensor&);

depthwise::Shape shape_of(const Tensor& x, const Tensor& weight, IntArrayRef stride, IntArrayRef padding,
                          IntArrayRef dilation) {
  const size_t dims = static_cast<size_t>(weight.dim()) - 2;
  TORCH_CHECK_VALUE(weight.dim() >= 3 && weight.dim() <= 5 && weight.size(1) == 1,
                    "fanin: weight must be [out, 1, kernel...] with 1 to 3 kernel sizes, got ", weight.sizes());
  TORCH_CHECK_VALUE(stride.size() == dims && padding.size() == 2 * dims && dilation.size() == dims, "fanin: stride ",
                    stride, " and dilation ", dilation, " must have ", dims, " elements each, padding ", padding, " ",
                    2 * dims);
  TORCH_CHECK_VALUE(x.dim() == weight.dim(), "fanin: x must have ", dims + 1, " or ", dims + 2, " dimensions, got ",
                    x.sizes());
  TORCH_CHECK_VALUE(x.size(1) >= 1 && weight.size(0) >= 1 && weight.size(0) % x.size(1) == 0, "fanin: weight has ",
                    weight.size(0), " rows, expected a multiple of x's ", x.size(1), " channels");
  depthwise::Shape s{};
  s.channels = x.size(1), s.multiplier = weight.size(0) / x.size(1);
  for (int d = 0; d < 3; ++d) {
    const int from = d - (3 - static_cast<int>(dims));
    const bool given = from >= 0;
    s.in[d] = given ? x.size(2 + from) : 1;
    s.kernel[d] = given ? weight.size(2 + from) : 1;
    s.stride[d] = given ? stride[from] : 1;
    s.dilation[d] = given ? dilation[from] : 1;
    s.before[d] = given ? padding[2 * from] : 0;
    const int64_t after = given ? padding[2 * from + 1] : 0;
    const int64_t room = s.in[d] + s.before[d] + after - s.dilation[d] * (s.kernel[d] - 1) - 1;
    TORCH_CHECK_VALUE(
        s.kernel[d] >= 1 && s.stride[d] >= 1 && s.dilation[d] >= 1 && s.before[d] >= 0 && after >= 0 && room >= 0,
        "fanin: kernel ", s.kernel[d], " with dilation ", s.dilation[d], ", stride ", s.stride[d], " and padding ",
        s.before[d], ", ", after, " does not fit an input of size ", s.in[d]);
    s.out[d] = room / s.stride[d] + 1;
  }
  return s;
}

Tensor run(const Tensor& x, const Tensor& weight, const OptTensor& bias, const depthwise::Shape& shape, IntArrayRef sizes,
           std::string_view activation, const OptTensor& residual) {
  const at::MemoryFormat wanted = format_of(x);
  // with a multiplier, neighbouring output channels do not read neighbouring channels of x
  const bool planar = wanted == at::MemoryFormat::Contiguous || shape.multiplier > 1;
  const at::MemoryFormat format = planar ? at::MemoryFormat::Contiguous : wanted;
  Tensor y = fanin::empty_output(sizes, x.scalar_type(), format);
  if (y.numel() == 0) return y.contiguous(wanted);
  const Tensor xc = x.contiguous(format), wc = weight.contiguous(), bc = bias ? bias->contiguous() : Tensor();
  const Tensor rc = residual ? residual->contiguous(format) : Tensor();
  const int64_t batch = x.size(0);
  const depthwise::Op op{shape, xc.const_data_ptr<float>(), wc.const_data_ptr<float>(),
                         bias ? bc.const_data_ptr<float>() : nullptr, residual ? rc.const_data_ptr<float>() : nullptr,
                         y.mutable_data_ptr<float>(), batch, fanin::act_of(activation)};
  const int64_t floats = planar ? depthwise::scratch_floats(shape) : depthwise::scratch_floats_last(shape);
  const int64_t items = batch * (planar ? shape.out_channels() : shape.out[0] * shape.out[1]);
  fanin::share_out(items, y.numel() * shape.taps(), [&](int64_t first, int64_t last) {
    (planar ? depthwise::run_planes : depthwise::run_rows)(op, first, last, fanin::scratch(floats));
  });
  return y.contiguous(wanted);
}

Tensor depthwise_conv_cpu(const Tensor& x, const Tensor& weight, const OptTensor& bias, IntArrayRef stride,
                          IntArrayRef padding, IntArrayRef dilation, std::string_view activation,
                          const OptTensor& residual) {
  const auto fp32 = [](const OptTensor& t) { return !t || t->scalar_type() == at::kFloat; };
  if (!fp32(x) || !fp32(weight) || !fp32(bias) || !fp32(residual)) {
    static const auto reference = fanin::handle_of<Signature>("fanin::depthwise_conv_reference");
    return reference.call(x, weight, bias, stride, padding, dilation, activation, residual);
  }
  const bool unbatched = x.dim() + 1 == weight.dim();
  const Tensor images = unbatched ? at::unsqueeze(x, 0) : x;
  const depthwise::Shape shape = shape_of(images, weight, stride, padding, dilation);
  TORCH_CHECK_VALUE(!bias || bias->numel() == shape.out_channels(), "fanin: bias must have ", shape.out_channels(),
                    " elements, got ", bias->sizes());
  at::DimVector sizes{images.size(0), shape.out_channels()};
  sizes.insert(sizes.end(), shape.out.end() - (images.dim() - 2), shape.out.end());
  const OptTensor added = residual && unbatched ? OptTensor(at::unsqueeze(*residual, 0)) : residual;
  TORCH_CHECK_VALUE(!added || added->sizes() == IntArrayRef(sizes), "fanin: residual must have the output's shape ",
                    IntArrayRef(sizes), ", got ", added->sizes());
  const Tensor y = run(images, weight, bias, shape, sizes, activation, added);
  return unbatched ? y.squeeze(0) : y;
}

// Below autograd unless a gradient is asked for; then ops_depthwise.py's autograd function takes over.
Tensor depthwise_conv_autograd(c10::DispatchKeySet keys, const Tensor& x, const Tensor& weight, const OptTensor& bias,
                               IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, std::string_view activation,
                               const OptTensor& residual) {
  if (fanin::wants_grad(x, weight, bias, residual)) {
    static const auto with_grad = fanin::handle_of<Signature>("fanin::depthwise_conv_with_grad");
    return with_grad.call(x, weight, bias, stride, padding, dilation, activation, residual);
  }
  static const auto op = fanin::handle_of<Signature>("fanin::depthwise_conv");
  at::AutoDispatchBelowADInplaceOrView guard;
  return op.redispatch(keys & c10::after_autograd_keyset, x, weight, bias, stride, padding, dilation, activation, residual);
}

}  // namespace

TORCH_LIBRARY_IMPL(fanin, CPU, m) { m.impl("depthwise_conv", depthwise_conv_cpu); }

TORCH_LIBRARY_IMPL(fanin, AutogradCPU, m) { m.impl("depthwise_conv", depthwise_conv_autograd); }
