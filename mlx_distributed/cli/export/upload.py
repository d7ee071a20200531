"""An exported folder on its way to the Hugging Face Hub, which nothing else here sends anything to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mlx_distributed.errors import ConfigError, UploadError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

NOT_LOGGED_IN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"


def open_hub(name: str) -> HfApi:
    """The Hub, once it knows who asks: before anything is written.

    Raises:
        ConfigError: `name` cannot be one, nobody is logged in, or the Hub cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError
    from huggingface_hub.utils._validators import validate_repo_id

    api = HfApi()
    try:
        validate_repo_id(name)
        if "/" not in name:
            raise ConfigError(f"--upload {name}: give the name with its owner, as in user/{name}")
        api.whoami()
    except HFValidationError as error:
        raise ConfigError(f"--upload {name}: {error}") from error
    except LocalTokenNotFoundError:
        raise ConfigError(
            f"--upload {name}: there are no credentials for the Hugging Face Hub on this machine; {NOT_LOGGED_IN}, and "
            "export again. Nothing was written"
        ) from None
    except _failures() as error:
        raise ConfigError(
            f"--upload {name}: the Hugging Face Hub refuses you or cannot be reached ({_in_short(error)}); look after "
            f"the network, {NOT_LOGGED_IN}, or export without --upload. Nothing was written"
        ) from error
    return api


def upload(api: HfApi, name: str, folder: Path, *, private: bool) -> str:
    """Send a folder; returns the address of what was made.

    Raises:
        UploadError: it could not be sent, or is to be private and the repository is public.
    """
    try:
        address = api.create_repo(name, private=private or None, exist_ok=True)
        if private and not api.repo_info(name).private:
            raise UploadError(
                f"--private: {name} is there already and public, so nothing was uploaded; make it private on the Hub "
                f"or take another name, then run `hf upload {name} {folder}`. The export in {folder} is whole"
            )
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Export of mlx-distributed")
    except _failures() as error:
        raise UploadError(
            f"{folder} is whole, and could not be uploaded to {name} ({_in_short(error)}); mend that, then run "
            f"`hf upload {name} {folder}`"
        ) from error
    return str(address)


def _failures() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises where it, the network or the Hub fails."""
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # its name there, whichever client it is

    return (OSError, RuntimeError, ValueError, httpx.HTTPError)


def _in_short(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
