"""Damage to files, from a seed: bits, bytes, sizes, pieces cut out, doubled, swapped; and numbers and words of text."""

from __future__ import annotations

import json
import random
from typing import Any

# What readers of lengths, counts and sizes are most often wrong about.
_NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
_WORDS = (
    *("", " ", "\0", "0", "-1", "1e309", "nan", "inf", "9" * 40, "true", "None", "+", "a+b", "é", "e\u0301", "\u202e"),
    *("../../etc/passwd", "/etc/passwd", "file:///etc/passwd", "http://127.0.0.1:9/x", "s3://127.0.0.1/x", "CON"),
    *("%s%n", "{0.__class__}", "${HOME}", "$(id)", "`id`", "'; DROP TABLE rows; --", "=1+1", "[/red]", "\x1b[2J"),
    *("\ufeff", "a" * 300),
)


def damaged(data: bytes, seed: int) -> bytes:
    """`data` with one to eight defects."""
    draw = random.Random(seed)
    mutant = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 3, 8))):
        if not mutant:
            break
        # Headers, indexes and tables are at the beginning and the end.
        at = draw.choice(
            (draw.randrange(len(mutant)), draw.randrange(min(len(mutant), 1024)), -draw.randrange(1, 1025))
        )
        at = at % len(mutant)
        length = min(len(mutant) - at, draw.choice((1, 4, 64, 1024, 16384)))
        kind = draw.randrange(9)
        if kind == 0:
            mutant[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            mutant[at] = draw.choice((0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)))
        elif kind == 2:
            size = draw.choice((2, 4, 8))
            number = draw.choice(_NUMBERS) % (1 << 8 * size)
            mutant[at : at + size] = number.to_bytes(size, draw.choice(("big", "little")))
        elif kind == 3:
            del mutant[at : at + length]
        elif kind == 4:
            mutant[at:at] = mutant[at : at + length]
        elif kind == 5:
            mutant[at : at + length] = bytes(length)
        elif kind == 6:
            mutant[at : at + length] = draw.randbytes(length)
        elif kind == 7:
            del mutant[at:]
        else:
            other = draw.randrange(len(mutant))
            piece = bytes(mutant[other : other + length])
            mutant[at : at + len(piece)] = piece
    return bytes(mutant)


def damaged_table(text: str, seed: int) -> str:
    """A CSV text with cells, delimiters and lines that are wrong."""
    draw = random.Random(seed)
    lines = text.splitlines()
    for _ in range(draw.choice((1, 1, 2, 5))):
        row = draw.randrange(len(lines))
        cells = lines[row].split(",")
        column = draw.randrange(len(cells))
        kind = draw.randrange(8)
        if kind <= 2:
            cells[column] = draw.choice(_WORDS)
        elif kind == 3:
            cells[column] = '"' + cells[column] * draw.choice((1, 2))
        elif kind == 4:
            del cells[column]
        elif kind == 5:
            cells.insert(column, draw.choice(_WORDS))
        elif kind == 6:
            cells = [";".join(cells)]
        lines[row] = ",".join(cells)
        if kind == 7:
            lines.insert(draw.randrange(len(lines)), lines[row])
    return draw.choice(("\n", "\r\n", "\r")).join(lines) + draw.choice(("", "\n", "\n\n"))


def damaged_json(text: str, seed: int) -> str:
    """A JSON text with one to three values that are others: numbers far off, other types, lists of another length."""
    draw = random.Random(seed)
    root: Any = json.loads(text)
    for _ in range(draw.choice((1, 1, 2, 3))):
        spots = list(_spots(root))
        if not spots:
            break
        holder, key = draw.choice(spots)
        value = holder[key]
        choices: list[Any] = [
            None,
            True,
            [],
            {},
            -1,
            0,
            1,
            2**31,
            10**12,
            1e308,
            "",
            draw.choice(_WORDS),
            [value, value],
        ]
        if isinstance(value, int | float):
            choices += [value + 1, value * 2, value * 1000, -value, value / 3]
        if isinstance(value, list) and value:
            choices += [value[1:], value * 2, value * 1000]
        holder[key] = draw.choice(choices)
    return json.dumps(root)


def _spots(node: Any) -> Any:
    entries = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in entries:
        yield node, key
        yield from _spots(value)
