// What the driver (linear.cpp) asks of the kernels, and the table of them for one instruction set.
//
// Everything is counted in 32-bit words along the summed dimension: a word is two neighbouring bf16 or one float, so that
// one kernel serves both. A packed panel holds 16 columns: word w of column c at [w * 16 + c]; the words of one column of
// a pair of rows are interleaved. Rank-space arrays follow tiles: the rows of a tile are adjacent, each with the experts
// ("slots") that any row of the tile uses.
#pragma once

#include <cstdint>

namespace moe_lora {

struct bf16 {
  uint16_t bits;
};

constexpr int kTile = 6;       // rows of one register tile
constexpr int kLanes = 16;     // columns of one packed panel
constexpr int kColumns = 256;  // of one task; its sums, rows and weights stay in an L2 cache of 1 MB
constexpr int kChunk = 32;     // tiles worked on together

struct Tile {
  int32_t row, rows;     // first row, how many
  int32_t slot, slots;   // where its experts start in the list of all tiles' experts, how many
};

struct Mask {  // of dropout; see dropout.py
  uint32_t a, b;         // keys
  int32_t threshold;     // of a signed 16-bit number; the mask is used if `on`
  bool on;
};

// A matrix with rows a stride apart, elements adjacent: E or, for the experts' parameters, float or E.
struct Matrix {
  const void* data;
  int64_t stride;
  bool is_float;  // float though E is bf16
};

// Panels of all experts: columns [first, first + columns) of expert e.
struct Source {
  Matrix matrix;
  int64_t expert_stride;
  bool across;  // true: the summed dimension runs along a row, column c is row c; false: it runs down the rows
};

template <class E>
struct Shrink {  // z = rows · panels, for the tiles' experts; then s = gates · z
  const E* rows;
  int64_t stride, D;         // rows [T, D]
  const uint32_t* panels;    // [E, groups, words(D), 16]
  int groups, R;             // panels per expert, their columns in use
  const Tile* tiles;
  const int32_t* experts;    // of the tiles' slots
  int K;
  const int32_t* slots;      // [T, K]: which slot of its tile
  const float* gates;        // [T, K], all that the row gives to that slot's expert
  E* s;                      // [slot · kTile + row · slots + slot of tile, even(R)]
  E* h;                      // forward: z is written to it, [T, K · R]
  const E* kept;             // backward: that h;
  E* kept_s;                 // gates · h, like s;
  float* dgates;             // [T, K]: <z, h>
  Mask mask;
};

template <class E>
struct Expand {  // out = rows · weight + bias + s · panels(source), columns first .. first + columns
  const E* rows;
  int64_t stride, D;         // rows [T, D], D is summed over
  Source weight;
  Source lora;
  int num_experts, R;
  const E* s;                // [slot · kTile + row · slots + slot of tile, even(R)]
  const Tile* tiles;
  const int32_t* experts;
  const E* bias;             // or null
  E* out;                    // [T, columns]
  int64_t out_stride, columns;
  Mask mask;                 // of the expanded part, elements of [T, columns]
};

template <class E>
struct Sum {  // out_e = Σ over the expert's rows of sᵀ · rows
  const E* rows;
  int64_t stride, columns;   // rows [T, columns]
  const E* s;                // as in Expand
  int R;
  int num_experts;
  const int64_t* starts;     // [num_experts + 1]: the expert's part of
  const int32_t* row;        // rows
  const int64_t* place;      // where in s their R numbers start
  float* out;                // [num_experts, R, columns], or [num_experts, columns, R] if `across`
  bool across;
  Mask mask;                 // of rows
};

template <class E>
struct Few {  // out = rows · weightᵀ + bias + s · lora, for few rows: weight is read where it lies
  const E* rows;
  int64_t stride;
  const E* packed;           // the rows of a pass together: 64 bytes of each in turn, zeros after the last element
  int64_t packed_depth;
  int T;
  int64_t D;
  const E* weight;           // [F, D]
  int64_t weight_stride, F;
  const E* bias;
  Matrix lora_b;             // [E, R, F]
  int64_t expert_stride;
  const int32_t* experts;    // [T, K]
  const int32_t* used;       // those of them, each once, rising
  int num_used;
  const float* s;            // [T, K, R]
  int K, R;
  E* out;                    // [T, F]
  Matrix lora_a;             // [E, D, R], for the shrink
  int64_t a_expert_stride;
  float* h;                  // [splits, T, K, R]
};

constexpr int kFewColumns = 96;  // of one task
constexpr int kFewTile = 8;      // rows of one pass over a block of the weight
constexpr int kSplit = 1024;     // of D, in the shrink of few rows

inline int few_passes(int T) { return (T + kFewTile - 1) / kFewTile; }  // pass p: rows T · p / passes to the next's

template <class E>
struct Kernels {
  void (*pack)(const Source&, int expert, int64_t first, int64_t columns, int64_t depth, uint32_t* panels);
  void (*shrink)(const Shrink<E>&, int64_t tile_begin, int64_t tile_end);
  void (*expand)(const Expand<E>&, int64_t first, int64_t tile_begin, int64_t tile_end);
  void (*sum)(const Sum<E>&, int64_t first);
  void (*few_shrink)(const Few<E>&, int expert, int64_t split);
  void (*few_rows)(const Few<E>&, int64_t first);
};

struct InstructionSet {
  const char* name;
  bool (*supported)();
  const Kernels<bf16>* half;
  const Kernels<float>* single;
};

const InstructionSet* instruction_sets();  // best first, a null name ends

void* scratch(int which, int64_t bytes);  // of this thread, 64-byte aligned, kept until it ends

}  // namespace moe_lora
