"""Row 17 of the fault matrix: a slide damaged anywhere ends as one clean error or as pixels: no signal, no hang, no traceback."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from fault_rounds import rounds
from PIL import Image

ROOT = Path(__file__).parents[2]
SECONDS = 10              # for one damaged slide: it is opened, shrunk, and cut into patches
SEEDS = range(rounds(8, 40))
KINDS = ("pyramid", "pyramid in order of bytes MM", "tiled", "flat jpeg strips", "flat zlib", "png", "jpeg")
PLACES = ("header", "directory", "tables", "pixels", "anywhere")


def slide_of(kind: str, path: Path) -> bytes:
    rng = np.random.default_rng(0)
    pixels = np.asarray(Image.fromarray(rng.integers(0, 255, (30, 40, 3), dtype=np.uint8)).resize((400, 300), Image.Resampling.BICUBIC))
    if kind in ("png", "jpeg"):
        Image.fromarray(pixels).save(path, format=kind)
    elif kind.startswith("pyramid"):
        with tifffile.TiffWriter(path, byteorder=">" if "MM" in kind else "<") as tiff:
            for level in range(3):
                tiff.write(pixels[::2 ** level, ::2 ** level], photometric="rgb", tile=(64, 64), compression="jpeg",
                           subfiletype=int(level > 0), resolution=(20_000, 20_000), resolutionunit="CENTIMETER")
    elif kind == "flat jpeg strips":
        Image.fromarray(pixels).convert("YCbCr").save(path, format="TIFF", compression="jpeg")
    else:
        tiled = {"tile": (64, 64), "compression": "zstd"} if kind == "tiled" else {"compression": "zlib", "rowsperstrip": 16}
        tifffile.imwrite(path, pixels, photometric="rgb", **tiled)
    return path.read_bytes()


def regions_of(kind: str, path: Path, size: int) -> dict[str, list[tuple[int, int]]]:
    """Where the bytes of each place are, as (start, stop)."""
    everything = [(0, size)]
    if kind in ("png", "jpeg"):
        return {"header": [(0, 40)], "directory": [(0, 200)], "tables": [(0, 700)], "pixels": [(size // 2, size)], "anywhere": everything}
    with tifffile.TiffFile(path) as tiff:
        directories = [(page.offset, page.offset + 2 + 12 * len(page.tags) + 4) for page in tiff.pages]
        tables = [(tag.valueoffset, tag.valueoffset + tag.valuebytecount) for page in tiff.pages for tag in page.tags.values()]
        tiles = [(at, at + count) for page in tiff.pages for at, count in zip(page.dataoffsets, page.databytecounts, strict=True)]
    return {"header": [(0, 8)], "directory": directories, "tables": tables, "pixels": tiles, "anywhere": everything}


def mutated(content: bytes, regions: list[tuple[int, int]], rng: np.random.Generator) -> bytes:
    """One to six places flipped, zeroed, set to 255 or to noise, or the file cut there, or bytes left out."""
    damaged = bytearray(content)
    for _ in range(rng.integers(1, 7)):
        start, stop = regions[rng.integers(len(regions))]
        at = int(rng.integers(start, max(start + 1, stop)))
        length = int(rng.integers(1, 9))
        what = rng.integers(12)
        if what < 4 and at < len(damaged):
            damaged[at] ^= 1 << int(rng.integers(8))
        elif what < 6:
            damaged[at:at + length] = bytes(len(damaged[at:at + length]))
        elif what < 8:
            damaged[at:at + length] = b"\xff" * len(damaged[at:at + length])
        elif what < 10:
            damaged[at:at + length] = rng.bytes(len(damaged[at:at + length]))
        elif what == 10:
            del damaged[at:at + length]
        elif rng.integers(3) == 0:
            del damaged[at:]
    return bytes(damaged)


WORKER = """
import json, os, resource, signal, sys, traceback
import numpy as np
from preprocessing.errors import InputError
from preprocessing.slide import open_slide
from preprocessing.windows import cut_blocks, windows_inside

def use(path):
    with open_slide(path) as slide:
        if slide.width_px > 4000 or slide.height_px > 4000:      # a damaged size: what matters is that reading ends
            centres = np.array([[100.0, 100.0], [slide.width_px - 50, slide.height_px - 50]])
        else:
            slide.thumbnail(64)
            x, y = np.meshgrid(np.arange(40, max(41, slide.width_px - 40), 20), np.arange(40, max(41, slide.height_px - 40), 20))
            centres = np.stack([x.ravel(), y.ravel()], axis=1).astype(float)
        centres = centres[windows_inside(slide, centres, 64, 1.0)[0]]
        n_bad = sum(len(block.reasons) for block in cut_blocks(slide, centres, 64, 1.0, 32, [slice(0, len(centres))], workers=2))
        return f"pixels, {n_bad} unreadable"

for line in sys.stdin:
    path, seconds = json.loads(line)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.alarm(seconds)
        try:
            said = use(path)
        except InputError as error:
            said = "traceback: a message of several lines: " + str(error) if "\\n" in str(error).strip() else "refused: " + str(error)
        except BaseException:
            said = "traceback: " + traceback.format_exc()
        os.write(writing, said.encode()[:8000])
        os._exit(0)
    os.close(writing)
    said = os.read(reading, 8000).decode(errors="replace")
    os.close(reading)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        said = f"killed by signal {os.WTERMSIG(status)}"
    print(json.dumps(said), flush=True)
"""


@pytest.fixture(scope="module")
def outcome():
    """Reads a slide in a child of a process that has everything imported; returns what became of it."""
    worker = subprocess.Popen([sys.executable, "-c", WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                              text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})

    def ask(path: Path) -> str:
        worker.stdin.write(json.dumps([str(path), SECONDS]) + "\n")
        worker.stdin.flush()
        return json.loads(worker.stdout.readline())

    yield ask
    worker.stdin.close()
    worker.wait(timeout=SECONDS)


@pytest.mark.parametrize("kind", KINDS)
def test_an_undamaged_slide_is_read_by_the_same_means(kind, outcome, tmp_path):
    slide_of(kind, tmp_path / "s")
    suffix = {"png": ".png", "jpeg": ".jpg"}.get(kind, ".tif")
    (tmp_path / "s").rename(tmp_path / f"s{suffix}")
    assert outcome(tmp_path / f"s{suffix}") == "pixels, 0 unreadable"


@pytest.mark.fault("mutated slide")
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_slide_ends_as_one_line_or_as_pixels(kind, place, outcome, tmp_path, tried):
    path = tmp_path / f"s{ {'png': '.png', 'jpeg': '.jpg'}.get(kind, '.tif') }"
    content = slide_of(kind, path)
    regions = regions_of(kind, path, len(content))[place]
    found = {}
    for seed in SEEDS:
        path.write_bytes(mutated(content, regions, np.random.default_rng([seed, KINDS.index(kind), PLACES.index(place)])))
        tried()
        found[seed] = outcome(path)
    assert {seed: said for seed, said in found.items() if not said.startswith(("refused: ", "pixels, "))} == {}
