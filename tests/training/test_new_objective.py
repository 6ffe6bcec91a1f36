"""The worked example of a new objective (docs/examples/extending/objective.py), executed."""

import json
import runpy
from pathlib import Path

import pytest
import yaml

from avg_llava.model.configuration import AvgLlavaConfig
from avg_llava.planning.estimate import Request, estimate
from avg_llava.training import run
from avg_llava.training.config import ConfigError, load_config
from avg_llava.training.stages import OBJECTIVES
from tests.tiny import make_checkpoint, stage_values, write_backbones, write_data

EXAMPLE = Path(__file__).parents[2] / "docs/examples/extending/objective.py"


@pytest.fixture
def registered():
    """Runs the example, which adds its entry to the registry."""
    runpy.run_path(str(EXAMPLE))
    yield
    del OBJECTIVES["two_levels"]


@pytest.fixture
def config_file(tmp_path) -> Path:
    write_backbones(tmp_path)
    write_data(tmp_path)
    make_checkpoint(tmp_path / "tiny")
    values = stage_values(3, tmp_path, tmp_path)
    values["model"] = {"start": str(tmp_path / "tiny/model"), "force_start": True}
    values["optim"]["max_steps"] = 2
    values["objective"] = {"method": "two_levels"}
    path = tmp_path / "stage3.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_two_steps_and_an_estimate(registered, config_file):
    output = run.run_stage(load_config(config_file))
    lines = [json.loads(line) for line in (output / "log_history.jsonl").read_text().splitlines()]
    first, second = (line for line in lines if "loss" in line)
    coarsest, *between, finest = AvgLlavaConfig.from_pretrained(output).granularities
    assert first["loss"] == pytest.approx((first[f"loss_{coarsest}"] + first[f"loss_{finest}"]) / 2, rel=1e-5)
    assert not any(f"loss_{level}" in first for level in between)
    assert first["tokens"] > 0
    assert first["tflops"] > 0
    assert second["loss"] != first["loss"]

    two = estimate(config_file, Request(num_gpus=1))
    values = yaml.safe_load(config_file.read_text())
    config_file.write_text(yaml.safe_dump(values | {"objective": {"method": "rglf"}}))
    five = estimate(config_file, Request(num_gpus=1))
    for key in ("tokens", "flops"):
        assert 0 < two["step"][key] < five["step"][key]
    assert two["memory"]["none"]["activations"] < five["memory"]["none"]["activations"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--objective.method", "two_level"], "must be one of rglf, gumbel, two_levels.*did you mean 'two_levels'"),
        (["--objective.feedback_store", "store"], "two_levels does not learn from feedback"),
    ],
)
def test_mistakes_are_named(registered, config_file, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(config_file, overrides)


def test_it_is_unknown_without_its_entry(config_file):
    with pytest.raises(ConfigError, match="must be one of rglf, gumbel; got 'two_levels'"):
        load_config(config_file)
