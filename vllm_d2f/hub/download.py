# SPDX-License-Identifier: Apache-2.0
"""Sources of a merge: folders, or repositories on the Hub fetched with huggingface_hub.

A download lands in the Hub's own cache (`HF_HOME`), continues where it broke off, and follows
`HF_ENDPOINT`, `HF_TOKEN` and `HF_HUB_OFFLINE`. It brings configs, tokenizer files and safetensors
only. Every file is then compared with the hash that the Hub names it by.
"""

import hashlib
import logging
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from huggingface_hub import HfApi, constants, errors, snapshot_download

from vllm_d2f.hub import HubError, cache, human, say
from vllm_d2f.hub.checkpoint import INDEX, SINGLE, refuse_pickle, shard_names

logger = logging.getLogger(__name__)

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
SPARE = 64 << 20

# What to download of a base or an adapter before it is checked, and the name of its weights.
_FIRST_FILES = {
    "base": ("config.json", "generation_config.json", INDEX, *TOKENIZER_FILES),
    "adapter": ("adapter_config.json", "adapter_model.safetensors"),
}
_WEIGHTS = {"base": SINGLE, "adapter": "adapter_model.safetensors"}

_HTTP_CLIENTS = ("httpx", "httpx2", "httpcore", "requests")


class Unreachable(HubError):
    """The Hub cannot be reached, and its cache lacks what is needed."""


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


def at_revision(origin: object, revision: object) -> str:
    """Return a source and its revision, if there is one, for messages."""
    return f"{origin} at {revision}" if revision else str(origin)


def local(folder: str | Path) -> Source:
    """Return a folder of the user's. One in the Hub's cache knows its repository and commit."""
    path = Path(folder).expanduser().resolve()
    repository = re.fullmatch(r"models--(.+?)--(.+)", path.parent.parent.name)
    if repository and path.parent.name == "snapshots":
        return Source("/".join(repository.groups()), path.name, path)
    return Source(str(path), None, path)


def fetch(repository: str, revision: str | None, what: str) -> Source:
    """Download what has to be checked first: a base's small files, or a whole adapter.

    Args:
        what: "base" or "adapter".

    Raises:
        Unreachable: there is no connection, and the cache lacks what is needed.
        HubError: the Hub refuses, or the repository holds no safetensors weights.
    """
    source = _fetch(repository, revision, _FIRST_FILES[what])
    weights = _WEIGHTS[what]
    if not any((source.folder / name).exists() for name in (INDEX, weights)):
        try:
            names = HfApi().list_repo_files(repository, revision=source.revision)
        except Exception:  # This is only for a better message than that of the missing file.
            return source
        if weights not in names:
            refuse_pickle(source.folder, what, names)
            raise HubError(f"{repository}: holds no {weights}")
    return source


def fetch_weights(source: Source, target: Path) -> None:
    """Download the weights of a base whose small files are there.

    Args:
        target: the existing folder for the merged copy; both must fit on the disk.

    Raises:
        HubError: a disk is too small, the download fails, or the repository is incomplete.
    """
    names = shard_names(source.folder)
    try:
        files = snapshot_download(
            source.origin, revision=source.revision, allow_patterns=names, dry_run=True
        )
    except (errors.DryRunError, OSError):
        files = []  # Without a connection the cache is used, or `snapshot` says what is missing.
    missing = sum(file.file_size or 0 for file in files if file.will_download)
    merged = sum(file.file_size or 0 for file in files)
    memory = _device_memory()
    if merged > memory:
        say(
            f"{source.origin}: its weights take {human(merged)}, and the devices of this machine "
            f"hold {human(memory)}. They fit if they are quantized or split over more machines"
        )
    if source.folder.stat().st_dev == target.stat().st_dev:
        check_space(target, missing + merged, f"{source.origin} and its merged copy")
    else:
        check_space(source.folder, missing, source.origin)
        check_space(target, merged, "the merged copy")
    _fetch(source.origin, source.revision, names)
    for name in names:
        if not (source.folder / name).exists():
            raise HubError(f"{source.origin}: its index names {name}, which it does not hold")


def _device_memory() -> int:
    """Return the bytes that this machine's devices have together, without starting a device."""
    # Training reaches this module and must not need vLLM.
    platform = import_module("vllm.platforms").current_platform
    devices = platform.device_count() if platform.is_cuda() else 1
    return devices * platform.get_device_total_memory()


def check_space(folder: Path, needed: int, what: str) -> None:
    """Refuse to begin what the disk of `folder` cannot hold."""
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if free < needed + SPARE:
        raise HubError(
            f"not enough disk space for {what}: {human(needed + SPARE)} needed under {folder}, "
            f"{human(free)} free. Free some (`python -m vllm_d2f models` shows what is there, "
            f"`python -m vllm_d2f rm NAME` removes it) or {cache.elsewhere(folder)}"
        )


def _fetch(repository: str, revision: str | None, names: Sequence[str]) -> Source:
    """Download files and compare them with their hashes; a damaged one is fetched once more."""
    folder = snapshot(repository, revision, names)
    if damaged := _remove_damaged(folder, names):
        logger.warning("%s: %s was damaged, downloading it again", repository, ", ".join(damaged))
        folder = snapshot(repository, revision, names)
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


def snapshot(repository: str, revision: str | None, names: Sequence[str]) -> Path:
    """Call `huggingface_hub.snapshot_download`, and turn its errors into some that name the remedy.

    Args:
        names: of files, or patterns. A name of an index holds none: `checkpoint.index_of`.
    """
    wanted = at_revision(repository, revision and f"revision {revision}")
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(names)))
    except errors.HFValidationError as error:
        raise HubError(f"{repository!r:.100}: neither a folder nor a Hub id ({error})") from None
    except errors.RevisionNotFoundError:
        raise HubError(f"{repository}: the Hub has no revision {revision}") from None
    except errors.RepositoryNotFoundError as error:
        why = "not on the Hub, or private"
        if isinstance(error, errors.GatedRepoError):
            why = "its licence must be accepted on the Hub"
        raise HubError(f"{repository}: {why}; log in (hf auth login) or set HF_TOKEN") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        why = f"the Hub cannot be reached ({_first_line(error.__cause__ or error)})"
        if constants.HF_HUB_OFFLINE:
            why = "HF_HUB_OFFLINE is set"
        raise Unreachable(f"{wanted} is not in the cache, and {why}") from error
    except Exception as error:
        # huggingface_hub lets the errors of its HTTP client through.
        network = isinstance(error, (errors.HfHubHTTPError, ConnectionError, TimeoutError))
        if not network and type(error).__module__.split(".")[0] not in _HTTP_CLIENTS:
            if not isinstance(error, OSError):
                raise
            if error.errno is not None:
                raise HubError(f"{repository}: cannot be written to the cache ({error})") from error
        raise Unreachable(
            f"{wanted}: the download was interrupted ({_first_line(error)}); run the same "
            "command again, finished files are kept"
        ) from error


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip()}".partition("\n")[0][:250]


def _remove_damaged(folder: Path, names: Iterable[str]) -> list[str]:
    """Delete files whose content is not what the Hub's cache names them by; return their names.

    The cache keeps a file under the sha256 of its content (large files) or under git's sha1. On a
    file system without links it has no such names, and huggingface_hub has compared sizes only.
    """
    damaged = []
    for name in names:
        path = folder / name
        blob = path.resolve()
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
        return hashlib.file_digest(file, lambda: digest).hexdigest() == blob.name
