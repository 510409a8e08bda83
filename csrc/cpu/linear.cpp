// moe_lora._C: the forward and backward of moe_lora::linear and linear_group on the CPU. The checks are at the ops.
#include <torch/extension.h>

#include <set>
#include <string>
#include <thread>

#include "call.h"
#include "threads.h"

namespace moe_lora {
namespace {

// Weights and biases as the kernels take them.
template <class E>
void prepare(Call& call) {
  for (Member& member : call.members) {
    if (member.weight.stride(0) != 1 && member.weight.stride(1) != 1) member.weight = member.weight.contiguous();
    if (member.bias) member.bias = member.bias->to(kDtype<E>).contiguous();
  }
}

template <class E>
std::tuple<Tensors, Tensors> forward_as(Call call) {
  const Tensor rows = as_rows<E>(call.x);
  const int64_t T = rows.size(0);
  prepare<E>(call);
  Tensors ys, hs;
  for (const Member& member : call.members) {
    ys.push_back(at::empty({T, member.F()}, kDtype<E>));
    hs.push_back(at::empty({T, call.K() * call.R()}, kDtype<E>));
  }
  if (T) {
    const std::shared_ptr<const Plan> plan = plan_of(call, T);
    (few(call, T) ? few_forward<E> : tiles_forward<E>)(call, rows, *plan, ys, hs);
  }
  auto shape = call.x.sizes().vec();
  for (size_t m = 0; m < ys.size(); ++m) {
    shape.back() = call.members[m].F();
    ys[m] = ys[m].to(call.x.scalar_type()).view(shape), hs[m] = hs[m].to(call.x.scalar_type());
  }
  return {ys, hs};
}

Grads zero_grads(const Call& call, const Needs& needs) {
  Tensors inputs{call.x, call.gates};
  for (const Member& member : call.members) inputs.push_back(member.lora_a);
  for (const Member& member : call.members) inputs.push_back(member.lora_b);
  Grads grads(inputs.size());
  for (size_t i = 0; i < inputs.size(); ++i)
    if (needs.all[i]) grads[i] = at::zeros(inputs[i].sizes(), inputs[i].options());
  return grads;
}

// Of x, the gates, each A, each B.
template <class E>
Grads backward_as(const Tensors& dys, const Tensors& hs, Call call, const Needs& needs) {
  const Tensor rows = as_rows<E>(call.x);
  if (rows.size(0) == 0) return zero_grads(call, needs);
  prepare<E>(call);
  return tiles_backward<E>(dys, hs, call, rows, *plan_of(call, rows.size(0)), needs);
}

// Whether bf16 is multiplied as it is; else everything is computed in float.
bool native(const Tensor& x) {
  TORCH_CHECK(in_use().name, "this processor has no instruction set that moe_lora._C was built for");
  return x.scalar_type() == at::kBFloat16 && in_use().half;
}

Call call_of(const Tensor& x, const Tensors& weights, const std::vector<std::optional<Tensor>>& biases,
             const Tensors& lora_as, const Tensors& lora_bs, const Tensor& experts, const Tensor& gates,
             const std::optional<Tensor>& offsets, double scale, double dropout, const std::optional<Tensor>& seed) {
  Call call{x, {}, experts, gates, offsets, scale, dropout, seed};
  for (size_t m = 0; m < weights.size(); ++m)
    call.members.push_back({weights[m], biases.empty() ? std::nullopt : biases[m], lora_as[m], lora_bs[m]});
  return call;
}

std::tuple<Tensors, Tensors> forward(Tensor x, Tensors weights, std::vector<std::optional<Tensor>> biases, Tensors lora_as,
                                     Tensors lora_bs, Tensor experts, Tensor gates, std::optional<Tensor> offsets,
                                     double scale, double dropout, std::optional<Tensor> seed) {
  const Call call = call_of(x, weights, biases, lora_as, lora_bs, experts, gates, offsets, scale, dropout, seed);
  return native(x) ? forward_as<bf16>(call) : forward_as<float>(call);
}

Grads backward(Tensors dys, Tensor x, Tensors weights, Tensors lora_as, Tensors lora_bs, Tensors hs, Tensor experts,
               Tensor gates, std::optional<Tensor> offsets, double scale, double dropout, std::optional<Tensor> seed,
               std::vector<bool> needs) {
  const Call call = call_of(x, weights, {}, lora_as, lora_bs, experts, gates, offsets, scale, dropout, seed);
  const Needs wanted{needs, weights.size()};
  return native(x) ? backward_as<bf16>(dys, hs, call, wanted) : backward_as<float>(dys, hs, call, wanted);
}

// The instruction set in use, or none.
std::optional<std::string> instructions() {
  return in_use().name ? std::optional<std::string>(in_use().name) : std::nullopt;
}

std::vector<std::string> all_instructions() {
  std::vector<std::string> names;
  for (const InstructionSet* set = instruction_sets(); set->name; ++set)
    if (set->supported()) names.push_back(set->name);
  return names;
}

void use_instructions(const std::string& name) {
  const InstructionSet* set = instruction_sets();
  while (set->name && (set->name != name || !set->supported())) ++set;
  TORCH_CHECK(set->name, "instructions must be one of those that run here, got ", name);
  use(*set);
}

// Of how many threads a loop makes use, counted.
size_t count_threads() {
  std::vector<std::thread::id> ids(threads());
  runs(int64_t(ids.size()), [&](int64_t i) { ids[i] = std::this_thread::get_id(); });
  return std::set<std::thread::id>(ids.begin(), ids.end()).size();
}

}  // namespace
}  // namespace moe_lora

PYBIND11_MODULE(_C, m) {
  using release = pybind11::call_guard<pybind11::gil_scoped_release>;
  m.def("forward", &moe_lora::forward, release());
  m.def("backward", &moe_lora::backward, release());
  m.attr("few_rows") = moe_lora::kFewRows;
  m.def("threads", &moe_lora::count_threads, release());
  m.def("instructions", &moe_lora::instructions);
  m.def("all_instructions", &moe_lora::all_instructions);
  m.def("use_instructions", &moe_lora::use_instructions);
}
