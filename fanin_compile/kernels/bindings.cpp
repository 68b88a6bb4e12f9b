// The linear op as a torch operator: checks, strides, threads. The schemas are defined in ops.py.
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <string_view>

#include "linear.h"
#include "torch_outputs.h"
#include "torch_types.h"

namespace {

using at::Tensor;
using fanin::OptTensor;
using fanin::act_of;
using fanin::as_matrix;
using fanin::dtype_of;
using Signature = Tensor(const Tensor&, const Tensor&, const Tensor&, const OptTensor&, int64_t, std::string_view,
                         const OptTensor&, const OptTensor&);

// The header of a packed weight, checked as far as can be in no time: packing.py wrote what it describes.
const fanin::Structure& structure_of(const Tensor& structure, const Tensor& values) {
  const auto bytes = static_cast<int64_t>(structure.numel());
  TORCH_CHECK_VALUE(structure.scalar_type() == at::kByte && structure.is_contiguous() &&
                        bytes >= static_cast<int64_t>(sizeof(fanin::Structure)),
                    "fanin: structure must be a packed weight's, got ", structure.scalar_type(), " ", structure.sizes());
  const auto& s = *static_cast<const fanin::Structure*>(structure.const_data_ptr());
  TORCH_CHECK_VALUE(s.version == fanin::Structure::kVersion && s.bytes == bytes,
                    "fanin: structure was packed by another version or is cut off: pack the condensed weight anew");
  // packing.py checks the rest where a structure is read from outside
  TORCH_CHECK_VALUE(s.entries >= 0 && s.segments_at >= 0 && s.groups_at >= s.segments_at && s.columns_at >= s.groups_at &&
                        s.columns_at + s.entries * s.column_bytes <= bytes && s.blocks >= 1 && s.chunks >= 1 && s.width >= 1,
                    "fanin: the structure is damaged: pack the condensed weight anew");
  TORCH_CHECK_VALUE(values.dim() == 1 && values.is_contiguous() && values.numel() >= s.entries,
                    "fanin: values must be contiguous with at least ", s.entries, " elements, got ", values.sizes());
  return s;
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
  fanin::pack_row(op, 0, x);
  split(w.blocks, threads_for(w.nnz), [&](int64_t first, int64_t last) { fanin::linear_dot(op, 0, x, first, last); });
}

// Batch rows cut into tiles of at most `most` vectors of lanes.
struct Tiles {
  const fanin::Tiling& tiling;
  int64_t batch, lanes, vectors, count;

  Tiles(int64_t batch, int64_t most, int64_t threads)
      : tiling(fanin::tiling_for(batch)), batch(batch), lanes(tiling.lanes), vectors(tiling.stride_of(batch) / lanes),
        count((vectors + most - 1) / most) {
    // Tiles for every thread, of two vectors at least: one alone would load each weight for eight multiply-adds.
    if (const int64_t even = (count + threads - 1) / threads * threads; vectors >= 2 * even) count = even;
  }
  int64_t begin(int64_t tile) const { return std::min(tile * vectors / count * lanes, batch); }
  int64_t size(int64_t tile) const { return begin(tile + 1) - begin(tile); }
  int64_t stride(int64_t tile) const { return tiling.stride_of(size(tile)); }
  int64_t widest() const { return (vectors + count - 1) / count * lanes; }
};

void run_lanes(const fanin::Linear& op, int64_t most) {
  const fanin::Structure& w = *op.weight;
  const int64_t threads = threads_for(op.batch * w.nnz);
  const Tiles tiles(op.batch, most, threads);
  // Where tiles are too few, threads share their rows; so do passes of an input too wide to be packed at once.
  const int64_t tall = (w.out + fanin::kTileRows - 1) / fanin::kTileRows;
  const int64_t groups = std::min(w.blocks, std::max(tall, (threads + tiles.count - 1) / tiles.count));
  split(tiles.count * groups, threads, [&](int64_t from, int64_t to) {
    for (int64_t unit = from; unit < to; ++unit) {
      const int64_t tile = unit / groups, group = unit % groups;
      fanin::linear_lanes(op, tiles.begin(tile), tiles.size(tile), group * w.blocks / groups, (group + 1) * w.blocks / groups);
    }
  });
}

// What is known without looking at x's shape.
fanin::Linear linear_of(const Tensor& x, const Tensor& values, const Tensor& structure, const OptTensor& bias,
                        std::string_view activation) {
  fanin::Linear op{};
  op.weight = &structure_of(structure, values), op.values = values.const_data_ptr();
  op.value_type = *dtype_of(values), op.x_type = *dtype_of(x), op.act = act_of(activation);
  op.bias_type = bias ? *dtype_of(*bias) : fanin::DType::f32;
  TORCH_CHECK_VALUE(!bias || bias->numel() == op.weight->out, "fanin: bias must have ", op.weight->out, " elements, got ",
                    bias->sizes());
  return op;
}

// Gives op a norm of its input, in fp32 whatever x is; returns what holds it meanwhile.
Tensor set_norm(fanin::Linear& op, const OptTensor& norm) {
  if (!norm) return {};
  TORCH_CHECK_VALUE(norm->dim() == 2 && norm->size(0) == 2 && norm->size(1) == op.weight->in + 1,
                    "fanin: norm must be [2, in_features + 1 = ", op.weight->in + 1, "], got ", norm->sizes());
  const Tensor held = norm->to(at::kFloat).contiguous();       // itself, unless a model was cast
  op.norm = held.const_data_ptr<float>();
  return held;
}

// The tensors of one call: x and residual in the form the kernels take, and the output.
struct Call {
  Tensor x, bias, residual, y;

  // Completes op, whose inputs have `in` features.
  Call(fanin::Linear& op, const Tensor& x_, int64_t in, const OptTensor& bias_, const OptTensor& residual_) {
    TORCH_CHECK_VALUE(x_.dim() >= 1 && x_.size(-1) == in, "fanin: x must be [..., in_features = ", in, "], got ", x_.sizes());
    at::DimVector sizes(x_.sizes());
    sizes.back() = op.weight->out;
    TORCH_CHECK_VALUE(!residual_ || residual_->sizes() == sizes, "fanin: residual must have the output's shape ", sizes,
                      ", got ", residual_->sizes());
    y = fanin::empty_output(sizes, x_.scalar_type());
    if (y.numel() == 0) return;
    x = as_matrix(x_);
    op.x = x.const_data_ptr(), op.x_stride = x.dim() == 2 ? x.stride(0) : in;
    op.batch = y.numel() / op.weight->out;
    if (bias_) bias = bias_->contiguous(), op.bias = bias.const_data_ptr();
    if (residual_) residual = residual_->to(x_.scalar_type()).contiguous(), op.residual = residual.const_data_ptr();
    op.y = y.mutable_data_ptr();
  }
};

Tensor gather_matmul_cpu(const Tensor& x, const Tensor& values, const Tensor& structure, const OptTensor& bias,
                         int64_t out_features, std::string_view activation, const OptTensor& residual,
                         const OptTensor& norm) {
  if (!dtype_of(x) || !dtype_of(values) || (bias && !dtype_of(*bias)) || (norm && !dtype_of(*norm))) {
    static const auto reference = fanin::handle_of<Signature>("fanin::gather_matmul_reference");
    return reference.call(x, values, structure, bias, out_features, activation, residual, norm);
  }
  fanin::Linear op = linear_of(x, values, structure, bias, activation);
  const fanin::Structure& w = *op.weight;
  TORCH_CHECK_VALUE(w.out == out_features, "fanin: out_features must be the packed weight's ", w.out, ", got ", out_features);
  const Tensor held = set_norm(op, norm);
  Call call(op, x, w.in, bias, residual);
  if (call.y.numel() == 0) return call.y;
  if (op.batch == 1) run_dot(op);
  else run_lanes(op, std::clamp<int64_t>(w.tile, 1, fanin::kMaxVectors));
  return call.y;
}

// ---- two layers in one call ---------------------------------------------------------------------------------------

int64_t hidden_bytes() { return fanin::l2_bytes() / 8 * 7; }    // of packed x and h of a tile
int64_t hidden_most() { return fanin::l2_bytes() / 8 * 15; }    // of one vector of lanes: beyond, h is better written to memory

void chain_row(const fanin::Chain& chain) {
  const fanin::Structure &w = *chain.first.weight, &w2 = *chain.second.weight;
  const int64_t threads = threads_for(w.nnz + w2.nnz);
  float *x = fanin::scratch(fanin::slots(w)), *h = fanin::scratch(fanin::slots(w2), 2);
  fanin::pack_row(chain.first, 0, x);
  fanin::chain_gaps(chain, 1, h);
  const auto hidden = [&](int64_t from, int64_t to) {
    split(to - from, threads, [&](int64_t a, int64_t b) { fanin::chain_hidden(chain, x, from + a, from + b, h); });
  };
  // a gate's other factor is multiplied to what the gate has written
  const int64_t half = chain.gated ? w.blocks / 2 : w.blocks;
  hidden(0, half);
  hidden(half, w.blocks);
  split(w2.blocks, threads, [&](int64_t a, int64_t b) { fanin::chain_output(chain, h, a, b); });
}

void chain_lanes(const fanin::Chain& chain, int64_t most) {
  const fanin::Structure &w = *chain.first.weight, &w2 = *chain.second.weight;
  const int64_t threads = threads_for(chain.first.batch * (w.nnz + w2.nnz));
  const Tiles tiles(chain.first.batch, most, threads);
  if (tiles.count >= threads) {
    return split(tiles.count, threads, [&](int64_t from, int64_t to) {
      for (int64_t tile = from; tile < to; ++tile) {
        const int64_t lane = tiles.begin(tile), lanes = tiles.size(tile), stride = tiles.stride(tile);
        float* h = fanin::scratch(fanin::slots(w2) * stride, 2);
        fanin::chain_gaps(chain, stride, h);
        fanin::chain_hidden(chain, lane, lanes, 0, w.blocks, h);
        fanin::chain_output(chain, lane, lanes, 0, w2.blocks, h);
      }
    });
  }
  // Threads share the rows of both layers, one after the other.
  const int64_t size = fanin::slots(w2) * tiles.widest(), share = (threads + tiles.count - 1) / tiles.count;
  float* all = fanin::scratch(size * tiles.count, 2);
  for (int64_t tile = 0; tile < tiles.count; ++tile)
    fanin::chain_gaps(chain, tiles.stride(tile), all + tile * size);
  const auto shared = [&](int64_t first, int64_t last, const auto& run) {
    const int64_t groups = std::min(last - first, share);
    split(tiles.count * groups, threads, [&](int64_t from, int64_t to) {
      for (int64_t unit = from; unit < to; ++unit) {
        const int64_t tile = unit / groups, group = unit % groups;
        run(tiles.begin(tile), tiles.size(tile), first + group * (last - first) / groups,
            first + (group + 1) * (last - first) / groups, all + tile * size);
      }
    });
  };
  const auto hidden = [&](int64_t lane, int64_t lanes, int64_t a, int64_t b, float* h) {
    fanin::chain_hidden(chain, lane, lanes, a, b, h);
  };
  const int64_t half = chain.gated ? w.blocks / 2 : w.blocks;
  if (half > 0) shared(0, half, hidden);
  if (half < w.blocks) shared(half, w.blocks, hidden);
  shared(0, w2.blocks, [&](int64_t lane, int64_t lanes, int64_t a, int64_t b, float* h) {
    fanin::chain_output(chain, lane, lanes, a, b, h);
  });
}

Tensor chain_cpu(const Tensor& x, const Tensor& values, const Tensor& structure, const OptTensor& bias,
                 std::string_view activation, bool gated, const Tensor& values2, const Tensor& structure2,
                 const OptTensor& bias2, int64_t hidden_features, int64_t out_features, std::string_view activation2,
                 const OptTensor& residual, const OptTensor& norm) {
  const auto type = [](const OptTensor& t) { return t ? dtype_of(*t) : fanin::DType::f32; };
  const auto in_two = [&] {
    static const auto reference = c10::Dispatcher::singleton()
                                      .findSchemaOrThrow("fanin::gather_matmul_chain_reference", "")
                                      .typed<decltype(chain_cpu)>();
    return reference.call(x, values, structure, bias, activation, gated, values2, structure2, bias2, hidden_features,
                          out_features, activation2, residual, norm);
  };
  if (!dtype_of(x) || !dtype_of(values) || !dtype_of(values2) || !type(bias) || !type(bias2) || !type(norm)) return in_two();
  fanin::Chain chain{linear_of(x, values, structure, bias, activation),
                     linear_of(x, values2, structure2, bias2, activation2), gated};
  const fanin::Structure &w = *chain.first.weight, &w2 = *chain.second.weight;
  TORCH_CHECK_VALUE(w.out == (gated ? 2 : 1) * hidden_features && w2.in == hidden_features && w2.out == out_features,
                    "fanin: a chain of weights [", w.out, ", ", w.in, "] and [", w2.out, ", ", w2.in, "] with ", hidden_features,
                    " hidden features", gated ? ", gated" : "", " and ", out_features, " outputs does not fit together");
  const Tensor held = set_norm(chain.first, norm);
  const int64_t vector = (fanin::slots(w) + fanin::slots(w2)) * fanin::whole_tiling().lanes *
                         static_cast<int64_t>(sizeof(float));
  const bool halves = !gated || w.blocks % 2 == 0;           // no block has rows of both factors
  if (vector > hidden_most() || !halves) return in_two();
  Call call(chain.second, x, w.in, bias2, residual);
  if (call.y.numel() == 0) return call.y;
  const Tensor first_bias = bias ? bias->contiguous() : Tensor();
  chain.first.x = chain.second.x, chain.first.x_stride = chain.second.x_stride, chain.first.batch = chain.second.batch;
  chain.first.bias = bias ? first_bias.const_data_ptr() : nullptr;
  if (chain.first.batch == 1) chain_row(chain);
  else chain_lanes(chain, std::clamp<int64_t>(hidden_bytes() / vector, 1, fanin::kMaxVectors));
  return call.y;
}

// Below autograd unless a gradient is asked for; then ops.py's autograd function takes over.
Tensor gather_matmul_autograd(c10::DispatchKeySet keys, const Tensor& x, const Tensor& values, const Tensor& structure,
                              const OptTensor& bias, int64_t out_features, std::string_view activation,
                              const OptTensor& residual, const OptTensor& norm) {
  if (fanin::wants_grad(x, values, bias, residual, norm)) {
    static const auto with_grad = fanin::handle_of<Signature>("fanin::gather_matmul_with_grad");
    return with_grad.call(x, values, structure, bias, out_features, activation, residual, norm);
  }
  static const auto op = fanin::handle_of<Signature>("fanin::gather_matmul");
  at::AutoDispatchBelowADInplaceOrView guard;
  return op.redispatch(keys & c10::after_autograd_keyset, x, values, structure, bias, out_features, activation, residual,
                       norm);
}

Tensor chain_autograd(c10::DispatchKeySet keys, const Tensor& x, const Tensor& values, const Tensor& structure,
                      const OptTensor& bias, std::string_view activation, bool gated, const Tensor& values2,
                      const Tensor& structure2, const OptTensor& bias2, int64_t hidden_features, int64_t out_features,
                      std::string_view activation2, const OptTensor& residual, const OptTensor& norm) {
  if (fanin::wants_grad(x, values, bias, values2, bias2, residual, norm)) {
    static const auto reference = fanin::handle_of<decltype(chain_cpu)>("fanin::gather_matmul_chain_reference");
    return reference.call(x, values, structure, bias, activation, gated, values2, structure2, bias2, hidden_features,
                          out_features, activation2, residual, norm);
  }
  static const auto op = fanin::handle_of<decltype(chain_cpu)>("fanin::gather_matmul_chain");
  at::AutoDispatchBelowADInplaceOrView guard;
  return op.redispatch(keys & c10::after_autograd_keyset, x, values, structure, bias, activation, gated, values2, structure2,
                       bias2, hidden_features, out_features, activation2, residual, norm);
}

}  // namespace

TORCH_LIBRARY_IMPL(fanin, CPU, m) {
  m.impl("gather_matmul", gather_matmul_cpu);
  m.impl("gather_matmul_chain", chain_cpu);
}

TORCH_LIBRARY_IMPL(fanin, AutogradCPU, m) {
  m.impl("gather_matmul", gather_matmul_autograd);
  m.impl("gather_matmul_chain", chain_autograd);
}

TORCH_LIBRARY_IMPL(fanin, CompositeExplicitAutograd, m) {
  m.impl("scratch_nbytes", &fanin::scratch_nbytes);
  m.impl("kept_output_nbytes", []() -> int64_t { return fanin::OutputBlocks::get().kept_nbytes(); });
  m.impl("release_outputs", []() { fanin::OutputBlocks::get().release(); });
}
