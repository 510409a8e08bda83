// Which instruction sets there are, and the one in use.
#include "kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#endif
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>

// Defined by the emulator of tile instructions that tests preload (tests/support/amxemu.c).
extern "C" __attribute__((weak, visibility("default"))) int moe_lora_emulates_amx();
#endif

namespace moe_lora {

#if defined(__x86_64__) && defined(__GNUC__)
extern const Kernels<bf16> kAmx, kAvx512Bf16;
extern const Kernels<float> kAvx512, kAvx2;

namespace {
bool avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}
bool avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }
bool avx512_bf16() { return avx512() && __builtin_cpu_supports("avx512bf16"); }

// Tile registers are part of a thread's state only if Linux is asked for them, once for the process.
bool amx() {
#ifdef __linux__
  if (!avx512_bf16()) return false;
  if (moe_lora_emulates_amx) return moe_lora_emulates_amx();
  unsigned a, b, c, d;
  constexpr unsigned tiles_and_bf16 = 1u << 24 | 1u << 22;
  constexpr long ask = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & tiles_and_bf16) == tiles_and_bf16 &&
         syscall(SYS_arch_prctl, ask, tile_data) == 0;
#else
  return false;
#endif
}
}  // namespace

const InstructionSet* instruction_sets() {
  static const InstructionSet sets[] = {
      {"amx", amx, &kAmx, &kAvx512},
      {"avx512_bf16", avx512_bf16, &kAvx512Bf16, &kAvx512},
      {"avx512", avx512, nullptr, &kAvx512},
      {"avx2", avx2, nullptr, &kAvx2},
      {nullptr, nullptr, nullptr, nullptr},
  };
  return sets;
}
#else
const InstructionSet* instruction_sets() {
  static const InstructionSet none[] = {{nullptr, nullptr, nullptr, nullptr}};
  return none;
}
#endif

static const InstructionSet*& current() {
  static const InstructionSet* set = [] {
    const InstructionSet* best = instruction_sets();
    while (best->name && !best->supported()) ++best;
    return best;
  }();
  return set;
}

const InstructionSet& in_use() { return *current(); }

void use(const InstructionSet& set) { current() = &set; }

}  // namespace moe_lora
