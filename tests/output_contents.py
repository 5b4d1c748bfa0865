"""What an output folder holds, so that two runs can be compared: every dataset, every pixel, every line, but no times."""
from __future__ import annotations

import hashlib
import json
from pathlib import Path

import h5py
import numpy as np
from PIL import Image


def contents(folder: Path) -> dict:
    """Name -> content of everything in the files of a folder. Nothing that is hidden."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        if any(part.startswith(".") for part in Path(name).parts):
            continue
        if path.suffix in (".h5", ".h5ad"):
            with h5py.File(path) as file:
                file.visititems(lambda key, item, name=name: found.update({f"{name}:{key}": _hdf5_item(item)}))
        elif path.suffix == ".png":
            found[name] = np.asarray(Image.open(path)).tobytes()
        elif path.name.endswith(".done.json"):
            found[name] = {key: value for key, value in json.loads(path.read_text()).items() if key in ("rows", "config", "barcode_sha256")}
        else:
            found[name] = path.read_bytes()
    return found


def _hdf5_item(item: h5py.Dataset | h5py.Group) -> tuple:
    attributes = {name: _digest(np.asarray(value)) for name, value in item.attrs.items()}
    if isinstance(item, h5py.Group) or item.shape is None:
        return type(item).__name__, attributes
    return _digest(np.asarray(item[()])), attributes


def _digest(array: np.ndarray) -> tuple:
    values = repr(array.tolist()).encode() if array.dtype.hasobject else np.ascontiguousarray(array).tobytes()
    return array.dtype.str, array.shape, hashlib.sha256(values).hexdigest()


def differences(one: dict, other: dict) -> list[str]:
    """Names of what is in one alone, or not the same in both."""
    return sorted(name for name in one | other if one.get(name) != other.get(name))


def leftovers(folder: Path) -> list[str]:
    """What no finished run leaves: temporaries, working folders, blocks. Locks may stay."""
    return sorted(path.name for path in folder.rglob("*") if ".tmp." in path.name or ".old." in path.name or (
        path.name.startswith(".") and not path.name.endswith(".lock")))
