// Runs the linear kernels, without torch, on random odd shapes in exactly sized heap buffers and compares every output
// with a double-precision sum. Weights are packed here, one entry at a time, from linear.h alone. Built by
// test_kernels_native.py at each vector width, under ASan and UBSan.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "dispatch.h"
#include "linear.h"
#include "vec.h"

using namespace fanin;

namespace {

std::mt19937 rng(7);
int64_t pick(std::initializer_list<int64_t> choices) { return choices.begin()[rng() % choices.size()]; }
float value() { return static_cast<float>(static_cast<int>(rng() % 2001) - 1000) / 500.0f; }
DType any_type() { return static_cast<DType>(rng() % 3); }
int64_t size_of(DType type) { return type == DType::f32 ? 4 : 2; }
double eps_of(DType type) { return type == DType::f32 ? 0x1p-23 : type == DType::f16 ? 0x1p-10 : 0x1p-7; }

// Numbers stored as `type` in a buffer of just their size, and what is read back.
struct Floats {
  DType type;
  std::unique_ptr<char[]> bytes;
  std::vector<float> exact;

  Floats(const std::vector<float>& from, DType type)
      : type(type), bytes(new char[from.size() * size_of(type)]), exact(from.size()) {
    with_dtype(type, [&](auto zero) {
      auto* p = reinterpret_cast<decltype(zero)*>(bytes.get());
      for (size_t i = 0; i < from.size(); ++i) narrow1(p + i, from[i]), exact[i] = widen1(p + i);
    });
  }
  static Floats random(int64_t count, DType type) {
    std::vector<float> from(count);
    for (float& f : from) f = value();
    return Floats(from, type);
  }
};

struct Entry {
  int64_t row, column;
  size_t place;                                               // among the packed values
};

// A packed weight [out, in], a share of whose rows is empty.
struct Weight {
  int64_t out, in;
  std::vector<Entry> entries;
  std::unique_ptr<char[]> structure;
  std::unique_ptr<Floats> values;

  Weight(int64_t out, int64_t in, bool even_blocks) : out(out), in(in) {
    Structure h{};
    h.version = Structure::kVersion, h.out = out, h.in = in, h.width = pick({1, 7, 40, 63, 255, 256, 1023});
    if (h.width == 1) h.width = std::max<int64_t>(1, in / 50);  // a segment for each column is too slow at -O0
    h.column_bytes = h.width <= 255 && rng() % 4 ? 1 : 2, h.tile = 1 + rng() % 3;
    h.chunks = std::max<int64_t>(1, (in + h.width - 1) / h.width);
    h.blocks = even_blocks ? 2 * pick({1, 2, 3}) : pick({1, 2, 5});
    h.blocks = std::min<int64_t>(h.blocks, std::max<int64_t>(out, even_blocks ? 2 : 1));

    const uint32_t density = pick({1, 10, 50, 100}), empty = pick({0, 0, 30, 100});
    std::vector<bool> ablated(out);
    for (int64_t r = 0; r < out; ++r) ablated[r] = rng() % 100 < empty;
    std::vector<Segment> segments;
    std::vector<Group> groups;
    std::vector<int64_t> columns;
    std::vector<float> numbers;
    for (int64_t block = 0; block < h.blocks; ++block)
      for (int64_t chunk = 0; chunk < h.chunks; ++chunk) {
        segments.push_back({static_cast<int32_t>(groups.size()), static_cast<int32_t>(columns.size())});
        const int64_t r0 = h.first_row(block), height = h.first_row(block + 1) - r0;
        std::vector<std::pair<int64_t, std::vector<int64_t>>> runs;  // row in the block, columns in the chunk
        for (int64_t r = 0; r < height; ++r) {
          std::vector<int64_t> run;
          for (int64_t c = 0; c < h.width && chunk * h.width + c < in; ++c)
            if (!ablated[r0 + r] && rng() % 100 < density) run.push_back(c);
          if (!run.empty()) runs.emplace_back(r, run);
        }
        std::shuffle(runs.begin(), runs.end(), rng);          // groups need not be sorted to be right
        for (size_t first = 0; first < runs.size(); first += 4) {
          Group group{};
          size_t longest = 0;
          for (size_t lane = 0; lane < 4; ++lane) {
            const bool there = first + lane < runs.size();
            group.row[lane] = static_cast<uint16_t>(there ? runs[first + lane].first : height);
            if (there) longest = std::max(longest, runs[first + lane].second.size());
          }
          group.pairs = static_cast<uint16_t>((longest + 1) / 2);
          groups.push_back(group);
          for (size_t step = 0; step < 2u * group.pairs; ++step)
            for (size_t lane = 0; lane < 4; ++lane) {
              const bool there = first + lane < runs.size() && step < runs[first + lane].second.size();
              const int64_t column = there ? runs[first + lane].second[step] : h.width;
              if (there) entries.push_back({r0 + group.row[lane], chunk * h.width + column, columns.size()});
              columns.push_back(column), numbers.push_back(there ? value() : 0);
            }
        }
      }
    segments.push_back({static_cast<int32_t>(groups.size()), static_cast<int32_t>(columns.size())});
    values = std::make_unique<Floats>(numbers, any_type());
    h.nnz = static_cast<int64_t>(entries.size()), h.entries = static_cast<int64_t>(columns.size());

    std::vector<char> packed_columns(columns.size() * h.column_bytes);
    for (size_t i = 0; i < columns.size(); ++i) std::memcpy(&packed_columns[i * h.column_bytes], &columns[i], h.column_bytes);
    struct Part {
      int64_t* at;
      const void* from;
      int64_t bytes;
    };
    std::vector<Part> parts{{&h.segments_at, segments.data(), static_cast<int64_t>(segments.size() * sizeof(Segment))},
                            {&h.groups_at, groups.data(), static_cast<int64_t>(groups.size() * sizeof(Group))},
                            {&h.columns_at, packed_columns.data(), static_cast<int64_t>(packed_columns.size())}};
    std::shuffle(parts.begin(), parts.end(), rng);            // each is the last one at times, with nothing behind it
    int64_t end = sizeof h;
    for (const Part& part : parts) *part.at = (end + 63) / 64 * 64, end = *part.at + part.bytes;
    h.bytes = end, structure.reset(new char[end]);
    std::memcpy(structure.get(), &h, sizeof h);
    for (const Part& part : parts)
      if (part.bytes) std::memcpy(structure.get() + *part.at, part.from, part.bytes);
  }
  const Structure& view() const { return *reinterpret_cast<const Structure*>(structure.get()); }
};

// What each output is, and by how much it may be off.
struct Exact {
  std::vector<double> value, error;
};

// bias + x @ W.T of [batch, in] inputs, themselves off by x.error
Exact linear(const Weight& w, const Floats& bias, const Exact& x, int64_t batch) {
  Exact y{std::vector<double>(batch * w.out), std::vector<double>(batch * w.out)};
  for (int64_t b = 0; b < batch; ++b) {
    double* sum = &y.value[b * w.out];
    double* error = &y.error[b * w.out];
    std::vector<double> size(w.out);
    for (int64_t o = 0; o < w.out; ++o) sum[o] = bias.exact[o], size[o] = std::fabs(bias.exact[o]);
    for (const Entry& e : w.entries) {
      const double weight = w.values->exact[e.place], term = weight * x.value[b * w.in + e.column];
      sum[e.row] += term, size[e.row] += std::fabs(term);
      error[e.row] += std::fabs(weight) * x.error[b * w.in + e.column];
    }
    for (int64_t o = 0; o < w.out; ++o) error[o] += (w.in + 3) * 0x1p-23 * size[o];
  }
  return y;
}

// A norm of inputs, as linear.h describes it, or none.
struct Norm {
  std::unique_ptr<float[]> packed;

  explicit Norm(int64_t in) {
    if (rng() % 2) return;
    packed.reset(new float[2 * (in + 1)]);
    for (int64_t i = 0; i < 2 * (in + 1); ++i) packed[i] = value();
    packed[in] = 1e-3f, packed[2 * in + 1] = rng() % 2;
  }
  // Each of `batch` rows of x normalised, and by how much that may be off.
  void apply(Exact& x, int64_t batch, int64_t in) const {
    if (!packed) return;
    for (int64_t b = 0; b < batch; ++b) {
      double *row = x.value.data() + b * in, mean = 0, square = 0, largest = 0;
      for (int64_t c = 0; c < in; ++c) mean += row[c] / in, largest = std::max(largest, std::fabs(row[c]));
      if (packed[2 * in + 1] == 0) mean = 0;
      for (int64_t c = 0; c < in; ++c) square += (row[c] - mean) * (row[c] - mean) / in;
      const double scale = 1 / std::sqrt(square + packed[in]);
      for (int64_t c = 0; c < in; ++c) {
        const double weight = packed[c], bias = packed[in + 1 + c];
        row[c] = (row[c] - mean) * scale * weight + bias;
        x.error[b * in + c] = (in + 8) * 0x1p-23 * (std::fabs(weight) * scale * largest + std::fabs(row[c]) + std::fabs(bias));
      }
    }
  }
};

// Inputs and outputs of one call, `y` full of NaN.
struct Call {
  int64_t batch, in, out, stride;
  DType type;
  Floats x, residual;
  std::unique_ptr<char[]> y;

  Call(int64_t batch, int64_t in, int64_t out)
      : batch(batch), in(in), out(out), stride(in + rng() % 3), type(any_type()),
        x(Floats::random((batch - 1) * stride + in, type)), residual(Floats::random(batch * out, type)),
        y(new char[batch * out * size_of(type)]) {
    std::memset(y.get(), 0xff, batch * out * size_of(type));
  }
  Linear op(const Weight& w, const Floats& bias) const {
    Linear op{};
    op.weight = &w.view(), op.values = w.values->bytes.get(), op.value_type = w.values->type;
    op.bias = bias.bytes.get(), op.bias_type = bias.type;
    op.x = x.bytes.get(), op.batch = batch, op.x_stride = stride, op.x_type = type;
    return op;
  }
  Exact inputs() const {
    Exact exact{std::vector<double>(batch * in), std::vector<double>(batch * in)};
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t c = 0; c < in; ++c) exact.value[b * in + c] = x.exact[b * stride + c];
    return exact;
  }
  // The largest error of y, which should be z + residual, in units of what is allowed.
  double worst(const Exact& z) const {
    double worst = 0;
    for (int64_t i = 0; i < batch * out; ++i) {
      const double want = z.value[i] + residual.exact[i];
      const double got = with_dtype(type, [&](auto zero) -> double {
        return widen1(reinterpret_cast<const decltype(zero)*>(y.get()) + i);
      });
      const double bound = z.error[i] + 0x1p-22 * std::fabs(residual.exact[i]) + eps_of(type) * std::fabs(want) + 1e-7;
      const double excess = std::fabs(got - want) / bound;
      worst = excess <= worst ? worst : std::isnan(excess) ? INFINITY : excess;
    }
    return worst;
  }
};

// In a thread of its own, so that scratch memory is of the size this call asks for.
void run(const std::function<void()>& kernels) { std::thread(kernels).join(); }

// [0, count) in one or two pieces, as threads share it
template <class F>
void pieces(int64_t count, const F& f) {
  const int64_t middle = rng() % 2 ? count / 2 : 0;
  if (middle) f(int64_t{0}, middle);
  f(middle, count);
}

template <class F>
void tiles(int64_t batch, const F& f) {
  const int64_t width = tiling_for(batch).lanes * static_cast<int64_t>(1 + rng() % kMaxVectors);
  for (int64_t lane = 0; lane < batch; lane += width) f(lane, std::min(width, batch - lane));
}

int64_t any_batch() { return pick({1, 1, 2, 7, 8, 9, 16, 31, 33, 64}); }

double one_layer() {
  // now and then so wide that x is packed in several windows
  const bool wide = rng() % 8 == 0;
  const int64_t out = wide ? 11 : pick({1, 7, 63, 100, 130}), in = wide ? 6000 : pick({0, 1, 7, 63, 100, 225, 500});
  const Weight w(out, in, false);
  const Call call(wide ? pick({2, 33, 50}) : any_batch(), in, out);
  const Floats bias = Floats::random(out, any_type());
  Linear op = call.op(w, bias);
  const Norm norm(in);
  op.y = call.y.get(), op.residual = call.residual.bytes.get(), op.norm = norm.packed.get();
  run([&] {
    if (call.batch == 1) {
      const std::unique_ptr<float[]> x(new float[slots(w.view())]);
      pack_row(op, 0, x.get());
      pieces(w.view().blocks, [&](int64_t a, int64_t b) { linear_dot(op, 0, x.get(), a, b); });
    } else {
      tiles(call.batch, [&](int64_t lane, int64_t lanes) {
        pieces(w.view().blocks, [&](int64_t a, int64_t b) { linear_lanes(op, lane, lanes, a, b); });
      });
    }
  });
  Exact x = call.inputs();
  norm.apply(x, call.batch, in);
  return call.worst(linear(w, bias, x, call.batch));
}

double chain_of_two() {
  const bool gated = rng() % 2;
  const int64_t in = pick({1, 7, 63, 225}), hidden = pick({1, 9, 64, 130, 300}), out = pick({1, 7, 63, 100});
  const Weight w(gated ? 2 * hidden : hidden, in, gated), w2(out, hidden, false);
  const Call call(any_batch(), in, out);
  const Floats bias = Floats::random(w.out, any_type()), bias2 = Floats::random(out, any_type());
  Chain chain{call.op(w, bias), call.op(w2, bias2), gated};
  const Norm norm(in);
  chain.first.norm = norm.packed.get();
  chain.first.act = Act::relu, chain.second.y = call.y.get(), chain.second.residual = call.residual.bytes.get();
  const Structure &first = w.view(), &second = w2.view();
  const int64_t half = gated ? first.blocks / 2 : first.blocks;  // the second factor comes after the first
  run([&] {
    if (call.batch == 1) {
      const std::unique_ptr<float[]> x(new float[slots(first)]), h(new float[slots(second)]);
      pack_row(chain.first, 0, x.get());
      chain_gaps(chain, 1, h.get());
      pieces(half, [&](int64_t a, int64_t b) { chain_hidden(chain, x.get(), a, b, h.get()); });
      if (gated) pieces(half, [&](int64_t a, int64_t b) { chain_hidden(chain, x.get(), half + a, half + b, h.get()); });
      pieces(second.blocks, [&](int64_t a, int64_t b) { chain_output(chain, h.get(), a, b); });
    } else {
      tiles(call.batch, [&](int64_t lane, int64_t lanes) {
        const int64_t stride = tiling_for(call.batch).stride_of(lanes);
        const std::unique_ptr<float[]> h(new float[slots(second) * stride]);
        chain_gaps(chain, stride, h.get());
        pieces(half, [&](int64_t a, int64_t b) { chain_hidden(chain, lane, lanes, a, b, h.get()); });
        if (gated)
          pieces(half, [&](int64_t a, int64_t b) { chain_hidden(chain, lane, lanes, half + a, half + b, h.get()); });
        pieces(second.blocks, [&](int64_t a, int64_t b) { chain_output(chain, lane, lanes, a, b, h.get()); });
      });
    }
  });

  Exact x = call.inputs();
  norm.apply(x, call.batch, in);
  const Exact z = linear(w, bias, x, call.batch);
  Exact h{std::vector<double>(call.batch * hidden), std::vector<double>(call.batch * hidden)};
  for (int64_t b = 0; b < call.batch; ++b)
    for (int64_t c = 0; c < hidden; ++c) {
      const int64_t gate = b * w.out + c, up = gate + hidden;
      const double g = std::max(z.value[gate], 0.0);
      h.value[b * hidden + c] = gated ? g * z.value[up] : g;
      h.error[b * hidden + c] = gated ? z.error[gate] * (std::fabs(z.value[up]) + z.error[up]) + g * z.error[up] + 0x1p-22 * g : z.error[gate];
    }
  return call.worst(linear(w2, bias2, h, call.batch));
}

}  // namespace

int main(int argc, char** argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 300;
  for (int i = 0; i < cases; ++i) {
    const bool chain = i % 3 == 2;
    const double worst = chain ? chain_of_two() : one_layer();
    if (!(worst <= 1)) {
      std::printf("case %d, %s, is %g times its bound\n", i, chain ? "a chain" : "a layer", worst);
      return 1;
    }
  }
  std::printf("%d cases at %ld lanes\n", cases, static_cast<long>(whole_tiling().lanes));
}
