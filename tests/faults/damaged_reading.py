"""Read damaged copies of what we wrote, in children: the same contents, other ones, refused in one line, a crash or a hang.

Not a test file. A child reads one damaged copy after the other and says what became of each; where it dies or hangs, the next goes on.
"""
from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import select
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from preprocessing.errors import InputError, OptionError

SECONDS = 20                     # for one copy


def digest(content) -> str:
    """A hash over anything the readers return."""
    state = hashlib.sha256()
    _feed(state, content)
    return state.hexdigest()


def _feed(state, content) -> None:
    state.update(type(content).__name__.encode())
    if hasattr(content, "detach"):
        content = content.detach().cpu().float().numpy()
    if hasattr(content, "state_dict"):
        content = content.state_dict()
    if dataclasses.is_dataclass(content):
        content = {field.name: getattr(content, field.name) for field in dataclasses.fields(content)}
    if isinstance(content, np.ndarray) and content.dtype.kind != "O":
        state.update(str((content.dtype, content.shape)).encode() + np.ascontiguousarray(content).tobytes())
    elif isinstance(content, dict):
        for key in sorted(content, key=str):
            state.update(str(key).encode())
            _feed(state, content[key])
    elif isinstance(content, (list, tuple, np.ndarray)):
        for item in content:
            _feed(state, item)
    else:
        state.update(repr(content).encode())


def outcomes(read: Callable[[], object], damages: list[Callable[[], None]], whole: str) -> Iterator[str]:
    """What becomes of reading after each of the damages: same, other, refused: ..., crash: ... or hang."""
    done = 0
    while done < len(damages):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            _read_all(read, damages[done:], whole, writing)
        os.close(writing)
        try:
            with os.fdopen(reading, buffering=1) as stream:
                while done < len(damages):
                    if not select.select([stream], [], [], SECONDS)[0]:
                        os.kill(child, signal.SIGKILL)
                        yield "hang"
                        done += 1
                        break
                    line = stream.readline()
                    if not line:
                        yield f"crash: the process ended ({os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])})"
                        child, done = None, done + 1
                        break
                    yield json.loads(line)
                    done += 1
        finally:
            if child is not None:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)


def _read_all(read, damages, whole: str, writing: int) -> None:
    try:
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(1)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)
        os.dup2(null, 1)
        warnings.simplefilter("ignore")
        for damage in damages:
            damage()
            os.write(writing, (json.dumps(_outcome(read, whole)) + "\n").encode())
    finally:
        os._exit(0)


def _outcome(read, whole: str) -> str:
    try:
        return "same" if digest(read()) == whole else "other"
    except (InputError, OptionError) as error:
        said = str(error)
        return f"crash: a message of several lines: {said}" if "\n" in said.strip() else f"refused: {said[:300]}"
    except OSError as error:
        return f"refused: {error}" if error.filename is not None else f"crash: {traceback.format_exc()[-1500:]}"
    except BaseException:
        return f"crash: {traceback.format_exc()[-1500:]}"


def damages_of(path: Path, content: bytes, flips: int, cuts: int, seed: int) -> list[Callable[[], None]]:
    """`flips` single changed bits, spread and at random, `cuts` truncations, no bytes, and no file."""
    rng = np.random.default_rng(seed)
    spread = np.linspace(0, len(content) - 1, flips - flips // 2).astype(int)
    places = [*spread.tolist(), *rng.integers(0, len(content), flips // 2).tolist()]

    def flip(at: int) -> Callable[[], None]:
        bit = 1 << int(rng.integers(8))
        return lambda: _put(path, content[:at] + bytes([content[at] ^ bit]) + content[at + 1:])

    lengths = [0, *rng.integers(1, max(len(content), 2), cuts - 1).tolist()]
    return [*map(flip, places), *((lambda length=length: _put(path, content[:length])) for length in lengths), lambda: path.unlink()]


def _put(path: Path, content: bytes) -> None:
    """New bytes, and a new time of change, as after any damage that a copy or a disk does."""
    path.write_bytes(content)
