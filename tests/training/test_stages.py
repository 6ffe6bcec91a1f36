import pytest

from avg_llava.training.config import OptimSettings
from avg_llava.training.stages import STAGES, count_parameters, log_parts, part_of, set_trainable
from avg_llava.training.trainer import build_optimizer, parameter_groups
from tests.tiny import tiny_model

SETTINGS = {"lr": 1e-3, "global_batch_size": 1, "micro_batch_size": 1}
# DESIGN's table: what each stage trains.
TRAINS = {
    1: {"projector"},
    2: {"vision", "projector", "newline", "llm"},
    3: {"vision", "projector", "newline", "llm"},
    4: {"router"},
}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_only_the_stage_s_parts_require_gradients(model, number):
    counts = set_trainable(model, STAGES[number])
    trainable = {part_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    frozen = {part_of(name) for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert trainable == TRAINS[number]
    assert not trainable & frozen
    assert {part for part, count in counts.items() if count.trainable == count.total} == TRAINS[number]
    assert {part for part, count in counts.items() if count.trainable} == TRAINS[number]
    assert sum(count.total for count in counts.values()) == sum(p.numel() for p in model.parameters())


def test_stages_follow_one_another():
    assert [stage.parent for stage in STAGES.values()] == [None, 1, 2, 3]
    assert [stage.objective for stage in STAGES.values()] == [
        "instruction",
        "instruction",
        "multi_granularity",
        "router",
    ]


def test_counts_are_logged(model, caplog):
    with caplog.at_level("INFO", logger="avg_llava"):
        log_parts(STAGES[4], set_trainable(model, STAGES[4]))
    total = count_parameters(model)["router"].total
    assert any("router" in line and "train" in line and f"{total:,}" in line for line in caplog.messages)
    assert any("vision" in line and "frozen" in line for line in caplog.messages)


def test_a_parameter_of_no_part_is_refused():
    with pytest.raises(ValueError, match=r"model\.adapter\.weight belongs to no part"):
        part_of("model.adapter.weight")


def test_learning_rates_of_the_parts(model):
    set_trainable(model, STAGES[2])
    groups = parameter_groups(model, OptimSettings(**SETTINGS, vision_lr=2e-6, projector_lr=5e-4))
    rates = {group["name"]: group["lr"] for group in groups}
    assert rates == {"vision": 2e-6, "projector": 5e-4, "newline": 1e-3, "llm": 1e-3}
    counts = count_parameters(model)
    for group in groups:
        assert sum(parameter.numel() for parameter in group["params"]) == counts[group["name"]].total
        assert group["weight_decay"] == 0


def test_rates_fall_back_to_the_base(model):
    set_trainable(model, STAGES[2])
    groups = parameter_groups(model, OptimSettings(**SETTINGS))
    assert {group["lr"] for group in groups} == {1e-3}


def test_vectors_do_not_decay(model):
    set_trainable(model, STAGES[2])
    groups = parameter_groups(model, OptimSettings(**SETTINGS, weight_decay=0.1))
    assert {group["name"] for group in groups} == {
        "vision", "vision/decay", "projector", "projector/decay", "newline", "llm", "llm/decay",
    }  # fmt: skip
    for group in groups:
        decays = group["name"].endswith("/decay")
        assert group["weight_decay"] == (0.1 if decays else 0.0)
        assert all((parameter.dim() > 1) == decays for parameter in group["params"])
    held = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(held) == len(set(held)) == sum(parameter.requires_grad for parameter in model.parameters())


def test_optimizer_settings(model):
    set_trainable(model, STAGES[4])
    optimizer = build_optimizer(model, OptimSettings(**SETTINGS, betas=(0.8, 0.95), eps=1e-6))
    assert optimizer.defaults["betas"] == (0.8, 0.95)
    assert optimizer.defaults["eps"] == 1e-6
    assert [group["name"] for group in optimizer.param_groups] == ["router"]


def test_nothing_to_train_is_refused(model):
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter that requires gradients"):
        parameter_groups(model, OptimSettings(**SETTINGS))
