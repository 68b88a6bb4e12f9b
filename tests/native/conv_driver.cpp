// Runs the convolution kernels, without torch, on random odd geometries in exactly sized heap buffers and compares every
// output with a double-precision sum. Built by test_native_drivers.py at each vector width, under ASan and UBSan.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <memory>
#include <random>
#include <vector>

#include "conv_cores.cpp"
#include "conv_layout.cpp"
#include "conv_pack.cpp"
#include "conv_run.cpp"
#include "conv_store.cpp"
#include "conv_weave.cpp"
#include "linear_scratch.cpp"

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

  Floats(const std::vector<float>& from, DType type) : bytes(from.size() * (type == DType::f32 ? 4 : 2)), exact(from.size()) {
    with_dtype(type, [&](auto zero) {
      auto* p = reinterpret_cast<decltype(zero)*>(bytes.data());
      for (size_t i = 0; i < from.size(); ++i) {
        narrow1(p + i, from[i]);
        exact[i] = widen1(p + i);
      }
    });
  }
  Floats(int64_t count, DType type) : Floats(random(count), type) {}

 private:
  static std::vector<float> random(int64_t count) {
    std::vector<float> numbers(count);
    std::generate(numbers.begin(), numbers.end(), value);
    return numbers;
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
    s.stride[d] = !used ? 1 : pick({1, 1, 2, 3});
    s.dilation[d] = pointwise || !used ? 1 : pick({1, 1, 2});
    s.padding[d] = pointwise || !used ? 0 : pick({0, 1, 2, 3});
    const int64_t least = std::max<int64_t>(1, s.dilation[d] * (s.kernel[d] - 1) + 1 - 2 * s.padding[d]);
    s.in[d] = used ? least + pick({0, 1, 5, 8, 13, d == 0 ? int64_t{2} : int64_t{40}}) : 1;
    s.out[d] = (s.in[d] + 2 * s.padding[d] - s.dilation[d] * (s.kernel[d] - 1) - 1) / s.stride[d] + 1;
  }
  s.sharers = pick({1, 1, 2, 3, 5});
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

// One run: the non-zeros [start, start + count) of a live row in one chunk.
struct Run {
  int64_t start, count, row;
  bool first, last;
  int kind() const { return first ? (last ? 0 : 1) : (last ? 3 : 2); }
};

// The weight in exactly sized arrays, packed as packing_conv.py does it, but for blocks and chunks of any size.
struct Packed {
  conv::Structure header{};
  std::vector<char> structure;  // alignment is malloc's
  std::vector<float> values;

  Packed(const Case& c, const std::vector<float>& dense_values) {
    const conv::Shape& s = c.shape;
    const bool pointwise = s.pointwise();
    conv::Structure& h = header;
    h.version = conv::Structure::kVersion;
    h.out = s.out_channels, h.group_channels = s.group_channels(), h.groups = s.groups, h.taps = s.taps();
    h.nnz = static_cast<int64_t>(c.indices.size());
    h.together = pointwise && rng() % 2 ? conv::kTogether : 1;
    h.chunk = std::min<int64_t>(s.in_channels, pick({1, 5, 16, 33}));
    std::vector<int32_t> rows, live;
    for (int64_t r = 0; r < c.n; ++r)
      if (c.row_ptr[r] < c.row_ptr[r + 1]) rows.push_back(c.rows[r]), live.push_back(static_cast<int32_t>(r));
    h.live = static_cast<int64_t>(rows.size()), h.blocks = pick({1, 2, 5});
    for (int32_t o = 0; o < s.out_channels; ++o)
      if (std::find(rows.begin(), rows.begin() + h.live, o) == rows.begin() + h.live) rows.push_back(o);

    int64_t step = conv::kNarrow * 4;
    if (h.together == 1)
      for (step = 1; step < h.taps;) step *= 2;
    std::vector<conv::Stage> stages;
    std::vector<uint16_t> counts, order, codes;
    for (int64_t block = 0; block < h.blocks; ++block)
      for (int64_t chunk = 0; chunk < h.chunks(); ++chunk) {
        std::vector<Run> runs;
        for (int64_t i = h.first_row(block); i < h.first_row(block + 1); ++i) {
          const int64_t begin = c.row_ptr[live[i]], end = c.row_ptr[live[i] + 1];
          Run run{0, 0, i, false, false};
          for (int64_t j = begin; j < end; ++j) {
            if (channel_of(c, rows[i], j) / h.chunk != chunk) continue;
            if (run.count++ == 0) run.start = j, run.first = j == begin;
            run.last = j == end - 1;
          }
          if (run.count) runs.push_back(run);
        }
        conv::Stage stage{static_cast<int32_t>(codes.size()), {}};
        for (int kind = 0; kind < 4; ++kind) {
          stage.visit[kind] = static_cast<int32_t>(counts.size());
          std::vector<Run> of_kind;
          std::copy_if(runs.begin(), runs.end(), std::back_inserter(of_kind), [&](const Run& r) { return r.kind() == kind; });
          for (size_t at = 0; at < of_kind.size(); at += h.together) {
            const int64_t real = std::min<int64_t>(h.together, static_cast<int64_t>(of_kind.size() - at)), missing = h.together - real;
            int64_t longest = 0;
            for (int64_t i = 0; i < real; ++i) longest = std::max(longest, of_kind[at + i].count);
            counts.push_back(static_cast<uint16_t>(longest));
            for (int64_t i = 0; i < h.together; ++i)
              order.push_back(static_cast<uint16_t>(of_kind[at + std::max<int64_t>(0, i - missing)].row - h.first_row(block)));
            for (int64_t j = 0; j < longest; ++j)
              for (int64_t i = 0; i < h.together; ++i) {
                const Run& run = of_kind[at + std::max<int64_t>(0, i - missing)];
                const bool filler = i < missing || j >= run.count;
                const int64_t n = run.start + j;
                values.push_back(filler ? 0.0f : dense_values[n]);
                codes.push_back(static_cast<uint16_t>(
                    filler ? h.chunk * step : (channel_of(c, rows[run.row], n) - chunk * h.chunk) * step + c.indices[n] % h.taps));
              }
          }
        }
        stages.push_back(stage);
        h.longest = std::max(h.longest, static_cast<int64_t>(codes.size()) - stage.entry);
      }
    const auto visits = static_cast<int32_t>(counts.size());
    stages.push_back({static_cast<int32_t>(codes.size()), {visits, visits, visits, visits}});
    h.entries = static_cast<int64_t>(codes.size()), h.visits = visits;
    structure.resize(sizeof(conv::Structure));
    h.rows_at = append(rows), h.stages_at = append(stages), h.counts_at = append(counts), h.order_at = append(order);
    h.codes_at = append(codes), h.bytes = static_cast<int64_t>(structure.size());
    std::memcpy(structure.data(), &h, sizeof(h));
  }

  const conv::Structure& get() const { return *reinterpret_cast<const conv::Structure*>(structure.data()); }

 private:
  static int64_t channel_of(const Case& c, int64_t out, int64_t j) {
    const conv::Shape& s = c.shape;
    return out / (s.out_channels / s.groups) * s.group_channels() + c.indices[j] / s.taps();
  }
  template <class T>
  int64_t append(const std::vector<T>& part) {
    const auto at = static_cast<int64_t>((structure.size() + 7) / 8 * 8);
    structure.resize(at + part.size() * sizeof(T));
    if (!part.empty()) std::memcpy(structure.data() + at, part.data(), part.size() * sizeof(T));
    return at;
  }
};

double worst_excess(const Case& c) {
  const conv::Shape& s = c.shape;
  // fp32 has a store of its own: as often as the others together
  const DType x_type = rng() % 2 ? DType::f32 : static_cast<DType>(rng() % 3), value_type = static_cast<DType>(rng() % 3);
  const bool last = rng() % 2;
  const int64_t nnz = static_cast<int64_t>(c.indices.size()), in = s.pixels_in(), out = s.pixels_out();
  const Floats x(c.batch * s.in_channels * in, x_type), values(nnz, value_type), bias(s.out_channels, DType::f32);
  const Floats residual(c.batch * s.out_channels * out, x_type);
  std::vector<char> y(residual.bytes.size(), static_cast<char>(0xff));        // NaN

  const Packed packed(c, values.exact);
  const Floats stored(packed.values, value_type);
  const conv::Kernels* half = conv::half_kernels();
  const conv::Kernels& kernels = half && rng() % 2 ? *half : conv::whole_kernels();
  conv::Geometry geometry{conv::flatten_pointwise(s), &kernels, {}};
  if (!kernels.make_layout(packed.get(), geometry.shape, geometry.layout)) return INFINITY;
  geometry.layout.cheap_loads = rng() % 2;      // the microkernels of either kind of core
  conv::Op op{};
  op.weight = &packed.get(), op.geometry = &geometry, op.values = stored.bytes.data(), op.value_type = value_type;
  op.x = x.bytes.data(), op.bias = bias.bytes.data();
  op.residual = rng() % 2 ? residual.bytes.data() : nullptr, op.y = y.data(), op.batch = c.batch;
  op.x_type = x_type, op.channels_last = last, op.act = rng() % 2 ? Act::relu : Act::none;
  const int64_t split = pick({1, 2, 3}), floats = kernels.scratch_floats(op);
  for (int64_t part = 0; part < split; ++part) {
    const auto free_it = [](float* p) { std::free(p); };
    const std::unique_ptr<float, decltype(free_it)> scratch(
        static_cast<float*>(std::aligned_alloc(64, (floats * 4 + 63) / 64 * 64)), free_it);
    std::fill_n(scratch.get(), floats, NAN);
    for (int64_t image = 0; image < c.batch; image += geometry.layout.images)
      for (int64_t unit = 0; unit < geometry.layout.units(); ++unit)
        kernels.run(op, image, unit, {part, split}, scratch.get());
  }
  for (int64_t image = 0; image < c.batch; ++image) kernels.run_dead(op, image);

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
