"""Time and peak memory of every stage of preprocessing as slides grow, beside the naive way of doing it.

Each stage runs in a process of its own (peak memory is the kernel's figure for it), on a simulated Visium HD sample that is made
once and kept. Before and after it the naive way runs on a thousand of the same spots, so both see the same machine; the table
gives the ratio per spot of times on the wall, and of CPU time, which other work on the machine disturbs less and which our threads
do not shorten. The naive "whole" is the sum of its parts a spot: reading, windows, sums, patches, writing.
62,500 bins take a few minutes on 2 cores, 1 M about a quarter of an hour, 11 M about an hour and 60 GB of disk.
Example: python -m benchmarks.preprocessing --sizes 62500,1000000,11222500 --work bench
"""
from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from math import isqrt
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[1]
# A script in this folder that imports the package `preprocessing` finds this file first: let it be that package to them.
__path__ = [str(ROOT / "preprocessing")]

AIMED_BINS = 1_000_000                   # from here on the specification has targets
FULL_SLIDE_BINS = 4_000_000              # from here on tissue repeats and the slide has gigapixels


@dataclass(frozen=True)
class Stage:
    """A row of the table."""

    title: str
    naive: tuple[str, ...] = ()          # stages of the naive way; their times a spot add up
    least_ratio: float | None = None     # target of the specification, on 1 M bins
    torchstain: bool = False             # compare with it as well


STAGES = {
    "read": Stage("read sample"),
    "sums": Stage("sums of pseudo-spots", ("naive_sums",), 15),
    "cutting": Stage("cutting patches", ("naive_cutting",), 3),
    "stain_png": Stage("stain + PNG", ("naive_stain_png",), 4, torchstain=True),
    "extraction": Stage("whole extraction", ("naive_read", "naive_windows", "naive_sums", "naive_cutting", "naive_writing"), 8),
    "genes": Stage("gene filter"),
    "dump": Stage("dump_patches", ("naive_stain_png",)),
}
COLUMNS = ("bins", "stage", "units", "wall s", "CPU s", "units/s", "peak RSS GiB", "ms a unit", "naive ms a unit", "ratio", "ratio of CPU",
           "target")
HEADER = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"


def simulate(size: int, work: Path) -> Path:
    """The sample of `size` bins (a square), made unless it stands finished in `work`."""
    side_um = 2 * isqrt(size)
    options = {"out-dir": work / str(size), "platform": "visium-hd", "sample-id": f"BENCH{size}", "width-um": side_um, "height-um": side_um,
               "mpp": 0.274, "genes": 19_000, "umis": 30, "margin-um": max(20, min(100, side_um // 50))}
    if size >= FULL_SLIDE_BINS:
        options |= {"rim-um": 3000, "repeat-um": 1500}
    subprocess.run([sys.executable, "-m", "preprocessing.simulate_sample",
                    *(text for name, value in options.items() for text in (f"--{name}", str(value)))], cwd=ROOT, check=True)
    return work / str(size)


@dataclass
class Bench:
    """One size; keeps what was measured, so that a naive time serves every stage it is part of."""

    sample: Path
    out: Path
    workers: int
    spots: int
    runs: dict[str, list[dict]] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    def run(self, stage: str) -> None:
        command = [sys.executable, "-m", "benchmarks.stages.preprocessing", stage, self.sample, self.out, self.workers, self.spots]
        threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}            # one for each of our workers, and best for the naive way
        answer = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, env={**os.environ, **threads})
        if answer.returncode:
            click.echo(f"{stage} failed: {answer.stderr.strip()[-1500:]}", err=True)
            self.failed.append(stage)
            return
        found = json.loads(answer.stdout.strip().splitlines()[-1])
        self.runs.setdefault(stage, []).append(found)
        click.echo(f"{self.sample.name} {stage}: {json.dumps(found)}", err=True)

    def ms(self, *stages: str, clock: str = "wall_s") -> float:
        """Median time of a unit, of all the stages together; not a number where one failed."""
        return sum(statistics.median([1e3 * run[clock] / max(run["units"], 1) for run in self.runs.get(stage, [])] or [float("nan")])
                   for stage in stages)

    def compare(self, name: str, repeats: int) -> str:
        """Run a stage between runs of its naive way, and give its row of the table."""
        stage = STAGES[name]
        others = (*stage.naive, *(["torchstain_png"] if stage.torchstain else []))
        for _ in range(repeats):
            for turn in (*others, name):
                self.run(turn)
        for other in others:
            self.run(other)
        return self.row(name)

    def row(self, name: str) -> str:
        stage, runs = STAGES[name], self.runs.get(name)
        if not runs:
            return f"| {self.sample.name} | {stage.title} | failed |" + " |" * 9
        ours, wall, cpu = self.ms(name), *(statistics.median(run[key] for run in runs) for key in ("wall_s", "cpu_s"))
        units, peak = runs[0]["units"], max(run["peak_gib"] for run in runs)
        cells = [f"{int(self.sample.name):,}", stage.title, f"{units:,} {runs[0]['unit']}", f"{wall:.1f}", f"{cpu:.1f}",
                 f"{units / wall:,.0f}", f"{peak:.2f}", f"{ours:.4f}" if ours < 0.1 else f"{ours:.3f}"]
        ways = [("", stage.naive)] * bool(stage.naive) + [("torchstain ", ("torchstain_png",))] * stage.torchstain
        cells += [", ".join(f"{said}{value(way)}" for said, way in ways) for value in (
            lambda way: f"{self.ms(*way):.2f}",
            lambda way: f"{self.ms(*way) / ours:.1f}",
            lambda way: f"{self.ms(*way, clock='cpu_s') / max(self.ms(name, clock='cpu_s'), 1e-9):.1f}")]
        return "| " + " | ".join([*cells, self.target(name)]) + " |"

    def target(self, name: str) -> str:
        """What the specification asks of this stage at this size."""
        size, asked = int(self.sample.name), []
        if size < AIMED_BINS:
            return ""
        if STAGES[name].least_ratio and size < FULL_SLIDE_BINS:
            asked.append(f">= {STAGES[name].least_ratio:g}x")
        if name in ("sums", "extraction"):
            asked.append("RSS < 8 GiB" if size >= FULL_SLIDE_BINS else "RSS < 3 GiB")
        if name == "sums" and size >= FULL_SLIDE_BINS:
            asked.append("< 1,200 s")
        return ", ".join(asked)


def growth(benches: list[Bench], names: list[str]) -> str:
    """How a stage's time for a bin and its memory change from the smallest sample to each larger one."""
    lines = []
    for name in names:
        measured = [(int(bench.sample.name), bench.runs[name]) for bench in benches if name in bench.runs]
        if len(measured) > 1:
            first, steps = measured[0], []
            for size, runs in measured[1:]:
                time, memory = (statistics.median(run[key] for run in runs) / statistics.median(run[key] for run in first[1])
                                for key in ("wall_s", "peak_gib"))
                steps.append(f"bins x{size / first[0]:.0f}: time x{time:.1f}, memory x{memory:.1f}")
            lines.append(f"- {STAGES[name].title}: {'; '.join(steps)}")
    return "\n".join(lines)


def _sizes(_context, _option, text: str) -> list[int]:
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or any(isqrt(size) ** 2 != size or size < 62_500 for size in sizes):
        raise click.BadParameter(f"expected squares from 62500 on, comma-separated (62500,1000000,11222500); found {text}")
    return sorted(sizes)


def _stages(_context, _option, text: str) -> list[str]:
    names = text.split(",")
    if not set(names) <= set(STAGES):
        raise click.BadParameter(f"expected some of {','.join(STAGES)}; found {text}")
    return [name for name in STAGES if name in names]


@click.command(context_settings={"show_default": True})
@click.option("--sizes", default="62500,1000000", callback=_sizes, help="Numbers of bins, squares; a full slide is 11222500.")
@click.option("--work", type=click.Path(path_type=Path), help="Folder of the samples, kept for the next run.  [default: temporary]")
@click.option("--stages", default=",".join(STAGES), callback=_stages, help="Which to measure; the last two need extraction.")
@click.option("--spots-naive", default=1000, help="Spots that the naive way is timed on.")
@click.option("--repeats", default=1, help="Times a stage is measured, each between runs of the naive way; the table has medians.")
@click.option("--workers", default=2, help="Threads of our stages; the naive way has one.")
def main(sizes: list[int], work: Path | None, stages: list[str], spots_naive: int, repeats: int, workers: int):
    """Time and peak memory of preprocessing, ours and the naive way, as a Markdown table."""
    benches, rows = [], []
    with tempfile.TemporaryDirectory() as temporary:
        for size in sizes:
            sample = simulate(size, (work or Path(temporary)).absolute())
            out = sample.with_name(f"{size}.out")
            out.mkdir(exist_ok=True)
            benches.append(Bench(sample, out, workers, spots_naive))
            try:
                rows += [benches[-1].compare(name, repeats) for name in stages]
            finally:
                shutil.rmtree(out)
        click.echo("\n".join([HEADER, *rows, "", growth(benches, stages)]))
    if any(bench.failed for bench in benches):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
