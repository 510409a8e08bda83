// One call of the forward or the backward: its tensors, as in ops.py, and what the kernels take of them.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "plan.h"

namespace moe_lora {

using at::Tensor;
using Tensors = std::vector<Tensor>;
using Grads = std::vector<std::optional<Tensor>>;

struct Member {
  Tensor weight;
  std::optional<Tensor> bias;
  Tensor lora_a, lora_b;

  int64_t F() const { return weight.size(0); }
};

struct Call {  // the plan and the parameters; members share x, E and R
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

struct Needs {  // which gradients: of x, the gates, each A, each B
  std::vector<bool> all;
  size_t members;

  bool x() const { return all[0]; }
  bool gates() const { return all[1]; }
  bool a(size_t m) const { return all[2 + m]; }
  bool b(size_t m) const { return all[2 + members + m]; }
  bool any_a() const { return std::find(all.begin() + 2, all.begin() + 2 + members, true) < all.begin() + 2 + members; }
};

// The two forms of the forward and the backward, on at least one row [T, D] and for each E that there are kernels of.
constexpr int64_t kFewRows = 64;
bool few(const Call& call, int64_t T);
template <class E>
void few_forward(const Call& call, const Tensor& rows, const Plan& plan, Tensors& ys, Tensors& hs);
template <class E>
void tiles_forward(const Call& call, const Tensor& rows, const Plan& plan, Tensors& ys, Tensors& hs);
template <class E>
Grads tiles_backward(const Tensors& dys, const Tensors& hs, const Call& call, const Tensor& rows, const Plan& plan,
                     const Needs& needs);

// The scale of everything low-rank, with that of the elements which dropout keeps.
float scale_of(const Call& call);

// [N, K]: that scale times all that an instance gives to each pick's expert
std::vector<float> total_gates(const Call& call, const Plan& plan);

Mask mask_of(const Call& call);

std::shared_ptr<const Plan> plan_of(const Call& call, int64_t T);

// Columns along the dimension that is not summed over; the last one is if `sum_last`.
Source source(const Tensor& p, bool sum_last, const int32_t* used = nullptr);

// The experts in use of a parameter: all, read where they lie, or a copy of those if its layout or dtype has no kernel.
class Experts {
 public:
  Experts(const Tensor& p, const Plan& plan, bool last_adjacent = false);
  Source panels(bool sum_last) const { return source(tensor, sum_last, used); }

 private:
  Tensor tensor;
  const int32_t* used;
};

template <class E>
constexpr at::ScalarType kDtype = sizeof(E) == 2 ? at::kBFloat16 : at::kFloat;

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// Rows of E with adjacent elements.
template <class E>
Tensor as_rows(const Tensor& x) {
  Tensor rows = x.reshape({-1, x.size(-1)}).to(kDtype<E>);
  return rows.stride(1) == 1 || rows.size(1) == 1 ? rows : rows.contiguous();
}

}  // namespace moe_lora
