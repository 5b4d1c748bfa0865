"""Keep the finished blocks of a long step, so that a killed run goes on where it was.

A block is one immutable file of named arrays (safetensors, with a checksum of each), written by the rule of `outputs.py` in a
folder beside the output it is for. The folder belongs to one config and one set of inputs: blocks of another are thrown away,
never mixed in. The caller holds the lock of the output.
"""
from __future__ import annotations

import json
import re
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors import safe_open

from preprocessing.done_manifests import config_sha256, fingerprints
from preprocessing.errors import InputError
from preprocessing.inputs import read_json
from preprocessing.outputs import finished_file, write_json

KEY = "key.json"
DTYPES = {"|b1": "BOOL", "|u1": "U8", "<i4": "I32", "<i8": "I64", "<f8": "F64"}        # as safetensors calls them
FORMAT = 1                       # of what blocks hold; blocks of another are not understood


def parts_folder(output: Path | str) -> Path:
    """Where the blocks of an output lie while it is made."""
    output = Path(output).absolute()
    return output.with_name(f".{output.name}.parts")


class Parts:
    """The blocks 0, 1, ... of `output` made so far from exactly these inputs with exactly this config."""

    def __init__(self, output: Path | str, *, config: Mapping, inputs: Mapping[str, Path | str | Mapping], resume: bool = True,
                 beside: Path | None = None):
        """`beside` is where further files of these blocks may lie, on another disk maybe: `self.beside` is that path with the
        blocks' own mark, a folder that goes when they go."""
        self.folder = parts_folder(output)
        self._damaged: dict[int, OSError] = {}     # blocks that were thrown away here, and how one thread says so to the others
        key = {"format": FORMAT, "config_sha256": config_sha256(config), "inputs": fingerprints(inputs)}
        self.beside = None if beside is None else beside.with_name(f"{beside.name}.{config_sha256(key)[:12]}")
        key |= {"beside": str(self.beside or "")}
        if not (resume and _recorded_key(self.folder) == key):
            self._empty()
            write_json(self.folder / KEY, key)

    def _empty(self) -> None:
        try:
            _remove_beside(self.folder)
            if self.folder.exists():
                shutil.rmtree(self.folder)
            self.folder.mkdir(parents=True)
        except OSError as error:                   # rmtree names the file within the folder alone
            raise OSError(error.errno, error.strerror, str(self.folder)) from error

    def __len__(self) -> int:
        """How many blocks are finished, from block 0 without a gap."""
        number = 0
        while number in self:
            number += 1
        return number

    def __contains__(self, number: int) -> bool:
        """Whether block `number` is finished, for blocks that come in any order."""
        return number in self._damaged or self._path(number).exists()

    def _path(self, number: int) -> Path:
        return self.folder / f"block_{number:06d}.safetensors"

    def write(self, number: int, **arrays: np.ndarray) -> None:
        """Finish block `number`. It need not reach the disk at once: a torn block is noticed when it is read."""
        arrays = {name: np.asarray(array, order="C") for name, array in arrays.items()}
        with finished_file(self._path(number), sync=False) as temporary, open(temporary, "wb") as stream:
            stream.write(_header(arrays))
            for array in arrays.values():                  # not by the library's writer, which copies gigabytes twice before
                stream.write(array.reshape(-1).view(np.uint8))

    def read(self, number: int, *names: str) -> dict[str, np.ndarray]:
        """The arrays `names` of a finished block (default: all).

        A damaged block is thrown away, so that the next run makes it anew, and is an `OSError`.
        """
        path = self._path(number)
        if number in self._damaged and not path.exists():
            raise self._damaged[number]
        path.stat()                                # that there is none, or none for us to read, is no damage
        try:
            return _arrays(path, names)
        except PermissionError:
            raise
        except Exception as error:                 # a changed byte of the header may mean anything
            self._damaged[number] = OSError(f"{path}: damaged ({error}); run the command again, which makes this block anew")
            path.unlink(missing_ok=True)
            raise self._damaged[number] from error

    def drop_from(self, number: int) -> None:
        """Throw away block `number` and all after it: each goes on from the one before."""
        for later in range(number, len(self)):
            self._path(later).unlink(missing_ok=True)

    def blocks(self, *names: str) -> Iterator[dict[str, np.ndarray]]:
        """These arrays of every finished block, in order."""
        return (self.read(number, *names) for number in range(len(self)))

    def remove(self) -> None:
        """Throw all blocks away: the output stands."""
        _remove_beside(self.folder)
        shutil.rmtree(self.folder, ignore_errors=True)

    @staticmethod
    def clear(output: Path | str) -> None:
        """Throw away the blocks of an output that stands, whatever they were made of."""
        _remove_beside(parts_folder(output))
        shutil.rmtree(parts_folder(output), ignore_errors=True)


def _recorded_key(folder: Path) -> dict:
    try:
        key = read_json(folder / KEY, "what the blocks were made of")
    except (InputError, OSError):
        return {}
    return key if isinstance(key, dict) else {}


def _remove_beside(folder: Path) -> None:
    beside = _recorded_key(folder).get("beside")
    if isinstance(beside, str) and re.fullmatch(r"\..+\.pngs\.[0-9a-f]{12}", Path(beside).name):      # a damaged key names no other folder
        shutil.rmtree(beside, ignore_errors=True)


def _arrays(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    with safe_open(path, framework="numpy") as file:
        sums = file.metadata() or {}
        arrays = {name: file.get_tensor(name) for name in names or file.keys()}
    for name, array in arrays.items():
        if _checksum(array) != sums.get(name):
            raise ValueError(f"{name} is not what was written")
    return arrays


def _header(arrays: Mapping[str, np.ndarray]) -> bytes:
    """The head of a safetensors file: its own length in 8 bytes, then where each array lies and what it is, in JSON."""
    entries: dict[str, object] = {"__metadata__": {name: _checksum(array) for name, array in arrays.items()}}
    end = 0
    for name, array in arrays.items():
        start, end = end, end + array.nbytes
        entries[name] = {"dtype": DTYPES[array.dtype.str], "shape": list(array.shape), "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _checksum(array: np.ndarray) -> str:
    about = zlib.crc32(f"{array.dtype} {array.shape}".encode())
    return f"{zlib.crc32(array.reshape(-1).view(np.uint8), about):08x}"
