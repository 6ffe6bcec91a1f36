import ast
import io
import json
from collections import Counter

import datasets
import pytest
from PIL import Image

from avg_llava.cli import main
from avg_llava.mini.benchmarks import write_benchmarks
from avg_llava.mini.world import WorldError
from tests.evaluation.harness import TASKS, gold_answer, load_task, mini_benchmarks, score, total

TEXT, TEXTS, PICTURE = "string", ["string"], "image"
OBJECTS = [{"objectId": TEXT, "value": TEXT}]

# What the hub's data viewer shows of each data set: (repository, configuration, split) -> column -> type.
PUBLISHED = {
    ("GQA", "testdev_balanced_images", "testdev"): {"id": TEXT, "image": PICTURE},
    ("GQA", "testdev_balanced_instructions", "testdev"): {
        **{"id": TEXT, "imageId": TEXT, "question": TEXT, "answer": TEXT, "fullAnswer": TEXT, "isBalanced": "bool"},
        "groups": {"global": TEXT, "local": TEXT},
        **{"entailed": TEXT, "equivalent": TEXT},
        "types": {"structural": TEXT, "semantic": TEXT, "detailed": TEXT},
        "annotations": {"question": OBJECTS, "answer": OBJECTS, "fullAnswer": OBJECTS},
        "semantic": [{"operation": TEXT, "argument": TEXT, "dependencies": ["int32"]}],
        "semanticStr": TEXT,
    },
    ("ScienceQA", "ScienceQA-IMG", "test"): {
        **{"image": PICTURE, "question": TEXT, "choices": TEXTS, "answer": "int8", "hint": TEXT, "task": TEXT},
        **{"grade": TEXT, "subject": TEXT, "topic": TEXT, "category": TEXT, "skill": TEXT, "lecture": TEXT},
        "solution": TEXT,
    },
    ("VizWiz-VQA", "default", "val"): {
        **{"question_id": TEXT, "image": PICTURE, "question": TEXT, "answers": TEXTS, "category": TEXT},
    },
    ("textvqa", "default", "validation"): {
        **{"image_id": TEXT, "question_id": "int32", "question": TEXT, "question_tokens": TEXTS, "image": PICTURE},
        **{"image_width": "int32", "image_height": "int32", "flickr_original_url": TEXT, "flickr_300k_url": TEXT},
        **{"answers": TEXTS, "image_classes": TEXTS, "set_name": TEXT, "ocr_tokens": TEXTS},
    },
    ("ChartQA", "default", "test"): {"type": TEXT, "question": TEXT, "answer": TEXT, "image": PICTURE},
    ("DocVQA", "DocVQA", "validation"): {
        **{"questionId": TEXT, "question": TEXT, "question_types": TEXTS, "image": PICTURE, "docId": "int64"},
        **{"ucsf_document_id": TEXT, "ucsf_document_page_no": TEXT, "answers": TEXTS, "data_split": TEXT},
    },
    ("ai2d", "default", "test"): {"question": TEXT, "options": TEXTS, "answer": TEXT, "image": PICTURE},
    ("MME", "default", "test"): {
        **{"question_id": TEXT, "image": PICTURE, "question": TEXT, "answer": TEXT, "category": TEXT},
    },
    **{
        ("MMBench", language, "dev"): {
            **{"index": "int32", "question": TEXT, "hint": TEXT, "answer": TEXT, "A": TEXT, "B": TEXT, "C": TEXT},
            **{"D": TEXT, "category": TEXT, "image": PICTURE, "source": TEXT, "L2-category": TEXT, "comment": TEXT},
            "split": TEXT,
        }
        for language in ("en", "cn")
    },
    **{
        ("POPE", config, split): {
            **{"id": TEXT, "question_id": TEXT, "question": TEXT, "answer": TEXT, "image_source": TEXT},
            **{"image": PICTURE, "category": TEXT},
        }
        for config, split in [("Full", "adversarial"), ("Full", "popular"), ("Full", "random"), ("default", "test")]
    },
    ("MMMU", "default", "validation"): {
        **{"id": TEXT, "question": TEXT, "options": TEXT, "explanation": TEXT},
        **{f"image_{number}": PICTURE for number in range(1, 8)},
        **{"img_type": TEXT, "answer": TEXT, "topic_difficulty": TEXT, "question_type": TEXT, "subfield": TEXT},
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with mini_benchmarks(tmp_path_factory.mktemp("benchmarks")) as folder:
        yield folder


@pytest.fixture(scope="module", params=TASKS)
def benchmark(request):
    return request.param


@pytest.fixture(scope="module")
def task(benchmark, folder):
    return load_task(benchmark, folder)


def plain(feature):
    """A feature type as written in PUBLISHED."""
    if isinstance(feature, dict):
        return {name: plain(part) for name, part in feature.items()}
    if isinstance(feature, datasets.List):
        return [plain(feature.feature)]
    return PICTURE if isinstance(feature, datasets.Image) else feature.dtype


def rows(folder, repository, config=None, split="test"):
    return list(datasets.load_dataset(str(folder / repository), config, split=split))


@pytest.mark.parametrize(("repository", "config", "split"), PUBLISHED)
def test_columns_are_those_of_the_public_data_set(folder, repository, config, split):
    data = datasets.load_dataset(str(folder / repository), config, split=split)
    assert {name: plain(feature) for name, feature in data.features.items()} == PUBLISHED[repository, config, split]
    assert list(data.features) == list(PUBLISHED[repository, config, split])
    assert len(data) >= (6 if config == "Full" else 8)


def test_files_are_named_as_on_the_hub(folder):
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*.parquet")}
    folders = {"default": "data"}
    assert found == {
        f"{repository}/{folders.get(config, config)}/{split}-00000-of-00001.parquet"
        for repository, config, split in PUBLISHED
    }


def test_pictures_are_png_bytes(folder):
    data = datasets.load_dataset(str(folder / "GQA"), "testdev_balanced_images", split="testdev")
    cell = data.cast_column("image", datasets.Image(decode=False))[0]["image"]
    assert cell["path"].endswith(".png")
    assert Image.open(io.BytesIO(cell["bytes"])).format == "PNG"


def test_the_same_seed_gives_the_same_bytes(folder, tmp_path):
    again = write_benchmarks(tmp_path / "again")
    assert again == json.loads((folder / "manifest.json").read_text())
    for name in again["sha256"]:
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    other = write_benchmarks(tmp_path / "other", seed=1)
    assert other["num_rows"] == again["num_rows"]
    assert other["sha256"] != again["sha256"]


def test_overwrites_nothing_but_benchmarks(tmp_path, capsys):
    output = tmp_path / "data"
    assert main(["mini", "benchmarks", "--output", str(output), "--json"]) == 0
    manifest = json.loads(capsys.readouterr().out)
    (output / "GQA" / "README.md").write_text("damaged")
    time = (output / "MME" / "README.md").stat().st_mtime_ns
    assert write_benchmarks(output) == manifest
    assert (output / "MME" / "README.md").stat().st_mtime_ns == time
    assert write_benchmarks(output, seed=1)["seed"] == 1
    assert not (tmp_path / "data.tmp").exists()

    (output / "manifest.json").unlink()
    with pytest.raises(WorldError, match="holds something else"):
        write_benchmarks(output)
    assert (output / "GQA").exists()


class TestEveryAnswerTypeIsThere:
    def test_gqa(self, folder):
        found = rows(folder, "GQA", "testdev_balanced_instructions", "testdev")
        assert {"yes", "no"} < {row["answer"] for row in found}
        assert max(Counter(row["imageId"] for row in found).values()) == 2
        images = rows(folder, "GQA", "testdev_balanced_images", "testdev")
        assert {row["imageId"] for row in found} == {row["id"] for row in images}

    def test_scienceqa(self, folder):
        found = rows(folder, "ScienceQA", "ScienceQA-IMG")
        kinds = {(len(row["choices"]), row["hint"] != "") for row in found}
        assert {number for number, _ in kinds} == {2, 3, 4, 5}
        assert {hinted for _, hinted in kinds} == {True, False}
        assert all(len(set(row["choices"])) == len(row["choices"]) for row in found)

    @pytest.mark.parametrize(("repository", "split"), [("VizWiz-VQA", "val"), ("textvqa", "validation")])
    def test_ten_annotators(self, folder, repository, split):
        found = rows(folder, repository, split=split)
        assert {len(row["answers"]) for row in found} == {10}
        agreement = {Counter(row["answers"]).most_common(1)[0][1] for row in found}
        assert agreement >= {10, 4}
        # lmms-eval lowers all but the first letter.
        assert all(row["question"] == row["question"].capitalize() for row in found)

    def test_vizwiz(self, folder):
        found = rows(folder, "VizWiz-VQA", split="val")
        assert {row["category"] for row in found} == {"yes/no", "number", "other", "unanswerable"}
        for row in found:
            most = Counter(row["answers"]).most_common(1)[0][0]
            assert (most == "unanswerable") == (row["category"] == "unanswerable")

    def test_textvqa(self, folder):
        found = rows(folder, "textvqa", split="validation")
        for row in found:
            assert (row["image_width"], row["image_height"]) == row["image"].size
            if "digits" in row["question"] or "code" in row["question"]:
                assert Counter(row["answers"]).most_common(1)[0][0].replace(" ", "") in row["ocr_tokens"]

    @pytest.mark.parametrize("origin", ["human_test", "augmented_test"])
    def test_chartqa(self, folder, origin):
        answers = [row["answer"] for row in rows(folder, "ChartQA") if row["type"] == origin]
        assert any(answer.isdigit() for answer in answers)
        assert any(answer.endswith("%") for answer in answers)
        assert any(answer.isalpha() for answer in answers)

    def test_docvqa(self, folder):
        assert {len(row["answers"]) for row in rows(folder, "DocVQA", split="validation")} == {1, 2}

    def test_ai2d(self, folder):
        found = rows(folder, "ai2d")
        assert Counter(row["answer"] for row in found) == {"0": 2, "1": 2, "2": 2, "3": 2}
        assert all(len(set(row["options"])) == 4 for row in found)

    def test_mme(self, folder):
        pairs = {}
        for row in rows(folder, "MME"):
            pairs.setdefault((row["category"], row["question_id"]), []).append(row)
        assert all(sorted(row["answer"] for row in pair) == ["No", "Yes"] for pair in pairs.values())
        assert all(pair[0]["image"] == pair[1]["image"] for pair in pairs.values())
        categories = {category for category, _ in pairs}
        assert {"existence", "count", "color", "OCR"} < categories
        assert {"commonsense_reasoning", "numerical_calculation", "code_reasoning"} < categories

    @pytest.mark.parametrize("language", ["en", "cn"])
    def test_mmbench(self, folder, language):
        turns = {}
        for row in rows(folder, "MMBench", language, "dev"):
            turns.setdefault(row["index"] % 10**6, []).append(row)
        assert {len(turned) for turned in turns.values()} == {3, 4}
        assert {turned[0]["hint"] == "nan" for turned in turns.values()} == {True, False}
        for base, turned in turns.items():
            options = [[row[letter] for letter in "ABCD" if row[letter] != "nan"] for row in turned]
            assert [row["index"] for row in turned] == [base + turn * 10**6 for turn in range(len(turned))]
            assert [option[-turn:] + option[:-turn] for turn, option in enumerate(options)] == [options[0]] * len(
                turned
            )
            assert len({row[row["answer"]] for row in turned}) == 1
            assert len({row["answer"] for row in turned}) == len(turned)

    def test_some_of_mmbench_is_chinese(self, folder):
        assert {row["question"].isascii() for row in rows(folder, "MMBench", "cn", "dev")} == {True, False}

    def test_pope(self, folder):
        counts = Counter((row["category"], row["answer"]) for row in rows(folder, "POPE"))
        assert counts == {(c, a): 3 for c in ("adversarial", "popular", "random") for a in ("yes", "no")}

    def test_mmmu(self, folder):
        found = rows(folder, "MMMU", split="validation")
        assert len({row["id"] for row in found}) == len(found)
        assert {row["question_type"] for row in found} == {"multiple-choice", "open"}
        assert any(row["answer"].isdigit() for row in found)
        num_images = Counter()
        for row in found:
            options = ast.literal_eval(row["options"])
            assert (row["question_type"] == "open") == (options == [])
            placed = [number for number in range(1, 8) if f"<image {number}>" in row["question"] + row["options"]]
            assert placed == [number for number in range(1, 8) if row[f"image_{number}"] is not None]
            num_images[len(placed)] += 1
            if "<image" in row["options"]:
                assert "<image 1>" in row["question"]
        assert set(num_images) == {1, 2, 3}


def test_lmms_eval_reads_every_row(benchmark, task):
    for doc in task.task_docs:
        assert doc["question"].strip()[:8].lower() in task.doc_to_text(doc).lower()
        images = task.doc_to_visual(doc)
        assert images
        assert {image.mode for image in images} == {"RGB"}


def test_each_gold_answer_has_full_score(benchmark, task):
    scores = [score(benchmark, task, doc, gold_answer(benchmark, doc)) for doc in task.task_docs]
    assert scores == [1.0] * len(task.task_docs)


def test_gold_answers_give_the_highest_score(benchmark, task):
    gold = total(benchmark, task, [gold_answer(benchmark, doc) for doc in task.task_docs])
    highest = {"mme_perception_score": 5 * 200, "mme_cognition_score": 3 * 200, "pope_yes_ratio": 0.5}
    assert gold == {metric: highest.get(metric, 1) for metric in gold}
    assert gold
