"""What a finished file was made from: its done-manifest (`name.done.json`), SHA-256 sums, versions.

A step is skipped only if the done-manifest matches the inputs **and** the config; that the file exists proves nothing.
"""
from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from preprocessing.errors import InputError
from preprocessing.inputs import read_json
from preprocessing.outputs import MIB, done_path, write_json

WHOLE_FILE_MIB = 256              # inputs up to this size are hashed whole


def file_sha256(path: Path | str) -> str:
    """SHA-256 of a whole file, read in blocks."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(stream)


def _digest(stream) -> str:                      # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    while block := stream.read(MIB):
        digest.update(block)
    return digest.hexdigest()


def fingerprint(path: Path | str) -> dict[str, object]:
    """Name, size and SHA-256 of a file. Of more than 256 MiB, without reading gigabytes: time of last change, SHA-256 of both ends."""
    path = Path(path)
    about = path.stat()
    return dict(_fingerprint(path.absolute(), about.st_size, about.st_mtime_ns, about.st_ino))


@lru_cache(maxsize=256)                          # one command asks for the same slide a dozen times
def _fingerprint(path: Path, size: int, mtime_ns: int, _inode: int) -> dict[str, object]:
    if size <= WHOLE_FILE_MIB * MIB:
        return {"name": path.name, "bytes": size, "sha256": file_sha256(path)}
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        digest.update(stream.read(MIB))
        stream.seek(-MIB, os.SEEK_END)
        digest.update(stream.read(MIB))
    return {"name": path.name, "bytes": size, "mtime_ns": mtime_ns, "ends_sha256": digest.hexdigest()}


def fingerprints(inputs: Mapping[str, Path | str | Mapping]) -> dict[str, Mapping]:
    """Fingerprint of every input. One that was taken already stays: a file may be replaced while it is read."""
    return {name: dict(file) if isinstance(file, Mapping) else fingerprint(file) for name, file in inputs.items()}


def strings_sha256(strings) -> str:
    """SHA-256 over an ordered list of strings (barcodes, genes), one a line."""
    return hashlib.sha256("\n".join(strings).encode()).hexdigest()


def config_sha256(config: Mapping) -> str:
    """SHA-256 of a config, independent of key order."""
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()


def write_done(path: Path | str, *, config: Mapping, inputs: Mapping[str, Path | str | Mapping], **facts: object) -> None:
    """Write the done-manifest of a finished file or folder; the last thing a step does.

    `config` is what the step was told, `inputs` the files it read, or their fingerprints taken before it read them,
    `facts` what a reader may want (rows, barcode_sha256, ...).
    """
    path = Path(path)
    if path.is_file():
        facts = {"sha256": file_sha256(path), "bytes": path.stat().st_size, **facts}
    write_json(done_path(path), {
        **facts, "config_sha256": config_sha256(config), "config": dict(config),
        "inputs": fingerprints(inputs), "versions": program_versions(),
    })


def is_done(path: Path | str, *, config: Mapping, inputs: Mapping[str, Path | str | Mapping], **facts: object) -> bool:
    """True if `path` was finished from exactly these inputs with exactly this config and is as it was, which `facts` may witness."""
    path, done = Path(path), read_done(path)
    if not path.exists() or not all(isinstance(file, Mapping) or Path(file).is_file() for file in inputs.values()):
        return False
    if done.get("config_sha256") != config_sha256(config) or any(done.get(name) != facts[name] for name in facts):
        return False
    return (done.get("inputs") == fingerprints(inputs)
            and (not path.is_file() or done.get("sha256") == file_sha256(path)))


def read_done(path: Path | str) -> dict:
    """The done-manifest of a file or folder; empty where there is none that can be read."""
    try:
        done = read_json(done_path(path), "a done-manifest")
    except (InputError, OSError):
        return {}
    return done if isinstance(done, dict) else {}


def record_file(path: Path | str) -> None:
    """Write the size and SHA-256 of a finished cache file beside it (`name.json`), for `is_as_recorded`."""
    path = Path(path)
    write_json(path.with_suffix(".json"), {"bytes": path.stat().st_size, "sha256": file_sha256(path)})


def is_as_recorded(path: Path | str) -> bool:
    """Whether a cache file is there with the bytes it was finished with; else who needs it makes it anew."""
    path = Path(path)
    try:
        about = read_json(path.with_suffix(".json"), "the record of a cache file")
        return isinstance(about, dict) and about.get("bytes") == path.stat().st_size and about.get("sha256") == file_sha256(path)
    except (InputError, OSError):
        return False


def program_versions() -> dict[str, str]:
    """Versions of ourselves and of the packages that shape numbers on disk."""
    versions = {}
    for name in ("genes-to-morphology", "numpy", "scipy", "anndata", "h5py", "pillow", "torch", "timm"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
