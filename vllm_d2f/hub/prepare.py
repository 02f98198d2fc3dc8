# SPDX-License-Identifier: Apache-2.0
"""From a name, or a base and an adapter, to a merged folder that vLLM serves."""

import logging
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vllm_d2f.hub import cache
from vllm_d2f.hub.errors import HubError
from vllm_d2f.hub.registry import MODELS, Entry

__all__ = ["Plan", "ensure", "merge", "prepare"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Plan:
    """What to merge, and how the result decodes.

    Attributes:
        base, adapter: a folder or a Hub id each.
        base_revision, adapter_revision: for Hub ids: branch, tag or commit.
        architecture: the base must have this one; None: any that D2F serves.
        variant: "base" or "instruct": the base must be this one; None: what the adapter says.
        d2f: the `d2f` section of the merged config.json; None keeps the base's.
        context: see `Entry.context`.
        check_variant: False trusts the user that base and adapter belong together.
    """

    base: str
    adapter: str
    base_revision: str | None = None
    adapter_revision: str | None = None
    architecture: str | None = None
    variant: str | None = None
    d2f: Mapping[str, Any] | None = None
    context: int | None = None
    check_variant: bool = True


def plan_of(
    entry: Entry,
    base: str | None = None,
    adapter: str | None = None,
    base_revision: str | None = None,
    adapter_revision: str | None = None,
    check_variant: bool = True,
) -> Plan:
    """The plan of a registered model, with other sources where they are given."""
    return Plan(
        base=base or entry.base,
        adapter=adapter or entry.adapter,
        base_revision=base_revision or (None if base else entry.base_revision),
        adapter_revision=adapter_revision or (None if adapter else entry.adapter_revision),
        architecture=entry.architecture,
        variant=entry.variant,
        d2f=entry.d2f,
        context=entry.context,
        check_variant=check_variant,
    )


def ensure(name: str) -> Path:
    """The folder of a registered model, prepared now if this is its first use.

    Raises:
        HubError: it cannot be prepared, or what is in its place is damaged.
    """
    folder = cache.folder_of(name)
    state = cache.inspect(folder)
    if state.kind == "ready":
        return folder
    _refuse_damaged(name, folder, state)
    entry = MODELS[name]
    _say(
        f"{name}: first use. Downloading {entry.base} and {entry.adapter} "
        f"({entry.gigabytes:.0f} GB) and merging them into {folder}"
    )
    return prepare(name, plan_of(entry))


def prepare(name: str, plan: Plan, force: bool = False) -> Path:
    """Download and merge what `plan` says into the place of `name`.

    A model that is ready stays as it is, if it was made from the same sources.

    Args:
        force: merge again whatever is there.

    Raises:
        HubError: says what to do.
    """
    folder = cache.folder_of(name)
    with cache.locked(folder, _say):
        state = cache.inspect(folder)
        if not force:
            if state.kind == "ready":
                _refuse_other_sources(name, plan, state)
                return folder
            _refuse_damaged(name, folder, state)
        try:
            _merge(folder, plan, name)
        except HubError as error:
            raise _with_commands(name, error) from error.__cause__
    return folder


def merge(folder: Path, plan: Plan, force: bool = False) -> Path:
    """Merge any base and adapter into a folder of the user's choice.

    Raises:
        HubError: the folder is taken, or the merge is not possible.
    """
    folder = folder.expanduser().absolute()
    if cache.is_part(folder):
        raise HubError(f"{folder}: names ending in .part-NUMBER are for unfinished merges")
    with cache.locked(folder, _say):
        if cache.inspect(folder).kind != "absent" and not force:
            raise HubError(f"{folder}: exists; name another folder, or add --force to replace it")
        if force and folder.exists() and not (folder / cache.RECORD).exists():
            raise HubError(f"{folder}: was not written by a merge, so --force does not replace it")
        _merge(folder, plan, folder.name)
    return folder


def _merge(folder: Path, plan: Plan, name: str) -> None:
    from vllm_d2f.hub import adapter as adapters
    from vllm_d2f.hub import download
    from vllm_d2f.hub import folder as folders
    from vllm_d2f.hub.merge import merge_weights

    if plan.d2f is not None:
        from vllm_d2f.settings import settings_from_dict

        try:
            settings_from_dict(plan.d2f)
        except ValueError as error:
            raise HubError(str(error)) from None

    adapter_source = _source(plan.adapter, plan.adapter_revision, "adapter", download.fetch_adapter)
    adapter = adapters.read_adapter(adapter_source.folder)
    base_source = _source(plan.base, plan.base_revision, "base", download.fetch_base)
    config_file = folders.plain_file(base_source.folder, "config.json")
    if not config_file.exists():
        raise HubError(f"{plan.base}: holds no config.json")
    config = folders.read_json(config_file)
    # What can be refused is refused before the weights are downloaded.
    _check_architecture(plan, config)
    evidence = _check_variant(plan, adapter_source, adapter.config, base_source, config)
    index = folders.index_of(base_source.folder)
    if index is not None:
        adapters.match(adapter, index)
    if base_source.revision is not None and not Path(plan.base).expanduser().is_dir():
        download.fetch_weights(base_source, folder.parent)

    base = folders.open_checkpoint(base_source.folder)
    download.check_space(folder.parent, base.size, "the merged model")

    def write(part: Path) -> dict[str, Any]:
        with _progress(name, base.size) as bar:
            written = merge_weights(base, adapter, part, bar.update)
        files = {file: {"size": w.size, "sha256": w.sha256} for file, w in written.items()}
        _write_small_files(base_source.folder, part)
        _write_card(part, name, plan, base_source, adapter_source)
        # config.json is the last file that makes this a checkpoint.
        cache.write_json(part / "config.json", _merged_config(config, plan))
        for path in part.iterdir():
            if path.name not in files:
                digest = cache.sha256_of(path)
                files[path.name] = {"size": path.stat().st_size, "sha256": digest}
        return {
            "name": name,
            "base": {
                "source": base_source.origin,
                "requested": plan.base_revision,
                "revision": base_source.revision,
            },
            "adapter": {
                "source": adapter_source.origin,
                "requested": plan.adapter_revision,
                "revision": adapter_source.revision,
                "sha256": cache.sha256_of(adapter.shard.path),
            },
            "base_or_instruct": [f"{e.where}: {e.text}" for e in evidence],
            "merged_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "versions": {name: version(name) for name in ("vllm-d2f", "torch", "safetensors")},
            "files": dict(sorted(files.items())),
        }

    cache.write_whole(folder, write)


def _source(given: str, revision: str | None, what: str, fetch: Callable[..., Any]) -> Any:
    """A folder if there is one of that name, else a Hub id."""
    from vllm_d2f.hub.download import local

    path = Path(given).expanduser()
    if path.is_dir():
        if revision is not None:
            raise HubError(f"--{what}-revision is for a Hub id, {given} is a folder")
        return local(given)
    if path.exists():
        raise HubError(f"{given}: give the folder that the {what} is in")
    if path.is_absolute() or given.startswith(".") or given.count("/") != 1:
        raise HubError(f"{given}: no such folder, and not a Hub id (owner/name)")
    return fetch(given, revision)


def _check_architecture(plan: Plan, config: Mapping[str, Any]) -> None:
    from vllm_d2f.models import ARCHITECTURES

    listed = config.get("architectures")
    found = listed[0] if isinstance(listed, list) and listed else None
    allowed = [plan.architecture] if plan.architecture else list(ARCHITECTURES)
    if found not in allowed:
        raise HubError(
            f"{plan.base}: config.json says architecture {found!r:.80}, expected "
            f"{' or '.join(allowed)}; is it the right base?"
        )


def _check_variant(
    plan: Plan, adapter_source: Any, adapter_config: Any, base_source: Any, config: Any
) -> list[Any]:
    """Refuse Base for Instruct and the other way round; return what spoke for the base."""
    from vllm_d2f.hub import provenance

    of_base = provenance.of_base(base_source.folder, base_source.origin, config)
    if not plan.check_variant:
        return of_base
    of_adapter = []
    # The published pairs are known to belong together, whatever path their author trained with.
    if adapter_source.origin not in {entry.adapter for entry in MODELS.values()}:
        of_adapter = provenance.of_adapter(
            adapter_source.folder, adapter_source.origin, adapter_config
        )
    else:
        known = [e.variant for e in MODELS.values() if e.adapter == adapter_source.origin]
        of_adapter = [provenance.Evidence("its name on the Hub", adapter_source.origin, known[0])]
    expected = plan.variant or (of_adapter[0].variant if of_adapter else None)
    if expected is None:
        logger.warning(
            "%s does not say whether it was trained on a Base or an Instruct model, and the wrong "
            "one answers much worse: make sure that %s is right",
            plan.adapter,
            plan.base,
        )
        return of_base
    right = f"Give the {expected} model as --base"
    adapter_remedy = f"Give the adapter for the {expected} model as --adapter"
    provenance.check_variant(expected, of_adapter, f"the adapter {plan.adapter}", adapter_remedy)
    provenance.check_variant(expected, of_base, f"the base {plan.base}", right)
    if not of_base:
        logger.warning(
            "nothing in %s says whether it is the Base or the Instruct model; the adapter needs "
            "the %s one, and the other answers much worse",
            plan.base,
            expected,
        )
    return of_base


def _merged_config(config: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """The base's config without remote code, with the decoding settings."""
    merged = {k: v for k, v in config.items() if k not in ("auto_map", "_name_or_path")}
    if plan.d2f is not None:
        merged["d2f"] = dict(plan.d2f)
    if plan.context is not None:
        # vLLM takes the smallest length it finds; the rotary embedding keeps the base's.
        merged["max_seq_len"] = plan.context
    return merged


def _write_small_files(source: Path, part: Path) -> None:
    """Tokenizer, generation settings and index. Never code."""
    from vllm_d2f.hub.download import TOKENIZER_FILES
    from vllm_d2f.hub.folder import INDEX, plain_file, read_json

    for name in ("generation_config.json", INDEX, *TOKENIZER_FILES):
        if not (source / name).exists():
            continue
        path = plain_file(source, name)
        if name == "tokenizer_config.json":
            settings = read_json(path)
            settings.pop("auto_map", None)
            cache.write_json(part / name, settings)
        else:
            shutil.copyfile(path, part / name)


def _write_card(part: Path, name: str, plan: Plan, base: Any, adapter: Any) -> None:
    def named(source: Any) -> str:
        return source.origin + (f" at {source.revision}" if source.revision else "")

    cache.write_text(
        part / "README.md",
        f"# {name}\n\n{named(base)} with the D2F adapter {named(adapter)} merged into it by "
        f"vllm-d2f {version('vllm-d2f')}, in float32 and rounded once. The licences of both "
        f"apply. {cache.RECORD} lists the files.\n",
    )


def _refuse_damaged(name: str, folder: Path, state: cache.State) -> None:
    if state.kind == "damaged":
        raise HubError(
            f"{name}: {folder} is damaged: {state.reason}. Remove it with "
            f"`python -m vllm_d2f rm {name}` and use the name again"
        )


def _refuse_other_sources(name: str, plan: Plan, state: cache.State) -> None:
    """A request for other weights than those in place must not be answered by these."""
    from vllm_d2f.hub.adapter import WEIGHTS
    from vllm_d2f.hub.download import local

    for what, given, requested in (
        ("base", plan.base, plan.base_revision),
        ("adapter", plan.adapter, plan.adapter_revision),
    ):
        record = state.record.get(what, {})
        source, same = given, True
        if Path(given).expanduser().is_dir():
            found = local(given)
            source, requested = found.origin, found.revision
            weights = found.folder / WEIGHTS
            if what == "adapter" and weights.is_file():
                same = cache.sha256_of(weights) == record.get("sha256")
        if requested is not None:
            same = same and requested in (record.get("revision"), record.get("requested"))
        if record.get("source") != source or not same:
            commit = record.get("revision")
            raise HubError(
                f"{name} was already prepared, with the {what} {record.get('source')}"
                f"{f' at {commit}' if commit else ''}, not with this {what}: {source}"
                f"{f' at {requested}' if requested else ''}. Add --force to prepare it again"
            )


def _with_commands(name: str, error: HubError) -> HubError:
    """Add to an unreachable Hub the two ways of preparing a model."""
    from vllm_d2f.hub.download import Unreachable

    if not isinstance(error, Unreachable):
        return error
    entry = MODELS[name]
    return Unreachable(
        f"{name} is not prepared on this machine: {error}.\n"
        f"With a connection to the Hub, run once (it downloads {entry.gigabytes:.0f} GB):\n"
        f"  python -m vllm_d2f prepare {name}\n"
        f"From folders that were brought here (downloads of {entry.base} and {entry.adapter}):\n"
        f"  python -m vllm_d2f prepare {name} --base DIR --adapter DIR"
    )


def _progress(name: str, size: int) -> Any:
    from huggingface_hub.utils import tqdm

    return tqdm(total=size, unit="B", unit_scale=True, desc=f"merging {name}")


def _say(message: str) -> None:
    print(f"vllm-d2f: {message}", file=sys.stderr, flush=True)
