"""The feedback store: its contents, equality with feedback computed while training, and refusals."""

import json
import multiprocessing
import random
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from avg_llava import cli, load, load_model
from avg_llava.checkpoints.routing_model import RoutingModel
from avg_llava.data.records import DataError
from avg_llava.training import assembly, feedback, run
from avg_llava.training.checkpoint import read_manifest
from avg_llava.training.config import ConfigError, TrainConfig, load_config
from avg_llava.training.feedback import collect
from avg_llava.training.feedback_store import FeedbackError, FeedbackStore, describe
from tests.tiny import forget_checksums, stage_values, write_backbones, write_data

pytestmark = pytest.mark.xdist_group("feedback")  # the trained stages are shared

NUM_IMAGE_SAMPLES, NUM_TEXT_SAMPLES = 14, 3
NUM_SAMPLES = NUM_IMAGE_SAMPLES + NUM_TEXT_SAMPLES


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A folder with backbones, data, and stages 1 to 3, trained for a step each."""
    folder = tmp_path_factory.mktemp("feedback")
    write_backbones(folder)
    write_data(folder, NUM_IMAGE_SAMPLES, NUM_TEXT_SAMPLES)
    for stage in (1, 2, 3):
        run.run_stage(configuration(folder, stage, "--optim.max_steps", "1"))
    return folder


@pytest.fixture(scope="module")
def store(root) -> Path:
    """A store of all samples in shards of one sample, collected without interruption."""
    begin(root, root / "store", shard_size=1)
    collect(configuration(root), root / "store", num_processes=1)
    return root / "store"


def configuration(root: Path, stage: int = 4, *overrides: str) -> TrainConfig:
    path = root / f"stage{stage}.yaml"
    path.write_text(yaml.safe_dump(stage_values(stage, root, root)))
    return load_config(path, overrides)


def begin(root: Path, folder: Path, shard_size: int) -> FeedbackStore:
    """An empty store with another shard size than the default."""
    config = configuration(root)
    dataset = assembly.build_dataset(config, *assembly.load_processor(config))
    manifest = describe(config.model.start, dataset, config.runtime.precision)
    return FeedbackStore.create(folder, replace(manifest, shard_size=shard_size))


def rows(store: Path) -> dict[str, dict]:
    """The rows of all shards by the samples' ids."""
    return {row["id"]: row for path in sorted(store.glob("*.parquet")) for row in pq.read_table(path).to_pylist()}


def contents(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.iterdir()}


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "log_history.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


# ---- collecting ---------------------------------------------------------------------------------------------------


def test_values(root, store):
    """Against the public forward pass of the whole model, one sample and one level at a time."""
    model, processor = load(root / "stage3")
    dataset = assembly.build_dataset(configuration(root), processor, model.config)
    found = rows(store)
    assert len(found) == len(dataset) == NUM_SAMPLES
    for index in range(len(dataset)):
        item = dataset[index]
        row = found[item["id"]]
        assert (row["file"], row["position"], row["truncated"]) == (0, index, False)
        assert row["num_tokens"] == int((item["labels"] != -100).sum())
        levels = [row[f"log_prob_{level}"] for level in model.config.granularities]
        if not item["pixel_values"]:
            assert row["status"] == "no image"
            assert levels == [None] * 5
            continue
        assert row["status"] == "compared"
        pixels = torch.nn.utils.rnn.pad_sequence(item["pixel_values"], batch_first=True)
        inputs = {"input_ids": item["input_ids"][None], "labels": item["labels"][None]}
        inputs |= {"pixel_values": pixels, "image_sizes": item["image_sizes"]}
        for level, log_prob in zip(model.config.granularities, levels, strict=True):
            with torch.no_grad():
                loss = model(**inputs, granularity=level).loss
            assert log_prob == pytest.approx(-loss.item() * row["num_tokens"], abs=2e-4)


def test_two_processes_write_the_same_store(root, store, tmp_path):
    begin(root, tmp_path / "two", shard_size=1)
    collection = collect(configuration(root), tmp_path / "two", num_processes=2)
    assert (collection.num_samples, collection.num_shards, collection.num_missing_shards) == (17, 17, 0)
    assert collection.counts == {"compared": NUM_IMAGE_SAMPLES, "no image": NUM_TEXT_SAMPLES}
    assert contents(tmp_path / "two") == contents(store)


def test_two_machines_share_a_store(root, store, tmp_path, monkeypatch):
    begin(root, tmp_path / "shared", shard_size=1)
    for node, missing in ((1, 9), (0, 0)):
        monkeypatch.setenv("NNODES", "2")
        monkeypatch.setenv("NODE_RANK", str(node))
        assert collect(configuration(root), tmp_path / "shared", num_processes=1).num_missing_shards == missing
    assert contents(tmp_path / "shared") == contents(store)


def _collect_quietly(config: TrainConfig, folder: Path) -> None:
    collect(config, folder, num_processes=1)


def test_killed_ten_times_it_is_the_same_store(root, store, tmp_path):
    """Kill -9 at random times: finished shards stay, and no shard is written twice."""
    folder = tmp_path / "killed"
    begin(root, folder, shard_size=1)
    config = configuration(root, 4, "--logging.progress_bar", "false")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["avg_llava.training.feedback"])
    moments = random.Random(0)
    written: dict[str, int] = {}
    for attempt in range(10):
        process = context.Process(target=_collect_quietly, args=(config, folder))
        process.start()
        while len(list(folder.glob("*.parquet"))) <= attempt:
            assert process.is_alive()
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.02))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "killed at work"
        for path in folder.glob("*.parquet"):
            assert written.setdefault(path.name, path.stat().st_mtime_ns) == path.stat().st_mtime_ns
    collect(config, folder, num_processes=1)
    assert contents(folder) == contents(store)
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob("*.parquet")}.items() >= written.items()


def test_a_damaged_shard_is_computed_again(root, store, tmp_path):
    folder = shutil.copytree(store, tmp_path / "damaged")
    path = folder / "feedback-00002.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ConfigError, match=r"1 of 17 shards are missing.*it continues"):
        run.run_stage(configuration(root, 4, "--objective.feedback_store", str(folder), "--output.dir", "none"))
    collect(configuration(root), folder, num_processes=1)
    assert contents(folder) == contents(store)


@pytest.fixture
def other_data(root, tmp_path) -> Path:
    """Samples that cannot be compared, each for a different reason, and one that can."""
    shutil.copytree(root / "images", tmp_path / "images")
    (tmp_path / "images/bad.png").write_bytes((root / "images/0.png").read_bytes()[:60])
    records = {record["id"]: record for record in json.loads((root / "instruct.json").read_text())}
    question, answer = records["image-0"]["conversations"][:2]
    long = {"from": "human", "value": question["value"] + " please" * 5000}
    kept = {"from": "gpt", "value": "yes " * 4000}
    chosen = [
        records["image-0"],
        {**records["image-1"], "id": "corrupt", "image": "images/bad.png"},
        {**records["image-2"], "id": "empty answer", "conversations": [question, {"from": "gpt", "value": ""}]},
        {**records["image-3"], "id": "answer cut off", "conversations": [long, answer]},
        {**records["image-3"], "id": "answer cut short", "conversations": [question, kept]},
        records["text-0"],
    ]
    path = tmp_path / "other.json"
    path.write_text(json.dumps(chosen))
    return path


def test_samples_that_cannot_be_compared_are_marked(root, other_data, tmp_path):
    sources = ("--data.sources", f"[{{path: {other_data}}}]", "--model.max_length", "1500")
    with pytest.raises(DataError, match=r"sample 'corrupt' .*bad\.png: cannot be read.*on_bad_sample to skip"):
        collect(configuration(root, 4, *sources), tmp_path / "strict", num_processes=1)
    config = configuration(root, 4, *sources, "--data.on_bad_sample", "skip")
    collection = collect(config, tmp_path / "store", num_processes=1)
    assert collection.counts == {"compared": 2, "unreadable": 1, "no supervised tokens": 2, "no image": 1}
    found = rows(tmp_path / "store")
    assert {name: (row["status"], row["truncated"]) for name, row in found.items()} == {
        "image-0": ("compared", False),
        "corrupt": ("unreadable", False),
        "empty answer": ("no supervised tokens", False),
        "answer cut off": ("no supervised tokens", True),
        "answer cut short": ("compared", True),
        "text-0": ("no image", False),
    }
    assert found["answer cut short"]["num_tokens"] > 100
    # and training takes no notice of those that are marked
    settings = ("--optim.max_steps", "2", "--objective.feedback_store")
    stored = (*settings, str(tmp_path / "store"), "--output.dir", str(tmp_path / "stored"))
    config = configuration(root, 4, *sources, "--data.on_bad_sample", "skip", *stored)
    direct = replace(
        config,
        objective=replace(config.objective, feedback_store=None),
        output=replace(config.output, dir=str(tmp_path / "direct")),
    )
    assert losses(run.run_stage(config)) == pytest.approx(losses(run.run_stage(direct)), abs=1e-5)


def test_levels_that_see_different_tokens_are_not_compared():
    item = {"unreadable": False, "pixel_values": [torch.zeros(1)]}
    assert feedback._status(item, feedback.Answer([-1.0, -2.0], [3, 3])) == "compared"
    assert feedback._status(item, feedback.Answer([-1.0, -2.0], [3, 2])) == "cut off"


def test_a_log_probability_that_is_not_finite_names_its_sample(root, tmp_path):
    broken = shutil.copytree(root / "stage3", tmp_path / "stage3")
    weights = load_file(broken / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"] * float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    forget_checksums(broken)
    config = configuration(root, 4, "--model.start", str(broken))
    with pytest.raises(FeedbackError, match=r"answer of sample '.*' .* is \[nan.*levels \[4, 8"):
        collect(config, tmp_path / "store", num_processes=1)


def test_command(root, store, tmp_path, capsys):
    """A complete store is not changed, and its counts are reported."""
    configuration(root, 4, "--logging.progress_bar", "false")
    before = contents(store)
    command = ["feedback", "--config", str(root / "stage4.yaml"), "--output", str(store)]
    assert cli.main([*command, "--num-processes", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "output": str(store),
        "num_samples": NUM_SAMPLES,
        "num_shards": NUM_SAMPLES,
        "num_missing_shards": 0,
        "counts": {"compared": NUM_IMAGE_SAMPLES, "no image": NUM_TEXT_SAMPLES},
    }
    assert contents(store) == before
    assert cli.main(command) == 0
    assert "17 samples" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main([*command, "--num-processes", "0"])
    assert "is not a whole number of at least 1" in capsys.readouterr().err


def test_only_stage_4_has_feedback(root, tmp_path):
    with pytest.raises(ConfigError, match="configuration is of stage 3"):
        collect(configuration(root, 3), tmp_path / "store")
    with pytest.raises(ConfigError, match=r"feedback_store is for stage 4.*stage 3"):
        configuration(root, 3, "--objective.feedback_store", "somewhere")


# ---- training from a store ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def direct(root) -> Path:
    """Stage 4 without a store."""
    return run.run_stage(configuration(root, 4, "--output.dir", str(root / "direct")))


def test_the_router_learns_the_same_from_a_store(root, store, direct):
    stored = ("--objective.feedback_store", str(store), "--output.dir", str(root / "stored"))
    folder = run.run_stage(configuration(root, 4, *stored))
    assert losses(folder) == pytest.approx(losses(direct), abs=1e-5)
    assert len(set(losses(folder))) == 4
    parent, expected, found = (load_model(path).state_dict() for path in (root / "stage3", direct, folder))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
        if not name.startswith("model.router."):
            assert torch.equal(found[name], parent[name])
    assert any(not torch.equal(found[name], parent[name]) for name in parent)
    files = {path.name for path in direct.iterdir() if path.name != "optimizer.pt"}
    assert {path.name for path in folder.iterdir()} == files
    for name in ("config.json", "generation_config.json", "tokenizer.json", "processor_config.json"):
        assert (folder / name).read_text() == (direct / name).read_text()


def test_no_language_model_is_in_memory(root, store):
    model, _ = assembly.build_model(configuration(root, 4, "--objective.feedback_store", str(store)))
    assert isinstance(model, RoutingModel)
    language = {name for name, _ in model.named_parameters() if name.startswith(("model.language_model", "lm_head"))}
    assert language == {"model.language_model.embed_tokens.weight", "model.language_model.norm.weight"}
    whole = load_model(root / "stage3")
    assert {name for name, _ in whole.named_parameters()} > {name for name, _ in model.named_parameters()}
    assert model.config.to_dict() == whole.config.to_dict()


def test_a_run_from_a_store_is_resumed(root, store, direct, tmp_path, monkeypatch):
    settings = ("--objective.feedback_store", str(store), "--output.dir", str(tmp_path / "run"))
    config = configuration(root, 4, *settings, "--output.save_every", "1")
    compute_loss = run.StageTrainer.compute_loss

    def interrupt(trainer, *arguments, **settings):
        if trainer.state.global_step == 2:
            raise KeyboardInterrupt
        return compute_loss(trainer, *arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(run.StageTrainer, "compute_loss", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run.run_stage(config)
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert load_model(checkpoint).state_dict().keys() == load_model(direct).state_dict().keys()
    run.run_stage(config)
    assert losses(tmp_path / "run") == pytest.approx(losses(direct), abs=1e-5)


def test_one_store_serves_every_sweep(root, store, tmp_path):
    """Other k, levels, loss weights and reduction; fewer samples in another order."""
    sweep = {
        "model.router": "{num_text_tokens: 9, num_attention_heads: 4}",
        "model.granularities": "[4, 16, 64]",
        "objective.feedback_store": str(store),
        "objective.rank_loss_weight": "0",
        "objective.feedback": "sum",
        "objective.tie_tolerance": "0.1",
        "data.sources": f"[{{path: {root / 'instruct.json'}, sampling: 'random:9'}}]",
        "output.dir": str(tmp_path / "stored"),
    }
    config = configuration(root, 4, *(word for key, value in sweep.items() for word in (f"--{key}", value)))
    folder = run.run_stage(config)
    assert read_manifest(folder).finished
    found = load_model(folder)
    assert (found.config.router_config.num_text_tokens, found.config.granularities) == (9, [4, 16, 64])
    assert found.model.router.voter.shape == (4 + 16 + 64 + 9, 1)
    direct = replace(config, objective=replace(config.objective, feedback_store=None))
    direct = replace(direct, output=replace(config.output, dir=str(tmp_path / "direct")))
    assert losses(folder) == pytest.approx(losses(run.run_stage(direct)), abs=1e-5)
    for name, tensor in load_model(tmp_path / "direct").state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def test_the_routers_weights_do_not_matter_to_a_store(root, store, tmp_path):
    other = shutil.copytree(root / "stage3", tmp_path / "stage3")
    weights = load_file(other / "model.safetensors")
    weights["model.router.voter"] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    forget_checksums(other)
    overrides = ("--model.start", str(other), "--objective.feedback_store", str(store), "--optim.max_steps", "1")
    run.run_stage(configuration(root, 4, *overrides, "--output.dir", str(tmp_path / "run")))


@pytest.mark.parametrize("levels", ["[4, 16]", "[64, 4]", "[4, 12, 64]", "[]"])
def test_levels_that_the_start_does_not_offer(root, levels):
    with pytest.raises(ConfigError, match=r"model\.granularities .* some of the levels of model\.start"):
        assembly.build_model(configuration(root, 4, "--model.granularities", levels))


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("weights", r"of other model weights \(the router apart\)\. Collect it in another folder"),
        ("architecture", "a model of another configuration"),
        ("tokenizer", "another tokenizer or other image settings"),
        ("template", "data.template vicuna_v1, not plain"),
        ("max_length", "model.max_length 4096, not 100"),
        ("precision", "runtime.precision fp32, not bf16"),
        ("data", r"instruct\.json is not among its files, or has changed since"),
    ],
)
def test_feedback_of_something_else_is_refused(root, store, tmp_path, part, message):
    other = shutil.copytree(root / "stage3", tmp_path / "stage3")
    data = root / "instruct.json"
    if part == "weights":
        weights = load_file(other / "model.safetensors")
        weights["model.language_model.layers.0.mlp.up_proj.weight"][0, 0] += 1
        save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    elif part == "architecture":
        fields = json.loads((other / "config.json").read_text())
        (other / "config.json").write_text(json.dumps({**fields, "behavior": "released"}))
    elif part == "tokenizer":
        settings = (other / "processor_config.json").read_text()
        assert '"resample": 3' in settings
        (other / "processor_config.json").write_text(settings.replace('"resample": 3', '"resample": 2'))
    elif part == "data":
        data = root / "images" / "instruct.json"
        data.write_text((root / "instruct.json").read_text().replace("Is it big?", "Is it large?"))
    elif part == "template":
        data = root / "captions.json"
    overrides = {
        "model.start": str(other),
        "objective.feedback_store": str(store),
        "data.sources": f"[{{path: {data}, image_root: {root}}}]",
        "output.dir": str(tmp_path / "run"),
        **{"template": {"data.template": "plain"}, "max_length": {"model.max_length": "100"}}.get(part, {}),
        **({"runtime.precision": "bf16"} if part == "precision" else {}),
    }
    config = configuration(root, 4, *(word for key, value in overrides.items() for word in (f"--{key}", value)))
    with pytest.raises(ConfigError, match=message):
        run.run_stage(config)
    if part == "data":
        message = "it is of other data files"
    with pytest.raises(ConfigError, match=message):
        collect(config, store, num_processes=1)


def test_samples_that_are_not_in_the_store_are_named(root, tmp_path):
    few = f"[{{path: {root / 'instruct.json'}, sampling: 'first:3'}}]"
    collect(configuration(root, 4, "--data.sources", few), tmp_path / "few", num_processes=1)
    stored = ("--objective.feedback_store", str(tmp_path / "few"), "--output.dir", str(tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"lacks 14 of 17 samples, the first of them sample 'image-3'"):
        run.run_stage(configuration(root, 4, *stored))
    with pytest.raises(ConfigError, match="another selection of samples"):
        collect(configuration(root), tmp_path / "few", num_processes=1)


def test_what_is_no_store_is_refused(root, tmp_path):
    stored = ("--objective.feedback_store", str(tmp_path), "--output.dir", str(tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"holds no feedback.*avg-llava feedback --config"):
        run.run_stage(configuration(root, 4, *stored))
    (tmp_path / "notes.txt").write_text("something else lives here")
    with pytest.raises(ConfigError, match="holds no feedback"):
        collect(configuration(root), tmp_path, num_processes=1)
    (tmp_path / "store.json").write_text('{"levels": [1]}')
    with pytest.raises(ConfigError, match="not the manifest of a feedback store"):
        collect(configuration(root), tmp_path, num_processes=1)
