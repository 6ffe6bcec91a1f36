"""The mini world is byte-identical for the same seed, has valid records, and its answers are in the pixels."""

import hashlib
import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from avg_llava.data.records import parse_record
from avg_llava.mini.glyphs import COLOURS, GROUNDS, LETTERS, MASTER_CELL, PALETTE, SIGNS
from avg_llava.mini.questions import FAMILIES, all_questions, choose_questions
from avg_llava.mini.scenes import CELLS_OF_SIZE, KINDS, draw_scene
from avg_llava.mini.world import WorldError, WorldSize, encode_png, scene_of, write_world

SIZE = WorldSize(num_captions=10, num_instruct=30, num_router=10, num_eval=40)
# Of the small world above with seed 0. A change of the world changes it.
IMAGES_SHA256 = "ce5d1142fb2e6011c7fd89ba0f9d67e8e9942cdda0583e7f7a26af20daac45ed"
EVAL_SHA256 = "1c2e28575fa4cf8b730f33d77d1044b7481054a443de99a4c13e1b56a41c88fd"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, seed=0, size=SIZE)
    return folder


def read(world: Path, name: str) -> list[dict]:
    return json.loads((world / f"{name}.json").read_text())


def scenes(count: int, seed: int = 3):
    return [draw_scene(random.Random(f"{seed}/{index}")) for index in range(count)]


def test_the_same_seed_gives_the_same_bytes_on_every_machine(world):
    sums = json.loads((world / "manifest.json").read_text())["sha256"]
    assert sums["images"] == IMAGES_SHA256
    assert sums["eval.json"] == EVAL_SHA256
    assert hashlib.sha256((world / "eval.json").read_bytes()).hexdigest() == EVAL_SHA256


def test_another_seed_gives_another_world(world, tmp_path):
    other = write_world(tmp_path, seed=1, size=SIZE)
    assert other["sha256"]["images"] != IMAGES_SHA256


def test_a_finished_world_is_kept_and_a_broken_one_repaired(world, tmp_path):
    size = WorldSize(num_captions=2, num_instruct=3, num_router=1, num_eval=2)
    first = write_world(tmp_path, seed=0, size=size)
    image = next((tmp_path / "images" / "instruct").rglob("*.png"))
    before, stamp = image.read_bytes(), image.stat().st_mtime_ns
    assert write_world(tmp_path, seed=0, size=size) == first
    assert image.stat().st_mtime_ns == stamp, "a finished world was drawn again"
    image.write_bytes(before[:50])
    (tmp_path / "manifest.json").unlink()
    assert write_world(tmp_path, seed=0, size=size) == first
    assert image.read_bytes() == before


def test_a_world_of_another_seed_is_refused(world):
    with pytest.raises(WorldError, match="choose another --output"):
        write_world(world, seed=5, size=SIZE)


def test_records_are_llava_json_with_readable_images(world):
    for name in ("stage1", "instruct", "router", "eval"):
        for record in read(world, name):
            sample = parse_record(record, world, name)
            with Image.open(sample.images[0]) as image:
                image.load()
                assert min(image.size) >= 32
    assert len({record["image"] for record in read(world, "eval")}) == SIZE.num_eval


def test_held_out_pictures_are_not_trained_on(world):
    def images(*names):
        return {(world / record["image"]).read_bytes() for name in names for record in read(world, name)}

    assert not images("eval") & images("stage1", "instruct", "router")


def test_every_family_is_held_out_and_answers_vary(world):
    records = read(world, "eval")
    assert {record["family"] for record in records} == set(FAMILIES)
    questions = [question for scene in scenes(300) for question in choose_questions(scene, 8, random.Random(0))]
    types = Counter(question.question_type for question in questions)
    assert {"letter_small", "letter_medium", "letter_large", "frame_small", "frame_large", "code"} <= set(types)
    for kind in types:
        answers = Counter(question.answer for question in questions if question.question_type == kind)
        assert max(answers.values()) / sum(answers.values()) < 0.75, f"{kind} can be guessed: {answers}"


def test_wordings_do_not_depend_on_the_size_of_marks():
    kinds_of_wording: dict[str, set[str]] = {}
    for scene in scenes(300):
        for question in all_questions(scene):
            if question.question_type.startswith(("letter_", "frame_")):
                kinds_of_wording.setdefault(question.wordings[0], set()).add(question.family)
    assert all(families == {"object", "fine"} for families in kinds_of_wording.values())


def test_questions_of_a_scene_have_one_answer_each():
    for scene in scenes(100):
        answers: dict[str, set[str]] = {}
        for question in all_questions(scene):
            for wording in question.wordings:
                answers.setdefault(wording, set()).add(question.answer)
        assert all(len(found) == 1 for found in answers.values())


def test_answers_are_in_the_pixels():
    """Recovers letters, codes and grounds from the pixels alone."""
    read_back = Counter()
    for scene in scenes(60):
        pixels = scene.drawing
        for question in all_questions(scene):
            if question.question_type.startswith("letter_"):
                cells = CELLS_OF_SIZE[question.question_type.split("_")[1]]
                found = _find(pixels, LETTERS[question.key], cells)
            elif question.question_type == "code":
                found = None
                row, column = _locate(pixels, SIGNS[question.key], 1)
                digits = [
                    next(kind for kind in KINDS if kind.isdigit() and _shows(pixels, kind, row, column + 1 + offset))
                    for offset in range(3)
                ]
                assert " ".join(digits) == question.answer
                read_back["code"] += 1
            elif question.question_type == "ground":
                grounds = Counter(pixels.ravel()[pixels.ravel() >= len(COLOURS)].tolist())
                found = [*COLOURS, *GROUNDS][grounds.most_common(1)[0][0]]
            else:
                continue
            if found is not None:
                assert found == question.answer
                read_back[question.question_type] += 1
    assert min(read_back[kind] for kind in ("letter_small", "letter_medium", "letter_large", "code", "ground")) > 5


def _cells(pixels: np.ndarray, row: int, column: int, cells: int) -> np.ndarray:
    side = cells * MASTER_CELL
    return pixels[row * MASTER_CELL :, column * MASTER_CELL :][:side, :side]


def _locate(pixels: np.ndarray, glyph: np.ndarray, cells: int) -> tuple[int, int]:
    """(row, column) of the cell where the glyph's pixels have one mark colour and all others a ground colour."""
    mask = glyph.repeat(cells, 0).repeat(cells, 1)
    height, width = pixels.shape[0] // MASTER_CELL, pixels.shape[1] // MASTER_CELL
    for row in range(0, height - cells + 1, cells):
        for column in range(0, width - cells + 1, cells):
            area = _cells(pixels, row, column, cells)
            if len(set(area[mask])) == 1 and area[mask][0] < len(COLOURS) and (area[~mask] >= len(COLOURS)).all():
                return row, column
    raise AssertionError("the picture does not contain the glyph")


def _find(pixels: np.ndarray, glyph: np.ndarray, cells: int) -> str:
    row, column = _locate(pixels, glyph, cells)
    mask = glyph.repeat(cells, 0).repeat(cells, 1)
    return list(COLOURS)[_cells(pixels, row, column, cells)[mask][0]]


def _shows(pixels: np.ndarray, digit: str, row: int, column: int) -> bool:
    from avg_llava.mini.glyphs import DIGITS

    return bool(((_cells(pixels, row, column, 1) < len(COLOURS)) == DIGITS[digit]).all())


def test_png_holds_the_pixels_exactly(tmp_path):
    pixels = np.random.default_rng(0).integers(0, len(PALETTE), (301, 257), dtype=np.uint8)
    path = tmp_path / "picture.png"
    path.write_bytes(encode_png(pixels))
    with Image.open(path) as image:
        assert np.array_equal(np.array(image.convert("RGB")), np.array(PALETTE, dtype=np.uint8)[pixels])


def test_sizes_and_aspects_vary():
    sizes = {scene.pixels().shape for scene in scenes(200)}
    assert len(sizes) > 20
    assert any(max(size) < 64 for size in sizes), "no picture is smaller than a crop"
    assert {size[0] > size[1] for size in sizes} == {True, False}


def test_a_scene_depends_on_seed_split_and_number_only():
    first, _ = scene_of(0, "eval", 7)
    again, _ = scene_of(0, "eval", 7)
    other, _ = scene_of(0, "eval", 8)
    assert np.array_equal(first.pixels(), again.pixels())
    assert first.pixels().shape != other.pixels().shape or not np.array_equal(first.pixels(), other.pixels())


def test_world_of_other_code_is_drawn_again(tmp_path, monkeypatch):
    first = write_world(tmp_path, size=WorldSize(4, 4, 4, 4))
    (tmp_path / "eval.json").write_text("[]")
    assert write_world(tmp_path, size=WorldSize(4, 4, 4, 4)) == first
    assert (tmp_path / "eval.json").read_text() == "[]"  # the same code: left alone
    monkeypatch.setattr("avg_llava.mini.world._code_hash", lambda: "another")
    assert write_world(tmp_path, size=WorldSize(4, 4, 4, 4)) == {**first, "code": "another"}
    assert json.loads((tmp_path / "eval.json").read_text()) != []
