"""Generate patches for prompts: what gen_images.py does, in one process or in several that torchrun started.

Each rank makes its share of the batches that are not there yet; rank 0 then writes samples.csv, grid.png and the .h5 in the order of the
requests. They must share the disk.
"""
from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evaluation.contact_sheet import contact_sheet, save_png
from networks.snapshot import Snapshot
from preprocessing.done_manifests import fingerprint
from preprocessing.errors import OptionError
from preprocessing.inputs import path_list
from preprocessing.older_outputs import GENERATED_HDF5
from preprocessing.output_places import require_outputs, require_own_folder
from preprocessing.outputs import locked
from preprocessing.progress import ProgressBar
from training.data import ImageGeneDataset
from training.generated_h5 import GeneratedH5
from training.generated_pngs import GeneratedPngs
from training.generation_plan import GenerationPlan, ingredients
from training.prompts import parse_seeds, plan_requests, read_prompts
from training.ranks import TIMEOUT_MINUTES
from training.sample_folders import GENERATED, with_file
from training.sample_sheet import sample_files
from training.sampling import newest_snapshot, open_snapshot, sample_batches
from training.sampling_options import SamplingOptions
from training.sampling_ranks import Ranks, all_ranks

SAMPLES, GRID = "samples.csv", "grid.png"
MEET_EVERY = 32                         # batches of a rank: so long a slower one, or one that is stuck, is not noticed


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(SamplingOptions):
    """One call of `generate_patches`."""

    gex: Path | None = None             # prompts; None for an unconditional snapshot
    n_samples: int | None = None        # prompts per cluster or over all (.h5ad); patches a row (.npy)
    clusters: str | None = None         # labels: .npy, CSV, or an obs column
    same_seed: bool = False             # one z for all prompts of a seed
    images: str | None = None           # real patches of the prompts, for grid.png
    out_h5: Path | None = None          # one file of patches instead of PNGs
    timeout_minutes: float = TIMEOUT_MINUTES   # that one process waits for another

    def __post_init__(self):
        super().__post_init__()
        if self.images and (self.encoded or self.gex is None or self.gex.suffix != ".h5ad"):
            raise OptionError("--images", "an .h5ad as --gex, whose barcodes name the patches", str(self.gex))
        require_own_folder("--outdir", self.outdir, with_file(GENERATED, self.outdir, self.out_h5))
        require_outputs({"--outdir": [self.outdir / SAMPLES, self.outdir / GRID],
                         "--out-h5": {} if self.out_h5 is None else {self.out_h5: GENERATED_HDF5}},
                        {"--gex": self.gex, "--images": path_list(self.images or ""), "--clusters": self.clusters})


@dataclass(frozen=True)
class Generated:
    """What a call left."""

    n_patches: int
    n_kept: int             # of them found whole from an earlier call
    files: list[Path]       # beside single patches: the .h5, samples.csv, grid.png


def generate_patches(config: GenerateConfig, progress: bool = True) -> Generated | None:
    """Make and save the patches of `config` that are not there yet. None on all ranks but the first.

    Stopped at any moment, it leaves whole patches; called again with the same config, weights and prompts it makes the rest.
    """
    seeds = parse_seeds(config.seeds)
    with all_ranks(config.timeout_minutes) as ranks, ExitStack() as held:
        device, workers = ranks.device(config.device), ranks.workers(config.workers)
        snapshot = open_snapshot(Path(ranks.tell(str(newest_snapshot(config.network)))), config, device)
        read_from = fingerprint(config.gex) if config.gex and config.gex.is_file() else {}   # before it is read: it may be replaced
        prompts = read_prompts(config.gex, snapshot, encoded=config.encoded, clusters=config.clusters)
        plan = GenerationPlan(prompts, plan_requests(prompts, seeds, config.n_samples), config, config.same_seed,
                              snapshot.generator.config.img_resolution, snapshot.weights_sha256,
                              ingredients(snapshot, read_from, config, device))
        real = _real_patches(config, snapshot) if ranks.is_first else None
        if config.out_h5 is None:
            output = GeneratedPngs(plan, config.outdir, ranks, workers)
        else:
            output = GeneratedH5(plan, config.out_h5, ranks)
        for path, covers in ((config.outdir / SAMPLES, [config.outdir / GRID]), (config.out_h5, [])) if ranks.is_first else ():
            if path is not None:
                held.enter_context(locked(path, covers=covers))
        missing = output.begin()
        _make(plan, missing, snapshot, output, ranks, workers, progress)
        if not ranks.is_first:
            return None
        files = [*output.finish(), *_describe(plan, output, config.outdir, real)]
        return Generated(len(plan), len(plan) - sum(len(plan.rows(number)) for number in missing), files)


def _make(plan: GenerationPlan, missing: list[int], snapshot: Snapshot, output: GeneratedPngs | GeneratedH5, ranks: Ranks, workers: int,
          progress: bool) -> None:
    """This rank's share of the missing batches; returns when all ranks have theirs on the disk.

    Ranks wait for each other on the way, so that no wait is longer than the work of a few batches, however long the whole takes.
    """
    if missing and ranks.is_first:            # what describes other patches goes before they do
        for name in (SAMPLES, GRID):
            (plan.options.outdir / name).unlink(missing_ok=True)
    ranks.wait()
    own = missing[ranks.rank::ranks.size]
    total = sum(len(plan.rows(number)) for number in own)
    batches = (plan.batch(number) for number in own)
    with ProgressBar(total=total, desc="patches", unit="patch", disable=not (progress and ranks.is_first)) as bar:
        for number, n_saved in enumerate(sample_batches(snapshot.generator, batches, plan.options, output.save, workers), 1):
            bar.update(n_saved)
            if number % MEET_EVERY == 0 and number <= len(missing) // ranks.size:     # batches that every rank has
                ranks.wait()
    output.settle()
    ranks.wait()


def _real_patches(config: GenerateConfig, snapshot: Snapshot) -> ImageGeneDataset | None:
    """Patches of the prompts, paired by barcode, where `--images` names them."""
    if not config.images:
        return None
    return ImageGeneDataset(sample_files(config.images, config.gex), vocabulary=snapshot.gene_encoder.gene_names)


def _describe(plan: GenerationPlan, output: GeneratedPngs | GeneratedH5, folder: Path, real: ImageGeneDataset | None) -> list[Path]:
    """Write samples.csv and grid.png: one row a prompt, its real patch first where known."""
    samples, grid = folder / SAMPLES, folder / GRID
    shown = plan.grid()

    def row_of(prompt: int) -> list[np.ndarray]:
        first = [] if real is None else [real.read_image(prompt, plan.patch_px)]
        return first + [output.picture(row) for row in shown[prompt]]

    columns = [*([] if real is None else ["real"]), *(f"{number + 1}" for number in range(max(map(len, shown.values()))))]
    save_png(grid, contact_sheet([row_of(prompt) for prompt in shown], row_labels=[f"prompt {prompt}" for prompt in shown],
                                 column_labels=columns))
    plan.write_samples_csv(samples, output.columns, [output.names(row) for row in range(len(plan))])
    return [samples, grid]
