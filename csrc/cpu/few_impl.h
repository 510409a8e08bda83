// Few rows: the weight is read once, where it lies, in dot products along its rows. Included after kernels_impl.h.

// out[m][n] = <row m, weight row n> for M rows and N weight rows
template <class E, int M, int N>
void dots(const E* x, int64_t x_stride, const E* w, int64_t w_stride, int64_t depth, float* out, int64_t out_stride) {
  constexpr int wide = kLanes * kPer<E>;
  F acc[M][N];
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) acc[m][n] = zero();
  int64_t d = 0;
  for (; d + wide <= depth; d += wide) {
    U y[N];
    for (int n = 0; n < N; ++n) y[n] = load_words(w + n * w_stride + d);
    for (int m = 0; m < M; ++m) {
      U z = load_words(x + m * x_stride + d);
      for (int n = 0; n < N; ++n) acc[m][n] = dot(acc[m][n], z, y[n], E());
    }
  }
  if (d < depth) {
    E buffer[M + N][wide] = {};
    for (int n = 0; n < N; ++n) std::memcpy(buffer[n], w + n * w_stride + d, (depth - d) * sizeof(E));
    for (int m = 0; m < M; ++m) std::memcpy(buffer[N + m], x + m * x_stride + d, (depth - d) * sizeof(E));
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n)
        acc[m][n] = dot(acc[m][n], load_words(buffer[N + m]), load_words(buffer[n]), E());
  }
  for (int m = 0; m < M; ++m) {
    int n = 0;
    for (; n + 4 <= N; n += 4) totals(acc[m] + n, out + m * out_stride + n);
    for (; n < N; ++n) out[m * out_stride + n] = total(acc[m][n]);
  }
}

template <class E, int N>
void dots_rows(int rows, const E* x, int64_t xs, const E* w, int64_t ws, int64_t depth, float* out, int64_t os) {
  switch (rows) {
    case 1: return dots<E, 1, N>(x, xs, w, ws, depth, out, os);
    case 2: return dots<E, 2, N>(x, xs, w, ws, depth, out, os);
    case 3: return dots<E, 3, N>(x, xs, w, ws, depth, out, os);
    case 4: return dots<E, 4, N>(x, xs, w, ws, depth, out, os);
    case 5: return dots<E, 5, N>(x, xs, w, ws, depth, out, os);
    default: return dots<E, 6, N>(x, xs, w, ws, depth, out, os);
  }
}

inline float number(float x) { return x; }
inline float number(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

// h[split] of one expert for the rows that use it
template <class S, class E>
void few_shrink_as(const Few<E>& job, int expert, int64_t split) {
  const S* a = (const S*)job.lora_a.data + expert * job.a_expert_stride;
  const int64_t begin = split * kSplit, end = std::min(job.D, begin + kSplit);
  for (int t = 0; t < job.T; ++t) {
    const E* x = job.rows + t * job.stride;
    for (int k = 0; k < job.K; ++k) {
      if (job.experts[t * job.K + k] != expert) continue;
      float* h = job.h + ((split * job.T + t) * job.K + k) * job.R;
      for (int r = 0; r < job.R; r += 2 * kLanes) {
        F acc[2][2] = {{zero(), zero()}, {zero(), zero()}};
        const int64_t n = job.R - r, m = n > kLanes ? n - kLanes : 0;
        for (int64_t d = begin; d < end; ++d) {
          const F value = spread(number(x[d]));
          const S* p = a + d * job.lora_a.stride + r;
          acc[d & 1][0] = multiply_add(value, floats(p, n), acc[d & 1][0]);
          if (m) acc[d & 1][1] = multiply_add(value, floats(p + kLanes, m), acc[d & 1][1]);
        }
        float out[2 * kLanes];
        store(out, add(acc[0][0], acc[1][0])), store(out + kLanes, add(acc[0][1], acc[1][1]));
        std::memcpy(h + r, out, std::min<int64_t>(n, 2 * kLanes) * sizeof(float));
      }
    }
  }
}

template <class E>
void few_shrink(const Few<E>& job, int expert, int64_t split) {
  job.lora_a.is_float ? few_shrink_as<float>(job, expert, split) : few_shrink_as<E>(job, expert, split);
}

// c[T][64] += s · lora_b, columns first .. first + n
template <class S, class E>
void few_expand(const Few<E>& job, int64_t first, int64_t columns, float* c) {
  for (int t = 0; t < job.T; ++t)
    for (int64_t n = 0; n < columns; n += 2 * kLanes) {
      const int64_t left = columns - n, more = left > kLanes ? left - kLanes : 0;
      F low = load(c + t * kFewColumns + n), high = load(c + t * kFewColumns + n + kLanes);
      for (int k = 0; k < job.K; ++k) {
        const S* b = (const S*)job.lora_b.data + job.experts[t * job.K + k] * job.expert_stride + first + n;
        const float* s = job.s + (int64_t(t) * job.K + k) * job.R;
        for (int r = 0; r < job.R; ++r, b += job.lora_b.stride) {
          const F value = spread(s[r]);
          low = multiply_add(value, floats(b, left), low);
          if (more) high = multiply_add(value, floats(b + kLanes, more), high);
        }
      }
      store(c + t * kFewColumns + n, low), store(c + t * kFewColumns + n + kLanes, high);
    }
}

template <class E>
void few_rows(const Few<E>& job, int64_t first) {
  const int64_t columns = std::min<int64_t>(kFewColumns, job.F - first);
  auto* c = (float*)scratch(kSums, job.T * kFewColumns * sizeof(float));
  int64_t n = 0;
  const auto rows = [&](auto count) {
    for (; n + count() <= columns; n += count())
      for (int t = 0; t < job.T; t += kTile)
        dots_rows<E, count()>(std::min(kTile, job.T - t), job.rows + t * job.stride, job.stride,
                              job.weight + (first + n) * job.weight_stride, job.weight_stride, job.D,
                              c + t * kFewColumns + n, kFewColumns);
  };
  rows(std::integral_constant<int, 4>());
  rows(std::integral_constant<int, 1>());
  for (int t = 0; t < job.T; ++t)
    for (int64_t i = columns; i < kFewColumns; ++i) c[t * kFewColumns + i] = 0;
  job.lora_b.is_float ? few_expand<float>(job, first, columns, c) : few_expand<E>(job, first, columns, c);
  for (int t = 0; t < job.T; ++t)
    finish(c + t * kFewColumns, job.bias ? job.bias + first : nullptr, columns, job.out + t * job.F + first);
}
