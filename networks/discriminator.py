"""Tell real from generated patches by what a frozen, pre-trained image encoder sees in them (projected discriminator).

Images (N, 3, H, W) in [-1, 1] and prompt embeddings (N, c_dim) -> logits (N, T): one per token of every feature map.
Only the heads are trained. ViT backbones give the tokens after blocks 2, 5, 8, 11 and after the position embedding, CLS (where there is
one) added to every patch token; convolutional ones give their maps at strides 4, 8, 16, 32, flattened, maps under 3 x 3 dropped.
Papers: Sauer et al., Projected GANs (2021), StyleGAN-T (2023).
"""
from __future__ import annotations

from math import log2, sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.layers import ConditionNorm, CondNormKind, EqualizedLinear
from preprocessing.errors import OptionError

GROUP = 8                       # samples that share batch statistics in a head
C_MAP = 64                      # width in which logits and prompt meet
VIT_BLOCKS = (2, 5, 8, 11)
MIN_MAP_PX = 3
STRIDES = (4, 8, 16, 32)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class SpectralConv1d(nn.Module):
    """1-d convolution divided by its largest singular value; `iterate` does one power iteration, once per optimiser step."""

    def __init__(self, width_in: int, width_out: int, kernel: int):
        super().__init__()
        conv = nn.Conv1d(width_in, width_out, kernel)   # PyTorch's own start, as in the published method
        self.weight, self.bias, self.padding = conv.weight, conv.bias, kernel // 2
        self.register_buffer("u", F.normalize(torch.randn(width_out), dim=0))
        self.register_buffer("v", F.normalize(torch.randn(width_in * kernel), dim=0))
        for _ in range(15):
            self.iterate()

    @torch.no_grad()
    def iterate(self) -> None:
        matrix = self.weight.flatten(1)
        self.v.copy_(F.normalize(matrix.T @ self.u, dim=0))
        self.u.copy_(F.normalize(matrix @ self.v, dim=0))

    def forward(self, x: Tensor) -> Tensor:
        sigma = self.u.clone() @ self.weight.flatten(1) @ self.v.clone()   # clones: the next iteration must not touch this graph
        if self.padding:
            x = F.pad(x, (self.padding, self.padding), mode="circular") if self.padding <= x.shape[2] else _wrap(x, self.padding)
        return F.conv1d(x, self.weight / sigma, self.bias)


def _wrap(x: Tensor, padding: int) -> Tensor:
    """Circular padding wider than the sequence, which PyTorch's own refuses."""
    index = torch.arange(-padding, x.shape[2] + padding, device=x.device) % x.shape[2]
    return x[:, :, index]


class BatchNormLocal(nn.Module):
    """Batch norm over groups of 8 contiguous samples and all their tokens; no running statistics, so micro-batches do not matter."""

    def __init__(self, width: int, eps: float = 1e-5):
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        if len(x) % GROUP:
            raise OptionError("--batch-gpu", f"a multiple of {GROUP} (batch norm works in groups of {GROUP})", str(len(x)))
        groups = x.unflatten(0, (-1, GROUP))                                      # (N / 8, 8, C, T)
        variance, mean = torch.var_mean(groups, dim=(1, 3), correction=0, keepdim=True)
        x = ((groups - mean) * (variance + self.eps).rsqrt()).flatten(0, 1)
        return torch.addcmul(self.bias[:, None], x, self.weight[:, None])


class Head(nn.Module):
    """Tokens (N, C, T) and prompts (N, c_dim) -> logits (N, T): logit_t = sum_k out_tk FC(c)_k / sqrt 64, out = SN conv1d k1 C -> 64.

    Unconditional (c_dim 0) there is no projection: logit_t = out_t, out = SN conv1d k1 C -> 1.
    `prompt_bias` 1 lets a head judge realism from the start; with centred prompts and 0 every prompt would have to teach it anew.
    """

    def __init__(self, width: int, c_dim: int, prompt_bias: float = 0.0):
        super().__init__()
        self.conv_in, self.norm_in = SpectralConv1d(width, width, 1), BatchNormLocal(width)
        self.conv_mid, self.norm_mid = SpectralConv1d(width, width, 9), BatchNormLocal(width)
        self.conv_out = SpectralConv1d(width, C_MAP if c_dim else 1, 1)
        self.prompt = EqualizedLinear(c_dim, C_MAP, bias_init=prompt_bias) if c_dim else None

    def judge(self, tokens: Tensor) -> Tensor:
        """What a head makes of the tokens before it sees a prompt: (N, 64, T)."""
        x = F.leaky_relu(self.norm_in(self.conv_in(tokens)), 0.2)
        x = (F.leaky_relu(self.norm_mid(self.conv_mid(x)), 0.2) + x) / sqrt(2)
        return self.conv_out(x)

    def project(self, judged: Tensor, c: Tensor) -> Tensor:
        """Logits of judged tokens (N, 64, T) for prompts (N, c_dim): (N, T); without prompts the judgement (N, 1, T) is the logit."""
        if self.prompt is None:
            return judged.squeeze(1)
        return torch.einsum("nkt,nk->nt", judged, self.prompt(c)) / sqrt(C_MAP)

    def forward(self, tokens: Tensor, c: Tensor) -> Tensor:
        return self.project(self.judge(tokens), c)


class FeatureTaps(nn.Module):
    """A frozen encoder body seen as images -> list of (N, C, T) token maps. The images are at the backbone's statistics already."""

    def __init__(self, body: nn.Module):
        super().__init__()
        self.body = body.to(memory_format=torch.channels_last)
        self.is_vit = hasattr(body, "patch_embed") and hasattr(body, "cls_token")
        self.has_class_token = getattr(body, "cls_token", None) is not None
        self.compute_dtype: torch.dtype | None = None     # of the body; None: the weights'. Token maps are of the images' type

    def forward(self, images: Tensor) -> list[Tensor]:
        if self.compute_dtype is None:
            return self._tokens(images)
        with torch.autocast(images.device.type, dtype=self.compute_dtype):
            return [x.to(images.dtype) for x in self._tokens(images)]

    def _tokens(self, images: Tensor) -> list[Tensor]:
        if self.is_vit:
            return self._vit_tokens(images)
        maps = self._maps(images.contiguous(memory_format=torch.channels_last))
        return [x.flatten(2) for x in maps if min(x.shape[2:]) >= MIN_MAP_PX]

    def _vit_tokens(self, images: Tensor) -> list[Tensor]:
        body = self.body
        x = body._pos_embed(body.patch_embed(images))
        taps = [x]
        x = body.norm_pre(x)
        for number, block in enumerate(body.blocks):
            x = block(x)
            if number in VIT_BLOCKS:
                taps.append(x)
        prefix = body.num_prefix_tokens
        return [(x[:, prefix:] + x[:, :1] if self.has_class_token else x[:, prefix:]).transpose(1, 2) for x in taps]

    def _maps(self, images: Tensor) -> list[Tensor]:
        """The deepest map of every stride in `STRIDES`, whatever stages the network has."""
        stages = list(self.body) if isinstance(self.body, nn.Sequential) else [
            nn.Sequential(self.body.conv_stem, self.body.bn1), *self.body.blocks]
        deepest, x = {}, images
        for stage in stages:
            x = stage(x)
            if x.dim() != 4 or x.shape[3] < MIN_MAP_PX:
                break
            deepest[2 ** round(log2(images.shape[3] / x.shape[3]))] = x
        return [deepest[stride] for stride in STRIDES if stride in deepest]


class Discriminator(nn.Module):
    """Frozen backbone + trained heads. `features` and `logits` are its two halves, so that a pass can be shared by two losses.

    encoder: of `networks.histo_models.build_encoder`. `input_px` is the side the backbone sees (0 = the image's own,
    for convolutional backbones); `statistics` is the backbone's "own" mean and deviation, or "imagenet" as the original has it.
    """

    def __init__(self, encoder: nn.Module, c_dim: int, img_resolution: int, *, cond_norm: CondNormKind = "l2", input_px: int = 0,
                 statistics: str = "own", prompt_bias: float = 0.0):
        super().__init__()
        self.taps = FeatureTaps(encoder.body).requires_grad_(False).eval()
        self.input_px = input_px or (encoder.input_px if self.taps.is_vit else img_resolution)
        self.condition = ConditionNorm(c_dim, cond_norm)
        mean, std = (encoder.mean, encoder.std) if statistics == "own" else (
            torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        self.register_buffer("mean", mean.clone(), persistent=False)
        self.register_buffer("std", std.clone(), persistent=False)
        maps = self._probe(encoder)
        if not maps:
            raise OptionError("--backbone", f"feature maps of at least {MIN_MAP_PX} x {MIN_MAP_PX}", f"none at {self.input_px} px")
        self.heads = nn.ModuleList(Head(x.shape[1], c_dim, prompt_bias) for x in maps)
        self.logits_per_image = sum(x.shape[2] for x in maps)

    @torch.no_grad()
    def _probe(self, encoder: nn.Module) -> list[Tensor]:
        """The maps of an empty image; refuses a body that is laid out otherwise than those whose maps we know."""
        try:
            return self.taps(torch.zeros(1, 3, self.input_px, self.input_px))
        except (AttributeError, TypeError, ValueError, RuntimeError, AssertionError) as error:   # foreign bodies fail in their own ways
            name, reason = getattr(encoder, "name", type(encoder.body).__name__), str(error).partition("\n")[0][:120]
            raise OptionError("--backbone", "a ViT, or a network of the EfficientNet or MobileNet family, at a side it takes",
                              f"{name} at {self.input_px} px ({reason})") from error

    def train(self, mode: bool = True) -> Discriminator:
        super().train(mode)
        self.taps.eval()   # the backbone keeps its running statistics
        return self

    def trainable_state(self) -> dict[str, Tensor]:
        """What a checkpoint holds: heads and condition statistics; the backbone is named by its hash."""
        return {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("taps.")}

    def features(self, images: Tensor, crops: Tensor | None = None) -> list[Tensor]:
        """Images in [-1, 1] -> token maps. `crops` (N, 3) uniform numbers: coin, x, y of a random crop of images wider than the input."""
        if images.shape[3] > self.input_px and crops is not None:
            images = torch.stack([self._random_crop(image, crop) for image, crop in zip(images, crops.tolist(), strict=True)])
        if images.shape[3] < self.input_px and not self.taps.is_vit:
            images = F.interpolate(images, (self.input_px, self.input_px), mode="bilinear", align_corners=False)
        elif images.shape[3] != self.input_px:
            images = F.interpolate(images, (self.input_px, self.input_px), mode="area")
        return self.taps(((images + 1) / 2 - self.mean) / self.std)

    def _random_crop(self, image: Tensor, crop: list[float]) -> Tensor:
        coin, x, y = crop
        if coin >= 0.5:
            return F.interpolate(image[None], (self.input_px, self.input_px), mode="area")[0]
        room = image.shape[2] - self.input_px + 1
        return image[:, int(y * room):int(y * room) + self.input_px, int(x * room):int(x * room) + self.input_px]

    def judge(self, features: list[Tensor]) -> list[Tensor]:
        """Token maps -> (N, 64, T) a head: all of it that no prompt changes, batch statistics included."""
        return [head.judge(x) for head, x in zip(self.heads, features, strict=True)]

    def project(self, judged: list[Tensor], c: Tensor) -> Tensor:
        """Logits (N, T) of judged maps for prompts (N, c_dim); other prompts for the same patches cost no more than this."""
        c = self.condition(c)
        return torch.cat([head.project(x, c) for head, x in zip(self.heads, judged, strict=True)], dim=1)

    def logits(self, features: list[Tensor], c: Tensor) -> Tensor:
        return self.project(self.judge(features), c)

    def forward(self, images: Tensor, c: Tensor, crops: Tensor | None = None) -> Tensor:
        return self.logits(self.features(images, crops), c)

    def update_spectral_norm(self) -> None:
        """One power iteration of every head's convolution; call once per optimiser step of the discriminator."""
        for module in self.heads.modules():
            if isinstance(module, SpectralConv1d):
                module.iterate()
