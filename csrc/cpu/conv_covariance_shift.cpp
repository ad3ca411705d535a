#include "cpu/conv_covariance_shift.h"

#include <algorithm>
#include <cstring>

namespace kronfac::cpu {
namespace {

using kernels::ShiftBox;
using kernels::ShiftChunk;

// Panels of a chunk take this much memory: a part of an L2 cache, so that every product finds them there, and enough
// positions for small boxes to be worth a visit (of 128 KiB to 2 MiB, 256 and 512 KiB were fastest).
constexpr int64_t kChunkBytes = int64_t{512} << 10;
// Positions summed before their sum is added to the total: bounds the rounding error of float32 sums over many of them.
constexpr int64_t kFlush = 16384;
// Sums that threads keep for themselves may take as much as two results, and this much anyway.
constexpr int64_t kSliceBytes = int64_t{16} << 20;

template <class T>
const kernels::ShiftKernels<T>& shift_kernels() {
  if constexpr (sizeof(T) == sizeof(float)) {
    return *kernels::table().shift_f32;
  } else {
    return *kernels::table().shift_f64;
  }
}

// Everything about a call that does not depend on the group.
template <class T>
class ShiftSum {
 public:
  ShiftSum(const kernels::ConvInput& input, int64_t images, int64_t positions, bool bias, const ShiftPlan& plan)
      : input_(input), images_(images), positions_(positions), bias_(bias), plan_(plan) {
    shift_.type = input.type;
    shift_.batch_stride = input.batch_stride;
    shift_.channel_stride = input.channel_stride;
    for (size_t axis = 0; axis < 3; ++axis) {
      shift_.axis_stride[axis] = input.axis_stride[axis];
      shift_.size[axis] = input.size[axis];
      shift_.step[axis] = input.step[axis];
    }
    make_rows();
    make_terms();
    square_ = plan.columns * plan.columns;
    bias_sums_ = plan.sums * square_;
    sums_size_ = (bias_sums_ + (bias ? plan.parts() * bias_cells_ * plan.columns : 0) + 15) / 16 * 16;
  }

  void run(const SymmetricOutput& out, int64_t group_stride, T decay, T scale) {
    const int64_t threads = thread_count();
    const bool groups_first = out.groups >= threads;
    const int64_t workers = groups_first ? threads : 1, helpers = groups_first ? 1 : threads;
    make_chunks(workers * helpers);
    int64_t slices = std::min(helpers, static_cast<int64_t>(chunks_.size()));
    // Long sums need a second level.
    const int64_t size = static_cast<int64_t>(sizeof(T));
    const auto levels = [&](int64_t s) { return all_positions() / s > 2 * kFlush ? int64_t{2} : int64_t{1}; };
    const int64_t allowed = std::max(2 * out.d * out.d * size, kSliceBytes);
    while (slices > 1 && slices * levels(slices) * sums_size_ * size > allowed) --slices;
    // With much fewer slices than threads, all of them work on one chunk at a time.
    const bool together = 2 * slices < helpers;
    if (together) slices = 1;
    const int64_t count = levels(slices);
    // Matrix units want many rows at once, since every unit splits the right operand for itself.
    const int64_t lanes = kernel_.lanes, shares = together ? helpers : 1;
    const int64_t many = (plan_.rows + shares * lanes - 1) / (shares * lanes) * lanes;
    const int64_t split_bytes = Scratch::rounded(kernel_.split_scratch(many, plan_.rows));
    make_units(split_bytes > 0 ? many : lanes);

    const int64_t ld = (out.d + 15) / 16 * 16, panel_rows = rows_of_block(helpers) * offsets();
    const int64_t panels_bytes = Scratch::rounded(panel_elements_ * size),
                  sums_bytes = Scratch::rounded(sums_size_ * size),
                  row_bytes = Scratch::rounded(panel_rows * ld * size);
    const int64_t slice_bytes = panels_bytes + count * sums_bytes;
    const int64_t group_bytes = slices * slice_bytes + helpers * (row_bytes + split_bytes);
    const Scratch memory(group_bytes * workers);
    std::vector<int64_t> groups(static_cast<size_t>(out.groups));
    std::iota(groups.begin(), groups.end(), 0);
    const auto one_group = [&](int64_t group, int64_t worker) {
      kernels::ShiftInput shift = shift_;
      shift.data = static_cast<const std::byte*>(input_.data) + group * group_stride;
      const int64_t base = worker * group_bytes;
      const Split split{
          split_bytes > 0 ? memory.at<std::byte>(base + slices * slice_bytes + helpers * row_bytes) : nullptr,
          split_bytes};
      const auto total = [&](int64_t slice) { return memory.at<T>(base + slice * slice_bytes); };
      const auto panels = [&](int64_t slice) { return memory.at<T>(base + slice * slice_bytes + count * sums_bytes); };
      const auto part = [&](int64_t slice) {
        return count == 2 ? memory.at<T>(base + slice * slice_bytes + sums_bytes) : total(slice);
      };
      if (together) {
        sum_together(shift, helpers, total(0), part(0), panels(0), split);
      } else {
        std::vector<int64_t> tasks(static_cast<size_t>(slices));
        std::iota(tasks.begin(), tasks.end(), 0);
        run_tasks(tasks, slices, [&](int64_t slice, int64_t worker_of_group) {
          sum_slice(shift, slice, slices, total(slice), part(slice), panels(slice), split.of(worker_of_group));
        });
      }
      // The slices are added in their order, every entry by one thread.
      if (slices > 1) {
        const int64_t pieces = std::clamp<int64_t>(sums_size_ / 4096, 1, helpers),
                      piece = (sums_size_ + pieces - 1) / pieces;
        for_all(pieces, helpers, [&](int64_t p, int64_t) {
          const int64_t first = p * piece, n = std::min(piece, sums_size_ - first);
          for (int64_t slice = 1; slice < slices && n > 0; ++slice)
            kernel_.add(n, total(slice) + first, total(0) + first);
        });
      }
      assemble(out, group, helpers, total(0), memory, base + slices * slice_bytes, row_bytes, ld, decay, scale);
    };
    run_tasks(groups, workers, one_group);
  }

 private:
  // Products with some rows of a term's left operand; with `term` == -1, sums of the part's rows.
  struct Unit {
    int64_t term, part, row0, row1;
    double cost;
  };

  // Each worker's memory for products on matrix units; null without them.
  struct Split {
    std::byte* data;
    int64_t bytes;
    void* of(int64_t worker) const { return data == nullptr ? nullptr : data + worker * bytes; }
  };

  int64_t offsets() const { return input_.kernel[0] * input_.kernel[1] * input_.kernel[2]; }
  int64_t all_positions() const { return images_ * plan_.axes[0].extent * plan_.axes[1].extent * plan_.axes[2].extent; }

  template <class F>
  static void for_all(int64_t tasks, int64_t workers, const F& f) {
    std::vector<int64_t> list(static_cast<size_t>(tasks));
    std::iota(list.begin(), list.end(), 0);
    run_tasks(list, workers, f);
  }

  void make_rows() {
    const auto& axes = plan_.axes;
    for (int64_t p0 = 0; p0 < axes[0].parts; ++p0) {
      for (int64_t p1 = 0; p1 < axes[1].parts; ++p1) {
        for (int64_t p2 = 0; p2 < axes[2].parts; ++p2) {
          for (int64_t s0 = 0; s0 < axes[0].subs; ++s0) {
            for (int64_t s1 = 0; s1 < axes[1].subs; ++s1) {
              for (int64_t s2 = 0; s2 < axes[2].subs; ++s2) {
                for (int64_t c = 0; c < plan_.channels; ++c) {
                  rows_.push_back({c,
                                   {axes[0].bases[static_cast<size_t>(p0 * axes[0].subs + s0)],
                                    axes[1].bases[static_cast<size_t>(p1 * axes[1].subs + s1)],
                                    axes[2].bases[static_cast<size_t>(p2 * axes[2].subs + s2)]}});
                }
              }
            }
          }
        }
      }
    }
  }

  const AxisPlan::Term& axis_term(const ShiftPlan::Term& term, size_t axis) const {
    return plan_.axes[axis].terms[static_cast<size_t>(term.axis_term[axis])];
  }

  void make_terms() {
    for (size_t t = 0; t < plan_.terms.size(); ++t) {
      const int64_t cells = cell_count(plan_.terms[t]);
      if (cells == 0 || !plan_.terms[t].symmetric) continue;
      bias_terms_.push_back(static_cast<int64_t>(t));
      bias_cells_ = std::max(bias_cells_, cells);
    }
  }

  int64_t cell_count(const ShiftPlan::Term& term) const {
    int64_t cells = 1;
    for (size_t axis = 0; axis < 3; ++axis) cells *= static_cast<int64_t>(axis_term(term, axis).cells.size());
    return cells;
  }

  void make_units(int64_t height) {
    for (size_t t = 0; t < plan_.terms.size(); ++t) {
      const ShiftPlan::Term& term = plan_.terms[t];
      if (cell_count(term) == 0) continue;
      double positions = 1;
      for (size_t axis = 0; axis < 3; ++axis) {
        const auto& list = axis_term(term, axis).cells;
        positions *= static_cast<double>(list.back().last - list.front().first);
      }
      for (int64_t row = 0; row < plan_.rows; row += height) {
        const int64_t last = std::min(row + height, plan_.rows), width = term.symmetric ? last : plan_.columns;
        units_.push_back({static_cast<int64_t>(t), term.left, row, last,
                          positions * static_cast<double>(width) * static_cast<double>(last - row)});
      }
      if (bias_ && term.symmetric) units_.push_back({static_cast<int64_t>(t), -1, 0, plan_.rows, positions});
    }
  }

  // Cuts the images into chunks: several whole images, or bands of one along its outermost axis.
  void make_chunks(int64_t workers) {
    const auto& axes = plan_.axes;
    const int64_t row_bytes = plan_.parts() * plan_.columns * static_cast<int64_t>(sizeof(T));
    const int64_t image = axes[0].extent * axes[1].extent * axes[2].extent;
    // All chunks in use together take no more than half the input.
    const int64_t input_bytes =
        images_ * plan_.channels * input_.size[0] * input_.size[1] * input_.size[2] * element_size(input_.type);
    const int64_t target = std::max<int64_t>(1, std::min(kChunkBytes, input_bytes / (2 * workers)) / row_bytes);
    const auto add = [&](int64_t first, int64_t count, int64_t band0, int64_t band1, int64_t end) {
      ShiftChunk chunk{first, count, {0, 0, 0}, {axes[0].extent, axes[1].extent, axes[2].extent}};
      chunk.first[band_axis_] = band0;
      chunk.count[band_axis_] = end - band0;
      chunks_.push_back({chunk, band0, band1});
      panel_elements_ = std::max(panel_elements_, chunk.positions() * plan_.parts() * plan_.columns);
    };
    band_axis_ = axes[0].extent > 1 ? 0 : axes[1].extent > 1 ? 1 : 2;
    const int64_t length = axes[band_axis_].extent;
    if (image <= target) {
      // As many chunks as there are slices, at least, where there are enough images.
      const int64_t fewest = (images_ + target / image - 1) / (target / image);
      const int64_t count = std::max(fewest, std::min(workers, images_));
      for (int64_t i = 0; i < count; ++i) {
        const int64_t first = images_ * i / count, last = images_ * (i + 1) / count;
        add(first, last - first, 0, length, length);
      }
      return;
    }
    // A band carries the rows that its right operands reach into, so it should be longer than that.
    int64_t reach = 0;
    for (const AxisPlan::Term& term : axes[band_axis_].terms) {
      if (!term.cells.empty()) reach = std::max(reach, term.shift);
    }
    const int64_t rows =
        std::clamp(target / (image / length) - reach, std::min(length, std::max<int64_t>(1, reach)), length);
    const int64_t bands = (length + rows - 1) / rows;
    for (int64_t n = 0; n < images_; ++n) {
      for (int64_t b = 0; b < bands; ++b) {
        const int64_t first = length * b / bands, last = length * (b + 1) / bands;
        add(n, 1, first, last, std::min(length, last + reach));
      }
    }
  }

  struct Chunk {
    ShiftChunk area;
    int64_t band0, band1;  // left positions along the band axis
  };

  int64_t panel_stride(const ShiftChunk& area) const { return area.positions() * kernel_.lanes; }
  int64_t part_stride(const ShiftChunk& area) const { return area.positions() * plan_.columns; }

  void pack_part(const kernels::ShiftInput& shift, const Chunk& chunk, int64_t part, int64_t row0, int64_t row1,
                 T* panels) const {
    kernel_.pack(shift, rows_.data() + part * plan_.rows + row0, row1 - row0, chunk.area,
                 panels + part * part_stride(chunk.area) + row0 / kernel_.lanes * panel_stride(chunk.area));
  }

  void compute(const Unit& unit, const Chunk& chunk, const T* panels, T* sums, void* split) const {
    const ShiftPlan::Term& term = plan_.terms[static_cast<size_t>(unit.term)];
    const ShiftChunk& area = chunk.area;
    const int64_t lanes = kernel_.lanes;
    const int64_t stride[3] = {area.count[1] * area.count[2], area.count[2], 1};
    const AxisPlan::Term* axis[3] = {&axis_term(term, 0), &axis_term(term, 1), &axis_term(term, 2)};
    const int64_t shift = axis[0]->shift * stride[0] + axis[1]->shift * stride[1] + axis[2]->shift * stride[2];
    const T *left = panels + term.left * part_stride(area), *right = panels + term.right * part_stride(area);
    int64_t cell = 0;
    for (const AxisPlan::Cell& c0 : axis[0]->cells) {
      for (const AxisPlan::Cell& c1 : axis[1]->cells) {
        for (const AxisPlan::Cell& c2 : axis[2]->cells) {
          AxisPlan::Cell cells[3] = {c0, c1, c2};
          AxisPlan::Cell& banded = cells[band_axis_];
          banded = {std::max(banded.first, chunk.band0), std::min(banded.last, chunk.band1)};
          const int64_t index = cell++;
          if (banded.first >= banded.last) continue;
          ShiftBox box{{area.images, 0, 0, 0}, {area.positions() / area.images, stride[0], stride[1], stride[2]}};
          int64_t start = 0;
          for (size_t a = 0; a < 3; ++a) {
            box.count[a + 1] = cells[a].last - cells[a].first;
            start += (cells[a].first - area.first[a]) * stride[a];
          }
          if (unit.part < 0) {
            kernel_.sums(box, left + start * lanes, plan_.rows, panel_stride(area),
                         sums + bias_sums_ + (term.left * bias_cells_ + index) * plan_.columns);
          } else {
            kernel_.products(box, left + start * lanes, unit.row0, unit.row1, right + (start + shift) * lanes,
                             plan_.rows, panel_stride(area), term.symmetric, sums + (term.first_sum + index) * square_,
                             split);
          }
        }
      }
    }
  }

  void clear(T* sums) const { std::memset(sums, 0, static_cast<size_t>(sums_size_) * sizeof(T)); }

  void sum_slice(const kernels::ShiftInput& shift, int64_t slice, int64_t slices, T* total, T* part, T* panels,
                 void* split) const {
    const int64_t count = static_cast<int64_t>(chunks_.size());
    clear(total);
    if (part != total) clear(part);
    int64_t since = 0;
    for (int64_t c = count * slice / slices; c < count * (slice + 1) / slices; ++c) {
      const Chunk& chunk = chunks_[static_cast<size_t>(c)];
      for (int64_t p = 0; p < plan_.parts(); ++p) pack_part(shift, chunk, p, 0, plan_.rows, panels);
      for (const Unit& unit : units_) compute(unit, chunk, panels, part, split);
      since += chunk.area.positions();
      if (part != total && since >= kFlush) {
        kernel_.flush(sums_size_, part, total);
        since = 0;
      }
    }
    if (part != total) kernel_.flush(sums_size_, part, total);
  }

  // All workers on every chunk: each entry of the sums belongs to one unit, so its order of additions is that of the
  // chunks.
  void sum_together(const kernels::ShiftInput& shift, int64_t workers, T* total, T* part, T* panels,
                    const Split& split) const {
    clear(total);
    if (part != total) clear(part);
    const int64_t lanes = kernel_.lanes, groups = plan_.columns / lanes;
    std::vector<double> costs;
    for (const Unit& unit : units_) costs.push_back(unit.cost);
    const std::vector<int64_t> order = largest_first(costs);
    const int64_t pieces = std::clamp<int64_t>(sums_size_ / 4096, 1, workers),
                  piece = (sums_size_ + pieces - 1) / pieces;
    const auto flush = [&] {
      for_all(pieces, workers, [&](int64_t p, int64_t) {
        const int64_t first = p * piece, n = std::min(piece, sums_size_ - first);
        if (n > 0) kernel_.flush(n, part + first, total + first);
      });
    };
    int64_t since = 0;
    for (const Chunk& chunk : chunks_) {
      for_all(plan_.parts() * groups, workers, [&](int64_t task, int64_t) {
        const int64_t row = task % groups * lanes;
        pack_part(shift, chunk, task / groups, row, std::min(row + lanes, plan_.rows), panels);
      });
      run_tasks(order, workers, [&](int64_t u, int64_t worker) {
        compute(units_[static_cast<size_t>(u)], chunk, panels, part, split.of(worker));
      });
      since += chunk.area.positions();
      if (part != total && since >= kFlush) {
        flush();
        since = 0;
      }
    }
    if (part != total) flush();
  }

  // Channels whose features are put together at a time: enough blocks for all workers.
  int64_t rows_of_block(int64_t workers) const { return std::clamp<int64_t>(plan_.channels / (4 * workers), 1, 16); }

  // Puts blocks of rows of the covariance together from the sums.
  void assemble(const SymmetricOutput& out, int64_t group, int64_t workers, const T* sums, const Scratch& memory,
                int64_t first_byte, int64_t row_bytes, int64_t ld, T decay, T scale) const {
    const auto& symmetric = Kernels<T>().symmetric;
    const int64_t channels = plan_.channels, height = rows_of_block(workers), count = offsets();
    const int64_t blocks = (channels + height - 1) / height;
    T* const data = out.tensor.mutable_data_ptr<T>() + group * out.group_stride;
    std::vector<int64_t> order;  // the last rows of the triangle are the longest
    for (int64_t block = blocks + (bias_ ? 1 : 0); block-- > 0;) order.push_back(block);
    run_tasks(order, workers, [&](int64_t block, int64_t worker) {
      T* rows = memory.at<T>(first_byte + worker * row_bytes);
      if (block == blocks) {
        for (int64_t i = 0; i < count; ++i) bias_row(i, sums, rows);
        rows[out.d - 1] = static_cast<T>(positions_);
        symmetric.finish(out.d - 1, out.d, rows, 1, 0, ld, decay, scale, data, out.row_stride, out.col_stride);
        return;
      }
      const int64_t first = block * height, last = std::min(channels, first + height);
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t j = 0; j < count; ++j) pair_block(i, j, first, last, sums, rows, ld);
      }
      symmetric.finish(first * count, last * count, rows, 1, 0, ld, decay, scale, data, out.row_stride, out.col_stride);
    });
  }

  std::array<int64_t, 3> place(int64_t offset) const {
    const int64_t k1 = input_.kernel[1], k2 = input_.kernel[2];
    return {offset / (k1 * k2), offset / k2 % k1, offset % k2};
  }

  // First row of an offset's channels within its part.
  int64_t first_row(const std::array<int64_t, 3>& offset) const {
    int64_t sub = 0;
    for (size_t axis = 0; axis < 3; ++axis) {
      sub = sub * plan_.axes[axis].subs + plan_.axes[axis].offsets[static_cast<size_t>(offset[axis])].sub;
    }
    return sub * plan_.channels;
  }

  // Calls f(cell number) for the cells of a term that make up a pair of offsets.
  template <class F>
  void for_cells(const ShiftPlan::Term& term, const std::array<int64_t, 3>& i, const std::array<int64_t, 3>& j,
                 const F& f) const {
    const AxisPlan::Pair* pair[3];
    int64_t cells[3];
    for (size_t axis = 0; axis < 3; ++axis) {
      pair[axis] = &plan_.axes[axis].pair(i[axis], j[axis]);
      cells[axis] = static_cast<int64_t>(axis_term(term, axis).cells.size());
    }
    for (int64_t c0 = pair[0]->first_cell; c0 < pair[0]->last_cell; ++c0) {
      for (int64_t c1 = pair[1]->first_cell; c1 < pair[1]->last_cell; ++c1) {
        for (int64_t c2 = pair[2]->first_cell; c2 < pair[2]->last_cell; ++c2) f((c0 * cells[1] + c1) * cells[2] + c2);
      }
    }
  }

  // Entries ((c, offset i), (c', offset j)) for c in [first, last) and c' < last.
  void pair_block(int64_t i, int64_t j, int64_t first, int64_t last, const T* sums, T* rows, int64_t ld) const {
    const int64_t count = offsets(), columns = plan_.columns;
    std::array<int64_t, 3> left = place(i), right = place(j), t{};
    for (size_t axis = 0; axis < 3; ++axis) t[axis] = plan_.axes[axis].pair(left[axis], right[axis]).term;
    int64_t number = plan_.lookup[static_cast<size_t>(plan_.combination(t))];
    bool transposed = number < 0;
    if (transposed) number = ~number;
    const ShiftPlan::Term& term = plan_.terms[static_cast<size_t>(number)];
    // Of a symmetric term, what lies below the diagonal.
    if (term.symmetric) transposed = first_row(left) < first_row(right);
    if (transposed) std::swap(left, right);
    const int64_t row = first_row(left) + (transposed ? 0 : first),
                  column = first_row(right) + (transposed ? first : 0);
    constexpr int64_t most = 64;
    const T* boxes[most];
    int64_t taken = 0;
    const int64_t height = transposed ? last : last - first, width = transposed ? last - first : last;
    T* to = rows + i * ld + j;
    const int64_t row_stride = transposed ? count : count * ld, col_stride = transposed ? count * ld : count;
    bool fresh = true;
    const auto gather = [&] {
      kernel_.gather(boxes, taken, height, width, columns, fresh, to, row_stride, col_stride);
      fresh = false;
      taken = 0;
    };
    for_cells(term, left, right, [&](int64_t cell) {
      boxes[taken++] = sums + (term.first_sum + cell) * square_ + row * columns + column;
      if (taken == most) gather();
    });
    if (fresh || taken > 0) gather();
  }

  // Entries (one, (c', offset i)).
  void bias_row(int64_t i, const T* sums, T* row) const {
    const std::array<int64_t, 3> offset = place(i);
    std::array<int64_t, 3> t{};
    for (size_t axis = 0; axis < 3; ++axis) t[axis] = plan_.axes[axis].pair(offset[axis], offset[axis]).term;
    const ShiftPlan::Term& term =
        plan_.terms[static_cast<size_t>(plan_.lookup[static_cast<size_t>(plan_.combination(t))])];
    for (int64_t c = 0; c < plan_.channels; ++c) row[c * offsets() + i] = T(0);
    for_cells(term, offset, offset, [&](int64_t cell) {
      const T* sum = sums + bias_sums_ + (term.left * bias_cells_ + cell) * plan_.columns + first_row(offset);
      for (int64_t c = 0; c < plan_.channels; ++c) row[c * offsets() + i] += sum[c];
    });
  }

  const kernels::ShiftKernels<T>& kernel_ = shift_kernels<T>();
  const kernels::ConvInput& input_;
  kernels::ShiftInput shift_{};
  int64_t images_, positions_;
  bool bias_;
  const ShiftPlan& plan_;
  std::vector<kernels::ShiftRow> rows_;  // of all parts
  std::vector<Unit> units_;
  std::vector<Chunk> chunks_;
  std::vector<int64_t> bias_terms_;
  size_t band_axis_ = 0;
  int64_t panel_elements_ = 0, bias_cells_ = 0, square_ = 0, bias_sums_ = 0, sums_size_ = 0;
};

}  // namespace

template <class T>
void conv_covariance_shift(const SymmetricOutput& out, const kernels::ConvInput& input, int64_t images,
                           int64_t group_stride, int64_t positions, bool bias, double decay, double scale,
                           const ShiftPlan& plan) {
  ShiftSum<T>(input, images, positions, bias, plan)
      .run(out, group_stride, static_cast<T>(decay), static_cast<T>(scale));
}

template void conv_covariance_shift<float>(const SymmetricOutput&, const kernels::ConvInput&, int64_t, int64_t, int64_t,
                                           bool, double, double, const ShiftPlan&);
template void conv_covariance_shift<double>(const SymmetricOutput&, const kernels::ConvInput&, int64_t, int64_t,
                                            int64_t, bool, double, double, const ShiftPlan&);

}  // namespace kronfac::cpu
