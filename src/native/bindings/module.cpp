// The Python module: checks every array, releases the GIL, calls a kernel. A file a topic.

#include <nanobind/stl/vector.h>

#include "checks.h"

namespace requant::bindings {

void init_quantize(nb::module_& m);
void init_search(nb::module_& m);
void init_measure(nb::module_& m);
void init_gptq(nb::module_& m);
void init_values(nb::module_& m);
void init_repack(nb::module_& m);
void init_decode(nb::module_& m);
void init_gguf(nb::module_& m);
void init_unit(nb::module_& m);
void init_unit_repack(nb::module_& m);

namespace {

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Kernels* const* k = available_kernels(); *k != nullptr; k++) names.emplace_back((*k)->name);
  return names;
}

void set_isa(const std::string& name) {
  if (use_kernels(name.c_str())) return;
  std::string known;
  for (const std::string& isa : available_isas()) known += (known.empty() ? "" : ", ") + isa;
  throw_value_error("isa: expected one of " + known + ", got " + name);
}

void init_isa(nb::module_& m) {
  m.def("isa", [] { return std::string(kernels().name); }, "The instruction set whose kernels run.");
  m.def("set_isa", &set_isa, "name"_a, "Has the kernels of another instruction set run, in all threads.");
  m.def("available_isas", &available_isas, "Instruction sets that this processor has kernels for, the best last.");
}

}  // namespace

}  // namespace requant::bindings

NB_MODULE(_native, m) {
  using namespace requant::bindings;
  m.doc() =
      "Kernels of requant.\n\n"
      "Arrays are C-contiguous and outputs are allocated by the caller. Floats are passed\n"
      "as bits, uint16 or uint32, with a dtype name: \"F32\", \"F16\" or \"BF16\".";
  init_quantize(m);
  init_search(m);
  init_measure(m);
  init_gptq(m);
  init_values(m);
  init_repack(m);
  init_decode(m);
  init_gguf(m);
  init_unit(m);
  init_unit_repack(m);
  init_isa(m);
}
