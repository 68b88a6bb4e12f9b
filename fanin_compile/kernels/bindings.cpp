// The linear op as a torch operator: checks, strides, threads. The schemas are defined in ops.py.
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <string_view>

#include "linear.h"
#include "torch_types.h"

namespace {

using at::Tensor;
using fanin::OptTensor;
using fanin::act_of;
using fanin::dtype_of;
using Signature = Tensor(const Tensor&, const Tensor&, const Tensor&, const OptTensor&, int64_t, std::string_view,
                         const OptTensor&);

c10::TypedOperatorHandle<Signature> handle(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// The header of a packed weight, checked as far as can be in no time: packing.py wrote what it describes.
const fanin::Structure& structure_of(const Tensor& structure, const Tensor& values) {
  const auto bytes = static_cast<int64_t>(structure.numel());
  TORCH_CHECK_VALUE(structure.scalar_type() == at::kByte && structure.is_contiguous() &&
                        bytes >= static_cast<int64_t>(sizeof(fanin::Structure)),
                    "fanin: structure must be a packed weight's, got ", structure.scalar_type(), " ", structure.sizes());
  const auto& s = *static_cast<const fanin::Structure*>(structure.const_data_ptr());
  TORCH_CHECK_VALUE(s.version == fanin::Structure::kVersion && s.bytes == bytes,
                    "fanin: structure was packed by another version or is cut off: pack the condensed weight anew");
  TORCH_CHECK_VALUE(values.dim() == 1 && values.is_contiguous() && values.numel() >= s.entries,
                    "fanin: values must be contiguous with at least ", s.entries, " elements, got ", values.sizes());
  return s;
}

// x as [batch, in] with unit column stride; a copy only where no such view exists
Tensor as_matrix(const Tensor& x) {
  if (x.dim() == 2 ? x.stride(1) == 1 || x.size(1) <= 1 : x.is_contiguous()) return x;
  return x.contiguous();
}

constexpr int64_t kWorthThreads = 1 << 16;     // multiply-adds, about 5 us of work

int64_t threads_for(int64_t work) { return work < kWorthThreads ? 1 : at::get_num_threads(); }

template <class F>
void split(int64_t units, int64_t threads, const F& f) {
  if (units <= 1 || threads == 1) return f(0, units);
  at::parallel_for(0, units, 1, f);
}

void run_dot(const fanin::Linear& op) {
  const fanin::Structure& w = *op.weight;
  float* x = fanin::scratch(fanin::slots(w));
  for (int64_t b = 0; b < op.batch; ++b) {
    fanin::spread_row(op, b, x);
    split(w.blocks, threads_for(w.nnz), [&](int64_t first, int64_t last) { fanin::linear_dot(op, b, x, first, last); });
  }
}

void run_lanes(const fanin::Linear& op, int64_t most) {
  const fanin::Structure& w = *op.weight;
  const int64_t lanes = fanin::vector_lanes(), vectors = (op.batch + lanes - 1) / lanes;
  const int64_t threads = threads_for(op.batch * w.nnz);
  int64_t tiles = (vectors + most - 1) / most;
  // Tiles for every thread, of two vectors at least: one alone would load each weight for eight multiply-adds.
  if (const int64_t even = (tiles + threads - 1) / threads * threads; vectors >= 2 * even) tiles = even;
  // Where tiles are too few, threads share their rows; so do passes of an input too wide to be packed at once.
  const int64_t tall = (w.out + fanin::kTileRows - 1) / fanin::kTileRows;
  const int64_t groups = std::min(w.blocks, std::max(tall, (threads + tiles - 1) / tiles));
  split(tiles * groups, threads, [&](int64_t from, int64_t to) {
    for (int64_t unit = from; unit < to; ++unit) {
      const int64_t tile = unit / groups, group = unit % groups;
      const int64_t lane = tile * vectors / tiles * lanes, end = std::min((tile + 1) * vectors / tiles * lanes, op.batch);
      fanin::linear_lanes(op, lane, end - lane, group * w.blocks / groups, (group + 1) * w.blocks / groups);
    }
  });
}

Tensor gather_matmul_cpu(const Tensor& x, const Tensor& values, const Tensor& structure, const OptTensor& bias,
                         int64_t out_features, std::string_view activation, const OptTensor& residual) {
  const auto x_type = dtype_of(x), value_type = dtype_of(values);
  const auto bias_type = bias ? dtype_of(*bias) : fanin::DType::f32;
  if (!x_type || !value_type || !bias_type) {
    static const auto reference = handle("fanin::gather_matmul_reference");
    return reference.call(x, values, structure, bias, out_features, activation, residual);
  }
  const fanin::Structure& w = structure_of(structure, values);
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.size(-1) == w.in, "fanin: x must be [..., in_features = ", w.in, "], got ", x.sizes());
  TORCH_CHECK_VALUE(w.out == out_features, "fanin: out_features must be the packed weight's ", w.out, ", got ", out_features);
  TORCH_CHECK_VALUE(!bias || bias->numel() == out_features, "fanin: bias must have ", out_features, " elements, got ",
                    bias->sizes());
  at::DimVector sizes(x.sizes());
  sizes.back() = out_features;
  TORCH_CHECK_VALUE(!residual || residual->sizes() == sizes, "fanin: residual must have the output's shape ", sizes, ", got ",
                    residual->sizes());

  Tensor y = at::detail::empty_cpu(sizes, x.scalar_type(), {}, {}, {}, {});
  if (y.numel() == 0) return y;
  const Tensor xm = as_matrix(x), b = bias ? bias->contiguous() : Tensor();
  const Tensor res = residual ? residual->to(x.scalar_type()).contiguous() : Tensor();

  fanin::Linear op{};
  op.weight = &w, op.values = values.const_data_ptr(), op.value_type = *value_type;
  op.x = xm.const_data_ptr(), op.x_type = *x_type, op.x_stride = xm.dim() == 2 ? xm.stride(0) : w.in;
  op.batch = y.numel() / w.out;
  op.bias = bias ? b.const_data_ptr() : nullptr, op.bias_type = *bias_type;
  op.residual = residual ? res.const_data_ptr() : nullptr;
  op.y = y.mutable_data_ptr(), op.act = act_of(activation);
  if (op.batch == 1) run_dot(op);
  else run_lanes(op, std::clamp<int64_t>(w.tile, 1, fanin::max_vectors()));
  return y;
}

// Below autograd unless a gradient is asked for; then ops.py's autograd function takes over.
Tensor gather_matmul_autograd(c10::DispatchKeySet keys, const Tensor& x, const Tensor& values, const Tensor& structure,
                              const OptTensor& bias, int64_t out_features, std::string_view activation,
                              const OptTensor& residual) {
  const auto wants = [](const OptTensor& t) { return t && t->requires_grad(); };
  if (at::GradMode::is_enabled() && (x.requires_grad() || values.requires_grad() || wants(bias) || wants(residual))) {
    static const auto with_grad = handle("fanin::gather_matmul_with_grad");
    return with_grad.call(x, values, structure, bias, out_features, activation, residual);
  }
  static const auto op = handle("fanin::gather_matmul");
  at::AutoDispatchBelowADInplaceOrView guard;
  return op.redispatch(keys & c10::after_autograd_keyset, x, values, structure, bias, out_features, activation, residual);
}

}  // namespace

TORCH_LIBRARY_IMPL(fanin, CPU, m) { m.impl("gather_matmul", gather_matmul_cpu); }
TORCH_LIBRARY_IMPL(fanin, AutogradCPU, m) { m.impl("gather_matmul", gather_matmul_autograd); }
