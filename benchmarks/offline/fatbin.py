# SPDX-License-Identifier: Apache-2.0
"""Leave out of a CUDA library what other architectures would run.

A library embeds its kernels as "fat binaries": a header, then entries, each compiled for one
architecture. The contents of entries that the device does not take are overwritten with zeros,
which compress to nothing; offsets and headers stay, and the driver picks its entry as before. Where
a fat binary has no code for the device, its newest PTX that the device can compile stays.

Layout (little endian). Container: u32 magic, u16 version, u16 header size, u64 size of what
follows. Entry: u16 kind (1 PTX, 2 code), u16, u32 header size, u64 size of its contents, 12 bytes,
u32 architecture (90 for sm_90 and sm_90a) at offset 28.
"""

import struct
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

MAGIC = b"\x50\xed\x55\xba"
PTX, CODE = 1, 2


class Entry(NamedTuple):
    """What is compiled for one architecture: its contents are bytes [begin, end)."""

    kind: int
    architecture: int
    begin: int
    end: int


def containers(library: bytes) -> Iterator[list[Entry]]:
    """The entries of every fat binary."""
    at = library.find(MAGIC)
    while at >= 0:
        head = library[at + 4 : at + 16]
        version, header, size = struct.unpack("<HHQ", head) if len(head) == 12 else (0, 0, 0)
        end = at + header + size
        if version != 1 or header < 16 or end > len(library):
            at = library.find(MAGIC, at + 4)  # these four bytes are no container
            continue
        entries = []
        entry = at + header
        while entry + 32 <= end:
            kind, _, entry_header, contents = struct.unpack_from("<HHIQ", library, entry)
            (architecture,) = struct.unpack_from("<I", library, entry + 28)
            begin = entry + entry_header
            if kind not in (PTX, CODE) or entry_header < 32 or begin + contents > end:
                break
            entries.append(Entry(kind, architecture, begin, begin + contents))
            entry = begin + contents
        yield entries
        at = library.find(MAGIC, end)


def keep_only(library: bytes, architecture: int) -> bytes:
    """The library with what a device of this architecture takes.

    Raises:
        ValueError: it has kernels, and none for this device.
    """
    out = bytearray(library)
    found = kept = 0
    for entries in containers(library):
        ptx = [e.architecture for e in entries if e.kind == PTX and e.architecture <= architecture]
        want = (CODE, architecture)
        if want not in {entry[:2] for entry in entries}:
            want = (PTX, max(ptx, default=0))
        for entry in entries:
            found += 1
            if entry[:2] == want:
                kept += 1
            else:
                out[entry.begin : entry.end] = bytes(entry.end - entry.begin)
    if found and not kept:
        raise ValueError(f"no code for sm_{architecture}, only {summary(library)}")
    return bytes(out)


def summary(library: bytes) -> dict[str, int]:
    """Bytes by kind and architecture."""
    sizes: Counter[str] = Counter()
    for entries in containers(library):
        for kind, architecture, begin, end in entries:
            sizes[f"{'PTX' if kind == PTX else 'code'} {architecture}"] += end - begin
    return dict(sizes)
