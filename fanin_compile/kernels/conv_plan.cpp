// Builds a plan: for each block of rows and chunk of channels, the runs of non-zeros sorted by length, their values and
// offsets in the order in which the kernel reads them.
#include <algorithm>
#include <cstring>

#include "conv.h"
#include "dispatch.h"

namespace fanin::conv {
namespace {

struct Run {
  int64_t start, count;         // in the structure
  uint16_t row;                 // in its block
  bool first, last;             // of its row
  int part() const { return first ? (last ? 0 : 1) : (last ? 3 : 2); }
};

using Stages = std::vector<std::vector<Run>>;   // [block][chunk]

// Cuts rows into runs of one chunk. Null or what is wrong.
template <class I>
const char* cut(const Structure& st, const Plan& plan, const std::vector<int32_t>& rows, Stages& runs) {
  const Shape& shape = plan.shape;
  const I* indices = static_cast<const I*>(st.indices);
  const int64_t taps = shape.taps(), fan_in = shape.group_channels() * taps, chunk = plan.layout.chunk;
  const int64_t rows_per_group = shape.out_channels / shape.groups, chunks = plan.layout.chunks(shape);
  for (int64_t block = 0; block < plan.blocks(); ++block)
    for (int64_t i = plan.block[block]; i < plan.block[block + 1]; ++i) {
      const int64_t begin = st.begin(rows[i]), end = st.begin(rows[i] + 1);
      const int64_t base = plan.live[i] / rows_per_group * shape.group_channels();
      int64_t previous = -1, j = begin;
      while (j < end) {
        const int64_t start = j;
        if (indices[j] < 0 || indices[j] >= fan_in) return "outside the dense fan-in";
        const int64_t at = (base + indices[j] / taps) / chunk;
        for (; j < end; ++j) {
          const int64_t index = indices[j];
          if (index <= previous) return "not strictly ascending";
          if (index >= fan_in) return "outside the dense fan-in";
          if (base + index / taps >= (at + 1) * chunk) break;
          previous = index;
        }
        runs[block * chunks + at].push_back(
            {start, j - start, static_cast<uint16_t>(i - plan.block[block]), start == begin, j == end});
      }
    }
  return nullptr;
}

// Appends one visit: runs[together], side by side.
template <class I>
void visit(const Structure& st, int64_t block, int64_t chunk, const Run* runs, Plan& plan) {
  const Shape& shape = plan.shape;
  const Layout& l = plan.layout;
  const I* indices = static_cast<const I*>(st.indices);
  const int64_t taps = shape.taps();
  const int64_t rows_per_group = shape.out_channels / shape.groups;
  const int64_t count = std::max_element(runs, runs + l.together, [](const Run& a, const Run& b) { return a.count < b.count; })->count;
  for (int r = 0; r < l.together; ++r) plan.rows.push_back(runs[r].row);
  plan.counts.push_back(static_cast<uint16_t>(count));
  for (int64_t j = 0; j < count; ++j)
    for (int r = 0; r < l.together; ++r) {
      const Run& run = runs[r];
      float value = 0;
      int64_t offset = l.chunk * l.channel;                   // the channel of zeros behind a chunk
      if (j < run.count) {
        value = with_dtype(st.value_type, [&](auto v) { return widen1(static_cast<const decltype(v)*>(st.values) + run.start + j); });
        const int64_t index = indices[run.start + j], tap = index % taps;
        const int64_t base = plan.live[plan.block[block] + run.row] / rows_per_group * shape.group_channels();
        offset = (base + index / taps - chunk * l.chunk) * l.channel + l.tap_phase[tap] * l.plane + l.tap[tap] * l.vector;
      }
      plan.values.push_back(value);
      plan.offsets.push_back(static_cast<uint16_t>(offset));
    }
}

template <class I>
void stages(const Structure& st, Stages& runs, Plan& plan) {
  const int64_t chunks = plan.layout.chunks(plan.shape), together = plan.layout.together;
  for (int64_t block = 0; block < plan.blocks(); ++block)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      std::vector<Run>& stage = runs[block * chunks + chunk];
      if (stage.empty()) continue;
      std::stable_sort(stage.begin(), stage.end(), [](const Run& a, const Run& b) {
        return a.part() != b.part() ? a.part() < b.part() : a.count < b.count;
      });
      Stage out{chunk * plan.layout.chunk, static_cast<int64_t>(plan.offsets.size()), static_cast<int64_t>(plan.counts.size()), {}};
      auto run = stage.begin();
      for (int part = 0; part < 4; ++part) {
        const auto end = std::find_if(run, stage.end(), [&](const Run& r) { return r.part() != part; });
        while (run < end) {
          Run group[kTogether];
          const int64_t real = std::min<int64_t>(together, end - run);
          // a missing run repeats a row, before it: what is stored last counts
          for (int64_t i = 0; i < together; ++i) {
            group[i] = run[std::max<int64_t>(0, i - (together - real))];
            if (i < together - real) group[i].count = 0;
          }
          visit<I>(st, block, chunk, group, plan);
          run += real;
        }
        out.end[part] = static_cast<int64_t>(plan.counts.size());
      }
      plan.stages[block].push_back(out);
    }
}

}  // namespace

const char* build_plan(const Structure& st, const Shape& shape, const Layout& layout, int64_t split, Plan& plan) {
  plan = Plan{};
  plan.shape = shape;
  plan.layout = layout;
  std::vector<int32_t> rows;
  std::vector<bool> alive(shape.out_channels);
  for (int64_t r = 0; r < st.n; ++r) {
    if (st.begin(r + 1) == st.begin(r)) continue;
    const int32_t out = st.rows ? st.rows[r] : static_cast<int32_t>(r);
    if (out < 0 || out >= shape.out_channels || alive[out]) return "rows outside the output channels, or repeated";
    alive[out] = true;
    rows.push_back(static_cast<int32_t>(r));
    plan.live.push_back(out);
  }
  for (int32_t o = 0; o < shape.out_channels; ++o)
    if (!alive[o]) plan.dead.push_back(o);

  const int64_t n = static_cast<int64_t>(plan.live.size());
  const int64_t blocks = split * ((n + kBlockRows * split - 1) / (kBlockRows * split));
  for (int64_t b = 0; b <= blocks; ++b) plan.block.push_back(b * n / std::max<int64_t>(blocks, 1));
  plan.stages.resize(blocks);
  Stages runs(blocks * layout.chunks(shape));
  return with_itype(st.type, [&](auto zero) -> const char* {
    using I = decltype(zero);
    if (const char* wrong = cut<I>(st, plan, rows, runs)) return wrong;
    const int64_t nonzeros = st.begin(st.n);
    if (layout.together == 1) plan.values.reserve(nonzeros), plan.offsets.reserve(nonzeros);
    stages<I>(st, runs, plan);
    plan.values.shrink_to_fit(), plan.offsets.shrink_to_fit();
    return nullptr;
  });
}

int64_t Plan::nbytes() const {
  int64_t total = static_cast<int64_t>(sizeof(int32_t) * (live.size() + dead.size()) + sizeof(float) * values.size() +
                                       sizeof(uint16_t) * (counts.size() + rows.size() + offsets.size()));
  for (const auto& stage : stages) total += static_cast<int64_t>(sizeof(Stage) * stage.size());
  return total;
}

}  // namespace fanin::conv
