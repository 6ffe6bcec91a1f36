"""`avg-llava verify-data` on a configuration, and training with the skip list it writes."""

import json
import re

import pytest
import yaml

from avg_llava import cli
from avg_llava.data.records import DataError
from avg_llava.training import run
from avg_llava.training.checkpoint import read_manifest
from avg_llava.training.config import load_config
from tests.tiny import stage_values, write_backbones, write_data


@pytest.fixture
def path(tmp_path):
    """Stage 1, with one truncated image."""
    write_backbones(tmp_path)
    write_data(tmp_path, num_samples=6, num_text_only=0)
    (tmp_path / "images/3.png").write_bytes((tmp_path / "images/3.png").read_bytes()[:90])
    values = stage_values(1, tmp_path, tmp_path)
    values["data"]["sources"][0] |= {"expected": {"total": 6, "images": 7, "(text only)": 2}}
    values["optim"] |= {"max_steps": None, "global_batch_size": 6, "micro_batch_size": 3}
    (tmp_path / "stage1.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "stage1.yaml"


def test_command(path, tmp_path, capsys):
    command = ["verify-data", "--config", str(path), "--num-processes", "1"]
    assert cli.main(command) == 1
    output = capsys.readouterr().out
    assert "captions.json: 6 records" in output
    assert "position 3: unreadable:" in output
    assert "images/3.png" in output
    assert "--output" in output
    assert re.search(r"unlike expected: images +6 instead of about 7\n", output)
    assert re.search(r"unlike expected: \(text only\) +0 instead of about 2\n", output)
    assert "unlike expected: total" not in output

    with pytest.raises(DataError, match=r"3\.png"):
        run.run_stage(load_config(path))
    assert cli.main([*command, "--output", str(tmp_path / "skip.json"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["num_skipped"], facts["skip_list"]) == (1, str(tmp_path / "skip.json"))
    assert facts["sources"][0]["groups"] == {"images": 6}
    assert facts["sources"][0]["problems"] == {"unreadable": 1}
    assert facts["sources"][0]["unexpected"] == {"images": 6, "(text only)": 0}

    values = stage_values(2, tmp_path, tmp_path)  # whose start is not trained yet
    values["data"]["sources"][0]["weight"] = 0.5  # of any seed
    (tmp_path / "stage2.yaml").write_text(yaml.safe_dump(values))
    later = ["verify-data", "--config", str(tmp_path / "stage2.yaml"), "--model-of", str(path)]
    assert cli.main(later) == 1
    assert "instruct.json: 6 records" in capsys.readouterr().out
    assert cli.main(later[:3]) == 1
    assert "name stage 1's file with --model-of" in capsys.readouterr().err

    folder = run.run_stage(load_config(path, ["--data.skip_list", str(tmp_path / "skip.json"), "--output.overwrite"]))
    assert read_manifest(folder).finished
