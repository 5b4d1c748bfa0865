"""What stands in an output's place is replaced only if it is an older output of the same command."""
import json
import os

import h5py
import pytest

from preprocessing.errors import OptionError
from preprocessing.older_outputs import FILTERED, GENERATED_HDF5, IMPORTED, VOCABULARY, extracted, json_file, page, table
from preprocessing.output_places import FolderKind, require_outputs, require_own_folder, require_shared_folder

KIND = FolderKind("an older folder", r"samples\.csv|seed\d+\.png")
PAGE = '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'


def is_refused(path, kind) -> bool:
    try:
        require_outputs({"--out": {path: kind}}, {})
    except OptionError as error:
        assert str(path) in str(error) and "--out" in str(error)
        return True
    return False


def hdf5(path, **texts) -> None:
    with h5py.File(path, "w") as file:
        for name, text in texts.items():
            file[name.replace("__", "/")] = text


@pytest.mark.parametrize(("kind", "name", "own", "foreign"), [
    (VOCABULARY, "v.txt", "ACTB\nmt-Nd1\nE(spl)m8-HLH\nsnRNA:U6:96Aa\n", "To do today: buy bread\n"),
    (VOCABULARY, "v", "ACTB\r\n\r\n ERBB2 \r\n", "ERBB2:+2\nKRT17:0\n"),
    (VOCABULARY, "v.txt", "".join(f"Gene{n}\n" for n in range(20_000)), '{"config": 1}'),
    (page("a page", "Image"), "p.html", f"{PAGE}<title>Image quality: C4</title>", f"{PAGE}<title>Perturbation: A</title>"),
    (json_file("numbers", "sections"), "r.json", '{\n "sections": {}}', '["sections"]'),
    (table("a table", "gene(,.*)?"), "g.csv", "gene,1 vs. 2\r\nACTB,0\r\n", "barcode,gene\n"),
])
def test_a_text_is_told_by_its_first_lines(tmp_path, kind, name, own, foreign):
    path = tmp_path / name
    assert not is_refused(path, kind)
    for text, refused in ((own, False), (foreign, True), ("", False), ("\0\x01\xff", True)):
        path.write_bytes(text.encode("latin-1"))
        assert is_refused(path, kind) == refused, text


def test_a_name_without_the_suffix_is_refused_before_anything_is_there(tmp_path):
    assert is_refused(tmp_path / "page.h5ad", page("a page")) and is_refused(tmp_path / "page", page("a page"))
    assert not is_refused(tmp_path / "PAGE.HTML", page("a page"))


def test_hdf5_files_are_told_by_content_or_by_the_done_manifest_that_a_damaged_one_has(tmp_path):
    path = tmp_path / "gex.h5ad"
    hdf5(path, uns__vocab_sha256="abc")
    assert not is_refused(path, FILTERED)
    for kind, other, settings in ((extracted(tmp_path / "qc.png"), IMPORTED, {"edge": "drop", "patch_um": 55}),
                                  (IMPORTED, extracted(tmp_path / "qc.png"), {"patch_um": 100})):
        hdf5(path, uns__morphology__settings=json.dumps(settings))
        (tmp_path / "imgs.h5").write_text("what a killed run left beside it")
        assert [is_refused(file, kind) for file in (path, tmp_path / "imgs.h5")] == [False, False] and is_refused(path, other)
        assert is_refused(path, FILTERED)
        (tmp_path / "vocab.txt").write_text("ACTB")
        assert is_refused(tmp_path / "vocab.txt", kind)
    path.write_text("damaged")
    assert is_refused(path, FILTERED) and is_refused(path, IMPORTED)
    (tmp_path / "gex.h5ad.done.json").write_text('{"config": {"missing_genes": "error"}}')
    assert not is_refused(path, FILTERED)
    for config, of_spots in (('{"edge": "drop"}', True), ('{"n_patches": 9, "tissue": "auto"}', False)):
        (tmp_path / "gex.h5ad.done.json").write_text(f'{{"config": {config}}}')
        assert not is_refused(path, extracted(tmp_path / "qc.png", of_spots))
        assert is_refused(path, extracted(tmp_path / "qc.png", not of_spots))


def test_only_what_a_killed_import_left_makes_a_file_beside_it_an_older_one(tmp_path):
    (tmp_path / "imgs.h5").write_text("somebody's")
    (tmp_path / "gex.h5ad.tmp.mine").touch()
    assert is_refused(tmp_path / "imgs.h5", IMPORTED)
    (tmp_path / "gex.h5ad.tmp.7").touch()
    assert not is_refused(tmp_path / "imgs.h5", IMPORTED)


def test_a_file_of_generated_patches_is_told_by_its_manifest_or_the_blocks_of_a_killed_run(tmp_path):
    path = tmp_path / "imgs.h5"
    hdf5(path, img="patches")
    assert is_refused(path, GENERATED_HDF5)
    (tmp_path / ".imgs.h5.parts").mkdir()
    assert not is_refused(path, GENERATED_HDF5)


def folder_is_refused(path, kind=KIND) -> bool:
    try:
        require_own_folder("--outdir", path, kind)
    except OptionError:
        return True
    return False


def test_a_folder_is_new_or_empty_or_holds_older_outputs_beside_what_its_user_put_there(tmp_path, monkeypatch):
    folder = tmp_path / "out"
    assert not folder_is_refused(folder)
    folder.mkdir()
    (folder / ".samples.csv.lock").touch()
    assert not folder_is_refused(folder)
    (folder / "notes.txt").write_text("mine")
    assert folder_is_refused(folder) and folder_is_refused(tmp_path) and folder_is_refused(os.sep)
    monkeypatch.chdir(folder)
    assert folder_is_refused(".")
    (folder / "seed1.png.tmp.77").touch()
    assert not folder_is_refused(folder) and not folder_is_refused(".")
    assert folder_is_refused(folder, FolderKind("another", KIND.names, is_older=lambda path: False))


def test_a_folder_that_is_one_output_takes_no_files_beside(tmp_path):
    require_shared_folder("--outdir", tmp_path / "new")
    (tmp_path / "notes.txt").touch()
    require_shared_folder("--outdir", tmp_path)
    (tmp_path / "metadata.jsonl").touch()
    with pytest.raises(OptionError, match="patches alone"):
        require_shared_folder("--outdir", tmp_path)
