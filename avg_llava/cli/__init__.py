"""The command line, `avg-llava COMMAND`: one dataclass of options per command, read by tyro.

Commands import what they need when they run, so that help and usage errors take a fraction of a second. Results go to
standard output, everything else to standard error. Exit codes: 0 success, 1 failure, 2 wrong usage, 130 interrupted,
141 standard output closed by its reader.
"""

import difflib
import logging
import os
import select
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace

import tyro

from avg_llava.cli.bench import BENCH
from avg_llava.cli.checkpoints import Convert, Inspect
from avg_llava.cli.evaluation import Evaluate, Report
from avg_llava.cli.export import EXPORT
from avg_llava.cli.inference import Chat, Generate
from avg_llava.cli.mini import MINI
from avg_llava.cli.options import CLOSED_OUTPUT, FAILED, INTERRUPTED, WRONG_USAGE, Command, Group, StageCommand
from avg_llava.cli.publishing import Push
from avg_llava.cli.serving import Demo, Serve
from avg_llava.cli.training import Estimate, Feedback, Train, VerifyData

COMMANDS = Group(
    "LLaVA-NeXT that picks its visual granularity from the image and the instruction.",
    "avg-llava generate --model runs/mini/stage4 --image cat.png --prompt 'What is this?'",
    {
        "train": Train,
        "feedback": Feedback,
        "verify-data": VerifyData,
        "estimate": Estimate,
        "generate": Generate,
        "chat": Chat,
        "inspect": Inspect,
        "convert": Convert,
        "export": EXPORT,
        "push": Push,
        "demo": Demo,
        "serve": Serve,
        "evaluate": Evaluate,
        "report": Report,
        "mini": MINI,
        "bench": BENCH,
    },
    "\nshell completion (bash, zsh or fish):\n"
    "  mkdir -p ~/.local/share/bash-completion/completions\n"
    "  avg-llava --tyro-write-completion bash ~/.local/share/bash-completion/completions/avg-llava",
)
# Switches have no --no-... twin, and the word None means itself.
_MARKERS = (tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone)
tyro._experimental_options["utf8_boxes"] = False  # plain text, also in terminals


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: The words after `avg-llava`; None means those of this process.

    Returns:
        The exit code.
    """
    debug = False
    try:
        command = parse(sys.argv[1:] if arguments is None else arguments)
        debug = command.debug
        _set_up_logging(debug)
        code = command.run()
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return INTERRUPTED
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if isinstance(error, BrokenPipeError) and _is_output_closed():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # it is flushed once more at exit
            return CLOSED_OUTPUT
        if debug:
            raise
        print(f"avg-llava: {_one_line(error)}", file=sys.stderr)
        return FAILED


def parse(arguments: Sequence[str]) -> Command:
    """Parses the words after `avg-llava` into a command with its options.

    Raises:
        SystemExit: After help, and after wrong usage with code 2.
    """
    prog, rest = "avg-llava", _attach_sentences(arguments)
    node: type[Command] | Group = COMMANDS
    while isinstance(node, Group) and rest and not rest[0].startswith("-"):
        name = rest.pop(0)
        if name not in node.commands:
            matches = difflib.get_close_matches(name, node.commands, n=1)
            hint = f"did you mean {matches[0]!r}?" if matches else f"there are {', '.join(node.commands)}"
            print(f"{prog}: unknown command {name!r}; {hint}", file=sys.stderr)
            raise SystemExit(WRONG_USAGE)
        prog, node = f"{prog} {name}", node.commands[name]
    try:
        if isinstance(node, Group):
            return _subcommands(node).cli(prog=prog, description=node.description, args=rest, config=_MARKERS)
        if issubclass(node, StageCommand):
            staged, overrides = tyro.cli(node, prog=prog, args=rest, config=_MARKERS, return_unknown_args=True)
            if issubclass(node, Train) or _are_keys(overrides):
                return replace(staged, overrides=tuple(overrides))
        return tyro.cli(node, prog=prog, args=rest, config=_MARKERS)
    except SystemExit as stop:
        if stop.code == 0:  # after help
            print(node.epilog(), flush=True)
        raise


def _are_keys(words: Sequence[str]) -> bool:
    """True if words change values of a configuration: `--section.key VALUE` or `--section.key=VALUE`."""
    names = [word.partition("=")[0] for word in words if word.startswith("--")]
    return all("." in name for name in names) and all(word.startswith("--") for word in words[:1])


def _attach_sentences(arguments: Sequence[str]) -> list[str]:
    """Joins `--option` and a sentence that begins with a dash, such as a prompt, which tyro takes for an option."""
    words: list[str] = []
    for word in arguments:
        if word.startswith("-") and " " in word.partition("=")[0] and words and words[-1].startswith("--"):
            words[-1] += f"={word}"
        else:
            words.append(word)
    return words


def _subcommands(group: Group) -> tyro.extras.SubcommandApp:
    app = tyro.extras.SubcommandApp()
    for name, node in group.commands.items():
        if isinstance(node, Group):
            app.command(_subcommands(node), name=name, help=node.description)
        else:
            app.command(name=name)(node)
    return app


def _is_output_closed() -> bool:
    """Returns True if the reader of standard output, such as `head`, has closed the pipe."""
    poll = select.poll()
    poll.register(sys.stdout, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _set_up_logging(debug: bool) -> None:
    """Logs this package's messages from level INFO, and those of libraries from ERROR, or WARNING with `--debug`.

    Progress bars of libraries are shown in terminals only. Comes before the libraries are imported.
    """
    logging.basicConfig(
        level=logging.WARNING if debug else logging.ERROR, format="%(name)s: %(message)s", stream=sys.stderr
    )
    logging.getLogger("avg_llava").setLevel(logging.INFO)
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # also read by transformers
    if not debug:
        warnings.simplefilter("ignore")
        os.environ.setdefault("PYTHONWARNINGS", "ignore")  # of worker processes
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        logging.getLogger("DeepSpeed").addFilter(
            lambda record: record.levelno >= logging.ERROR
        )  # its import sets its level


def _one_line(error: Exception) -> str:
    message = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, ModuleNotFoundError):
        message += "; it belongs to an extra: pip install -e '.[train,eval,serve,demo]'"
    return message
