"""What diffusion learns of genes with the published prompts and with learned ones, at equal images seen, in pixel space, several seeds.

Reads sections prepared by `assets/real_tissue.sh` or by the demo's commands (FOLDER/<section>/patches, gex_filt.h5ad with clusters)
and runs the project's own commands: a CLIP for the prompts, another that judges, `train_diffusion` for each way and seed from scratch,
patches for every spot of the held-out section. Ways: published (one token, padded with ones), learned (8 tokens), shuffled (learned tokens,
prompts of other patches in training: the null experiment), null (the learned runs, drawn without genes). Finished runs are kept in --out
and stopped ones go on. Prints the mean cosine between prompts of different clusters both ways, then a line a measure, means over seeds:
cluster accuracy, R@10 of the judge, Frechet distance and coverage in features of an encoder that trained nothing here. The interval of
learned - published is from one seed to the next.

    python -m benchmarks.diffusion_learning --data runs/her2st --train C2,C3 --held-out C4 --out runs/diffusion_learning
"""
from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import click

from benchmarks.learning_scores import Sections, run, score_runs, table

WAYS = {   # how each is trained; None: drawn from the learned runs
    "published": ["--prompt-tokens", "published"],
    "learned": [],
    "shuffled": ["--shuffle-prompts"],
    "null": None,
}
EMBEDDINGS, BATCH = "gene_clip_emb.npy", 16


@dataclass(frozen=True)
class Plan(Sections):
    """Where data lie and what is run."""

    kimg: float
    resolution: int
    guidance: float
    images: int              # of every prompt
    prompts: int | None      # held-out spots, evenly chosen; None: all

    def embeddings(self, name: str) -> Path:
        """Prompt embeddings of a section."""
        folder = self.out / "embeddings" / name
        if not (folder / EMBEDDINGS).is_file():
            run("clip_embeddings.py", "--network", self.out / "clip" / "clip", "--gex", self.files([name], "gex_filt.h5ad"), "--out-dir",
                folder)
        return folder / EMBEDDINGS

    def no_genes(self) -> Path:
        """The null prompt, the mean of the training prompts, for every spot of the held-out section."""
        import numpy as np

        path, held = self.out / "embeddings" / "null" / EMBEDDINGS, self.embeddings(self.held_out)
        path.parent.mkdir(parents=True, exist_ok=True)
        record = json.loads(held.with_name("embeddings.json").read_text())
        record.pop("sha256", None)                              # of the embeddings that the null prompt takes the place of
        path.with_name("embeddings.json").write_text(json.dumps(record))
        null = np.concatenate([np.load(self.embeddings(name), allow_pickle=False) for name in self.train]).mean(axis=0, keepdims=True)
        np.save(path, np.repeat(null, len(np.load(held, mmap_mode="r", allow_pickle=False)), axis=0), allow_pickle=False)
        return path

    def train_run(self, way: str, seed: int) -> Path:
        """Run folder of one way and seed, trained or found."""
        folder = self.out / f"{way}-{seed}"
        if not (folder / "pipeline" / "model_index.json").is_file():
            run("diffusion_utils.train_diffusion", "--train-data-dir", self.files(self.train, "patches"), "--dataset-embs",
                ",".join(str(self.embeddings(name)) for name in self.train), "--output-dir", folder, "--from-scratch", "small",
                "--pixel-space", "--resolution", self.resolution, "--train-batch-size", BATCH, "--max-train-steps",
                max(1, round(self.kimg * 1000 / BATCH)), "--ema-decay", "0.995", "--seed", seed, "--report-to", "none", "--no-progress",
                "--resume-from-checkpoint", "latest", *WAYS[way])
        return folder

    def patches(self, way: str, seed: int) -> Path:
        """Patches of held-out spots; returns their folder."""
        patches = self.out / f"{way}-{seed}-patches"
        if not (patches / "samples.csv").is_file():
            null = WAYS[way] is None
            run("diffusion_utils.generate_img", "--model-checkpoint", self.train_run("learned" if null else way, seed), "--prompt-file",
                self.no_genes() if null else self.embeddings(self.held_out), "--gen-img-path", patches, "--num-imgs", self.images,
                "--guidance-scale", 1 if null else self.guidance, "--guidance-interval", "0.2,0.8", "--batch-size", 32, "--device", "cpu",
                "--no-progress", *(["--n-prompts", self.prompts] if self.prompts else []))
        return patches


def prompts_apart(embeddings, clusters, folder: Path | None) -> dict[str, float]:
    """Mean cosine between prompts (N, D) of different clusters: as they are, padded with ones as published, as learned tokens carry them,
    and as cross-attention sees them after the training of the run in `folder`."""
    import torch

    from diffusion_utils.pipeline import load_pipeline
    from diffusion_utils.prompts import PromptEncoder

    width = embeddings.shape[1]
    learned = PromptEncoder(width, "learned", 1).fit(embeddings, embeddings.mean(dim=0))
    ways = {"embeddings": embeddings, "published": PromptEncoder(width, "published", cross_width=width * 3 // 2)(embeddings),
            "learned, before training": learned(embeddings)}       # the layer behind starts as a random map, which keeps angles
    if folder is not None:
        pipeline = load_pipeline(folder)
        with torch.no_grad():
            ways["learned"] = pipeline.denoiser.encoder_hid_proj(pipeline.prompts(embeddings))
    return {name: between_clusters(rows.flatten(1), clusters) for name, rows in ways.items()}


def between_clusters(rows, clusters) -> float:
    """Mean cosine of all pairs of rows (N, W) from different clusters."""
    import torch

    unit, apart = torch.nn.functional.normalize(rows.double(), dim=1), torch.from_numpy(clusters[:, None] != clusters[None])
    return float((unit @ unit.T)[apart].mean())


@click.command(context_settings={"show_default": True})
@click.option("--data", type=click.Path(path_type=Path), default="runs/her2st", help="Folder that holds the prepared sections.")
@click.option("--train", default="C2,C3", help="Training sections, by commas.")
@click.option("--held-out", default="C4", help="Section whose spots are the prompts.")
@click.option("--out", type=click.Path(path_type=Path), default="runs/diffusion_learning", help="Folder of runs, patches, contact sheet.")
@click.option("--kimg", default=48.0, help="Of every run: equal images seen.")
@click.option("--resolution", default=32, help="Of the pixels that are learned, px.")
@click.option("--guidance-scale", default=3.0, help="Of the patches.")
@click.option("--images", default=4, type=click.IntRange(min=1), help="Of every prompt.")
@click.option("--n-prompts", default=None, type=click.IntRange(min=20), help="Of the held-out spots, evenly chosen.  [default: all]")
@click.option("--seeds", default="0,1,2")
@click.option("--ways", default=",".join(WAYS), help="Of: " + ", ".join(WAYS) + ". The difference is second - first.")
@click.option("--jobs", default=1, help="Runs at a time.")
@click.option("--features", default="timm:mobilenetv2_100=../shared/weights/mobilenetv2_100.imagenet_features.safetensors",
              help="Encoder that scores.")
@click.option("--judge/--no-judge", "with_judge", default=True, help="Train a second CLIP that looks for each prompt's patch.")
def main(data, train, held_out, out, kimg, resolution, guidance_scale, images, n_prompts, seeds, ways, jobs, features, with_judge):
    """Train, generate, score; print a table and write sheet.png."""
    from diffusion_utils.prompts import read_embeddings
    from evaluation.features import feature_specs

    plan, ways = Plan(data, train.split(","), held_out, out, kimg, resolution, guidance_scale, images, n_prompts), ways.split(",")
    if unknown := [way for way in ways if way not in WAYS]:
        raise click.BadParameter(f"expected some of {', '.join(WAYS)}; found {unknown[0]}", param_hint="--ways")
    [spec] = feature_specs(features)
    if plan.missing() or (spec.weights is not None and not spec.weights.is_file()):
        click.echo(f"skipped: {f'{data / plan.missing()[0]} is not prepared' if plan.missing() else f'no {spec.weights}'}")
        return
    plan.claim()
    plan.clip(out / "clip", 0)
    for name in (*plan.train, held_out):
        plan.embeddings(name)
    network = plan.judge(spec) if with_judge else None
    trained = [way for way in ways if WAYS[way] is not None]
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda key: plan.train_run(*key), [(way, int(seed)) for seed in seeds.split(",") for way in trained]))
        keys = [(way, int(seed)) for seed in seeds.split(",") for way in ways]
        folders = dict(zip(keys, pool.map(lambda key: plan.patches(*key), keys), strict=True))
    section, scores = score_runs(plan, folders, spec, network)
    learned = plan.train_run("learned", int(seeds.split(",")[0])) if "learned" in ways else None
    cosines = prompts_apart(read_embeddings(plan.embeddings(held_out)), section.clusters, learned)
    click.echo("mean cosine between prompts of different clusters: " + ", ".join(f"{name} {value:.3f}" for name, value in cosines.items()))
    click.echo(f"{train} -> {held_out}, {kimg:g} kimg at {resolution} px, seeds {seeds}, {n_prompts or len(section.barcodes)} prompts, "
               f"scored by {spec.label}")
    click.echo("\n".join(table(scores)))


if __name__ == "__main__":
    main()
