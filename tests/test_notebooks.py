"""The notebooks run from top to bottom on two simulated sections, as they are but for the paths, and show what they promise."""
import json
import os
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from nbclient import NotebookClient
from tiny_samples import tiny_sample

import clip_embeddings
import interpretability
from networks.clip import CLIP, ClipModelConfig
from networks.histo_models import build_encoder
from preprocessing import extract_patches
from preprocessing.expression import read_vocabulary
from preprocessing.gene_vocab import write_sample_vocabulary
from preprocessing.gex_preprocessing import filter_expression

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "analysis_notebooks").glob("*.ipynb"))
SAMPLES = ("A", "B")
LARGEST_BYTES = 400_000      # of a notebook with its figures: a page, not an archive


def ask(command, *arguments):
    answer = CliRunner().invoke(command.main, list(map(str, arguments)))
    assert answer.exit_code == 0, answer.output


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two sections of one biology with patches and clusters, embeddings by an untrained CLIP, attributions, and the programmes as gene
    sets."""
    folder = tmp_path_factory.mktemp("notebooks")
    for seed, name in enumerate(SAMPLES, start=1):
        sample = tiny_sample(folder / name, "visium-v2", sample_id=name, seed=seed, width_um=750, height_um=650, umis=8000)
        ask(extract_patches, "--space-ranger-dir", sample.space_ranger_dir, "--wsi-file", sample.slide, "--sample-id", name, "--out-dir",
            folder / name, "--patch-sz-px", 32, "--dump-dir", folder / name / "patches", "--no-h5", "--workers", 1)
    write_sample_vocabulary(",".join(str(folder / name / "gex.h5ad") for name in SAMPLES), folder / "vocab.txt", 1, None)
    genes = read_vocabulary(folder / "vocab.txt")
    torch.manual_seed(0)
    config = ClipModelConfig(gene_encoder="bottleneck", gene_hidden=32, gene_width=32, projection=16, image_encoder="random_tiny")
    CLIP(config, genes, image_encoder=build_encoder("random_tiny")).eval().save_pretrained(folder / "clip")
    for name in SAMPLES:
        filter_expression(folder / name / "gex.h5ad", folder / "vocab.txt", folder / name / "gex_filt.h5ad")
        ask(clip_embeddings, "--network", folder / "clip", "--gex", folder / name / "gex_filt.h5ad", "--images", folder / name / "patches",
            "--out-dir", folder / name / "embeddings", "--device", "cpu")
    ask(interpretability, "--network", folder / "clip", "--gex", folder / "A" / "gex_filt.h5ad", "--cluster-labs", "cluster",
        "--out-file", folder / "genes.csv", "--device", "cpu")
    truth = pd.read_csv(next((folder / "A").rglob("genes.csv")))
    (folder / "sets.gmt").write_text("".join("\t".join([programme, "planted", *part.gene]) + "\n"
                                             for programme, part in truth.groupby("programme") if programme != "housekeeping"))
    return folder


def parameters(notebook: str, world: Path, out: Path) -> dict[str, object]:
    gex = {name: str(world / name / "gex_filt.h5ad") for name in SAMPLES}
    return {"clip_latent_space_analysis": {"GEX": gex, "PATCHES": {name: str(world / name / "patches") for name in SAMPLES},
                                           "EMBEDDINGS": {name: str(world / name / "embeddings") for name in SAMPLES}},
            "attribution_analysis": {"ATTRIBUTIONS": str(world / "genes.csv"), "GENE_SETS": str(world / "sets.gmt"), "PERMUTATIONS": 50},
            "scGPT_embeddings": {"GEX": gex, "OUT": str(out), "N_GENES": 60}}[notebook]


def run(notebook: str, world: Path, out: Path, **changes):
    """Execute with other parameters; returns its output as text, and its pictures (count, bytes of the file)."""
    page = nbformat.read(ROOT / "analysis_notebooks" / f"{notebook}.ipynb", as_version=4)
    (cell,) = [cell for cell in page.cells if "parameters" in cell.metadata.get("tags", [])]
    cell.source += "\n" + "\n".join(f"{name} = {value!r}" for name, value in (parameters(notebook, world, out) | changes).items())
    here = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{here}"        # the kernel is a process of its own
    try:
        NotebookClient(page, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(out)}}).execute()
    finally:
        os.environ["PYTHONPATH"] = here
    outputs = [output for cell in page.cells for output in cell.get("outputs", [])]
    text = "\n".join(output.get("text", "") or output.get("data", {}).get("text/plain", "") for output in outputs)
    return text, sum("image/png" in output.get("data", {}) for output in outputs), len(nbformat.writes(page))


@pytest.mark.slow
def test_the_latent_space_notebook_shows_both_sections_in_one_plane_and_scores_three_spaces(world, tmp_path):
    text, pictures, size = run("clip_latent_space_analysis", world, tmp_path)
    assert pictures == 4 and size < LARGEST_BYTES        # plane, bars, ways, retrieval
    assert all(row in text for row in ("gene", "image", "PCA of expression")) and "ARI with samples" in text and "median rank" in text


@pytest.mark.slow
def test_the_attribution_notebook_lists_genes_and_gene_sets(world, tmp_path):
    text, pictures, size = run("attribution_analysis", world, tmp_path)
    assert pictures >= 1 and size < LARGEST_BYTES
    assert "genes in any list" in text and "12 sets with genes of the model" in text and "Sim0" in text


@pytest.mark.slow
def test_the_scgpt_notebook_writes_prompts_that_pair_with_patches_where_there_is_no_scgpt(world, tmp_path):
    import anndata as ad

    from diffusion_utils.pairs import read_pairs
    text, pictures, _ = run("scGPT_embeddings", world, tmp_path)
    assert pictures == 1 and "prompts: PCA" in text and "no scGPT embedding was named" in text
    handed = ad.read_h5ad(tmp_path / "for_scgpt.h5ad")
    assert handed.n_vars == 60 and (handed.X.data == np.round(handed.X.data)).all() and "gene_name" in handed.var
    pairs = read_pairs(str(world / "A" / "patches"), str(tmp_path / "A" / "PCA_emb.npy"))
    assert len(pairs) == (handed.obs.sample_id == "A").sum()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_small_valid_and_hold_no_logic(path):
    page = nbformat.read(path, as_version=4)
    nbformat.validate(page)
    assert path.stat().st_size < LARGEST_BYTES and page.cells[0].cell_type == "markdown" and page.cells[0].source.startswith("# ")
    code = [cell.source for cell in page.cells if cell.cell_type == "code"]
    assert sum(bool([tag for tag in cell.metadata.get("tags", []) if tag == "parameters"]) for cell in page.cells) == 1
    assert max(len(source.splitlines()) for source in code) <= 20
    assert "/work" not in json.dumps(page) and "/tmp/" not in json.dumps(page) and "/home/" not in json.dumps(page)


def test_there_are_the_three_notebooks():
    assert [path.stem for path in NOTEBOOKS] == ["attribution_analysis", "clip_latent_space_analysis", "scGPT_embeddings"]
