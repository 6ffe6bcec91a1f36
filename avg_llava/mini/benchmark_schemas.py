"""Schemas of the twelve benchmarks as published on the hub: repositories, configurations, splits and column types."""

from __future__ import annotations

from dataclasses import dataclass

from datasets import Features, Image, Sequence, Value

_TEXT, _TEXTS = Value("string"), Sequence(Value("string"))
_OBJECTS = [{"objectId": Value("string"), "value": Value("string")}]

_GQA_QUESTIONS = Features(
    {
        **dict.fromkeys(["id", "imageId", "question", "answer", "fullAnswer"], _TEXT),
        "isBalanced": Value("bool"),
        "groups": {"global": _TEXT, "local": _TEXT},
        "entailed": _TEXT,
        "equivalent": _TEXT,
        "types": {"structural": _TEXT, "semantic": _TEXT, "detailed": _TEXT},
        "annotations": {"question": _OBJECTS, "answer": _OBJECTS, "fullAnswer": _OBJECTS},
        "semantic": [{"operation": _TEXT, "argument": _TEXT, "dependencies": Sequence(Value("int32"))}],
        "semanticStr": _TEXT,
    }
)
_SCIENCEQA = Features(
    {
        "image": Image(),
        "question": _TEXT,
        "choices": _TEXTS,
        "answer": Value("int8"),
        **dict.fromkeys(
            ["hint", "task", "grade", "subject", "topic", "category", "skill", "lecture", "solution"], _TEXT
        ),
    }
)
_TEXTVQA = Features(
    {
        "image_id": _TEXT,
        "question_id": Value("int32"),
        "question": _TEXT,
        "question_tokens": _TEXTS,
        "image": Image(),
        "image_width": Value("int32"),
        "image_height": Value("int32"),
        "flickr_original_url": _TEXT,
        "flickr_300k_url": _TEXT,
        "answers": _TEXTS,
        "image_classes": _TEXTS,
        "set_name": _TEXT,
        "ocr_tokens": _TEXTS,
    }
)
_DOCVQA = Features(
    {
        "questionId": _TEXT,
        "question": _TEXT,
        "question_types": _TEXTS,
        "image": Image(),
        "docId": Value("int64"),
        "ucsf_document_id": _TEXT,
        "ucsf_document_page_no": _TEXT,
        "answers": _TEXTS,
        "data_split": _TEXT,
    }
)
_MMBENCH = Features(
    {
        "index": Value("int32"),
        **dict.fromkeys(["question", "hint", "answer", "A", "B", "C", "D", "category"], _TEXT),
        "image": Image(),
        **dict.fromkeys(["source", "L2-category", "comment", "split"], _TEXT),
    }
)
_POPE = Features(
    {
        **dict.fromkeys(["id", "question_id", "question", "answer", "image_source"], _TEXT),
        "image": Image(),
        "category": _TEXT,
    }
)
_MMMU = Features(
    {
        **dict.fromkeys(["id", "question", "options", "explanation"], _TEXT),
        **{f"image_{number}": Image() for number in range(1, 8)},
        **dict.fromkeys(["img_type", "answer", "topic_difficulty", "question_type", "subfield"], _TEXT),
    }
)


@dataclass(frozen=True)
class Table:
    """One split of one configuration.

    Attributes:
        config: Name of the configuration.
        split: Name of the split.
        folder: Folder of the Parquet file.
        columns: Column types.
    """

    config: str
    split: str
    folder: str
    columns: Features


REPOSITORIES = {
    "GQA": [
        Table("testdev_balanced_images", "testdev", "testdev_balanced_images", Features(id=_TEXT, image=Image())),
        Table("testdev_balanced_instructions", "testdev", "testdev_balanced_instructions", _GQA_QUESTIONS),
    ],
    "ScienceQA": [Table("ScienceQA-IMG", "test", "ScienceQA-IMG", _SCIENCEQA)],
    "VizWiz-VQA": [
        Table(
            "default",
            "val",
            "data",
            Features(question_id=_TEXT, image=Image(), question=_TEXT, answers=_TEXTS, category=_TEXT),
        )
    ],
    "textvqa": [Table("default", "validation", "data", _TEXTVQA)],
    "ChartQA": [
        Table("default", "test", "data", Features(type=_TEXT, question=_TEXT, answer=_TEXT, image=Image())),
    ],
    "DocVQA": [Table("DocVQA", "validation", "DocVQA", _DOCVQA)],
    "ai2d": [Table("default", "test", "data", Features(question=_TEXT, options=_TEXTS, answer=_TEXT, image=Image()))],
    "MME": [
        Table(
            "default",
            "test",
            "data",
            Features(question_id=_TEXT, image=Image(), question=_TEXT, answer=_TEXT, category=_TEXT),
        )
    ],
    "MMBench": [Table("cn", "dev", "cn", _MMBENCH), Table("en", "dev", "en", _MMBENCH)],
    "POPE": [
        *(Table("Full", split, "Full", _POPE) for split in ("adversarial", "popular", "random")),
        Table("default", "test", "data", _POPE),
    ],
    "MMMU": [Table("default", "validation", "data", _MMMU)],
}
"""Repository name -> its tables, with the column types of lmms-lab's copies on the hub."""
