"""imgs.h5 -> patch folder: the command, its function, and the run of one sample."""
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from preprocessing.done_manifests import fingerprint, strings_sha256
from preprocessing.dump_patches import dump_patches_to_folder, dump_patches_to_folder_single, main
from preprocessing.expression import read_expression, write_expression, write_vocabulary
from preprocessing.patch_file import read_patch_file, write_patch_file
from preprocessing.patches import pair, read_patch, read_patch_folder
from preprocessing.stain import normalise_stain, read_stain_file

ROOT = Path(__file__).resolve().parents[2]
BARCODES = ["D-1", "B-1", "C-1", "A-1"]


def stained_image(height, width, seed=0):
    """Two stains on tissue everywhere."""
    generator = np.random.default_rng(seed)
    mostly = np.where(generator.random((height, width, 1)) < 0.5, (1, 0.02), (0.02, 1))
    amounts = generator.gamma(2.0, 0.4, (height, width, 2)) * mostly
    return np.clip(240 * np.exp(-amounts @ np.array([[0.65, 0.07], [0.70, 0.99], [0.29, 0.11]]).T) - 1, 0, 255).astype(np.uint8)


@pytest.fixture
def sample(tmp_path):
    """A folder S1 with slide.png, imgs.h5 (four 16 px patches) and the gex.h5ad beside it."""
    import anndata as ad
    import scipy.sparse as sp
    folder = tmp_path / "S1"
    folder.mkdir()
    slide = stained_image(200, 300)
    Image.fromarray(slide).save(folder / "slide.png")
    coords = np.array([[0, 0], [20, 40], [100, 60], [200, 150]])
    write_patch_file(folder / "imgs.h5", (slide[y:y + 16, x:x + 16] for x, y in coords), count=4, patch_px=16, coords=coords,
                     barcodes=BARCODES, patch_size_src=16, pixel_size=0.5, name="S1")
    adata = ad.AnnData(sp.csr_matrix(np.arange(8).reshape(4, 2)))
    adata.obs_names, adata.var_names = BARCODES, ["Umod", "Actb"]
    adata.obs["sample_id"], adata.obsm["spatial"] = "S1", coords + 8.0
    adata.uns["morphology"] = {"mpp": 0.5}
    write_expression(folder / "gex.h5ad", adata)
    return folder


def metadata(folder):
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_both_names_of_the_original_call_one_function():
    assert dump_patches_to_folder is dump_patches_to_folder_single


def test_raw_patches_come_out_bit_for_bit_with_their_barcodes(sample):
    assert dump_patches_to_folder_single(sample / "imgs.h5", None, sample / "patches", normalize=False) == 4
    folder = read_patch_folder(sample / "patches")
    assert folder.barcodes == BARCODES and folder.sample_ids == ["S1"] * 4 and folder.rows == [0, 1, 2, 3]
    with read_patch_file(sample / "imgs.h5") as file:
        assert all((read_patch(path) == file.images(row)).all() for row, path in enumerate(folder.paths))
        assert (folder.centre_xy_px == file.coords + 8).all()
    assert json.loads((sample / "patches" / "stain.json").read_text()) == {"normalised": False,
                                                                                "barcode_sha256": strings_sha256(BARCODES)}


def test_normalised_patches_follow_the_vectors_in_stain_json(sample):
    dump_patches_to_folder(sample / "imgs.h5", sample / "slide.png", sample / "patches")
    record = json.loads((sample / "patches" / "stain.json").read_text())
    assert record["normalised"] is True and record["slide"]["name"] == "slide.png" and record["settings"]["method"] == "macenko"
    stain, folder = read_stain_file(sample / "patches" / "stain.json"), read_patch_folder(sample / "patches")
    with read_patch_file(sample / "imgs.h5") as file:
        assert all((read_patch(path) == normalise_stain(file.images(row), stain)).all() for row, path in enumerate(folder.paths))


def test_a_stain_file_replaces_the_estimate(sample):
    run("--images", sample / "imgs.h5", "--wsi", sample / "slide.png", "--out-dir", sample / "a")
    result = run("--images", sample / "imgs.h5", "--out-dir", sample / "b", "--stain-file", sample / "a" / "stain.json")
    assert result.exit_code == 0 and f"4 patches stand in {sample / 'b'}" in result.output
    assert (read_patch(sample / "a" / "patch_2.png") == read_patch(sample / "b" / "patch_2.png")).all()
    assert json.loads((sample / "b" / "stain.json").read_text())["from_stain_file"] == "stain.json"


def test_a_slide_of_other_bytes_than_the_patches_were_cut_from_is_warned_of(sample, tmp_path):
    adata = read_expression(sample / "gex.h5ad")
    adata.uns["morphology"] = dict(adata.uns["morphology"]) | {"slide": fingerprint(sample / "slide.png")}
    write_expression(sample / "gex.h5ad", adata)
    same = shutil.copy(sample / "slide.png", tmp_path / "renamed.png")
    Image.open(sample / "slide.png").save(tmp_path / "converted.tif")
    said = {slide.name: run("--images", sample / "imgs.h5", "--wsi", slide, "--out-dir", tmp_path / f"{slide.stem} out")
            for slide in (Path(same), tmp_path / "converted.tif")}
    assert all(result.exit_code == 0 for result in said.values()) and "warning" not in said["renamed.png"].output
    warning, = (line for line in said["converted.tif"].output.splitlines() if "warning" in line)
    assert str(tmp_path / "converted.tif") in warning and str(sample / "gex.h5ad") in warning and "(slide.png)" in warning
    assert json.loads((tmp_path / "converted out" / "stain.json").read_text())["slide"]["name"] == "converted.tif"


def test_a_folder_does_not_replace_the_stain_file_it_is_made_with(sample):
    run("--images", sample / "imgs.h5", "--wsi", sample / "slide.png", "--out-dir", sample / "a")
    before = content(sample / "a")
    refused = run("--images", sample / "imgs.h5", "--out-dir", sample / "a", "--stain-file", sample / "a" / "stain.json")
    assert refused.exit_code == 2 and "--out-dir: expected a folder without an input in it" in refused.output
    assert content(sample / "a") == before


def test_a_refused_run_leaves_no_new_folder(tmp_path):
    refused = run("--images", tmp_path / "nothing.h5", "--no-normalize", "--out-dir", tmp_path / "new" / "patches")
    assert refused.exit_code == 3 and not (tmp_path / "new").exists()


def test_rows_follow_the_h5ad_beside_even_when_it_was_resorted(sample):
    adata = read_expression(sample / "gex.h5ad")[["A-1", "B-1", "C-1", "D-1"]].copy()
    write_expression(sample / "gex.h5ad", adata)
    dump_patches_to_folder(sample / "imgs.h5", None, sample / "patches", normalize=False)
    lines = metadata(sample / "patches")
    assert [(line["barcode"], line["gex_emb"]) for line in lines] == [("A-1", 0), ("B-1", 1), ("C-1", 2), ("D-1", 3)]
    assert lines[3]["x"] == 8 and lines[3]["y"] == 8
    with read_patch_file(sample / "imgs.h5") as file:
        paths = pair(read_patch_folder(sample / "patches"), adata.obs_names.tolist(), "gex.h5ad", adata.uns["morphology"]["barcode_sha256"])
        assert all((read_patch(path) == file.images(row)).all() for path, row in zip(paths, [3, 1, 2, 0], strict=True))


def test_an_h5ad_of_another_sample_beside_is_refused(sample):
    adata = read_expression(sample / "gex.h5ad")
    adata.obs_names = ["W-1", "X-1", "Y-1", "Z-1"]
    write_expression(sample / "gex.h5ad", adata)
    result = run("--images", sample / "imgs.h5", "--out-dir", sample / "patches", "--no-normalize")
    assert result.exit_code == 3 and "no patch for 4 (W-1, X-1, Y-1, Z-1)" in result.output and not (sample / "patches").exists()


@pytest.mark.parametrize("colour", [(255, 255, 255), (190, 90, 150)], ids=["white", "single colour"])
def test_a_slide_without_two_stains_is_an_error_or_keeps_its_colours(sample, colour):
    Image.fromarray(np.full((200, 300, 3), colour, np.uint8)).save(sample / "slide.png")
    arguments = ["--images", sample / "imgs.h5", "--wsi", sample / "slide.png", "--out-dir", sample / "patches"]
    refused = run(*arguments)
    assert refused.exit_code == 3 and "slide.png: stain: expected tissue in two stains" in refused.output
    assert not (sample / "patches").exists() and "Traceback" not in refused.output
    kept = run(*arguments, "--on-stain-failure", "skip")
    assert kept.exit_code == 0 and json.loads((sample / "patches" / "stain.json").read_text())["normalised"] is False
    with read_patch_file(sample / "imgs.h5") as file:
        assert (read_patch(sample / "patches" / "patch_1.png") == file.images(1)).all()


def test_random_patches_without_barcodes_are_dumped_without_a_pairing(sample):
    with read_patch_file(sample / "imgs.h5") as file:
        images, coords = file.images(slice(0, 4)), file.coords
    write_patch_file(sample / "random.h5", iter(images), count=4, patch_px=16, coords=coords, barcodes=None, patch_size_src=16,
                     pixel_size=0.5, name="S1")
    dump_patches_to_folder(sample / "random.h5", None, sample / "random", normalize=False)
    assert metadata(sample / "random")[1] == {"file_name": "patch_1.png", "sample_id": "S1", "x": 28.0, "y": 48.0}


def test_the_ids_form_finds_every_sample_and_its_slide(sample, tmp_path):
    (tmp_path / "wsi").mkdir()
    (sample / "slide.png").rename(tmp_path / "wsi" / "S1.png")
    (tmp_path / "S2.h5").write_bytes((sample / "imgs.h5").read_bytes())
    (tmp_path / "wsi" / "S2").mkdir()
    (tmp_path / "wsi" / "S2" / "anything.png").write_bytes((tmp_path / "wsi" / "S1.png").read_bytes())
    result = run("--ids", "S1,S2", "--root-dir", tmp_path, "--wsi-dir", tmp_path / "wsi", "--out-dir", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert read_patch_folder(tmp_path / "out" / "S1").barcodes == read_patch_folder(tmp_path / "out" / "S2").barcodes == BARCODES


@pytest.mark.parametrize("arguments, code, message", [
    (["--ids", "S9", "--root-dir", "."], 3, "S9: expected S9/imgs.h5 or S9.h5; found neither"),
    (["--ids", "S1"], 2, "no --root-dir"),
    (["--ids", " , ", "--root-dir", "."], 2, "--ids: expected at least one sample; found none"),
    (["--images", "S1/imgs.h5", "--stain-file", "S1"], 3, "S1: file: expected a stain.json; found a folder"),
    ([], 2, "no --ids and no --root-dir"),
    (["--images", "S1/imgs.h5", "--ids", "S1"], 2, "both: --ids as well"),
    (["--images", "S1/imgs.h5"], 2, "--wsi: expected the slide"),
    (["--images", "S1/imgs.h5", "--no-normalize", "--stain-file", "S1/slide.png"], 2,
     "--stain-file: expected patches that are normalised .--normalize.; found --no-normalize"),
    (["--ids", "S1", "--root-dir", ".", "--wsi-dir", "S1"], 3, r"expected one slide S1.\*"),
    (["--images", "nothing.h5"], 3, "nothing.h5: file: expected an HDF5 file of patches; found nothing there"),
], ids=["unknown sample", "no root", "empty list", "stain is a folder", "nothing",
        "two forms", "no slide", "stain without normalisation", "no slide of that name", "no file"])
def test_options_that_cannot_hold_end_in_one_line(sample, monkeypatch, arguments, code, message):
    import re
    monkeypatch.chdir(sample.parent)
    result = run(*arguments, "--out-dir", "out")
    assert result.exit_code == code and re.search(message, result.output), result.output
    assert "Traceback" not in result.output and not Path("out").exists()


def preprocessing_sh(*arguments):
    import os
    environment = os.environ | {"PYTHON": sys.executable}
    return subprocess.run(["bash", str(ROOT / "preprocessing" / "preprocessing.sh"), *map(str, arguments)], capture_output=True,
                          text=True, env=environment)


def test_the_script_teaches_itself():
    helped, bare = preprocessing_sh("--help"), preprocessing_sh("only", "two")
    assert helped.returncode == 0 and "Usage: bash preprocessing/preprocessing.sh SAMPLE_DIR SLIDE VOCAB OUT_DIR" in helped.stdout
    assert bare.returncode == 2 and "Usage:" in bare.stderr


@pytest.mark.parametrize(("more", "message"), [
    (["--stain-file"], "error: --stain-file: expected a value; found nothing"),
    (["--missing-genes", "--no-normalize"], "error: --missing-genes: expected a value; found --no-normalize"),
    *[([option], f"error: {option}: expected no such option here; the steps after the first need its files")
      for option in ("--dry-run", "--no-h5")],
    *[(option, f"error: {name}: expected no such option here; OUT_DIR says where results go")
      for name in ("--out-dir", "--dump-dir") for option in ([name, "x"], [f"{name}=x"])]],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_the_script_refuses_an_option_without_its_value_and_those_that_it_settles(more, message):
    result = preprocessing_sh("sample", "slide.tif", "vocab.txt", "out", *more)
    assert (result.returncode, result.stderr.strip(), result.stdout) == (2, message, "")


def test_the_script_wants_its_four_places_before_the_options():
    result = preprocessing_sh("--patch-sz-px", "64", "sample", "slide.tif", "vocab.txt", "out")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: --patch-sz-px: expected SAMPLE_DIR SLIDE VOCAB OUT_DIR first; found an option before them\n"


@pytest.mark.parametrize(("gone", "message"), [
    ("slide.png", "slide.png: file: expected the slide; found nothing there"),
    ("vocab.txt", "vocab.txt: file: expected a gene vocabulary, one symbol a line; found nothing there")])
def test_the_script_looks_for_slide_and_vocabulary_before_the_long_step(sample, gone, message):
    write_vocabulary(sample / "vocab.txt", ["Umod"])
    (sample / gone).unlink()
    result = preprocessing_sh(sample / "gex.h5ad", sample / "slide.png", sample / "vocab.txt", sample / "new" / "out")
    assert (result.returncode, result.stderr, result.stdout) == (3, f"error: {sample}/{message}\n", "")
    assert not (sample / "new").exists()


@pytest.mark.parametrize("arguments", [["-h"], ["sample", "--help"], ["s", "slide.tif", "v", "o", "-h"]], ids=" ".join)
def test_the_script_helps_wherever_it_is_asked(arguments):
    result = preprocessing_sh(*arguments)
    assert result.returncode == 0 and result.stdout.startswith("Usage: bash preprocessing/preprocessing.sh")


def test_the_script_takes_real_tissue_from_the_space_ranger_folder_to_a_paired_folder(shared_data, tmp_path):
    brain = shared_data / "mouse-brain-crop"
    vocabulary = tmp_path / "vocab.txt"
    with h5py.File(brain / "derived_spaceranger_v2" / "filtered_feature_bc_matrix.h5") as file:
        write_vocabulary(vocabulary, [*file["matrix/features/name"].asstr()[:2], "not_a_gene"])
    out = tmp_path / "brain"
    arguments = [brain / "derived_spaceranger_v2", brain / "fullres.tif", vocabulary, out]
    stopped = preprocessing_sh(*arguments)
    assert stopped.returncode == 3 and "missing" in stopped.stderr and "dump_patches" not in stopped.stdout
    assert not (out / "gex_filt.h5ad").exists() and not (out / "patches").exists()
    done = preprocessing_sh(*arguments, "--missing-genes", "zero", "--sample-id", "BRAIN")
    assert done.returncode == 0, done.stderr
    expression, folder = read_expression(out / "gex_filt.h5ad"), read_patch_folder(out / "patches")
    assert expression.n_vars == 3 and set(folder.sample_ids) == {"BRAIN"}
    assert len(pair(folder, expression.obs_names.tolist(), "gex_filt.h5ad", expression.uns["morphology"]["barcode_sha256"])) == 49


def test_a_finished_folder_is_left_alone_and_a_damaged_or_otherwise_set_one_is_redone(sample, tmp_path):
    folder = tmp_path / "patches"
    dump_patches_to_folder_single(sample / "imgs.h5", None, folder, normalize=False)
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    dump_patches_to_folder_single(sample / "imgs.h5", None, folder, normalize=False)
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob("*.png")} == before
    next(folder.glob("*.png")).unlink()
    assert dump_patches_to_folder_single(sample / "imgs.h5", None, folder, normalize=False) == len(list(folder.glob("*.png")))


def truncate_a_patch(folder):
    path = folder / "patch_1.png"
    path.write_bytes(path.read_bytes()[:40])


@pytest.mark.parametrize("damage", [lambda folder: (folder / "metadata.jsonl").unlink(), lambda folder: (folder / "stain.json").unlink(),
                                    lambda folder: (folder / "metadata.jsonl").write_text("{}"), truncate_a_patch],
                         ids=["metadata gone", "stain gone", "metadata changed", "patch cut short"])
def test_a_damaged_folder_is_redone(sample, damage):
    folder = sample / "patches"
    dump_patches_to_folder_single(sample / "imgs.h5", None, folder, normalize=False)
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    damage(folder)
    assert dump_patches_to_folder_single(sample / "imgs.h5", None, folder, normalize=False) == 4
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole


def test_patches_of_other_positions_than_the_h5ad_beside_are_refused(sample):
    adata = read_expression(sample / "gex.h5ad")
    adata.obs_names = BARCODES[1:] + BARCODES[:1]
    write_expression(sample / "gex.h5ad", adata)
    result = run("--images", sample / "imgs.h5", "--out-dir", sample / "patches", "--no-normalize")
    assert result.exit_code == 3 and "imgs.h5: positions: expected every patch within 2 px of its spot" in result.output


def test_the_working_folder_can_be_the_patch_folder(sample, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    for _ in range(2):
        result = run("--images", "../S1/imgs.h5", "--out-dir", ".", "--no-normalize")
        assert result.exit_code == 0, result.output
    assert read_patch_folder(tmp_path / "empty").barcodes == BARCODES


# ---- a run that was stopped ----

@pytest.fixture
def long_sample(tmp_path, monkeypatch):
    """S2/imgs.h5 of 47 random patches, dumped in ten blocks of five."""
    monkeypatch.setattr("preprocessing.dump_patches.MOST_PATCHES", 5)
    folder = tmp_path / "S2"
    folder.mkdir()
    slide = stained_image(100, 100)
    Image.fromarray(slide).save(folder / "slide.png")
    coords = np.random.default_rng(0).integers(0, 84, (47, 2))
    write_patch_file(folder / "imgs.h5", (slide[y:y + 16, x:x + 16] for x, y in coords), count=47, patch_px=16, coords=coords,
                     barcodes=None, patch_size_src=16, pixel_size=0.5, name="S2")
    return folder


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def blocks_written(monkeypatch):
    """First rows of the blocks that were written, in order; a test may append to `stop_at` the row at which the user presses Ctrl-C."""
    import preprocessing.png_folder as png_folder
    rows, write = [], png_folder.write_pngs
    rows_and_stop = type("Blocks", (list,), {"stop_at": None})(rows)

    def counted(folder, first_row, *arguments):
        if first_row == rows_and_stop.stop_at:
            raise KeyboardInterrupt
        rows_and_stop.append(first_row)
        write(folder, first_row, *arguments)

    monkeypatch.setattr(png_folder, "write_pngs", counted)
    return rows_and_stop


def dump_long(sample, out, **options):
    return dump_patches_to_folder_single(sample / "imgs.h5", sample / "slide.png", out, workers=2, **options)


def test_blocks_make_the_folder_that_one_block_makes(long_sample, tmp_path, monkeypatch, blocks_written):
    assert dump_long(long_sample, tmp_path / "in blocks") == 47 and blocks_written == list(range(0, 47, 5))
    monkeypatch.setattr("preprocessing.dump_patches.MOST_PATCHES", 1000)
    dump_long(long_sample, tmp_path / "at once")
    assert content(tmp_path / "in blocks") == content(tmp_path / "at once") and blocks_written[10:] == [0]


def test_ctrl_c_ends_in_one_line_and_the_next_run_goes_on_where_it_was(long_sample, tmp_path, blocks_written):
    arguments = ["--images", long_sample / "imgs.h5", "--wsi", long_sample / "slide.png", "--out-dir", tmp_path / "out", "--workers", "1"]
    blocks_written.stop_at = 25
    stopped = run(*arguments)
    assert stopped.exit_code == 130 and "error: interrupted; what was finished is kept" in stopped.output
    assert "Traceback" not in stopped.output and not (tmp_path / "out").exists()
    blocks_written.stop_at = None
    done = run(*arguments)
    assert done.exit_code == 0 and blocks_written == list(range(0, 47, 5)) and "| 25/47" in done.output
    dump_long(long_sample, tmp_path / "straight")
    assert content(tmp_path / "out") == content(tmp_path / "straight")
    assert not list(tmp_path.glob(".out.parts"))


def test_patches_replaced_during_a_run_are_not_taken_for_dumped(long_sample, tmp_path, blocks_written, monkeypatch):
    import preprocessing.png_folder as png_folder
    images, write = long_sample / "imgs.h5", png_folder.write_pngs
    with h5py.File(shutil.copy(images, tmp_path / "new.h5"), "r+") as file:
        file["img"][...] = 255 - file["img"][...]
    old, new = (read_patch_file(path).images(slice(0, 47)) for path in (images, tmp_path / "new.h5"))

    def replacing(folder, first_row, *arguments):
        if first_row == 10 and (tmp_path / "new.h5").exists():
            os.replace(tmp_path / "new.h5", images)
        write(folder, first_row, *arguments)

    monkeypatch.setattr(png_folder, "write_pngs", replacing)
    for expected in (old, new):
        dump_patches_to_folder_single(images, None, tmp_path / "out", normalize=False)
        assert (np.stack([read_patch(path) for path in read_patch_folder(tmp_path / "out").paths]) == expected).all()


@pytest.mark.parametrize("change", ["config", "patches", "stain"])
def test_a_stopped_run_of_other_patches_or_settings_is_begun_anew(long_sample, tmp_path, blocks_written, change):
    blocks_written.stop_at = 25
    with pytest.raises(KeyboardInterrupt):
        dump_long(long_sample, tmp_path / "out")
    blocks_written.stop_at = None
    options = {"normalize": False} if change == "config" else {}
    if change == "patches":
        with h5py.File(long_sample / "imgs.h5", "r+") as file:
            file["img"][3] = 7
    elif change == "stain":
        Image.fromarray(stained_image(100, 100, seed=1)).save(long_sample / "slide.png")
    del blocks_written[:]
    dump_long(long_sample, tmp_path / "out", **options)
    assert blocks_written == list(range(0, 47, 5))
    dump_long(long_sample, tmp_path / "straight", **options)
    assert content(tmp_path / "out") == content(tmp_path / "straight")


def test_patches_that_vanished_from_a_stopped_run_are_made_again(long_sample, tmp_path, blocks_written):
    blocks_written.stop_at = 25
    with pytest.raises(KeyboardInterrupt):
        dump_long(long_sample, tmp_path / "out")
    (tmp_path / ".out.parts" / "patches" / "patch_12.png").unlink()
    blocks_written.stop_at = None
    del blocks_written[:]
    dump_long(long_sample, tmp_path / "out")
    assert blocks_written == list(range(10, 47, 5)) and len(read_patch_folder(tmp_path / "out").paths) == 47


def test_a_run_killed_when_the_folder_had_just_got_its_name_is_done(long_sample, tmp_path, monkeypatch, blocks_written):
    from preprocessing.parts import Parts
    monkeypatch.setattr(Parts, "remove", lambda self: os.kill(os.getpid(), signal.SIGKILL))
    assert killed_after(lambda: dump_long(long_sample, tmp_path / "out"), seconds=60)
    assert dump_long(long_sample, tmp_path / "out") == 47 and blocks_written == []


def killed_after(work, seconds) -> bool:
    """Do `work` in another process, which is killed if it takes longer; True if it did not end by itself."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(seconds)
    process.kill()
    process.join()
    return process.exitcode != 0


def test_a_run_killed_at_twenty_random_moments_comes_to_the_same_folder(long_sample, tmp_path, monkeypatch):
    import time

    import preprocessing.png_folder as png_folder
    log, write = tmp_path / "log", png_folder.write_pngs

    def logged(folder, first_row, *arguments):
        with open(log, "a") as stream:
            stream.write(f"{first_row}\n")
        time.sleep(0.01)                                       # kills must find blocks half done, not only whole runs
        write(folder, first_row, *arguments)

    monkeypatch.setattr(png_folder, "write_pngs", logged)
    began = time.perf_counter()
    dump_long(long_sample, tmp_path / "straight")
    seconds = time.perf_counter() - began
    log.unlink()
    generator, kills, in_a_block, number = np.random.default_rng(0), 0, 0, 0
    for _ in range(100):
        out = tmp_path / f"out{number}"
        if killed_after(lambda out=out: dump_long(long_sample, out), generator.uniform(0.1, 1) * seconds if kills < 20 else 60):
            kills += 1
            continue
        assert content(out) == content(tmp_path / "straight")
        rows = [int(line) for line in log.read_text().split()]
        assert all(later in (earlier, earlier + 5) for earlier, later in zip(rows, rows[1:], strict=False)), rows
        in_a_block += sum(np.diff(rows) == 0)
        number += 1
        log.unlink()
        if kills == 20:
            break
    assert kills == 20 and in_a_block >= 3, "too few kills came while a block was being written"


@pytest.mark.parametrize("shape", [(4, 5000, 2, 3), (4, 2, 200_000, 3)], ids=["tall", "wide"])
def test_patches_too_large_to_read_back_are_refused_before_they_are_decoded(sample, shape):
    with h5py.File(sample / "imgs.h5", "r+") as file:
        del file["img"]
        file.create_dataset("img", shape, np.uint8, chunks=(1, *shape[1:]), compression="gzip")
    result = run("--images", sample / "imgs.h5", "--out-dir", sample / "patches", "--no-normalize")
    assert result.exit_code == 3 and "img: expected patches of at most 4096 x 4096 px; found" in result.output
    assert not (sample / "patches").exists()


def test_a_full_disk_is_noticed_before_the_first_patch(long_sample, tmp_path, monkeypatch, blocks_written):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 500}))
    result = run("--images", long_sample / "imgs.h5", "--out-dir", tmp_path / "out", "--no-normalize")
    assert result.exit_code == 4 and "needs 0.0 GB, 0.0 GB are free" in result.output and blocks_written == []


def test_workers_are_counted_from_one(sample):
    result = run("--images", sample / "imgs.h5", "--out-dir", sample / "patches", "--no-normalize", "--workers", "0")
    assert result.exit_code == 2 and "--workers" in result.output
