// Runs the linear kernels, without torch, on random odd shapes in exactly sized heap buffers and compares every output
// with a double-precision sum. Built by test_kernels_native.py at each vector width, under ASan and UBSan.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "linear_dot.cpp"
#include "linear_epilogue.cpp"
#include "linear_lanes.cpp"
#include "linear_plan.cpp"

using namespace fanin;

namespace {

std::mt19937 rng(7);
int64_t pick(std::initializer_list<int64_t> choices) { return choices.begin()[rng() % choices.size()]; }
float value() { return static_cast<float>(static_cast<int>(rng() % 2001) - 1000) / 500.0f; }

// Floats stored as `type`, and what the kernels read back.
struct Floats {
  std::vector<char> bytes;
  std::vector<float> exact;

  Floats(int64_t count, DType type) : bytes(count * (type == DType::f32 ? 4 : 2)), exact(count) {
    with_dtype(type, [&](auto zero) {
      auto* p = reinterpret_cast<decltype(zero)*>(bytes.data());
      for (int64_t i = 0; i < count; ++i) {
        narrow1(p + i, value());
        exact[i] = widen1(p + i);
      }
    });
  }
};

struct Case {
  int64_t n, in, out, batch, k;
  bool constant;                                              // without row_ptr
  std::vector<int32_t> row_ptr{0}, rows, columns;
};

Case random_case() {
  Case c;
  c.n = pick({0, 1, 7, 63, 100, 385, 800}), c.in = pick({1, 7, 63, 100, 225, 500, 2000});
  c.batch = pick({1, 2, 7, 8, 9, 16, 31, 33, 64});
  c.constant = rng() % 2, c.k = std::min(c.in, pick({0, 1, 3, 20, c.in}));
  const bool ablated = rng() % 2;
  std::vector<int32_t> all(c.in);
  for (int64_t i = 0; i < c.in; ++i) all[i] = static_cast<int32_t>(i);
  c.out = 0;
  for (int64_t r = 0; r < c.n; ++r) {
    const int64_t count = c.constant ? c.k : static_cast<int64_t>(rng() % (c.k + 1));
    std::shuffle(all.begin(), all.end(), rng);
    std::sort(all.begin(), all.begin() + count);
    c.columns.insert(c.columns.end(), all.begin(), all.begin() + count);
    std::sort(all.begin(), all.end());
    c.row_ptr.push_back(static_cast<int32_t>(c.columns.size()));
    if (ablated) c.out += rng() % 3;
    c.rows.push_back(static_cast<int32_t>(c.out++));
  }
  if (ablated || c.n == 0) c.out += 1 + rng() % 20;
  return c;
}

double worst_excess(const Case& c) {
  const DType x_type = static_cast<DType>(rng() % 3), value_type = static_cast<DType>(rng() % 3);
  const IType index_type = static_cast<IType>(c.in <= 256 ? rng() % 3 : 1 + rng() % 2);
  const int64_t nnz = static_cast<int64_t>(c.columns.size()), stride = c.in + rng() % 3;
  const Floats x((c.batch - 1) * stride + c.in, x_type), values(nnz, value_type), bias(c.out, DType::bf16);
  const Floats residual(c.batch * c.out, x_type);
  std::vector<char> columns, y(c.batch * c.out * (x_type == DType::f32 ? 4 : 2), static_cast<char>(0xff));  // NaN
  with_itype(index_type, [&](auto zero) {
    columns.resize(nnz * sizeof(zero));
    for (int64_t i = 0; i < nnz; ++i) reinterpret_cast<decltype(zero)*>(columns.data())[i] = static_cast<decltype(zero)>(c.columns[i]);
  });
  std::vector<int32_t> plan(Plan::size(c.n, c.in));
  const int32_t* row_ptr = c.constant ? nullptr : c.row_ptr.data();
  if (!build_plan(plan.data(), columns.data(), index_type, row_ptr, c.n, c.k, c.in)) return INFINITY;

  Linear op{};
  op.x = x.bytes.data(), op.values = values.bytes.data(), op.indices = columns.data(), op.row_ptr = row_ptr, op.k = c.k;
  static const int32_t no_rows = 0;                           // an empty vector's data() may be null, which means identity
  op.rows = c.rows.empty() ? &no_rows : c.rows.data(), op.bias = bias.bytes.data(), op.residual = residual.bytes.data(), op.plan = plan.data();
  op.y = y.data(), op.batch = c.batch, op.in = c.in, op.out = c.out, op.n = c.n, op.x_stride = stride;
  op.x_type = x_type, op.value_type = value_type, op.bias_type = DType::bf16, op.index_type = index_type;
  if (c.batch == 1) {
    std::vector<float> wide(c.in);
    widen_row(op.x, x_type, c.in, wide.data());
    const int64_t middle = c.n / 2;                           // two ranges, as two threads take them
    linear_dot(op, 0, wide.data(), 0, middle);
    if (middle < c.n) linear_dot(op, 0, wide.data(), middle, c.n);
  } else {
    const int64_t width = vector_lanes() * (1 + rng() % max_vectors());
    for (int64_t lane = 0; lane < c.batch; lane += width)
      for (int64_t block = 0; block < Plan::blocks(c.n); ++block)
        linear_lanes(op, lane, std::min(width, c.batch - lane), block, block + 1);
  }

  double worst = 0;
  for (int64_t b = 0; b < c.batch; ++b) {
    std::vector<double> sum(c.out), size(c.out);
    for (int64_t o = 0; o < c.out; ++o) {
      sum[o] = double{bias.exact[o]} + residual.exact[b * c.out + o];
      size[o] = std::fabs(bias.exact[o]) + std::fabs(residual.exact[b * c.out + o]);
    }
    for (int64_t r = 0; r < c.n; ++r)
      for (int64_t p = c.row_ptr[r]; p < c.row_ptr[r + 1]; ++p) {
        const double term = double{values.exact[p]} * x.exact[b * stride + c.columns[p]];
        sum[c.rows[r]] += term, size[c.rows[r]] += std::fabs(term);
      }
    for (int64_t o = 0; o < c.out; ++o) {
      const double got = with_dtype(x_type, [&](auto zero) -> double {
        return widen1(reinterpret_cast<const decltype(zero)*>(y.data()) + b * c.out + o);
      });
      const double eps = x_type == DType::f32 ? 0x1p-23 : x_type == DType::f16 ? 0x1p-10 : 0x1p-7;
      const double bound = (c.in + 3) * 0x1p-23 * size[o] + eps * std::fabs(sum[o]) + 1e-7;
      const double excess = std::fabs(got - sum[o]) / bound;
      worst = excess <= worst ? worst : std::isnan(excess) ? INFINITY : excess;
    }
  }
  return worst;
}

}  // namespace

int main(int argc, char** argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 300;
  for (int i = 0; i < cases; ++i) {
    const Case c = random_case();
    const double worst = worst_excess(c);
    if (!(worst <= 1)) {
      std::printf("case %d: n=%ld in=%ld out=%ld batch=%ld nnz=%zu is %g times its bound\n", i, static_cast<long>(c.n),
                  static_cast<long>(c.in), static_cast<long>(c.out), static_cast<long>(c.batch), c.columns.size(), worst);
      return 1;
    }
  }
  std::printf("%d cases at %ld lanes\n", cases, static_cast<long>(vector_lanes()));
}
