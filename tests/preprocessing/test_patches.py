"""imgs.h5, the patch folder, and which patch belongs to which row."""
import json
import resource
import struct
import weakref
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from preprocessing.done_manifests import strings_sha256
from preprocessing.errors import InputError
from preprocessing.patch_file import read_patch_file, write_patch_file
from preprocessing.patches import pair, read_patch, read_patch_folder
from preprocessing.png_folder import write_patch_folder

BARCODES = [f"AAAC{i:02d}-1" for i in range(12)]


def flat_patches(count=12, px=8):
    """Patch i is filled with the grey level 20 i: a wrong pair shows as a wrong level."""
    return [np.full((px, px, 3), 20 * i, np.uint8) for i in range(count)]


def row_of(path) -> int:
    return int(read_patch(path)[0, 0, 0]) // 20


@pytest.fixture
def folder(tmp_path):
    write_patch_folder(tmp_path / "patches", flat_patches(), barcodes=BARCODES, sample_id="S1",
                       xy=np.arange(24.0).reshape(12, 2), stain={"normalised": False})
    return tmp_path / "patches"


def paired_rows(folder, barcodes, **kwargs):
    return [row_of(path) for path in pair(read_patch_folder(folder), barcodes, "gex.h5ad", **kwargs)]


# ---- imgs.h5 ----

def write_file(path, count=12, patches=None, **changes):
    fields = dict(count=count, patch_px=8, coords=np.arange(2 * count).reshape(count, 2), barcodes=BARCODES[:count],
                  patch_size_src=16.0, pixel_size=0.5, name="S1") | changes
    write_patch_file(path, iter(flat_patches(count)) if patches is None else patches, **fields)
    return path


def test_patch_file_has_hests_schema(tmp_path):
    with h5py.File(write_file(tmp_path / "imgs.h5")) as file:
        assert file["img"].dtype == np.uint8 and file["img"].shape == (12, 8, 8, 3) and file["img"].chunks == (1, 8, 8, 3)
        assert file["img"].compression is not None
        assert file["coords"].dtype == np.int64 and file["coords"].shape == (12, 2)
        assert file["barcode"].shape == (12, 1) and h5py.check_string_dtype(file["barcode"].dtype).encoding == "utf-8"
        for name in ("img", "coords"):
            assert dict(file[name].attrs) == {"patch_size_src": 16.0, "patch_size_target": 8, "downsample": 2.0,
                                              "pixel_size": 0.5, "name": "S1"}


def test_patch_file_round_trip_in_slices(tmp_path):
    with read_patch_file(write_file(tmp_path / "imgs.h5")) as file:
        assert len(file) == 12 and file.barcodes == BARCODES
        assert (file.images(slice(3, 5)) == np.stack(flat_patches()[3:5])).all()
        assert (file.centre_xy_px == file.coords + 8).all()


def test_random_patches_carry_coordinates_only(tmp_path):
    with read_patch_file(write_file(tmp_path / "imgs.h5", barcodes=None)) as file:
        assert file.barcodes is None and len(file.coords) == 12


def test_patch_file_is_streamed_one_block_at_a_time(tmp_path):
    made, alive = [], []

    def patches():
        for _ in range(500):
            patch = np.zeros((8, 8, 3), np.uint8)
            made.append(weakref.ref(patch))
            alive.append(sum(reference() is not None for reference in made))
            yield patch

    write_file(tmp_path / "imgs.h5", count=500, patches=patches(), barcodes=None)
    assert len(made) == 500 and max(alive) <= 130


@pytest.mark.parametrize("came", [11, 13], ids=["too few", "too many"])
def test_a_wrong_number_of_patches_leaves_no_file(tmp_path, came):
    with pytest.raises(ValueError, match=f"12 patches were announced, {came} came"):
        write_file(tmp_path / "imgs.h5", patches=iter(flat_patches(came)))
    assert list(tmp_path.iterdir()) == []


def test_a_failure_while_cutting_keeps_the_old_file(tmp_path):
    before = write_file(tmp_path / "imgs.h5").read_bytes()

    def breaks():
        yield from flat_patches(5)
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        write_file(tmp_path / "imgs.h5", patches=breaks())
    assert (tmp_path / "imgs.h5").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def edit_h5(path, name, value):
    with h5py.File(path, "a") as file:
        del file[name]
        if value is not None:
            file[name] = value


@pytest.mark.parametrize("name, value, message", [
    ("img", None, "no img"),
    ("img", np.zeros((12, 8, 8, 4), np.uint8), r"img: expected uint8 \(N, H, W, 3\); found uint8 \(12, 8, 8, 4\)"),
    ("img", np.zeros((12, 8, 8, 3), np.uint16), "found uint16"),
    ("coords", np.zeros((7, 2)), "coords: expected 12 rows"),
    ("barcode", np.array(BARCODES[:5], dtype="S10"), "barcode: expected 12 rows, one a patch; found 5"),
    ("barcode", np.array(BARCODES[:11] + BARCODES[:1], dtype="S10"), r"no value twice; found repeated 1 \(AAAC00-1\)"),
], ids=["no images", "four channels", "16 bit", "short coords", "short barcodes", "repeated barcode"])
def test_a_wrong_patch_file_is_refused(tmp_path, name, value, message):
    edit_h5(write_file(tmp_path / "imgs.h5"), name, value)
    with pytest.raises(InputError, match=message):
        read_patch_file(tmp_path / "imgs.h5")


def test_what_is_not_hdf5_is_refused(tmp_path):
    (tmp_path / "imgs.h5").write_bytes(b"not a patch file")
    with pytest.raises(InputError, match="imgs.h5: file: expected an HDF5 file of patches; found 16 bytes"):
        read_patch_file(tmp_path / "imgs.h5")


# ---- the folder ----

def test_folder_lists_padded_names_in_row_order(folder):
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert [line["file_name"] for line in lines] == sorted(line["file_name"] for line in lines)
    assert lines[3] == {"file_name": "patch_03.png", "barcode": "AAAC03-1", "sample_id": "S1", "x": 6.0, "y": 7.0, "gex_emb": 3}
    assert json.loads((folder / "stain.json").read_text()) == {"normalised": False}
    assert [row_of(folder / line["file_name"]) for line in lines] == list(range(12))


def test_rewriting_replaces_a_patch_folder_but_never_somebody_elses(tmp_path, folder):
    arguments = dict(barcodes=BARCODES[:3], sample_id="S1", xy=np.zeros((3, 2)), stain={})
    write_patch_folder(folder, flat_patches(3), **arguments)
    assert len(list(folder.glob("*.png"))) == 3
    (folder / "thesis.docx").write_text("precious")
    with pytest.raises(InputError, match=r"a patch folder to replace; found 1 \(thesis.docx\) other entries. Name another folder"):
        write_patch_folder(folder, flat_patches(3), **arguments)
    assert (folder / "thesis.docx").read_text() == "precious"


@pytest.mark.parametrize("name", [".git/config", ".env", ".DS_Store"], ids=["repository", "dot file", "litter alone"])
def test_a_folder_of_dot_entries_is_nobodys_patch_folder(tmp_path, name):
    (tmp_path / "p" / name).parent.mkdir(parents=True)
    (tmp_path / "p" / name).write_text("precious")
    with pytest.raises(InputError, match=rf"a patch folder to replace; found 1 \({name.split('/')[0]}\) other entries"):
        write_patch_folder(tmp_path / "p", flat_patches(3), barcodes=None, sample_id="S", xy=np.zeros((3, 2)), stain={})
    assert (tmp_path / "p" / name).read_text() == "precious"


@pytest.mark.parametrize("name, replaced", [(".git/config", False), ("patch_1.png/x", False), (".ipynb_checkpoints/x.png", True),
                                            (".DS_Store", True)])
def test_a_patch_folder_with_dot_entries_is_replaced_only_if_they_are_litter(folder, name, replaced):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("x")
    if replaced:
        write_patch_folder(folder, flat_patches(3), barcodes=None, sample_id="S", xy=np.zeros((3, 2)), stain={})
        assert len(list(folder.iterdir())) == 5
    else:
        with pytest.raises(InputError, match="other entries"):
            write_patch_folder(folder, flat_patches(3), barcodes=None, sample_id="S", xy=np.zeros((3, 2)), stain={})


@pytest.mark.parametrize("as_array", [list, np.array])
def test_too_few_barcodes_are_counted_in_the_error_whatever_holds_them(tmp_path, as_array):
    with pytest.raises(ValueError, match="12 patches need as many centres and barcodes; got 12 and 3"):
        write_patch_folder(tmp_path / "p", flat_patches(12), barcodes=as_array(BARCODES[:3]), sample_id="S", xy=np.zeros((12, 2)), stain={})
    with pytest.raises(ValueError, match=r"12 patches need as many coords and barcodes; got \(12, 2\) and 3"):
        write_patch_file(tmp_path / "imgs.h5", flat_patches(12), count=12, patch_px=8, coords=np.zeros((12, 2)), name="S",
                         barcodes=as_array(BARCODES[:3]), patch_size_src=8, pixel_size=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("came", [11, 13])
def test_a_wrong_number_of_patches_leaves_no_folder(tmp_path, came):
    with pytest.raises(ValueError, match="12 patches were announced"):
        write_patch_folder(tmp_path / "p", flat_patches(came), barcodes=BARCODES, sample_id="S", xy=np.zeros((12, 2)), stain={})
    assert list(tmp_path.iterdir()) == []


# ---- the pairing ----

def test_a_resorted_h5ad_still_pairs_every_row(folder):
    order = np.random.default_rng(0).permutation(12)
    rows = paired_rows(folder, [BARCODES[i] for i in order], recorded_sha256=strings_sha256(BARCODES))
    assert rows == order.tolist()


def add_stray_png(folder):
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / "patch_99.png")


def add_dot_files(folder):
    (folder / "._patch_00.png").write_bytes(b"\0")
    (folder / ".DS_Store").write_bytes(b"\0")


def add_checkpoint_folder(folder):
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / ".ipynb_checkpoints" / "patch_00-checkpoint.png").write_bytes(b"\0")
    (folder / "checkpoint-100").mkdir()
    (folder / "checkpoint-100" / "patch_00.png").write_bytes(b"\0")


def unpad_names(folder):
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for row, line in enumerate(lines):
        (folder / line["file_name"]).rename(folder / f"patch_{row}.png")
        line["file_name"] = f"patch_{row}.png"
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in sorted(lines, key=lambda line: line["file_name"])))


HARMLESS = [add_stray_png, add_dot_files, add_checkpoint_folder, unpad_names]


@pytest.mark.parametrize("change", HARMLESS, ids=lambda change: change.__name__)
def test_what_metadata_does_not_list_changes_no_pair(folder, change):
    change(folder)
    assert paired_rows(folder, BARCODES, recorded_sha256=strings_sha256(BARCODES)) == list(range(12))


def test_a_deleted_png_is_refused_naming_its_barcode(folder):
    (folder / "patch_07.png").unlink()
    with pytest.raises(InputError, match=r"the 12 files that metadata.jsonl lists; found missing 1 \(patch_07.png of barcode AAAC07-1\)"):
        read_patch_folder(folder)


def test_an_extra_patch_is_refused_naming_its_barcode(folder):
    with pytest.raises(InputError, match=r"the 11 of gex.h5ad; found patches of 1 \(AAAC11-1\) that it does not have"):
        paired_rows(folder, BARCODES[:11])


def test_missing_patches_are_counted_and_the_first_five_named(folder):
    expected = r"no patch for 7 \(BBBB0-1, BBBB1-1, BBBB2-1, BBBB3-1, BBBB4-1, ...\)$"
    with pytest.raises(InputError, match=expected):
        paired_rows(folder, BARCODES + [f"BBBB{i}-1" for i in range(7)])


def test_another_sample_of_the_same_length_is_refused(folder):
    with pytest.raises(InputError, match=r"no patch for 12 \(BBBB00-1.*and patches of 12 \(AAAC00-1"):
        paired_rows(folder, [barcode.replace("AAAC", "BBBB") for barcode in BARCODES])


def test_the_same_barcodes_of_another_extraction_are_refused_by_their_hash(folder):
    of_another = BARCODES[::-1]
    with pytest.raises(InputError, match="barcode_sha256: expected .* as gex.h5ad records; found .* not of one extraction"):
        paired_rows(folder, of_another, recorded_sha256=strings_sha256(of_another))


def of_extraction(folder, stain):
    """The patch folder of an h5ad that was re-sorted before the dump: row order is reversed, its extraction's is BARCODES."""
    write_patch_folder(folder, flat_patches()[::-1], barcodes=BARCODES[::-1], sample_id="S1", xy=np.zeros((12, 2)), stain=stain)
    return folder


@pytest.mark.parametrize("order", [list(range(12)), list(range(12))[::-1], [5, *range(5), *range(6, 12)]],
                         ids=["as extracted", "as dumped", "sorted a second time"])
def test_every_order_of_one_extraction_pairs_through_the_hash_kept_at_the_dump(folder, order):
    patches = of_extraction(folder, {"normalised": False, "barcode_sha256": strings_sha256(BARCODES)})
    assert paired_rows(patches, [BARCODES[i] for i in order], recorded_sha256=strings_sha256(BARCODES)) == order


def test_a_stain_json_nested_without_end_proves_nothing_and_stops_nothing(folder):
    (folder / "stain.json").write_text("[" * 100_000)
    assert read_patch_folder(folder).barcode_sha256 is None


def test_without_the_hash_of_the_dump_a_second_order_is_refused(folder):
    shuffled = BARCODES[5:] + BARCODES[:5]
    with pytest.raises(InputError, match="not of one extraction"):
        paired_rows(of_extraction(folder, {}), shuffled, recorded_sha256=strings_sha256(BARCODES))


def test_equal_positions_pair_whatever_the_order(folder):
    order, xy = np.random.default_rng(1).permutation(12), np.arange(24.0).reshape(12, 2)
    rows = paired_rows(folder, [BARCODES[i] for i in order], recorded_sha256="of a third order", centre_xy_px=xy[order] + 0.7)
    assert rows == order.tolist()


def test_barcodes_moved_onto_other_rows_are_refused_by_their_positions(folder):
    rotated = BARCODES[1:] + BARCODES[:1]
    with pytest.raises(InputError, match=r"positions: expected every patch within 2 px .*; found up to 22 px apart: 1 \(AAAC00-1\)"):
        paired_rows(folder, rotated, recorded_sha256=strings_sha256(BARCODES), centre_xy_px=np.arange(24.0).reshape(12, 2))


def test_another_sample_of_the_same_barcodes_is_refused_by_its_positions(folder):
    with pytest.raises(InputError, match=r"up to 300 px apart: 12 \(AAAC00-1, "):
        paired_rows(folder, BARCODES, recorded_sha256=strings_sha256(BARCODES), centre_xy_px=np.arange(24.0).reshape(12, 2) + 300)


def test_a_repeated_row_is_refused(folder):
    with pytest.raises(InputError, match=r"gex.h5ad: obs_names: expected no value twice; found repeated 1 \(AAAC00-1\)"):
        paired_rows(folder, BARCODES[:11] + BARCODES[:1])


def rewrite(folder, change):
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    change(lines)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize("change, message", [
    (lambda lines: lines[1].update(barcode="AAAC00-1"), r"barcode: expected no value twice; found repeated 1 \(AAAC00-1\)"),
    (lambda lines: lines[1].update(file_name="patch_00.png"), r"file_name: expected no value twice"),
    (lambda lines: lines[1].pop("barcode"), r"barcode: expected one in every line; found none for 1 \(patch_01.png\)"),
    (lambda lines: lines[1].pop("file_name"), "line 2: expected an object with `file_name`"),
    (lambda lines: lines[1].update(file_name="../../etc/passwd"), "line 2: expected a file inside the folder; found ../../etc/passwd"),
    (lambda lines: lines[1].update(barcode=7), "line 2: barcode: expected text; found 7"),
    (lambda lines: lines[1].update(x="q"), "line 2: x: expected a finite number; found 'q'"),
    (lambda lines: lines[1].update(y=float("nan")), "line 2: y: expected a finite number; found nan"),
    (lambda lines: lines[1].update(y=10 ** 400), "line 2: y: expected a finite number; found 1000"),
    (lambda lines: lines[1].update(gex_emb="a"), "line 2: gex_emb: expected a row number; found 'a'"),
    (lambda lines: lines.clear(), "lines: expected one a patch; found none"),
], ids=["repeated barcode", "repeated file", "no barcode", "no file name", "outside the folder",
        "barcode a number", "x a word", "y not finite", "y beyond any number", "row a word", "empty"])
def test_wrong_metadata_is_refused(folder, change, message):
    rewrite(folder, change)
    with pytest.raises(InputError, match=message):
        read_patch_folder(folder)


def test_metadata_that_is_not_json_is_refused_with_its_line(folder):
    with open(folder / "metadata.jsonl", "a") as stream:
        stream.write('{"file_name": "patch_')
    with pytest.raises(InputError, match="metadata.jsonl: line 13: expected JSON"):
        read_patch_folder(folder)


def test_metadata_that_is_not_text_is_refused(folder):
    (folder / "metadata.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="metadata.jsonl: file: expected JSON lines, one a patch, in UTF-8; found other bytes"):
        read_patch_folder(folder)


# ---- a folder that somebody else made ----

def foreign(tmp_path, names):
    folder = tmp_path / "foreign"
    folder.mkdir()
    for name, patch in zip(names, flat_patches(len(names)), strict=True):
        Image.fromarray(patch).save(folder / name)
    return folder


@pytest.mark.parametrize("name", ["patch_{}.png", "{}.png", "TENX45_{}_HE.png", "img{:04d}.png"])
def test_foreign_names_with_numbers_pair_in_natural_order_with_one_warning(tmp_path, name):
    folder = foreign(tmp_path, [name.format(i) for i in range(12)])
    with pytest.warns(UserWarning, match="no metadata.jsonl; 12 patches paired by the numbers in its file names") as record:
        assert paired_rows(folder, BARCODES) == list(range(12))
    assert len(record) == 1


def test_foreign_names_that_are_barcodes_pair_by_barcode(tmp_path):
    folder = foreign(tmp_path, [f"{barcode}.png" for barcode in BARCODES])
    with pytest.warns(UserWarning, match="paired by the barcodes in its file names"):
        assert paired_rows(folder, BARCODES[::-1]) == list(range(12))[::-1]


@pytest.mark.parametrize("names, message", [
    ([f"patch_{i}.png" for i in range(12) if i != 5], r"numbers 0..11 or the 12 barcodes of gex.h5ad; found no patch for row 1 \(5\)"),
    ([f"patch_{i}.png" for i in range(13)], "numbers 0..11 .*; found 13 images"),
    ([f"patch_{i + 1}.png" for i in range(12)], r"no patch for row 1 \(0\)"),
    ([f"patch_{i}.png" for i in range(11)] + ["patch_01.png"], r"no patch for row 1 \(11\)"),
    ([f"patch_{i}.png" for i in range(11)] + ["other_11.png"], "found 12 images"),
    ([f"{barcode}.png" for barcode in BARCODES[:11]], r"no patch for 1 \(AAAC11-1\)"),
    (["a.png", "b.png"], "no patch for row 12"),
], ids=["gap", "one more", "from one", "twice", "two kinds of names", "barcode gone", "no numbers"])
def test_any_other_foreign_folder_is_refused(tmp_path, names, message):
    with pytest.raises(InputError, match=message):
        paired_rows(foreign(tmp_path, names), BARCODES)


def test_numbers_do_not_pair_with_a_resorted_h5ad(tmp_path):
    folder = foreign(tmp_path, [f"{i}.png" for i in range(12)])
    with pytest.raises(InputError, match="its original row order, as numbers in file names mean rows; found re-sorted rows"):
        paired_rows(folder, BARCODES[::-1], recorded_sha256=strings_sha256(BARCODES))


# ---- one patch ----

RED = np.full((6, 4, 3), (200, 30, 40), np.uint8)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK"])
def test_every_eight_bit_file_reads_as_rgb(tmp_path, mode):
    path = tmp_path / ("patch.tif" if mode == "CMYK" else "patch.png")
    image = Image.fromarray(RED)
    (image.quantize(4) if mode == "P" else image.convert(mode)).save(path)
    patch = read_patch(path)
    assert patch.shape == (6, 4, 3) and patch.dtype == np.uint8
    if mode in ("RGB", "RGBA", "P"):
        assert (patch == RED).all()


def test_transparent_pixels_are_white(tmp_path):
    pixels = np.dstack([RED, np.full((6, 4), 255, np.uint8)])
    pixels[0, 0] = (0, 0, 0, 0)
    Image.fromarray(pixels).save(tmp_path / "patch.png")
    patch = read_patch(tmp_path / "patch.png")
    assert patch[0, 0].tolist() == [255, 255, 255] and patch[1, 1].tolist() == [200, 30, 40]


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
def test_exif_rotation_is_applied(tmp_path, suffix):
    pixels = np.repeat(RED, 8, axis=0).repeat(8, axis=1)          # (48, 32), JPEG's blocks of 8 x 8 each of one colour
    pixels[:16] = (0, 0, 255)
    exif = Image.Exif()
    exif[0x0112] = 6                                              # show it turned by 90 degrees clockwise
    Image.fromarray(pixels).save(tmp_path / f"patch{suffix}", exif=exif, quality=95)
    patch = read_patch(tmp_path / f"patch{suffix}").astype(int)
    assert patch.shape == (32, 48, 3) and np.abs(patch[:, -12:] - (0, 0, 255)).max() < 8
    assert np.abs(patch[:, :28] - (200, 30, 40)).max() < 8


@pytest.mark.parametrize("kind", ["grey", "rgb", "rgba", "float"])
def test_more_than_eight_bits_a_channel_is_refused(tmp_path, kind):
    path = tmp_path / ("patch.tif" if kind == "float" else "patch.png")
    if kind.startswith("rgb"):
        rows = b"".join(b"\0" + np.full((4, len(kind)), 40000, ">u2").tobytes() for _ in range(4))
        header = struct.pack(">IIBBBBB", 4, 4, 16, 6 if kind == "rgba" else 2, 0, 0, 0)
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    else:
        Image.fromarray(np.full((4, 4), 40000, np.uint16 if kind == "grey" else np.float32)).save(path)
    with pytest.raises(InputError, match=rf"{path.name}: pixels: expected 8 bits a channel; found .* Convert it to 8-bit RGB"):
        read_patch(path)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@pytest.mark.parametrize("damage", [lambda data: data[:len(data) // 2], lambda data: data[:4], lambda data: b"",
                                    lambda data: data[:60] + b"\xff\0\xff\0" + data[64:]],
                         ids=["half", "four bytes", "nothing", "garbled"])
def test_a_damaged_patch_is_refused_naming_it(tmp_path, damage):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "patch.png")
    data = (tmp_path / "patch.png").read_bytes()
    (tmp_path / "patch.png").write_bytes(damage(data))
    with pytest.raises(InputError, match="patch.png: image: expected an image file that can be decoded"):
        read_patch(tmp_path / "patch.png")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side, found", [(20_000, "400000000 pixels"), (12_000, "12000 x 12000"), (5_000, "5000 x 5000")])
def test_a_huge_patch_is_refused_before_it_is_decoded(tmp_path, side, found, monkeypatch):
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)                  # a bilevel PNG: kilobytes on disk
    rows = zlib.compress(bytes((side // 8 + 1) * side), 9)
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
    assert (tmp_path / "bomb.png").stat().st_size < 60_000
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("was decoded"))
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda self: pytest.fail("was decoded"))
    with pytest.raises(InputError, match=f"bomb.png: size: expected at most 4096 x 4096 px; found .*{found}"):
        read_patch(tmp_path / "bomb.png")


@pytest.fixture
def little_memory():
    """At most 150 MB more than the process has now; what asks for more gets a MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 150_000_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("kind, prefix, refused", [
    (b"zTXt", b"Comment\0\0", True), (b"iTXt", b"Comment\0\1\0\0\0", True), (b"iCCP", b"profile\0\0", True), (b"IDAT", b"", False),
], ids=["text", "international text", "colour profile", "pixels beyond the size"])
def test_a_small_patch_that_inflates_to_a_gigabyte_takes_little_memory(tmp_path, kind, prefix, refused, little_memory):
    header = struct.pack(">IIBBBBB", 4, 4, 8, 2, 0, 0, 0)
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
    ten_mb = squeeze.compress(bytes(10 << 20)) + squeeze.flush(zlib.Z_FULL_FLUSH)        # stands by itself, so it can be repeated
    pixels = b"" if kind == b"IDAT" else chunk(b"IDAT", zlib.compress(bytes(4 * 13)))
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(kind, prefix + b"\x78\xda" + 100 * ten_mb)
                                        + pixels + chunk(b"IEND", b""))
    if refused:
        with pytest.raises(InputError, match="bomb.png: image"):
            read_patch(tmp_path / "bomb.png")
    else:
        assert (read_patch(tmp_path / "bomb.png") == np.zeros((4, 4, 3))).all()
