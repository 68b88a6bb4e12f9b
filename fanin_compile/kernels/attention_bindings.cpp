// Attention over past and new keys as torch operators: checks, strides, threads. Their schemas are in ops_attention.py.
#include <ATen/MemoryOverlap.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <cmath>
#include <initializer_list>
#include <optional>
#include <tuple>

#include "attention.h"
#include "torch_outputs.h"
#include "torch_types.h"

namespace {

namespace attention = fanin::attention;
using at::Tensor;
using fanin::OptTensor;
using Three = std::tuple<Tensor, Tensor, Tensor>;
template <class Result>
using Signature = Result(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const OptTensor&,
                         std::optional<double>);

constexpr int64_t kMostRows = 64;               // of queries that read one head: more are a product of matrices

// x itself, or a copy whose last dimension is contiguous.
Tensor with_rows(const Tensor& x) { return x.stride(3) == 1 || x.size(3) <= 1 ? x : x.contiguous(); }

attention::Rows rows_of(const Tensor& x) { return {x.const_data_ptr<float>(), x.stride(0), x.stride(1), x.stride(2)}; }

void check_pair(const char* what, const Tensor& past, const Tensor& fresh) {
  TORCH_CHECK_VALUE(past.dim() == 4 && fresh.dim() == 4, "fanin: past and new ", what,
                    " must be [batch, heads, length, dim], got ", past.sizes(), " and ", fresh.sizes());
  for (int64_t d : {0, 1, 3})
    TORCH_CHECK_VALUE(past.size(d) == fresh.size(d), "fanin: past and new ", what, " must differ in length alone, got ",
                      past.sizes(), " and ", fresh.sizes());
}

// keys and values of this many rows, wherever they stand
void check(const Tensor& query, const Tensor& keys, int64_t key_rows, const Tensor& values, int64_t value_rows) {
  TORCH_CHECK_VALUE(keys.sizes().slice(0, 2) == values.sizes().slice(0, 2), "fanin: keys ", keys.sizes(), " and values ",
                    values.sizes(), " must have the same batch and heads");
  TORCH_CHECK_VALUE(key_rows == value_rows, "fanin: there are ", key_rows, " keys and ", value_rows, " values");
  TORCH_CHECK_VALUE(query.dim() == 4 && query.size(0) == keys.size(0) && query.size(3) == keys.size(3),
                    "fanin: query ", query.sizes(), " must have the batch and the dim of keys ", keys.sizes());
  const int64_t heads = keys.size(1);
  TORCH_CHECK_VALUE(heads == 0 ? query.size(1) == 0 : query.size(1) % heads == 0, "fanin: the ", query.size(1),
                    " heads of the query must be a multiple of the keys' ", heads);
}

attention::Mask mask_of(const OptTensor& mask, at::IntArrayRef scores) {
  using attention::Mask;
  if (!mask) return {Mask::Kind::none, nullptr, 0, 0, 0, 0};
  const int64_t missing = 4 - mask->dim();
  int64_t strides[4] = {};
  bool fits = missing >= 0;
  for (int64_t d = std::max<int64_t>(missing, 0); fits && d < 4; ++d) {
    const int64_t size = mask->size(d - missing);
    fits = size == 1 || size == scores[d];
    strides[d] = size == 1 ? 0 : mask->stride(d - missing);
  }
  TORCH_CHECK_VALUE(fits, "fanin: the mask's shape ", mask->sizes(), " does not broadcast to that of the scores, ", scores);
  const auto kind = mask->scalar_type() == at::kBool ? Mask::Kind::hides : Mask::Kind::adds;
  return {kind, mask->const_data_ptr(), strides[0], strides[1], strides[2], strides[3]};
}

// Whether the kernel is for this: few queries for a head of `keys`, and dtypes that it knows.
bool is_native(const Tensor& query, const Tensor& keys, std::initializer_list<const Tensor*> others, const OptTensor& mask) {
  for (const Tensor* t : others)
    if (t->scalar_type() != at::kFloat) return false;
  return query.scalar_type() == at::kFloat && keys.scalar_type() == at::kFloat &&
         query.size(2) * query.size(1) <= kMostRows * keys.size(1) &&
         (!mask || mask->scalar_type() == at::kBool || mask->scalar_type() == at::kFloat);
}

void share_out(const attention::Op& op, bool appends) {
  const int64_t units = op.batch * op.heads;
  const int64_t work = units * op.length() * (op.keys.dim + op.values.dim) * (op.rows() + appends);
  if (units > 0)
    fanin::share_out(units, work, [&](int64_t first, int64_t last) {
      attention::run_heads(op, first, last, fanin::scratch(attention::scratch_floats(op)));
    });
}

float scale_of(std::optional<double> scale, int64_t dim) {
  return static_cast<float>(scale ? *scale : 1.0 / std::sqrt(static_cast<double>(dim)));
}

// y, and the appended keys and values where they are wanted.
template <bool kAppends>
Three attend(const Tensor& query, const Tensor& past_keys, const Tensor& keys, const Tensor& past_values,
             const Tensor& values, const OptTensor& mask, std::optional<double> scale) {
  const int64_t batch = query.size(0), heads = keys.size(1), queries = query.size(2), dim = keys.size(3);
  const int64_t length = past_keys.size(2) + keys.size(2);
  const auto output = [&](int64_t rows, int64_t columns, int64_t width) {
    return fanin::empty_output({batch, rows, columns, width}, at::kFloat);
  };
  const Tensor y = output(queries, query.size(1), values.size(3));
  Tensor all_keys, all_values;
  if (kAppends) all_keys = output(heads, length, dim), all_values = output(heads, length, values.size(3));

  const Tensor q = with_rows(query), pk = with_rows(past_keys), k = with_rows(keys), pv = with_rows(past_values),
               v = with_rows(values);
  const auto to = [](Tensor& all) { return kAppends ? all.mutable_data_ptr<float>() : nullptr; };
  const attention::Op op{
      batch, heads, heads ? query.size(1) / heads : 0, queries, rows_of(q),
      {rows_of(pk), rows_of(k), pk.size(2), k.size(2), dim, to(all_keys)},
      {rows_of(pv), rows_of(v), pv.size(2), v.size(2), values.size(3), to(all_values)},
      mask_of(mask, {batch, query.size(1), queries, length}),
      scale_of(scale, dim), y.mutable_data_ptr<float>(), {}};
  share_out(op, kAppends);
  return {y.transpose(1, 2), all_keys, all_values};
}

template <class Result>
Result result_of(const Three& three) {
  if constexpr (std::is_same_v<Result, Three>) return three;
  else return std::get<0>(three);
}

template <class Result>
struct Names;
template <>
struct Names<Tensor> {
  static constexpr const char *op = "fanin::attend_appended", *reference = "fanin::attend_appended_reference";
};
template <>
struct Names<Three> {
  static constexpr const char *op = "fanin::append_attend", *reference = "fanin::append_attend_reference";
};

template <class Result>
Result attend_cpu(const Tensor& query, const Tensor& past_keys, const Tensor& keys, const Tensor& past_values,
                  const Tensor& values, const OptTensor& mask, std::optional<double> scale) {
  check_pair("keys", past_keys, keys);
  check_pair("values", past_values, values);
  check(query, keys, past_keys.size(2) + keys.size(2), values, past_values.size(2) + values.size(2));
  if (!is_native(query, keys, {&past_keys, &past_values, &values}, mask)) {
    static const auto reference = fanin::handle_of<Signature<Result>>(Names<Result>::reference);
    return reference.call(query, past_keys, keys, past_values, values, mask, scale);
  }
  constexpr bool kAppends = std::is_same_v<Result, Three>;
  return result_of<Result>(attend<kAppends>(query, past_keys, keys, past_values, values, mask, scale));
}

// Attention over a whole cache, to which `written` goes first.
Tensor attend_whole(const Tensor& query, const Tensor& keys, const Tensor& values, const OptTensor& mask,
                    std::optional<double> scale, const attention::Written& written) {
  const int64_t batch = query.size(0), heads = keys.size(1), queries = query.size(2), length = keys.size(2);
  const Tensor q = with_rows(query), k = with_rows(keys), v = with_rows(values);
  const Tensor y = fanin::empty_output({batch, queries, query.size(1), values.size(3)}, at::kFloat);
  const attention::Op op{
      batch, heads, heads ? query.size(1) / heads : 0, queries, rows_of(q),
      {rows_of(k), {}, length, 0, keys.size(3), nullptr}, {rows_of(v), {}, length, 0, values.size(3), nullptr},
      mask_of(mask, {batch, query.size(1), queries, length}), scale_of(scale, keys.size(3)), y.mutable_data_ptr<float>(), written};
  share_out(op, false);
  return y.transpose(1, 2);
}

Tensor attend_cache_cpu(const Tensor& query, const Tensor& keys, const Tensor& values, const OptTensor& mask,
                        std::optional<double> scale) {
  TORCH_CHECK_VALUE(keys.dim() == 4 && values.dim() == 4, "fanin: keys and values must be [batch, heads, length, dim], got ",
                    keys.sizes(), " and ", values.sizes());
  check(query, keys, keys.size(2), values, values.size(2));
  if (is_native(query, keys, {&values}, mask)) return attend_whole(query, keys, values, mask, scale, {});
  static const auto reference = fanin::handle_of<decltype(attend_cache_cpu)>("fanin::attend_cache_reference");
  return reference.call(query, keys, values, mask, scale);
}

void check_written(const Tensor& keys, const Tensor& values, const Tensor& new_keys, const Tensor& new_values,
                   const Tensor& position) {
  check_pair("keys", keys, new_keys);
  check_pair("values", values, new_values);
  TORCH_CHECK_VALUE(position.dim() == 1 && position.scalar_type() == at::kLong, "fanin: position must be int64 of one dimension, got ",
                    position.scalar_type(), " ", position.sizes());
  for (const Tensor* fresh : {&new_keys, &new_values})
    TORCH_CHECK_VALUE(fresh->size(2) == position.size(0), "fanin: there are ", position.size(0), " positions for new rows ",
                      fresh->sizes());
}

Tensor write_attend_cpu(const Tensor& query, const Tensor& keys, const Tensor& values, const Tensor& new_keys,
                        const Tensor& new_values, const Tensor& position, const OptTensor& mask, std::optional<double> scale) {
  check_written(keys, values, new_keys, new_values, position);
  check(query, keys, keys.size(2), values, values.size(2));
  const auto in_place = [](const Tensor& cache) { return cache.stride(3) == 1 || cache.size(3) <= 1; };
  if (!in_place(keys) || !in_place(values) || !is_native(query, keys, {&values, &new_keys, &new_values}, mask)) {
    static const auto reference = fanin::handle_of<decltype(write_attend_cpu)>("fanin::write_attend_reference");
    return reference.call(query, keys, values, new_keys, new_values, position, mask, scale);
  }
  at::assert_no_internal_overlap(keys);
  at::assert_no_internal_overlap(values);
  const Tensor k = with_rows(new_keys), v = with_rows(new_values), at = position.contiguous();
  const int64_t* positions = at.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < at.size(0); ++i)
    TORCH_CHECK_INDEX(positions[i] >= 0 && positions[i] < keys.size(2), "fanin: position ", positions[i],
                      " is not in a cache of length ", keys.size(2));
  return attend_whole(query, keys, values, mask, scale,
                      {rows_of(k), rows_of(v), positions, at.size(0), keys.mutable_data_ptr<float>(), values.mutable_data_ptr<float>()});
}

Tensor write_attend_autograd(c10::DispatchKeySet keys_of, const Tensor& query, const Tensor& keys, const Tensor& values,
                             const Tensor& new_keys, const Tensor& new_values, const Tensor& position, const OptTensor& mask,
                             std::optional<double> scale) {
  if (fanin::wants_grad(query, keys, values, new_keys, new_values, mask)) {
    static const auto reference = fanin::handle_of<decltype(write_attend_cpu)>("fanin::write_attend_reference");
    return reference.call(query, keys, values, new_keys, new_values, position, mask, scale);
  }
  static const auto op = fanin::handle_of<decltype(write_attend_cpu)>("fanin::write_attend");
  at::AutoDispatchBelowAutograd guard;
  return op.redispatch(keys_of & c10::after_autograd_keyset, query, keys, values, new_keys, new_values, position, mask, scale);
}

// What was written to has another version from then on.
Tensor write_attend_counted(c10::DispatchKeySet keys_of, const Tensor& query, const Tensor& keys, const Tensor& values,
                            const Tensor& new_keys, const Tensor& new_values, const Tensor& position, const OptTensor& mask,
                            std::optional<double> scale) {
  static const auto op = fanin::handle_of<decltype(write_attend_cpu)>("fanin::write_attend");
  Tensor y;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    y = op.redispatch(keys_of & c10::after_ADInplaceOrView_keyset, query, keys, values, new_keys, new_values, position, mask, scale);
  }
  for (const Tensor* cache : {&keys, &values}) cache->unsafeGetTensorImpl()->bump_version();
  return y;
}

Tensor attend_cache_autograd(c10::DispatchKeySet keys_of, const Tensor& query, const Tensor& keys, const Tensor& values,
                             const OptTensor& mask, std::optional<double> scale) {
  if (fanin::wants_grad(query, keys, values, mask)) {
    static const auto reference = fanin::handle_of<decltype(attend_cache_cpu)>("fanin::attend_cache_reference");
    return reference.call(query, keys, values, mask, scale);
  }
  static const auto op = fanin::handle_of<decltype(attend_cache_cpu)>("fanin::attend_cache");
  at::AutoDispatchBelowADInplaceOrView guard;
  return op.redispatch(keys_of & c10::after_autograd_keyset, query, keys, values, mask, scale);
}

// Below autograd unless a gradient is asked for; then the reference, of which torch knows the derivatives.
template <class Result>
Result attend_autograd(c10::DispatchKeySet keys_of, const Tensor& query, const Tensor& past_keys, const Tensor& keys,
                       const Tensor& past_values, const Tensor& values, const OptTensor& mask,
                       std::optional<double> scale) {
  if (fanin::wants_grad(query, past_keys, keys, past_values, values, mask)) {
    static const auto reference = fanin::handle_of<Signature<Result>>(Names<Result>::reference);
    return reference.call(query, past_keys, keys, past_values, values, mask, scale);
  }
  static const auto op = fanin::handle_of<Signature<Result>>(Names<Result>::op);
  at::AutoDispatchBelowADInplaceOrView guard;
  return op.redispatch(keys_of & c10::after_autograd_keyset, query, past_keys, keys, past_values, values, mask, scale);
}

}  // namespace

TORCH_LIBRARY_IMPL(fanin, CPU, m) {
  m.impl("attend_cache", attend_cache_cpu);
  m.impl("write_attend", write_attend_cpu);
  m.impl("attend_appended", attend_cpu<Tensor>);
  m.impl("append_attend", attend_cpu<Three>);
}

TORCH_LIBRARY_IMPL(fanin, AutogradCPU, m) {
  m.impl("attend_cache", attend_cache_autograd);
  m.impl("write_attend", write_attend_autograd);
  m.impl("attend_appended", attend_autograd<Tensor>);
  m.impl("append_attend", attend_autograd<Three>);
}

TORCH_LIBRARY_IMPL(fanin, ADInplaceOrView, m) { m.impl("write_attend", write_attend_counted); }
