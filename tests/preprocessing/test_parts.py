"""Blocks of a long step: kept for the same config and inputs, thrown away for others, and never half there."""
import io
import os
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from preprocessing.outputs import finished_file, finished_folder, finished_together, is_leftover, locked, only_writer
from preprocessing.parts import Parts


def parts(tmp_path, **changed):
    (tmp_path / "input").touch()
    return Parts(tmp_path / "imgs.h5", **{"config": {"stride": 5}, "inputs": {"slide": tmp_path / "input"}} | changed)


def test_a_block_comes_back_as_it_was(tmp_path):
    made = parts(tmp_path)
    made.write(0, rows=np.arange(3), names=np.arange(6, dtype=np.uint8).reshape(2, 3)[:, ::2])
    assert len(parts(tmp_path)) == 1
    block = parts(tmp_path).read(0)
    assert block["rows"].tolist() == [0, 1, 2] and block["names"].tolist() == [[0, 2], [3, 5]]
    assert list(parts(tmp_path).read(0, "rows")) == ["rows"]


def test_blocks_count_up_to_the_first_gap(tmp_path):
    made = parts(tmp_path)
    for number in (0, 1, 3):
        made.write(number, x=np.zeros(1))
    assert len(parts(tmp_path)) == 2 and len(list(parts(tmp_path).blocks("x"))) == 2
    assert [number for number in range(5) if number in parts(tmp_path)] == [0, 1, 3]      # made in any order


@pytest.mark.parametrize("change", ["config", "input", "no resume"])
def test_blocks_of_another_config_or_input_are_thrown_away(tmp_path, change):
    parts(tmp_path).write(0, x=np.zeros(1))
    if change == "input":
        (tmp_path / "input").write_text("other")
    changed = {"config": {"config": {"stride": 7}}, "no resume": {"resume": False}}.get(change, {})
    assert len(parts(tmp_path, **changed)) == 0
    assert not (tmp_path / ".imgs.h5.parts" / "block_000000.safetensors").exists()


def test_a_damaged_block_is_an_error_and_is_made_anew_by_the_next_run(tmp_path):
    made = parts(tmp_path)
    made.write(0, x=np.arange(1000))
    made.write(1, x=np.arange(1000))
    path = tmp_path / ".imgs.h5.parts" / "block_000000.safetensors"
    content = bytearray(path.read_bytes())
    content[500] ^= 1
    path.write_bytes(content)
    with pytest.raises(OSError, match="block_000000.safetensors: damaged .* run the command again"):
        made.read(0)
    with pytest.raises(OSError, match="block_000000.safetensors: damaged"):      # so another thread of the run hears it too
        list(made.blocks())
    assert len(parts(tmp_path)) == 0


def test_a_block_that_cannot_be_written_is_not_there(tmp_path, monkeypatch):
    made = parts(tmp_path)

    class FullDisk(io.FileIO):
        def write(self, content):
            super().write(bytes(content)[:4])
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("preprocessing.parts.open", FullDisk, raising=False)
    with pytest.raises(OSError, match="No space"):
        made.write(0, x=np.zeros(1))
    assert len(made) == 0 and [path.name for path in made.folder.iterdir()] == ["key.json"]


def test_a_block_is_a_safetensors_file(tmp_path):
    arrays = {"mask": np.array([True, False]), "none": np.empty(0, np.int32), "one": np.array(3), "table": np.arange(6.0).reshape(2, 3)}
    made = parts(tmp_path)
    made.write(0, **arrays)
    found = load_file(made.folder / "block_000000.safetensors")
    assert all(found[name].dtype == array.dtype and np.array_equal(found[name], array) for name, array in arrays.items())


def test_nothing_is_left_once_the_output_stands(tmp_path):
    parts(tmp_path).write(0, x=np.zeros(1))
    parts(tmp_path).remove()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["input"]
    Parts.clear(tmp_path / "imgs.h5")                                   # nor does it matter that there is nothing


def test_the_lock_removes_what_a_killed_process_left(tmp_path):
    (tmp_path / "gex.h5ad.tmp.123").write_text("half")
    (tmp_path / "imgs.h5.tmp.99").write_text("half")
    (tmp_path / "other.h5.tmp.99").write_text("not covered")
    with locked(tmp_path / "imgs.h5", covers=[tmp_path / "gex.h5ad"]):
        assert sorted(path.name for path in tmp_path.glob("[!.]*")) == ["other.h5.tmp.99"]


OF_USERS = ["out.old.keep", "out.tmp.mine", "out.old.2024-bak", "out.tmp.7.zip", "out.old.", "out.tmp.-7", "out.tmp.20240501"]


def shown(folder):
    return sorted(path.name for path in folder.glob("[!.]*"))


@pytest.mark.fault("a name like that of a leftover")
@pytest.mark.parametrize("make", [Path.touch, Path.mkdir], ids=["file", "folder"])
@pytest.mark.parametrize("finished", [["out"], []], ids=["beside", "alone"])
@pytest.mark.parametrize("hold", [lambda folder: locked(folder / "out"), only_writer], ids=["locked", "only writer"])
def test_what_is_only_named_like_a_leftover_is_its_users_and_stays(tmp_path, make, finished, hold, tried):
    tried(len(OF_USERS))
    for name in (*OF_USERS, *finished, "out.tmp.7", "out.tmp.4194304", "out.done.json.tmp.7", "out.tmp.7.tmp.7", "out.old.7.tmp.7"):
        make(tmp_path / name)
    if finished:
        (tmp_path / "out.old.7").mkdir()
    with hold(tmp_path):
        assert shown(tmp_path) == sorted([*OF_USERS, *finished])


def test_a_file_is_never_taken_for_a_folder_that_was_being_replaced(tmp_path):
    (tmp_path / "vocab.txt.old.1").write_text("mine")
    with locked(tmp_path / "vocab.txt"), only_writer(tmp_path):
        assert shown(tmp_path) == ["vocab.txt.old.1"]


def test_every_name_that_is_written_to_or_moved_away_counts_as_a_leftover(tmp_path, monkeypatch):
    renamed, rename = [], os.rename

    def note(old, new):
        renamed.append(Path(new))
        rename(old, new)

    monkeypatch.setattr(os, "rename", note)
    (tmp_path / "folder").mkdir()
    with finished_file(tmp_path / "a.csv") as one, finished_together([tmp_path / "b.csv"]) as staged:
        with finished_file(staged[tmp_path / "b.csv"]) as twice:
            twice.touch()
        for path, name in ((one, "a.csv"), (staged[tmp_path / "b.csv"], "b.csv"), (twice, "b.csv")):
            path.touch()
            assert is_leftover(path, re.escape(name)) and not is_leftover(path, "csv")
    with finished_folder(tmp_path / "folder") as working:
        assert is_leftover(working, "folder")
    renamed[0].mkdir()
    assert is_leftover(renamed[0], "folder")


def test_a_folder_killed_between_its_two_renames_comes_back(tmp_path):
    with finished_folder(tmp_path / "patches") as working:
        (working / "a.png").write_text("old")
    (tmp_path / "patches").rename(tmp_path / "patches.old.77")
    with locked(tmp_path / "patches"):
        assert (tmp_path / "patches" / "a.png").read_text() == "old"
    (tmp_path / "patches.old.78").mkdir()
    with locked(tmp_path / "patches"):
        assert not (tmp_path / "patches.old.78").exists()
