"""Push a packed checkpoint to the Hub, verified, in one commit; a push that fails leaves the folder and the way on."""

from __future__ import annotations

import logging
import os
import re
import shlex
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HTTPError

from ..errors import CPQError
from .card import CARD, HERE, MARK, PICTURE, is_users
from .checkpoint import WEIGHTS, verify_checkpoint

logger = logging.getLogger(__name__)

_LOCAL = re.compile(r"[_.]|(incomplete-)?checkpoint-\d+")  # of a Trainer's folder


def push_to_hub(
    model: Any, repo_id: str, *, max_shard_size: int | str | None = None, tags: Any = None, **kwargs: Any
) -> CommitInfo | None:
    """`push_to_hub` of a packed model.

    Every process may call it, the first one pushes. A push that fails leaves what it wanted to push in a folder.

    Args:
        model (`PreTrainedModel`): A packed model.
        repo_id (`str`): The repository, made if it is not there.
        max_shard_size (`int` or `str`, *optional*): As for `save_pretrained`.
        tags (`list[str]`, *optional*): Tags of the model card.
        kwargs: Those of [`push_folder`].
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        return None
    if tags:
        model.add_model_tags(tags)
    folder = Path(tempfile.mkdtemp(prefix="cpq-push-"))
    model.save_pretrained(folder, **({} if max_shard_size is None else {"max_shard_size": max_shard_size}))
    info = push_folder(folder, repo_id, verified=True, **kwargs)
    shutil.rmtree(folder)
    return info


def push_folder(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
    verified: bool = False,
) -> CommitInfo:
    """Push the folder of a packed checkpoint in one commit. A model card that somebody wrote on the Hub stays.

    Args:
        folder (`str` or `PathLike`): A packed checkpoint. Checkpoints of a Trainer inside of it stay where they are.
        repo_id (`str`): The repository, made if it is not there.
        private (`bool`, *optional*): Whether a repository that is made is private.
        token (`str` or `bool`, *optional*): As everywhere in huggingface_hub.
        revision (`str`, *optional*): Branch to push to, made if it is not there.
        create_pr (`bool`, defaults to False): Open a pull request instead.
        commit_message (`str`, *optional*): Defaults to "Upload packed model".
        commit_description (`str`, *optional*): A longer text.
        verified (`bool`, defaults to False): It was verified just now.

    Raises:
        CPQError: If the folder does not verify, or the Hub refuses or cannot be reached; the message then has the
            command that goes on.
    """
    folder = Path(folder)
    if not verified:
        verify_checkpoint(folder)
    options = {"--private": private or None, "--revision": revision, "--message": commit_message}
    command = ["cpq-hf", "push", str(folder), repo_id]
    for name, value in options.items():
        command += [] if value is None else [name] if value is True else [name, str(value)]
    way_on = f"Nothing is lost, the packed checkpoint is whole in {folder}. To go on: {shlex.join(command)}"
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        _say_where(folder / CARD, repo_id)
        return api.create_commit(  # one commit, where `upload_folder` may make several
            repo_id,
            _operations(api, folder, repo_id, revision),
            commit_message=commit_message or "Upload packed model",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        raise CPQError(f"{repo_id}: the push was refused or interrupted: {_one_line(error)}. {way_on}") from error
    except KeyboardInterrupt:
        logger.error("%s: the push was interrupted. %s", repo_id, way_on)
        raise


def _operations(api: HfApi, folder: Path, repo_id: str, revision: str | None) -> list[Any]:
    """Add the files of a folder, but no card where somebody wrote one; delete weights of an earlier push."""
    files = {str(file.relative_to(folder).as_posix()): file for file in sorted(folder.rglob("*")) if file.is_file()}
    there = api.list_repo_files(repo_id, revision=revision)
    if CARD in there and not is_users(folder / CARD):
        if is_users(Path(api.hf_hub_download(repo_id, CARD, revision=revision))):
            files = {name: file for name, file in files.items() if name not in (CARD, PICTURE)}
    pushed = {name: file for name, file in files.items() if not _LOCAL.match(name)}
    deleted = [CommitOperationDelete(name) for name in there if WEIGHTS.fullmatch(name) and name not in pushed]
    return [*(CommitOperationAdd(name, file) for name, file in pushed.items()), *deleted]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def _say_where(card: Path, repo_id: str) -> None:
    """Write into our model card which repository it goes to, and close a door that a Trainer's push has left open."""
    if card.is_file() and MARK in (text := card.read_text(encoding="utf-8")):
        text = text.replace(HERE, repo_id).replace("library_name: peft", "library_name: transformers")
        card.write_text(text, encoding="utf-8")
