"""Do the numbers order generators as they must? real > good generator > poor generator > shuffled prompts > noise, on one held-out section.

Reads the section's patches and expression, and two folders that gen_images.py wrote for its spots: of a trained snapshot and of an early
one. Shuffled: the good generator's patches at other spots. Noise: pixels with the colours of the real patches, all in disorder. Prints a
row a number, and whether its values stand in that order; one that only sees the pairing cannot tell shuffled from noise (both 0).

    python -m benchmarks.ordering --images SIM_B/patches --gex SIM_B/gex_filt.h5ad --good generated --poor generated_early --spots 300
"""
from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np

if TYPE_CHECKING:
    from evaluation.sections import Generated, Section

ORDER = ("real", "good", "poor", "shuffled", "noise")
MEASURES = (   # what is printed, entry of score_all, key
    ("expression read-out: Pearson", "readout", "score"), ("expression read-out: variance explained", "readout", "explained"),
    ("clusters: balanced accuracy", "clusters", "score"), ("clusters: log-likelihood", "clusters", "log_likelihood"),
    ("nuclei and stain: Pearson", "nuclei", "score"), ("nuclei and stain: variance explained", "nuclei", "explained"),
    ("pattern in space: Moran's I", "spatial", "score"), ("retrieval: R@10", "retrieval", "score"),
)
PAIRING_ALONE = {"expression read-out: Pearson", "clusters: balanced accuracy", "nuclei and stain: Pearson", "pattern in space: Moran's I",
                 "retrieval: R@10"}


@dataclass(frozen=True)
class Row:
    """One number of the five."""

    name: str
    values: dict[str, float]           # by ORDER; without shuffled for what does not see pairing
    smaller_is_better: bool = False

    def ordered(self, tolerance: float) -> str:
        """"yes", or the first neighbours that stand the wrong way round."""
        known = [name for name in ORDER if name in self.values]
        sign = -1 if self.smaller_is_better else 1
        for better, worse in zip(known, known[1:], strict=False):
            gap = sign * (self.values[better] - self.values[worse])
            level = self.name in PAIRING_ALONE and (better, worse) == ("shuffled", "noise")
            if gap <= 0 and not (level and -gap <= tolerance):
                return f"no: {worse} above {better}"
        return "yes"


def scrambled(real: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """uint8 (n, px, px, 3): every patch's pixels drawn from all pixels of all real patches."""
    pixels = real.reshape(-1, 3)
    return pixels[rng.integers(len(pixels), size=real.shape[0] * real.shape[1] * real.shape[2])].reshape(real.shape)


def score_generators(images: Path, gex: Path, good: Path, poor: Path, spots: int | None, features: str, judge: Path | None = None,
                     workers: int = 1, seed: int = 0) -> tuple[list[Row], int]:
    """The rows, and how many spots they are of."""
    from evaluation.coverage import coverage_metrics
    from evaluation.distances import frechet_distance
    from evaluation.faithfulness import score_all
    from evaluation.features import build_features, feature_specs, resize_by_area
    from evaluation.sections import FeatureBank, Generated, read_generated
    from networks.clip import CLIP
    from training.faithfulness_run import ReportConfig, load_section

    rng, network = np.random.default_rng(seed), None if judge is None else CLIP.from_pretrained(judge)
    section, patch_um = load_section(ReportConfig(reference=(images,), generated=(good,), gex=gex), network, True)
    n, barcodes = len(section.barcodes), section.barcodes
    chosen = np.arange(n) if spots is None or spots >= n else np.sort(rng.choice(n, spots, replace=False))
    section = of_spots(section, chosen)
    made = {name: of_prompts(read_generated(folder, section.sample_id, barcodes), chosen)
            for name, folder in (("good", good), ("poor", poor))}
    px = made["good"].px
    real = resize_by_area(section.images[made["good"].rows], px)
    made["noise"] = Generated(made["good"].rows, ["0"], scrambled(real, rng)[:, None])
    (spec,) = feature_specs(features)
    encoder, bank = build_features(spec), FeatureBank()
    found, encoded = {}, {"real": bank.features(f"{section.sample_id}, real at {px}", resize_by_area(section.images, px), encoder)}
    for name, generated in made.items():
        bank.known = {key: value for key, value in bank.known.items() if "generated" not in key[0]}
        found[name] = score_all(section, generated, encoder, bank, judge=network, um_per_px=patch_um / px, workers=workers,
                                seed=seed)
        encoded[name] = bank.features(f"{section.sample_id}, generated", generated.flat, encoder)
    rows = [Row(what, {"real": found["good"][part]["real"][key], **{name: found[name][part]["generated"][key] for name in made},
                       "shuffled": found["good"][part]["shuffled"][key]}) for what, part, key in MEASURES if part in found["good"]]
    halves = np.array_split(rng.permutation(len(encoded["real"])), 2)
    half = encoded["real"][halves[0]]
    sides = {name: encoded["real"][halves[1]] if name == "real" else values[rng.choice(len(values), len(half), replace=False)]
             for name, values in encoded.items()}
    rows.append(Row("Frechet distance", {name: frechet_distance(side, half) for name, side in sides.items()}, smaller_is_better=True))
    rows.append(Row("coverage", {name: coverage_metrics(half[:len(side)], side[:len(half)])["coverage"] for name, side in sides.items()}))
    return rows, len(section.barcodes)


def of_spots(section: Section, chosen: np.ndarray) -> Section:
    """The section of the chosen rows alone."""
    clusters, xy = section.clusters, section.centre_xy_px
    return replace(section, barcodes=[section.barcodes[i] for i in chosen], images=section.images[chosen],
                   expression=section.expression[chosen], judge_expression=section.judge_expression[chosen],
                   clusters=None if clusters is None else clusters[chosen], centre_xy_px=None if xy is None else xy[chosen])


def of_prompts(generated: Generated, chosen: np.ndarray) -> Generated:
    """The first seed's patches of the chosen spots, numbered among these."""
    place = {row: number for number, row in enumerate(chosen)}
    kept = [number for number, row in enumerate(generated.rows) if row in place]
    return replace(generated, rows=np.array([place[generated.rows[number]] for number in kept]), seeds=generated.seeds[:1],
                   images=generated.images[kept][:, :1])


@click.command(context_settings={"show_default": True})
@click.option("--images", type=click.Path(path_type=Path), required=True, help="Real patches of the held-out section.")
@click.option("--gex", type=click.Path(path_type=Path), required=True, help="Its expression, with a `cluster` column.")
@click.option("--good", type=click.Path(path_type=Path), required=True, help="Patches of a trained snapshot for its spots.")
@click.option("--poor", type=click.Path(path_type=Path), required=True, help="Patches of an early snapshot.")
@click.option("--spots", type=int, help="So many spots, drawn. Default: all.")
@click.option("--features", default="efficientnet_lite0", help="Encoder, with =WEIGHT_FILE where it needs one.")
@click.option("--judge", type=click.Path(path_type=Path), help="Weights of a CLIP of other spots than the generator's: adds retrieval.")
@click.option("--tolerance", type=float, help="Up to so much apart counts as level, of shuffled and noise where only pairing is seen. "
              "Default: 2 / sqrt(spots), two standard errors of a correlation.")
def main(images: Path, gex: Path, good: Path, poor: Path, spots: int | None, features: str, judge: Path | None,
         tolerance: float | None):
    """Print every number for real, good, poor, shuffled and noise, and whether it orders them."""
    rows, n = score_generators(images, gex, good, poor, spots, features, judge)
    click.echo(f"{n} spots, {features}")
    click.echo("| measure | " + " | ".join(ORDER) + " | in order |\n|" + "---|" * (len(ORDER) + 2))
    for row in rows:
        values = [f"{row.values[name]:.3f}" if name in row.values else "" for name in ORDER]
        click.echo(f"| {row.name} | " + " | ".join(values) + f" | {row.ordered(2 / n ** 0.5 if tolerance is None else tolerance)} |")


if __name__ == "__main__":
    main()
