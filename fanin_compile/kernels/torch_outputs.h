// Memory for large outputs, kept between calls. Includes torch headers.
//
// glibc gives blocks beyond 32 MB, and the top of its heap, back to the system when they are freed: the pages that the next
// call writes are then made and cleared anew, a fifth of the time of a memory-bound layer. What else is in the heap decides
// whether that is so: 64->64 3x3 at 56 on two threads took 165 or 203 us from one process to the next.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/alloc_cpu.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <mutex>
#include <vector>

namespace fanin {

// Freed blocks. Together with those in use they never take more than half as many bytes again as were asked for at one time:
// a block may serve a smaller output, and the next large one should still find its own.
class OutputBlocks final : public c10::Allocator {
 public:
  static constexpr size_t kLeast = 128 << 10;   // bytes of a block that is kept: from so many on glibc maps memory by itself

  c10::DataPtr allocate(size_t bytes) override {
    const size_t room = with_room(bytes);
    Block* block = take(bytes, room);
    if (!block) block = new Block{c10::alloc_cpu(room), room, bytes};
    return {block->data, block, &give, c10::Device(c10::DeviceType::CPU)};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }

  static OutputBlocks& get() {
    static auto* kept = new OutputBlocks;       // never destroyed: tensors may outlive static destructors
    return *kept;
  }
  int64_t kept_nbytes() {
    const std::lock_guard lock(mutex_);
    return static_cast<int64_t>(free_bytes_);
  }
  void release() {
    const std::lock_guard lock(mutex_);
    most_asked_ = asked_;
    drop_until(0);
  }

 private:
  struct Block {
    void* data;
    size_t bytes, asked;        // asked: by whom it serves now
  };

  // A new block has up to a quarter more: it will serve outputs that grow from call to call, as caches do. What is never
  // written takes no memory.
  static size_t with_room(size_t bytes) {
    const size_t step = std::bit_floor(bytes) / 4;
    return (bytes + step - 1) / step * step;
  }
  // The smallest that is large enough, or null, for which a new one of size `room` will be made.
  Block* take(size_t bytes, size_t room) {
    const std::lock_guard lock(mutex_);
    auto best = free_.end();
    for (auto i = free_.begin(); i != free_.end(); ++i)
      if ((*i)->bytes >= bytes && (best == free_.end() || (*i)->bytes < (*best)->bytes)) best = i;
    Block* block = nullptr;
    if (best != free_.end()) {
      block = *best;
      block->asked = bytes;
      free_.erase(best), free_bytes_ -= block->bytes;
    }
    used_ += block ? block->bytes : room, asked_ += bytes;
    most_asked_ = std::max(most_asked_, asked_);
    return block;
  }

  static void give(void* pointer) { get().keep(static_cast<Block*>(pointer)); }
  void keep(Block* block) {
    const std::lock_guard lock(mutex_);
    used_ -= block->bytes, asked_ -= block->asked, free_bytes_ += block->bytes;
    free_.push_back(block);
    const size_t most = most_asked_ + most_asked_ / 2;
    drop_until(most - std::min(used_, most));
  }
  void drop_until(size_t bytes) {               // the longest unused go first
    auto last = free_.begin();
    for (; last != free_.end() && free_bytes_ > bytes; ++last) {
      free_bytes_ -= (*last)->bytes;
      c10::free_cpu((*last)->data);
      delete *last;
    }
    free_.erase(free_.begin(), last);
  }

  std::mutex mutex_;
  std::vector<Block*> free_;                    // in the order in which they were given back
  size_t free_bytes_ = 0, used_ = 0, asked_ = 0, most_asked_ = 0;           // used: bytes of blocks in use
};

inline at::Tensor empty_output(at::IntArrayRef sizes, at::ScalarType type, at::MemoryFormat format = at::MemoryFormat::Contiguous) {
  const size_t bytes = c10::multiply_integers(sizes) * c10::elementSize(type);
  if (bytes < OutputBlocks::kLeast) return at::detail::empty_cpu(sizes, type, {}, {}, {}, format);
  return at::detail::empty_generic(sizes, &OutputBlocks::get(), c10::DispatchKeySet(c10::DispatchKey::CPU), type, format);
}

}  // namespace fanin
