// The layouts of convolutions, kept between calls: they depend on shapes, of the weight and of images. No torch headers.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "conv.h"

namespace fanin::conv {

class Geometries {
 public:
  // Null where there is no layout: see make_layout. Shape as flatten_pointwise() gives it.
  std::shared_ptr<const Geometry> find(const Structure& w, const Shape& shape) {
    const Key key{shape, w.chunk, w.together, w.nnz, w.live, w.blocks, w.entries};
    const std::lock_guard lock(mutex_);
    for (const Entry& entry : entries_)
      if (entry.key == key) return entry.geometry;
    auto made = std::make_shared<Geometry>();
    made->shape = shape;
    made->kernels = &kernels_for(shape);
    if (!made->kernels->make_layout(w, shape, made->layout)) made = nullptr;
    if (entries_.size() == kMost) entries_.erase(entries_.begin(), entries_.begin() + kMost / 2);
    entries_.push_back({key, made});
    return made;
  }

 private:
  static constexpr size_t kMost = 256;          // a network has some dozens; with every image of another size, the oldest go

  struct Key {
    Shape shape;
    int64_t chunk, together, nnz, live, blocks, entries;
    bool operator==(const Key&) const = default;
  };
  struct Entry {
    Key key;
    std::shared_ptr<const Geometry> geometry;
  };
  std::mutex mutex_;
  std::vector<Entry> entries_;
};

}  // namespace fanin::conv
