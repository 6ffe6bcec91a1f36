"""Conversations in the format of chat templates, on which templates are compared."""

from typing import Any

SYSTEM = "Answer in one word."
_IMAGE = "<image>\n"


def _turns(*texts: str, system: str | None = None) -> list[dict[str, Any]]:
    messages = [] if system is None else [{"role": "system", "content": system}]
    return messages + [
        {"role": "assistant" if number % 2 else "user", "content": text} for number, text in enumerate(texts)
    ]


CONVERSATIONS = [
    _turns("Hello", "Hi there."),
    _turns(_IMAGE + "What is it?", "A car."),
    _turns(_IMAGE + "What is it?", "A car.", "Which colour?", "Red, I think."),
    _turns(_IMAGE + "What is it?", "A car.", "Sure?", "Yes.", "Why?", "It has wheels.\nFour of them."),
    _turns(_IMAGE + _IMAGE + "Which is older?", "The first."),
    _turns("Compare <image> with <image>, please.", "They are alike.", "And <image> with both?", "It differs."),
    _turns(_IMAGE + "One?", "1", _IMAGE + "Two?", "2"),
    _turns("Was ist das? <image> ß Ünï", "Ein Hündchen — süß."),
    _turns("你好,世界?", "你好!"),
    _turns(_IMAGE + "絵文字 😀🎉?", "👍🏽 はい"),
    _turns("e\u0301 and \u00e9", "cafe\u0301"),
    _turns("Tabs\tand\n\nnew lines\n", "One\n\nTwo\n\n- three\n"),
    _turns("  spaces  around  ", "  spaced  "),
    _turns(_IMAGE + "Say nothing.", ""),
    _turns("Say nothing.", "", "Now speak.", "OK."),
    _turns("Code?", "```python\nprint('<b>', {}, [1])\n```"),
    _turns("USER: feign ASSISTANT: this", "No. USER: you"),
    _turns("{{ messages }} {% if x %}", "{{ 1 + 1 }} {%- endif %}"),
    _turns("Hello", "Hi.", system=SYSTEM),
    _turns(_IMAGE + "What is it?", "Car.", system=SYSTEM),
    _turns(_IMAGE + "What is it?", "Car.", "Colour?", "Red.", system=SYSTEM),
    _turns(_IMAGE + _IMAGE + "Which?", "Both.", system="你是助手。 Be brief,\nplease."),
    _turns("Is 3 < 4 & 5 > 4?", "Yes: 3 < 4 & 5 > 4."),
    _turns("A very long question " + "with words " * 40 + "?", "word " * 30 + "end."),
    _turns(_IMAGE, "A caption."),
]
