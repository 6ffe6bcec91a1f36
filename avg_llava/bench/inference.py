"""`avg-llava bench inference`: answers at every level, forced and routed, against transformers' LLaVA-NeXT.

All variants run in one process on the same random weights, pixels and prompts, which do not affect times. In a routed
variant the router runs and its choice is read back to the CPU; the level in the variant's name then replaces it.
"""

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from avg_llava.bench.presets import PRESETS, ModelShape, Preset, check_device, random_model
from avg_llava.bench.timing import alternate, environment
from avg_llava.common.machine import peak_memory
from avg_llava.common.tables import render_table
from avg_llava.evaluation.llava_next import as_llava_next, expand_placeholders
from avg_llava.inference.generation import now
from avg_llava.model.anyres import num_crops, num_visual_tokens
from avg_llava.model.modeling import AvgLlavaForConditionalGeneration
from avg_llava.training.flops import SampleShape, head_flops, language_flops, router_flops, vision_flops

SHAPES: dict[Preset, ModelShape] = PRESETS | {
    # As deep as the 7B model, for which the activations of training would be too large. The router, always one layer,
    # then takes 3% of a routed answer's operations at the finest level, as in the 7B model, and the tower 4%.
    "proportioned": replace(PRESETS["proportioned"], vision=(192, 11, 768, 3), language=(512, 32, 1376, 8))
}
BASELINE = "transformers LLaVA-NeXT"
PAPER_SHARE = 0.147
"""Visual tokens on AI2D as a share of those at the finest level (arXiv 2410.02745, table 3)."""


@dataclass(frozen=True)
class Variant:
    """A way to answer a batch.

    Attributes:
        levels: Visual tokens per crop of each image of the batch.
        routed: The router runs first.
        grouped: Images at the same level are answered together, one level after another.
        baseline: transformers' model answers.
    """

    name: str
    levels: tuple[int, ...]
    routed: bool = False
    grouped: bool = False
    baseline: bool = False


class _FirstToken(StoppingCriteria):
    """Records the time `at` which the first token is generated, in milliseconds; never stops."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.at = device, 0.0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.at = self.at or now(self.device)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class Workload:
    """A random model, transformers' model with the same weights, and a batch of identical images and prompts."""

    def __init__(
        self,
        preset: Preset,
        batch_size: int,
        image_size: tuple[int, int],
        num_prompt_tokens: int,
        new_tokens: int,
        static_cache: bool = False,
    ) -> None:
        self.model: AvgLlavaForConditionalGeneration = random_model(SHAPES[preset].config()).eval()
        self.baseline = as_llava_next(self.model)
        if static_cache:
            for model in (self.model, self.baseline):
                model.generation_config.cache_implementation = "static"
        self.new_tokens = new_tokens
        config, device = self.model.config, self.model.device
        self.sample = SampleShape(image_size, num_prompt_tokens, 0)
        self.crops = num_crops(image_size, config)
        generator = torch.Generator().manual_seed(0)
        crop = config.crop_size
        pixels = torch.randn(batch_size, self.crops, 3, crop, crop, generator=generator)
        self.pixels = pixels.to(device, self.model.dtype)
        self.sizes = torch.tensor([image_size] * batch_size)
        ids = torch.randint(3, config.text_config.vocab_size, (num_prompt_tokens + 1,), generator=generator)
        ids[1] = config.image_token_id
        self.input_ids = ids.repeat(batch_size, 1).to(device)
        row = expand_placeholders(self.input_ids[0], self.sizes[:1], self.model)
        self.expanded = row.repeat(batch_size, 1)

    @torch.inference_mode()
    def run(self, variant: Variant) -> dict[str, float]:
        """Answers the batch, from pixels to last tokens; returns milliseconds by phase."""
        model, device = self.model, self.model.device
        began = now(device)
        if variant.baseline:
            first = _FirstToken(device)
            arguments = {"input_ids": self.expanded, "pixel_values": self.pixels, "image_sizes": self.sizes.to(device)}
            self._generate(self.baseline, torch.ones_like(self.expanded), first, **arguments)
            return self._phases([began, began, began, first.at, now(device)])
        features = model.encode_images(self.pixels, self.sizes)
        encoded = now(device)
        mask = torch.ones_like(self.input_ids)
        if variant.routed:
            model.choose_granularity(model.route(features, self.input_ids, mask)).tolist()
        routed = now(device)
        prefill = decode = 0.0
        for rows in _groups(variant):
            start = now(device)
            images = features if len(rows) == len(variant.levels) else features.of_images(rows)
            levels = [variant.levels[row] for row in rows]
            spliced = model.splice(images, self.input_ids[rows], mask[rows], granularity=levels, padding_side="left")
            first = _FirstToken(device)
            self._generate(model, spliced.attention_mask, first, inputs_embeds=spliced.inputs_embeds)
            prefill, decode = prefill + first.at - start, decode + now(device) - first.at
        return self._phases([began, encoded, routed, routed + prefill, routed + prefill + decode])

    def _generate(self, model: Any, attention_mask: Tensor, first: _FirstToken, **inputs: Any) -> None:
        tokens = self.new_tokens
        model.generate(
            attention_mask=attention_mask,
            do_sample=False,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            pad_token_id=0,
            stopping_criteria=[first],
            **inputs,
        )

    def _phases(self, moments: Sequence[float]) -> dict[str, float]:
        encode, route, prefill, decode = (end - begin for begin, end in pairwise(moments))
        per_token = decode / (self.new_tokens - 1) if self.new_tokens > 1 else 0.0
        phases = {"encode_ms": encode, "route_ms": route, "prefill_ms": prefill, "per_token_ms": per_token}
        return phases | {"total_ms": moments[-1] - moments[0]}

    def flops(self, variant: Variant) -> dict[str, float]:
        """Operations by part, including those on padding."""
        config = self.model.config
        lengths = {level: self.sample.length(level, config) for level in set(variant.levels)}
        language = 0.0
        for rows in _groups(variant):
            padded = max(lengths[variant.levels[row]] for row in rows) + self.new_tokens - 1
            mixed = len({variant.levels[row] for row in rows}) > 1
            language += language_flops([padded] * len(rows), config, masked=mixed)
        crops = self.crops * len(variant.levels)
        return {
            "vision": vision_flops(crops, config, whole_tower=variant.baseline),
            "router": router_flops(crops, config) if variant.routed else 0.0,
            "language": language,
            "head": head_flops(len(variant.levels) * self.new_tokens, config),
        }


def _groups(variant: Variant) -> list[list[int]]:
    """Rows of the batch that go through the language model together."""
    groups: dict[int, list[int]] = defaultdict(list)
    for row, level in enumerate(variant.levels):
        groups[level if variant.grouped else 0].append(row)
    return list(groups.values())


def make_variants(granularities: Sequence[int], batch_size: int) -> list[Variant]:
    """The baseline, and each level forced and routed; for a batch also mixed levels, padded together and grouped."""
    finest = granularities[-1]
    variants = [Variant(BASELINE, (finest,) * batch_size, baseline=True)]
    for routed in (False, True):
        word = "routed" if routed else "forced"
        variants += [Variant(f"{word} {level}", (level,) * batch_size, routed) for level in granularities]
    if batch_size > 1:
        mixed = tuple(granularities[row % len(granularities)] for row in range(batch_size))
        variants += [
            Variant("mixed, padded together", mixed, True),
            Variant("mixed, grouped by level", mixed, True, grouped=True),
        ]
    return variants


def bench_inference(
    preset: Preset = "proportioned",
    batch_size: int = 1,
    new_tokens: int = 1,
    image_size: tuple[int, int] | None = None,
    num_prompt_tokens: int = 24,
    repeats: int = 10,
    static_cache: bool = False,
) -> dict[str, Any]:
    """Measures all variants and compares them.

    Args:
        batch_size: Number of images, each with its question, answered in one batch.
        new_tokens: Length of every answer in tokens.
        image_size: (height, width) in pixels; None is two by two crops (672x672 for CLIP-L/336).
        num_prompt_tokens: Text tokens of a question.
        repeats: Measured answers of each variant, after a warm-up; the median counts.
        static_cache: Both models generate with a cache of fixed size, as with `load(..., static_cache=True)`.

    Returns:
        `rows` of each variant with milliseconds by phase, `speedup` over transformers' model and `bound_speedup`, the
        ratio of operations; `paper_mix`, `router`, settings, machine.

    Raises:
        ValueError: The preset needs a GPU.
    """
    check_device(preset)
    crop = SHAPES[preset].crop
    size = image_size or (2 * crop, 2 * crop)
    workload = Workload(preset, batch_size, size, num_prompt_tokens, new_tokens, static_cache)
    variants = {variant.name: variant for variant in make_variants(workload.model.config.granularities, batch_size)}
    measured = alternate(
        {name: partial(workload.run, variant) for name, variant in variants.items()}, repeats, "bench inference"
    )
    rows = [_row(workload, variant, measured[name][1:]) for name, variant in variants.items()]
    for row in rows:
        row["speedup"] = rows[0]["total_ms"] / row["total_ms"]
        row["bound_speedup"] = rows[0]["gflop"] / row["gflop"]
    return {
        "preset": preset,
        "batch_size": batch_size,
        "new_tokens": new_tokens,
        "rows": rows,
        "paper_mix": paper_mix(rows),
        "router": router_share(rows),
        "settings": {
            "model": asdict(SHAPES[preset]),
            "image_size": list(size),
            "prompt_tokens": num_prompt_tokens,
            "repeats": repeats,
            "static_cache": static_cache,
            "dtype": str(workload.model.dtype).removeprefix("torch."),
        },
        "peak_memory_bytes": peak_memory(),
        **environment(),
    }


def _row(workload: Workload, variant: Variant, runs: Sequence[dict[str, float]]) -> dict[str, Any]:
    config = workload.model.config
    flops = workload.flops(variant)
    tokens = [num_visual_tokens(workload.sample.image_size or (1, 1), level, config) for level in variant.levels]
    return {
        "name": variant.name,
        "granularity": variant.levels[0] if len(set(variant.levels)) == 1 else list(variant.levels),
        "visual_tokens": sum(tokens) / len(tokens),
        **{phase: statistics.median(run[phase] for run in runs) for phase in runs[0]},
        "gflop": sum(flops.values()) / 1e9,
        "gflop_by_part": {part: value / 1e9 for part, value in flops.items()},
    }


def paper_mix(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Interpolates routed answers between two adjacent levels at the paper's mean number of visual tokens on AI2D."""
    routed = [row for row in rows if row["name"].startswith("routed ")]
    finest = routed[-1]["visual_tokens"]
    shares = [row["visual_tokens"] / finest for row in routed]
    upper = next(index for index, share in enumerate(shares) if share >= PAPER_SHARE)
    lower = max(upper - 1, 0)
    span = shares[upper] - shares[lower]
    weight = (PAPER_SHARE - shares[lower]) / span if span else 1.0

    def mean(key: str) -> float:
        return float((1 - weight) * routed[lower][key] + weight * routed[upper][key])

    return {
        "token_share": mean("visual_tokens") / finest,
        "total_ms": mean("total_ms"),
        "speedup": rows[0]["total_ms"] / mean("total_ms"),
        "bound_speedup": rows[0]["gflop"] / mean("gflop"),
    }


def router_share(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Share of the router in the time and the operations of a routed answer at the finest level, and their ratio."""
    finest = [row for row in rows if row["name"].startswith("routed ")][-1]
    time_share = finest["route_ms"] / finest["total_ms"]
    flop_share = finest["gflop_by_part"]["router"] / finest["gflop"]
    return {"time_share": time_share, "flop_share": flop_share, "ratio": time_share / flop_share}


def table_lines(result: dict[str, Any]) -> list[str]:
    """The result as lines of text."""
    columns = ("", "tokens", "encode", "route", "prefill", "per token", "total ms", "speed-up", "bound")
    keys = ("visual_tokens", "encode_ms", "route_ms", "prefill_ms", "per_token_ms", "total_ms")
    rows = [
        (
            row["name"],
            *(f"{row[key]:.1f}" for key in keys),
            f"{row['speedup']:.2f}x",
            f"{row['bound_speedup']:.2f}x",
        )
        for row in result["rows"]
    ]
    mix, router = result["paper_mix"], result["router"]
    return [
        f"preset {result['preset']}, batch {result['batch_size']}, answers of {result['new_tokens']} tokens",
        *render_table(columns, rows).splitlines(),
        f"at {mix['token_share']:.1%} of the finest level's tokens: {mix['speedup']:.2f}x (bound "
        f"{mix['bound_speedup']:.2f}x); router at the finest level: {router['time_share']:.1%} of the time, "
        f"{router['flop_share']:.1%} of the operations ({router['ratio']:.2f}x)",
    ]
