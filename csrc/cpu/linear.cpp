// moe_lora._C: the forward and backward of moe_lora::linear and linear_group on the CPU. The checks are at the ops.
#include <ATen/Parallel.h>
#include <pthread.h>
#include <torch/extension.h>

#include <algorithm>
#include <atomic>
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

struct Member {
  Tensor weight;
  std::optional<Tensor> bias;
  Tensor lora_a, lora_b;

  int64_t F() const { return weight.size(0); }
};

struct Call {  // the plan and the parameters, as in ops.py; members share x, E and R
  Tensor x;
  std::vector<Member> members;
  Tensor experts, gates;
  std::optional<Tensor> offsets;
  double scale, dropout;
  std::optional<Tensor> seed;

  int64_t D() const { return x.size(-1); }
  int64_t E() const { return members[0].lora_a.size(0); }
  int R() const { return int(members[0].lora_a.size(2)); }
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

using Task = std::function<void(int64_t)>;

bool forked = false;  // a forked child has none of OpenMP's threads, and would wait for them for ever

// begin and end of as many runs of tasks as torch has threads, each on one of them
void split(int64_t count, const std::function<void(int64_t, int64_t)>& run) {
  if (forked)
    run(0, count);
  else
    at::parallel_for(0, count, 1, run);
}

// Every task once, each thread a run of them one after the other: for tasks that stream adjacent memory.
void runs(int64_t count, const Task& task) {
  split(count, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) task(i);
  });
}

// The same, each thread taking the next one: for few and unequal tasks.
void each(int64_t count, const Task& task) {
  std::atomic<int64_t> next{0};
  split(std::min<int64_t>(count, at::get_num_threads()), [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) task(i);
  });
}

// How many threads take part: one where the extension was built without OpenMP.
int threads() {
  std::atomic<int> count{0};
  split(at::get_num_threads(), [&](int64_t, int64_t) { count += 1; });
  return count;
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
std::vector<Tensor> empty_ranks(const Call& call, const Plan& plan) {
  std::vector<Tensor> all;
  for (size_t m = 0; m < call.members.size(); ++m) all.push_back(at::empty({plan.T, call.K(), even<E>(call.R())}, kDtype<E>));
  return all;
}

template <class E>
void run(const Shrink<E>* jobs, int members, const Plan& plan) {
  const auto tiles = int64_t(plan.tiles.size());
  each((tiles + kChunk - 1) / kChunk, [&](int64_t i) {
    kernels<E>().shrink(jobs, members, i * kChunk, std::min(tiles, (i + 1) * kChunk));
  });
}

// rows · weight + s · lora, to be added up or written to `out`
template <class E>
Expand<E> expand_job(const Tensor& rows, const Source& weight, const Source& lora, const Tensor& s, const Call& call,
                     const Plan& plan, Tensor& out) {
  Expand<E> job{};
  job.rows = data<E>(rows), job.stride = rows.stride(0), job.D = rows.size(1);
  job.weight = weight, job.lora = lora, job.used = int(plan.used.size()), job.R = call.R();
  job.s = data<E>(s), job.routes = plan.routes();
  job.out = static_cast<E*>(out.mutable_data_ptr()), job.out_stride = job.columns = out.size(1);
  return job;
}

// `summed`: one sum of all jobs; else each for itself.
template <class E>
void run(const std::vector<Expand<E>>& jobs, const Plan& plan, bool summed) {
  const int members = summed ? int(jobs.size()) : 1;
  std::vector<std::pair<const Expand<E>*, int64_t>> panels;  // and their first column
  for (const Expand<E>* job = jobs.data(); job < jobs.data() + jobs.size(); job += members)
    for (int64_t first = 0; first < job->columns; first += kColumns) panels.emplace_back(job, first);
  const int64_t count = panels.size(), tiles = plan.tiles.size(), chunks = (tiles + kChunk - 1) / kChunk;
  const int64_t threads = at::get_num_threads();
  const int64_t ranges = threads == 1 || count >= 4 * threads ? 1 : std::min(chunks, (4 * threads + count - 1) / count);
  each(count * ranges, [&](int64_t i) {
    const int64_t range = i % ranges, begin = range * chunks / ranges * kChunk, end = (range + 1) * chunks / ranges * kChunk;
    const auto [job, first] = panels[i / ranges];
    kernels<E>().expand(job, members, first, begin, std::min(end, tiles));
  });
}

constexpr int64_t kFewRows = 64;

bool few(const Call& call, int64_t T) {
  const auto adjacent = [](const Member& member) { return member.weight.stride(1) == 1; };
  return T <= kFewRows && !call.dropout && std::all_of(call.members.begin(), call.members.end(), adjacent);
}

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
  runs((T + kLanes - 1) / kLanes, [&](int64_t i) {
    kernels<E>().pack(all, 0, i * kLanes, std::min<int64_t>(kLanes, T - i * kLanes), D, out + i * kLanes * words);
  });
  return packed;
}

// From z [T, K, R] by places to h by picks; then s = gates · z, in its place.
void few_fold(const Call& call, const Plan& plan, const std::vector<float>& gates, float* z, Tensor& h) {
  const int64_t T = plan.T, K = call.K(), R = call.R();
  std::vector<float> picks(T * K * R);
  for (int64_t t = 0; t < T; ++t)
    for (int64_t k = 0; k < K; ++k)
      std::copy_n(z + (t * K + plan.places[plan.instance[t] * K + k]) * R, R, picks.data() + (t * K + k) * R);
  h.copy_(at::from_blob(picks.data(), h.sizes(), at::kFloat));
  for (int64_t t = 0; t < T; ++t)
    for (int64_t k = 0; k < K; ++k) {
      const float gate = gates[plan.instance[t] * K + k], *from = picks.data() + (t * K + k) * R;
      float* to = z + (t * K + plan.places[plan.instance[t] * K + k]) * R;
      std::transform(from, from + R, to, [=](float value) { return gate * value; });
    }
}

template <class E>
void few_forward(const Call& call, const Tensor& rows, const Plan& plan, std::vector<Tensor>& ys, std::vector<Tensor>& hs) {
  const int64_t T = rows.size(0), D = call.D(), splits = (D + kSplit - 1) / kSplit, size = T * call.K() * call.R();
  const auto members = int64_t(call.members.size()), used = int64_t(plan.used.size());
  std::vector<float> z(members * splits * size);
  std::vector<Few<E>> jobs;
  std::vector<Experts> keep;
  std::vector<std::pair<int64_t, int64_t>> tasks;  // member and first column
  const Tensor packed = few_packed<E>(rows);
  for (int64_t m = 0; m < members; ++m) {
    const Member& member = call.members[m];
    Few<E> job{};
    job.rows = data<E>(rows), job.stride = rows.stride(0), job.T = int(T), job.D = D, job.F = member.F();
    job.packed = data<uint32_t>(packed), job.words = packed.size(1);
    job.weight = source(member.weight, true, nullptr).matrix;
    job.bias = member.bias ? data<E>(*member.bias) : nullptr;
    job.lora_a = keep.emplace_back(member.lora_a, plan, true).panels(false);
    job.lora_b = keep.emplace_back(member.lora_b, plan, true).panels(false);
    job.routes = plan.routes(), job.used = int(used), job.R = call.R();
    job.out = static_cast<E*>(ys[m].mutable_data_ptr()), job.s = job.z = z.data() + m * splits * size;
    for (int64_t first = 0; first < job.F; first += kFewColumns) tasks.emplace_back(m, first);
    jobs.push_back(job);
  }
  runs(members * used * splits, [&](int64_t i) {
    kernels<E>().few_shrink(jobs[i / splits / used], int(i / splits % used), i % splits);
  });
  const std::vector<float> gates = total_gates(call, plan);
  for (int64_t m = 0; m < members; ++m) {
    float* sum = jobs[m].z;
    for (int64_t split = 1; split < splits; ++split)
      for (int64_t i = 0; i < size; ++i) sum[i] += sum[split * size + i];
    few_fold(call, plan, gates, sum, hs[m]);
  }
  runs(int64_t(tasks.size()), [&](int64_t i) { kernels<E>().few_rows(jobs[tasks[i].first], tasks[i].second); });
}

// Weights and biases as the kernels take them.
template <class E>
void prepare(Call& call) {
  for (Member& member : call.members) {
    if (member.weight.stride(0) != 1 && member.weight.stride(1) != 1) member.weight = member.weight.contiguous();
    if (member.bias) member.bias = member.bias->to(kDtype<E>).contiguous();
  }
}

using Tensors = std::vector<Tensor>;

template <class E>
void tiles_forward(const Call& call, const Tensor& rows, const Plan& plan, Tensors& ys, Tensors& hs) {
  Tensors ss = empty_ranks<E>(call, plan), panels;
  const std::vector<float> gates = total_gates(call, plan);
  std::vector<Experts> keep;
  std::vector<Shrink<E>> shrinks;
  std::vector<Expand<E>> expands;
  for (size_t m = 0; m < call.members.size(); ++m) {
    const Member& member = call.members[m];
    const Source a = keep.emplace_back(member.lora_a, plan).panels(false);
    const Source b = keep.emplace_back(member.lora_b, plan).panels(false);
    panels.push_back(shrink_panels<E>(a, call, plan, call.D()));
    shrinks.push_back(shrink_job<E>(rows, panels[m], call, plan, gates, ss[m]));
    shrinks[m].h = static_cast<E*>(hs[m].mutable_data_ptr()), shrinks[m].mask = mask_of(call);
    expands.push_back(expand_job<E>(rows, source(member.weight, true, nullptr), b, ss[m], call, plan, ys[m]));
    expands[m].bias = member.bias ? data<E>(*member.bias) : nullptr;
  }
  run(shrinks.data(), int(shrinks.size()), plan);
  run(expands, plan, false);
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

// Σ over each expert's rows of sᵀ · rows, for each s, like those parameters
template <class E>
Tensors sum(const Tensor& rows, const Tensors& ss, const Call& call, const Plan& plan, const Mask& mask,
            const Tensors& likes, bool across) {
  const auto used = int64_t(plan.used.size());
  Tensors outs;
  std::vector<Sum<E>> jobs;
  for (size_t m = 0; m < ss.size(); ++m) {
    outs.push_back(at::empty({used, likes[m].size(1), likes[m].size(2)}, at::kFloat));
    Sum<E> job{};
    job.rows = data<E>(rows), job.stride = rows.stride(0), job.columns = rows.size(1), job.s = data<E>(ss[m]);
    job.R = call.R(), job.used = int(used), job.routes = plan.routes();
    job.out = outs[m].mutable_data_ptr<float>(), job.mask = mask, job.across = across;
    jobs.push_back(job);
  }
  each((rows.size(1) + kColumns - 1) / kColumns, [&](int64_t i) {
    kernels<E>().sum(jobs.data(), int(jobs.size()), i * kColumns);
  });
  for (size_t m = 0; m < ss.size(); ++m) {
    const Tensor sums = outs[m];
    if (used == call.E()) {
      outs[m] = sums.to(likes[m].scalar_type());
      continue;
    }
    outs[m] = at::zeros(likes[m].sizes(), likes[m].scalar_type());
    for (int64_t u = 0; u < used; ++u) outs[m][plan.used[u]].copy_(sums[u]);
  }
  return outs;
}

// [N, K] of each member's [T, K], summed in the rows' order
Tensor sum_gates(const Tensors& dgates, const Call& call, const Plan& plan) {
  Tensor total = at::zeros(call.gates.sizes(), at::kDouble);
  auto* out = total.mutable_data_ptr<double>();
  for (const Tensor& each : dgates) {
    const auto* from = data<float>(each);
    for (int64_t t = 0, K = call.K(); t < plan.T; ++t)
      for (int64_t k = 0; k < K; ++k) out[plan.instance[t] * K + k] += from[t * K + k];
  }
  return total.mul_(float(call.scale * keep_scale(call.dropout))).to(call.gates.scalar_type());
}

using Grads = std::vector<std::optional<Tensor>>;

struct Needs {  // of x, the gates, each A, each B
  std::vector<bool> all;
  size_t members;

  bool x() const { return all[0]; }
  bool gates() const { return all[1]; }
  bool a(size_t m) const { return all[2 + m]; }
  bool b(size_t m) const { return all[2 + members + m]; }
  bool any_a() const { return std::find(all.begin() + 2, all.begin() + 2 + members, true) < all.begin() + 2 + members; }
};

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
  const size_t members = call.members.size();
  const Tensor rows = as_rows<E>(call.x);
  const int64_t T = rows.size(0);
  if (T == 0) return zero_grads(call, needs);
  prepare<E>(call);
  const std::shared_ptr<const Plan> plan = plan_of(call, T);
  const Mask mask = mask_of(call);
  const std::vector<float> gates = total_gates(call, *plan);
  Grads grads(needs.all.size());
  Tensor dx = at::empty({T, call.D()}, kDtype<E>);
  Tensors ss = empty_ranks<E>(call, *plan), drows, dgates, likes;
  std::vector<Experts> keep;
  std::vector<Expand<E>> expands;
  for (size_t m = 0; m < members; ++m) {
    const Member& member = call.members[m];
    const Source a = keep.emplace_back(member.lora_a, *plan).panels(true);
    const Source b = keep.emplace_back(member.lora_b, *plan).panels(true);
    drows.push_back(as_rows<E>(dys[m])), dgates.push_back(at::empty({T, call.K()}, at::kFloat));
    const Tensor panels = shrink_panels<E>(b, call, *plan, member.F()), kept = hs[m].to(kDtype<E>).contiguous();
    Tensor kept_s = at::empty_like(ss[m]);
    auto job = shrink_job<E>(drows[m], panels, call, *plan, gates, ss[m]);
    job.kept = data<E>(kept), job.kept_s = static_cast<E*>(kept_s.mutable_data_ptr());
    job.dgates = dgates[m].mutable_data_ptr<float>();
    run(&job, 1, *plan);
    if (needs.b(m)) grads[2 + members + m] = sum<E>(drows[m], {kept_s}, call, *plan, {}, {member.lora_b}, false)[0];
    expands.push_back(expand_job<E>(drows[m], source(member.weight, false, nullptr), a, ss[m], call, *plan, dx));
    expands[m].mask = mask;
    likes.push_back(member.lora_a);
  }
  if (needs.x()) {
    run(expands, *plan, true);
    grads[0] = dx.to(call.x.scalar_type()).view(call.x.sizes());
  }
  if (needs.any_a()) {
    const Tensors das = sum<E>(rows, ss, call, *plan, mask, likes, true);
    for (size_t m = 0; m < members; ++m)
      if (needs.a(m)) grads[2 + m] = das[m];
  }
  if (needs.gates()) grads[1] = sum_gates(dgates, call, *plan);
  return grads;
}

// Whether bf16 is multiplied as it is; else everything is computed in float.
bool native(const Tensor& x) { return x.scalar_type() == at::kBFloat16 && in_use().half; }

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
  pthread_atfork(nullptr, nullptr, [] { moe_lora::forked = true; });
  using release = pybind11::call_guard<pybind11::gil_scoped_release>;
  m.def("forward", &moe_lora::forward, release());
  m.def("backward", &moe_lora::backward, release());
  m.attr("few_rows") = moe_lora::kFewRows;
  m.def("threads", &moe_lora::threads, release());
  m.def("instructions", &moe_lora::instructions);
  m.def("all_instructions", &moe_lora::all_instructions);
  m.def("use_instructions", &moe_lora::use_instructions);
}
