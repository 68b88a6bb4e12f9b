// A packed weight is read once, front to back, and those of a network do not fit the caches.
#pragma once

#include "vec.h"

namespace fanin {

// Every line from `ahead` bytes behind `begin`.
template <class T>
FANIN_INLINE void request(const T* begin, const T* end, int64_t ahead) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (const T* p = begin; p < end; p += kLine) __builtin_prefetch(reinterpret_cast<const char*>(p) + ahead);
}

// Requests what stands a page of values behind these entries, and the columns that belong to it: the hardware's own requests
// end with the page. Where the work on an entry hides the wait, as in tiles of several vectors, this only costs.
template <class V, class C>
FANIN_INLINE void request_ahead(const V* values, const C* columns, int64_t entries) {
  constexpr int64_t kAhead = 4096;
  request(values, values + entries, kAhead);
  request(columns, columns + entries, kAhead * sizeof(C) / sizeof(V));
}

}  // namespace fanin
