"""A short form of `python -m tests.fuzz`: every verb on mutated files, each ends in a result or in one sentence."""

from __future__ import annotations

import random

import pytest

from tests import fuzz


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_verb_ends_in_a_result_or_a_sentence_whatever_a_file_holds() -> None:
    found = fuzz.main(["--cases", str(len(fuzz.VERBS))])
    assert [case for case in found if case.found] == []
    assert {case.verb for case in found} == set(fuzz.VERBS)
    assert len({case.status for case in found}) > 1, "no mutation was noticed at all"


def test_a_mutation_changes_one_place() -> None:
    tree = {"a": [1, {"b": 2}], "c": "d"}
    changed = [fuzz.mutate(tree, random.Random(seed)) for seed in range(200)]
    assert tree == {"a": [1, {"b": 2}], "c": "d"}
    assert sum(repr(one) != repr(tree) for one in changed) > 190
