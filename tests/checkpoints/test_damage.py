"""Every damaged or hostile checkpoint ends in one clear line or loads with the right weights, and runs nothing."""

import json
import random
import re
import resource
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from avg_llava import build_from_backbones, load_model
from avg_llava.checkpoints.routing_model import load_routing_model
from tests.checkpoints.damage import (
    CANARY,
    FORMS,
    damaged_copy,
    damages,
    protect,
    protected_damages,
    remove_weights,
    write_weights,
)
from tests.parity.golden import GOLDEN
from tests.tiny import make_checkpoint

CHECKPOINTS = Path(__file__).parents[1] / "data/checkpoints"
LAYOUTS = ("golden", "llava16_vicuna", "hf45_vicuna", "ours", "language", "vision", "protected", "routing")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return checkpoints_in(tmp_path_factory.mktemp("whole"))


def checkpoints_in(root):
    """A function that gives the whole checkpoint of a layout in a form."""
    ours = make_checkpoint(root / "made")

    def make(layout, form):
        folder = root / layout / form.replace(" ", "-")
        if not folder.exists():
            sources = {"golden": GOLDEN / "checkpoint", "language": CHECKPOINTS / "vicuna_bin"}
            sources |= {"vision": CHECKPOINTS / "clip_bin", **dict.fromkeys(("ours", "protected", "routing"), ours)}
            shutil.copytree(sources.get(layout, CHECKPOINTS / layout), folder)
            write_weights(folder, remove_weights(folder), form)
            if layout == "protected":
                protect(folder)
        return folder

    return make


def load(layout, folder):
    if layout == "language":
        model = build_from_backbones(CHECKPOINTS / "clip_bin", folder)
    elif layout == "vision":
        model = build_from_backbones(folder, CHECKPOINTS / "vicuna_bin")
    else:
        model = load_routing_model(folder) if layout == "routing" else load_model(folder)
    fresh = ("model.router.",) if layout in ("llava16_vicuna", "hf45_vicuna") else ()
    if layout in ("language", "vision"):
        fresh = ("model.router.", "model.multi_modal_projector.", "model.image_newline")
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if not name.startswith(fresh)}


def outcome(layout, damage, folder, expected):
    """What is wrong about loading a damaged checkpoint; None if it ended as it should."""
    try:
        weights = load(layout, folder)
    except ValueError as error:
        message = str(error)
        if "\n" in message and "does not fit its configuration" not in message.splitlines()[0]:
            return f"more than one line: {message}"
        if str(folder) not in message:
            return f"names no file: {message}"
        return None
    except Exception as error:  # noqa: BLE001 - any other exception is what is looked for
        return f"{type(error).__name__}: {error}"
    if weights.keys() != expected.keys():
        return "other weights"
    different = sum(int((weights[name].float() != tensor.float()).sum()) for name, tensor in expected.items())
    if different > damage.changes_weights:  # a changed weight may be one that is not loaded
        return f"{different} other values"
    return None


def cases(layout):
    """Damages of a layout, each in one of the forms, drawn from the layout's seed."""
    chance = random.Random(zlib.crc32(layout.encode()))
    for number, damage in enumerate(protected_damages() if layout == "protected" else damages()):
        forms = ("safetensors", "safetensors shards", "archive") if layout == "protected" else FORMS
        yield number, damage, chance.choice(forms)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_damaged_checkpoints(layout, whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = {}
    wrong = []
    for number, damage, form in cases(layout):
        source = whole(layout, form)
        if form not in expected:
            expected[form] = load(layout, source)
        folder = tmp_path / f"{number}"
        damaged_copy(source, folder, damage, number)
        found = outcome(layout, damage, folder, expected[form])
        if found is not None:
            wrong.append(f"{damage.name} of {form}: {found}")
        assert not (tmp_path / CANARY).exists(), damage.name
        shutil.rmtree(folder)
    assert not wrong, "\n".join(wrong)


HUNGRY = re.compile("huge|large|to the end|claimed|deep|configuration|pickled (memory|tensor|repeated|meta)|compressed")


def load_hungry_ones(folder):
    """Loads checkpoints that lie about sizes; prints the growth of the peak, the weights' bytes and outcomes."""
    make, wrong, size = checkpoints_in(folder), [], 0
    expected = {layout: load(layout, make(layout, "archive")) for layout in ("golden", "ours")}
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 2**30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for layout, weights in expected.items():
        for number, damage, form in cases(layout):
            if HUNGRY.search(damage.name):
                damaged_copy(make(layout, form), folder / "damaged", damage, number)
                wrong.append(outcome(layout, damage, folder / "damaged", weights))
                shutil.rmtree(folder / "damaged")
        size = max(size, sum(tensor.nbytes for tensor in weights.values()))
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    print(json.dumps({"growth": growth, "size": size, "outcomes": wrong}))  # noqa: T201 - read by the test


def test_lying_checkpoints_take_no_memory(tmp_path):
    """With a limit of 1 GiB more than is taken before; the peak grows by twice the weights and an allowance."""
    code = (
        f"from pathlib import Path; from {__name__} import load_hungry_ones; load_hungry_ones(Path({str(tmp_path)!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["outcomes"]) >= 60
    assert set(found["outcomes"]) == {None}
    assert found["growth"] < 2 * found["size"] + 32 * 2**20
