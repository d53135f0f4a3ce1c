"""JSON files: what is written is JSON."""

import json

from finetune.folders import config_files


def test_numbers_that_json_does_not_know_become_text():
    given = {"a": [float("inf"), (1.5, float("nan"))], "b": {"c": -float("inf"), "d": None, "e": True, "f": "x"}}
    found = config_files.finite(given)
    assert found == {"a": ["inf", [1.5, "nan"]], "b": {"c": "-inf", "d": None, "e": True, "f": "x"}}
    json.dumps(found, allow_nan=False)
