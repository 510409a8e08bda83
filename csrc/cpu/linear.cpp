// moe_lora._C: the forward and backward of moe_lora::linear on the CPU. The checks are at the op, in ops.py.
#include <ATen/Parallel.h>
#include <torch/extension.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <new>
#include <optional>
#include <vector>

#include "plan.h"

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

const InstructionSet& in_use() {
  const InstructionSet* set = chosen ? chosen : best();
  TORCH_CHECK(set->name, "this processor has no instruction set that moe_lora._C was built for");
  return *set;
}

template <class E>
const Kernels<E>& kernels() {
  if constexpr (sizeof(E) == 2)
    return *in_use().half;
  else
    return *in_use().single;
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

template <class E>
constexpr at::ScalarType kDtype = sizeof(E) == 2 ? at::kBFloat16 : at::kFloat;

// Rows of E with adjacent elements.
template <class E>
Tensor as_rows(const Tensor& x) {
  Tensor rows = x.reshape({-1, x.size(-1)}).to(kDtype<E>);
  return rows.stride(1) == 1 || rows.size(1) == 1 ? rows : rows.contiguous();
}

std::optional<Kind> kind_of(const Tensor& p) {
  switch (p.scalar_type()) {
    case at::kFloat: return Kind::kFloat;
    case at::kBFloat16: return Kind::kBf16;
    case at::kHalf: return Kind::kFp16;
    default: return std::nullopt;
  }
}

// Columns along the dimension that is not summed over; the last one is if `sum_last`.
Source source(const Tensor& p, bool sum_last, const int32_t* used) {
  const bool last = p.stride(-1) == 1;
  return {{p.const_data_ptr(), p.stride(last ? -2 : -1), *kind_of(p)}, p.dim() == 3 ? p.stride(0) : 0, last == sum_last, used};
}

// The experts in use of a parameter: all, read where they lie, or a copy of those if its layout or dtype has no kernel.
struct Experts {
  Tensor tensor;
  const int32_t* used;

  Experts(const Tensor& p, const Plan& plan, bool last_adjacent = false) : tensor(p), used(plan.used.data()) {
    const bool adjacent = p.stride(-1) == 1 || (p.stride(-2) == 1 && !last_adjacent);
    if (adjacent && kind_of(p)) return;
    tensor = p.index_select(0, numbers(plan)).to(kind_of(p) ? p.scalar_type() : at::kFloat).contiguous();
    used = nullptr;
  }

  static Tensor numbers(const Plan& plan) {
    return at::from_blob((void*)plan.used.data(), {int64_t(plan.used.size())}, at::kInt);
  }

  Source panels(bool sum_last) const { return source(tensor, sum_last, used); }
};

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

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

std::vector<int32_t> values(const Tensor& tensor) {
  const Tensor whole = tensor.contiguous();
  return {data<int32_t>(whole), data<int32_t>(whole) + whole.numel()};
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
  return moe_lora::plan_of(std::move(picks), std::move(ends), T, call.E(), call.K());
}

// [N, K]: the scale times all that an instance gives to each pick's expert
std::vector<float> total_gates(const Call& call, const Plan& plan) {
  const Tensor gates = call.gates.to(at::kFloat).contiguous();
  const auto scale = float(call.scale * keep_scale(call.dropout));
  const int64_t picks = gates.numel(), K = call.K();
  std::vector<float> total(picks), out(picks);
  for (int64_t at = 0; at < picks; ++at) total[at / K * K + plan.places[at]] += scale * data<float>(gates)[at];
  for (int64_t at = 0; at < picks; ++at) out[at] = total[at / K * K + plan.places[at]];
  return out;
}

void each(int64_t count, const std::function<void(int64_t)>& task) {
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) task(i);
  });
}

// Panels of the experts' columns, for a shrink.
template <class E>
Tensor shrink_panels(const Source& from, const Call& call, const Plan& plan, int64_t depth) {
  const int64_t groups = (call.R() + kLanes - 1) / kLanes, words = even<E>(depth) * int64_t(sizeof(E)) / 4;
  const auto used = int64_t(plan.used.size());
  Tensor panels = at::empty({used, groups * words * kLanes}, at::kInt);
  auto* out = static_cast<uint32_t*>(panels.mutable_data_ptr());
  each(used * groups, [&](int64_t i) {
    const int64_t first = i % groups * kLanes, columns = std::min<int64_t>(kLanes, call.R() - first);
    kernels<E>().pack(from, int(i / groups), first, columns, depth, out + i * words * kLanes);
  });
  return panels;
}

template <class E>
Shrink<E> shrink_job(const Tensor& rows, const Tensor& panels, const Call& call, const Plan& plan,
                     const std::vector<float>& gates, Tensor& s) {
  Shrink<E> job{};
  job.rows = data<E>(rows), job.stride = rows.stride(0), job.D = rows.size(1);
  job.panels = data<uint32_t>(panels), job.groups = (call.R() + kLanes - 1) / kLanes, job.R = call.R();
  job.routes = plan.routes(), job.gates = gates.data();
  job.s = static_cast<E*>(s.mutable_data_ptr());
  return job;
}

template <class E>
Tensor empty_ranks(const Call& call, const Plan& plan) {
  return at::empty({plan.T, call.K(), even<E>(call.R())}, kDtype<E>);
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
  job.weight = weight, job.lora = lora, job.used = int(plan.used.size()), job.R = call.R();
  job.s = data<E>(s), job.routes = plan.routes();
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

constexpr int64_t kFewRows = 64;

bool few(const Call& call, int64_t T) { return T <= kFewRows && !call.dropout && call.weight.stride(1) == 1; }

// The rows as Few::packed.
template <class E>
Tensor few_packed(const Tensor& rows) {
  const int64_t T = rows.size(0), D = rows.size(1), wide = 64 / sizeof(E), words = (D + wide - 1) / wide * kLanes;
  Tensor packed = at::zeros({(T <= kernels<E>().dots ? T : (T + kLanes - 1) / kLanes * kLanes), words}, at::kInt);
  auto* out = static_cast<uint32_t*>(packed.mutable_data_ptr());
  if (T <= kernels<E>().dots) {
    for (int64_t d = 0; d < D; d += wide)
      for (int64_t t = 0; t < T; ++t, out += kLanes)
        std::memcpy(out, data<E>(rows) + t * rows.stride(0) + d, std::min(wide, D - d) * sizeof(E));
    return packed;
  }
  const Source all{{data<E>(rows), rows.stride(0), sizeof(E) == 2 ? Kind::kBf16 : Kind::kFloat}, 0, true, nullptr};
  each((T + kLanes - 1) / kLanes, [&](int64_t i) {
    kernels<E>().pack(all, 0, i * kLanes, std::min<int64_t>(kLanes, T - i * kLanes), D, out + i * kLanes * words);
  });
  return packed;
}

template <class E>
void few_forward(const Call& call, const Tensor& rows, const Plan& plan, Tensor& y, Tensor& h) {
  const int64_t T = rows.size(0), splits = (call.D() + kSplit - 1) / kSplit, width = call.K() * call.R();
  std::vector<float> z(splits * T * width), picks(T * width);
  Few<E> job{};
  job.rows = data<E>(rows), job.stride = rows.stride(0), job.T = int(T), job.D = call.D(), job.F = call.F();
  const Tensor packed = few_packed<E>(rows);
  job.packed = data<uint32_t>(packed), job.words = packed.size(1);
  job.weight = source(call.weight, true, nullptr).matrix;
  job.bias = call.bias ? data<E>(*call.bias) : nullptr;
  const Experts a(call.lora_a, plan, true), b(call.lora_b, plan, true);
  job.lora_a = a.panels(false), job.lora_b = b.panels(false);
  job.routes = plan.routes(), job.used = int(plan.used.size()), job.R = call.R();
  job.out = static_cast<E*>(y.mutable_data_ptr()), job.z = z.data(), job.s = z.data();
  each(int64_t(plan.used.size()) * splits, [&](int64_t i) { kernels<E>().few_shrink(job, int(i / splits), i % splits); });
  for (int64_t split = 1; split < splits; ++split)
    for (int64_t i = 0; i < T * width; ++i) z[i] += z[split * T * width + i];
  const std::vector<float> gates = total_gates(call, plan);
  const auto of_pick = [&](int64_t t, int k) { return z.data() + (t * call.K() + plan.places[plan.instance[t] * call.K() + k]) * call.R(); };
  for (int64_t t = 0; t < T; ++t)
    for (int k = 0; k < call.K(); ++k) std::copy_n(of_pick(t, k), call.R(), picks.data() + (t * call.K() + k) * call.R());
  h.copy_(at::from_blob(picks.data(), {T, width}, at::kFloat));
  for (int64_t t = 0; t < T; ++t)
    for (int k = 0; k < call.K(); ++k) {
      const float gate = gates[plan.instance[t] * call.K() + k], *from = picks.data() + (t * call.K() + k) * call.R();
      std::transform(from, from + call.R(), of_pick(t, k), [=](float value) { return gate * value; });
    }
  each((call.F() + kFewColumns - 1) / kFewColumns, [&](int64_t i) { kernels<E>().few_rows(job, i * kFewColumns); });
}

// Weight and bias as the kernels take them.
template <class E>
void prepare(Call& call) {
  if (call.weight.stride(0) != 1 && call.weight.stride(1) != 1) call.weight = call.weight.contiguous();
  if (call.bias) call.bias = call.bias->to(kDtype<E>).contiguous();
}

template <class E>
std::tuple<Tensor, Tensor> forward_as(Call call) {
  auto shape = call.x.sizes().vec();
  shape.back() = call.F();
  const Tensor rows = as_rows<E>(call.x);
  const int64_t T = rows.size(0);
  prepare<E>(call);
  Tensor y = at::empty({T, call.F()}, kDtype<E>), h = at::empty({T, call.K() * call.R()}, kDtype<E>);
  const auto results = [&] { return std::tuple(y.to(call.x.scalar_type()).view(shape), h.to(call.x.scalar_type())); };
  if (T == 0) return results();
  const std::shared_ptr<const Plan> plan = plan_of(call, T);
  if (few(call, T)) {
    few_forward<E>(call, rows, *plan, y, h);
    return results();
  }
  Tensor s = empty_ranks<E>(call, *plan);
  const Experts a(call.lora_a, *plan), b(call.lora_b, *plan);
  const std::vector<float> gates = total_gates(call, *plan);
  const Tensor panels = shrink_panels<E>(a.panels(false), call, *plan, call.D());
  auto job = shrink_job<E>(rows, panels, call, *plan, gates, s);
  job.h = static_cast<E*>(h.mutable_data_ptr()), job.mask = mask_of(call);
  run(job, *plan);
  const Tensor* bias = call.bias ? &*call.bias : nullptr;
  expand<E>(rows, source(call.weight, true, nullptr), b.panels(false), bias, s, call, *plan, {}, y);
  return results();
}

// Σ over each expert's rows of sᵀ · rows
template <class E>
Tensor sum(const Tensor& rows, const Tensor& s, const Call& call, const Plan& plan, const Mask& mask, const Tensor& like) {
  const auto used = int64_t(plan.used.size());
  Tensor sums = at::empty({used, like.size(1), like.size(2)}, at::kFloat);
  Sum<E> job{};
  job.rows = data<E>(rows), job.stride = rows.stride(0), job.columns = rows.size(1), job.s = data<E>(s);
  job.R = call.R(), job.used = int(used), job.routes = plan.routes();
  job.out = sums.mutable_data_ptr<float>(), job.mask = mask;
  job.across = &like == &call.lora_a;
  each((job.columns + kColumns - 1) / kColumns, [&](int64_t i) { kernels<E>().sum(job, i * kColumns); });
  if (used == call.E()) return sums.to(like.scalar_type());
  Tensor out = at::zeros(like.sizes(), like.scalar_type());
  for (int64_t u = 0; u < used; ++u) out[plan.used[u]].copy_(sums[u]);
  return out;
}

// [N, K] of [T, K], summed in the rows' order
Tensor sum_gates(const Tensor& dgates, const Call& call, const Plan& plan) {
  Tensor total = at::zeros(call.gates.sizes(), at::kDouble);
  auto* out = total.mutable_data_ptr<double>();
  const auto* from = data<float>(dgates);
  for (int64_t t = 0, K = call.K(); t < plan.T; ++t)
    for (int64_t k = 0; k < K; ++k) out[plan.instance[t] * K + k] += from[t * K + k];
  return total.mul_(float(call.scale * keep_scale(call.dropout))).to(call.gates.scalar_type());
}

template <class E>
std::vector<std::optional<Tensor>> backward_as(Tensor dy, Tensor h, Call call, std::vector<bool> needs) {
  std::vector<std::optional<Tensor>> grads(4);
  const Tensor rows = as_rows<E>(call.x), drows = as_rows<E>(dy), kept = h.to(kDtype<E>).contiguous();
  const int64_t T = rows.size(0);
  if (T == 0) {
    const Tensor inputs[] = {call.x, call.lora_a, call.lora_b, call.gates};
    for (int i = 0; i < 4; ++i)
      if (needs[i]) grads[i] = at::zeros(inputs[i].sizes(), inputs[i].options());
    return grads;
  }
  prepare<E>(call);
  const std::shared_ptr<const Plan> plan = plan_of(call, T);
  const Mask mask = mask_of(call);
  const Experts a(call.lora_a, *plan), b(call.lora_b, *plan);
  const std::vector<float> gates = total_gates(call, *plan);
  Tensor s = empty_ranks<E>(call, *plan), kept_s = at::empty_like(s), dgates = at::empty({T, call.K()}, at::kFloat);
  const Tensor panels = shrink_panels<E>(b.panels(true), call, *plan, call.F());
  auto job = shrink_job<E>(drows, panels, call, *plan, gates, s);
  job.kept = data<E>(kept), job.kept_s = static_cast<E*>(kept_s.mutable_data_ptr());
  job.dgates = dgates.mutable_data_ptr<float>();
  run(job, *plan);
  if (needs[0]) {
    Tensor dx = at::empty({T, call.D()}, kDtype<E>);
    expand<E>(drows, source(call.weight, false, nullptr), a.panels(true), nullptr, s, call, *plan, mask, dx);
    grads[0] = dx.to(call.x.scalar_type()).view(call.x.sizes());
  }
  if (needs[1]) grads[1] = sum<E>(rows, s, call, *plan, mask, call.lora_a);
  if (needs[2]) grads[2] = sum<E>(drows, kept_s, call, *plan, {}, call.lora_b);
  if (needs[3]) grads[3] = sum_gates(dgates, call, *plan);
  return grads;
}

// Whether bf16 is multiplied as it is; else everything is computed in float.
bool native(const Tensor& x) { return x.scalar_type() == at::kBFloat16 && in_use().half; }

std::tuple<Tensor, Tensor> forward(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor lora_a, Tensor lora_b,
                                   Tensor experts, Tensor gates, std::optional<Tensor> offsets, double scale,
                                   double dropout, std::optional<Tensor> seed) {
  Call call{x, weight, bias, lora_a, lora_b, experts, gates, offsets, scale, dropout, seed};
  return native(x) ? forward_as<bf16>(call) : forward_as<float>(call);
}

std::vector<std::optional<Tensor>> backward(Tensor dy, Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor h,
                                            Tensor experts, Tensor gates, std::optional<Tensor> offsets, double scale,
                                            double dropout, std::optional<Tensor> seed, std::vector<bool> needs) {
  Call call{x, weight, std::nullopt, lora_a, lora_b, experts, gates, offsets, scale, dropout, seed};
  return native(x) ? backward_as<bf16>(dy, h, call, needs) : backward_as<float>(dy, h, call, needs);
}

}  // namespace

void* scratch(int which, int64_t bytes) {
  constexpr std::align_val_t page{4096};
  struct Buffers {
    void* data[8] = {};
    int64_t bytes[8] = {};
    ~Buffers() {
      for (void* p : data) ::operator delete(p, page);
    }
  };
  static thread_local Buffers buffers;
  if (buffers.bytes[which] < bytes) {
    ::operator delete(buffers.data[which], page);
    buffers.data[which] = nullptr, buffers.bytes[which] = 0;
    buffers.data[which] = ::operator new(bytes, page);
    buffers.bytes[which] = bytes;
  }
  return buffers.data[which];
}

}  // namespace moe_lora

PYBIND11_MODULE(_C, m) {
  using release = pybind11::call_guard<pybind11::gil_scoped_release>;
  m.def("forward", &moe_lora::forward, release());
  m.def("backward", &moe_lora::backward, release());
  m.attr("few_rows") = moe_lora::kFewRows;
  m.def("instructions", &moe_lora::instructions);
  m.def("all_instructions", &moe_lora::all_instructions);
  m.def("use_instructions", &moe_lora::use_instructions);
}
