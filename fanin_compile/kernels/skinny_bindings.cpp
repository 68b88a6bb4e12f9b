// The dense linear op of few batch rows as a torch operator: checks, threads. Its schema is in ops_skinny.py.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/linear.h>
#include <torch/library.h>

#include "skinny.h"
#include "torch_outputs.h"
#include "torch_types.h"

namespace {

using at::Tensor;
using fanin::OptTensor;
using Signature = Tensor(const Tensor&, const Tensor&, const OptTensor&);

bool is_plain(const Tensor& t) { return t.scalar_type() == at::kFloat && t.is_contiguous(); }

Tensor skinny_linear_cpu(const Tensor& x, const Tensor& weight, const OptTensor& bias) {
  TORCH_CHECK_VALUE(weight.dim() == 2 && x.dim() >= 1 && x.size(-1) == weight.size(1), "fanin: x must be [..., in_features] of a weight "
                    "[out_features, in_features], got ", x.sizes(), " and ", weight.sizes());
  TORCH_CHECK_VALUE(!bias || (bias->dim() == 1 && bias->numel() == weight.size(0)), "fanin: bias must have ", weight.size(0),
                    " elements, got ", bias->sizes());
  const int64_t in = weight.size(1), out = weight.size(0), rows = c10::multiply_integers(x.sizes().slice(0, x.dim() - 1));
  const bool plain = x.scalar_type() == at::kFloat && is_plain(weight) && (!bias || is_plain(*bias));
  if (!plain || rows > fanin::skinny::kFew) return at::linear(x, weight, bias);
  at::DimVector sizes(x.sizes());
  sizes.back() = out;
  Tensor y = fanin::empty_output(sizes, at::kFloat);
  if (y.numel() == 0) return y;
  const Tensor xm = fanin::as_matrix(x);
  const fanin::skinny::Op op{xm.const_data_ptr<float>(), weight.const_data_ptr<float>(),
                             bias ? bias->const_data_ptr<float>() : nullptr, y.mutable_data_ptr<float>(), rows, in, out,
                             xm.dim() == 2 ? xm.stride(0) : in};
  fanin::share_out(out, rows * in * out, [&](int64_t first, int64_t last) { fanin::skinny::run(op, first, last); });
  return y;
}

// Where a gradient is wanted, torch's own.
Tensor skinny_linear_autograd(c10::DispatchKeySet keys, const Tensor& x, const Tensor& weight, const OptTensor& bias) {
  if (fanin::wants_grad(x, weight, bias)) return at::linear(x, weight, bias);
  static const auto op = fanin::handle_of<Signature>("fanin::skinny_linear");
  at::AutoDispatchBelowADInplaceOrView guard;
  return op.redispatch(keys & c10::after_autograd_keyset, x, weight, bias);
}

}  // namespace

TORCH_LIBRARY_IMPL(fanin, CPU, m) { m.impl("skinny_linear", skinny_linear_cpu); }

TORCH_LIBRARY_IMPL(fanin, AutogradCPU, m) { m.impl("skinny_linear", skinny_linear_autograd); }
