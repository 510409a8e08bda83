// Few rows: the weight is read once, where it lies, in dot products along its rows. Included after kernels_impl.h.

constexpr int kFewBlock = 6;     // weight rows that stay in L1 while all rows pass, though all may lie in the same sets
constexpr int64_t kDeep = 2048;  // bytes of depth of them at a time

// acc[m · kFewBlock + n] (+)= sixteen partial sums of <row m, weight row n>, of M rows and N weight rows. x holds 64
// bytes of each row in turn. `ahead` bytes after what is read of the weight lies what will be read next; pass p of all
// passes over it asks for its part.
template <class E, int M, int N>
__attribute__((noinline)) void dots(const E* x, const E* w, int64_t w_stride, int64_t depth, float* c, bool add_to,
                                    int64_t ahead, int pass, int passes) {
  constexpr int wide = kLanes * kPer<E>;
  alignas(64) static const float zeros[kLanes] = {};
  const float* start = add_to ? c : zeros;
  const int64_t step = add_to ? kLanes : 0;
  int64_t next[N];
  for (int n = 0; n < N; ++n) next[n] = n % passes == pass ? ahead : 0;
  F acc[M][N];
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) acc[m][n] = load(start + (m * kFewBlock + n) * step);
  int64_t d = 0;
  do {
    U y[N];
    for (int n = 0; n < N; ++n) {
      y[n] = load_words(w + n * w_stride + d);
      __builtin_prefetch((const char*)(w + n * w_stride + d) + next[n], 0, 2);
    }
    for (int m = 0; m < M; ++m) {
      U z = load_words(x + m * wide);
      for (int n = 0; n < N; ++n) acc[m][n] = dot(acc[m][n], z, y[n], E());
    }
    d += wide, x += M * wide;
  } while (d < depth);
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) store(c + (m * kFewBlock + n) * kLanes, acc[m][n]);
}

// All `count` weight rows for M rows, as many at a time as there are registers for.
template <class E, int M>
void dots_rows(const E* x, const E* w, int64_t ws, int count, int64_t depth, float* c, bool add_to, int64_t ahead,
               int pass, int passes) {
  constexpr int N = M > 4 ? 3 : 6;
  int n = 0;
  for (; n + N <= count; n += N)
    dots<E, M, N>(x, w + n * ws, ws, depth, c + n * kLanes, add_to, ahead, pass, passes);
  for (; n < count; ++n) dots<E, M, 1>(x, w + n * ws, ws, depth, c + n * kLanes, add_to, ahead, pass, passes);
}

// Depth d .. d + depth of all T rows and `count` weight rows, into acc[T][kFewBlock][16].
template <class E>
void dots_block(const Few<E>& job, int64_t d, const E* w, int64_t ws, int count, int64_t depth, float* acc,
                int64_t ahead) {
  const int passes = few_passes(job.T);
  for (int p = 0; p < passes; ++p) {
    const int t = job.T * p / passes, rows = job.T * (p + 1) / passes - t;
    const E* x = job.packed + t * job.packed_depth + rows * d;
    float* c = acc + t * kFewBlock * kLanes;
    switch (rows) {
      case 1: dots_rows<E, 1>(x, w, ws, count, depth, c, d > 0, ahead, p, passes); break;
      case 2: dots_rows<E, 2>(x, w, ws, count, depth, c, d > 0, ahead, p, passes); break;
      case 3: dots_rows<E, 3>(x, w, ws, count, depth, c, d > 0, ahead, p, passes); break;
      case 4: dots_rows<E, 4>(x, w, ws, count, depth, c, d > 0, ahead, p, passes); break;
      case 5: dots_rows<E, 5>(x, w, ws, count, depth, c, d > 0, ahead, p, passes); break;
      case 6: dots_rows<E, 6>(x, w, ws, count, depth, c, d > 0, ahead, p, passes); break;
      case 7: dots_rows<E, 7>(x, w, ws, count, depth, c, d > 0, ahead, p, passes); break;
      default: dots_rows<E, 8>(x, w, ws, count, depth, c, d > 0, ahead, p, passes);
    }
  }
}

// The rest of the depth, less than a vector, in a copy of the weight with zeros after it.
template <class E>
void dots_rest(const Few<E>& job, int64_t d, const E* w, int64_t ws, int count, float* acc) {
  constexpr int wide = kLanes * kPer<E>;
  E copy[kFewBlock * wide] = {};
  for (int n = 0; n < count; ++n) std::memcpy(copy + n * wide, w + n * ws, (job.D - d) * sizeof(E));
  dots_block(job, d, copy, wide, count, wide, acc, 0);
}

// c[T][kFewColumns] = rows · weightᵀ for `count` weight rows from row `first` on.
template <class E>
void base(const Few<E>& job, int64_t first, int count, float* c) {
  auto* acc = (float*)scratch(kLora, job.T * kFewBlock * kLanes * sizeof(float));
  const int64_t whole = job.D / (kLanes * kPer<E>) * (kLanes * kPer<E>);
  const int64_t step = job.T > 6 ? kDeep / int64_t(sizeof(E)) : std::max<int64_t>(whole, 1);
  const E* w = job.weight + first * job.weight_stride;
  for (int64_t d = 0; d < whole; d += step) {
    const int64_t depth = std::min(step, whole - d), next = d + step < whole ? step : kFewBlock * job.weight_stride - d;
    dots_block(job, d, w + d, job.weight_stride, count, depth, acc, next * sizeof(E));
  }
  if (whole < job.D) dots_rest(job, whole, w + whole, job.weight_stride, count, acc);
  for (int t = 0; t < job.T; ++t)
    for (int n = 0; n < count; n += 4) {
      F four[4];
      float out[4];
      for (int i = 0; i < 4; ++i) four[i] = load(acc + (t * kFewBlock + std::min(n + i, count - 1)) * kLanes);
      totals(four, out);
      std::memcpy(c + t * kFewColumns + n, out, std::min(4, count - n) * sizeof(float));
    }
}

inline float number(float x) { return x; }
inline float number(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

// z[m] = x[m] · columns r .. r + 32 of a, over its rows begin .. end, for M rows
template <class S, class E, int M>
void few_shrink_rows(const E* const* x, const S* a, int64_t stride, int64_t begin, int64_t end, int64_t n, float* const* z) {
  F acc[M][2];
  const int64_t low = std::min<int64_t>(n, kLanes), high = std::max<int64_t>(n - kLanes, 0);
  for (int m = 0; m < M; ++m) acc[m][0] = acc[m][1] = zero();
  for (int64_t d = begin; d < end; ++d) {
    const F y0 = floats(a + d * stride, low), y1 = high ? floats(a + d * stride + kLanes, high) : zero();
    for (int m = 0; m < M; ++m) {
      const F value = spread(number(x[m][d]));
      acc[m][0] = multiply_add(value, y0, acc[m][0]), acc[m][1] = multiply_add(value, y1, acc[m][1]);
    }
  }
  for (int m = 0; m < M; ++m) {
    store_some(z[m], acc[m][0], low);
    if (high) store_some(z[m] + kLanes, acc[m][1], high);
  }
}

// h[split] of one expert for the rows that use it, four at a time
template <class S, class E>
void few_shrink_as(const Few<E>& job, int expert, int64_t split) {
  const S* a = (const S*)job.lora_a.data + expert * job.a_expert_stride;
  const int64_t begin = split * kSplit, end = std::min(job.D, begin + kSplit);
  const E* x[4];
  float *h[4], *z[4];
  int count = 0;
  for (int at = 0; at <= job.T * job.K; ++at) {
    const bool last = at == job.T * job.K;
    if (!last && job.experts[at] == expert) {
      x[count] = job.rows + at / job.K * job.stride;
      h[count++] = job.h + (split * job.T * job.K + at) * job.R;
    }
    if (count < 4 && !(last && count)) continue;
    for (int r = 0; r < job.R; r += 2 * kLanes) {
      for (int i = 0; i < count; ++i) z[i] = h[i] + r;
      const int64_t n = job.R - r;
      switch (count) {
        case 1: few_shrink_rows<S, E, 1>(x, a + r, job.lora_a.stride, begin, end, n, z); break;
        case 2: few_shrink_rows<S, E, 2>(x, a + r, job.lora_a.stride, begin, end, n, z); break;
        case 3: few_shrink_rows<S, E, 3>(x, a + r, job.lora_a.stride, begin, end, n, z); break;
        default: few_shrink_rows<S, E, 4>(x, a + r, job.lora_a.stride, begin, end, n, z);
      }
    }
    count = 0;
  }
}

template <class E>
void few_shrink(const Few<E>& job, int expert, int64_t split) {
  job.lora_a.is_float ? few_shrink_as<float>(job, expert, split) : few_shrink_as<E>(job, expert, split);
}

// c[T][kFewColumns] += s · lora_b, columns first .. first + columns. An expert's columns are copied together: a column's
// rows lie far apart, often by a power of two.
template <class S, class E>
void few_expand(const Few<E>& job, int64_t first, int64_t columns, float* c) {
  constexpr int vectors = kFewColumns / kLanes;
  auto* copy = (float*)scratch(kWeights, job.R * kFewColumns * sizeof(float));
  for (int u = 0; u < job.num_used; ++u) {
    const S* b = (const S*)job.lora_b.data + job.used[u] * job.expert_stride + first;
    for (int r = 0; r < job.R; ++r)
      for (int64_t v = 0; v < vectors; ++v)
        store(copy + r * kFewColumns + v * kLanes, floats(b + r * job.lora_b.stride + v * kLanes, columns - v * kLanes));
    for (int at = 0; at < job.T * job.K; ++at) {
      if (job.experts[at] != job.used[u]) continue;
      float* out = c + at / job.K * kFewColumns;
      const float *s = job.s + int64_t(at) * job.R, *row = copy;
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
void few_rows(const Few<E>& job, int64_t first) {
  const int64_t columns = std::min<int64_t>(kFewColumns, job.F - first);
  auto* c = (float*)scratch(kSums, job.T * kFewColumns * sizeof(float));
  if (columns < kFewColumns) std::memset(c, 0, job.T * kFewColumns * sizeof(float));
  for (int64_t n = 0; n < columns; n += kFewBlock) base(job, first + n, std::min<int64_t>(kFewBlock, columns - n), c + n);
  job.lora_b.is_float ? few_expand<float>(job, first, columns, c) : few_expand<E>(job, first, columns, c);
  for (int t = 0; t < job.T; ++t)
    finish(c + t * kFewColumns, job.bias ? job.bias + first : nullptr, columns, job.out + t * job.F + first);
}
