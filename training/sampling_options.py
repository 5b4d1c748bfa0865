"""Options that every command sampling from a snapshot has, as a dataclass and as click options. Loads no torch."""
from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

import click

from preprocessing.errors import OptionError
from preprocessing.patches import require_no_patch_folder


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Which generator is asked, how, and where its patches go."""

    network: Path                       # snapshot folder, or a run folder: its newest snapshot
    outdir: Path
    seeds: str = "0"
    truncation: float = 1.0             # 1 = none
    noise_mode: str = "random"
    translate: tuple[float, float] = (0.0, 0.0)   # shares of the side
    rotate: float = 0.0                 # degrees
    device: str | None = None
    encoded: bool = False               # prompts are embeddings
    batch_sz: int = 16
    workers: int | None = None          # threads that draw random numbers, encode and write; None: one a core
    clip: Path | None = None            # where the gene encoder lies now

    def __post_init__(self):
        for name in ("batch_sz", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(f"--{name.replace('_', '-')}", "at least 1", str(value))
        for name in ("truncation", "rotate"):
            if not isfinite(getattr(self, name)):
                raise OptionError(f"--{name}", "a finite number", str(getattr(self, name)))
        if not all(map(isfinite, self.translate)):
            raise OptionError("--translate", "two finite numbers", ",".join(map(str, self.translate)))
        require_no_patch_folder("--outdir", self.outdir)


def is_pipeline(network: Path) -> bool:
    """Whether `network` is a diffusion pipeline, or a run folder with one."""
    return any((folder / "model_index.json").is_file() for folder in (network, network / "pipeline"))


def refuse_given(names: Iterable[str], expected: str, found: str) -> None:
    """Refuse those options of the command that runs which were named on its command line."""
    for name in names:
        if click.get_current_context().get_parameter_source(name) is not click.core.ParameterSource.DEFAULT:
            raise OptionError(f"--{name.replace('_', '-')}", expected, found)


def solver_options(command: Callable) -> Callable:
    """Add the options of `diffusion_utils.sampling.Solver` that a command has beside those of a GAN; None where they are not given."""
    for option in reversed((
        click.option("--steps", type=click.IntRange(max=10_000), help="Diffusion pipeline: steps from noise to patch. Default: 20."),
        click.option("--sampler", type=click.Choice(["dpm++", "unipc", "ddim", "ddpm", "euler"]),
                     help="Diffusion pipeline: solver. Default: dpm++."),
        click.option("--guidance-scale", "--guidance_scale", type=float, help="Diffusion pipeline: weight of the prompt. Default: 3."),
    )):
        command = option(command)
    return command


def sampling_options(command: Callable, *, seeds: str = "0", encoded: bool = True) -> Callable:
    """Add the options of `SamplingOptions` to a click command, in their order; `seeds` is a default, `encoded` whether that is one."""
    for option in reversed((
        click.option("--network", "--network_pkl", "--network-pkl", "network", type=click.Path(path_type=Path), required=True,
                     help="Snapshot folder, or a run folder (its newest snapshot). Never a pickle."),
        click.option("--outdir", type=click.Path(path_type=Path), required=True, help="Folder for the patches."),
        click.option("--seeds", default=seeds, help="Seeds, as 0,1,4-6; every prompt is drawn once per seed."),
        click.option("--truncation", type=click.FloatRange(-100, 100), default=1.0,
                     help="psi: pulls z's part of the style to its mean; 1 is none."),
        click.option("--noise-mode", "--noise_mode", type=click.Choice(["const", "random", "none"]), default="random",
                     help="Per-pixel noise."),
        click.option("--translate", default="0,0", callback=_pair_of_numbers, help="Move what is drawn: x,y in shares of the side."),
        click.option("--rotate", default=0.0, help="Turn what is drawn, degrees."),
        click.option("--device", help="cpu, cuda, ... Default: a GPU if there is one."),
        *([click.option("--encoded", is_flag=True, help="The .npy holds embeddings, not expression.")] if encoded else []),
        click.option("--batch-sz", "--batch_sz", type=click.IntRange(max=2**16), default=16,
                     help="Patches at a time; does not change them."),
        click.option("--workers", type=click.IntRange(max=1024),
                     help="Threads that draw random numbers, encode and write. Default: one a core."),
        click.option("--clip", type=click.Path(path_type=Path), help="Where the gene encoder of the snapshot lies now, if it was moved."),
    )):
        command = option(command)
    return command


def _pair_of_numbers(_context, _parameter, text: str) -> tuple[float, float]:
    try:
        x, y = (float(part) for part in text.split(","))
    except ValueError as error:
        raise click.BadParameter(f"expected two numbers, as 0.1,-0.2; found {text}") from error
    return x, y
