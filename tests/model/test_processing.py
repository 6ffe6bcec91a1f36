import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    LlavaNextImageProcessorPil,
)

from avg_llava import AvgLlavaConfig, AvgLlavaProcessor
from avg_llava.data.encoding import render_conversation
from avg_llava.data.records import Turn
from avg_llava.model.images import load_image
from avg_llava.model.processing import AvgLlavaImageProcessor, tokenize_with_images
from tests.parity.golden import GOLDEN
from tests.tiny import language_config, tiny_config, vision_config

TOKENIZER = GOLDEN / "tokenizer_tiny"


@pytest.fixture(scope="module")
def config() -> AvgLlavaConfig:
    return tiny_config(vision_config(patch_size=8), language_config(vocab_size=512))


@pytest.fixture
def processor(config) -> AvgLlavaProcessor:
    return AvgLlavaProcessor.from_backbones(None, TOKENIZER, config)


def picture(width: int = 50, height: int = 40) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


class TestCall:
    def test_one_prompt_and_image(self, processor):
        inputs = processor(images=picture(), text="<image>\nWhat?")
        assert inputs.keys() == {"input_ids", "attention_mask", "pixel_values", "image_sizes"}
        assert inputs["input_ids"].tolist()[0][:2] == [1, 512]  # one BOS, then one placeholder
        assert inputs["input_ids"].tolist()[0].count(1) == 1
        assert inputs["pixel_values"].shape == (1, 5, 3, 32, 32)
        assert inputs["image_sizes"].tolist() == [[40, 50]]

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_prompts_of_many_lengths_and_images(self, processor, side):
        prompts = ["<image>\nWhat is it?", "Hi", "<image> <image>"]
        images = [picture(30, 10), picture(), picture(90, 90)]
        inputs = processor(images=images, text=prompts, padding_side=side)
        for prompt, ids, mask in zip(prompts, inputs["input_ids"], inputs["attention_mask"], strict=True):
            alone = tokenize_with_images(prompt, processor.tokenizer, 512).input_ids
            assert ids[mask.bool()].tolist() == alone
            padding = ids[: -len(alone)] if side == "left" else ids[len(alone) :]
            assert set(padding.tolist()) <= {processor.tokenizer.pad_token_id}
        assert inputs["pixel_values"].shape == (3, 5, 3, 32, 32)
        assert inputs["image_sizes"].tolist() == [[10, 30], [40, 50], [90, 90]]
        assert bool((inputs["pixel_values"][0, 3:] == 0).all())
        nested = processor(images=[[images[0]], [], images[1:]], text=prompts, padding_side=side)
        assert nested["pixel_values"].equal(inputs["pixel_values"])

    def test_text_only(self, processor):
        for images in (None, [], [[]]):
            assert processor(images=images, text="Hi").keys() == {"input_ids", "attention_mask"}

    def test_arrays_and_greyscale(self, processor):
        image = picture()
        inputs = processor(images=[image, np.asarray(image)], text="<image><image>")
        assert inputs["pixel_values"][0].equal(inputs["pixel_values"][1])
        assert processor(images=image.convert("L"), text="<image>")["pixel_values"].shape == (1, 5, 3, 32, 32)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({}, "text is missing"),
            ({"text": "<image>"}, "1 <image> placeholders, but 0 images"),
            ({"text": "Hi", "images": picture()}, "0 <image> placeholders, but 1 images"),
            ({"text": ["<image>", "Hi"], "images": [[], [picture()]]}, r"\[1, 0\] .* \[0, 1\] images"),
            ({"text": ["Hi", "Hello you"], "padding": False}, "differ in length"),
            ({"text": "Hi", "padding_side": "up"}, "padding_side"),
            ({"text": "Hi", "return_tensors": "np"}, "return_tensors"),
            ({"text": "Hi", "videos": [picture()]}, "no videos"),
        ],
    )
    def test_refusals(self, processor, arguments, message):
        with pytest.raises(ValueError, match=message):
            processor(**arguments)


def chat(*turns: Turn, parts: bool) -> list[dict]:
    roles = {"human": "user", "gpt": "assistant"}
    if not parts:
        return [{"role": roles[turn.role], "content": turn.value} for turn in turns]
    messages = []
    for turn in turns:
        content = []
        for number, piece in enumerate(turn.value.split("<image>\n")):
            content += [{"type": "image"}] * bool(number)
            content += [{"type": "text", "text": piece}] * bool(piece)
        messages.append({"role": roles[turn.role], "content": content})
    return messages


HUMAN, MODEL = "human", "gpt"


@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize(
    "turns",
    [
        [Turn(HUMAN, "<image>\nWhat?")],
        [Turn(HUMAN, "What?"), Turn(MODEL, "A car."), Turn(HUMAN, "<image>\nSure?")],
        [Turn(HUMAN, "Is it this? <image>\n"), Turn(MODEL, 'Yes & <no> "4" {{ x }}'), Turn(HUMAN, " spaced ")],
        [Turn(HUMAN, "<image>\n<image>\nWhich?"), Turn(MODEL, "Both.")],
        [Turn(HUMAN, "<image>\n")],
        [Turn(HUMAN, "<image>\nSay nothing."), Turn(MODEL, ""), Turn(HUMAN, "Now speak."), Turn(MODEL, "OK.")],
    ],
)
def test_chat_template_is_the_training_format(processor, turns, parts):
    prompt = processor.apply_chat_template(chat(*turns, parts=parts), add_generation_prompt=False)
    assert prompt == render_conversation(turns, "vicuna_v1", processor.tokenizer).text
    if turns[-1].role == HUMAN:
        asked = processor.apply_chat_template(chat(*turns, parts=parts), add_generation_prompt=True)
        assert asked == prompt + "ASSISTANT:"


class TestChatTemplate:
    def test_system_message(self, processor):
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
        assert processor.apply_chat_template(messages, add_generation_prompt=True) == "Be brief. USER: Hi ASSISTANT:"

    def test_other_roles_are_refused(self, processor):
        with pytest.raises(Exception, match="role must be user or assistant"):
            processor.apply_chat_template([{"role": "tool", "content": "x"}])

    def test_tokenize(self, processor):
        content = [{"type": "image", "image": picture()}, {"type": "text", "text": "What?"}]
        messages = [{"role": "user", "content": content}]
        direct = processor(images=picture(), text=processor.apply_chat_template(messages, add_generation_prompt=True))
        inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
        assert inputs.keys() == direct.keys()
        assert all(inputs[name].equal(direct[name]) for name in direct)

    def test_tokenize_a_prompt_that_begins_with_a_bos(self, processor):
        messages = [{"role": "user", "content": "What?"}]
        options = {"chat_template": "{{ bos_token }}USER: What?", "tokenize": True, "return_dict": True}
        ids = processor.apply_chat_template(messages, **options)["input_ids"]
        assert (ids == processor.tokenizer.bos_token_id).sum() == 1


class TestFiles:
    @pytest.mark.parametrize("legacy", [True, False])
    @pytest.mark.parametrize("loader", [AvgLlavaProcessor, AutoProcessor])
    def test_round_trip(self, config, tmp_path, legacy, loader):
        tokenizer = AutoTokenizer.from_pretrained(TOKENIZER, legacy=legacy)
        image_processor = AvgLlavaProcessor.from_backbones(None, TOKENIZER, config).image_processor
        image_processor.image_mean = (0.1, 0.2, 0.3)
        saved = AvgLlavaProcessor(image_processor, tokenizer, 512, chat_template="{{ messages[0]['content'] }}")
        saved.save_pretrained(tmp_path)
        loaded = loader.from_pretrained(tmp_path)
        assert type(loaded) is AvgLlavaProcessor
        assert type(loaded.image_processor) is AvgLlavaImageProcessor
        assert type(AutoImageProcessor.from_pretrained(tmp_path)) is AvgLlavaImageProcessor
        assert loaded.to_dict() == saved.to_dict()
        assert loaded.image_token_id == 512
        assert loaded.chat_template == saved.chat_template
        text = "<image>\nWhat é 你? USER: a</s>USER: b</s> <image> c"
        before, after = (p(images=[picture(), picture()], text=text) for p in (saved, loaded))
        assert all(before[name].equal(after[name]) for name in before)
        # The choice between the two id patterns after </s> survives.
        tokens = loaded.tokenizer.convert_ids_to_tokens(after["input_ids"][0].tolist())
        assert (tokens[tokens.index("</s>") + 1] == "USER") is not legacy

    def test_pixel_statistics_are_the_towers(self, config, tmp_path):
        stored = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25], "crop_size": 224, "resample": 2}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(stored))
        image_processor = AvgLlavaProcessor.from_backbones(tmp_path, TOKENIZER, config).image_processor
        assert list(image_processor.image_mean) == [0.5, 0.5, 0.5]
        assert list(image_processor.image_std) == [0.25, 0.25, 0.25]
        assert image_processor.resample == 2
        assert image_processor.crop_size.height == 32  # the model's, not the file's

    def test_checkpoints_of_other_formats(self, config, tmp_path, processor):
        """A folder with a tokenizer and another class's processor gets the configuration's crops and pinpoints."""
        processor.tokenizer.save_pretrained(tmp_path)
        foreign = {"processor_class": "LlavaNextProcessor", "patch_size": 14}
        (tmp_path / "processor_config.json").write_text(json.dumps(foreign))
        stored = {"image_processor_type": "LlavaNextImageProcessor", "image_mean": [0.5] * 3, "size": 336}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(stored))
        loaded = AvgLlavaProcessor.from_checkpoint(tmp_path, config)
        assert list(loaded.image_processor.image_mean) == [0.5] * 3
        assert loaded.image_processor.image_grid_pinpoints == config.image_grid_pinpoints
        assert loaded.image_token_id == 512
        assert loaded(images=picture(), text="<image>")["pixel_values"].shape == (1, 5, 3, 32, 32)

    @pytest.mark.parametrize("loader", [AvgLlavaProcessor, AutoProcessor])
    def test_code_in_a_checkpoint_is_not_run(self, processor, tmp_path, loader):
        processor.save_pretrained(tmp_path)
        (tmp_path / "evil.py").write_text("import sys\nsys.evil_was_run = True\n")
        for name in ("processor_config.json", "tokenizer_config.json"):
            content = json.loads((tmp_path / name).read_text())
            content["auto_map"] = {
                "AutoProcessor": "evil.P",
                "AutoImageProcessor": "evil.I",
                "AutoTokenizer": ["evil.T", "evil.T"],
            }
            content["trust_remote_code"] = True
            (tmp_path / name).write_text(json.dumps(content))
        loaded = loader.from_pretrained(tmp_path, trust_remote_code=True)
        assert type(loaded) is AvgLlavaProcessor
        assert not hasattr(sys, "evil_was_run")

    def test_a_tokenizer_without_padding_gets_one(self, config, tmp_path):
        tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
        tokenizer.pad_token = None
        tokenizer.save_pretrained(tmp_path)
        loaded = AvgLlavaProcessor.from_backbones(None, tmp_path, config)
        assert loaded.tokenizer.pad_token_id == loaded.tokenizer.unk_token_id == 0


class TestAgainstTransformers:
    """The same pixels as transformers' own processor, where Pillow resizes both in one order."""

    SETTINGS = {
        "size": {"shortest_edge": 32},
        "crop_size": {"height": 32, "width": 32},
        "image_grid_pinpoints": [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]],
    }

    def compare(self, images, **settings):
        theirs = LlavaNextImageProcessorPil(**self.SETTINGS, **settings)(images, return_tensors="pt")
        ours = AvgLlavaImageProcessor(**self.SETTINGS, **settings)(images, return_tensors="pt")
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert ours[name].dtype == value.dtype
            torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-6)

    def test_sizes(self):
        sizes = [(1, 1), (1, 7), (31, 32), (32, 32), (33, 32), (64, 64), (65, 63), (97, 32), (32, 97), (200, 11)]
        sizes += [(int(width), int(height)) for width, height in np.random.default_rng(0).integers(1, 300, (40, 2))]
        wide = [(width, height) for width, height in sizes if height - 32 <= 2 * max(width - 64, 0)]
        assert len(wide) > 25
        self.compare([picture(*size) for size in wide])
        for size in wide[:12]:  # each by itself, with no crop to fill up to
            self.compare([picture(*size)])

    @pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "HSV"])
    def test_modes(self, mode):
        image = picture(90, 40)
        image.putalpha(Image.linear_gradient("L").resize(image.size))
        self.compare([image.convert(mode) if mode != "PA" else image.convert("P").convert("PA")])

    def test_transparent_colour(self):
        for image in (picture(90, 40), picture(90, 40).convert("L")):
            image.info["transparency"] = image.getpixel((3, 3))
            self.compare([image])

    def test_orientation_is_left_alone(self, tmp_path):
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by a quarter
        picture(90, 40).save(tmp_path / "a.jpg", exif=exif, quality=95)
        self.compare([Image.open(tmp_path / "a.jpg")])
        self.compare([load_image(tmp_path / "a.jpg")])

    @pytest.mark.parametrize(
        "settings",
        [
            {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "resample": 2},
            {"do_normalize": False, "rescale_factor": 0.0123},
            {"do_rescale": False},
            {"do_rescale": False, "do_normalize": False},
        ],
    )
    def test_settings(self, settings):
        self.compare([picture(90, 40), picture(64, 64)], **settings)

    def test_arrays(self):
        pixels = np.asarray(picture(90, 40))
        self.compare([pixels, pixels.astype(np.float32), pixels[..., :1], torch.tensor(pixels)])

    def test_refusals(self):
        with pytest.raises(ValueError, match="whole numbers from 0 to 255"):
            AvgLlavaImageProcessor(**self.SETTINGS)([np.full((40, 90, 3), 0.5)], return_tensors="pt")
        with pytest.raises(ValueError, match="equal squares"):
            AvgLlavaImageProcessor(**self.SETTINGS | {"size": {"shortest_edge": 30}})([picture()], return_tensors="pt")


def test_pinpoint_order_settles_ties(config):
    """An image no larger than a crop fits 1x2 and 2x1 tiles equally; the first listed wins."""
    seen = []
    for pinpoints in ([[32, 64], [64, 32]], [[64, 32], [32, 64]]):
        changed = AvgLlavaConfig(**{**config.to_dict(), "image_grid_pinpoints": pinpoints})
        image_processor = AvgLlavaProcessor.from_backbones(None, TOKENIZER, changed).image_processor
        white = Image.new("RGB", (30, 30), (255, 255, 255))
        tiles = image_processor([white], return_tensors="pt")["pixel_values"][0, 1:]  # (2, 3, 32, 32)
        seen.append((tiles[:, 0, 20, 0] > 0).tolist())
    # On two tiles side by side the image begins in the middle of the first and reaches the left edge of the second; on
    # two above one another it fills rows 16 to 47, so row 20 of the first and not of the second.
    assert seen == [[False, True], [True, False]]
