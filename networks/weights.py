"""Read and write weights without running code from a file.

A weights folder is `model.safetensors` + `config.json` (plain JSON) + `SHA256SUMS` (as `sha256sum -c` reads it).
Single files are `.safetensors`, or `.pt .pth .bin .torch` read with `weights_only=True`. Everything else is a `WeightsError`.
"""
from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from preprocessing.done_manifests import file_sha256, program_versions
from preprocessing.errors import InputError, WeightsError, first_few
from preprocessing.output_places import FolderKind
from preprocessing.outputs import finished_folder

MODEL_FILE, CONFIG_FILE, SUMS_FILE, CARD_FILE = "model.safetensors", "config.json", "SHA256SUMS", "README.md"
KIND = FolderKind("a weights folder", r"model\.safetensors|config\.json|SHA256SUMS|README\.md", mark=SUMS_FILE)
TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".torch", ".ckpt")
HUB = "hf:"      # in front of the name of a repository
WRAPPERS = ("state_dict", "model", "teacher")   # keys under which others' files keep their tensors


def read_state_dict(path: Path | str, values: bool = True) -> dict[str, Tensor]:
    """Tensors by name, on the CPU; without `values` on the device `meta`. A single wrapping key (`state_dict`, `model`, `teacher`) is
    opened."""
    content = read_plain_file(path, values)
    for key in WRAPPERS:
        if isinstance(content.get(key), Mapping):
            content = content[key]
            break
    strangers = [name for name, value in content.items() if not isinstance(value, Tensor)]
    if strangers or not content:
        raise WeightsError(path, "contents", "tensors by name", f"{first_few(strangers)} that are not tensors" if strangers else "none")
    return dict(content)


def read_plain_file(path: Path | str, values: bool = True) -> dict:
    """The dictionary in a weights file: tensors and plain values only, no object is ever built from it. Without `values` the tensors
    are only described, which takes no time however large the file is."""
    path = Path(path)
    if not path.is_file():
        raise InputError(path, "file", "a weights file", "nothing there")
    if path.suffix != ".safetensors" and path.suffix not in TORCH_SUFFIXES:
        raise WeightsError(path, "suffix", f".safetensors or {' '.join(TORCH_SUFFIXES)}", path.suffix or "none")
    try:
        if path.suffix == ".safetensors":
            content = load_file(path) if values else _described(path)
        else:
            content = torch.load(path, map_location="cpu" if values else "meta", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:   # the two loaders raise a dozen types for a damaged or hostile file
        if isinstance(error, OSError) and error.filename is not None:      # not of a damaged place that torch seeks
            raise
        raise WeightsError(path, "contents", "tensors that load without running code", _reason(error)) from error
    if not isinstance(content, Mapping):
        raise WeightsError(path, "contents", "tensors by name", type(content).__name__)
    return dict(content)


def _described(path: Path) -> dict[str, Tensor]:
    """Names and shapes that the header of a .safetensors file gives, which has to fit the file's size."""
    with safe_open(path, framework="pt") as file:
        return {name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in file.keys()}


def write_plain_file(content: Mapping, path: Path | str) -> None:
    """Write what `read_plain_file` reads from a file that is no .safetensors. Python writes it, so that a disk, quota or limit that
    refuses more is an error with its reason, where torch's own writer has none."""
    with open(path, "wb") as stream:
        torch.save(content, stream)


def _reason(error: Exception) -> str:
    """Ours, in plain words: the loaders' own texts advise to run what is in the file."""
    if "GLOBAL" in str(error).upper():   # a class or function that loading would call
        return "a file that holds more than tensors and plain values"
    return "a file that is damaged, cut short or of another kind"


def load_into(module: nn.Module, tensors: Mapping[str, Tensor], path: Path | str) -> None:
    """Copy `tensors` into `module`; all of them or none. `path` is only named in the message.

    Refuses missing, unexpected, misshapen and non-finite tensors, listing each kind.
    """
    require_tensors(module, tensors, path)
    module.load_state_dict(dict(tensors), strict=True)


def require_tensors(module: nn.Module, tensors: Mapping[str, Tensor], path: Path | str) -> None:
    """Refuse, as `load_into` does, what is not the tensors of `module`. Either may lie on the device `meta`, in no memory."""
    own = module.state_dict()
    missing = [name for name in own if name not in tensors]
    unexpected = [name for name in tensors if name not in own]
    misshapen = [f"{name} {tuple(tensors[name].shape)} for {tuple(own[name].shape)}"
                 for name in own if name in tensors and tensors[name].shape != own[name].shape]
    broken = [name for name, tensor in tensors.items()
              if tensor.is_floating_point() and not tensor.is_meta and not torch.isfinite(tensor).all()]
    kinds = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen, "not finite": broken}
    found = "; ".join(f"{kind}: {first_few(names)}" for kind, names in kinds.items() if names)
    if found:
        raise WeightsError(path, "tensors", f"the {len(own)} of {type(module).__name__}", found)


def save_weights_folder(folder: Path | str, tensors: Mapping[str, Tensor], config: Mapping, card: str = "") -> Path:
    """Write a weights folder, with a model card if there is one; it appears under its name only when whole. Returns the folder."""
    folder = Path(folder)
    with finished_folder(folder, validate=load_weights_folder, kind=KIND) as temporary:
        save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, temporary / MODEL_FILE)
        text = json.dumps({**config, "versions": program_versions()}, indent=2)
        (temporary / CONFIG_FILE).write_text(text + "\n")
        sums = "".join(f"{file_sha256(temporary / name)}  {name}\n" for name in (MODEL_FILE, CONFIG_FILE))
        (temporary / SUMS_FILE).write_text(sums)
        if card:
            (temporary / CARD_FILE).write_text(card)
    return folder


def load_weights_folder(folder: Path | str) -> tuple[dict[str, Tensor], dict]:
    """(tensors, config) of a weights folder, after comparing every file with SHA256SUMS."""
    folder = Path(folder)
    _verify_sums(folder)
    try:
        config = json.loads((folder / CONFIG_FILE).read_text())
    except (ValueError, RecursionError) as error:
        raise WeightsError(folder / CONFIG_FILE, "contents", "JSON", str(error)) from error
    if not isinstance(config, dict):
        raise WeightsError(folder / CONFIG_FILE, "contents", "a JSON object", type(config).__name__)
    return read_state_dict(folder / MODEL_FILE), config


def weights_sha256(folder: Path | str) -> str:
    """SHA-256 of the tensors' file in a weights folder: names the weights in other files."""
    _require_files(Path(folder))
    return file_sha256(Path(folder) / MODEL_FILE)


def local_or_hub(path: Path | str) -> Path:
    """A path of this machine as it is; `hf:owner/name`: what the hub or its cache holds, of the branch, tag or commit asked for by
    `hf:owner/name@revision`. Without `hf:` the hub is never asked: a mistyped path may be the name of a stranger's repository."""
    path = Path(path)
    if not path.as_posix().startswith(HUB):
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError
    repository, _, revision = path.as_posix().removeprefix(HUB).partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=[MODEL_FILE, CONFIG_FILE, SUMS_FILE]))
    except (OSError, HFValidationError) as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise InputError(path, "weights", f"a repository of the hub with {MODEL_FILE}, {CONFIG_FILE}, {SUMS_FILE}",
                         f"the hub says: {reason}") from error


def pinned(repository: Path | str) -> str:
    """`hf:owner/name` -> `owner/name@commit`, of the commit that the hub or its cache gives for it now."""
    folder = local_or_hub(repository)      # the hub's cache keeps each commit in snapshots/<commit>
    repository = Path(repository).as_posix().removeprefix(HUB)
    return repository if "@" in repository or folder.parent.name != "snapshots" else f"{repository}@{folder.name}"


def _require_files(folder: Path) -> None:
    if not folder.is_dir():
        raise InputError(folder, "folder", f"a weights folder ({MODEL_FILE}, {CONFIG_FILE}, {SUMS_FILE})", "nothing there")
    missing = [name for name in (MODEL_FILE, CONFIG_FILE, SUMS_FILE) if not (folder / name).is_file()]
    if missing:
        raise WeightsError(folder, "files", f"{MODEL_FILE}, {CONFIG_FILE} and {SUMS_FILE}", f"missing {', '.join(missing)}")


def _verify_sums(folder: Path) -> None:
    _require_files(folder)
    expected = dict(line.split(maxsplit=1)[::-1] for line in (folder / SUMS_FILE).read_text(errors="replace").splitlines()
                    if len(line.split()) == 2)
    for name in (MODEL_FILE, CONFIG_FILE):
        if name not in expected:
            raise WeightsError(folder / SUMS_FILE, "entries", f"one for {name}", "none")
        found = file_sha256(folder / name)
        if expected[name] != found:
            raise WeightsError(folder / name, "SHA-256", f"{expected[name][:64]}, as {folder / SUMS_FILE} says", found,
                               "the file is damaged")
