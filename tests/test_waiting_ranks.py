"""A process whose others never come says what it waits for, and ends by a signal within seconds."""
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta

import pytest
from clip_runs import MODEL, ROOT, TRAINER, write_samples
from diffusion_world import write_world
from processes import finish

from training import meeting
from training.meeting import meet

SOON_S = 15
LONG = timedelta(minutes=30)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Samples for CLIP, patches and embeddings for diffusion; the others meet before they read anything."""
    folder = tmp_path_factory.mktemp("waiting")
    write_samples(folder)
    write_world(folder)
    return folder


COMMANDS = {
    "train_clip": ("train_clip.py", "data.train_gex=A/gex_filt.h5ad", "data.train_image_dir=A/patches", "run_dir=clip", *MODEL, *TRAINER),
    "train_gan": ("train_gan.py", "--outdir", "gan", "--data", "A/patches", "--img-resolution", "16", "--batch", "16", "--device", "cpu"),
    "gen_images": ("gen_images.py", "--network", "nowhere", "--gex", "A/gex_filt.h5ad", "--outdir", "drawn"),
    "train_diffusion": ("-c", "import diffusion_world; from diffusion_utils.train_diffusion import main; main()",     # a tiny denoiser
                        "--train-data-dir", "patches", "--dataset-embs", "emb.npy", "--output-dir", "diffusion", "--from-scratch", "small",
                        "--pixel-space", "--resolution", "8", "--train-batch-size", "4", "--report-to", "none"),
}


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def start_alone(world, name: str, launcher: str) -> subprocess.Popen:
    """Process 0 of 2, as torchrun or (CLIP) the user at the first of two machines starts it."""
    given = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    given |= {"NODE_RANK": "0"} if launcher == "by hand" else {"RANK": "0", "WORLD_SIZE": "2"}
    command = [*COMMANDS[name], *(["trainer.num_nodes=2"] if name == "train_clip" else [])]
    command[0] = command[0] if command[0] == "-c" else str(ROOT / command[0])
    return subprocess.Popen([sys.executable, *command], cwd=world, env={**os.environ, **given}, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


@pytest.mark.slow
@pytest.mark.fault("rank that fails or hangs")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(("name", "launcher"), [("train_clip", "by hand"), ("train_gan", "torchrun"), ("gen_images", "torchrun"),
                                                ("train_diffusion", "torchrun")])
def test_a_process_whose_other_never_comes_says_so_and_ends_by_a_signal(world, name, launcher, number):
    process = start_alone(world, name, launcher)
    watchdog = threading.Timer(120, process.kill)
    watchdog.start()
    said = []
    while not (said and said[-1].startswith("waiting for ")) and (line := process.stderr.readline()):
        said.append(line)
    assert said and said[-1] == ("waiting for the other process of this run, at most 30 minutes: each has to be started; Ctrl-C ends this "
                                 "one\n"), said
    began = time.monotonic()
    process.send_signal(number)
    code, _, errors = finish(process, SOON_S)
    watchdog.cancel()
    ended = 128 + number if number == signal.SIGINT or name == "train_clip" else -number
    assert code == ended and time.monotonic() - began < SOON_S, errors
    assert len(errors.splitlines()) == (0 if code < 0 else 1) and "Traceback" not in errors, errors


def test_those_who_meet_at_once_say_nothing_and_an_error_of_the_meeting_is_raised(capsys):
    met = []
    meet(lambda: met.append(True), 2, LONG, speaks=True)

    def fail():
        raise OSError("no route")

    with pytest.raises(OSError, match="no route"):
        meet(fail, 2, LONG, speaks=True)
    assert met == [True] and capsys.readouterr().err == ""


@pytest.mark.parametrize("speaks", [True, False])
def test_a_long_meeting_is_said_by_one_and_a_handler_ends_it(speaks, capsys, monkeypatch):
    monkeypatch.setattr(meeting, "NOTICE_S", 0.05)
    handler = signal.signal(signal.SIGUSR1, lambda *_: sys.exit(143))
    threading.Timer(0.4, os.kill, (os.getpid(), signal.SIGUSR1)).start()
    try:
        with pytest.raises(SystemExit):
            meet(lambda: time.sleep(3), 3, LONG, speaks=speaks)
    finally:
        signal.signal(signal.SIGUSR1, handler)
    said = capsys.readouterr().err
    assert said.startswith("waiting for the other 2 processes of this run, at most 30 minutes: ") if speaks else said == ""
