// The forward and the backward of many rows: one shrink, one expand, and in the backward two sums over each expert's rows.
#include <utility>

#include "call.h"
#include "round.h"
#include "threads.h"

namespace moe_lora {
namespace {

template <class E>
int64_t whole(int64_t n) {
  const int64_t unit = kernels<E>().whole;
  return (n + unit - 1) / unit * unit;
}

template <class E>
struct Rows {  // a matrix with adjacent elements in a row
  const E* data;
  int64_t stride, columns;
};

template <class E>
Rows<E> rows_of(const moe_lora_rows& rows, int64_t columns) {
  return {static_cast<const E*>(rows.data), rows.stride, columns};
}

// Panels of the experts' columns, for a shrink.
template <class E>
Buffer<uint32_t> shrink_panels(const Source& from, const Call& call, const Plan& plan, int64_t depth) {
  const int64_t groups = (call.R + kLanes - 1) / kLanes, words = whole<E>(depth) * int64_t(sizeof(E)) / 4;
  const auto used = int64_t(plan.used.size());
  Buffer<uint32_t> panels(used * groups * words * kLanes);
  each(used * groups, [&](int64_t i) {
    const int64_t first = i % groups * kLanes, columns = std::min<int64_t>(kLanes, call.R - first);
    kernels<E>().pack(from, int(i / groups), first, columns, depth, panels.data() + i * words * kLanes);
  });
  return panels;
}

template <class E>
Shrink<E> shrink_job(const Rows<E>& rows, const Buffer<uint32_t>& panels, const Call& call, const Plan& plan,
                     const std::vector<float>& gates, const Buffer<E>& s) {
  Shrink<E> job{};
  job.rows = rows.data, job.stride = rows.stride, job.D = rows.columns;
  job.panels = panels.data(), job.groups = int((call.R + kLanes - 1) / kLanes), job.R = int(call.R);
  job.used = int(plan.used.size()), job.routes = plan.routes(), job.gates = gates.data();
  job.s = s.data();
  return job;
}

// Room for rows as tile instructions take them, which the shrink fills; none for other kernels.
template <class E>
Buffer<uint32_t> empty_tiles(const Plan& plan, int64_t depth) {
  const bool any = kernels<E>().lays_rows;
  return Buffer<uint32_t>(any ? int64_t(plan.tiles.size()) * plan.size * whole<E>(depth) * int64_t(sizeof(E)) / 4 : 0);
}

template <class E>
Buffer<E> empty_ranks(const Call& call, const Plan& plan) {
  return Buffer<E>(plan.T * plan.K * whole<E>(call.R));
}

template <class E>
void run(const Shrink<E>* jobs, int members, const Plan& plan) {
  const int64_t tiles = plan.tiles.size(), chunk = kernels<E>().chunk;
  const int64_t rounds = (tiles + chunk * threads() - 1) / (chunk * threads());
  const int64_t chunks = std::min(tiles, rounds * threads());  // at most `chunk` tiles each, as many for each thread
  each(chunks, [&](int64_t i) { kernels<E>().shrink(jobs, members, i * tiles / chunks, (i + 1) * tiles / chunks); });
}

// rows · weight + s · lora, to be added up or written to `out` [T, columns]
template <class E>
Expand<E> expand_job(const Rows<E>& rows, const Source& weight, const Source& lora, const Buffer<E>& s, const Call& call,
                     const Plan& plan, void* out, int64_t columns) {
  Expand<E> job{};
  job.rows = rows.data, job.stride = rows.stride, job.D = rows.columns;
  job.weight = weight, job.lora = lora, job.used = int(plan.used.size()), job.R = int(call.R);
  job.s = s.data(), job.routes = plan.routes();
  job.out = static_cast<E*>(out), job.out_stride = job.columns = columns;
  return job;
}

// `summed`: one sum of all jobs; else each for itself.
template <class E>
void run(const std::vector<Expand<E>>& jobs, const Plan& plan, bool summed) {
  const int members = summed ? int(jobs.size()) : 1;
  std::vector<std::pair<const Expand<E>*, int64_t>> panels;  // and their first column
  for (const Expand<E>* job = jobs.data(); job < jobs.data() + jobs.size(); job += members)
    for (int64_t first = 0; first < job->columns; first += kernels<E>().columns) panels.emplace_back(job, first);
  if (panels.empty()) return;
  // Few panels are cut by rows, but each part packs the panel: not more parts than threads, nor less than a
  // chunk of tiles each.
  const int64_t chunk = kernels<E>().chunk, count = panels.size(), tiles = plan.tiles.size();
  const int64_t wanted = (4 * threads() + count - 1) / count;
  const int64_t parts = std::min({wanted, threads(), (tiles + chunk - 1) / chunk});
  each(count * parts, [&](int64_t i) {
    const auto [job, first] = panels[i / parts];
    const int64_t part = i % parts;
    kernels<E>().expand(job, members, first, part * tiles / parts, (part + 1) * tiles / parts);
  });
}

// Where the sums of one parameter's experts in use go: to the gradient itself, if it is made of just those floats, else to
// memory that write() rounds from.
class Sums {
 public:
  Sums(const moe_lora_gradient& gradient, const Plan& plan, int64_t size)
      : gradient(gradient), plan(plan), size(size), own(in_place() ? 0 : int64_t(plan.used.size()) * size) {}
  float* data() const { return in_place() ? static_cast<float*>(gradient.data) : own.data(); }

  void write() const {
    switch (in_place() ? -1 : gradient.dtype) {
      case MOE_LORA_FLOAT: return write_to(static_cast<float*>(gradient.data));
      case MOE_LORA_BF16: return write_to(static_cast<bf16*>(gradient.data));
      case MOE_LORA_DOUBLE: return write_to(static_cast<double*>(gradient.data));
    }
  }

 private:
  bool in_place() const { return gradient.dtype == MOE_LORA_FLOAT && int64_t(plan.used.size()) == plan.E; }

  template <class G>
  void write_to(G* to) const {
    std::vector<int64_t> number(plan.E, -1);
    for (size_t u = 0; u < plan.used.size(); ++u) number[plan.used[u]] = int64_t(u);
    runs(plan.E, [&](int64_t e) {
      if (number[e] < 0)
        std::memset(static_cast<void*>(to + e * size), 0, size * sizeof(G));
      else
        round_to(own.data() + number[e] * size, size, to + e * size);
    });
  }

  moe_lora_gradient gradient;
  const Plan& plan;
  int64_t size;
  Buffer<float> own;
};

template <class E>
Sum<E> sum_job(const Rows<E>& rows, const Buffer<E>& s, const Call& call, const Plan& plan, const Sums& sums) {
  Sum<E> job{};
  job.rows = rows.data, job.stride = rows.stride, job.columns = rows.columns;
  job.s = s.data(), job.R = int(call.R), job.routes = plan.routes(), job.out = sums.data();
  return job;
}

// Σ over each expert's rows of sᵀ · rows, of jobs that share the rows
template <class E>
void run(const std::vector<Sum<E>>& jobs, const Plan& plan) {
  if (jobs.empty()) return;
  const int64_t panels = (jobs[0].columns + kColumns - 1) / kColumns;
  each(int64_t(plan.used.size()) * panels, [&](int64_t i) {
    kernels<E>().sum(jobs.data(), int(jobs.size()), int(i / panels), i % panels * kColumns);
  });
}

// out [N, K] += each row's [T, K], in the rows' order
void sum_gates(const float* dgates, const Plan& plan, double* out) {
  for (int64_t t = 0, K = plan.K; t < plan.T; ++t)
    for (int64_t k = 0; k < K; ++k) out[plan.instance[t] * K + k] += dgates[t * K + k];
}

void write_gates(const std::vector<double>& sums, const Call& call, const moe_lora_gradient& gradient) {
  const float scale = scale_of(call);
  for (size_t i = 0; i < sums.size(); ++i) {
    const double sum = sums[i] * scale;
    if (gradient.dtype == MOE_LORA_DOUBLE)
      static_cast<double*>(gradient.data)[i] = sum;
    else if (gradient.dtype == MOE_LORA_FLOAT)
      static_cast<float*>(gradient.data)[i] = float(sum);
    else
      static_cast<bf16*>(gradient.data)[i] = as_bf16(float(sum));
  }
}

// The gradients of all members' A, which share the rows.
template <class E>
void sum_a(const Call& call, const Plan& plan, const std::vector<Buffer<E>>& ss, const Mask& mask,
           const moe_lora_gradient* das) {
  std::vector<Sums> sums;
  std::vector<Sum<E>> jobs;
  for (int64_t m = 0; m < call.count; ++m) {
    if (!das[m].data) continue;
    sums.emplace_back(das[m], plan, call.D * call.R);
    jobs.push_back(sum_job(rows_of<E>(call.x, call.D), ss[m], call, plan, sums.back()));
    jobs.back().mask = mask, jobs.back().across = true;
  }
  run(jobs, plan);
  for (const Sums& own : sums) own.write();
}

}  // namespace

template <class E>
void tiles_forward(const Call& call, const Plan& plan, void* const* ys, void* const* hs) {
  const Rows<E> rows = rows_of<E>(call.x, call.D);
  const std::vector<float> gates = total_gates(call, plan);
  const Buffer<uint32_t> tiles = empty_tiles<E>(plan, call.D);
  std::vector<Buffer<E>> ss;
  std::vector<Buffer<uint32_t>> panels;
  std::vector<Shrink<E>> shrinks;
  std::vector<Expand<E>> expands;
  for (int64_t m = 0; m < call.count; ++m) {
    const Member& member = call.members[m];
    const Source a = source(member.lora_a, false, plan), b = source(member.lora_b, false, plan);
    ss.push_back(empty_ranks<E>(call, plan)), panels.push_back(shrink_panels<E>(a, call, plan, call.D));
    shrinks.push_back(shrink_job(rows, panels[m], call, plan, gates, ss[m]));
    shrinks[m].tiles = tiles.data();
    shrinks[m].h = static_cast<E*>(hs[m]), shrinks[m].mask = mask_of(call);
    expands.push_back(expand_job(rows, source(member.weight, true), b, ss[m], call, plan, ys[m], member.F));
    expands[m].tiles = tiles.data();
    expands[m].bias = static_cast<const E*>(member.bias);
  }
  run(shrinks.data(), int(shrinks.size()), plan);
  run(expands, plan, false);
}

template <class E>
void tiles_backward(const Call& call, const Plan& plan, const moe_lora_rows* dys, const void* const* hs,
                    const Grads& grads) {
  const Mask mask = mask_of(call);
  const std::vector<float> gates = total_gates(call, plan);
  std::vector<double> gate_sums(call.routing.N * plan.K);
  const Buffer<float> dgates(plan.T * plan.K);
  std::vector<Buffer<E>> ss;
  std::vector<Buffer<uint32_t>> tiles;
  std::vector<Expand<E>> expands;
  for (int64_t m = 0; m < call.count; ++m) {
    const Member& member = call.members[m];
    const Rows<E> drows = rows_of<E>(dys[m], member.F);
    const Source a = source(member.lora_a, true, plan), b = source(member.lora_b, true, plan);
    const Buffer<uint32_t> panels = shrink_panels<E>(b, call, plan, member.F);
    const Buffer<E> kept_s = empty_ranks<E>(call, plan);
    ss.push_back(empty_ranks<E>(call, plan)), tiles.push_back(empty_tiles<E>(plan, member.F));
    auto job = shrink_job(drows, panels, call, plan, gates, ss[m]);
    job.tiles = tiles[m].data();
    job.kept = static_cast<const E*>(hs[m]), job.kept_s = kept_s.data(), job.dgates = dgates.data();
    run(&job, 1, plan);
    sum_gates(dgates.data(), plan, gate_sums.data());
    if (grads.dbs[m].data) {
      const Sums sums(grads.dbs[m], plan, call.R * member.F);
      run<E>({sum_job(drows, kept_s, call, plan, sums)}, plan);
      sums.write();
    }
    expands.push_back(expand_job(drows, source(member.weight, false), a, ss[m], call, plan, grads.dx, call.D));
    expands[m].tiles = tiles[m].data(), expands[m].mask = mask;
  }
  if (grads.dx) run(expands, plan, true);
  if (grads.dgates.data) write_gates(gate_sums, call, grads.dgates);
  sum_a(call, plan, ss, mask, grads.das);
}

#define INSTANTIATE(E)                                                                      \
  template void tiles_forward<E>(const Call&, const Plan&, void* const*, void* const*);     \
  template void tiles_backward<E>(const Call&, const Plan&, const moe_lora_rows*, const void* const*, const Grads&);
INSTANTIATE(bf16)
INSTANTIATE(float)
#undef INSTANTIATE

}  // namespace moe_lora
