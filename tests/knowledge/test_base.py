"""What edits look up in a base, beside the same read from all rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from making.tiny_run import make_run

from retrikt_ray.knowledge.base import Base
from retrikt_ray.knowledge.knowledge import Knowledge
from retrikt_ray.runtime.tables import matrix


@pytest.fixture
def knowledge(tmp_path: Path) -> Knowledge:
    """A run with rows added, one of them twice by its text, one updated and some deleted."""
    knowledge = Knowledge.open(str(make_run(tmp_path / "run")))
    knowledge.add([{"id": f"new-{i}", "text": f"new {i // 2}", "label": ("negative", "positive")[i % 2]} for i in range(6)])
    knowledge.update([{"id": "new-4", "text": "changed", "label": "negative"}])
    knowledge.delete([*knowledge.view.base.ids.take(pa.array([0, 3])).to_pylist(), "new-3"])
    return knowledge


def test_a_base_finds_what_its_rows_hold(knowledge: Knowledge) -> None:
    base = knowledge.view.base
    count, ids = base.rows.num_rows, base.rows["id"].to_pylist()
    assert len(base.pieces[0]) > 1
    for positions in ([], [0], [count - 1], list(range(0, count, 3))):
        assert base.taken(np.array(positions, np.int64)).to_pylist() == base.rows.take(pa.array(positions, pa.int64())).to_pylist()
    assert [base.positions(name) for name in ids] == [[i] for i in range(count)]
    assert base.positions("") == base.positions("zzz") == base.positions("row") == []
    assert dict(base.sources) == {s: base.rows["source"].to_pylist().count(s) for s in set(base.rows["source"].to_pylist())}


def test_a_view_is_what_its_rows_say(knowledge: Knowledge) -> None:
    view = knowledge.view
    rows = view.rows.to_pylist()
    live = [i for i, alive in enumerate(view.alive) if alive]
    assert view.count == len(live) == len(rows) - 4  # two of the base, a deleted one, and what the update replaced
    assert view.find([row["id"] for row in rows]) == {rows[i]["id"]: i for i in live}
    assert view.sources == sorted({rows[i]["source"] for i in live})
    positions = np.array([[len(rows) - 1, 2, -1], [0, len(rows) - 5, 1]])
    np.testing.assert_array_equal(view.labels_of(positions)[positions >= 0], matrix(view.rows["teacher_probs"])[positions[positions >= 0]])
    np.testing.assert_array_equal(view.labels, matrix(view.rows["teacher_probs"]))
    assert view.ids_of(positions[positions >= 0]) == [rows[p]["id"] for p in positions[positions >= 0]]
    newest = {text: max(i for i in live if rows[i]["text"] == text) for text in ("new 0", "new 1", "new 2", "changed")}
    asked = [(text.upper(), None) for text in newest] + [(rows[2]["text"], None)]
    assert view.told_of(asked).tolist() == [*newest.values(), -1]


def test_told_rows_are_found_in_a_base_too(knowledge: Knowledge) -> None:
    assert knowledge.compact()
    view = knowledge.view
    assert view.log is not None and not view.log.edits
    (twice,) = view.told_of([("new 0", None)])
    assert view.row(int(twice))["id"] == "new-1"
    knowledge.delete("new-1")
    (once,) = knowledge.view.told_of([("new 0", None)])
    assert knowledge.view.row(int(once))["id"] == "new-0"  # the one before speaks again


def test_an_edit_leaves_the_columns_of_the_base_alone(knowledge: Knowledge, monkeypatch: pytest.MonkeyPatch) -> None:
    knowledge.view.told_of([("a", None)])
    held = {name: getattr(knowledge.view.base, name) for name in ("labels", "ids", "by_id", "told", "pieces")}
    sizes: list[int] = []
    monkeypatch.setattr("retrikt_ray.knowledge.base.matrix", lambda column: sizes.append(len(column)) or matrix(column))
    before = knowledge.view
    knowledge.add([{"text": "one more", "label": "negative"}])
    knowledge.delete(before.base.ids[5].as_py())
    assert knowledge.view is not before and isinstance(knowledge.view.base, Base)
    assert all(getattr(knowledge.view.base, name) is value for name, value in held.items())
    assert not sizes
    assert set(before.edits) <= set(knowledge.view.edits)
