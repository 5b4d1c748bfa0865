"""Put a pipeline folder on the hub, with the login this machine already has: no token is taken as an option or written anywhere."""
from __future__ import annotations

from pathlib import Path

from preprocessing.errors import InputError


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
