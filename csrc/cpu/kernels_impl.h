// The kernels, on the sixteen lanes of vector_*.h. Included inside the namespace of one instruction set.

template <class E>
constexpr int kPer = 4 / sizeof(E);  // elements of a word

template <class E>
constexpr int64_t words_of(int64_t depth) {
  return (depth + kPer<E> - 1) / kPer<E>;
}

constexpr int64_t kBlock = 144;  // words of depth at a time: 64 columns of them fill two thirds of an L1 cache of 48 KB

enum Scratch { kWeights, kLora, kSums, kRows, kLeft, kBits };

// One product of a register tile: rows at `a`, each a_row bytes apart, a word each a_step bytes, against packed columns.
struct Segment {
  const char* a;
  int64_t a_row, a_step;
  const uint32_t* b[kPanels];
  int64_t depth;            // elements
  const char* next;         // the rows of the next tile, to prefetch, or null
};

template <class E, int M, int N>
void tile_of(const Segment* segments, int count, float* c, int64_t stride, bool add_to) {
  F acc[M][N];
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) acc[m][n] = add_to ? load(c + m * stride + n * kLanes) : zero();
  for (const Segment* s = segments; s < segments + count; ++s) {
    const char* a = s->a;
    const int64_t row = s->a_row, step = s->a_step, whole = s->depth / kPer<E>;
    const uint32_t* b[N];
    for (int n = 0; n < N; ++n) b[n] = s->b[n];
    for (int64_t w = 0; w < whole;) {
      if (s->next)
        for (int m = 0; m < M; ++m) __builtin_prefetch(s->next + m * row + w * 4);
      for (const int64_t end = w + 16 < whole ? w + 16 : whole; w < end; ++w, a += step) {
        U y[N];
        for (int n = 0; n < N; ++n) y[n] = load_words(b[n] + w * kLanes);
        for (int m = 0; m < M; ++m) {
          U x = spread_word(a + m * row);
          for (int n = 0; n < N; ++n) acc[m][n] = dot(acc[m][n], x, y[n], E());
        }
      }
    }
    if (whole * kPer<E> < s->depth)  // an odd bf16, and never what lies after it
      for (int m = 0; m < M; ++m) {
        uint16_t last;
        std::memcpy(&last, a + m * row, 2);
        U x = spread_word(uint32_t(last));
        for (int n = 0; n < N; ++n) acc[m][n] = dot(acc[m][n], x, load_words(b[n] + whole * kLanes), E());
      }
  }
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) store(c + m * stride + n * kLanes, acc[m][n]);
}

template <class E, int M>
void tile_rows(const Segment* segments, int count, int vectors, float* c, int64_t stride, bool add_to) {
  switch (vectors) {
    case 1: return tile_of<E, M, 1>(segments, count, c, stride, add_to);
    case 2: return tile_of<E, M, 2>(segments, count, c, stride, add_to);
    case 3: return tile_of<E, M, 3>(segments, count, c, stride, add_to);
    default: return tile_of<E, M, 4>(segments, count, c, stride, add_to);
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

// Sixteen words whose low (only) parts are the elements at p.
inline U elements(const bf16* p, bf16) { return words(p); }
inline U elements(const float* p, bf16) { return words(load(p)); }
inline U elements(const float* p, float) { return load_words(p); }

// The same of n < 16 elements, zeros after them.
template <class S, class E>
U elements(const S* p, int64_t n, E) {
  if (n >= kLanes) return elements(p, E());
  S buffer[kLanes] = {};
  if (n > 0) std::memcpy(buffer, p, n * sizeof(S));
  return elements(buffer, E());
}

// Sixteen whole words of one row: 32 bf16 or 16 floats.
inline U row_words(const bf16* p, bf16) { return load_words(p); }
inline U row_words(const float* p, float) { return load_words(p); }
inline U row_words(const float* p, bf16) {
  bf16 buffer[2 * kLanes];
  store(buffer, load(p)), store(buffer + kLanes, load(p + kLanes));
  return load_words(buffer);
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
    const S* low = row(w * kPer<E>);
    const S* high = kPer<E> == 2 && w * 2 + 1 < depth ? row(w * 2 + 1) : nullptr;
    for (int64_t first = 0; first < columns; first += kLanes) {
      U x = elements(low + first, columns - first, E());
      if (high) x = join(x, elements(high + first, columns - first, E()));
      store_words(out + (first * all) + w * kLanes, x);  // first / 16 panels of all · 16 words
    }
  }
}

template <class S, class E>
void pack_as(const Source& source, int expert, int64_t first, int64_t columns, int64_t depth, uint32_t* panels) {
  const S* data = (const S*)source.matrix.data + expert * source.expert_stride;
  const int64_t stride = source.matrix.stride;
  if (source.across)
    pack_across<S, E>(data + first * stride, stride, columns, depth, panels);
  else
    pack_down<S, E>([=](int64_t i) { return data + first + i * stride; }, columns, depth, panels);
}

// Panels of 16 columns each, words_of(depth) · 16 words; what is past the columns or the depth is zero.
template <class E>
void pack(const Source& source, int expert, int64_t first, int64_t columns, int64_t depth, uint32_t* panels) {
  if (source.matrix.is_float)
    pack_as<float, E>(source, expert, first, columns, depth, panels);
  else
    pack_as<E, E>(source, expert, first, columns, depth, panels);
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

inline F floats(const float* p, int64_t n) {
  if (n >= kLanes) return load(p);
  float buffer[kLanes] = {};
  std::memcpy(buffer, p, n * sizeof(float));
  return load(buffer);
}

inline F floats(const bf16* p, int64_t n) {
  if (n >= kLanes) return widen(p);
  bf16 buffer[kLanes] = {};
  std::memcpy(buffer, p, n * sizeof(bf16));
  return widen(buffer);
}

template <class E>
void store_some(E* p, F x, int64_t n) {
  if (n >= kLanes) return store(p, x);
  E buffer[kLanes];
  store(buffer, x);
  std::memcpy(p, buffer, n * sizeof(E));
}

// From z [rows][slots · groups · 16] of one tile to h and s, or from z and h to s, kept_s and dgates.
template <class E>
void fold(const Shrink<E>& job, const Tile& t, const float* z) {
  const int64_t even = words_of<E>(job.R) * kPer<E>, wide = job.groups * kLanes, first = int64_t(t.slot) * kTile * even;
  std::memset((void*)(job.s + first), 0, t.rows * t.slots * even * sizeof(E));
  if (job.kept) std::memset((void*)(job.kept_s + first), 0, t.rows * t.slots * even * sizeof(E));
  for (int64_t r = 0; r < t.rows; ++r)
    for (int64_t k = 0, at = (t.row + r) * job.K; k < job.K; ++k, ++at) {
      const int64_t place = r * t.slots + job.slots[at];
      const float* source = z + place * wide;
      const F gate = spread(job.gates[at]);
      E* s = job.s + first + place * even;
      F product = zero();
      for (int64_t i = 0; i < job.R; i += kLanes) {
        const F value = load(source + i);
        store_some(s + i, multiply(gate, value), job.R - i);
        if (job.h) store_some(job.h + at * job.R + i, value, job.R - i);
        if (job.kept) {
          const F h = floats(job.kept + at * job.R + i, job.R - i);
          product = multiply_add(i + kLanes > job.R ? floats(source + i, job.R - i) : value, h, product);
          store_some(job.kept_s + first + place * even + i, multiply(gate, h), job.R - i);
        }
      }
      if (job.kept) job.dgates[at] = total(product);
    }
}

template <class E>
void shrink(const Shrink<E>& job, int64_t begin, int64_t end) {
  const int64_t all = words_of<E>(job.D) * kLanes;
  const int64_t step = job.mask.on ? 512 : job.D;
  auto* dropped = job.mask.on ? (E*)scratch(kRows, kTile * step * sizeof(E)) : nullptr;
  for (int64_t i = begin; i < end; ++i) {
    const Tile& t = job.tiles[i];
    const int64_t panels = t.slots * job.groups;
    auto* z = (float*)scratch(kSums, kTile * panels * kLanes * sizeof(float));
    for (int64_t d = 0; d < job.D; d += step) {
      const int64_t depth = std::min(step, job.D - d);
      const E* rows = job.rows + t.row * job.stride + d;
      Segment s{(const char*)rows, job.stride * int64_t(sizeof(E)), 4, {}, depth, nullptr};
      if (dropped) {
        for (int r = 0; r < t.rows; ++r)
          drop(job.mask, (t.row + r) * job.D + d, depth, rows + r * job.stride, dropped + r * step);
        s.a = (const char*)dropped, s.a_row = step * sizeof(E);
      }
      for (int64_t p = 0; p < panels; p += kVectors) {
        const int n = std::min<int64_t>(kVectors, panels - p);
        for (int v = 0; v < n; ++v) {
          const int64_t slot = (p + v) / job.groups, group = (p + v) % job.groups;
          s.b[v] = job.panels + (job.experts[t.slot + slot] * job.groups + group) * all + d / kPer<E> * kLanes;
        }
        tile<E>(&s, 1, t.rows, n, z + p * kLanes, panels * kLanes, d > 0);
      }
    }
    fold(job, t, z);
  }
}

template <class E>
void finish(const float* c, const E* bias, int64_t n, E* out) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    F y = load(c + i);
    if constexpr (sizeof(E) == 2)
      store(out + i, bias ? add(y, widen(bias + i)) : y);
    else
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

// The rank-space products of a tile, one per expert, as segments.
template <class E>
int expand_segments(const Expand<E>& job, const Tile& t, const uint32_t* lora, int vector, int n, Segment* segments) {
  const int64_t even = words_of<E>(job.R) * kPer<E>, all = words_of<E>(job.R) * kLanes;
  for (int j = 0; j < t.slots; ++j) {
    Segment& s = segments[j];
    s.a = (const char*)(job.s + int64_t(t.slot) * kTile * even + j * even);
    s.a_row = t.slots * even * sizeof(E), s.a_step = 4, s.depth = even, s.next = nullptr;
    for (int v = 0; v < n; ++v) s.b[v] = lora + (job.experts[t.slot + j] * kPanels + vector + v) * all;
  }
  return t.slots;
}

template <class E>
void expand(const Expand<E>& job, int64_t first, int64_t begin, int64_t end) {
  const int64_t columns = std::min<int64_t>(kColumns, job.columns - first), all = words_of<E>(job.D);
  const int64_t blocks = std::max<int64_t>(1, (all + kBlock - 1) / kBlock), block = (all + blocks - 1) / blocks;
  const int64_t rank = words_of<E>(job.R) * kLanes;
  const int vectors = (columns + kLanes - 1) / kLanes;
  auto* weights = (uint32_t*)scratch(kWeights, all * kColumns * 4);
  auto* lora = (uint32_t*)scratch(kLora, job.num_experts * kPanels * rank * 4);
  auto* sums = (float*)scratch(kSums, kChunk * kTile * kColumns * sizeof(float));
  pack<E>(job.weight, 0, first, columns, job.D, weights);
  for (int e = 0; e < job.num_experts; ++e) pack<E>(job.lora, e, first, columns, job.R, lora + e * kPanels * rank);
  std::vector<Segment> segments(job.num_experts + 1);
  for (; begin < end; begin += kChunk) {
    const int64_t stop = std::min(end, begin + kChunk);
    for (int64_t k = 0; k < blocks; ++k)
      for (int64_t i = begin; i < stop; ++i) {
        const Tile& t = job.tiles[i];
        float* c = sums + (i - begin) * kTile * kColumns;
        const char* rows = (const char*)(job.rows + k * block * kPer<E>);
        const int64_t bytes = job.stride * sizeof(E), depth = std::min(block * kPer<E>, job.D - k * block * kPer<E>);
        for (int v = 0; v < vectors; v += kVectors) {
          const int n = std::min(kVectors, vectors - v);
          int count = k ? 0 : expand_segments(job, t, lora, v, n, segments.data());
          bool add_to = k > 0;
          if (count && job.mask.on) {
            tile<E>(segments.data(), count, t.rows, n, c + v * kLanes, kColumns, false);
            for (int r = 0; r < t.rows; ++r) {
              float* row = c + r * kColumns + v * kLanes;
              const int64_t width = std::min<int64_t>(n * kLanes, columns - v * kLanes);
              drop(job.mask, (t.row + r) * job.columns + first + v * kLanes, width, row, row);
            }
            count = 0, add_to = true;
          }
          Segment& s = segments[count];
          s.a = rows + t.row * bytes, s.a_row = bytes, s.a_step = 4, s.depth = depth;
          s.next = i + 1 < stop ? rows + job.tiles[i + 1].row * bytes : nullptr;
          for (int u = 0; u < n; ++u) s.b[u] = weights + ((v + u) * all + k * block) * kLanes;
          tile<E>(segments.data(), count + 1, t.rows, n, c + v * kLanes, kColumns, add_to);
        }
        if (k + 1 == blocks)
          for (int r = 0; r < t.rows; ++r)
            finish(c + r * kColumns, job.bias ? job.bias + first : nullptr, columns,
                   job.out + (t.row + r) * job.out_stride + first);
      }
  }
}

template <class E>
void sum(const Sum<E>& job, int64_t first) {
  const int64_t columns = std::min<int64_t>(kColumns, job.columns - first), most = kBlock * kPer<E>;
  const int vectors = (columns + kLanes - 1) / kLanes, groups = (job.R + kLanes - 1) / kLanes;
  auto* right = (uint32_t*)scratch(kWeights, kBlock * kColumns * 4);
  auto* left = (uint32_t*)scratch(kLeft, groups * kBlock * kLanes * 4);
  auto* sums = (float*)scratch(kSums, groups * kLanes * kColumns * sizeof(float));
  auto* dropped = job.mask.on ? (E*)scratch(kRows, most * kColumns * sizeof(E)) : nullptr;
  for (int e = 0; e < job.num_experts; ++e) {
    const int64_t begin = job.starts[e], end = job.starts[e + 1];
    if (begin == end) std::memset(sums, 0, groups * kLanes * kColumns * sizeof(float));
    for (int64_t at = begin; at < end; at += most) {
      const int64_t depth = std::min(most, end - at), all = words_of<E>(depth) * kLanes;
      pack_down<E, E>([&](int64_t i) { return job.s + job.place[at + i]; }, job.R, depth, left);
      if (dropped) {
        for (int64_t i = 0; i < depth; ++i)
          drop(job.mask, job.row[at + i] * job.columns + first, columns,
               job.rows + job.row[at + i] * job.stride + first, dropped + i * kColumns);
        pack_down<E, E>([&](int64_t i) { return dropped + i * kColumns; }, columns, depth, right);
      } else {
        pack_down<E, E>([&](int64_t i) { return job.rows + job.row[at + i] * job.stride + first; }, columns, depth, right);
      }
      for (int g = 0; g < groups; ++g)
        for (int r = 0; r < kLanes && g * kLanes + r < job.R; r += kTile)
          for (int v = 0; v < vectors; v += kVectors) {
            const int n = std::min(kVectors, vectors - v), rows = std::min({kTile, kLanes - r, job.R - g * kLanes - r});
            Segment s{(const char*)(left + g * all + r), 4, kLanes * 4, {}, all / kLanes * kPer<E>, nullptr};
            for (int u = 0; u < n; ++u) s.b[u] = right + (v + u) * all;
            tile<E>(&s, 1, rows, n, sums + (g * kLanes + r) * kColumns + v * kLanes, kColumns, at > begin);
          }
    }
    float* out = job.out + int64_t(e) * job.R * job.columns;
    for (int r = 0; r < job.R; ++r)
      for (int64_t c = 0; c < columns; ++c)
        out[job.across ? (first + c) * job.R + r : r * job.columns + first + c] = sums[r * kColumns + c];
  }
}
