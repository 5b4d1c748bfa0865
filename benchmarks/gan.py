"""Time the GAN's step and its memory, part by part: ours, and a straightforward formulation of the same formulas beside it.

Every row has a process of its own, so that its peak memory is its own; the processes of a part take turns, one go each, so that what
else the machine does falls on all of them. Rows: `ours` (one pass serves both losses), `ours, two passes` (the published passes, our
layers), `plain` (the published passes, benchmarks/stages/plain_gan.py). Parts: the generator, forward and back; the discriminator,
backbone and heads for both losses, prompts embedded as each way does it; guidance by the image tower, one row, as it is one code for
all; the whole step without and with guidance. Patches, expression and frozen weights are made on the spot. Ours is set up as
`train_gan.py` sets a run up, with the same options and defaults; the plain way is float32 and eager.
Example: python -m benchmarks.gan --device cuda --batch 128 --batch-gpu 128 --compile blocks
"""
from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import click

ROOT = Path(__file__).resolve().parent.parent
WAYS = ("ours", "ours, two passes", "plain")
STEP, GUIDED = "step", "step with guidance"
PARTS = ("generator", "discriminator", "guidance", STEP, GUIDED)
BARS = {STEP: (600, 750), GUIDED: (430, 550)}   # images/s of lite at 64 px on one H200: first bar, aim


@dataclass
class Row:
    """One way of one part: its process, and what it measured."""

    part: str
    way: str
    batch: int
    process: subprocess.Popen
    goes: list[dict] = field(default_factory=list)
    peak_gib: float = float("nan")

    def s_per_kimg(self, clock: str = "wall_s") -> float:
        return median(go[clock] for go in self.goes) / self.batch * 1000

    @property
    def images_per_s(self) -> float:
        return 1000 / self.s_per_kimg()

    def answer(self) -> str:
        """The next line of the process; its own words on stderr say what went wrong if there is none."""
        line = self.process.stdout.readline()
        if not line:
            raise click.ClickException(f"{self.part}, {self.way}: the process ended with code {self.process.wait()}")
        return line

    def go(self) -> None:
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self.goes.append(json.loads(self.answer()))

    def finish(self) -> None:
        self.process.stdin.close()
        self.peak_gib = json.loads(self.answer())["peak_gib"]
        self.process.wait()


def measure(part: str, ways: list[str], rounds: int, **job: object) -> list[Row]:
    """One part, all ways taking turns."""
    rows: list[Row] = []
    try:
        for way in ways:
            command = [sys.executable, "-m", "benchmarks.stages.gan", json.dumps({"way": way, "part": part, **job})]
            process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            rows.append(Row(part, way, job["batch"], process))
            rows[-1].answer()                         # built and warm, before the next one starts
        for _ in range(rounds):
            for row in rows:
                row.go()
        for row in rows:
            row.finish()
    finally:
        for row in rows:
            if row.process.poll() is None:
                row.process.kill()
                row.process.wait()
    return rows


def print_rows(rows: list[Row], on_gpu: bool) -> None:
    """The rows of one part, and what ours is worth beside the last of them."""
    for row in rows:
        click.echo(f"{row.part:<20}{row.way:<18}{len(row.goes):>6}{row.s_per_kimg():>12.2f}{row.s_per_kimg('cpu_s'):>12.2f}"
                   f"{row.images_per_s:>11.1f}{row.peak_gib:>9.2f}")
    *ours, other = rows
    for row in ours:
        click.echo(f"{'':<20}{row.way} is {other.s_per_kimg() / row.s_per_kimg():.2f} x as fast as {other.way} "
                   f"({other.s_per_kimg('cpu_s') / row.s_per_kimg('cpu_s'):.2f} x by CPU time) "
                   f"in {row.peak_gib / other.peak_gib:.2f} x its {'GPU memory' if on_gpu else 'memory'}")


def print_bars(rows: list[Row]) -> None:
    """Images a second of a whole step against what we want of it."""
    for row in rows:
        bar, aim = BARS[row.part]
        verdict = "reaches its aim" if row.images_per_s >= aim else "passes its bar" if row.images_per_s >= bar else "misses its bar"
        click.echo(f"{row.part}: {row.images_per_s:.0f} images/s {verdict} (bar {bar}, aim {aim}, on an H200)")


def _chosen(choices: tuple[str, ...]):
    def parse(_context, _option, text: str) -> list[str]:
        chosen = [part.strip() for part in text.split(";")]
        if unknown := [part for part in chosen if part not in choices]:
            raise click.BadParameter(f"expected some of {'; '.join(choices)}; found {', '.join(unknown)}")
        return chosen
    return parse


@click.command(context_settings={"show_default": True})
@click.option("--device", default="cpu", help="cpu or cuda.")
@click.option("--cfg", default="lite", type=click.Choice(["small", "lite", "full"]), help="Size of the generator.")
@click.option("--img-resolution", default=64, help="px.")
@click.option("--batch", default=8, help="Images a go, a multiple of 8.")
@click.option("--rounds", default=None, type=click.IntRange(min=1), help="Goes a row; none = 3 on a CPU, 20 on a GPU.")
@click.option("--ways", default=";".join(WAYS), callback=_chosen(WAYS), help=f"Rows, separated by semicolons: {'; '.join(WAYS)}.")
@click.option("--parts", default=";".join(PARTS), callback=_chosen(PARTS), help="Parts, separated by semicolons.")
@click.option("--backbone", default="lunit_dino_vits16", help="Of the discriminator, a name in networks/encoder_specs.py.")
@click.option("--tower", default="uni", help="Image tower that guides.")
@click.option("--batch-gpu", default=8, help="Images of a micro-batch; a multiple of 8.")
@click.option("--compile", default="off", type=click.Choice(["off", "blocks", "max"]), help="Of ours: minutes before the first go.")
@click.option("--fp32/--bf16", default=None, help="What ours computes in. Default: bf16 on a GPU, fp32 on a CPU.")
@click.option("--workers", default=3, help="Threads that draw random numbers and read patches ahead of a step.")
@click.option("--genes", default=18_248, help="Genes the prompt encoder of the plain way reads at every use.")
def main(device: str, rounds: int | None, ways: list[str], parts: list[str], **sizes):
    """Print seconds a kimg and peak memory of every part; on a GPU also images/s against our bars."""
    on_gpu = device.startswith("cuda")
    rounds = rounds or (20 if on_gpu else 3)
    click.echo(f"{device}, " + ", ".join(f"{name} {value}" for name, value in sizes.items() if value is not None))
    click.echo(f"{'':<38}{'goes':>6}{'s a kimg':>12}{'CPU s':>12}{'images/s':>11}{'GPU GiB' if on_gpu else 'RSS GiB':>9}")
    steps: list[Row] = []
    for part in parts:
        rows = measure(part, ways[:1] if part == "guidance" else ways, rounds, device=device, **sizes)
        print_rows(rows, on_gpu)
        steps += [row for row in rows if part in BARS and row.way == "ours"]
    if on_gpu and (sizes["cfg"], sizes["img_resolution"]) == ("lite", 64):
        print_bars(steps)


if __name__ == "__main__":
    main()
