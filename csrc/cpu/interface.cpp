// The functions of moe_lora.h.
#include "moe_lora.h"

#include <exception>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>

#include "call.h"
#include "threads.h"

namespace moe_lora {
namespace {

// Runs a body; what it throws becomes the message that the interface returns.
template <class Body>
const char* guarded(Body body) {
  static thread_local std::string message;
  try {
    body();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
  } catch (...) {
    message = "an unknown exception in the native kernels";
  }
  return message.c_str();
}

void require(bool holds, const char* message) {
  if (!holds) throw std::invalid_argument(message);
}

int tile_rows(bool half) { return half ? kernels<bf16>().rows : kernels<float>().rows; }

void check(const Call& call) {
  require(in_use().name, "this processor has no instruction set that moe_lora._C was built for");
  require(call.dtype == MOE_LORA_FLOAT || (call.dtype == MOE_LORA_BF16 && in_use().half),
          "dtype must be MOE_LORA_FLOAT, or MOE_LORA_BF16 where the instructions in use multiply it");
  require(call.count >= 1 && call.routing.T >= 1 && call.threads >= 1,
          "a call needs at least one member, one row and one thread");
}

}  // namespace
}  // namespace moe_lora

using namespace moe_lora;

extern "C" {

const char* moe_lora_forward(const moe_lora_call* call, int form, void* const* ys, void* const* hs) {
  return guarded([&] {
    check(*call);
    const ThreadLimit limit(call->threads);
    const bool half = call->dtype == MOE_LORA_BF16;
    const auto plan = plan_of(call->routing, tile_rows(half));
    if (form == MOE_LORA_TILES) return (half ? tiles_forward<bf16> : tiles_forward<float>)(*call, *plan, ys, hs);
    require(form == MOE_LORA_FEW_ROWS, "form must be MOE_LORA_TILES or MOE_LORA_FEW_ROWS");
    require(plan->T <= kFewRows && !call->dropout, "MOE_LORA_FEW_ROWS is for at most 64 rows without dropout");
    for (const Member* m = call->members; m < call->members + call->count; ++m)
      require(m->weight.strides[1] == 1 && m->lora_a.strides[2] == 1 && m->lora_b.strides[2] == 1,
              "MOE_LORA_FEW_ROWS needs adjacent elements in the last dimension of weights and experts");
    (half ? few_forward<bf16> : few_forward<float>)(*call, *plan, ys, hs);
  });
}

const char* moe_lora_backward(const moe_lora_call* call, const moe_lora_rows* dys, const void* const* hs, void* dx,
                              moe_lora_gradient dgates, const moe_lora_gradient* das, const moe_lora_gradient* dbs) {
  return guarded([&] {
    check(*call);
    const auto fits = [](const moe_lora_gradient& to) { return !to.data || to.dtype != MOE_LORA_FP16; };
    for (int64_t m = 0; m < call->count; ++m)
      require(fits(dgates) && fits(das[m]) && fits(dbs[m]), "gradients are written as float, bf16 or double");
    const ThreadLimit limit(call->threads);
    const bool half = call->dtype == MOE_LORA_BF16;
    const Grads grads{dx, dgates, das, dbs};
    (half ? tiles_backward<bf16> : tiles_backward<float>)(*call, *plan_of(call->routing, tile_rows(half)), dys, hs, grads);
  });
}

const char* moe_lora_used(const moe_lora_routing* routing, int32_t* used, int64_t* count) {
  return guarded([&] {
    const auto plan = plan_of(*routing, 0);
    std::copy(plan->used.begin(), plan->used.end(), used);
    *count = int64_t(plan->used.size());
  });
}

int moe_lora_few_rows(void) { return kFewRows; }

const char* moe_lora_instruction_set(int i) {
  for (const InstructionSet* set = instruction_sets(); set->name; ++set)
    if (set->supported() && i-- == 0) return set->name;
  return nullptr;
}

const char* moe_lora_instructions(void) { return in_use().name; }

const char* moe_lora_use_instructions(const char* name) {
  return guarded([&] {
    const InstructionSet* set = instruction_sets();
    while (set->name && (set->name != std::string(name) || !set->supported())) ++set;
    if (!set->name) throw std::invalid_argument("instructions must be one of those that run here, got " + std::string(name));
    use(*set);
  });
}

int moe_lora_has_bf16(void) { return in_use().name && in_use().half; }

int64_t moe_lora_threads(int64_t limit) {
  const ThreadLimit scope(limit);
  std::vector<std::thread::id> ids(threads());
  runs(int64_t(ids.size()), [&](int64_t i) { ids[i] = std::this_thread::get_id(); });
  return int64_t(std::set<std::thread::id>(ids.begin(), ids.end()).size());
}

}  // extern "C"
