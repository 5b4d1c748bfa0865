"""Get a base from the hub and put a pipeline folder there, with the login this machine already has.

No token is taken as an option or written anywhere.
"""
from __future__ import annotations

from pathlib import Path

from preprocessing.errors import InputError


def local_or_hub_pipeline(path: Path | str) -> Path:
    """A path of this machine as it is; `owner/name`, where nothing of that name lies here: what the hub or its cache holds."""
    path = Path(path)
    if path.is_dir() or path.is_absolute() or len(path.parts) != 2 or Path(path.parts[0]).exists():
        if not path.is_dir():
            raise InputError(path, "base", "a pipeline folder in diffusers' layout", "nothing there",
                             "Put unet/, vae/ and scheduler/ of, for example, CompVis/stable-diffusion-v1-4 there, or --from-scratch small")
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError
    try:
        return Path(snapshot_download(path.as_posix(), allow_patterns=[f"{part}/*.{kind}" for part in ("unet", "transformer", "vae")
                                                                       for kind in ("json", "safetensors")] + ["scheduler/*"]))
    except (OSError, HFValidationError) as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        hint = f"Download unet/, vae/ and scheduler/ of {path.as_posix()} and name their folder, or --from-scratch small"
        raise InputError(path, "base", "a pipeline folder here, or a repository of the hub",
                         f"nothing there, and the hub says: {reason}", hint) from error


def push_folder(folder: Path, repository: str) -> None:
    """Upload `folder` to `repository` (owner/name), a private one if it is new."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError

    try:
        api = HfApi()
        api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=repository)
    except (OSError, HFValidationError, LocalTokenNotFoundError) as error:      # the hub's own errors are OSErrors
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise InputError(repository, "--push-to-hub", "a repository of the hub that this machine may write to", reason,
                         f"{folder} is finished: upload it later with `hf upload`") from error
