// Which instruction sets there are, and the one in use.
#include "kernels.h"

namespace moe_lora {

#if defined(__x86_64__) && defined(__GNUC__)
extern const Kernels<bf16> kAvx512Bf16;
extern const Kernels<float> kAvx512, kAvx2;

namespace {
bool avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}
bool avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }
bool avx512_bf16() { return avx512() && __builtin_cpu_supports("avx512bf16"); }
}  // namespace

const InstructionSet* instruction_sets() {
  static const InstructionSet sets[] = {
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
