"""When a file counts as finished, from which inputs, and who may write it."""
import errno
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import tifffile
import torch
from PIL import Image
from safetensors.torch import save_file

from networks.weights import write_plain_file
from preprocessing import done_manifests, outputs
from preprocessing.done_manifests import fingerprint, is_done, read_done, write_done
from preprocessing.errors import InputError
from preprocessing.hdf5_output import hdf5_output
from preprocessing.output_places import FolderKind
from preprocessing.outputs import done_path, finished_file, finished_folder, finished_together, finished_within, locked

ROOT = Path(__file__).resolve().parents[2]
HOLDS_A_LOCK = """
import sys, time
from preprocessing.outputs import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(1)
"""


def finished_from(tmp_path, content: bytes):
    """An output and the input it was finished from."""
    source, out = tmp_path / "source.bin", tmp_path / "out.txt"
    source.write_bytes(content)
    out.write_text("result")
    write_done(out, config={}, inputs={"source": source})
    return source, out


@pytest.mark.parametrize("content", ["[" * 100_000, "[1]", "{", "\udcff"], ids=["nested without end", "a list", "cut short", "other bytes"])
def test_a_done_manifest_that_cannot_be_read_counts_as_none(tmp_path, content):
    source, out = finished_from(tmp_path, b"content")
    done_path(out).write_text(content, errors="surrogateescape")
    assert read_done(out) == {} and not is_done(out, config={}, inputs={"source": source})


def test_a_byte_changed_in_the_middle_of_an_input_is_another_input(tmp_path):
    content = bytearray(3 << 20)
    source, out = finished_from(tmp_path, content)
    assert is_done(out, config={}, inputs={"source": source})
    content[len(content) // 2] = 1
    source.write_bytes(content)
    assert not is_done(out, config={}, inputs={"source": source})


def test_a_larger_input_is_known_by_its_ends_its_size_and_the_time_of_its_last_change(tmp_path, monkeypatch):
    monkeypatch.setattr(done_manifests, "WHOLE_FILE_MIB", 2)
    source, out = finished_from(tmp_path, bytes(3 << 20))
    assert is_done(out, config={}, inputs={"source": source})
    os.utime(source, ns=(0, 1_000))
    assert not is_done(out, config={}, inputs={"source": source})
    assert fingerprint(source)["mtime_ns"] == 1_000 and "sha256" not in fingerprint(source)


@pytest.mark.parametrize("manifest", [b"[]", b"\xff\xfe", b"{"], ids=["no object", "not text", "cut short"])
def test_a_damaged_manifest_means_not_done(tmp_path, manifest):
    source, out = finished_from(tmp_path, b"1")
    done_path(out).write_bytes(manifest)
    assert not is_done(out, config={}, inputs={"source": source})


@pytest.mark.parametrize("name", [".", "../here", "sub/..", ""], ids=["dot", "by its parent", "down and up", "empty"])
def test_the_working_folder_itself_can_be_an_output(tmp_path, monkeypatch, name):
    (tmp_path / "here" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    with locked(name), finished_folder(name, kind=FolderKind("a folder", "sub/")) as temporary:
        (temporary / "new.txt").write_text("new")
    write_done(".", config={}, inputs={})
    assert Path("new.txt").read_text() == "new" and [path.name for path in Path.cwd().iterdir()] == ["new.txt"]
    assert done_path(Path(".")) == tmp_path / "here.done.json" and is_done(".", config={}, inputs={})


def test_two_files_finished_together_have_two_names(tmp_path):
    paths = [tmp_path / "a.csv", tmp_path / "b" / ".." / "a.csv"]
    with pytest.raises(InputError, match="expected a name of its own for every file"), finished_together(paths):
        pytest.fail("the work has begun")
    assert list(tmp_path.iterdir()) == []


def older_pictures(folder):
    """A folder with two pictures of an older call, their list, and a note of its user."""
    for name in ("list.csv", "a.png", "b.png", "note.txt"):
        (folder / name).write_text("old")
    return ["a.png", "b.png"]


def test_files_finished_within_a_folder_take_the_place_of_the_older_ones_alone(tmp_path):
    (tmp_path / ".new.tmp.1").mkdir()                      # of a killed process
    with finished_within(tmp_path, ["list.csv"], older_pictures(tmp_path)) as folder:
        (folder / "null").mkdir()
        for name in ("list.csv", "a.png", "null/a.png"):
            (folder / name).write_text("new")
        assert (tmp_path / "a.png").read_text() == (tmp_path / "list.csv").read_text() == "old"
    found = {path.relative_to(tmp_path).as_posix(): path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {"list.csv": "new", "a.png": "new", "null/a.png": "new", "note.txt": "old"}
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()], ids=["full disk", "Ctrl-C"])
def test_a_folder_stays_as_it_was_until_all_that_comes_is_written(tmp_path, error):
    older = older_pictures(tmp_path)
    with pytest.raises(type(error)), finished_within(tmp_path, ["list.csv"], older) as folder:
        (folder / "a.png").write_text("new")
        raise error
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(("list.csv", "a.png", "b.png", "note.txt"), "old")


def test_an_error_within_names_the_file_as_it_shall_be_called(tmp_path):
    with pytest.raises(OSError) as raised, finished_within(tmp_path, []) as folder, finished_file(folder / "a.png"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert raised.value.filename == str(tmp_path / "a.png")


def test_a_folder_of_a_name_that_is_needed_is_refused_before_anything_older_goes(tmp_path):
    older = older_pictures(tmp_path)
    (tmp_path / "c.png").mkdir()
    with pytest.raises(IsADirectoryError), finished_within(tmp_path, ["list.csv"], older) as folder:
        (folder / "c.png").write_text("new")
    assert all((tmp_path / name).read_text() == "old" for name in (*older, "list.csv"))


def test_a_list_goes_before_the_first_file_it_speaks_of_and_comes_after_the_last(tmp_path, monkeypatch):
    older, replace, seen = older_pictures(tmp_path), os.replace, []

    def watched(source, target):
        seen.append((target.name, (tmp_path / "list.csv").exists()))
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    with finished_within(tmp_path, ["list.csv"], older) as folder:
        for name in ("list.csv", "z.png", "a.png"):
            (folder / name).write_text("new")
    assert seen == [("a.png", False), ("z.png", False), ("list.csv", False)]


@pytest.mark.parametrize("kind", [None, FolderKind("a sheet's folder", r"sheet\.csv|.*/", mark="sheet.csv")], ids=["any", "of a kind"])
@pytest.mark.parametrize("name", ["thesis.txt", "sheets/thesis.txt"])
def test_a_folder_of_anything_else_is_not_replaced(tmp_path, kind, name):
    (tmp_path / "out" / name).parent.mkdir(parents=True)
    (tmp_path / "out" / name).write_text("precious")
    with pytest.raises(InputError, match="expected a new folder.*other entries"), finished_folder(tmp_path / "out", kind=kind):
        pytest.fail("the work has begun")
    assert (tmp_path / "out" / name).read_text() == "precious" and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_file_cannot_replace_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match="directory"), finished_file(".") as temporary:
        temporary.write_text("x")
    assert not list(tmp_path.parent.glob("*.tmp.*"))


def test_waiting_for_a_lock_says_so_once(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(outputs, "SILENT_WAIT_S", 0.2)
    other = subprocess.Popen([sys.executable, "-c", HOLDS_A_LOCK, str(tmp_path / "out")], stdout=subprocess.PIPE,
                             env={"PYTHONPATH": str(ROOT)})
    assert other.stdout.readline() == b"held\n"
    start = time.monotonic()
    with locked(tmp_path / "out"):
        assert time.monotonic() - start > 0.3
    other.wait()
    assert capfd.readouterr().err == f"waiting for another process writing {tmp_path / 'out'}\n"


def test_a_free_lock_is_taken_silently_and_a_held_one_ends_in_an_error(tmp_path, capfd):
    with locked(tmp_path / "out"):
        assert capfd.readouterr().err == ""
        with pytest.raises(OSError, match="another process is still writing it"), locked(tmp_path / "out", wait_s=0.1):
            pass


# ---- a system that takes no more, whoever writes ---------------------------------------------------------------------

NOISE = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)


def write_hdf5(path):
    with hdf5_output(path) as file:
        file["a"] = NOISE


def write_plain_hdf5(path):
    with h5py.File(path, "w") as file:
        file["a"] = NOISE


def write_npy(path):
    with open(path, "wb") as stream:
        np.save(stream, NOISE)


WRITERS = {
    "text": lambda path: path.write_text("x" * NOISE.size), "png": lambda path: Image.fromarray(NOISE).save(path, format="PNG"),
    "npy": write_npy, "hdf5": write_hdf5, "hdf5 by h5py": write_plain_hdf5, "tiff": lambda path: tifffile.imwrite(path, NOISE),
    "csv": lambda path: pd.DataFrame(NOISE.reshape(-1, 3)).to_csv(path),
    "parquet": lambda path: pd.DataFrame(NOISE.reshape(-1, 3), columns=list("abc")).to_parquet(path),
    "safetensors": lambda path: save_file({"a": torch.from_numpy(NOISE)}, path),
    "torch": lambda path: write_plain_file({"a": torch.from_numpy(NOISE)}, path)}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_limit_on_writing_names_the_file_whoever_writes_and_the_old_one_stays(tmp_path, writer):
    path, limits = tmp_path / "out", resource.getrlimit(resource.RLIMIT_FSIZE)
    path.write_text("old")
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError) as raised, finished_file(path) as temporary:
            WRITERS[writer](temporary)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = raised.value
    assert str(path) in (said.filename or str(said)) and (said.errno == errno.EFBIG or said.errno is None)
    assert path.read_text() == "old" and [file.name for file in tmp_path.iterdir()] == ["out"]
