"""gen_images.py under torchrun, and stopped by a real Ctrl-C: the patches of one process, in one list, or a clear end."""
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from processes import finish
from sampling_world import apart, arguments, call, make_world, pictures
from test_readme import TORCHRUN

import gen_images
from preprocessing.patch_file import read_patch_file
from training.generation import MEET_EVERY

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("ranks"))


def start(*command: str) -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")}
    return subprocess.Popen([sys.executable, *command], cwd=ROOT, env={**environment, "OMP_NUM_THREADS": "1"}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def in_two(script: Path | str = "gen_images.py", **options) -> tuple[int, str, str]:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    return finish(start(*launch, *arguments(**options)), 120)


def test_two_processes_make_the_patches_the_list_and_the_grid_of_one(world, tmp_path):
    options = {"network": world / "snapshot", "gex": world / "gex.h5ad", "seeds": "0-1", "batch_sz": 4, "images": world / "imgs.h5",
               "device": "cpu"}
    assert call(gen_images, **options, outdir=tmp_path / "one").exit_code == 0
    code, told, errors = in_two(**options, outdir=tmp_path / "two")
    assert code == 0 and told.count("wrote 32 patches") == 1, errors
    one, two = pictures(tmp_path / "one"), pictures(tmp_path / "two")
    assert apart(one, two) <= 1
    assert (tmp_path / "one" / "samples.csv").read_bytes() == (tmp_path / "two" / "samples.csv").read_bytes()
    for name in list(two)[3:9]:
        (tmp_path / "two" / name).unlink()
    result = call(gen_images, **options, outdir=tmp_path / "two")     # in how many processes it goes on does not matter
    assert "were there" in result.output and apart(one, pictures(tmp_path / "two")) <= 1


def test_two_processes_fill_one_file_as_the_readme_says(world, tmp_path):
    shown = dict(re.findall(r"--([\w-]+) (\S+)", TORCHRUN.partition("gen_images.py")[2]))
    assert shown.keys() == {"network", "gex", "seeds", "out-h5", "outdir", "batch-sz"}
    assert TORCHRUN.startswith("torchrun --nproc-per-node 2 gen_images.py ")
    options = {"network": world / "snapshot", "gex": world / "gex.h5ad", "seeds": shown["seeds"], "batch_sz": 4}
    code, told, errors = in_two(**options, out_h5=tmp_path / "two.h5", outdir=tmp_path / "two")
    assert code == 0 and told.count("wrote ") == 1 and not list(tmp_path.glob(".*.parts")), errors
    assert call(gen_images, **options, out_h5=tmp_path / "one.h5", outdir=tmp_path / "one").exit_code == 0
    with read_patch_file(tmp_path / "one.h5") as one, read_patch_file(tmp_path / "two.h5") as two:
        assert one.barcodes == two.barcodes and (one.coords == two.coords).all()
        assert np.abs(one.images(slice(None)).astype(int) - two.images(slice(None))).max() <= 1
    assert (tmp_path / "one" / "samples.csv").read_bytes() == (tmp_path / "two" / "samples.csv").read_bytes()


def test_a_mistake_is_said_once_by_all_processes(world, tmp_path):
    code, _, errors = in_two(network=world / "snapshot", gex=tmp_path / "nowhere.h5ad", outdir=tmp_path / "out")
    assert code != 0 and errors.count("error: ") == 1 and "nowhere.h5ad" in errors and not (tmp_path / "out").exists()


STUCK = """
import os, sys, time
sys.path.insert(0, {root!r})
import gen_images
from training.generated_pngs import GeneratedPngs
sound = GeneratedPngs.save
def save(self, number, pictures):
    if os.environ["RANK"] == {rank!r} and number >= 4:
        time.sleep(600)
    return sound(self, number, pictures)
GeneratedPngs.save = save
gen_images.main()
"""


@pytest.mark.fault("rank that fails or hangs")
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_stuck_rank_ends_the_job_within_the_timeout_while_the_other_has_work_left(world, tmp_path, rank):
    script, n_all = tmp_path / "stuck.py", 16 * 100
    script.write_text(STUCK.format(root=str(ROOT), rank=rank))
    options = {"network": world / "snapshot", "gex": world / "gex.h5ad", "seeds": "0-99", "batch_sz": 2, "outdir": tmp_path / "out"}
    code, _, errors = in_two(script, **options, timeout_minutes=0.25)
    said, other = re.findall(r"error: .*", errors), {"0": "1", "1": "0"}[rank]
    assert said == [f"error: rank {other}: another process of this run ended or did not answer within --timeout-minutes 0.25"], errors
    assert code != 0 and "exitcode  : 4" in errors and "RuntimeError" not in errors
    assert 2 * MEET_EVERY <= len(pictures(tmp_path / "out")) < n_all // 4         # of the half that it had to make
    result = call(gen_images, **options, device="cpu")
    assert result.exit_code == 0 and f"wrote {n_all:,} patches" in result.output and "of them were there" in result.output


@pytest.mark.parametrize("minutes", ["nan", 0, 1e9])
def test_a_timeout_that_is_none_is_refused_before_anything_is_made(world, tmp_path, minutes):
    result = call(gen_images, network=world / "snapshot", gex=world / "gex.h5ad", outdir=tmp_path / "out", timeout_minutes=minutes)
    assert result.exit_code == 2 and "--timeout-minutes: expected" in result.output and not (tmp_path / "out").exists()


def test_the_help_says_how_often_processes_meet():
    assert f"after every {MEET_EVERY} batches" in " ".join(call(gen_images, help=True).output.split())


def test_a_real_ctrl_c_ends_with_130_and_the_same_command_finishes(world, tmp_path):
    options = {"network": world / "snapshot", "gex": world / "gex.h5ad", "seeds": "0-99", "batch_sz": 2}
    process = start("gen_images.py", *arguments(**options, outdir=tmp_path / "out"))
    while len(list((tmp_path / "out").glob("prompt*.png"))) < 10 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    code, _, errors = finish(process, 120)
    assert code == 130 and "run the same command again" in errors and "Traceback" not in errors
    assert 10 <= len(pictures(tmp_path / "out")) < 1600 and not list((tmp_path / "out").glob("*.tmp.*"))
    assert not (tmp_path / "out" / "samples.csv").exists()
    for name in ("out", "straight"):
        result = call(gen_images, **options, outdir=tmp_path / name)
        assert result.exit_code == 0 and ("of them were there" in result.output) == (name == "out")
    assert apart(pictures(tmp_path / "out"), pictures(tmp_path / "straight")) == 0
