"""What of a generator is trained: everything, its condition encoder alone, or its upper blocks.

What is frozen gets no gradient and no optimiser state, and does not move: neither its weights nor its running means.
"""
from __future__ import annotations

from torch import nn

from networks.generator import Generator

FREEZE = "freeze"
TRAIN_MODES = ("all", "text_encoder", *(f"{FREEZE}{2 ** k}" for k in range(3, 8)))   # freeze8 ... freeze128


def first_trained_px(mode: str) -> int:
    """Resolution of the first block that is trained: `freeze16` -> 32; 0 if blocks are not the question."""
    return 2 * int(mode.removeprefix(FREEZE)) if mode.startswith(FREEZE) else 0


def choose_trained(mode: str, generator: Generator, mlp: nn.Module | None) -> list[nn.Parameter]:
    """Freeze what `mode` leaves out; returns the parameters that are trained, the generator's first.

    all: everything. text_encoder: the condition encoder `mlp` alone. freezeN: the blocks above N px and all ToRGB; the mapping,
    the Fourier input and the condition encoder are frozen.
    """
    first = first_trained_px(mode)
    generator.requires_grad_(mode == "all")
    if first:
        for resolution, block in zip(generator.config.resolutions, generator.blocks, strict=True):
            block.requires_grad_(resolution >= first)
            block.to_rgb.requires_grad_(True)
    if mlp is not None:
        mlp.requires_grad_(not first)
    parameters = [*generator.parameters(), *(() if mlp is None else mlp.parameters())]
    return [parameter for parameter in parameters if parameter.requires_grad]
