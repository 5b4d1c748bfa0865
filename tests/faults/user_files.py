"""Valid files as a user hands them over, and who reads them: reader -> (write them in a folder, which of them is damaged, read).

Not a test file: `test_fuzzed_readers.py` damages them. What is only read with its sums (checkpoints, pipelines, caches) is damaged in
`test_damaged_files.py`, slides in `preprocessing/test_mutated_slides.py`.
"""
import json
from pathlib import Path
from types import SimpleNamespace

import anndata as ad
import diffusers
import numpy as np
import pandas as pd
import tifffile
import torch
import yaml
from diffusion_world import tiny_vae
from visium_folders import GENES, counts_of_rows, visium_positions, write_clusters, write_hd, write_visium

from diffusion_utils.denoisers import load_denoiser, load_vae, read_scheduler
from diffusion_utils.noising import scheduler_config
from diffusion_utils.pairs import prompt_barcodes, read_pairs
from diffusion_utils.perturbation import open_clip
from evaluate_sections import read_steps
from evaluation.features import list_images
from evaluation.gene_lists import load_gene_sets, read_attributions
from evaluation.image_quality import read_rows as read_rows_of_metrics
from evaluation.latent_space import read_embedded
from evaluation.sections import read_generated
from networks.clip import CLIP, ClipModelConfig, clip_weights_sha256
from networks.histo_models import build_encoder
from preprocessing.cohort import read_cohort_config, read_cohort_sheet
from preprocessing.done_manifests import strings_sha256
from preprocessing.expression import read_gene_map, read_vocabulary
from preprocessing.gene_sets import gene_sets_within
from preprocessing.patches import pair, read_patch, read_patch_folder
from preprocessing.png_folder import write_patch_folder
from preprocessing.slide import open_slide
from preprocessing.space_ranger import read_sample
from preprocessing.st_sample import read_clusters, read_counts, read_spots
from preprocessing.stain import read_stain_file
from preprocessing.tissue import read_tissue
from training.clip_config import clip_config
from training.gene_changes import read_gene_changes
from training.prompts import parse_seeds, read_labels
from training.sample_sheet import read_sample_sheet
from training.spot_choice import read_mask

BARCODES = visium_positions()["barcode"][:6].tolist()
CENTRES = np.arange(12.0).reshape(6, 2) * 100      # of the patches of six spots, level-0 px


# ---- valid files ----------------------------------------------------------------------------------------------------

def visium(folder: Path, **options) -> Path:
    write_visium(folder, **options)
    write_clusters(folder, visium_positions()["barcode"][:9], ["1", "2", "3"] * 3)
    tifffile.imwrite(folder.parent / "slide.tif", np.full((1200, 1100, 3), 200, np.uint8), tile=(64, 64), photometric="rgb")
    return folder


def section(folder: Path, **options) -> None:
    sample = read_sample(folder, **options)
    assert np.isfinite(counts_of_rows(sample)).all() and np.isfinite(sample.centre_xy_px[sample.in_tissue]).all() and sample.mpp > 0


def patches(folder: Path) -> Path:
    write_patch_folder(folder / "patches", np.full((6, 8, 8, 3), 99, np.uint8), barcodes=BARCODES, sample_id="S",
                       xy=CENTRES, stain={"normalised": False})
    np.save(folder / "emb.npy", np.ones((6, 3), np.float32))
    (folder / "embeddings.json").write_text(json.dumps(
        {"barcode_sha256": strings_sha256(BARCODES), "files": ["emb.npy"], "gex": str(folder / "gex.h5ad")}))
    return folder / "patches"


def generated(folder: Path) -> Path:
    patches(folder)
    names = sorted(path.name for path in (folder / "patches").glob("*.png"))
    rows = "".join(f"{name},{row},{BARCODES[row]},{seed}\n" for row, (name, seed) in enumerate(zip(names, [0] * 6, strict=True)))
    (folder / "patches" / "samples.csv").write_text("file,prompt,barcode,seed\n" + rows)
    return folder / "patches"


def gex(path: Path, write=True) -> Path:
    counts = np.random.default_rng(0).poisson(2, (6, 4)).astype(np.float32)
    sample = ad.AnnData(counts, obs={"in_tissue": [1] * 6, "array_row": [0, 0, 1, 1, 2, 2], "array_col": [0, 2, 1, 3, 0, 2],
                                     "sample_id": ["S"] * 6, "cluster": ["a", "b"] * 3, "n_members": [1] * 6},
                        var={"gene_ids": list("wxyz")}, obsm={"spatial": CENTRES})
    sample.obs_names, sample.var_names = BARCODES, GENES[:3] + ["Xkr4"]
    sample.uns["spatial"] = {"S": {"scalefactors": {"spot_diameter_fullres": 130.0}, "images": {"lowres": np.zeros((9, 9, 3), np.uint8)}}}
    sample.uns["morphology"] = {"mpp": 0.5, "patch_um": 55.0, "barcode_sha256": "0"}
    sample.layers["counts"] = counts
    sample.write_h5ad(path)
    return path


def spots() -> pd.DataFrame:
    """obs of six spots."""
    return pd.DataFrame(index=[f"S__b{i}" for i in range(6)])


def embedded(folder: Path, model_sha256: str = "0") -> None:
    """gex.h5ad and the embeddings of its spots, as a CLIP makes them."""
    gex(folder / "gex.h5ad")
    np.save(folder / "gene_clip_emb.npy", np.ones((6, 3), np.float32))
    (folder / "embeddings.json").write_text(json.dumps({"barcode_sha256": strings_sha256(BARCODES), "files": ["gene_clip_emb.npy"],
                                                        "gex": str(folder / "gex.h5ad"), "sha256": {}, "model_sha256": model_sha256}))


def small_clip(folder: Path) -> None:
    """clip/, a checkpoint of it, and the YAML that describes its model."""
    model = ClipModelConfig(gene_encoder="bottleneck", gene_hidden=4, gene_width=4, projection=3, image_encoder="random_tiny")
    clip = CLIP(model, GENES[:3], image_encoder=build_encoder("random_tiny")).eval()
    clip.save_pretrained(folder / "clip")
    torch.save({"clip": json.dumps(clip.description()), "state_dict": {f"clip.{name}": tensor for name, tensor in clip.weights().items()}},
               folder / "last.ckpt")
    (folder / "model.yaml").write_text("model:\n  gene_hidden: 4\n  gene_width: 4\n  projection: 3\n  dropout: 0.8\n")


def perturbed_pipeline(folder: Path) -> None:
    """A CLIP, embeddings that it may have made, and the record of a pipeline that was trained on them."""
    small_clip(folder)
    embedded(folder, clip_weights_sha256(folder / "clip"))
    (folder / "training.json").write_text(json.dumps({"config": {"dataset_embs": str(folder / "gene_clip_emb.npy")}}))


def diffusers_base(folder: Path) -> None:
    """unet/, vae/ and scheduler/ as diffusers keeps a base, the denoiser's weights in parts."""
    denoiser = diffusers.UNet2DConditionModel(block_out_channels=(8, 8), layers_per_block=1, cross_attention_dim=4, attention_head_dim=2,
                                              norm_num_groups=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                                              up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))
    denoiser.save_pretrained(folder / "unet", max_shard_size="30KB")
    tiny_vae("AutoencoderTiny").save_pretrained(folder / "vae")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler_config("epsilon"), indent=1))


def sheet(path: Path, columns: str) -> None:
    names = columns.split(",")
    cells = {"sample_id": "S{}", "wsi_file": "slide{}.tif", "gex_file": "gex{}.h5ad", "mpp": "0.5", "spot_um": "55", "images": "patches{}",
             "gex": "gex{}.h5ad", "split": "train", "embeddings": "emb{}.npy"}
    path.write_text("\n".join([columns, *(",".join(cells[name].format(i) for name in names) for i in range(3))]) + "\n")


# ---- readers of texts -----------------------------------------------------------------------------------------------

def text(content: str):
    return lambda folder: (folder / "f").write_text(content)


def read_yaml(path: Path) -> dict:
    try:
        return yaml.safe_load(path.read_text())
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}                            # said by train_clip.py's door; here the content is what matters


CONFIG = "data: {train_gex: a, max_size: 5, val_fraction: 0.1}\nmodel: {gene_hidden: 8, dropout: 0.1}\ntrainer: {max_epochs: 2}\nseed: 1\n"
COHORT = "samples: sheet.csv\nout_dir: out\nmemory_gb: 4\nstride: 5\n"
GEOJSON = json.dumps({"type": "FeatureCollection", "features": [
    {"type": "Feature", "properties": {}, "geometry": {"type": "Polygon", "coordinates": [[[1, 1], [90, 1], [90, 80], [1, 80], [1, 1]]]}},
    {"type": "Feature", "geometry": {"type": "GeometryCollection", "geometries": [{"type": "Point", "coordinates": [3, 4]}]}}]})
PIPELINE = SimpleNamespace(prompts=SimpleNamespace(embedding_width=3))
SLIDE = SimpleNamespace(path=Path("slide.tif"), width_px=80, height_px=60)
STAIN_JSON = json.dumps({"normalised": True, "vectors": [[0.65, 0.07], [0.7, 0.99], [0.29, 0.11]], "maxima": [1.9, 1.0], "n_pixels": 9})
ST_COUNTS = "\tG1\tG2\tG3\n" + "".join(f"{x}x{y}\t{x}\t{y}\t3\n" for x in range(2) for y in range(3))
ST_SPOTS = "x\ty\tpixel_x\tpixel_y\tselected\n" + "".join(f"{x}\t{y}\t{x * 100}\t{y * 99}\t1\n" for x in range(2) for y in range(3))
ST_LABELS = "x\ty\tlabel\n" + "".join(f"{x}\t{y}\tcluster {x}\n" for x in range(2) for y in range(3))
TEXTS = {
    "positions without header": (lambda f: visium(f / "v", version=1), "v/spatial/tissue_positions_list.csv",
                                 lambda f: section(f / "v")),
    "positions with header": (lambda f: visium(f / "v"), "v/spatial/tissue_positions.csv", lambda f: section(f / "v")),
    "positions, with a slide": (lambda f: visium(f / "v"), "v/spatial/tissue_positions.csv",
                                lambda f: section(f / "v", slide=open_slide(f / "slide.tif"))),
    "scale factors": (lambda f: visium(f / "v"), "v/spatial/scalefactors_json.json", lambda f: section(f / "v")),
    "scale factors of Visium HD": (lambda f: write_hd(f / "v"), "v/binned_outputs/square_002um/spatial/scalefactors_json.json",
                                   lambda f: section(f / "v")),
    "10x matrix.mtx": (lambda f: visium(f / "v", matrix="mtx"), "v/filtered_feature_bc_matrix/matrix.mtx", lambda f: section(f / "v")),
    "10x features.tsv": (lambda f: visium(f / "v", matrix="mtx"), "v/filtered_feature_bc_matrix/features.tsv",
                         lambda f: section(f / "v")),
    "10x barcodes.tsv": (lambda f: visium(f / "v", matrix="mtx"), "v/filtered_feature_bc_matrix/barcodes.tsv",
                         lambda f: section(f / "v")),
    "10x matrix.mtx.gz": (lambda f: visium(f / "v", matrix="mtx.gz"), "v/filtered_feature_bc_matrix/matrix.mtx.gz",
                          lambda f: section(f / "v")),
    "10x clusters": (lambda f: visium(f / "v"), "v/analysis/clustering/gene_expression_graphclust/clusters.csv",
                     lambda f: section(f / "v")),
    "ST counts": (text(ST_COUNTS), "f", lambda f: read_counts(f / "f")),
    "ST positions": (text(ST_SPOTS), "f", lambda f: read_spots(f / "f")),
    "ST labels": (text(ST_LABELS), "f", lambda f: read_clusters(f / "f", ["0x0", "1x2"])),
    "vocabulary": (text("Actb\nUmod\nNphs1\nXkr4\n"), "f", lambda f: read_vocabulary(f / "f")),
    "gene map": (text("ENS1\tActb\nENS2\tUmod\nENS3\t\n"), "f", lambda f: read_gene_map(f / "f")),
    "gene sets": (text("GLYCOLYSIS\thttp://x\tActb\tUmod\nHYPOXIA\t\tNphs1,1.0\tUmod\n"), "f", lambda f: gene_sets_within(f / "f", GENES)),
    "gene changes": (text("Actb:+2\nUmod:0 # off\n"), "f", lambda f: read_gene_changes(str(f / "f"), ["Actb", "Umod"])),
    "cluster labels": (text("barcode,cluster\n" + "".join(f"b{i},c{i % 2}\n" for i in range(6))), "f",
                       lambda f: read_labels(str(f / "f"), None, f / "f", 6)),
    "mask": (text("barcode,keep\n" + "".join(f"b{i},{i % 2}\n" for i in range(6))), "f", lambda f: read_mask(str(f / "f"), 6, None, "f")),
    "sample sheet": (lambda f: sheet(f / "f", "sample_id,images,gex,split,embeddings"), "f", lambda f: read_sample_sheet(f / "f")),
    "cohort sheet": (lambda f: sheet(f / "f", "sample_id,wsi_file,gex_file,mpp,spot_um"), "f", lambda f: read_cohort_sheet(f / "f")),
    "cohort settings": (text(COHORT), "f", lambda f: read_cohort_config(mapping(read_yaml(f / "f")))),
    "CLIP settings": (text(CONFIG), "f", lambda f: clip_config(mapping(read_yaml(f / "f")))),
    "cluster labels by barcode": (text("barcode,cluster\n" + "".join(f"b{i},c{i % 2}\n" for i in range(6))), "f",
                                  lambda f: read_labels(str(f / "f"), spots(), f / "gex.h5ad", 6)),
    "mask by barcode": (text("barcode,keep\n" + "".join(f"b{i},{i % 2}\n" for i in range(6))), "f",
                        lambda f: read_mask(str(f / "f"), 6, spots(), "gex.h5ad")),
    "gene sets to change": (text("GLYCOLYSIS\thttp://x\tActb\tUmod\nHYPOXIA\t\tNphs1\tXkr4\n"), "f",
                            lambda f: read_gene_changes("GLYCOLYSIS:+1", ["Actb", "Umod", "Nphs1"], f / "f")),
    "gene sets by name": (text("GLYCOLYSIS\thttp://x\tActb\tUmod\nHYPOXIA\t\tNphs1\tUmod\n"), "f",
                          lambda f: load_gene_sets(f / "f", GENES)),
    "YAML of a CLIP": (small_clip, "model.yaml", lambda f: CLIP.convert_ckpt_to_dict(f / "last.ckpt", f / "model.yaml", f / "clip.pt")),
    "config.json of weights": (small_clip, "clip/config.json", lambda f: CLIP.from_pretrained(f / "clip", image_encoder=False)),
    "SHA256SUMS of weights": (small_clip, "clip/SHA256SUMS", lambda f: CLIP.from_pretrained(f / "clip", image_encoder=False)),
    "denoiser of a base": (diffusers_base, "unet/config.json", lambda f: load_denoiser(f)),
    "weights of a base in parts": (diffusers_base, "unet/diffusion_pytorch_model.safetensors.index.json", lambda f: load_denoiser(f)),
    "autoencoder of a base": (diffusers_base, "vae/config.json", lambda f: load_vae(f)),
    "scheduler of a base": (diffusers_base, "scheduler/scheduler_config.json", lambda f: read_scheduler(f)),
    "metadata.jsonl": (lambda f: patches(f), "patches/metadata.jsonl",
                       lambda f: pair(read_patch_folder(f / "patches"), BARCODES, f / "gex.h5ad", None, CENTRES)),
    "stain.json of a folder": (lambda f: patches(f), "patches/stain.json", lambda f: read_patch_folder(f / "patches")),
    "stain.json": (text(STAIN_JSON), "f", lambda f: read_stain_file(f / "f")),
    "embeddings.json": (lambda f: patches(f), "embeddings.json", lambda f: read_pairs(str(f / "patches"), str(f / "emb.npy"))),
    "embeddings.json of a joint space": (embedded, "embeddings.json", lambda f: read_embedded({"S": f / "gex.h5ad"}, {"S": f}, ["gene"])),
    "embeddings.json of prompts": (embedded, "embeddings.json", lambda f: prompt_barcodes(f / "gene_clip_emb.npy", 6)),
    "embeddings.json of a pipeline": (perturbed_pipeline, "embeddings.json", lambda f: open_clip(f / "clip", f, PIPELINE)),
    "metadata.jsonl for metrics": (lambda f: patches(f), "patches/metadata.jsonl", lambda f: list_images(f / "patches")),
    "metadata.jsonl for diffusion": (lambda f: patches(f), "patches/metadata.jsonl",
                                     lambda f: read_pairs(str(f / "patches"), str(f / "emb.npy"))),
    "samples.csv": (lambda f: generated(f), "patches/samples.csv", lambda f: read_generated(f / "patches", "S", BARCODES)),
    "samples.csv for metrics": (lambda f: generated(f), "patches/samples.csv", lambda f: list_images(f / "patches")),
    "GeoJSON": (text(GEOJSON), "f", lambda f: read_tissue(f / "f")),
    "GeoJSON on a slide": (text(GEOJSON), "f", lambda f: read_tissue(f / "f", SLIDE)),
    "earlier metrics": (text("experiment,FID,KID_mean,KID_std,seed\na,1,0.1,0.1,0\nb,2,0.2,0.1,0\n"), "f",
                        lambda f: read_rows_of_metrics(f / "f")),
    "attributions": (text("gene,0 vs. 1,1 vs. 0\nActb,0.5,0.1\nUmod,-1,2\n"), "f", lambda f: read_attributions(f / "f")),
    "step times, JSON": (text('{"step": "a", "seconds": 1}\n{"step": "b", "seconds": 2.5}\n'), "f", lambda f: read_steps(f / "f")),
    "step times, CSV": (text("step,seconds\na,1\nb,2\n"), "f", lambda f: read_steps(f / "f")),
    "seeds": (text("0,1,4-6"), "f", lambda f: parse_seeds((f / "f").read_text(errors="replace"))),
    "PNG patch": (lambda f: patches(f), "patches/patch_1.png", lambda f: read_patch(f / "patches" / "patch_1.png")),
}


def mapping(content) -> dict:
    return {str(key): value for key, value in content.items()} if isinstance(content, dict) else {}
