// Sixteen lanes of 32 bits in two AVX2 registers. Included inside the namespace of one instruction set.

constexpr int kVectors = 1;       // columns of a register tile, in vectors: 6 x 1 accumulators, 12 of 16 registers
constexpr int kAccumulators = 6;
constexpr int kDots = 3;          // rows in dot products at once

struct F {
  __m256 low, high;
};
struct U {
  __m256i low, high;
};

inline F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, F x) { _mm256_storeu_ps(p, x.low), _mm256_storeu_ps(p + 8, x.high); }
inline F add(F x, F y) { return {_mm256_add_ps(x.low, y.low), _mm256_add_ps(x.high, y.high)}; }
inline F multiply(F x, F y) { return {_mm256_mul_ps(x.low, y.low), _mm256_mul_ps(x.high, y.high)}; }
inline F multiply_add(F x, F y, F z) {
  return {_mm256_fmadd_ps(x.low, y.low, z.low), _mm256_fmadd_ps(x.high, y.high, z.high)};
}
inline F spread(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }

inline U load_words(const void* p) {
  return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)p + 1)};
}
inline void store_words(void* p, U x) {
  _mm256_storeu_si256((__m256i*)p, x.low), _mm256_storeu_si256((__m256i*)p + 1, x.high);
}
inline U spread_word(uint32_t x) { return {_mm256_set1_epi32(int(x)), _mm256_set1_epi32(int(x))}; }
inline U spread_word(const void* p) {
  uint32_t word;
  std::memcpy(&word, p, 4);
  return spread_word(word);
}
inline U count_up() {
  return {_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15)};
}
inline U add(U x, U y) { return {_mm256_add_epi32(x.low, y.low), _mm256_add_epi32(x.high, y.high)}; }
inline U multiply(U x, U y) { return {_mm256_mullo_epi32(x.low, y.low), _mm256_mullo_epi32(x.high, y.high)}; }
template <int bits>
inline U xor_shift(U x) {
  return {_mm256_xor_si256(x.low, _mm256_srli_epi32(x.low, bits)), _mm256_xor_si256(x.high, _mm256_srli_epi32(x.high, bits))};
}

inline U as_words(F x) { return {_mm256_castps_si256(x.low), _mm256_castps_si256(x.high)}; }
inline F as_floats(U x) { return {_mm256_castsi256_ps(x.low), _mm256_castsi256_ps(x.high)}; }
inline F dot(F acc, U x, U y, float) { return multiply_add(as_floats(x), as_floats(y), acc); }

inline __m256i eight(const bf16* p) {
  return _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
}
inline F load(const bf16* p) { return as_floats({eight(p), eight(p + 8)}); }
inline F load(const fp16* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p + 1))};
}

// A vector of eight as one of four, its halves added.
inline __m128 halves(__m256 x) { return _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)); }

// The sums of four vectors.
inline void totals(const F* x, float* out) {
  __m128 y[4];
  for (int i = 0; i < 4; ++i) y[i] = halves(_mm256_add_ps(x[i].low, x[i].high));
  _mm_storeu_ps(out, _mm_hadd_ps(_mm_hadd_ps(y[0], y[1]), _mm_hadd_ps(y[2], y[3])));
}
inline float total(F x) {
  const __m128 y = halves(_mm256_add_ps(x.low, x.high)), z = _mm_hadd_ps(y, y);
  return _mm_cvtss_f32(_mm_hadd_ps(z, z));
}

// x[i] lane j <-> x[j] lane i, of eight by eight
inline void transpose(__m256i* x) {
  __m256i t[8];
  for (int i = 0; i < 8; i += 4) {
    const __m256i a = _mm256_unpacklo_epi32(x[i], x[i + 1]), b = _mm256_unpackhi_epi32(x[i], x[i + 1]);
    const __m256i c = _mm256_unpacklo_epi32(x[i + 2], x[i + 3]), d = _mm256_unpackhi_epi32(x[i + 2], x[i + 3]);
    t[i] = _mm256_unpacklo_epi64(a, c), t[i + 1] = _mm256_unpackhi_epi64(a, c);
    t[i + 2] = _mm256_unpacklo_epi64(b, d), t[i + 3] = _mm256_unpackhi_epi64(b, d);
  }
  for (int i = 0; i < 4; ++i) {
    x[i] = _mm256_permute2x128_si256(t[i], t[i + 4], 0x20);
    x[i + 4] = _mm256_permute2x128_si256(t[i], t[i + 4], 0x31);
  }
}

// The same of sixteen by sixteen.
inline void transpose(U* x) {
  __m256i quarter[2][2][8];  // of the result: upper or lower rows, low or high lanes
  for (int i = 0; i < 8; ++i) {
    quarter[0][0][i] = x[i].low, quarter[1][0][i] = x[i].high;
    quarter[0][1][i] = x[i + 8].low, quarter[1][1][i] = x[i + 8].high;
  }
  for (auto& rows : quarter)
    for (auto& part : rows) transpose(part);
  for (int i = 0; i < 16; ++i) x[i] = {quarter[i / 8][0][i % 8], quarter[i / 8][1][i % 8]};
}
