"""Kernels to PTX without a GPU: Triton's own compiler with an explicit target, and `nvcc -ptx`."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

TARGETS = (80, 90, 100)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A Triton kernel compiled for one target and one specialisation; its registers are `static_facts`' business."""

    ptx: str
    name: str
    threads: int  # of a CTA
    shared: int  # bytes of dynamic shared memory
    cluster: int  # CTAs of a cluster
    global_scratch: int  # bytes per CTA
    runtime: tuple[str, ...]  # parameters that the compiled kernel takes, in order
    target: int


_compiled: dict[Any, Compiled] = {}
_ptx: dict[str, str] = {}


def specialise(kernel: Any, arguments: dict[str, Any], options: dict[str, Any], target: int) -> tuple[Any, ...]:
    """What Triton's JIT derives from the arguments: (options, signature, constexprs, attributes) and a cache key.

    Uses the JIT's own functions: 16-divisibility of pointers and integers, integers equal to 1 and None as constants.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(GPUTarget("cuda", target, 32))
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    given = dict(options) | {"debug": options.get("debug", False)}
    bound, specialization, _ = binder(**arguments, **given)
    packed = kernel._pack_args(backend, given, bound, specialization, None)
    key = (kernel.cache_key, target, str(specialization), str(sorted(packed[0].__dict__.items(), key=str)))
    constants = tuple(sorted((str(path), _identity(value)) for path, value in packed[2].items()))
    return packed, (*key, constants)


def _identity(value: Any) -> str:
    """A constexpr as part of a cache key; functions by their source."""
    return str(getattr(value, "cache_key", None) or repr(value))


def compile_triton(kernel: Any, arguments: dict[str, Any], options: dict[str, Any], target: int) -> Compiled:
    """Compiles a `triton.JITFunction` as the JIT would for these arguments on a GPU of the target (80, 90, 100)."""
    (parsed, signature, constexprs, attributes), key = specialise(kernel, arguments, options, target)
    if key not in _compiled:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        source = ASTSource(kernel, signature, constexprs, attributes)
        with _no_assembly():
            made = triton.compile(source, target=GPUTarget("cuda", target, 32), options=parsed.__dict__)
        meta = made.metadata
        _compiled[key] = Compiled(
            made.asm["ptx"],
            meta.name,
            meta.num_warps * 32,
            meta.shared,
            meta.num_ctas,
            meta.global_scratch_size,
            tuple(name for name, kind in signature.items() if kind != "constexpr"),
            target,
        )
    return _compiled[key]


@contextlib.contextmanager
def _no_assembly() -> Iterator[None]:
    """Triton's pipeline without its last stage, ptxas, where this Triton can be told so: a fifth of the time."""
    from triton import knobs

    if not hasattr(knobs.runtime, "add_stages_inspection_hook"):
        yield
        return

    def hook(*arguments: Any) -> tuple[str, str] | None:
        if not arguments:
            return "ptx only", "ptx only"  # part of the cache's keys
        arguments[1]["cubin"] = lambda source, metadata: b""
        return None

    previous = knobs.runtime.add_stages_inspection_hook
    knobs.runtime.add_stages_inspection_hook = hook
    try:
        yield
    finally:
        knobs.runtime.add_stages_inspection_hook = previous


def nvcc() -> str | None:
    """The path of nvcc, None where there is none."""
    return os.environ.get("NVCC") or shutil.which("nvcc")


def compile_cuda(source: str | Path, target: int = 90, flags: Sequence[str] = ()) -> str:
    """PTX of a CUDA source (a path, or the text itself) for sm_<target>. Raises RuntimeError with nvcc's complaints."""
    compiler = nvcc()
    if compiler is None:
        raise RuntimeError("nvcc is not on PATH; set NVCC")
    text = source.read_text() if isinstance(source, Path) else source
    command = [compiler, "-ptx", f"-arch=sm_{target}", "-std=c++17", *flags]
    if isinstance(source, Path):
        command.append(f"-I{source.parent}")
    stamp = hashlib.sha256("\0".join([text, *command]).encode()).hexdigest()[:16]
    if stamp in _ptx:
        return _ptx[stamp]
    with tempfile.TemporaryDirectory() as folder:
        path, result = Path(folder, f"{stamp}.cu"), Path(folder, f"{stamp}.ptx")
        path.write_text(text)
        done = subprocess.run([*command, str(path), "-o", str(result)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"nvcc failed:\n{done.stderr}")
        _ptx[stamp] = result.read_text()
        return _ptx[stamp]


def kept_ptx(source: Path, target: int, flags: Sequence[str], depends: Iterable[Path], folder: Path) -> str:
    """`compile_cuda` once for all test processes, as it takes seconds: `folder` keeps the result for as long as the
    contents of `depends`, the source and what it includes, are the same."""
    parts = [str(nvcc()).encode(), *(flag.encode() for flag in flags), *(path.read_bytes() for path in depends)]
    stamp = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    kept = folder / f"{source.stem}-{target}-{stamp}.ptx"
    if not kept.is_file():
        text = compile_cuda(source, target, flags)
        folder.mkdir(parents=True, exist_ok=True)
        fresh = kept.with_suffix(f".{os.getpid()}")
        fresh.write_text(text)
        fresh.replace(kept)
    return kept.read_text()
