// What the kernels take of a call.
#include "call.h"

#include <ATen/ops/from_blob.h>

#include <cmath>

namespace moe_lora {
namespace {

std::optional<Kind> kind_of(const Tensor& p) {
  switch (p.scalar_type()) {
    case at::kFloat: return Kind::kFloat;
    case at::kBFloat16: return Kind::kBf16;
    case at::kHalf: return Kind::kFp16;
    default: return std::nullopt;
  }
}

double drop_threshold(double p) { return std::min<double>(std::nearbyint(p * 65536), 65535); }

uint32_t mix(uint32_t z) {
  z = (z ^ (z >> 16)) * 0x7feb352du;
  z = (z ^ (z >> 15)) * 0x846ca68bu;
  return z ^ (z >> 16);
}

std::vector<int32_t> values(const Tensor& tensor) {
  const Tensor whole = tensor.contiguous();
  return {data<int32_t>(whole), data<int32_t>(whole) + whole.numel()};
}

}  // namespace

Source source(const Tensor& p, bool sum_last, const int32_t* used) {
  const bool last = p.stride(-1) == 1;
  const int64_t expert_stride = p.dim() == 3 ? p.stride(0) : 0;
  return {{p.const_data_ptr(), p.stride(last ? -2 : -1), *kind_of(p)}, expert_stride, last == sum_last, used};
}

Experts::Experts(const Tensor& p, const Plan& plan, bool last_adjacent) : tensor(p), used(plan.used.data()) {
  const bool adjacent = p.stride(-1) == 1 || (p.stride(-2) == 1 && !last_adjacent);
  if (adjacent && kind_of(p)) return;
  const Tensor numbers = at::from_blob((void*)plan.used.data(), {int64_t(plan.used.size())}, at::kInt);
  tensor = p.index_select(0, numbers).to(kind_of(p) ? p.scalar_type() : at::kFloat).contiguous();
  used = nullptr;
}

Mask mask_of(const Call& call) {
  if (!call.dropout) return {};
  TORCH_CHECK(call.seed, "dropout needs a seed");
  const auto seed = uint64_t(call.seed->item<int64_t>());
  uint32_t a = uint32_t(seed), b = uint32_t(seed >> 32);
  a ^= mix(b + 0x9e3779b9u);
  b ^= mix(a + 0x85ebca6bu);
  a ^= mix(b + 0xc2b2ae35u);
  return {a, b ^ mix(0x27d4eb2fu), int32_t(drop_threshold(call.dropout)) - 32768, true};
}

float scale_of(const Call& call) { return float(call.scale * (65536 / (65536 - drop_threshold(call.dropout)))); }

std::vector<float> total_gates(const Call& call, const Plan& plan) {
  const Tensor gates = call.gates.to(at::kFloat).contiguous();
  const float scale = scale_of(call);
  const int64_t picks = gates.numel(), K = call.K();
  std::vector<float> total(picks), out(picks);
  for (int64_t at = 0; at < picks; ++at) total[at / K * K + plan.places[at]] += scale * data<float>(gates)[at];
  for (int64_t at = 0; at < picks; ++at) out[at] = total[at / K * K + plan.places[at]];
  return out;
}

std::shared_ptr<const Plan> plan_of(const Call& call, int64_t T) {
  std::vector<int32_t> picks = values(call.experts), ends;
  for (int32_t e : picks)  // a compiled graph comes here without the checks of routing.py
    TORCH_CHECK(e >= 0 && e < call.E(), "experts must be in 0..", call.E() - 1, ", got ", e);
  if (call.offsets) {
    ends = values(*call.offsets);
    TORCH_CHECK(ends.front() == 0 && ends.back() == T && std::is_sorted(ends.begin(), ends.end()),
                "offsets must rise from 0 to x's ", T, " rows");
  }
  return plan_of(std::move(picks), std::move(ends), T, call.E(), call.K());
}

}  // namespace moe_lora
