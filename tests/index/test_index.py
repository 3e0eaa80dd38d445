"""The index stage beside its Ray tasks: labels of found rows, the mixture of allowed voices, and what it is told to gain."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from making.tiny_run import TEXTS, make_run

from retrikt_ray.index.index import compared, fit_on_unseen, labels_at
from retrikt_ray.index.learning import of_texts
from retrikt_ray.index.mixture import NAMES
from retrikt_ray.runtime.folders import Folder
from retrikt_ray.runtime.tables import Source


def inputs_of(run: Folder) -> dict[str, Folder]:
    return {name: run / name for name in ("task", "student", "store")}


def test_labels_of_rows_anywhere_in_the_store(tmp_path: Path) -> None:
    """Positive by 0.95, 0.93 ... in the first part of seven rows and on into the second; -1, no row, has some label that has no weight."""
    store = make_run(tmp_path / "run") / "store"
    found = labels_at(store, np.array([[0, 11, 6], [6, 0, -1]]))
    assert found.shape == (2, 3, 2)
    np.testing.assert_allclose(found[:, :, 1], [[0.95, 0.15, 0.05], [0.05, 0.95, 0.95]], atol=1e-6)
    assert labels_at(store, np.array([[8]])).shape == (1, 1, 2)


def test_only_rows_that_were_found_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, read, whole = make_run(tmp_path / "run") / "store", [], Source.read
    monkeypatch.setattr(Source, "read", lambda self, low, high, columns: read.append(low) or whole(self, low, high, columns))
    labels_at(store, np.array([[8, 9]]))
    assert read == [7]  # the second part alone


def test_what_the_mixture_gains() -> None:
    targets = np.eye(2)[[0, 0, 1, 1]]
    mixed, alone = np.array([[0.8, 0.2], [0.6, 0.4], [0.4, 0.6], [0.9, 0.1]]), np.array([[0.8, 0.2], [0.4, 0.6], [0.6, 0.4], [0.9, 0.1]])
    found = compared(targets, mixed, alone)
    assert found["rows"] == 4 and found["gain"] == 0.5  # two of four
    assert found["ci95"] == pytest.approx(1.96 * 0.5 / 2)
    assert found["loss"] == pytest.approx(-np.log([0.8, 0.6, 0.6, 0.1]).mean())
    assert found["student_loss"] == pytest.approx(-np.log([0.8, 0.4, 0.4, 0.1]).mean())
    values = compared(np.array([[1.0], [2.0]]), np.array([[1.0], [3.0]]), np.array([[3.0], [2.0]]))
    assert (values["gain"], values["loss"], values["student_loss"]) == (1.5, 0.5, 2.0)  # squared errors 4, 0 less 0, 1


@pytest.mark.parametrize("names", [list(NAMES), ["student"], ["dense", "ngrams"]])
def test_who_may_speak(tmp_path: Path, names: list[str]) -> None:
    run, held = make_run(tmp_path / "run"), np.array([1, 9])
    memory = of_texts([(t, None) for t in TEXTS], np.eye(2)[[1] * 6 + [0] * 6])
    mixture, told = fit_on_unseen(inputs_of(run), run / "index", held, memory, names, 1)
    weights = {name: getattr(mixture, name) for name in NAMES}
    assert sum(weights.values()) > 0 and not any(weights[name] for name in NAMES if name not in names)
    assert (told["rows"], told["gold"]) == (5, 3)
    if names == ["student"]:
        assert told["gain"] == 0
