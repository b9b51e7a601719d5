"""Plausible damage to files: of their bytes, and of what is inside of their containers."""

from __future__ import annotations

import gzip
import io
import json
import random
import re
import struct
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

CANARY = "sparse_adv_fuzz_canary"
"""Name of an environment variable that code in a file sets, if a reader executes it."""

MAX_BYTES = 4 << 20

_SETS_CANARY = f"import os; os.environ[{CANARY!r}] = '1'".encode()
_TOKENS = (
    b"cbuiltins\nexec\n(V" + _SETS_CANARY + b"\ntR.",
    b"\x80\x02cbuiltins\nexec\nX" + struct.pack("<I", len(_SETS_CANARY)) + _SETS_CANARY + b"\x85R.",
    b"cposix\nsystem\n",
    b"cnumpy\ndtype\n",
    b"r\xff\xff\xff\x7f",  # PUT of a large number in a pickle
    b"\x8e" + struct.pack("<Q", 1 << 62),  # BINBYTES8
    b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"(" * 500,
    b"]" * 300 + b"a" * 299,
    b"[" * 20_000,
    b'{"a":' * 5_000,
    b"&a [*a, *a]",
    b"!!python/object/apply:os.system [true]",
    b"999999999999999999999",
    b"-1",
    b"1e999",
    b"NaN",
    b"Infinity",
    b"null",
    b"true",
    b"{}",
    b"[]",
    b'""',
    b"\xff\xff\xff\xff",
    b"\x7f\xff\xff\xff",
    b"\x00" * 16,
    b"|O",
    b"<f8",
    b"<V9",
    b"\x93NUMPY",
    b"PK\x03\x04",
    b"\x1f\x8b\x08",
    b"../../x",
    "\u202e\u0000é".encode(),
)


def mutated(rng: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
    """A file with a few changes: half of the time inside of its container, so that its checksums are right."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        inside = next((change for start, change in _CONTAINERS if start(content)), None)
        if inside and rng.random() < 0.6:
            try:
                content = inside(rng, content, others)
                continue
            except Exception:  # it is damaged already
                pass
        content = _bytes(rng, content, others)
    return content[:MAX_BYTES]


def _bytes(rng: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
    start = rng.randrange(len(content) + 1)
    if rng.random() < 0.5:
        start = min(start, rng.randrange(256))  # headers matter most
    length = min(rng.choice((1, 1, 2, 4, 8, 64, 1024)), len(content) - start)
    before, taken, after = content[:start], content[start : start + length], content[start + length :]
    kind = rng.randrange(8)
    if kind == 0:
        return before
    if kind == 1:
        return before + after
    if kind == 2:
        return before + taken * rng.choice((2, 3, 100)) + after
    if kind == 3:
        return before + rng.choice(_TOKENS) + (after if rng.random() < 0.5 else taken + after)
    if kind == 4:
        number = rng.choice((0, 1, 255, 256, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1))
        packed = struct.pack(rng.choice((">Q", "<Q")), number)[: rng.choice((1, 2, 4, 8))]
        return before + packed + content[start + len(packed) :]
    if kind == 5:
        return before + bytes(byte ^ 1 << rng.randrange(8) for byte in taken) + after
    if kind == 6:
        other = rng.choice(others)
        cut = rng.randrange(len(other) + 1)
        return before + other[cut : cut + rng.choice((8, 64, 4096))] + after
    return _another_number(rng, content)


def _another_number(rng: random.Random, content: bytes) -> bytes:
    """A number or a word in text replaced by another token."""
    found = list(re.finditer(rb"-?\d+(\.\d+)?|\"\w*\"|true|false|null", content[:100_000]))
    if not found:
        return content
    place = rng.choice(found)
    return content[: place.start()] + rng.choice(_TOKENS) + content[place.end() :]


def _in_zip(rng: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    chosen = rng.choice([name for name in members if name.endswith("data.pkl") or rng.random() < 0.3] or list(members))
    if rng.random() < 0.1:
        del members[chosen]
    else:
        members[chosen] = _bytes(rng, members[chosen], others)
    stored = io.BytesIO()
    kind = zipfile.ZIP_DEFLATED if rng.random() < 0.1 else zipfile.ZIP_STORED
    with zipfile.ZipFile(stored, "w", kind) as archive:
        for name, member in members.items():
            archive.writestr(name, member)
    return stored.getvalue()


def _in_gzip(rng: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
    unpacked = gzip.decompress(content)
    if unpacked[257:262] == b"ustar":
        return gzip.compress(_in_tar(rng, unpacked, others), 1)
    return gzip.compress(_bytes(rng, unpacked, others), 1)


def _in_tar(rng: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
    if rng.random() < 0.3:
        return _bytes(rng, content, others)
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        members = [(member, archive.extractfile(member)) for member in archive]
        contents = [(member, file.read() if file else b"") for member, file in members]
    chosen, written = rng.randrange(len(contents)), io.BytesIO()
    with tarfile.open(fileobj=written, mode="w") as archive:
        for i, (member, data) in enumerate(contents):
            if i == chosen:
                data = _bytes(rng, data, others)
                member.type = rng.choice(
                    (member.type, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE)
                )
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return written.getvalue()


def _in_safetensors(rng: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
    """Change the header's JSON, and its length with it."""
    (length,) = struct.unpack("<Q", content[:8])
    header, rest = json.loads(content[8 : 8 + length]), content[8 + length :]
    if rng.random() < 0.6:
        header = _another_value(rng, header)
        text = json.dumps(header).encode()
    else:
        text = _bytes(rng, content[8 : 8 + length], others)
    return struct.pack("<Q", len(text)) + text + rest


_VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    2**31,
    2**63,
    1e300,
    "",
    "x",
    [],
    {},
    [[]],
    [2**40, 2**40],
    [-1],
    {"a": {}},
)


def _another_value(rng: random.Random, value: Any) -> Any:
    """Walk down a JSON value and replace, rename or remove something; text that is JSON is walked into."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(sorted(value))
        kind = rng.random()
        rest = {name: item for name, item in value.items() if name != key}
        if kind < 0.1:
            return rest
        return rest | {key if kind > 0.2 else f"{key}x": _another_value(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.7:
        place = rng.randrange(len(value))
        return [*value[:place], _another_value(rng, value[place]), *value[place + 1 :]]
    if isinstance(value, str) and value[:1] in ("{", "[") and rng.random() < 0.8:
        return json.dumps(_another_value(rng, json.loads(value)))
    return rng.choice(_VALUES)


def _in_json(rng: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
    lines = content.decode().splitlines() if content.count(b"\n{") else [content.decode()]
    place = rng.randrange(len(lines))
    lines[place] = json.dumps(_another_value(rng, json.loads(lines[place])))
    return "\n".join(lines).encode()


_CONTAINERS: tuple[tuple[Callable[[bytes], bool], Callable[..., bytes]], ...] = (
    (lambda content: content[:2] == b"PK", _in_zip),
    (lambda content: content[:2] == b"\x1f\x8b", _in_gzip),
    (lambda content: content[8:9] == b"{", _in_safetensors),
    (lambda content: content[:1] == b"{", _in_json),
)
