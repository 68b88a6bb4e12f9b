// Interface of the decode attention kernel: plain data, no torch headers. Derivations: ATTENTION.md.
#pragma once

#include <cstdint>

namespace fanin::attention {

// A tensor [batch, heads, length, dim] whose last dimension is contiguous; strides in elements.
struct Rows {
  const float* data;
  int64_t batch, head, row;
};

// The rows of every head: those of the cache, and behind them the new ones.
struct Appended {
  Rows past, fresh;
  int64_t past_length, fresh_length, dim;
  float* all;                   // [batch, heads, length, dim] contiguous, where they are written together, or null

  int64_t length() const { return past_length + fresh_length; }
};

// [batch, heads * group, queries, length], strides 0 where it is broadcast.
struct Mask {
  enum class Kind { none, hides, adds } kind;       // hides: bool, false where a key is hidden; adds: float, to the scores
  const void* data;
  int64_t batch, head, query, key;
};

// Rows of keys and values that go into the cache before it is read: row i of each head to row position[i].
struct Written {
  Rows keys, values;
  const int64_t* position;
  int64_t count;
  float *to_keys, *to_values;   // the cache's own data
};

// y = softmax(scale * query keys^T + mask) values; 0 where a query's keys are all hidden.
struct Op {
  int64_t batch, heads, group;  // heads: of keys and values, each of which serves a group of the queries' heads
  int64_t queries;
  Rows query;                   // [batch, heads * group, queries, keys.dim]
  Appended keys, values;        // of one length
  Mask mask;
  float scale;
  float* y;                     // [batch, queries, heads * group, values.dim] contiguous; every element is written
  Written written;              // to keys.past and values.past; none if count is 0

  int64_t length() const { return keys.length(); }
  int64_t rows() const { return group * queries; }   // of queries that read one head of keys
};

// Floats of scratch that a call needs on its thread.
int64_t scratch_floats(const Op& op);
// Heads [first, last) of batch * heads.
void run_heads(const Op& op, int64_t first, int64_t last, float* scratch);

}  // namespace fanin::attention
