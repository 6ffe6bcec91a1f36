"""A new training objective: stage 3's loss at the coarsest and the finest level only.

An objective is a subclass of `Objective` and an entry in `OBJECTIVES`. The entry states the passes that it makes, which
configuration, `avg-llava estimate`, FLOP counts and the log read. To add the objective to the package, put the class
into a module of `avg_llava/training/`, and the entry, with the class's import path "module:TwoLevelObjective", into
`avg_llava/training/stages.py`. A configuration of stage 3 then selects it:

    objective:
      method: two_levels
"""

from avg_llava.model.modeling import ImageFeatures
from avg_llava.training.levels import TextBatch, total_log_prob
from avg_llava.training.objectives import Objective, ObjectiveOutput
from avg_llava.training.stages import OBJECTIVES, ObjectiveSpec, Passes

PASSES = Passes(levels=(0, -1))  # coarsest and finest


class TwoLevelObjective(Objective):
    """Mean of the next-token loss over the coarsest and the finest level, from one encoding of the images."""

    def loss(self, features: ImageFeatures, texts: TextBatch) -> ObjectiveOutput:
        levels = PASSES.granularities(self.config.granularities)
        total, answers = total_log_prob(self.model, features, texts, levels)
        num_items = max(self.num_items(texts.input_ids, texts.labels), 1)
        losses = -answers.log_probs.sum(dim=0) / num_items  # (2,), for the log
        return {
            "loss": -total / (len(levels) * num_items),
            "metrics": {f"loss_{level}": loss for level, loss in zip(levels, losses.unbind(), strict=True)},
            "num_items": num_items,
        }


OBJECTIVES["two_levels"] = ObjectiveSpec(TwoLevelObjective, PASSES, stages=(3,))
