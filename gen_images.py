"""Generate patches: GAN snapshot + prompts (expression or embeddings) + seeds -> PNG patches, samples.csv, grid.png."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

import click

from preprocessing.errors import Command, OptionError

GRID_ROWS, GRID_COLUMNS = 12, 8
SAMPLE_COLUMNS = ("file", "prompt", "barcode", "cluster", "seed", "truncation", "weights_sha256")


@dataclass(frozen=True)
class GenerateConfig:
    """One call of `generate_patches`."""

    network: Path                       # snapshot folder, or a run folder: its newest snapshot
    gex: Path | None                    # prompts; None for an unconditional snapshot
    outdir: Path
    seeds: str = "0"
    n_samples: int | None = None        # prompts per cluster or over all (.h5ad); patches a row (.npy)
    clusters: str | None = None         # labels: .npy, CSV, or an obs column
    truncation: float = 1.0             # 1 = none
    noise_mode: str = "random"
    translate: tuple[float, float] = (0.0, 0.0)   # shares of the side
    rotate: float = 0.0                 # degrees
    device: str | None = None
    encoded: bool = False               # the rows are embeddings
    batch_sz: int = 16
    same_seed: bool = False             # one z for all prompts of a seed
    images: str | None = None           # real patches of the prompts, for grid.png
    clip: Path | None = None            # where the gene encoder lies now

    def __post_init__(self):
        if self.batch_sz < 1:
            raise OptionError("--batch-sz", "at least 1", str(self.batch_sz))
        for name in ("truncation", "rotate"):
            if not isfinite(getattr(self, name)):
                raise OptionError(f"--{name}", "a finite number", str(getattr(self, name)))
        if not all(map(isfinite, self.translate)):
            raise OptionError("--translate", "two finite numbers", ",".join(map(str, self.translate)))
        if self.images and (self.encoded or self.gex is None or self.gex.suffix != ".h5ad"):
            raise OptionError("--images", "an .h5ad as --gex, whose barcodes name the patches", str(self.gex))


def generate_patches(config: GenerateConfig) -> Iterator[Path]:
    """Make and save the patches; yields the files as they are written, samples.csv and grid.png last."""
    from evaluation.contact_sheet import save_png
    from evaluation.features import pick_device
    from networks.snapshot import load_snapshot, move_fourier_input
    from training.gan_grids import as_pictures, generate
    from training.prompts import parse_seeds, plan_requests, read_prompts

    seeds, device = parse_seeds(config.seeds), pick_device(config.device or "auto")
    snapshot = load_snapshot(newest_snapshot(config.network), gene_encoder=not config.encoded, gene_encoder_path=config.clip)
    prompts = read_prompts(config.gex, snapshot, encoded=config.encoded, clusters=config.clusters)
    requests = plan_requests(prompts, seeds, config.n_samples)
    real = _RealPatches(config, snapshot)
    move_fourier_input(snapshot.generator, config.translate, config.rotate)
    generator = snapshot.generator.to(device)
    grid: dict[int, list] = {}
    for start in range(0, len(requests), config.batch_sz):
        part = requests[start:start + config.batch_sz]
        keys = [(request.seed, 0 if config.same_seed else request.prompt) for request in part]
        embeddings = prompts.embeddings[[request.prompt for request in part]]
        made = as_pictures(generate(generator, embeddings, keys, config.truncation, config.noise_mode, config.batch_sz))
        for request, picture in zip(part, made, strict=True):
            path = config.outdir / request.file_name
            save_png(path, picture)
            if request.prompt in grid or len(grid) < GRID_ROWS:
                grid.setdefault(request.prompt, []).append(picture)
            yield path
    yield _write_samples(config, requests, prompts, snapshot.weights_sha256)
    yield _write_grid(config, grid, real)


class _RealPatches:
    """Patches of the prompts, paired by barcode, where `--images` names them."""

    def __init__(self, config: GenerateConfig, snapshot):
        self.side, self.spots = snapshot.generator.config.img_resolution, None
        if config.images:
            from training.data import ImageGeneDataset, sample_files
            self.spots = ImageGeneDataset(sample_files(config.images, config.gex), vocabulary=snapshot.gene_encoder.gene_names)

    def __getitem__(self, prompt: int) -> list:
        return [] if self.spots is None else [self.spots.read_image(prompt, self.side)]


def newest_snapshot(folder: Path) -> Path:
    """`folder` itself, or the newest snapshot of a run folder."""
    found = [path for path in folder.glob("snapshot-*") if path.name[9:].isdigit()] if folder.is_dir() else []
    return max(found, key=lambda path: int(path.name[9:])) if found else folder


def _write_samples(config: GenerateConfig, requests, prompts, weights_sha256: str) -> Path:
    import csv

    from preprocessing.outputs import finished_file

    path = config.outdir / "samples.csv"
    with finished_file(path) as temporary, open(temporary, "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(SAMPLE_COLUMNS)
        for request in requests:
            writer.writerow([request.file_name, request.prompt, prompts.barcodes[request.prompt], request.cluster or "", request.seed,
                             config.truncation, weights_sha256])
    return path


def _write_grid(config: GenerateConfig, grid: dict[int, list], real: _RealPatches) -> Path:
    """One row a prompt, its real patch first where known."""
    from evaluation.contact_sheet import contact_sheet, save_png

    first = ["real"] if real.spots is not None else []
    rows = [real[prompt] + pictures[:GRID_COLUMNS] for prompt, pictures in grid.items()]
    n_columns = max(len(row) for row in rows) - len(first)
    path = config.outdir / "grid.png"
    save_png(path, contact_sheet(rows, row_labels=[f"prompt {prompt}" for prompt in grid],
                                 column_labels=first + [f"{number + 1}" for number in range(n_columns)]))
    return path


def _pair_of_numbers(_context, _parameter, text: str) -> tuple[float, float]:
    try:
        x, y = (float(part) for part in text.split(","))
    except ValueError as error:
        raise click.BadParameter(f"expected two numbers, as 0.1,-0.2; found {text}") from error
    return x, y


@click.command(cls=Command)
@click.option("--network", "--network_pkl", "--network-pkl", "network", type=click.Path(path_type=Path), required=True,
              help="Snapshot folder, or a run folder (its newest snapshot). Never a pickle.")
@click.option("--gex", type=click.Path(path_type=Path), help="Prompts (none for an unconditional snapshot): .h5ad of raw counts; or .npy, "
              "one row a prompt: expression of the snapshot's genes in their order, normalised as in training (counts scaled to the "
              "snapshot's library size, gene_encoder.target_sum in its config.json, then log1p).")
@click.option("--outdir", type=click.Path(path_type=Path), required=True, help="Folder for the patches.")
@click.option("--seeds", default="0", help="Seeds, as 0,1,4-6; every prompt is drawn once per seed.")
@click.option("--n-samples", "--n_samples", type=int,
              help=".h5ad: prompts per cluster, or over all; .npy: patches a row. Default: every row.")
@click.option("--clusters", help="Cluster labels: .npy, CSV (last column), or an obs column of the .h5ad.")
@click.option("--truncation", default=1.0, help="psi: pulls z's part of the style to its mean; 1 is none.")
@click.option("--noise-mode", "--noise_mode", type=click.Choice(["const", "random", "none"]), default="random", help="Per-pixel noise.")
@click.option("--translate", default="0,0", callback=_pair_of_numbers, help="Move what is drawn: x,y in shares of the side.")
@click.option("--rotate", default=0.0, help="Turn what is drawn, degrees.")
@click.option("--device", help="cpu, cuda, ... Default: a GPU if there is one.")
@click.option("--encoded", is_flag=True, help="The .npy holds embeddings, not expression.")
@click.option("--batch-sz", "--batch_sz", default=16, help="Patches at a time; does not change them.")
@click.option("--same-seed", "--same_seed", is_flag=True, help="One z a seed for all prompts, so that only the genes differ.")
@click.option("--images", help="Real patches (folder or imgs.h5) of the .h5ad, shown first in grid.png.")
@click.option("--clip", type=click.Path(path_type=Path), help="Where the gene encoder of the snapshot lies now, if it was moved.")
def main(**options):
    """Generate patches for gene-expression prompts.

    \b
    python gen_images.py --network runs/gan/00000-C2-C3@64-small-gpus1-b16 --gex runs/C4/gex_filt.h5ad --seeds 0-3 \\
        --n-samples 5 --clusters cluster --images runs/C4/patches --outdir runs/generated
    """
    from tqdm import tqdm

    config = GenerateConfig(**options)
    files = list(tqdm(generate_patches(config), desc="patches", unit="patch"))
    click.echo(f"wrote {len(files) - 2} patches, {files[-2].name} and {files[-1].name} to {config.outdir}")


if __name__ == "__main__":
    main()
