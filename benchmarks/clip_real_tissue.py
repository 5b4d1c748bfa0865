"""Compare CLIP recipes on real tissue with few spots, at equal images seen, beside a linear baseline.

Reads sections prepared by `assets/real_tissue.sh` (OUT/<section>/patches, gex_filt.h5ad in the genes of the training sections).
Without --held-out each training section in turn is left out and scored: that is what to choose by, and how learning rate and
temperature of the tuned published model are found. With it the held-out section is scored, for reporting: retrieval with 95 %
intervals, averaged over seeds, and the paired difference in R@10 to the baseline that `evaluate_sections.py` fits (its tower at
224 px, counts to 10,000), bootstrapped over the spots. Intervals leave out the spread of seeds.

    python -m benchmarks.clip_real_tissue --out runs/her2st --train C2,C3 --held-out C4 --seeds 0,1,2
    python -m benchmarks.clip_real_tissue --out runs/her2st --train C2,C3 --recipes "clip_small,D 64"      (cross-validates only)

The published gene encoder has G x G weights: give it a GPU, or leave it out with --recipes.
"""
from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = {"model.image_encoder": "efficientnet_lite0", "model.image_encoder_px": 128, "image.cache_features": 8,   # as clip_small
             "data.val_fraction": 0, "trainer.select": "last"}
RECIPES = {   # name -> (configuration of assets/, what differs)
    "published": ("clip_config", PUBLISHED),
    "published tuned": ("clip_config", PUBLISHED),
    "clip_small": ("clip_small", {}),
    "dropouts .3 and .6": ("clip_small", {"model.gene_dropout": 0.3, "model.feature_dropout": 0.6}),
    "every gene": ("clip_small", {"model.gene_min_share": 0.0}),
    "tower at 224 px": ("clip_small", {"model.image_encoder_px": None}),
    "D 64": ("clip_small", {"model.projection": 64}),
    "learned temperature": ("clip_small", {"model.learn_temperature": True, "model.temperature": 0.07}),
    "one view when embedding": ("clip_small", {"model.image_views": 1}),
    "not centred": ("clip_small", {"model.feature_sample_scaling": "none", "model.gene_sample_scaling": "none"}),
    "patches alone centred": ("clip_small", {"model.gene_sample_scaling": "none"}),
    "within-sample contrast": ("clip_small", {"trainer.contrast": "within_sample"}),
}
TUNED = "published tuned"
BASELINE_SUM = 10_000.0     # counts of a spot
GRID = [{"optimizer.lr": lr, "model.temperature": temperature} for lr in (1e-4, 1e-3) for temperature in (0.05, 0.2)]
COLUMNS = ("gene to image R@1", "R@5", "R@10", "95 %", "rank", "image to gene R@10", "95 %", "rank",
           "gene to image R@10 minus baseline's at 224 px", "image to gene")


@dataclass(frozen=True)
class Bench:
    """What every training of this benchmark shares."""

    work: Path                  # features, run folders
    epochs: int
    encoder_weights: str | None

    @property
    def device(self) -> str:
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"

    def train(self, recipe: tuple[str, dict], train: list[Path], val: Path, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Train on sections, embed another; two float32 (N, D): genes and images."""
        from omegaconf import OmegaConf

        from training.clip_config import clip_config
        from training.clip_run import run_clip
        from training.composed_config import compose_config

        name, differences = recipe
        loaded = compose_config(name, None, ())
        with tempfile.TemporaryDirectory(dir=self.work) as run_dir:
            for key, value in {**differences, "seed": seed, "logger": "none", "run_dir": run_dir, "trainer.progress_bar": False,
                               "trainer.save_top": 0, "trainer.max_epochs": self.epochs, "image.cache_dir": str(self.work / "features"),
                               "model.image_encoder_weights": self.encoder_weights,
                               "data.train_gex": [str(folder / "gex_filt.h5ad") for folder in train],
                               "data.train_image_dir": [str(folder / "patches") for folder in train]}.items():
                OmegaConf.update(loaded, key, value, force_add=True)
            run_clip(clip_config(loaded), Path)
            return self.embed(Path(run_dir) / "clip", val)

    def embed(self, network: Path, section: Path) -> tuple[np.ndarray, np.ndarray]:
        """What `clip_embeddings.py` gives, with the frozen tower's features of a section computed once for all recipes."""
        import torch

        from networks.clip import CLIP
        from training.augment import plain_views, turned_views
        from training.clip_features import cached_features

        clip = CLIP.from_pretrained(network, image_encoder_weights=self.encoder_weights).to(self.device)
        data = self.read([section], clip.target_sum)
        views = (turned_views() if clip.config.image_views == 8 else plain_views(1)).expand(len(data), -1, -1)
        features = cached_features(data.load_images(clip.training_record["patch_px"], progress=False), views, clip.image_encoder,
                                   tower_key=f"{clip.image_encoder.source}@{clip.image_encoder.input_px}px",
                                   cache_dir=self.work / "features", device=self.device, progress=False).to(self.device)
        with torch.no_grad():
            images = clip.project_views(features, features.mean((0, 1)) if clip.centres_features else None)
        return clip.embed_expression(data.expression, sample_ids=data.sample_ids).numpy(), images.cpu().numpy()

    def read(self, folders: list[Path], target_sum: float | str):
        """The paired samples of these folders."""
        from training.data import ImageGeneDataset
        from training.sample_sheet import sample_files

        images, gex = (",".join(str(folder / name) for folder in folders) for name in ("patches", "gex_filt.h5ad"))
        return ImageGeneDataset(sample_files(images, gex), target_sum=target_sum)

    def baseline(self, train: list[Path], val: Path, side_px: int, centred: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """(predicted, projected) of the linear baseline on another section, both (N, 50); `centred`: every section about its own mean."""
        from evaluation.features import image_features
        from evaluation.linear_baseline import fit_linear_baseline
        from networks.histo_models import build_encoder

        tower = build_encoder("efficientnet_lite0", self.encoder_weights, side_px).to(self.device)
        fitted, held = self.read(train, BASELINE_SUM), self.read([val], BASELINE_SUM)
        features = [image_features(data.load_images(progress=False).permute(0, 2, 3, 1).numpy(), tower, device=self.device, progress=False)
                    for data in (fitted, held)]
        expression = [data.expression for data in (fitted, held)]
        if centred:
            samples = [data.sample_ids for data in (fitted, held)]
            expression, features = [[about_own_mean(rows, names) for rows, names in zip(side, samples, strict=True)]
                                    for side in ([part.toarray() for part in expression], features)]
        model = fit_linear_baseline(expression[0], features[0], fitted.sample_ids, rng=np.random.default_rng(0))
        return model.predict(expression[1]), model.project(features[1])


def about_own_mean(rows: np.ndarray, sample_ids: np.ndarray) -> np.ndarray:
    """(N, F) rows minus the mean of their sample."""
    return rows - np.stack([rows[sample_ids == name].mean(axis=0) for name in sample_ids])


def folds_of(train: list[Path]) -> list[tuple[list[Path], Path]]:
    """Each training section left out once."""
    return [([other for other in train if other != folder], folder) for folder in train]


def cross_validated(bench: Bench, recipe: tuple[str, dict], train: list[Path], seeds: list[int]) -> tuple[float, float]:
    """(mean R@10 gene to image, mean share of the pool above the right patch), the second steadier and small when good."""
    from evaluation.linear_baseline import mean_share_above
    from evaluation.retrieval import retrieval_metrics

    found = [bench.train(recipe, others, left_out, seed) for others, left_out in folds_of(train) for seed in seeds]
    return (float(np.mean([retrieval_metrics(*pair, n_bootstrap=1)["r10"] for pair in found])),
            float(np.mean([mean_share_above(*pair) for pair in found])))


def tune(bench: Bench, train: list[Path]) -> dict:
    """The learning rate and temperature of the published model with which it ranks left-out training sections best."""
    scores = []
    for options in GRID:
        r10, above = cross_validated(bench, ("clip_config", {**PUBLISHED, **options}), train, [0])
        click.echo(f"published with {options}: cross-validated R@10 {r10:.3f}, share above {above:.4f}", err=True)
        scores.append(above)
    return GRID[int(np.argmin(scores))]


def row(name: str, runs: list[tuple[np.ndarray, np.ndarray]], baseline: tuple[np.ndarray, np.ndarray] | None) -> str:
    """One line of the table: the mean over seeds; intervals are over spots."""
    from evaluation.retrieval import places, r10_difference, summarise_places

    turned = [pair[::-1] for pair in runs]
    ways = [summarise_places([places(*pair) for pair in pairs]) for pairs in (runs, turned)]
    cells = [f"{ways[0]['r1']:.3f}", f"{ways[0]['r5']:.3f}"]
    for way in ways:
        cells += [f"{way['r10']:.3f}", f"{way['r10_ci95'][0]:.3f}-{way['r10_ci95'][1]:.3f}", f"{way['median_rank']:.1f}"]
    for pairs, other in ((runs, baseline), (turned, baseline and baseline[::-1])):
        found = other and r10_difference(pairs, other)
        cells.append(f"{found['mean']:+.3f} ({found['ci95'][0]:+.3f} to {found['ci95'][1]:+.3f})" if found else "")
    return f"| {name} | {' | '.join(cells)} |"


def table(bench: Bench, train: list[Path], held_out: Path | None, names: list[str], seeds: list[int]) -> list[str]:
    """A line a recipe: cross-validated, or scored on the held-out section below the linear baseline at two sides of its tower."""
    rows, baselines = [], {}
    if held_out is not None:
        baselines = {side: bench.baseline(train, held_out, side) for side in (128, 224)}
        rows = [row(f"linear baseline at {side} px", [pair], None) for side, pair in baselines.items()]
        rows.append(row("linear baseline at 224 px, sections centred", [bench.baseline(train, held_out, 224, centred=True)], None))
    for name in names:
        config, differences = RECIPES[name]
        if name == TUNED:
            best = tune(bench, train)
            differences, name = {**differences, **best}, f"{name}: lr {best['optimizer.lr']:g}, T {best['model.temperature']:g}"
        if held_out is None:
            r10, above = cross_validated(bench, (config, differences), train, seeds)
            rows.append(f"| {name} | {r10:.3f} | {above:.4f} |")
        else:
            rows.append(row(name, [bench.train((config, differences), train, held_out, seed) for seed in seeds], baselines[224]))
        click.echo(rows[-1], err=True)
    return rows


@click.command(context_settings={"show_default": True})
@click.option("--out", type=click.Path(path_type=Path), default="runs/her2st", help="Folder that holds the prepared sections.")
@click.option("--train", default="C2,C3", help="Training sections, by commas.")
@click.option("--held-out", default=None, help="Section to score once.  [default: none: only cross-validation]")
@click.option("--seeds", default="0,1,2")
@click.option("--epochs", default=200, help="Of every recipe: equal images seen.")
@click.option("--recipes", default="published,published tuned,clip_small", help=f"By commas, of: {', '.join(RECIPES)}.")
@click.option("--encoder-weights", help="Weight file of EfficientNet-Lite0, where its package is not installed.")
@click.option("--work", type=click.Path(path_type=Path), help="Folder of what is made on the way.  [default: temporary]")
def main(out, train, held_out, seeds, epochs, recipes, encoder_weights, work):
    """Print a table of recipes: cross-validated between the training sections, or scored on a held-out one."""
    from training.clip_notices import quiet_lightning

    folders, names = [out / name for name in train.split(",")], [name.strip() for name in recipes.split(",")]
    if unknown := [name for name in names if name not in RECIPES]:
        raise click.BadParameter(f"expected some of {', '.join(RECIPES)}; found {unknown[0]}", param_hint="--recipes")
    missing = [folder for folder in [*folders, *([out / held_out] if held_out else [])] if not (folder / "gex_filt.h5ad").exists()]
    if missing:
        click.echo(f"skipped: {missing[0]} is not prepared; run assets/real_tissue.sh first")
        return
    quiet_lightning()
    with tempfile.TemporaryDirectory(dir=work) as temporary:
        rows = table(Bench(Path(temporary), epochs, encoder_weights), folders, out / held_out if held_out else None, names,
                     [int(seed) for seed in seeds.split(",")])
    columns = COLUMNS if held_out else ("cross-validated g2i R@10", "share above")
    click.echo("\n".join([f"| {train} -> {held_out or 'each other'} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|", *rows]))


if __name__ == "__main__":
    main()
