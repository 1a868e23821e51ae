"""The bounds from compiled code: their arithmetic, what is counted, and what the report says."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import counted, counting, gpu_report, model, run
from benchmarks.counting import Recorder, Step
from benchmarks.devices import DEVICES, Device
from benchmarks.shapes import Case

pytestmark = pytest.mark.slow

CHIP = Device(
    "slow chip", 90, multiprocessors=1, clock_hz=100.0, bytes_per_second=3200.0, l2_bytes=1000, sources=("made up",)
)
"""100 sectors, 400 warp instructions, 1600 special functions a second."""
SHORT = 4096


def step(memory: float = 0.0, issue: float = 0.0, special: float = 0.0, again: float = 0.0) -> Step:
    """A step whose resources need so many seconds for ten pairs on `CHIP`, `again` of memory for second reads."""
    first = 10 * memory - 10 * again
    return Step("s", "compiled", 1, 10 * memory, 0.0, first, 0.0, 40 * issue, 160 * special)


def contestant(name: str) -> counted.Counted:
    return next(c for c in counted.CONTESTANTS if c.name == name)


@pytest.mark.parametrize(
    ("needs", "seconds", "by"),
    [((5, 2, 3), 5, "memory"), ((1, 4, 3), 4, "issue"), ((1, 2, 7), 7, "special")],
)
def test_a_step_takes_as_long_as_its_slowest_resource(needs: Any, seconds: float, by: str) -> None:
    total, resource = model.bound([step(*needs)], CHIP, 10)
    assert (pytest.approx(total), resource) == (seconds, by)


def test_steps_follow_one_another() -> None:
    total, resource = model.bound([step(5, 2), step(1, 3), step(0, 3)], CHIP, 10)
    assert (total, resource) == (pytest.approx(11), "issue")  # 5 + 3 + 3, six of them issue


def test_a_cache_spares_second_reads_and_whole_tensors() -> None:
    steps = [step(6, 2, again=3), step(4)]
    assert model.bound(steps, CHIP, 10)[0] == pytest.approx(10)
    assert model.cached_bound(steps, CHIP, 10, 0.5, stays=False) == (pytest.approx(7), "memory")
    assert model.cached_bound(steps, CHIP, 10, 0.5, stays=True) == (pytest.approx(2), "issue")


@pytest.mark.parametrize(("name", "lanes", "teraflops"), [("a100", 64, 19.5), ("h100", 128, 67), ("b200", 128, 75)])
def test_the_clock_gives_the_data_sheets_fp32_rate(name: str, lanes: int, teraflops: float) -> None:
    device = DEVICES[name]
    assert 2 * lanes * device.multiprocessors * device.clock_hz / 1e12 == pytest.approx(teraflops, rel=0.01)
    assert all(device.sources)


def _torch_steps(work: Any) -> dict[str, tuple[float, float]]:
    """Operation -> bytes read and written per pair by `work` on fp32 logits."""
    x, y = torch.randn(counting.ROWS, SHORT), torch.randn(counting.ROWS, SHORT)
    recorder = Recorder(90, x.numel())
    with recorder:
        work(x, y)
    return {s.name: (32 * s.load_sectors, 32 * s.store_sectors) for s in recorder.steps.values()}


def test_torch_operations_count_with_their_least_bytes() -> None:
    def work(x: Tensor, y: Tensor) -> None:
        total = x.t().t().sum(-1, keepdim=True)  # views cost nothing, nor does a number per row
        z = torch.empty_like(x).copy_(y)
        z.mul_(0.5)
        torch.sub(z, total.broadcast_to(x.shape), out=z)
        z.to(torch.bfloat16)
        torch.zeros_like(x)
        z.zero_()
        torch.ones(7, SHORT).exp()  # not logits: another number of rows

    assert _torch_steps(work) == {
        "sum": (4, 0),
        "copy_": (4, 4),
        "mul_": (4, 4),
        "sub": (4, 4),
        "_to_copy": (4, 2),
        "zeros_like": (0, 4),
        "zero_": (0, 4),
    }


def test_products_and_uncounted_work_are_left_out() -> None:
    recorder = Recorder(90, counting.ROWS * SHORT)
    hidden, head = torch.randn(counting.ROWS, 3), torch.randn(3, SHORT)
    with recorder:
        logits = hidden @ head
        with recorder.uncounted():
            logits.exp()
        assert not recorder.steps
        logits.exp()
    assert [*recorder.steps] == ["exp"]


def test_ours_reads_both_sides_twice_and_leaves_the_gradient_alone() -> None:
    steps = {s.name: s for s in counted.steps(contestant("ours"), Case("dense", "forward_kl", "bf16", 512, SHORT), 90)}
    kernel, scale = steps["dense_kernel"], steps["scale_kernel"]
    assert 32 * kernel.load_sectors == pytest.approx(8, rel=0.01)
    assert 32 * kernel.first_sectors == pytest.approx(4)
    assert 32 * kernel.store_sectors == pytest.approx(2, rel=0.01)
    assert 3 < kernel.special < 6
    assert kernel.thread_instructions <= 32 * kernel.warp_instructions
    assert 32 * scale.load_sectors < 0.05
    assert scale.store_sectors == 0


@pytest.mark.skipif(bool(contestant("ours:onchip").absent()), reason="no nvcc here")
def test_our_kernels_on_chip_stand_beside_those_of_triton() -> None:
    """Each by its name; on GPUs without clusters, and for a divergence that is no KL, there is one."""
    chip, case = contestant("ours:onchip"), Case("dense", "forward_kl", "bf16", 512, SHORT)
    kernel = counted.steps(chip, case, 90)[0]
    assert kernel.name == "kl_onchip"
    assert 32 * kernel.load_sectors == pytest.approx(4, rel=0.03)
    assert 32 * kernel.store_sectors == pytest.approx(2, rel=0.03)
    assert [chip.serves(case, target) for target in (80, 90, 100)] == [False, True, True]
    assert not chip.serves(replace(case, divergence="jsd"), 90)
    entries = [
        model.entry(case, c.name, counted.steps(c, case, 90), DEVICES["h100"], 512) for c in (contestant("ours"), chip)
    ]
    assert entries[1]["bound_ms"] <= 0.65 * entries[0]["bound_ms"]
    text = gpu_report.model_table({"model": entries})
    assert "forward KL 512 x 4096 bf16, Triton" in text
    assert "forward KL 512 x 4096 bf16, on chip" in text


def test_rows_are_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("dense", "jsd", "bf16", 512, SHORT)
    two = counted.steps(contestant("ours"), case, 90)[0]
    monkeypatch.setattr(counting, "ROWS", 5)
    monkeypatch.setattr(counted, "ROWS", 5)
    five = counted.steps(contestant("ours"), case, 90)[0]
    for figure in model.FIGURES:
        assert getattr(five, figure) == pytest.approx(getattr(two, figure), rel=1e-3), figure


def test_a_fused_head_costs_the_kernel_and_nothing_else_on_logits() -> None:
    case = Case("linear", "jsd", "bf16", 2048, SHORT, H=1024, Ht=2048, chunk_bytes=2**29)
    assert [s.name for s in counted.steps(contestant("ours"), case, 90)] == ["dense_kernel"]


@pytest.mark.skipif(bool(contestant("liger").absent()), reason=contestant("liger").absent() or "installed")
@pytest.mark.parametrize("op", ["dense", "linear"])
def test_liger_is_counted_with_the_torch_steps_around_its_kernel(op: str) -> None:
    case = Case(op, "jsd", "bf16", 512, SHORT, H=64, Ht=64)
    steps = {s.name: s for s in counted.steps(contestant("liger"), replace(case, H=64, Ht=64), 90)}
    kernel = steps["_jsd_kernel"]
    size = 2 if op == "dense" else 4  # the fused one keeps logits in fp32
    assert kernel.calls == 1
    assert 32 * kernel.load_sectors == pytest.approx(2 * size)
    assert 32 * kernel.store_sectors == pytest.approx(size + 4)  # gradient, and the loss of each entry in fp32
    assert steps["_log_softmax"].calls == 2
    assert 32 * steps["_log_softmax"].load_sectors == pytest.approx(2 * size)
    assert (32 * steps["zeros"].load_sectors, 32 * steps["zeros"].store_sectors) == (0, 4)


@pytest.mark.skipif(bool(contestant("trl").absent()), reason=contestant("trl").absent() or "installed")
@pytest.mark.parametrize(("divergence", "kernels"), [("forward_kl", 2), ("jsd", 3)])
def test_trl_reads_fp32_tiles_in_each_of_its_kernels(divergence: str, kernels: int) -> None:
    steps = counted.steps(contestant("trl"), Case("linear", divergence, "bf16", 512, SHORT, H=64, Ht=64), 90)
    compiled = [s for s in steps if s.source == "compiled"]
    assert len(compiled) == kernels
    assert all(32 * s.load_sectors == pytest.approx(8, rel=0.1) for s in compiled)
    assert sum(32 * s.store_sectors for s in compiled) == pytest.approx(4, rel=0.1)


def test_ligers_chunks_are_as_its_source_has_them() -> None:
    case = Case("linear", "jsd", "bf16", 2048, 128256, H=1024, Ht=2048)
    assert counted._liger_rows(case, 90) == 32  # 126 chunks wanted: 17 rows, 32 as a power of two
    assert counted._liger_rows(case, 100) == 128
    assert counted._liger_rows(replace(case, op="dense"), 90) == 2048


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return model.result([Case("dense", "jsd", "bf16", 512, SHORT)], DEVICES["h100"])


def test_the_result_says_what_it_is_and_can_be_read_again(found: dict[str, Any]) -> None:
    assert found["what"] == "a bound computed from compiled code, not a measured time"
    assert json.loads(json.dumps(found)) == found
    text = gpu_report.model_text(found)
    assert "not a measured time" in text
    assert "JSD(.5) 512 x 4096 bf16: ours" in text
    mine = next(e for e in found["model"] if e["contestant"] == "ours")
    assert mine["floor_ms"] == pytest.approx(1e3 * 3 * 512 * SHORT * 2 / 3.35e12, rel=1e-3)
    assert mine["bound_ms"] >= max(mine["needs_ms"].values()) >= mine["floor_ms"]
    assert mine["cached_ms"] <= mine["bound_ms"]


def test_who_is_not_installed_is_named(found: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counted, "find_spec", lambda name: None if name in ("liger_kernel", "trl") else object())
    fewer = model.count([], DEVICES["h100"])
    text = gpu_report.model_text({**copy.deepcopy(found), **fewer})
    assert "liger is left out: liger_kernel is not installed: pip install --no-deps liger-kernel==0.8.5" in text
    assert "trl is left out" in text


def test_wrong_input_ends_with_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert model.main("h100", "jds") == 2
    assert "cases='jds' matches none of dense-forward_kl" in capsys.readouterr().err
    monkeypatch.setattr(counted, "find_spec", lambda name: None)
    assert model.main("h100") == 2
    assert capsys.readouterr().err == (
        "kdkernels bench: error: triton is not installed: pip install --no-deps triton\n"
    )


def test_the_command_hands_over(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Any] = []
    monkeypatch.setattr(model, "main", lambda *given: called.append(given) or 0)
    with pytest.raises(SystemExit) as end:
        run.main(["--model", "b200", "--cases", "jsd"])
    assert end.value.code == 0
    assert called == [("b200", "jsd", None)]
    with pytest.raises(SystemExit) as end:
        run.main(["--model", "t4"])
    assert end.value.code == 2
