"""Memory of a process that loads a checkpoint: what no other process shares, in a fresh process."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPVisionModel, LlamaForCausalLM

from avg_llava import AvgLlavaForConditionalGeneration
from tests.tiny import language_config, make_checkpoint, tiny_config, vision_config

MB = 10**6
# Arguments: a tiny checkpoint to load first, for what imports and threads take, and the calls to measure.
MEASURE = """
import json, pathlib, re, sys, threading
import torch
from avg_llava.checkpoints.loading import build_from_backbones, load_model

def private():
    pages = pathlib.Path("/proc/self/smaps_rollup").read_text()
    return sum(int(size) for size in re.findall(r"Private_(?:Clean|Dirty):\\s+(\\d+)", pages)) * 1024

def measure(call):
    done, before = threading.Event(), private()
    peak = before

    def sample():
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, private())

    sampler = threading.Thread(target=sample)
    sampler.start()
    model = eval(call)
    done.set()
    sampler.join()
    peak = max(peak, private())
    weights = sum(parameter.nbytes for parameter in model.parameters())
    return {"peak": peak - before, "weights": weights, "sum": float(model.lm_head.weight.sum(dtype=torch.float64))}

load_model(sys.argv[1], dtype=torch.float16)
print(json.dumps([measure(call) for call in sys.argv[2:]]))
"""


def write_big(folder, width, num_layers, vocabulary, dtype, form):
    """A checkpoint of this package, or two backbones, whose head is all ones; returns its bytes."""
    language = language_config(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=num_layers
    )
    config = tiny_config(vision_config(), language)
    if form == "backbones":
        parts = {"vision": (CLIPVisionModel, config.vision_config), "language": (LlamaForCausalLM, language)}
    else:
        parts = {"": (AvgLlavaForConditionalGeneration, config)}
    num_bytes = 0
    for name, (model_class, part) in parts.items():
        with torch.device("meta"):
            shapes = {key: tensor.shape for key, tensor in model_class(part).state_dict().items()}
        weights = {key: torch.zeros(shape, dtype=dtype) for key, shape in shapes.items()}
        if "lm_head.weight" in weights:
            weights["lm_head.weight"] += 1
        (folder / name).mkdir(parents=True, exist_ok=True)
        if form == "pickled":
            torch.save(weights, folder / name / "pytorch_model.bin")
        else:
            save_file(weights, folder / name / "model.safetensors", {"format": "pt"})
        part.architectures = [model_class.__name__]
        part.save_pretrained(folder / name)
        num_bytes += sum(tensor.nbytes for tensor in weights.values())
    return num_bytes


def check_peaks(tmp_path, forms, width, num_layers, vocabulary, slack):
    """Peaks are at most 0.1 times the bytes of the files, 1.1 times those of cast or new parts, and `slack`."""
    tiny, calls, sizes = make_checkpoint(tmp_path / "tiny"), [], []
    for form in forms:
        folder = tmp_path / form
        sizes.append(write_big(folder, width, num_layers, vocabulary, torch.bfloat16, form))
        load = f"load_model({str(folder)!r}, dtype=DTYPE)"
        if form == "backbones":
            load = f"build_from_backbones({str(folder / 'vision')!r}, {str(folder / 'language')!r}, dtype=DTYPE)"
        calls += [load.replace("DTYPE", "None"), load.replace("DTYPE", "torch.float32")]
    # Freed memory is given back at once, so that what one call leaves does not hide what the next one takes.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", MEASURE, tiny, *calls]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    results = iter(json.loads(done.stdout))
    for form, size in zip(forms, sizes, strict=True):
        own, cast = next(results), next(results)
        new = own["weights"] - size
        shares = {"own data type": own["peak"] / size, "cast": cast["peak"] / cast["weights"]}
        sys.stdout.write(f"{form}: {size} bytes in files, {new} new; peaks {shares}\n")
        assert own["sum"] == cast["sum"] == width * vocabulary
        assert 0 <= new < (size / 5 if form == "backbones" else 1)
        assert own["peak"] < 0.1 * size + 1.1 * new + slack
        assert cast["peak"] < 1.1 * cast["weights"] + slack


def test_loading_takes_no_second_copy(tmp_path):
    """60 MB each; the slack is for the buffers of four threads, 5 MB each, and the allocator."""
    check_peaks(tmp_path, ["safetensors", "pickled", "backbones"], 512, 7, 5000, slack=40 * MB)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["safetensors", "pickled", "backbones"])
def test_loading_takes_no_second_copy_at_size(tmp_path, form):
    """1.5 GB."""
    check_peaks(tmp_path, [form], 2048, 13, 32000, slack=0)
