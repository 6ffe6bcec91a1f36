"""Variants alternate, and the first result of each is the warm-up."""

from avg_llava.bench.timing import alternate, environment


def test_variants_alternate():
    calls = []
    variants = {name: lambda name=name: calls.append(name) or len(calls) for name in ("a", "b")}
    assert alternate(variants, 2, "test") == {"a": [1, 3, 5], "b": [2, 4, 6]}
    assert calls == ["a", "b"] * 3


def test_environment_names_machine_and_date():
    facts = environment()
    assert {"processor", "torch", "threads"} <= facts["machine"].keys()
    assert len(facts["measured_at"]) == len("2026-01-31")
