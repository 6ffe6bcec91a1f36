"""The shipped configurations on stand-ins of their starts: tiny weights of the families in the published layouts."""

import contextlib
import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaConfig, MistralConfig, Qwen3Config, SiglipVisionConfig

from avg_llava import load
from avg_llava.checkpoints.convert import convert, plan_conversion
from avg_llava.checkpoints.loading import build_from_backbones
from avg_llava.model.processing import AvgLlavaProcessor
from avg_llava.planning.dry_run import dry_run
from avg_llava.training import run
from avg_llava.training.config import load_config
from avg_llava.training.feedback import collect
from tests.family_tokenizers import make_tokenizer
from tests.model import without_package
from tests.tiny import noise_images, write_backbones, write_data

pytestmark = pytest.mark.xdist_group("training-recipes")  # the trained stages are shared

ROOT = Path(__file__).parents[2]
BIN = ROOT / "tests/data/checkpoints"
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL = {
    "optim.global_batch_size": 4,
    "optim.micro_batch_size": 2,
    "optim.max_steps": 6,
    "optim.lr": 3e-3,
    "data.num_workers": 0,
    "output.save_every": 0,
    "runtime.deepspeed": "null",
    "logging.progress_bar": "false",
    "logging.trackers": "[]",
}


def backbones(folder: Path, template: str, kind: type, vision=None, **fields) -> None:
    tokenizer = make_tokenizer(template)
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    language = kind(**SIZES, **special, vocab_size=len(tokenizer), max_position_embeddings=8192, **fields)
    write_backbones(folder, vision, language, tokenizer)


def stand_in(folder: Path, template: str, kind: type, **fields) -> None:
    """Writes `folder`/start: a LLaVA-NeXT in bfloat16 in the layout of the original code."""
    backbones(folder, template, kind, **fields)
    model = build_from_backbones(folder / "vision", folder / "language", dtype=torch.bfloat16)
    model.save_pretrained(folder / "model")
    AvgLlavaProcessor.from_backbones(folder / "vision", folder / "language", model.config).save_pretrained(
        folder / "model"
    )
    convert(plan_conversion(folder / "model", "original"), folder / "start", check=False)


def configured(path: str, folder: Path, file: str = "instruct.json", **changes):
    """A shipped configuration with small batches, `folder`'s data and output folder, and further changes."""
    (folder / "sources.yaml").write_text(yaml.safe_dump([{"path": str(folder / file)}]))
    values = {**SMALL, "data.sources": folder / "sources.yaml", "output.dir": folder / Path(path).stem}
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    return load_config(f"configs/{path}", [f"--{key}={value}" for key, value in values.items()])


def train_from_start(family: str, folder: Path, template: str, kind: type, **fields) -> None:
    """Stage 3 with QLoRA, feedback, and stage 4 from it."""
    stand_in(folder, template, kind, **fields)
    start = {"model__start": folder / "start"}
    run.run_stage(configured(f"{family}/qlora/stage3.yaml", folder, optim__lora_lr=1e-2, **start))
    store = {"model__start": folder / "stage3", "objective__feedback_store": folder / "feedback"}
    stage4 = configured(f"{family}/qlora/stage4.yaml", folder, **store)
    assert collect(stage4, folder / "feedback", num_processes=1).num_missing_shards == 0
    run.run_stage(stage4)


def train_from_backbones(family: str, folder: Path, template: str, kind: type, **fields) -> None:
    """All stages, with a tower of 27 x 27 patches, as the published one."""
    vision = SiglipVisionConfig(image_size=54, patch_size=2, **{**SIZES, "hidden_size": 16, "intermediate_size": 32})
    backbones(folder, template, kind, vision, **fields)
    start = {"model__vision": folder / "vision", "model__language": folder / "language"}
    for stage, steps in {1: 1, 2: 1, 3: 4, 4: 1}.items():
        file = "captions.json" if stage == 1 else "instruct.json"
        changes = {"optim__max_steps": steps, "optim__global_batch_size": 2, **start}
        run.run_stage(configured(f"{family}/stage{stage}.yaml", folder, file, **changes))
        start = {"model__start": folder / f"stage{stage}"}


RECIPES = {
    "llava-v1.6-vicuna-7b": (train_from_start, "vicuna_v1", LlamaConfig, {}),
    "llava-v1.6-mistral-7b": (train_from_start, "mistral_instruct", MistralConfig, {"num_key_value_heads": 2}),
    "llama3-llava-next-8b": (train_from_start, "llava_llama_3", LlamaConfig, {"num_key_value_heads": 2}),
    "siglip2-qwen3-4b": (
        train_from_backbones,
        "chatml",
        Qwen3Config,
        {"num_key_value_heads": 2, "head_dim": 24, "tie_word_embeddings": True},
    ),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, Path]:
    """Folders with the results of stages 3 and 4 of every recipe."""
    folders = {}
    with contextlib.chdir(ROOT):
        for family, (train, template, kind, fields) in RECIPES.items():
            folder = folders[family] = tmp_path_factory.mktemp(family)
            write_data(folder)
            train(family, folder, template, kind, **fields)
    return folders


@pytest.mark.parametrize("family", RECIPES)
def test_a_recipe_learns(trained, family):
    """The loss of stage 3 falls; the template is the family's, the levels are the tower's."""
    log = [json.loads(line) for line in (trained[family] / "stage3/log_history.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in log if "loss" in line]
    assert losses[-1] < losses[0], losses
    train, template, *_ = RECIPES[family]
    model, _ = load(trained[family] / "stage4")
    assert model.config.template == template
    assert model.dtype == torch.bfloat16
    assert model.config.granularities == ([4, 8, 16, 32, 64] if train is train_from_start else [49, 98, 196, 378, 729])


def test_results_load_without_this_package(trained, tmp_path):
    """In a process of its own, where they compute what they compute here."""
    without_package.check(tmp_path, noise_images()[1], *(folder / "stage4" for folder in trained.values()))


def test_stage_1_from_pickled_backbones(tmp_path, monkeypatch):
    """Vicuna's and CLIP's published layouts: a dry run, and two steps."""
    monkeypatch.chdir(ROOT)
    write_data(tmp_path, num_samples=4)
    changes = {"model__vision": BIN / "clip_bin", "model__language": BIN / "vicuna_bin", "optim__max_steps": 2}
    config = configured("vicuna-7b/stage1.yaml", tmp_path, "captions.json", **changes)
    (tmp_path / "stage1.yaml").write_text(config.to_yaml())
    assert dry_run(tmp_path / "stage1.yaml").problems == []
    folder = run.run_stage(config)
    model, _ = load(folder)
    language = torch.load(next((BIN / "vicuna_bin").glob("*00001*.bin")), weights_only=True)
    weight = model.model.language_model.embed_tokens.weight
    assert torch.equal(weight, language["model.embed_tokens.weight"].to(weight.dtype))
