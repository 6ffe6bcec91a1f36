"""Saved models: loaded without this package and with it, and nothing of an earlier model left in their folder."""

import ast
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers.dynamic_module_utils import get_imports, get_relative_imports

from avg_llava import (
    AvgLlavaConfig,
    AvgLlavaForConditionalGeneration,
    AvgLlavaProcessor,
    build_from_backbones,
    load,
    load_model,
)
from avg_llava.checkpoints.routing_model import load_routing_model
from avg_llava.checkpoints.weight_files import CheckpointError
from avg_llava.model.saving import AUTO_MAP, PREFIX, modelling_files
from tests.model import without_package
from tests.tiny import (
    bpe_tokenizer,
    language_models,
    make_checkpoint,
    noise_images,
    tiny_model,
    towers,
    write_backbones,
)

pytestmark = pytest.mark.xdist_group("model-saving")

STALE = [
    "model-00001-of-00003.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "model.fp16.safetensors",
    "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "adapter_config.json", "mm_projector.bin",
    "adapter_model.safetensors", "non_lora_trainables.bin", f"{PREFIX}of_an_older_version.py", "weights.safetensors",
    "stage.json",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("saved"))


@pytest.fixture(scope="module")
def image_file(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("image") / "noise.png"
    noise_images()[1].save(file)
    return file


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# ---- the modelling files -------------------------------------------------------------------------------------------


def test_modelling_files_import_each_other_and_what_transformers_has(tmp_path):
    files = modelling_files()
    assert files == modelling_files()
    assert {f"{PREFIX}{name}.py" for name in ("auto", "modeling", "processing", "router", "scaler")} <= files.keys()
    allowed = {"torch", "transformers", "numpy", "PIL", "huggingface_hub", "jinja2"} | set(sys.stdlib_module_names)
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        assert set(get_imports(tmp_path / name)) <= allowed, name
        assert {f"{module}.py" for module in get_relative_imports(tmp_path / name)} <= files.keys(), name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0 or f"{node.module}.py" in files, "a module of this package is imported whole"
            assert not isinstance(node, ast.Import) or all(alias.name != "avg_llava" for alias in node.names)
    for reference in AUTO_MAP.values():
        module, _, name = reference.partition(".")
        assert name in files[f"{module}.py"]


def test_every_door_names_the_modelling_files(folder, tmp_path):
    code = modelling_files().keys()
    processor = AvgLlavaProcessor.from_pretrained(folder)
    AvgLlavaConfig.from_pretrained(folder).save_pretrained(tmp_path / "config")
    processor.save_pretrained(tmp_path / "processor")
    processor.image_processor.save_pretrained(tmp_path / "images")
    for door, file in (
        ("config", "config.json"),
        ("processor", "processor_config.json"),
        ("images", "preprocessor_config.json"),
    ):
        assert code <= names(tmp_path / door)
        assert json.loads((tmp_path / door / file).read_text())["auto_map"] == AUTO_MAP
    assert str(folder.parent) not in (tmp_path / "config" / "config.json").read_text(), "no path of this machine"


FAMILIES = {"siglip": ("qwen2", "chatml"), "siglip2": ("gemma2", "gemma"), "dinov2_registers": ("phi3", "llama_3")}
"""Language model and template that are tested with a tower."""


def of_family(root: Path, tower: str) -> Path:
    """A model of another tower, language model and template."""
    language, template = FAMILIES[tower]
    tokenizer = bpe_tokenizer()
    write_backbones(root, towers()[tower], language_models(tokenizer)[language], tokenizer)
    model = build_from_backbones(root / "vision", root / "language", template=template)
    model.save_pretrained(root / tower)
    AvgLlavaProcessor.from_backbones(root / "vision", root / "language", model.config).save_pretrained(root / tower)
    return root / tower


def test_without_the_package(folder, image_file, tmp_path):
    """In a fresh process, all Auto classes and the pipeline; then the model that this process saved, here."""
    families = [of_family(tmp_path / f"family-{tower}", tower) for tower in FAMILIES]
    without_package.run(image_file, tmp_path, folder, *families)
    for number, family in enumerate(families, 1):
        without_package.compare(tmp_path, number, *load(family), Image.open(image_file))
    model, processor = load(folder)
    image = Image.open(image_file)
    expected = without_package.answers(model, processor, image, model.config.granularities)
    found = load_file(tmp_path / "0.safetensors")
    assert found.keys() == expected.keys()
    assert len({tuple(ids.flatten().tolist()) for name, ids in expected.items() if name.startswith("ids/")}) > 1
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    routed = processor.tokenizer.decode(expected["ids/None"][0], skip_special_tokens=True)
    assert json.loads((tmp_path / "0.json").read_text())["text"] == routed
    saved = tmp_path / "0"
    assert names(saved) == names(folder)
    for file in folder.iterdir():
        if file.name != "tokenizer_config.json":  # transformers adds the processor's class to it
            assert (saved / file.name).read_bytes() == file.read_bytes(), file.name
    again, _ = load(saved)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_with_the_package(folder, image_file):
    """All Auto classes and the pipeline, without `trust_remote_code`."""
    reference, processor = load(folder)
    image = Image.open(image_file)
    expected = without_package.answers(reference, processor, image, reference.config.granularities)
    model, processor, pipeline = without_package.load_everything(str(folder))
    assert type(model) is AvgLlavaForConditionalGeneration
    assert type(processor) is AvgLlavaProcessor
    for name, tensor in without_package.answers(model, processor, image, model.config.granularities).items():
        assert torch.equal(tensor, expected[name]), name
    routed = processor.tokenizer.decode(expected["ids/None"][0], skip_special_tokens=True)
    assert without_package.pipeline_text(pipeline, image) == routed


def test_code_in_a_folder_is_never_run(folder, tmp_path):
    """By this package; transformers' classes run it neither, if this package is imported, even if told to."""
    copy = tmp_path / "hostile"
    load(folder)[0].save_pretrained(copy)
    load(folder)[1].save_pretrained(copy)
    for file in copy.glob("*.py"):
        file.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nraise SystemExit")
    load(copy)
    load_routing_model(copy)
    without_package.load_everything(str(copy))
    without_package.load_everything(str(copy), trust_remote_code=True)
    assert not (tmp_path / "ran").exists()


# ---- folders that hold another model -------------------------------------------------------------------------------


def save_whole(source: Path, target: Path) -> None:
    load_model(source).save_pretrained(target)


def save_shards(source: Path, target: Path) -> None:
    load_model(source).save_pretrained(target, max_shard_size="20KB")


def save_routing(source: Path, target: Path) -> None:
    load_routing_model(source).save_pretrained(target)


def save_original(source: Path, target: Path) -> None:
    """From a fresh model, whose weights are in no file."""
    model = tiny_model(router_config={"num_text_tokens": 12})
    model.save_pretrained(target)


@pytest.mark.parametrize("save", [save_whole, save_shards, save_routing, save_original])
@pytest.mark.parametrize("earlier", ["nothing", "one file", "shards", "stale", "itself"])
def test_nothing_of_an_earlier_model_stays(folder, tmp_path, save, earlier):
    fresh, target = tmp_path / "fresh", tmp_path / "target"
    save(folder, fresh)
    if earlier in ("one file", "shards", "itself"):
        model = load_model(folder) if earlier == "itself" else tiny_model(seed=1)
        model.save_pretrained(target, max_shard_size="20KB" if earlier == "shards" else "1GB")
    elif earlier == "stale":
        target.mkdir()
        for name in STALE:
            (target / name).write_bytes(b"stale")
        (target / "notes.bin").write_bytes(b"not a model's")
    save(target if earlier == "itself" and save is not save_original else folder, target)
    kept = {"notes.bin"} if earlier == "stale" else set()
    assert names(target) == names(fresh) | kept
    expected, found = load_model(fresh).state_dict(), load_model(target).state_dict()
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_a_failed_save_keeps_the_earlier_model(tmp_path, monkeypatch):
    earlier = tiny_model(seed=1)
    earlier.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model = tiny_model(seed=2)
    with monkeypatch.context() as patch:
        patch.setattr(type(model.generation_config), "save_pretrained", lambda *arguments: os.stat("/nowhere"))
        with pytest.raises(FileNotFoundError):
            model.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("files_moved", range(3))
def test_a_save_that_ends_halfway_leaves_no_mixture(tmp_path, monkeypatch, files_moved):
    """It is interrupted when some of the new shards are in place: no loader takes the folder for a model."""
    tiny_model(seed=1).save_pretrained(tmp_path, max_shard_size="200KB")
    replace, left = os.replace, [files_moved]

    def interrupted(source, target):
        if Path(source).parent.name == ".new" and Path(source).name.startswith("model-"):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tiny_model(seed=2).save_pretrained(tmp_path, max_shard_size="200KB")
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        load_model(tmp_path)
    (tmp_path / ".new").mkdir()  # as a killed process leaves it
    (tmp_path / ".new" / "model-00002-of-00009.safetensors").touch()
    tiny_model(seed=3).save_pretrained(tmp_path)
    assert {name for name in names(tmp_path) if "model" in name and not name.endswith(".py")} == {"model.safetensors"}
    assert ".new" not in names(tmp_path)
    assert torch.equal(load_model(tmp_path).lm_head.weight, tiny_model(seed=3).lm_head.weight)


def test_weights_of_another_configuration_are_an_error(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["vocab_size"] = 70
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="does not fit its configuration"):
        load_model(tmp_path)


def test_a_folder_with_the_name_of_a_file_keeps_the_earlier_model(folder, tmp_path):
    tiny_model(seed=1).save_pretrained(tmp_path)
    (tmp_path / "model-x.safetensors").mkdir()
    before = names(tmp_path)
    with pytest.raises(ValueError, match=r"model-x\.safetensors is a folder"):
        tiny_model(seed=2).save_pretrained(tmp_path)
    assert names(tmp_path) == before
    assert torch.equal(load_model(tmp_path).lm_head.weight, tiny_model(seed=1).lm_head.weight)


def test_chat_templates_of_an_earlier_model_do_not_stay(folder, tmp_path):
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("rag")
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "earlier"}))
    (tmp_path / "chat_template.jinja").write_text("earlier")
    processor = AvgLlavaProcessor.from_pretrained(folder)
    processor.tokenizer.chat_template = {"default": "other", "tool_use": "other"}
    processor.save_pretrained(tmp_path)
    assert names(tmp_path) == names(folder) - {"config.json", "generation_config.json", "model.safetensors"}
    saved = AvgLlavaProcessor.from_pretrained(tmp_path)
    assert saved.chat_template == saved.tokenizer.chat_template == processor.chat_template
