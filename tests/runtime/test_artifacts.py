"""Artifacts: whole or not there at all, on a disk and on an object store alike."""

from __future__ import annotations

import hashlib
import os
import time
import uuid
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from retrikt_ray.runtime import artifacts
from retrikt_ray.runtime.artifacts import Manifest, check, open_draft, read_manifest
from retrikt_ray.runtime.folders import ArtifactError, Folder, canonical, digest


@pytest.fixture(params=["path", "file", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    """The same tests run on a path, a file:// URI and an object store."""
    where = {"path": str(tmp_path / "a"), "file": f"file://{tmp_path}/a", "memory": f"memory://{uuid.uuid4().hex}/a"}
    return Folder.at(where[request.param])


def seal(folder: Folder, **more: Any) -> Manifest:
    values = {"stage": "store", "fingerprint": "f1", "config": {"k": 1}, "inputs": {"task": "t1"}, "seed": 3, "started": time.time()} | more
    return artifacts.seal(folder, **values)


def filled(folder: Folder) -> Folder:
    folder.write_bytes("weights/a.bin", b"0123456789")
    folder.write_json("card.json", {"name": "ä"})
    folder.write_table("part-00000.parquet", pa.table({"id": ["x", "y"], "n": [1, 2]}))
    folder.write_table("part-00001.parquet", pa.table({"id": ["z"], "n": [3]}))
    return folder


# -- names and values --------------------------------------------------------------------------------------------------


def test_canonical_has_one_spelling_per_value() -> None:
    assert canonical({"b": 1, "a": [1.5, None, True, "ä"]}) == '{"a":[1.5,null,true,"\\u00e4"],"b":1}'
    assert canonical({"a": 1, "b": 2}) == canonical({"b": 2, "a": 1})
    assert digest({"b": 1}) == hashlib.sha256(b'{"b":1}').hexdigest()
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 2, "b": 1})


def test_folder_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Folder.at("runs/x").uri == f"{tmp_path}/runs/x"
    assert Folder.at(Path("runs")).uri == f"{tmp_path}/runs"
    assert Folder.at(f"file://{tmp_path}/a").uri == f"{tmp_path}/a"
    assert Folder.at("~/x").uri == os.path.expanduser("~/x")
    assert Folder.at("s3://bucket/run/").uri == "s3://bucket/run" and not Folder.at("s3://bucket/run/").is_local
    assert (Folder.at("s3://bucket") / "a" / "b").uri == "s3://bucket/a/b"


# -- reading and writing -----------------------------------------------------------------------------------------------


def test_round_trips(folder: Folder) -> None:
    assert not folder.exists() and folder.files() == []
    filled(folder)
    assert folder.exists() and folder.exists("card.json") and not folder.exists("other.json")
    assert folder.files() == ["card.json", "part-00000.parquet", "part-00001.parquet", "weights/a.bin"]
    assert folder.read_bytes("weights/a.bin") == b"0123456789" and folder.size("weights/a.bin") == 10
    assert folder.read_json("card.json") == {"name": "ä"}
    assert folder.read_table("part-00000.parquet", ["n"]).to_pydict() == {"n": [1, 2]}
    assert folder.read_tables().to_pydict() == {"id": ["x", "y", "z"], "n": [1, 2, 3]}
    folder.write_bytes("weights/a.bin", b"new")
    assert folder.read_bytes("weights/a.bin") == b"new"
    folder.remove("card.json")
    folder.remove("card.json")  # what is not there is removed already
    assert "card.json" not in folder.files()
    folder.remove()
    assert folder.files() == []


def test_errors_name_the_file(folder: Folder) -> None:
    folder.write_bytes("bad.json", b"{")
    folder.write_bytes("bad.parquet", b"PAR1")
    for act, words in (
        (lambda: folder.read_bytes("no.bin"), "/no.bin is missing"),
        (lambda: folder.read_json("bad.json"), "/bad.json is not JSON"),
        (lambda: folder.read_table("bad.parquet"), "/bad.parquet is not a readable Parquet file"),
        (lambda: folder.read_tables(), " holds no part-*.parquet"),
    ):
        with pytest.raises(ArtifactError) as error:
            act()
        assert f"{folder}{words}" in str(error.value)


def test_upload_and_local(folder: Folder, tmp_path: Path) -> None:
    (tmp_path / "source/deep").mkdir(parents=True)
    (tmp_path / "source/deep/x.txt").write_bytes(b"x")
    (tmp_path / "source/y.txt").write_bytes(b"y")
    folder.upload(tmp_path / "source")
    assert folder.files() == ["deep/x.txt", "y.txt"]
    seal(folder)
    local = folder.local()
    assert (local / "deep/x.txt").read_bytes() == b"x" and folder.local() == local
    if not folder.is_local:  # a changed artifact is another copy
        folder.write_bytes("y.txt", b"changed")
        folder.remove(artifacts.MANIFEST)
        seal(folder)
        assert (folder.local() / "y.txt").read_bytes() == b"changed"


def test_a_write_that_dies_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder.at(tmp_path)
    folder.write_bytes("a.bin", b"old")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    for step in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, step, killed)
            with pytest.raises(KeyboardInterrupt):
                folder.write_bytes("a.bin", b"new and longer")
        assert folder.read_bytes("a.bin") == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]
    (tmp_path / "a.bin.tmp-1234").write_bytes(b"ne")  # of a process that was killed
    assert folder.files() == ["a.bin"]  # a temporary file is no file of the artifact
    assert list(seal(folder).files) == ["a.bin"]


def test_a_folder_may_have_any_name(tmp_path: Path) -> None:
    folder = Folder.at(tmp_path / "run.tmp-1")
    folder.write_bytes("a.bin", b"a")
    assert folder.files() == ["a.bin"]


# -- manifests ---------------------------------------------------------------------------------------------------------


def test_seal_describes_the_folder(folder: Folder) -> None:
    manifest = seal(filled(folder), started=0.0, summary={"kept": 3})
    assert manifest.files["weights/a.bin"] == {"sha256": hashlib.sha256(b"0123456789").hexdigest(), "bytes": 10}
    assert sorted(manifest.files) == ["card.json", "part-00000.parquet", "part-00001.parquet", "weights/a.bin"]
    assert manifest.rows == {"part": 3} and manifest.columns == {"part": ["id: string", "n: int64"]}
    assert (manifest.started, manifest.seed, manifest.summary) == ("1970-01-01T00:00:00Z", 3, {"kept": 3})
    assert manifest.versions["pyarrow"] == pa.__version__
    assert read_manifest(folder) == manifest == check(folder) == check(folder, deep=True)
    contents = {name: file["sha256"] for name, file in manifest.files.items()}
    assert manifest.content == digest(contents)
    assert seal_again(folder).content == manifest.content  # a re-run with the same files is the same to its readers


def seal_again(folder: Folder) -> Manifest:
    folder.remove(artifacts.MANIFEST)
    return seal(folder, seed=4, fingerprint="f2")


def test_the_manifest_is_written_last(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    open_draft(folder, "f1")
    filled(folder)
    written: list[str] = []
    write = Folder.write_bytes
    monkeypatch.setattr(Folder, "write_bytes", lambda self, name, data: (written.append(name), write(self, name, data))[1])
    assert read_manifest(folder) is None
    with pytest.raises(ArtifactError, match=r"is not complete: it has no manifest\.json"):
        check(folder)
    seal(folder)
    assert written == [artifacts.MANIFEST]  # one write, after which the folder is complete
    assert artifacts.DRAFT not in folder.files() and artifacts.DRAFT not in check(folder).files


@pytest.mark.parametrize("name", ["weights/a.bin", "part-00001.parquet"])
def test_check_names_what_is_wrong(folder: Folder, name: str) -> None:
    seal(filled(folder))
    data = folder.read_bytes(name)
    folder.write_bytes(name, data[:-1])
    with pytest.raises(ArtifactError, match=rf"{name} has {len(data) - 1} bytes, its manifest says {len(data)}: truncated"):
        check(folder)
    folder.write_bytes(name, data[:-1] + bytes([data[-1] ^ 1]))
    check(folder)  # sizes alone agree
    with pytest.raises(ArtifactError, match=rf"{name} was altered"):
        check(folder, deep=True)
    folder.remove(name)
    with pytest.raises(ArtifactError, match=rf"{name} is missing"):
        check(folder)
    folder.write_bytes(name, data)
    check(folder, deep=True)


def test_a_manifest_of_another_version_is_refused(folder: Folder) -> None:
    folder.write_sealed(artifacts.MANIFEST, {"stage": "store"})
    with pytest.raises(ArtifactError, match=r"manifest\.json is not a manifest of this version"):
        check(folder)


def test_every_byte_of_a_manifest_counts(folder: Folder) -> None:
    seal(filled(folder))
    data = folder.read_bytes(artifacts.MANIFEST)
    for at in range(0, len(data), 7):
        for changed in (data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :], data[:at] + data[at + 1 :], data[:at]):
            folder.write_bytes(artifacts.MANIFEST, changed)
            with pytest.raises(ArtifactError, match=r"manifest\.json (is not JSON|was altered|has no checksum)"):
                read_manifest(folder)
    folder.write_bytes(artifacts.MANIFEST, data)
    check(folder, deep=True)


def test_sealing_twice_counts_the_same_files(folder: Folder) -> None:
    first = seal(filled(folder))
    assert seal(folder).files == first.files
    check(folder, deep=True)


# -- drafts ------------------------------------------------------------------------------------------------------------


def test_a_draft_of_the_same_fingerprint_keeps_its_files(folder: Folder) -> None:
    open_draft(folder, "f1")
    folder.write_bytes("part-1", b"1")
    open_draft(folder, "f1")
    assert folder.files() == [artifacts.DRAFT, "part-1"]


def test_a_draft_of_another_fingerprint_starts_anew(folder: Folder) -> None:
    open_draft(folder, "f1")
    folder.write_bytes("part-1", b"1")
    open_draft(folder, "f2")
    assert folder.files() == [artifacts.DRAFT]
    assert folder.read_json(artifacts.DRAFT) == {"fingerprint": "f2"}


def test_a_folder_with_draft_and_manifest_starts_anew(folder: Folder) -> None:
    open_draft(folder, "f1")
    folder.write_json(artifacts.MANIFEST, {})  # of whom, nobody knows
    open_draft(folder, "f1")
    assert folder.files() == [artifacts.DRAFT]


@pytest.mark.parametrize("fingerprint", ["f1", "f2"])
def test_a_complete_folder_that_is_written_again_starts_anew(folder: Folder, fingerprint: str) -> None:
    open_draft(folder, "f1")
    seal(filled(folder))
    open_draft(folder, fingerprint)
    assert folder.files() == [artifacts.DRAFT] and read_manifest(folder) is None


def test_files_of_unknown_origin_do_not_stay(folder: Folder) -> None:
    folder.write_bytes("part-1", b"1")
    open_draft(folder, "f1")
    assert folder.files() == [artifacts.DRAFT]


def test_the_manifest_goes_first(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while clearing, a folder must not look complete."""
    seal(filled(folder))
    removed: list[str] = []
    remove = Folder.remove
    monkeypatch.setattr(Folder, "remove", lambda self, name="": (removed.append(name), remove(self, name))[1])
    open_draft(folder, "f2")
    assert removed == [artifacts.MANIFEST, ""]
