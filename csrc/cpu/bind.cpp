// moe_lora._C: moe_lora.h for Python. Pointers, strides and dtypes of tensors are read through the tensors' own methods,
// which every version of torch has; moe_lora/backend/cpu.py allocates what is written.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "moe_lora.h"

namespace py = pybind11;

namespace {

enum { kInt32 = MOE_LORA_DOUBLE + 1, kDtypes, kOther = kDtypes };

PyObject *data_ptr_name, *stride_name, *shape_name, *dtype_name;  // interned
PyObject* dtypes[kDtypes];                                        // torch's, at their codes

py::object checked(PyObject* object) {
  if (!object) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(object);
}

int64_t integer(PyObject* object) {
  const int64_t value = PyLong_AsLongLong(object);
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

void* data(py::handle tensor) {
  if (tensor.is_none()) return nullptr;
  return reinterpret_cast<void*>(integer(checked(PyObject_CallMethodNoArgs(tensor.ptr(), data_ptr_name)).ptr()));
}

int64_t dtype(py::handle tensor) {
  const py::object own = checked(PyObject_GetAttr(tensor.ptr(), dtype_name));
  return std::find(dtypes, dtypes + kDtypes, own.ptr()) - dtypes;
}

template <size_t n>
void read_integers(const py::object& tuple, int64_t (&to)[n]) {
  if (!PyTuple_Check(tuple.ptr()) || size_t(PyTuple_GET_SIZE(tuple.ptr())) != n)
    throw py::value_error("a tensor of " + std::to_string(n) + " dimensions is needed");
  for (size_t i = 0; i < n; ++i) to[i] = integer(PyTuple_GET_ITEM(tuple.ptr(), i));
}

template <size_t n>
void read_strides(py::handle tensor, int64_t (&to)[n]) {
  read_integers(checked(PyObject_CallMethodNoArgs(tensor.ptr(), stride_name)), to);
}

template <size_t n>
void read_shape(py::handle tensor, int64_t (&to)[n]) {
  read_integers(checked(PyObject_GetAttr(tensor.ptr(), shape_name)), to);
}

moe_lora_rows rows(const py::tuple& tuple) {  // a tensor that holds them, their number, their distance
  return {data(tuple[0]), integer(py::handle(tuple[2]).ptr())};
}

template <class T>
std::vector<T*> pointers(const py::sequence& tensors) {
  std::vector<T*> all;
  for (py::handle tensor : tensors) all.push_back(static_cast<T*>(data(tensor)));
  return all;
}

std::vector<moe_lora_gradient> gradients(const py::sequence& tensors) {
  std::vector<moe_lora_gradient> all;
  for (py::handle tensor : tensors) all.push_back({data(tensor), tensor.is_none() ? 0 : dtype(tensor)});
  return all;
}

void raise(const char* error) {
  if (error) throw std::runtime_error(error);
}

// `plan` is routing.py's Plan: experts, gates, offsets, scale, dropout, seed.
moe_lora_routing routing(const py::tuple& plan, int64_t E, int64_t T) {
  const py::object experts = plan[0], offsets = plan[2];
  if (dtype(experts) != kInt32 || (!offsets.is_none() && dtype(offsets) != kInt32))
    throw py::type_error("experts and offsets must be int32");
  moe_lora_routing to{};
  int64_t shape[2];
  read_shape(experts, shape), read_strides(experts, to.expert_strides);
  to.experts = static_cast<const int32_t*>(data(experts)), to.offsets = static_cast<const int32_t*>(data(offsets));
  to.N = shape[0], to.K = shape[1], to.E = E, to.T = T;
  return to;
}

// A call, and whether the kernels can read all of its tensors where they lie.
struct Call {
  std::vector<moe_lora_member> members;
  moe_lora_call call{};
  bool readable = true;

  Call(int64_t dtype_code, int64_t threads, const py::tuple& x, const py::sequence& weights, const py::object& biases,
       const py::sequence& lora_as, const py::sequence& lora_bs, bool only_used, const py::tuple& plan, int64_t seed,
       bool last_adjacent) {
    int64_t shape[3];
    read_shape(lora_as[0], shape);
    call.dtype = dtype_code, call.threads = threads;
    call.x = rows(x), call.D = shape[1], call.R = shape[2];
    const size_t count = weights.size();
    if (lora_as.size() != count || lora_bs.size() != count || (!biases.is_none() && py::len(biases) != count))
      throw py::value_error("each member needs a weight, a bias or None, lora_a and lora_b");
    for (size_t m = 0; m < count; ++m) {
      const py::object bias = biases.is_none() ? py::none() : py::object(py::sequence(biases)[m]);
      members.push_back({});
      read_base(weights[m], bias, last_adjacent, members.back());
      members.back().lora_a = experts(lora_as[m], only_used, last_adjacent);
      members.back().lora_b = experts(lora_bs[m], only_used, last_adjacent);
    }
    call.members = members.data(), call.count = int64_t(count);
    call.routing = routing(plan, integer(py::handle(x[3]).ptr()), integer(py::handle(x[1]).ptr()));
    const py::object gates = plan[1];
    call.gates = static_cast<const float*>(data(gates));
    read_strides(gates, call.gate_strides);
    if (dtype(gates) != MOE_LORA_FLOAT) readable = false;
    call.scale = plan[3].cast<double>(), call.dropout = plan[4].cast<double>(), call.seed = seed;
  }

 private:
  void read_base(const py::object& weight, const py::object& bias, bool last_adjacent, moe_lora_member& to) {
    int64_t shape[2], stride[1] = {1};
    read_shape(weight, shape), read_strides(weight, to.weight.strides);
    to.F = shape[0], to.weight.data = data(weight), to.weight.dtype = dtype(weight), to.bias = data(bias);
    const bool adjacent = to.weight.strides[1] == 1 || (to.weight.strides[0] == 1 && !last_adjacent);
    if (!bias.is_none()) read_strides(bias, stride);
    const bool fits = bias.is_none() || (dtype(bias) == call.dtype && stride[0] == 1);
    if (!adjacent || to.weight.dtype > MOE_LORA_FP16 || !fits) readable = false;
  }

  moe_lora_experts experts(const py::object& parameter, bool only_used, bool last_adjacent) {
    moe_lora_experts to{};
    to.data = data(parameter), to.dtype = dtype(parameter), to.only_used = only_used;
    read_strides(parameter, to.strides);
    const bool adjacent = to.strides[2] == 1 || (to.strides[1] == 1 && !last_adjacent);
    if (!adjacent || to.dtype > MOE_LORA_FP16) readable = false;
    return to;
  }
};

// These return false, having done nothing, if a parameter's dtype or layout is none that the kernels read.
bool forward(int64_t dtype_code, int64_t threads, const py::tuple& x, const py::sequence& weights,
             const py::object& biases, const py::sequence& lora_as, const py::sequence& lora_bs, bool only_used,
             const py::tuple& plan, int64_t seed, int form, const py::sequence& ys, const py::sequence& hs) {
  const bool few = form == MOE_LORA_FEW_ROWS;
  const Call own(dtype_code, threads, x, weights, biases, lora_as, lora_bs, only_used, plan, seed, few);
  if (!own.readable) return false;
  const auto y = pointers<void>(ys), h = pointers<void>(hs);
  if (y.size() != own.members.size() || h.size() != own.members.size())
    throw py::value_error("each member needs y and h");
  const py::gil_scoped_release release;
  raise(moe_lora_forward(&own.call, form, y.data(), h.data()));
  return true;
}

bool backward(int64_t dtype_code, int64_t threads, const py::tuple& x, const py::sequence& weights,
              const py::sequence& lora_as, const py::sequence& lora_bs, bool only_used, const py::tuple& plan,
              int64_t seed, const py::sequence& dys, const py::sequence& hs, const py::object& dx,
              const py::object& dgates, const py::sequence& das, const py::sequence& dbs) {
  const Call own(dtype_code, threads, x, weights, py::none(), lora_as, lora_bs, only_used, plan, seed, false);
  if (!own.readable) return false;
  std::vector<moe_lora_rows> dy;
  for (py::handle tuple : dys) dy.push_back(rows(py::reinterpret_borrow<py::tuple>(tuple)));
  const auto h = pointers<const void>(hs);
  const auto da = gradients(das), db = gradients(dbs);
  const moe_lora_gradient gates{data(dgates), dgates.is_none() ? 0 : dtype(dgates)};
  for (size_t size : {dy.size(), h.size(), da.size(), db.size()})
    if (size != own.members.size()) throw py::value_error("each member needs dy, h, dA and dB");
  void* const dx_data = data(dx);
  const py::gil_scoped_release release;
  raise(moe_lora_backward(&own.call, dy.data(), h.data(), dx_data, gates, da.data(), db.data()));
  return true;
}

std::vector<int32_t> used(const py::tuple& plan, int64_t E, int64_t T) {
  const moe_lora_routing all = routing(plan, E, T);
  std::vector<int32_t> numbers(std::min(all.E, all.N * all.K));
  int64_t count = 0;
  raise(moe_lora_used(&all, numbers.data(), &count));
  numbers.resize(count);
  return numbers;
}

std::vector<std::string> all_instructions() {
  std::vector<std::string> names;
  for (int i = 0; const char* name = moe_lora_instruction_set(i); ++i) names.emplace_back(name);
  return names;
}

void set_dtypes(py::object float32, py::object bfloat16, py::object float16, py::object float64, py::object int32) {
  PyObject* all[kDtypes] = {};
  all[MOE_LORA_FLOAT] = float32.ptr(), all[MOE_LORA_BF16] = bfloat16.ptr(), all[MOE_LORA_FP16] = float16.ptr();
  all[MOE_LORA_DOUBLE] = float64.ptr(), all[kInt32] = int32.ptr();
  for (int i = 0; i < kDtypes; ++i) Py_INCREF(all[i]), dtypes[i] = all[i];
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  using release = py::call_guard<py::gil_scoped_release>;
  data_ptr_name = PyUnicode_InternFromString("data_ptr"), stride_name = PyUnicode_InternFromString("stride");
  shape_name = PyUnicode_InternFromString("shape"), dtype_name = PyUnicode_InternFromString("dtype");
  m.def("set_dtypes", &set_dtypes);
  m.def("forward", &forward);
  m.def("backward", &backward);
  m.def("used", &used);
  m.attr("INTERFACE") = int(MOE_LORA_INTERFACE);
  m.attr("FLOAT") = int(MOE_LORA_FLOAT);
  m.attr("BF16") = int(MOE_LORA_BF16);
  m.attr("TILES") = int(MOE_LORA_TILES);
  m.attr("FEW_ROWS") = int(MOE_LORA_FEW_ROWS);
  m.attr("few_rows") = moe_lora_few_rows();
  m.def("threads", &moe_lora_threads, py::arg("limit"), release());
  m.def("instructions", &moe_lora_instructions);
  m.def("has_bf16", [] { return moe_lora_has_bf16() != 0; });
  m.def("all_instructions", &all_instructions);
  m.def("use_instructions", [](const std::string& name) { raise(moe_lora_use_instructions(name.c_str())); });
}
