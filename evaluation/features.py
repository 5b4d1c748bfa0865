"""Turn images into the features that distances compare: any image folder, any frozen encoder, in batches.

Reads folders of images; writes only into a cache folder, if one is given. An encoder is a module that takes
float (N, 3, H, W) in [-1, 1] and gives (N, D), with `name` and `source` (the hash of its weights).
"""
from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from networks.layers import images_to_float
from preprocessing.done_manifests import file_sha256, is_as_recorded, record_file
from preprocessing.errors import InputError, OptionError, first_few
from preprocessing.inputs import read_text
from preprocessing.outputs import finished_file
from preprocessing.patches import read_patch, read_patch_folder
from preprocessing.progress import ProgressBar

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp"}
READERS = 2


@dataclass(frozen=True)
class ImageFolder:
    """The images of a folder in the order of their names, and how many other files lie beside them."""

    folder: Path
    paths: list[Path]
    n_ignored: int


def list_images(folder: Path | str) -> ImageFolder:
    """What `samples.csv` or `metadata.jsonl` lists, else every image below the folder. Opens no image.

    Hidden files and folders do not count at all; everything else that is not listed is counted as ignored.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(folder, "folder", "a folder of images", "a file" if folder.exists() else "nothing there")
    files = sorted(path for path in folder.rglob("*")
                   if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts))
    if (folder / "samples.csv").is_file():
        paths = [folder / row["file"] for row in read_samples_csv(folder)]
    elif (folder / "metadata.jsonl").is_file():
        paths = read_patch_folder(folder).paths
    else:
        paths = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    if not paths:
        raise InputError(folder, "content", "images (png, jpg, tif, bmp, webp)", f"none among {len(files):,} files")
    return ImageFolder(folder, paths, len(set(files) - set(paths)))


def read_samples_csv(folder: Path | str) -> list[dict[str, str]]:
    """Rows of a generated folder's `samples.csv`; every `file` must be there."""
    source = Path(folder) / "samples.csv"
    text = read_text(source, "the list that gen_images.py writes")
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline=""), restkey="", restval=""))
    except csv.Error as error:
        raise InputError(source, "lines", "comma-separated text", str(error)) from error
    if not rows or "file" not in rows[0]:
        raise InputError(source, "columns", "at least one row with `file`", ", ".join(rows[0]) if rows else "no rows")
    nameless = [number for number, row in enumerate(rows, start=1) if not row["file"]]
    if nameless:
        raise InputError(source, "file", "a name in every row", f"none in rows {first_few(nameless)}")
    outside = [row["file"] for row in rows if Path(row["file"]).is_absolute() or ".." in Path(row["file"]).parts]
    if outside:
        raise InputError(source, "file", "files inside the folder", first_few(outside))
    missing = [row["file"] for row in rows if not os.path.isfile(Path(folder) / row["file"])]     # False too for no possible name
    if missing:
        raise InputError(source, "file", f"the {len(rows):,} images it lists", f"missing {first_few(missing)}")
    return rows


@dataclass(frozen=True)
class FeatureSpec:
    """One feature set as the user names it: `inception`, `uni`, `efficientnet_lite0`, `timm:mobilenetv2_100=weights.safetensors`."""

    name: str                      # inception, a key of networks.encoder_specs.ENCODERS, or timm:<model>
    weights: Path | None = None    # local weight file; None = where the encoder looks by itself

    @property
    def label(self) -> str:
        """How tables and results name it: without `timm:`."""
        return self.name.removeprefix("timm:")


def feature_specs(text: str, inception_weights: Path | None = None) -> list[FeatureSpec]:
    """`"inception,timm:mobilenetv2_100=PATH"` -> specs; a label may stand once. `inception_weights` as if behind `inception=`."""
    specs = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, weights = part.partition("=")
        specs.append(FeatureSpec(name.strip(), Path(weights.strip()) if weights else None))
    if inception_weights is not None:
        if FeatureSpec("inception") not in specs:
            raise OptionError("--weights", "inception among --features, as this is its weight file", text)
        specs = [FeatureSpec("inception", Path(inception_weights)) if spec.name == "inception" else spec for spec in specs]
    labels = [spec.label for spec in specs]
    if not specs or len(set(labels)) < len(labels):
        raise OptionError("--features", "names separated by commas, each once, e.g. inception,timm:mobilenetv2_100=weights.safetensors",
                          text or "nothing")
    return specs


def build_features(spec: FeatureSpec) -> nn.Module:
    """The encoder of a spec, frozen."""
    if spec.name == "inception":
        from evaluation.inception import build_inception
        return build_inception(spec.weights)
    from networks.histo_models import build_encoder
    return build_encoder(spec.name, spec.weights)


def resize_by_area(images: np.ndarray, px: int) -> np.ndarray:
    """uint8 (N, H, W, 3) -> (N, px, px, 3): the mean of what each new pixel covers; bicubic if it has to grow."""
    if images.shape[1:3] == (px, px):
        return images
    method = Image.Resampling.BOX if px < max(images.shape[1:3]) else Image.Resampling.BICUBIC
    return np.stack([np.asarray(Image.fromarray(image).resize((px, px), method)) for image in images])


def image_features(images: Sequence[Path] | np.ndarray | Tensor, encoder: nn.Module, batch_size: int = 64,
                   device: str | torch.device = "cpu", progress: bool = True, match_px: int | None = None) -> np.ndarray:
    """Features float32 (N, D) of image files of any size, or of uint8 (N, H, W, 3) arrays or (N, 3, H, W) tensors.

    Files are first brought to `match_px` by area, if given, so that no side of a comparison is sharper. Only one batch
    of images is in memory at a time. Row order is that of the images.
    """
    encoder = encoder.to(device).eval()
    features: np.ndarray | None = None
    bar = ProgressBar(total=len(images), unit="image", desc=getattr(encoder, "name", "features"), disable=not progress)
    with torch.inference_mode(), bar:
        for rows, batch in same_size_batches(images, batch_size, match_px):
            block = encoder(images_to_float(batch.to(device))).float().cpu().numpy()
            if features is None:
                features = np.empty((len(images), block.shape[1]), dtype=np.float32)
            features[rows] = block
            bar.update(len(rows))
    if features is None:
        raise ValueError("no images")
    return features


def same_size_batches(images: Sequence[Path] | np.ndarray | Tensor, batch_size: int,
                      match_px: int | None = None) -> Iterator[tuple[np.ndarray, Tensor]]:
    """(rows, uint8 (n, 3, H, W)); a batch of mixed sizes comes in parts. Files are read one batch ahead."""
    blocks = [np.arange(start, min(start + batch_size, len(images))) for start in range(0, len(images), batch_size)]
    if isinstance(images, Tensor):
        for rows in blocks:
            yield rows, images[rows[0]:rows[-1] + 1]
        return
    if isinstance(images, np.ndarray):
        for rows in blocks:
            yield rows, torch.from_numpy(np.ascontiguousarray(images[rows[0]:rows[-1] + 1].transpose(0, 3, 1, 2)))
        return
    def read(path: Path) -> np.ndarray:
        return read_patch(path) if match_px is None else resize_by_area(read_patch(path)[None], match_px)[0]

    with ThreadPoolExecutor(READERS) as pool:
        def submit(rows):
            return [pool.submit(read, images[row]) for row in rows]
        ahead = submit(blocks[0]) if blocks else []
        for number, rows in enumerate(blocks):
            patches = [future.result() for future in ahead]
            ahead = submit(blocks[number + 1]) if number + 1 < len(blocks) else []
            for shape in dict.fromkeys(patch.shape for patch in patches):
                same = [i for i, patch in enumerate(patches) if patch.shape == shape]
                yield rows[same], torch.from_numpy(np.stack([patches[i] for i in same]).transpose(0, 3, 1, 2).copy())


def cached_features(paths: Sequence[Path], encoder: nn.Module, cache_dir: Path | None, batch_size: int = 64,
                    device: str | torch.device = "cpu", progress: bool = True,
                    match_px: int | None = None) -> tuple[np.ndarray, bool]:
    """`image_features`, or the same from `cache_dir` if these very contents went through these very weights before.

    Returns the features and whether they came from the cache. Names, dates and places of the files do not matter.
    """
    if cache_dir is None:
        return image_features(paths, encoder, batch_size, device, progress, match_px), False
    cache_dir = Path(cache_dir)
    with ThreadPoolExecutor(READERS) as pool:
        contents = list(pool.map(file_sha256, paths))
    key = hashlib.sha256(json.dumps([encoder.name, encoder.source, match_px, contents]).encode()).hexdigest()[:32]
    target = cache_dir / f"{encoder.name.replace(':', '_')}_{key}.npy"
    if is_as_recorded(target):
        return np.load(target, mmap_mode="r", allow_pickle=False), True
    features = image_features(paths, encoder, batch_size, device, progress, match_px)
    with finished_file(target) as temporary, open(temporary, "wb") as stream:
        np.save(stream, features, allow_pickle=False)
    record_file(target)
    return features, False


def pick_device(name: str) -> str:
    """`auto` -> cuda where there is one, else cpu; checks a named one."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise OptionError("--device", "auto, cpu, cuda or cuda:N", name)
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise OptionError("--device", "cpu, as no GPU is visible", name)
    return name


def display_name(path: Path | str) -> str:
    """The last two parts of a path: enough to recognise it, without the machine's folders."""
    return os.path.join(*Path(path).parts[-2:])
