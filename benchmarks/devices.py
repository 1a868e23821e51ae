"""What the vendor says of four GPUs: the rates that `model` divides counts by.

The clock is the one at which the data sheet's FP32 rate holds (2 x FP32 lanes x multiprocessors x clock), so the rates
are peaks: no kernel exceeds them, few come near. Each multiprocessor has four warp schedulers, each issues one warp
instruction a clock; special functions (ex2, lg2, rcp, ...) come at 16 results a clock a multiprocessor ("Throughput of
Native Arithmetic Instructions" in NVIDIA's CUDA C++ Programming Guide, 8.0, 9.0 and 10.0 alike).
"""

from __future__ import annotations

from dataclasses import dataclass

GUIDE = "https://docs.nvidia.com/cuda/cuda-c-programming-guide/#arithmetic-instructions"


@dataclass(frozen=True)
class Device:
    """One GPU.

    Attributes:
        name: the product.
        target: compute capability times ten, what kernels are compiled for.
        multiprocessors: enabled ones.
        clock_hz: highest clock, see the module.
        bytes_per_second: of the memory.
        l2_bytes: second-level cache.
        sources: where the numbers come from.
        issues_per_clock: warp instructions that a multiprocessor issues a clock.
        specials_per_clock: special-function results of a multiprocessor a clock.
    """

    name: str
    target: int
    multiprocessors: int
    clock_hz: float
    bytes_per_second: float
    l2_bytes: int
    sources: tuple[str, ...]
    issues_per_clock: int = 4
    specials_per_clock: int = 16

    @property
    def major(self) -> int:
        """Major compute capability."""
        return self.target // 10

    @property
    def warp_instructions_per_second(self) -> float:
        """Of the whole chip."""
        return self.issues_per_clock * self.multiprocessors * self.clock_hz

    @property
    def specials_per_second(self) -> float:
        """Special-function results of the whole chip."""
        return self.specials_per_clock * self.multiprocessors * self.clock_hz


DEVICES = {
    "a100": Device(
        "A100 SXM 80 GB",
        target=80,
        multiprocessors=108,
        clock_hz=1.41e9,
        bytes_per_second=2.039e12,
        l2_bytes=40 * 2**20,
        sources=(
            "NVIDIA A100 datasheet (19.5 TFLOPS FP32, 2,039 GB/s)",
            "https://images.nvidia.com/aem-dam/en-zz/Solutions/data-center/nvidia-ampere-architecture-whitepaper.pdf",
            GUIDE,
        ),
    ),
    "h100": Device(
        "H100 SXM 80 GB",
        target=90,
        multiprocessors=132,
        clock_hz=1.98e9,
        bytes_per_second=3.35e12,
        l2_bytes=50 * 2**20,
        sources=("https://www.nvidia.com/en-us/data-center/h100/ (67 TFLOPS FP32, 3.35 TB/s)", GUIDE),
    ),
    "h200": Device(
        "H200 SXM 141 GB",
        target=90,
        multiprocessors=132,
        clock_hz=1.98e9,
        bytes_per_second=4.8e12,
        l2_bytes=50 * 2**20,
        sources=("https://www.nvidia.com/en-us/data-center/h200/ (67 TFLOPS FP32, 4.8 TB/s)", GUIDE),
    ),
    "b200": Device(
        "B200 SXM 180 GB",
        target=100,
        multiprocessors=148,
        clock_hz=1.98e9,
        bytes_per_second=8.0e12,
        l2_bytes=126 * 2**20,
        sources=("https://www.nvidia.com/en-us/data-center/hgx/ (75 TFLOPS FP32 and up to 8 TB/s a GPU)", GUIDE),
    ),
}
