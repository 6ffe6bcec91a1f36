"""Parts of models: projectors by themselves, adapters merged as peft merges them, shards that DeepSpeed left."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, CLIPVisionModel, LlamaForCausalLM, LlavaNextForConditionalGeneration

from avg_llava import load_model
from avg_llava.checkpoints.loading import build_from_backbones
from avg_llava.checkpoints.weight_files import CheckpointError
from avg_llava.common.settings import ConfigError, build
from avg_llava.training.assembly import build_model
from avg_llava.training.config import LoraSettings, TrainConfig
from avg_llava.training.lora import add_adapters, save_adapters
from tests.tiny import llava_next, prompt, stage_values, tiny_model, write_backbones

TARGETS = r".*language_model.*(q_proj|v_proj|down_proj)"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_backbones(folder)
    return folder


def projector(model):
    return {
        f"{layer}.{kind}": getattr(getattr(model.model.multi_modal_projector, name), kind).detach().clone()
        for layer, name in ((0, "linear_1"), (2, "linear_2"))
        for kind in ("weight", "bias")
    }


class TestProjector:
    @pytest.mark.parametrize("prefix", ["model.mm_projector.", "base_model.model.model.mm_projector.", "mm_projector."])
    def test_prefixes_do_not_matter(self, world, tmp_path, prefix):
        expected = projector(build_from_backbones(world / "vision", world / "language"))
        torch.save({prefix + name: tensor for name, tensor in expected.items()}, tmp_path / "mm_projector.bin")
        for path in (tmp_path / "mm_projector.bin", tmp_path):
            loaded = build_from_backbones(world / "vision", world / "language", projector=path)
            assert all(torch.equal(tensor, expected[name]) for name, tensor in projector(loaded).items())

    def test_it_replaces_that_of_a_checkpoint(self, tmp_path):
        model, other = tiny_model(0), projector(tiny_model(1))
        model.save_pretrained(tmp_path / "model")
        save_file({f"multi_modal_projector.{name}": t for name, t in renamed(other)}, tmp_path / "own.safetensors")
        loaded = load_model(tmp_path / "model", projector=tmp_path / "own.safetensors")
        assert all(torch.equal(tensor, other[name]) for name, tensor in projector(loaded).items())
        assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)

    def test_stage_2_starts_from_backbones_with_it(self, world, tmp_path):
        expected = projector(tiny_model_of(world))
        torch.save({f"model.mm_projector.{name}": t for name, t in expected.items()}, tmp_path / "mm_projector.bin")
        values = stage_values(2, tmp_path, world)
        values["data"]["sources"] = [{"path": str(tmp_path / "data.json")}]
        values["model"] = {name: str(world / name) for name in ("vision", "language")}
        with pytest.raises(ConfigError, match=r"stage 2 starts from model\.start"):
            build(TrainConfig, values)
        values["model"]["projector"] = str(tmp_path / "mm_projector.bin")
        model, processor = build_model(build(TrainConfig, values))
        assert all(torch.equal(tensor, expected[name]) for name, tensor in projector(model).items())
        assert processor.image_token_id == model.config.image_token_id
        for stage, extra in ((2, {"lora": {}}), (4, {"model": {"start": "x", "projector": "y"}})):
            with pytest.raises(ConfigError, match=r"lora needs model\.start|projector is for stages 1 to 3"):
                build(TrainConfig, values | {"stage": stage} | extra)

    @pytest.mark.parametrize(
        ("names", "found"),
        [
            (["mm_projector.weight", "mm_projector.bias"], "mm_projector.bias"),
            (["mm_projector.0.weight", "mm_projector.0.bias"], r"linear_2\.bias"),
            (["mm_projector.0.weight", "lm_head.weight"], r"lm_head\.weight"),
        ],
    )
    def test_other_contents_are_refused(self, world, tmp_path, names, found):
        torch.save({name: torch.zeros(2) for name in names}, tmp_path / "mm_projector.bin")
        with pytest.raises(CheckpointError, match=rf"mm_projector\.bin does not hold exactly.*{found}"):
            build_from_backbones(world / "vision", world / "language", projector=tmp_path / "mm_projector.bin")

    def test_other_shapes_are_refused(self, world, tmp_path):
        torch.save({f"mm_projector.{name}": t for name, t in projector(tiny_model()).items()}, tmp_path / "p.bin")
        with pytest.raises(CheckpointError, match=r"shape .*linear_1\.weight"):
            build_from_backbones(world / "vision", world / "language", projector=tmp_path / "p.bin")

    def test_a_folder_with_nothing_else_says_what_it_is_for(self, tmp_path):
        torch.save({}, tmp_path / "mm_projector.bin")
        with pytest.raises(CheckpointError, match=r"holds only a projector; .*model\.projector: .*mm_projector\.bin"):
            load_model(tmp_path)


def renamed(weights):
    return [(name.replace("0.", "linear_1.").replace("2.", "linear_2."), tensor) for name, tensor in weights.items()]


def tiny_model_of(world):
    torch.manual_seed(9)
    return build_from_backbones(world / "vision", world / "language")


def adapt(model, folder, base, **fields):
    """Saves random adapters of a model in peft's format, and returns the model that peft merges them into."""
    torch.manual_seed(1)
    wrapped = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **fields}))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.05)
    wrapped.peft_config["default"].base_model_name_or_path = str(base)
    wrapped.save_pretrained(folder)
    return wrapped


def assert_equal_to_peft(loaded, merged, skipped=("model.router.",)):
    theirs = merged.state_dict()
    for name, tensor in loaded.state_dict().items():
        if not name.startswith(skipped):
            assert torch.equal(tensor, theirs[name]), name


class TestAdapters:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(
        "fields", [{}, {"use_rslora": True}, {"alpha_pattern": {"v_proj": 3}, "rank_pattern": {"v_proj": 2}}]
    )
    def test_of_peft_on_transformers_llava_next(self, tmp_path, dtype, fields):
        llava_next(tiny_model().config).to(dtype).save_pretrained(tmp_path / "base")
        base = LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "base", dtype=dtype)
        adapt(base, tmp_path / "lora", tmp_path / "base", **fields)
        fresh = LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "base", dtype=dtype)
        merged = PeftModel.from_pretrained(fresh, tmp_path / "lora").merge_and_unload()
        loaded = load_model(tmp_path / "lora")
        assert loaded.dtype == dtype
        assert_equal_to_peft(loaded, merged)
        plain = load_model(tmp_path / "base")
        assert not torch.equal(
            loaded.model.language_model.layers[0].mlp.down_proj.weight,
            plain.model.language_model.layers[0].mlp.down_proj.weight,
        )

    def test_of_this_packages_training(self, tmp_path):
        model = tiny_model()
        model.save_pretrained(tmp_path / "start")
        add_adapters(model, LoraSettings(rank=4, alpha=8.0), seed=1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name or "multi_modal_projector" in name:
                    parameter.normal_(std=0.05)
        save_adapters(tmp_path, model, model.state_dict(), str(tmp_path / "start"))
        loaded = load_model(tmp_path / "adapter")
        ids = prompt(9)[None]
        with torch.no_grad():
            expected = model.eval()(ids).logits
            assert (loaded(ids).logits - expected).abs().max() < 1e-5
        assert torch.equal(
            loaded.model.multi_modal_projector.linear_1.weight, model.model.multi_modal_projector.linear_1.weight
        )

    @pytest.mark.parametrize("prefix", ["base_model.model.", "base_model.", ""])
    def test_of_the_original_code_on_a_language_model(self, world, tmp_path, prefix):
        """Adapters of the language model, and projector and newline trained whole, beside the model's config.json."""
        base = AutoModelForCausalLM.from_pretrained(world / "language")
        width, vision = base.config.hidden_size, CLIPVisionModel.from_pretrained(world / "vision")
        raw = base.config.to_dict() | {
            "model_type": "llava_llama",
            "architectures": ["LlavaLlamaForCausalLM"],
            "rope_theta": 10000.0,
            "mm_vision_tower": str(world / "vision"),
            "mm_projector_type": "mlp2x_gelu",
            "mm_patch_merge_type": "spatial_unpad",
            "image_aspect_ratio": "anyres",
            "image_grid_pinpoints": [[16, 32], [32, 16], [32, 32]],
        }
        adapt(base, tmp_path, world / "language", target_modules=["q_proj", "up_proj"])
        (tmp_path / "config.json").write_text(json.dumps(raw))
        torch.manual_seed(2)
        others = {
            "mm_projector.0.weight": torch.randn(width, vision.config.hidden_size),
            "mm_projector.0.bias": torch.randn(width),
            "mm_projector.2.weight": torch.randn(width, width),
            "mm_projector.2.bias": torch.randn(width),
            "image_newline": torch.randn(width),
        }
        torch.save({f"{prefix}model.{name}": t for name, t in others.items()}, tmp_path / "non_lora_trainables.bin")
        fresh = LlamaForCausalLM.from_pretrained(world / "language")
        merged = PeftModel.from_pretrained(fresh, tmp_path).merge_and_unload()
        loaded = load_model(tmp_path)
        for name, tensor in merged.model.state_dict().items():
            assert torch.equal(loaded.model.language_model.state_dict()[name], tensor), name
        assert torch.equal(loaded.model.image_newline, others["image_newline"])
        assert torch.equal(loaded.model.multi_modal_projector.linear_2.weight, others["mm_projector.2.weight"])
        assert loaded.config.image_grid_pinpoints == [[32, 16], [16, 32], [32, 32]]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"use_dora": True}, "use_dora is True; only False"),
            ({"peft_type": "IA3"}, "peft_type is 'IA3'; only 'LORA'"),
            ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
            ({"base_model_name_or_path": None}, "names no base_model_name_or_path"),
            ({"base_model_name_or_path": "./checkpoints/vicuna"}, "write its folder or hub id there"),
            ({"base_model_name_or_path": "~nobody/model" * 100}, "write its folder or hub id there"),
            ({"base_model_name_or_path": "."}, r"base model \. is made of adapters itself"),
            ({"base_model_name_or_path": ["a"]}, "names no base_model_name_or_path"),
            ({"lora_alpha": "x"}, "lora_alpha is 'x', not a number"),
            ({"lora_alpha": float("nan")}, "lora_alpha is nan, not a number"),
            ({"alpha_pattern": [1]}, r"alpha_pattern is \[1\], not values by pattern"),
            ({"alpha_pattern": {"q_proj": None}}, "q_proj is None, not a number"),
            ({"alpha_pattern": {"(": 1}}, "is no regular expression"),
            ({"alpha_pattern": {"(.*)*(.*)*x": 1}}, "names of layers and one wildcard are"),
            ({"rank_pattern": {"q_proj": 3}}, "but its rank is 3 in"),
            ({"r": 0}, "r is 0, not a whole number above 0"),
            ({"alora_invocation_tokens": [5]}, r"alora_invocation_tokens is \[5\]; only"),
            ({"use_something_new": True}, "use_something_new is True, which is not supported"),
        ],
    )
    def test_what_cannot_be_merged_is_refused_by_name(self, tmp_path, changes, message):
        tiny_model().save_pretrained(tmp_path / "base")
        adapt(load_model(tmp_path / "base"), tmp_path / "lora", tmp_path / "base")
        file = tmp_path / "lora" / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        with pytest.raises(CheckpointError, match=message) as error:
            load_model(tmp_path / "lora")
        assert "adapter_config.json" in str(error.value)

    def test_adapters_of_another_model_are_refused(self, tmp_path):
        model = tiny_model()
        model.save_pretrained(tmp_path / "base")
        adapt(model, tmp_path / "lora", tmp_path / "base")
        config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
        deeper = tiny_model(language=replace_layers(model.config.text_config, 1))
        deeper.save_pretrained(tmp_path / "other")
        config["base_model_name_or_path"] = str(tmp_path / "other")
        (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=r"layers\.1\..* is no weight of the base model"):
            load_model(tmp_path / "lora")
        (tmp_path / "lora" / "adapter_model.safetensors").unlink()
        with pytest.raises(CheckpointError, match="but neither adapter_model"):
            load_model(tmp_path / "lora")


def replace_layers(config, count):
    fields = {**config.to_dict(), "num_hidden_layers": count}
    return type(config)(**fields)


def test_shards_of_deepspeed_say_how_to_make_them_whole(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    shutil.copytree(tmp_path, tmp_path / "global_step12")
    with pytest.raises(CheckpointError, match=r"\(global_step12\); .*deepspeed\.utils\.zero_to_fp32"):
        load_model(tmp_path)
