"""The GAN's formulas written down straightforwardly: what `benchmarks/gan.py` measures ours against.

Modulation is one convolution a sample, all of a batch in one grouped call; the FIR is a depthwise convolution; tensors are float32 and
contiguous NCHW; generator, backbone and prompt encoder run anew wherever their output is used. Weights are those of ours, under the
same names, and so are the results, but for rounding (tests/test_gan_benchmark.py). The frozen networks are the same modules.
"""
from __future__ import annotations

from dataclasses import replace
from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.generator import Generator
from networks.synthesis_layers import RGB_CLAMP, ModulatedConv, NoiseMode, ToRGB
from training.gan_draws import G_PHASE, Draws
from training.gan_parts import Part, Step
from training.gan_step import GanStep

TAPS = torch.tensor([1.0, 3.0, 3.0, 1.0])


def fir(x: Tensor) -> Tensor:
    """Valid convolution of every channel with outer([1, 3, 3, 1]) / 64 * 4."""
    kernel = (torch.outer(TAPS, TAPS) / 64 * 4).to(x)
    return F.conv2d(x, kernel.expand(x.shape[1], 1, 4, 4), groups=x.shape[1])


def upsample(x: Tensor) -> Tensor:
    """Zero-insert, pad (2, 1), FIR: (N, C, n, n) -> (N, C, 2n, 2n)."""
    n, channels, height, width = x.shape
    inserted = x.new_zeros(n, channels, 2 * height, 2 * width)
    inserted[:, :, ::2, ::2] = x
    return fir(F.pad(inserted, (2, 1, 2, 1)))


def per_sample_conv(x: Tensor, weight: Tensor, *, up: bool = False) -> Tensor:
    """x (N, I, n, n) with a kernel a sample, weight (N, O, I, k, k), in one grouped convolution; `up` doubles the side."""
    n, width_out, width_in, side, _ = weight.shape
    x = x.reshape(1, n * width_in, *x.shape[2:])
    if up:
        kernel = weight.flip(3, 4).transpose(1, 2).reshape(n * width_in, width_out, side, side)
        y = fir(F.pad(F.conv_transpose2d(x, kernel, stride=2, groups=n), (1, 1, 1, 1)))
    else:
        y = F.conv2d(x, weight.reshape(n * width_out, width_in, side, side), padding=side // 2, groups=n)
    return y.view(n, width_out, *y.shape[2:])


def conv_layer(conv: ModulatedConv, x: Tensor, w: Tensor, noise: Tensor | None) -> Tensor:
    """gan.md's convolution layer: normalise, modulate and demodulate the kernel, convolve, noise, bias, lrelu, residual."""
    x = x if conv.norm is None else conv.norm(x)
    weight = conv.weight[None] * conv.style(w)[:, None, :, None, None]
    weight = weight * (weight.square().sum(dim=(2, 3, 4), keepdim=True) + 1e-8).rsqrt()
    y = per_sample_conv(x, weight, up=conv.up)
    y = y if noise is None else y + noise * conv.noise_strength
    y = F.leaky_relu(y + conv.bias[None, :, None, None], 0.2) * (sqrt(2) * conv.gain)
    y = y.clamp(-conv.CLAMP * conv.gain, conv.CLAMP * conv.gain)
    return y if conv.norm is None else sqrt(2) * (conv.gamma * y + x)


def rgb_layer(layer: ToRGB, x: Tensor, w: Tensor) -> Tensor:
    """Features -> colour by one 1x1 kernel a sample."""
    weight = layer.weight[None] * (layer.style(w) / sqrt(x.shape[1]))[:, None, :, None, None]
    return (per_sample_conv(x, weight) + layer.bias[None, :, None, None]).clamp(-RGB_CLAMP, RGB_CLAMP)


class PlainGenerator(Generator):
    """Our generator's weights, its synthesis written straightforwardly."""

    def synthesis(self, w: Tensor, noise_mode: NoiseMode = "random", noise: Tensor | None = None) -> Tensor:
        """As `Generator.synthesis`; "random" noise is given as `noise` (N, noise_size)."""
        styles, offset, image = iter(w.unbind(dim=1)), 0, None
        style, x = next(styles), None
        for block in self.blocks:
            if block.input is not None:
                x, style = block.input(style), next(styles)
            for conv in block.convs:
                pixels = conv.resolution ** 2
                values = noise[:, offset:offset + pixels] if noise_mode == "random" else w
                x, style, offset = conv_layer(conv, x, style, conv.noise(noise_mode, values)), next(styles), offset + pixels
            colour = rgb_layer(block.to_rgb, x, style)
            image = colour if image is None else upsample(image) + colour
        return image


class PlainStep(GanStep):
    """A step in two passes whose every prompt is embedded where it is used: four times a micro-batch, as the original does it."""

    encoder: nn.Module                # networks.clip.CLIP in evaluation mode, whose gene side embeds `data.expression`

    def _part(self, now: Step, start: int, draws: Draws, phase: int = G_PHASE) -> Part:
        part = super()._part(now, start, draws, phase)
        return replace(part, c=self._embed(part), asked=self._embed(part))

    @torch.no_grad()
    def _embed(self, part: Part) -> Tensor:
        return self.encoder.encode_genes(torch.from_numpy(self.data.expression[part.rows].toarray()).to(part.real))
