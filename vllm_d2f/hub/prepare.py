# SPDX-License-Identifier: Apache-2.0
"""Makes a merged folder that vLLM serves, of a name or of a base and an adapter."""

import logging
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub.utils import tqdm

from vllm_d2f.hub import HubError, cache, checkpoint, download, human, own_name, say
from vllm_d2f.hub.download import Source, Unreachable, at_revision, local
from vllm_d2f.hub.merge import WEIGHTS, match, merge_weights, read_adapter
from vllm_d2f.hub.wheel import base_from_wheel
from vllm_d2f.models import FAMILIES, PUBLISHED
from vllm_d2f.models.adapted import FAMILIES as adapted_families
from vllm_d2f.models.family import Published, Wheel
from vllm_d2f.output import check_output
from vllm_d2f.settings import settings_from_dict

logger = logging.getLogger(__name__)

STACKS = {arch: one.hf for one in adapted_families for arch in (one.architecture, one.hf)}
"""What an adapter of an autoregressive base results in -> the architecture of that base."""
_VARIANTS = {"base": "base", "instruct": "instruct", "chat": "instruct"}


@dataclass(frozen=True, slots=True)
class MergePlan:
    """What to merge, and how the result decodes.

    Attributes:
        base, adapter: a folder or a Hub id each; without an adapter the base is the whole model.
        base_revision, adapter_revision: branch, tag or commit of a Hub id.
        architecture: the one that the base must have; None allows all that D2F serves.
        variant: "base" or "instruct", which the base must be; None takes it from the adapter.
        d2f: the `d2f` section of the merged config.json; None keeps the base's.
        context: see `Published.context`.
        check_variant: False trusts the user that base and adapter belong together.
        wheel: see `Published.wheel`.
    """

    base: str
    adapter: str | None
    base_revision: str | None = None
    adapter_revision: str | None = None
    architecture: str | None = None
    variant: str | None = None
    d2f: Mapping[str, Any] | None = None
    context: int | None = None
    check_variant: bool = True
    wheel: Wheel | None = None


def plan_of(
    name: str,
    base: str | None = None,
    adapter: str | None = None,
    base_revision: str | None = None,
    adapter_revision: str | None = None,
    check_variant: bool = True,
) -> MergePlan:
    """Return the plan of the published model `name`, with other sources where they are given."""
    published = PUBLISHED[name]
    (family,) = (family for family in FAMILIES.values() if name in family.published)
    shipped = _shipped_adapter(name)
    return MergePlan(
        base=base or published.base,
        adapter=adapter or (str(shipped) if shipped else published.adapter),
        base_revision=base_revision or (None if base else published.base_revision),
        adapter_revision=adapter_revision or (None if adapter else published.adapter_revision),
        architecture=family.architecture,
        variant=published.variant,
        d2f=published.d2f or None,
        context=published.context,
        check_variant=check_variant and not shipped,
        wheel=None if base else published.wheel,
    )


def _shipped_adapter(name: str) -> Path | None:
    """Return the folder of an adapter that ships with the package."""
    shipped = PUBLISHED[name].shipped
    # Not by `names`, which imports this module.
    return Path(str(resources.files("vllm_d2f"))) / "embedded" / shipped if shipped else None


def ensure(name: str) -> Path:
    """Return the folder of a published model; its first use prepares it.

    Raises:
        HubError: the model cannot be prepared, or its folder is damaged.
    """
    folder = cache.folder_of(name)
    state, shipped = cache.inspect(folder), _shipped_adapter(name)
    if state.kind == "ready":
        if shipped is None or not _is_older(state.record["adapter"], shipped):
            return folder
        say(f"{name}: this version of vllm-d2f ships another adapter, merging again")
        # A base that was brought to this machine is there still, or the merge stays as it is.
        base = state.record["base"]["source"]
        try:
            plan = plan_of(name, base=base if Path(base).is_dir() else None)
            return prepare(name, plan, force=True)
        except Unreachable as error:
            logger.warning("%s; serving the merge with the adapter of an earlier version", error)
            return folder
    _refuse_damaged(name, folder, state)
    published = PUBLISHED[name]
    say(
        f"{name}: first use. Downloading {' and '.join(published.repositories)} "
        f"({_size(published)}) into {folder}"
    )
    return prepare(name, plan_of(name))


def _is_older(adapter: Mapping[str, str | None], shipped: Path) -> bool:
    """Return whether a merge has an adapter that another version of the package shipped.

    One that was made with `prepare NAME --adapter DIR` has the user's own, and stays.
    """
    was_shipped = Path(adapter["source"] or "").parts[-3:] == shipped.parts[-3:]
    return was_shipped and _sha256(shipped) != adapter["sha256"]


def _sha256(adapter: Path) -> str:
    return cache.sha256_of(adapter / WEIGHTS)


def _size(published: Published) -> str:
    return human(int(1e9 * published.gigabytes))


def prepare(name: str, plan: MergePlan, force: bool = False) -> Path:
    """Download and merge what `plan` says into the place of `name`.

    A model that is ready stays as it is if it was made from the same sources.

    Args:
        force: replace whatever is there.

    Raises:
        HubError: the model cannot be prepared; the message says what to do.
    """
    folder = cache.folder_of(name)
    check_output(folder, cache.RECORD, text="")
    with cache.locked(folder):
        state = cache.inspect(folder)
        if not force:
            if state.kind == "ready":
                _refuse_other_sources(name, plan, state)
                return folder
            _refuse_damaged(name, folder, state)
        try:
            _merge(folder, plan, name)
        except Unreachable as error:
            published = PUBLISHED[name]
            whole = published.adapter is None or published.shipped
            folders = "--base DIR" if whole else "--base DIR --adapter DIR"
            raise Unreachable(
                f"{name} is not prepared on this machine: {error}.\n"
                "With a connection to the Hub, run once (it downloads "
                f"{_size(published)}):\n"
                f"  python -m vllm_d2f prepare {name}\n"
                "From folders that were brought here (downloads of "
                f"{' and '.join(published.repositories)}):\n"
                f"  python -m vllm_d2f prepare {name} {folders}"
            ) from error.__cause__
    return folder


def merge(folder: Path, plan: MergePlan, force: bool = False) -> Path:
    """Merge any base and adapter into a folder of the user's choice.

    Raises:
        HubError: the folder is taken, or the merge is not possible.
    """
    folder = folder.expanduser().absolute()
    if cache.is_part(folder):
        raise HubError(f"{folder}: names ending in .part-NUMBER are for unfinished merges")
    check_output(folder, cache.RECORD, text="")
    with cache.locked(folder):
        if cache.inspect(folder).kind != "absent" and not force:
            raise HubError(f"{folder}: exists; name another folder, or add --force to replace it")
        _merge(folder, plan, folder.name)
    return folder


def _merge(folder: Path, plan: MergePlan, name: str) -> None:
    if plan.d2f is not None:
        try:
            settings_from_dict(plan.d2f)
        except ValueError as error:
            raise HubError(str(error)) from None

    # Everything that can be checked is checked before the weights are downloaded.
    adapter = adapter_source = None
    if plan.adapter is not None:
        adapter_source = _source(plan.adapter, plan.adapter_revision, "adapter")
        adapter = read_adapter(adapter_source.folder)
    base_source = _base_source(plan)
    config = checkpoint.read_json(checkpoint.plain_file(base_source.folder, "config.json"))
    own = _own_config(adapter.folder) if adapter else {}
    _check_architecture(plan, config, own)
    checkpoint.check_tokenizer_files(base_source.folder)
    evidence = {}
    if adapter is not None and adapter_source is not None:
        evidence = _check_variant(plan, base_source, config, adapter_source, adapter.config)
    index = checkpoint.index_of(base_source.folder)
    if adapter is not None and index is not None:
        match(adapter, index)
    if base_source.revision is not None and not Path(plan.base).expanduser().is_dir():
        download.fetch_weights(base_source, folder.parent)

    base = checkpoint.open_checkpoint(base_source.folder)
    size = sum(shard.size for shard in base)
    download.check_space(folder.parent, size, "the merged model")
    sources: dict[str, dict[str, str | None]] = {
        "base": _source_record(base_source, plan.base_revision)
    }
    if adapter_source is not None:
        sources["adapter"] = _source_record(adapter_source, plan.adapter_revision)
        sources["adapter"]["sha256"] = _sha256(adapter_source.folder)

    def write(part: Path) -> dict[str, Any]:
        with tqdm(total=size, unit="B", unit_scale=True, desc=f"merging {name}") as bar:
            files = merge_weights(base, adapter, part, bar.update)
        _write_small_files(base_source.folder, part)
        if adapter and own:  # a chat template, a tokenizer with a mask token
            _write_small_files(adapter.folder, part)
        _write_card(part, name, sources)
        # config.json is the last file that makes this a checkpoint.
        cache.write_json(part / "config.json", _merged_config(own or config, plan))
        for path in part.iterdir():
            if path.name not in files:
                files[path.name] = {"size": path.stat().st_size, "sha256": cache.sha256_of(path)}
        return {
            "name": name,
            **sources,
            "base_or_instruct": [f"{where}: {name}" for where, name in evidence.items()],
            "merged_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "versions": {name: version(name) for name in ("vllm-d2f", "torch", "safetensors")},
            "files": dict(sorted(files.items())),
        }

    cache.write_whole(folder, write)


def _source_record(source: Source, requested: str | None) -> dict[str, str | None]:
    return {"source": source.origin, "requested": requested, "revision": source.revision}


def _source(given: str, revision: str | None, what: str) -> Source:
    """Return the folder of that name if there is one, else what the Hub has under that id."""
    path = Path(given).expanduser()
    if path.is_dir():
        if revision is not None:
            raise HubError(f"--{what}-revision is for a Hub id, {given} is a folder")
        if what == "base" and checkpoint.is_adapter(path):
            raise HubError(f"{given}: this is an adapter, not a base")
        return local(given)
    if path.exists():
        raise HubError(f"{given}: give the folder that the {what} is in")
    if path.is_absolute() or given.startswith(".") or given.count("/") != 1:
        raise HubError(f"{given}: no such folder, and not a Hub id (owner/name)")
    return download.fetch(given, revision, what)


def _base_source(plan: MergePlan) -> Source:
    if plan.wheel is not None:
        try:
            return base_from_wheel(plan.base, plan.wheel)
        except Unreachable as error:
            logger.warning("%s; trying the Hub", error)
    return _source(plan.base, plan.base_revision, "base")


def _own_config(adapter: Path) -> dict[str, Any]:
    """Return the config.json that `training` writes beside an adapter of an autoregressive base.

    It is what the merged model has: the adapter makes another architecture of its base.
    """
    if not (adapter / "config.json").exists():
        return {}
    own = checkpoint.read_json(checkpoint.plain_file(adapter, "config.json"))
    return own if _architecture(own) in STACKS else {}


def _architecture(config: Mapping[str, Any]) -> str | None:
    listed = config.get("architectures")
    return listed[0] if isinstance(listed, list) and listed else None


def _check_architecture(plan: MergePlan, config: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    found = _architecture(config)
    allowed = [plan.architecture] if plan.architecture else list(FAMILIES)
    if own:
        allowed = [STACKS[str(_architecture(own))]]
    if found not in allowed:
        raise HubError(
            f"{plan.base}: config.json says architecture {found!r:.80}, expected "
            f"{' or '.join(allowed)}; is it the right base?"
        )


def variant_of(name: str) -> str | None:
    """Return "base" or "instruct", from a model's name or path; None if it does not say.

    The name counts only if it names a family: a folder with the name `base` alone says nothing.
    """
    words = re.split(r"[^a-z0-9]+", own_name(name))
    families = {known for family in FAMILIES.values() for known in (family.name, *family.aliases)}
    if not any(family in word for family in families for word in words):
        return None
    found = {_VARIANTS[word] for word in words if word in _VARIANTS}
    return found.pop() if len(found) == 1 else None


def _check_variant(
    plan: MergePlan,
    base: Source,
    config: Mapping[str, Any],
    adapter: Source,
    adapter_config: Mapping[str, Any],
) -> dict[str, str]:
    """Refuse Base for Instruct and the other way round.

    Both checkpoints of a family have the same tensors, so the wrong one merges without an error and
    answers much worse. Only their names tell them apart.

    Returns:
        The names that say which one the base is, by where they stand.
    """
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", base.origin) is not None
    of_base = {"its name on the Hub" if on_hub else "the folder's name": base.origin}
    if not (on_hub and variant_of(base.origin)):  # A Hub id that names a variant decides alone.
        of_base["config.json, _name_or_path"] = str(config.get("_name_or_path"))
    of_base = {where: name for where, name in of_base.items() if variant_of(name)}
    if not plan.check_variant:
        return of_base
    of_adapter = {"the adapter's name": adapter.origin}
    # A published adapter belongs to its base, whatever path its author trained with.
    if adapter.origin not in {published.adapter for published in PUBLISHED.values()}:
        key = "base_model_name_or_path"
        of_adapter = {f"adapter_config.json, {key}": str(adapter_config.get(key))} | of_adapter
    expected = plan.variant or next(filter(None, map(variant_of, of_adapter.values())), None)
    if expected is None:
        logger.warning(
            "nothing in %s says whether it was trained on the Base or the Instruct model, so %s "
            "is merged as it is; the wrong one answers much worse",
            plan.adapter,
            plan.base,
        )
        return of_base
    for source, names in ((f"adapter {plan.adapter}", of_adapter), (f"base {plan.base}", of_base)):
        for where, name in names.items():
            if (variant := variant_of(name)) not in (None, expected):
                raise HubError(
                    f"wrong base: the {source} is for {variant!r} by {where} ({name!r:.150}), but "
                    f"{expected!r} is needed. The two have the same tensors and very different "
                    f"answers. Give the {expected} model as --base and an adapter for it as "
                    f"--adapter, or, if you know better, add --allow-other-base"
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
    """Return the base's config without remote code, with the decoding settings."""
    merged = {k: v for k, v in config.items() if k not in ("auto_map", "_name_or_path")}
    # Some checkpoints name the `model_type` of their layers.
    if family := FAMILIES.get(config["architectures"][0]):  # else an autoregressive twin
        merged["model_type"] = family.model_type
    if plan.d2f is not None:
        merged["d2f"] = dict(plan.d2f)
    if plan.context is not None:
        # vLLM takes the smallest length it finds; the rotary embedding keeps the base's.
        merged["max_seq_len"] = plan.context
    return merged


def _write_small_files(source: Path, part: Path) -> None:
    """Copy tokenizer, generation settings and index, and no code."""
    for name in ("generation_config.json", checkpoint.INDEX, *download.TOKENIZER_FILES):
        if not (source / name).exists():
            continue
        path = checkpoint.plain_file(source, name)
        if name == "tokenizer_config.json":
            settings = checkpoint.read_json(path)
            settings.pop("auto_map", None)
            cache.write_json(part / name, settings)
        else:
            shutil.copyfile(path, part / name)


def _write_card(part: Path, name: str, sources: Mapping[str, Mapping[str, Any]]) -> None:
    named = (at_revision(source["source"], source["revision"]) for source in sources.values())
    text = f"# {name}\n\n{' with the D2F adapter '.join(named)} "
    if "adapter" in sources:
        text += f"merged into it by vllm-d2f {version('vllm-d2f')}, in float32 and rounded once"
    else:
        text += f"copied by vllm-d2f {version('vllm-d2f')}"
    text += f". Their licences apply. {cache.RECORD} lists the files.\n"
    (part / "README.md").write_text(text, encoding="utf-8")


def _refuse_damaged(name: str, folder: Path, state: cache.State) -> None:
    if state.kind == "damaged":
        check_output(folder, cache.RECORD, text="")
        raise HubError(
            f"{name}: {folder} is damaged: {state.reason}. Remove it with "
            f"`python -m vllm_d2f rm {name}` and use the name again"
        )


def _refuse_other_sources(name: str, plan: MergePlan, state: cache.State) -> None:
    """Refuse a request for other weights than those that the place holds."""
    for what, given, requested in (
        ("base", plan.base, plan.base_revision),
        ("adapter", plan.adapter, plan.adapter_revision),
    ):
        if given is None:
            continue
        record = state.record.get(what, {})
        source, same = given, True
        if Path(given).expanduser().is_dir():
            found = local(given)
            source, requested = found.origin, found.revision
            weights = found.folder / WEIGHTS
            if what == "adapter" and weights.is_file():
                same = _sha256(found.folder) == record.get("sha256")
                if PUBLISHED[name].shipped and same:
                    source = record.get("source")  # the package may lie elsewhere now
        if requested is not None:
            same = same and requested in (record.get("revision"), record.get("requested"))
        if record.get("source") != source or not same:
            old = at_revision(record.get("source"), record.get("revision"))
            raise HubError(
                f"{name} was already prepared, with the {what} {old}, not with this {what}: "
                f"{at_revision(source, requested)}. Add --force to prepare it again"
            )
