# SPDX-License-Identifier: Apache-2.0
"""Sources of a merge: folders, or repositories on the Hub fetched with huggingface_hub.

Downloads land in the Hub's own cache (`HF_HOME`), resume, follow `HF_ENDPOINT`, `HF_TOKEN` and
`HF_HUB_OFFLINE`. Only configs, tokenizer files and safetensors are asked for. Every file is then
compared with the hash that the Hub names it by.
"""

import hashlib
import logging
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_d2f.hub import HubError
from vllm_d2f.hub.checkpoint import INDEX, SINGLE, refuse_pickle, shard_names

__all__ = ["Source", "Unreachable", "check_space", "fetch_adapter", "fetch_base", "local"]

logger = logging.getLogger(__name__)

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
BASE_FILES = ("config.json", "generation_config.json", INDEX, *TOKENIZER_FILES)
SPARE = 64 << 20

_PIECE = 4 << 20


class Unreachable(HubError):
    """The Hub cannot be asked and its cache has not what is needed."""


@dataclass(frozen=True, slots=True)
class Source:
    """A folder with a checkpoint or an adapter, and where it came from.

    Attributes:
        origin: the Hub id, or the folder's absolute path.
        revision: the commit on the Hub; None for a folder that does not know.
    """

    origin: str
    revision: str | None
    folder: Path


def local(folder: str | Path) -> Source:
    """A folder of the user's. One in the Hub's cache knows its repository and commit."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise HubError(f"{folder}: no such folder")
    path = path.resolve()
    repository = re.fullmatch(r"models--(.+?)--(.+)", path.parent.parent.name)
    if repository and path.parent.name == "snapshots":
        return Source("/".join(repository.groups()), path.name, path)
    return Source(str(path), None, path)


def fetch_adapter(repository: str, revision: str | None) -> Source:
    """Download an adapter.

    Raises:
        Unreachable, HubError: see `_snapshot`; an adapter whose weights are pickle.
    """
    source = _fetch(repository, revision, ADAPTER_FILES)
    if not (source.folder / "adapter_model.safetensors").exists():
        refuse_pickle(source.folder, "adapter", _listed(source))
        raise HubError(f"{repository}: holds no adapter_model.safetensors")
    return source


def fetch_base(repository: str, revision: str | None) -> Source:
    """Download a base's small files; `fetch_weights` gets the rest once they have been checked."""
    source = _fetch(repository, revision, BASE_FILES)
    if not (source.folder / INDEX).exists():
        names = _listed(source)
        if names is not None and SINGLE not in names:
            refuse_pickle(source.folder, "model", names)
            raise HubError(f"{repository}: holds no safetensors weights")
    return source


def fetch_weights(source: Source, target: Path) -> None:
    """Download the weights of a base whose small files are there.

    Args:
        target: where as many bytes again will be written; both must fit on the disk.
    """
    names = shard_names(source.folder) if (source.folder / INDEX).exists() else [SINGLE]
    _check_download_space(source, names, target)
    _fetch(source.origin, source.revision, names)
    missing = [name for name in names if not (source.folder / name).exists()]
    if missing:
        raise HubError(f"{source.origin}: its index names {missing[0]}, which it does not hold")


def check_space(folder: Path, needed: int, what: str) -> None:
    """Refuse to begin what the disk of `folder` cannot hold."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed + SPARE:
        raise HubError(
            f"not enough disk space for {what}: {_gb(needed + SPARE)} needed under {folder}, "
            f"{_gb(free)} free. Free some (`python -m vllm_d2f models` shows what is there, "
            "`python -m vllm_d2f rm NAME` removes it) or set HF_HOME or D2F_CACHE to a folder "
            "on another disk"
        )


def _fetch(repository: str, revision: str | None, names: Sequence[str]) -> Source:
    """Download files and compare them with their hashes; a damaged one is fetched once more."""
    folder = _snapshot(repository, revision, names)
    damaged = _remove_damaged(folder, names)
    if damaged:
        logger.warning("%s: %s was damaged, downloading it again", repository, ", ".join(damaged))
        folder = _snapshot(repository, revision, names)
        if still := _remove_damaged(folder, names):
            raise HubError(
                f"{repository}: {still[0]} arrived twice with another content than the Hub's hash "
                "says. A proxy or the disk changes it; it was removed"
            )
        if missing := [name for name in damaged if not (folder / name).exists()]:
            raise Unreachable(
                f"{repository}: {missing[0]} in the cache was damaged and cannot be fetched again"
            )
    return Source(repository, folder.name, folder)


def _snapshot(repository: str, revision: str | None, names: Sequence[str]) -> Path:
    """`huggingface_hub.snapshot_download`, with errors that say what to do."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    at = f" at revision {revision}" if revision else ""
    try:
        # The names hold no wildcards: `checkpoint.index_of` refuses others.
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(names)))
    except HFValidationError as error:
        raise HubError(f"{repository!r:.100}: neither a folder nor a Hub id ({error})") from None
    except RevisionNotFoundError:
        raise HubError(f"{repository}: the Hub has no revision {revision}") from None
    except GatedRepoError:
        raise HubError(
            f"{repository}: its licence must be accepted on the Hub; then log in (hf auth login) "
            "or set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise HubError(
            f"{repository}: not on the Hub, or private (log in with hf auth login, or set HF_TOKEN)"
        ) from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise Unreachable(
            f"{repository}{at} is not in the cache, and {_why_offline(error)}"
        ) from error
    except Exception as error:
        # Beside huggingface_hub's errors those of its HTTP client, which are not its interface.
        client = type(error).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore", "requests")
        if not client and not isinstance(error, (HfHubHTTPError, OSError)):
            raise
        network = (HfHubHTTPError, ConnectionError, TimeoutError)
        if (
            isinstance(error, OSError)
            and error.errno is not None
            and not isinstance(error, network)
        ):
            raise HubError(f"{repository}: cannot be written to the cache ({error})") from error
        raise Unreachable(
            f"{repository}{at}: the download was interrupted ({_first_line(error)}); run the same "
            "command again, finished files are kept"
        ) from error


def _why_offline(error: BaseException) -> str:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    return f"the Hub cannot be reached ({_first_line(error.__cause__ or error)})"


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]:.200}" if text else type(error).__name__


def _listed(source: Source) -> list[str] | None:
    """Names of a repository's files; None if the Hub cannot be asked."""
    from huggingface_hub import HfApi

    try:
        return HfApi().list_repo_files(source.origin, revision=source.revision)
    except Exception:  # only used for a better message
        return None


def _check_download_space(source: Source, names: Sequence[str], target: Path) -> None:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import DryRunError

    try:
        plan = snapshot_download(
            source.origin, revision=source.revision, allow_patterns=list(names), dry_run=True
        )
    except (DryRunError, OSError):
        return  # no connection: what is in the cache is used, or `_snapshot` says what is missing
    missing = sum(file.file_size or 0 for file in plan if file.will_download)
    merged = sum(file.file_size or 0 for file in plan)
    cache = Path(constants.HF_HUB_CACHE)
    if _device(cache) == _device(target):
        check_space(cache, missing + merged, f"{source.origin} and its merged copy")
    else:
        check_space(cache, missing, source.origin)
        check_space(target, merged, "the merged copy")


def _device(path: Path) -> int:
    while not path.exists():
        path = path.parent
    return path.stat().st_dev


def _remove_damaged(folder: Path, names: Iterable[str]) -> list[str]:
    """Delete files whose content is not what the Hub's cache names them by; return their names.

    The cache keeps a file under the sha256 of its content (large files) or under git's sha1. On a
    file system without links there are no such names, and only sizes have been compared.
    """
    damaged = []
    for name in names:
        path = folder / name
        blob = Path(os.path.realpath(path))
        if blob.is_file() and not _is_intact(blob):
            blob.unlink()
            path.unlink(missing_ok=True)
            damaged.append(name)
    return damaged


def _is_intact(blob: Path) -> bool:
    if re.fullmatch(r"[0-9a-f]{64}", blob.name):
        digest = hashlib.sha256()
    elif re.fullmatch(r"[0-9a-f]{40}", blob.name):
        digest = hashlib.sha1(b"blob %d\0" % blob.stat().st_size, usedforsecurity=False)
    else:
        return True
    with blob.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest() == blob.name


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
