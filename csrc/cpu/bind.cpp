// moe_lora._C: moe_lora.h for Python. Tensors come as tuples of integers; moe_lora/backend/cpu.py makes them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "moe_lora.h"

namespace py = pybind11;

namespace {

// Reads the integers of a tuple one after the other.
class Reader {
 public:
  explicit Reader(const py::handle& tuple) : tuple(tuple.ptr()) {
    if (!PyTuple_Check(this->tuple)) throw py::type_error("a tuple of integers is needed");
  }
  int64_t number() {
    if (next >= PyTuple_GET_SIZE(tuple)) throw py::value_error("a tuple of integers is too short");
    const int64_t value = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, next++));
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
    return value;
  }
  template <class T>
  T* pointer() {
    return reinterpret_cast<T*>(number());
  }
  void end() const {
    if (next != PyTuple_GET_SIZE(tuple)) throw py::value_error("a tuple of integers is too long");
  }

 private:
  PyObject* tuple;
  Py_ssize_t next = 0;
};

moe_lora_experts experts(Reader& from) {
  moe_lora_experts to{};
  to.data = from.pointer<const void>();
  for (int64_t& stride : to.strides) stride = from.number();
  to.dtype = from.number(), to.only_used = from.number();
  return to;
}

moe_lora_member member(const py::handle& tuple) {
  Reader from(tuple);
  moe_lora_member to{};
  to.F = from.number(), to.weight.data = from.pointer<const void>();
  for (int64_t& stride : to.weight.strides) stride = from.number();
  to.weight.dtype = from.number(), to.bias = from.pointer<const void>();
  to.lora_a = experts(from), to.lora_b = experts(from);
  from.end();
  return to;
}

moe_lora_routing routing(const py::handle& tuple) {
  Reader from(tuple);
  moe_lora_routing to{};
  to.experts = from.pointer<const int32_t>();
  for (int64_t& stride : to.expert_strides) stride = from.number();
  to.offsets = from.pointer<const int32_t>();
  to.N = from.number(), to.K = from.number(), to.E = from.number(), to.T = from.number();
  from.end();
  return to;
}

template <class T>
std::vector<T*> pointers(const py::tuple& tuple) {
  std::vector<T*> all;
  Reader from(tuple);
  for (size_t i = 0; i < tuple.size(); ++i) all.push_back(from.pointer<T>());
  return all;
}

void raise(const char* error) {
  if (error) throw std::runtime_error(error);
}

// x: dtype, threads, data, stride, D, R; gates: data and two strides; numbers: scale, dropout, seed.
struct Call {
  std::vector<moe_lora_member> members;
  moe_lora_call call{};

  Call(const py::tuple& x, const py::tuple& all, const py::tuple& route, const py::tuple& gates, double scale,
       double dropout, int64_t seed) {
    Reader from(x), gate(gates);
    call.dtype = from.number(), call.threads = from.number();
    call.x.data = from.pointer<const void>(), call.x.stride = from.number();
    call.D = from.number(), call.R = from.number();
    from.end();
    for (const py::handle& tuple : all) members.push_back(member(tuple));
    call.members = members.data(), call.count = int64_t(members.size());
    call.routing = routing(route);
    call.gates = gate.pointer<const float>();
    for (int64_t& stride : call.gate_strides) stride = gate.number();
    gate.end();
    call.scale = scale, call.dropout = dropout, call.seed = seed;
  }

  void check(std::initializer_list<size_t> lengths) const {
    for (size_t length : lengths)
      if (length != members.size()) throw py::value_error("each member needs its own tensors");
  }
};

void forward(const py::tuple& x, const py::tuple& members, const py::tuple& route, const py::tuple& gates, double scale,
             double dropout, int64_t seed, int form, const py::tuple& ys, const py::tuple& hs) {
  const Call own(x, members, route, gates, scale, dropout, seed);
  own.check({ys.size(), hs.size()});
  const auto y = pointers<void>(ys), h = pointers<void>(hs);
  const py::gil_scoped_release release;
  raise(moe_lora_forward(&own.call, form, y.data(), h.data()));
}

void backward(const py::tuple& x, const py::tuple& members, const py::tuple& route, const py::tuple& gates, double scale,
              double dropout, int64_t seed, const py::tuple& dys, const py::tuple& hs, const py::tuple& dx_dgates,
              const py::tuple& das, const py::tuple& dbs) {
  const Call own(x, members, route, gates, scale, dropout, seed);
  own.check({dys.size(), hs.size(), das.size(), dbs.size()});
  std::vector<moe_lora_rows> dy;
  for (const py::handle& tuple : dys) {
    Reader from(tuple);
    const void* data = from.pointer<const void>();
    dy.push_back({data, from.number()});
  }
  Reader from(dx_dgates);
  void* dx = from.pointer<void>();
  auto* dgates = from.pointer<double>();
  const auto h = pointers<const void>(hs);
  const auto da = pointers<float>(das), db = pointers<float>(dbs);
  const py::gil_scoped_release release;
  raise(moe_lora_backward(&own.call, dy.data(), h.data(), dx, dgates, da.data(), db.data()));
}

std::vector<int32_t> used(const py::tuple& route) {
  const moe_lora_routing all = routing(route);
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

}  // namespace

PYBIND11_MODULE(_C, m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def("forward", &forward);
  m.def("backward", &backward);
  m.def("used", &used);
  m.attr("INTERFACE") = int(MOE_LORA_INTERFACE);
  m.attr("few_rows") = moe_lora_few_rows();
  m.attr("TILES") = int(MOE_LORA_TILES);
  m.attr("FEW_ROWS") = int(MOE_LORA_FEW_ROWS);
  m.def("threads", &moe_lora_threads, py::arg("limit"), release());
  m.def("instructions", &moe_lora_instructions);
  m.def("has_bf16", [] { return moe_lora_has_bf16() != 0; });
  m.def("all_instructions", &all_instructions);
  m.def("use_instructions", [](const std::string& name) { raise(moe_lora_use_instructions(name.c_str())); });
}
