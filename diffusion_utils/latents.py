"""What a denoiser is trained on, by row: pixels, or latents of an autoencoder, computed once (cached) or at every step (online).

A cache holds, of all eight flips and quarter turns of every patch, the mean and the deviation of the autoencoder's posterior in half
precision, so that a step still draws its own orientation and its own posterior sample. It is keyed by the autoencoder and the patches,
mapped from the disk, and goes on where a killed run left it.
"""
from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from diffusion_utils.draws import ORIENTATIONS, oriented
from networks.layers import images_to_float
from preprocessing.npy_file import NPY_ERRORS
from preprocessing.outputs import finished_file, flush_to_disk, locked, raise_named, require_free_space, write_json
from preprocessing.progress import ProgressBar
from training.patch_cache import PatchRows, spread_sha256

ROWS_A_BLOCK = 8
WAIT_S = 7 * 24 * 3600.0      # of a process for another that fills the cache both need


@dataclass(frozen=True)
class Pixels:
    """Patches themselves, in [-1, 1]."""

    images: PatchRows         # uint8 (N, 3, H, H)

    has_posterior = False

    def read(self, rows: Tensor, orientations: Tensor, posterior: Tensor | None, device: str) -> Tensor:
        """(n, 3, H, H) of those rows, turned."""
        turned = [oriented(image, int(kind)) for image, kind in zip(self.images[rows], orientations, strict=True)]
        return images_to_float(torch.stack(turned).to(device))


@dataclass(frozen=True)
class OnlineLatents:
    """Patches encoded when they are asked for."""

    pixels: Pixels
    vae: nn.Module

    has_posterior = True

    def read(self, rows: Tensor, orientations: Tensor, posterior: Tensor, device: str) -> Tensor:
        """(n, Z, h, h): a draw from each posterior by the normal numbers `posterior`, scaled as the denoiser expects it."""
        mean, deviation = posterior_of(self.vae, self.pixels.read(rows, orientations, None, device))
        return scaled(self.vae.config, mean + deviation * posterior.to(device))


@dataclass(frozen=True)
class CachedLatents:
    """Posteriors from the disk; the autoencoder is no longer needed."""

    posteriors: np.ndarray    # (N, 8, 2, Z, h, h) float16, mapped
    vae_config: dict

    has_posterior = True

    def read(self, rows: Tensor, orientations: Tensor, posterior: Tensor, device: str) -> Tensor:
        picked = np.stack([self.posteriors[row, kind] for row, kind in zip(rows.tolist(), orientations.tolist(), strict=True)])
        mean, deviation = torch.from_numpy(picked).to(device).float().unbind(dim=1)
        return scaled(self.vae_config, mean + deviation * posterior.to(device))


def scaled(config, latents: Tensor) -> Tensor:
    """As the denoiser sees them."""
    return (latents - (config.get("shift_factor") or 0.0)) * config["scaling_factor"]


def unscaled(config, latents: Tensor) -> Tensor:
    """As the autoencoder decodes them."""
    return latents / config["scaling_factor"] + (config.get("shift_factor") or 0.0)


@torch.no_grad()
def posterior_of(vae: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation (N, Z, h, h) of images in [-1, 1]; a tiny autoencoder is certain."""
    encoded = vae.encode(images)
    if hasattr(encoded, "latent_dist"):
        return encoded.latent_dist.mean, encoded.latent_dist.std
    return encoded.latents, torch.zeros_like(encoded.latents)


def cached_latents(images: PatchRows, vae: nn.Module, folder: Path, *, device: str = "cpu", progress: bool = True) -> CachedLatents:
    """The posteriors of all patches, from `folder` or made and kept there. One process makes them, others wait for it."""
    path = folder / f"latents-{_key(images, vae)[:24]}.npy"
    side = images.array.shape[-1] // 2 ** (len(vae.config.block_out_channels) - 1)
    shape = (len(images), ORIENTATIONS, 2, vae.config.latent_channels, side, side)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / "latents", WAIT_S):
        if not is_whole(path, shape):
            _fill(path, shape, images, vae, device, progress)
    return CachedLatents(np.load(path, mmap_mode="r", allow_pickle=False), dict(vae.config))


def _fill(path: Path, shape: tuple[int, ...], images: PatchRows, vae: nn.Module, device: str, progress: bool) -> None:
    """Block by block into a working file beside a note of how far it is; the file gets its name when it is whole."""
    working, note = path.with_suffix(".part"), path.with_suffix(".part.json")
    done = _rows_done(working, note, shape)
    if not done:
        require_free_space(path.parent, int(np.prod(shape)) * 2)
    array = np.lib.format.open_memmap(working, mode="r+" if done else "w+", dtype=np.float16, shape=None if done else shape)
    _take_space(working)
    vae = vae.to(device)
    with ProgressBar(total=shape[0], initial=done, desc="latents", unit="patch", disable=not progress) as bar:
        for start in range(done, shape[0], ROWS_A_BLOCK):
            block = images[torch.arange(start, min(start + ROWS_A_BLOCK, shape[0]))]
            for kind in range(ORIENTATIONS):
                mean, deviation = posterior_of(vae, images_to_float(oriented(block, kind).to(device)))
                array[start:start + len(block), kind] = torch.stack([mean, deviation], dim=1).half().cpu().numpy()
            if (start // ROWS_A_BLOCK) % 32 == 31:
                array.flush()
                with finished_file(note) as temporary:
                    temporary.write_text(json.dumps({"rows": start + len(block), "shape": shape}))
            bar.update(len(block))
    array.flush()
    del array
    flush_to_disk(working)
    write_json(path.with_suffix(".json"), {"shape": shape, "sha256": spread_sha256(working)})
    working.rename(path)
    note.unlink(missing_ok=True)


def is_whole(path: Path, shape: tuple[int, ...]) -> bool:
    """Whether a cache is there with the bytes it was finished with; else it is made anew."""
    try:
        about = json.loads(path.with_suffix(".json").read_text())
        return about["shape"] == list(shape) and about["sha256"] == spread_sha256(path)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _take_space(path: Path) -> None:
    """Claim a mapped file's blocks at once: a disk that is full later would end the process without a word."""
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as stream:
            try:
                os.posix_fallocate(stream.fileno(), 0, path.stat().st_size)
            except OSError as error:
                raise_named(error, path)


def _rows_done(working: Path, note: Path, shape: tuple[int, ...]) -> int:
    """Rows that a killed run left whole; 0 where that cannot be known."""
    try:
        said = json.loads(note.read_text())
        kept = np.load(working, mmap_mode="r", allow_pickle=False)
        whole = kept.shape == shape == tuple(said["shape"]) and kept.dtype == np.float16
        rows = said["rows"]
    except (*NPY_ERRORS, OSError):
        return 0
    return rows if whole and isinstance(rows, int) and 0 <= rows <= shape[0] else 0


def _key(images: PatchRows, vae: nn.Module) -> str:
    digest = hashlib.sha256(f"posteriors 1 {len(images)} {tuple(images.array.shape[1:])}".encode())
    hash_tensors(digest, vae.state_dict())
    digest.update(images_sha256(images).encode())
    return digest.hexdigest()


def hash_tensors(digest, tensors: Mapping[str, Tensor]) -> None:
    """Add names and float32 values to a hashlib digest, in their order."""
    for name, tensor in tensors.items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy())


def images_sha256(images: PatchRows) -> str:
    """SHA-256 of all pixels in row order, read in blocks."""
    digest = hashlib.sha256()
    for start in range(0, len(images), 1024):
        digest.update(images[torch.arange(start, min(start + 1024, len(images)))].contiguous().numpy())
    return digest.hexdigest()
