"""The config: strict, with errors that name the key; and every config that the repository ships loads."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from retrikt_ray.config import RunConfig, documentation, load, parse
from retrikt_ray.runtime.settings import ConfigError, all_keys, nearest_key

ROOT = Path(__file__).parents[1]


def error_of(text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        parse(text, "x.yaml", overrides)
    return str(error.value)


def test_defaults() -> None:
    assert parse("", "x.yaml") == RunConfig()
    assert parse("seed: 3\ndistill: {epochs: 7}", "x.yaml").distill.epochs == 7
    assert parse("seed: 3", "x.yaml").distill == RunConfig().distill


def test_a_config_does_not_change_after_loading() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        parse("", "x.yaml").seed = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("distill: {epoch: 3}", "distill.epoch: there is no such key; did you mean distill.epochs?"),
        ("distil: {epochs: 3}", "distil: there is no such key; did you mean distill?"),
        ("kd: 3", "kd: there is no such key; did you mean distill.kd?"),
        (
            "reinforce: {weights: {fluentcy: 1}}",
            "reinforce.weights.fluentcy: there is no such key; did you mean reinforce.weights.fluency?",
        ),
        ("reinforce: {contrast: 1}", "reinforce.contrast: there is no such key; did you mean teach.contrast?"),
        ("zzzzzz: 3", "zzzzzz: there is no such key"),
        ("distill: {epochs: many}", "distill.epochs: found 'many'; input should be a valid integer"),
        ("distill: {epochs: 0}", "distill.epochs: found 0; input should be greater than or equal to 1"),
        ("reinforce: {weights: {domain: .inf}}", "reinforce.weights.domain: found inf; input should be a finite number"),
        ("distill: 3", "distill: found 3; input should be"),
        ("distill: {kind: dynamic}", "distill.kind: found 'dynamic'; input should be 'static', 'convolution' or 'transformer'"),
        ("prepare: {n_per_class: 4, n_rows: 8}", "give n_per_class or n_rows, not both"),
        ("prepare: {n_per_class: 4, problem: regression}", "n_per_class needs classes; use n_rows in regression"),
    ],
)
def test_errors_name_the_key(text: str, words: str) -> None:
    message = error_of(text)
    assert message.startswith("x.yaml:") and words in message
    if "did you mean" not in words:
        assert "did you mean" not in message


def test_all_errors_are_told_at_once() -> None:
    message = error_of("distill: {epoch: 3, batch: x}\nseed: -1")
    assert len(message.splitlines()) == 4 and "distill.batch" in message and "seed: found -1" in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed: 1\nseed: 2", "x.yaml, line 2: the key 'seed' is written twice"),
        ("distill:\n  epochs: 3\n  kd: 1\n  epochs: 4", "x.yaml, line 4: the key 'epochs' is written twice"),
        ("- seed", "x.yaml: found list, expected a mapping of sections"),
        ("seed", "x.yaml: found str, expected a mapping of sections"),
        ("[]", "x.yaml: found list, expected a mapping of sections"),
        ("false", "x.yaml: found bool, expected a mapping of sections"),
        ("seed: [1", "x.yaml: not YAML"),
        ("seed: !!python/object:os.system {}", "x.yaml: not YAML"),
        ("[1, 2]: 3", "x.yaml"),
    ],
)
def test_yaml_is_read_strictly(text: str, words: str) -> None:
    assert words in error_of(text)


def test_a_merged_key_may_be_overridden() -> None:
    got = parse("annotate: {<<: {batch: 4, min_words: 3}, batch: 5}", "x.yaml").annotate
    assert (got.batch, got.min_words) == (5, 3)


# -- overrides ---------------------------------------------------------------------------------------------------------


def test_overrides_win_over_the_file_and_are_yaml() -> None:
    overrides = ["distill.epochs=4", "prepare.data=hf://datasets/a/b", "evaluate.store_fractions=[0.1, 0.2]", "teach.contrast=1e-1"]
    overrides += ["prepare.label_names={HUM: a person}", "distill.model=", "reinforce.weights.domain=2", "prepare.template='{label} = '"]
    got = parse("distill: {epochs: 3, kd: 0.5}", "x.yaml", overrides)
    assert (got.distill.epochs, got.distill.kd, got.distill.model) == (4, 0.5, None)
    assert got.prepare.data == "hf://datasets/a/b" and got.prepare.label_names == {"HUM": "a person"}
    assert got.prepare.template == "{label} = "  # only the first = counts
    assert got.evaluate.store_fractions == [0.1, 0.2]
    assert got.reinforce.weights.domain == 2.0
    assert got.teach.contrast == pytest.approx(0.1)
    assert parse("", "x.yaml", ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ("distill.epochs", "override 'distill.epochs': expected key=value"),
        ("=3", "override '=3': expected key=value"),
        ("distill.epoch=3", "distill.epoch: there is no such key; did you mean distill.epochs?"),
        ("seed.x=3", "override 'seed.x=3': seed is not a section"),
        ("seed=[1", "override 'seed=[1': the value is not YAML"),
        ("seed=many", "seed: found 'many'"),
    ],
)
def test_errors_in_overrides(item: str, words: str) -> None:
    message = error_of("seed: 1", item)
    assert words in message
    assert item in message


# -- files -------------------------------------------------------------------------------------------------------------


def test_load(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("seed: 5\nprepare: {name: Käse}", encoding="utf-8")
    got = load(str(file), ["distill.epochs=2"])
    assert (got.seed, got.prepare.name, got.distill.epochs) == (5, "Käse", 2)
    with pytest.raises(ConfigError, match=r"no\.yaml: no such config file"):
        load(str(tmp_path / "no.yaml"))
    file.write_bytes(b"seed: 5 # \xff")
    with pytest.raises(ConfigError, match=r"a\.yaml: byte 10 is not UTF-8"):
        load(str(file))


def shipped() -> list[Path]:
    return sorted(
        path
        for folder in ("jobs", "retrikt_ray")
        for path in (ROOT / folder).rglob("*.y*ml")
        if "apiVersion:" not in path.read_text() and not path.name.startswith("bench")  # tests/test_docs.py loads that
    )


def test_there_are_shipped_configs() -> None:
    assert "retrikt_ray/quickstart/config.yaml" in [p.relative_to(ROOT).as_posix() for p in shipped()]
    quickstart = load(None)
    assert quickstart.prepare.data == "quickstart" and quickstart.teach.base == "embedded"


@pytest.mark.parametrize("path", shipped(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_shipped_config_loads(path: Path) -> None:
    assert isinstance(load(str(path)), RunConfig)


def test_documentation_lists_every_key_beside_its_default() -> None:
    text = documentation()
    for key in all_keys(RunConfig):
        if key in ("reinforce.weights", *(k for k in RunConfig.model_fields if k != "seed")):
            assert f"\n## {key}\n" in text
            continue
        section, _, leaf = key.rpartition(".")
        rows = text.split(f"\n## {section or '(top level)'}\n")[1].split("\n## ")[0].splitlines()
        row = next((r for r in rows if r.startswith(f"| `{leaf}` |")), None)
        assert row is not None, f"{key} is not documented"
        cells = re.split(r"(?<!\\) \| ", row)
        assert len(cells) == 4 and len(cells[3]) > 10, f"{key} has no description"
    assert "| `seed` | int | `0` | Seed of everything" in text
    assert "| `epochs` | int | `30` | Passes over the store" in text


# -- settings ----------------------------------------------------------------------------------------------------------


def test_all_keys() -> None:
    keys = all_keys(RunConfig)
    assert keys[:3] == ["seed", "prepare", "prepare.data"] and "reinforce.weights.fidelity" in keys
    assert len(keys) == len(set(keys))


def test_nearest_key() -> None:
    assert nearest_key(RunConfig, "distill.epoch") == "distill.epochs"
    assert nearest_key(RunConfig, "nprobe") == "index.nprobe"
    assert nearest_key(RunConfig, "qqqqq") is None


def test_keys_of_scale_are_no_part_of_a_fingerprint() -> None:
    one, eight = parse("distill: {workers: 1}", "x").distill, parse("distill: {workers: 8, cpus_per_worker: 2}", "x").distill
    assert one.fingerprint_view() == eight.fingerprint_view()
    assert "workers" not in one.fingerprint_view() and one.fingerprint_view()["epochs"] == 30
    assert parse("distill: {epochs: 2}", "x").distill.fingerprint_view() != one.fingerprint_view()
