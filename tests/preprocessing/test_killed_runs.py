"""Killed at any moment and run again, a command ends with the contents of a run that nobody disturbed."""
import os
import random
import shutil
import signal
import time

import anndata as ad
import pytest
from click.testing import CliRunner
from output_contents import contents, differences, leftovers
from tiny_samples import tiny_sample

from preprocessing import block_extraction, extract_patches, gex_preprocessing  # commands, run as a user does
from preprocessing.done_manifests import write_done
from preprocessing.dump_patches import main as dump_patches
from preprocessing.expression import write_vocabulary
from preprocessing.parts import Parts

KILLS, KILLS_A_ROUND = 20, 4


@pytest.fixture(scope="module")
def hd_sample(tmp_path_factory):
    """A section of 19 blocks of 64 pseudo-spots."""
    return tiny_sample(tmp_path_factory.mktemp("killed"), "visium-hd", width_um=520, height_um=460, genes=60)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(block_extraction, "MOST_SPOTS", 64)
    monkeypatch.setattr("preprocessing.expression.ROWS_AT_ONCE", 64)
    monkeypatch.setattr("preprocessing.dump_patches.MOST_PATCHES", 64)


def succeeds(command, arguments) -> None:
    result = CliRunner().invoke(command, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output


def killed(command, arguments, after_s: float) -> bool:
    """Run the command in a child and kill it after a while; whether it was still running."""
    child = os.fork()
    if child == 0:
        os.setpgrp()
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        try:
            command.main([str(argument) for argument in arguments], standalone_mode=False)
        finally:
            os._exit(0)
    deadline = time.monotonic() + after_s
    while time.monotonic() < deadline:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def survives(command, arguments_into, tmp_path, seed, tried) -> None:
    """Kill the command `KILLS` times at random moments, `KILLS_A_ROUND` on one output folder; each round is then allowed to finish."""
    whole, moments, n_killed = tmp_path / "whole", random.Random(seed), 0
    succeeds(command, arguments_into(whole))                        # the first run also compiles and warms up
    start = time.monotonic()
    succeeds(command, arguments_into(tmp_path / "timed"))
    duration, expected = time.monotonic() - start, contents(whole)
    for number in range(0, KILLS, KILLS_A_ROUND):
        disturbed = tmp_path / f"disturbed_{number}"
        killed_here = 0
        while killed_here < KILLS_A_ROUND:
            if killed(command, arguments_into(disturbed), moments.uniform(0.05, 0.9) * duration):
                killed_here += 1
                n_killed += 1
                tried()
            else:
                duration *= 0.8                                     # it had ended: come earlier, to something still to be done
                shutil.rmtree(disturbed)
        succeeds(command, arguments_into(disturbed))
        assert differences(expected, contents(disturbed)) == []
        assert leftovers(disturbed) == []
    assert n_killed == KILLS


@pytest.mark.fault("killed")
def test_an_extraction_killed_at_random_moments_ends_with_the_same_contents(hd_sample, tmp_path, tried):
    survives(extract_patches.main, lambda out: (
        "--space-ranger-dir", hd_sample.space_ranger_dir, "--wsi-file", hd_sample.slide, "--out-dir", out, "--dump-dir", out / "patches",
        "--patch-sz-px", 48, "--workers", 2), tmp_path, seed=1, tried=tried)


@pytest.fixture(scope="module")
def extracted(hd_sample, tmp_path_factory):
    out = tmp_path_factory.mktemp("extracted")
    succeeds(extract_patches.main, ("--space-ranger-dir", hd_sample.space_ranger_dir, "--wsi-file", hd_sample.slide, "--out-dir", out,
                                    "--patch-sz-px", 48))
    return out


@pytest.mark.fault("killed")
def test_a_gene_filter_killed_at_random_moments_ends_with_the_same_contents(extracted, tmp_path, tried):
    genes = ad.read_h5ad(extracted / "gex.h5ad", backed="r").var_names.tolist()
    write_vocabulary(tmp_path / "vocab.txt", genes[40:5:-1])

    def into(out):
        out.mkdir(exist_ok=True)
        return ("--raw-file", extracted / "gex.h5ad", "--vocab-file", tmp_path / "vocab.txt", "--out-file", out / "gex_filt.h5ad")

    survives(gex_preprocessing.main, into, tmp_path, seed=2, tried=tried)


@pytest.mark.fault("killed")
def test_a_dump_killed_at_random_moments_ends_with_the_same_contents(hd_sample, extracted, tmp_path, tried):
    def into(out):
        out.mkdir(exist_ok=True)
        return ("--images", extracted / "imgs.h5", "--wsi", hd_sample.slide, "--out-dir", out / "patches")

    survives(dump_patches, into, tmp_path, seed=3, tried=tried)


# ---- what a run after a kill repeats --------------------------------------------------------------------------------

def stop_at_block(monkeypatch, number):
    """Make the next run end as a killed one does once `number` blocks are finished."""
    write = Parts.write

    def write_or_stop(parts, block, **arrays):
        if block == number:
            raise KeyboardInterrupt
        write(parts, block, **arrays)

    monkeypatch.setattr(Parts, "write", write_or_stop)


@pytest.mark.parametrize("folder", [False, True], ids=["HDF5", "HDF5 and patch folder"])
def test_a_run_goes_on_with_the_block_it_was_at(hd_sample, tmp_path, monkeypatch, folder):
    arguments = ["--space-ranger-dir", hd_sample.space_ranger_dir, "--wsi-file", hd_sample.slide, "--out-dir", tmp_path / "out",
                 "--patch-sz-px", 32, *(["--dump-dir", tmp_path / "out" / "patches"] if folder else [])]
    with monkeypatch.context() as patched:
        stop_at_block(patched, 3)
        result = CliRunner().invoke(extract_patches.main, [str(argument) for argument in arguments])
        assert result.exit_code == 130 and "run the same command again" in result.output
    written = []
    write = Parts.write
    monkeypatch.setattr(Parts, "write", lambda parts, block, **arrays: (written.append(block), write(parts, block, **arrays)))
    succeeds(extract_patches.main, arguments)
    assert written[0] == 3 and written == list(range(3, 3 + len(written))) and len(written) > 10


def stopped(arguments, number, monkeypatch) -> None:
    with monkeypatch.context() as patched:
        stop_at_block(patched, number)
        assert CliRunner().invoke(extract_patches.main, [str(argument) for argument in arguments]).exit_code == 130


@pytest.mark.parametrize("other", [["--stride", 7], ["--no-h5", "--mpp", 0.45], ["--no-normalize"]], ids=lambda other: other[0])
def test_a_changed_config_begins_anew_and_mixes_nothing(hd_sample, tmp_path, monkeypatch, other):
    def into(name):
        return ["--space-ranger-dir", hd_sample.space_ranger_dir, "--wsi-file", hd_sample.slide, "--patch-sz-px", 32, "--out-dir",
                tmp_path / name, "--dump-dir", tmp_path / name / "patches"]

    stopped(into("out"), 3, monkeypatch)
    assert len(list((tmp_path / "out" / ".qc.png.parts").glob("*.safetensors"))) == 3
    stopped([*into("out"), *other], 2, monkeypatch)
    for name in ("out", "clean"):
        succeeds(extract_patches.main, into(name))
    assert contents(tmp_path / "out") == contents(tmp_path / "clean")
    assert not list((tmp_path / "out").glob(".*pngs*")) and not list((tmp_path / "out").glob(".*parts"))


def test_a_run_killed_when_the_patch_folder_had_just_got_its_name_repeats_no_block(hd_sample, tmp_path, monkeypatch):
    arguments = ["--space-ranger-dir", hd_sample.space_ranger_dir, "--wsi-file", hd_sample.slide, "--patch-sz-px", 32, "--out-dir",
                 tmp_path / "out", "--dump-dir", tmp_path / "out" / "patches"]
    with monkeypatch.context() as patched:
        patched.setattr("preprocessing.extraction_products.write_done",
                        lambda path, **facts: write_done(path, **facts) if path.name == "patches" else killed_now())
        assert CliRunner().invoke(extract_patches.main, [str(argument) for argument in arguments]).exit_code == 130
    assert (tmp_path / "out" / "patches").is_dir()
    monkeypatch.setattr(Parts, "write", lambda *_, **__: pytest.fail("a block was made again"))
    succeeds(extract_patches.main, arguments)
    assert (tmp_path / "out" / "imgs.h5.done.json").exists() and not list((tmp_path / "out").glob(".*parts"))


def killed_now():
    raise KeyboardInterrupt
