"""The cache of folders of an object store: one copy a content, bounded, and never taken from under who uses it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from retrikt_ray.runtime import artifacts, copies
from retrikt_ray.runtime.folders import ArtifactError, Folder
from retrikt_ray.runtime.settings import ConfigError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of its own, in which 100 bytes have room."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("RETRIKT_CACHE_GB", "1e-7")
    monkeypatch.setattr(copies, "held", {})
    yield tmp_path / f"retrikt-{os.getuid()}"
    for lock in copies.held.values():
        os.close(lock)


def fetch(key: str, size: int = 40) -> Path:
    return copies.directory(
        key, lambda target: (target / "file").write_bytes(b"x" * size) and None, lambda target: (target / "file").exists()
    )


def forget(cache: Path, key: str, seconds: float) -> None:
    """As if it had been asked for so long ago."""
    then = time.time() - seconds
    os.utime(cache / f"{key}.held", (then, then))


def there(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir() if path.is_dir()}


def test_what_is_there_is_not_copied_again(cache: Path) -> None:
    assert (fetch("a") / "file").read_bytes() == b"x" * 40
    (cache / "a" / "file").write_bytes(b"mine")
    assert (fetch("a") / "file").read_bytes() == b"mine"
    (cache / "a" / "file").unlink()  # not whole any more
    assert (fetch("a") / "file").read_bytes() == b"x" * 40


def test_what_was_asked_for_longest_ago_goes_first(cache: Path) -> None:
    for age, key in ((3000, "a"), (4000, "b"), (2000, "c")):
        fetch(key, 30)
        forget(cache, key, age)
    fetch("d", 30)  # 120 bytes
    assert there(cache) == {"a", "c", "d"}
    fetch("a", 30)
    fetch("e", 30)
    assert there(cache) == {"a", "d", "e"}


def test_what_is_larger_than_the_cache_is_there_nevertheless(cache: Path) -> None:
    fetch("a")
    forget(cache, "a", 3000)
    assert fetch("b", 500).exists() and there(cache) == {"b"}


def test_what_was_handed_out_lately_or_is_open_or_mapped_stays(cache: Path) -> None:
    import mmap

    with (fetch("open") / "file").open("rb"), (fetch("mapped") / "file").open("r+b") as file:
        mapped = mmap.mmap(file.fileno(), 0)
        file.close()
        fetch("lately")
        for key in ("open", "mapped"):
            forget(cache, key, 3000)
        fetch("more")
        assert there(cache) == {"open", "mapped", "lately", "more"}
        mapped.close()
        fetch("most")
        assert there(cache) == {"open", "lately", "more", "most"}


def test_what_another_process_holds_stays_until_it_dies(cache: Path) -> None:
    code = """
from retrikt_ray.runtime import copies
copies.directory("theirs", lambda target: (target / "file").write_bytes(b"x" * 90) and None, lambda target: True)
print("there", flush=True)
input()
"""
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "there\n"
    forget(cache, "theirs", 3000)
    fetch("mine")
    assert there(cache) == {"theirs", "mine"}
    other.kill()
    other.communicate()
    fetch("more", 30)
    assert there(cache) == {"mine", "more"}


def test_what_a_killed_process_left_is_removed(cache: Path) -> None:
    fetch("a")
    for name in ("a.tmp-1", "b.tmp-1"):
        (cache / name).mkdir()
        (cache / name / "file").write_bytes(b"x" * 90)
    (cache / "a" / "file").unlink()
    fetch("a")
    assert there(cache) == {"a"}


def test_a_copy_that_failed_leaves_nothing(cache: Path) -> None:
    def fail(target: Path) -> None:
        (target / "file").write_bytes(b"x")
        raise OSError("no more room")

    with pytest.raises(OSError, match="no more room"):
        copies.directory("a", fail, lambda target: True)
    assert there(cache) == set()


def test_a_limit_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETRIKT_CACHE_GB", "much")
    with pytest.raises(ConfigError, match="RETRIKT_CACHE_GB='much': expected a number of gigabytes"):
        fetch("a")


def test_equal_contents_are_one_copy(cache: Path, s3: str) -> None:
    home = Folder.at(f"{s3}/copies-{uuid.uuid4().hex[:8]}")
    for name in ("one", "two"):
        (home / name).write_bytes("part/weights", b"12345")
        artifacts.seal(home / name, stage=name, fingerprint="f", config={}, inputs={}, seed=0, started=time.time())
    copy = (home / "one").local()
    assert (copy / "part" / "weights").read_bytes() == b"12345" and (home / "two").local() == copy
    home.write_bytes("two/part/weights", b"54321")
    (copy / "part" / "weights").write_bytes(b"53124")  # neither is what the manifest says
    with pytest.raises(ArtifactError, match="two/part/weights was altered"):
        (home / "two").local()


def test_a_folder_without_a_manifest_is_copied_once_until_it_changes(cache: Path, s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder.at(f"{s3}/copies-{uuid.uuid4().hex[:8]}")
    folder.write_bytes("a", b"1")
    first = folder.local()
    assert folder.local() == first and (first / "a").read_bytes() == b"1"
    folder.write_bytes("a", b"2")
    assert (folder.local() / "a").read_bytes() == b"2"
