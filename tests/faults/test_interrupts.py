"""Ctrl-C at any moment: exit code 130, one line, nothing under a final name, and the same command then ends as if undisturbed."""
import random
import shutil
import signal
import subprocess
import sys
import time

import anndata as ad
import pytest
from fault_rounds import rounds
from fault_runs import ROOT, SECONDS
from output_contents import contents, differences, leftovers

from preprocessing import interrupts
from preprocessing.expression import write_vocabulary

pytestmark = pytest.mark.fault("Ctrl-C")
MOMENTS, ROUND = rounds(6, 20), 2                     # Ctrl-C so often, so often on one output folder

INTERRUPTED = interrupts.INTERRUPTED + "\n"


@pytest.fixture(scope="module")
def jobs(server, sample, tmp_path_factory):
    """name -> (command, arguments for an output folder)."""
    out = tmp_path_factory.mktemp("extracted")

    def extraction(folder):
        return ("--space-ranger-dir", sample.space_ranger_dir, "--wsi-file", sample.slide, "--out-dir", folder, "--dump-dir",
                folder / "patches", "--patch-sz-px", 24, "--workers", 2)

    server.succeeds("extract", *extraction(out))
    write_vocabulary(out / "vocab.txt", ad.read_h5ad(out / "gex.h5ad", backed="r").var_names.tolist()[50:3:-1])
    return {
        "extract": extraction,
        "random": lambda folder: ("--wsi-file", sample.slide, "--tissue-seg-file", "auto", "--out-dir", folder, "--n-pts", 400,
                                  "--patch-sz-px", 24),
        "filter": lambda folder: ("--raw-file", out / "gex.h5ad", "--vocab-file", out / "vocab.txt", "--out-file", folder / "f.h5ad"),
        "dump": lambda folder: ("--images", out / "imgs.h5", "--wsi", sample.slide, "--out-dir", folder / "patches")}


@pytest.mark.slow
@pytest.mark.parametrize("job", ["extract", "random", "filter", "dump"])
def test_ctrl_c_at_any_moment_is_one_line_and_exit_code_130_and_the_run_goes_on_afterwards(server, jobs, tmp_path, job, tried):
    command, moments = {"random": "extract"}.get(job, job), random.Random(job)
    (whole := tmp_path / "whole").mkdir()
    start = time.monotonic()
    server.succeeds(command, *jobs[job](whole))
    duration, expected, n_interrupted = time.monotonic() - start, contents(whole), 0
    for number in range(0, MOMENTS, ROUND):
        (out := tmp_path / f"out_{number}").mkdir()
        for _ in range(ROUND):
            run = server.start(command, *jobs[job](out))
            time.sleep(moments.uniform(0.03, 0.85) * duration)
            run.signal(signal.SIGINT)
            if run.wait() in (0, -signal.SIGINT) and differences(contents(out), expected) == []:
                duration *= 0.7                                     # all was written before the interpreter left: come earlier,
                shutil.rmtree(out)                                  # and to something that is still to be done
                out.mkdir()
                continue
            n_interrupted += 1
            tried()
            assert run.code == 130, (run.code, run.said)
            assert run.errors == [INTERRUPTED.strip()], run.said
            assert not [path.name for path in out.rglob("*") if ".tmp." in path.name or ".old." in path.name]
        server.succeeds(command, *jobs[job](out))
        assert differences(contents(out), expected) == [] and leftovers(out) == []
    assert n_interrupted >= MOMENTS // 3, "Ctrl-C came too late to test anything"


@pytest.mark.slow
def test_a_second_ctrl_c_at_any_moment_ends_it_at_once_without_a_crash(server, jobs, tmp_path, tried):
    moments, start = random.Random(2), time.monotonic()
    server.succeeds("extract", *jobs["extract"](tmp_path / "whole"))
    duration = time.monotonic() - start
    for _ in range(MOMENTS):
        run = server.start("extract", *jobs["extract"](tmp_path / "out"))
        time.sleep(moments.uniform(0.02, 0.8) * duration)
        for _ in range(2):
            run.signal(signal.SIGINT)
            time.sleep(0.002)
        tried()
        assert run.wait() in (0, 130, -signal.SIGINT), (run.code, run.said)
        assert [line for line in run.errors if not line.startswith("error: interrupted")] == [], run.said
    server.succeeds("extract", *jobs["extract"](tmp_path / "out"))
    assert differences(contents(tmp_path / "out"), contents(tmp_path / "whole")) == [] and leftovers(tmp_path / "out") == []


def test_a_term_signal_leaves_what_a_kill_leaves(server, jobs, tmp_path):
    """Nothing is promised but that the next run goes on."""
    began = time.monotonic()
    server.succeeds("extract", *jobs["extract"](tmp_path / "whole"))
    duration, arguments = time.monotonic() - began, jobs["extract"](tmp_path / "out")
    for share in (0.5, 0.3, 0.2, 0.1):
        run = server.start("extract", *arguments)
        time.sleep(share * duration)
        run.signal(signal.SIGTERM)
        if run.wait() == -signal.SIGTERM:
            break
        shutil.rmtree(tmp_path / "out")                             # it had ended: come earlier
    assert run.code == -signal.SIGTERM, (run.code, run.said)
    server.succeeds("extract", *arguments)
    assert differences(contents(tmp_path / "out"), contents(tmp_path / "whole")) == [] and leftovers(tmp_path / "out") == []


PROGRAM = """
import os, signal, sys, time
import click
from preprocessing.errors import Command

def press():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.01)

class Dropping:
    def __del__(self):
        press()

def library():
    try:
        press()
    except KeyboardInterrupt as error:
        raise ValueError("source failed") from error

def destructor():
    Dropping()
    for _ in range(1000):
        time.sleep(0.01)

def twice():
    try:
        press()
    finally:
        press()

@click.command(cls=Command)
@click.option("--before", is_flag=True, callback=lambda context, option, given: press() if given else None)
@click.argument("where", default="library")
def main(before, where):
    globals()[where]()
    print("went on")

main()
"""


@pytest.mark.parametrize(("arguments", "code", "said"), [
    (["library"], 130, INTERRUPTED), (["destructor"], 130, INTERRUPTED), (["twice"], -signal.SIGINT, ""), (["--before"], 130, INTERRUPTED)],
    ids=["that a library takes for another error", "that a destructor drops", "pressed again", "before the command begins"])
def test_a_ctrl_c_is_never_lost_nor_another_error(arguments, code, said):
    done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], cwd=ROOT, text=True, capture_output=True, timeout=SECONDS)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", said)
    done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments, "--debug"], cwd=ROOT, text=True, capture_output=True, timeout=SECONDS)
    assert (done.returncode, done.stdout) == (code, "") and done.stderr.endswith(said) and ("Traceback" in done.stderr) == bool(said)


IMPORTING = """
import os, runpy, signal, sys

class Press:
    def find_spec(self, name, *_):
        if name == sys.argv[1]:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Press())
sys.path.insert(0, ".")
runpy.run_path(sys.argv[2], run_name="__main__")
"""


@pytest.mark.parametrize(("library", "command", "code"), [
    ("hydra", "train_clip.py", 130), ("preprocessing.errors", "preprocessing/extract_patches.py", -signal.SIGINT)],
    ids=["within the command", "before it begins"])
def test_a_ctrl_c_while_a_command_imports_is_one_line(library, command, code):
    done = subprocess.run([sys.executable, "-c", IMPORTING, library, command], cwd=ROOT, text=True, capture_output=True, timeout=SECONDS)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", INTERRUPTED)
    done = subprocess.run([sys.executable, "-c", IMPORTING, library, command, "--debug"], cwd=ROOT, text=True, capture_output=True,
                          timeout=SECONDS)
    assert (done.returncode, done.stdout) == (code, "") and done.stderr.endswith(INTERRUPTED) and "Traceback" in done.stderr
