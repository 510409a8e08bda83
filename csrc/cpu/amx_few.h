// Few rows with tile instructions: A tiles are the weight where it lies, B tiles the packed rows, so that the weight is
// read once and not packed. Included after few_impl.h and amx_impl.h.

constexpr int64_t kFewSteps = 32;  // of depth at a time: the rows' panels for them stay in L1

// acc[n] (+)= M · 16 weight rows times N panels of rows, over `steps` of depth; sums are blocks of M by N tiles. `ahead`
// bytes after what is read of the weight lies what will be read later.
template <int M, int N>
__attribute__((noinline)) void few_tiles(const char* w, int64_t row, const uint32_t* x, int64_t panel, int64_t steps, float* c,
                                         bool add_to, int64_t ahead) {
  asm volatile("" : : : "memory");
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
  const char* low = w + kSixteen * row;
  for (; steps; --steps, w += 64, low += 64, x += kTileWords) {
    if (ahead)
      for (int r = 0; r < M * kSixteen; ++r) __builtin_prefetch(w + r * row + ahead, 0, 2);
    _tile_loadd(6, x, 64);
    _tile_loadd(4, w, row);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (N == 2) {
      _tile_loadd(7, x + panel, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (M == 2) {
      _tile_loadd(5, low, row);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (N == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, 64);
  if constexpr (N == 2) _tile_stored(1, c + kTileWords, 64);
  if constexpr (M == 2) _tile_stored(2, c + 2 * kTileWords, 64);
  if constexpr (M == 2 && N == 2) _tile_stored(3, c + 3 * kTileWords, 64);
  asm volatile("" : : : "memory");
}

// Up to 32 weight rows at w for all panels of rows, from step `at` on; a block for each two panels.
inline void few_block(const Few<bf16>& job, const bf16* w, int64_t stride, int count, int64_t at, int64_t steps, float* sums,
                      int64_t ahead) {
  const int panels = (job.T + kLanes - 1) / kLanes;
  const int64_t panel = job.words * kLanes, row = stride * sizeof(bf16);
  for (int v = 0; v < panels; v += 2, sums += kBlockFloats) {
    const uint32_t* x = job.packed + v * panel + at * kTileWords;
    const auto run = [&](auto m, auto n) {
      few_tiles<m(), n()>((const char*)w, row, x, panel, steps, sums, at > 0, v ? 0 : ahead);
    };
    using one = std::integral_constant<int, 1>;
    using two = std::integral_constant<int, 2>;
    if (count > kSixteen)
      panels - v > 1 ? run(two(), two()) : run(two(), one());
    else
      panels - v > 1 ? run(one(), two()) : run(one(), one());
  }
}

// c[T][kFewColumns] = rows · weightᵀ for `columns` weight rows from row `first` on.
inline void base_tiles(const Few<bf16>& job, int64_t first, int64_t columns, float* c) {
  const TileRegisters configured;
  const int blocks = (job.T + kRowsOfBlock - 1) / kRowsOfBlock;
  auto* sums = (float*)scratch(kLora, blocks * kBlockFloats * sizeof(float));
  auto* copy = (bf16*)scratch(kRows, kRowsOfBlock * (kFewSteps + 1) * kDepth * sizeof(bf16));
  const int64_t whole = job.D / kDepth, all = steps_of(job.D), stride = job.weight.stride;
  for (int64_t n = 0; n < columns; n += kRowsOfBlock) {
    const int count = int(std::min<int64_t>(kRowsOfBlock, columns - n)), filled = halves(count) * kSixteen;
    const bf16* w = (const bf16*)job.weight.data + (first + n) * stride;
    for (int64_t at = 0; at < all; at += kFewSteps) {
      const int64_t steps = std::min(kFewSteps, whole - at), depth = std::min(kFewSteps * kDepth, job.D - at * kDepth);
      if (count == filled && steps > 0) {
        const int64_t next = at + kFewSteps < whole ? kFewSteps * kDepth : kRowsOfBlock * stride - at * kDepth;
        few_block(job, w + at * kDepth, stride, count, at, steps, sums, next * int64_t(sizeof(bf16)));
      }
      const int64_t from = count == filled ? std::max<int64_t>(steps, 0) * kDepth : 0, rest = depth - from;
      if (rest <= 0) continue;
      const int64_t padded = steps_of(rest) * kDepth;  // a copy with zeros where the weight has ended
      std::memset((void*)copy, 0, filled * padded * sizeof(bf16));
      for (int r = 0; r < count; ++r)
        std::memcpy((void*)(copy + r * padded), w + r * stride + at * kDepth + from, rest * sizeof(bf16));
      few_block(job, copy, padded, count, at + from / kDepth, steps_of(rest), sums, 0);
    }
    for (int t = 0; t < job.T; t += kLanes)
      for (int m = 0; m < halves(count); ++m) {
        const float* tile = block_row(sums + t / kRowsOfBlock * kBlockFloats, m * kSixteen, t / kLanes % 2);
        U x[kLanes];
        for (int i = 0; i < kLanes; ++i) x[i] = load_words(tile + i * kLanes);
        transpose(x);
        for (int i = 0; i < std::min(kLanes, job.T - t); ++i) store_words(c + (t + i) * kFewColumns + n + m * kSixteen, x[i]);
      }
  }
}

inline void tiles_few_rows(const Few<bf16>& job, int64_t first) {
  few_rows(job, first, job.T <= kTileDots ? base_dots<bf16> : base_tiles);
}
