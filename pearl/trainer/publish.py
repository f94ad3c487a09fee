"""The model's folder on the Hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pearl.errors import PearlError
from pearl.paths import without_folders
from pearl.trainer.model_folder import MODEL_SETTINGS


def open_repository(repo: str) -> None:
    """Makes a private repository on the Hub, or finds one: before a run, so that its end does not fail.

    Raises:
        PearlError: the Hub is not reached, or refuses; or the repository is there and public.
    """
    from huggingface_hub import HfApi

    with _explained(f"{repo} cannot be made on the Hub"):
        HfApi().create_repo(repo, private=True, exist_ok=True)
        private = HfApi().model_info(repo).private
    if not private:
        raise PearlError(f"{repo} is on the Hub already, and public: choose another --push-to-hub, or make it private")


def upload(folder: Path, repo: str) -> None:
    """Puts the model there; no settings name a folder of this machine.

    Raises:
        PearlError: as above; the model stays in its folder.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    training = json.loads(files.pop(MODEL_SETTINGS).read_text(encoding="utf-8"))
    training["settings"] = without_folders(training["settings"])
    operations = [CommitOperationAdd(name, path) for name, path in files.items()]
    operations.append(CommitOperationAdd(MODEL_SETTINGS, json.dumps(training, indent=2).encode()))
    with _explained(f"{folder} is made, but the Hub does not take it as {repo}"):
        HfApi().create_commit(repo, operations, commit_message="Trained with pearl-vlm")


@contextmanager
def _explained(what: str) -> Iterator[None]:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    of_the_client: type[Exception] = next(  # httpx's, or httpx2's
        base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception) and base is not OSError
    )
    try:
        yield
    except (of_the_client, HFValidationError, OSError, RuntimeError) as error:
        raise PearlError(f"{what}: {' '.join(str(error).split())}") from error
