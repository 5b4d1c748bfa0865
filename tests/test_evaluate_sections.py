"""`evaluate_sections.py` from one section's files to scores and a page."""
import json
import weakref

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
from click.testing import CliRunner
from PIL import Image

import evaluate_sections
from preprocessing.errors import InputError
from preprocessing.png_folder import write_patch_folder

N, G, PX, SEEDS = 40, 12, 32, 2
RETRIEVAL = {f"{prefix}{name}{suffix}" for name in ("r1", "r5", "r10", "median_rank")
             for prefix, suffix in (("", ""), ("", "_ci95"), ("chance_", ""))}


def write_section(folder, name, rng):
    """Spots whose patch colour follows two genes: folders as preprocessing writes them."""
    share = rng.random((N, 2))
    counts = rng.poisson(5, size=(N, G))
    counts[:, 0], counts[:, 1] = rng.poisson(200 * share[:, 0]) + 1, rng.poisson(200 * share[:, 1]) + 1
    colour = np.stack([255 * share[:, 0], 255 * share[:, 1], np.full(N, 90)], axis=1)
    images = np.clip(colour[:, None, None, :] + rng.normal(0, 12, (N, PX, PX, 3)), 0, 255).astype(np.uint8)
    barcodes = [f"spot{i}" for i in range(N)]
    write_patch_folder(folder / name / "patches", images, barcodes=barcodes, sample_id=name, xy=rng.random((N, 2)),
                       stain={"normalised": False})
    adata = ad.AnnData(sp.csr_matrix(counts.astype(np.float32)))
    adata.obs_names, adata.var_names = barcodes, [f"gene{i}" for i in range(G)]
    adata.obs["sample_id"], adata.obs["cluster"] = name, [str(int(value > 0.5)) for value in share[:, 0]]
    adata.obsm["spatial"] = rng.random((N, 2))
    adata.write_h5ad(folder / name / "gex_filt.h5ad")
    return images, barcodes


def write_generated(folder, patches, barcodes):
    """patches (N, k, px, px, 3)."""
    folder.mkdir()
    lines = ["file,prompt,barcode,cluster,seed,truncation,weights_sha256"]
    for i, barcode in enumerate(barcodes):
        for seed in range(patches.shape[1]):
            name = f"prompt{i:05d}_seed{seed:04d}.png"
            Image.fromarray(patches[i, seed]).save(folder / name)
            lines.append(f"{name},{i},{barcode},,{seed},1.0,abc")
    (folder / "samples.csv").write_text("\n".join(lines) + "\n")


def save_clip(folder, seed):
    import torch

    from networks.clip import CLIP, ClipModelConfig
    from networks.histo_models import build_encoder
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = ClipModelConfig(gene_encoder="bottleneck", gene_hidden=8, gene_width=8, dropout=0, image_dropout=0, projection=8,
                                 image_encoder="random_tiny")
        clip = CLIP(config, [f"gene{i}" for i in range(G)], image_encoder=build_encoder("random_tiny"))
    clip.save_pretrained(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run: two training sections, one held out, patches that follow the real ones, patches of noise."""
    folder, rng = tmp_path_factory.mktemp("run"), np.random.default_rng(4)
    write_section(folder, "A", rng)
    write_section(folder, "B", rng)
    images, barcodes = write_section(folder, "C", rng)
    small = images.reshape(N, PX // 2, 2, PX // 2, 2, 3).mean(axis=(2, 4))
    good = np.stack([np.clip(small + rng.normal(0, 6, small.shape), 0, 255) for _ in range(SEEDS)], axis=1).astype(np.uint8)
    write_generated(folder / "generated", good, barcodes)
    write_generated(folder / "untrained", rng.integers(0, 256, size=good.shape, dtype=np.uint8), barcodes)
    save_clip(folder / "clip", 1)
    save_clip(folder / "judge", 2)
    steps = [("clip", 2.5), ("gan", 10), ("clip", 1)]
    (folder / "steps.jsonl").write_text("".join(json.dumps({"step": name, "seconds": seconds}) + "\n" for name, seconds in steps))
    return folder


def call(run, *extra, out="results.json"):
    arguments = ["--train", f"{run / 'A'},{run / 'B'}", "--val", str(run / "C"), "--network", str(run / "clip"),
                 "--features", "random_tiny", "--out", str(run / out), "--device", "cpu", *map(str, extra)]
    return CliRunner().invoke(evaluate_sections.main, arguments)


@pytest.fixture(scope="module")
def results(run):
    answer = call(run, "--judge", run / "judge", "--generated", run / "generated", "--untrained", run / "untrained",
                  "--steps", run / "steps.jsonl", "--report", run / "index.html")
    assert answer.exit_code == 0, answer.output
    assert f"wrote {run / 'results.json'}" in answer.output and f"wrote {run / 'index.html'}" in answer.output
    return json.loads((run / "results.json").read_text())


def test_results_hold_every_score_of_a_section(results):
    section = results["sections"]["C"]
    assert section["n_spots"] == N
    for model in ("retrieval", "baseline_linear"):
        for way in ("gene_to_image", "image_to_gene"):
            assert set(section[model][way]) == RETRIEVAL
    for distance in ("frechet", "kid"):
        scores = section[distance]["random_tiny"]
        assert all({"mean", "ci95"} == set(scores[name]) for name in ("generated", "real_vs_real", "untrained"))
        assert (scores["n"], scores["n_splits"]) == (N // 2, 20)
    for name in ("own_genes", "shuffled_genes", "real_patches"):
        assert set(section["paired"][name]) == RETRIEVAL
    assert results["wall_time_s"]["clip"] == 3.5 and results["wall_time_s"]["gan"] == 10 and "evaluate sections" in results["wall_time_s"]


def test_distances_order_real_generated_and_noise(results):
    for distance in ("frechet", "kid"):
        scores = results["sections"]["C"][distance]["random_tiny"]
        assert scores["generated"]["ci95"][1] < scores["untrained"]["ci95"][0]
        assert scores["real_vs_real"]["mean"] < scores["untrained"]["ci95"][0]


def test_the_linear_baseline_finds_the_planted_colours(results):
    found = results["sections"]["C"]["baseline_linear"]["gene_to_image"]
    assert found["r10_ci95"][0] > 2 * found["chance_r10"]


def test_diversity_of_the_seeds_is_the_planted_noise(results):
    diversity = results["sections"]["C"]["within_prompt_diversity"]
    assert diversity["generated"] == pytest.approx(6, abs=0.8)
    assert diversity["real"] > 20 and diversity["real_groups"] == "cluster"


def test_the_page_is_whole_and_says_what_the_numbers_say(run, results):
    html = (run / "index.html").read_text()
    assert "src=\"data:image/png;base64," in html and "http:" not in html and "https:" not in html and "<script" not in html
    found = results["sections"]["C"]["retrieval"]["gene_to_image"]
    assert f"R@10 {found['r10']:.3f}" in html and "linear baseline" in html and "Section C: 40 spots" in html


def test_without_generated_patches_only_retrieval_is_scored(run):
    answer = call(run, out="retrieval.json")
    assert answer.exit_code == 0, answer.output
    section = json.loads((run / "retrieval.json").read_text())["sections"]["C"]
    assert set(section) == {"n_spots", "retrieval", "baseline_linear", "r10_above_baseline"}


def test_the_same_seed_gives_the_same_results(run, results):
    call(run, "--judge", run / "judge", "--generated", run / "generated", "--untrained", run / "untrained", out="again.json")
    assert json.loads((run / "again.json").read_text())["sections"] == results["sections"]


@pytest.mark.parametrize(("extra", "code", "message"), [
    (["--generated", "generated", "--judge", "clip"], 2, "another CLIP than --network"),
    (["--val", "A"], 2, "sections that --train does not name; found A"),
    (["--generated", "generated,generated"], 2, "one folder for each of the 1 validation sections"),
    (["--generated", "nowhere"], 3, "samples.csv: file"),
    (["--val", "nowhere"], 3, "found no folder"),
    (["--network", "A"], 5, "config.json"),
    (["--judge", "judge"], 2, "--judge: expected --generated beside it"),
    (["--untrained", "untrained"], 2, "--untrained: expected --generated beside it"),
    (["--steps", "nowhere"], 3, "nowhere: file: expected rows of step and seconds"),
], ids=["judge is the model", "trained on", "folders", "no generated", "no section", "no weights", "judge of nothing", "untrained alone",
        "no steps"])
def test_wrong_arguments_are_one_line(run, extra, code, message):
    resolved = [part if part.startswith("--") else ",".join(str(run / name) for name in part.split(",")) for part in extra]
    answer = call(run, *resolved, out="never.json")
    assert answer.exit_code == code, answer.output
    assert message in answer.output and answer.output.strip().count("\n") == 0 and not (run / "never.json").exists()


def test_generated_patches_of_other_spots_or_with_gaps_are_refused(run, tmp_path):
    from evaluation.sections import read_generated
    barcodes = [f"spot{i}" for i in range(N)]
    with pytest.raises(InputError, match="others: 39"):
        read_generated(run / "generated", "C", barcodes[:1])
    whole = read_generated(run / "generated", "C", [f"spot{i}" for i in reversed(range(N))])
    first = np.asarray(Image.open(run / "generated" / "prompt00000_seed0001.png"))
    assert (whole.images[-1, 1] == first).all() and whole.images.shape == (N, SEEDS, PX // 2, PX // 2, 3)    # by barcode, not by place
    lines = (run / "generated" / "samples.csv").read_text().splitlines()
    for path in (run / "generated").glob("*.png"):
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "samples.csv").write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(InputError, match="none for 1 \\(spot39 seed 1\\)"):
        read_generated(tmp_path, "C", barcodes)


def test_steps_are_read_from_csv_too(tmp_path):
    (tmp_path / "steps.csv").write_text("step,seconds\nclip,2\nclip,3\n")
    assert evaluate_sections.read_steps(tmp_path / "steps.csv") == {"clip": 5}
    (tmp_path / "broken.csv").write_text("name,time\nclip,2\n")
    with pytest.raises(InputError, match="rows of step and seconds"):
        evaluate_sections.read_steps(tmp_path / "broken.csv")


def test_the_patches_of_one_held_out_section_are_in_memory_at_a_time(run, monkeypatch):
    loaded, load_section = [], evaluate_sections.load_section

    def watched(*arguments):
        assert [known for known in loaded if known() is not None] == []
        section = load_section(*arguments)
        loaded.append(weakref.ref(section))
        return section

    monkeypatch.setattr(evaluate_sections, "load_section", watched)
    answer = call(run, "--train", run / "A", "--val", f"{run / 'B'},{run / 'C'}", "--generated",
                  f"{run / 'generated'},{run / 'generated'}", "--report", run / "both.html", out="both.json")
    assert answer.exit_code == 0 and len(loaded) == 2, answer.output
    assert (run / "contact_sheet_B.png").is_file() and (run / "contact_sheet_C.png").is_file()


def test_a_spot_without_cluster_is_of_no_cluster():
    import pandas as pd

    from evaluation.sections import Generated, Section, named_clusters, score_diversity
    from evaluation.sections_page import section_sheet
    assert named_clusters(pd.DataFrame({"x": [1]})) is None
    labels = named_clusters(pd.DataFrame({"cluster": pd.Categorical(["a", "NaN", None, "a", None, "NaN"])}))
    assert labels.tolist() == ["a", "NaN", "", "a", "", "NaN"]
    images = np.zeros((6, 4, 4, 3), np.uint8)
    images[2], images[4] = 0, 200                                   # those without a cluster differ, and are no group
    section = Section("S", list("abcdef"), images, sp.eye(6).tocsr(), sp.eye(6).tocsr(), labels)
    made = Generated(np.arange(6), ["0"], images[:, None])
    assert score_diversity(section, made, None)["real"] == 0
    assert section_sheet(section, made, np.random.default_rng(0)).shape[1] > 2 * 96
