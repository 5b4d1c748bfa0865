"""Row 26: two processes on one output, the lock of a dead one, the lock of a live one."""
import errno
import fcntl
import os
import signal
import subprocess
import sys
import time

import pytest
from fault_runs import ROOT, SECONDS
from output_contents import contents, differences, leftovers

from preprocessing.outputs import locked

pytestmark = pytest.mark.fault("two processes, locks")
PAUSE_AT_BLOCK = """
import pathlib, time
from preprocessing.parts import Parts
write = Parts.write
def write_or_wait(parts, number, **arrays):
    if number == 2:
        pathlib.Path({!r}).touch()
        time.sleep(3)
    write(parts, number, **arrays)
Parts.write = write_or_wait
"""


def extraction(sample, out, *options):
    return ("extract", "--space-ranger-dir", sample.space_ranger_dir, "--wsi-file", sample.slide, "--out-dir", out,
            "--patch-sz-px", 24, "--workers", 2, *options)


def folder_of(images, sample, out):
    return "dump", "--images", images / "imgs.h5", "--wsi", sample.slide, "--out-dir", out / "patches", "--workers", 1


@pytest.fixture(scope="module")
def extracted(server, sample, tmp_path_factory):
    out = tmp_path_factory.mktemp("extracted")
    server.succeeds(*extraction(sample, out))
    return out


def in_the_midst(server, job, tmp_path):
    """The job in a process that waits a while within its third block; returns when it is there."""
    mark = tmp_path / "in the midst"
    run = server.start(*job, before=PAUSE_AT_BLOCK.format(str(mark)))
    deadline = time.monotonic() + SECONDS
    while not mark.exists():
        assert not run.is_over() and time.monotonic() < deadline, run.said
        time.sleep(0.01)
    return run


def both_succeed(server, first, second, tmp_path):
    """The second starts while the first is at work, waits for it, says so once, and both are content."""
    one = in_the_midst(server, first, tmp_path)
    two = server.start(*second)
    assert two.wait() == 0 and one.wait() == 0, (one.said, two.said)
    assert one.errors == two.errors == [] and two.said.count("waiting for another process writing") == 1
    return two.said


def test_a_second_extraction_waits_for_the_first_and_finds_its_work_done(server, sample, extracted, tmp_path):
    job = extraction(sample, tmp_path / "out")
    said = both_succeed(server, job, job, tmp_path)
    assert "already extracted" in said and "extracting:" not in said
    assert differences(contents(tmp_path / "out"), contents(extracted)) == [] and leftovers(tmp_path / "out") == []


def test_an_extraction_without_images_waits_for_one_with_them(server, sample, extracted, tmp_path):
    out = tmp_path / "out"
    without = extraction(sample, out, "--no-h5", "--dump-dir", tmp_path / "patches")
    assert "already extracted" not in both_succeed(server, extraction(sample, out), without, tmp_path)
    assert differences(contents(out), contents(extracted)) == ["qc.html"] or differences(contents(out), contents(extracted)) == []
    assert leftovers(tmp_path) == []


def test_two_extractions_with_other_settings_end_as_the_second_one_says(server, sample, tmp_path):
    both_succeed(server, extraction(sample, tmp_path / "out", "--stride", 8), extraction(sample, tmp_path / "out", "--stride", 7), tmp_path)
    server.succeeds(*extraction(sample, tmp_path / "alone", "--stride", 7))
    assert differences(contents(tmp_path / "out"), contents(tmp_path / "alone")) == [] and leftovers(tmp_path / "out") == []


def test_a_second_dump_waits_for_the_first_and_finds_its_work_done(server, sample, extracted, tmp_path):
    job = folder_of(extracted, sample, tmp_path / "out")
    both_succeed(server, job, job, tmp_path)
    server.succeeds(*folder_of(extracted, sample, tmp_path / "alone"))
    assert differences(contents(tmp_path / "out"), contents(tmp_path / "alone")) == [] and leftovers(tmp_path / "out") == []


@pytest.mark.parametrize("first", ["extraction", "dump"])
def test_an_extraction_and_a_dump_into_one_folder_wait_for_each_other(server, sample, extracted, tmp_path, first):
    out = tmp_path / "out"
    jobs = [extraction(sample, out, "--dump-dir", out / "patches"), folder_of(extracted, sample, out)]
    both_succeed(server, *(jobs if first == "extraction" else jobs[::-1]), tmp_path)
    server.succeeds(*folder_of(extracted, sample, tmp_path / "alone"))
    found, alone = contents(out / "patches"), contents(tmp_path / "alone" / "patches")
    assert differences(found, alone) == [] and len(alone) > 600 and leftovers(out) == []


def test_two_extractions_started_at_the_same_moment_end_as_one(server, sample, extracted, tmp_path):
    runs = [server.start(*extraction(sample, tmp_path / "out")) for _ in range(3)]
    assert [run.wait() for run in runs] == [0, 0, 0] and [run.errors for run in runs] == [[], [], []]
    assert differences(contents(tmp_path / "out"), contents(extracted)) == [] and leftovers(tmp_path / "out") == []


# ---- locks ----------------------------------------------------------------------------------------------------------

def test_the_lock_of_a_dead_process_is_taken_at_once_and_what_it_left_is_removed(server, sample, extracted, tmp_path):
    run = in_the_midst(server, extraction(sample, tmp_path / "out"), tmp_path)
    (tmp_path / "out" / "gex.h5ad.tmp.1").write_text("half")
    run.signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL and (tmp_path / "out" / ".imgs.h5.lock").exists()
    said = server.succeeds(*extraction(sample, tmp_path / "out"))
    assert "waiting" not in said
    assert differences(contents(tmp_path / "out"), contents(extracted)) == [] and leftovers(tmp_path / "out") == []


HOLDER = """
import sys, time
from preprocessing.outputs import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


def test_the_lock_of_a_live_process_is_never_taken_however_old(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "out")], stdout=subprocess.PIPE,
                              env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        assert holder.stdout.readline() == b"held\n"
        os.utime(tmp_path / ".out.lock", (0, 0))
        left = tmp_path / f"out.tmp.{holder.pid}"
        left.write_text("at work")
        with pytest.raises(OSError, match="another process is still writing it"), locked(tmp_path / "out", wait_s=0.3):
            pass
        assert left.read_text() == "at work", "what a live process writes is left alone"
        holder.send_signal(signal.SIGSTOP)                          # stopped is not dead
        with pytest.raises(OSError, match="another process is still writing it"), locked(tmp_path / "out", wait_s=0.3):
            pass
    finally:
        holder.kill()
        holder.wait()
    with locked(tmp_path / "out", wait_s=0):
        assert not left.exists()


def test_a_lock_file_with_anything_in_it_is_only_a_file(tmp_path):
    """The kernel's lock counts, not the file nor the number of a process in it."""
    (tmp_path / ".out.lock").write_text("1\n")
    with locked(tmp_path / "out", wait_s=0), open(tmp_path / ".out.lock") as stream, pytest.raises(BlockingIOError):
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)


WITHOUT_LOCKS = """
import errno, fcntl, os, sys
def refuse(*_):
    number = getattr(errno, sys.argv[1])
    raise OSError(number, os.strerror(number))
fcntl.flock = refuse
import click
from preprocessing.errors import Command
from preprocessing.outputs import locked, only_writer
@click.command(cls=Command)
@click.argument("out")
@click.option("--run", is_flag=True)
def main(out, run):
    with only_writer(out) if run else locked(out):
        print("held", flush=True)
main(sys.argv[2:])
"""


@pytest.mark.parametrize("number", ["ENOSYS", "ENOTSUP", "ENOLCK"])
@pytest.mark.parametrize("is_run", [False, True], ids=["output", "run folder"])
def test_on_a_file_system_without_locks_no_process_gets_one_and_each_says_so_in_one_line(tmp_path, number, is_run):
    """Neither beside a process that holds a lock, from another machine for instance, nor where nobody does."""
    out = tmp_path / "out"
    command = [sys.executable, "-c", WITHOUT_LOCKS, number, str(out), *(["--run"] if is_run else [])]

    def tries():
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=SECONDS)
        assert (done.returncode, done.stdout) == (4, ""), done.stderr
        reason = os.strerror(getattr(errno, number))
        assert done.stderr == f"error: {out if is_run else tmp_path}: the file system of this folder has no locks ({reason}), and two " \
                              "processes could write at once; put the output on one that has\n"

    tries()
    with locked(out / "run" if is_run else out, wait_s=0):
        tries()
        tries()
    with locked(out / "run" if is_run else out, wait_s=0):       # what the refused ones left bars nobody
        pass
