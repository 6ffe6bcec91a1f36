"""Every shipped configuration is read, and says what the paper says."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from avg_llava import AvgLlavaConfig, AvgLlavaForConditionalGeneration
from avg_llava.data.conversation import TEMPLATES
from avg_llava.model.loading import KNOWN_TOWERS
from avg_llava.training.config import RouterSettings, load_config
from avg_llava.training.processes import read_deepspeed_file
from avg_llava.training.stages import STAGES, count_parameters, set_trainable
from tests.parity.golden import GOLDEN

ROOT = Path(__file__).parents[2]
ABLATIONS = sorted((ROOT / "configs/ablations").glob("*.yaml"))
SHIPPED = sorted(set((ROOT / "configs").glob("*/*.yaml")) - set(ABLATIONS))
WIDTH = 4096


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_shipped_configuration(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_config(path)
    assert path.stem == f"stage{config.stage}"
    assert config.data.template in TEMPLATES
    assert config.output.dir == f"runs/{path.parent.name}/stage{config.stage}"
    if config.stage > 1:
        assert config.model.start == f"runs/{path.parent.name}/stage{config.stage - 1}"
    settings = read_deepspeed_file(config.runtime.deepspeed)
    assert settings["zero_optimization"]["stage"] == (2 if config.stage == 1 else 3)
    assert config.accumulation_steps(2) >= 1


@pytest.mark.parametrize("path", ABLATIONS, ids=lambda path: path.stem)
def test_shipped_ablation(path, monkeypatch):
    """Stage 4 of the paper but for one thing, from the one store of feedback, with an output of its own."""
    monkeypatch.chdir(ROOT)
    full, config = load_config("configs/vicuna-7b/stage4.yaml").to_dict(), load_config(path).to_dict()
    assert path.read_text().count("stage: 4") == 1, "what scripts/train_stage4.sh looks for"
    assert config["output"].pop("dir") == f"runs/ablations/{path.stem}"
    assert config["objective"].pop("feedback_store") == "runs/vicuna-7b/feedback"
    full["output"].pop("dir")
    full["objective"].pop("feedback_store")
    changed = [
        f"{section}.{key}"
        for section in ("model", "data", "objective", "optim", "runtime", "logging", "output")
        for key in full[section]
        if full[section][key] != config[section][key]
    ]
    assert len(changed) == (path.stem != "full"), changed
    if changed == ["model.router"]:
        assert config["model"]["router"] == {**asdict(RouterSettings()), "num_text_tokens": int(path.stem[2:])}


def test_there_is_a_configuration_for_every_stage():
    assert {(path.parent.name, path.stem) for path in SHIPPED} >= {
        (folder, f"stage{number}") for folder in ("mini", "vicuna-7b") for number in STAGES
    }


def test_deepspeed_files():
    names = {path.stem for path in (ROOT / "configs/deepspeed").glob("*.json")}
    assert names >= {"zero2", "zero3", "zero3_offload"}
    for name in names:
        assert read_deepspeed_file(str(ROOT / f"configs/deepspeed/{name}.json"))["zero_optimization"]["stage"] in (2, 3)


# Paper, Table 5: (learning rate, the vision tower's, global batch)
PAPER = {1: (1e-3, None, 256), 2: (2e-5, 2e-6, 128), 3: (1e-5, 2e-5, 128), 4: (1e-3, None, 128)}


@pytest.mark.parametrize("stage", STAGES)
def test_the_papers_values(stage, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_config(f"configs/vicuna-7b/stage{stage}.yaml")
    optim = config.optim
    assert (optim.lr, optim.vision_lr, optim.global_batch_size) == PAPER[stage]
    assert (optim.scheduler, optim.warmup_ratio, optim.weight_decay, optim.epochs) == ("cosine", 0.03, 0.0, 1.0)
    assert config.runtime.precision == "bf16"
    assert config.model.max_length == 4096
    assert config.data.group_by_modality_length == (stage > 1)
    for world_size in (1, 8, 16):
        assert config.accumulation_steps(world_size) >= 1
    objective = config.objective
    assert (objective.rank_loss_weight, objective.cross_entropy_weight, objective.tie_tolerance) == (1.0, 0.1, 0.0)


def test_the_7b_model_has_the_real_number_of_parameters(monkeypatch):
    """Built on the meta device from stage 1's configuration and the two backbones' published shapes."""
    monkeypatch.chdir(ROOT)
    settings = load_config("configs/vicuna-7b/stage1.yaml")
    vicuna = LlamaConfig(
        vocab_size=32000,
        hidden_size=WIDTH,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
    )
    config = AvgLlavaConfig(
        vision_config={"model_type": "clip_vision_model", **KNOWN_TOWERS[settings.model.vision]},
        text_config=vicuna,
        image_token_index=vicuna.vocab_size,
        **settings.architecture(),
    )
    with torch.device("meta"):
        model = AvgLlavaForConditionalGeneration(config)
    expected = json.loads((GOLDEN / "I_params.json").read_text())
    counts = {part: count.total for part, count in count_parameters(model).items()}
    assert counts["router"] == expected["router_total"] == 117_507_211
    assert counts["llm"] == expected["llm"]
    assert counts["projector"] == expected["projector"]
    assert counts["newline"] == expected["image_newline"]
    assert counts["vision"] == expected["clip_vision"]
    assert config.max_sequence_length == 4096
    assert config.granularities == [36, 72, 144, 288, 576]
    for stage in STAGES.values():
        trainable = {part for part, count in set_trainable(model, stage).items() if count.trainable}
        assert trainable == set(stage.trains)
