from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from avg_llava.common.settings import read_yaml
from avg_llava.training.config import ConfigError, load_config
from tests.tiny import stage_values

ROOT = Path(__file__).parents[2]


@pytest.fixture
def write(tmp_path):
    def write_values(stage: int = 2, **sections) -> Path:
        values = stage_values(stage, tmp_path / "runs", tmp_path)
        for name, section in sections.items():
            values[name] = {**values.get(name, {}), **section} if isinstance(section, dict) else section
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return write_values


def test_values_and_overrides(write):
    config = load_config(
        write(),
        ["--optim.lr", "1e-4", "--data.num_workers=3", "--output.overwrite", "--logging.trackers", "[wandb]"],
    )
    assert config.stage == 2
    assert config.optim.lr == 1e-4
    assert config.optim.vision_lr == 2e-3
    assert config.data.num_workers == 3
    assert config.output.overwrite is True
    assert config.logging.trackers == ("wandb",)
    assert config.data.sources[0].path.endswith("instruct.json")
    assert config.model.force_start is False


def test_force_start_flag(write):
    assert load_config(write(), ["--force-start"]).model.force_start is True


def test_null_and_nested_overrides(write):
    config = load_config(
        write(),
        [
            "--optim.vision_lr",
            "null",
            "--data.sources",
            "[{path: a.json, sampling: 'first:3'}]",
            "--optim.betas",
            "[0.9, 0.95]",
        ],
    )
    assert config.optim.vision_lr is None
    assert (config.data.sources[0].path, config.data.sources[0].sampling) == ("a.json", "first:3")
    assert config.optim.betas == (0.9, 0.95)


def test_text_stays_text(write):
    assert load_config(write(), ["--logging.run_name", "123"]).logging.run_name == "123"


def test_scientific_notation_without_a_dot_is_a_number(tmp_path, write):
    path = write()
    path.write_text(path.read_text().replace("lr: 0.001", "lr: 1e-3"))
    assert yaml.safe_load("lr: 1e-3")["lr"] == "1e-3", "YAML 1.1 reads it as text"
    assert load_config(path).optim.lr == 1e-3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--optim.leaning_rate", "1"], "unknown key optim.leaning_rate"),
        (["--optim.warmup_ration", "1"], "did you mean 'warmup_ratio'"),
        (["--optm.lr", "1"], "unknown key optm - did you mean 'optim'"),
        (["--optim.lr", "fast"], "optim.lr must be a number, got 'fast'"),
        (["--optim.lr", "true"], "optim.lr must be a number"),
        (["--optim.micro_batch_size", "1.5"], "optim.micro_batch_size must be a whole number"),
        (["--data.template", "vicuna"], "phi_3, tokenizer; got 'vicuna' - did you mean 'vicuna_v1'"),
        (["--stage", "5"], "stage must be one of 1, 2, 3, 4"),
        (["--output.overwrite", "1"], "output.overwrite must be true or false"),
        (["--data.sources", "x.yaml"], "data.sources: x.yaml does not exist; name a YAML file that holds a list"),
        (["--data.sources", "3"], "data.sources must be a list"),
        (["--data.sources", "[{path: x.json, weight: 0}]"], "data.sources.0.weight must be above 0"),
        (["--data.sources", "[{pth: x}]"], "unknown key data.sources.0.pth - did you mean 'path'"),
        (["--data.sources", "[{image_root: x}]"], "data.sources.0.path is missing"),
        (["--data", "3"], "data must be a mapping"),
        (["--seed.x", "3"], "seed is a value, not a section"),
        (["optim.lr", "3"], "expected `--key.subkey value`"),
        (["--optim.lr", "0"], "optim.lr must be above 0"),
        (["--optim.max_tokens_per_batch", "0"], "optim.max_tokens_per_batch must be above 0"),
        (["--optim.weight_decay", "-1"], "optim.weight_decay must be at least 0"),
        (["--optim.warmup_ratio", "1"], "optim.warmup_ratio must be below 1"),
        (["--optim.betas", "[0.9]"], "list of two numbers"),
        (["--data.sources", "[]"], "data.sources is empty"),
        (["--model.vision", "x"], "neither model.vision nor model.language"),
        (["--model.granularities", "[4, 8]"], "model.granularities is decided in stage 1"),
        (["--optim.lr", "[1"], "cannot read the value"),
    ],
)
def test_mistakes_are_named(write, overrides, message):
    with pytest.raises(ConfigError) as error:
        load_config(write(), overrides)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("stage", "objective", "message"),
    [
        (3, {"method": "gumbel"}, r"objective\.method gumbel is for stage 4; this is stage 3"),
        (
            4,
            {"method": "gumbel", "feedback_store": "store"},
            r"nothing to store; set objective\.feedback_store to null",
        ),
        (4, {"method": "gumbel", "temperature": 0}, r"objective\.temperature must be above 0"),
        (4, {"method": "gumble"}, r"objective\.method must be one of rglf, gumbel; .* did you mean 'gumbel'"),
    ],
)
def test_mistakes_in_the_method(write, stage, objective, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write(stage, objective=objective))


def test_the_method_decides_the_objective(write):
    assert load_config(write(4)).objective_name == "router"
    assert load_config(write(4), ["--objective.method", "gumbel"]).objective_name == "gumbel"


def test_stage_1_needs_backbones(write):
    with pytest.raises(ConfigError, match=r"stage 1 starts from model\.vision and model\.language"):
        load_config(write(1), ["--model.vision", "null"])


def test_a_file_extends_another(write, tmp_path):
    """Sections are merged, other values are replaced, and command-line options override both."""
    base = write(4)
    (tmp_path / "sweeps").mkdir()
    middle, path = tmp_path / "sweeps/middle.yaml", tmp_path / "sweeps/last.yaml"
    middle.write_text(
        f"extends: ../{base.name}\noptim:\n  lr: 5e-3\n  eps: 1e-6\ndata:\n  sources: [{{path: mine.json}}]\n"
    )
    path.write_text("extends: middle.yaml\noptim: {lr: 7e-3}\nobjective: {rank_loss_weight: 0.0}\n")
    before, config = load_config(base), load_config(path, ["--optim.eps", "1e-7"])
    assert (config.optim.lr, config.optim.eps) == (7e-3, 1e-7)
    assert config.objective.rank_loss_weight == 0
    assert [source.path for source in config.data.sources] == ["mine.json"]
    assert config.optim.global_batch_size == before.optim.global_batch_size
    assert config.model == before.model


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("extends: none.yaml", r"configuration file .*none\.yaml does not exist"),
        ("extends: self.yaml", r"self\.yaml extends .*self\.yaml: files that extend one another in a circle"),
        ("extends: [a.yaml]", r"self\.yaml: extends must be the path of a YAML file"),
        ("extends: {base}\noptim: {{leaning_rate: 1}}", r"unknown key optim\.leaning_rate"),
        ("extends: {base}\noptim: 1", r"optim must be a mapping"),
    ],
)
def test_mistakes_in_extending(write, tmp_path, content, message):
    path = tmp_path / "self.yaml"
    path.write_text(content.format(base=write().name))
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_missing_required_key(write):
    values = read_yaml(write())
    del values["optim"]["lr"]
    path = write()
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match=r"optim\.lr is missing"):
        load_config(path)


def test_files_that_are_no_configuration(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(tmp_path / "none.yaml")
    path = tmp_path / "broken.yaml"
    path.write_text("a: [1")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(path)
    path.write_text("- 1")
    with pytest.raises(ConfigError, match="must hold a mapping"):
        load_config(path)


def test_round_trip(write, tmp_path):
    config = load_config(write(1))
    dumped = tmp_path / "dumped.yaml"
    dumped.write_text(config.to_yaml())
    assert load_config(dumped) == config


@pytest.mark.parametrize(("world_size", "steps"), [(1, 8), (2, 4), (8, 1)])
def test_accumulation_follows_from_the_batch_sizes(write, world_size, steps):
    config = load_config(write(optim={"global_batch_size": 16, "micro_batch_size": 2}))
    assert config.accumulation_steps(world_size) == steps


@pytest.mark.parametrize("world_size", [3, 16])
def test_batch_sizes_that_do_not_fit(write, world_size):
    config = load_config(write(optim={"global_batch_size": 16, "micro_batch_size": 2}))
    with pytest.raises(ConfigError, match=r"global_batch_size 16 is not a multiple of .* 2 x"):
        config.accumulation_steps(world_size)


class TestMixture:
    """`data.sources` in a separate file, shared by stages."""

    @pytest.fixture
    def mixture(self, tmp_path) -> Path:
        path = tmp_path / "mixture.yaml"
        path.write_text("- path: a.json\n  weight: 0.5\n- path: b.parquet\n  expected: {total: 3, coco: 2}\n")
        return path

    @pytest.mark.parametrize("place", ["file", "override"])
    def test_it_stands_for_its_list(self, write, mixture, place):
        if place == "file":
            config = load_config(write(data={"sources": str(mixture)}))
        else:
            config = load_config(write(), ["--data.sources", str(mixture)])
        first, second = config.data.sources
        assert (first.path, first.weight, first.expected) == ("a.json", 0.5, None)
        assert (second.path, second.weight, second.expected) == ("b.parquet", 1.0, {"total": 3, "coco": 2})
        listed = yaml.safe_load(mixture.read_text())
        assert config == load_config(write(data={"sources": listed})), "what a run records is the list itself"

    def test_mistakes_in_it_are_named(self, write, mixture):
        path = write(data={"sources": str(mixture)})
        for content, message in {
            "path: a.json": r"data\.sources: .*mixture\.yaml must hold a list, got dict",
            "- [": r"mixture\.yaml is not valid YAML",
            "- pth: a.json": r"unknown key data\.sources\.0\.pth - did you mean 'path'",
        }.items():
            mixture.write_text(content)
            with pytest.raises(ConfigError, match=message):
                load_config(path)


def test_a_configuration_built_in_python_is_checked(write):
    config = load_config(write())
    with pytest.raises(ConfigError, match=r"optim\.lr must be above 0, got -1"):
        replace(config, optim=replace(config.optim, lr=-1.0))
    source = replace(config.data.sources[0], weight=0.0)
    with pytest.raises(ConfigError, match=r"data\.sources\.0\.weight must be above 0"):
        replace(config, data=replace(config.data, sources=(source,)))
