"""Which files a GAN run reads and where its prompts come from, out of the options that say so.

Four kinds of prompts: embedded by frozen CLIP weights (`clip`), by an encoder trained with the generator (`mlp`), handed over as
embeddings (`ready`), or none at all (`none`: unconditional).
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from preprocessing.errors import InputError, OptionError
from preprocessing.inputs import path_list
from training.sample_sheet import SampleFiles, read_sample_sheet, sample_files


@dataclass(frozen=True)
class GanSources:
    """Files of a run. Unconditional: patches alone, no samples."""

    encoder: str                                  # clip, mlp, ready or none
    network: Path | None = None                   # CLIP weights: of the prompts, or of guidance alone
    train: tuple[SampleFiles, ...] = ()
    validation: tuple[SampleFiles, ...] = ()
    patches: tuple[Path, ...] = ()
    val_patches: tuple[Path, ...] = ()

    @property
    def listed(self) -> list[dict]:
        """Plain JSON for the run's config.json."""
        samples = [{**asdict(files), "images": str(files.images), "gex": str(files.gex), "embeddings": str(files.embeddings),
                    "split": split} for split, part in (("train", self.train), ("val", self.validation)) for files in part]
        for sample in samples:
            if sample["embeddings"] == "None":
                del sample["embeddings"]
        return samples + [{"images": str(path), "split": split} for split, part in (("train", self.patches), ("val", self.val_patches))
                          for path in part]


def gan_sources(*, data: str | None, gex: str | None, samples: Path | None, val_data: str | None, val_gex: str | None,
                embeddings: str | None, val_embeddings: str | None, encoder: str | None, network: Path | None,
                guided: bool, scored: bool = False) -> GanSources:
    """Resolve the options; `guided` says whether CLIP guidance is on, `scored` whether its weights score the snapshots."""
    if samples is None and not gex:
        return _unconditional(data, val_data, {"--val-gex": val_gex, "--embeddings": embeddings, "--val-embeddings": val_embeddings,
                                               "--encoder": encoder, "--network": network})
    if samples is not None:
        if data or gex or val_data or val_gex or embeddings or val_embeddings:
            raise OptionError("--samples", "without --data, --gex, --embeddings and their --val- twins", "both")
        train, validation = _from_sheet(samples)
    else:
        train, validation = _from_lists(data, gex, val_data, val_gex, embeddings, val_embeddings)
    kind = _kind(train + validation, encoder, samples or "--embeddings")
    if kind == "clip" and network is None:
        raise OptionError("--network", "CLIP weights that embed the expression (or --encoder mlp, or --embeddings)", "none")
    if kind == "ready" and guided and network is None:
        raise OptionError("--network", "CLIP weights with --clip-weight: they guide", "none")
    if network is not None and (kind == "mlp" or (kind == "ready" and not guided and not scored)):
        raise OptionError("--network", "nothing: prompts come from elsewhere, nothing is guided or scored", str(network))
    return GanSources(kind, network, tuple(train), tuple(validation))


def _unconditional(data: str | None, val_data: str | None, needless: dict[str, object]) -> GanSources:
    if not data:
        raise OptionError("--data and --gex", "both, or --samples; --data alone trains without prompts", "neither")
    for option, said in needless.items():
        if said:
            raise OptionError(option, "--gex with it, or (unconditional training) neither", f"{said} alone")
    return GanSources("none", patches=tuple(path_list(data)), val_patches=tuple(path_list(val_data or "")))


def _from_sheet(path: Path) -> tuple[list[SampleFiles], list[SampleFiles]]:
    sheet = read_sample_sheet(path)
    train = [sample for sample in sheet if sample.split == "train"]
    if not train:
        raise InputError(path, "split", "at least one sample of split train", "none")
    return train, [sample for sample in sheet if sample.split == "val"]


def _from_lists(data: str | None, gex: str, val_data: str | None, val_gex: str | None, embeddings: str | None,
                val_embeddings: str | None) -> tuple[list[SampleFiles], list[SampleFiles]]:
    if not data:
        raise OptionError("--data and --gex", "both, or --samples", "--gex alone")
    if bool(val_data) != bool(val_gex):
        raise OptionError("--val-data and --val-gex", "both or none", "one of them")
    if val_embeddings and not val_data:
        raise OptionError("--val-embeddings", "with --val-data and --val-gex", "alone")
    train = _with_embeddings(sample_files(data, gex), embeddings, "--embeddings")
    return train, _with_embeddings(sample_files(val_data, val_gex), val_embeddings, "--val-embeddings") if val_data else []


def _with_embeddings(samples: list[SampleFiles], embeddings: str | None, option: str) -> list[SampleFiles]:
    if not embeddings:
        return samples
    paths = path_list(embeddings)
    if len(paths) != len(samples):
        raise OptionError(option, f"one .npy for each of the {len(samples)} files of expression, in their order", str(len(paths)))
    return [replace(sample, embeddings=path) for sample, path in zip(samples, paths, strict=True)]


def _kind(samples: Sequence[SampleFiles], encoder: str | None, where: Path | str) -> str:
    """clip, mlp or ready; embeddings are handed over for all samples or for none."""
    n_ready = sum(sample.embeddings is not None for sample in samples)
    if not n_ready:
        return encoder or "clip"
    if n_ready < len(samples):
        lacking = [sample.sample_id for sample in samples if sample.embeddings is None]
        raise InputError(where, "embeddings", "of every sample, those of validation included, or of none", f"none of {', '.join(lacking)}")
    if encoder is not None:
        raise OptionError("--encoder", "nothing with ready-made --embeddings", encoder)
    return "ready"
