// The kernel templates of conv_covariance, run thread by thread on the CPU; see emulate.cpp. Memory that kernels write
// before they read it is full of NaN.
#include <cstring>
#include <memory>

#include "cuda/conv_covariance_assemble.cuh"
#include "cuda/conv_covariance_layout.cuh"
#include "cuda/conv_covariance_mma.cuh"
#include "cuda/conv_covariance_plan.h"

using namespace kronfac::cuda;

namespace {

// Blocks of a launch in reverse: their order must not matter.
template <class F>
void each(int64_t blocks, const F& f) {
  for (int64_t i = blocks; i > 0; --i) f(i - 1);
}

struct Memory {
  explicit Memory(int64_t bytes) : data(new double[static_cast<size_t>(bytes / 8 + 1)]) {
    std::memset(data.get(), 0xff, static_cast<size_t>(bytes));
  }
  std::unique_ptr<double[]> data;
};

template <class T, int kSide>
void products(const ConvCovariance& p) {
  const auto shared = std::make_unique<ConvShared<T, kSide>>();
  const auto block = std::make_unique<HostBlock<ConvState<T, kSide>, ConvTile<T, kSide>::Tile::kThreads>>();
  each(p.groups * p.blocks, [&](int64_t i) {
    const int32_t number = static_cast<int32_t>(i);
    p.aligned ? conv_product<T, kSide, true>(*block, *shared, p, number)
              : conv_product<T, kSide, false>(*block, *shared, p, number);
  });
}

template <class In, int kSide>
void mma_products(const ConvCovariance& p) {
  const auto shared = std::make_unique<ConvMmaShared<In, kSide>>();
  const auto block = std::make_unique<HostBlock<ConvMmaState<In, kSide>, MmaTile<In, kSide>::kThreads>>();
  each(p.groups * p.blocks, [&](int64_t i) {
    const int32_t number = static_cast<int32_t>(i);
    p.aligned ? conv_mma_product<In, kSide, true>(*block, *shared, p, number)
              : conv_mma_product<In, kSide, false>(*block, *shared, p, number);
  });
}

template <class In, class T>
void run(const ConvCovariance& p) {
  if constexpr (sizeof(In) <= 4) {
    if (p.tensor) p.side == 64 ? mma_products<In, 64>(p) : mma_products<In, 128>(p);
  }
  if constexpr (sizeof(In) >= 4) {
    if (!p.tensor) p.side == 32 ? products<T, 32>(p) : products<T, 64>(p);
  }
  if (p.reduced) each(conv_reduce_blocks(p) * kConvThreads, [&](int64_t i) { conv_reduce<T>(p, i); });
  HostBlock<NoState, kConvThreads> block;
  ConvAssembleShared<T> shared;
  each(conv_assemble_blocks(p), [&](int64_t i) { conv_assemble<T>(block, shared, p, static_cast<int32_t>(i)); });
  if (p.bias) each(conv_bias_blocks(p) * kConvThreads, [&](int64_t i) { conv_bias<T>(p, i); });
}

template <class E>
void lay_out(const ConvPlan& plan) {
  const ConvLayout& p = plan.layout;
  if (plan.form == ConvForm::direct) {
    each(conv_pad_blocks(p) * kConvThreads, [&](int64_t i) { conv_pad_entry<E>(p, i); });
    return;
  }
  HostBlock<NoState, kConvThreads> block;
  const auto shared = std::make_unique<ConvTransposeShared<E>>();
  each(conv_transpose_blocks(p),
       [&](int64_t i) { conv_transpose_block<E>(block, *shared, p, static_cast<int32_t>(i)); });
}

// sizes: images, channels of a group, groups, then 3 entries of each of size, kernel, step, dilation, low, high;
// strides: of x. form: 0 direct, 1 shift, -1 as operations decide. Fills in form, boxes and parts of the plan.
ConvPlan make_plan(int type, bool tensor, const void* x, const int64_t* sizes, const int64_t* strides, bool bias,
                   int form, int64_t* chosen) {
  kronfac::ConvShape shape{};
  shape.images = sizes[0], shape.channels = sizes[1], shape.groups = sizes[2], shape.bias = bias;
  for (size_t axis = 0; axis < 3; ++axis) {
    const int64_t* of_axis = sizes + 3 + axis;
    shape.size[axis] = of_axis[0], shape.kernel[axis] = of_axis[3], shape.step[axis] = of_axis[6];
    shape.dilation[axis] = of_axis[9], shape.low[axis] = of_axis[12], shape.high[axis] = of_axis[15];
    const int64_t padded = shape.size[axis] + shape.low[axis] + shape.high[axis];
    shape.out[axis] = (padded - shape.dilation[axis] * (shape.kernel[axis] - 1) - 1) / shape.step[axis] + 1;
  }
  const ConvInput input{static_cast<Element>(type),           x,     strides[0], strides[1],
                        {strides[2], strides[3], strides[4]}, tensor};
  ConvPlan plan = plan_conv(shape, input, form < 0 ? std::nullopt : std::optional(static_cast<ConvForm>(form)));
  chosen[0] = static_cast<int64_t>(plan.form), chosen[1] = plan.product.boxes, chosen[2] = plan.product.parts;
  return plan;
}

}  // namespace

extern "C" void plan_conv_covariance(int type, bool tensor, const int64_t* sizes, const int64_t* strides, bool bias,
                                     int form, int64_t* chosen) {
  make_plan(type, tensor, nullptr, sizes, strides, bias, form, chosen);
}

// out_strides: 3.
extern "C" void emulate_conv_covariance(int type, bool tensor, const void* x, const int64_t* sizes,
                                        const int64_t* strides, bool bias, int form, int64_t* chosen, void* out,
                                        const int64_t* out_strides, double decay, double scale) {
  ConvPlan plan = make_plan(type, tensor, x, sizes, strides, bias, form, chosen);
  const std::vector<uint64_t> table = plan.table();
  plan.place(table.data());
  const Element element = plan.product.type;
  const int64_t bytes = conv_element_bytes(element);
  const Memory map(plan.layout_size() * bytes), sums(plan.sums_size() * 8);
  ConvCovariance& p = plan.product;
  if (plan.copied) {
    plan.layout.target = map.data.get();
    p.map = map.data.get();
    if (bytes == 8) lay_out<uint64_t>(plan);
    if (bytes == 4) lay_out<uint32_t>(plan);
    if (bytes == 2) lay_out<uint16_t>(plan);
  }
  p.sums = sums.data.get(), p.decay = decay, p.scale = scale;
  p.out = out, p.out_group = out_strides[0], p.out_row = out_strides[1], p.out_column = out_strides[2];
  if (element == Element::f32) run<float, float>(p);
  if (element == Element::f64) run<double, double>(p);
  if (element == Element::bf16) run<BFloat16, float>(p);
  if (element == Element::f16) run<Half, float>(p);
}
