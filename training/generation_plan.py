"""What one call of gen_images.py makes: requests in their order, cut into batches, and the mark of everything a patch is made of.

Two patches with one mark are the same patch: that is how an interrupted call knows what it need not make again.
"""
from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from networks.snapshot import Snapshot
from preprocessing.done_manifests import program_versions
from preprocessing.outputs import finished_file
from training.prompts import Prompts, Request
from training.sampling import Batch
from training.sampling_options import SamplingOptions

FORMAT = 1                        # of the way from a request to a patch; a patch of another is made again
SAMPLE_COLUMNS = ("prompt", "barcode", "cluster", "seed", "truncation", "weights_sha256")
GRID_ROWS, GRID_COLUMNS = 12, 8


@dataclass(frozen=True)
class GenerationPlan:
    """Every patch of one call. Request i is row i of samples.csv, and of an .h5 of patches."""

    prompts: Prompts
    requests: Sequence[Request]
    options: SamplingOptions
    same_seed: bool               # one z for all prompts of a seed
    patch_px: int
    weights_sha256: str
    made_of: Mapping              # plain JSON: what all patches depend on; `ingredients`

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def n_batches(self) -> int:
        return -(-len(self.requests) // self.options.batch_sz)

    def rows(self, number: int) -> range:
        """Requests of batch `number`: the same ones in any number of processes, and so the same patches, to the last bit."""
        start = number * self.options.batch_sz
        return range(start, min(start + self.options.batch_sz, len(self.requests)))

    def key(self, row: int) -> tuple[int, int]:
        """(seed, number): which random numbers patch `row` takes."""
        request = self.requests[row]
        return request.seed, 0 if self.same_seed else request.prompt

    def batch(self, number: int) -> Batch:
        rows = self.rows(number)
        return Batch(number, self.prompts.embeddings[[self.requests[row].prompt for row in rows]], [self.key(row) for row in rows])

    @cached_property
    def _mark_of_all(self) -> str:
        return hashlib.sha256(json.dumps(self.made_of, sort_keys=True, default=str).encode()).hexdigest()

    def mark(self, row: int) -> str:
        """SHA-256 over weights, prompt, options and seed of patch `row`."""
        seed, number = self.key(row)
        return hashlib.sha256(f"{self._mark_of_all} {self.requests[row].prompt} {seed} {number}".encode()).hexdigest()

    def record(self) -> dict[str, object]:
        """The whole plan, short and as plain JSON."""
        marks = hashlib.sha256("".join(self.mark(row) for row in range(len(self))).encode()).hexdigest()
        return {"made_of": dict(self.made_of), "marks_sha256": marks, "count": len(self), "batch_sz": self.options.batch_sz}

    def write_samples_csv(self, path: Path, columns: Sequence[str], names: Sequence[Sequence[object]]) -> None:
        """One line a request: `names`, how the output calls each, under `columns`, and what it was asked for."""
        with finished_file(path) as temporary, open(temporary, "w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow([*columns, *SAMPLE_COLUMNS])
            for request, name in zip(self.requests, names, strict=True):
                writer.writerow([*name, request.prompt, self.prompts.barcodes[request.prompt], request.cluster or "", request.seed,
                                 self.options.truncation, self.weights_sha256])

    def grid(self) -> dict[int, list[int]]:
        """Which requests grid.png shows of which prompt: some of the first prompts."""
        shown: dict[int, list[int]] = {}
        for row, request in enumerate(self.requests):
            if request.prompt not in shown and len(shown) == GRID_ROWS:
                break
            rows = shown.setdefault(request.prompt, [])
            if len(rows) < GRID_COLUMNS:
                rows.append(row)
        return shown


def ingredients(snapshot: Snapshot, prompts: Mapping, options: SamplingOptions, device: str) -> dict:
    """What every patch of a call depends on; `prompts` is the fingerprint of their file.

    A CPU and a GPU differ by a grey level here and there: they are not mixed.
    """
    versions = program_versions()
    return {"format": FORMAT, "weights_sha256": snapshot.weights_sha256, "gene_encoder": snapshot.config.get("gene_encoder"),
            "prompts": dict(prompts), "encoded": options.encoded, "truncation": options.truncation,
            "noise_mode": options.noise_mode, "translate": list(options.translate), "rotate": options.rotate,
            "device": device.partition(":")[0], "versions": {name: versions.get(name) for name in ("genes-to-morphology", "torch")}}
