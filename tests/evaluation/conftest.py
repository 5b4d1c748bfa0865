"""What the tests of evaluation share: a seeded generator, folders of numbered images, Inception's weights at random."""
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
    from evaluation.inception import write_random_weights

    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    write_random_weights(path)
    return path
