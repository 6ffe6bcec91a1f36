"""Golden A, B, C and I: scaler, text filter, router, parameter counts."""

import json

import pytest
import torch

from avg_llava import AvgLlavaConfig, AvgLlavaForConditionalGeneration
from avg_llava.checkpoints.formats import KNOWN_TOWERS
from avg_llava.model.router import filter_text
from avg_llava.model.scaler import WidthFirstLadder
from tests.parity.golden import GOLDEN, golden

A, A_JSON = golden("A_scaler")
B, B_JSON = golden("B_text_filter")
C, C_JSON = golden("C_router")


@pytest.mark.parametrize("granularity", [36, 72, 144, 288])
@pytest.mark.parametrize("kind", ["random", "coord"])
def test_scaler(kind, granularity):
    pooled = WidthFirstLadder(24).pool(A[f"in/{kind}"], granularity)
    torch.testing.assert_close(pooled, A[f"out/{kind}/{granularity}"], rtol=0, atol=1e-6)


def test_scaler_grids():
    assert {str(g): list(WidthFirstLadder(24).grid(g)) for g in (36, 72, 144, 288, 576)} == A_JSON["grid_hw"]
    assert WidthFirstLadder(24).pool(A["in/random"], 576) is A["in/random"]


@pytest.mark.parametrize("case", B_JSON["cases"])
def test_text_filter_indices(case):
    """Indices of the instruction's tokens are exact; which masked tokens fill the rest is left to the sort."""
    about = B_JSON["cases"][case]
    text = B[f"in/{about['text']}"][: about["rows"]]
    mask = B[f"{case}/mask"].bool() if f"{case}/mask" in B else torch.ones(about["rows"], dtype=torch.bool)
    indices, valid = filter_text(text[None], mask[None], B["in/image"][None], B_JSON["k"])
    indices, valid = indices[0], valid[0]
    count = about["n_selected_valid"]
    assert int(valid.sum()) == count
    assert valid[:count].all()
    assert indices[:count].tolist() == about["indices"][:count]
    assert len(indices) == about["n_selected"]


@pytest.mark.parametrize("case", ["crop1", "crop3", "crop5", "crop3_valid20"])
def test_router_logits(released_model, case):
    image = case.split("_")[0]
    crops = C[f"{image}/image_features"]
    router = released_model.model.router
    mask = C[f"{case}/text_mask"]
    with torch.no_grad():
        logits = router(crops, [len(crops)], C[f"{image}/text"][None], mask[None])
    torch.testing.assert_close(logits, C[f"{case}/logits"], rtol=0, atol=1e-5)


def test_router_batch_of_images_equals_one_by_one(released_model):
    """Images with 1, 3 and 5 crops together: padding crops takes no part in attention across crops."""
    cases = ["crop1", "crop3", "crop5"]
    crops = [C[f"{case}/image_features"] for case in cases]
    with torch.no_grad():
        logits = released_model.model.router(
            torch.cat(crops),
            [len(crop) for crop in crops],
            torch.stack([C[f"{case}/text"] for case in cases]),
            torch.stack([C[f"{case}/text_mask"] for case in cases]),
        )
    expected = torch.cat([C[f"{case}/logits"] for case in cases])
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def test_parameter_counts_of_the_7b_model():
    """Exact counts at width 4096, on the meta device: 117,507,211 router parameters, 1.66% of LLaVA-NeXT-7B."""
    expected = json.loads((GOLDEN / "I_params.json").read_text())
    config = AvgLlavaConfig(vision_config=KNOWN_TOWERS["openai/clip-vit-large-patch14-336"], text_config=VICUNA_7B)
    with torch.device("meta"):
        model = AvgLlavaForConditionalGeneration(config)

    def count(part: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in part.parameters())

    router = count(model.model.router)
    assert {name: p.numel() for name, p in model.model.router.named_parameters()} == expected["by_parameter"]
    assert router == expected["router_total"] == 117_507_211
    assert count(model.model.vision_tower) == expected["clip_vision"]
    assert count(model.model.multi_modal_projector) == expected["projector"]
    assert count(model.model.language_model) + model.lm_head.weight.numel() == expected["llm"]
    assert count(model) - router == expected["llava_next_7b_total"]
    assert round(100 * router / (count(model) - router), 2) == 1.66


VICUNA_7B = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
