"""Run as a script, with `python -I -S`: loads saved models as the world does, where this package is not installed.

usage: without_package.py SITE_PACKAGES IMAGE OUTPUT FOLDER...

Writes to the folder OUTPUT, for each FOLDER, its logits and greedy ids as `N.safetensors`, texts as `N.json`, and the
model saved again as `N`.
"""

import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

# Packages that this package requires, and a saved model must not, with those that import them.
ABSENT = ("accelerate", "deepspeed", "docstring_parser", "einops", "numba", "open_clip", "peft", "pydantic", "tyro")


def run(image_file: Path, output: Path, *folders: Path | str, **environment: str) -> None:
    """Runs this script, offline unless the environment's variables say otherwise."""
    environment = os.environ | {"HF_MODULES_CACHE": str(output / "modules"), "HF_HUB_OFFLINE": "1"} | environment
    paths = [__file__, sysconfig.get_paths()["purelib"], image_file, output, *folders]
    command = [sys.executable, "-I", "-S", *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=output)
    assert done.returncode == 0, done.stderr[-4000:]


def answers(model, processor, image, levels) -> dict:
    """Logits and greedy ids at every level and routed (-1)."""
    import torch

    messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "How many?"}]}]
    inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    tensors = {}
    for level in (None, *levels):
        with torch.no_grad():
            tensors[f"logits/{level}"] = model(**inputs, granularity=level).logits
        tensors[f"ids/{level}"] = model.generate(**inputs, granularity=level, max_new_tokens=6)
    return tensors


def compare(output: Path, number: int, model, processor, image) -> None:
    """Asserts that a run's answers of its folder `number` are bit for bit those of a model that was loaded here."""
    import torch
    from safetensors.torch import load_file

    found, expected = (
        load_file(output / f"{number}.safetensors"),
        answers(model, processor, image, model.config.granularities),
    )
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), f"folder {number}: {name}"


def check(output: Path, image, *folders: Path) -> None:
    """Asserts that models give the same answers where this package is not installed, and here."""
    from avg_llava import load

    image.save(output / "image.png")
    run(output / "image.png", output, *folders)
    for number, folder in enumerate(folders):
        compare(output, number, *load(folder), image)


def load_everything(folder: str, **options) -> tuple:
    """Model and processor, by each Auto class and the pipeline."""
    import transformers as hf

    processor = hf.AutoProcessor.from_pretrained(folder, **options)
    image_processor = hf.AutoImageProcessor.from_pretrained(folder, **options)
    config = hf.AutoConfig.from_pretrained(folder, **options)
    model = hf.AutoModelForImageTextToText.from_pretrained(folder, **options)
    assert type(hf.AutoModel.from_pretrained(folder, **options)) is type(model)
    assert type(model.config) is type(config)
    assert type(processor.image_processor) is type(image_processor)
    pipeline = hf.pipeline("image-text-to-text", model=folder, **options)
    assert type(pipeline.model) is type(model)
    return model.eval(), processor, pipeline


def pipeline_text(pipeline, image) -> str:
    """The pipeline's answer to a conversation."""
    content = [{"type": "image", "image": image}, {"type": "text", "text": "How many?"}]
    (answer,) = pipeline(text=[{"role": "user", "content": content}], max_new_tokens=6, return_full_text=False)
    return answer["generated_text"]


def main(site_packages: str, image_file: str, output: str, *folders: str) -> None:
    sys.path.append(site_packages)
    sys.modules.update(dict.fromkeys(ABSENT))
    assert importlib.util.find_spec("avg_llava") is None
    from PIL import Image
    from safetensors.torch import save_file

    image = Image.open(image_file)
    for number, folder in enumerate(folders):
        model, processor, pipeline = load_everything(folder, trust_remote_code=True)
        assert type(model).__module__.startswith("transformers_modules.")
        save_file(answers(model, processor, image, model.config.granularities), f"{output}/{number}.safetensors")
        Path(f"{output}/{number}.json").write_text(json.dumps({"text": pipeline_text(pipeline, image)}))
        model.save_pretrained(f"{output}/{number}")
        processor.save_pretrained(f"{output}/{number}")


if __name__ == "__main__":
    main(*sys.argv[1:])
