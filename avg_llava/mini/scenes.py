"""Scenes of the mini world: random pictures of marks on a grid of cells, with a label for every cell.

Anyres preprocessing turns one cell into one patch of a tile. Small marks fill one cell, so they are readable only at
the finest level, which has a token per patch. Medium marks fill 2x2 cells, and large ones 4x4 cells (a "site"), the
area of one token of the coarsest level.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np

from avg_llava.mini.glyphs import (
    COLOURS,
    DIGITS,
    GROUNDS,
    LETTERS,
    MASTER_CELL,
    PALETTE_INDEX,
    SHAPES,
    SIGNS,
    shape_mask,
)

SITE = 4  # cells per side of a site
OVERVIEW = 8  # patches per side of one crop
SIZES = ["none", "small", "medium", "large"]
CELLS_OF_SIZE = {"small": 1, "medium": 2, "large": 4}
# "writing": a small mark in the overview, where it is visible but not readable.
KINDS = ["nothing", "writing", "frame", *SHAPES, *LETTERS, *DIGITS, *SIGNS]
HUES = ["none", *COLOURS]
GROUND_NAMES = list(GROUNDS)
# Fields of a patch's label and their numbers of values.
LABEL_FIELDS = {
    "ground": len(GROUND_NAMES),
    "kind": len(KINDS),
    "colour": len(HUES),
    "inside": len(HUES),
    "size": len(SIZES),
}

# (rows, columns) in cells -> weight. All are multiples of a site, and fill an anyres grid of two or more tiles exactly,
# except 8x8 (two tiles, half padding) and 12x16 and 16x12 (2x2 tiles with padding).
LAYOUTS = {(16, 16): 3, (12, 16): 2, (16, 12): 2, (8, 16): 2, (16, 8): 2, (8, 24): 1, (24, 8): 1, (8, 8): 1}


@dataclass(frozen=True)
class Mark:
    """A letter, digit, sign, shape or frame; `kind` is in KINDS, (row, column) is the upper left cell."""

    kind: str
    colour: str
    size: str
    row: int
    column: int
    inside: str = "none"


@dataclass
class Scene:
    """One picture.

    Attributes:
        rows: Height in cells.
        columns: Width in cells.
        cell: Side of a cell in pixels.
        grounds: Background colours: one, or two if the background is split.
        split: "none", "columns" or "rows".
        share: Cells of the first ground along the split axis.
        drawing: (rows * 8, columns * 8) palette indices, the drawing at 8 pixels per cell.
        labels: (rows, columns, 5) the LABEL_FIELDS of every cell.
        marks: All marks, including the signs and digits of codes.
        codes: Sign -> the digits to its right, one cell each.
    """

    rows: int
    columns: int
    cell: int
    grounds: list[str]
    split: str
    share: int
    drawing: np.ndarray
    labels: np.ndarray
    marks: list[Mark] = field(default_factory=list)
    codes: dict[str, str] = field(default_factory=dict)

    @property
    def has_writing(self) -> bool:
        return any(mark.size == "small" for mark in self.marks)

    @property
    def shapes(self) -> list[Mark]:
        return [mark for mark in self.marks if mark.kind in SHAPES]

    def pixels(self) -> np.ndarray:
        """Palette indices (rows * cell, columns * cell): the drawing, scaled to `cell` pixels per cell."""
        y = np.arange(self.rows * self.cell) * MASTER_CELL // self.cell
        x = np.arange(self.columns * self.cell) * MASTER_CELL // self.cell
        return self.drawing[y[:, None], x[None, :]]

    def add(self, mark: Mark) -> None:
        """Draws a mark and labels its cells."""
        cells = CELLS_OF_SIZE[mark.size]
        side = cells * MASTER_CELL
        y, x = mark.row * MASTER_CELL, mark.column * MASTER_CELL
        area = self.drawing[y : y + side, x : x + side]
        colour = PALETTE_INDEX[mark.colour]
        if mark.kind == "frame":
            gap, border = (cells // 2, 2 * cells) if cells > 1 else (0, 2)
            area[gap : side - gap, gap : side - gap] = colour
            area[border : side - border, border : side - border] = PALETTE_INDEX[mark.inside]
        elif mark.kind in SHAPES:
            area[shape_mask(mark.kind, side)] = colour
        else:
            mask = next(table[mark.kind] for table in (LETTERS, DIGITS, SIGNS) if mark.kind in table)
            area[mask.repeat(cells, axis=0).repeat(cells, axis=1)] = colour
        self.labels[mark.row : mark.row + cells, mark.column : mark.column + cells, 1:] = (
            KINDS.index(mark.kind),
            HUES.index(mark.colour),
            HUES.index(mark.inside),
            SIZES.index(mark.size),
        )
        self.marks.append(mark)

    def overview_labels(self) -> np.ndarray:
        """Labels (8, 8, 5) of the overview: of the cell at each patch's centre, or "writing" if it is unreadable."""
        middles = 2 * np.arange(OVERVIEW) + 1
        row = middles * self.rows // (2 * OVERVIEW)
        column = middles * self.columns // (2 * OVERVIEW)
        labels = self.labels[row[:, None], column[None, :]].copy()
        largest = max(self.rows, self.columns) // OVERVIEW
        unreadable = (labels[..., 4] > 0) & (2 ** (labels[..., 4] - 1.0) < largest)
        labels[unreadable, 1:4] = (KINDS.index("writing"), 0, 0)
        return labels


def _empty(rng: random.Random, layouts: dict[tuple[int, int], int]) -> Scene:
    """A scene without marks; its background has one colour or two unequal parts."""
    rows, columns = rng.choices(list(layouts), weights=list(layouts.values()))[0]
    # Pictures smaller than a crop have no small marks, unless `layouts` asks for that size.
    small_picture = layouts is LAYOUTS and rows * columns == SITE * SITE * 4
    cell = rng.choice([4, 6, 8]) if small_picture else rng.choice([8, 8, 10, 12])
    first, second = rng.sample(GROUND_NAMES, 2)
    split = rng.choice(["none", "none", "columns", "rows"])
    length = {"none": 0, "columns": columns, "rows": rows}[split] // SITE
    shares = [share for share in range(1, length) if 2 * share != length]
    if not shares:
        split = "none"
    share = rng.choice(shares) * SITE if shares else 0
    labels = np.zeros((rows, columns, len(LABEL_FIELDS)), dtype=np.int64)
    labels[..., 0] = GROUND_NAMES.index(first)
    if split == "columns":
        labels[:, share:, 0] = GROUND_NAMES.index(second)
    elif split == "rows":
        labels[share:, :, 0] = GROUND_NAMES.index(second)
    colours = np.array([PALETTE_INDEX[name] for name in GROUND_NAMES], dtype=np.uint8)[labels[..., 0]]
    drawing = colours.repeat(MASTER_CELL, axis=0).repeat(MASTER_CELL, axis=1)
    grounds = [first] if split == "none" else [first, second]
    return Scene(rows, columns, cell, grounds, split, share, drawing, labels)


def draw_scene(rng: random.Random, layouts: dict[tuple[int, int], int] | None = None) -> Scene:
    """One random picture.

    All letters and frames of a picture have the same size (large, medium or small), so that questions about them need
    not mention it. Codes and shapes may be added.

    Args:
        layouts: (rows, columns) in cells -> weight; None takes LAYOUTS.
    """
    scene = _empty(rng, layouts or LAYOUTS)
    sites = [(row, column) for row in range(0, scene.rows, SITE) for column in range(0, scene.columns, SITE)]
    rng.shuffle(sites)
    if len(sites) > 1:
        sites.pop()  # at least one site stays empty
    # Small marks would be unreadable in the small pictures of LAYOUTS.
    coarse_only = layouts is None and len(sites) < 4
    size = rng.choice(["large", "medium"] if coarse_only else ["large", "large", "medium", "small", "small"])
    if len(sites) == 1:
        size = "small"
    wide = len(sites) > 8
    letters = list(LETTERS)
    frames = list(COLOURS)
    rng.shuffle(letters)
    rng.shuffle(frames)

    num_codes = 0 if coarse_only else rng.choice([0, 1, 1, 2] if wide else [0, 0, 1])
    signs = list(SIGNS)
    rng.shuffle(signs)
    for _ in range(num_codes):
        row, column = sites.pop()
        for line in range(SITE):
            sign, colour = signs.pop(), rng.choice(list(COLOURS))
            digits = "".join(rng.choice(list(DIGITS)) for _ in range(SITE - 1))
            scene.codes[sign] = digits
            for offset, kind in enumerate([sign, *digits]):
                scene.add(Mark(kind, colour, "small", row + line, column + offset))

    cells = CELLS_OF_SIZE[size]
    most = {"large": rng.randint(2, 5 if wide else 3), "medium": rng.randint(1, 2), "small": 2 if wide else 1}
    for _ in range(min(most[size], max(len(sites) - 1, 1), len(sites))):
        row, column = sites.pop()
        spots = [(row + y, column + x) for y in range(0, SITE, cells) for x in range(0, SITE, cells)]
        for spot in spots:
            if frames and (rng.random() < 0.4 or not letters):
                frame = frames.pop()
                inside = rng.choice([colour for colour in COLOURS if colour != frame])
                scene.add(Mark("frame", frame, size, *spot, inside=inside))
            elif letters:
                scene.add(Mark(letters.pop(), rng.choice(list(COLOURS)), size, *spot))

    shapes, colours = list(SHAPES), list(COLOURS)
    rng.shuffle(shapes)
    rng.shuffle(colours)
    for _ in range(min(rng.randint(1, 5 if wide else 3), len(sites))):
        scene.add(Mark(shapes.pop(), colours.pop(), "large", *sites.pop()))
    return scene
