// The convolution op as a torch operator: checks, memory formats, threads. Its schema is in ops_conv.py.
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/unsqueeze.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <numeric>
#include <optional>
#include <string_view>

#include "conv_geometries.h"
#include "torch_outputs.h"
#include "torch_types.h"

namespace {

namespace conv = fanin::conv;
using at::IntArrayRef;
using at::Tensor;
using fanin::OptTensor;
using fanin::format_of;
using fanin::act_of;
using fanin::dtype_of;
using Signature = Tensor(const Tensor&, const Tensor&, const Tensor&, const OptTensor&, IntArrayRef, IntArrayRef, IntArrayRef,
                         IntArrayRef, int64_t, std::string_view, const OptTensor&);

conv::Geometries& geometries() {
  static auto* kept = new conv::Geometries;    // never destroyed: threads may outlive static destructors
  return *kept;
}

// The header of a packed weight, checked as far as can be in no time: packing_conv.py wrote what it describes.
const conv::Structure& structure_of(const Tensor& structure, const Tensor& values) {
  const auto bytes = static_cast<int64_t>(structure.numel());
  TORCH_CHECK_VALUE(structure.scalar_type() == at::kByte && structure.is_contiguous() &&
                        bytes >= static_cast<int64_t>(sizeof(conv::Structure)),
                    "fanin: structure must be a packed convolution's, got ", structure.scalar_type(), " ", structure.sizes());
  const auto& s = *static_cast<const conv::Structure*>(structure.const_data_ptr());
  TORCH_CHECK_VALUE(s.version == conv::Structure::kVersion && s.bytes == bytes,
                    "fanin: structure was packed by another version or is cut off: pack the condensed weight anew");
  // packing_conv.py checks the rest where a structure is read from outside
  const bool ordered = s.rows_at >= 0 && s.stages_at >= s.rows_at && s.counts_at >= s.stages_at && s.order_at >= s.counts_at &&
                       s.codes_at >= s.order_at && s.entries >= 0 && s.codes_at + 2 * s.entries <= bytes;
  TORCH_CHECK_VALUE(ordered && s.blocks >= 1 && s.chunk >= 1 && s.live >= 0 && s.live <= s.out &&
                        (s.together == 1 || s.together == conv::kTogether),
                    "fanin: the structure is damaged: pack the condensed weight anew");
  TORCH_CHECK_VALUE(values.dim() == 1 && values.is_contiguous() && values.numel() >= s.entries,
                    "fanin: values must be contiguous with at least ", s.entries, " elements, got ", values.sizes());
  return s;
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

// What depends on the threads alone: parts into which units are cut, so that all of them have work. Packing x is repeated
// in each.
int64_t split_of(int64_t items, int64_t most, int64_t threads) {
  int64_t parts = 1;
  while (parts < std::min(threads, most) && items * parts < 4 * threads && items * parts % threads != 0) ++parts;
  return parts;
}

void run(const conv::Op& op, int64_t threads) {
  const conv::Layout& l = op.geometry->layout;
  const conv::Kernels& kernels = *op.geometry->kernels;
  const conv::Structure& w = *op.weight;
  const int64_t items = (op.batch + l.images - 1) / l.images * l.units(), split = split_of(items, l.parts(w.blocks), threads);
  const auto spread = [&](int64_t count, const auto& f) {
    if (count <= 1 || threads == 1) f(0, count);
    else at::parallel_for(0, count, 1, f);
  };
  const int64_t floats = kernels.scratch_floats(op);
  if (w.live > 0)
    spread(items * split, [&](int64_t from, int64_t to) {
      float* scratch = fanin::scratch(floats);
      for (int64_t i = from; i < to; ++i) {
        const int64_t part = i % split, unit = i / split % l.units(), image = i / split / l.units() * l.images;
        kernels.run(op, image, unit, {part, split}, scratch);
      }
    });
  if (w.live < w.out)
    spread(op.batch, [&](int64_t from, int64_t to) {
      for (int64_t image = from; image < to; ++image) kernels.run_dead(op, image);
    });
}

// Whether y has the shape, type and strides of the output that a call would allocate.
bool fits(const Tensor& y, IntArrayRef sizes, const Tensor& x, at::MemoryFormat format) {
  return y.sizes() == sizes && y.scalar_type() == x.scalar_type() && y.is_contiguous(format);
}

// into: written instead of a new tensor where that is possible. An undefined tensor if there is no kernel for it.
Tensor compute(const Tensor& x, const Tensor& values, const Tensor& structure, const OptTensor& bias, IntArrayRef weight_shape,
               IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups, std::string_view activation,
               const OptTensor& residual, const Tensor& into) {
  const auto x_type = dtype_of(x), value_type = dtype_of(values);
  if (!x_type || !value_type || (bias && !dtype_of(*bias))) return {};
  const conv::Structure& weight = structure_of(structure, values);
  const bool unbatched = x.dim() + 1 == static_cast<int64_t>(weight_shape.size());
  const Tensor images = unbatched ? at::unsqueeze(x, 0) : x;
  conv::Shape shape = shape_of(images, weight_shape, stride, padding, dilation, groups);
  constexpr int64_t kWorthThreads = 1 << 16;    // multiply-adds
  const int64_t threads = images.size(0) * weight.nnz * shape.pixels_out() < kWorthThreads ? 1 : at::get_num_threads();
  shape.sharers = threads / std::gcd(images.size(0), threads);
  TORCH_CHECK_VALUE(weight.out == shape.out_channels && weight.group_channels == shape.group_channels() &&
                        weight.groups == groups && weight.taps == shape.taps(),
                    "fanin: weight_shape ", weight_shape, " and groups ", groups, " are not those of the packed weight: ",
                    weight.out, " x ", weight.group_channels, " channels, ", weight.taps, " taps, ", weight.groups, " groups");
  TORCH_CHECK_VALUE(!bias || bias->numel() == shape.out_channels, "fanin: bias must have ", shape.out_channels,
                    " elements, got ", bias->sizes());
  at::DimVector sizes{images.size(0), shape.out_channels};
  sizes.insert(sizes.end(), shape.out.end() - (images.dim() - 2), shape.out.end());
  const OptTensor added = residual && unbatched ? OptTensor(at::unsqueeze(*residual, 0)) : residual;
  TORCH_CHECK_VALUE(!added || added->sizes() == IntArrayRef(sizes), "fanin: residual must have the output's shape ",
                    IntArrayRef(sizes), ", got ", added->sizes());

  const at::MemoryFormat format = format_of(images);
  const Tensor given = into.defined() && unbatched ? at::unsqueeze(into, 0) : into;
  // spatial layers compute the pixels twice where their blocks overlap: they must not write what they read
  const bool in_place = given.defined() && shape.pointwise() && fits(given, sizes, x, format);
  Tensor y = in_place ? given : fanin::empty_output(sizes, x.scalar_type(), format);
  if (y.numel() != 0) {
    // none: packed for pointwise layers only, or a chunk of x is beyond 32-bit offsets
    const std::shared_ptr<const conv::Geometry> geometry = geometries().find(weight, conv::flatten_pointwise(shape));
    if (!geometry) return {};
    const Tensor xc = images.contiguous(format), bc = bias ? bias->contiguous() : Tensor();
    const Tensor rc = added ? added->to(x.scalar_type()).contiguous(format) : Tensor();
    conv::Op op{};
    op.weight = &weight, op.geometry = geometry.get(), op.batch = images.size(0);
    op.values = values.const_data_ptr(), op.value_type = *value_type;
    op.x = xc.const_data_ptr(), op.x_type = *x_type;
    op.bias = bias ? bc.const_data_ptr() : nullptr, op.bias_type = bias ? *dtype_of(bc) : fanin::DType::f32;
    op.residual = added ? rc.const_data_ptr() : nullptr;
    op.y = y.mutable_data_ptr(), op.channels_last = format != at::MemoryFormat::Contiguous, op.act = act_of(activation);
    run(op, threads);
  }
  return unbatched ? y.squeeze(0) : y;
}

Tensor gather_conv_cpu(const Tensor& x, const Tensor& values, const Tensor& structure, const OptTensor& bias,
                       IntArrayRef weight_shape, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups,
                       std::string_view activation, const OptTensor& residual) {
  const Tensor y =
      compute(x, values, structure, bias, weight_shape, stride, padding, dilation, groups, activation, residual, {});
  if (y.defined()) return y;
  static const auto reference = fanin::handle_of<Signature>("fanin::gather_conv_reference");
  return reference.call(x, values, structure, bias, weight_shape, stride, padding, dilation, groups, activation, residual);
}

void gather_conv_in_place_cpu(const Tensor& x, const Tensor& values, const Tensor& structure, const OptTensor& bias,
                              IntArrayRef weight_shape, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                              int64_t groups, std::string_view activation, const Tensor& residual) {
  Tensor y =
      compute(x, values, structure, bias, weight_shape, stride, padding, dilation, groups, activation, residual, residual);
  static const auto reference = fanin::handle_of<Signature>("fanin::gather_conv_reference");
  if (!y.defined())
    y = reference.call(x, values, structure, bias, weight_shape, stride, padding, dilation, groups, activation, residual);
  if (y.const_data_ptr() != residual.const_data_ptr()) residual.copy_(y);
}

// Below autograd unless a gradient is asked for; then ops_conv.py's autograd function takes over.
Tensor gather_conv_autograd(c10::DispatchKeySet keys, const Tensor& x, const Tensor& values, const Tensor& structure,
                            const OptTensor& bias, IntArrayRef weight_shape, IntArrayRef stride, IntArrayRef padding,
                            IntArrayRef dilation, int64_t groups, std::string_view activation, const OptTensor& residual) {
  if (fanin::wants_grad(x, values, bias, residual)) {
    static const auto with_grad = fanin::handle_of<Signature>("fanin::gather_conv_with_grad");
    return with_grad.call(x, values, structure, bias, weight_shape, stride, padding, dilation, groups, activation, residual);
  }
  static const auto op = fanin::handle_of<Signature>("fanin::gather_conv");
  at::AutoDispatchBelowADInplaceOrView guard;
  return op.redispatch(keys & c10::after_autograd_keyset, x, values, structure, bias, weight_shape, stride, padding, dilation,
                       groups, activation, residual);
}

}  // namespace

TORCH_LIBRARY_IMPL(fanin, CPU, m) {
  m.impl("gather_conv", gather_conv_cpu);
  m.impl("gather_conv_", gather_conv_in_place_cpu);
}

TORCH_LIBRARY_IMPL(fanin, AutogradCPU, m) { m.impl("gather_conv", gather_conv_autograd); }
