"""The packed cache: the same patches as without it, built once, never stale, never half, whoever else asks for it."""
import multiprocessing
import os
import pickle
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from paired_samples import two_samples, write_sample
from PIL import Image
from torch.utils.data import DataLoader

from preprocessing.errors import InputError, OptionError
from preprocessing.expression import read_expression, write_expression
from training import patch_cache, patch_images
from training.augment import AugmentConfig
from training.clip_config import clip_config
from training.clip_pairs import Pairs, whole_batch
from training.data import ImageGeneDataset
from training.loading import in_order
from training.patch_cache import FOLDER, PatchRows


def pack(samples, cache, px=None, **options):
    return ImageGeneDataset(samples, **options).open_patches(px, progress=False, cache_dir=cache)


def arrays(cache):
    return sorted(cache.glob("*.npy"))


def built(monkeypatch):
    """Counts how often a cache is built from now on."""
    calls, build = [], patch_cache._build
    monkeypatch.setattr(patch_cache, "_build", lambda *arguments: (calls.append(1), build(*arguments)))
    return calls


# ---- the same patches ----

@pytest.mark.parametrize("px", [None, 4, 16])
def test_the_cache_holds_what_is_read_without_it_and_is_built_once(tmp_path, monkeypatch, px):
    samples, calls = two_samples(tmp_path), built(monkeypatch)
    without = ImageGeneDataset(samples).load_images(px, progress=False)
    for _ in range(2):
        images = ImageGeneDataset(samples).load_images(px, progress=False, cache_dir=tmp_path / "cache")
        assert torch.equal(images, without) and images.dtype == torch.uint8
    assert len(calls) == 1 and len(arrays(tmp_path / "cache")) == 1


def test_the_tensor_shares_the_pages_of_the_file_and_writing_to_it_leaves_the_file_alone(tmp_path):
    sample = write_sample(tmp_path / "S1", "S1")
    images = pack([sample], tmp_path / "cache").array
    mapped = [line for line in open("/proc/self/maps") if str(arrays(tmp_path / "cache")[0]) in line]
    address = images.data_ptr()
    assert any(int(line.split("-")[0], 16) <= address < int(line.split("-")[1].split()[0], 16) for line in mapped)
    images[:] = 1
    assert torch.equal(pack([sample], tmp_path / "cache").array, ImageGeneDataset([sample]).load_images(progress=False))


def test_a_small_set_is_read_into_memory_and_a_large_one_is_kept_beside_its_images(tmp_path, monkeypatch):
    samples = two_samples(tmp_path)
    pack(samples, "auto")
    assert not (tmp_path / "one" / FOLDER).exists()
    monkeypatch.setattr(patch_images, "WORTH_KEEPING_MIB", 0)
    pack(samples, "auto")
    assert len(arrays(tmp_path / "one" / FOLDER)) == 1 and not (tmp_path / "two" / FOLDER).exists()


def test_rows_of_rows_are_the_rows_they_name_and_copy_nothing():
    images = torch.arange(5 * 3, dtype=torch.uint8).view(5, 3, 1, 1)
    some = PatchRows(images).subset(np.array([4, 2, 0])).subset(np.array([2, 1]))
    assert len(some) == 2 and some[torch.tensor([0, 1])][:, 0, 0, 0].tolist() == [0, 6] and some[1][0].item() == 6
    assert some.array.data_ptr() == images.data_ptr()


# ---- never stale ----

def repaint(path, level):
    """Another patch under the same name, of the same number of bytes."""
    before = path.stat()
    Image.fromarray(np.full((8, 8, 3), level, np.uint8)).save(path)
    content = path.read_bytes()
    assert len(content) <= before.st_size
    path.write_bytes(content + b"\0" * (before.st_size - len(content)))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))


def test_a_patch_replaced_by_one_of_equal_size_is_never_served_from_the_old_cache(tmp_path, capsys):
    sample, cache = write_sample(tmp_path / "S1", "S1"), tmp_path / "cache"
    Image.fromarray(np.full((8, 8, 3), 100, np.uint8)).save(sample.images / "patch_3.png", compress_level=0)
    pack([sample], cache)
    old = arrays(cache)
    copies = [Path(f"{old[0]}.keep"), old[0].with_suffix(".tmp.mine")]
    for copy in copies:
        copy.mkdir()
    repaint(sample.images / "patch_3.png", 201)
    images = ImageGeneDataset([sample]).load_images(cache_dir=cache)
    assert (images[3] == 201).all() and len(arrays(cache)) == 1 and arrays(cache) != old and all(copy.exists() for copy in copies)
    assert f"removed {old[0]}: a patch, the order of the spots or the version of Pillow has changed since" in capsys.readouterr().err


def test_an_hdf5_file_written_anew_is_read_anew(tmp_path):
    cache = tmp_path / "cache"
    first = pack([write_sample(tmp_path / "S1", "S1", "imgs.h5")], cache).array.clone()
    other = write_sample(tmp_path / "S2", "S1", "imgs.h5", level=5)
    (tmp_path / "S1" / "imgs.h5").write_bytes((tmp_path / "S2" / "imgs.h5").read_bytes())
    second = pack([type(other)("S1", tmp_path / "S1" / "imgs.h5", tmp_path / "S1" / "gex_filt.h5ad")], cache).array
    assert (second == first + 5).all() and len(arrays(cache)) == 1


def test_rows_in_another_order_make_another_cache_that_replaces_the_first(tmp_path):
    sample, cache = write_sample(tmp_path / "S1", "S1"), tmp_path / "cache"
    first, name = pack([sample], cache).array.clone(), arrays(cache)
    write_expression(sample.gex, read_expression(sample.gex)[::-1].copy())
    assert torch.equal(pack([sample], cache).array, first.flip(0))
    assert len(arrays(cache)) == 1 and arrays(cache) != name


def test_another_size_another_way_of_resizing_and_another_sample_each_keep_a_cache_of_their_own(tmp_path, capsys):
    one, two = two_samples(tmp_path)
    cache = tmp_path / "cache"
    for samples, options in (([one], {}), ([one], {"image_px": 4}), ([one], {"image_px": 8}), ([two], {}), ([one, two], {})):
        pack(samples, cache, **options)                    # the patches' own 8 px, and resized to 8 px: the same pixels, told apart
    kept = arrays(cache)
    assert len(kept) == 5 and "removed" not in capsys.readouterr().err
    repaint(one.images / "patch_3.png", 0)
    pack([one], cache)
    assert len(arrays(cache)) == 5 and len(set(kept) & set(arrays(cache))) == 4


def test_another_version_of_the_resizing_program_replaces_the_cache(tmp_path, monkeypatch, capsys):
    sample, cache = write_sample(tmp_path / "S1", "S1"), tmp_path / "cache"
    pack([sample], cache, image_px=4)
    old = arrays(cache)
    monkeypatch.setattr(patch_images.PIL, "__version__", "0.0")
    ImageGeneDataset([sample], image_px=4).open_patches(cache_dir=cache)
    assert len(arrays(cache)) == 1 and arrays(cache) != old and "version of Pillow has changed" in capsys.readouterr().err


# ---- one for every subset ----

def test_every_seed_and_size_of_a_subset_maps_the_one_file(tmp_path, monkeypatch):
    samples, cache, calls = two_samples(tmp_path), tmp_path / "cache", built(monkeypatch)
    for options in ({"max_size": 6}, {"max_size": 6, "seed": 1}, {"max_size": 13, "image_px": 8}, {"max_size": 5, "seed": 2, "image_px": 8},
                    {}):
        dataset = ImageGeneDataset(samples, **options)
        patches, without = dataset.open_patches(progress=False, cache_dir=cache), dataset.load_images(progress=False)
        assert torch.equal(patches[torch.arange(len(patches))], without) and len(without) == options.get("max_size", 20)
        assert torch.equal(dataset.load_images(progress=False, cache_dir=cache), without) and patches.source in arrays(cache)
    assert len(calls) == len(arrays(cache)) == 2                              # as they are, and resized


def test_a_subset_is_kept_beside_the_images_once_it_is_large_itself(tmp_path, monkeypatch):
    sample = write_sample(tmp_path / "S1", "S1")
    monkeypatch.setattr(patch_images, "MIB", 6 * 3 * 8 * 8)
    monkeypatch.setattr(patch_images, "WORTH_KEEPING_MIB", 1)
    pack([sample], "auto", max_size=5)
    assert not (tmp_path / "S1" / FOLDER).exists()
    assert len(pack([sample], "auto", max_size=6)) == 6 and len(arrays(tmp_path / "S1" / FOLDER)) == 1


@pytest.mark.parametrize("said", [None, "none", "None", "NONE", "null", " Null ", ""])
def test_no_cache_is_said_in_any_of_these_words_to_either_training(said):
    assert patch_cache.cache_place(said) is None
    config = clip_config({"data": {"cache_dir": said}, "image": {"cache_dir": said}})
    assert config.data.cache_dir is None and config.data.patch_cache(Path) is None and config.image.cache_dir is None


def test_auto_and_folders_are_kept_as_they_are_said():
    assert [patch_cache.cache_place(said) for said in ("auto", "AUTO", "nonesuch", "/x/None")] == ["auto", "auto", "nonesuch", "/x/None"]
    with pytest.raises(OptionError, match="image.cache_dir: expected a folder, or none; found auto"):
        clip_config({"image": {"cache_dir": "auto"}})


def test_a_moved_sample_keeps_its_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(patch_images, "WORTH_KEEPING_MIB", 0)
    sample = write_sample(tmp_path / "S1", "S1")
    pack([sample], "auto")
    calls = built(monkeypatch)
    (tmp_path / "S1").rename(tmp_path / "S2")
    pack([type(sample)("S1", tmp_path / "S2" / "patches", tmp_path / "S2" / "gex_filt.h5ad")], "auto")
    assert not calls


# ---- never half ----

def truncate(path):
    with open(path, "r+b") as stream:
        stream.truncate(path.stat().st_size - 100)


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 255
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [
    truncate, flip_a_byte, lambda path: path.write_bytes(b""), lambda path: path.unlink(),
    lambda path: path.with_suffix(".json").unlink(), lambda path: path.with_suffix(".json").write_text("[1]"),
    lambda path: path.with_suffix(".json").write_text("{"),
], ids=["truncated", "a byte flipped", "emptied", "gone", "without its JSON", "with a foreign JSON", "with half a JSON"])
def test_a_damaged_cache_is_built_again(tmp_path, damage):
    sample, cache = write_sample(tmp_path / "S1", "S1"), tmp_path / "cache"
    expected = ImageGeneDataset([sample]).load_images(progress=False)
    pack([sample], cache)
    damage(arrays(cache)[0])
    assert torch.equal(pack([sample], cache).array, expected)


def test_of_a_large_cache_blocks_from_end_to_end_are_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(patch_cache, "MIB", 16)
    monkeypatch.setattr(patch_cache, "CHECKED_MIB", 5)
    path = tmp_path / "x"
    path.write_bytes(bytes(16 * 20 + 3))
    whole, differs = patch_cache.spread_sha256(path), []
    for place in (0, 16 * 10, 16 * 20 + 2, 16 * 2):          # first block, middle, last, one that is not looked at
        content = bytearray(16 * 20 + 3)
        content[place] = 1
        path.write_bytes(content)
        differs.append(patch_cache.spread_sha256(path) != whole)
    assert differs == [True, True, True, False]


def test_a_patch_that_cannot_be_packed_leaves_nothing(tmp_path):
    sample, cache = write_sample(tmp_path / "S1", "S1"), tmp_path / "cache"
    (sample.images / "patch_7.png").write_bytes(b"\x89PNG")
    with pytest.raises(InputError, match="patch_7.png: image: expected an image file that can be decoded"):
        pack([sample], cache)
    assert [path.name for path in cache.iterdir() if not path.name.endswith(".lock")] == []


def slow_pack(samples, cache, pause_s, results):
    """In a process of its own: builds with a pause between patches; reports how many it read, and the sum of what it got."""
    reads, read = [], ImageGeneDataset._read

    def paused(self, path, row, image_px):
        reads.append(path)
        time.sleep(pause_s)
        return read(self, path, row, image_px)

    ImageGeneDataset._read = paused
    images = pack(samples, cache).array
    results.put((len(reads), int(images.sum())))


def test_two_processes_at_once_build_it_once_and_see_the_same(tmp_path):
    samples, cache, context = [write_sample(tmp_path / "S1", "S1")], tmp_path / "cache", multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=slow_pack, args=(samples, cache, 0.3, results)) for _ in range(2)]
    for process in processes:
        process.start()
    found = sorted(results.get(timeout=120) for _ in processes)
    for process in processes:
        process.join()
    total = int(ImageGeneDataset(samples).load_images(progress=False).sum())
    assert found == [(1, total), (11, total)] and len(arrays(cache)) == 1       # both look at the first patch; one packs all ten


def test_a_killed_build_leaves_nothing_that_counts_and_what_it_left_is_removed(tmp_path):
    samples, cache, context = [write_sample(tmp_path / "S1", "S1")], tmp_path / "cache", multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=slow_pack, args=(samples, cache, 0.5, results))
    process.start()
    deadline = time.monotonic() + 120
    while process.is_alive() and not list(cache.glob("*.npy.tmp.*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert list(cache.glob("*.npy.tmp.*")) and not arrays(cache) and not list(cache.glob("*.json"))
    assert torch.equal(pack(samples, cache).array, ImageGeneDataset(samples).load_images(progress=False))
    assert not list(cache.glob("*.tmp.*")) and len(arrays(cache)) == 1


# ---- places that cannot be written ----

def test_where_the_default_place_cannot_be_written_patches_are_read_into_memory_with_a_notice(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(patch_images, "WORTH_KEEPING_MIB", 0)
    sample = write_sample(tmp_path / "S1", "S1")
    (tmp_path / "S1" / FOLDER).write_text("no folder")
    images = pack([sample], "auto").array
    assert torch.equal(images, ImageGeneDataset([sample]).load_images(progress=False))
    assert f"no packed patches in {tmp_path / 'S1' / FOLDER}" in capsys.readouterr().err


def test_a_full_disk_is_said_before_anything_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(patch_images, "WORTH_KEEPING_MIB", 0)
    sample = write_sample(tmp_path / "S1", "S1")
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("usage", (), {"free": 100}))
    assert len(pack([sample], "auto")) == 10 and "0.0 GB are free" in capsys.readouterr().err
    with pytest.raises(OSError, match="0.0 GB are free"):
        pack([sample], tmp_path / "named")


def test_a_finished_cache_is_used_where_nothing_can_be_written(tmp_path, monkeypatch):
    sample, cache = write_sample(tmp_path / "S1", "S1"), tmp_path / "cache"
    first = pack([sample], cache).array

    def refuse(*_):
        raise PermissionError(13, "read-only")

    monkeypatch.setattr(patch_cache, "locked", refuse)
    assert torch.equal(pack([sample], cache).array, first)
    with pytest.raises(PermissionError):
        pack([sample], cache, px=4)


# ---- workers ----

def batches_of(pairs, workers, start=None):
    keys = [[(step, row) for row in np.random.default_rng(step).permutation(len(pairs))[:4].tolist()] for step in range(6)]
    loader = DataLoader(pairs, batch_sampler=keys, collate_fn=whole_batch, num_workers=workers, multiprocessing_context=start)
    return keys, list(loader)


@pytest.mark.parametrize("start, workers", [("fork", 2), ("spawn", 1)])
@pytest.mark.parametrize("source", ["memory", "cache"])
def test_augmented_batches_are_the_same_from_any_number_of_workers(tmp_path, source, start, workers):
    dataset = ImageGeneDataset(two_samples(tmp_path))
    images = dataset.open_patches(progress=False, cache_dir=tmp_path / "cache" if source == "cache" else None)
    rows = np.arange(19, 1, -1)
    pairs = Pairs(dataset.expression[rows], dataset.barcodes[rows], dataset.sample_ids[rows], images.subset(rows), np.zeros(18, int),
                  augment=AugmentConfig(rotate=True), seed=3)
    keys, alone = batches_of(pairs, 0)
    threads = [list(in_order(keys, pairs.__getitems__, count)) for count in (0, 1, 2)]
    for ours in (batches_of(pairs, workers, start)[1], *threads):
        assert len(ours) == len(alone) == 6
        assert all(torch.equal(a, b) for one, other in zip(ours, alone, strict=True) for a, b in zip(one[:3], other[:3], strict=True))


@pytest.mark.parametrize("start", ["fork", "spawn"])
@pytest.mark.parametrize("images", ["patches", "imgs.h5"])
def test_files_opened_before_workers_start_give_the_values_of_one_process(tmp_path, images, start):
    dataset = ImageGeneDataset([write_sample(tmp_path / "S1", "S1", images)])
    alone = torch.stack([dataset[i][0] for i in range(10)])
    loaded = torch.cat([batch for batch, _ in DataLoader(dataset, 3, num_workers=2, multiprocessing_context=start)])
    assert torch.equal(loaded, alone)


def test_a_worker_is_sent_the_path_of_a_cache_and_not_its_patches(tmp_path):
    patches = pack([write_sample(tmp_path / "S1", "S1")], tmp_path / "cache").subset(np.array([7, 1]))
    sent = pickle.dumps(patches)
    again = pickle.loads(sent)
    assert arrays(tmp_path / "cache")[0].name.encode() in sent and torch.equal(again[torch.tensor([0, 1])], patches[torch.tensor([0, 1])])


def test_batches_loaded_ahead_keep_their_order_their_errors_and_a_bound():
    asked = []

    def load(key):
        asked.append(key)
        time.sleep(0.01 * (key % 3))
        if key == 7:
            raise ValueError("seven")
        return key

    for workers in (0, 1, 2):
        asked.clear()
        batches, seen = in_order(range(100), load, workers), []
        with pytest.raises(ValueError, match="seven"):
            for batch in batches:
                seen.append(batch)
                assert max(asked) - batch <= 2 * workers + 1
        assert seen == list(range(7)) and len(asked) <= 8 + 2 * workers
