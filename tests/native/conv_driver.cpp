// Runs the convolution kernels, without torch, on random odd geometries in exactly sized heap buffers and compares every
// output with a double-precision sum. Built by test_conv_native.py at each vector width, under ASan and UBSan.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "conv_layout.cpp"
#include "conv_pack.cpp"
#include "conv_plan.cpp"
#include "conv_run.cpp"
#include "conv_store.cpp"

using namespace fanin;
namespace conv = fanin::conv;

namespace {

std::mt19937 rng(11);
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
  conv::Shape shape;
  int64_t batch, n = 0;
  std::vector<int32_t> row_ptr{0}, rows, indices;
};

Case random_case() {
  Case c;
  conv::Shape& s = c.shape;
  const bool pointwise = rng() % 3 == 0;
  for (int d = 0; d < 3; ++d) {
    const bool used = d == 2 || rng() % (d == 0 ? 4 : 2);
    s.kernel[d] = pointwise || !used ? 1 : pick({1, 2, 3, 5});
    s.stride[d] = pointwise || !used ? 1 : pick({1, 1, 2, 3});
    s.dilation[d] = pointwise || !used ? 1 : pick({1, 1, 2});
    s.padding[d] = pointwise || !used ? 0 : pick({0, 1, 2, 3});
    const int64_t least = std::max<int64_t>(1, s.dilation[d] * (s.kernel[d] - 1) + 1 - 2 * s.padding[d]);
    s.in[d] = used ? least + pick({0, 1, 5, 8, 13, d == 0 ? int64_t{2} : int64_t{40}}) : 1;
    s.out[d] = (s.in[d] + 2 * s.padding[d] - s.dilation[d] * (s.kernel[d] - 1) - 1) / s.stride[d] + 1;
  }
  s.groups = pick({1, 1, 1, 2, 3});
  s.in_channels = s.groups * pick({1, 3, 8, 17, 40}), s.out_channels = s.groups * pick({1, 5, 16, 21});
  c.batch = pick({1, 2, 3, 9}), s.images = c.batch == 9 ? 8 : c.batch > 1 ? 2 : 1;
  const double density = std::vector<double>{0.0, 0.1, 0.5, 1.0}[rng() % 4];
  for (int32_t r = 0; r < s.out_channels; ++r) {
    if (rng() % 5 == 0) continue;
    for (int32_t i = 0; i < s.group_channels() * s.taps(); ++i)
      if (rng() % 1000 < density * 1000) c.indices.push_back(i);
    c.rows.push_back(r);
    c.row_ptr.push_back(static_cast<int32_t>(c.indices.size()));
  }
  c.n = static_cast<int64_t>(c.rows.size());
  return c;
}

double worst_excess(const Case& c) {
  const conv::Shape& s = c.shape;
  const DType x_type = static_cast<DType>(rng() % 3), value_type = static_cast<DType>(rng() % 3);
  const bool last = rng() % 2;
  const int64_t nnz = static_cast<int64_t>(c.indices.size()), in = s.pixels_in(), out = s.pixels_out();
  const Floats x(c.batch * s.in_channels * in, x_type), values(nnz, value_type), bias(s.out_channels, DType::f32);
  const Floats residual(c.batch * s.out_channels * out, x_type);
  std::vector<char> y(residual.bytes.size(), static_cast<char>(0xff));        // NaN
  const std::vector<uint16_t> indices(c.indices.begin(), c.indices.end());

  const conv::Shape flat = conv::flatten_pointwise(s);
  conv::Layout layout;
  const double fan_in = static_cast<double>(nnz) / static_cast<double>(std::max<int64_t>(c.n, 1));
  if (!conv::make_layout(flat, fan_in, layout)) return INFINITY;
  conv::Plan plan;
  const conv::Structure structure{
      indices.data(), values.bytes.data(), c.row_ptr.data(), c.rows.data(), c.n, 0, IType::u16, value_type};
  const int64_t split = pick({1, 2});
  if (conv::build_plan(structure, flat, layout, split, plan)) return INFINITY;
  conv::Op op{};
  op.plan = &plan, op.x = x.bytes.data(), op.bias = bias.bytes.data();
  op.residual = rng() % 2 ? residual.bytes.data() : nullptr, op.y = y.data(), op.batch = c.batch;
  op.x_type = x_type, op.channels_last = last, op.act = rng() % 2 ? Act::relu : Act::none;
  const int64_t per = plan.blocks() / split;
  for (int64_t part = 0; part < split && per > 0; ++part) {
    const int64_t floats = conv::scratch_floats(plan, part * per, (part + 1) * per);
    const auto free_it = [](float* p) { std::free(p); };
    const std::unique_ptr<float, decltype(free_it)> scratch(
        static_cast<float*>(std::aligned_alloc(64, (floats * 4 + 63) / 64 * 64)), free_it);
    for (int64_t image = 0; image < c.batch; image += layout.images)
      for (int64_t unit = 0; unit < layout.units(); ++unit)
        conv::run(op, image, unit, part * per, (part + 1) * per, scratch.get());
  }
  for (int64_t image = 0; image < c.batch; ++image) conv::run_dead(op, image);

  const auto at = [&](int64_t image, int64_t channel, int64_t pixel, int64_t channels, int64_t pixels) {
    return last ? (image * pixels + pixel) * channels + channel : (image * channels + channel) * pixels + pixel;
  };
  std::vector<int64_t> row_of(s.out_channels, -1);
  for (int64_t r = 0; r < c.n; ++r) row_of[c.rows[r]] = r;
  double worst = 0;
  for (int64_t image = 0; image < c.batch; ++image)
    for (int64_t o = 0; o < s.out_channels; ++o)
      for (int64_t p = 0; p < out; ++p) {
        const conv::Dims pixel{p / (s.out[1] * s.out[2]), p / s.out[2] % s.out[1], p % s.out[2]};
        double sum = bias.exact[o], size = std::fabs(sum);
        const int64_t where = at(image, o, p, s.out_channels, out);
        if (op.residual) sum += residual.exact[where], size += std::fabs(residual.exact[where]);
        const int64_t begin = row_of[o] < 0 ? 0 : c.row_ptr[row_of[o]], end = row_of[o] < 0 ? 0 : c.row_ptr[row_of[o] + 1];
        for (int64_t j = begin; j < end; ++j) {
          int64_t tap = c.indices[j] % s.taps(), from = 0;
          const int64_t channel = o / (s.out_channels / s.groups) * s.group_channels() + c.indices[j] / s.taps();
          bool inside = true;
          const conv::Dims k{tap / (s.kernel[1] * s.kernel[2]), tap / s.kernel[2] % s.kernel[1], tap % s.kernel[2]};
          for (int d = 0; d < 3; ++d) {
            const int64_t i = pixel[d] * s.stride[d] + k[d] * s.dilation[d] - s.padding[d];
            inside = inside && i >= 0 && i < s.in[d];
            from = from * s.in[d] + i;
          }
          if (!inside) continue;
          const double term = static_cast<double>(values.exact[j]) * x.exact[at(image, channel, from, s.in_channels, in)];
          sum += term, size += std::fabs(term);
        }
        if (op.act == Act::relu) sum = std::max(sum, 0.0);
        const double eps = x_type == DType::f32 ? 0.0 : x_type == DType::f16 ? 0x1p-10 : 0x1p-7;
        const double bound = 2 * (end - begin + 3) * 0x1p-23 * size + eps * std::fabs(sum) + 1e-6;
        const float got = with_dtype(x_type, [&](auto zero) { return widen1(reinterpret_cast<decltype(zero)*>(y.data()) + where); });
        const double excess = std::fabs(got - sum) / bound;
        worst = excess <= worst ? worst : excess;               // a NaN wins
      }
  return worst;
}

}  // namespace

int main(int, char** arguments) {
  const int cases = std::atoi(arguments[1]);
  for (int i = 0; i < cases; ++i)
    if (const double excess = worst_excess(random_case()); !(excess <= 1.0)) {
      std::printf("case %d is off by %g times its bound\n", i, excess);
      return 1;
    }
  std::printf("%d cases at %d lanes\n", cases, kLanes);
}
