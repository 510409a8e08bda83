// What the driver (tiles.cpp, few.cpp) asks of the kernels, and the table of them for one instruction set.
//
// Everything is counted in 32-bit words along the summed dimension: a word is two neighbouring bf16 or one float, so that
// one kernel serves both. A packed panel holds 16 columns: word w of column c at [w * 16 + c]; the words of one column of
// a pair of rows are interleaved. Experts are counted among those that the routing uses, see plan.h. A row has one place
// for each of its experts, rising: rank-space arrays are [T, K, even(R)], where a row's first `count` places are in use.
#pragma once

#include <cstdint>

namespace moe_lora {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

constexpr int kTile = 6;       // rows of one register tile
constexpr int kLanes = 16;     // columns of one packed panel
constexpr int kColumns = 256;  // of one task; its sums, rows and weights stay in an L2 cache of 1 MB
constexpr int kChunk = 32;     // tiles worked on together

struct Run {  // neighbouring rows with the same experts
  int32_t row, rows;
  int32_t first, count;  // these experts, among Routes::experts
};

struct Tile {
  int32_t row, rows;  // first row, how many
  int32_t run, runs;  // the runs that make it up
};

struct Routes {
  const Tile* tiles;
  const Run* runs;
  const int32_t* experts;
  const int32_t* instance;  // [T]
  const int32_t* places;    // [N, K]: the place of each pick
  const int64_t* starts;    // [used + 1]: an expert's part of
  const int32_t* rows;      // its rows, rising, and
  const int64_t* slots;     // row · K + place there
  int K;
};

struct Mask {  // of dropout; see dropout.py
  uint32_t a, b;         // keys
  int32_t threshold;     // of a signed 16-bit number; the mask is used if `on`
  bool on;
};

enum class Kind { kFloat, kBf16, kFp16 };

// Rows a stride apart, elements adjacent; converted as they are read.
struct Matrix {
  const void* data;
  int64_t stride;
  Kind kind;
};

// Panels of experts: columns [first, first + columns) of expert e, which is number used[e] of the parameter.
struct Source {
  Matrix matrix;
  int64_t expert_stride;
  bool across;          // true: the summed dimension runs along a row, column c is row c; false: it runs down the rows
  const int32_t* used;  // or null: number e
};

template <class E>
struct Shrink {  // z = rows · panels, for each row's experts; then s = gates · z
  const E* rows;
  int64_t stride, D;         // rows [T, D]
  const uint32_t* panels;    // [used, groups, words(D), 16]
  int groups, R;             // panels per expert, their columns in use
  int used;
  uint32_t* tiles;           // with tile instructions: the rows as A tiles are written to it, [tiles, rows · whole(D)]
  Routes routes;
  const float* gates;        // [N, K], all that the instance gives to that pick's expert
  E* s;                      // [T, K, even(R)]
  E* h;                      // forward: z is written to it, [T, K · R], by picks
  const E* kept;             // backward: that h;
  E* kept_s;                 // gates · h, like s;
  float* dgates;             // [T, K]: <z, h>
  Mask mask;
};

template <class E>
struct Expand {  // out = rows · weight + bias + s · panels(lora), columns first .. first + columns
  const E* rows;
  int64_t stride, D;         // rows [T, D], D is summed over
  const uint32_t* tiles;     // with tile instructions instead of rows: those of the shrink
  Source weight;
  Source lora;
  int used, R;
  const E* s;                // [T, K, even(R)]
  Routes routes;
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
  Routes routes;
  float* out;                // [used, R, columns], or [used, columns, R] if `across`
  bool across;
  Mask mask;                 // of rows
};

template <class E>
struct Few {  // out = rows · weightᵀ + bias + s · lora, for few rows: weight is read once, where it lies
  const E* rows;
  int64_t stride;
  const uint32_t* packed;    // up to `dots` rows: 64 bytes of each in turn, zeros after the last element; more: panels
  int64_t words;             // of packed depth
  int T;
  int64_t D, F;
  Matrix weight;             // [F, D]
  const E* bias;
  Source lora_a, lora_b;     // [E, D, R], [E, R, F], elements of the last dimension adjacent
  Routes routes;
  int used, R;
  const float* s;            // [T, K, R]
  E* out;                    // [T, F]
  float* z;                  // [splits, T, K, R]
};

constexpr int kFewColumns = 96;  // of one task
constexpr int kSplit = 1024;     // of D, in the shrink of few rows

template <class E>
struct Kernels {
  void (*pack)(const Source&, int expert, int64_t first, int64_t columns, int64_t depth, uint32_t* panels);
  // of members that share rows, their mask and R; `expand` makes one sum over all of them
  void (*shrink)(const Shrink<E>*, int members, int64_t tile_begin, int64_t tile_end);
  void (*expand)(const Expand<E>*, int members, int64_t first, int64_t tile_begin, int64_t tile_end);
  void (*sum)(const Sum<E>*, int members, int expert, int64_t first);
  void (*few_shrink)(const Few<E>&, int expert, int64_t split);
  void (*few_rows)(const Few<E>&, int64_t first);
  int dots;         // up to so many rows, few_rows takes dot products
  int rows;         // of a plan's tile
  int64_t whole;    // panels have a multiple of so many elements of depth, s so many a place
  int64_t columns;  // of a task of `expand`
  int64_t chunk;    // tiles worked on together
  bool lays_rows;   // shrink fills Shrink::tiles, expand reads them
};

struct InstructionSet {
  const char* name;
  bool (*supported)();
  const Kernels<bf16>* half;  // or null: bf16 is computed in float
  const Kernels<float>* single;
};

const InstructionSet* instruction_sets();  // best first, a null name ends

const InstructionSet& in_use();       // the best that runs here, or with a null name if none does
void use(const InstructionSet& set);  // another one that runs here, to test it; not while a call runs

template <class E>
const Kernels<E>& kernels() {
  if constexpr (sizeof(E) == 2)
    return *in_use().half;
  else
    return *in_use().single;
}

void* scratch(int which, int64_t bytes);  // of this thread, aligned to a page, kept until it ends

}  // namespace moe_lora
