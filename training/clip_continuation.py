"""What a CLIP run is when it goes on: the spots, the split and the options it began with, but for those that say how, not what."""
from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from preprocessing.errors import WeightsError
from training.clip_config import ClipConfig

RUN = "run"               # its entry in a checkpoint
MAY_CHANGE = (            # rates are said aloud where they change; a cycle's length and the optimiser are compared by the module
    "data.train_gex", "data.train_image_dir", "data.val_gex", "data.val_image_dir", "data.samples", "data.max_size",
    "data.val_fraction", "data.val_buffer_px",             # which spots these lead to is compared
    "data.cache_dir", "data.loader_threads", "image.cache_dir", "optimizer.name", "optimizer.schedule", "optimizer.lr",
    "optimizer.weight_decay", "trainer.max_epochs", "trainer.accelerator", "trainer.devices", "trainer.num_nodes",
    "trainer.timeout_minutes", "trainer.precision", "trainer.val_every_steps", "trainer.save_top", "trainer.select",
    "trainer.log_every_steps", "trainer.num_threads", "trainer.progress_bar", "logger", "out_dir", "run_dir", "ckpt_path")


@dataclass(frozen=True)
class ResumePoint:
    """A whole checkpoint, and what its run began with; None in one older than this record."""

    path: Path
    run: Mapping | None

    @classmethod
    def of(cls, path: Path, content: Mapping) -> ResumePoint:
        """`content`: what the file holds."""
        try:
            run = json.loads(content[RUN]) if RUN in content else None
        except (TypeError, ValueError, RecursionError) as error:
            raise WeightsError(path, RUN, "what the run began with, as JSON", str(content[RUN])[:80]) from error
        if run is not None and not (isinstance(run, dict) and isinstance(run.get("config"), dict)):
            raise WeightsError(path, RUN, "data_sha256 and config", str(run)[:80])
        return cls(path, run)


def run_record(config: ClipConfig, data_sha256: str) -> dict:
    """Plain JSON for a checkpoint: what must be the same when the run goes on."""
    told = {name: value for name, value in _flat(asdict(config)) if name not in MAY_CHANGE and not name.startswith("model.")}
    return json.loads(json.dumps({"data_sha256": data_sha256, "config": told}))


def require_same_run(start: ResumePoint | None, now: Mapping) -> None:
    """Refuse to go on with other spots or options; a name that one side lacks is of another version."""
    if start is None or start.run is None:
        return
    began = start.run["config"]
    changed = [f"{name} {began[name]} -> {value}" for name, value in now["config"].items() if name in began and began[name] != value]
    for what, expected, found in (
            ("options", "those it was started with", ", ".join(changed)),
            ("data", "the patches, expression and split it was started with", "" if start.run.get("data_sha256") == now["data_sha256"]
             else "others")):
        if found:
            raise WeightsError(start.path, what, expected, found, "Give these, or another run_dir without ckpt_path")


def _flat(section: Mapping, prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in section.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
