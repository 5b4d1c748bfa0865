"""Damaged blocks of a stopped run, those of another version and of another user end as one line or are made anew."""
import os
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from output_contents import contents, differences, leftovers

from preprocessing.parts import Parts

pytestmark = pytest.mark.fault("damaged block of a stopped run")
NOBODY = 65534


def extraction(sample, out):
    return ("extract", "--space-ranger-dir", sample.space_ranger_dir, "--wsi-file", sample.slide, "--out-dir", out, "--dump-dir",
            out / "patches", "--patch-sz-px", 24, "--workers", 2)


@pytest.fixture(scope="module")
def whole(server, sample, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    server.succeeds(*extraction(sample, out))
    return contents(out)


STOP_AT_BLOCK = """
from preprocessing.parts import Parts
write = Parts.write
def write_or_stop(parts, number, **arrays):
    if number == {}:
        raise KeyboardInterrupt
    write(parts, number, **arrays)
Parts.write = write_or_stop
"""


@pytest.fixture(scope="module")
def stopped_once(server, sample, tmp_path_factory):
    """The output folder of an extraction stopped after six blocks, and a copy of it."""
    out, copy = tmp_path_factory.mktemp("stopped") / "out", tmp_path_factory.mktemp("copy") / "out"
    server.fails(130, *extraction(sample, out), before=STOP_AT_BLOCK.format(6))
    assert len(list((out / ".qc.png.parts").glob("block_*.safetensors"))) == 6 and not list(out.glob("[!.]*"))
    shutil.copytree(out, copy)
    return out, copy


@pytest.fixture
def stopped(stopped_once):
    """That folder as it was when the extraction stopped, and the folder of its six blocks."""
    out, copy = stopped_once
    shutil.rmtree(out)
    shutil.copytree(copy, out)
    return out, out / ".qc.png.parts"


# ---- one block ------------------------------------------------------------------------------------------------------

def test_any_one_changed_bit_and_any_cut_of_a_block_is_noticed_or_harmless(tmp_path, tried):
    (tmp_path / "input").touch()
    parts = Parts(tmp_path / "imgs.h5", config={}, inputs={"slide": tmp_path / "input"})
    arrays = {"readable": np.ones(9, bool), "reasons": np.array([], dtype="u1"), "n_black": np.array(3),
              "streams": np.arange(99, dtype="u1")}
    parts.write(0, **arrays)
    path = parts.folder / "block_000000.safetensors"
    content = path.read_bytes()
    noticed = 0
    flips = [content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1:] for at in range(len(content))]
    for damaged in [*flips, *(content[:stop] for stop in range(0, len(content), 7))]:
        path.write_bytes(damaged)
        tried()
        try:
            found = parts.read(0, *arrays)
        except OSError as error:
            assert "damaged" in str(error) and "run the command again" in str(error) and not path.exists()
            noticed += 1
            continue
        for name, array in arrays.items():
            assert found[name].dtype == array.dtype and np.array_equal(found[name], array), name
    assert noticed > 0.6 * len(content)


# ---- between two runs -----------------------------------------------------------------------------------------------

def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 16
    path.write_bytes(content)


DAMAGE = {"a flipped bit": flip, "cut in half": lambda path: path.write_bytes(path.read_bytes()[:path.stat().st_size // 2]),
          "no bytes": lambda path: path.write_bytes(b""), "another program's": lambda path: path.write_bytes(b"\x89PNG" * 999)}


@pytest.mark.parametrize(("damage", "number"), list(zip(DAMAGE, (5, 0, 5, 2), strict=True)), ids=DAMAGE)
def test_a_block_damaged_between_two_runs_is_named_and_made_anew_by_the_next(server, sample, whole, stopped, damage, number):
    out, kept = stopped
    DAMAGE[damage](kept / f"block_{number:06d}.safetensors")
    said = server.fails(4, *extraction(sample, out))
    assert f"block_{number:06d}.safetensors: damaged" in said and "run the command again" in said
    server.succeeds(*extraction(sample, out))
    assert differences(contents(out), whole) == [] and leftovers(out) == []


def test_a_png_file_lost_between_two_runs_is_made_anew(server, sample, whole, stopped):
    out, _ = stopped
    next(out.glob(".patches.pngs.*/patch_130.png")).unlink()
    server.succeeds(*extraction(sample, out))
    assert differences(contents(out), whole) == [] and leftovers(out) == []


@pytest.mark.parametrize("key", ["{}", "[1]", "\x00\x00", None], ids=["another version", "a list", "zeros", "none"])
def test_blocks_whose_key_is_of_another_version_or_damaged_are_made_anew(server, sample, whole, stopped, key):
    out, kept = stopped
    (kept / "key.json").unlink() if key is None else (kept / "key.json").write_text(key)
    for path in kept.glob("block_*.safetensors"):
        flip(path)                                                  # who reads one of them is noticed
    server.succeeds(*extraction(sample, out))
    assert differences(contents(out), whole) == [] and leftovers(out) == []


def test_a_file_where_the_blocks_should_lie_is_one_line(server, sample, tmp_path):
    (tmp_path / ".qc.png.parts").write_text("not a folder")
    assert ".qc.png.parts" in server.fails(4, *extraction(sample, tmp_path))
    assert not list(tmp_path.glob("[!.]*"))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can run a command as another user")
@pytest.mark.parametrize("options", [(), ("--stride", 6)], ids=["that fit", "that would have to be thrown away"])
def test_blocks_of_another_user_are_one_line_and_stay_as_they_are(server, sample, options):
    with tempfile.TemporaryDirectory() as base:
        folder = Path(base)
        shutil.copytree(sample.space_ranger_dir, folder / "outs")
        shutil.copy(sample.slide, folder / "slide.tif")
        copied = SimpleNamespace(space_ranger_dir=folder / "outs", slide=folder / "slide.tif")
        server.fails(130, *extraction(copied, folder / "out"), before=STOP_AT_BLOCK.format(2))
        for path in (folder, folder / "out", *folder.glob("out/*.lock")):
            path.chmod(0o777)
        before = sorted(path.name for path in (folder / "out").rglob("*"))
        said = server.fails(4, *extraction(copied, folder / "out"), *options, uid=NOBODY)
        assert "Permission denied" in said and ("/out/.qc.png.parts" in said or "/out/.patches.pngs." in said)
        assert sorted(path.name for path in (folder / "out").rglob("*")) == before
