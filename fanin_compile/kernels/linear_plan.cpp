// Builds the plan of the lanes kernel: a counting sort of each block's rows by their count in each chunk.
#include <vector>

#include "dispatch.h"
#include "linear.h"

namespace fanin {
namespace {

template <class I>
bool fill(int32_t* plan, const I* indices, const int32_t* row_ptr, int64_t n, int64_t k, int64_t in, int level) {
  const int64_t width = Plan::width(level);
  const auto begin = [&](int64_t r) { return row_ptr ? int64_t{row_ptr[r]} : r * k; };
  const auto key = [&](int64_t count) { return count < width ? count : width; };
  std::vector<int64_t> cursor, slot;
  std::vector<int32_t> count;
  for (int64_t block = 0; block < Plan::blocks(n); ++block) {
    const int64_t first = Plan::first_row(n, block), rows = Plan::first_row(n, block + 1) - first;
    cursor.resize(rows), count.resize(rows);
    for (int64_t r = 0; r < rows; ++r) cursor[r] = begin(first + r);
    for (int64_t chunk = 0; chunk < Plan::chunks(in, level); ++chunk) {
      const int64_t stop = (chunk + 1) * width < in ? (chunk + 1) * width : in;
      slot.assign(width + 2, 0);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t end = begin(first + r + 1);
        int64_t p = cursor[r];
        while (p < end && int64_t{indices[p]} >= chunk * width && int64_t{indices[p]} < stop) ++p;
        if (p - cursor[r] > UINT16_MAX) return false;         // only rows that repeat a column
        count[r] = static_cast<int32_t>(p - cursor[r]);
        ++slot[key(count[r]) + 1];
        cursor[r] = p;
      }
      for (int64_t c = 0; c <= width; ++c) slot[c + 1] += slot[c];
      Visit* visits = const_cast<Visit*>(Plan::visits(plan, n, in, level, block, chunk));
      for (int64_t r = 0; r < rows; ++r)
        visits[slot[key(count[r])]++] = {static_cast<int32_t>(cursor[r] - count[r]), static_cast<uint16_t>(r),
                                    static_cast<uint16_t>(count[r])};
    }
    for (int64_t r = 0; r < rows; ++r)
      if (cursor[r] != begin(first + r + 1)) return false;
  }
  const Visit* end = Plan::visits(plan, n, in, level, Plan::blocks(n), 0);
  __builtin_memset(const_cast<Visit*>(end), 0, Plan::kAhead * sizeof(Visit));
  return true;
}

}  // namespace

bool build_plan(int32_t* plan, const void* indices, IType type, const int32_t* row_ptr, int64_t n, int64_t k, int64_t in) {
  const int64_t nnz = row_ptr ? row_ptr[n] : n * k;
  const int32_t header[Plan::kHeader] = {Plan::kVersion, static_cast<int32_t>(n), static_cast<int32_t>(in),
                                         static_cast<int32_t>(nnz)};
  for (int64_t i = 0; i < Plan::kHeader; ++i) plan[i] = header[i];
  return with_itype(type, [&](auto zero) {
    const auto* columns = static_cast<const decltype(zero)*>(indices);
    bool ok = true;
    for (int level = 0; level < Plan::kLevels; ++level) ok = ok && fill(plan, columns, row_ptr, n, k, in, level);
    return ok;
  });
}

bool columns_below(const void* indices, IType type, const int32_t* row_ptr, int64_t n, int64_t k, int64_t in) {
  return with_itype(type, [&](auto zero) {
    const auto* columns = static_cast<const decltype(zero)*>(indices);
    bool below = true;
    for (int64_t r = 0; r < n; ++r) {
      const int64_t first = row_ptr ? row_ptr[r] : r * k, end = row_ptr ? row_ptr[r + 1] : first + k;
      below = below && (end == first || int64_t{columns[end - 1]} < in);
    }
    return below;
  });
}

bool plan_fits(const int32_t* plan, int64_t n, int64_t in, int64_t nnz) {
  return plan[0] == Plan::kVersion && plan[1] == n && plan[2] == in && plan[3] == nnz;
}

}  // namespace fanin
