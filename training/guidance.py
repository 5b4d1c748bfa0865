"""Guide the generator by the CLIP image tower: a generated patch should embed where its prompt lies."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.gan_losses import GuidanceKind, contrastive_guidance, guidance_loss
from training.sample_centres import SamplePatches

GUIDANCE_PX = 64


@dataclass(frozen=True)
class Wanted:
    """Which prompts the images of a global batch were made for, each prompt once."""

    prompts: Tensor           # (P, c_dim) unit rows
    index: Tensor             # (batch,) int64: the prompt of every image
    centres: Tensor | None = None   # (P, F) mean image features of each prompt's sample


def wanted_prompts(prompts: Tensor, rows: np.ndarray, *, in_pairs: bool, centres: Tensor | None = None) -> Wanted:
    """Of the spots `rows` (batch,); `in_pairs`: two neighbours share the prompt of the first, as under diversity pressure.

    A spot that comes twice in a batch, at the seam of two epochs, is one prompt: it is no negative of itself. `centres` (N, F): of
    all spots, with a CLIP that centres samples.
    """
    spots, index = np.unique(rows[::2].repeat(2) if in_pairs else rows, return_inverse=True)
    spots = torch.from_numpy(spots)
    return Wanted(F.normalize(prompts[spots], dim=1), torch.from_numpy(index).to(prompts.device),
                  None if centres is None else centres[spots])


def guidance_centres(clip: nn.Module, patches: SamplePatches, device: torch.device | str) -> Tensor:
    """(S, F) mean features of each sample's real patches, cut to the middle 64 px as generated ones are to random ones."""
    def tower(images: Tensor) -> Tensor:
        return clip.image_encoder(guidance_crops(images, torch.full((len(images), 3), 0.5)))

    return patches.mean_features(tower, device=device).to(device)


def clip_guidance(clip: nn.Module, kind: GuidanceKind, images: Tensor, crops: Tensor, wanted: Wanted, part: slice, *,
                  reduced: bool = False) -> Tensor:
    """Loss of the images (N, 3, H, W) at the places `part` of the global batch; `crops` (N, 3) as `guidance_crops` takes them.
    `reduced`: the tower computes in bfloat16."""
    # not CLIP.encode_images, which gives no gradient to the images
    index = wanted.index[part]
    centres = None if wanted.centres is None else wanted.centres[index]
    with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=reduced):
        features = clip.image_encoder(guidance_crops(images, crops))
    embeds = clip.project_image_features(features.to(images.dtype), centres)
    if kind == "infonce":
        return contrastive_guidance(embeds, wanted.prompts, index, clip.temperature)
    return guidance_loss(embeds, wanted.prompts[index])


def guidance_crops(images: Tensor, crops: Tensor) -> Tensor:
    """Random 64 px squares of larger images; `crops` (N, 3) uniform: unused, x, y."""
    room = images.shape[3] - GUIDANCE_PX + 1
    if room <= 1:
        return images
    corners = [(int(x * room), int(y * room)) for _, x, y in crops.tolist()]
    return torch.stack([image[:, y:y + GUIDANCE_PX, x:x + GUIDANCE_PX] for image, (x, y) in zip(images, corners, strict=True)])
