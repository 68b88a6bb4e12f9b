// A packed weight is read once, front to back, and those of a network do not fit the caches.
#pragma once

#include "vec.h"

namespace fanin {

// Bytes between what is read of the values and what is requested: the hardware's own requests end with the page.
inline constexpr int64_t kAhead = 4096;

// What stands a page behind these values, and the columns that belong to it.
template <class V, class C>
FANIN_INLINE void request_page(const V* values, const C* columns) {
  __builtin_prefetch(reinterpret_cast<const char*>(values) + kAhead);
  __builtin_prefetch(reinterpret_cast<const char*>(columns) + kAhead * sizeof(C) / sizeof(V));
}

// The same for every line of these entries.
template <class T>
FANIN_INLINE void request(const T* begin, const T* end, int64_t ahead) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (const T* p = begin; p < end; p += kLine) __builtin_prefetch(reinterpret_cast<const char*>(p) + ahead);
}
template <class V, class C>
FANIN_INLINE void request_ahead(const V* values, const C* columns, int64_t entries) {
  request(values, values + entries, kAhead);
  request(columns, columns + entries, kAhead * sizeof(C) / sizeof(V));
}

}  // namespace fanin
