# SPDX-License-Identifier: Apache-2.0
"""`python -m vllm_d2f models | prepare | merge | rm`."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from huggingface_hub import scan_cache_dir
from huggingface_hub.errors import CacheNotFound

from vllm_d2f.hub import HubError, cache
from vllm_d2f.hub.names import EMBEDDED, resolve_embedded
from vllm_d2f.hub.prepare import MergePlan, merge, plan_of, prepare
from vllm_d2f.models import FAMILIES, PRESETS, PUBLISHED

__all__ = ["add_commands", "overview"]

USAGE = """
models:
  models [--check] [--json]                list models by name, with state and size
  prepare NAME                             download and merge, so that serving starts at once
  prepare NAME --base DIR --adapter DIR    the same from folders, without a network
  merge --base DIR --adapter DIR --out DIR merge any D2F adapter into a base of its family
  rm NAME [--downloads]                    free the space that a name takes
"""


def add_commands(subparsers: Any) -> None:
    """Add the subcommands to `python -m vllm_d2f`."""
    models = subparsers.add_parser("models", help="list models by name, with state and size")
    models.add_argument("--check", action="store_true", help="read all files, compare checksums")
    models.add_argument("--json", action="store_true", help="print JSON")
    models.set_defaults(run=_models)

    preparing = subparsers.add_parser("prepare", help="download and merge a model by name")
    preparing.add_argument(
        "name", choices=list(PUBLISHED), metavar="NAME", help=", ".join(PUBLISHED)
    )
    _add_sources(preparing, required=False)
    preparing.set_defaults(run=_prepare)

    merging = subparsers.add_parser("merge", help="merge a D2F adapter into its base")
    _add_sources(merging, required=True)
    merging.add_argument("--out", required=True, metavar="DIR", help="the folder to write")
    merging.add_argument(
        "--d2f",
        type=_json_object,
        metavar="JSON",
        help=f'how the model decodes, for example \'{{"preset": "{next(iter(PRESETS))}"}}\'; '
        "without it the server is told with --additional-config",
    )
    merging.set_defaults(run=_merge)

    remove = subparsers.add_parser("rm", help="free the space that a model takes")
    remove.add_argument("name", metavar="NAME", help=", ".join(PUBLISHED))
    remove.add_argument(
        "--downloads",
        action="store_true",
        help="also its base and adapter in the Hub's cache, which other programs may use",
    )
    remove.set_defaults(run=_remove)


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
        action="store_true",
        help="merge although the base seems to be Base for Instruct or the other way round",
    )
    parser.add_argument("--force", action="store_true", help="replace what is there")


def overview() -> list[dict[str, Any]]:
    """Every model by name: what it is, its state, its size in bytes, where it is from."""
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
        row |= dict(base=published.base, adapter=published.adapter)
        if state.kind == "ready":
            row |= {what: state.record[what]["source"] for what in ("base", "adapter")}
            row |= {f"{w}_revision": state.record[w]["revision"] for w in ("base", "adapter")}
        elif state.kind == "damaged":
            row["reason"] = state.reason
        row["unfinished"] = sum(map(cache.size_of, cache.parts_of(folder)))
        rows.append(row)
    return rows


def _models(args: argparse.Namespace) -> int:
    rows = overview()
    downloads = _downloads()
    status = 0
    for row in rows:
        if row["name"] not in PUBLISHED:
            continue
        published = PUBLISHED[row["name"]]
        repositories = (published.base, published.adapter)
        row["downloads"] = sum(downloads.get(repository, 0) for repository in repositories)
        if args.check and row["state"] == "ready":
            folder = cache.folder_of(row["name"])
            if bad := cache.damaged_files(folder, cache.inspect(folder)):
                row |= dict(state="damaged", reason=f"{', '.join(bad)}: content has changed")
        if row["state"] == "damaged":
            status = 1
    if args.json:
        print(json.dumps(rows, indent=2))
        return status
    words = {"embedded": "ships with the package", "absent": "prepared at first use"}
    for row in rows:
        state = words.get(row["state"], row["state"])
        print(f"{row['name']:<14}{state:<24}{human(row['size']):>9}  {row['about']}")
        for what in ("base", "adapter"):
            if what in row:
                commit = row.get(f"{what}_revision")
                print(f"{'':<14}{what + ' ' + row[what]}{f' at {commit}' if commit else ''}")
        if row.get("reason"):
            print(f"{'':<14}damaged: {row['reason']}; python -m vllm_d2f rm {row['name']}")
        for key, text in (
            ("unfinished", "left by an interrupted merge, goes with the next prepare or rm"),
            ("downloads", "in the Hub's cache, goes with rm --downloads"),
        ):
            if row.get(key):
                print(f"{'':<14}{human(row[key])} {text}")
        if row["state"] == "absent":
            print(
                f"{'':<14}needs about {2 * PUBLISHED[row['name']].gigabytes:.0f} GB of disk space"
            )
    print(f"\nmerged models are in {cache.root()} (D2F_CACHE, HF_HOME)")
    return status


def _prepare(args: argparse.Namespace) -> int:
    plan = plan_of(
        args.name,
        args.base,
        args.adapter,
        args.base_revision,
        args.adapter_revision,
        check_variant=not args.allow_other_base,
    )
    folder = prepare(args.name, plan, force=args.force)
    print(f"{args.name} is ready in {folder}\nvllm serve {args.name}")
    return 0


def _merge(args: argparse.Namespace) -> int:
    plan = MergePlan(
        base=args.base,
        adapter=args.adapter,
        base_revision=args.base_revision,
        adapter_revision=args.adapter_revision,
        d2f=args.d2f,
        check_variant=not args.allow_other_base,
    )
    folder = merge(Path(args.out), plan, force=args.force)
    print(f"merged into {folder}\nvllm serve {folder}")
    return 0


def _remove(args: argparse.Namespace) -> int:
    if args.name in EMBEDDED:
        raise HubError(f"{args.name} ships with the package; there is nothing to free")
    if args.name not in PUBLISHED:
        raise HubError(f"unknown model name {args.name!r:.80}; known are {', '.join(PUBLISHED)}")
    folder = cache.folder_of(args.name)
    with cache.locked(folder, lambda message: print(message, file=sys.stderr)):
        freed = cache.inspect(folder).size
        freed += cache.remove_parts(folder)
        if folder.is_dir():
            cache.remove_folder(folder)
    repositories = [PUBLISHED[args.name].base, PUBLISHED[args.name].adapter]
    if args.downloads:
        freed += _remove_downloads(repositories)
    print(f"freed {human(freed)}")
    if not args.downloads and (kept := _downloads()):
        held = sum(kept.get(repository, 0) for repository in repositories)
        if held:
            print(f"{human(held)} of downloads are still in the Hub's cache: add --downloads")
    return 0


def _downloads() -> dict[str, int]:
    """Repository -> bytes in the Hub's cache."""
    found = _scanned()
    return {repo.repo_id: repo.size_on_disk for repo in found.repos} if found else {}


def _remove_downloads(repositories: list[str]) -> int:
    if not (found := _scanned()):
        return 0
    commits = [
        revision.commit_hash
        for repo in found.repos
        if repo.repo_id in repositories
        for revision in repo.revisions
    ]
    strategy = found.delete_revisions(*commits)
    strategy.execute()
    return strategy.expected_freed_size


def _scanned() -> Any:
    """What is in the Hub's cache; None without one."""
    try:
        return scan_cache_dir()
    except CacheNotFound:
        return None


def human(size: int) -> str:
    """A size in bytes, in the unit that fits."""
    for unit, divisor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= divisor:
            return f"{size / divisor:.1f} {unit}"
    return f"{size} B" if size else ""


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not JSON ({error})") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("must be a JSON object")
    return value
