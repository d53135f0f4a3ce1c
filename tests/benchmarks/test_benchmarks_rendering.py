"""benchmarks/rendering.py to its end, small."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
def test_all_three_parts(tmp_path):
    small = "--megabytes 0.2 --conversations 700 --rendered 300".split()
    command = [sys.executable, str(ROOT / "benchmarks" / "rendering.py"), *small, "--json", str(tmp_path / "f.json")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == ["speed", "memory", "start"]
    found = json.loads((tmp_path / "f.json").read_text())
    assert {"machine", "versions", "commit"} <= found["about"].keys()
    assert found["speed"]["megabytes"] >= 0.2 and found["speed"]["ratio"] > 0
    assert found["memory"]["conversations"] == 700 and 0.1 < found["memory"]["peak_gb"] < 2
    assert found["start"]["conversations"] == 300 and 0 < found["start"]["seconds"] < 5
    assert list(tmp_path.iterdir()) == [tmp_path / "f.json"]
