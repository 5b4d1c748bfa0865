"""How options of these commands are spelt: with hyphens, or with underscores as diffusers' examples have them. Loads no torch."""
from __future__ import annotations

from collections.abc import Callable

import click


def option(name: str, **how) -> Callable:
    """`--train-data-dir` and `--train_data_dir` in one."""
    spellings = dict.fromkeys((f"--{name}", f"--{name.replace('-', '_')}"))
    return click.option(*spellings, name.replace("-", "_"), **how)


def switch(name: str, default: bool, **how) -> Callable:
    """`--use-ema / --no-use-ema`, and with underscores."""
    pairs = [f"--{name}/--no-{name}"]
    if "-" in name:
        pairs.append(f"--{name.replace('-', '_')}/--no_{name.replace('-', '_')}")
    return click.option(*pairs, name.replace("-", "_"), default=default, **how)
