"""The configuration of `train_clip.py` composed from YAML files and `key=value` words: Hydra's composition, and nothing else of Hydra.

Its job runner would also call whatever `hydra.callbacks` and `hydra.job_logging` of a file name: a file from a stranger is data here.
What stands below `hydra:` in a file has no effect, and no file reads the environment (`${oc.env:...}`), whose tokens would end in the
run's own record of its configuration.
"""
from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from preprocessing.errors import OptionError, is_out_of_memory

if TYPE_CHECKING:
    from omegaconf import DictConfig

ASSETS = Path(__file__).resolve().parent.parent / "assets"
KEYS = "keys of the configuration (--cfg job shows them)"
PATHS = re.compile(r"^(\+{0,2}(?:data\.(?:train|val)_(?:gex|image_dir)|data\.samples|run_dir|out_dir|ckpt_path"
                   r"|(?:data|image)\.cache_dir|model\.(?:image_encoder_weights|pathways_file)))=([^\[\"'].*)$")
OF_HYDRA = re.compile(r"^[+~]*hydra\b")


def quoted(text: str) -> str:
    """A string in the grammar of Hydra's words."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def quote_paths(words: Sequence[str]) -> list[str]:
    """Hydra reads a comma as a sweep and trips over spaces: a bare path or comma list becomes a quoted string."""
    matches = [(word, PATHS.match(word)) for word in words]
    return [f"{match[1]}={quoted(match[2])}" if match and match[2] not in ("null", "none") else word for word, match in matches]


def compose_config(name: str, folder: Path | str | None, words: Sequence[str]) -> DictConfig:
    """The configuration `name` of assets/, or of `folder` (which may build on those of assets/), changed by `key=value` words.

    Raises `OptionError` for whatever is wrong with a file or a word.
    """
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from yaml import YAMLError

    OmegaConf.clear_resolver("oc.env")
    for word in words:
        if OF_HYDRA.match(word):
            raise OptionError("command line", KEYS, f"{word}, a setting of Hydra itself, which has no part here")
    folders = [ASSETS] if folder is None else [ASSETS, Path(folder).resolve()]
    first = next((place for place in reversed(folders) if (place / f"{name.removesuffix('.yaml')}.yaml").is_file()), ASSETS)
    others = ", ".join(quoted(f"file://{place}") for place in folders if place != first)
    try:
        with initialize_config_dir(str(first), version_base="1.3", job_name="train_clip"):
            return compose(name, [f"hydra.searchpath=[{others}]", *quote_paths(words)])
    except YAMLError as error:   # a tag that would build an object, too
        raise OptionError("configuration", "YAML of plain values", " ".join(str(error).split())) from error
    except Exception as error:   # Hydra raises a dozen types, some of them bare, for a word or a file it cannot read
        if (isinstance(error, OSError) and not isinstance(error, HydraException)) or is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OptionError("command line", KEYS, reason) from error
