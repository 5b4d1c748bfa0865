"""StyleGAN-T's generator, conditioned on a prompt embedding: (z, c) -> image. Written from the published formulas.

Takes embeddings, never expression: the gene encoder is a separate part of a snapshot. Images are float (N, 3, r, r),
nominally in [-1, 1]. Convolutions are modulated without fusing: input times style, one shared weight, output times demodulation.
Paper: Sauer et al., StyleGAN-T (2023); second-order styles, Fourier input, GroupNorm residuals.
"""
from __future__ import annotations

from dataclasses import dataclass
from math import log2, pi, sqrt
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.layers import (
    ConditionNorm,
    CondNormKind,
    EqualizedLinear,
    SecondOrderStyle,
    lrelu,
    normalise_groups,
    recomputed,
    upsample_conv,
    upsample_image,
)
from preprocessing.errors import OptionError

FIRST_RESOLUTION = 8       # synthesis starts here, px
RGB_CLAMP = 256.0
NoiseMode = Literal["random", "const", "none"]


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


class FourierInput(nn.Module):
    """w -> (N, C, 8, 8): fixed random waves, shifted and turned by a transform that w chooses and the user may move."""

    SAMPLING_RATE, BANDWIDTH = 8, 2

    def __init__(self, w_dim: int, channels: int):
        super().__init__()
        rows = torch.randn(channels, 2)
        radius = rows.square().sum(dim=1, keepdim=True).sqrt()
        self.register_buffer("frequencies", rows / (radius * radius.square().exp() ** 0.25) * self.BANDWIDTH)
        self.register_buffer("phases", torch.rand(channels) - 0.5)
        self.register_buffer("user_transform", torch.eye(3))
        self.weight = nn.Parameter(torch.randn(channels, channels))
        self.affine = EqualizedLinear(w_dim, 4, weight_init=0.0)
        with torch.no_grad():
            self.affine.bias.copy_(torch.tensor([1.0, 0.0, 0.0, 0.0]))

    def forward(self, w: Tensor) -> Tensor:
        t = self.affine(w)
        t = t / t[:, :2].norm(dim=1, keepdim=True)
        cos, sin, dx, dy = t.unbind(dim=1)
        zero, one = torch.zeros_like(cos), torch.ones_like(cos)
        rotate = torch.stack((cos, -sin, zero, sin, cos, zero, zero, zero, one), dim=1).view(-1, 3, 3)
        shift = torch.stack((one, zero, -dx, zero, one, -dy, zero, zero, one), dim=1).view(-1, 3, 3)
        transform = rotate @ shift @ self.user_transform                              # (N, 3, 3)
        phases = self.phases + (self.frequencies @ transform[:, :2, 2:]).squeeze(2)   # (N, C)
        frequencies = self.frequencies @ transform[:, :2, :2]                         # (N, C, 2)
        half_rate = self.SAMPLING_RATE / 2
        amplitude = (1 - (frequencies.norm(dim=2) - self.BANDWIDTH) / (half_rate - self.BANDWIDTH)).clamp(0, 1)
        centres = (torch.arange(FIRST_RESOLUTION, device=w.device, dtype=w.dtype) + 0.5) / FIRST_RESOLUTION - 0.5
        wave = frequencies[:, :, 0, None, None] * centres + frequencies[:, :, 1, None, None] * centres[:, None]   # grid is (x, y)
        feature = amplitude[..., None, None] * torch.sin(2 * pi * (wave + phases[..., None, None]))
        return torch.einsum("nchw,oc->nohw", feature, self.weight / sqrt(self.weight.shape[0]))


class ModulatedConv(nn.Module):
    """3x3 convolution whose input channels are scaled by a style and whose output is brought back to unit variance.

    `residual`: the input is group-normalised first (which replaces it) and added to the result.
    """

    CLAMP = 256.0

    def __init__(self, width_in: int, width_out: int, w_dim: int, resolution: int, *, gain: float = 1.0, up: bool = False,
                 residual_groups: int = 0, noise_init: float = 0.0):
        super().__init__()
        self.resolution, self.gain, self.up = resolution, gain, up
        self.style = SecondOrderStyle(w_dim, width_in)
        self.weight = nn.Parameter(torch.randn(width_out, width_in, 3, 3))
        self.bias = nn.Parameter(torch.zeros(width_out))
        self.noise_strength = nn.Parameter(torch.tensor(float(noise_init)))
        self.register_buffer("noise_const", torch.randn(resolution, resolution))
        self.norm = nn.GroupNorm(residual_groups, width_in) if residual_groups else None
        self.gamma = nn.Parameter(torch.full((1, width_out, 1, 1), 1e-5)) if residual_groups else None
        self.memory_format = torch.contiguous_format      # of the features

    def lay_out(self, memory_format: torch.memory_format) -> None:
        """Expect features in this layout, and keep the weights in it: else they would be turned at every use."""
        self.memory_format = memory_format
        self.weight.data = self.weight.data.contiguous(memory_format=memory_format)

    def forward(self, x: Tensor, w: Tensor, noise: Tensor | None) -> Tensor:
        """x (N, I, n, n); noise broadcastable to (N, 1, r, r) or None."""
        dtype = x.dtype              # of the convolution; styles, statistics and the residual sum are of the weights'
        if self.norm is not None:
            x = normalise_groups(self.norm, x, self.memory_format)
        style = self.style(w)
        demodulation = (style.square() @ self.weight.square().sum(dim=(2, 3)).T + 1e-8).rsqrt()   # (N, O)
        y = recomputed(self._convolve, x, style.to(dtype))
        return recomputed(self._activate, x, y, demodulation.to(dtype), noise)

    def _convolve(self, x: Tensor, style: Tensor) -> Tensor:
        x, weight = x.to(style.dtype) * style[:, :, None, None], self.weight.to(style.dtype)
        return upsample_conv(x, weight) if self.up else F.conv2d(x, weight, padding=1)

    def _activate(self, x: Tensor, y: Tensor, demodulation: Tensor, noise: Tensor | None) -> Tensor:
        """What follows the convolution: demodulation, bias, noise, lrelu, residual sum with its input x."""
        dtype = y.dtype
        y = torch.addcmul(self.bias[:, None, None].to(dtype), y, demodulation[:, :, None, None])
        if noise is not None:
            y = torch.addcmul(y, noise.to(dtype), self.noise_strength.to(dtype))
        limit = self.CLAMP * self.gain
        y = lrelu(y, sqrt(2) * self.gain).clamp(-limit, limit)
        return y if self.norm is None else (sqrt(2) * torch.addcmul(x, y.to(x.dtype), self.gamma)).to(dtype)

    def noise(self, mode: NoiseMode, values: Tensor) -> Tensor | None:
        """The (·, 1, r, r) noise of this layer; `values` (N, r * r) are what mode "random" uses."""
        if mode == "none":
            return None
        return self.noise_const[None, None] if mode == "const" else values.view(-1, 1, self.resolution, self.resolution)


class ToRGB(nn.Module):
    """Features -> colour: style over sqrt(C), 1x1 convolution, no demodulation."""

    def __init__(self, channels: int, w_dim: int):
        super().__init__()
        self.style = SecondOrderStyle(w_dim, channels)
        self.weight = nn.Parameter(torch.randn(3, channels, 1, 1) * 0.1)
        self.bias = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        return recomputed(self._colour, x, self.style(w) / sqrt(x.shape[1]))

    def _colour(self, x: Tensor, style: Tensor) -> Tensor:
        return F.conv2d(x.to(style.dtype) * style[:, :, None, None], self.weight, self.bias).clamp(-RGB_CLAMP, RGB_CLAMP)


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
