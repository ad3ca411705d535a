// The bookkeeping of conv_covariance.h's shifted form along one axis. Torch-free, on the host.
#pragma once

#include <algorithm>
#include <vector>

#include "common/conv_shape.h"
#include "cuda/conv_covariance.h"

namespace kronfac::cuda {

// One axis of the shifted form. A term is a difference of offsets and the phase of the left one: entries of the map at
// phase + u * step, times those `difference` further on.
struct ConvAxis {
  struct Range {
    int64_t first, last;  // of u
  };
  struct Term {
    int64_t phase, difference;
    std::vector<Range> ranges;
  };
  std::vector<Term> terms;
  std::vector<ConvPair> pairs;
};

inline int64_t conv_floor_divide(int64_t a, int64_t b) { return a / b - (a % b < 0 ? 1 : 0); }

inline ConvAxis plan_conv_axis(const ConvShape& shape, size_t axis) {
  using Range = ConvAxis::Range;
  const int64_t kernel = shape.kernel[axis], step = shape.step[axis];
  ConvAxis plan;
  std::vector<Range> of_pair;
  std::vector<std::vector<Range>> of_term;
  for (int64_t i = 0; i < kernel; ++i) {
    for (int64_t j = 0; j < kernel; ++j) {
      const int64_t left = i * shape.dilation[axis] - shape.low[axis],
                    right = j * shape.dilation[axis] - shape.low[axis];
      const int64_t shift = conv_floor_divide(left, step), phase = left - shift * step;
      // Outputs whose left and right entry both lie in the map, and where their left entries lie.
      const int64_t first = std::max<int64_t>(0, -conv_floor_divide(std::min(left, right), step)),
                    last = std::min(shape.out[axis],
                                    conv_floor_divide(shape.size[axis] - 1 - std::max(left, right), step) + 1);
      size_t term = 0;
      while (term < plan.terms.size() &&
             (plan.terms[term].phase != phase || plan.terms[term].difference != right - left)) {
        ++term;
      }
      if (term == plan.terms.size()) {
        plan.terms.push_back({phase, right - left, {}});
        of_term.emplace_back();
      }
      of_pair.push_back({first + shift, std::max(first, last) + shift});
      plan.pairs.push_back({static_cast<int32_t>(term), 0, 0});
      if (first < last) of_term[term].push_back(of_pair.back());
    }
  }
  for (size_t t = 0; t < plan.terms.size(); ++t) {
    std::vector<int64_t> ends;
    for (const Range& range : of_term[t]) ends.insert(ends.end(), {range.first, range.last});
    std::sort(ends.begin(), ends.end());
    ends.erase(std::unique(ends.begin(), ends.end()), ends.end());
    for (size_t e = 1; e < ends.size(); ++e) {
      const auto covers = [&](const Range& range) { return range.first <= ends[e - 1] && ends[e] <= range.last; };
      if (std::any_of(of_term[t].begin(), of_term[t].end(), covers))
        plan.terms[t].ranges.push_back({ends[e - 1], ends[e]});
    }
  }
  for (size_t p = 0; p < plan.pairs.size(); ++p) {
    ConvPair& pair = plan.pairs[p];
    const auto& ranges = plan.terms[static_cast<size_t>(pair.term)].ranges;
    if (of_pair[p].first == of_pair[p].last) continue;
    for (const Range& range : ranges) {
      if (range.last <= of_pair[p].first) ++pair.first;
      if (range.last <= of_pair[p].last) ++pair.last;
    }
  }
  return plan;
}

}  // namespace kronfac::cuda
