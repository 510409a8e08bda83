// The kernels of many rows with tile instructions. Included after kernels_impl.h, which packs: a panel's sixteen words of
// depth are one B tile as they lie. A rows are copied into tiles, zeros after the last row and the last element, so that
// every tile has sixteen rows of 64 bytes and one configuration serves all.
//
// Sums lie in blocks: two by two tiles of sixteen rows and sixteen floats, 4 KB.

constexpr int kSixteen = 16;                          // rows of one tile register
constexpr int kRowsOfBlock = 2 * kSixteen;            // and columns
constexpr int64_t kTileWords = kSixteen * kLanes;     // of one tile, 1 KB
constexpr int64_t kBlockFloats = 4 * kTileWords;
constexpr int64_t kDepth = 32;                        // bf16 of one step of depth
constexpr int64_t kSteps = 8;                         // of depth at a time: 32 rows of them, 16 KB, stay in L1
constexpr int kTileDots = 1;                          // rows in dot products
constexpr int64_t kTaskColumns = 512;                 // of one task of expand
constexpr int64_t kTilesOfChunk = 8;                  // of the plan, worked on together: their sums stay in L2

// This thread's tile registers while a kernel runs; how they were configured before comes back after it.
class TileRegisters {
 public:
  TileRegisters() {
    Configuration all = {};
    all.palette = 1;
    for (int i = 0; i < 8; ++i) all.bytes[i] = 64, all.rows[i] = kSixteen;
    _tile_storeconfig(&before_);
    asm volatile("" : : "m"(all) : "memory");
    _tile_loadconfig(&all);
  }
  ~TileRegisters() {
    if (before_.palette)
      _tile_loadconfig(&before_);
    else
      _tile_release();
  }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;

 private:
  struct alignas(64) Configuration {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  };
  Configuration before_;
};

// A tiles at `a`, M of them for each step of depth, times B tiles: `steps` tiles one after the other in each panel.
struct Product {
  const uint32_t* a;
  const uint32_t* b[2];
  int64_t steps;
};

// The block at c (+)= Σ of the products, of M by N tiles. From `ahead` on lies what will be read next: 128 bytes a step.
template <int M, int N>
__attribute__((noinline)) void multiply(const Product* product, int count, float* c, bool add_to, const char* ahead) {
  asm volatile("" : : : "memory");  // the compiler does not know that tile instructions read memory
  if (add_to) {
    _tile_loadd(0, c, 64);
    if constexpr (N == 2) _tile_loadd(1, c + kTileWords, 64);
    if constexpr (M == 2) _tile_loadd(2, c + 2 * kTileWords, 64);
    if constexpr (M == 2 && N == 2) _tile_loadd(3, c + 3 * kTileWords, 64);
  } else {
    _tile_zero(0);
    if constexpr (N == 2) _tile_zero(1);
    if constexpr (M == 2) _tile_zero(2);
    if constexpr (M == 2 && N == 2) _tile_zero(3);
  }
  for (const Product* end = product + count; product < end; ++product) {
    const uint32_t *a = product->a, *b = product->b[0], *right = product->b[1];
    for (int64_t i = product->steps; i; --i, a += M * kTileWords, b += kTileWords, right += kTileWords) {
      __builtin_prefetch(ahead, 0, 2), __builtin_prefetch(ahead + 64, 0, 2);
      ahead += 128;
      _tile_loadd(4, a, 64);
      _tile_loadd(6, b, 64);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (N == 2) {
        _tile_loadd(7, right, 64);
        _tile_dpbf16ps(1, 4, 7);
      }
      if constexpr (M == 2) {
        _tile_loadd(5, a + kTileWords, 64);
        _tile_dpbf16ps(2, 5, 6);
        if constexpr (N == 2) _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
  _tile_stored(0, c, 64);
  if constexpr (N == 2) _tile_stored(1, c + kTileWords, 64);
  if constexpr (M == 2) _tile_stored(2, c + 2 * kTileWords, 64);
  if constexpr (M == 2 && N == 2) _tile_stored(3, c + 3 * kTileWords, 64);
  asm volatile("" : : : "memory");
}

inline void multiply(const Product* products, int count, int m, int n, float* c, bool add_to, const void* next = nullptr) {
  const auto* ahead = (const char*)(next ? next : products->a);
  if (m == 2)
    n == 2 ? multiply<2, 2>(products, count, c, add_to, ahead) : multiply<2, 1>(products, count, c, add_to, ahead);
  else
    n == 2 ? multiply<1, 2>(products, count, c, add_to, ahead) : multiply<1, 1>(products, count, c, add_to, ahead);
}

constexpr int halves(int64_t rows) { return rows > kSixteen ? 2 : 1; }

// Where row r of a step's A tiles begins.
inline uint32_t* tile_row(uint32_t* a, int m, int64_t step, int64_t r) { return a + (step * m * kSixteen + r) * kLanes; }

// Where row r and column 0 of a block's tile n begin.
template <class P>
P* block_row(P* c, int64_t r, int n) { return c + ((r / kSixteen * 2 + n) * kSixteen + r % kSixteen) * kLanes; }

// A row of `depth` elements into A tiles, m of them a step.
inline void copy_row(const bf16* from, int64_t depth, uint32_t* a, int m, int64_t r) {
  int64_t d = 0;
  for (; d + kDepth <= depth; d += kDepth) store_words(tile_row(a, m, d / kDepth, r), load_words(from + d));
  if (d == depth) return;
  alignas(64) bf16 rest[kDepth] = {};
  std::memcpy(rest, from + d, (depth - d) * sizeof(bf16));
  store_words(tile_row(a, m, d / kDepth, r), load_words(rest));
}

inline void zero_row(int64_t steps, uint32_t* a, int m, int64_t r) {
  for (int64_t i = 0; i < steps; ++i) store_words(tile_row(a, m, i, r), spread_word(0u));
}

inline int64_t steps_of(int64_t depth) { return (depth + kDepth - 1) / kDepth; }

// `depth` elements of a plan's tile as A tiles.
inline void copy_tile(const Tile& t, const bf16* rows, int64_t stride, int64_t depth, uint32_t* a) {
  const int m = halves(t.rows);
  for (int64_t r = 0; r < t.rows; ++r) copy_row(rows + r * stride, depth, a, m, r);
  for (int64_t r = t.rows; r < m * kSixteen; ++r) zero_row(steps_of(depth), a, m, r);
}

// The experts of a tile's runs, each once.
struct Experts {
  int32_t* numbers;
  int count;

  int find(int32_t expert) const {
    int i = 0;
    while (i < count && numbers[i] != expert) ++i;
    return i;
  }
};

inline Experts experts_of(const Routes& routes, const Tile& t) {
  Experts all{(int32_t*)scratch(kNumbers, t.rows * routes.K * sizeof(int32_t)), 0};
  for (const Run* run = routes.runs + t.run; run < routes.runs + t.run + t.runs; ++run)
    for (int p = 0; p < run->count; ++p) {
      const int32_t expert = routes.experts[run->first + p];
      if (all.find(expert) == all.count) all.numbers[all.count++] = expert;
    }
  return all;
}

// Blocks of depth, as equal as can be, in steps.
struct Depths {
  int64_t steps, count, size;
  explicit Depths(int64_t depth)
      : steps(steps_of(depth)), count((steps + kSteps - 1) / kSteps), size((steps + count - 1) / count) {}
};

// z [rows][K · groups · 16] of a tile from the blocks of all its experts' panels.
inline void pick_ranks(const Shrink<bf16>& job, const Tile& t, const Experts& experts, float* blocks, float* z) {
  const int64_t groups = job.groups, row_wide = job.routes.K * groups * kLanes;
  for (const Run* run = job.routes.runs + t.run; run < job.routes.runs + t.run + t.runs; ++run)
    for (int p = 0; p < run->count; ++p) {
      const int64_t number = experts.find(job.routes.experts[run->first + p]);
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t panel = number * groups + g;
        for (int64_t r = run->row - t.row; r < run->row - t.row + run->rows; ++r)
          store(z + r * row_wide + (p * groups + g) * kLanes, load(block_row(blocks + panel / 2 * kBlockFloats, r, panel % 2)));
      }
    }
}

// z of the rows and all experts of their tile; then each row picks its own.
inline void tiles_shrink(const Shrink<bf16>* jobs, int members, int64_t begin, int64_t end) {
  const Shrink<bf16>& job = *jobs;
  const TileRegisters configured;
  const Depths depths(job.D);
  const int64_t most = (std::min<int64_t>(job.used, kRowsOfBlock * job.routes.K) * job.groups + 1) / 2 * kBlockFloats;
  auto* own = (uint32_t*)scratch(kRows, depths.size * 2 * kTileWords * 4);
  auto* dropped = (bf16*)scratch(kLeft, depths.size * kDepth * sizeof(bf16));
  auto* z = (float*)scratch(kLora, kRowsOfBlock * job.routes.K * job.groups * kLanes * sizeof(float));
  auto* sums = (float*)scratch(kSums, members * (end - begin) * most * sizeof(float));
  for (int64_t step = 0; step < depths.steps; step += depths.size)
    for (int64_t i = begin; i < end; ++i) {
      const Tile& t = job.routes.tiles[i];
      const int64_t d = step * kDepth, depth = std::min(depths.size * kDepth, job.D - d);
      const bf16* rows = job.rows + t.row * job.stride + d;
      const int m = halves(t.rows);
      uint32_t* a = job.tiles + (i * depths.steps * 2 + step * m) * kTileWords;
      copy_tile(t, rows, job.stride, depth, a);
      if (job.mask.on) {
        std::memcpy(own, a, steps_of(depth) * m * kTileWords * 4);
        a = own;
      }
      for (int r = 0; job.mask.on && r < t.rows; ++r) {
        drop(job.mask, (t.row + r) * job.D + d, depth, rows + r * job.stride, dropped);
        copy_row(dropped, depth, a, m, r);
      }
      const Experts experts = experts_of(job.routes, t);
      const int64_t panels = experts.count * job.groups;
      const auto panel = [&](const Shrink<bf16>& of, int64_t p) {
        return of.panels + ((experts.numbers[p / of.groups] * of.groups + p % of.groups) * depths.steps + step) * kTileWords;
      };
      float* c = sums + (i - begin) * members * most;
      for (int member = 0; member < members; ++member, c += most) {
        for (int64_t p = 0; p < panels; p += 2) {
          const Shrink<bf16>& of = jobs[member];
          const Product product{a, {panel(of, p), panel(of, std::min(p + 1, panels - 1))}, steps_of(depth)};
          multiply(&product, 1, m, int(std::min<int64_t>(2, panels - p)), c + p / 2 * kBlockFloats, step > 0);
        }
        if (step + depths.size < depths.steps) continue;
        pick_ranks(jobs[member], t, experts, c, z);
        fold(jobs[member], t, z);
      }
    }
}

// Whether a panel of bf16 has neither Inf nor NaN.
inline bool finite(const uint32_t* words, int64_t count) {
  const U exponent = spread_word(0x7f807f80u);
  for (int64_t i = 0; i < count; i += kLanes)
    if (_mm512_cmpeq_epi16_mask(_mm512_and_si512(load_words(words + i), exponent), exponent)) return false;
  return true;
}

// One task of an expand: its packed columns, and where it works.
struct ExpandTask {
  const Expand<bf16>* jobs;
  int members;
  int64_t first;
  int panels;
  const uint32_t* lora;   // [members · used][panels][R padded]
  const bool* clean;      // [members · used]: those panels are finite
  uint32_t* ranks;        // A tiles of a tile's experts
  Product* products;
  float* sums;            // blocks
};

// The rank-space products of a tile of the plan, for columns of its panels v and v + 1: s of each expert, zeros where a
// row does not use it. An expert with Inf or NaN is left out where some rows do not use it. Returns how many.
inline int rank_products(const ExpandTask& task, const Tile& t, const Experts& experts, int v, int n) {
  const Expand<bf16>& job = *task.jobs;
  const int64_t steps = steps_of(job.R), size = steps * halves(t.rows) * kTileWords;
  Product* next = task.products;
  const uint32_t* a = task.ranks;
  for (int e = 0; e < task.members * experts.count; ++e, a += size) {
    const int64_t expert = e / experts.count * job.used + experts.numbers[e % experts.count];
    if (t.runs > 1 && !task.clean[expert]) continue;
    const uint32_t* b = task.lora + (expert * task.panels + v) * steps * kTileWords;
    *next++ = {a, {b, b + (n - 1) * steps * kTileWords}, steps};
  }
  return int(next - task.products);
}

inline void copy_ranks(const ExpandTask& task, const Tile& t, const Experts& experts) {
  const Routes& routes = task.jobs->routes;
  const int64_t steps = steps_of(task.jobs->R), wide = steps * kDepth;
  const int m = halves(t.rows);
  const int64_t size = steps * m * kTileWords;
  if (t.runs > 1 || t.rows < m * kSixteen) std::memset(task.ranks, 0, task.members * experts.count * size * 4);
  for (int member = 0; member < task.members; ++member)
    for (const Run* run = routes.runs + t.run; run < routes.runs + t.run + t.runs; ++run)
      for (int p = 0; p < run->count; ++p) {
        uint32_t* a = task.ranks + (member * experts.count + experts.find(routes.experts[run->first + p])) * size;
        for (int64_t row = run->row; row < run->row + run->rows; ++row)
          copy_row(task.jobs[member].s + (row * routes.K + p) * wide, wide, a, m, row - t.row);
      }
}

// What rank_products left out, for the rows that use it, into a block that starts from zeros.
inline bool add_unclean(const ExpandTask& task, const Tile& t, int v, int n, float* c) {
  const Expand<bf16>& job = *task.jobs;
  const int64_t words = steps_of(job.R) * kLanes, row_bytes = job.routes.K * words * 4;
  bool any = false;
  for (int member = 0; member < task.members && t.runs > 1; ++member)
    for (const Run* run = job.routes.runs + t.run; run < job.routes.runs + t.run + t.runs; ++run)
      for (int p = 0; p < run->count; ++p) {
        const int64_t expert = member * job.used + job.routes.experts[run->first + p];
        if (task.clean[expert]) continue;
        if (!any) std::memset(c, 0, kBlockFloats * sizeof(float));
        any = true;
        for (int64_t r = run->row - t.row; r < run->row - t.row + run->rows; ++r)
          for (int u = 0; u < n; ++u) {
            const bf16* s = task.jobs[member].s + ((t.row + r) * job.routes.K + p) * words * 2;
            Segment segment{(const char*)s, row_bytes, 4, {}, words * kLanes};
            segment.b[0] = task.lora + (expert * task.panels + v + u) * words * kLanes;
            tile<bf16>(&segment, 1, 1, 1, block_row(c, r, u), kLanes, true);
          }
      }
  return any;
}

// Dropout of the expanded part of a block.
inline void drop_block(const Expand<bf16>& job, const Tile& t, int64_t from, int n, float* c) {
  alignas(64) float row[kRowsOfBlock];
  const int64_t width = std::min<int64_t>(n * kLanes, job.columns - from);
  for (int64_t r = 0; r < t.rows; ++r) {
    for (int u = 0; u < n; ++u) store(row + u * kLanes, load(block_row(c, r, u)));
    drop(job.mask, (t.row + r) * job.columns + from, width, row, row);
    for (int u = 0; u < n; ++u) store(block_row(c, r, u), load(row + u * kLanes));
  }
}

// The blocks of a tile of the plan, rounded once, with the bias, row by row.
inline void finish_blocks(const Expand<bf16>& job, const Tile& t, int64_t first, int panels, const float* c) {
  const bf16* bias = job.bias ? job.bias + first : nullptr;
  const int64_t width = std::min<int64_t>(panels * kLanes, job.columns - first);
  for (int64_t r = 0; r < t.rows; ++r) {
    bf16* out = job.out + (t.row + r) * job.out_stride + first;
    for (int v = 0; v < panels; ++v)
      finish(block_row(c + v / 2 * kBlockFloats, r, v % 2), bias ? bias + v * kLanes : nullptr,
             std::min<int64_t>(kLanes, width - v * kLanes), out + v * kLanes);
  }
}

// The sum of a block before its base: products to be added, or a start in the block itself (returns true).
inline bool start_block(const ExpandTask& task, const Tile& t, const Experts& experts, int v, int n, float* c, int& count) {
  const int m = halves(t.rows);
  count = rank_products(task, t, experts, v, n);
  bool started = add_unclean(task, t, v, n, c);
  if (task.jobs->mask.on) {
    multiply(task.products, count, m, n, c, started);
    drop_block(*task.jobs, t, task.first + v * kLanes, n, c);
    started = true, count = 0;
  }
  return started;
}

// What member number m adds to the sums of at most kTilesOfChunk tiles of the plan; the first one adds all members'
// rank-space products, the last one writes.
inline void add_member(const ExpandTask& task, int m, int64_t begin, int64_t end, const uint32_t* weights) {
  const Expand<bf16>& job = task.jobs[m];
  const Depths depths(job.D);
  const int64_t blocks = (task.panels + 1) / 2;
  for (int64_t step = 0; step < depths.steps; step += depths.size)
    for (int64_t i = begin; i < end; ++i) {
      const Tile& t = job.routes.tiles[i];
      const int64_t depth = std::min(depths.size * kDepth, job.D - step * kDepth);
      const bool first = m == 0 && step == 0, last = m == task.members - 1 && step + depths.size >= depths.steps;
      const uint32_t* a = job.tiles + (i * depths.steps * 2 + step * halves(t.rows)) * kTileWords;
      const uint32_t* next = i + 1 < end ? a + depths.steps * 2 * kTileWords : a;
      float* sums = task.sums + (i - begin) * blocks * kBlockFloats;
      Experts experts{nullptr, 0};
      if (first) copy_ranks(task, t, experts = experts_of(job.routes, t));
      for (int v = 0; v < task.panels; v += 2) {
        const int n = std::min(2, task.panels - v);
        float* c = sums + v / 2 * kBlockFloats;
        int count = 0;
        const bool add_to = first ? start_block(task, t, experts, v, n, c, count) : true;
        const uint32_t* b = weights + (v * depths.steps + step) * kTileWords;
        task.products[count++] = {a, {b, b + (n - 1) * depths.steps * kTileWords}, steps_of(depth)};
        multiply(task.products, count, halves(t.rows), n, c, add_to, next + v / 2 * steps_of(depth) * kLanes * 2);
      }
      if (last) finish_blocks(*task.jobs, t, task.first, task.panels, sums);
    }
}

// Columns first .. first + kTaskColumns of the rows of tiles begin .. end.
inline void tiles_expand(const Expand<bf16>* jobs, int members, int64_t first, int64_t begin, int64_t end) {
  const Expand<bf16>& job = *jobs;
  const TileRegisters configured;
  const int64_t columns = std::min<int64_t>(kTaskColumns, job.columns - first);
  const int64_t experts = members * job.used, rank = words_of<bf16>(job.R) * kLanes;
  const int panels = int((columns + kLanes - 1) / kLanes);
  int64_t words = 0;
  for (int m = 0; m < members; ++m) words += words_of<bf16>(jobs[m].D);
  auto* weights = (uint32_t*)scratch(kWeights, words * panels * kLanes * 4);
  auto* lora = (uint32_t*)scratch(kLora, experts * panels * rank * 4 + experts);
  auto* clean = (bool*)(lora + experts * panels * rank);
  const int64_t most = members * std::min<int64_t>(job.used, kRowsOfBlock * job.routes.K);  // experts of one tile
  ExpandTask task{jobs, members, first, panels, lora, clean, nullptr, nullptr, nullptr};
  task.ranks = (uint32_t*)scratch(kLeft, most * 2 * rank * 4);
  task.products = (Product*)scratch(kMany, (most + 1) * sizeof(Product));
  task.sums = (float*)scratch(kSums, kTilesOfChunk * ((panels + 1) / 2) * kBlockFloats * sizeof(float));
  for (int64_t e = 0; e < experts; ++e) {
    uint32_t* out = lora + e * panels * rank;
    pack<bf16>(jobs[e / job.used].lora, int(e % job.used), first, columns, job.R, out);
    clean[e] = finite(out, panels * rank);
  }
  uint32_t* next = weights;
  for (int m = 0; m < members; next += words_of<bf16>(jobs[m++].D) * panels * kLanes)
    pack<bf16>(jobs[m].weight, 0, first, columns, jobs[m].D, next);
  for (; begin < end; begin += kTilesOfChunk) {
    const uint32_t* from = weights;
    for (int m = 0; m < members; from += words_of<bf16>(jobs[m++].D) * panels * kLanes)
      add_member(task, m, begin, std::min(end, begin + kTilesOfChunk), from);
  }
}

// Panels of `depth` rows' s, R columns, as A tiles: two groups of sixteen columns next to each other in each step.
inline void turn_left(uint32_t* panels, int64_t words, int groups, uint32_t* out) {
  for (int g = 0; g < groups; ++g) {
    const int m = std::min(2, groups - g / 2 * 2);
    uint32_t* a = out + g / 2 * 2 * words * kLanes;
    for (int64_t w = 0; w < words; w += kLanes) {
      U x[kLanes];
      for (int i = 0; i < kLanes; ++i) x[i] = load_words(panels + (g * words + w + i) * kLanes);
      transpose(x);
      for (int i = 0; i < kLanes; ++i) store_words(tile_row(a, m, w / kLanes, g % 2 * kSixteen + i), x[i]);
    }
  }
}

// sums [groups · 16][kColumns] from blocks.
inline void lay_out(const float* blocks, int groups, int panels, float* sums) {
  for (int r = 0; r < groups * kLanes; ++r)
    for (int v = 0; v < panels; ++v) {
      const float* c = blocks + (r / kRowsOfBlock * ((panels + 1) / 2) + v / 2) * kBlockFloats;
      store(sums + r * kColumns + v * kLanes, load(block_row(c, r % kRowsOfBlock, v % 2)));
    }
}

// Columns first .. first + kColumns of an expert's sum.
inline void tiles_sum(const Sum<bf16>* jobs, int members, int expert, int64_t first) {
  const Sum<bf16>& job = *jobs;
  const TileRegisters configured;
  const int64_t columns = std::min<int64_t>(kColumns, job.columns - first), most = kSteps * kDepth;
  const int64_t even = words_of<bf16>(job.R) * 2;
  const int panels = int((columns + kLanes - 1) / kLanes), groups = (job.R + kLanes - 1) / kLanes;
  const int64_t wide = (panels + 1) / 2, size = (groups + 1) / 2 * wide * kBlockFloats;  // of a member's blocks
  auto* right = (uint32_t*)scratch(kWeights, most / 2 * kColumns * 4);
  auto* left = (uint32_t*)scratch(kLeft, 2 * groups * most / 2 * kLanes * 4);
  uint32_t* a = left + groups * most / 2 * kLanes;
  auto* blocks = (float*)scratch(kSums, members * size * sizeof(float));
  auto* sums = (float*)scratch(kLora, groups * kLanes * kColumns * sizeof(float));
  auto* dropped = job.mask.on ? (bf16*)scratch(kRows, most * kColumns * sizeof(bf16)) : nullptr;
  const int64_t begin = job.routes.starts[expert], end = job.routes.starts[expert + 1];
  if (begin == end) std::memset(blocks, 0, members * size * sizeof(float));
  for (int64_t at = begin; at < end; at += most) {
    const int64_t depth = std::min(most, end - at), words = words_of<bf16>(depth);
    pack_rows(job, at, depth, first, columns, dropped, right);
    for (int m = 0; m < members; ++m) {
      pack_down<bf16, bf16>([&](int64_t i) { return jobs[m].s + job.routes.slots[at + i] * even; }, job.R, depth, left);
      turn_left(left, words, groups, a);
      for (int g = 0; g < groups; g += 2)
        for (int v = 0; v < panels; v += 2) {
          const int n = std::min(2, panels - v);
          const uint32_t* b = right + v * words * kLanes;
          const Product product{a + g * words * kLanes, {b, b + (n - 1) * words * kLanes}, words / kLanes};
          float* c = blocks + m * size + (g / 2 * wide + v / 2) * kBlockFloats;
          multiply(&product, 1, std::min(2, groups - g), n, c, at > begin);
        }
    }
  }
  for (int m = 0; m < members; ++m) {
    lay_out(blocks + m * size, groups, panels, sums);
    store_sums(job, sums, first, columns, jobs[m].out + int64_t(expert) * job.R * job.columns);
  }
}
