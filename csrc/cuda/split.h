// Into how many parts, with sums of their own, a long sum is cut where its result has few tiles.
#pragma once

#include <algorithm>
#include <cstdint>

namespace kronfac::cuda {

// What a kernel needs to fill a large GPU: constants, so that results do not depend on the device. Times are counted in
// those of one row of a tile.
struct Split {
  int64_t slots;       // tiles that are computed at the same time
  int64_t least_rows;  // of a part
  double start;        // of a tile: its first loads, its epilogue
  double traffic;      // of a tile: sums of a part written and read again
  double adding;       // a part's share of the kernel that adds the parts up
};

// The number of parts with which `tiles` tiles of a sum over `rows` rows should take least time, up to `most`.
inline int64_t split_parts(const Split& split, int64_t tiles, int64_t rows, int64_t most) {
  most = std::min(most, rows / split.least_rows);
  if (tiles <= 0 || most <= 1) return 1;
  const auto time = [&](int64_t parts) {
    const double rounds = static_cast<double>((tiles * parts + split.slots - 1) / split.slots);
    const double each = static_cast<double>((rows + parts - 1) / parts) + split.start;
    const double again = parts == 1 ? 0 : static_cast<double>(parts);
    return rounds * each + again * (split.traffic * static_cast<double>(tiles) + split.adding);
  };
  int64_t best = 1;
  const auto consider = [&](int64_t parts) {
    parts = std::clamp<int64_t>(parts, 1, most);
    if (time(parts) < time(best)) best = parts;
  };
  for (int64_t fill = split.slots / tiles; fill > 1; fill /= 2) consider(fill);
  for (int64_t rounds = 2; rounds <= 5; ++rounds) consider(rounds * split.slots / tiles);
  return best;
}

}  // namespace kronfac::cuda
