# SPDX-License-Identifier: Apache-2.0
"""From a name, or a base and an adapter, to a merged folder that vLLM serves."""

import logging
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub.utils import tqdm

from vllm_d2f.hub import HubError, cache, download
from vllm_d2f.hub.checkpoint import INDEX, index_of, open_checkpoint, plain_file, read_json
from vllm_d2f.hub.download import Unreachable, local
from vllm_d2f.hub.merge import WEIGHTS, match, merge_weights, read_adapter
from vllm_d2f.models import FAMILIES, PUBLISHED
from vllm_d2f.settings import settings_from_dict

__all__ = ["MergePlan", "ensure", "merge", "plan_of", "prepare", "variant_of"]

logger = logging.getLogger(__name__)

OVERRIDE = "--allow-other-base"

_VARIANTS = {"base": "base", "instruct": "instruct", "chat": "instruct"}


@dataclass(frozen=True, slots=True)
class MergePlan:
    """What to merge, and how the result decodes.

    Attributes:
        base, adapter: a folder or a Hub id each.
        base_revision, adapter_revision: for Hub ids: branch, tag or commit.
        architecture: the base must have this one; None: any that D2F serves.
        variant: "base" or "instruct": the base must be this one; None: what the adapter says.
        d2f: the `d2f` section of the merged config.json; None keeps the base's.
        context: see `Published.context`.
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
    name: str,
    base: str | None = None,
    adapter: str | None = None,
    base_revision: str | None = None,
    adapter_revision: str | None = None,
    check_variant: bool = True,
) -> MergePlan:
    """The plan of the published model `name`, with other sources where they are given."""
    published = PUBLISHED[name]
    (family,) = (family for family in FAMILIES.values() if name in family.published)
    return MergePlan(
        base=base or published.base,
        adapter=adapter or published.adapter,
        base_revision=base_revision or (None if base else published.base_revision),
        adapter_revision=adapter_revision or (None if adapter else published.adapter_revision),
        architecture=family.architecture,
        variant=published.variant,
        d2f=published.d2f,
        context=published.context,
        check_variant=check_variant,
    )


def ensure(name: str) -> Path:
    """The folder of a published model, prepared now if this is its first use.

    Raises:
        HubError: it cannot be prepared, or what is in its place is damaged.
    """
    folder = cache.folder_of(name)
    state = cache.inspect(folder)
    if state.kind == "ready":
        return folder
    _refuse_damaged(name, folder, state)
    published = PUBLISHED[name]
    _say(
        f"{name}: first use. Downloading {published.base} and {published.adapter} "
        f"({published.gigabytes:.0f} GB) and merging them into {folder}"
    )
    return prepare(name, plan_of(name))


def prepare(name: str, plan: MergePlan, force: bool = False) -> Path:
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


def merge(folder: Path, plan: MergePlan, force: bool = False) -> Path:
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


def _merge(folder: Path, plan: MergePlan, name: str) -> None:
    if plan.d2f is not None:
        try:
            settings_from_dict(plan.d2f)
        except ValueError as error:
            raise HubError(str(error)) from None

    adapter_source = _source(plan.adapter, plan.adapter_revision, "adapter", download.fetch_adapter)
    adapter = read_adapter(adapter_source.folder)
    base_source = _source(plan.base, plan.base_revision, "base", download.fetch_base)
    config = read_json(plain_file(base_source.folder, "config.json"))
    # What can be refused is refused before the weights are downloaded.
    _check_architecture(plan, config)
    evidence = _check_variant(plan, adapter_source, adapter.config, base_source, config)
    index = index_of(base_source.folder)
    if index is not None:
        match(adapter, index)
    if base_source.revision is not None and not Path(plan.base).expanduser().is_dir():
        download.fetch_weights(base_source, folder.parent)

    base = open_checkpoint(base_source.folder)
    download.check_space(folder.parent, base.size, "the merged model")

    def write(part: Path) -> dict[str, Any]:
        with tqdm(total=base.size, unit="B", unit_scale=True, desc=f"merging {name}") as bar:
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
            "base_or_instruct": [f"{item.where}: {item.text}" for item in evidence],
            "merged_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "versions": {name: version(name) for name in ("vllm-d2f", "torch", "safetensors")},
            "files": dict(sorted(files.items())),
        }

    cache.write_whole(folder, write)


def _source(given: str, revision: str | None, what: str, fetch: Callable[..., Any]) -> Any:
    """A folder if there is one of that name, else a Hub id."""
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


def _check_architecture(plan: MergePlan, config: Mapping[str, Any]) -> None:
    listed = config.get("architectures")
    found = listed[0] if isinstance(listed, list) and listed else None
    allowed = [plan.architecture] if plan.architecture else list(FAMILIES)
    if found not in allowed:
        raise HubError(
            f"{plan.base}: config.json says architecture {found!r:.80}, expected "
            f"{' or '.join(allowed)}; is it the right base?"
        )


class _Evidence(NamedTuple):
    """A name that says which variant a folder is, or was trained on."""

    where: str
    text: str
    variant: str


def variant_of(name: str) -> str | None:
    """ "base" or "instruct", from a model's name or path; None if it does not say.

    Only the last part of a path counts, or the repository in a path of the Hub's cache, and only
    if it names a family: a folder that is just called `base` says nothing.
    """
    cached = re.search(r"models--([^/\\]+)", name)
    last = cached[1] if cached else re.split(r"[/\\]", name.rstrip("/\\"))[-1]
    words = re.split(r"[^a-z0-9]+", last.lower())
    families = {known for family in FAMILIES.values() for known in (family.name, *family.aliases)}
    if not any(family in word for family in families for word in words):
        return None
    found = {_VARIANTS[word] for word in words if word in _VARIANTS}
    return found.pop() if len(found) == 1 else None


def _evidence(names: Mapping[str, Any]) -> list[_Evidence]:
    """Those of the names, by where they stand, that tell a variant."""
    texts = {where: str(text or "") for where, text in names.items()}
    return [
        _Evidence(w, text, variant) for w, text in texts.items() if (variant := variant_of(text))
    ]


def _check_variant(
    plan: MergePlan, adapter_source: Any, adapter_config: Any, base_source: Any, config: Any
) -> list[_Evidence]:
    """Refuse Base for Instruct and the other way round; return what spoke for the base.

    Both checkpoints of a family have the same tensors, so the wrong one merges without an error and
    answers much worse. What tells them apart is their names.
    """
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", base_source.origin) is not None
    where = "its name on the Hub" if on_hub else "the folder's name"
    of_base = _evidence({where: base_source.origin})
    if not (on_hub and of_base):  # a Hub id that tells decides alone
        of_base += _evidence({"config.json, _name_or_path": config.get("_name_or_path")})
    if not plan.check_variant:
        return of_base
    origin = adapter_source.origin
    # The published pairs are known to belong together, whatever path their author trained with.
    known = [p.variant for p in PUBLISHED.values() if p.adapter == origin]
    of_adapter = [_Evidence("its name on the Hub", origin, variant) for variant in known[:1]]
    of_adapter = of_adapter or _evidence(
        {
            "adapter_config.json, base_model_name_or_path": adapter_config.get(
                "base_model_name_or_path"
            ),
            "the adapter's name": origin,
        }
    )
    expected = plan.variant or (of_adapter[0].variant if of_adapter else None)
    if expected is None:
        logger.warning(
            "%s does not say whether it was trained on a Base or an Instruct model, and the wrong "
            "one answers much worse: make sure that %s is right",
            plan.adapter,
            plan.base,
        )
        return of_base
    for what, found, remedy in (
        (
            f"the adapter {plan.adapter}",
            of_adapter,
            f"adapter for the {expected} model as --adapter",
        ),
        (f"the base {plan.base}", of_base, f"{expected} model as --base"),
    ):
        for item in found:
            if item.variant != expected:
                raise HubError(
                    f"wrong base: {what} is for {item.variant!r} by {item.where} "
                    f"({item.text!r:.150}), but {expected!r} is needed. The two have the same "
                    f"tensors and very different answers. Give the {remedy}, or, if you know "
                    f"better, add {OVERRIDE}"
                )
    if not of_base:
        logger.warning(
            "nothing in %s says whether it is the Base or the Instruct model; the adapter needs "
            "the %s one, and the other answers much worse",
            plan.base,
            expected,
        )
    return of_base


def _merged_config(config: Mapping[str, Any], plan: MergePlan) -> dict[str, Any]:
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
    for name in ("generation_config.json", INDEX, *download.TOKENIZER_FILES):
        if not (source / name).exists():
            continue
        path = plain_file(source, name)
        if name == "tokenizer_config.json":
            settings = read_json(path)
            settings.pop("auto_map", None)
            cache.write_json(part / name, settings)
        else:
            shutil.copyfile(path, part / name)


def _write_card(part: Path, name: str, plan: MergePlan, base: Any, adapter: Any) -> None:
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


def _refuse_other_sources(name: str, plan: MergePlan, state: cache.State) -> None:
    """A request for other weights than those in place must not be answered by these."""
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
    if not isinstance(error, Unreachable):
        return error
    published = PUBLISHED[name]
    return Unreachable(
        f"{name} is not prepared on this machine: {error}.\n"
        f"With a connection to the Hub, run once (it downloads {published.gigabytes:.0f} GB):\n"
        f"  python -m vllm_d2f prepare {name}\n"
        f"From folders that were brought here (downloads of {published.base} and "
        f"{published.adapter}):\n"
        f"  python -m vllm_d2f prepare {name} --base DIR --adapter DIR"
    )


def _say(message: str) -> None:
    print(f"vllm-d2f: {message}", file=sys.stderr, flush=True)
