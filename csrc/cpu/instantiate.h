// The kernels of one instruction set: TARGET, which functions of VECTORS need, on elements of ELEMENT, as KERNELS.
#include "kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

#define PRAGMA_(text) _Pragma(#text)
#define PRAGMA(text) PRAGMA_(text)

#if defined(__clang__)
PRAGMA(clang attribute push(__attribute__((target(TARGET))), apply_to = function))
#else
#pragma GCC push_options
PRAGMA(GCC target(TARGET))
#endif

namespace moe_lora {
namespace {
#include VECTORS

#include "kernels_impl.h"

#include "few_impl.h"
#ifdef TILES
#include "amx_impl.h"

#include "amx_few.h"
#endif
}  // namespace

#ifdef TILES
extern const Kernels<ELEMENT> KERNELS{
    pack<ELEMENT>, tiles_shrink, tiles_expand,           tiles_sum,    few_shrink<ELEMENT>, tiles_few_rows,
    kTileDots,     kRowsOfBlock, kWhole * kPer<ELEMENT>, kTaskColumns, kTilesOfChunk,       true};
#else
extern const Kernels<ELEMENT> KERNELS{
    pack<ELEMENT>,     shrink<ELEMENT>, expand<ELEMENT>, sum<ELEMENT>,           few_shrink<ELEMENT>,
    few_rows<ELEMENT>, kDots,           kTile,           kWhole * kPer<ELEMENT>, kColumns, kChunk, false};
#endif
}  // namespace moe_lora

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
