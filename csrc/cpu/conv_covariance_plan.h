// How the patch covariance of a map falls apart into products of the map with itself shifted; the identity is described
// in kernels/conv_covariance_shift.h. Here is its bookkeeping: which differences occur, which boxes of positions each
// is cut into, which of them an entry of the covariance is the sum of, and what all that costs.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "kernels/blocks.h"
#include "kernels/conv_covariance.h"

namespace kronfac::cpu {

// How an axis is treated. Positions p of the output see the map at p * step + offset.
//   combined  u = p + floor(offset / step); the remainders (phases) count as further channels, all of them together;
//   separate  the same, but every pair of phases is a problem of its own: more products, none of them superfluous;
//   direct    no shifts along this axis: every kernel offset counts as further channels.
enum class AxisForm { combined, separate, direct };
using Forms = std::array<AxisForm, 3>;

// One axis. A part is a set of phases that are stored side by side (subs of them).
struct AxisPlan {
  struct Offset {
    int64_t part, sub, shift;
  };
  // Positions [first, last) of the left operand.
  struct Cell {
    int64_t first, last;
  };
  // Products of part `left` at u with part `right` at u + shift.
  struct Term {
    int64_t left, right, shift;
    std::vector<Cell> cells;  // ascending
    int64_t mirror;           // the term with left and right exchanged
  };
  // For a pair of kernel offsets: its term, and which of the term's cells it is the sum of.
  struct Pair {
    int64_t term, first_cell, last_cell;
  };

  int64_t kernel, parts, subs, extent;
  std::vector<Offset> offsets;
  std::vector<int64_t> bases;  // of phase sub in part: [part * subs + sub], where position 0 lies in the map
  std::vector<Term> terms;
  std::vector<Pair> pairs;  // [left * kernel + right]

  double positions() const;  // summed over all cells
  double cells() const;
  double sums() const;  // cells summed over all pairs
  const Pair& pair(int64_t left, int64_t right) const { return pairs[static_cast<size_t>(left * kernel + right)]; }
};

struct ShiftPlan {
  std::array<AxisPlan, 3> axes;
  int64_t channels;  // of a group
  int64_t rows;      // channels of one part, its phases counted
  int64_t columns;   // rows, rounded up to whole panels

  // One product per cell of the term; half of all combinations of axis terms, the others are their transposes.
  struct Term {
    std::array<int64_t, 3> axis_term;
    int64_t left, right;  // parts, counted over all axes
    bool symmetric;
    int64_t first_sum;  // its cells' sums follow each other from here on, in units of columns * columns
  };
  std::vector<Term> terms;
  std::vector<int64_t> lookup;  // by combination of axis terms: index of its term, or ~index of its transpose's
  int64_t sums;                 // cells of all terms

  int64_t parts() const { return axes[0].parts * axes[1].parts * axes[2].parts; }
  int64_t combination(const std::array<int64_t, 3>& t) const {
    return (t[0] * static_cast<int64_t>(axes[1].terms.size()) + t[1]) * static_cast<int64_t>(axes[2].terms.size()) +
           t[2];
  }
};

// Which form of the operator to use for `images` images: nothing stands for the direct form, patches packed on the fly.
// Counted operations decide, unless KRONFAC_CONV_COVARIANCE says "direct", or "shift", or "shift:" and three letters
// c, s or d for the forms of the axes (outermost first): how tests compare forms. Throws for other values.
std::optional<ShiftPlan> plan_shift(const kernels::ConvInput& input, int64_t images, const kernels::Blocks& blocks,
                                    int64_t element_bytes);

}  // namespace kronfac::cpu
