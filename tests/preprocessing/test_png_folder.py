"""Patches become PNG files that every reader opens; a folder of them is complete or not there."""
import io
import json
import os
import struct
import zlib

import imagecodecs
import numpy as np
import pytest
from PIL import Image

from preprocessing import png_folder
from preprocessing.errors import InputError
from preprocessing.patches import read_patch, read_patch_folder
from preprocessing.png_folder import encode_png, finish_patch_folder, name_digits, patch_folder_sha256, png_name, whole_pngs, write_pngs
from preprocessing.slide import open_slide

BARCODES = [f"AAAC{i:02d}-1" for i in range(12)]


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def smooth(height, width):
    """Every value 0 to 255 beside its like, as on tissue: what a filter turns into small differences."""
    return (np.add.outer(np.arange(height), np.arange(width))[..., None] * (1, 2, 3) % 256).astype(np.uint8)


# ---- one PNG ----

@pytest.mark.parametrize("patch", [
    noise(128, 128), smooth(128, 128), np.full((128, 128, 3), 255, np.uint8), np.zeros((5, 7, 3), np.uint8), noise(1, 1), noise(1, 9),
    noise(9, 1), noise(40, 40)[::2, 1::3], noise(30, 20)[..., ::-1],
], ids=["noise", "smooth", "white", "black", "one pixel", "one row", "one column", "every second row", "channels turned"])
def test_a_png_holds_exactly_the_pixels_whoever_reads_it(patch):
    data = encode_png(patch)
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        assert image.format == "PNG" and image.mode == "RGB" and (np.array(image) == patch).all()
    assert (imagecodecs.png_decode(data) == patch).all()                                     # libpng, which checks every checksum


def test_a_png_holds_nothing_but_the_pixels():
    data, kinds, at = encode_png(noise(8, 8)), [], 8
    while at < len(data):
        length, kind = struct.unpack(">I4s", data[at:at + 8])
        assert zlib.crc32(data[at + 4:at + 8 + length]) == struct.unpack(">I", data[at + 8 + length:at + 12 + length])[0]
        kinds.append(kind)
        at += 12 + length
    assert kinds == [b"IHDR", b"IDAT", b"IEND"] and at == len(data)


def test_a_png_is_about_as_small_as_pillows(shared_data):
    with open_slide(shared_data / "wsi" / "CMU-1-Small-Region.svs") as slide:
        tissue = slide.read_region(800, 1200, 512, 512)
    stream = io.BytesIO()
    Image.fromarray(tissue).save(stream, "png")
    assert len(encode_png(tissue)) < 1.1 * stream.tell()
    assert len(encode_png(np.full((128, 128, 3), 240, np.uint8))) < 1000


# ---- the working folder ----

@pytest.mark.parametrize("workers", [1, 4])
def test_blocks_land_under_the_numbers_of_their_rows(tmp_path, workers):
    patches = noise(12, 6, 6)
    for first in (5, 0):
        write_pngs(tmp_path, first, iter(patches[first:first + 7]), 2, workers)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"patch_{row:02d}.png" for row in range(12)]
    assert all((read_patch(tmp_path / png_name(row, 2)) == patches[row]).all() for row in range(12))


def test_what_a_killed_run_left_half_written_is_written_over(tmp_path):
    write_pngs(tmp_path, 0, noise(3, 32, 32, seed=1), 1, 1)
    (tmp_path / "patch_1.png").write_bytes((tmp_path / "patch_1.png").read_bytes()[:50])
    write_pngs(tmp_path, 0, noise(3, 4, 4), 1, 1)
    assert all((read_patch(tmp_path / f"patch_{row}.png") == noise(3, 4, 4)[row]).all() for row in range(3))


def test_patches_are_on_the_disk_when_their_block_is_written(tmp_path, monkeypatch):
    flushed, real = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (flushed.append(os.readlink(f"/proc/self/fd/{descriptor}")), real(descriptor)))
    write_pngs(tmp_path, 0, noise(3, 4, 4), 1, 2)
    assert sorted(flushed) == sorted(str(path) for path in (tmp_path, *tmp_path.iterdir()))


def test_a_patch_that_cannot_be_written_ends_the_block(tmp_path):
    (tmp_path / "patch_1.png").mkdir()
    with pytest.raises(IsADirectoryError):
        write_pngs(tmp_path, 0, noise(3, 4, 4), 1, 2)


def test_whole_patches_count_up_to_the_first_gap(tmp_path):
    assert whole_pngs(tmp_path / "none", 2) == 0 and whole_pngs(tmp_path, 2) == 0
    write_pngs(tmp_path, 0, noise(12, 4, 4), 2, 1)
    assert whole_pngs(tmp_path, 2) == 12
    (tmp_path / "patch_07.png").unlink()
    assert whole_pngs(tmp_path, 2) == 7


@pytest.mark.parametrize("count, digits", [(0, 1), (1, 1), (10, 1), (11, 2), (100, 2), (101, 3)])
def test_names_have_the_digits_of_the_last_row(count, digits):
    assert name_digits(count) == digits


# ---- the finished folder ----

@pytest.fixture
def working(tmp_path):
    (tmp_path / ".parts").mkdir()
    write_pngs(tmp_path / ".parts", 0, noise(12, 6, 6), 2, 2)
    return tmp_path / ".parts"


def finish(working, folder, **changes):
    arguments = dict(count=12, digits=2, barcodes=BARCODES, sample_id="S1", xy=np.arange(24.0).reshape(12, 2), stain={"normalised": False})
    finish_patch_folder(working, folder, **arguments | changes)


def test_a_finished_folder_is_described_and_the_working_folder_is_gone(tmp_path, working):
    finish(working, tmp_path / "patches")
    folder = read_patch_folder(tmp_path / "patches")
    assert folder.barcodes == BARCODES and folder.rows == list(range(12)) and folder.sample_ids == ["S1"] * 12
    assert [path.name for path in folder.paths] == [png_name(row, 2) for row in range(12)]
    assert (folder.centre_xy_px == np.arange(24).reshape(12, 2)).all() and [path.name for path in tmp_path.iterdir()] == ["patches"]


def test_a_missing_patch_ends_finishing_and_keeps_both_folders(tmp_path, working):
    finish_other = tmp_path / "other"
    finish_other.mkdir()
    write_pngs(finish_other, 0, noise(1, 4, 4), 1, 1)
    finish(finish_other, tmp_path / "patches", count=1, digits=1, barcodes=None, xy=np.zeros((1, 2)))
    before = patch_folder_sha256(tmp_path / "patches")
    (working / "patch_03.png").unlink()
    with pytest.raises(OSError, match=r"1 \(patch_03.png\) of 12 patches are not there; run the command again"):
        finish(working, tmp_path / "patches")
    assert patch_folder_sha256(tmp_path / "patches") == before and len(list(working.glob("*.png"))) == 11


def test_files_of_a_killed_run_beside_the_patches_do_not_enter_the_folder(tmp_path, working):
    for name in ("patch_12.png", "patch_1.png", "metadata.jsonl.tmp"):
        (working / name).write_bytes(b"left")
    finish(working, tmp_path / "patches")
    assert len(list((tmp_path / "patches").iterdir())) == 12 + 2


def test_somebody_elses_folder_is_never_replaced(tmp_path, working):
    (tmp_path / "patches").mkdir()
    (tmp_path / "patches" / "thesis.docx").write_text("precious")
    with pytest.raises(InputError, match=r"found 1 \(thesis.docx\) other entries"):
        finish(working, tmp_path / "patches")
    assert (tmp_path / "patches" / "thesis.docx").read_text() == "precious" and working.is_dir()


def test_the_record_sees_the_folder_as_it_will_stand_before_it_has_its_name(tmp_path, working):
    seen = []

    def record(complete):
        seen.append((patch_folder_sha256(complete), (tmp_path / "patches").exists()))

    finish(working, tmp_path / "patches", record=record)
    assert seen == [(patch_folder_sha256(tmp_path / "patches"), False)]


def test_an_older_patch_folder_comes_back_when_the_new_one_cannot_take_its_name(tmp_path, working, monkeypatch):
    finish(working, tmp_path / "patches")
    before = patch_folder_sha256(tmp_path / "patches")
    working.mkdir()
    write_pngs(working, 0, noise(12, 9, 9), 2, 2)
    rename = os.rename

    def fails(source, target):
        if source == working:
            raise OSError("no space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises(OSError, match="no space left"):
        finish(working, tmp_path / "patches")
    assert patch_folder_sha256(tmp_path / "patches") == before and whole_pngs(working, 2) == 12
    assert sorted(path.name for path in tmp_path.iterdir()) == [".parts", "patches"]


def test_centres_and_barcodes_must_be_as_many_as_patches(tmp_path, working):
    with pytest.raises(ValueError, match="12 patches need as many centres and barcodes; got 12 and 11"):
        finish(working, tmp_path / "patches", barcodes=BARCODES[:11])


def test_metadata_lines_are_json_of_plain_numbers(tmp_path, working):
    finish(working, tmp_path / "patches", barcodes=None, xy=np.ones((12, 2), dtype=np.float32))
    first = json.loads((tmp_path / "patches" / png_folder.METADATA).read_text().splitlines()[0])
    assert first == {"file_name": "patch_00.png", "sample_id": "S1", "x": 1.0, "y": 1.0}
