// The forward of few rows: the base reads the weight once, where it lies.
#include <ATen/ops/from_blob.h>
#include <ATen/ops/zeros.h>

#include <cstring>
#include <utility>

#include "call.h"
#include "threads.h"

namespace moe_lora {
namespace {

// The rows as Few::packed.
template <class E>
Tensor packed_rows(const Tensor& rows) {
  const int64_t T = rows.size(0), D = rows.size(1), wide = 64 / sizeof(E), words = (D + wide - 1) / wide * kLanes;
  const bool dots = T <= kernels<E>().dots;
  const int64_t panels = (T + kLanes - 1) / kLanes;
  Tensor packed = at::zeros({dots ? T : panels * kLanes, words}, at::kInt);
  auto* out = mutable_data<uint32_t>(packed);
  if (dots) {
    for (int64_t d = 0; d < D; d += wide)
      for (int64_t t = 0; t < T; ++t, out += kLanes)
        std::memcpy(out, data<E>(rows) + t * rows.stride(0) + d, std::min(wide, D - d) * sizeof(E));
    return packed;
  }
  const Source all{{data<E>(rows), rows.stride(0), sizeof(E) == 2 ? Kind::kBf16 : Kind::kFloat}, 0, true, nullptr};
  runs(panels, [&](int64_t i) {
    kernels<E>().pack(all, 0, i * kLanes, std::min<int64_t>(kLanes, T - i * kLanes), D, out + i * kLanes * words);
  });
  return packed;
}

// From z [T, K, R] by places to h by picks; then s = gates · z, in its place.
void fold(const Call& call, const Plan& plan, const std::vector<float>& gates, float* z, Tensor& h) {
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

}  // namespace

bool few(const Call& call, int64_t T) {
  const auto adjacent = [](const Member& member) { return member.weight.stride(1) == 1; };
  return T <= kFewRows && !call.dropout && std::all_of(call.members.begin(), call.members.end(), adjacent);
}

template <class E>
void few_forward(const Call& call, const Tensor& rows, const Plan& plan, Tensors& ys, Tensors& hs) {
  const int64_t T = rows.size(0), D = call.D(), splits = (D + kSplit - 1) / kSplit, size = T * call.K() * call.R();
  const auto members = int64_t(call.members.size()), used = int64_t(plan.used.size());
  std::vector<float> z(members * splits * size);
  std::vector<Few<E>> jobs;
  std::vector<Experts> keep;
  std::vector<std::pair<int64_t, int64_t>> tasks;  // member and first column
  const Tensor packed = packed_rows<E>(rows);
  for (int64_t m = 0; m < members; ++m) {
    const Member& member = call.members[m];
    Few<E> job{};
    job.rows = data<E>(rows), job.stride = rows.stride(0), job.T = int(T), job.D = D, job.F = member.F();
    job.packed = data<uint32_t>(packed), job.words = packed.size(1);
    job.weight = source(member.weight, true).matrix;
    job.bias = member.bias ? data<E>(*member.bias) : nullptr;
    job.lora_a = keep.emplace_back(member.lora_a, plan, true).panels(false);
    job.lora_b = keep.emplace_back(member.lora_b, plan, true).panels(false);
    job.routes = plan.routes(), job.used = int(used), job.R = call.R();
    job.out = mutable_data<E>(ys[m]), job.s = job.z = z.data() + m * splits * size;
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
    fold(call, plan, gates, sum, hs[m]);
  }
  runs(int64_t(tasks.size()), [&](int64_t i) { kernels<E>().few_rows(jobs[tasks[i].first], tasks[i].second); });
}

template void few_forward<bf16>(const Call&, const Tensor&, const Plan&, Tensors&, Tensors&);
template void few_forward<float>(const Call&, const Tensor&, const Plan&, Tensors&, Tensors&);

}  // namespace moe_lora
