"""Which checkpoints of a run are complete, which one a run goes on from, and which are kept."""

import pytest

from finetune.errors import UserError
from finetune.folders import checkpoints, output_folder


def test_checkpoints_of_this_launch(tmp_path):
    """Whole or not; with one of the run's agents in common, as the others may have come back as new ones."""
    (tmp_path / "checkpoint-3").mkdir()
    assert not checkpoints.of_launch(tmp_path, ["a"])
    (tmp_path / "checkpoint-3" / output_folder.RECORD).write_text('{"launches": ["a", "b"]}')
    assert checkpoints.of_launch(tmp_path, ["b", "c"])
    assert not checkpoints.of_launch(tmp_path, ["c"]) and not checkpoints.of_launch(tmp_path, [])


def test_checkpoints_in_order_and_complete_only(tmp_path):
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-11", "checkpoint-x"):
        (tmp_path / name).mkdir()
        for file in ("trainer_state.json", "optimizer.pt", "scheduler.pt"):
            if (name, file) != ("checkpoint-11", "optimizer.pt"):  # as --save_only_model leaves it
                (tmp_path / name / file).write_text("{}")
    assert [path.name for path in checkpoints.complete(tmp_path)] == ["checkpoint-9", "checkpoint-10"]
    assert checkpoints.resume_point(tmp_path, "auto").name == "checkpoint-10"
    assert checkpoints.resume_point(tmp_path, "True").name == "checkpoint-10"
    assert checkpoints.resume_point(tmp_path, None) is None
    assert checkpoints.resume_point(tmp_path / "empty", "auto") is None
    assert checkpoints.resume_point(tmp_path, str(tmp_path / "checkpoint-9")).name == "checkpoint-9"
    with pytest.raises(UserError, match="no complete checkpoint there"):
        checkpoints.resume_point(tmp_path, str(tmp_path / "checkpoint-11"))


def test_keep_newest_spares_the_best(tmp_path):
    for step in (1, 2, 3, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
        for file in ("trainer_state.json", "optimizer.pt", "scheduler.pt"):
            (tmp_path / f"checkpoint-{step}" / file).write_text("{}")
    checkpoints.keep_newest(tmp_path, None)
    assert len(checkpoints.complete(tmp_path)) == 4
    checkpoints.keep_newest(tmp_path, 2, best=str(tmp_path / "checkpoint-1"))
    assert [path.name for path in checkpoints.complete(tmp_path)] == ["checkpoint-1", "checkpoint-4"]


def test_a_folder_without_a_number_has_no_place_in_the_order(tmp_path):
    assert [checkpoints.number(tmp_path / name) for name in ("checkpoint-12", "kept", "kept-3", "checkpoint-x")] == [12, -1, -1, -1]
