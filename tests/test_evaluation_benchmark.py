"""benchmarks/evaluation.py prints its parts at a small size; benchmarks/ordering.py says whether numbers stand in order."""
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp

from benchmarks.evaluation import attribution
from benchmarks.ordering import ORDER, Row, of_prompts, of_spots, scrambled
from evaluation.sections import Generated, Section

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_memory_is_measured_in_a_process_of_its_own():
    done = subprocess.run([sys.executable, "-m", "benchmarks.evaluation", *"--parts memory --memory-images 16 --px 16 --threads 1".split()],
                          cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    count, seconds, megabytes = done.stdout.splitlines()[-1].split()
    assert count == "16" and float(seconds) > 0 and float(megabytes) > 100


@pytest.mark.parametrize("method", ["ig", "sg"])
def test_attributions_of_every_ordered_pair_are_timed(method):
    found = attribution(30, 2, method)
    assert found["pairs"] == 2 and found["pairs_per_s"] > 0 and found["delta"] < 0.01


@pytest.mark.parametrize(("values", "said"), [
    ((5, 4, 3, 2, 1), "yes"), ((5, 4, 4.5, 2, 1), "no: poor above good"), ((5, 4, 3, 1, 1.01), "no: noise above shuffled"),
], ids=["in order", "poor before good", "noise before shuffled"])
def test_an_order_is_held_or_its_first_break_is_named(values, said):
    assert Row("clusters: log-likelihood", dict(zip(ORDER, values, strict=True))).ordered(0.05) == said
    backwards = Row("Frechet distance", dict(zip(ORDER, (-value for value in values), strict=True)), smaller_is_better=True)
    assert backwards.ordered(0.05) == said


def test_what_sees_pairing_alone_holds_shuffled_and_noise_level():
    assert Row("expression read-out: Pearson", dict(zip(ORDER, (0.8, 0.6, 0.3, 0.0, 0.02), strict=True))).ordered(0.05) == "yes"
    assert Row("expression read-out: Pearson", dict(zip(ORDER, (0.8, 0.6, 0.3, 0.0, 0.2), strict=True))).ordered(0.05) != "yes"


def test_fewer_spots_keep_their_patches_and_noise_has_the_colours_of_the_real_ones():
    images = np.arange(6, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    genes = sp.eye(6).tocsr()
    section = Section("S", list("abcdef"), images, genes, genes, np.array(list("xyxyxy")), np.arange(12.0).reshape(6, 2))
    fewer = of_spots(section, np.array([1, 4]))
    assert fewer.barcodes == ["b", "e"] and fewer.images[1, 0, 0, 0] == 4 and fewer.clusters.tolist() == ["y", "x"]
    made = of_prompts(Generated(np.array([0, 1, 4]), ["0", "1"], images[[0, 1, 4], None].repeat(2, axis=1)), np.array([1, 4]))
    assert made.rows.tolist() == [0, 1] and made.images.shape == (2, 1, 2, 2, 3) and made.images[1, 0, 0, 0, 0] == 4
    noise = scrambled(images, np.random.default_rng(0))
    assert noise.shape == images.shape and set(np.unique(noise)) <= set(range(6)) and (noise[0] != noise[0][0, 0]).any()
