// kdkernels._codec: what Python data workers need without importing torch. Torch-free.
#include <pybind11/pybind11.h>

#include "build_facts.gen.h"

PYBIND11_MODULE(_codec, m) {
  m.doc() = "Torch-free native helpers of kdkernels.";
  m.def(
      "build_facts", [] { return pybind11::module_::import("json").attr("loads")(KD_BUILD_FACTS); },
      "What this build is: version, torch and compiler it was made with, instruction sets, CUDA, kernel "
      "digests.");
}
