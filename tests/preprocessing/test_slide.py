"""Slides: the same pixels from every format, white where transparent, and no file that makes a command crash or hang."""
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tifffile
from PIL import Image

from preprocessing.errors import InputError
from preprocessing.flat_image import on_white
from preprocessing.slide import FlatSlide, PyramidSlide, SlideReadError, open_slide
from preprocessing.tissue import segment_tissue

SECONDS = 5


def picture(height=300, width=420) -> np.ndarray:
    """Colour names the place: red is x / 2, green y / 2."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0], pixels[..., 1], pixels[..., 2] = np.arange(width) // 2, np.arange(height)[:, None] // 2, 90
    return pixels


def write(path, pixels, **options):
    if path.suffix in (".tif", ".tiff"):
        tifffile.imwrite(path, pixels, photometric="rgb" if pixels.ndim == 3 else "minisblack", **options)
    else:
        Image.fromarray(pixels).save(path, **options)
    return path


TILED = {"tile": (64, 64), "resolution": (20_000, 20_000), "resolutionunit": "CENTIMETER"}       # 0.5 µm/px
STRIPED = {"resolution": (50_800, 50_800), "resolutionunit": "INCH"}


@pytest.mark.parametrize("name, options, reader, mpp", [
    ("s.tif", TILED, PyramidSlide, 0.5), ("s.tif", STRIPED, FlatSlide, 0.5), ("s.tif", {"compression": "zlib", **STRIPED}, FlatSlide, 0.5),
    ("s.tif", {"resolution": (72, 72), "resolutionunit": "INCH"}, FlatSlide, None), ("s.png", {}, FlatSlide, None),
    ("s.png", {"dpi": (72, 72)}, FlatSlide, None),
], ids=["tiled-tiff", "striped-tiff", "compressed-tiff", "tiff-of-72-dpi", "png", "png-of-72-dpi"])
def test_a_region_is_the_same_from_every_format(tmp_path, name, options, reader, mpp):
    pixels = picture()
    with open_slide(write(tmp_path / name, pixels, **options)) as slide:
        assert type(slide) is reader and (slide.width_px, slide.height_px) == (420, 300)
        assert slide.mpp == (None if mpp is None else pytest.approx(mpp))
        region = slide.read_region(100, 30, 50, 40)
        assert region.dtype == np.uint8 and (region == pixels[30:70, 100:150]).all()
        assert (slide.read_region(419, 299, 1, 1) == pixels[299:, 419:]).all()


def test_an_implausible_mpp_is_kept_apart(tmp_path):
    with open_slide(write(tmp_path / "s.tif", picture(), resolution=(72, 72), resolutionunit="INCH")) as slide:
        assert slide.mpp is None and slide.declared_mpp == pytest.approx(352.78, rel=1e-3)


@pytest.mark.parametrize("region", [(-1, 0, 5, 5), (0, 0, 421, 5), (416, 0, 5, 5), (0, 296, 5, 5), (0, 0, 0, 5)])
def test_a_region_that_leaves_the_slide_is_refused(tmp_path, region):
    with open_slide(write(tmp_path / "s.png", picture())) as slide, pytest.raises(ValueError, match="is not inside 420 x 300"):
        slide.read_region(*region)


@pytest.mark.parametrize("name, options", [("s.png", {}), ("s.tif", TILED)], ids=["flat", "pyramid"])
def test_a_thumbnail_is_the_whole_slide_by_area_means(tmp_path, name, options):
    with open_slide(write(tmp_path / name, picture(), **options)) as slide:
        thumbnail = slide.thumbnail(42)
        assert thumbnail.shape == (30, 42, 3)
        assert np.abs(thumbnail.astype(float) - picture().reshape(30, 10, 42, 10, 3).mean(axis=(1, 3))).max() <= 1
        assert (slide.thumbnail(5000) == picture()).all()


def test_a_thumbnail_made_in_bands_is_the_same(tmp_path, monkeypatch):
    with open_slide(write(tmp_path / "s.tif", picture(), **TILED)) as slide:
        whole = slide.thumbnail(99)
        monkeypatch.setattr("preprocessing.slide.BAND_BYTES", 4 * 420 * 20)
        assert np.abs(slide.thumbnail(99).astype(int) - whole).max() <= 1


def test_transparent_pixels_are_white_and_half_transparent_ones_half(tmp_path):
    pixels = np.zeros((2, 3, 4), np.uint8)
    pixels[0, :, 3], pixels[1, :, 3] = 0, (255, 128, 0)
    expected = [[[255] * 3] * 3, [[0] * 3, [127] * 3, [255] * 3]]
    assert on_white(pixels).tolist() == expected
    with open_slide(write(tmp_path / "s.png", pixels)) as slide:
        assert slide.read_region(0, 0, 3, 2).tolist() == expected


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "LA"])
def test_flat_images_of_other_modes_become_rgb(tmp_path, mode):
    path = tmp_path / ("s.jpg" if mode == "CMYK" else "s.png")
    Image.new("RGB", (20, 10), (255, 255, 255)).convert(mode).save(path)
    with open_slide(path) as slide:
        assert slide.read_region(0, 0, 20, 10).shape == (10, 20, 3) and slide.read_region(0, 0, 20, 10).min() > 250


def coloured(height=32, width=48) -> np.ndarray:
    """Four flat colours: exact in a palette, and not changed much by JPEG."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:16, :24], pixels[:16, 24:], pixels[16:, :24], pixels[16:, 24:] = (220, 120, 180), (90, 40, 140), (245, 244, 240), (30, 160, 60)
    return pixels


@pytest.mark.parametrize("name, mode, tolerance", [
    ("s.tif", "P", 0), ("s.tif", "RGB", 0), ("s.tif", "RGBA", 0), ("s.png", "P", 0), ("s.png", "RGB", 0), ("s.png", "RGBA", 0),
    ("s.jpg", "RGB", 3), ("s.jpg", "CMYK", 3)])
def test_colours_survive_every_mode_of_a_flat_image(tmp_path, name, mode, tolerance):
    image = Image.fromarray(coloured())
    image = image.quantize(8, dither=Image.Dither.NONE) if mode == "P" else image.convert(mode)
    image.save(tmp_path / name, **({"quality": 100, "subsampling": 0} if name.endswith("jpg") else {}))
    with open_slide(tmp_path / name) as slide:
        assert isinstance(slide, FlatSlide)
        assert np.abs(slide.read_region(0, 0, 48, 32).astype(int) - coloured()).max() <= tolerance


@pytest.mark.parametrize("photometric, stored", [("minisblack", lambda grey: grey), ("miniswhite", lambda grey: 255 - grey)])
def test_grey_is_right_whichever_end_is_white(tmp_path, photometric, stored):
    grey = coloured()[..., 0]
    tifffile.imwrite(tmp_path / "s.tif", stored(grey), photometric=photometric)
    with open_slide(tmp_path / "s.tif") as slide:
        assert (slide.read_region(0, 0, 48, 32) == grey[..., None]).all()


def test_a_tiff_of_jpeg_strips_in_ycbcr_keeps_its_colours(tmp_path):
    Image.fromarray(coloured()).convert("YCbCr").save(tmp_path / "s.tif", compression="jpeg", quality=95)
    with tifffile.TiffFile(tmp_path / "s.tif") as tiff:
        assert tiff.pages[0].photometric == tifffile.PHOTOMETRIC.YCBCR
    with open_slide(tmp_path / "s.tif") as slide:
        assert isinstance(slide, FlatSlide)
        assert np.abs(slide.read_region(0, 0, 48, 32).astype(int) - coloured()).mean() < 4


@pytest.mark.parametrize("photometric, channels, compression", [("separated", 4, None), ("cielab", 3, None), ("ycbcr", 3, "zlib")])
def test_a_tiff_whose_colours_we_cannot_read_is_refused(tmp_path, photometric, channels, compression):
    pixels = np.zeros((32, 48, channels), np.uint8)
    tifffile.imwrite(tmp_path / "s.tif", pixels, photometric=photometric, compression=compression,
                     planarconfig="contig", **({"subsampling": (1, 1)} if photometric == "ycbcr" else {}))
    with pytest.raises(InputError, match=f"grey, RGB.*found .*{photometric.upper()}"):
        open_slide(tmp_path / "s.tif")


def truncated(path, share):
    path.write_bytes(path.read_bytes()[:int(path.stat().st_size * share)])


def noise():
    return np.random.default_rng(0).integers(0, 255, (600, 800, 3), dtype=np.uint8)


@pytest.mark.parametrize("name, options", [
    ("s.tif", TILED), ("s.tif", STRIPED), ("s.tif", {"compression": "zlib"}), ("s.jpg", {}), ("s.png", {})],
    ids=["tiled-tiff", "striped-tiff", "zlib-tiff", "jpeg", "png"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9])
def test_a_truncated_file_is_refused_within_seconds(tmp_path, name, options, share):
    path = write(tmp_path / name, noise(), **options)
    truncated(path, share)
    started = time.monotonic()
    with pytest.raises(InputError, match=f"{name}: slide: expected"):
        open_slide(path)
    assert time.monotonic() - started < SECONDS


@pytest.mark.parametrize("name, content, message", [
    ("s.tif", "JPEG", "expected TIFF, as the extension .tif says; found JPEG"), ("s.jpg", "PNG", "expected JPEG.*found PNG"),
    ("s.png", "TIFF", "expected PNG.*found TIFF"), ("s.tiff", "text", "found none of JPEG, PNG, TIFF"),
    ("s.svs", "text", "a slide that OpenSlide can open"), ("s.svs", "JPEG", "a slide that OpenSlide can open"),
    ("s.ndpi", "PNG", "a slide that OpenSlide can open"), ("s", "text", "a slide that OpenSlide can open"),
])
def test_a_wrong_extension_is_refused_within_seconds(tmp_path, name, content, message):
    path = tmp_path / name
    if content == "text":
        path.write_text("barcode,in_tissue\n" * 50)
    else:
        Image.fromarray(picture()).save(path, format=content)
    started = time.monotonic()
    with pytest.raises(InputError, match=message):
        open_slide(path)
    assert time.monotonic() - started < SECONDS


@pytest.mark.parametrize("make, message", [(lambda path: path.mkdir(), "a folder"), (lambda path: None, "nothing at this path")],
                         ids=["folder", "absent"])
def test_what_is_not_a_file_is_refused(tmp_path, make, message):
    make(tmp_path / "s.tif")
    with pytest.raises(InputError, match=message):
        open_slide(tmp_path / "s.tif")


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_deep_images_are_refused_and_not_squeezed(tmp_path, dtype):
    tifffile.imwrite(tmp_path / "s.tif", picture().astype(dtype), photometric="rgb")
    with pytest.raises(InputError, match="8-bit grey, RGB or RGBA"):
        open_slide(tmp_path / "s.tif")


def test_a_flat_image_too_large_to_decode_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr("preprocessing.flat_image.MAX_FLAT_PX", 1000)
    with pytest.raises(InputError, match="at most 1,000 pixels in a flat image; found 420 x 300"):
        open_slide(write(tmp_path / "s.png", picture()))


def test_pillows_guard_is_lifted_for_one_slide_only(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with open_slide(write(tmp_path / "s.png", picture())) as slide:
        assert slide.width_px == 420
    assert Image.MAX_IMAGE_PIXELS == 1000


def damage_tile(path, number):
    with tifffile.TiffFile(path) as tiff:
        offset, count = tiff.pages[0].dataoffsets[number], tiff.pages[0].databytecounts[number]
    content = bytearray(path.read_bytes())
    content[offset:offset + count] = bytes(count)
    path.write_bytes(content)


@pytest.mark.parametrize("damaged_tile", [0, 7])
def test_one_corrupt_tile_is_named_and_does_not_poison_the_slide(tmp_path, damaged_tile):
    path = write(tmp_path / "s.tif", noise(), tile=(256, 256), compression="jpeg")
    damage_tile(path, damaged_tile)
    x, y = 256 * (damaged_tile % 4), 256 * (damaged_tile // 4)
    with open_slide(path) as slide:
        whole = slide.read_region(300, 10, 100, 100)
        with pytest.raises(SlideReadError, match=f"region x={x} y={y} 20 x 20 of level 0: expected pixels; found a tile"):
            slide.read_region(x, y, 20, 20)
        assert (slide.read_region(300, 10, 100, 100) == whole).all()


@pytest.mark.parametrize("tag, value, message", [
    ("TileWidth", 239_846_720, "tiles of at most 67,108,864 pixels; found 239,846,720 x 64"), ("TileLength", 0, "damaged|tiles of at most"),
    ("ImageLength", 42_460, "tiles of 64 x 64 pixels for an image of 420 x 42,460; found 35 offsets"),
    ("ImageWidth", 4_000_000_000, "tiles of 64 x 64 pixels for an image"),
])
def test_a_directory_that_asks_for_impossible_tiles_is_refused_before_they_are_decoded(tmp_path, tag, value, message):
    path = write(tmp_path / "s.tif", noise()[:300, :420], **TILED, compression="jpeg")
    with tifffile.TiffFile(path) as tiff:
        at = tiff.pages[0].tags[tag].offset
    content = bytearray(path.read_bytes())
    content[at + 2:at + 12] = (4).to_bytes(2, "little") + (1).to_bytes(4, "little") + value.to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        open_slide(path)


def test_directories_in_a_circle_end_as_an_error_within_seconds(tmp_path):
    with tifffile.TiffWriter(tmp_path / "s.tif") as tiff:
        for _ in range(3):
            tiff.write(picture(), photometric="rgb", tile=(64, 64))
    with tifffile.TiffFile(tmp_path / "s.tif") as tiff:
        first, last = tiff.pages[0], tiff.pages[2]
        link = last.offset + 2 + 12 * len(last.tags)
    content = bytearray((tmp_path / "s.tif").read_bytes())
    content[link:link + 4] = first.offset.to_bytes(4, "little")
    (tmp_path / "s.tif").write_bytes(content)
    started = time.monotonic()
    with pytest.raises(InputError, match="damaged"):
        open_slide(tmp_path / "s.tif")
    assert time.monotonic() - started < SECONDS


@pytest.mark.parametrize("options", [{"tile": (64, 64), "compression": "zstd"}, STRIPED, {"compression": "zlib"}],
                         ids=["tiled", "striped", "zlib"])
def test_a_large_flat_tiff_lies_in_a_temporary_file_that_goes_with_it(tmp_path, monkeypatch, options):
    monkeypatch.setattr("preprocessing.flat_image.MAPPED_BYTES", 1000)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    with FlatSlide(write(tmp_path / "s.tif", picture(), **options), "TIFF") as slide:        # OpenSlide may know the tiled one, too
        assert isinstance(slide._pixels.stored, np.memmap)
        assert (slide.read_region(100, 30, 50, 40) == picture()[30:70, 100:150]).all()
    assert not list((tmp_path / "temporary").iterdir())


def test_a_large_grey_tiff_is_not_tripled_in_memory(tmp_path):
    tifffile.imwrite(tmp_path / "s.tif", picture()[..., 0], photometric="minisblack")
    with open_slide(tmp_path / "s.tif") as slide:
        assert slide._pixels.stored.shape == (300, 420) and (slide.read_region(9, 8, 7, 6) == picture()[8:14, 9:16, :1]).all()


def test_a_damaged_tile_does_not_fail_the_reads_of_other_threads(tmp_path):
    path = write(tmp_path / "s.tif", noise(), tile=(64, 64), compression="jpeg")
    with open_slide(path) as slide:
        whole = slide.read_region(0, 0, 800, 600)
    damage_tile(path, 0)
    with open_slide(path) as slide, ThreadPoolExecutor(4) as pool:
        def read(number):
            x, y = (0, 0) if number % 3 == 0 else (64 + number * 7 % 700, 64 + number * 13 % 500)
            try:
                return np.array_equal(slide.read_region(x, y, 30, 30), whole[y:y + 30, x:x + 30])
            except SlideReadError:
                return None
        assert list(pool.map(read, range(300))) == [None if number % 3 == 0 else True for number in range(300)]


# ---- real slides ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, size, mpp", [
    ("wsi/CMU-1-Small-Region.svs", (2220, 2967), 0.499), ("wsi/openslide-python_small.svs", (16, 16), 0.499),
    ("wsi/openslide-python_boxes.tiff", (300, 250), None), ("mouse-brain-crop/fullres.tif", (950, 1717), 0.7269),
    ("mouse-brain-crop/original/test_img.jpg", (950, 1717), None), ("her2st/C4/image.jpg", (9278, 9916), None)])
def test_real_slides_are_read(shared_data, name, size, mpp):
    with open_slide(shared_data / name) as slide:
        assert (slide.width_px, slide.height_px) == size and slide.mpp == (None if mpp is None else pytest.approx(mpp, abs=1e-4))
        assert slide.read_region(size[0] - 16, size[1] - 16, 16, 16).shape == (16, 16, 3)
        assert max(slide.thumbnail(256).shape) == min(256, max(size))


def test_the_lossless_copy_of_a_real_image_has_its_pixels(shared_data):
    folder = shared_data / "mouse-brain-crop"
    with open_slide(folder / "fullres.tif") as copy, open_slide(folder / "original" / "test_img.jpg") as original:
        assert (copy.read_region(300, 800, 200, 150) == original.read_region(300, 800, 200, 150)).all()


def test_a_real_slide_of_which_nothing_can_be_decoded_is_not_said_to_have_no_tissue(shared_data):
    with open_slide(shared_data / "wsi/openslide-python_unreadable.svs") as slide:
        with pytest.raises(SlideReadError, match="found a tile that cannot be decoded"):
            segment_tissue(slide)
        assert (slide.thumbnail(64, may_be_blank=True) == 255).all()


def test_a_real_slide_that_opens_but_cannot_be_decoded_is_refused_on_reading(shared_data):
    with open_slide(shared_data / "wsi/openslide-python_unreadable.svs") as slide, pytest.raises(SlideReadError, match="cannot be decoded"):
        slide.read_region(0, 0, 16, 16)
