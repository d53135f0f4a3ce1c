"""What the operating system refuses is a line, not a traceback."""

import pytest

from finetune import errors


def test_a_path_that_is_none(tmp_path, capsys):
    """A name beyond what file systems take, and links that lead to each other."""
    (tmp_path / "one").symlink_to(tmp_path / "other")
    (tmp_path / "other").symlink_to(tmp_path / "one")
    for path, words in ((tmp_path / ("x" * 300), "File name too long"), (tmp_path / "one", "Too many levels of symbolic links")):
        with pytest.raises(SystemExit) as end:
            errors.run(path.stat)
        said = capsys.readouterr().err
        assert end.value.code == 2 and said.startswith(f"error: {str(path)[:90]}") and f"{words} - give another path" in said
        assert said.count("\n") == 1


@pytest.mark.parametrize("kind", [13, 1, 30], ids=["of another user", "not allowed", "read-only"])
def test_what_may_not_be_touched(kind, capsys):
    def refused():
        raise OSError(kind, "refused", "base/model.safetensors")

    with pytest.raises(SystemExit) as end:
        errors.run(refused)
    assert end.value.code == 1
    assert capsys.readouterr().err == "error: base/model.safetensors: refused - change whose it is or its modes, or give another path\n"
