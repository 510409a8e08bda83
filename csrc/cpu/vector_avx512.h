// Sixteen lanes of 32 bits in one AVX-512 register; with NATIVE_BF16 products of pairs of bf16 too.
// Included inside the namespace of one instruction set.

constexpr int kVectors = 4;       // columns of a register tile, in vectors: 6 x 4 accumulators of 32 registers
constexpr int kAccumulators = 24;
constexpr int kDots = 8;          // rows in dot products at once

using F = __m512;
using U = __m512i;

inline F zero() { return _mm512_setzero_ps(); }
inline F load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, F x) { _mm512_storeu_ps(p, x); }
inline F add(F x, F y) { return _mm512_add_ps(x, y); }
inline F multiply(F x, F y) { return _mm512_mul_ps(x, y); }
inline F multiply_add(F x, F y, F z) { return _mm512_fmadd_ps(x, y, z); }
inline F spread(float x) { return _mm512_set1_ps(x); }
inline float total(F x) { return _mm512_reduce_add_ps(x); }

inline U load_words(const void* p) { return _mm512_loadu_si512(p); }
inline void store_words(void* p, U x) { _mm512_storeu_si512(p, x); }
inline U spread_word(uint32_t x) { return _mm512_set1_epi32(int(x)); }
inline U spread_word(const void* p) {
  int32_t word;
  std::memcpy(&word, p, 4);
  return _mm512_set1_epi32(word);
}
inline U count_up() { return _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0); }
inline U add(U x, U y) { return _mm512_add_epi32(x, y); }
inline U multiply(U x, U y) { return _mm512_mullo_epi32(x, y); }
template <int bits>
inline U xor_shift(U x) {
  return _mm512_xor_si512(x, _mm512_srli_epi32(x, bits));
}

inline U as_words(F x) { return _mm512_castps_si512(x); }
inline F load(const bf16* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
inline F load(const fp16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
inline F dot(F acc, U x, U y, float) { return _mm512_fmadd_ps(_mm512_castsi512_ps(x), _mm512_castsi512_ps(y), acc); }

#ifdef NATIVE_BF16
inline __m256i narrow(F x) { return (__m256i)_mm512_cvtneps_pbh(x); }
inline void store(bf16* p, F x) { _mm256_storeu_si256((__m256i*)p, narrow(x)); }
inline U words(const bf16* p) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)); }  // low halves
inline U words(F x) { return _mm512_cvtepu16_epi32(narrow(x)); }
inline U join(U low, U high) { return _mm512_or_si512(low, _mm512_slli_epi32(high, 16)); }
inline F dot(F acc, U x, U y, bf16) { return _mm512_dpbf16_ps(acc, (__m512bh)x, (__m512bh)y); }
#endif

// x[i] lane j <-> x[j] lane i
inline void transpose(U* x) {
  U t[16];
  for (int i = 0; i < 16; i += 4) {
    U a = _mm512_unpacklo_epi32(x[i], x[i + 1]), b = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    U c = _mm512_unpacklo_epi32(x[i + 2], x[i + 3]), d = _mm512_unpackhi_epi32(x[i + 2], x[i + 3]);
    t[i] = _mm512_unpacklo_epi64(a, c), t[i + 1] = _mm512_unpackhi_epi64(a, c);
    t[i + 2] = _mm512_unpacklo_epi64(b, d), t[i + 3] = _mm512_unpackhi_epi64(b, d);
  }
  for (int i = 0; i < 4; ++i) {
    U a = _mm512_shuffle_i32x4(t[i], t[i + 4], 0x88), b = _mm512_shuffle_i32x4(t[i], t[i + 4], 0xdd);
    U c = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0x88), d = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0xdd);
    x[i] = _mm512_shuffle_i32x4(a, c, 0x88), x[i + 8] = _mm512_shuffle_i32x4(a, c, 0xdd);
    x[i + 4] = _mm512_shuffle_i32x4(b, d, 0x88), x[i + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
}

// The sums of four vectors.
inline void totals(const F* x, float* out) {
  F a = _mm512_add_ps(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
  F b = _mm512_add_ps(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
  F c = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b))),
                      _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b))));
  __m256 d = _mm256_add_ps(_mm512_castps512_ps256(c), _mm512_extractf32x8_ps(c, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(d), _mm256_extractf128_ps(d, 1)));
}
