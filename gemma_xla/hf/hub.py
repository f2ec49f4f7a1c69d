"""Uploading folders to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from gemma_xla.errors import UserError
from gemma_xla.storage import fetched, reason


def check_push(name: str) -> None:
    """Make sure, as far as the hub tells, that `push` to the repository ``name`` is going to work.

    Raises:
        UserError: nobody is logged in, the token may only read, or the repository belongs to somebody else.
    """
    try:
        validate_repo_id(name)
        user = HfApi().whoami()
    except Exception as error:  # noqa: BLE001 (beside its own errors, those of whatever HTTP client it uses)
        raise UserError(f"{name}: nothing can be uploaded to it: {_why_not(name, error)}") from error
    owner, slash, _ = name.rpartition("/")
    writable = [user["name"], *(group["name"] for group in user.get("orgs", []))]
    if slash and owner not in writable:
        raise UserError(
            f"{name}: nothing can be uploaded to it: you are logged in as {user['name']} and may write to "
            f"{', '.join(writable)}; choose one of them, or log in as another with `hf auth login`"
        )
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UserError(
            f"{name}: nothing can be uploaded to it: your token may only read; make one that may write on "
            "https://huggingface.co/settings/tokens and give it to `hf auth login`"
        )


def push(folder: Path, name: str) -> str:
    """Upload a folder as a model repository, private if it is new, and return its address.

    Weight files that an earlier upload left there and that are not in the folder are removed from it.

    Raises:
        UserError: the hub cannot be reached or does not take it; the folder is as it was.
    """
    try:
        with fetched(folder) as local:
            api = HfApi()
            url = api.create_repo(name, private=True, exist_ok=True)
            api.upload_folder(
                repo_id=url.repo_id,
                folder_path=local,
                commit_message="Upload by gemma_xla",
                delete_patterns=["*.safetensors", "*.safetensors.index.json"],
            )
    except Exception as error:  # noqa: BLE001
        raise UserError(
            f"{name}: {folder} could not be uploaded to it: {_why_not(name, error)}; the folder is whole: upload it "
            f"later with `hf upload {name} {folder}`"
        ) from error
    return str(url)


def _why_not(name: str, error: Exception) -> str:
    """Why the hub did not take something, and the way out."""
    if isinstance(error, HFValidationError):
        return "it is not the name of a repository, such as me/my-gemma; choose another"
    if isinstance(error, LocalTokenNotFoundError):
        return "nobody is logged in; run `hf auth login`"
    response = error.response if isinstance(error, HfHubHTTPError) else None
    status = None if response is None else response.status_code
    if status == 401:
        return "the Hugging Face hub does not know your token; run `hf auth login`"
    if status == 403:
        return "your token does not allow it; choose another name, or log in with `hf auth login`"
    return f"the Hugging Face hub says: {reason(error.__cause__ or error)}; check the connection"
