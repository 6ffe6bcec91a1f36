"""The comparison with open_clip of `test_published.py`, run by `tests/open_clip_process.py`: prints it as JSON."""

import json
import sys
from pathlib import Path

import open_clip
import torch

from tests.checkpoints.open_clip_cases import write_model
from tests.checkpoints.test_published import OPEN_CLIP, Measured, compare_backbones, difference, write_language_model


def measure(folder: Path) -> Measured:
    assert f"open_clip {open_clip.__version__}" == OPEN_CLIP
    write_model(folder / "tower")
    theirs = open_clip.create_model(f"local-dir:{folder / 'tower'}").visual.eval()

    def tower_difference(model) -> float:
        pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            ours = model.config.tower.encode(model.model.vision_tower, pixels, model.config.num_vision_layers)
            states = theirs.forward_intermediates(
                pixels, indices=[model.config.num_vision_layers - 1], output_fmt="NLC", intermediates_only=True
            )
        return difference(ours, states["image_intermediates"][0])

    return compare_backbones(folder / "tower", folder / "language", write_language_model(folder), tower_difference)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure(Path(sys.argv[1]))))
