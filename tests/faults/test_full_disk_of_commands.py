"""Row 27 for every command: a disk that takes no more, or files that may not grow, at many points of what it writes.

What a command has written before stands until the new is whole; one that trains, and `gen_images`, goes on from what it has. `make test`
tries a few, FAULT_ROUNDS=full ten points a command in both ways; preprocessing on a full disk: `test_disk_full.py`.
"""
import itertools
import shutil

import pytest
from fault_rounds import FULL, rounds
from output_contents import differences, leftovers
from small_disk import ShortFiles, SmallDisk
from walk import BESIDE, LONGEST_S, WRITES, remove_output, start, succeeds, walk_contents

pytestmark = [pytest.mark.slow, pytest.mark.fault("full or read-only disk")]
POINTS, BLOCK = rounds(1, 10), 4096
OLDER = {"simulate": ("--seed", 2), "embeddings": (), "metrics": (), "interpretability": ("--method", "sg"), "import_st":
         ("--patch-sz-px", 32), "evaluate_sections": ("--seed", 1), "choose_ema": ("--sigma-rel", 0.1), "extract": ("--stride", 9),
         "filter": ("--vocab-file", "beside/genes_few.txt"), "generate_img": ("--steps", 3), "perturb": ("--seeds", "0-2"),
         "interpolate": ("--prompt2", "data/gex_filt.h5ad:5")}            # settings of an older output
FOLDERS = {**WRITES, "extract": "data", "filter": "data"}
DRAW = ("gen_images",)                                      # goes on from the patches it has
SHORT = ("embeddings", "generate_img", "interpolate", "interpretability")         # no file of theirs is long enough to be refused
FEW = [("gen_images", "full disk"), ("interpretability", "full disk"), ("clip", "short files"), ("metrics", "short files")]
ALL = [*((name, "full disk") for name in WRITES), *((name, "short files") for name in FOLDERS if name not in SHORT)]


@pytest.fixture
def disk(kind, commands, tmp_path):
    if kind == "full disk" and not isinstance(commands, SmallDisk):
        pytest.skip("a small disk cannot be mounted here: files that may not grow take its place")
    (tmp_path / "mount").mkdir()
    chosen = commands if kind == "full disk" else ShortFiles(commands, tmp_path / "mount")
    chosen.make_empty()
    yield chosen
    chosen.leave_room()


def newest_step(found: dict) -> int:
    """Of the checkpoints of a run folder."""
    steps = [int(name.split("checkpoint-")[1].split("/")[0]) for name in found if "checkpoint-" in name]
    steps += [found[name]["global_step"] for name in found if name.endswith(".ckpt")]
    return max(steps, default=0)


def require_standing(name: str, old: dict, found: dict) -> None:
    """What was there before the disk was full is there still."""
    if name in DRAW:
        assert {path: found.get(path) for path in old} == old, "a patch is lost"
    elif name not in OLDER:
        assert newest_step(found) >= newest_step(old), "a checkpoint is lost"
    else:
        assert differences(found, old) == [], "the old output stands, and nothing new beside it"


@pytest.mark.parametrize(("name", "kind"), ALL if FULL else FEW)
def test_a_command_on_a_full_disk_is_one_line_keeps_what_was_there_and_goes_on_with_room(name, disk, undisturbed, tmp_path, tried):
    whole, folder, older = undisturbed[0], disk.mount / "walk", tmp_path / "older"
    out = folder / FOLDERS[name]

    def begin() -> dict:
        """The folder of the command as it was before; its contents."""
        disk.leave_room()
        assert disk.call("rm", "-rf", out) == 0
        if older.exists():
            assert disk.call("cp", "-r", older, out) == 0
        return walk_contents(disk.path(out))

    assert disk.call("cp", "-r", whole, folder) == 0
    if name in OLDER:
        succeeds(start(disk, name, folder, *OLDER[name]))
        shutil.copytree(disk.path(out), older)
    old = begin()
    n_full, shares = 0, itertools.cycle((number + 0.5) / POINTS for number in range(POINTS))
    for share in itertools.islice(shares, 5 * POINTS):
        disk.leave_share(share, whole / FOLDERS[name])
        run = start(disk, name, folder)
        if run.wait(LONGEST_S) == 0:                                  # what it had was enough to end with
            old = begin()
            continue
        assert run.code == 4 and len(run.errors) == 1, (n_full, run.code, run.said[-3000:])
        assert any(words in run.errors[0] for words in disk.refused) and str(folder) in run.errors[0], run.errors
        found = walk_contents(disk.path(out))
        require_standing(name, old, found)
        old = old if name in OLDER else found
        n_full += 1
        tried()
        if n_full == POINTS:
            break
    assert n_full == POINTS or name == "interpretability", f"{n_full} points only"       # its two small files take a block each
    disk.leave_room()
    succeeds(start(disk, name, folder))
    assert differences(walk_contents(disk.path(folder)), walk_contents(whole)) == []
    assert leftovers(disk.path(folder)) == leftovers(whole) == []


@pytest.mark.parametrize("kind", ["full disk"])           # no file of theirs is long enough to be refused
@pytest.mark.parametrize("name", BESIDE)
def test_a_command_that_writes_beside_others_leaves_its_older_output_on_a_full_disk(name, disk, undisturbed, tmp_path, tried):
    whole, folder, older = undisturbed[0], disk.mount / "walk", tmp_path / "older"
    out = (folder / BESIDE[name][0]).parent
    assert disk.call("cp", "-r", whole, folder) == 0
    remove_output(name, disk.path(folder))
    if name != "dump_metadata":                           # which replaces nothing
        for file in BESIDE[name]:
            older.write_text("".join((whole / file).read_text().splitlines(keepends=True)[:-1]))
            assert disk.call("cp", older, folder / file) == 0
    old = walk_contents(disk.path(out))
    n_blocks = sum((whole / file).stat().st_size // BLOCK for file in BESIDE[name])
    for number in range(POINTS):
        disk.leave_free(n_blocks * number // POINTS * BLOCK)
        run = start(disk, name, folder)
        assert run.wait(LONGEST_S) == 4 and len(run.errors) == 1, (run.code, run.said[-3000:])
        assert any(words in run.errors[0] for words in disk.refused), run.errors
        assert any(str(folder / file) in run.errors[0] for file in BESIDE[name]), run.errors
        assert differences(walk_contents(disk.path(out)), old) == [], "the old output stands, and nothing new beside it"
        tried()
    disk.leave_room()
    succeeds(start(disk, name, folder))
    assert differences(walk_contents(disk.path(out)), walk_contents(whole / out.name)) == []
    assert leftovers(disk.path(folder)) == leftovers(whole) == []
