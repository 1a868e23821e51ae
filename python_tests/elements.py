"""Element functions outside torch: the printed C++ in a shared object, and a Triton kernel around each.

`python elements.py OUT.pt` runs the Triton kernels on the inputs saved there; with TRITON_INTERPRET=1, on the CPU.
"""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdkernels import divergences

HERE = Path(__file__).resolve().parent
MASKED = -1e4

SHIM = r"""
#include <cmath>
#define KD_INLINE inline
namespace {
template <class T> T kd_const(double x) { return static_cast<T>(x); }
template <class T> T kd_exp(T x) {
  const T low = sizeof(T) == 8 ? T(-700) : T(-87);
  return std::exp(x < low ? low : x);
}
template <class T> T kd_log(T x) { return std::log(x); }
template <class T> T kd_abs(T x) { return std::fabs(x); }
template <class T> T kd_max(T x, T y) { return x != x ? x : y != y ? y : x > y ? x : y; }
template <class T> T kd_min(T x, T y) { return x != x ? x : y != y ? y : x < y ? x : y; }
template <class T> bool kd_lt(T x, T y) { return x < y; }
template <class T> bool kd_gt(T x, T y) { return x > y; }
template <class T> bool kd_le(T x, T y) { return x <= y; }
template <class T> bool kd_ge(T x, T y) { return x >= y; }
template <class T> bool kd_eq(T x, T y) { return x == y; }
template <class T> bool kd_ne(T x, T y) { return x != y; }
template <class T> T kd_select(bool k, T x, T y) { return k ? x : y; }
template <class T> T kd_kl(T p, T q, T d) {
  if (sizeof(T) == 8 || !(std::fabs(d) < T(0.25))) return p * (d - 1) + q;
  T s = 0;
  for (int k = 9; k >= 2; --k) { T f = 1; for (int i = 2; i <= k; ++i) f *= i; s = 1 / f - d * s; }
  return p * d * d * s;
}
#include "divergences.gen.h"
template <class D, class T> void run(long n, const T* lp, const T* lq, double a, double b, T* term, T* grad) {
  for (long i = 0; i < n; ++i) {
    const T p = kd_exp(lp[i]), q = kd_exp(lq[i]);
    term[i] = D::template term<T>(lp[i], lq[i], p, q, T(a), T(b));
    grad[i] = D::template grad<T>(lp[i], lq[i], p, q, T(a), T(b));
  }
}
}  // namespace
#define KD_EXPORT(NAME, ID)                                                                                       \
  extern "C" const char* NAME##_digest() { return NAME::digest; }                                                 \
  extern "C" int NAME##_id() { return ID; }                                                                       \
  extern "C" void NAME##_f64(long n, double* x, double* y, double a, double b, double* t, double* g) {            \
    run<NAME, double>(n, x, y, a, b, t, g);                                                                       \
  }                                                                                                               \
  extern "C" void NAME##_f32(long n, float* x, float* y, double a, double b, float* t, float* g) {                \
    run<NAME, float>(n, x, y, a, b, t, g);                                                                        \
  }
KD_FOR_EACH_DIVERGENCE(KD_EXPORT)
"""


def compile_cpp(folder: Path) -> ctypes.CDLL:
    """The generated header in scalar C++, float and double, as a shared object in `folder`."""
    emit = Path(divergences.__file__).parent / "_emit.py"
    subprocess.run([sys.executable, "-I", str(emit), str(folder / "divergences.gen.h")], check=True)
    (folder / "shim.cpp").write_text(SHIM)
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or "c++"
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Wno-unused-function"]
    command = [*compiler.split(), *flags, "-shared", "-fPIC", "shim.cpp", "-o", "shim.so"]
    subprocess.run(command, cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "shim.so"))


def run_cpp(library: ctypes.CDLL, kernel: divergences.Kernel, lp: Tensor, lq: Tensor) -> tuple[Tensor, Tensor]:
    """term and grad of the printed C++, in the dtype of the contiguous `lp` and `lq` (float32 or float64)."""
    term, grad = torch.empty_like(lp), torch.empty_like(lp)
    function = getattr(library, f"{kernel.name}_{'f64' if lp.dtype == torch.float64 else 'f32'}")
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in (lp, lq, term, grad)]
    a, b = ctypes.c_double(kernel.a), ctypes.c_double(kernel.b)
    function(ctypes.c_long(lp.numel()), pointers[0], pointers[1], a, b, pointers[2], pointers[3])
    return term, grad


def as_scalar(function: Any) -> Any:
    """The element function on Python numbers: the operations of the printed C++ in double, same exp and log."""
    language = types.SimpleNamespace(
        exp=lambda x: math.exp(max(x, -700.0)),
        log=math.log,
        abs=abs,
        where=lambda condition, x, y: x if condition else y,
        maximum=max,
        minimum=min,
        near=lambda x: False,
        kl=lambda p, q, d: p * (d - 1) + q,
    )
    return types.FunctionType(function.__code__, {"tl": language})


def compile_triton(kernel: divergences.Kernel, capability: int) -> dict[str, Any]:
    """ptx and cubin of the kernel below for compute capability 80, 90, ...; needs no GPU."""
    import element_kernel
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from kdkernels.triton.element import as_triton

    functions = divergences.elements(kernel.name)
    constants = {"TERM": as_triton(functions.term), "GRAD": as_triton(functions.grad), "BLOCK": 128}
    pointers = dict.fromkeys(("lp_ptr", "lq_ptr", "term_ptr", "grad_ptr"), "*fp32")
    signature = {**pointers, "a": "fp32", "b": "fp32", "n": "i32", **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(element_kernel.both, signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm


def run_interpreted(folder: Path, kernels: list[divergences.Kernel], lp: Tensor, lq: Tensor) -> list[Any]:
    """(term, grad) of each kernel from Triton's interpreter, in a process of its own: it patches triton.language."""
    path = folder / "interpreted.pt"
    torch.save({"kernels": [tuple(kernel) for kernel in kernels], "lp": lp, "lq": lq}, path)
    paths = os.pathsep.join([str(HERE.parent), str(HERE)])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    subprocess.run([sys.executable, __file__, str(path)], env=environment, check=True)
    results: list[Any] = torch.load(path)
    return results


def _main(path: str) -> None:
    import element_kernel

    from kdkernels.triton.element import as_triton

    given, results = torch.load(path), []
    lp, lq, BLOCK = given["lp"], given["lq"], 4096
    for name, a, b in given["kernels"]:
        term, grad = torch.empty_like(lp), torch.empty_like(lp)
        functions = divergences.elements(name)
        TERM, GRAD = as_triton(functions.term), as_triton(functions.grad)
        element_kernel.both[(-(-lp.numel() // BLOCK),)](lp, lq, term, grad, a, b, lp.numel(), TERM, GRAD, BLOCK)
        results.append((term, grad))
    torch.save(results, path)


if __name__ == "__main__":
    _main(sys.argv[1])
