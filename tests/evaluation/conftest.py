import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def rng():
    return np.random.default_rng(5)


@pytest.fixture
def write_images():
    """Write uint8 (N, H, W, 3) as numbered PNGs into a folder; returns it."""
    def write(folder, images, name="patch_{:03d}.png"):
        folder.mkdir(parents=True, exist_ok=True)
        for number, image in enumerate(images):
            Image.fromarray(image).save(folder / name.format(number))
        return folder
    return write


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory):
    """A weight file of torch-fidelity's Inception with seeded random tensors: real shapes, no download."""
    import torch
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    folder = tmp_path_factory.mktemp("inception")
    torch.save({}, folder / "none.pth")
    keep = FeatureExtractorInceptionV3.load_state_dict
    FeatureExtractorInceptionV3.load_state_dict = lambda self, *_, **__: None      # build it without its weights
    try:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            extractor = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"],
                                                    feature_extractor_weights_path=str(folder / "none.pth"))
    finally:
        FeatureExtractorInceptionV3.load_state_dict = keep
    generator = torch.Generator().manual_seed(2)
    tensors = extractor.state_dict()
    for name, tensor in tensors.items():
        if name.endswith("conv.weight"):       # He's deviation keeps the signal alive through all layers
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * (2 / tensor[0].numel()) ** 0.5)
    torch.save(tensors, folder / "inception.pth")
    return folder / "inception.pth"
