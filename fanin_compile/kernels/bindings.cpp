// The linear ops as torch operators: checks, strides, threads. The schemas are defined in ops.py.
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <torch/library.h>

#include <limits>
#include <optional>
#include <string_view>

#include "linear.h"
#include "torch_types.h"

namespace {

using at::Tensor;
using fanin::OptTensor;
using fanin::act_of;
using fanin::dtype_of;
using fanin::itype_of;
using Signature = Tensor(const Tensor&, const Tensor&, const Tensor&, const OptTensor&, const OptTensor&, const OptTensor&,
                         const OptTensor&, int64_t, std::string_view, const OptTensor&);

c10::TypedOperatorHandle<Signature> handle(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// A contiguous vector of int32; null only for an absent one, not for an empty one
const int32_t* ints(const OptTensor& t, int64_t length, const char* what) {
  if (!t) return nullptr;
  TORCH_CHECK_VALUE(t->scalar_type() == at::kInt && t->numel() == length && t->is_contiguous(), "fanin: ", what,
                    " must be a contiguous int32 tensor of ", length, " elements, got ", t->scalar_type(), " ", t->sizes());
  static constexpr int32_t kEmpty = 0;
  return length ? t->const_data_ptr<int32_t>() : &kEmpty;
}

struct Rows {
  int64_t n, k, nnz;
};

Rows rows_of(const Tensor& indices, const OptTensor& row_ptr) {
  const int64_t nnz = indices.numel();
  TORCH_CHECK_VALUE(nnz <= std::numeric_limits<int32_t>::max(), "fanin: at most 2^31 - 1 non-zeros, got ", nnz);
  if (row_ptr) {
    TORCH_CHECK_VALUE(indices.dim() == 1 && row_ptr->numel() >= 1, "fanin: with row_ptr, indices must have 1 dimension");
    return {row_ptr->numel() - 1, 0, nnz};
  }
  TORCH_CHECK_VALUE(indices.dim() == 2, "fanin: indices must be [rows, k], got ", indices.sizes());
  return {indices.size(0), indices.size(1), nnz};
}

Tensor plan_cpu(const Tensor& indices, const OptTensor& row_ptr, int64_t in) {
  const Rows rows = rows_of(indices, row_ptr);
  const int32_t* ptr = ints(row_ptr, rows.n + 1, "row_ptr");
  const Tensor columns = indices.contiguous();
  Tensor plan = at::detail::empty_cpu({fanin::Plan::size(rows.n, in)}, at::kInt, {}, {}, {}, {});
  const bool ok = fanin::build_plan(plan.mutable_data_ptr<int32_t>(), columns.const_data_ptr(), itype_of(columns), ptr,
                                    rows.n, rows.k, in);
  TORCH_CHECK_VALUE(ok, "fanin: indices must ascend in each row and lie in [0, in_features = ", in, ")");
  return plan;
}

struct Variant {
  std::string_view name;
  int64_t vectors, batch;
};

// The default for `batch` rows, or the variant of that name.
const Variant& variant_for(int64_t batch, std::string_view name) {
  static const int64_t L = fanin::vector_lanes();
  static const Variant variants[] = {
#define FANIN_VARIANT(name, vectors, batch, why) {#name, vectors, batch},
#include "variants.inc"
#undef FANIN_VARIANT
  };
  const Variant* best = variants;
  for (const Variant& variant : variants) {
    if (variant.name == name) return variant;
    if (variant.batch <= batch) best = &variant;
  }
  TORCH_CHECK_VALUE(name.empty(), "fanin: unknown kernel variant '", name, "'");
  return *best;
}

// x as [batch, in] with unit column stride; a copy only where no such view exists
Tensor as_matrix(const Tensor& x) {
  if (x.dim() == 2 ? x.stride(1) == 1 || x.size(1) <= 1 : x.is_contiguous()) return x;
  return x.contiguous();
}

constexpr int64_t kWorthThreads = 1 << 16;     // multiply-adds, about 5 us of work

// Splits `units` over threads when the work of the whole call pays for waking them.
template <class F>
void split(int64_t units, int64_t work, const F& f) {
  if (units <= 1 || work < kWorthThreads || at::get_num_threads() == 1) return f(0, units);
  at::parallel_for(0, units, 1, f);
}

void run_dot(const fanin::Linear& op, int64_t work) {
  const int64_t threads = at::get_num_threads();
  for (int64_t b = 0; b < op.batch; ++b) {
    const char* x = static_cast<const char*>(op.x) + b * op.x_stride * (op.x_type == fanin::DType::f32 ? 4 : 2);
    const float* xf = reinterpret_cast<const float*>(x);
    if (op.x_type != fanin::DType::f32) {
      float* wide = fanin::scratch(op.in);
      fanin::widen_row(x, op.x_type, op.in, wide);
      xf = wide;
    }
    const int64_t step = std::max<int64_t>(8, (op.n + threads - 1) / threads);
    const int64_t units = std::max<int64_t>(1, (op.n + step - 1) / step);
    split(units, work / op.batch, [&](int64_t from, int64_t to) {
      fanin::linear_dot(op, b, xf, std::min(op.n, from * step), std::min(op.n, to * step));
    });
  }
}

void run_lanes(const fanin::Linear& op, int64_t vectors, int64_t work) {
  const int64_t width = std::min(vectors, fanin::max_vectors()) * fanin::vector_lanes();
  const int64_t tiles = (op.batch + width - 1) / width;
  const int64_t blocks = fanin::Plan::blocks(op.n);
  const int64_t tallest = std::max<int64_t>(1, (op.n + blocks - 1) / blocks), most = fanin::kTileRows / tallest;
  const int64_t threads = work < kWorthThreads ? 1 : at::get_num_threads();
  const int64_t groups = std::min(blocks, std::max((blocks + most - 1) / most, (threads + tiles - 1) / tiles));
  split(tiles * groups, work, [&](int64_t from, int64_t to) {
    for (int64_t unit = from; unit < to; ++unit) {
      const int64_t lane = unit / groups * width, group = unit % groups;
      fanin::linear_lanes(op, lane, std::min(width, op.batch - lane), group * blocks / groups, (group + 1) * blocks / groups);
    }
  });
}

Tensor gather_matmul_variant(const Tensor& x, const Tensor& values, const Tensor& indices, const OptTensor& row_ptr,
                             const OptTensor& rows, const OptTensor& bias, const OptTensor& plan, int64_t out_features,
                             std::string_view activation, const OptTensor& residual, std::string_view name) {
  const auto x_type = dtype_of(x), value_type = dtype_of(values);
  const auto bias_type = bias ? dtype_of(*bias) : fanin::DType::f32;
  if (!x_type || !value_type || !bias_type) {
    static const auto reference = handle("fanin::gather_matmul_reference");
    return reference.call(x, values, indices, row_ptr, rows, bias, plan, out_features, activation, residual);
  }
  TORCH_CHECK_VALUE(x.dim() >= 1, "fanin: x must be [..., in_features], got a scalar");
  const Rows shape = rows_of(indices, row_ptr);
  TORCH_CHECK_VALUE(values.sizes() == indices.sizes(), "fanin: values ", values.sizes(), " and indices ", indices.sizes(),
                    " must have the same shape");
  TORCH_CHECK_VALUE(rows || shape.n == out_features, "fanin: without rows, out_features must be the number of condensed rows ",
                    shape.n, ", got ", out_features);
  TORCH_CHECK_VALUE(!bias || (bias->numel() == out_features && bias->is_contiguous()), "fanin: bias must be contiguous with ",
                    out_features, " elements, got ", bias->sizes());
  at::DimVector sizes(x.sizes());
  sizes.back() = out_features;
  TORCH_CHECK_VALUE(!residual || residual->sizes() == sizes, "fanin: residual must have the output's shape ", sizes, ", got ",
                    residual->sizes());

  Tensor y = at::detail::empty_cpu(sizes, x.scalar_type(), {}, {}, {}, {});
  if (y.numel() == 0) return y;
  const Tensor xm = as_matrix(x), v = values.contiguous(), c = indices.contiguous();
  const Tensor res = residual ? residual->to(x.scalar_type()).contiguous() : Tensor();

  fanin::Linear op{};
  op.in = x.size(-1), op.out = out_features, op.n = shape.n, op.k = shape.k, op.batch = y.numel() / op.out;
  op.x = xm.const_data_ptr(), op.x_type = *x_type, op.x_stride = xm.dim() == 2 ? xm.stride(0) : op.in;
  op.values = v.const_data_ptr(), op.value_type = *value_type;
  op.indices = c.const_data_ptr(), op.index_type = itype_of(c);
  op.row_ptr = ints(row_ptr, op.n + 1, "row_ptr"), op.rows = ints(rows, op.n, "rows");
  op.bias = bias ? bias->const_data_ptr() : nullptr, op.bias_type = *bias_type;
  op.residual = residual ? res.const_data_ptr() : nullptr;
  op.y = y.mutable_data_ptr(), op.act = act_of(activation);

  const int64_t plan_size = fanin::Plan::size(op.n, op.in);
  TORCH_CHECK_VALUE(!plan || plan->numel() == plan_size, "fanin: x has ", op.in, " features; the plan of ", op.n,
                    " rows is not one for so many");
  op.plan = ints(plan, plan_size, "plan");
  if (op.plan && !fanin::plan_fits(op.plan, op.n, op.in, shape.nnz)) op.plan = nullptr;

  const int64_t work = op.batch * shape.nnz;
  const Variant& variant = variant_for(op.batch, name);
  if (variant.vectors == 0) {
    TORCH_CHECK_VALUE(op.plan || fanin::columns_below(op.indices, op.index_type, op.row_ptr, op.n, op.k, op.in),
                      "fanin: x has ", op.in, " features, fewer than a column of the weight needs");
    run_dot(op, work);
    return y;
  }
  Tensor built;
  if (!op.plan) {
    built = plan_cpu(c, row_ptr, op.in);
    op.plan = built.const_data_ptr<int32_t>();
  }
  run_lanes(op, variant.vectors, work);
  return y;
}

Tensor gather_matmul_cpu(const Tensor& x, const Tensor& values, const Tensor& indices, const OptTensor& row_ptr,
                         const OptTensor& rows, const OptTensor& bias, const OptTensor& plan, int64_t out_features,
                         std::string_view activation, const OptTensor& residual) {
  return gather_matmul_variant(x, values, indices, row_ptr, rows, bias, plan, out_features, activation, residual, {});
}

// Below autograd unless a gradient is asked for; then ops.py's autograd function takes over.
Tensor gather_matmul_autograd(c10::DispatchKeySet keys, const Tensor& x, const Tensor& values, const Tensor& indices,
                              const OptTensor& row_ptr, const OptTensor& rows, const OptTensor& bias, const OptTensor& plan,
                              int64_t out_features, std::string_view activation, const OptTensor& residual) {
  const auto wants = [](const OptTensor& t) { return t && t->requires_grad(); };
  if (at::GradMode::is_enabled() && (x.requires_grad() || values.requires_grad() || wants(bias) || wants(residual))) {
    static const auto with_grad = handle("fanin::gather_matmul_with_grad");
    return with_grad.call(x, values, indices, row_ptr, rows, bias, plan, out_features, activation, residual);
  }
  static const auto op = handle("fanin::gather_matmul");
  at::AutoDispatchBelowADInplaceOrView guard;
  return op.redispatch(keys & c10::after_autograd_keyset, x, values, indices, row_ptr, rows, bias, plan, out_features,
                       activation, residual);
}

}  // namespace

TORCH_LIBRARY_IMPL(fanin, CPU, m) {
  m.impl("gather_matmul", gather_matmul_cpu);
  m.impl("gather_matmul_variant", gather_matmul_variant);
  m.impl("gather_matmul_plan", plan_cpu);
}

TORCH_LIBRARY_IMPL(fanin, AutogradCPU, m) { m.impl("gather_matmul", gather_matmul_autograd); }
