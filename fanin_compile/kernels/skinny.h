// Interface of the dense kernel for few batch rows: plain data, no torch headers. README.md has its figures.
#pragma once

#include <cstdint>

namespace fanin::skinny {

// y[rows, out] = x[rows, in] @ weight[out, in].T + bias, all fp32.
struct Op {
  const float *x, *weight, *bias;               // bias may be null
  float* y;
  int64_t rows, in, out;
  int64_t x_stride;                             // floats from one row to the next; weight and y have none between rows
};

inline constexpr int64_t kMostRows = 6;         // that read a weight together; more take turns
inline constexpr int64_t kFew = 16;             // rows: of more, torch's product of matrices is as fast

// Neurons [first, last), all rows.
void run(const Op& op, int64_t first, int64_t last);

}  // namespace fanin::skinny
