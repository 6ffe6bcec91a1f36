"""Complete runs in this process on a tiny world, without DeepSpeed."""

import json
import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import TrainingArguments, set_seed

from avg_llava import AvgLlavaConfig, load
from avg_llava.checkpoints.checksums import compute_checksums
from avg_llava.model.templates import TEMPLATES, ConversationTemplate
from avg_llava.planning.dry_run import dry_run
from avg_llava.training import assembly, run
from avg_llava.training.checkpoint import read_manifest
from avg_llava.training.config import ConfigError, TrainConfig, load_config
from avg_llava.training.monitor import MACHINE_METRICS
from avg_llava.training.stages import STAGES, part_of
from avg_llava.training.trainer import TrainingError
from tests.family_tokenizers import make_tokenizer
from tests.model import without_package
from tests.parity.golden import GOLDEN
from tests.tiny import noise_images, stage_values, write_backbones, write_data
from tests.training.interruption import interrupt_at

pytestmark = pytest.mark.xdist_group("training-run")  # the trained stages are shared


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_backbones(folder)
    write_data(folder)
    return folder


@pytest.fixture(scope="module")
def stages(world, tmp_path_factory) -> Path:
    """All four stages, trained one after another."""
    root = tmp_path_factory.mktemp("runs")
    for stage in STAGES:
        run.run_stage(_config(stage, root, world))
    return root


def _config(stage: int, root: Path, world: Path, overrides: tuple[str, ...] = ()) -> TrainConfig:
    path = root / f"stage{stage}.yaml"
    path.write_text(yaml.safe_dump(stage_values(stage, root, world)))
    return load_config(path, overrides)


def _log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log_history.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_says_what_it_is(stages, stage):
    folder = stages / f"stage{stage}"
    manifest = read_manifest(folder)
    assert (manifest.stage, manifest.finished, manifest.step, manifest.world_size) == (stage, True, 4, 1)
    if stage > 1:
        parent = read_manifest(stages / f"stage{stage - 1}")
        assert manifest.parent == {
            "path": str(stages / f"stage{stage - 1}"),
            "stage": stage - 1,
            "created": parent.created,
        }
    config = load_config(folder / "train_config.yaml")
    assert manifest.weights == compute_checksums(folder)
    assert config.to_dict() == manifest.config
    assert not list(folder.glob("checkpoint-*"))


@pytest.mark.parametrize("stage", STAGES)
def test_only_the_stage_s_parts_change(stages, world, stage):
    if stage == 1:
        config = _config(1, stages, world)
        set_seed(config.seed)
        before, _ = assembly.build_model(config)
    else:
        before, _ = load(stages / f"stage{stage - 1}")
    after, _ = load(stages / f"stage{stage}")
    weights = dict(after.named_parameters())
    changed = {name for name, weight in before.named_parameters() if not torch.equal(weight, weights[name])}
    assert {part_of(name) for name in changed} == set(STAGES[stage].trains)
    if stage in (2, 3):  # the released code froze the tower by accident
        assert any("vision_tower.embeddings" in name for name in changed)
        assert any("vision_tower.encoder.layers.0" in name for name in changed)


@pytest.mark.parametrize("levels", [[64], [4, 16, 64]])
def test_stage_3_learns_some_of_the_levels(stages, world, tmp_path, levels):
    """The result has only these levels and a router for them; its losses are means over them."""
    overrides = ("--model.granularities", str(levels), "--output.dir", str(tmp_path / "stage3"))
    folder = run.run_stage(_config(3, stages, world, overrides))
    model, _ = load(folder)
    assert model.config.granularities == levels
    assert model.model.router.voter.shape == (sum(levels) + 6, 1)
    (first, *_) = (line for line in _log(folder) if "loss" in line)
    assert sum(first[f"loss_{level}"] for level in levels) / len(levels) == pytest.approx(first["loss"], rel=1e-4)
    assert [key for key in first if key.startswith("loss_")] == [f"loss_{level}" for level in levels]
    (whole, *_) = (line for line in _log(stages / "stage3") if "loss" in line)
    for level in levels:
        assert first[f"loss_{level}"] == pytest.approx(whole[f"loss_{level}"], rel=1e-4)


def test_a_router_that_sees_the_image_only(stages, world, tmp_path):
    router = "{num_text_tokens: 0, num_attention_heads: 2}"
    folder = run.run_stage(_config(4, stages, world, ("--model.router", router, "--output.dir", str(tmp_path))))
    model, _ = load(folder)
    assert model.config.router_config.num_text_tokens == 0
    assert model.model.router.voter.shape == (4 + 8 + 16 + 32 + 64, 1)


def test_router_from_the_instruction_loss(stages, world, tmp_path):
    """With and without recomputed activations, sampled levels and losses are equal."""
    logs = []
    for recompute in ("false", "true"):
        overrides = ("--objective.method", "gumbel", "--runtime.gradient_checkpointing", recompute)
        folder = run.run_stage(_config(4, stages, world, (*overrides, "--output.dir", str(tmp_path / recompute))))
        logs.append([line["loss"] for line in _log(folder) if "loss" in line])
        before, after = load(stages / "stage3")[0].state_dict(), load(folder)[0].state_dict()
        changed = {part_of(name) for name, tensor in before.items() if not torch.equal(tensor, after[name])}
        assert changed == {"router"}
    assert len(logs[0]) == 4
    assert logs[1] == pytest.approx(logs[0], abs=1e-5)
    (line, *_) = (line for line in _log(folder) if "loss" in line)
    assert sum(line[f"share_{level}"] for level in (4, 8, 16, 32, 64)) == pytest.approx(1)
    assert line["router_entropy"] > 0


def test_log(stages):
    for stage, extra in {3: "loss_64", 4: "ranking_loss"}.items():
        lines = _log(stages / f"stage{stage}")
        assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
        assert all({"learning_rate", "grad_norm", extra} <= line.keys() for line in lines if "loss" in line)
    for line in _log(stages / "stage3")[:-1]:
        levels = [value for name, value in line.items() if name.startswith("loss_")]
        assert len(levels) == 5


def test_result_is_loaded_with_its_processor(stages):
    model, processor = load(stages / "stage4")
    assert processor.image_token_id == model.config.image_token_id
    assert model.config.router_config.num_text_tokens == 6


def test_results_bring_a_card(stages):
    """Each names its own stage and those before it, with the samples of their data."""
    for stage in STAGES:
        card = (stages / f"stage{stage}" / "README.md").read_text()
        assert re.findall(r"^\| (\d) \| (?:captions|instruct)\.json \| (\d+) \|", card, flags=re.MULTILINE) == [
            ("1", "16"),
            *((str(number), "20") for number in range(2, stage + 1)),
        ]
        assert ("not trained" in card) == (stage < 4)
        assert str(stages) not in card


def test_results_are_models_without_this_package(stages, tmp_path):
    """Every stage's, in a fresh process: logits and greedy ids at every level and routed."""
    without_package.check(tmp_path, noise_images()[1], *(stages / f"stage{stage}" for stage in STAGES))


def test_a_result_is_prompted_with_the_template_of_its_training(stages, world, tmp_path, monkeypatch):
    _, processor = load(stages / "stage1")  # trained on captions, whose template asks no questions
    assert processor.chat_template == TEMPLATES["vicuna_v1"].jinja
    own = (
        "{%- for message in messages -%}{%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}"
        "{%- endfor -%}"
    )
    monkeypatch.setitem(TEMPLATES, "own", ConversationTemplate(own))
    overrides = ("--data.template", "own", "--optim.max_steps", "1", "--output.dir", str(tmp_path / "own"))
    _, processor = load(run.run_stage(_config(2, stages, world, overrides)))
    assert processor.apply_chat_template([{"role": "user", "content": "What?"}]) == "What?</s>"


def test_the_template_is_the_starts_and_is_recorded(stages, world, tmp_path, caplog):
    """Captions set no template; without data.template, later stages go on with the start's."""
    assert AvgLlavaConfig.from_pretrained(stages / "stage1").template is None
    assert AvgLlavaConfig.from_pretrained(stages / "stage2").template == "vicuna_v1"
    for stage in (2, 3):
        overrides = ("--data.template", "null", "--optim.max_steps", "1", "--output.dir", str(tmp_path / str(stage)))
        config = _config(stage, stages, world, overrides)
        result = run.run_stage(config)
        assert read_manifest(result).config["data"]["template"] == "vicuna_v1"
        assert AvgLlavaConfig.from_pretrained(result).template == "vicuna_v1"
        with caplog.at_level(logging.INFO, logger="avg_llava"):
            run.run_stage(config)
        assert f"stage {stage} is already complete" in caplog.text


def test_a_language_model_keeps_its_chat_template(tmp_path):
    """From a backbone with a chat template: stage 2 learns it, and its result answers with it and stops at its end."""
    tokenizer = make_tokenizer("llama_3")
    tokenizer.chat_template = (GOLDEN.parent / "chat_templates" / "llama_3.jinja").read_text("utf-8")
    write_backbones(tmp_path, tokenizer=tokenizer)
    write_data(tmp_path, num_samples=4, num_text_only=0, two_images=False)
    for stage in (1, 2):
        overrides = ("--data.template", "null", "--optim.max_steps", "1")
        result = run.run_stage(_config(stage, tmp_path, tmp_path, overrides))
    assert read_manifest(result).config["data"]["template"] == "tokenizer"
    assert AvgLlavaConfig.from_pretrained(result).template == "tokenizer"
    end = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    eos = json.loads((result / "generation_config.json").read_text())["eos_token_id"]
    assert end in (eos if isinstance(eos, list) else [eos])
    _, processor = load(result)
    messages = [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "Red."}]
    wanted = tokenizer.apply_chat_template(messages, tokenize=False)
    assert processor.apply_chat_template(messages) == wanted
    parts = [{"type": "image"}, {"type": "text", "text": "What?"}]
    assert processor.apply_chat_template([{"role": "user", "content": parts}, messages[1]]) == wanted


def test_another_template_than_the_starts_is_refused(stages, world, tmp_path, monkeypatch):
    other = ConversationTemplate(TEMPLATES["vicuna_v1"].jinja.replace("USER", "HUMAN"))
    monkeypatch.setitem(TEMPLATES, "human", other)
    overrides = ("--data.template", "human", "--optim.max_steps", "1", "--output.dir", str(tmp_path / "other"))
    config = _config(3, stages, world, (*overrides, "--force-start"))
    message = "data.template is human, but model.start was trained with vicuna_v1; leave data.template out"
    with pytest.raises(ConfigError, match=message):
        run.run_stage(config)
    report = dry_run(stages / "stage3.yaml", overrides)
    assert any(message in problem for problem in report.problems)
    model, processor = load(run.run_stage(_config(3, stages, world, (*overrides, "--data.force_template", "true"))))
    assert (model.config.template, processor.chat_template) == ("human", other.jinja)


def test_a_finished_stage_is_left_alone(stages, world, caplog):
    before = (stages / "stage2" / "model.safetensors").stat().st_mtime_ns
    with caplog.at_level(logging.INFO, logger="avg_llava"):
        run.run_stage(_config(2, stages, world))
    assert "already complete" in caplog.text
    assert (stages / "stage2" / "model.safetensors").stat().st_mtime_ns == before


def test_settings_that_an_earlier_version_did_not_have_count_as_their_defaults(stages, world, tmp_path, caplog):
    shutil.copytree(stages / "stage1", tmp_path / "stage1")
    manifest = json.loads((tmp_path / "stage1/stage.json").read_text())
    del manifest["config"]["model"]["pooling_ladder"], manifest["config"]["model"]["router"]["kind"]
    (tmp_path / "stage1/stage.json").write_text(json.dumps(manifest))
    with caplog.at_level(logging.INFO, logger="avg_llava"):
        run.run_stage(_config(1, stages, world, ("--output.dir", str(tmp_path / "stage1"))))
    assert "already complete" in caplog.text


def test_a_finished_stage_of_other_settings_is_not_taken_for_this_one(stages, world):
    with pytest.raises(ConfigError, match=r"optim\.lr: 0\.001 -> 0\.005.*--output\.overwrite"):
        run.run_stage(_config(2, stages, world, ("--optim.lr", "5e-3")))


def test_changed_data_are_noticed(stages, world):
    path = world / "instruct.json"
    original = path.read_text()
    path.write_text(original.replace("Is it big?", "Is it large?"))
    try:
        with pytest.raises(ConfigError, match=r"data\.sources have changed"):
            run.run_stage(_config(3, stages, world))
    finally:
        path.write_text(original)


def test_a_stage_refuses_what_is_not_its_parent(stages, world, tmp_path):
    overrides = ("--model.start", str(stages / "stage1"), "--output.dir", str(tmp_path / "run"))
    with pytest.raises(ConfigError, match="holds stage 1"):
        run.run_stage(_config(3, stages, world, overrides))
    folder = run.run_stage(_config(3, stages, world, (*overrides, "--force-start", "--optim.max_steps", "1")))
    assert read_manifest(folder).parent["stage"] == 1


def test_checkpoints_are_kept_as_told_and_resumed(stages, world, tmp_path, monkeypatch):
    """Interrupted after step 3, the run continues from the checkpoint of step 2 to the same losses and weights."""
    overrides = ("--output.dir", str(tmp_path / "run"), "--output.save_every", "1", "--output.keep", "2")
    config = _config(3, stages, world, overrides)

    interrupt_at(3, config, monkeypatch)
    folder = tmp_path / "run"
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    assert read_manifest(folder) is None
    (folder / "checkpoint-3" / "stage.json").unlink()  # as if killed while it was written

    run.run_stage(config)
    expected, found = _log(stages / "stage3"), _log(folder)
    for reference, line in zip(expected[:4], found[:4], strict=True):
        assert line.keys() == reference.keys()
        for name in line.keys() - set(MACHINE_METRICS):
            assert line[name] == pytest.approx(reference[name], rel=1e-5), name
    weights = load_file(folder / "model.safetensors")
    for name, tensor in load_file(stages / "stage3" / "model.safetensors").items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-5, atol=1e-6)
    assert not list(folder.glob("checkpoint-*"))


def test_a_run_with_a_token_budget_resumes_at_any_step(stages, world, tmp_path, monkeypatch):
    """Killed in each epoch: the same samples, losses and weights as an uninterrupted run."""
    budget = ("--optim.max_tokens_per_batch", "1200", "--optim.max_steps", "12", "--output.save_every", "1")
    seen: list[list[int]] = []

    def watch(trainer, model, inputs, *arguments, **settings):
        seen.append(inputs["index"].tolist())
        return compute_loss(trainer, model, inputs, *arguments, **settings)

    compute_loss = run.StageTrainer.compute_loss
    monkeypatch.setattr(run.StageTrainer, "compute_loss", watch)
    run.run_stage(_config(2, stages, world, (*budget, "--output.dir", str(tmp_path / "whole"))))
    expected, seen[:] = list(seen), []
    per_epoch = next(count for count in range(1, len(expected)) if sum(map(len, expected[:count])) == 20)
    assert {index for batch in expected[:per_epoch] for index in batch} == set(range(20))
    assert len(expected) > per_epoch  # into another epoch, with the same micro-batches in another order
    assert len({len(batch) for batch in expected}) > 1
    assert expected[per_epoch:] != expected[: len(expected) - per_epoch]

    config = _config(2, stages, world, (*budget, "--output.dir", str(tmp_path / "killed")))
    for step in (1, 5, 10):
        interrupt_at(step, config, monkeypatch)
    run.run_stage(config)
    assert seen == expected
    losses = [[line["loss"] for line in _log(tmp_path / name) if "loss" in line] for name in ("whole", "killed")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    weights = load_file(tmp_path / "killed" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "whole" / "model.safetensors").items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-5, atol=1e-6)


def test_overwrite_starts_anew(stages, world, tmp_path):
    arguments = ("--output.dir", str(tmp_path / "run"), "--optim.max_steps", "1")
    run.run_stage(_config(4, stages, world, arguments))
    (tmp_path / "run" / "adapter").mkdir()  # as of a run with LoRA
    (tmp_path / "run" / "model.safetensors.index.json").write_text("{}")
    config = _config(4, stages, world, (*arguments, "--optim.lr", "2e-3", "--output.overwrite"))
    run.run_stage(config)
    load(tmp_path / "run")
    assert not (tmp_path / "run" / "adapter").exists()
    assert read_manifest(tmp_path / "run").config["optim"]["lr"] == 2e-3


def test_a_loss_that_is_not_finite_names_its_samples(stages, world, tmp_path, monkeypatch):
    config = _config(2, stages, world, ("--output.dir", str(tmp_path / "run")))
    forward = run.objective_class("instruction").forward

    def broken(*arguments, **inputs):
        return {**forward(*arguments, **inputs), "loss": torch.tensor(float("nan"), requires_grad=True)}

    monkeypatch.setattr(run.objective_class("instruction"), "forward", broken)
    with pytest.raises(TrainingError, match=r"loss is nan at step 1 on sample '.*instruct\.json"):
        run.run_stage(config)


def test_only_the_first_rank_writes(stages, world, tmp_path, monkeypatch):
    """Other ranks do not hold the gathered weights and would overwrite the model."""
    config = _config(2, stages, world, ("--output.dir", str(tmp_path / "run"), "--optim.max_steps", "1"))
    monkeypatch.setattr(TrainingArguments, "should_save", property(lambda self: False))
    run.run_stage(config)
    assert not list((tmp_path / "run").glob("*.safetensors"))
    assert read_manifest(tmp_path / "run") is None


def test_tensorboard(stages, world, tmp_path):
    arguments = ("--output.dir", str(tmp_path / "run"), "--optim.max_steps", "1", "--logging.trackers", "[tensorboard]")
    run.run_stage(_config(3, stages, world, arguments))
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))


def test_command_line(stages, world, capsys):
    assert run.main(["--help"]) == 0
    assert "example:" in capsys.readouterr().out
    assert run.main([]) == 2
    assert "usage:" in capsys.readouterr().err
    _config(2, stages, world)
    path = str(stages / "stage2.yaml")
    assert run.main([path, "--optim.lrr", "1"]) == 2
    assert capsys.readouterr().err.startswith("error: unknown key optim.lrr - did you mean 'lr'?")
    assert run.main([path]) == 0
    missing = ["--data.sources", "[{path: none.json}]", "--output.dir", str(stages / "other")]
    assert run.main([path, *missing]) == 1
    assert "cannot read none.json" in capsys.readouterr().err
