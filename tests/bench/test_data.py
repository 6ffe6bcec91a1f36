"""`avg-llava bench data`: shapes, ratios and variants. No time is asserted."""

import json
from io import BytesIO

import pytest
import torch
from PIL import Image

from avg_llava.bench import data as bench
from avg_llava.cli import main


def test_command(capfd, monkeypatch):
    monkeypatch.setattr(bench.bench_data, "__defaults__", (((640, 480), (1008, 336)), 7))
    threads = torch.get_num_threads()
    assert main(["bench", "data", "--repeats", "1", "--json"]) == 0
    assert torch.get_num_threads() == threads
    result = json.loads(capfd.readouterr().out)
    assert [row["crops"] for row in result["rows"]] == [5, 4]
    assert result["max_pixel_difference"] <= 1e-6
    for row in result["rows"]:
        assert row["ratio"] == pytest.approx(row["ours_images_per_s"] / row["baseline_images_per_s"])
        assert row["bound"] == pytest.approx(row["decode_images_per_s"] / row["baseline_images_per_s"])
    slower, faster = (sum(1 / row[f"{name}_images_per_s"] for row in result["rows"]) for name in ("baseline", "ours"))
    assert result["ratio"] == pytest.approx(slower / faster)
    assert result["settings"]["repeats"] == 1
    assert "processor" in result["machine"]
    lines = bench.table_lines(result)
    assert len(lines) == 6
    assert f"{result['ratio']:.2f}x" in lines[-1]


def test_photographs_have_a_realistic_size():
    content = bench.photograph(1152, 864)
    assert content == bench.photograph(1152, 864)
    with Image.open(BytesIO(content)) as image:
        assert (image.format, image.size) == ("JPEG", (1152, 864))
    assert 1.5 < 8 * len(content) / (1152 * 864) < 4  # bits per pixel


def test_variants_compute_what_they_are_named_after():
    variants = bench.make_variants(bench.photograph(640, 480))
    assert variants["decode"]().size == (640, 480)
    assert variants["ours"]().equal(variants["baseline"]())
