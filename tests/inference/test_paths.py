"""Every path to an answer gives the tokens of the reference: one prompt at a time through transformers' `generate`.

Quantised weights, which cannot, are held to a tolerance in tests/checkpoints/test_quantization.py, and an engine that
decodes exported prompts to the same tokens in tests/inference/test_export.py.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import CompileConfig
from transformers.generation.streamers import BaseStreamer

import avg_llava
from avg_llava import Budget, Decoding, Pipeline, Request
from avg_llava.inference.question_files import answer_file, read_questions
from avg_llava.mini.world import WorldSize, write_world
from tests.tiny import make_checkpoint, noise_images

LONGEST = {"random": 6, "trained": 8}


class Tokens(BaseStreamer):
    """Records the tokens of an answer."""

    def __init__(self):
        self.ids, self.ended = [], False

    def put(self, value):
        self.ids += value.flatten().tolist()

    def end(self):
        self.ended = True


@dataclasses.dataclass
class Case:
    """A pipeline, requests of different sizes and numbers of images, and the folder of their images."""

    pipeline: Pipeline
    requests: list
    decoding: Decoding
    folder: Path
    found: dict = dataclasses.field(default_factory=dict)

    def budgets(self, name):
        levels = self.pipeline.model.config.granularities
        if name == "mixed":  # routed, forced and priced requests in one batch
            return [(Budget(), Budget(levels[index % 5]), Budget(token_cost=0.3))[index % 3] for index in range(7)]
        return [Budget() if name == "routed" else Budget(levels[int(name)])] * 7

    def reference(self, name):
        """Token ids of each answer, and levels of each request's images."""
        if name not in self.found:
            answers = self.found[name] = []
            for request, budget in zip(self.requests, self.budgets(name), strict=True):
                question = "<image>\n" * len(request.images) + request.prompt
                answers.append(self.generate([{"role": "user", "content": question}], request.images, budget))
        return self.found[name]

    def generate(self, messages, images, budget, granularity=None):
        processor = self.pipeline.processor
        text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        inputs = processor(images=[list(images)] if images else None, text=[text])
        budget = {"granularity": granularity or budget.granularity, "token_cost": budget.token_cost}
        (ids,) = self.pipeline.model.generate(
            **inputs, **budget, do_sample=False, max_new_tokens=self.decoding.max_new_tokens, pad_token_id=0
        ).tolist()
        with torch.no_grad():
            levels = self.pipeline.model(**inputs, **budget).granularity
        return ids, () if levels is None else tuple(levels.tolist())


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    return {name: make_case(name, tmp_path_factory.mktemp(name)) for name in LONGEST}


def make_case(name, folder):
    """A random model, whose long answers depend on every token, or the trained mini model."""
    if name == "random":
        checkpoint = make_checkpoint(folder)
        images = noise_images()
        questions = ["what color is the background?", "how many dots?", "which code?", "yes or no?", "why?"]
    else:
        checkpoint = Path(avg_llava.__file__).parent / "mini/checkpoint"
        write_world(folder, size=WorldSize(num_captions=0, num_instruct=0, num_router=0, num_eval=3))
        records = json.loads((folder / "eval.json").read_text())[:5]
        images = [avg_llava.model.images.load_image(folder / record["image"]) for record in records]
        questions = [record["conversations"][0]["value"].removeprefix("<image>\n") for record in records]
    for number, image in enumerate(images):
        image.save(folder / f"{number}.png")
    requests = [Request(question, (image,)) for question, image in zip(questions, images, strict=True)]
    requests += [Request("no image here"), Request("compare them", (images[1], images[0]))]
    return Case(Pipeline.load(checkpoint), requests, Decoding(LONGEST[name]), folder)


def one_by_one(case, budgets):
    for request, budget in zip(case.requests, budgets, strict=True):
        yield case.pipeline.predictor.predict([request], budget, case.decoding)[0], None


def asked(case, budgets):
    for request, budget in zip(case.requests, budgets, strict=True):
        fields = dataclasses.asdict(budget)
        longest = case.decoding.max_new_tokens
        yield case.pipeline.ask(request.images, request.prompt, **fields, max_new_tokens=longest), None


def batched(case, budgets):
    return ((answer, None) for answer in case.pipeline.predictor.predict(case.requests, budgets, case.decoding))


def streamed(case, budgets):
    """A batch with a streamer for each answer."""
    streamers = [Tokens() for _ in case.requests]
    answers = case.pipeline.predictor.predict(case.requests, budgets, case.decoding, streamers)
    assert all(streamer.ended for streamer in streamers)
    return ((answer, streamer.ids) for answer, streamer in zip(answers, streamers, strict=True))


def reordered(case, budgets):
    """Small batches in reverse order: other rows and padding must not matter."""
    rows = list(range(len(case.requests)))[::-1]
    answers = {}
    for piece in (rows[:3], rows[3:]):
        requests, budgets_of_piece = [case.requests[row] for row in piece], [budgets[row] for row in piece]
        answers |= dict(
            zip(piece, case.pipeline.predictor.predict(requests, budgets_of_piece, case.decoding), strict=True)
        )
    return ((answers[row], None) for row in range(len(rows)))


def encoded_once(case, budgets):
    """All levels, then the routed answers, from one encoding."""
    predictor = case.pipeline.predictor
    encoded = predictor.encode(case.requests)
    choice = predictor.choose(encoded, budgets)
    predictor.answer(encoded, predictor.granularities[0], Decoding(1))  # must not change the encoding
    return ((answer, None) for answer in predictor.answer(encoded, choice, case.decoding))


def first_turns(case, budgets):
    for request, budget in zip(case.requests, budgets, strict=True):
        streamer = Tokens()
        conversation = case.pipeline.chat(budget, case.decoding)
        yield conversation.ask(request.prompt, request.images, streamer), streamer.ids


def from_a_file(case, budgets):
    """A file of questions, as with `avg-llava generate --input`."""
    paths, lines = iter(range(5)), []
    for request, budget in zip(case.requests[:6], budgets, strict=False):
        image = [f"{next(paths)}.png"] if request.images else None
        lines.append({"prompt": request.prompt, "image": image, **dataclasses.asdict(budget)})
    lines.append({"prompt": case.requests[6].prompt, "image": ["1.png", "0.png"], **dataclasses.asdict(budgets[6])})
    source, output = case.folder / "questions.jsonl", case.folder / "answers.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    output.unlink(missing_ok=True)
    questions = read_questions(source, case.folder, Budget())
    assert answer_file(case.pipeline.predictor, questions, output, case.decoding, batch_size=4) == 0
    answers = {answer.pop("id"): answer for answer in map(json.loads, output.read_text().splitlines())}
    for question in questions:
        fields = answers[question.id]
        yield avg_llava.Answer(**fields | {"granularity": tuple(fields["granularity"])}), None


def with_static_cache(path):
    def run(case, budgets):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(case.pipeline.model.generation_config, "cache_implementation", "static")
            return list(path(case, budgets))

    run.__name__ = f"{path.__name__}_with_static_cache"
    return run


PATHS = [one_by_one, asked, batched, streamed, reordered, encoded_once, first_turns, from_a_file]
PATHS += [with_static_cache(batched), with_static_cache(first_turns)]
BUDGETS = {"random": ["routed", "mixed", "0", "1", "2", "3", "4"], "trained": ["routed", "mixed"]}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in BUDGETS.items() for name in names])
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.__name__)
def test_path_equals_reference(cases, path, kind, name):
    case = cases[kind]
    found = list(path(case, case.budgets(name)))
    assert len(found) == len(case.requests)
    for (answer, streamed_ids), (ids, levels) in zip(found, case.reference(name), strict=True):
        assert answer.granularity == levels
        assert answer.text == case.pipeline.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert answer.num_new_tokens == len(ids)
        assert streamed_ids in (None, ids)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
def test_compiled_steps_equal_reference(cases, monkeypatch):
    """With a static cache on a GPU, transformers compiles the decoding step."""
    compiling = CompileConfig(mode="default")
    compiling._compile_all_devices = True
    monkeypatch.setattr(cases["random"].pipeline.model.generation_config, "compile_config", compiling)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    test_path_equals_reference(cases, with_static_cache(batched), "random", "mixed")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > graphs, "something was compiled"


@pytest.mark.parametrize("kind", LONGEST)
def test_the_comparison_can_fail(cases, kind):
    case = cases[kind]
    routed, coarsest, finest = (case.reference(name) for name in ("routed", "0", "4"))
    assert len({levels for _, levels in routed}) > 2, "the router chooses different levels"
    assert len({tuple(ids) for ids, _ in routed}) > 3, "answers differ between requests"
    assert [ids for ids, _ in coarsest] != [ids for ids, _ in finest], "answers differ between levels"
    ended = any(len(ids) < case.decoding.max_new_tokens for ids, _ in routed)
    assert ended == (kind == "trained"), "answers that end by themselves, and answers that are cut off"


@pytest.mark.parametrize(
    ("kind", "name"), [("random", "routed"), ("random", "mixed"), ("random", "3"), ("trained", "0")]
)
def test_cached_turns_equal_reference(cases, kind, name):
    """Three turns and two images, compared with the reference at the levels of the turns."""
    case = cases[kind]
    budget = case.budgets(name)[2]
    conversation = case.pipeline.chat(budget, case.decoding)
    first, second = case.requests[0], case.requests[1]
    turns = [(first.prompt, first.images), ("why?", ()), (second.prompt, second.images)]
    shown = []
    for number, (question, images) in enumerate(turns):
        shown += images
        streamer = Tokens()
        answer = conversation.ask(question, images, streamer)
        if number == 0:
            assert (streamer.ids, answer.granularity) == case.generate(conversation.messages[:-1], shown, budget)
        ids, levels = case.generate(conversation.messages[:-1], shown, Budget(), granularity=conversation.levels)
        assert streamer.ids == ids
        assert tuple(conversation.levels) == levels
        assert (conversation.num_cached > 0) == (number > 0)
