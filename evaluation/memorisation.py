"""Ask whether generated patches are copies: the nearest training patch of each, in two encoders, under the eight flips and turns.

How near is near is told by held-out patches: nobody copied those, and what they find in training is chance. A patch counts as a copy if
every encoder names the same training patch, less than half as far as any other picture, and less than half as far as all but 5 % of the
held-out patches find theirs. (Yoon et al. 2023 ask for a third, in pixels, of one space; here several encoders must agree.)
Images are files, or uint8 (N, H, W, 3).
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from evaluation.contact_sheet import contact_sheet
from evaluation.features import image_features, resize_by_area
from preprocessing.errors import InputError
from preprocessing.patches import read_patch

VIEWS = tuple((flip, turns) for flip in (False, True) for turns in range(4))
QUANTILE = 0.05              # of held-out patches: so many lie nearer than it by chance
COPY_RATIO = 0.5             # nearest over second nearest, and over the held-out quantile
SAME = 1e-3                  # training patches nearer to each other than this share of the usual distance are one picture
QUERIES_A_BLOCK = 256
Images = Sequence[Path] | np.ndarray


@dataclass(frozen=True)
class Nearest:
    """For each of N patches, in one encoder."""

    row: np.ndarray          # (N,) of the nearest training patch
    view: np.ndarray         # (N,) index into VIEWS: how the patch was turned to lie nearest
    distance: np.ndarray     # (N,) Euclidean, between features
    ratio: np.ndarray        # (N,) that distance over the one to the nearest other training picture, 0..1

    @property
    def limit(self) -> float:
        """The distance that 5 % of these patches stay below."""
        return float(np.quantile(self.distance, QUANTILE))


@dataclass(frozen=True)
class Memorisation:
    """What was found, by encoder, for the generated and the held-out patches."""

    generated: dict[str, Nearest]
    held_out: dict[str, Nearest]
    n_training: int

    @property
    def copies(self) -> np.ndarray:
        """(N,) bool: generated patches that are copies."""
        return self._copies_among(self.generated)

    def _copies_among(self, found: Mapping[str, Nearest]) -> np.ndarray:
        return are_copies(found, {name: near.limit for name, near in self.held_out.items()})

    def closest(self, count: int) -> np.ndarray:
        """Rows of the generated patches that lie nearest, copies first; distances count in shares of the encoder's usual one."""
        share = np.mean([near.distance / max(np.median(self.held_out[name].distance), 1e-12) for name, near in self.generated.items()],
                        axis=0)
        return np.lexsort((share, ~self.copies))[:count]

    def summary(self, seed: int = 0) -> dict[str, object]:
        """All numbers, plain: copies, and by encoder the share nearer than the held-out 5 % quantile with its 95 % interval."""
        encoders = {name: _summary_of(near, self.held_out[name], seed) for name, near in self.generated.items()}
        n, n_held = len(self.copies), len(next(iter(self.held_out.values())).row)
        return {"n_generated": n, "n_held_out": n_held, "n_training": self.n_training, "copies": int(self.copies.sum()),
                "copies_among_held_out": int(self._copies_among(self.held_out).sum()), "copy_ratio": COPY_RATIO, "encoders": encoders}


def find_memorised(generated: Images, held_out: Images, training: Images, encoders: Mapping[str, nn.Module], *, batch_size: int = 64,
                   device: str = "cpu", progress: bool = True, match_px: int | None = None) -> Memorisation:
    """Compare generated and held-out patches with the training patches in every encoder.

    `match_px`: files are brought to this side first, so that sharpness does not tell; arrays must be of one size.
    """
    for name, images, least in (("training", training, 2), ("held-out", held_out, 10), ("generated", generated, 1)):
        if len(images) < least:
            raise InputError(name, "patches to look for copies", f"at least {least}", str(len(images)))
    found: dict[str, dict[str, Nearest]] = {"generated": {}, "held_out": {}}
    for label, encoder in encoders.items():
        def features(images: Images, view=(False, 0), encoder=encoder) -> np.ndarray:
            return image_features(images, Turned(encoder, *view), batch_size, device, progress, match_px)

        known = features(training)
        for side, images in (("generated", generated), ("held_out", held_out)):
            found[side][label] = nearest(np.stack([features(images, view) for view in VIEWS], axis=1), known)
    return Memorisation(found["generated"], found["held_out"], len(training))


class Turned(nn.Module):
    """An encoder that sees every image flipped and turned."""

    def __init__(self, encoder: nn.Module, flip: bool, turns: int):
        super().__init__()
        self.encoder, self.flip, self.turns = encoder, flip, turns
        self.name = getattr(encoder, "name", "features")

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder(torch.rot90(images.flip(-1) if self.flip else images, self.turns, (-2, -1)).contiguous())


class Pixels(nn.Module):
    """The picture itself, small: a second space that needs no weights."""

    name, side = "pixels", 16

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, 768)."""
        return nn.functional.interpolate(images, (self.side, self.side), mode="area").flatten(1)


def nearest(queries: np.ndarray, training: np.ndarray) -> Nearest:
    """Features (N, V, F) of N patches in V views, and (T, F) of the training patches."""
    training = training.astype(np.float64)
    squares = (training ** 2).sum(axis=1)
    parts = [_nearest_of(queries[start:start + QUERIES_A_BLOCK].astype(np.float64), training, squares)
             for start in range(0, len(queries), QUERIES_A_BLOCK)]
    return Nearest(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _nearest_of(queries: np.ndarray, training: np.ndarray, squares: np.ndarray) -> tuple[np.ndarray, ...]:
    n, views, width = queries.shape
    squared = _squared_distances(queries.reshape(n * views, width), training, squares).reshape(n, views, -1)
    by_patch = squared.min(axis=1)                                       # (N, T): the best view for every training patch
    row = by_patch.argmin(axis=1)
    view = squared[np.arange(n), :, row].argmin(axis=1)
    first = np.sqrt(by_patch[np.arange(n), row])
    apart = _squared_distances(training[row], training, squares)         # (N, T): of the nearest one from the others
    same = apart <= (SAME ** 2) * np.median(apart)
    second = np.sqrt(np.where(same, np.inf, by_patch).min(axis=1))
    ratio = np.where(np.isfinite(second), first / np.maximum(second, 1e-12), 1.0)
    return row, view, first, np.minimum(ratio, 1.0)


def _squared_distances(first: np.ndarray, second: np.ndarray, squares: np.ndarray) -> np.ndarray:
    return np.maximum((first ** 2).sum(axis=1)[:, None] - 2 * first @ second.T + squares, 0)


def are_copies(found: Mapping[str, Nearest], limits: Mapping[str, float]) -> np.ndarray:
    """(N,) bool: every encoder names the same training patch, it stands alone, and nearer than chance; `limits` of held-out patches."""
    first = next(iter(found.values()))
    return np.logical_and.reduce([(near.row == first.row) & (near.ratio < COPY_RATIO) & (near.distance <= COPY_RATIO * limits[name])
                                  for name, near in found.items()])


def _summary_of(near: Nearest, held_out: Nearest, seed: int) -> dict[str, object]:
    limit = held_out.limit
    rng = np.random.default_rng(seed)
    shares = []
    for _ in range(1000):                                                # both sides are samples: both are drawn again
        drawn = np.quantile(rng.choice(held_out.distance, len(held_out.distance)), QUANTILE)
        shares.append((rng.choice(near.distance, len(near.distance)) < drawn).mean())
    return {"held_out_quantile_5": limit, "share_nearer": float((near.distance < limit).mean()),
            "share_nearer_ci95": np.quantile(shares, [0.025, 0.975]).tolist(), "expected_share": QUANTILE,
            "median_distance": float(np.median(near.distance)), "median_distance_held_out": float(np.median(held_out.distance)),
            "smallest_distance": float(near.distance.min()), "smallest_distance_held_out": float(held_out.distance.min())}


def closest_pairs(found: Memorisation, generated: Images, training: Images, count: int = 8, cell_px: int = 96) -> np.ndarray:
    """uint8 (H, W, 3): a column a pair - generated patch above, the nearest training patch of each encoder below, turned to match it."""
    shown = found.closest(count)
    rows = [[_read(generated, i, cell_px) for i in shown]]
    for near in found.generated.values():
        rows.append([turned_back(_read(training, near.row[i], cell_px), near.view[i]) for i in shown])
    labels = [f"{'copy ' if found.copies[i] else ''}{np.max([near.ratio[i] for near in found.generated.values()]):.2f}" for i in shown]
    return contact_sheet(rows, ["generated", *(f"training, {name}" for name in found.generated)], labels, cell_px=cell_px)


def turned_back(patch: np.ndarray, view: int) -> np.ndarray:
    """A training patch (H, W, 3) as the generated one lies, which matches it after `VIEWS[view]`."""
    flip, turns = VIEWS[view]
    patch = np.rot90(patch, -turns, (0, 1))
    return np.ascontiguousarray(patch[:, ::-1] if flip else patch)


def _read(images: Images, row: int, px: int) -> np.ndarray:
    return resize_by_area((images[row] if isinstance(images, np.ndarray) else read_patch(images[row]))[None], px)[0]
