"""Names, registration, refusals; and the printer of C++: what it accepts, what it says, when it rewrites its output."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

import kdkernels as kd
from kdkernels import divergences
from kdkernels.divergences import Divergence, Elements, Kernel, _emit, parameter, tl

EMIT = Path(_emit.__file__)
PUBLISHED = {
    "adaptive_kl": kd.AdaptiveKL,
    "alpha_beta": kd.AlphaBeta,
    "forward_kl": kd.ForwardKL,
    "jsd": kd.JSD,
    "reverse_kl": kd.ReverseKL,
    "skew_kl": kd.SkewKL,
    "skew_reverse_kl": kd.SkewReverseKL,
    "total_variation": kd.TotalVariation,
}
LIMITS = [
    (kd.JSD(0), Kernel("forward_kl")),
    (kd.JSD(1), Kernel("reverse_kl")),
    (kd.JSD(0.25), Kernel("jsd", 0.25)),
    (kd.SkewKL(0), Kernel("forward_kl")),
    (kd.SkewReverseKL(0.0), Kernel("reverse_kl")),
    (kd.SkewReverseKL(0.2), Kernel("skew_reverse_kl", 0.2)),
    (kd.AlphaBeta(1, 0), Kernel("forward_kl")),
    (kd.AlphaBeta(0, 1), Kernel("reverse_kl")),
    (kd.AlphaBeta(0.5, 0), Kernel("alpha_beta_b0", 0.5, 0.0)),
    (kd.AlphaBeta(0, 0.5), Kernel("alpha_beta_a0", 0.0, 0.5)),
    (kd.AlphaBeta(0, 0), Kernel("alpha_beta_a0_b0", 0.0, 0.0)),
    (kd.AlphaBeta(0.2, 0.7), Kernel("alpha_beta", 0.2, 0.7)),
    (kd.AdaptiveKL(0.3), Kernel("adaptive_kl", 0.3)),
]


@pytest.fixture
def clean_registry():
    tables = (divergences.DIVERGENCES, divergences.ELEMENTS)
    before = [dict(table) for table in tables]
    yield
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)


def test_the_published_eight():
    assert {name: divergences.DIVERGENCES[name] for name in PUBLISHED} == PUBLISHED
    assert set(PUBLISHED) <= set(divergences.names())
    assert divergences.names() == sorted(divergences.names())
    assert [name for name in PUBLISHED if not divergences.DIVERGENCES[name].separable] == ["adaptive_kl"]
    defaults = {name: dataclasses.astuple(divergences.get(name)) for name in PUBLISHED if name != "alpha_beta"}
    assert defaults == {
        "adaptive_kl": (0.5,),
        "forward_kl": (),
        "jsd": (0.5,),
        "reverse_kl": (),
        "skew_kl": (0.1,),
        "skew_reverse_kl": (0.1,),
        "total_variation": (),
    }


@pytest.mark.parametrize(("divergence", "kernel"), LIMITS, ids=repr)
def test_limits_run_as_what_they_are(divergence, kernel):
    assert divergence.kernel() == kernel
    assert kernel.name == "adaptive_kl" or divergences.elements(kernel.name).name == kernel.name


@pytest.mark.parametrize("value", [0.04, -0.5, 1e-9, 101])
def test_alpha_beta_is_zero_or_at_least_a_twentieth(value):
    with pytest.raises(ValueError, match=r"AlphaBeta: beta is .*; allowed: 0, or 0.05 <= beta <= 100. .*use 0"):
        kd.AlphaBeta(0.2, value)
    kd.AlphaBeta(0.05, 0)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ("jds", ValueError, "divergence is 'jds', which is unknown; did you mean 'jsd'"),
        ("forwardkl", ValueError, "did you mean 'forward_kl'"),
        ("kl_div_loss_of_my_own", ValueError, "known: adaptive_kl, alpha_beta, forward_kl"),
        (kd.JSD, TypeError, r"divergence is the class JSD; pass an object, such as JSD\(\)"),
        (3, TypeError, "divergence must be a name or a Divergence object, not int 3"),
        (None, TypeError, "not NoneType None"),
    ],
)
def test_unknown_divergences_are_errors_with_a_remedy(wrong, error, message):
    with pytest.raises(error, match=message):
        divergences.get(wrong)


def test_unknown_elements():
    with pytest.raises(KeyError, match="no element functions are called 'adaptive_kl'; known: alpha_beta"):
        divergences.elements("adaptive_kl")


def test_a_class_of_ones_own_is_served_by_eager(clean_registry):
    @dataclass(frozen=True)
    class Pearson(Divergence):
        """scale sum (p - q)^2 / p."""

        name = "pearson"
        scale: float = parameter(1.0, low=0, open_low=True)

        @staticmethod
        def term(lp: Tensor, lq: Tensor, a: float, b: float) -> Tensor:
            p = tl.exp(lp)
            d = p - tl.exp(lq)
            return a * d * d / p

        @staticmethod
        def grad(lp: Tensor, lq: Tensor, a: float, b: float) -> Tensor:
            p = tl.exp(lp)
            q = tl.exp(lq)
            return 2.0 * a * q * (q - p) / p

    assert divergences.get("pearson") == Pearson()
    zs, zt = torch.randn(2, 3, 11, dtype=torch.float64)
    p, q = zt.softmax(-1), zs.softmax(-1)
    loss = kd.distillation_loss(zs, zt, Pearson(2.0), reduction="none")
    torch.testing.assert_close(loss, 2 * ((p - q) ** 2 / p).sum(-1))
    with pytest.raises(ValueError, match="scale is 0; allowed: 0 < scale and finite"):
        Pearson(0)
    with pytest.raises(ValueError, match=r"pearson|native"):
        kd.distillation_loss(zs, zt, "pearson", backend="cpp")


def test_registration_refuses_what_cannot_work(clean_registry):
    with pytest.raises(TypeError, match="Half defines term only; term and grad go together"):
        type("Half", (Elements,), {"name": "half", "term": staticmethod(lambda lp, lq, a, b: lp)})
    with pytest.raises(TypeError, match="Nameless needs its own class attribute `name`"):
        type("Nameless", (Divergence,), {})
    with pytest.raises(TypeError, match="Heir needs its own class attribute `name`"):
        type("Heir", (kd.JSD,), {})
    with pytest.raises(TypeError, match=r"the name 'jsd' is taken by kdkernels\.divergences\.jsd\.JSD; choose another"):
        type("Other", (Divergence,), {"name": "jsd"})
    assert divergences.get("jsd") == kd.JSD()


def emitted(tmp_path: Path, body: str, name: str = "x") -> str:
    """The header printed from a folder with one file whose class has this `term`."""
    lines = "\n        ".join(body.strip().splitlines())
    text = f"""
class X:
    name = "{name}"

    @staticmethod
    def term(lp, lq, a, b):
        {lines}

    @staticmethod
    def grad(lp, lq, a, b):
        return lq - lp
"""
    (tmp_path / "x.py").write_text(text)
    return _emit.header(tmp_path)


def test_printed_text(tmp_path):
    text = emitted(tmp_path, "p = tl.exp(lp)\nt = -(1 / 4) * p - tl.exp(a * lq)\nreturn tl.where(lq >= t, t, 2)")
    assert "KD_INLINE static T term(T, T lq, T p, T, T a, T) {" in text
    assert "const auto t_ = ((kd_const<T>(-0.25) * p_) - kd_exp((a * lq)));" in text
    assert "return kd_select(kd_ge(lq, t_), t_, kd_const<T>(2.0));" in text
    assert "#define KD_FOR_EACH_DIVERGENCE(X) X(x, 0)\n" in text


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return exp(lp)", "call of exp, which is not tl.something"),
        ("return tl.sin(lp)", "tl.sin does not exist"),
        ("return tl.exp(lp, lq)", "tl.exp takes 1 arguments by position"),
        ("return lp ** 2", r"'lp \*\* 2' is outside the element language"),
        ("return lp if a > 0 else lq", "is outside the element language"),
        ("return 0.0 < lp < 1.0", "is outside the element language"),
        ("return PI * lp", "'PI' is not an argument or a local name"),
        ("x = lp\nx = lq\nreturn x", "'x' is assigned a second time"),
        ("lp = lq\nreturn lp", "'lp' is assigned a second time"),
        ("x, y = lp, lq\nreturn x", "is outside the element language"),
        ("x += lp\nreturn x", "is outside the element language"),
        ("for i in lp: pass\nreturn lp", "is outside the element language"),
        ("return lp\nreturn lq", "must end with its only return"),
        ("x = lp", "must end with its only return"),
        ("return True", "'True' is outside the element language"),
    ],
)
def test_what_the_language_lacks_is_named_with_its_place(tmp_path, body, message):
    with pytest.raises(SyntaxError, match=message) as error:
        emitted(tmp_path, body)
    assert error.value.filename == str(tmp_path / "x.py")
    assert error.value.lineno >= 6


def test_classes_the_printer_refuses(tmp_path):
    text = emitted(tmp_path, "return lp") and (tmp_path / "x.py").read_text()
    (tmp_path / "y.py").write_text(text)
    with pytest.raises(SyntaxError, match="that no other class has"):
        _emit.header(tmp_path)
    (tmp_path / "y.py").unlink()
    (tmp_path / "x.py").write_text(text.replace('name = "x"', 'title = "x"'))
    with pytest.raises(SyntaxError, match=r'X needs term, grad and a `name = "\.\.\."`'):
        _emit.header(tmp_path)
    (tmp_path / "x.py").write_text(text.replace("@staticmethod", "@classmethod"))
    with pytest.raises(SyntaxError, match=r"must be a staticmethod term\(lp, lq, a, b\)"):
        _emit.header(tmp_path)


def test_digests_follow_the_mathematics_only(tmp_path):
    emitted(tmp_path, "return lp - lq")
    first = _emit.digests(tmp_path)
    emitted(tmp_path, '"""A docstring."""\n# a comment\nreturn (lp  -  lq)')
    assert _emit.digests(tmp_path) == first
    emitted(tmp_path, "return lq - lp")
    assert _emit.digests(tmp_path).keys() == first.keys()
    assert _emit.digests(tmp_path) != first
    assert set(_emit.digests()) == set(divergences.ELEMENTS)


def test_it_runs_without_site_packages_and_leaves_an_unchanged_header_alone(tmp_path):
    """The build calls it where torch may be absent, and must not recompile for nothing."""
    copy, out = tmp_path / "divergences", tmp_path / "out" / "divergences.gen.h"
    shutil.copytree(EMIT.parent, copy)
    command = [sys.executable, "-I", "-S", str(copy / "_emit.py"), str(out)]
    subprocess.run(command, check=True)
    assert out.read_text() == _emit.header()
    before = out.stat().st_mtime_ns
    subprocess.run(command, check=True)
    assert out.stat().st_mtime_ns == before
    assert subprocess.run(command[:-1], capture_output=True, check=False).returncode == 2


def test_triton_missing_is_an_error_with_a_remedy():
    code = "import sys; sys.modules['triton'] = None\nimport kdkernels.triton\nimport kdkernels.triton.element"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "kdkernels.triton needs triton, which does not import here" in done.stderr
    assert 'pip install triton, or use backend="cpp" or "eager"' in done.stderr


def test_triton_functions_are_made_once():
    pytest.importorskip("triton")
    from kdkernels.triton.element import as_triton

    term = divergences.elements("jsd").term
    assert as_triton(term) is as_triton(term)
