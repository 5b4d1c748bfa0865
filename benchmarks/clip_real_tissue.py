"""Choose the CLIP recipe for real tissue with few spots: cross-validation between training sections, never the held-out one.

Reads sections prepared by `assets/real_tissue.sh` (OUT/<section>/patches, gex_filt.h5ad). Every recipe is `assets/clip_small.yaml`
plus a few overrides; each section in turn is left out, retrieval is measured on it, figures are means over sections and seeds.
`--held-out C4` then trains each recipe on all sections and scores that one: for reporting, not for choosing.

    python benchmarks/clip_real_tissue.py --out runs/her2st --sections C2,C3 --held-out C4 --seeds 0,1
"""
from __future__ import annotations

import json
import tempfile
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
RECIPES = {
    "clip_small": {},
    "tower at 224 px": {"model.image_encoder_px": None},
    "D 64, lr 1e-3": {"model.projection": 64, "optimizer.lr": 1e-3},
    "learned temperature": {"model.learn_temperature": True, "model.temperature": 0.07},
    "one view when embedding": {"model.image_views": 1},
    "bottleneck MLP, no axes": {"model.gene_encoder": "bottleneck", "model.gene_components": 0, "model.gene_min_share": 0.2},
}
COLUMNS = ("gene_to_image_r1", "gene_to_image_r5", "gene_to_image_r10", "gene_to_image_median_rank", "image_to_gene_r10")


def score(recipe: dict, train: list[Path], val: Path, seed: int, work: Path) -> dict[str, float]:
    """Train on the sections `train`, return the retrieval on the section `val`."""
    from omegaconf import OmegaConf

    from training.clip_config import clip_config
    from training.clip_run import run_clip

    loaded = OmegaConf.merge(OmegaConf.load(ROOT / "assets" / "clip_config.yaml"), OmegaConf.load(ROOT / "assets" / "clip_small.yaml"))
    for key in ("defaults", "hydra"):
        loaded.pop(key, None)
    for key, value in {**recipe, "seed": seed, "logger": "none", "trainer.progress_bar": False, "image.cache_dir": str(work / "features"),
                       "data.train_gex": [str(folder / "gex_filt.h5ad") for folder in train],
                       "data.train_image_dir": [str(folder / "patches") for folder in train], "data.val_gex": str(val / "gex_filt.h5ad"),
                       "data.val_image_dir": str(val / "patches")}.items():
        OmegaConf.update(loaded, key, value, force_add=True)
    with tempfile.TemporaryDirectory(dir=work) as run_dir:
        OmegaConf.update(loaded, "run_dir", run_dir, force_add=True)
        run_clip(clip_config(loaded), Path)
        return json.loads((Path(run_dir) / "retrieval.json").read_text())


@click.command(context_settings={"show_default": True})
@click.option("--out", type=click.Path(path_type=Path), default="runs/her2st", help="Folder that holds the prepared sections.")
@click.option("--sections", default="C2,C3", help="Training sections, by commas.")
@click.option("--held-out", default=None, help="Section to score at the end.")
@click.option("--seeds", default="0,1")
@click.option("--recipes", default=",".join(RECIPES), help="Which, by commas.")
def main(out: Path, sections: str, held_out: str | None, seeds: str, recipes: str):
    """Print one row a recipe: cross-validated retrieval, and on --held-out."""
    folders = [out / name for name in sections.split(",")]
    missing = [folder for folder in folders if not (folder / "gex_filt.h5ad").exists()]
    if missing:
        click.echo(f"skipped: {missing[0]} is not prepared; run assets/real_tissue.sh first")
        return
    from training.clip_notices import quiet_lightning

    quiet_lightning()
    folds = [([other for other in folders if other != folder], folder) for folder in folders]
    rows = []
    with tempfile.TemporaryDirectory() as work:
        for name in recipes.split(","):
            for title, pairs in (("cross-validated", folds), *([(held_out, [(folders, out / held_out)])] if held_out else [])):
                found = [score(RECIPES[name.strip()], train, val, int(seed), Path(work))
                         for train, val in pairs for seed in seeds.split(",")]
                means = [sum(one[column] for one in found) / len(found) for column in COLUMNS]
                rows.append(f"{name:26s} {title:16s} " + "  ".join(f"{mean:7.3f}" for mean in means))
    click.echo(f"\n{'recipe':26s} {'scored on':16s} " + "  ".join(("g2i R@1", "g2i R@5", "g2i R@10", "g2i rank", "i2g R@10")))
    click.echo("\n".join(rows))


if __name__ == "__main__":
    main()
