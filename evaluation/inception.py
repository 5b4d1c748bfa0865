"""The Inception network of FID and KID: torch-fidelity's own extractor (2048 features, its own resize to 299 px).

Weights are looked for in the file the user names, then in the torch hub cache, then on the hub if it answers.
Nothing else is ever put in their place: a Frechet distance on other features is not an FID.
"""
from __future__ import annotations

import tempfile
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path

import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from networks.layers import images_to_uint8
from networks.weights import read_state_dict
from preprocessing.done_manifests import file_sha256
from preprocessing.errors import InputError, WeightsError
from preprocessing.outputs import finished_file

FILE_NAME = "weights-inception-2015-12-05-6726825d.pth"    # the digits open the SHA-256 of the file
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{FILE_NAME}"
TIMEOUT_S = 10
MIB = 1 << 20


class Inception(nn.Module):
    """float (N, 3, H, W) in [-1, 1] -> (N, 2048), as torch-fidelity computes it from the uint8 images."""

    name, width, input_px = "inception", 2048, 299

    def __init__(self, extractor: nn.Module, source: str):
        super().__init__()
        self.extractor, self.source = extractor, source      # source: SHA-256 of the weight file
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.extractor(images_to_uint8(images))[0]


def build_inception(weights: Path | str | None = None) -> Inception:
    """torch-fidelity's extractor with weights from a local file (see the module's docstring for where it looks)."""
    path = Path(weights) if weights is not None else cached_weights()
    if not path.is_file():
        raise InputError(path, "Inception weights", f"the file {FILE_NAME}", "nothing there", f"Fetch it once from {URL}")
    tensors = read_state_dict(path)                          # weights only: runs no code from the file
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "inception.pth"
        torch.save(tensors, plain)
        del tensors                                          # the extractor reads its own: not two at a time
        try:
            extractor = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(plain))
        except RuntimeError as error:                        # torch lists missing, unexpected and misshapen tensors
            raise WeightsError(path, "tensors", "those of torch-fidelity's Inception", " ".join(str(error).split())[:300]) from error
    return Inception(extractor, file_sha256(path))


def cached_weights() -> Path:
    """The weight file in the torch hub cache; fetched, aloud, if it is not there and the hub answers."""
    path = hub_path()
    if path.is_file():
        return path
    print(f"fetching {URL} to {path}")
    try:
        with urllib.request.urlopen(URL, timeout=TIMEOUT_S) as answer, \
                finished_file(path, validate=require_published_file) as temporary, open(temporary, "wb") as stream:
            while block := answer.read(MIB):
                stream.write(block)
    except (urllib.error.URLError, TimeoutError, ConnectionError, HTTPException) as error:      # the last: an answer cut short
        raise InputError(path, "Inception weights", "this file, or another place for it named by --weights",
                         f"nothing there, and no network ({getattr(error, 'reason', error)})",
                         f"Fetch {URL} elsewhere and put it there, or name another encoder with --features") from error
    return path


def hub_path() -> Path:
    """Where the weight file lies in the torch hub cache."""
    return Path(torch.hub.get_dir()) / "checkpoints" / FILE_NAME


def require_published_file(path: Path) -> None:
    digest = file_sha256(path)
    if not digest.startswith(FILE_NAME.removesuffix(".pth").rsplit("-", 1)[1]):
        raise WeightsError(path, "SHA-256", "6726825d...", digest[:8])


def write_random_weights(path: Path | str, seed: int = 0) -> None:
    """A weight file of the right shapes with seeded random tensors: for tests and timings, where no number is quoted from it."""
    keep = FeatureExtractorInceptionV3.load_state_dict
    FeatureExtractorInceptionV3.load_state_dict = lambda self, *_, **__: None      # build it without its weights
    try:
        with tempfile.TemporaryDirectory() as folder:
            torch.save({}, Path(folder) / "none.pth")
            extractor = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=f"{folder}/none.pth")
    finally:
        FeatureExtractorInceptionV3.load_state_dict = keep
    generator = torch.Generator().manual_seed(seed)
    tensors = extractor.state_dict()
    for name, tensor in tensors.items():
        if tensor.dim() > 1:                   # He's deviation keeps the signal alive through all layers
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * (2 / tensor[0].numel()) ** 0.5)
        elif name.endswith(("running_var", "bn.weight")):
            tensor.fill_(1)
        else:
            tensor.zero_()
    with finished_file(path) as temporary:
        torch.save(tensors, temporary)
