"""The command that uploads a model to the hub."""

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, UseAppendAction, arg

from avg_llava.cli.options import Outcome, ReportingCommand, command


@command("avg-llava push runs/mini/stage4 owner/name")
class Push(ReportingCommand):
    """Uploads a model to the hub, or shows what --yes would upload."""

    folder: Annotated[Path, Positional, arg(metavar="FOLDER")]
    """Folder of a stage's result, or of any model that this program saved."""
    repository: Annotated[str, Positional, arg(metavar="OWNER/NAME")]
    """Repository; it is created if there is none."""
    license: Annotated[str, arg(metavar="NAME")] = "other"
    """Licence of the weights for the model card, as the hub names it, such as apache-2.0."""
    results: UseAppendAction[tuple[Path, ...]] = ()
    """Result file of `avg-llava evaluate` for the card, besides those in the folder."""
    private: bool = False
    """Create the repository as a private one."""
    yes: bool = False
    """Upload; without it nothing is written or sent."""

    def compute(self) -> Outcome:
        from avg_llava.reports.publishing import plan_upload, upload
        from avg_llava.training.card import CARD_NAME

        plan = plan_upload(self.folder, self.repository, self.license, self.results)
        facts = {
            "repository": plan.repository,
            "files": plan.sizes,
            "skipped": plan.skipped,
            "front_matter": plan.front_matter,
            "card_edited": plan.is_edited,
            "commit": None,
        }
        if self.yes:
            facts["commit"] = upload(plan, self.private)
            if not plan.is_edited:
                (self.folder / CARD_NAME).write_text(plan.card, encoding="utf-8")
            return Outcome(facts, f"uploaded {len(plan.sizes)} files: {facts['commit']}")
        lines = [f"{size:>15,}  {name}" for name, size in plan.sizes.items()]
        skipped = [f"{name}: {reason}" for name, reason in plan.skipped.items()]
        text = [f"to {plan.repository}, {sum(plan.sizes.values()):,} bytes:", *lines]
        text += ["", "stays here:", *(f"  {line}" for line in skipped)] if skipped else []
        text += ["", f"{CARD_NAME}{', as edited' if plan.is_edited else ''}:", plan.front_matter.rstrip()]
        return Outcome(facts, "\n".join([*text, "", "nothing was uploaded; to upload, add --yes"]))
