// Builds a plan: for each block of rows and chunk of channels, the runs of non-zeros sorted by length; and their offsets.
#include <algorithm>

#include "conv.h"
#include "dispatch.h"

namespace fanin::conv {
namespace {

struct Run {
  int64_t channel;              // chunk's first channel
  Visit visit;
  bool first, last;             // of its row
  int part() const { return first ? (last ? 0 : 1) : (last ? 3 : 2); }
};

// Cuts rows into runs of one chunk; writes offsets unless the indices serve as they are. Null or what is wrong.
template <class I>
const char* cut(const Structure& st, const Shape& shape, const Layout& layout, const std::vector<int32_t>& rows,
                std::vector<std::vector<Run>>& runs, Plan& plan) {
  const I* indices = static_cast<const I*>(st.indices);
  const int64_t taps = shape.taps(), fan_in = shape.group_channels() * taps;
  const int64_t rows_per_group = shape.out_channels / shape.groups, blocks = plan.blocks();
  std::vector<int32_t> tap(taps);
  for (int64_t t = 0; t < taps; ++t)
    tap[t] = layout.pointwise ? 0 : static_cast<int32_t>(layout.tap_phase[t] * layout.plane + layout.tap[t] - layout.low);
  const int64_t step = layout.pointwise ? 1 : layout.channel;

  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t i = plan.block[block]; i < plan.block[block + 1]; ++i) {
      const int64_t begin = st.begin(rows[i]), end = st.begin(rows[i] + 1);
      const int64_t base = plan.live[i] / rows_per_group * shape.group_channels();
      int64_t previous = -1, j = begin;
      while (j < end) {
        const int64_t index = indices[j];
        if (index < 0 || index >= fan_in) return "outside the dense fan-in";
        const int64_t chunk = (base + index / taps) / layout.chunk, first = chunk * layout.chunk;
        const int64_t start = j;
        for (; j < end; ++j) {
          const int64_t at = indices[j];
          if (at <= previous) return "not strictly ascending";
          if (at >= fan_in) return "outside the dense fan-in";
          const int64_t channel = base + at / taps;
          if (channel >= first + layout.chunk) break;
          previous = at;
          if (!plan.offsets.empty()) plan.offsets[j] = static_cast<uint16_t>((channel - first) * step + tap[at % taps]);
        }
        runs[block * (static_cast<int64_t>(runs.size()) / blocks) + chunk].push_back(
            {first, {static_cast<int32_t>(start), static_cast<uint16_t>(i - plan.block[block]), static_cast<uint16_t>(j - start)},
             start == begin, j == end});
      }
    }
  return nullptr;
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
  // the indices of an ungrouped pointwise layer are its offsets, from channel 0
  if (!(layout.pointwise && shape.groups == 1 && st.type == IType::u16)) plan.offsets.resize(st.begin(st.n));

  const int64_t chunks = (shape.in_channels + layout.chunk - 1) / layout.chunk;
  std::vector<std::vector<Run>> runs(blocks * chunks);
  const char* wrong = with_itype(st.type, [&](auto zero) { return cut<decltype(zero)>(st, shape, layout, rows, runs, plan); });
  if (wrong) return wrong;
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      std::vector<Run>& stage = runs[block * chunks + chunk];
      if (stage.empty()) continue;
      std::stable_sort(stage.begin(), stage.end(), [](const Run& a, const Run& b) {
        return a.part() != b.part() ? a.part() < b.part() : a.visit.count < b.visit.count;
      });
      int64_t ends[4];
      for (int part = 0; part < 4; ++part)
        ends[part] = std::count_if(stage.begin(), stage.end(), [&](const Run& run) { return run.part() <= part; });
      const int64_t begin = static_cast<int64_t>(plan.visits.size());
      for (const Run& run : stage) plan.visits.push_back(run.visit);
      plan.stages[block].push_back(
          {chunk * layout.chunk, begin, begin + ends[0], begin + ends[1], begin + ends[2], begin + ends[3]});
    }
  plan.visits.resize(plan.visits.size() + kVisitsAhead);      // the kernel looks ahead
  return nullptr;
}

int64_t Plan::nbytes() const {
  int64_t total = static_cast<int64_t>(sizeof(int32_t) * (live.size() + dead.size()) + sizeof(Visit) * visits.size() +
                                       sizeof(uint16_t) * offsets.size());
  for (const auto& stage : stages) total += static_cast<int64_t>(sizeof(Stage) * stage.size());
  return total;
}

}  // namespace fanin::conv
