// What the kernels take of a call.
#include "call.h"

#include <cmath>
#include <stdexcept>
#include <string>

namespace moe_lora {
namespace {

double drop_threshold(double p) { return std::min<double>(std::nearbyint(p * 65536), 65535); }

uint32_t mix(uint32_t z) {
  z = (z ^ (z >> 16)) * 0x7feb352du;
  z = (z ^ (z >> 15)) * 0x846ca68bu;
  return z ^ (z >> 16);
}

}  // namespace

Source source(const moe_lora_matrix& matrix, bool sum_last) {
  const bool last = matrix.strides[1] == 1;
  return {{matrix.data, matrix.strides[last ? 0 : 1], Kind(matrix.dtype)}, 0, last == sum_last, nullptr};
}

Source source(const moe_lora_experts& parameter, bool sum_last, const Plan& plan) {
  const bool last = parameter.strides[2] == 1;
  return {{parameter.data, parameter.strides[last ? 1 : 2], Kind(parameter.dtype)},
          parameter.strides[0],
          last == sum_last,
          parameter.only_used ? nullptr : plan.used.data()};
}

Mask mask_of(const Call& call) {
  if (!call.dropout) return {};
  const auto seed = uint64_t(call.seed);
  uint32_t a = uint32_t(seed), b = uint32_t(seed >> 32);
  a ^= mix(b + 0x9e3779b9u);
  b ^= mix(a + 0x85ebca6bu);
  a ^= mix(b + 0xc2b2ae35u);
  return {a, b ^ mix(0x27d4eb2fu), int32_t(drop_threshold(call.dropout)) - 32768, true};
}

float scale_of(const Call& call) { return float(call.scale * (65536 / (65536 - drop_threshold(call.dropout)))); }

std::vector<float> total_gates(const Call& call, const Plan& plan) {
  const float scale = scale_of(call);
  const int64_t N = call.routing.N, K = call.routing.K;
  std::vector<float> total(N * K), out(N * K);
  for (int64_t i = 0; i < N; ++i) {
    const float* gates = call.gates + i * call.gate_strides[0];
    for (int64_t k = 0; k < K; ++k) total[i * K + plan.places[i * K + k]] += scale * gates[k * call.gate_strides[1]];
    for (int64_t k = 0; k < K; ++k) out[i * K + k] = total[i * K + plan.places[i * K + k]];
  }
  return out;
}

std::shared_ptr<const Plan> plan_of(const moe_lora_routing& r, int tile) {
  std::vector<int32_t> picks, ends;
  picks.reserve(r.N * r.K);
  for (int64_t i = 0; i < r.N; ++i)
    for (int64_t k = 0; k < r.K; ++k) picks.push_back(r.experts[i * r.expert_strides[0] + k * r.expert_strides[1]]);
  for (int32_t e : picks)  // a compiled graph comes here without the checks of routing.py
    if (e < 0 || e >= r.E)
      throw std::runtime_error("experts must be in 0.." + std::to_string(r.E - 1) + ", got " + std::to_string(e));
  if (r.offsets) {
    ends.assign(r.offsets, r.offsets + r.N + 1);
    if (ends.front() != 0 || ends.back() != r.T || !std::is_sorted(ends.begin(), ends.end()))
      throw std::runtime_error("offsets must rise from 0 to x's " + std::to_string(r.T) + " rows");
  } else if (r.N < 1 || r.T % r.N) {
    throw std::runtime_error("the routing's " + std::to_string(r.N) + " instances must divide x's " +
                             std::to_string(r.T) + " rows, or have offsets");
  }
  return plan_of(std::move(picks), std::move(ends), r.T, r.E, int(r.K), tile);
}

}  // namespace moe_lora
