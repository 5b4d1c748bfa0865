"""The layers a generator's pictures are drawn with, each under a style made of w: Fourier input, modulated convolution, features to colour.

Convolutions are modulated without fusing: input times style, one shared weight, output times demodulation.
Papers: Karras et al. 2020 (modulation), 2021 (Fourier input); Sauer et al., StyleGAN-T (2023; second-order styles, GroupNorm residuals).
"""
from __future__ import annotations

from math import pi, sqrt
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.layers import EqualizedLinear, SecondOrderStyle, lrelu, normalise_groups, recomputed, upsample_conv

FIRST_RESOLUTION = 8       # synthesis starts here, px
RGB_CLAMP = 256.0
NoiseMode = Literal["random", "const", "none"]


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
