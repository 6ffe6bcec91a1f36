"""`avg-llava bench inference`: rows, operations and logits. No time is asserted."""

import json

import pytest
import torch

from avg_llava.bench import inference as bench
from avg_llava.bench.inference import BASELINE, Variant, Workload, make_variants
from avg_llava.cli import main
from avg_llava.training import flops


@pytest.fixture(scope="module")
def small():
    return Workload("mini", batch_size=3, image_size=(96, 70), num_prompt_tokens=9, new_tokens=2)


def test_command(capfd):
    assert main(["bench", "inference", "--preset", "mini", "--repeats", "1", "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    rows = {row["name"]: row for row in result["rows"]}
    assert len(rows) == 11
    finest, baseline = rows["forced 64"], rows[BASELINE]
    assert finest["visual_tokens"] == baseline["visual_tokens"]
    assert finest["gflop_by_part"]["language"] == baseline["gflop_by_part"]["language"]
    assert finest["gflop_by_part"]["vision"] < baseline["gflop_by_part"]["vision"]  # its last layer is not used
    for row in rows.values():
        assert row["gflop"] == pytest.approx(sum(row["gflop_by_part"].values()))
        assert row["speedup"] == pytest.approx(baseline["total_ms"] / row["total_ms"])
        assert row["bound_speedup"] == pytest.approx(baseline["gflop"] / row["gflop"])
        assert row["name"].startswith("routed") == (row["gflop_by_part"]["router"] > 0)
    shares = [rows[f"routed {level}"]["visual_tokens"] / finest["visual_tokens"] for level in (4, 8, 16, 32, 64)]
    assert result["paper_mix"]["token_share"] == pytest.approx(max(bench.PAPER_SHARE, shares[0]))
    assert result["settings"]["image_size"] == [96, 96]
    text = "\n".join(bench.table_lines(result))
    assert all(name in text for name in rows)


def test_batches_are_mixed_and_grouped():
    variants = {variant.name: variant for variant in make_variants([1, 2, 4], 5)}
    assert variants["mixed, padded together"].levels == (1, 2, 4, 1, 2)
    assert bench._groups(variants["mixed, padded together"]) == [[0, 1, 2, 3, 4]]
    assert bench._groups(variants["mixed, grouped by level"]) == [[0, 3], [1, 4], [2]]
    assert not any(name.startswith("mixed") for name in (variant.name for variant in make_variants([1, 2], 1)))


def test_operations_match_torch_s_counter(small):
    """All operations but attention, where the mask decides what is computed."""
    from torch.utils.flop_counter import FlopCounterMode

    for variant in (Variant("routed", (16,) * 3, routed=True), Variant(BASELINE, (64,) * 3, baseline=True)):
        with FlopCounterMode(display=False) as counter:
            small.run(variant)
        counted = counter.get_total_flops() / 1e9
        assert sum(small.flops(variant).values()) / 1e9 == pytest.approx(counted, rel=0.25)


def test_proportioned_has_the_shares_of_the_7b_model():
    """Tower and router take the same share of a routed answer at the finest level."""
    shares = {}
    for preset in ("proportioned", "7b"):
        config = bench.SHAPES[preset].config()
        parts = (flops.vision_flops(5, config), flops.router_flops(5, config), flops.language_flops([2952], config))
        shares[preset] = [part / sum(parts) for part in parts]
    assert shares["proportioned"] == pytest.approx(shares["7b"], rel=0.1)


def test_baseline_has_the_same_logits(small):
    """The baseline and the finest level read the same prompt: equal logits show that the work is the same."""
    model = small.model
    with torch.inference_mode():
        features = model.encode_images(small.pixels, small.sizes)
        mask = torch.ones_like(small.input_ids)
        spliced = model.splice(features, small.input_ids, mask, granularity=[64] * 3)
        ours = model(inputs_embeds=spliced.inputs_embeds, attention_mask=spliced.attention_mask).logits[:, -1]
        theirs = small.baseline(
            input_ids=small.expanded,
            attention_mask=torch.ones_like(small.expanded),
            pixel_values=small.pixels,
            image_sizes=small.sizes,
        ).logits[:, -1]
    torch.testing.assert_close(ours, theirs[:, : ours.shape[1]], atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_7b_preset_needs_a_gpu(capsys):
    assert main(["bench", "inference", "--preset", "7b"]) == 1
    assert "needs a GPU; on a CPU, --preset proportioned" in capsys.readouterr().err
