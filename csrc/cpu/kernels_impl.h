// The kernels, on the sixteen lanes of vector_*.h. Included inside the namespace of one instruction set.

#ifdef TILES
constexpr int64_t kWhole = kLanes;  // words
#else
constexpr int64_t kWhole = 1;
#endif

template <class E>
constexpr int kPer = 4 / sizeof(E);  // elements of a word

// Of a panel of that depth; with tile instructions whole tiles, see amx_impl.h.
template <class E>
constexpr int64_t words_of(int64_t depth) {
  return (depth + kPer<E> * kWhole - 1) / (kPer<E> * kWhole) * kWhole;
}

constexpr int64_t kBlock = 192;  // words of depth at a time: 64 columns of them, 48 KB, stream from L2 and half stay in L1
constexpr int kWide = kVectors * kLanes;  // columns of a register tile

// Blocks of depth, as equal as can be.
struct Blocks {
  int64_t words, count, size;
  explicit Blocks(int64_t all) : words(all), count((all + kBlock - 1) / kBlock), size((all + count - 1) / count) {}
};

enum Scratch { kWeights, kLora, kSums, kRows, kLeft, kBits, kMany, kNumbers };

// One product of a register tile: rows at `a`, each a_row bytes apart, a word each a_step bytes, against packed columns.
struct Segment {
  const char* a;
  int64_t a_row, a_step;
  const uint32_t* b[kVectors];
  int64_t words;            // 16 times the depth in words, at least one word
};

// A sum of one block of depth at a time: added to c at its end, since one long sum in float loses with its length. What it
// is added to comes by one path of loads, from c or from zeros: a second one would make the compiler spill the sums.
template <class E, int M, int N>
__attribute__((noinline)) void tile_of(const Segment* s, int count, float* c, int64_t stride, bool add_to) {
  F acc[M][N];
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) acc[m][n] = zero();
  const Segment* end = s + count;
  do {
    const int64_t row = s->a_row, step = s->a_step;
    const char *low = s->a, *high = s->a + 3 * row;
    asm("" : "+r"(high));  // two pointers and one stride take fewer registers than six rows
    const uint32_t* b[N];
    for (int n = 0; n < N; ++n) b[n] = s->b[n];
    int64_t w = 0;
    const int64_t words = s->words;
    do {
      U y[N];
      for (int n = 0; n < N; ++n) y[n] = load_words(b[n] + w);
      for (int m = 0; m < M; ++m) {
        U x = spread_word(m < 3 ? low + m * row : high + (m - 3) * row);
        for (int n = 0; n < N; ++n) acc[m][n] = dot(acc[m][n], x, y[n], E());
      }
      w += kLanes, low += step, high += step;
    } while (w < words);
  } while (++s < end);
  alignas(64) static const float zeros[kWide] = {};
  const float* before = add_to ? c : zeros;
  const int64_t before_stride = add_to ? stride : 0;
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n)
      store(c + m * stride + n * kLanes, add(acc[m][n], load(before + m * before_stride + n * kLanes)));
}

template <class E, int M>
void tile_rows(const Segment* segments, int count, int vectors, float* c, int64_t stride, bool add_to) {
  switch (vectors) {
    case 1: return tile_of<E, M, 1>(segments, count, c, stride, add_to);
    case 2: return tile_of<E, M, std::min(2, kVectors)>(segments, count, c, stride, add_to);
    case 3: return tile_of<E, M, std::min(3, kVectors)>(segments, count, c, stride, add_to);
    default: return tile_of<E, M, kVectors>(segments, count, c, stride, add_to);
  }
}

// c[rows][vectors · 16] (+)= Σ of the segments' products
template <class E>
void tile(const Segment* segments, int count, int rows, int vectors, float* c, int64_t stride, bool add_to) {
  switch (rows) {
    case 1: return tile_rows<E, 1>(segments, count, vectors, c, stride, add_to);
    case 2: return tile_rows<E, 2>(segments, count, vectors, c, stride, add_to);
    case 3: return tile_rows<E, 3>(segments, count, vectors, c, stride, add_to);
    case 4: return tile_rows<E, 4>(segments, count, vectors, c, stride, add_to);
    case 5: return tile_rows<E, 5>(segments, count, vectors, c, stride, add_to);
    default: return tile_rows<E, 6>(segments, count, vectors, c, stride, add_to);
  }
}

// The product of rows of E and packed columns b, as one segment, and one more for an odd last bf16, which is copied to
// `odd`: what lies after it may be anything. Returns how many.
template <class E>
int row_segments(const E* rows, int64_t stride, int count, int64_t depth, const uint32_t* const* b, int vectors,
                 Segment* segments, uint32_t* odd) {
  const int64_t words = depth / kPer<E> * kLanes, row = stride * sizeof(E);
  Segment* s = segments;
  if (words) {
    *s = {(const char*)rows, row, 4, {}, words};
    std::copy_n(b, vectors, s++->b);
  }
  if (depth % kPer<E>) {
    for (int r = 0; r < count; ++r) {
      odd[r] = 0;
      std::memcpy(odd + r, rows + r * stride + depth - 1, sizeof(uint16_t));
    }
    *s = {(const char*)odd, 4, 4, {}, kLanes};
    for (int v = 0; v < vectors; ++v) s->b[v] = b[v] + words;
    ++s;
  }
  return int(s - segments);
}

// Sixteen words whose low (only) parts are the elements at p.
template <class S>
U elements(const S* p, bf16) {
  if constexpr (std::is_same_v<S, bf16>)
    return words(p);
  else
    return words(load(p));
}
template <class S>
U elements(const S* p, float) {
  return as_words(load(p));
}

// The same of n < 16 elements, zeros after them.
template <class S, class E>
U elements(const S* p, int64_t n, E) {
  if (n >= kLanes) return elements(p, E());
  S buffer[kLanes] = {};
  if (n > 0) std::memcpy(buffer, p, n * sizeof(S));
  return elements(buffer, E());
}

// Sixteen whole words of one row: 32 bf16 or 16 floats.
template <class S>
U row_words(const S* p, bf16) {
  if constexpr (std::is_same_v<S, bf16>) return load_words(p);
  bf16 buffer[2 * kLanes];
  store(buffer, load(p)), store(buffer + kLanes, load(p + kLanes));
  return load_words(buffer);
}
template <class S>
U row_words(const S* p, float) {
  return as_words(load(p));
}

// Columns from the rows of a matrix: sixteen rows become one panel.
template <class S, class E>
void pack_across(const S* data, int64_t stride, int64_t columns, int64_t depth, uint32_t* out) {
  const int64_t all = words_of<E>(depth), wide = kLanes * kPer<E>;
  for (int64_t first = 0; first < columns; first += kLanes, out += all * kLanes)
    for (int64_t w = 0; w < all; w += kLanes) {
      U x[16];
      const int64_t rows = std::min<int64_t>(columns - first, kLanes), left = depth - w * kPer<E>;
      for (int r = 0; r < kLanes; ++r) {
        const S* p = data + (first + r) * stride + w * kPer<E>;
        S buffer[kLanes * 2] = {};
        if (r >= rows || left < wide) {
          if (r < rows) std::memcpy(buffer, p, std::min(left, wide) * sizeof(S));
          p = buffer;
        }
        x[r] = row_words(p, E());
        __builtin_prefetch((const char*)p + 512);
      }
      transpose(x);
      for (int64_t i = 0; i < std::min<int64_t>(all - w, kLanes); ++i) store_words(out + (w + i) * kLanes, x[i]);
    }
}

// Columns from the columns of rows given by a function: row(i) is the i-th summed row, or null.
template <class S, class E, class Row>
void pack_down(Row row, int64_t columns, int64_t depth, uint32_t* out) {
  const int64_t all = words_of<E>(depth);
  for (int64_t w = 0; w < all; ++w) {
    if (w * kPer<E> >= depth) {
      for (int64_t first = 0; first < columns; first += kLanes) store_words(out + first * all + w * kLanes, spread_word(0u));
      continue;
    }
    const S* low = row(w * kPer<E>);
    const S* high = kPer<E> == 2 && w * 2 + 1 < depth ? row(w * 2 + 1) : nullptr;
    for (int64_t first = 0; first < columns; first += kLanes) {
      U x = elements(low + first, columns - first, E());
      if constexpr (kPer<E> == 2)
        if (high) x = join(x, elements(high + first, columns - first, E()));
      store_words(out + (first * all) + w * kLanes, x);  // first / 16 panels of all · 16 words
    }
  }
}

// `expert` of a source.
template <class S>
const S* expert_of(const Source& source, int expert) {
  return (const S*)source.matrix.data + (source.used ? source.used[expert] : expert) * source.expert_stride;
}

template <class S, class E>
void pack_as(const Source& source, int expert, int64_t first, int64_t columns, int64_t depth, uint32_t* panels) {
  const S* data = expert_of<S>(source, expert);
  const int64_t stride = source.matrix.stride;
  if (source.across)
    pack_across<S, E>(data + first * stride, stride, columns, depth, panels);
  else
    pack_down<S, E>([=](int64_t i) { return data + first + i * stride; }, columns, depth, panels);
}

// Panels of 16 columns each, words_of(depth) · 16 words; what is past the columns or the depth is zero.
template <class E>
void pack(const Source& source, int expert, int64_t first, int64_t columns, int64_t depth, uint32_t* panels) {
  switch (source.matrix.kind) {
    case Kind::kFloat: return pack_as<float, E>(source, expert, first, columns, depth, panels);
    case Kind::kBf16: return pack_as<bf16, E>(source, expert, first, columns, depth, panels);
    case Kind::kFp16: return pack_as<fp16, E>(source, expert, first, columns, depth, panels);
  }
}

// The dropout bits of elements first .. first + n: element i is kept if the result's [i] >= threshold.
inline const int16_t* random_halves(const Mask& mask, int64_t first, int64_t n) {
  const int64_t count = n / 2 + 1;
  auto* out = (uint32_t*)scratch(kBits, (count + kLanes) * 4);
  for (int64_t i = 0; i < count; i += kLanes) {
    U z = add(add(spread_word(uint32_t(first / 2 + i) + mask.a), count_up()), spread_word(0u));
    z = multiply(xor_shift<16>(z), spread_word(0x7feb352du));
    z = add(xor_shift<15>(z), spread_word(mask.b));
    z = xor_shift<16>(multiply(z, spread_word(0x846ca68bu)));
    store_words(out + i, z);
  }
  return (const int16_t*)out + (first & 1);
}

inline void drop(const Mask& mask, int64_t first, int64_t n, const bf16* x, bf16* out) {
  const int16_t* bits = random_halves(mask, first, n);
  for (int64_t i = 0; i < n; ++i) out[i].bits = bits[i] >= mask.threshold ? x[i].bits : 0;
}

inline void drop(const Mask& mask, int64_t first, int64_t n, const float* x, float* out) {
  const int16_t* bits = random_halves(mask, first, n);
  for (int64_t i = 0; i < n; ++i) out[i] = bits[i] >= mask.threshold ? x[i] : 0;
}

// n elements, zeros after them.
template <class S>
F floats(const S* p, int64_t n) {
  if (n >= kLanes) return load(p);
  S buffer[kLanes] = {};
  if (n > 0) std::memcpy((void*)buffer, p, n * sizeof(S));
  return load(buffer);
}

template <class E>
void store_some(E* p, F x, int64_t n) {
  if (n >= kLanes) return store(p, x);
  E buffer[kLanes];
  store(buffer, x);
  std::memcpy(p, buffer, n * sizeof(E));
}

// From z [rows][K · groups · 16] of one tile to h and s, or from z and h to s, kept_s and dgates.
template <class E>
void fold(const Shrink<E>& job, const Tile& t, const float* z) {
  const int64_t even = words_of<E>(job.R) * kPer<E>, wide = job.groups * kLanes, K = job.routes.K;
  std::memset((void*)(job.s + t.row * K * even), 0, t.rows * K * even * sizeof(E));
  if (job.kept) std::memset((void*)(job.kept_s + t.row * K * even), 0, t.rows * K * even * sizeof(E));
  for (int64_t row = t.row; row < t.row + t.rows; ++row)
    for (int64_t k = 0; k < K; ++k) {
      const int64_t pick = job.routes.instance[row] * K + k, place = row * K + job.routes.places[pick];
      const float* source = z + (place - t.row * K) * wide;
      const F gate = spread(job.gates[pick]);
      E* s = job.s + place * even;
      F product = zero();
      for (int64_t i = 0; i < job.R; i += kLanes) {
        const F value = load(source + i);
        store_some(s + i, multiply(gate, value), job.R - i);
        if (job.h) store_some(job.h + (row * K + k) * job.R + i, value, job.R - i);
        if (job.kept) {
          const F h = floats(job.kept + (row * K + k) * job.R + i, job.R - i);
          product = multiply_add(i + kLanes > job.R ? floats(source + i, job.R - i) : value, h, product);
          store_some(job.kept_s + place * even + i, multiply(gate, h), job.R - i);
        }
      }
      if (job.kept) job.dgates[row * K + k] = total(product);
    }
}

// z [rows][K · groups · 16] (+)= the product of a tile's rows, `depth` of them from d on, and its runs' experts
template <class E>
void shrink_tile(const Shrink<E>& job, const Tile& t, const E* rows, int64_t stride, int64_t d, int64_t depth,
                 int64_t words, float* z) {
  const int64_t row_wide = job.routes.K * job.groups * kLanes;
  for (const Run* run = job.routes.runs + t.run; run < job.routes.runs + t.run + t.runs; ++run)
    for (int64_t p = 0, panels = run->count * job.groups; p < panels; p += kVectors) {
      const int n = std::min<int64_t>(kVectors, panels - p);
      const uint32_t* b[kVectors];
      for (int v = 0; v < n; ++v) {
        const int64_t panel = job.routes.experts[run->first + (p + v) / job.groups] * job.groups + (p + v) % job.groups;
        b[v] = job.panels + (panel * words + d / kPer<E>) * kLanes;
      }
      Segment s[2];
      uint32_t odd[kTile];
      const int64_t r = run->row - t.row;
      const int count = row_segments(rows + r * stride, stride, run->rows, depth, b, n, s, odd);
      tile<E>(s, count, run->rows, n, z + r * row_wide + p * kLanes, row_wide, d > 0);
    }
}

template <class E>
void shrink(const Shrink<E>* jobs, int members, int64_t begin, int64_t end) {
  const Shrink<E>& job = *jobs;
  const Blocks blocks(words_of<E>(job.D));
  const int64_t wide = job.groups * kLanes, row_wide = job.routes.K * wide, step = blocks.size * kPer<E>;
  auto* dropped = job.mask.on ? (E*)scratch(kRows, kTile * step * sizeof(E)) : nullptr;
  auto* sums = (float*)scratch(kSums, members * (end - begin) * kTile * row_wide * sizeof(float));
  for (int64_t d = 0; d < job.D; d += step)
    for (int64_t i = begin; i < end; ++i) {
      const Tile& t = job.routes.tiles[i];
      const int64_t depth = std::min(step, job.D - d);
      float* z = sums + (i - begin) * members * kTile * row_wide;
      const E* rows = job.rows + t.row * job.stride + d;
      for (int r = 0; dropped && r < t.rows; ++r)
        drop(job.mask, (t.row + r) * job.D + d, depth, rows + r * job.stride, dropped + r * step);
      if (dropped) rows = dropped;
      const int64_t stride = dropped ? step : job.stride;
      for (int m = 0; m < members; ++m, z += kTile * row_wide) {
        shrink_tile(jobs[m], t, rows, stride, d, depth, blocks.words, z);
        if (d + step >= job.D) fold(jobs[m], t, z);
      }
    }
}

template <class E>
void finish(const float* c, const E* bias, int64_t n, E* out) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    F y = load(c + i);
    store(out + i, bias ? add(y, load(bias + i)) : y);
  }
  if (i < n) {
    float rest[kLanes] = {};
    E rounded[kLanes], b[kLanes] = {};
    std::memcpy(rest, c + i, (n - i) * sizeof(float));
    if (bias) std::memcpy(b, bias + i, (n - i) * sizeof(E));
    finish(rest, bias ? b : nullptr, kLanes, rounded);
    std::memcpy(out + i, rounded, (n - i) * sizeof(E));
  }
}

// The rank-space products of a run, one per expert and member, as segments: of n panels from panel v on.
template <class E>
int run_segments(const Expand<E>* jobs, int members, const Run& run, const uint32_t* lora, int all, int v, int n,
                 Segment* segments) {
  const int64_t words = words_of<E>(jobs->R), even = words * kPer<E>, row = jobs->routes.K * even;
  Segment* s = segments;
  for (int m = 0; m < members; ++m)
    for (int p = 0; p < run.count; ++p, ++s) {
      *s = {(const char*)(jobs[m].s + run.row * row + p * even), int64_t(row * sizeof(E)), 4, {}, words * kLanes};
      const int64_t expert = m * jobs->used + jobs->routes.experts[run.first + p];
      for (int u = 0; u < n; ++u) s->b[u] = lora + (expert * all + v + u) * words * kLanes;
    }
  return int(s - segments);
}

// The rank-space products of a tile before its base: of a single run as the first segments of the same sum, whose number
// is returned; of more, or under dropout, summed into c, since a row must not meet an expert it does not use.
template <class E>
int ranks(const Expand<E>* jobs, int members, const Tile& t, const uint32_t* lora, int all, int v, int n, int64_t from,
          float* c, Segment* segments) {
  const Expand<E>& job = *jobs;
  const Run* runs = job.routes.runs + t.run;
  if (t.runs == 1 && !job.mask.on) return run_segments(jobs, members, *runs, lora, all, v, n, segments);
  for (const Run* run = runs; run < runs + t.runs; ++run) {
    const int count = run_segments(jobs, members, *run, lora, all, v, n, segments);
    tile<E>(segments, count, run->rows, n, c + (run->row - t.row) * kWide, kWide, false);
  }
  const int64_t width = std::min<int64_t>(kWide, job.columns - from);
  for (int r = 0; job.mask.on && r < t.rows; ++r)
    drop(job.mask, (t.row + r) * job.columns + from, width, c + r * kWide, c + r * kWide);
  return 0;
}

template <class E>
void finish_tile(const Expand<E>& job, const Tile& t, int64_t first, const float* c) {
  for (int r = 0; r < t.rows; ++r)
    finish(c + r * kWide, job.bias ? job.bias + first : nullptr, std::min<int64_t>(kWide, job.columns - first),
           job.out + (t.row + r) * job.out_stride + first);
}

// What member m adds to the sums of at most kChunk tiles; the first one adds all members' rank-space products, the last
// one writes.
template <class E>
void expand_member(const Expand<E>* jobs, int members, int m, int64_t first, int panels, int64_t begin, int64_t end,
                   const uint32_t* weights, const uint32_t* lora, Segment* segments, float* sums) {
  const Expand<E>& job = jobs[m];
  const Blocks blocks(words_of<E>(job.D));
  const int64_t step = blocks.size * kPer<E>;
  for (int64_t d = 0; d < job.D; d += step)
    for (int v = 0; v < panels; v += kVectors) {
      const int n = std::min(kVectors, panels - v);
      const int64_t depth = std::min(step, job.D - d), from = first + v * kLanes;
      const uint32_t* b[kVectors];
      for (int u = 0; u < n; ++u) b[u] = weights + ((v + u) * blocks.words + d / kPer<E>) * kLanes;
      for (int64_t i = begin; i < end; ++i) {
        const Tile& t = job.routes.tiles[i];
        float* c = sums + ((v / kVectors) * kChunk + i - begin) * kTile * kWide;
        int count = m || d ? 0 : ranks(jobs, members, t, lora, panels, v, n, from, c, segments);
        const bool add_to = count == 0;
        uint32_t odd[kTile];
        const E* rows = job.rows + t.row * job.stride + d;
        count += row_segments(rows, job.stride, t.rows, depth, b, n, segments + count, odd);
        tile<E>(segments, count, t.rows, n, c, kWide, add_to);
        if (m == members - 1 && d + step >= job.D) finish_tile(*jobs, t, from, c);
      }
    }
}

// Columns first .. first + kColumns of the rows of tiles begin .. end.
template <class E>
void expand(const Expand<E>* jobs, int members, int64_t first, int64_t begin, int64_t end) {
  const Expand<E>& job = *jobs;
  const int64_t columns = std::min<int64_t>(kColumns, job.columns - first), rank = words_of<E>(job.R) * kLanes;
  const int panels = (columns + kLanes - 1) / kLanes, experts = members * job.used;
  int64_t words = 0;
  for (int m = 0; m < members; ++m) words += words_of<E>(jobs[m].D);
  auto* weights = (uint32_t*)scratch(kWeights, words * panels * kLanes * 4);
  auto* lora = (uint32_t*)scratch(kLora, experts * panels * rank * 4);
  auto* sums = (float*)scratch(kSums, kChunk * kTile * kColumns * sizeof(float));
  auto* segments = (Segment*)scratch(kMany, (members * job.routes.K + 2) * sizeof(Segment));
  for (int m = 0, e = 0; m < members; ++m)
    for (; e < (m + 1) * job.used; ++e)
      pack<E>(jobs[m].lora, e - m * job.used, first, columns, job.R, lora + e * panels * rank);
  uint32_t* next = weights;
  for (int m = 0; m < members; next += words_of<E>(jobs[m++].D) * panels * kLanes)
    pack<E>(jobs[m].weight, 0, first, columns, jobs[m].D, next);
  for (; begin < end; begin += kChunk) {
    const uint32_t* from = weights;
    for (int m = 0; m < members; from += words_of<E>(jobs[m++].D) * panels * kLanes)
      expand_member(jobs, members, m, first, panels, begin, std::min(end, begin + kChunk), from, lora, segments, sums);
  }
}

// One block of an expert's rows: sums[R rounded up][panels · 16] (+)= leftᵀ · right, both packed
template <class E>
void sum_block(const uint32_t* left, const uint32_t* right, int64_t words, int R, int panels, float* sums, bool add_to) {
  for (int v = 0; v < panels; v += kVectors)
    for (int g = 0; g * kLanes < R; ++g)
      for (int r = 0; r < kLanes && g * kLanes + r < R; r += kTile) {
        const int n = std::min(kVectors, panels - v), rows = std::min({kTile, kLanes - r, R - g * kLanes - r});
        Segment s{(const char*)(left + g * words * kLanes + r), 4, kLanes * 4, {}, words * kLanes};
        for (int u = 0; u < n; ++u) s.b[u] = right + (v + u) * words * kLanes;
        tile<E>(&s, 1, rows, n, sums + (g * kLanes + r) * kColumns + v * kLanes, kColumns, add_to);
      }
}

// sums [R][kColumns] to [R, columns], or to [columns, R] in blocks of sixteen by sixteen.
template <class E>
void store_sums(const Sum<E>& job, const float* sums, int64_t first, int64_t columns, float* out) {
  if (!job.across) {
    for (int r = 0; r < job.R; ++r)
      std::memcpy(out + r * job.columns + first, sums + r * kColumns, columns * sizeof(float));
    return;
  }
  for (int r = 0; r < job.R; r += kLanes)
    for (int64_t c = 0; c < columns; c += kLanes) {
      U x[kLanes];
      for (int i = 0; i < kLanes; ++i) x[i] = load_words(sums + (r + i) * kColumns + c);
      transpose(x);
      for (int i = 0; i < std::min<int64_t>(kLanes, columns - c); ++i) {
        float* p = out + (first + c + i) * job.R + r;
        if (job.R - r >= kLanes)
          store_words(p, x[i]);
        else
          std::memcpy(p, &x[i], (job.R - r) * sizeof(float));
      }
    }
}

// `depth` of an expert's rows from the at-th on, after dropout, as panels of `columns` columns.
template <class E>
void pack_rows(const Sum<E>& job, int64_t at, int64_t depth, int64_t first, int64_t columns, E* dropped, uint32_t* right) {
  const auto row = [&](int64_t i) { return job.rows + job.routes.rows[at + i] * job.stride + first; };
  if (!dropped) return pack_down<E, E>(row, columns, depth, right);
  for (int64_t i = 0; i < depth; ++i)
    drop(job.mask, job.routes.rows[at + i] * job.columns + first, columns, row(i), dropped + i * kColumns);
  pack_down<E, E>([&](int64_t i) { return dropped + i * kColumns; }, columns, depth, right);
}

// Columns first .. first + kColumns of an expert's sum.
template <class E>
void sum(const Sum<E>* jobs, int members, int expert, int64_t first) {
  const Sum<E>& job = *jobs;
  const int64_t columns = std::min<int64_t>(kColumns, job.columns - first), most = kBlock * kPer<E>;
  const int64_t even = words_of<E>(job.R) * kPer<E>;
  const int panels = (columns + kLanes - 1) / kLanes, groups = (job.R + kLanes - 1) / kLanes;
  const int64_t size = int64_t(groups) * kLanes * kColumns;  // of a member's sums
  auto* right = (uint32_t*)scratch(kWeights, kBlock * kColumns * 4);
  auto* left = (uint32_t*)scratch(kLeft, groups * kBlock * kLanes * 4);
  auto* sums = (float*)scratch(kSums, members * size * sizeof(float));
  auto* dropped = job.mask.on ? (E*)scratch(kRows, most * kColumns * sizeof(E)) : nullptr;
  const int64_t begin = job.routes.starts[expert], end = job.routes.starts[expert + 1];
  if (begin == end) std::memset(sums, 0, members * size * sizeof(float));
  for (int64_t at = begin; at < end; at += most) {
    const int64_t depth = std::min(most, end - at);
    pack_rows(job, at, depth, first, columns, dropped, right);
    for (int m = 0; m < members; ++m) {
      pack_down<E, E>([&](int64_t i) { return jobs[m].s + job.routes.slots[at + i] * even; }, job.R, depth, left);
      sum_block<E>(left, right, words_of<E>(depth), job.R, panels, sums + m * size, at > begin);
    }
  }
  for (int m = 0; m < members; ++m)
    store_sums(job, sums + m * size, first, columns, jobs[m].out + int64_t(expert) * job.R * job.columns);
}
