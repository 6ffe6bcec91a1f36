"""Generated predictions for every benchmark, in the forms that models give and that scorers misread."""

import ast
import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tests.evaluation.harness import gold_answer

Doc = Mapping[str, Any]
LETTERED = ("scienceqa", "ai2d", "mmbench", "mmbench_cn")

ANY = [
    "", " ", "\n", "\t \n", ".", "...", "?!", ",", "'", "-", "()", "%", "None", "nan", "N/A", "null", "0",
    "Unanswerable", "unanswerable.", "unsuitable image", "I cannot see the picture.",
    "Failed to obtain answer via API", "🙂", "Ａ", "é", "Żółć", "\u200b", "答案是A", "答案：Ｂ。", "ＹＥＳ", "no\u00a0",
    "<image>", "</s>", "{answer}", "\\frac{1}{2}", "x" * 3000, "A B C D " * 200,
]  # fmt: skip
LETTERS = [
    "{0}", "{0}.", "{0},", "{0}:", "{0})", "({0})", "({0}).", "[{0}]", "**{0}**", "{lower}", "({lower})",
    "{lower}.", " {0} ", "{0}\n", "{0}. {option}", "{0}: {option}", "({0}) {option}", "{0} {option}",
    "{option}", "{option}.", "{title}", "{upper}", "Answer: {0}", "The answer is {0}", "The answer is {0}.",
    "The answer is ({0})", "the answer is {lower}", "Option {0}", "I think that it is {option}.",
    "It is {option} and not {other}", "A {option} is what the picture shows here", "{0} or {1}", "{0}, {1}",
    "{0}{1}", "({0}) or ({1})", "{1}, no, {0}", "Not {1} but {0}.", "{0}.{1}.", "A. B. C. D.", "A B C D",
    "{full}", "{full}.", "{0}'", "{0}!", "{0}?", "'{0}'", '"{0}"', "$\\boxed{{{0}}}$", "{0}|", "E", "F.", "Z",
    "{other}", "{0} {0}", "so {0}. therefore {1}", "{option} {other}",
    "because a picture has a background, it is {0}", "{0}\n{1}. {other}", "{0}。",
]  # fmt: skip
WORDS = [
    "{answer}", " {answer} ", "{answer}.", "{answer}!", "{upper}", "{title}", "{title}.", "the {answer}",
    "a {answer}", "an {answer}", "The {upper}", "It is {answer}.", "The answer is {answer}",
    "The answer is: {answer}.", "{answer} {answer}", "{answer}, {other}", "{other}", "{other}.", "{answer}\n",
    "{answer}\n{other}", "'{answer}'", '"{answer}"', "{answer}'s", "{answer}?", "{answer};", "{answer}/{other}",
    "{answer}-{other}", "({answer})", "[{answer}]", "{answer}%", "${answer}", "{answer} cm", "{answer} percent",
    "{answer} or {other}", "not {answer}", "so {answer}", "= {answer}", "x = {answer}", "{typo}", "{typo}.",
    "{short}", "{long}", "{swapped}", "{spaced}", "{joined}", "{wide}", "{answer}🙂", "{answer}\u200b",
    "{answer} is what I see in the picture. It is clear.", "There is {answer}. The final result is {other}",
    "dont know", "isn't {answer}", "{answer}. {answer}. {other}.", "{long} {long}",
]  # fmt: skip
YES_NO = [
    "yes", "no", "Yes", "No", "YES", "NO", "Yes.", "No.", "yes,", "no!", "y", "n", "Y", "N", "y.",
    "Yes, there is.", "yes, there is", "No, there is not", "no there isn't", "Not sure", "not", "None", "nope",
    "yeah", "yep", "yes no", "no yes", "Yes and no", "noyes", " yes ", "\nno\n", "yes\n", ".yes.", "y.e.s",
    "n.o", "The answer is yes", "The answer is no.", "I know", "know", "Yesterday", "eyes", "the yes",
    "There is no writing", "there is", "true", "false", "1", "0", "sí", "да", "是", "ｙｅｓ", "yes!!!", "'yes'",
]  # fmt: skip
NUMBERS = [
    "0", "00", "-0", "1", "1.0", "2", "3", "4", "5", "three", "Three", "none", "ten", "1e0", "1E2", "1,000",
    "1,0", "1 000", "$5", "5 %", "5%", "%5", "%", "5%%", "100%", "inf", "-inf", "nan", "infinity", "1/2", "½",
    "²", "٣", "３", "IV", "3.14.15", "1..2", ".5", "5.", "+5", "-5", "--5", "5cm", "5 cm", "about 5", "5-6",
    "0x10", "1_000", "so 5", "x = 5", "5 = x", "2.999", "1,234,567.89", "1e400",
]  # fmt: skip
NOTATIONS = ["{0}", "{0:g}", "{0:.2f}", "{0:e}", "{0:,.0f}", "{0:g}%", "{0:g} %", "{0:g}.", "${0:g}", "{0:g} units"]
FACTORS = [0.5, 0.94, 0.9499, 0.95, 0.951, 0.999, 1.0, 1.001, 1.0499, 1.05, 1.0501, 1.06, -1.0, 100.0, 0.01]


def _options(benchmark: str, doc: Doc) -> list[str]:
    if benchmark == "scienceqa":
        return list(doc["choices"])
    if benchmark == "ai2d":
        return list(doc["options"])
    if benchmark == "mmmu":
        return [str(option) for option in ast.literal_eval(doc["options"])]
    return [doc[letter] for letter in "ABCD" if doc[letter] != "nan"]


class _Maker:
    """Makes predictions about the rows of one benchmark; every form is used once before any is used again."""

    def __init__(self, benchmark: str, docs: Sequence[Doc], rng: random.Random) -> None:
        self.benchmark, self.docs, self.rng = benchmark, docs, rng
        forms = {"any": ANY, "letters": LETTERS, "words": WORDS, "yes_no": YES_NO, "numbers": NUMBERS}
        self.forms = {kind: itertools.cycle(rng.sample(texts, len(texts))) for kind, texts in forms.items()}
        self.kinds: dict[str, Callable[[Doc], str]] = {
            "any": lambda doc: next(self.forms["any"]),
            "yes_no": lambda doc: next(self.forms["yes_no"]),
            "gold": lambda doc: rng.choice(doc["answers"]) if "answers" in doc else gold_answer(benchmark, doc),
            "letters": self.lettered,
            "words": self.worded,
            "numbers": self.numeric,
        }

    def make(self, doc: Doc) -> str:
        """A prediction of a random kind that suits the row."""
        if self.benchmark in LETTERED or doc.get("question_type") == "multiple-choice":
            kinds = ["letters"] * 5
        elif self.benchmark in ("mme", "pope"):
            kinds = ["yes_no"] * 5
        else:
            kinds = ["words"] * 4 + ["numbers"] * 2 + ["yes_no"]
        return self.kinds[self.rng.choice(["any", "gold", *kinds])](doc)

    def lettered(self, doc: Doc) -> str:
        """Names two letters, the right one first or a wrong one first."""
        options = _options(self.benchmark, doc)
        letters = "ABCDE"[: len(options)]
        gold = gold_answer(self.benchmark, doc)
        first, second = self.rng.sample(letters, 2)
        if self.rng.random() < 0.6:
            first, second = gold, self.rng.choice([letter for letter in letters if letter != gold])
        option = options[letters.index(first)]
        return next(self.forms["letters"]).format(
            first,
            second,
            lower=first.lower(),
            option=option,
            other=options[letters.index(second)],
            title=option.capitalize(),
            upper=option.upper(),
            full=_full_width(first),
        )

    def worded(self, doc: Doc) -> str:
        """The right answer and another row's, in sentences, punctuation and misspellings."""
        answer = gold_answer(self.benchmark, doc)
        typo = answer
        for _ in range(self.rng.randint(1, 4)):
            index = self.rng.randrange(max(1, len(typo)))
            typo = typo[:index] + self.rng.choice(["", "z", "e", " "]) + typo[index + 1 :]
        return next(self.forms["words"]).format(
            answer=answer,
            other=gold_answer(self.benchmark, self.rng.choice(self.docs)),
            upper=answer.upper(),
            title=answer.capitalize(),
            typo=typo,
            short=answer[: len(answer) // 2],
            long=answer + "ly" * self.rng.randint(1, 4),
            swapped=answer[1:2] + answer[:1] + answer[2:],
            spaced=" ".join(answer),
            joined=answer.replace(" ", ""),
            wide=_full_width(answer),
        )

    def numeric(self, doc: Doc) -> str:
        """A number near the answer in one of many notations; an unusual number if the answer is none."""
        answer = gold_answer(self.benchmark, doc)
        digits = answer.replace(" ", "").rstrip("%")
        if not digits.isdecimal() or self.rng.random() < 0.3:
            return next(self.forms["numbers"])
        value = float(digits) * self.rng.choice(FACTORS)
        if answer.endswith("%") and self.rng.random() < 0.5:
            value /= 100
        return self.rng.choice(NOTATIONS).format(value)


def _full_width(text: str) -> str:
    return "".join(chr(ord(char) + 0xFEE0) if "!" <= char <= "~" else char for char in text)


def make_predictions(benchmark: str, docs: Sequence[Doc], num: int = 500, seed: int = 0) -> list[tuple[int, str]]:
    """Generated predictions about the rows of a benchmark, in turn, as (index of the row, prediction).

    Args:
        benchmark: One of `tests.evaluation.harness.TASKS`.
        docs: Rows with the public columns; images are not used.
        num: Number of predictions.
        seed: Seed of the generator.

    Returns:
        Predictions that are right, nearly right, wrong, or no answer at all.
    """
    maker = _Maker(benchmark, docs, random.Random(f"{seed}/{benchmark}"))
    return [(index % len(docs), maker.make(docs[index % len(docs)])) for index in range(num)]
