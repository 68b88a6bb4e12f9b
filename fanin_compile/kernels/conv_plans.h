// The plans of convolutions, kept between calls for as long as their weights live. Includes torch headers.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "conv.h"
#include "torch_types.h"

namespace fanin::conv {

using at::Tensor;

// What a plan was made of. The storage is held weakly: its address cannot be given to another tensor while an entry names
// it. Inference tensors do not count their changes, so their contents are summed instead.
struct Fingerprint {
  c10::weak_intrusive_ptr<c10::StorageImpl> storage;
  const void* data;
  int64_t count;
  at::ScalarType type;
  uint64_t version;

  bool is(const Tensor& t, uint64_t now) const {
    return storage._unsafe_get_target() == t.storage().unsafeGetStorageImpl() && data == t.const_data_ptr() &&
           count == t.numel() && type == t.scalar_type() && version == now;
  }
};

inline Fingerprint fingerprint(const Tensor& t, uint64_t version) {
  return {t.storage().getWeakStorageImpl(), t.const_data_ptr(), t.numel(), t.scalar_type(), version};
}

inline uint64_t version_of(const Tensor& t) {
  if (!t.is_inference()) return t._version();
  uint64_t sum = 0xcbf29ce484222325u;
  const char* p = static_cast<const char*>(t.const_data_ptr());
  const int64_t bytes = static_cast<int64_t>(t.nbytes());
  for (int64_t i = 0; i < bytes; i += 8) {
    uint64_t word = 0;
    std::memcpy(&word, p + i, std::min<int64_t>(8, bytes - i));
    sum = (sum ^ word) * 0x9e3779b97f4a7c15u;
  }
  return sum;
}

inline std::vector<int32_t> contents(const int32_t* p, int64_t count) {
  return p ? std::vector<int32_t>(p, p + count) : std::vector<int32_t>();
}

struct Request {
  const Tensor &indices, &values;
  Structure structure;
  Shape shape;
  int64_t batch, threads;

  // Parts into which the rows are cut, so that all threads have work: packing is repeated in each.
  int64_t split(const Layout& l) const {
    const int64_t items = (batch + l.images - 1) / l.images * l.units();
    int64_t parts = 1;
    while (parts < threads && items * parts < 4 * threads && items * parts % threads != 0) ++parts;
    return parts;
  }
};

struct Entry {
  Fingerprint indices, values;
  std::vector<int32_t> row_ptr, rows;
  int64_t split;
  std::shared_ptr<const Plan> plan;

  bool expired() const { return indices.storage.expired() || values.storage.expired(); }
  bool serves(const Request& r, uint64_t of_indices, uint64_t of_values) const {
    const auto same = [](const std::vector<int32_t>& kept, const int32_t* p, int64_t count) {
      return p ? static_cast<int64_t>(kept.size()) == count && std::equal(kept.begin(), kept.end(), p) : kept.empty();
    };
    return indices.is(r.indices, of_indices) && values.is(r.values, of_values) &&
           split == r.split(plan->layout) && plan->shape == r.shape &&
           same(row_ptr, r.structure.row_ptr, r.structure.n + 1) && same(rows, r.structure.rows, r.structure.n);
  }
};

inline constexpr size_t kPlansPerWeight = 4;           // geometries and thread counts of one weight that are remembered

class Plans {
 public:
  std::shared_ptr<const Plan> find(const Request& r) {
    const uint64_t of_indices = version_of(r.indices), of_values = version_of(r.values);
    const void* key = r.indices.const_data_ptr();
    {
      const std::lock_guard lock(mutex_);
      if (const auto found = entries_.find(key); found != entries_.end())
        for (const Entry& entry : found->second)
          if (entry.serves(r, of_indices, of_values)) return entry.plan;
    }
    std::shared_ptr<const Plan> plan = build(r);
    if (!plan) return nullptr;
    const std::lock_guard lock(mutex_);
    drop_expired();
    std::vector<Entry>& entries = entries_[key];
    std::erase_if(entries, [&](const Entry& e) { return !e.indices.is(r.indices, of_indices) || !e.values.is(r.values, of_values); });
    if (entries.size() == kPlansPerWeight) entries.erase(entries.begin());
    entries.push_back({fingerprint(r.indices, of_indices), fingerprint(r.values, of_values),
                       contents(r.structure.row_ptr, r.structure.n + 1), contents(r.structure.rows, r.structure.n),
                       r.split(plan->layout), plan});
    return plan;
  }

  int64_t nbytes() {
    const std::lock_guard lock(mutex_);
    drop_expired();
    int64_t total = 0;
    for (const auto& [key, entries] : entries_)
      for (const Entry& entry : entries) total += entry.plan->nbytes();
    return total;
  }

  // Most bytes that one thread needs at a time, over all plans kept.
  int64_t scratch_nbytes() {
    const std::lock_guard lock(mutex_);
    drop_expired();
    int64_t most = 0;
    for (const auto& [key, entries] : entries_)
      for (const Entry& entry : entries) {
        const int64_t per = entry.plan->blocks() / entry.split;
        for (int64_t first = 0; first + per <= entry.plan->blocks() && per > 0; first += per)
          most = std::max(most, scratch_floats(*entry.plan, first, first + per) * int64_t{sizeof(float)});
      }
    return most;
  }

 private:
  static std::shared_ptr<const Plan> build(const Request& r) {
    Layout layout;
    auto plan = std::make_shared<Plan>();
    const double rows = static_cast<double>(std::max<int64_t>(r.structure.n, 1));
    if (!make_layout(r.shape, static_cast<double>(r.indices.numel()) / rows, layout)) return nullptr;
    const char* wrong = build_plan(r.structure, r.shape, layout, r.split(layout), *plan);
    TORCH_CHECK_VALUE(!wrong, "fanin: indices or rows are ", wrong);
    return plan;
  }

  void drop_expired() {
    for (auto item = entries_.begin(); item != entries_.end();) {
      std::erase_if(item->second, [](const Entry& entry) { return entry.expired(); });
      item = item->second.empty() ? entries_.erase(item) : std::next(item);
    }
  }

  std::mutex mutex_;
  std::unordered_map<const void*, std::vector<Entry>> entries_;
};

}  // namespace fanin::conv
