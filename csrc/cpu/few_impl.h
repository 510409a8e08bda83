// Few rows: the weight is read once, where it lies. Included after kernels_impl.h.
//
// Up to kDots rows are dot products: both operands lie along the depth, sixteen partial sums each. More rows lie packed in
// panels, sixteen to a vector, and meet one word of one weight row at a time: no sums across lanes, no second read.

constexpr int kDotBlock = 24;          // weight rows that meet a part of the rows while it is in L1
constexpr int64_t kDotBytes = 16384;   // of all rows in such a part
// Words of depth while a task's columns pass, panels from L2: a page of a weight row for bf16; shorter sums for float.
template <class E>
constexpr int64_t kLaneWords = sizeof(E) == 2 ? 1024 : 256;
constexpr int kPanels = kVectors;       // of rows at once

// acc[m · kDotBlock + n] (+)= sixteen partial sums of <row m, weight row n>, of M rows and N weight rows. x holds 64 bytes
// of each row in turn. `ahead` bytes after what is read of the weight lies what will be read later.
template <class E, int M, int N>
__attribute__((noinline)) void dots(const uint32_t* x, const E* w, int64_t w_stride, int64_t depth, float* c, bool add_to,
                                    int64_t ahead) {
  constexpr int wide = kLanes * kPer<E>;
  alignas(64) static const float zeros[kLanes] = {};
  const float* start = add_to ? c : zeros;
  const int64_t step = add_to ? kLanes : 0;
  F acc[M][N];
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) acc[m][n] = load(start + (m * kDotBlock + n) * step);
  int64_t d = 0;
  do {
    U y[N];
    for (int n = 0; n < N; ++n) {
      y[n] = load_words(w + n * w_stride + d);
      __builtin_prefetch((const char*)(w + n * w_stride + d) + ahead, 0, 2);
    }
    for (int m = 0; m < M; ++m) {
      U z = load_words(x + m * kLanes);
      for (int n = 0; n < N; ++n) acc[m][n] = dot(acc[m][n], z, y[n], E());
    }
    d += wide, x += M * kLanes;
  } while (d < depth);
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) store(c + (m * kDotBlock + n) * kLanes, acc[m][n]);
}

// All `count` weight rows for M rows, as many at a time as there are registers for.
template <class E, int M>
void dots_rows(const uint32_t* x, const E* w, int64_t ws, int count, int64_t depth, float* c, bool add_to, int64_t ahead) {
  constexpr int N = std::min(kAccumulators / M, 6);
  int n = 0;
  for (; n + N <= count; n += N) dots<E, M, N>(x, w + n * ws, ws, depth, c + n * kLanes, add_to, ahead);
  for (; n < count; ++n) dots<E, M, 1>(x, w + n * ws, ws, depth, c + n * kLanes, add_to, ahead);
}

// Depth d .. d + depth of all rows and `count` weight rows, into acc[T][kDotBlock][16].
template <class E, int M = 1>
void dots_block(const Few<E>& job, int64_t d, const E* w, int64_t ws, int count, int64_t depth, float* acc, int64_t ahead) {
  if (job.T == M) return dots_rows<E, M>(job.packed + M * (d / kPer<E>), w, ws, count, depth, acc, d > 0, ahead);
  if constexpr (M < kDots) dots_block<E, M + 1>(job, d, w, ws, count, depth, acc, ahead);
}

// `count` rows of the weight from row `first` on, depth d .. d + depth, where they lie if they are of type E and whole
// vectors or words, else in a copy with zeros after it. `stride` becomes theirs.
template <class S, class E>
const E* weight_rows(const Few<E>& job, int64_t first, int count, int64_t d, int64_t depth, bool whole, int64_t& stride) {
  const S* w = (const S*)job.weight.data + first * job.weight.stride + d;
  stride = job.weight.stride;
  if constexpr (std::is_same_v<S, E>)
    if (whole) return w;
  const int64_t wide = kLanes * kPer<E>, padded = (depth + wide - 1) / wide * wide;
  auto* copy = (E*)scratch(kRows, count * padded * sizeof(E));
  for (int n = 0; n < count; ++n)
    if constexpr (std::is_same_v<S, E>) {
      std::memset((void*)(copy + n * padded), 0, padded * sizeof(E));
      std::memcpy((void*)(copy + n * padded), w + n * stride, depth * sizeof(E));
    } else {
      for (int64_t i = 0; i < padded; i += kLanes) store(copy + n * padded + i, floats(w + n * stride + i, depth - i));
    }
  stride = padded;
  return copy;
}

template <class E>
const E* weight_rows(const Few<E>& job, int64_t first, int count, int64_t d, int64_t depth, bool whole, int64_t& stride) {
  if constexpr (sizeof(E) == 4) {
    if (job.weight.kind == Kind::kBf16) return weight_rows<bf16>(job, first, count, d, depth, whole, stride);
    if (job.weight.kind == Kind::kFp16) return weight_rows<fp16>(job, first, count, d, depth, whole, stride);
  }
  return weight_rows<E, E>(job, first, count, d, depth, whole, stride);
}

// c[T][kFewColumns] = rows · weightᵀ for `columns` weight rows from row `first` on, by dot products.
template <class E>
void base_dots(const Few<E>& job, int64_t first, int64_t columns, float* c) {
  constexpr int64_t wide = kLanes * kPer<E>;
  auto* acc = (float*)scratch(kLora, job.T * kDotBlock * kLanes * sizeof(float));
  const int block = job.T > 4 ? kDotBlock : 6;
  const int64_t whole = job.D / wide * wide, most = kDotBytes / (job.T * 64) * wide;
  for (int64_t n = 0; n < columns; n += block) {
    const int count = int(std::min<int64_t>(block, columns - n));
    for (int64_t d = 0; d < job.D; d += most) {
      const int64_t part = std::min(most, whole - d), rest = std::min(most, job.D - d) - part;
      const int64_t next = d + most < whole ? most : block * job.weight.stride - d;
      int64_t stride;
      if (part) {
        const E* w = weight_rows(job, first + n, count, d, part, true, stride);
        dots_block(job, d, w, stride, count, part, acc, next * sizeof(E));
      }
      if (rest) {
        const E* w = weight_rows(job, first + n, count, d + part, rest, false, stride);
        dots_block(job, d + part, w, stride, count, rest, acc, 0);
      }
    }
    for (int t = 0; t < job.T; ++t)
      for (int m = 0; m < count; m += 4) {
        F four[4];
        float out[4];
        for (int i = 0; i < 4; ++i) four[i] = load(acc + (t * kDotBlock + std::min(m + i, count - 1)) * kLanes);
        totals(four, out);
        std::memcpy(c + t * kFewColumns + n + m, out, std::min(4, count - m) * sizeof(float));
      }
  }
}

// c[n][V · 16] (+)= words of N weight rows times V panels of rows
template <class E, int V, int N>
__attribute__((noinline)) void lanes(const uint32_t* x, int64_t x_stride, const E* w, int64_t w_stride, int64_t words,
                                     float* c, int64_t c_stride, bool add_to, int64_t ahead) {
  constexpr int groups = (N + 2) / 3;
  const int64_t row = w_stride * sizeof(E);
  const char* p[groups];  // of every third row: fewer registers than rows
  for (int g = 0; g < groups; ++g) {
    p[g] = (const char*)w + 3 * g * row;
    asm("" : "+r"(p[g]));
  }
  F acc[N][V];
  for (int n = 0; n < N; ++n)
    for (int v = 0; v < V; ++v) acc[n][v] = zero();
  int64_t i = 0;
  do {
    for (int n = 0; n < N; ++n) __builtin_prefetch(p[n / 3] + n % 3 * row + i * 4 + ahead, 0, 2);
    const int64_t end = std::min<int64_t>(i + kLanes, words);
    do {
      U y[V];
      for (int v = 0; v < V; ++v) y[v] = load_words(x + v * x_stride);
      for (int n = 0; n < N; ++n) {
        const U z = spread_word(p[n / 3] + n % 3 * row + i * 4);
        for (int v = 0; v < V; ++v) acc[n][v] = dot(acc[n][v], z, y[v], E());
      }
      x += kLanes;
    } while (++i < end);
  } while (i < words);
  alignas(64) static const float zeros[kLanes * V] = {};
  const float* before = add_to ? c : zeros;
  const int64_t before_stride = add_to ? c_stride : 0;
  for (int n = 0; n < N; ++n)
    for (int v = 0; v < V; ++v)
      store(c + n * c_stride + v * kLanes, add(acc[n][v], load(before + n * before_stride + v * kLanes)));
}

template <class E, int V>
void lanes_rows(const uint32_t* x, int64_t x_stride, const E* w, int64_t w_stride, int count, int64_t words, float* c,
                int64_t c_stride, bool add_to, int64_t ahead) {
  // not more: weight rows a power of two apart share one set of twelve lines of L1
  constexpr int N = std::min(kAccumulators / V, 12), M = std::max(N / 3, 1);
  int n = 0;
  const auto run = [&](auto rows) {
    for (; n + rows() <= count; n += rows())
      lanes<E, V, rows()>(x, x_stride, w + n * w_stride, w_stride, words, c + n * c_stride, c_stride, add_to, ahead);
  };
  run(std::integral_constant<int, N>()), run(std::integral_constant<int, M>()), run(std::integral_constant<int, 1>());
}

// `count` weight rows at w, from word `at` of the depth on, for all panels of rows.
template <class E>
void lanes_block(const Few<E>& job, int64_t at, const E* w, int64_t stride, int count, int64_t words, float* c,
                 int64_t ahead) {
  const int panels = (job.T + kLanes - 1) / kLanes;
  for (int v = 0; v < panels; v += kPanels) {
    const uint32_t* x = job.packed + (v * job.words + at) * kLanes;
    const auto run = [&](auto n) {
      lanes_rows<E, n()>(x, job.words * kLanes, w, stride, count, words, c + v * kLanes, panels * kLanes, at > 0,
                         v ? 0 : ahead);
    };
    switch (std::min(panels - v, kPanels)) {
      case 1: run(std::integral_constant<int, 1>()); break;
      case 2: run(std::integral_constant<int, std::min(2, kPanels)>()); break;
      case 3: run(std::integral_constant<int, std::min(3, kPanels)>()); break;
      default: run(std::integral_constant<int, kPanels>());
    }
  }
}

// The same by words of the weight and panels of rows.
template <class E>
void base_lanes(const Few<E>& job, int64_t first, int64_t columns, float* c) {
  const int panels = (job.T + kLanes - 1) / kLanes;
  auto* sums = (float*)scratch(kLora, kFewColumns * panels * kLanes * sizeof(float));
  for (int64_t at = 0; at < job.words; at += kLaneWords<E>) {
    const int64_t d = at * kPer<E>, depth = std::min<int64_t>(kLaneWords<E> * kPer<E>, job.D - d), odd = depth % kPer<E>;
    for (int64_t n = 0; n < columns; n += kDotBlock) {
      const int count = int(std::min<int64_t>(kDotBlock, columns - n));
      const int64_t next = n + count < columns ? count * job.weight.stride : kLaneWords<E> * kPer<E> - n * job.weight.stride;
      float* out = sums + n * panels * kLanes;
      int64_t stride;
      if (depth > odd) {
        const E* w = weight_rows(job, first + n, count, d, depth - odd, true, stride);
        lanes_block(job, at, w, stride, count, depth / kPer<E>, out, next * int64_t(sizeof(E)));
      }
      if (odd) {
        const E* w = weight_rows(job, first + n, count, d + depth - odd, odd, false, stride);
        lanes_block(job, at + depth / kPer<E>, w, stride, count, 1, out, 0);
      }
    }
  }
  for (int t = 0; t < job.T; t += kLanes)
    for (int64_t n = 0; n < columns; n += kLanes) {
      U x[kLanes];
      for (int i = 0; i < kLanes; ++i) x[i] = load_words(sums + (n + i) * panels * kLanes + t);
      transpose(x);
      for (int i = 0; i < std::min(kLanes, job.T - t); ++i) store_words(c + (t + i) * kFewColumns + n, x[i]);
    }
}

constexpr int64_t kShortSum = 256;  // of depth: a longer sum in float loses with its length

// z[m] (+)= x[m] · columns r .. r + 32 of a, over its rows begin .. end, for M rows
template <class S, class E, int M>
void few_shrink_rows(const E* const* x, const S* a, int64_t stride, int64_t begin, int64_t end, int64_t n, float* const* z,
                     bool add_to) {
  F acc[M][2];
  const int64_t low = std::min<int64_t>(n, kLanes), high = std::max<int64_t>(n - kLanes, 0);
  for (int m = 0; m < M; ++m) acc[m][0] = acc[m][1] = zero();
  const auto columns = [&](int64_t d, int64_t first, int64_t count) {
    U y = elements(a + d * stride + first, count, E());
    if constexpr (kPer<E> == 2)
      if (d + 1 < end) y = join(y, elements(a + (d + 1) * stride + first, count, E()));
    return y;
  };
  int64_t d = begin;
  for (; d + kPer<E> <= end; d += kPer<E>) {
    const U y0 = columns(d, 0, low), y1 = high ? columns(d, kLanes, high) : y0;
    for (int m = 0; m < M; ++m) {
      const U value = spread_word(x[m] + d);
      acc[m][0] = dot(acc[m][0], value, y0, E()), acc[m][1] = dot(acc[m][1], value, y1, E());
    }
  }
  if (d < end) {
    const U y0 = columns(d, 0, low), y1 = high ? columns(d, kLanes, high) : y0;
    for (int m = 0; m < M; ++m) {
      uint32_t last = 0;
      std::memcpy(&last, x[m] + d, sizeof(E));
      acc[m][0] = dot(acc[m][0], spread_word(last), y0, E()), acc[m][1] = dot(acc[m][1], spread_word(last), y1, E());
    }
  }
  for (int m = 0; m < M; ++m) {
    if (add_to) acc[m][0] = add(acc[m][0], floats(z[m], low));
    store_some(z[m], acc[m][0], low);
    if (!high) continue;
    if (add_to) acc[m][1] = add(acc[m][1], floats(z[m] + kLanes, high));
    store_some(z[m] + kLanes, acc[m][1], high);
  }
}

template <class S, class E, int M = 1>
void few_shrink_some(int rows, const E* const* x, const S* a, int64_t stride, int64_t begin, int64_t end, int64_t n,
                     float* const* z, bool add_to) {
  if (rows == M) return few_shrink_rows<S, E, M>(x, a, stride, begin, end, n, z, add_to);
  if constexpr (M < kAccumulators / 3) few_shrink_some<S, E, M + 1>(rows, x, a, stride, begin, end, n, z, add_to);
}

// z[split] of one expert for the rows that use it, as many at a time as there are registers for
template <class S, class E>
void few_shrink_as(const Few<E>& job, int expert, int64_t split) {
  constexpr int most = kAccumulators / 3;
  const S* a = expert_of<S>(job.lora_a, expert);
  const int64_t begin = split * kSplit, end = std::min(job.D, begin + kSplit), last = job.routes.starts[expert + 1];
  for (int64_t at = job.routes.starts[expert]; at < last; at += most) {
    const int rows = int(std::min<int64_t>(most, last - at));
    const E* x[most];
    float* z[most];
    for (int i = 0; i < rows; ++i) x[i] = job.rows + job.routes.rows[at + i] * job.stride;
    for (int r = 0; r < job.R; r += 2 * kLanes) {
      for (int i = 0; i < rows; ++i) z[i] = job.z + (split * job.T * job.routes.K + job.routes.slots[at + i]) * job.R + r;
      for (int64_t d = begin; d < end; d += kShortSum)
        few_shrink_some(rows, x, a + r, job.lora_a.matrix.stride, d, std::min(end, d + kShortSum), job.R - r, z, d > begin);
    }
  }
}

template <class E>
void few_shrink(const Few<E>& job, int expert, int64_t split) {
  switch (job.lora_a.matrix.kind) {
    case Kind::kFloat: return few_shrink_as<float>(job, expert, split);
    case Kind::kBf16: return few_shrink_as<bf16>(job, expert, split);
    case Kind::kFp16: return few_shrink_as<fp16>(job, expert, split);
  }
}

// c[T][kFewColumns] += s · lora_b, columns first .. first + columns. An expert's columns are copied together: a column's
// rows lie far apart, often by a power of two.
template <class S, class E>
void few_expand(const Few<E>& job, int64_t first, int64_t columns, float* c) {
  constexpr int vectors = kFewColumns / kLanes;
  auto* copy = (float*)scratch(kWeights, job.R * kFewColumns * sizeof(float));
  for (int u = 0; u < job.used; ++u) {
    const S* b = expert_of<S>(job.lora_b, u) + first;
    for (int r = 0; r < job.R; ++r)
      for (int64_t v = 0; v < vectors; ++v)
        store(copy + r * kFewColumns + v * kLanes,
              floats(b + r * job.lora_b.matrix.stride + v * kLanes, columns - v * kLanes));
    for (int64_t at = job.routes.starts[u]; at < job.routes.starts[u + 1]; ++at) {
      float* out = c + job.routes.rows[at] * kFewColumns;
      const float *s = job.s + job.routes.slots[at] * job.R, *row = copy;
      F acc[vectors];
      for (int v = 0; v < vectors; ++v) acc[v] = load(out + v * kLanes);
      for (int r = 0; r < job.R; ++r, row += kFewColumns) {
        const F value = spread(s[r]);
        for (int v = 0; v < vectors; ++v) acc[v] = multiply_add(value, load(row + v * kLanes), acc[v]);
      }
      for (int v = 0; v < vectors; ++v) store(out + v * kLanes, acc[v]);
    }
  }
}

template <class E>
void few_rows(const Few<E>& job, int64_t first, void (*base)(const Few<E>&, int64_t, int64_t, float*)) {
  const int64_t columns = std::min<int64_t>(kFewColumns, job.F - first);
  auto* c = (float*)scratch(kSums, job.T * kFewColumns * sizeof(float));
  if (columns < kFewColumns) std::memset(c, 0, job.T * kFewColumns * sizeof(float));
  base(job, first, columns, c);
  switch (job.lora_b.matrix.kind) {
    case Kind::kFloat: few_expand<float>(job, first, columns, c); break;
    case Kind::kBf16: few_expand<bf16>(job, first, columns, c); break;
    case Kind::kFp16: few_expand<fp16>(job, first, columns, c); break;
  }
  for (int t = 0; t < job.T; ++t)
    finish(c + t * kFewColumns, job.bias ? job.bias + first : nullptr, columns, job.out + t * job.F + first);
}

template <class E>
void few_rows(const Few<E>& job, int64_t first) {
  few_rows(job, first, job.T <= kDots ? base_dots<E> : base_lanes<E>);
}
