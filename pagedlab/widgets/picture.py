"""The block map as a still picture, in the colours of its light theme."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pagedlab.widgets.blockmap import (
    CACHED,
    CLAIMED,
    FREE,
    NULL,
    NUM_CODES,
    PALETTES,
    SEQUENCE,
    SHARED,
    Codes,
)

if TYPE_CHECKING:
    from PIL.Image import Image

_SCALE = 2


def draw_map(
    codes: Codes, cols: int, title: str, labels: Mapping[str, str], counts: Mapping[str, int]
) -> Image:
    """Return tiles, title and legend as a picture at twice its nominal size."""
    from PIL import Image, ImageDraw, ImageFont

    palette = PALETTES["light"]
    cell = max(2, min(16, 800 // cols)) * _SCALE
    rows = -(-len(codes) // cols)
    font = ImageFont.load_default(12 * _SCALE)
    top = 24 * _SCALE if title else 4 * _SCALE
    width = max(cols * cell, 620 * _SCALE) + 8 * _SCALE
    picture = Image.new("RGB", (width, top + rows * cell + 30 * _SCALE), "#ffffff")
    pen = ImageDraw.Draw(picture)
    left = 4 * _SCALE
    if title:
        pen.text((left, 4 * _SCALE), title, fill=palette[NUM_CODES + 2], font=font)
    tiles = [_tile(code, cell, palette) for code in range(NUM_CODES)]
    for i, code in enumerate(codes.tolist()):
        picture.paste(tiles[code], (left + i % cols * cell, top + i // cols * cell))
    x, y = left, top + rows * cell + 8 * _SCALE
    side = 14 * _SCALE
    for kind, code in (
        ("free", FREE),
        ("running", SEQUENCE),
        ("shared", SHARED),
        ("cached", CACHED),
        ("claimed", CLAIMED),
        ("null", NULL),
    ):
        if not counts[kind] and (kind in ("claimed", "null") or not labels[kind]):
            continue
        picture.paste(_tile(code, side, palette), (x, y))
        text = f"{labels[kind]} {counts[kind]}"
        pen.text((x + side + 4 * _SCALE, y), text, fill=palette[NUM_CODES + 3], font=font)
        x += side + int(pen.textlength(text, font=font)) + 18 * _SCALE
    return picture


def _tile(code: int, size: int, palette: list[str]) -> Image:
    from PIL import Image, ImageDraw

    tile = Image.new("RGB", (size, size), "#ffffff")
    pen = ImageDraw.Draw(tile)
    side = size - 1 - (2 if size >= 12 else 0)
    if size < 12:
        return Image.new("RGB", (size, size), palette[code])
    pen.rounded_rectangle((0, 0, side, side), radius=side // 6, fill=palette[code])
    if code == CACHED:
        for offset in range(side // 3, 2 * side, side // 2):
            low = max(0, offset - side)
            pen.line(
                (offset - low, low, low, offset - low), fill=palette[NUM_CODES], width=max(1, size // 12)
            )
    elif code == SHARED:
        middle, radius = side / 2, side / 5
        pen.ellipse(
            (middle - radius, middle - radius, middle + radius, middle + radius), fill=palette[NUM_CODES + 1]
        )
    elif code == CLAIMED:
        pen.rounded_rectangle(
            (0, 0, side, side), radius=side // 6, outline=palette[NUM_CODES], width=max(2, size // 12)
        )
    elif code == NULL:
        near, far = side * 0.25, side * 0.75
        pen.line((near, near, far, far), fill=palette[NUM_CODES], width=max(1, size // 12))
        pen.line((far, near, near, far), fill=palette[NUM_CODES], width=max(1, size // 12))
    return tile
