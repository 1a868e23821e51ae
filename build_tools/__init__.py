"""How kdkernels is built. Standard library only: this runs in pip's isolated build environment.

locate   finds torch, pybind11, the compiler and nvcc
options  reads KD_BUILD, KD_SANITIZE, KD_JOBS
plan     turns csrc/ into a list of compile and link steps
generate writes the headers that are made at build time
execute  runs the steps, by ninja where it is present
native   the whole: `native.build(...)`, used by setup.py
sanitize the kernels and their C++ driver under ASan and UBSan, without torch
"""
