// The convolution op as a torch operator: checks, memory formats, threads. Its schema is in ops_conv.py.
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/unsqueeze.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <optional>
#include <string_view>

#include "conv_plans.h"
#include "torch_types.h"

namespace {

namespace conv = fanin::conv;
using at::IntArrayRef;
using at::Tensor;
using fanin::OptTensor;
using fanin::act_of;
using fanin::dtype_of;
using fanin::itype_of;
using Signature = Tensor(const Tensor&, const Tensor&, const Tensor&, const OptTensor&, const OptTensor&, const OptTensor&,
                         IntArrayRef, IntArrayRef, IntArrayRef, IntArrayRef, int64_t, std::string_view, const OptTensor&);

c10::TypedOperatorHandle<Signature> handle(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

conv::Plans& plans() {
  static auto* kept = new conv::Plans;         // never destroyed: threads may outlive static destructors
  return *kept;
}

const int32_t* ints(const OptTensor& t, int64_t length, const char* what) {
  if (!t) return nullptr;
  TORCH_CHECK_VALUE(t->scalar_type() == at::kInt && t->numel() == length && t->is_contiguous(), "fanin: ", what,
                    " must be a contiguous int32 tensor of ", length, " elements, got ", t->scalar_type(), " ", t->sizes());
  return t->const_data_ptr<int32_t>();
}

conv::Shape shape_of(const Tensor& x, IntArrayRef weight, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                     int64_t groups) {
  const size_t dims = weight.size() - 2;
  TORCH_CHECK_VALUE(weight.size() >= 3 && weight.size() <= 5, "fanin: weight_shape must be [out, in / groups, kernel...] with ",
                    "1 to 3 kernel sizes, got ", weight);
  TORCH_CHECK_VALUE(stride.size() == dims && padding.size() == dims && dilation.size() == dims, "fanin: stride ", stride,
                    ", padding ", padding, " and dilation ", dilation, " must have ", dims, " elements each");
  TORCH_CHECK_VALUE(x.dim() == static_cast<int64_t>(dims) + 2, "fanin: x must have ", dims + 1, " or ", dims + 2,
                    " dimensions, got ", x.sizes());
  TORCH_CHECK_VALUE(groups >= 1 && weight[0] % groups == 0 && x.size(1) == weight[1] * groups, "fanin: x has ", x.size(1),
                    " channels, expected groups * weight_shape[1] = ", groups, " * ", weight[1], "; weight_shape[0] = ",
                    weight[0], " must be a multiple of groups");
  conv::Shape s{};
  s.images = 1;
  while (2 * s.images <= std::min(x.size(0), conv::kMaxLanes)) s.images *= 2;
  s.in_channels = x.size(1), s.out_channels = weight[0], s.groups = groups;
  for (int d = 0; d < 3; ++d) {
    const int from = d - (3 - static_cast<int>(dims));
    const bool given = from >= 0;
    s.in[d] = given ? x.size(2 + from) : 1;
    s.kernel[d] = given ? weight[2 + from] : 1;
    s.stride[d] = given ? stride[from] : 1;
    s.padding[d] = given ? padding[from] : 0;
    s.dilation[d] = given ? dilation[from] : 1;
    const int64_t room = s.in[d] + 2 * s.padding[d] - s.dilation[d] * (s.kernel[d] - 1) - 1;
    TORCH_CHECK_VALUE(s.kernel[d] >= 1 && s.stride[d] >= 1 && s.dilation[d] >= 1 && s.padding[d] >= 0 && room >= 0,
                      "fanin: kernel ", s.kernel[d], " with dilation ", s.dilation[d], ", stride ", s.stride[d],
                      " and padding ", s.padding[d], " does not fit an input of size ", s.in[d]);
    s.out[d] = room / s.stride[d] + 1;
  }
  return s;
}

at::MemoryFormat format_of(const Tensor& x) {
  if (x.is_contiguous()) return at::MemoryFormat::Contiguous;
  return x.suggest_memory_format();
}

Tensor run(const Tensor& x, const Tensor& values, const Tensor& indices, const fanin::DType x_type,
           const fanin::DType value_type, const OptTensor& row_ptr, const OptTensor& rows, const OptTensor& bias,
           const conv::Shape& shape, IntArrayRef out_sizes, std::string_view activation, const OptTensor& residual) {
  const at::MemoryFormat format = format_of(x);
  Tensor y = at::detail::empty_cpu(out_sizes, x.scalar_type(), {}, {}, {}, format);
  if (y.numel() == 0) return y;
  const Tensor xc = x.contiguous(format), vc = values.contiguous(), ic = indices.contiguous();
  const Tensor bc = bias ? bias->contiguous() : Tensor();
  const Tensor rc = residual ? residual->to(x.scalar_type()).contiguous(format) : Tensor();
  const bool channels_last = format != at::MemoryFormat::Contiguous;
  const int64_t batch = x.size(0), n = row_ptr ? row_ptr->numel() - 1 : indices.size(0);
  const int64_t work = batch * indices.numel() * shape.pixels_out();
  constexpr int64_t kWorthThreads = 1 << 16;    // multiply-adds

  const conv::Request request{ic, vc,
                        {ic.const_data_ptr(), vc.const_data_ptr(), ints(row_ptr, n + 1, "row_ptr"), ints(rows, n, "rows"), n,
                         row_ptr ? 0 : indices.size(1), itype_of(ic), value_type},
                        conv::flatten_pointwise(shape),
                        batch,
                        work < kWorthThreads ? 1 : at::get_num_threads()};
  const std::shared_ptr<const conv::Plan> plan = plans().find(request);
  if (!plan) return Tensor();

  conv::Op op{};
  op.plan = plan.get(), op.batch = batch, op.channels_last = channels_last, op.act = act_of(activation);
  op.x = xc.const_data_ptr(), op.x_type = x_type;
  op.bias = bias ? bc.const_data_ptr() : nullptr, op.bias_type = bias ? *dtype_of(bc) : fanin::DType::f32;
  op.residual = residual ? rc.const_data_ptr() : nullptr;
  op.y = y.mutable_data_ptr();

  const conv::Layout& l = plan->layout;
  const int64_t split = request.split(l), per = plan->blocks() / split, groups = (batch + l.images - 1) / l.images;
  const auto items = [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) {
      const int64_t part = i % split, unit = i / split % l.units(), image = i / split / l.units() * l.images;
      float* scratch = fanin::scratch(conv::scratch_floats(*plan, part * per, (part + 1) * per));
      conv::run(op, image, unit, part * per, (part + 1) * per, scratch);
    }
  };
  const auto spread = [&](int64_t count, const auto& f) {
    if (count <= 1 || request.threads == 1) f(0, count);
    else at::parallel_for(0, count, 1, f);
  };
  if (per > 0) spread(groups * l.units() * split, items);
  if (!plan->dead.empty())
    spread(batch, [&](int64_t from, int64_t to) {
      for (int64_t image = from; image < to; ++image) conv::run_dead(op, image);
    });
  return y;
}

Tensor gather_conv_cpu(const Tensor& x, const Tensor& values, const Tensor& indices, const OptTensor& row_ptr,
                       const OptTensor& rows, const OptTensor& bias, IntArrayRef weight_shape, IntArrayRef stride,
                       IntArrayRef padding, IntArrayRef dilation, int64_t groups, std::string_view activation,
                       const OptTensor& residual) {
  const auto reference = [&] {
    static const auto op = handle("fanin::gather_conv_reference");
    return op.call(x, values, indices, row_ptr, rows, bias, weight_shape, stride, padding, dilation, groups, activation,
                   residual);
  };
  const auto x_type = dtype_of(x), value_type = dtype_of(values);
  if (!x_type || !value_type || (bias && !dtype_of(*bias))) return reference();
  TORCH_CHECK_VALUE(indices.dim() == (row_ptr ? 1 : 2) && values.sizes() == indices.sizes(), "fanin: values ", values.sizes(),
                    " and indices ", indices.sizes(), " must both be [rows, k], or [nnz] with row_ptr");
  TORCH_CHECK_VALUE(indices.numel() <= std::numeric_limits<int32_t>::max(), "fanin: at most 2^31 - 1 non-zeros, got ",
                    indices.numel());
  const bool unbatched = x.dim() + 1 == static_cast<int64_t>(weight_shape.size());
  const Tensor images = unbatched ? at::unsqueeze(x, 0) : x;
  const conv::Shape shape = shape_of(images, weight_shape, stride, padding, dilation, groups);
  const int64_t n = row_ptr ? row_ptr->numel() - 1 : indices.size(0);
  TORCH_CHECK_VALUE(rows || n == shape.out_channels, "fanin: without rows, there must be weight_shape[0] = ",
                    shape.out_channels, " condensed rows, got ", n);
  TORCH_CHECK_VALUE(!bias || bias->numel() == shape.out_channels, "fanin: bias must have ", shape.out_channels,
                    " elements, got ", bias->sizes());
  at::DimVector sizes{images.size(0), shape.out_channels};
  sizes.insert(sizes.end(), shape.out.end() - (images.dim() - 2), shape.out.end());
  const OptTensor added = residual && unbatched ? OptTensor(at::unsqueeze(*residual, 0)) : residual;
  TORCH_CHECK_VALUE(!added || added->sizes() == IntArrayRef(sizes), "fanin: residual must have the output's shape ",
                    IntArrayRef(sizes), ", got ", added->sizes());
  const Tensor y = run(images, values, indices, *x_type, *value_type, row_ptr, rows, bias, shape, sizes, activation, added);
  if (!y.defined()) return reference();         // one channel of one tile is beyond 16-bit offsets
  return unbatched ? y.squeeze(0) : y;
}

// Below autograd unless a gradient is asked for; then ops_conv.py's autograd function takes over.
Tensor gather_conv_autograd(c10::DispatchKeySet keys, const Tensor& x, const Tensor& values, const Tensor& indices,
                            const OptTensor& row_ptr, const OptTensor& rows, const OptTensor& bias, IntArrayRef weight_shape,
                            IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups,
                            std::string_view activation, const OptTensor& residual) {
  const auto wants = [](const OptTensor& t) { return t && t->requires_grad(); };
  if (at::GradMode::is_enabled() && (x.requires_grad() || values.requires_grad() || wants(bias) || wants(residual))) {
    static const auto with_grad = handle("fanin::gather_conv_with_grad");
    return with_grad.call(x, values, indices, row_ptr, rows, bias, weight_shape, stride, padding, dilation, groups, activation,
                          residual);
  }
  static const auto op = handle("fanin::gather_conv");
  at::AutoDispatchBelowADInplaceOrView guard;
  return op.redispatch(keys & c10::after_autograd_keyset, x, values, indices, row_ptr, rows, bias, weight_shape, stride, padding,
                       dilation, groups, activation, residual);
}

}  // namespace

TORCH_LIBRARY_IMPL(fanin, CPU, m) {
  m.impl("gather_conv", gather_conv_cpu);
}

TORCH_LIBRARY_IMPL(fanin, AutogradCPU, m) { m.impl("gather_conv", gather_conv_autograd); }

TORCH_LIBRARY_IMPL(fanin, CompositeExplicitAutograd, m) {
  m.impl("gather_conv_plan_nbytes", []() -> int64_t { return plans().nbytes(); });
  m.impl("gather_conv_scratch_nbytes", []() -> int64_t { return plans().scratch_nbytes(); });
}
