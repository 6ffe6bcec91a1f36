"""Commands about checkpoint folders: converting and inspecting them."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from avg_llava.cli.options import OptionalDType, Outcome, ReportingCommand, command, parsed_by

if TYPE_CHECKING:
    from avg_llava.checkpoints.convert import Conversion
    from avg_llava.planning.inspection import Inspection

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def _size(text: str) -> int:
    number, unit = text[:-2], text[-2:].upper()
    if unit not in _UNITS or not number.isdecimal() or int(number) < 1:
        raise ValueError(f"{text!r} is no size such as 5GB, 500MB or 100KB")
    return int(number) * _UNITS[unit]


@command("avg-llava convert checkpoints/avg-llava-7b checkpoints/llava-next-7b --to llava-next")
class Convert(ReportingCommand):
    """Converts a checkpoint to another layout, tensor by tensor; weights keep their bytes."""

    source: Annotated[str, Positional, arg(metavar="SOURCE")]
    """Checkpoint folder or hub id, in any layout that is read."""
    output: Annotated[Path, Positional, arg(metavar="OUTPUT")]
    """Folder to write, new or empty."""
    to: Literal["avg", "original", "llava-next"] = "avg"
    """Layout of the output: this package's, the original code's, or plain LLaVA-NeXT of transformers, which has the
    finest level and no router."""
    dtype: OptionalDType = None
    """Data type of the weights."""
    max_shard_size: Annotated[int, parsed_by(_size, "SIZE")] = 5 * 10**9
    """Largest size of a file of weights, such as 5GB or 500MB."""
    dry_run: bool = False
    """Only say what would become of every weight."""
    overwrite: bool = False
    """Replace the checkpoint in OUTPUT; other files in the folder stay."""
    no_check: bool = False
    """Do not compare the logits of source and output."""

    def compute(self) -> Outcome:
        import torch

        from avg_llava.checkpoints.convert import convert, plan_conversion

        dtype = getattr(torch, self.dtype) if self.dtype else None
        plan = plan_conversion(self.source, self.to, dtype, self.max_shard_size)
        facts = _plan_facts(plan) | {"output": str(self.output)}
        if self.dry_run:
            return Outcome(facts, "\n".join(_plan_lines(plan, facts)))
        difference = convert(plan, self.output, overwrite=self.overwrite, check=not self.no_check)
        if difference is not None:
            checked = f"largest difference of logits from the source: {difference:.1e} of the largest logit"
        else:
            checked = "logits not compared" + ("" if self.no_check else ": the model does not fit in the free memory")
        lines = [f"wrote {self.output}: {facts['parameters']:,} weights in {len(facts['files'])} files", checked]
        return Outcome(facts | {"difference": difference}, "\n".join([*lines, *_notes(facts["notes"])]))


@command("avg-llava inspect checkpoints/avg-llava-7b")
class Inspect(ReportingCommand):
    """Says what a folder holds, what it can start, and everything that is wrong with it (then exits with 1)."""

    path: Annotated[Path, Positional, arg(metavar="DIR")]
    """Folder of a model, a backbone, an adapter, a training run or data; or a file of weights."""
    scan: bool = False
    """Read all weights: count values that are not finite, and compare the checksums of the manifest."""

    def compute(self) -> Outcome:
        from avg_llava.planning.inspection import inspect

        found = inspect(self.path, self.scan)
        return Outcome(asdict(found), "\n".join(_inspection_lines(found)), failed=bool(found.problems))


def _plan_facts(plan: "Conversion") -> dict[str, Any]:
    files = {name: sum(tensor.num_bytes for tensor in tensors) for name, tensors in plan.shards.items()}
    return {
        "layout": plan.target,
        "dtype": str(plan.dtype).removeprefix("torch."),
        "parameters": plan.num_parameters,
        "files": files,
        "weights": [asdict(fate) for fate in plan.fates],
        "notes": list(plan.notes),
    }


def _plan_lines(plan: "Conversion", facts: dict[str, Any]) -> Iterator[str]:
    from avg_llava.common.tables import render_table

    rows = [(fate.key, fate.target or "-", fate.note) for fate in plan.fates]
    yield render_table(("weight of the source", "in the output", "change"), rows, num_left=3)
    yield ""
    yield render_table(("file", "bytes"), [(name, f"{size:,}") for name, size in facts["files"].items()])
    yield from _notes(facts["notes"])
    yield f"nothing is written to {facts['output']} (--dry-run)"


def _notes(notes: list[str]) -> list[str]:
    return [f"note: {note}" for note in notes]


def _stage_text(stage: dict[str, Any]) -> str:
    parent = stage["parent"].get("path") or " and ".join(map(str, stage["parent"].values()))
    state = "finished" if stage["finished"] else "not finished"
    return f"{stage['stage']}, {state}, step {stage['step']:,}, of {stage['created']}, from {parent}"


def _inspection_lines(found: "Inspection") -> Iterator[str]:
    from avg_llava.common.tables import render_table

    def listed(values: dict[str, Any] | None) -> str:
        return ", ".join(
            f"{name} {value:,}" if isinstance(value, int) else f"{name} {value}"
            for name, value in (values or {}).items()
        )

    facts = {
        "path": found.path,
        "kind": found.kind,
        "layout": found.layout,
        "stage": None if found.stage is None else _stage_text(found.stage),
        "behavior": found.behavior,
        "template": found.template,
        "levels": ", ".join(map(str, found.granularities)),
        "router": None if found.has_router is None else "yes" if found.has_router else "no",
        "vision tower": listed(found.vision),
        "language model": listed(found.language),
        "longest sequence": found.max_sequence_length and f"{found.max_sequence_length:,} tokens",
        "parameters": listed(found.parameters),
        "data types": listed(found.dtypes),
        "checksums": "in the manifest; --scan compares them" if found.has_checksums else None,
        "can start": "; ".join(found.starts),
    }
    yield render_table(("", ""), [(name, str(value)) for name, value in facts.items() if value], num_left=2)
    yield ""
    yield render_table(
        ("file", "bytes"),
        [(file["name"], f"{file['bytes']:,}") for file in found.files],
    )
    yield from _notes(found.notes)
    yield from (f"problem: {problem}" for problem in found.problems)
