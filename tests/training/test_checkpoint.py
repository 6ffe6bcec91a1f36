import json

import pytest

from avg_llava.common.machine import library_versions
from avg_llava.common.settings import ConfigError
from avg_llava.training.checkpoint import (
    StageManifest,
    changed_keys,
    check_start,
    latest_checkpoint,
    make_universal,
    read_manifest,
    write_manifest,
)


def _manifest(stage: int = 2, finished: bool = True, step: int = 10) -> StageManifest:
    return StageManifest(stage, finished, step, {}, "abc", {"seed": 1}, world_size=2)


def test_round_trip(tmp_path):
    manifest = _manifest()
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    assert [path.name for path in tmp_path.iterdir()] == ["stage.json"]
    assert set(library_versions()) >= {"python", "torch", "transformers"}


def test_no_manifest(tmp_path):
    assert read_manifest(tmp_path) is None
    (tmp_path / "stage.json").write_text(json.dumps({"stage": 1, "unknown": 2}))
    with pytest.raises(ConfigError, match=r"stage\.json is not a stage manifest"):
        read_manifest(tmp_path)


def test_a_finished_parent_is_accepted(tmp_path):
    write_manifest(tmp_path, _manifest(stage=2))
    parent = check_start(str(tmp_path), stage=3, parent_stage=2, force=False)
    assert (parent["path"], parent["stage"]) == (str(tmp_path), 2)
    assert parent["created"]


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (None, "has no stage.json"),
        (_manifest(stage=1), "holds stage 1"),
        (_manifest(stage=3), "holds stage 3"),
        (_manifest(finished=False), "checkpoint at step 10 of an unfinished run"),
    ],
)
def test_other_starts_are_refused_unless_forced(tmp_path, manifest, message):
    if manifest is not None:
        write_manifest(tmp_path, manifest)
    with pytest.raises(ConfigError) as error:
        check_start(str(tmp_path), stage=3, parent_stage=2, force=False)
    assert message in str(error.value)
    assert "--force-start" in str(error.value)
    assert check_start(str(tmp_path), stage=3, parent_stage=2, force=True)["path"] == str(tmp_path)


def test_the_name_of_a_folder_means_nothing(tmp_path):
    misnamed = tmp_path / "stage2"
    misnamed.mkdir()
    write_manifest(misnamed, _manifest(stage=1))
    with pytest.raises(ConfigError, match="holds stage 1"):
        check_start(str(misnamed), stage=3, parent_stage=2, force=False)


def test_latest_checkpoint_ignores_incomplete_ones(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    for step in (9, 10, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-old").mkdir()
    assert latest_checkpoint(tmp_path) is None
    for step in (9, 10):
        write_manifest(tmp_path / f"checkpoint-{step}", _manifest(finished=False, step=step))
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_changed_keys_names_what_matters():
    before = {"seed": 1, "optim": {"lr": 1e-3, "eps": 1e-8}, "output": {"dir": "a"}, "data": {"num_workers": 1}}
    after = {"seed": 1, "optim": {"lr": 2e-3, "eps": 1e-8}, "output": {"dir": "b"}, "data": {"num_workers": 4}}
    assert changed_keys(before, after) == ["optim.lr: 0.001 -> 0.002"]
    assert changed_keys(before, before) == []
    assert changed_keys(before, {**before, "extra": 1}) == ["extra: None -> 1"]
    source = {"path": "a.json", "weight": 1.0, "license": None}
    licensed, weighed = source | {"license": "mit"}, source | {"weight": 2.0}
    assert changed_keys({"data": {"sources": [source]}}, {"data": {"sources": [licensed]}}) == []
    changes = changed_keys(
        {"data": {"sources": [source]}}, {"data": {"sources": [source, source | {"path": "b.json"}]}}
    )
    assert "data.sources.1.path: None -> b.json" in changes
    changes = changed_keys({"data": {"sources": [source]}}, {"data": {"sources": [weighed]}})
    assert changes == ["data.sources.0.weight: 1.0 -> 2.0"]


def test_a_checkpoint_that_cannot_be_converted(tmp_path):
    (tmp_path / "latest").write_text("global_step4")
    (tmp_path / "global_step4").mkdir()
    with pytest.raises(ConfigError, match=r"could not be converted .*global_step4.* as many processes as wrote it"):
        make_universal(tmp_path)
    assert not (tmp_path / "latest_universal").exists()


def test_a_checkpoint_is_converted_once(tmp_path):
    (tmp_path / "universal.done").touch()
    make_universal(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["universal.done"]
