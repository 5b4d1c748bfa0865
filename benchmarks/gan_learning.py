"""What the GAN's two presets learn at equal images seen: the same small generator, backbone and prompts, several seeds.

Reads sections prepared by `assets/real_tissue.sh` or by the demo's commands (FOLDER/<section>/patches, gex_filt.h5ad with clusters)
and runs the project's own commands: a CLIP for the prompts, another that judges, `train_gan.py` for each preset and seed, patches for
every spot of the held-out section. Finished runs are kept in --out, so that a stopped benchmark goes on. Prints a line a measure, means
over seeds: cluster accuracy of generated patches as a share of that of real ones (a classifier trained on real patches of the training
sections), R@10 of the judge, Frechet distance and coverage in features of an encoder that trained nothing here, diversity within a prompt.
The interval of the difference is from one seed to the next.

    python -m benchmarks.gan_learning --data runs/her2st --train C2,C3 --held-out C4 --out runs/gan_learning
"""
from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from training.run_folder import latest_run

ROOT = Path(__file__).resolve().parent.parent
PRESETS = {   # of either: the same size, backbone and a blur that fades within the run; frozen prompts without dropout
    "reference": ["--preset", "reference", "--backbone", "efficientnet_lite0", "--cond-dropout", "0"],
    "best": ["--preset", "best"],
}


@dataclass(frozen=True)
class Plan:
    """Where data lie and what is run."""

    data: Path
    train: list[str]
    held_out: str
    out: Path
    kimg: float
    blur_fade_kimg: float
    backbone_weights: str | None

    def claim(self) -> None:
        """Write down what the runs of --out are made of; refused where they were made of something else."""
        self.out.mkdir(parents=True, exist_ok=True)
        path, ours = self.out / "plan.json", {name: str(value) for name, value in asdict(self).items()}
        if path.is_file() and json.loads(path.read_text()) != ours:
            raise click.ClickException(f"{path} says that the runs there were made otherwise: choose another --out")
        path.write_text(json.dumps(ours, indent=2) + "\n")

    def files(self, names: list[str], what: str) -> str:
        return ",".join(str((self.data / name / what).resolve()) for name in names)

    def clip(self, name: str, seed: int, *differences: str) -> Path:
        """CLIP weights of the training sections."""
        folder = self.out / name
        if not (folder / "clip").is_dir():
            run("train_clip.py", "--config-name", "clip_small", f"data.train_gex={self.files(self.train, 'gex_filt.h5ad')}",
                f"data.train_image_dir={self.files(self.train, 'patches')}", f"run_dir={folder.resolve()}", f"seed={seed}",
                "trainer.progress_bar=false", *differences)
        return folder / "clip"

    def gan(self, preset: str, seed: int) -> Path:
        """Patches of every held-out spot, four seeds each, from one run (of several that were killed: the last); returns their folder."""
        folder, patches = self.out / f"{preset}-{seed}", self.out / f"{preset}-{seed}-patches"
        if (patches / "samples.csv").is_file():
            return patches
        backbone = ["--backbone-weights", self.backbone_weights] if self.backbone_weights else []
        run("train_gan.py", "--data", self.files(self.train, "patches"), "--gex", self.files(self.train, "gex_filt.h5ad"), "--network",
            self.out / "clip" / "clip", "--outdir", folder, "--img-resolution", "64", "--cfg", "small", "--batch", "8", "--kimg", self.kimg,
            "--blur-fade-kimg", self.blur_fade_kimg, "--seed", seed, "--no-tensorboard", "--resume", "auto", *PRESETS[preset], *backbone)
        run("gen_images.py", "--network", latest_run(folder), "--gex", self.files([self.held_out], "gex_filt.h5ad"), "--images",
            self.files([self.held_out], "patches"), "--seeds", "0-3", "--outdir", patches)
        return patches


def run(script: str, *arguments: object) -> None:
    """One command of the project; its output goes to stderr only where it fails."""
    done = subprocess.run([sys.executable, str(ROOT / script), *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(f"{script} ended with {done.returncode}: {done.stderr[-2000:]}")


# ---- scores -----------------------------------------------------------------------------------------------------------

def read_section(plan: Plan, clip):
    """The held-out section, its genes as that CLIP wants them, and its patches' side in um."""
    import anndata as ad

    from evaluation.sections import Section
    from training.data import ImageGeneDataset, sample_files

    folder = plan.data / plan.held_out
    data = ImageGeneDataset(sample_files(str(folder / "patches"), str(folder / "gex_filt.h5ad")), target_sum=clip.target_sum,
                            vocabulary=clip.gene_names)
    name = str(data.sample_ids[0])
    section = Section(name, [barcode.removeprefix(f"{name}__") for barcode in data.barcodes],
                      data.load_images(progress=False).permute(0, 2, 3, 1).numpy(), data.expression, data.expression,
                      data.obs["cluster"].astype(str).to_numpy(), data.centre_xy_px)
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
    if judge is not None:
        pairs["judge: R@10 shuffled"] = (found["retrieval"]["shuffled"]["score"], None)
    return {**pairs, "clusters: accuracy": tuple(found["clusters"][side]["accuracy"] for side in ("generated", "real")),
            "clusters: share of the way from shuffled to real": (found["clusters"]["share_of_ceiling"], 1.0),
            "Frechet distance": (distances["generated"]["mean"], distances["real_vs_real"]["mean"]),
            "coverage": (sum(covered) / len(covered), None),
            "diversity within a prompt, grey levels": (diversity["generated"], diversity["real"])}


def table(scores: dict[str, list[dict]]) -> list[str]:
    """A line a measure: real patches, each preset's mean over seeds (least to most), and best minus reference with its 95 % interval
    from one seed to the next (Student's t over paired seeds)."""
    import numpy as np
    from scipy import stats

    lines = ["| measure | real | " + " | ".join(scores) + " | best - reference (95 %) |", "|---" * (len(scores) + 3) + "|"]
    for name in next(iter(scores.values()))[0]:
        cells = [np.array([run[name][0] for run in runs]) for runs in scores.values()]
        ceiling = next(iter(scores.values()))[0][name][1]
        shown = [f"{values.mean():.3f} ({values.min():.3f}-{values.max():.3f})" for values in cells]
        difference = ""
        if len(cells) == 2 and len(cells[0]) == len(cells[1]) > 1:
            apart = cells[1] - cells[0]
            half = stats.t.ppf(0.975, len(apart) - 1) * apart.std(ddof=1) / len(apart) ** 0.5
            difference = f"{apart.mean():+.3f} ({apart.mean() - half:+.3f} to {apart.mean() + half:+.3f})"
        lines.append(f"| {name} | {'' if ceiling is None else f'{ceiling:.3f}'} | {' | '.join(shown)} | {difference} |")
    return lines


def sheet(folders: dict[str, Path], section, path: Path) -> None:
    """Real | patches of each preset, a draw a spot: six spots of every cluster."""
    import numpy as np

    from evaluation.contact_sheet import contact_sheet, save_png
    from evaluation.features import resize_by_area
    from evaluation.sections import read_generated

    made = {preset: read_generated(folder, section.sample_id, section.barcodes) for preset, folder in folders.items()}
    px = next(iter(made.values())).px
    real, rows, labels = resize_by_area(section.images, px), [], []
    for cluster in np.unique(section.clusters):
        spots = np.flatnonzero(section.clusters == cluster)[:6]
        rows.append([real[spot] for spot in spots])
        labels.append(f"{cluster}, real")
        for preset, generated in made.items():
            rows.append([generated.images[np.flatnonzero(generated.rows == spot)[0], 0] for spot in spots])
            labels.append(f"{cluster}, {preset}")
    save_png(path, contact_sheet(rows, labels, cell_px=2 * px))


@click.command(context_settings={"show_default": True})
@click.option("--data", type=click.Path(path_type=Path), default="runs/her2st", help="Folder that holds the prepared sections.")
@click.option("--train", default="C2,C3", help="Training sections, by commas.")
@click.option("--held-out", default="C4", help="Section whose spots are the prompts.")
@click.option("--out", type=click.Path(path_type=Path), default="runs/gan_learning", help="Folder of runs, patches, contact sheet.")
@click.option("--kimg", default=10.0, help="Of every run: equal images seen.")
@click.option("--blur-fade-kimg", type=float, help="When the blur is gone, of every run. Default: after a tenth.")
@click.option("--seeds", default="0,1,2")
@click.option("--presets", default="reference,best", help="Of: " + ", ".join(PRESETS))
@click.option("--jobs", default=1, help="Runs at a time.")
@click.option("--features", default="timm:mobilenetv2_100=../shared/weights/mobilenetv2_100.imagenet_features.safetensors",
              help="Encoder that scores, other than the discriminator's backbone.")
@click.option("--judge/--no-judge", "with_judge", default=True, help="Train a second CLIP that looks for each prompt's patch.")
@click.option("--backbone-weights", help="Weight file of EfficientNet-Lite0, where its package is not installed.")
def main(data, train, held_out, out, kimg, blur_fade_kimg, seeds, presets, jobs, features, with_judge, backbone_weights):
    """Train, generate, score; print a table and write sheet.png."""
    from evaluation.features import build_features, feature_specs
    from evaluation.sections import FeatureBank
    from networks.clip import CLIP

    plan, presets = Plan(data, train.split(","), held_out, out, kimg, blur_fade_kimg or kimg / 10, backbone_weights), presets.split(",")
    if unknown := [preset for preset in presets if preset not in PRESETS]:
        raise click.BadParameter(f"expected some of {', '.join(PRESETS)}; found {unknown[0]}", param_hint="--presets")
    missing = [name for name in (*plan.train, held_out) if not (data / name / "gex_filt.h5ad").exists()]
    [spec] = feature_specs(features)
    if missing or (spec.weights is not None and not spec.weights.is_file()):
        click.echo(f"skipped: {f'{data / missing[0]} is not prepared' if missing else f'no {spec.weights}'}")
        return
    plan.claim()
    plan.clip("clip", 0)
    tower = ["model.image_encoder=timm:mobilenetv2_100", f"model.image_encoder_weights={spec.weights.resolve()}"] if spec.weights else []
    network = plan.clip("judge", 1000, "model.image_views=1", *tower) if with_judge else None
    with ThreadPoolExecutor(jobs) as pool:
        made = {(preset, int(seed)): pool.submit(plan.gan, preset, int(seed)) for seed in seeds.split(",") for preset in presets}
        folders = {key: future.result() for key, future in made.items()}
    encoder, bank = build_features(spec), FeatureBank(progress=False)
    judge = CLIP.from_pretrained(network) if with_judge else None
    section, patch_um = read_section(plan, judge or CLIP.from_pretrained(out / "clip" / "clip", image_encoder=False))
    scores: dict[str, list[dict]] = {preset: [] for preset in presets}
    for (preset, seed), folder in folders.items():
        scores[preset].append(score(section, folder, judge, encoder, bank, patch_um))
        click.echo(f"{preset}, seed {seed}: " + json.dumps(scores[preset][-1]), err=True)
    first_seed = seeds.split(",")[0]
    sheet({preset: folders[preset, int(first_seed)] for preset in presets}, section, out / "sheet.png")
    click.echo(f"{train} -> {held_out}, {kimg:g} kimg, seeds {seeds}, {len(section.barcodes)} prompts, scored by {spec.label}")
    click.echo("\n".join(table(scores)))


if __name__ == "__main__":
    main()
