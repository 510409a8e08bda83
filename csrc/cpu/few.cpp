// The forward of few rows: the base reads the weight once, where it lies.
#include <cstring>
#include <utility>

#include "call.h"
#include "round.h"
#include "threads.h"

namespace moe_lora {
namespace {

// The rows as Few::packed, and the words of one.
template <class E>
struct Packed {
  int64_t words;
  Buffer<uint32_t> buffer;

  explicit Packed(const Call& call) : words(words_of(call.D)), buffer(size(call)) {
    const int64_t T = call.routing.T, D = call.D, panels = (T + kLanes - 1) / kLanes;
    const E* rows = static_cast<const E*>(call.x.data);
    uint32_t* out = buffer.data();
    if (T <= kernels<E>().dots) {
      std::memset(out, 0, T * words * sizeof(uint32_t));
      for (int64_t d = 0; d < D; d += kWide)
        for (int64_t t = 0; t < T; ++t, out += kLanes)
          std::memcpy(out, rows + t * call.x.stride + d, std::min(kWide, D - d) * sizeof(E));
      return;
    }
    std::memset(out, 0, panels * kLanes * words * sizeof(uint32_t));
    const Source all{{rows, call.x.stride, sizeof(E) == 2 ? Kind::kBf16 : Kind::kFloat}, 0, true, nullptr};
    runs(panels, [&](int64_t i) {
      kernels<E>().pack(all, 0, i * kLanes, std::min<int64_t>(kLanes, T - i * kLanes), D, out + i * kLanes * words);
    });
  }

 private:
  static constexpr int64_t kWide = 64 / sizeof(E);
  static int64_t words_of(int64_t D) { return (D + kWide - 1) / kWide * kLanes; }
  static int64_t size(const Call& call) {
    const int64_t T = call.routing.T;
    return (T <= kernels<E>().dots ? T : (T + kLanes - 1) / kLanes * kLanes) * words_of(call.D);
  }
};

// From z [T, K, R] by places to h by picks; then s = gates · z, in its place.
template <class E>
void fold(const Call& call, const Plan& plan, const std::vector<float>& gates, float* z, E* h) {
  const int64_t T = plan.T, K = plan.K, R = call.R;
  std::vector<float> picks(T * K * R);
  for (int64_t t = 0; t < T; ++t)
    for (int64_t k = 0; k < K; ++k)
      std::copy_n(z + (t * K + plan.places[plan.instance[t] * K + k]) * R, R, picks.data() + (t * K + k) * R);
  round_to(picks.data(), T * K * R, h);
  for (int64_t t = 0; t < T; ++t)
    for (int64_t k = 0; k < K; ++k) {
      const float gate = gates[plan.instance[t] * K + k], *from = picks.data() + (t * K + k) * R;
      float* to = z + (t * K + plan.places[plan.instance[t] * K + k]) * R;
      std::transform(from, from + R, to, [=](float value) { return gate * value; });
    }
}

}  // namespace

template <class E>
void few_forward(const Call& call, const Plan& plan, void* const* ys, void* const* hs) {
  const int64_t T = plan.T, D = call.D, splits = (D + kSplit - 1) / kSplit, size = T * plan.K * call.R;
  const int64_t members = call.count, used = int64_t(plan.used.size());
  std::vector<float> z(members * splits * size);
  std::vector<Few<E>> jobs;
  std::vector<std::pair<int64_t, int64_t>> tasks;  // member and first column
  const Packed<E> packed(call);
  for (int64_t m = 0; m < members; ++m) {
    const Member& member = call.members[m];
    Few<E> job{};
    job.rows = static_cast<const E*>(call.x.data), job.stride = call.x.stride;
    job.T = int(T), job.D = D, job.F = member.F, job.R = int(call.R);
    job.packed = packed.buffer.data(), job.words = packed.words;
    job.weight = source(member.weight, true).matrix, job.bias = static_cast<const E*>(member.bias);
    job.lora_a = source(member.lora_a, false, plan), job.lora_b = source(member.lora_b, false, plan);
    job.routes = plan.routes(), job.used = int(used);
    job.out = static_cast<E*>(ys[m]), job.s = job.z = z.data() + m * splits * size;
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
    fold(call, plan, gates, sum, static_cast<E*>(hs[m]));
  }
  runs(int64_t(tasks.size()), [&](int64_t i) { kernels<E>().few_rows(jobs[tasks[i].first], tasks[i].second); });
}

template void few_forward<bf16>(const Call&, const Plan&, void* const*, void* const*);
template void few_forward<float>(const Call&, const Plan&, void* const*, void* const*);

}  // namespace moe_lora
