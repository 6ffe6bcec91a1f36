"""Fixtures shared by several folders of tests: the golden checkpoint and batches of golden images."""

import pytest
import torch
from safetensors.torch import load_file

from avg_llava import AvgLlavaForConditionalGeneration, load_model
from tests.parity.golden import GOLDEN, ORIGINAL_IMAGE_TOKEN, SIZES


@pytest.fixture(scope="session")
def released_model() -> AvgLlavaForConditionalGeneration:
    """The golden checkpoint in the original format, through the public loader."""
    model = load_model(GOLDEN / "checkpoint")
    assert model.config.behavior == "released"
    assert model.dtype == torch.float32
    return model


@pytest.fixture(scope="session")
def pixels() -> dict[str, torch.Tensor]:
    tensors = load_file(GOLDEN / "D_merge.safetensors")
    return {name: tensors[f"{name}/pixel_values"] for name in SIZES}


@pytest.fixture(scope="session")
def batch_inputs(released_model, pixels):
    """Builds model inputs from golden ids and image names: placeholders renamed, crops padded, sizes swapped."""

    def build(input_ids: torch.Tensor, images: list[str], attention_mask=None, labels=None) -> dict:
        ids = input_ids.clone().reshape(-1, input_ids.shape[-1])
        ids[ids == ORIGINAL_IMAGE_TOKEN] = released_model.config.image_token_id
        inputs = {"input_ids": ids}
        inputs["attention_mask"] = torch.ones_like(ids) if attention_mask is None else attention_mask.long()
        if labels is not None:
            inputs["labels"] = labels.reshape(ids.shape)
        if images:
            crops = torch.nn.utils.rnn.pad_sequence([pixels[name] for name in images], batch_first=True)
            inputs["pixel_values"] = crops
            inputs["image_sizes"] = torch.tensor([SIZES[name][::-1] for name in images])
        return inputs

    return build
