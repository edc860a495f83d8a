"""What is done to good input: bytes scrambled, keys of params.yaml changed."""

from __future__ import annotations

import math
import random

import yaml

TOKENS = [
    b"\0",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"nan",
    b".inf",
    b"-1",
    b"1e999",
    b"9" * 5000,
    b'"',
    b"\r",
    b",",
]
TOKENS += [
    b"\t",
    b"{",
    b"[" * 2000,
    b"&a [*a]",
    b"!!python/object:os.system x",
    b"\xe2\x80\xa8",
    b"2001-99-99",
]
TOKENS += [b"null", b"{}", b"true", b"../../x", b"/dev/zero", b"<<: *b", b": ", b"\n- ", b"\\ud800"]
NASTY = [
    None,
    True,
    -1,
    0,
    2**70,
    1.5,
    math.nan,
    math.inf,
    "",
    "x\0y",
    "\ud83d",
    [],
    {},
    [[]],
    {"a": {"b": 1}},
]
NASTY += ["9" * 5000, "../../etc", b"bytes", "true"]


def scramble(data: bytes, draw: random.Random) -> bytes:
    """One to three of: a flipped bit, a cut, a repeat, a swap, random bytes, a token, the file torn."""
    for _ in range(draw.randint(1, 3)):
        a, b = sorted(draw.randrange(len(data) + 1) for _ in range(2))
        b = min(b, a + draw.choice((1, 8, 200)))
        match draw.randrange(7):
            case 0 if a < len(data):
                data = data[:a] + bytes([data[a] ^ 1 << draw.randrange(8)]) + data[a + 1 :]
            case 1:
                data = data[:a] + data[b:]
            case 2:
                data = data[:b] + data[a:b] * draw.choice((1, 50)) + data[b:]
            case 3:
                data = data[:a] + data[b:] + data[a:b]
            case 4:
                data = data[:a] + draw.randbytes(draw.choice((1, 16))) + data[a:]
            case 5:
                data = data[:a] + draw.choice(TOKENS) + data[b:]
            case _:
                data = data[:a]
    return data


def change_a_key(text: str, draw: random.Random) -> str:
    """params.yaml with one key renamed, removed or given a nasty value."""
    top = yaml.safe_load(text)
    section = top
    while True:
        name = draw.choice(sorted(section))
        if not isinstance(section[name], dict) or draw.random() < 0.2:
            break
        section = section[name]
    match draw.randrange(3):
        case 0:
            section[name + draw.choice("sx_")] = section.pop(name)
        case 1:
            del section[name]
        case _:
            section[name] = draw.choice(NASTY)
    return yaml.dump(top)
