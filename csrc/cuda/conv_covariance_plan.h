// Which form of conv_covariance.h a call takes, and its tables. Made on the host from shapes and strides alone, so that
// results do not depend on the device.
#pragma once

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "common/conv_shape.h"
#include "cuda/conv_covariance_axis.h"

namespace kronfac::cuda {

enum class ConvForm { direct, shift };

// (images, channels, *size), strides in elements.
struct ConvInput {
  Element type;
  const void* data;
  int64_t image, channel, axis[3];
  bool tensor;  // products on tensor cores; not in float64
};
inline int64_t conv_element_bytes(Element type) { return type == Element::f64 ? 8 : type == Element::f32 ? 4 : 2; }

struct ConvPlan {
  ConvForm form;
  bool copied;             // the map is laid out anew
  ConvLayout layout;       // target is set by the caller, as are map, sums and out of `product`
  ConvCovariance product;  // its tables point into device memory after place()
  std::vector<ConvBox> box;
  std::vector<ConvPair> pair[3];
  std::vector<int32_t> ranges[3], combination;
  double cost;

  int64_t layout_size() const {
    if (!copied) return 0;
    const bool direct = form == ConvForm::direct;
    const int64_t* size = direct ? layout.padded : layout.size;
    return layout.images * (direct ? layout.channels : layout.row) * size[0] * size[1] * size[2];
  }
  int64_t sums_size() const { return product.groups * product.parts * product.unit(); }

  // The tables one after another, each from a whole word on.
  std::vector<uint64_t> table() const {
    std::vector<uint64_t> words;
    const auto add = [&words](const auto& list) {
      const size_t bytes = list.size() * sizeof(list[0]), at = words.size();
      words.resize(at + (bytes + 7) / 8);
      if (bytes > 0) std::memcpy(words.data() + at, list.data(), bytes);
    };
    add(box);
    for (const auto& list : pair) add(list);
    for (const auto& list : ranges) add(list);
    add(combination);
    return words;
  }
  void place(const uint64_t* table) {
    const auto next = [&table](const auto& list) {
      const uint64_t* here = table;
      table += (list.size() * sizeof(list[0]) + 7) / 8;
      return here;
    };
    product.box = reinterpret_cast<const ConvBox*>(next(box));
    for (int axis = 0; axis < 3; ++axis) product.pair[axis] = reinterpret_cast<const ConvPair*>(next(pair[axis]));
    for (int axis = 0; axis < 3; ++axis) product.ranges[axis] = reinterpret_cast<const int32_t*>(next(ranges[axis]));
    product.combination = reinterpret_cast<const int32_t*>(next(combination));
  }
};

// Longer kernels have too many pairs of offsets for tables, and so have more boxes or combinations.
inline constexpr int64_t kConvLongest = 16;
inline constexpr size_t kConvMostBoxes = 2048, kConvMostCombinations = 2048;

inline int64_t conv_box_positions(const ConvBox& box, int64_t images) {
  return images * box.extent[0] * box.extent[1] * box.extent[2];
}

// Cuts the sums of all boxes into parts of about equal length: enough blocks of threads for three rounds of three on
// each multiprocessor of a large GPU; on tensor cores, where writing and adding the parts counts, for two rounds of
// four, or of two with large tiles. Large tiles also keep no totals.
inline void plan_conv_parts(ConvPlan& plan) {
  constexpr int64_t kDepth = 32, kLeast = 256;
  ConvCovariance& p = plan.product;
  const int64_t wanted = p.side == 128 ? 528 : p.tensor ? 1056 : 1188, most = p.side == 128 ? 4096 : int64_t{1} << 30;
  const int64_t across = (p.rows + p.side - 1) / p.side;
  int64_t work = 0;
  for (ConvBox& box : plan.box) {
    box.tiles = static_cast<int32_t>(box.symmetric ? across * (across + 1) / 2 : across * across);
    work += p.groups * box.tiles * conv_box_positions(box, p.images);
  }
  const int64_t length = std::clamp((work / wanted + kDepth) / kDepth * kDepth, kLeast, most);
  int32_t blocks = 0, parts = 0;
  for (ConvBox& box : plan.box) {
    box.parts = static_cast<int32_t>((conv_box_positions(box, p.images) + length - 1) / length);
    box.first_block = blocks;
    box.first_part = parts;
    blocks += box.tiles * box.parts;
    parts += box.parts;
    if (box.parts > 1) p.reduced = 1;
  }
  p.boxes = static_cast<int32_t>(plan.box.size());
  p.blocks = blocks;
  p.parts = parts;
}

// Multiply-adds, and what else there is in units of them: an H200 does 33e12 in float32 a second and moves 1.2e12
// numbers.
inline double conv_cost(const ConvPlan& plan) {
  constexpr double kMove = 28, kLaunch = 33e12 * 2e-6,
                   kStart = 300;  // positions that a block's start and end are worth
  const ConvCovariance& p = plan.product;
  // Small tiles take longer, tensor cores less time, and so do features of a patch, of which only those of one row of
  // the kernel lie side by side.
  const double small_tile = p.tensor ? 1.8 : 1.5, rate = p.tensor ? 0.25 : 1;
  const double row = p.offset[2] == 1 ? static_cast<double>(p.feature_kernel[2]) : 1;
  const double gather = (p.tensor ? 2 : 1.2) + 4 / row;
  const double unit = static_cast<double>(p.groups * p.unit());
  double products = 0;
  for (const ConvBox& box : plan.box) {
    const double positions = static_cast<double>(conv_box_positions(box, p.images));
    products += box.tiles * (positions + kStart * box.parts);
  }
  products *= rate * static_cast<double>(p.groups * p.side * p.side);
  if (p.side == (p.tensor ? 64 : 32)) products *= small_tile;
  if (plan.form == ConvForm::direct) products *= gather;
  const double uploads =
      static_cast<double>(plan.box.size() * sizeof(ConvBox) / 8 + plan.combination.size() / 2) / kConvUploadWords;
  return products + 2 * kMove * static_cast<double>(plan.layout_size()) + 3 * kMove * unit * p.parts +
         kLaunch * (uploads + (plan.copied ? 1 : 0));
}

inline ConvPlan start_conv_plan(const ConvShape& shape, const ConvInput& x, ConvForm form) {
  ConvPlan plan{};
  plan.form = form;
  ConvLayout& layout = plan.layout;
  layout.x = x.data, layout.images = shape.images, layout.channels = shape.groups * shape.channels;
  layout.image = x.image, layout.channel = x.channel;
  ConvCovariance& p = plan.product;
  p.type = x.type, p.map = x.data, p.image = x.image, p.channel = x.channel;
  p.images = shape.images, p.groups = shape.groups, p.bias = shape.bias, p.positions = shape.positions();
  bool padded = false;
  for (size_t axis = 0; axis < 3; ++axis) {
    layout.axis[axis] = x.axis[axis], layout.size[axis] = shape.size[axis], layout.low[axis] = shape.low[axis];
    layout.padded[axis] = shape.low[axis] + shape.size[axis] + shape.high[axis];
    padded = padded || shape.low[axis] > 0 || shape.high[axis] > 0;
  }
  // Strides of the map that products read.
  int64_t stride[3] = {x.axis[0], x.axis[1], x.axis[2]};
  if (form == ConvForm::direct) {
    plan.copied = padded || x.axis[2] != 1;
    if (plan.copied) {
      stride[2] = 1, stride[1] = layout.padded[2], stride[0] = layout.padded[1] * layout.padded[2];
      p.channel = layout.padded[0] * stride[0];
      p.image = layout.channels * p.channel;
    }
    p.rows = shape.features();
  } else {
    // Products load 16 bytes at once, beyond the last feature too.
    const int64_t run = 16 / conv_element_bytes(x.type);
    bool aligned = reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && layout.channels % run == 0 &&
                   (shape.images == 1 || x.image % run == 0);
    for (size_t axis = 0; axis < 3; ++axis) aligned = aligned && (shape.size[axis] == 1 || stride[axis] % run == 0);
    plan.copied = x.channel != 1 || !aligned;
    if (plan.copied) {
      p.channel = 1;
      layout.row = (layout.channels + run - 1) / run * run;
      stride[2] = layout.row, stride[1] = layout.size[2] * stride[2], stride[0] = layout.size[1] * stride[1];
      p.image = layout.size[0] * stride[0];
    }
    p.rows = shape.channels;
    p.aligned = shape.groups == 1 || shape.channels % run == 0;
  }
  p.group = shape.channels * p.channel;
  p.tensor = x.tensor;
  const int32_t small_side = x.tensor ? 64 : 32;
  p.side = p.rows <= small_side ? small_side : 2 * small_side;
  for (size_t axis = 0; axis < 3; ++axis) {
    const bool direct = form == ConvForm::direct;
    p.position[axis] = shape.step[axis] * stride[axis];
    p.offset[axis] = direct ? shape.dilation[axis] * stride[axis] : 0;
    p.feature_kernel[axis] = direct ? shape.kernel[axis] : 1;
    p.kernel[axis] = direct ? 1 : static_cast<int32_t>(shape.kernel[axis]);
  }
  return plan;
}

// `empty`: no map, or no features; the result has no sums then.
inline ConvPlan plan_conv_direct(const ConvShape& shape, const ConvInput& x, bool empty) {
  ConvPlan plan = start_conv_plan(shape, x, ConvForm::direct);
  for (size_t axis = 0; axis < 3; ++axis) {
    plan.pair[axis] = {{0, 0, static_cast<int16_t>(empty ? 0 : 1)}};
    plan.ranges[axis] = {1};
    plan.product.terms[axis] = 1;
  }
  plan.combination = {0};
  if (empty) {
    plan.copied = false;
  } else {
    ConvBox box{};
    for (size_t axis = 0; axis < 3; ++axis) box.extent[axis] = shape.out[axis];
    box.symmetric = 1;
    plan.box.push_back(box);
  }
  plan_conv_parts(plan);
  plan.cost = conv_cost(plan);
  return plan;
}

// Nothing where the tables, or the sums of all boxes, would be too large.
inline std::optional<ConvPlan> plan_conv_shift(const ConvShape& shape, const ConvInput& x) {
  for (const int64_t kernel : shape.kernel) {
    if (kernel > kConvLongest) return {};
  }
  ConvPlan plan = start_conv_plan(shape, x, ConvForm::shift);
  ConvCovariance& p = plan.product;
  std::vector<ConvAxis> axes;
  size_t combinations = 1;
  for (size_t axis = 0; axis < 3; ++axis) {
    axes.push_back(plan_conv_axis(shape, axis));
    combinations *= axes[axis].terms.size();
    p.terms[axis] = static_cast<int32_t>(axes[axis].terms.size());
    plan.pair[axis] = axes[axis].pairs;
    for (const auto& term : axes[axis].terms) plan.ranges[axis].push_back(static_cast<int32_t>(term.ranges.size()));
  }
  if (combinations > kConvMostCombinations) return {};
  const int64_t allowed = 2 * shape.features() * shape.features() + (int64_t{1} << 19);
  for (size_t number = 0; number < combinations; ++number) {
    const size_t index[3] = {number / axes[2].terms.size() / axes[1].terms.size(),
                             number / axes[2].terms.size() % axes[1].terms.size(), number % axes[2].terms.size()};
    const ConvAxis::Term* term[3];
    for (size_t axis = 0; axis < 3; ++axis) term[axis] = &axes[axis].terms[index[axis]];
    // Of two differences that are transposes the one is formed that leads forward along the first axis it moves on.
    int64_t direction = 0, left = 0, right = 0;
    for (size_t axis = 0; axis < 3; ++axis) {
      if (direction == 0) direction = term[axis]->difference;
      const int64_t stride = p.position[axis] / shape.step[axis];
      left += term[axis]->phase * stride;
      right += (term[axis]->phase + term[axis]->difference) * stride;
    }
    plan.combination.push_back(direction < 0 ? -1 : static_cast<int32_t>(plan.box.size()));
    if (direction < 0) continue;
    for (const auto& r0 : term[0]->ranges) {
      for (const auto& r1 : term[1]->ranges) {
        for (const auto& r2 : term[2]->ranges) {
          const int64_t start = r0.first * p.position[0] + r1.first * p.position[1] + r2.first * p.position[2];
          plan.box.push_back({left + start,
                              right + start,
                              {r0.last - r0.first, r1.last - r1.first, r2.last - r2.first},
                              0,
                              0,
                              0,
                              0,
                              direction == 0,
                              0});
        }
      }
    }
    if (plan.box.size() > kConvMostBoxes || static_cast<int64_t>(plan.box.size()) * p.unit() > allowed) return {};
  }
  plan_conv_parts(plan);
  plan.cost = conv_cost(plan);
  return plan;
}

// `wish`: the form that tests ask for, taken where it is possible.
inline ConvPlan plan_conv(const ConvShape& shape, const ConvInput& x, std::optional<ConvForm> wish) {
  const bool empty =
      shape.positions() == 0 || shape.features() == 0 || shape.size[0] * shape.size[1] * shape.size[2] == 0;
  ConvPlan direct = plan_conv_direct(shape, x, empty);
  if (empty || wish == ConvForm::direct) return direct;
  std::optional<ConvPlan> shift = plan_conv_shift(shape, x);
  if (!shift || (!wish && direct.cost <= shift->cost)) return direct;
  return std::move(*shift);
}

}  // namespace kronfac::cuda
