"""Compute the frozen tower's features once: K augmented views of every patch, kept in memory or on disk.

A cached view equals what the online path computes for the same view: both go through `training.augment.apply_views` and the tower.
"""
from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from networks.weights import load_weights_folder, save_weights_folder
from preprocessing.done_manifests import config_sha256
from preprocessing.progress import ProgressBar
from training.augment import AugmentConfig, apply_views, draw_views, plain_views, turned_views
from training.patch_cache import PatchRows
from training.ranks import gather_rows, own_rows, rank_and_size

IMAGES_A_BATCH = 64


def view_table(n_patches: int, n_views: int, augment: AugmentConfig, seed: int) -> Tensor:
    """(N, K, 7) views to cache. View 0 changes nothing; where patches are turned and flipped, 1 to 7 are the other ways
    to lay them (recoloured by chance), so that K = 8 sees each once; the rest is drawn."""
    generator = torch.Generator().manual_seed(seed)
    table = draw_views(n_patches * n_views, augment, generator).view(n_patches, n_views, 7)
    if augment.flip and augment.rotate:
        laid = min(n_views, 8)
        table[:, :laid, :3] = turned_views()[:laid, :3]
    table[:, 0] = plain_views(1)
    return table


@torch.no_grad()
def compute_features(images: Tensor | PatchRows, views: Tensor, tower: Callable[[Tensor], Tensor], *, device: torch.device | str = "cpu",
                     progress: bool = True) -> Tensor:
    """uint8 (N, 3, H, W) and (N, K, 7) -> float32 (N, K, F) on the CPU. Several ranks share the work; each gets the whole."""
    n_views = views.shape[1]
    flat = views.flatten(0, 1)
    source = torch.arange(len(images)).repeat_interleave(n_views)
    blocks = []
    with ProgressBar(total=len(source), desc="image features", unit="patch", disable=not progress) as bar:
        for rows in torch.arange(len(source)).split(IMAGES_A_BATCH * rank_and_size()[1]):
            own = rows[own_rows(len(rows))]
            seen = apply_views(images[source[own]], flat[own]).to(device)
            blocks.append(gather_rows(tower(seen).float())[:len(rows)].cpu())
            bar.update(len(rows))
    return torch.cat(blocks).unflatten(0, (len(images), n_views))


def cached_features(images: Tensor | PatchRows, views: Tensor, tower: Callable[[Tensor], Tensor], *, tower_key: str, cache_dir: Path | None,
                    device: torch.device | str = "cpu", progress: bool = True) -> Tensor:
    """`compute_features`, kept in `cache_dir` (if given) under the hash of the patches, the views and the tower
    (`tower_key`: its weights and input side)."""
    if cache_dir is None:
        return compute_features(images, views, tower, device=device, progress=progress)
    key = config_sha256({"tower": tower_key, "views": tensor_sha256(views), "images": tensor_sha256(images)})
    folder = Path(cache_dir) / key[:32]
    if gather_rows(torch.tensor([float(folder.is_dir())], device=device)).all():   # each rank sees it: all read, or all compute
        return load_weights_folder(folder)[0]["features"]
    features = compute_features(images, views, tower, device=device, progress=progress)
    if rank_and_size()[0] == 0:
        save_weights_folder(folder, {"features": features}, {"class": "image features", "tower": tower_key})
    return features


def tensor_sha256(tensor: Tensor | PatchRows) -> str:
    """SHA-256 of a tensor's rows: their bytes, type and shape."""
    digest = hashlib.sha256()
    for row in tensor:
        digest.update(f"{row.dtype} {tuple(row.shape)}".encode())
        digest.update(row.contiguous().numpy().tobytes())
    return digest.hexdigest()
