"""StyleGAN-T's generator, conditioned on a prompt embedding: (z, c) -> image. Written from the published formulas.

Takes embeddings, never expression: the gene encoder is a separate part of a snapshot. Images are float (N, 3, r, r),
nominally in [-1, 1]. Paper: Sauer et al., StyleGAN-T (2023).
"""
from __future__ import annotations

from dataclasses import dataclass
from math import log2, sqrt
from typing import get_args

import torch
from torch import Tensor, nn

from networks.layers import ConditionNorm, CondNormKind, EqualizedLinear, lrelu, upsample_image
from networks.synthesis_layers import FIRST_RESOLUTION, FourierInput, ModulatedConv, NoiseMode, ToRGB
from preprocessing.errors import OptionError


@dataclass(frozen=True)
class GeneratorConfig:
    """Everything that fixes the shapes of a generator."""

    img_resolution: int                 # side of the image, px; a power of two >= 8
    c_dim: int = 512                    # width of a prompt embedding; 0: unconditional, w is the mapped z alone
    z_dim: int = 64                     # width of the latent noise
    cbase: int = 32768                  # channels at resolution r: min(cbase // r, cmax)
    cmax: int = 512
    res_blocks: int = 2                 # pairs (plain conv, residual conv) per resolution
    norm_groups: int = 32               # GroupNorm has min(norm_groups, channels) groups
    noise_init: float = 0.0             # strength of the per-pixel noise at the start
    cond_norm: CondNormKind = "l2"      # how prompt embeddings are scaled

    def __post_init__(self):
        resolution = self.img_resolution
        if resolution < FIRST_RESOLUTION or resolution & (resolution - 1):
            raise OptionError("--img-resolution", f"a power of two >= {FIRST_RESOLUTION}", str(resolution))
        for name in ("c_dim", "z_dim", "cbase", "cmax", "res_blocks", "norm_groups"):
            least = 0 if name == "c_dim" else 1
            if getattr(self, name) < least:
                raise OptionError(name, f"at least {least}", str(getattr(self, name)))
        for resolution in self.resolutions:
            channels = self.channels(resolution)
            if channels < 1 or channels % min(self.norm_groups, channels):
                raise OptionError("--cbase, --cmax", f"channels that GroupNorm's {self.norm_groups} groups divide",
                                  f"{channels} at {resolution} px")

    @property
    def resolutions(self) -> list[int]:
        return [2 ** k for k in range(int(log2(FIRST_RESOLUTION)), int(log2(self.img_resolution)) + 1)]

    @property
    def w_dim(self) -> int:
        return self.z_dim + self.c_dim

    def channels(self, resolution: int) -> int:
        return min(self.cbase // resolution, self.cmax)


class Mapping(nn.Module):
    """(z, normalised c) -> w = concat(x, c). Truncation pulls x towards its running mean; the gene part is never truncated."""

    X_AVG_BETA = 0.995

    def __init__(self, z_dim: int):
        super().__init__()
        self.fc0 = EqualizedLinear(z_dim, z_dim, lr_mult=0.01)
        self.fc1 = EqualizedLinear(z_dim, z_dim, lr_mult=0.01)
        self.register_buffer("x_avg", torch.zeros(z_dim))

    def _mapped(self, z: Tensor) -> Tensor:
        z = z * (z.square().mean(dim=1, keepdim=True) + 1e-8).rsqrt()
        return self.fc1(lrelu(self.fc0(z)))

    @torch.no_grad()
    def update_average(self, z: Tensor) -> None:
        """Move x_avg towards the mean x of z (N, z_dim): call once per optimiser step, with the whole global batch."""
        self.x_avg.copy_(torch.lerp(self._mapped(z).mean(dim=0), self.x_avg, self.X_AVG_BETA))

    def forward(self, z: Tensor, c: Tensor, truncation_psi: float = 1.0) -> Tensor:
        x = self._mapped(z)
        if truncation_psi != 1:
            x = torch.lerp(self.x_avg, x, truncation_psi)
        return torch.cat((x, c), dim=1)


class Block(nn.Module):
    """One resolution: Fourier input (at 8 px) or up-sampling conv0, residual pairs, ToRGB."""

    def __init__(self, config: GeneratorConfig, resolution: int):
        super().__init__()
        width, w_dim = config.channels(resolution), config.w_dim
        self.input = FourierInput(w_dim, width) if resolution == FIRST_RESOLUTION else None
        convs = [] if self.input is not None else [
            ModulatedConv(config.channels(resolution // 2), width, w_dim, resolution, up=True, noise_init=config.noise_init)]
        groups = min(config.norm_groups, width)
        for _ in range(config.res_blocks):
            convs += [ModulatedConv(width, width, w_dim, resolution, gain=sqrt(0.5), residual_groups=residual, noise_init=config.noise_init)
                      for residual in (0, groups)]
        self.convs = nn.ModuleList(convs)
        self.to_rgb = ToRGB(width, w_dim)
        self.num_ws = len(convs) + (self.input is not None)
        self.compute_dtype: torch.dtype | None = None        # of the convolutions; None: the weights'
        self.memory_format = torch.contiguous_format

    def forward(self, x: Tensor | None, image: Tensor | None, w: Tensor, noise: list[Tensor | None]) -> tuple[Tensor, Tensor]:
        """Features and image (None: at 8 px there are none yet) of half the side, w (N, num_ws + 1, w_dim) and a noise for every
        convolution -> features and image of this side."""
        if self.input is not None:
            x = self.input(w[:, 0]).to(dtype=self.compute_dtype, memory_format=self.memory_format)
        first = self.num_ws - len(self.convs)
        for row, (conv, values) in enumerate(zip(self.convs, noise, strict=True), first):
            x = conv(x, w[:, row], values)
        colour = self.to_rgb(x, w[:, self.num_ws])
        return x, colour if image is None else upsample_image(image) + colour


class Generator(nn.Module):
    """(z, c) -> image. `forward` is `mapping` then `synthesis`."""

    def __init__(self, config: GeneratorConfig):
        super().__init__()
        self.config = config
        self.condition = ConditionNorm(config.c_dim, config.cond_norm)
        self.mapping_network = Mapping(config.z_dim)
        self.blocks = nn.ModuleList(Block(config, resolution) for resolution in config.resolutions)
        self.num_ws = sum(block.num_ws for block in self.blocks) + 1
        self.noise_size = sum(conv.resolution ** 2 for conv in self._convs())   # numbers of noise per image

    def _convs(self) -> list[ModulatedConv]:
        return [conv for block in self.blocks for conv in block.convs]

    def compute_in(self, dtype: torch.dtype | None, *, channels_last: bool) -> None:
        """Type of the convolutions (None: the weights', which stay float32 in any case), layout of features, gradients and kernels."""
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        for block in self.blocks:
            block.compute_dtype, block.memory_format = dtype, memory_format
        for conv in self._convs():
            conv.lay_out(memory_format)

    @torch.no_grad()
    def start_at_colour(self, colour: Tensor, contrast: float = 0.5) -> None:
        """Begin at the mean colour (3,) of real patches, in [-1, 1], with `contrast` times the published ToRGB weights."""
        self.blocks[0].to_rgb.bias.copy_(colour)
        for block in self.blocks:
            block.to_rgb.weight.mul_(contrast)

    def mapping(self, z: Tensor, c: Tensor, truncation_psi: float = 1.0) -> Tensor:
        """z (N, z_dim), prompt embeddings c (N, c_dim) -> w (N, num_ws, w_dim)."""
        w = self.mapping_network(z, self.condition(c), truncation_psi)
        return w[:, None].expand(-1, self.num_ws, -1)

    def synthesis(self, w: Tensor, noise_mode: NoiseMode = "random", noise: Tensor | None = None) -> Tensor:
        """w (N, num_ws, w_dim) -> images (N, 3, r, r). `noise` (N, noise_size) fixes what "random" draws."""
        if noise_mode not in get_args(NoiseMode):
            raise OptionError("--noise-mode", f"one of {', '.join(get_args(NoiseMode))}", noise_mode)
        if noise is None and noise_mode == "random":
            noise = torch.randn(len(w), self.noise_size, device=w.device, dtype=w.dtype)
        x = image = None
        row = offset = 0
        for block in self.blocks:
            values = []
            for conv in block.convs:
                own = noise[:, offset:offset + conv.resolution ** 2] if noise_mode == "random" else w
                values.append(conv.noise(noise_mode, own))
                offset += conv.resolution ** 2
            x, image = block(x, image, w[:, row:row + block.num_ws + 1], values)
            row += block.num_ws
        return image

    def forward(self, z: Tensor, c: Tensor, truncation_psi: float = 1.0, noise_mode: NoiseMode = "random",
                noise: Tensor | None = None) -> Tensor:
        return self.synthesis(self.mapping(z, c, truncation_psi), noise_mode, noise)
