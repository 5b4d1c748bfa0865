"""Sampling in bulk: few batches in memory at a time, whatever is slow; PNG files that say what they were made of."""
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from networks.generator import Generator, GeneratorConfig
from preprocessing.errors import OptionError
from training import generation
from training.gan_draws import seeded_draws
from training.gan_grids import as_pictures, generate
from training.generated_pngs import carries_mark, encode_marked
from training.generation import MEET_EVERY
from training.sampling import Batch, newest_snapshot, sample_batches
from training.sampling_options import SamplingOptions
from training.sampling_ranks import Ranks, all_ranks


@pytest.fixture(scope="module")
def generator():
    torch.manual_seed(0)
    return Generator(GeneratorConfig(8, c_dim=4, cbase=64, cmax=8, res_blocks=1, noise_init=0.3)).eval()


def options(tmp_path, **changes):
    return SamplingOptions(network=tmp_path, outdir=tmp_path, **changes)


@pytest.mark.parametrize("noise_mode", ["random", "const", "none"])
def test_bulk_patches_are_those_a_training_run_shows_of_itself(generator, tmp_path, noise_mode):
    prompts, keys = torch.randn(7, 4), [(5, number) for number in range(7)]
    batches = [Batch(start, prompts[start:start + 3], keys[start:start + 3]) for start in range(0, 7, 3)]
    told = options(tmp_path, truncation=0.7, noise_mode=noise_mode)
    made = list(sample_batches(generator, batches, told, lambda number, pictures: (number, pictures), workers=2))
    assert [number for number, _ in made] == [0, 3, 6]
    expected = as_pictures(generate(generator, prompts, keys, 0.7, noise_mode, batch=3))
    assert all((a == b).all() for a, b in zip(sum((pictures for _, pictures in made), []), expected, strict=True))


def test_z_is_the_same_with_and_without_noise():
    keys = [(1, 2), (3, 4)]
    assert torch.equal(seeded_draws(keys, 64, 0)[0], seeded_draws(keys, 64, 500)[0])


def test_a_slow_disk_holds_the_generator_back(generator, tmp_path):
    asked, goes_on, n_saved = [], threading.Event(), 0

    def batches():
        for number in range(200):
            asked.append(number)
            yield Batch(number, torch.zeros(1, 4), [(0, number)])

    def save(number, _):
        goes_on.wait(10)
        return number

    threading.Timer(0.5, goes_on.set).start()
    for number in sample_batches(generator, batches(), options(tmp_path), save, workers=2):
        n_saved += 1
        assert len(asked) - n_saved <= 12 and number == n_saved - 1
    assert n_saved == 200


def test_a_failing_writer_ends_the_sampling(generator, tmp_path):
    def save(number, _):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        list(sample_batches(generator, (Batch(i, torch.zeros(1, 4), [(0, i)]) for i in range(50)), options(tmp_path), save, workers=2))


def test_a_marked_png_is_an_ordinary_png_that_knows_its_mark(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    path = tmp_path / "a.png"
    path.write_bytes(encode_marked(picture, "f00d"))
    image = Image.open(path)
    assert (np.asarray(image) == picture).all() and image.text == {"genes-to-morphology": "f00d"}
    assert carries_mark(path, "f00d") and not carries_mark(path, "f00") and not carries_mark(tmp_path / "none.png", "f00d")


def test_no_flipped_byte_and_no_cut_goes_unnoticed(tmp_path):
    whole = encode_marked(np.zeros((9, 9, 3), np.uint8), "f00d")
    path = tmp_path / "a.png"
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x41]) + whole[place + 1:])
        assert not carries_mark(path, "f00d"), place
        path.write_bytes(whole[:place])
        assert not carries_mark(path, "f00d"), place


def test_the_newest_snapshot_of_a_run_is_the_one_of_most_kimg(tmp_path):
    for name in ("snapshot-000009", "snapshot-000010", "snapshot-old", "checkpoint-000099"):
        (tmp_path / name).mkdir()
    assert newest_snapshot(tmp_path).name == "snapshot-000010"
    assert newest_snapshot(tmp_path / "snapshot-000009").name == "snapshot-000009"


def test_a_process_alone_is_the_first_of_one(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with all_ranks() as ranks:
        assert ranks == Ranks() and ranks.is_first and ranks.tell({"a": [1]}) == {"a": [1]} and ranks.workers(3) == 3


@pytest.mark.parametrize("n_missing", [0, 2, 3 * MEET_EVERY - 1, 3 * MEET_EVERY, 3 * MEET_EVERY + 1, 10 * MEET_EVERY])
def test_ranks_meet_equally_often_also_where_one_has_a_batch_more(monkeypatch, tmp_path, n_missing):
    monkeypatch.setattr(generation, "sample_batches", lambda _generator, batches, *_: batches)
    plan = SimpleNamespace(rows=lambda number: range(2), batch=lambda number: 2, options=SimpleNamespace(outdir=tmp_path))
    output, snapshot, met = SimpleNamespace(save=None, settle=lambda: None), SimpleNamespace(generator=None), []
    monkeypatch.setattr(Ranks, "wait", lambda ranks: met.append(ranks.rank))
    for rank in range(3):
        generation._make(plan, list(range(n_missing)), snapshot, output, Ranks(rank, 3), workers=1, progress=False)
    assert [met.count(rank) for rank in range(3)] == [2 + n_missing // (3 * MEET_EVERY)] * 3


@pytest.mark.parametrize("environment", [{"WORLD_SIZE": "two"}, {"WORLD_SIZE": "2", "RANK": "0"}], ids=str)
def test_an_environment_torchrun_did_not_set_is_a_usage_error(monkeypatch, environment):
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(OptionError, match="as torchrun sets them"), all_ranks():
        pass


def test_every_process_of_a_machine_takes_its_own_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert Ranks(3, 4, 1, 2).device(None) == "cuda:1" and Ranks(3, 4, 1, 2).device("cpu") == "cpu" and Ranks().device("cuda:1") == "cuda:1"
    with pytest.raises(OptionError, match="--device: expected cpu or cuda"):
        Ranks(0, 2, 0, 2).device("cuda:0")
    with pytest.raises(OptionError, match="at most the 2 GPUs of this machine; found 3"):
        Ranks(0, 3, 0, 3).device(None)
