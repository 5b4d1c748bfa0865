"""Building blocks of the networks. The two functions that convert image ranges live here and nowhere else."""
from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from preprocessing.errors import OptionError

CondNormKind = Literal["l2", "scaled", "standardize"]


def images_to_float(images: Tensor) -> Tensor:
    """uint8 (N, 3, H, W) in 0..255 -> float32 in [-1, 1]."""
    return images.to(torch.float32) / 127.5 - 1


def images_to_uint8(images: Tensor) -> Tensor:
    """float (N, 3, H, W), nominally in [-1, 1] -> uint8; values outside are clamped."""
    return (images * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def lrelu(x: Tensor, gain: float = 2 ** 0.5) -> Tensor:
    """Leaky ReLU, slope 0.2, times `gain` (sqrt 2 keeps unit variance)."""
    y = F.leaky_relu(x, 0.2)
    return y if gain == 1 else y * gain


def recomputed(function: Callable[..., Tensor], *arguments: Tensor | None) -> Tensor:
    """`function(*arguments)`, of which autograd keeps the arguments alone: what lies between is computed again in the backward pass,
    up to the last thing that pass needs. For elementwise work, and for what goes into a convolution: most of the memory for little time.
    A compiler decides for itself what to keep."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


class EqualizedLinear(nn.Module):
    """FC whose weights are kept at unit scale: W ~ N(0, weight_init / lr_mult), used as W * lr_mult / sqrt(fan_in)."""

    def __init__(self, width_in: int, width_out: int, bias_init: float = 0.0, weight_init: float = 1.0, lr_mult: float = 1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width_out, width_in) * (weight_init / lr_mult))
        self.bias = nn.Parameter(torch.full((width_out,), bias_init / lr_mult))
        self.weight_gain, self.bias_gain = lr_mult / width_in ** 0.5, lr_mult

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.weight_gain, self.bias * self.bias_gain)


class SecondOrderStyle(nn.Module):
    """Style of a layer, second order in w: [m1, m2, m3] = FC(w), s = m1 * m2 + m3. (N, w_dim) -> (N, C)."""

    def __init__(self, w_dim: int, channels: int):
        super().__init__()
        self.affine = EqualizedLinear(w_dim, 3 * channels, bias_init=1.0)

    def forward(self, w: Tensor) -> Tensor:
        first, second, third = self.affine(w).chunk(3, dim=1)
        return torch.addcmul(third, first, second)


class ConditionNorm(nn.Module):
    """Bring prompt embeddings to a known scale with statistics of the training prompts, kept as buffers.

    l2: each row to unit norm, as CLIP gives it. scaled: times one number, so that the second moment over all entries is 1.
    standardize: minus the mean prompt, then times one number, so that what differs between prompts has unit second moment;
    one number and not one per entry, so that entries that carry only noise stay small.
    """

    def __init__(self, c_dim: int, kind: CondNormKind = "standardize"):
        super().__init__()
        if kind not in get_args(CondNormKind):
            raise OptionError("--cond-norm", f"one of {', '.join(get_args(CondNormKind))}", kind)
        self.kind = kind
        self.register_buffer("mean", torch.zeros(c_dim))
        self.register_buffer("scale", torch.ones(()))

    @torch.no_grad()
    def fit(self, prompts: Tensor) -> None:
        """Take the statistics from the training prompts (N, c_dim)."""
        if self.kind == "l2" or not prompts.shape[1]:
            return
        if self.kind == "standardize":
            self.mean.copy_(prompts.mean(dim=0))
        self.scale.copy_((prompts - self.mean).square().mean().clamp_min(1e-12).rsqrt())

    def forward(self, c: Tensor) -> Tensor:
        return F.normalize(c, dim=1) if self.kind == "l2" else (c - self.mean) * self.scale


def _fir_pass(x: Tensor, dim: int) -> Tensor:
    """One axis of FIR [1, 3, 3, 1] / 8 without padding, as three sums of neighbours: (1, 1) * (1, 1) * (1, 1)."""
    for _ in range(3):
        n = x.shape[dim] - 1
        x = x.narrow(dim, 0, n) + x.narrow(dim, 1, n)
    return x


class _Fir(torch.autograd.Function):
    """FIR outer([1, 3, 3, 1]) / 64 * 4 without padding, (N, C, n, n) -> (N, C, n - 3, n - 3).

    As it is symmetric its gradient is the same filter over the padded gradient. Autograd's own, of sums of slices, would fill six
    maps with zeros, in NCHW whatever the features' layout.
    """

    @staticmethod
    def forward(context, x: Tensor) -> Tensor:
        return _fir_pass(_fir_pass(x, 3), 2) / 16      # (8 x 8) of the FIR over its gain of 4

    @staticmethod
    def backward(context, gradient: Tensor) -> Tensor:
        return _Fir.apply(F.pad(gradient, (3, 3, 3, 3)))


class _InLayout(torch.autograd.Function):
    """x (N, C, H, W) in a memory format, and its gradient in the same."""

    @staticmethod
    def forward(context, x: Tensor, memory_format: torch.memory_format) -> Tensor:
        context.memory_format = memory_format
        return x.contiguous(memory_format=memory_format).view_as(x)     # of what already is so a view: autograd must not get x itself

    @staticmethod
    def backward(context, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.contiguous(memory_format=context.memory_format), None


def normalise_groups(norm: nn.GroupNorm, x: Tensor, memory_format: torch.memory_format) -> Tensor:
    """GroupNorm of x (N, C, H, W), in the type of the norm's weights.

    On a GPU PyTorch's takes and returns NCHW, forward and back, and every operation after it would go on so: features that are to be
    channels-last, and their gradient, are brought back at once.
    """
    dtype = norm.weight.dtype
    if memory_format != torch.channels_last:
        return norm(x.to(dtype))
    x = _InLayout.apply(x, memory_format)                                # for the gradient
    return _InLayout.apply(norm(x.to(dtype, memory_format=torch.contiguous_format)), memory_format)


def upsample_image(x: Tensor) -> Tensor:
    """Double an image: zero-insert, pad (2, 1), FIR outer([1, 3, 3, 1]) / 64 * 4, written as its two phases per axis.

    (N, C, H, W) -> (N, C, 2H, 2W). Even rows are (x[i-1] + 3 x[i]) / 4, odd ones (3 x[i] + x[i+1]) / 4; zero outside.
    """
    for dim in (2, 3):
        padding = (0, 0, 1, 1) if dim == 2 else (1, 1)
        padded, n = F.pad(x, padding), x.shape[dim]
        before, after = padded.narrow(dim, 0, n), padded.narrow(dim, 2, n)
        x = torch.stack((x * 0.75 + before * 0.25, x * 0.75 + after * 0.25), dim=dim + 1).flatten(dim, dim + 1)
    return x


def upsample_conv(x: Tensor, weight: Tensor) -> Tensor:
    """3x3 convolution that doubles the side: transposed with stride 2 (n -> 2n + 1), zero pad 1, FIR -> 2n.

    Equal, borders included, to zero-insert x2, pad (3, 2), FIR, valid 3x3 convolution (tests/networks/test_generator.py).
    x (N, I, n, n), weight (O, I, 3, 3) -> (N, O, 2n, 2n).
    """
    y = F.conv_transpose2d(x, weight.flip(2, 3).transpose(0, 1), stride=2)
    y = F.pad(y, (1, 1, 1, 1))
    return _Fir.apply(y)
