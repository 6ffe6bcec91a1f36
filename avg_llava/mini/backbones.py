"""The mini world's backbones: architectures, pretraining recipe and pretraining, saved in transformers' formats.

The CLIP tower learns dense labels: what covers each patch of crops of fresh scenes. The Llama learns captions and
conversations about scenes whose patches are given as sums of symbol embeddings. These are discarded afterwards: the
projector must learn to produce such inputs from the tower's features. The two backbones are trained independently.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, LlamaTokenizer

from avg_llava.data.encoding import encode_conversation
from avg_llava.data.records import parse_record
from avg_llava.mini.glyphs import PALETTE
from avg_llava.mini.questions import caption, choose_questions
from avg_llava.mini.scenes import GROUND_NAMES, HUES, KINDS, LABEL_FIELDS, OVERVIEW, SITE, Scene, draw_scene
from avg_llava.mini.tokenizer import BOUNDARY, MAX_LENGTH, build_tokenizer
from avg_llava.mini.world import conversation_record
from avg_llava.model.anyres import select_canvas
from avg_llava.model.processing import AvgLlavaImageProcessor
from avg_llava.model.splice import IGNORE_INDEX

PATCH = 8
CROP = PATCH * OVERVIEW
# (rows, columns) of tiles, in the order of AvgLlavaConfig.
GRIDS = [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)]
ROPE_THETA = 1e7
SHIPPED = Path(__file__).parent / "backbones"
FEATURE_SCALE = 0.1
CAPTION_STATEMENTS, CONVERSATION_QUESTIONS = 24, 12


@dataclass(frozen=True)
class Phase:
    """One phase of pretraining, with a warm-up and a decay; `lr` is the peak learning rate."""

    steps: int
    lr: float


@dataclass(frozen=True)
class VisionPhase(Phase):
    """One phase of the tower's pretraining.

    Attributes:
        empty_weight: Weight in the loss of a patch without a mark; that of a patch with a mark is 1.
        num_scenes: Scenes per step.
    """

    empty_weight: float
    num_scenes: int = 12


@dataclass(frozen=True)
class LanguagePhase(Phase):
    """One phase of the language model's pretraining.

    Attributes:
        num_scenes: Scenes per step.
        single_site: Pictures of 4x4 cells without an overview, for short sequences dense with marks.
        caption_share: Share of scenes with a caption; the others have a conversation.
        code_share: Share of scenes that are drawn until they contain a code: reading codes is learnt last.
    """

    num_scenes: int
    single_site: bool
    caption_share: float
    code_share: float = 0.5


@dataclass(frozen=True)
class Recipe:
    """Seed and phases of pretraining; the defaults made the shipped backbones."""

    seed: int = 0
    vision: tuple[VisionPhase, ...] = (VisionPhase(1600, 1.5e-3, 1.0), VisionPhase(1500, 1.2e-3, 0.1))
    language: tuple[LanguagePhase, ...] = (
        LanguagePhase(800, 2e-3, 24, single_site=True, caption_share=1.0),
        LanguagePhase(900, 1.5e-3, 8, single_site=False, caption_share=0.5),
        LanguagePhase(500, 1.5e-3, 8, single_site=False, caption_share=0.15, code_share=0.2),
    )


def vision_config() -> CLIPVisionConfig:
    """The tower: its last layer is unused, since features come from the layer before it."""
    return CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=CROP,
        patch_size=PATCH,
        hidden_act="gelu",
    )


def language_config(vocab_size: int) -> LlamaConfig:
    """A Llama with fewer than a million parameters."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_LENGTH,
        rms_norm_eps=1e-5,
        # Slow rotations: attention to a mark hundreds of tokens back must depend on content, not on distance.
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        initializer_range=0.06,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def image_processor() -> AvgLlavaImageProcessor:
    """The anyres image processor for the tower's crops."""
    return AvgLlavaImageProcessor(
        size={"shortest_edge": CROP},
        crop_size={"height": CROP, "width": CROP},
        image_grid_pinpoints=[[CROP * rows, CROP * columns] for rows, columns in GRIDS],
    )


def crop_labels(scene: Scene, pinpoints: list[list[int]]) -> np.ndarray:
    """Labels (C, 64, 5) of every patch of the image processor's C crops; padding is -100."""
    canvas = select_canvas((scene.rows * scene.cell, scene.columns * scene.cell), pinpoints)
    rows, columns = canvas[0] // PATCH, canvas[1] // PATCH
    labels = np.full((rows, columns, len(LABEL_FIELDS)), IGNORE_INDEX)
    top, left = (rows - scene.rows) // 2, (columns - scene.columns) // 2
    labels[top : top + scene.rows, left : left + scene.columns] = scene.labels
    tiles = labels.reshape(rows // OVERVIEW, OVERVIEW, columns // OVERVIEW, OVERVIEW, -1).swapaxes(1, 2)
    crops = [scene.overview_labels(), *tiles.reshape(-1, OVERVIEW, OVERVIEW, len(LABEL_FIELDS))]
    return np.stack(crops).reshape(-1, OVERVIEW**2, len(LABEL_FIELDS))


def vision_batch(rng: random.Random, num_scenes: int, processor: AvgLlavaImageProcessor) -> tuple[Tensor, Tensor]:
    """Crops (C, 3, S, S) of fresh scenes and their labels (C, 64, 5)."""
    scenes = [draw_scene(rng) for _ in range(num_scenes)]
    pictures = [np.array(PALETTE, dtype=np.uint8)[scene.pixels()] for scene in scenes]  # (H, W, 3) each
    crops = [processor(picture, return_tensors="pt")["pixel_values"][0] for picture in pictures]
    labels = [crop_labels(scene, processor.image_grid_pinpoints) for scene in scenes]
    return torch.cat(crops), torch.from_numpy(np.concatenate(labels))


class DenseReader(nn.Module):
    """The tower without its unused last layer, and one linear head per label field on the patch features."""

    def __init__(self) -> None:
        super().__init__()
        config = vision_config()
        config.num_hidden_layers -= 1
        self.tower = CLIPVisionModel(config)
        self.heads = nn.ModuleList(nn.Linear(config.hidden_size, size) for size in LABEL_FIELDS.values())

    def forward(self, crops: Tensor) -> list[Tensor]:
        """Crops (C, 3, S, S) -> logits (C, 64, number of values) per field."""
        features = self.tower(pixel_values=crops).last_hidden_state[:, 1:]
        return [head(features) for head in self.heads]


def dense_loss(logits: list[Tensor], labels: Tensor, empty_weight: float) -> Tensor:
    """Sum over fields of the mean cross-entropy; patches without a mark are weighted by `empty_weight`."""
    weight = torch.where(labels[..., 1] > 0, 1.0, empty_weight).flatten()
    loss = torch.zeros(())
    for index, scores in enumerate(logits):
        target = labels[..., index].flatten()
        error = F.cross_entropy(scores.float().flatten(0, 1), target, ignore_index=IGNORE_INDEX, reduction="none")
        counted = weight * (target >= 0)
        loss = loss + (error * counted).sum() / counted.sum()
    return loss


def _mixed_precision() -> torch.autocast:
    """bfloat16 autocast: a third faster on CPUs that support it."""
    return torch.autocast("cpu", torch.bfloat16)


def _train(module: nn.Module, phase: Phase, description: str, sample_loss: Callable[[], Tensor]) -> list[float]:
    """Trains a module for one phase; returns the loss of every step."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=phase.lr, weight_decay=0.01, betas=(0.9, 0.98))
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, phase.lr, total_steps=phase.steps, pct_start=0.05)
    losses = []
    progress = tqdm(range(phase.steps), desc=description, unit="step", mininterval=2.0)
    for _ in progress:
        loss = sample_loss()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
        progress.set_postfix(loss=f"{losses[-1]:.3f}")
    return losses


def pretrain_vision(recipe: Recipe) -> tuple[CLIPVisionModel, list[float]]:
    """Trains a tower on dense labels and returns it, with all layers, and the loss of every step."""
    torch.manual_seed(recipe.seed)
    processor, reader, losses = image_processor(), DenseReader(), []

    def sample_loss(rng: random.Random, phase: VisionPhase) -> Tensor:
        crops, labels = vision_batch(rng, phase.num_scenes, processor)
        with _mixed_precision():
            fields = reader(crops)
        return dense_loss(fields, labels, phase.empty_weight)

    for number, phase in enumerate(recipe.vision):
        rng = random.Random(f"vision/{recipe.seed}" + (f"/{number}" if number else ""))
        losses += _train(reader, phase, f"vision tower, phase {number + 1}", partial(sample_loss, rng, phase))
    tower = CLIPVisionModel(vision_config())
    tower.load_state_dict(reader.tower.state_dict(), strict=False)
    scale_features(tower, FEATURE_SCALE)
    return tower, losses


@torch.no_grad()
def scale_features(tower: CLIPVisionModel, factor: float) -> None:
    """Multiplies a tower's hidden states by `factor`; its layers normalise their inputs, so nothing else changes.

    Word embeddings are small: with large features, a new projector's visual tokens would dominate the residual stream
    and hide what the language model's layers add to it.
    """
    for name, parameter in tower.named_parameters():
        if "pre_layrnorm" in name or "out_proj" in name or "fc2" in name:
            parameter.mul_(factor)


class SymbolReader(nn.Module):
    """A language model and the symbol embeddings that represent image patches.

    Every field of a patch has an embedding. Ground, kind and colour also add the model's word embedding of their name,
    so that a question's words match the symbols they ask about.
    """

    def __init__(self, tokenizer: LlamaTokenizer) -> None:
        super().__init__()
        config = language_config(len(tokenizer))
        self.model = LlamaForCausalLM(config)
        self.image_token_id = len(tokenizer)
        self.symbols = nn.ModuleList(nn.Embedding(size, config.hidden_size) for size in LABEL_FIELDS.values())
        self.newline = nn.Parameter(torch.zeros(config.hidden_size))
        for table in self.symbols.parameters():
            nn.init.normal_(table, std=config.initializer_range)
        for layer in self.model.model.layers:
            # Equal queries and keys: attention initially finds similar tokens.
            layer.self_attn.k_proj.weight.data.copy_(layer.self_attn.q_proj.weight.data)
        self.words = [_word_ids(tokenizer, names) for names in (GROUND_NAMES, KINDS, HUES)]
        self.halves = torch.stack([_word_ids(tokenizer, names) for names in (["top", "bottom"], ["left", "right"])])

    def patches(self, labels: np.ndarray) -> Tensor:
        """Labels (..., 5) -> symbol embeddings (..., D)."""
        indices = torch.from_numpy(labels).unbind(-1)
        symbols = torch.stack([table(index) for table, index in zip(self.symbols, indices, strict=True)]).sum(0)
        embed = self.model.get_input_embeddings()
        named = torch.stack([embed(words[index]) for words, index in zip(self.words, indices[:3], strict=True)]).sum(0)
        return symbols + named

    def picture(self, scene: Scene) -> Tensor:
        """Visual tokens (T, D) of a scene: the overview, then the cells row by row with a newline after each row.

        A picture of a single site has no overview.
        """
        rows = self.patches(scene.labels)
        newline = self.newline.expand(scene.rows, 1, -1)
        cells = torch.cat([rows, newline], dim=1).flatten(0, 1)
        if scene.rows * scene.columns == SITE * SITE:
            return cells
        # The tower's features encode a patch's position in its crop: for the overview, its position in the picture.
        halves = self.model.get_input_embeddings()(self.halves)  # (2, 2, D): top and bottom, left and right
        vertical, horizontal = halves.repeat_interleave(OVERVIEW // 2, dim=1)  # (8, D) each
        overview = self.patches(scene.overview_labels()) + vertical[:, None] + horizontal[None]
        return torch.cat([overview.flatten(0, 1), cells])

    def forward(self, scenes: list[Scene], ids: list[list[int]], labels: list[list[int]]) -> Tensor:
        """Mean loss of the supervised tokens; each sample's ids contain one placeholder for its picture."""
        rows, targets = [], []
        for scene, sample_ids, sample_labels in zip(scenes, ids, labels, strict=True):
            position = sample_ids.index(self.image_token_id)
            picture = self.picture(scene)
            embed = self.model.get_input_embeddings()
            before, after = torch.tensor(sample_ids[:position]), torch.tensor(sample_ids[position + 1 :])
            rows.append(torch.cat([embed(before), picture, embed(after)]))
            hidden = [IGNORE_INDEX] * len(picture)
            targets.append(torch.tensor(sample_labels[:position] + hidden + sample_labels[position + 1 :]))
        inputs = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        target = nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=IGNORE_INDEX)
        # Padding is on the right, where causal attention ignores it: no mask is needed.
        states = self.model.model(inputs_embeds=inputs, use_cache=False).last_hidden_state[:, :-1]
        supervised = target[:, 1:] != IGNORE_INDEX
        return F.cross_entropy(self.model.lm_head(states[supervised]).float(), target[:, 1:][supervised])


def _word_ids(tokenizer: LlamaTokenizer, names: list[str]) -> Tensor:
    """Ids of words after a space; names that are no words get the unknown token, whose embedding is zero."""
    return torch.tensor(tokenizer.convert_tokens_to_ids([BOUNDARY + name for name in names]))


def language_batch(
    rng: random.Random, phase: LanguagePhase, tokenizer: LlamaTokenizer
) -> tuple[list[Scene], list[list[int]], list[list[int]]]:
    """Fresh scenes, and token ids and labels of a caption or conversation about each."""
    scenes, ids, labels = [], [], []
    layouts = {(SITE, SITE): 1} if phase.single_site else None
    for _ in range(phase.num_scenes):
        scene = draw_scene(rng, layouts)
        if rng.random() < phase.code_share:
            while not scene.codes:
                scene = draw_scene(rng, layouts)
        if rng.random() < phase.caption_share:
            template, turns = "plain", [("", caption(scene, CAPTION_STATEMENTS, rng))]
        else:
            template = "vicuna_v1"
            questions = choose_questions(scene, CONVERSATION_QUESTIONS, rng)
            turns = [(rng.choice(question.wordings), question.answer) for question in questions]
        sample = parse_record(conversation_record("symbols", "symbols.png", turns), Path("."), "symbols")
        encoded = encode_conversation(sample.turns, tokenizer, template, len(tokenizer))
        scenes.append(scene)
        ids.append(encoded.input_ids)
        labels.append(encoded.labels)
    return scenes, ids, labels


def pretrain_language(recipe: Recipe) -> tuple[LlamaForCausalLM, LlamaTokenizer, list[float]]:
    """Trains a language model on symbolic pictures and returns it, its tokenizer and the loss of every step."""
    torch.manual_seed(recipe.seed)
    tokenizer, losses = build_tokenizer(), []
    reader = SymbolReader(tokenizer)

    def sample_loss(rng: random.Random, phase: LanguagePhase) -> Tensor:
        batch = language_batch(rng, phase, tokenizer)
        with _mixed_precision():
            return reader(*batch)

    for number, phase in enumerate(recipe.language):
        rng = random.Random(f"language/{recipe.seed}/{number}")
        losses += _train(reader, phase, f"language model, phase {number + 1}", partial(sample_loss, rng, phase))
    return reader.model, tokenizer, losses


def pretrain(output: str | Path, recipe: Recipe | None = None) -> None:
    """Pretrains both backbones and saves them in `output`/vision and `output`/language."""
    output, recipe = Path(output), recipe or Recipe()
    tower, vision_losses = pretrain_vision(recipe)
    _save_vision(tower, output / "vision")
    model, tokenizer, language_losses = pretrain_language(recipe)
    model.half().save_pretrained(output / "language")
    tokenizer.save_pretrained(output / "language")
    log = {"vision": vision_losses, "language": language_losses}
    (output / "losses.json").write_text(json.dumps({name: [round(x, 4) for x in row] for name, row in log.items()}))


def _save_vision(tower: CLIPVisionModel, folder: Path) -> None:
    """Saves the tower in half precision and its preprocessor_config.json."""
    tower.half().save_pretrained(folder)
    statistics = image_processor().to_dict()
    content = {
        **{name: statistics[name] for name in ("image_mean", "image_std", "rescale_factor", "resample")},
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "do_center_crop": True,
        "do_rescale": True,
        "do_normalize": True,
        "size": {"shortest_edge": CROP},
        "crop_size": {"height": CROP, "width": CROP},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(content, indent=2) + "\n")
