"""Read and apply changes of genes: `Up:+2,Down:0`, gene sets by name, and random genes of like expression to compare with.

Values are normalised expression, log1p of scaled counts, natural logarithm: `+2` adds 2 to it (not below 0), `0` or `1.5` sets it.
The library size is not scaled again: only the named genes change. Letters: N spots, G genes, T changed genes.
"""
from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from preprocessing.errors import InputError, OptionError, first_few
from preprocessing.gene_sets import read_gene_sets
from preprocessing.inputs import read_text

LIKE_GENES = 50            # a random gene is one of so many of nearest mean expression


@dataclass(frozen=True)
class GeneChanges:
    """T genes and what becomes of each."""

    columns: np.ndarray    # int (T,) of the expression
    values: np.ndarray     # float (T,)
    adds: np.ndarray       # bool (T,): the value is added, else set
    strangers: tuple[str, ...] = ()      # members of the named sets that the model does not know; they do not change

    def apply(self, rows: np.ndarray) -> np.ndarray:
        """A changed copy of normalised expression (N, G)."""
        changed = rows.copy()
        part = rows[:, self.columns]
        changed[:, self.columns] = np.maximum(np.where(self.adds, part + self.values, self.values), 0)
        return changed

    def at(self, columns: np.ndarray) -> GeneChanges:
        """The same changes of other genes."""
        return replace(self, columns=columns)

    def random_like(self, mean_expression: np.ndarray, rng: np.random.Generator) -> GeneChanges:
        """The same changes of random other genes, each near its own in mean expression (G,); no gene twice, none of the changed ones."""
        free = np.setdiff1d(np.arange(len(mean_expression)), self.columns)
        if len(free) < len(self.columns):
            raise OptionError("--controls", "as many genes left as are changed, to draw random sets from", f"{len(free)} left")
        drawn = []
        for column in self.columns:
            nearest = free[np.argsort(np.abs(mean_expression[free] - mean_expression[column]), kind="stable")[:LIKE_GENES]]
            drawn.append(int(rng.choice(nearest)))
            free = free[free != drawn[-1]]
        return self.at(np.array(drawn))

    def describe(self, gene_names: list[str]) -> str:
        """`Up +2, Down = 0`, the first dozen."""
        parts = [f"{gene_names[column]} {'' if not adds else '+' if value >= 0 else '-'}{'' if adds else '= '}{abs(value):g}"
                 for column, value, adds in zip(self.columns, self.values, self.adds, strict=True)]
        return ", ".join(parts[:12]) + (f", and {len(parts) - 12} more" if len(parts) > 12 else "")


def read_gene_changes(text: str, gene_names: list[str], sets_file: Path | None = None) -> GeneChanges:
    """`NAME:CHANGE,...`, or a file of such lines. A name is a gene, or a set of `sets_file` (GMT), whose known genes then all change.

    What is wrong in the text of the option itself is a usage error; in a file, or against the model's genes, it is one of the input.
    """
    path, is_file = Path(text), os.path.isfile(text)       # a list may be longer than any file's name: no error
    source = str(path) if is_file else "--genes"
    if is_file:
        text = ",".join(line.partition("#")[0] for line in read_text(path, "lines of GENE:CHANGE").splitlines())
    sets = read_gene_sets(sets_file) if sets_file else {}
    place = {name: column for column, name in enumerate(gene_names)}
    columns, values, adds, unknown, strangers = [], [], [], [], []
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, change = part.rpartition(":")
        value, is_added = _parse_change(path if is_file else None, part, name, change)
        members = [name] if name in place else sets.get(name, [])
        known = [place[gene] for gene in members if gene in place]
        unknown += [] if known else [name]
        strangers += [gene for gene in members if gene not in place]
        columns += known
        values += [value] * len(known)
        adds += [is_added] * len(known)
    if unknown:
        raise InputError(source, "genes", f"some of the {len(gene_names):,} genes of the model" + (f", or sets of {sets_file}" if sets_file
                         else ", or sets of --gene-sets"), f"others: {first_few(unknown)}")
    if not columns:
        raise _refused(path if is_file else None, "changes", "at least one, as Up:+2,Down:0", "none")
    twice = [gene_names[column] for column in set(columns) if columns.count(column) > 1]
    if twice:
        raise _refused(path if is_file else None, "genes", "every gene changed once", f"twice: {first_few(sorted(twice))}")
    return GeneChanges(np.array(columns), np.array(values), np.array(adds), tuple(dict.fromkeys(strangers)))


def _refused(path: Path | None, field: str, expected: str, found: str) -> InputError | OptionError:
    """Of a file of changes an error of the input, else of the option."""
    return InputError(path, field, expected, found) if path else OptionError("--genes", expected, found)


def _parse_change(path: Path | None, part: str, name: str, change: str) -> tuple[float, bool]:
    """(value, whether it is added)."""
    try:
        value = float(change)
    except ValueError:
        value = math.nan
    is_added = change.strip()[:1] in ("+", "-")
    if not name.strip() or not math.isfinite(value):
        raise _refused(path, "changes", "NAME:+2 or NAME:-2 to add, NAME:0 to set, separated by commas"
                       + ("" if path else "; or a file of such lines"), part)
    return value, is_added
