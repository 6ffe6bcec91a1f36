"""Every shipped configuration loads, and has the paper's values."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig

from avg_llava import AvgLlavaConfig, AvgLlavaForConditionalGeneration
from avg_llava.checkpoints.formats import KNOWN_TOWERS
from avg_llava.model.templates import TEMPLATES
from avg_llava.planning.estimate import Request, estimate
from avg_llava.planning.meta_model import KNOWN_BACKBONES, KNOWN_STARTS
from avg_llava.training.checkpoint import changed_keys
from avg_llava.training.config import RouterSettings, load_config
from avg_llava.training.processes import read_deepspeed_file
from avg_llava.training.stages import STAGES, count_parameters, set_trainable
from tests.parity.golden import GOLDEN

ROOT = Path(__file__).parents[2]
ABLATIONS = sorted((ROOT / "configs/ablations").glob("*.yaml"))
MIXTURES = sorted((ROOT / "configs/mixtures").glob("*.yaml"))
MINI_ABLATIONS = sorted((ROOT / "configs/mini/ablations").glob("*.yaml"))
FAMILIES = {  # published start
    "llava-v1.6-vicuna-7b": "liuhaotian/llava-v1.6-vicuna-7b",
    "llava-v1.6-mistral-7b": "liuhaotian/llava-v1.6-mistral-7b",
    "llama3-llava-next-8b": "lmms-lab/llama3-llava-next-8b",
}
STARTS = sorted(path for family in FAMILIES for path in (ROOT / "configs" / family).rglob("*.yaml"))
LORA = sorted((ROOT / "configs/vicuna-7b/lora").glob("*.yaml"))
SHIPPED = sorted(set((ROOT / "configs").glob("*/*.yaml")) - set(ABLATIONS) - set(MIXTURES))
# Some of the things that ablations change, each one.
CHANGES = {"gumbel": "objective.method", "image_only": "model.router", "fixed_576": "model.granularities"}
WIDTH = 4096


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_shipped_configuration(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_config(path)
    assert path.stem == f"stage{config.stage}"
    assert config.data.template in {None, *TEMPLATES}
    assert config.output.dir == f"runs/{path.parent.name}/stage{config.stage}"
    if config.model.force_start:
        assert (config.stage, config.model.start in KNOWN_STARTS) == (3, True)
    elif config.stage > 1:
        assert config.model.start == f"runs/{path.parent.name}/stage{config.stage - 1}"
    settings = read_deepspeed_file(config.runtime.deepspeed)
    assert settings["zero_optimization"]["stage"] == (2 if config.stage == 1 else 3)
    assert config.accumulation_steps(2) >= 1


@pytest.mark.parametrize("path", LORA, ids=lambda path: path.stem)
def test_shipped_lora(path, monkeypatch):
    """The stage's configuration except adapters, their learning rate and folders."""
    monkeypatch.chdir(ROOT)
    base, config = load_config(f"configs/vicuna-7b/{path.name}").to_dict(), load_config(path).to_dict()
    assert path.read_text().count(f"stage: {config['stage']}") == 1, "what the scripts look for"
    assert changed_keys(base, config) == [
        f"lora.{key}: None -> {value}" for key, value in sorted(config["lora"].items()) if value is not None
    ] + (["model.start: runs/vicuna-7b/stage2 -> runs/vicuna-7b/lora/stage2"] if config["stage"] == 3 else []) + [
        f"optim.lora_lr: None -> {config['optim']['lora_lr']}"
    ]
    assert config["output"]["dir"] == f"runs/vicuna-7b/lora/{path.stem}"


@pytest.mark.parametrize("path", STARTS, ids=lambda path: str(path.relative_to(ROOT / "configs").with_suffix("")))
def test_shipped_start(path, monkeypatch):
    """The families differ in start and folders only; stage 3 starts from a published model."""
    monkeypatch.chdir(ROOT)
    config = load_config(path)
    family, *kind, name = path.relative_to(ROOT / "configs").with_suffix("").parts
    folder = "/".join(("runs", family, *kind))
    assert path.read_text().count(f"stage: {config.stage}") == 1, "what the scripts look for"
    assert (name, config.output.dir) == (f"stage{config.stage}", f"{folder}/{name}")
    expected = (FAMILIES[family], True) if config.stage == 3 else (f"{folder}/stage3", False)
    assert (config.model.start, config.model.force_start) == expected
    assert config.data.template is None, "the start's"
    vicuna = load_config(ROOT.joinpath("configs", "llava-v1.6-vicuna-7b", *kind, path.name))
    changed = {line.partition(":")[0] for line in changed_keys(vicuna.to_dict(), config.to_dict())}
    assert changed <= {"model.start", "objective.feedback_store"}
    assert (config.lora is not None) == (bool(kind) and config.stage == 3)
    if kind == ["qlora"]:
        stage3, stage4 = (load_config(path.with_name(f"stage{stage}.yaml")) for stage in (3, 4))
        assert stage3.data.sources == stage4.data.sources
        assert stage3.lora.quantization == "4bit"
        assert stage4.objective.feedback_store == f"{folder}/feedback"


@pytest.mark.parametrize("stage", [3, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_qlora_fits_into_24_gb(family, stage, monkeypatch):
    """With a margin of 2 GB for an image of the largest number of tokens; feedback on the largest model just fits."""
    monkeypatch.chdir(ROOT)
    path = Path(f"configs/{family}/qlora/stage{stage}.yaml")
    largest = estimate(path, Request(num_gpus=1, gpu="rtx4090", image_size=(672, 672)))
    assert largest["sharding"] == "none"
    assert largest["memory"]["none"]["total"] < 22e9
    usual = estimate(path, Request(num_gpus=1, gpu="rtx4090"))
    assert usual["steps"] == 625
    assert (stage == 3) == (usual["feedback"] is None)
    assert stage == 3 or (usual["feedback"]["fits"] and usual["hours"] < 1 < usual["feedback"]["hours"])


def _changed(path: Path, base: dict, output: str, store: str) -> list[str]:
    """Keys in which an ablation differs from its base, without output and feedback store, which are checked here."""
    config = load_config(path).to_dict()
    assert path.read_text().count(f"\nstage: {base['stage']}\n") == 1, "what scripts/train_stage<N>.sh looks for"
    assert config["stage"] == base["stage"]
    assert config["output"].pop("dir") == f"{output}/{path.stem}"
    learns_from_feedback = config["stage"] == 4 and config["objective"]["method"] == "rglf"
    assert config["objective"].pop("feedback_store") == (store if learns_from_feedback else None)
    base["output"].pop("dir")
    base["objective"].pop("feedback_store")
    assert config.keys() == base.keys()
    sections = [section for section in base if isinstance(base[section], dict)]
    changed = [
        f"{section}.{key}"
        for section in sections
        for key in base[section]
        if base[section][key] != config[section][key]
    ]
    assert path.stem not in CHANGES or changed == [CHANGES[path.stem]]
    if changed == ["model.router"]:
        num_text_tokens = 0 if path.stem == "image_only" else int(path.stem.removeprefix("k_"))
        usual = base["model"]["router"] or asdict(RouterSettings())
        assert config["model"]["router"] == {**usual, "num_text_tokens": num_text_tokens}
    if changed == ["model.granularities"]:
        levels = path.stem.removeprefix("stage3_").split("_")[1:]
        assert config["model"]["granularities"] == [int(level) for level in levels]
    return changed


@pytest.mark.parametrize("path", ABLATIONS, ids=lambda path: path.stem)
def test_shipped_ablation(path, monkeypatch):
    """One difference from the paper's stage; stage 4 uses the common feedback store; a separate output folder."""
    monkeypatch.chdir(ROOT)
    stage = load_config(path).stage
    base = load_config(f"configs/vicuna-7b/stage{stage}.yaml").to_dict()
    changed = _changed(path, base, "runs/ablations", "runs/vicuna-7b/feedback")
    assert len(changed) == (path.stem != "full"), changed


@pytest.mark.parametrize("path", MINI_ABLATIONS, ids=lambda path: path.stem)
def test_shipped_mini_ablation(path, monkeypatch):
    """One difference from the folder's full method, which is the mini world's stage 4 on part of its data."""
    monkeypatch.chdir(ROOT)
    full = path.with_name("full.yaml")
    base = load_config("configs/mini/stage4.yaml" if path == full else full).to_dict()
    changed = _changed(path, base, "runs/mini/ablations", "runs/mini/ablations/feedback")
    if path == full:
        start = ["model.start", "model.force_start", "model.router"]
        assert set(changed) == {*start, "data.sources", "runtime.deepspeed", "output.save_every"}
        trained = load_config("configs/mini/stage1.yaml").model.router
        assert load_config(full).model.router == trained, "as large as the one that the quickstart trains"
    else:
        assert len(changed) == 1, changed


@pytest.mark.parametrize("path", MIXTURES, ids=lambda path: path.stem)
def test_shipped_mixture(path, monkeypatch):
    """It can be used in any configuration, and its files agree with playground/data/README.md."""
    monkeypatch.chdir(ROOT)
    (source,) = load_config("configs/mini/stage1.yaml", ["--data.sources", str(path)]).data.sources
    guide = Path("playground/data/README.md").read_text()
    assert f"`{Path(source.path).relative_to('playground/data')}`" in guide
    for count in source.expected.values():
        assert f"{count:,}" in guide


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


# Published numbers of parameters; of a tower, with all its parts.
SIZES = {
    "openai/clip-vit-large-patch14-336": 303_507_456,
    "google/siglip2-so400m-patch14-384": 428_225_600,
    "lmsys/vicuna-7b-v1.5": 6_738_415_616,
    "mistralai/Mistral-7B-Instruct-v0.2": 7_241_732_096,
    "meta-llama/Meta-Llama-3-8B-Instruct": 8_030_261_248,
    "Qwen/Qwen3-4B": 4_022_468_096,
}


@pytest.mark.parametrize("name", KNOWN_BACKBONES)
def test_known_backbones_have_the_published_number_of_parameters(name):
    config = AutoConfig.for_model(**KNOWN_BACKBONES[name])
    with torch.device("meta"):
        model = (AutoModelForCausalLM if "vocab_size" in KNOWN_BACKBONES[name] else AutoModel).from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == SIZES[name]


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
