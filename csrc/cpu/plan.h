// Who uses which experts: tiles of rows, runs of rows with the same experts, and the rows of each expert.
#pragma once

#include <algorithm>
#include <memory>
#include <numeric>
#include <vector>

#include "kernels.h"

namespace moe_lora {

struct Plan {
  std::vector<int32_t> picks, ends;  // what it was made from: experts [N, K]; offsets, or none
  int64_t T, E;
  int K;
  int size;  // rows of a tile

  std::vector<int32_t> used;      // experts, rising
  std::vector<int32_t> experts;   // [N, K]: an instance's, each once, rising, as numbers in `used`
  std::vector<int32_t> counts;    // [N]: how many those are
  std::vector<int32_t> places;    // [N, K]: of each pick, among those
  std::vector<int32_t> instance;  // [T]
  std::vector<Run> runs;
  std::vector<Tile> tiles;
  std::vector<int64_t> starts, slots;  // of each used expert
  std::vector<int32_t> rows;

  Plan(std::vector<int32_t> picks, std::vector<int32_t> ends, int64_t T, int64_t E, int K, int size)
      : picks(std::move(picks)), ends(std::move(ends)), T(T), E(E), K(K), size(size) {
    find_experts();
    find_tiles();
    find_rows();
  }

  bool made_from(const std::vector<int32_t>& p, const std::vector<int32_t>& e, int64_t rows, int64_t all, int k,
                 int tile) const {
    return T == rows && E == all && K == k && (size == tile || !tile) && picks == p && ends == e;
  }

  Routes routes() const {
    return {tiles.data(),  runs.data(),   experts.data(), instance.data(), places.data(),
            starts.data(), rows.data(), slots.data(),   K};
  }

 private:
  void find_experts() {
    std::vector<int32_t> number(E, -1);
    for (int32_t e : picks) number[e] = 0;
    for (int64_t e = 0; e < E; ++e)
      if (!number[e]) number[e] = int32_t(used.size()), used.push_back(int32_t(e));
    const int64_t N = int64_t(picks.size()) / K;
    experts.resize(N * K), places.resize(N * K), counts.resize(N);
    for (int64_t i = 0; i < N; ++i) {
      int32_t* own = experts.data() + i * K;
      for (int k = 0; k < K; ++k) own[k] = number[picks[i * K + k]];
      std::sort(own, own + K);
      counts[i] = int32_t(std::unique(own, own + K) - own);
      for (int k = 0; k < K; ++k)
        places[i * K + k] = int32_t(std::lower_bound(own, own + counts[i], number[picks[i * K + k]]) - own);
    }
  }

  bool same(int32_t i, int32_t j) const {
    const auto own = experts.begin() + int64_t(i) * K;
    return i == j || (counts[i] == counts[j] && std::equal(own, own + counts[i], experts.begin() + int64_t(j) * K));
  }

  void find_tiles() {
    const int64_t N = int64_t(counts.size());
    instance.resize(T);
    for (int64_t t = 0, i = 0; t < T; ++t) {
      while (!ends.empty() && t >= ends[i + 1]) ++i;
      instance[t] = int32_t(ends.empty() ? t / (T / N) : i);
    }
    for (int64_t row = 0; row < T; row += size) {
      Tile tile{int32_t(row), int32_t(std::min<int64_t>(size, T - row)), int32_t(runs.size()), 0};
      for (int32_t t = tile.row; t < tile.row + tile.rows; ++t)
        if (tile.runs && same(instance[t - 1], instance[t]))
          ++runs.back().rows;
        else
          runs.push_back({t, 1, instance[t] * K, counts[instance[t]]}), ++tile.runs;
      tiles.push_back(tile);
    }
  }

  void find_rows() {
    starts.assign(used.size() + 1, 0);
    for (int64_t t = 0; t < T; ++t)
      for (int p = 0; p < counts[instance[t]]; ++p) ++starts[experts[int64_t(instance[t]) * K + p] + 1];
    std::partial_sum(starts.begin(), starts.end(), starts.begin());
    rows.resize(starts.back()), slots.resize(starts.back());
    std::vector<int64_t> next(starts);
    for (int64_t t = 0; t < T; ++t)
      for (int p = 0; p < counts[instance[t]]; ++p) {
        const int64_t at = next[experts[int64_t(instance[t]) * K + p]]++;
        rows[at] = int32_t(t), slots[at] = t * K + p;
      }
  }
};

// The plan of this routing with tiles of that size, or 0 for any; kept for the thread's next call: all layers of a step share it, forward and backward.
inline std::shared_ptr<const Plan> plan_of(std::vector<int32_t> picks, std::vector<int32_t> ends, int64_t T, int64_t E,
                                           int K, int size) {
  static thread_local std::shared_ptr<const Plan> last;
  if (!last || !last->made_from(picks, ends, T, E, K, size))
    last = std::make_shared<const Plan>(std::move(picks), std::move(ends), T, E, K, size ? size : kTile);
  return last;
}

}  // namespace moe_lora
