"""How a GAN run computes: in bfloat16 or float32, compiled or not, with patches and random numbers made ahead. No formula changes.

Weights, styles, statistics, colours, logits and losses stay float32 in any case; bfloat16 is for convolutions and frozen towers.
"""
from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from networks.discriminator import Discriminator
from networks.generator import Generator

Made = TypeVar("Made")
Precision = Literal["fp32", "bf16"]
Compile = Literal["off", "blocks", "max"]
DTYPES: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16}     # of what is computed; None: the weights'
COMPILE_MODES: dict[str, str | None] = {"blocks": None, "max": "max-autotune-no-cudagraphs"}
DEVICE_SHARE = 0.5         # of its free memory that patches may take


def default_precision(device: str, fp32: bool | None) -> Precision:
    """What `--fp32` / `--bf16` say; nothing said: bfloat16 on a GPU, float32 on a CPU."""
    reduced = device.startswith("cuda") if fp32 is None else not fp32
    return "bf16" if reduced else "fp32"


def set_up_gpu(precision: Precision, *, search_kernels: bool) -> None:
    """Process-wide switches of the GPU's libraries: TF32 for what stays float32 unless all is to be exact, search for fast kernels."""
    torch.set_float32_matmul_precision("high" if precision == "bf16" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "bf16"
    torch.backends.cudnn.benchmark = search_kernels


def prepare(generator: Generator, discriminator: Discriminator, *, precision: Precision, compiled: Compile, on_gpu: bool,
            penalised: bool, backend: str = "inductor") -> None:
    """Set both networks up to train. `penalised`: heads whose gradient is differentiated again, which compiled code cannot do."""
    prepare_generator(generator, precision=precision, compiled=compiled, on_gpu=on_gpu, backend=backend)
    prepare_discriminator(discriminator, precision=precision, compiled=compiled, penalised=penalised, backend=backend)


def prepare_generator(generator: Generator, *, precision: Precision, compiled: Compile, on_gpu: bool, backend: str = "inductor") -> None:
    """Its blocks in channels-last on a GPU; compiled one by one."""
    generator.compute_in(DTYPES[precision], channels_last=on_gpu)
    if compiled != "off":
        for block in generator.blocks:
            block.compile(**_compiler(compiled, backend))


def prepare_discriminator(discriminator: Discriminator, *, precision: Precision, compiled: Compile, penalised: bool,
                          backend: str = "inductor") -> None:
    """Its backbone in reduced precision, its heads never; all of them compiled, but for penalised heads."""
    discriminator.taps.compute_dtype = DTYPES[precision]
    if compiled != "off":
        discriminator.taps.compile(**_compiler(compiled, backend))
        for head in () if penalised else discriminator.heads:
            head.judge = torch.compile(head.judge, **_compiler(compiled, backend))


def _compiler(compiled: Compile, backend: str) -> dict:
    torch._dynamo.config.recompile_limit = 64      # one graph a resolution, training and sampling: more than the default of 8
    return {"dynamic": False, "mode": COMPILE_MODES[compiled], "backend": backend}


def place_patches(images: Tensor, device: torch.device | str) -> Tensor:
    """The patches (N, 3, H, H) on the device, or where they are if they would take too much of its free memory."""
    device = torch.device(device)
    if device.type != "cuda":
        return images.to(device)
    free, _ = torch.cuda.mem_get_info(device)
    return images.to(device) if images.numel() <= DEVICE_SHARE * free else images


def take_patches(images: Tensor, rows: np.ndarray, device: torch.device | str) -> Tensor:
    """Patches (n, 3, H, H) of these rows, where `images` lie; ready to be copied to a GPU while the CPU goes on."""
    patches = images[torch.from_numpy(rows).to(images.device, non_blocking=True)]
    return patches.pin_memory() if torch.device(device).type == "cuda" and patches.device.type == "cpu" else patches


class Ahead(Generic[Made]):
    """What steps need and no step before them changes, `make(step)`, made by threads before it is asked for.

    `make` must depend on the step alone; so does then what a step gets, whatever the number of threads. 0: made when asked for.
    """

    def __init__(self, make: Callable[[int], Made], workers: int):
        self.make, self.workers = make, workers
        self.pool = ThreadPoolExecutor(workers, "ahead") if workers else None
        self.waiting: dict[int, Future[Made]] = {}

    def of_step(self, step: int) -> Made:
        if self.pool is None:
            return self.make(step)
        for number in [number for number in self.waiting if not step <= number <= step + self.workers]:
            self.waiting.pop(number).cancel()
        for number in range(step, step + self.workers + 1):
            if number not in self.waiting:
                self.waiting[number] = self.pool.submit(self.make, number)
        return self.waiting.pop(step).result()
