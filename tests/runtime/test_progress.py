"""Progress as it is seen: lines in a log, and one line that changes in place in a real notebook."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from making.tiny_run import make_run
from nbclient import NotebookClient

from retrikt_ray.runtime import progress
from retrikt_ray.runtime.progress import Tracker


def test_a_log_gets_a_line_with_rate_and_time_left(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    work = Tracker("write", 40, "rows", began=100.0, _last_line=100.0)
    now[0] += 4
    work.advance(10)
    assert capsys.readouterr().out == ""  # not every advance is worth a line
    now[0] += 8
    work.advance(10, "loss 1.25")
    assert capsys.readouterr().out == "write: 20/40 rows, 1.25/s, 16 s left  loss 1.25\n"  # 10 rows in the 8 s since the first came


def test_the_rate_before_and_after_the_first_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    work = Tracker("write", 10, "rows", began=0.0)
    now[0] = 2.0
    assert work.rate() == 0.0
    work.set(4)
    assert work.rate() == 2.0  # since it began
    now[0] = 3.0
    work.set(7)
    assert work.rate() == 3.0  # since the first progress: workers take a while to start


def test_in_a_notebook(tmp_path: Path) -> None:
    """One output that is written over, and answers as tables."""
    run = make_run(tmp_path / "run")
    cells = [
        "import time\nfrom retrikt_ray.runtime.progress import track\nwith track('write', 3, 'rows') as work:\n"
        "    for _ in range(3):\n        time.sleep(0.6)\n        work.advance(1, 'well')",
        f"from retrikt_ray import Predictor\nPredictor.open({run.uri!r}).predict(['a <b> film', 'never dull'])",
    ]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    client = NotebookClient(book, timeout=120, kernel_name="python3")
    client.execute()
    shown = [o for o in book.cells[0].outputs if o.output_type == "display_data"]
    assert len(shown) == 1 and shown[0]["data"]["text/plain"].startswith("write: 3 rows, "), book.cells[0].outputs
    answer = next(o for o in book.cells[1].outputs if o.output_type == "execute_result")
    assert "<table>" in answer["data"]["text/html"] and "a &lt;b&gt; film" in answer["data"]["text/html"]
    assert "never dull" in answer["data"]["text/plain"]
