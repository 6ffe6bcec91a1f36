"""Colours and bitmaps of the mini world, without fonts or anti-aliasing: the pixels are the same on all machines."""

from __future__ import annotations

import numpy as np

# Marks and grounds have different colours, so that every mark is visible on every ground.
COLOURS = {
    "red": (225, 30, 40),
    "green": (30, 165, 50),
    "blue": (50, 80, 235),
    "yellow": (245, 225, 30),
    "cyan": (50, 215, 230),
    "purple": (165, 45, 190),
    "orange": (250, 135, 20),
    "white": (250, 250, 250),
}
GROUNDS = {
    "black": (15, 15, 15),
    "gray": (115, 115, 115),
    "brown": (105, 60, 25),
    "pink": (255, 190, 205),
    "navy": (10, 15, 85),
    "olive": (80, 90, 15),
}
PALETTE = [*COLOURS.values(), *GROUNDS.values()]
PALETTE_INDEX = {name: index for index, name in enumerate([*COLOURS, *GROUNDS])}

SHAPES = ["circle", "square", "triangle", "diamond", "ring"]

# 5x7 letters, without I, O, Q, B, D and G: within one patch they are too similar to other marks.
_LETTERS = {
    "A": "01110 10001 10001 11111 10001 10001 10001",
    "C": "01110 10001 10000 10000 10000 10001 01110",
    "E": "11111 10000 10000 11110 10000 10000 11111",
    "F": "11111 10000 10000 11110 10000 10000 10000",
    "H": "10001 10001 10001 11111 10001 10001 10001",
    "J": "00111 00010 00010 00010 00010 10010 01100",
    "K": "10001 10010 10100 11000 10100 10010 10001",
    "L": "10000 10000 10000 10000 10000 10000 11111",
    "M": "10001 11011 10101 10101 10001 10001 10001",
    "N": "10001 11001 10101 10011 10001 10001 10001",
    "P": "11110 10001 10001 11110 10000 10000 10000",
    "R": "11110 10001 10001 11110 10100 10010 10001",
    "S": "01111 10000 10000 01110 00001 00001 11110",
    "T": "11111 00100 00100 00100 00100 00100 00100",
    "U": "10001 10001 10001 10001 10001 10001 01110",
    "V": "10001 10001 10001 10001 10001 01010 00100",
    "W": "10001 10001 10001 10101 10101 11011 10001",
    "X": "10001 10001 01010 00100 01010 10001 10001",
    "Y": "10001 10001 01010 00100 00100 00100 00100",
    "Z": "11111 00001 00010 00100 01000 10000 11111",
}
_DIGITS = {
    "0": "01110 10001 10011 10101 11001 10001 01110",
    "1": "00100 01100 00100 00100 00100 00100 01110",
    "2": "01110 10001 00001 00110 01000 10000 11111",
    "3": "11110 00001 00001 01110 00001 00001 11110",
    "4": "00010 00110 01010 10010 11111 00010 00010",
    "5": "11111 10000 11110 00001 00001 10001 01110",
    "6": "00110 01000 10000 11110 10001 10001 01110",
    "7": "11111 00001 00010 00100 01000 01000 01000",
    "8": "01110 10001 10001 01110 10001 10001 01110",
    "9": "01110 10001 10001 01111 00001 00010 01100",
}
# 7x7 signs; a code starts with one.
_SIGNS = {
    "star": "0001000 0001000 1111111 0111110 0011100 0110110 1100011",
    "heart": "0110110 1111111 1111111 1111111 0111110 0011100 0001000",
    "moon": "0011110 0111000 1110000 1110000 1110000 0111000 0011110",
    "arrow": "0001000 0000100 1111110 1111111 1111110 0000100 0001000",
    "bell": "0001000 0011100 0111110 0111110 0111110 1111111 0001000",
    "flag": "1111110 1111110 1111110 1111110 1000000 1000000 1000000",
    "tree": "0001000 0011100 0111110 1111111 0001000 0001000 0001000",
    "cup": "1111100 1111111 1111101 1111101 1111111 1111100 1111100",
}

MASTER_CELL = 8  # pixels per cell of the master drawing; one cell is one patch of a tile


def _bitmap(rows: str) -> np.ndarray:
    """Rows of 0 and 1 as text -> (8, 8) boolean mask with the glyph centred horizontally."""
    glyph = np.array([[char == "1" for char in row] for row in rows.split()])
    mask = np.zeros((MASTER_CELL, MASTER_CELL), dtype=bool)
    left = (MASTER_CELL - glyph.shape[1]) // 2
    mask[: glyph.shape[0], left : left + glyph.shape[1]] = glyph
    return mask


LETTERS = {name: _bitmap(rows) for name, rows in _LETTERS.items()}
DIGITS = {name: _bitmap(rows) for name, rows in _DIGITS.items()}
SIGNS = {name: _bitmap(rows) for name, rows in _SIGNS.items()}


def shape_mask(name: str, side: int) -> np.ndarray:
    """A large shape as a boolean mask (side, side), computed with integers only.

    Raises:
        ValueError: `name` is not one of SHAPES.
    """
    # Coordinates relative to the centre, doubled so that half pixels are integers.
    axis = 2 * np.arange(side) - side + 1
    y, x = axis[:, None], axis[None, :]
    reach = side - 4
    if name == "circle":
        return x * x + y * y <= reach * reach
    if name == "ring":
        distance = x * x + y * y
        return (distance <= reach * reach) & (4 * distance >= reach * reach)
    if name == "square":
        return (abs(x) <= reach) & (abs(y) <= reach)
    if name == "diamond":
        return abs(x) + abs(y) <= reach
    if name == "triangle":
        return (2 * abs(x) <= y + reach) & (abs(y) <= reach)
    raise ValueError(f"Unknown shape {name!r}: choose from {', '.join(SHAPES)}.")
