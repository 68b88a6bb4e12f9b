// Runs the attention kernel, without torch, on random odd sizes, strides and masks in exactly sized heap buffers and compares
// every output with sums in fp64, and appended and written rows to the bit. Built by test_native_drivers.py at each vector width,
// under ASan and UBSan.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "attention.cpp"

using namespace fanin;
namespace attention = fanin::attention;

namespace {

std::mt19937 rng(7);
int64_t pick(std::initializer_list<int64_t> choices) { return choices.begin()[rng() % choices.size()]; }
float value() { return static_cast<float>(static_cast<int>(rng() % 2001) - 1000) / 500.0f; }

// [batch, heads, length, dim], dense or as a view of [batch, length, heads, dim], its elements in a buffer of exactly their
// size; with gaps between the rows, which hold NaN.
struct Tensor {
  std::vector<float> data;
  int64_t batch, head, row;

  Tensor(int64_t b, int64_t h, int64_t l, int64_t d) {
    const int64_t gap = rng() % 3 ? 0 : pick({1, 5});
    const bool turned = rng() % 2;
    row = turned ? h * (d + gap) : d + gap;
    head = turned ? d + gap : l * (d + gap);
    batch = h * l * (d + gap);
    const int64_t size = b * h * l == 0 ? 0 : (b - 1) * batch + (h - 1) * head + (l - 1) * row + d;
    data.assign(size, NAN);
    for (int64_t i = 0; i < b * h * l * d; ++i)
      data[i / d / l / h * batch + i / d / l % h * head + i / d % l * row + i % d] = value();
  }
  attention::Rows rows() const { return {data.data(), batch, head, row}; }
  const float* at(int64_t b, int64_t h, int64_t l) const { return data.data() + b * batch + h * head + l * row; }
};

struct Case {
  attention::Op op;
  Tensor query, past_keys, keys, past_values, values;
  std::unique_ptr<bool[]> hides;
  std::vector<float> adds, y, all_keys, all_values;
  std::vector<int64_t> position;                // of rows of the cache that are written, with those of new_keys and new_values
  Tensor new_keys, new_values, old_keys, old_values;

  // m: of p + n values, how many are in the cache
  Case(int64_t b, int64_t h, int64_t group, int64_t q, int64_t p, int64_t n, int64_t m, int64_t d, int64_t w)
      : query(b, h * group, q, d), past_keys(b, h, p, d), keys(b, h, n, d), past_values(b, h, m, w), values(b, h, p + n - m, w),
        y(b * q * h * group * w, NAN), position(m == p ? rng() % (std::min<int64_t>(p, 3) + 1) : 0),
        new_keys(b, h, position.size(), d), new_values(b, h, position.size(), w), old_keys(past_keys), old_values(past_values) {
    const bool appends = position.empty() && rng() % 2;
    for (int64_t& at : position) at = rng() % p;
    if (appends) all_keys.assign(b * h * (p + n) * d, NAN), all_values.assign(b * h * (p + n) * w, NAN);
    const auto to = [&](std::vector<float>& all) { return appends ? all.data() : nullptr; };
    op = {b, h, group, q, query.rows(), {past_keys.rows(), keys.rows(), p, n, d, to(all_keys)},
          {past_values.rows(), values.rows(), m, p + n - m, w, to(all_values)}, {}, 0.3f, y.data(),
          {new_keys.rows(), new_values.rows(), position.data(), static_cast<int64_t>(position.size()), past_keys.data.data(),
           past_values.data.data()}};
    attention::Mask& mask = op.mask;
    mask.kind = std::vector{attention::Mask::Kind::none, attention::Mask::Kind::hides, attention::Mask::Kind::adds}[rng() % 3];
    // a full mask, or one of a row of keys for each image
    const bool full = rng() % 2;
    const int64_t size = full ? b * h * group * q * (p + n) : b * (p + n);
    mask.key = 1, mask.query = full ? p + n : 0, mask.head = full ? q * (p + n) : 0;
    mask.batch = full ? h * group * q * (p + n) : p + n;
    hides = std::make_unique<bool[]>(size);
    adds.resize(size);
    const int64_t share = pick({1, 3, 100});
    for (int64_t i = 0; i < size; ++i) {
      hides[i] = rng() % share != 0;
      adds[i] = rng() % 5 ? value() : -INFINITY;
    }
    // as of a cache made for more, or of images padded before: rows hidden from all, before and behind the others
    const int64_t length = p + n;
    const int64_t first = length && rng() % 2 ? rng() % length : 0, last = length && rng() % 2 ? rng() % (length + 1) : length;
    for (int64_t i = 0; i < size; ++i) hides[i] = hides[i] && i % length >= first && i % length < last;
    mask.data = mask.kind == attention::Mask::Kind::hides ? static_cast<const void*>(hides.get()) : adds.data();
  }
};

const float* key_row(const Case& c, int64_t b, int64_t h, int64_t t) {
  const int64_t past = c.op.keys.past_length;
  return t < past ? c.past_keys.at(b, h, t) : c.keys.at(b, h, t - past);
}
const float* value_row(const Case& c, int64_t b, int64_t h, int64_t t) {
  const int64_t past = c.op.values.past_length;
  return t < past ? c.past_values.at(b, h, t) : c.values.at(b, h, t - past);
}

int64_t wrong_row(const Case& c, int64_t b, int64_t head, int64_t q) {
  const attention::Op& op = c.op;
  const int64_t h = head / op.group, d = op.keys.dim, w = op.values.dim;
  std::vector<double> weights(op.length());
  double most = -INFINITY, sum = 0.0, error = 0.0;
  for (int64_t t = 0; t < op.length(); ++t) {
    double s = 0.0, size = 0.0;
    for (int64_t i = 0; i < d; ++i) {
      const double term = op.scale * static_cast<double>(c.query.at(b, head, q)[i]) * key_row(c, b, h, t)[i];
      s += term, size += std::abs(term);
    }
    const int64_t at = b * op.mask.batch + head * op.mask.head + q * op.mask.query + t * op.mask.key;
    if (op.mask.kind == attention::Mask::Kind::hides && !c.hides[at]) s = -INFINITY;
    if (op.mask.kind == attention::Mask::Kind::adds) s += c.adds[at];
    weights[t] = s, most = std::max(most, s), error = std::max(error, size + std::abs(c.adds.empty() ? 0.0 : 4.0));
  }
  for (double& s : weights) s = std::isinf(most) ? 0.0 : std::exp(s - most), sum += s;
  int64_t wrong = 0;
  for (int64_t i = 0; i < w; ++i) {
    double exact = 0.0, size = 0.0;
    for (int64_t t = 0; t < op.length(); ++t) {
      const double term = sum > 0.0 ? weights[t] / sum * value_row(c, b, h, t)[i] : 0.0;
      exact += term, size += std::abs(term);
    }
    const double got = c.y[((b * op.queries + q) * op.heads * op.group + head) * w + i];
    const double bound = (4 * (d + 2) * error + 2 * op.length() + 40) * std::numeric_limits<float>::epsilon() * size + 1e-30;
    wrong += !(std::abs(got - exact) <= bound);
  }
  return wrong;
}

// Rows of the cache that are neither what they were nor, where it says so, what was written there last.
int64_t wrong_rows(const Case& c, const Tensor& now, const Tensor& old, const Tensor& fresh, int64_t dim) {
  int64_t count = 0;
  for (int64_t b = 0; b < c.op.batch; ++b)
    for (int64_t h = 0; h < c.op.heads; ++h)
      for (int64_t t = 0; t < c.op.keys.past_length; ++t) {
        const float* expected = old.at(b, h, t);
        for (size_t i = 0; i < c.position.size(); ++i)
          if (c.position[i] == t) expected = fresh.at(b, h, i);
        count += !std::equal(expected, expected + dim, now.at(b, h, t));
      }
  return count;
}

int64_t wrong(const Case& c) {
  const attention::Op& op = c.op;
  int64_t count = 0;
  if (!c.position.empty())
    count += wrong_rows(c, c.past_keys, c.old_keys, c.new_keys, op.keys.dim) +
             wrong_rows(c, c.past_values, c.old_values, c.new_values, op.values.dim);
  for (int64_t b = 0; b < op.batch; ++b) {
    for (int64_t head = 0; head < op.heads * op.group; ++head)
      for (int64_t q = 0; q < op.queries; ++q) count += wrong_row(c, b, head, q);
    for (int64_t h = 0; op.keys.all && h < op.heads; ++h)
      for (int64_t t = 0; t < op.length(); ++t) {
        const int64_t row = (b * op.heads + h) * op.length() + t;
        count += !std::equal(key_row(c, b, h, t), key_row(c, b, h, t) + op.keys.dim, op.keys.all + row * op.keys.dim);
        count += !std::equal(value_row(c, b, h, t), value_row(c, b, h, t) + op.values.dim, op.values.all + row * op.values.dim);
      }
  }
  return count;
}

}  // namespace

int main(int argc, char** argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 100;
  for (int i = 0; i < cases; ++i) {
    const int64_t past = pick({0, 1, 3, 15, 16, 33, 127, rng() % 4 ? int64_t{40} : int64_t{700}}), fresh = pick({1, 1, 2, 7, past == 0 ? 40 : 0});
    Case c(pick({1, 2}), pick({1, 3}), pick({1, 1, 2, 5}), pick({1, 1, 3}), past, fresh,
           rng() % 4 ? past : static_cast<int64_t>(rng() % (past + fresh + 1)), pick({1, 7, 8, 16, 63, 64, 100}),
           pick({1, 5, 16, 63, 64, 100}));
    const attention::Op& op = c.op;
    const int64_t floats = attention::scratch_floats(op), units = op.batch * op.heads;
    const int64_t parts = std::min<int64_t>(units, pick({1, 2}));
    for (int64_t part = 0; part < parts; ++part) {
      auto* scratch = static_cast<float*>(std::aligned_alloc(64, (floats * 4 + 63) / 64 * 64));
      std::fill(scratch, scratch + floats, NAN);
      attention::run_heads(op, units * part / parts, units * (part + 1) / parts, scratch);
      std::free(scratch);
    }
    const int64_t count = wrong(c);
    if (count == 0) continue;
    std::printf("case %d has %ld wrong outputs: batch %ld heads %ld group %ld queries %ld keys %ld + %ld values %ld + %ld dims %ld %ld, "
                "mask %d, appends %d, writes %ld\n", i, count, op.batch, op.heads, op.group, op.queries, op.keys.past_length,
                op.keys.fresh_length, op.values.past_length, op.values.fresh_length, op.keys.dim, op.values.dim, static_cast<int>(op.mask.kind), op.keys.all != nullptr, op.written.count);
    return 1;
  }
  std::printf("%d cases at %d lanes\n", cases, kLanes);
}
