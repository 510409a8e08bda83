// The forward and the backward of many rows: one shrink, one expand, and in the backward two sums over each expert's rows.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include <utility>

#include "call.h"
#include "threads.h"

namespace moe_lora {
namespace {

template <class E>
constexpr int64_t even(int64_t n) {
  return sizeof(E) == 2 ? (n + 1) / 2 * 2 : n;
}

// Panels of the experts' columns, for a shrink.
template <class E>
Tensor shrink_panels(const Source& from, const Call& call, const Plan& plan, int64_t depth) {
  const int64_t groups = (call.R() + kLanes - 1) / kLanes, words = even<E>(depth) * int64_t(sizeof(E)) / 4;
  const auto used = int64_t(plan.used.size());
  Tensor panels = at::empty({used, groups * words * kLanes}, at::kInt);
  auto* out = mutable_data<uint32_t>(panels);
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
  job.s = mutable_data<E>(s);
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
  const int64_t tiles = plan.tiles.size(), rounds = (tiles + kChunk * threads() - 1) / (kChunk * threads());
  const int64_t chunks = std::min(tiles, rounds * threads());  // at most kChunk tiles each, as many for each thread
  each(chunks, [&](int64_t i) { kernels<E>().shrink(jobs, members, i * tiles / chunks, (i + 1) * tiles / chunks); });
}

// rows · weight + s · lora, to be added up or written to `out`
template <class E>
Expand<E> expand_job(const Tensor& rows, const Source& weight, const Source& lora, const Tensor& s, const Call& call,
                     const Plan& plan, Tensor& out) {
  Expand<E> job{};
  job.rows = data<E>(rows), job.stride = rows.stride(0), job.D = rows.size(1);
  job.weight = weight, job.lora = lora, job.used = int(plan.used.size()), job.R = call.R();
  job.s = data<E>(s), job.routes = plan.routes();
  job.out = mutable_data<E>(out), job.out_stride = job.columns = out.size(1);
  return job;
}

// `summed`: one sum of all jobs; else each for itself.
template <class E>
void run(const std::vector<Expand<E>>& jobs, const Plan& plan, bool summed) {
  const int members = summed ? int(jobs.size()) : 1;
  std::vector<std::pair<const Expand<E>*, int64_t>> panels;  // and their first column
  for (const Expand<E>* job = jobs.data(); job < jobs.data() + jobs.size(); job += members)
    for (int64_t first = 0; first < job->columns; first += kColumns) panels.emplace_back(job, first);
  if (panels.empty()) return;
  // Few panels are cut by rows, but each part packs the panel: not more parts than threads, nor less than kChunk tiles each.
  const int64_t count = panels.size(), tiles = plan.tiles.size(), wanted = (4 * threads() + count - 1) / count;
  const int64_t parts = std::min({wanted, threads(), (tiles + kChunk - 1) / kChunk});
  each(count * parts, [&](int64_t i) {
    const auto [job, first] = panels[i / parts];
    const int64_t part = i % parts;
    kernels<E>().expand(job, members, first, part * tiles / parts, (part + 1) * tiles / parts);
  });
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
    job.R = call.R(), job.routes = plan.routes();
    job.out = mutable_data<float>(outs[m]), job.mask = mask, job.across = across;
    jobs.push_back(job);
  }
  const int64_t panels = (rows.size(1) + kColumns - 1) / kColumns;
  each(used * panels, [&](int64_t i) {
    kernels<E>().sum(jobs.data(), int(jobs.size()), int(i / panels), i % panels * kColumns);
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
  auto* out = mutable_data<double>(total);
  for (const Tensor& each : dgates) {
    const auto* from = data<float>(each);
    for (int64_t t = 0, K = call.K(); t < plan.T; ++t)
      for (int64_t k = 0; k < K; ++k) out[plan.instance[t] * K + k] += from[t * K + k];
  }
  return total.mul_(scale_of(call)).to(call.gates.scalar_type());
}

}  // namespace

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
    shrinks[m].h = mutable_data<E>(hs[m]), shrinks[m].mask = mask_of(call);
    expands.push_back(expand_job<E>(rows, source(member.weight, true), b, ss[m], call, plan, ys[m]));
    expands[m].bias = member.bias ? data<E>(*member.bias) : nullptr;
  }
  run(shrinks.data(), int(shrinks.size()), plan);
  run(expands, plan, false);
}

template <class E>
Grads tiles_backward(const Tensors& dys, const Tensors& hs, const Call& call, const Tensor& rows, const Plan& plan,
                     const Needs& needs) {
  const size_t members = call.members.size();
  const Mask mask = mask_of(call);
  const std::vector<float> gates = total_gates(call, plan);
  Grads grads(needs.all.size());
  Tensor dx = at::empty({plan.T, call.D()}, kDtype<E>);
  Tensors ss = empty_ranks<E>(call, plan), drows, dgates, likes;
  std::vector<Experts> keep;
  std::vector<Expand<E>> expands;
  for (size_t m = 0; m < members; ++m) {
    const Member& member = call.members[m];
    const Source a = keep.emplace_back(member.lora_a, plan).panels(true);
    const Source b = keep.emplace_back(member.lora_b, plan).panels(true);
    drows.push_back(as_rows<E>(dys[m])), dgates.push_back(at::empty({plan.T, call.K()}, at::kFloat));
    const Tensor panels = shrink_panels<E>(b, call, plan, member.F()), kept = hs[m].to(kDtype<E>).contiguous();
    Tensor kept_s = at::empty_like(ss[m]);
    auto job = shrink_job<E>(drows[m], panels, call, plan, gates, ss[m]);
    job.kept = data<E>(kept), job.kept_s = mutable_data<E>(kept_s), job.dgates = mutable_data<float>(dgates[m]);
    run(&job, 1, plan);
    if (needs.b(m)) grads[2 + members + m] = sum<E>(drows[m], {kept_s}, call, plan, {}, {member.lora_b}, false)[0];
    expands.push_back(expand_job<E>(drows[m], source(member.weight, false), a, ss[m], call, plan, dx));
    expands[m].mask = mask;
    likes.push_back(member.lora_a);
  }
  if (needs.x()) {
    run(expands, plan, true);
    grads[0] = dx.to(call.x.scalar_type()).view(call.x.sizes());
  }
  if (needs.any_a()) {
    const Tensors das = sum<E>(rows, ss, call, plan, mask, likes, true);
    for (size_t m = 0; m < members; ++m)
      if (needs.a(m)) grads[2 + m] = das[m];
  }
  if (needs.gates()) grads[1] = sum_gates(dgates, call, plan);
  return grads;
}

#define INSTANTIATE(E)                                                                              \
  template void tiles_forward<E>(const Call&, const Tensor&, const Plan&, Tensors&, Tensors&);      \
  template Grads tiles_backward<E>(const Tensors&, const Tensors&, const Call&, const Tensor&, const Plan&, const Needs&);
INSTANTIATE(bf16)
INSTANTIATE(float)
#undef INSTANTIATE

}  // namespace moe_lora
