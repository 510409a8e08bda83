// moe_lora._C: the forward and backward of moe_lora::linear on the CPU. The checks are at the op, in ops.py.
#include <ATen/Parallel.h>
#include <torch/extension.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <optional>
#include <vector>

#include "kernels.h"

namespace moe_lora {
namespace {

using at::Tensor;

template <class E>
constexpr int64_t even(int64_t n) {
  return sizeof(E) == 2 ? (n + 1) / 2 * 2 : n;
}

const InstructionSet* best() {
  static const InstructionSet* found = [] {
    const InstructionSet* set = instruction_sets();
    while (set->name && !set->supported()) ++set;
    return set;
  }();
  return found;
}

const InstructionSet* chosen = nullptr;

// The instruction set in use, or null if none of them runs here.
std::optional<std::string> instructions() {
  const InstructionSet* set = chosen ? chosen : best();
  return set->name ? std::optional<std::string>(set->name) : std::nullopt;
}

std::vector<std::string> all_instructions() {
  std::vector<std::string> names;
  for (const InstructionSet* set = instruction_sets(); set->name; ++set)
    if (set->supported()) names.push_back(set->name);
  return names;
}

// Use another instruction set that runs here, to test it.
void use_instructions(const std::string& name) {
  for (const InstructionSet* set = instruction_sets(); set->name; ++set)
    if (set->name == name && set->supported()) {
      chosen = set;
      return;
    }
  TORCH_CHECK(false, "instructions must be one of those that run here, got ", name);
}

template <class E>
const Kernels<E>& kernels() {
  const InstructionSet* set = chosen ? chosen : best();
  TORCH_CHECK(set->name, "this processor has no instruction set that moe_lora._C was built for");
  if constexpr (sizeof(E) == 2)
    return *set->half;
  else
    return *set->single;
}

struct Call {  // the plan and the parameters, as in ops.py
  Tensor x, weight;
  std::optional<Tensor> bias;
  Tensor lora_a, lora_b, experts, gates;
  std::optional<Tensor> offsets;
  double scale, dropout;
  std::optional<Tensor> seed;

  int64_t D() const { return weight.size(1); }
  int64_t F() const { return weight.size(0); }
  int64_t E() const { return lora_a.size(0); }
  int R() const { return int(lora_a.size(2)); }
  int K() const { return int(experts.size(1)); }
};

// Rows with adjacent elements.
Tensor as_rows(const Tensor& x) {
  Tensor rows = x.reshape({-1, x.size(-1)});
  return rows.stride(1) == 1 || rows.size(1) == 1 ? rows : rows.contiguous();
}

// One of the last two dimensions has adjacent elements; the dtype is E's or float.
template <class E>
Tensor as_parameter(const Tensor& p) {
  const bool known = p.scalar_type() == at::kFloat || (sizeof(E) == 2 && p.scalar_type() == at::kBFloat16);
  Tensor out = known ? p : p.to(at::kFloat);
  return out.stride(-1) == 1 || out.stride(-2) == 1 ? out : out.contiguous();
}

// Columns along the dimension that is not summed over; the last one is if `sum_last`.
template <class E>
Source source(const Tensor& p, bool sum_last) {
  const bool last = p.stride(-1) == 1;
  Matrix matrix{p.const_data_ptr(), p.stride(last ? -2 : -1), sizeof(E) == 2 && p.scalar_type() == at::kFloat};
  return {matrix, p.dim() == 3 ? p.stride(0) : 0, last == sum_last};
}

double keep_scale(double p) {
  return 65536.0 / (65536.0 - std::min<double>(std::nearbyint(p * 65536), 65535));
}

uint32_t mix(uint32_t z) {
  z = (z ^ (z >> 16)) * 0x7feb352du;
  z = (z ^ (z >> 15)) * 0x846ca68bu;
  return z ^ (z >> 16);
}

Mask mask_of(const Call& call) {
  if (!call.dropout) return {};
  TORCH_CHECK(call.seed, "dropout needs a seed");
  const auto seed = uint64_t(call.seed->item<int64_t>());
  uint32_t a = uint32_t(seed), b = uint32_t(seed >> 32);
  a ^= mix(b + 0x9e3779b9u);
  b ^= mix(a + 0x85ebca6bu);
  a ^= mix(b + 0xc2b2ae35u);
  const auto threshold = int32_t(std::min<double>(std::nearbyint(call.dropout * 65536), 65535));
  return {a, b ^ mix(0x27d4eb2fu), threshold - 32768, true};
}

struct Plan {
  std::vector<Tile> tiles;
  std::vector<int32_t> experts;    // of the tiles' slots
  std::vector<int32_t> chosen;     // [T, K] experts
  std::vector<int32_t> slots;      // [T, K]
  std::vector<float> gates, total; // [T, K]: times the scale; the sum over equal experts
  std::vector<int32_t> instance;   // [T]

  Plan(const Call& call, int64_t T) : chosen(T * call.K()), slots(chosen.size()), gates(chosen.size()), total(chosen.size()), instance(T) {
    const int K = call.K();
    const int64_t N = call.experts.size(0);
    const Tensor experts_cpu = call.experts.contiguous(), gates_cpu = call.gates.to(at::kFloat).contiguous();
    const auto* from = experts_cpu.const_data_ptr<int32_t>();
    const auto* weight = gates_cpu.const_data_ptr<float>();
    const auto scale = float(call.scale * keep_scale(call.dropout));
    Tensor ends = call.offsets ? call.offsets->contiguous() : Tensor();
    for (int64_t at = 0; at < N * K; ++at)  // a compiled graph comes here without the checks of routing.py
      TORCH_CHECK(from[at] >= 0 && from[at] < call.E(), "experts must be in 0..", call.E() - 1, ", got ", from[at]);
    for (int64_t t = 0, i = 0; t < T; ++t) {
      if (call.offsets) {
        while (i < N && t >= ends.const_data_ptr<int32_t>()[i + 1]) ++i;
        TORCH_CHECK(i < N, "offsets must rise from 0 to x's ", T, " rows");
      } else
        i = t / (T / N);
      instance[t] = int32_t(i);
      for (int k = 0; k < K; ++k) chosen[t * K + k] = from[i * K + k], gates[t * K + k] = scale * weight[i * K + k];
    }
    for (int64_t row = 0; row < T; row += kTile) {
      Tile tile{int32_t(row), int32_t(std::min<int64_t>(kTile, T - row)), int32_t(experts.size()), 0};
      for (int64_t at = row * K; at < (row + tile.rows) * K; ++at) {
        const auto begin = experts.begin() + tile.slot;
        slots[at] = int32_t(std::find(begin, experts.end(), chosen[at]) - begin);
        if (slots[at] == int32_t(experts.size()) - tile.slot) experts.push_back(chosen[at]);
      }
      tile.slots = int32_t(experts.size()) - tile.slot;
      tiles.push_back(tile);
    }
    for (int64_t at = 0; at < T * K; ++at)
      for (int64_t other = at / K * K; other < at / K * K + K; ++other)
        if (slots[other] == slots[at]) total[at] += gates[other];
  }
};

void each(int64_t count, const std::function<void(int64_t)>& task) {
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) task(i);
  });
}

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

// Panels of all experts' columns, for a shrink.
template <class E>
Tensor shrink_panels(const Source& from, const Call& call, int64_t depth) {
  const int64_t groups = (call.R() + kLanes - 1) / kLanes, words = even<E>(depth) * int64_t(sizeof(E)) / 4;
  Tensor panels = at::empty({call.E(), groups * words * kLanes}, at::kInt);
  auto* out = static_cast<uint32_t*>(panels.mutable_data_ptr());
  each(call.E() * groups, [&](int64_t i) {
    const int64_t first = i % groups * kLanes, columns = std::min<int64_t>(kLanes, call.R() - first);
    kernels<E>().pack(from, int(i / groups), first, columns, depth, out + i * words * kLanes);
  });
  return panels;
}

template <class E>
Shrink<E> shrink_job(const Tensor& rows, const Tensor& panels, const Call& call, const Plan& plan, Tensor& s) {
  Shrink<E> job{};
  job.rows = data<E>(rows), job.stride = rows.stride(0), job.D = rows.size(1);
  job.panels = data<uint32_t>(panels), job.groups = (call.R() + kLanes - 1) / kLanes, job.R = call.R();
  job.tiles = plan.tiles.data(), job.experts = plan.experts.data(), job.K = call.K();
  job.slots = plan.slots.data(), job.gates = plan.total.data();
  job.s = static_cast<E*>(s.mutable_data_ptr());
  return job;
}

template <class E>
Tensor empty_ranks(const Tensor& rows, const Call& call, const Plan& plan) {
  return at::empty({int64_t(plan.experts.size()) * kTile, even<E>(call.R())}, rows.options());
}

template <class E>
void run(const Shrink<E>& job, const Plan& plan) {
  const auto tiles = int64_t(plan.tiles.size());
  each((tiles + kChunk - 1) / kChunk, [&](int64_t i) {
    kernels<E>().shrink(job, i * kChunk, std::min(tiles, (i + 1) * kChunk));
  });
}

// out = rows · weight + bias + s · lora
template <class E>
void expand(const Tensor& rows, const Source& weight, const Source& lora, const Tensor* bias, const Tensor& s,
            const Call& call, const Plan& plan, const Mask& mask, Tensor& out) {
  Expand<E> job{};
  job.rows = data<E>(rows), job.stride = rows.stride(0), job.D = rows.size(1);
  job.weight = weight, job.lora = lora, job.num_experts = int(call.E()), job.R = call.R();
  job.s = data<E>(s), job.tiles = plan.tiles.data(), job.experts = plan.experts.data();
  job.bias = bias ? data<E>(*bias) : nullptr;
  job.out = static_cast<E*>(out.mutable_data_ptr()), job.out_stride = job.columns = out.size(1);
  job.mask = mask;
  const int64_t panels = (job.columns + kColumns - 1) / kColumns, tiles = plan.tiles.size();
  const int64_t chunks = (tiles + kChunk - 1) / kChunk, threads = at::get_num_threads();
  const int64_t ranges = threads == 1 || panels >= 4 * threads ? 1 : std::min(chunks, (4 * threads + panels - 1) / panels);
  each(panels * ranges, [&](int64_t i) {
    const int64_t range = i % ranges, begin = range * chunks / ranges * kChunk, end = (range + 1) * chunks / ranges * kChunk;
    kernels<E>().expand(job, i / ranges * kColumns, begin, std::min(end, tiles));
  });
}

constexpr int64_t kFewRows = 32;

template <class E>
bool few(const Call& call, int64_t T) {
  return T <= kFewRows && !call.dropout && call.weight.stride(1) == 1 && call.lora_a.stride(2) == 1 && call.lora_b.stride(2) == 1;
}

// The rows of each pass together, as Few::packed.
template <class E>
Tensor few_packed(const Tensor& rows) {
  const int64_t D = rows.size(1), wide = 64 / sizeof(E);
  const int T = int(rows.size(0)), passes = few_passes(T);
  Tensor packed = at::zeros({T, (D + wide - 1) / wide * wide}, rows.options().memory_format(at::MemoryFormat::Contiguous));
  auto* out = static_cast<E*>(packed.mutable_data_ptr());
  for (int p = 0; p < passes; ++p)
    for (int64_t d = 0; d < D; d += wide)
      for (int t = T * p / passes; t < T * (p + 1) / passes; ++t, out += wide)
        std::memcpy((void*)out, data<E>(rows) + t * rows.stride(0) + d, std::min(wide, D - d) * sizeof(E));
  return packed;
}

template <class E>
void few_forward(const Call& call, const Tensor& rows, const Plan& plan, Tensor& y, Tensor& h) {
  const int64_t T = rows.size(0), splits = (call.D() + kSplit - 1) / kSplit, width = call.K() * call.R();
  std::vector<float> parts(splits * T * width);
  Few<E> job{};
  job.rows = data<E>(rows), job.stride = rows.stride(0), job.T = int(T), job.D = call.D();
  const Tensor packed = few_packed<E>(rows);
  job.packed = data<E>(packed), job.packed_depth = packed.size(1);
  job.weight = data<E>(call.weight), job.weight_stride = call.weight.stride(0), job.F = call.F();
  job.bias = call.bias ? data<E>(*call.bias) : nullptr;
  job.lora_b = source<E>(call.lora_b, false).matrix, job.expert_stride = call.lora_b.stride(0);
  job.lora_a = source<E>(call.lora_a, false).matrix, job.a_expert_stride = call.lora_a.stride(0);
  job.experts = plan.chosen.data(), job.K = call.K(), job.R = call.R();
  job.out = static_cast<E*>(y.mutable_data_ptr()), job.h = parts.data();
  std::vector<int32_t> used(plan.chosen);
  std::sort(used.begin(), used.end());
  used.erase(std::unique(used.begin(), used.end()), used.end());
  job.used = used.data(), job.num_used = int(used.size());
  each(int64_t(used.size()) * splits, [&](int64_t i) { kernels<E>().few_shrink(job, used[i / splits], i % splits); });
  for (int64_t split = 1; split < splits; ++split)
    for (int64_t i = 0; i < T * width; ++i) parts[i] += parts[split * T * width + i];
  h.copy_(at::from_blob(parts.data(), {T, width}, at::kFloat));
  for (int64_t i = 0; i < T * width; ++i) parts[i] *= plan.gates[i / call.R()];
  job.s = parts.data();
  each((call.F() + kFewColumns - 1) / kFewColumns, [&](int64_t i) { kernels<E>().few_rows(job, i * kFewColumns); });
}

template <class E>
std::tuple<Tensor, Tensor> forward_as(Call call) {
  auto shape = call.x.sizes().vec();
  shape.back() = call.F();
  const Tensor rows = as_rows(call.x);
  const int64_t T = rows.size(0);
  call.lora_a = as_parameter<E>(call.lora_a), call.lora_b = as_parameter<E>(call.lora_b);
  if (call.weight.stride(0) != 1 && call.weight.stride(1) != 1) call.weight = call.weight.contiguous();
  if (call.bias) call.bias = call.bias->contiguous();
  Tensor y = at::empty({T, call.F()}, rows.options()), h = at::empty({T, call.K() * call.R()}, rows.options());
  if (T == 0) return {y.view(shape), h};
  const Plan plan(call, T);
  if (few<E>(call, T)) {
    few_forward<E>(call, rows, plan, y, h);
    return {y.view(shape), h};
  }
  Tensor s = empty_ranks<E>(rows, call, plan);
  const Tensor panels = shrink_panels<E>(source<E>(call.lora_a, false), call, call.D());
  auto job = shrink_job<E>(rows, panels, call, plan, s);
  job.h = static_cast<E*>(h.mutable_data_ptr()), job.mask = mask_of(call);
  run(job, plan);
  const Tensor* bias = call.bias ? &*call.bias : nullptr;
  expand<E>(rows, source<E>(call.weight, true), source<E>(call.lora_b, false), bias, s, call, plan, {}, y);
  return {y.view(shape), h};
}

// Σ over each expert's rows of sᵀ · rows
template <class E>
Tensor sum(const Tensor& rows, const Tensor& s, const Call& call, const Plan& plan, const Mask& mask, const Tensor& like) {
  const int K = call.K();
  std::vector<int64_t> starts(call.E() + 1), place;
  std::vector<int32_t> row;
  std::vector<std::vector<std::pair<int32_t, int64_t>>> of(call.E());
  for (const Tile& tile : plan.tiles)
    for (int64_t t = tile.row; t < tile.row + tile.rows; ++t)
      for (int64_t at = t * K; at < (t + 1) * K; ++at) {
        auto& list = of[plan.chosen[at]];
        const int64_t where = (int64_t(tile.slot) * kTile + (t - tile.row) * tile.slots + plan.slots[at]) * even<E>(call.R());
        if (list.empty() || list.back().first != t) list.emplace_back(int32_t(t), where);
      }
  for (int64_t e = 0; e < call.E(); ++e) {
    for (const auto& [t, where] : of[e]) row.push_back(t), place.push_back(where);
    starts[e + 1] = int64_t(row.size());
  }
  Tensor out = at::empty(like.sizes(), like.options().dtype(at::kFloat).memory_format(at::MemoryFormat::Contiguous));
  Sum<E> job{};
  job.rows = data<E>(rows), job.stride = rows.stride(0), job.columns = rows.size(1), job.s = data<E>(s);
  job.R = call.R(), job.num_experts = int(call.E()), job.starts = starts.data(), job.row = row.data();
  job.place = place.data(), job.out = out.mutable_data_ptr<float>(), job.mask = mask;
  job.across = &like == &call.lora_a;
  each((job.columns + kColumns - 1) / kColumns, [&](int64_t i) { kernels<E>().sum(job, i * kColumns); });
  return out.to(like.scalar_type());
}

template <class E>
std::vector<std::optional<Tensor>> backward_as(Tensor dy, Tensor h, Call call, std::vector<bool> needs) {
  std::vector<std::optional<Tensor>> grads(4);
  const Tensor like_a = call.lora_a, like_b = call.lora_b;
  const Tensor rows = as_rows(call.x), drows = as_rows(dy);
  const int64_t T = rows.size(0);
  if (T == 0) {
    const Tensor inputs[] = {call.x, call.lora_a, call.lora_b, call.gates};
    for (int i = 0; i < 4; ++i)
      if (needs[i]) grads[i] = at::zeros(inputs[i].sizes(), inputs[i].options());
    return grads;
  }
  call.lora_a = as_parameter<E>(call.lora_a), call.lora_b = as_parameter<E>(call.lora_b);
  if (call.weight.stride(0) != 1 && call.weight.stride(1) != 1) call.weight = call.weight.contiguous();
  const Plan plan(call, T);
  const Mask mask = mask_of(call);
  Tensor s = empty_ranks<E>(rows, call, plan), kept_s = at::empty_like(s), dgates = at::empty({T, call.K()}, at::kFloat);
  const Tensor panels = shrink_panels<E>(source<E>(call.lora_b, true), call, call.F()), kept = h.contiguous();
  auto job = shrink_job<E>(drows, panels, call, plan, s);
  job.kept = data<E>(kept), job.kept_s = static_cast<E*>(kept_s.mutable_data_ptr());
  job.dgates = dgates.mutable_data_ptr<float>();
  run(job, plan);
  if (needs[0]) {
    Tensor dx = at::empty({T, call.D()}, rows.options());
    expand<E>(drows, source<E>(call.weight, false), source<E>(call.lora_a, true), nullptr, s, call, plan, mask, dx);
    grads[0] = dx.view(call.x.sizes());
  }
  if (needs[1]) grads[1] = sum<E>(rows, s, call, plan, mask, call.lora_a).to(like_a.scalar_type());
  if (needs[2]) grads[2] = sum<E>(drows, kept_s, call, plan, {}, call.lora_b).to(like_b.scalar_type());
  if (needs[3]) {
    Tensor total = at::zeros(call.gates.sizes(), at::kDouble);
    auto* out = total.mutable_data_ptr<double>();
    const auto* from = dgates.const_data_ptr<float>();
    const auto scale = float(call.scale * keep_scale(call.dropout));
    const int K = call.K();
    for (int64_t t = 0; t < T; ++t)
      for (int k = 0; k < K; ++k) out[plan.instance[t] * K + k] += from[t * K + k];
    grads[3] = total.mul_(scale).to(call.gates.scalar_type());
  }
  return grads;
}

std::tuple<Tensor, Tensor> forward(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor lora_a, Tensor lora_b,
                                   Tensor experts, Tensor gates, std::optional<Tensor> offsets, double scale,
                                   double dropout, std::optional<Tensor> seed) {
  Call call{x, weight, bias, lora_a, lora_b, experts, gates, offsets, scale, dropout, seed};
  return x.scalar_type() == at::kFloat ? forward_as<float>(call) : forward_as<bf16>(call);
}

std::vector<std::optional<Tensor>> backward(Tensor dy, Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor h,
                                            Tensor experts, Tensor gates, std::optional<Tensor> offsets, double scale,
                                            double dropout, std::optional<Tensor> seed, std::vector<bool> needs) {
  Call call{x, weight, std::nullopt, lora_a, lora_b, experts, gates, offsets, scale, dropout, seed};
  return x.scalar_type() == at::kFloat ? backward_as<float>(dy, h, call, needs) : backward_as<bf16>(dy, h, call, needs);
}

}  // namespace

void* scratch(int which, int64_t bytes) {
  struct Buffers {
    void* data[8] = {};
    int64_t bytes[8] = {};
    ~Buffers() {
      for (void* p : data) std::free(p);
    }
  };
  static thread_local Buffers buffers;
  if (buffers.bytes[which] < bytes) {
    std::free(buffers.data[which]);
    buffers.data[which] = nullptr, buffers.bytes[which] = 0;
    const int64_t whole = (bytes + 4095) / 4096 * 4096;
    void* data = std::aligned_alloc(4096, whole);
    TORCH_CHECK(data, "no memory for ", bytes, " bytes");
    buffers.data[which] = data, buffers.bytes[which] = whole;
  }
  return buffers.data[which];
}

}  // namespace moe_lora

PYBIND11_MODULE(_C, m) {
  using release = pybind11::call_guard<pybind11::gil_scoped_release>;
  m.def("forward", &moe_lora::forward, release());
  m.def("backward", &moe_lora::backward, release());
  m.def("instructions", &moe_lora::instructions);
  m.def("all_instructions", &moe_lora::all_instructions);
  m.def("use_instructions", &moe_lora::use_instructions);
}
