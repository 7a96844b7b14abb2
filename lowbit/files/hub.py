"""Folders on the Hugging Face hub. huggingface_hub is imported only where the hub is asked."""

import contextlib
import os
from collections.abc import Callable
from typing import Any

_CARD = "README.md"


def local_folder(folder: str | os.PathLike, files: str, content: str) -> str:
    """``folder`` itself, or the local copy of a hub repository of that name.

    Args:
        files: pattern of the files to download.
        content: what should be in it, for errors.

    Raises:
        FileNotFoundError: it is neither.
    """
    folder = os.fspath(folder)
    if os.path.isdir(folder):
        return folder
    # Only "owner/name" can be a repository; anything else is a path that does not exist.
    if os.path.isabs(folder) or folder.count("/") != 1 or folder.startswith("."):
        raise FileNotFoundError(f"{folder}: expected a folder with {content}, found none")
    try:
        from huggingface_hub import snapshot_download

        return snapshot_download(folder, allow_patterns=[files])
    except Exception as error:  # no network, no such repository, no huggingface_hub: all the same to the caller
        raise FileNotFoundError(
            f"{folder}: expected a folder or a hub repository with {content}, got {error}"
        ) from error


def upload(
    folder: str, repo_id: str, card: Callable[[str], str], private: bool | None, token: Any, **options: Any
) -> Any:
    """Upload a folder to the hub; returns what ``HfApi.upload_folder`` does, which takes the ``options``.

    The repository is made if it is not there. If it has no model card it gets ``card(its full name)``; one in the
    folder is removed.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with contextlib.suppress(FileNotFoundError):
        os.remove(os.path.join(folder, _CARD))
    if not api.file_exists(repo_id, _CARD):
        write_card(folder, card(repo_id))
    return api.upload_folder(repo_id=repo_id, folder_path=folder, **options)


def write_card(folder: str | os.PathLike, card: str) -> None:
    """Write ``card`` as the README.md of a folder that has none."""
    with contextlib.suppress(FileExistsError), open(os.path.join(folder, _CARD), "x", encoding="utf-8") as file:
        file.write(card)
