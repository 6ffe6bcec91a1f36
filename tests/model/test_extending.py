"""The router and the ladder of docs/extending.md, from configuration to training, generation, saving and loading."""

import runpy
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from avg_llava import AvgLlavaConfig, load_model
from avg_llava.common.settings import build
from avg_llava.model.anyres import num_crops
from avg_llava.model.router import ROUTERS, level_values
from avg_llava.model.scaler import LADDERS
from avg_llava.planning.memory import activation_memory
from avg_llava.training import run
from avg_llava.training.assembly import build_model
from avg_llava.training.config import ObjectiveSettings, TrainConfig
from avg_llava.training.flops import SampleShape, router_flops, step_flops
from avg_llava.training.objectives import objective_class
from avg_llava.training.stages import STAGES, set_trainable
from tests.tiny import images, pad, prompt, stage_values, tiny_config, tiny_model, write_backbones, write_data

EXAMPLES = Path(__file__).resolve().parents[2] / "docs" / "examples" / "extending"
SIZES = [(32, 32), (60, 30)]


@pytest.fixture(autouse=True)
def extensions():
    """Registers the examples for the duration of a test."""
    assert "mean" not in ROUTERS
    assert "squares" not in LADDERS
    for example in ("router.py", "ladder.py"):
        runpy.run_path(str(EXAMPLES / example))
    yield
    del ROUTERS["mean"], LADDERS["squares"]


@pytest.fixture
def model():
    return tiny_model(pooling_ladder="squares", router_config={"kind": "mean"})


@pytest.fixture
def batch(model):
    prompts = [prompt(20, 3, seed=1), prompt(26, 5, seed=2)]
    return {
        "input_ids": pad(prompts),
        "attention_mask": pad([torch.ones_like(ids) for ids in prompts]),
        **images(model.config, *SIZES),
    }


def test_levels_are_those_of_the_ladder():
    assert tiny_config(pooling_ladder="squares").granularities == [1, 4, 16, 64]
    with pytest.raises(ValueError, match="granularity 8 is no level of a 8x8 grid"):
        tiny_config(pooling_ladder="squares", granularities=[8, 64])


def test_the_router_checks_the_configuration():
    """The paper's router needs heads that divide the width; this one has no heads."""
    assert tiny_config(router_config={"kind": "mean", "num_attention_heads": 7}).router_config.kind == "mean"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"router_config": {"kind": "maen"}}, "router_config.kind must be one of transformer, mean; .* mean 'mean'"),
        ({"pooling_ladder": "square"}, "pooling_ladder must be one of width_first, squares; .* mean 'squares'"),
    ],
)
def test_unknown_names_are_refused_with_the_known_ones(fields, message):
    with pytest.raises(Exception, match=message):
        tiny_config(**fields)


def test_older_configurations_are_the_paper_s():
    fields = tiny_config().to_dict()
    del fields["pooling_ladder"], fields["router_config"]["kind"]
    loaded = AvgLlavaConfig(**fields)
    assert (loaded.pooling_ladder, loaded.router_config.kind) == ("width_first", "transformer")


def test_routing_answers_saving_and_loading(model, batch, tmp_path):
    with torch.no_grad():
        output = model(**batch)
    assert output.router_logits.shape == (2, 4)
    values = level_values(output.router_logits, model.config.granularities)
    assert output.granularity.tolist() == [[1, 4, 16, 64][level] for level in values.argmax(-1).tolist()]
    answers = model.generate(**batch, max_new_tokens=3, do_sample=False)

    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert (loaded.config.pooling_ladder, loaded.config.router_config.kind) == ("squares", "mean")
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, output.logits)
    assert torch.equal(loaded.generate(**batch, max_new_tokens=3, do_sample=False), answers)


def test_a_router_that_no_checkpoint_holds_is_initialised(model, tmp_path):
    weights = {name: tensor for name, tensor in model.state_dict().items() if ".router." not in name}
    loaded, info = type(model).from_pretrained(None, config=model.config, state_dict=weights, output_loading_info=True)
    assert all(key.startswith("model.router.") for key in info["missing_keys"])
    first = loaded.model.router.mlp[0].weight
    assert 0.5 < first.abs().max() * first.shape[1] ** 0.5 <= 1, "PyTorch's initialisation of a linear layer"
    for name, tensor in weights.items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


@pytest.mark.parametrize("name", ["router", "gumbel"])
def test_stage_4_trains_it(model, batch, name):
    """Every weight of the router gets a gradient."""
    set_trainable(model, STAGES[4])
    labels = batch["input_ids"].masked_fill(torch.arange(26) < 15, -100)
    objective_class(name)(model, ObjectiveSettings()).train()(**batch, labels=labels)["loss"].backward()
    for parameter, weights in model.model.router.named_parameters():
        assert weights.grad is not None, parameter
        assert weights.grad.abs().sum() > 0, parameter


def test_spread_tokens_add_to_pooled_ones(model):
    ladder, crops = model.config.ladder, torch.randn(2, 64, 3)
    for level in ladder.granularities:
        tokens = torch.randn(2, level, 3)
        torch.testing.assert_close(
            ladder.pool(crops + ladder.spread(tokens), level), ladder.pool(crops, level) + tokens
        )


def test_estimates_are_those_of_the_router(model):
    crops = torch.randn(5, 64, 64)
    inputs = (crops, [3, 2], torch.randn(2, 9, 64), torch.ones(2, 9, dtype=torch.bool))
    with FlopCounterMode(display=False) as counter:
        model.model.router(*inputs)
    assert router_flops(5, model.config) == counter.get_total_flops()

    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor
    )
    with hooks:
        model.model.router(*inputs)
    weights = {weight.data_ptr() for weight in model.model.router.parameters()}
    saved = {tensor.data_ptr(): tensor.nbytes for tensor in kept if tensor.data_ptr() not in weights}
    assert sum(saved.values()) == pytest.approx(ROUTERS["mean"].activation_bytes(5, model.config), rel=0.05)

    stage, samples = STAGES[4], [SampleShape((32, 32), 20, 5)]  # an image of one tile: two crops
    step = step_flops(stage.trains, stage.passes, samples, model.config)
    assert step.router == 3 * router_flops(num_crops((32, 32), model.config), model.config)
    memory = activation_memory(stage.trains, stage.passes, samples, model.config, element_size=4, recompute=False)
    assert memory.router == ROUTERS["mean"].activation_bytes(num_crops((32, 32), model.config), model.config)


def test_stage_1_builds_and_trains_it(tmp_path):
    write_backbones(tmp_path)
    write_data(tmp_path)
    values = stage_values(1, tmp_path, tmp_path)
    values["model"] |= {"pooling_ladder": "squares", "router": {"kind": "mean"}}
    model = load_model(run.run_stage(build(TrainConfig, values)))
    assert (model.config.pooling_ladder, model.config.router_config.kind) == ("squares", "mean")
    assert type(model.model.router) is ROUTERS["mean"]
    values["model"]["router"]["kind"] = "maen"
    with pytest.raises(Exception, match="did you mean 'mean'"):
        build_model(build(TrainConfig, values))
