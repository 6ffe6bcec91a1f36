"""Writes the mini world's training and evaluation data: images and LLaVA JSON, byte-identical for the same seed."""

from __future__ import annotations

import hashlib
import json
import random
import struct
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from avg_llava.common.files import hash_bytes, hash_chunks, write_bytes, write_json
from avg_llava.mini.glyphs import PALETTE
from avg_llava.mini.questions import SHORT_ANSWER, Question, caption, choose_questions, multiple_choice
from avg_llava.mini.scenes import Scene, draw_scene

MANIFEST = "manifest.json"
CAPTIONED_LAYOUTS = {(8, 8): 1}
"""Captioned pictures have the size of one crop and are dense with marks, which speeds up training the projector."""
CAPTIONED_CODES = 0.6
"""Share of captioned pictures that are redrawn until they contain a code: reading codes is learnt last."""

NOT_ASKED = ("ground_side", "place")
"""Question types of pretraining that the data leave out. Positions in the picture are learnt much later than everything
else, at all levels alike, so they say nothing about granularity."""

FORMATTED_TURNS = 4
"""Leading turns of a conversation that request an answer format."""
DRAWING_MODULES = ("glyphs", "questions", "scenes", "world")
"""Modules that determine the data; their hash is part of the manifest."""


class WorldError(ValueError):
    """The output folder holds other data."""


@dataclass(frozen=True)
class WorldSize:
    """Numbers of images per split and of questions per image.

    Attributes:
        num_captions: Images of `stage1.json`.
        num_instruct: Images of `instruct.json`.
        num_router: Images of `router.json`.
        num_eval: Images of `eval.json`.
        instruct_questions: Turns of a conversation.
        router_questions: Questions per image of `router.json`.
        caption_statements: Most statements in a caption.
        short_answer_share: Share of conversations whose first turns request a short answer, as instruction data do.
        multiple_choice_share: Share of conversations that start with multiple-choice questions.
    """

    num_captions: int = 8000
    num_instruct: int = 4000
    num_router: int = 4000
    num_eval: int = 500
    instruct_questions: int = 16
    router_questions: int = 2
    caption_statements: int = 24
    short_answer_share: float = 0.3
    multiple_choice_share: float = 0.15


def scene_of(seed: int, split: str, index: int) -> tuple[Scene, random.Random]:
    """The scene of one image, and the random generator from which its questions are sampled next."""
    rng = random.Random(f"{seed}/{split}/{index}")
    if split != "captions":
        return draw_scene(rng), rng
    wanted = rng.random() < CAPTIONED_CODES
    scene = draw_scene(rng, CAPTIONED_LAYOUTS)
    while wanted and not scene.codes:
        scene = draw_scene(rng, CAPTIONED_LAYOUTS)
    return scene, rng


def encode_png(pixels: np.ndarray) -> bytes:
    """Encodes palette indices (H, W) below 16 as a PNG file with 4 bits per pixel.

    Not compressed: compressed bytes differ between zlib builds, and the same seed must give the same files.
    """
    height, width = pixels.shape
    packed = np.zeros((height, (width + 1) // 2), dtype=np.uint8)
    packed[:] = pixels[:, 0::2] << 4
    packed[:, : width // 2] |= pixels[:, 1::2]
    raw = np.concatenate([np.zeros((height, 1), dtype=np.uint8), packed], axis=1).tobytes()
    limit = 0xFFFF
    blocks = [raw[start : start + limit] for start in range(0, len(raw), limit)]
    stored = b"".join(
        struct.pack("<BHH", index == len(blocks) - 1, len(block), len(block) ^ limit) + block
        for index, block in enumerate(blocks)
    )
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, 4, 3, 0, 0, 0),
        b"PLTE": bytes(value for colour in PALETTE for value in colour),
        b"IDAT": b"\x78\x01" + stored + struct.pack(">I", zlib.adler32(raw)),
        b"IEND": b"",
    }
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks.items()
    )


def conversation_record(name: str, image: str, turns: list[tuple[str, str]]) -> dict[str, Any]:
    """A LLaVA record of (question, answer) turns, with the image before the first."""
    conversations = []
    for index, (asked, answered) in enumerate(turns):
        head = "<image>\n" if index == 0 and asked else "<image>" if index == 0 else ""
        conversations += [{"from": "human", "value": head + asked}, {"from": "gpt", "value": answered}]
    return {"id": name, "image": image, "conversations": conversations}


def _worded(questions: list[Question], rng: random.Random) -> list[tuple[str, str]]:
    return [(rng.choice(question.wordings), question.answer) for question in questions]


def _instructed(questions: list[Question], size: WorldSize, rng: random.Random) -> list[tuple[str, str]]:
    """(question, answer) turns of a conversation, some of which request an answer format."""
    turns = _worded(questions, rng)
    form = rng.random()
    if form < size.short_answer_share:
        wanted = rng.choice(SHORT_ANSWER)
        turns[:FORMATTED_TURNS] = [(asked + wanted, answered) for asked, answered in turns[:FORMATTED_TURNS]]
    elif form < size.short_answer_share + size.multiple_choice_share:
        for index, question in enumerate(questions[:FORMATTED_TURNS]):
            if question.question_type != "code":
                turns[index] = multiple_choice(question, turns[index][0], rng)
    return turns


def _single_turns(name: str, image: str, questions: list[Question], rng: random.Random) -> list[dict[str, Any]]:
    """One record per question, with the question's family and type."""
    return [
        {
            **conversation_record(f"{name}-{number}", image, [turn]),
            "family": question.family,
            "question_type": question.question_type,
        }
        for number, (question, turn) in enumerate(zip(questions, _worded(questions, rng), strict=True))
    ]


def _one_per_family(scene: Scene, rng: random.Random) -> list[Question]:
    questions = choose_questions(scene, 1000, rng, NOT_ASKED)
    return [next(q for q in questions if q.family == family) for family in sorted({q.family for q in questions})]


def _draw_split(
    output: Path, seed: int, split: str, num_images: int, digest: Any
) -> Iterator[tuple[str, str, Scene, random.Random]]:
    """Writes the images of a split and yields (name, relative path, scene, generator)."""
    for index in tqdm(range(num_images), desc=f"drawing {split}", unit="image", mininterval=1.0):
        scene, rng = scene_of(seed, split, index)
        name = f"{split}-{index:05d}"
        relative = f"images/{split}/{index // 1000:02d}/{name}.png"
        content = encode_png(scene.pixels())
        digest.update(content)
        path = output / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, content)
        yield name, relative, scene, rng


def _code_hash() -> str:
    """SHA-256 of the DRAWING_MODULES."""
    folder = Path(__file__).parent
    return hash_chunks((folder / f"{name}.py").read_bytes() for name in DRAWING_MODULES)


def write_world(output: str | Path, seed: int = 0, size: WorldSize | None = None) -> dict[str, Any]:
    """Writes stage1.json, instruct.json, router.json, eval.json and images/ below `output`.

    Complete data of the same seed, size and code are left untouched; of other code, they are written again.

    Returns:
        The manifest: seed, size, hash of the code, numbers of records, SHA-256 of all images and of each JSON file.

    Raises:
        WorldError: `output` holds data of another seed or size.
    """
    output, size = Path(output), size or WorldSize()
    wanted = {"seed": seed, "size": asdict(size), "code": _code_hash()}
    manifest_path = output / MANIFEST
    if manifest_path.exists():
        found: dict[str, Any] = json.loads(manifest_path.read_text())
        if {key: found.get(key) for key in wanted} == wanted:
            return found
        if (found.get("seed"), found.get("size")) == (seed, wanted["size"]):
            manifest_path.unlink()  # of other code
        else:
            raise WorldError(
                f"{output} already holds a mini world drawn with {found.get('seed')=} and {found.get('size')=}: "
                "choose another --output, or delete it."
            )
    output.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    records: dict[str, list[dict[str, Any]]] = {"stage1": [], "instruct": [], "router": [], "eval": []}

    for name, image, scene, rng in _draw_split(output, seed, "captions", size.num_captions, digest):
        text = caption(scene, size.caption_statements, rng, NOT_ASKED)
        records["stage1"].append(conversation_record(name, image, [("", text)]))
    for name, image, scene, rng in _draw_split(output, seed, "instruct", size.num_instruct, digest):
        questions = choose_questions(scene, size.instruct_questions, rng, NOT_ASKED)
        records["instruct"].append(conversation_record(name, image, _instructed(questions, size, rng)))
    for name, image, scene, rng in _draw_split(output, seed, "router", size.num_router, digest):
        questions = choose_questions(scene, size.router_questions, rng, NOT_ASKED)
        records["router"] += _single_turns(name, image, questions, rng)
    for name, image, scene, rng in _draw_split(output, seed, "eval", size.num_eval, digest):
        records["eval"] += _single_turns(name, image, _one_per_family(scene, rng), rng)

    sums = {"images": digest.hexdigest()}
    for split, rows in records.items():
        content = (json.dumps(rows, indent=1) + "\n").encode()
        sums[f"{split}.json"] = hash_bytes(content)
        write_bytes(output / f"{split}.json", content)
    manifest = {**wanted, "num_records": {split: len(rows) for split, rows in records.items()}, "sha256": sums}
    write_json(manifest_path, manifest, indent=1)
    return manifest
