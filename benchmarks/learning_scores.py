"""What the learning benchmarks of the GAN and of diffusion share: prepared sections, the project's commands, scores, a table.

A measure is (value, that of real patches or None); scores are given by way, a list of one dictionary a seed.
"""
from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent


def run(script: str, *arguments: object) -> None:
    """One command of the project, a file or a module (run from the repository's root); what it says is shown where it fails."""
    what = [str(ROOT / script)] if script.endswith(".py") else ["-m", script]
    done = subprocess.run([sys.executable, *what, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(f"{script} ended with {done.returncode}: {done.stderr[-2000:]}")


@dataclass(frozen=True)
class Sections:
    """Prepared sections, FOLDER/<section>/patches, gex_filt.h5ad, and where a benchmark keeps its runs of them."""

    data: Path
    train: list[str]
    held_out: str
    out: Path                # of runs and what they make

    def files(self, names: list[str], what: str) -> str:
        """Paths of `what` of those sections, by commas."""
        return ",".join(str((self.data / name / what).resolve()) for name in names)

    def claim(self) -> None:
        """Write down what the runs of --out are made of; refused where they were made of something else."""
        self.out.mkdir(parents=True, exist_ok=True)
        path, ours = self.out / "plan.json", {name: str(value) for name, value in asdict(self).items()}
        if path.is_file() and json.loads(path.read_text()) != ours:
            raise click.ClickException(f"{path} says that the runs there were made otherwise: choose another --out")
        path.write_text(json.dumps(ours, indent=2) + "\n")

    def missing(self) -> list[str]:
        return [name for name in (*self.train, self.held_out) if not (self.data / name / "gex_filt.h5ad").exists()]

    def clip(self, folder: Path, seed: int, *differences: str) -> Path:
        """CLIP weights of the training sections, trained into `folder` or found there."""
        if not (folder / "clip").is_dir():
            run("train_clip.py", "--config-name", "clip_small", f"data.train_gex={self.files(self.train, 'gex_filt.h5ad')}",
                f"data.train_image_dir={self.files(self.train, 'patches')}", f"run_dir={folder.resolve()}", f"seed={seed}",
                "ckpt_path=auto", "trainer.progress_bar=false", *differences)
        return folder / "clip"

    def judge(self, spec) -> Path:
        """CLIP weights of another seed that look for each prompt's patch; their image tower is the encoder that scores."""
        tower = [] if spec.weights is None else ["model.image_encoder=timm:mobilenetv2_100",
                                                 f"model.image_encoder_weights={spec.weights.resolve()}"]
        return self.clip(self.out / "judge", 1000, "model.image_views=1", *tower)


def read_section(folder: Path, clip):
    """The prepared section of a folder, its genes as that CLIP wants them, and its patches' side in um."""
    import anndata as ad

    from evaluation.sections import Section, named_clusters
    from training.data import ImageGeneDataset
    from training.sample_sheet import sample_files

    data = ImageGeneDataset(sample_files(str(folder / "patches"), str(folder / "gex_filt.h5ad")), target_sum=clip.target_sum,
                            vocabulary=clip.gene_names)
    name = str(data.sample_ids[0])
    section = Section(name, [barcode.removeprefix(f"{name}__") for barcode in data.barcodes],
                      data.load_images(progress=False).permute(0, 2, 3, 1).numpy(), data.expression, data.expression,
                      named_clusters(data.obs), data.centre_xy_px)
    return section, float(ad.read_h5ad(folder / "gex_filt.h5ad", backed="r").uns["morphology"]["patch_um"])


def score(section, folder: Path, judge, encoder, bank, patch_um: float) -> dict[str, tuple[float, float | None]]:
    """Of the patches of one run: (value, that of real patches or None) by the name of the measure."""
    from evaluation.coverage import coverage_metrics
    from evaluation.faithfulness import score_all
    from evaluation.features import resize_by_area
    from evaluation.sections import read_generated, score_distances, score_diversity

    generated = read_generated(folder, section.sample_id, section.barcodes)
    bank.known = {key: value for key, value in bank.known.items() if "generated" not in key[0]}      # of another run
    found = score_all(section, generated, encoder, bank, judge=judge, um_per_px=patch_um / generated.px)
    distances = score_distances(section, generated, None, {"encoder": encoder}, bank)["frechet"]["encoder"]
    real = bank.features(f"{section.sample_id}, real at {generated.px}", resize_by_area(section.images, generated.px), encoder)
    made = bank.features(f"{section.sample_id}, generated", generated.flat, encoder)
    covered = [coverage_metrics(real, made[number::len(generated.seeds)])["coverage"] for number in range(len(generated.seeds))]
    diversity = score_diversity(section, generated, None)
    pairs = {f"{name}: {what}": (found[part]["generated"]["score"], found[part]["real"]["score"]) for name, part, what in (
        ("clusters", "clusters", "balanced accuracy"), ("judge", "retrieval", "R@10"), ("expression read-out", "readout", "Pearson"),
        ("nuclei and stain", "nuclei", "Pearson with the real patch")) if part in found}
    if diversity["generated"] is not None:
        pairs["diversity within a prompt, grey levels"] = (diversity["generated"], diversity["real"])
    if judge is not None:
        pairs["judge: R@10 shuffled"] = (found["retrieval"]["shuffled"]["score"], None)
    return {**pairs, "clusters: accuracy": tuple(found["clusters"][side]["accuracy"] for side in ("generated", "real")),
            "clusters: share of the way from shuffled to real": (found["clusters"]["share_of_ceiling"], 1.0),
            "Frechet distance": (distances["generated"]["mean"], distances["real_vs_real"]["mean"]),
            "coverage": (sum(covered) / len(covered), None)}


def score_runs(plan: Sections, folders: dict[tuple[str, int], Path], spec, network: Path | None):
    """Score the patches of every (way, seed), say each, and write sheet.png of the first seed: the held-out section, and scores by way."""
    from evaluation.features import build_features
    from evaluation.sections import FeatureBank
    from networks.clip import CLIP

    encoder, bank = build_features(spec), FeatureBank(progress=False)
    judge = CLIP.from_pretrained(network) if network else None
    section, patch_um = read_section(plan.data / plan.held_out,
                                     judge or CLIP.from_pretrained(plan.out / "clip" / "clip", image_encoder=False))
    scores: dict[str, list[dict]] = {}
    for (way, seed), folder in folders.items():
        scores.setdefault(way, []).append(score(section, folder, judge, encoder, bank, patch_um))
        click.echo(f"{way}, seed {seed}: " + json.dumps(scores[way][-1]), err=True)
    first_seed = next(iter(folders))[1]
    sheet(section, {way: folders[way, first_seed] for way in scores}, plan.out / "sheet.png")
    return section, scores


def table(scores: dict[str, list[dict]]) -> list[str]:
    """A line a measure: real patches, each way's mean over seeds (least to most), and how the second differs from the first, with the
    95 % interval from one seed to the next (Student's t over paired seeds)."""
    import numpy as np
    from scipy import stats

    names = list(scores)
    last = f"{names[1]} - {names[0]} (95 %)" if len(names) > 1 else ""
    lines = [f"| measure | real | {' | '.join(names)} | {last} |", "|---" * (len(scores) + 3) + "|"]
    for name in next(iter(scores.values()))[0]:
        cells = [np.array([run[name][0] for run in runs]) for runs in scores.values()]
        ceiling = next(iter(scores.values()))[0][name][1]
        shown = [f"{values.mean():.3f} ({values.min():.3f}-{values.max():.3f})" for values in cells]
        difference = ""
        if len(cells) > 1 and len(cells[0]) == len(cells[1]) > 1:
            apart = cells[1] - cells[0]
            half = stats.t.ppf(0.975, len(apart) - 1) * apart.std(ddof=1) / len(apart) ** 0.5
            difference = f"{apart.mean():+.3f} ({apart.mean() - half:+.3f} to {apart.mean() + half:+.3f})"
        lines.append(f"| {name} | {'' if ceiling is None else f'{ceiling:.3f}'} | {' | '.join(shown)} | {difference} |")
    return lines


def sheet(section, folders: dict[str, Path], path: Path) -> None:
    """Real patches and those of each way's generated folder: six spots of every cluster."""
    import numpy as np

    from evaluation.contact_sheet import contact_sheet, save_png
    from evaluation.features import resize_by_area
    from evaluation.sections import read_generated

    made = {way: read_generated(folder, section.sample_id, section.barcodes) for way, folder in folders.items()}
    px, prompts = next(iter(made.values())).px, next(iter(made.values())).rows
    real, rows, labels = resize_by_area(section.images, px), [], []
    for cluster in sorted(set(section.clusters[prompts]) - {""}):
        spots = prompts[section.clusters[prompts] == cluster][:6]
        rows.append([real[spot] for spot in spots])
        labels.append(f"{cluster}, real")
        for way, generated in made.items():
            rows.append([generated.images[np.flatnonzero(generated.rows == spot)[0], 0] for spot in spots])
            labels.append(f"{cluster}, {way}")
    save_png(path, contact_sheet(rows, labels, cell_px=2 * px))
