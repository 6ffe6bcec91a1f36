"""Routers compared by lookup of answers give the rows of routed generation."""

import json
import shutil

import pytest
import torch

from avg_llava import load, load_model
from avg_llava.cli import main
from avg_llava.inference.predictor import Predictor
from avg_llava.mini.answers import read_questions
from avg_llava.mini.claims import ClaimsError
from avg_llava.mini.comparison import compare_routers
from avg_llava.mini.world import WorldSize, write_world
from avg_llava.model.configuration import RouterConfig
from avg_llava.model.router import TransformerRouter
from tests.tiny import make_checkpoint


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Data, a model, a second router for it, and an image-only router for three of its levels."""
    folder = tmp_path_factory.mktemp("world")
    write_world(folder / "data", size=WorldSize(num_captions=2, num_instruct=2, num_router=2, num_eval=8))
    checkpoint = make_checkpoint(folder, seed=1)
    for seed, name in enumerate(("other", "image_only")):
        shutil.copytree(checkpoint, folder / name)
        model = load_model(checkpoint)
        if name == "image_only":
            model.config.granularities = [1, 4, 16]
            model.config.router_config = RouterConfig(num_text_tokens=0, num_attention_heads=2)
        torch.manual_seed(seed)
        model.model.router = TransformerRouter(model.config)
        model.save_pretrained(folder / name)
    return folder


def test_rows_match_routed_generation(world, capsys):
    folders = {name: str(world / name) for name in ("model", "data", "answers")}
    options = [word for name, folder in folders.items() for word in (f"--{name}", folder)]
    routers = [str(world / name) for name in ("model", "other", "image_only")]
    assert main(["mini", "routers", *options, "--workers", "1", "--json", *routers]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    fixed = [f"fixed-{level}" for level in (1, 2, 4, 8, 16)]
    assert list(rows) == [*fixed, "random", "model", "other", "image_only", "oracle"]
    items = read_questions(world / "data")
    for name in ("model", "other", "image_only"):
        predictions = Predictor(*load(world / name)).predict([item.request for item in items])
        right = [prediction.text == item.question.answer for prediction, item in zip(predictions, items, strict=True)]
        tokens = [prediction.num_visual_tokens for prediction in predictions]
        assert rows[name]["accuracy"] == pytest.approx(sum(right) / len(items))
        assert rows[name]["mean_visual_tokens"] == pytest.approx(sum(tokens) / len(items))
        levels = [str(prediction.granularity[0]) for prediction in predictions]
        assert rows[name]["levels"] == pytest.approx(
            {level: levels.count(level) / len(items) for level in rows[name]["levels"]}
        )
    assert len({rows[name]["mean_visual_tokens"] for name in ("model", "other", "image_only")}) > 1
    assert list(rows["image_only"]["levels"]) == ["1", "4", "16"]


def test_incomparable_routers_are_refused(world, tmp_path):
    another = make_checkpoint(tmp_path, seed=2)
    with pytest.raises(ClaimsError, match="differ in more than the router"):
        compare_routers(world / "model", [world / "other", another], world / "data", tmp_path / "answers")
    with pytest.raises(ClaimsError, match="two routers' folders have the same name"):
        compare_routers(world / "model", [world / "model", another], world / "data", tmp_path / "answers")
    with pytest.raises(ClaimsError, match=r"model chooses among .* not all of which are levels of .*image_only"):
        compare_routers(world / "image_only", [world / "model"], world / "data", tmp_path / "answers")
