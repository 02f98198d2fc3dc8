# SPDX-License-Identifier: Apache-2.0
"""`vllm-d2f models | prepare | merge | rm`."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import scan_cache_dir
from huggingface_hub.errors import CacheNotFound

from vllm_d2f.hub import HubError, cache, human
from vllm_d2f.hub.download import at_revision
from vllm_d2f.hub.names import EMBEDDED, known_names, resolve_embedded
from vllm_d2f.hub.prepare import MergePlan, merge, plan_of, prepare
from vllm_d2f.hub.wheel import folder_of_base
from vllm_d2f.models import FAMILIES, PRESETS, PUBLISHED
from vllm_d2f.models.family import Published


def add_commands(subparsers: Any) -> None:
    """Add the subcommands about models to `vllm-d2f`."""
    models = add_command(
        subparsers, "models", "list models by name, with state and size", "--check", _models
    )
    models.add_argument("--check", action="store_true", help="read all files, compare checksums")
    models.add_argument("--json", action="store_true", help="print JSON")

    about = "download and merge a model by name, or merge it from folders"
    preparing = add_command(subparsers, "prepare", about, "d2f-dream-7b", _prepare)
    preparing.add_argument(
        "name", choices=list(PUBLISHED), metavar="NAME", help=", ".join(PUBLISHED)
    )
    _add_sources(preparing, required=False)

    example = "--base DIR --adapter DIR --out FOLDER, then vllm serve FOLDER"
    about = "merge a D2F adapter into its base"
    merging = add_command(subparsers, "merge", about, example, _merge)
    _add_sources(merging, required=True)
    merging.add_argument("--out", required=True, metavar="DIR", help="the folder to write")
    merging.add_argument(
        "--d2f",
        type=_json_object,
        metavar="JSON",
        help=f'how the model decodes, for example \'{{"preset": "{next(iter(PRESETS))}"}}\'; '
        "without it --additional-config tells the server",
    )

    about = "free the space that a model takes"
    remove = add_command(subparsers, "rm", about, "d2f-dream-7b --downloads", _remove)
    remove.add_argument("name", metavar="NAME", help=", ".join(PUBLISHED))
    remove.add_argument(
        "--downloads",
        action="store_true",
        help="also its downloads: base and adapter in the Hub's cache, which other programs may "
        "use, and a base from the package index",
    )


def add_command(
    subparsers: Any, name: str, about: str, example: str, run: Callable[..., int]
) -> argparse.ArgumentParser:
    """Add a subcommand whose `--help` says what it does and shows a call."""
    parser = subparsers.add_parser(
        name,
        help=about,
        description=f"{about[0].upper()}{about[1:]}.",
        epilog=f"Example: %(prog)s {example}",
    )
    parser.set_defaults(run=run)
    return parser


def model_name(text: str) -> str:
    """Return a model by name, from the command line."""
    if text not in known_names():
        raise argparse.ArgumentTypeError(f"unknown; known are {', '.join(known_names())}")
    return text


def _add_sources(parser: argparse.ArgumentParser, required: bool) -> None:
    for what in ("base", "adapter"):
        parser.add_argument(
            f"--{what}",
            required=required,
            metavar="DIR",
            help=f"folder (or Hub id) of the {what}"
            + ("" if required else "; the published one unless given"),
        )
        parser.add_argument(
            f"--{what}-revision", metavar="REV", help="branch, tag or commit, of a Hub id"
        )
    parser.add_argument(
        "--allow-other-base",
        dest="check_variant",
        action="store_false",
        help="merge although the base seems to be Base for Instruct or the other way round",
    )
    parser.add_argument("--force", action="store_true", help="replace what is there")


def _sources(args: argparse.Namespace) -> dict[str, Any]:
    """Return what `_add_sources` parsed, as arguments of `MergePlan` and `plan_of`."""
    names = ("base", "adapter", "base_revision", "adapter_revision", "check_variant")
    return {name: getattr(args, name) for name in names}


def overview() -> list[dict[str, Any]]:
    """Describe every model by name: what it is, its state, its size in bytes, and its sources."""
    rows: list[dict[str, Any]] = []
    for name, about in EMBEDDED.items():
        folder = resolve_embedded(name)
        size = sum(file.stat().st_size for file in folder.iterdir())
        rows.append(dict(name=name, state="embedded", size=size, about=about, folder=str(folder)))
    for family, name in ((f, name) for f in FAMILIES.values() for name in f.published):
        published, folder = family.published[name], cache.folder_of(name)
        state = cache.inspect(folder)
        row: dict[str, Any] = dict(name=name, state=state.kind, size=state.size)
        row |= dict(about=published.about, folder=str(folder), presets=family.preset_names)
        row |= dict(base=published.base, adapter=published.adapter, family=family.name)
        row |= dict(gigabytes=published.gigabytes, licence=published.licence)
        row |= dict(preset=published.d2f.get("preset", "its own"))
        for what in ("base", "adapter"):
            if source := state.record.get(what):
                row |= {what: source["source"], f"{what}_revision": source["revision"]}
        if state.reason:
            row["reason"] = state.reason
        row["unfinished"] = sum(map(cache.size_of, cache.parts_of(folder)))
        rows.append(row)
    return rows


def _models(args: argparse.Namespace) -> int:
    rows = overview()
    for row in rows:
        if published := PUBLISHED.get(row["name"]):
            row["downloads"] = sum(repo.size_on_disk for repo in _downloads(published))
        if args.check and row["state"] == "ready":
            folder = Path(row["folder"])
            if bad := cache.damaged_files(folder, cache.inspect(folder)):
                row |= dict(state="damaged", reason=f"{', '.join(bad)}: content has changed")
    status = int(any(row["state"] == "damaged" for row in rows))
    if args.json:
        print(json.dumps(rows, indent=2))
        return status
    words = {"embedded": "ships with the package", "absent": "prepared at first use"}
    for row in rows:
        state, size = words.get(row["state"], row["state"]), human(row["size"])
        print(f"{row['name']:<23}{state:<24}{size if row['size'] else '':>9}  {row['about']}")
        details = [
            f"{what} {at_revision(row[what], row.get(f'{what}_revision'))}"
            for what in ("base", "adapter")
            if row.get(what)
        ]
        if "family" in row:
            details.append(
                f"family {row['family']}, preset {row['preset']}, "
                f"{human(int(1e9 * row['gigabytes']))} of memory for weights in bfloat16, "
                f"licence {row['licence']}"
            )
        if reason := row.get("reason"):
            ours = (Path(row["folder"]) / cache.RECORD).exists()
            remedy = f"python -m vllm_d2f rm {row['name']}" if ours else "move it away"
            details.append(f"damaged: {reason}; {remedy}")
        if unfinished := row.get("unfinished"):
            details.append(
                f"{human(unfinished)} left by an interrupted merge; the next prepare or rm frees it"
            )
        if downloads := row.get("downloads"):
            details.append(f"{human(downloads)} in the Hub's cache; rm --downloads frees it")
        if row["state"] == "absent":
            needed = int(2e9 * PUBLISHED[row["name"]].gigabytes)
            details.append(f"needs about {human(needed)} of disk space")
        for line in details:
            print(f"{'':<23}{line}")
    print(f"\nmerged models are in {cache.root()} (D2F_CACHE, HF_HOME)")
    return status


def _prepare(args: argparse.Namespace) -> int:
    folder = prepare(args.name, plan_of(args.name, **_sources(args)), force=args.force)
    print(f"{args.name} is ready in {folder}\nvllm serve {args.name}")
    return 0


def _merge(args: argparse.Namespace) -> int:
    folder = merge(Path(args.out), MergePlan(**_sources(args), d2f=args.d2f), force=args.force)
    print(f"merged into {folder}\nvllm serve {folder}")
    return 0


def _remove(args: argparse.Namespace) -> int:
    if args.name in EMBEDDED:
        raise HubError(f"{args.name} ships with the package; there is nothing to free")
    if args.name not in PUBLISHED:
        raise HubError(f"unknown model name {args.name!r:.80}; known are {', '.join(PUBLISHED)}")
    folder, freed = cache.folder_of(args.name), 0
    if folder.parent.is_dir():
        with cache.locked(folder):
            freed = cache.inspect(folder).size
            cache.remove_folder(folder)
            freed += cache.remove_parts(folder)
    base = folder_of_base(PUBLISHED[args.name].base)
    if args.downloads and base.is_dir():
        with cache.locked(base):
            freed += cache.size_of(base)
            cache.remove_folder(base)
    downloads = _downloads(PUBLISHED[args.name])
    if args.downloads and downloads:
        commits = [revision.commit_hash for repo in downloads for revision in repo.revisions]
        strategy = scan_cache_dir().delete_revisions(*commits)
        strategy.execute()
        freed += strategy.expected_freed_size
    print(f"freed {human(freed)}" if freed else f"there is no merged {args.name} to free")
    if not args.downloads and downloads:
        kept = sum(repo.size_on_disk for repo in downloads)
        print(f"{human(kept)} of downloads are still in the Hub's cache: add --downloads")
    return 0


def _downloads(published: Published) -> list[Any]:
    """Return the repositories of a model that are in the Hub's cache."""
    try:
        repositories = scan_cache_dir().repos
    except CacheNotFound:
        return []
    return [repo for repo in repositories if repo.repo_id in published.repositories]


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not JSON ({error})") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("must be a JSON object")
    return value
