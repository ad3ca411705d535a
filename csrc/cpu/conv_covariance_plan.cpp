#include "cpu/conv_covariance_plan.h"

#include <algorithm>
#include <cstdlib>
#include <map>
#include <tuple>

#include "common/checks.h"

namespace kronfac::cpu {
namespace {

// Kernels longer than this are not planned for: tables of pairs of offsets grow with its square.
constexpr int64_t kLongest = 256;

int64_t floor_divide(int64_t a, int64_t b) { return a / b - (a % b < 0 ? 1 : 0); }

struct Interval {
  int64_t first, last;
};

// Cuts the union of the intervals at every end of one of them.
std::vector<AxisPlan::Cell> cut(const std::vector<Interval>& intervals) {
  std::map<int64_t, int64_t> ends;  // change of the number of intervals that cover what follows
  for (const Interval& interval : intervals) {
    if (interval.first >= interval.last) continue;
    ++ends[interval.first];
    --ends[interval.last];
  }
  std::vector<AxisPlan::Cell> cells;
  int64_t depth = 0, start = 0;
  for (const auto& [end, change] : ends) {
    if (depth > 0) cells.push_back({start, end});
    start = end;
    depth += change;
  }
  return cells;
}

AxisPlan plan_axis(const kernels::ConvInput& input, size_t axis, AxisForm form) {
  const int64_t kernel = input.kernel[axis], step = input.step[axis], out = input.out[axis];
  AxisPlan plan{};
  plan.kernel = kernel;
  std::vector<int64_t> phases;
  for (int64_t i = 0; i < kernel; ++i) {
    const int64_t offset = i * input.dilation[axis] - input.low[axis], shift = floor_divide(offset, step);
    const int64_t base = form == AxisForm::direct ? offset : offset - shift * step;
    auto found = std::find(phases.begin(), phases.end(), base);
    if (found == phases.end()) found = phases.insert(found, base);
    const int64_t phase = found - phases.begin();
    plan.offsets.push_back({form == AxisForm::separate ? phase : 0, form == AxisForm::separate ? 0 : phase,
                            form == AxisForm::direct ? 0 : shift});
  }
  const int64_t count = static_cast<int64_t>(phases.size());
  plan.parts = form == AxisForm::separate ? count : 1;
  plan.subs = form == AxisForm::separate ? 1 : count;
  plan.bases = phases;
  plan.extent = form == AxisForm::direct ? out : (input.size[axis] + step - 1) / step;

  // Left positions of every pair: those of its outputs whose left and right entry both lie in the map.
  std::map<std::tuple<int64_t, int64_t, int64_t>, int64_t> numbers;
  std::vector<std::vector<Interval>> intervals;
  std::vector<Interval> of_pair;
  for (const AxisPlan::Offset& left : plan.offsets) {
    for (const AxisPlan::Offset& right : plan.offsets) {
      const int64_t shift = right.shift - left.shift;
      const auto [entry, is_new] =
          numbers.try_emplace({left.part, right.part, shift}, static_cast<int64_t>(plan.terms.size()));
      if (is_new) {
        plan.terms.push_back({left.part, right.part, shift, {}, 0});
        intervals.emplace_back();
      }
      of_pair.push_back(
          {std::max({left.shift, int64_t{0}, -shift}), std::min({left.shift + out, plan.extent, plan.extent - shift})});
      intervals[static_cast<size_t>(entry->second)].push_back(of_pair.back());
      plan.pairs.push_back({entry->second, 0, 0});
    }
  }
  for (size_t t = 0; t < plan.terms.size(); ++t) {
    AxisPlan::Term& term = plan.terms[t];
    term.cells = cut(intervals[t]);
    term.mirror = numbers.at({term.right, term.left, -term.shift});
  }
  for (size_t p = 0; p < plan.pairs.size(); ++p) {
    AxisPlan::Pair& pair = plan.pairs[p];
    if (of_pair[p].first >= of_pair[p].last) continue;
    const auto& cells = plan.terms[static_cast<size_t>(pair.term)].cells;
    while (cells[static_cast<size_t>(pair.first_cell)].first < of_pair[p].first) ++pair.first_cell;
    pair.last_cell = pair.first_cell;
    while (pair.last_cell < static_cast<int64_t>(cells.size()) &&
           cells[static_cast<size_t>(pair.last_cell)].last <= of_pair[p].last) {
      ++pair.last_cell;
    }
  }
  return plan;
}

int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

// Costs in multiply-adds of one vector, of which two start in a cycle; the weights are measured.
struct Costs {
  static constexpr double kDirectTile = 1.3;  // a tile of the direct form against one of the shifts
  static constexpr double kPacked = 2;        // packing one entry
  static constexpr double kTileStore = 1.5;   // adding a vector of a tile to memory
  static constexpr double kListed = 3;        // listing a position of a box
  static constexpr double kGathered = 3;      // writing one entry of the result
  static constexpr double kPlan = 200000;     // making a plan, about 30 us
  static constexpr double kChunk = 4096;      // positions between two visits of a small cell
};

double direct_cost(const kernels::ConvInput& input, int64_t images, double lanes, const kernels::Blocks& blocks) {
  const double d = static_cast<double>(input.features());
  const double positions = static_cast<double>(images * input.out[0] * input.out[1] * input.out[2]);
  const double rows = static_cast<double>(round_up(input.features(), blocks.mr));
  return positions * (rows * (d + lanes) / 2 / lanes * Costs::kDirectTile + d * Costs::kPacked);
}

double shift_cost(const std::array<AxisPlan, 3>& axes, int64_t channels, int64_t images, int64_t lanes_of_panel) {
  const double lanes = static_cast<double>(lanes_of_panel);
  double positions = 1, cells = 1, extent = 1, sums = 1, subs = 1, parts = 1, kernel = 1;
  for (const AxisPlan& axis : axes) {
    positions *= axis.positions();
    cells *= axis.cells();
    sums *= axis.sums();
    extent *= static_cast<double>(axis.extent);
    subs *= static_cast<double>(axis.subs);
    parts *= static_cast<double>(axis.parts);
    kernel *= static_cast<double>(axis.kernel);
  }
  const double n = static_cast<double>(images), c = static_cast<double>(channels);
  const int64_t rows = static_cast<int64_t>(subs) * channels;
  // Tiles of one vector have as many rows as a panel has lanes, wider ones no more than eight.
  const int64_t tile = rows <= lanes_of_panel ? lanes_of_panel : std::min<int64_t>(8, lanes_of_panel);
  const double height = static_cast<double>(round_up(rows, tile));
  const double vectors = static_cast<double>(round_up(rows, lanes_of_panel)) / lanes;
  // Half of the products, and of those of the symmetric term the panels on the diagonal twice.
  const double products = height * (n * positions * vectors + n * extent * parts) / 2;
  const double stores = height * vectors * cells / 2 * std::max(1.0, n * extent / Costs::kChunk) * Costs::kTileStore;
  return products + n * positions / 2 * Costs::kListed + stores + n * extent * parts * subs * c * Costs::kPacked +
         sums * c * c / 2 / lanes + kernel * kernel * c * c / 2 * Costs::kGathered;
}

std::array<AxisPlan, 3> plan_axes(const kernels::ConvInput& input, const Forms& forms) {
  return {plan_axis(input, 0, forms[0]), plan_axis(input, 1, forms[1]), plan_axis(input, 2, forms[2])};
}

ShiftPlan finish_plan(std::array<AxisPlan, 3> axes, int64_t channels, int64_t lanes) {
  ShiftPlan plan{};
  plan.axes = std::move(axes);
  plan.channels = channels;
  plan.rows = channels * plan.axes[0].subs * plan.axes[1].subs * plan.axes[2].subs;
  plan.columns = round_up(plan.rows, lanes);
  std::array<int64_t, 3> count{};
  for (size_t axis = 0; axis < 3; ++axis) count[axis] = static_cast<int64_t>(plan.axes[axis].terms.size());
  plan.lookup.resize(static_cast<size_t>(count[0] * count[1] * count[2]));
  std::array<int64_t, 3> t{};
  for (t[0] = 0; t[0] < count[0]; ++t[0]) {
    for (t[1] = 0; t[1] < count[1]; ++t[1]) {
      for (t[2] = 0; t[2] < count[2]; ++t[2]) {
        std::array<int64_t, 3> shift{}, mirror{};
        int64_t left = 0, right = 0, cells = 1;
        for (size_t axis = 0; axis < 3; ++axis) {
          const AxisPlan::Term& term = plan.axes[axis].terms[static_cast<size_t>(t[axis])];
          shift[axis] = term.shift;
          mirror[axis] = term.mirror;
          left = left * plan.axes[axis].parts + term.left;
          right = right * plan.axes[axis].parts + term.right;
          cells *= static_cast<int64_t>(term.cells.size());
        }
        // Forward shifts are formed, and of those by zero the lower triangle of parts.
        const std::array<int64_t, 3> zero{};
        if (shift < zero || (shift == zero && left < right)) continue;
        plan.lookup[static_cast<size_t>(plan.combination(t))] = static_cast<int64_t>(plan.terms.size());
        if (mirror != t)
          plan.lookup[static_cast<size_t>(plan.combination(mirror))] = ~static_cast<int64_t>(plan.terms.size());
        plan.terms.push_back({t, left, right, shift == zero && left == right, plan.sums});
        plan.sums += cells;
      }
    }
  }
  return plan;
}

// Forms asked for by the environment.
struct Wish {
  bool direct = false, shift = false;
  std::optional<Forms> forms;
};

Wish read_wish() {
  const char* variable = std::getenv("KRONFAC_CONV_COVARIANCE");
  const std::string value = variable == nullptr ? "" : variable;
  if (value.empty()) return {};
  if (value == "direct") return {.direct = true, .shift = false, .forms = {}};
  if (value == "shift") return {.direct = false, .shift = true, .forms = {}};
  const std::string prefix = "shift:";
  STD_TORCH_CHECK(
      value.size() == prefix.size() + 3 && value.compare(0, prefix.size(), prefix) == 0 &&
          value.find_first_not_of("csd", prefix.size()) == std::string::npos,
      "kronfac::conv_covariance: KRONFAC_CONV_COVARIANCE: expected direct, shift, or shift: and three of the "
      "letters c, s and d, got ",
      value, "; correct the variable or unset it");
  Forms forms{};
  for (size_t axis = 0; axis < 3; ++axis) {
    const char letter = value[prefix.size() + axis];
    forms[axis] = letter == 'c' ? AxisForm::combined : letter == 's' ? AxisForm::separate : AxisForm::direct;
  }
  return {.direct = false, .shift = true, .forms = forms};
}

}  // namespace

double AxisPlan::positions() const {
  int64_t sum = 0;
  for (const Term& term : terms) {
    for (const Cell& cell : term.cells) sum += cell.last - cell.first;
  }
  return static_cast<double>(sum);
}

double AxisPlan::cells() const {
  size_t sum = 0;
  for (const Term& term : terms) sum += term.cells.size();
  return static_cast<double>(sum);
}

double AxisPlan::sums() const {
  int64_t sum = 0;
  for (const Pair& p : pairs) sum += p.last_cell - p.first_cell;
  return static_cast<double>(sum);
}

std::optional<ShiftPlan> plan_shift(const kernels::ConvInput& input, int64_t images, const kernels::Blocks& blocks,
                                    int64_t element_bytes) {
  const Wish wish = read_wish();
  const int64_t features = input.features(), offsets = input.kernel[0] * input.kernel[1] * input.kernel[2];
  if (wish.direct || features == 0 || images == 0) return {};
  for (size_t axis = 0; axis < 3; ++axis) {
    if (input.out[axis] == 0 || input.size[axis] == 0 || input.kernel[axis] > kLongest) return {};
  }
  const int64_t lanes = blocks.vector_bytes / element_bytes;
  if (wish.forms) return finish_plan(plan_axes(input, *wish.forms), input.channels, lanes);
  if (offsets == 1 && !wish.shift) return {};  // a plain covariance

  double least = wish.shift ? 0 : direct_cost(input, images, static_cast<double>(lanes), blocks);
  if (!wish.shift && least < Costs::kPlan) return {};
  std::optional<std::array<AxisPlan, 3>> best;
  // All combinations of forms, without those that are the same.
  std::array<std::vector<AxisPlan>, 3> candidates;
  for (size_t axis = 0; axis < 3; ++axis) {
    candidates[axis].push_back(plan_axis(input, axis, AxisForm::combined));
    if (candidates[axis][0].subs > 1) candidates[axis].push_back(plan_axis(input, axis, AxisForm::separate));
    if (input.kernel[axis] > 1) candidates[axis].push_back(plan_axis(input, axis, AxisForm::direct));
  }
  for (const AxisPlan& a0 : candidates[0]) {
    for (const AxisPlan& a1 : candidates[1]) {
      for (const AxisPlan& a2 : candidates[2]) {
        const std::array<AxisPlan, 3> axes{a0, a1, a2};
        const int64_t columns = round_up(input.channels * a0.subs * a1.subs * a2.subs, lanes);
        // Sums in memory: no more than two results, small ones aside.
        const double bytes = a0.cells() * a1.cells() * a2.cells() / 2 * static_cast<double>(columns * columns) *
                             static_cast<double>(element_bytes);
        const double allowed =
            2.0 * static_cast<double>(features * features * element_bytes) + static_cast<double>(int64_t{1} << 21);
        if (bytes > allowed && !wish.shift) continue;
        const double cost = shift_cost(axes, input.channels, images, lanes);
        if ((wish.shift && !best) || cost < least) {
          least = cost;
          best = axes;
        }
      }
    }
  }
  if (!best) return {};
  return finish_plan(std::move(*best), input.channels, lanes);
}

}  // namespace kronfac::cpu
