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

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import click

from benchmarks.learning_scores import Sections, run, score_runs, table
from training.run_folder import latest_run

PRESETS = {   # of either: the same size, backbone and a blur that fades within the run; frozen prompts without dropout
    "reference": ["--preset", "reference", "--backbone", "efficientnet_lite0", "--cond-dropout", "0"],
    "best": ["--preset", "best"],
}


@dataclass(frozen=True)
class Plan(Sections):
    """Where data lie and what is run."""

    kimg: float
    blur_fade_kimg: float
    backbone_weights: str | None

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
    from evaluation.features import feature_specs

    plan, presets = Plan(data, train.split(","), held_out, out, kimg, blur_fade_kimg or kimg / 10, backbone_weights), presets.split(",")
    if unknown := [preset for preset in presets if preset not in PRESETS]:
        raise click.BadParameter(f"expected some of {', '.join(PRESETS)}; found {unknown[0]}", param_hint="--presets")
    missing = plan.missing()
    [spec] = feature_specs(features)
    if missing or (spec.weights is not None and not spec.weights.is_file()):
        click.echo(f"skipped: {f'{data / missing[0]} is not prepared' if missing else f'no {spec.weights}'}")
        return
    plan.claim()
    plan.clip(out / "clip", 0)
    network = plan.judge(spec) if with_judge else None
    with ThreadPoolExecutor(jobs) as pool:
        made = {(preset, int(seed)): pool.submit(plan.gan, preset, int(seed)) for seed in seeds.split(",") for preset in presets}
        folders = {key: future.result() for key, future in made.items()}
    section, scores = score_runs(plan, folders, spec, network)
    click.echo(f"{train} -> {held_out}, {kimg:g} kimg, seeds {seeds}, {len(section.barcodes)} prompts, scored by {spec.label}")
    click.echo("\n".join(table(scores)))


if __name__ == "__main__":
    main()
