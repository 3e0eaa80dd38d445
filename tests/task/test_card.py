"""The task's card."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from retrikt_ray.runtime.folders import ArtifactError, Folder
from retrikt_ray.task.card import Task

TASK = Task("trec", "classification", ("DESC", "HUM"), ("a description", "a person"), "Ask for {label}: ", False, "accuracy")


def test_a_task_survives_the_folder(tmp_path: Path) -> None:
    TASK.write(Folder.at(tmp_path))
    assert Task.read(Folder.at(tmp_path)) == TASK
    assert list(Folder.at(tmp_path).read_json("task.json")) == ["name", "problem", "labels", "conditions", "template", "pair", "metric"]


def test_a_card_of_another_version_is_refused_by_name(tmp_path: Path) -> None:
    for card in ({"name": "trec"}, vars(TASK) | {"more": 1}, []):
        Folder.at(tmp_path).write_json("task.json", card)
        with pytest.raises(ArtifactError, match=r"task\.json is not of this version: expected the keys conditions, labels"):
            Task.read(Folder.at(tmp_path))


def test_what_follows_from_it() -> None:
    assert TASK.prefixes == ["Ask for a description: ", "Ask for a person: "]
    assert (TASK.outputs, TASK.regression) == (2, False)
    assert TASK.named(np.array([0.25, 0.75])) == ("HUM", 0.75)
    value = Task("sts", "regression", (), ("0.5", "4.5"), "{label}: ", True, "pearson")
    assert (value.outputs, value.regression) == (1, True)
    assert value.named(np.array([3.14159])) == ("3.14", 3.14159)
