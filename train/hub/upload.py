"""Upload of an exported folder to the Hugging Face hub."""

from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from data.cli import UsageError
from train.errors import TrainingError


def check_push(repo: str) -> None:
    """Check the name and the login before any work. Raises UsageError if `repo` is no name or there is no login."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UsageError(f"push_to_hub={repo}: {error}") from error
    if get_token() is None:
        raise UsageError(f"push_to_hub={repo} needs a token: run `hf auth login`, or set HF_TOKEN")


def push(folder: Path, repo: str) -> str:
    """Upload `folder` and return its address. A repository that does not exist yet is created, private.

    Raises TrainingError if the hub cannot be reached or refuses; the folder stays as it is.
    """
    api = HfApi()
    try:
        address = api.create_repo(repo, private=True, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Export from kvfrontier")
    except Exception as error:  # the hub raises what its HTTP library does, which has changed twice
        again = f"`hf upload {repo} {folder}` sends it again"
        raise TrainingError(f"{folder} is complete, and could not be sent to {repo} ({error}); {again}") from error
    return str(address)
