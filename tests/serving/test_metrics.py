"""What a server counts, and that dashboard and alert rules ask for nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from making.serving_local import Replica, replica
from making.tiny_run import TEXTS, make_run
from prometheus_client.parser import text_string_to_metric_families

from retrikt_ray.index.mixture import Mixture

ASKED = TEXTS[6:] + TEXTS[:6]  # voices are of different minds about the first four
OWN = (("run", ""),)  # the labels of what is of the server's own run
SERVE = Path(__file__).parents[2] / "serve"


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replica]:
    """A replica that everything has happened to once."""
    run = str(make_run(tmp_path_factory.mktemp("runs") / "run", mixture=Mixture(0.3, 1.0, 1.0, 0.3, 4, 0.02, 4, 1.0)))
    with pytest.MonkeyPatch.context() as patch, replica(run, max_batch=4) as opened:
        patch.setattr("retrikt_ray.serving.answering.opened.SAMPLED_S", 1e9)
        opened.together([("predict", {"inputs": text}) for text in ASKED])
        for route in ("explain", "retrieve", "embed"):
            assert opened.post(route, {"inputs": TEXTS}).status_code == 200
        opened.post("predict", {})
        row = {"id": "new", "text": "a zebra film", "label": "negative"}
        opened.request("PUT", "/knowledge", json={"rows": [row]})
        opened.request("DELETE", "/knowledge?id=new")
        opened.post("predict", {"inputs": "a film"})
        opened.endpoint.swap("/nowhere")
        opened.endpoint.swap(run)
        yield opened


def samples(opened: Replica) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """Values by name and labels; without the times at which a figure began, which Prometheus's own parser adds."""
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(opened.get("/metrics").text):
        for sample in family.samples:
            if not sample.name.endswith("_created"):
                found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return found


def test_what_is_counted(asked: Replica) -> None:
    found = samples(asked)
    requests = {dict(labels)["route"] + " " + dict(labels)["status"]: value for labels, value in found["retrikt_requests_total"].items()}
    assert requests["POST /predict 200"] == 13 and requests["POST /predict 422"] == 1 and requests["PUT /knowledge 200"] == 1
    phases = {dict(labels)["phase"] for labels in found["retrikt_phase_seconds_count"]}
    assert phases == {"queue", "tokenise", "student", "dense", "lexical", "ngrams", "mix", "write"}
    assert sum(found["retrikt_batch_requests_count"].values()) == 3 + 3 + 1  # twelve predictions by four, and one by one
    assert found["retrikt_batch_requests_sum"][()] == 12 + 3 + 1
    assert found["retrikt_texts_total"][()] == 12 + 3 * 12 + 1
    assert found["retrikt_knowledge_version"][OWN] == 2 and found["retrikt_knowledge_rows"][OWN] == 12
    assert {dict(labels)["outcome"]: value for labels, value in found["retrikt_swaps_total"].items()} == {"refused": 1, "taken": 1}
    assert found["retrikt_swap_refused"][OWN] == 0
    # One batch was sampled: the first four texts.
    assert found["retrikt_sampled_texts_total"][()] == 4
    decided = {dict(labels)["voice"]: value for labels, value in found["retrikt_decided_total"].items()}
    answers = asked.post("explain", {"inputs": ASKED[:4]}).json()
    want = {
        name: sum(answer["without"][name][0]["label"] != answer["prediction"][0]["label"] for answer in answers if answer["without"][name])
        for name in ("student", "dense", "lexical", "ngrams")
    }
    assert {name: decided.get(name, 0) for name in want} == want and decided["dense"] == 2 and decided["lexical"] == 1


def expressions() -> Iterator[str]:
    board = json.loads((SERVE / "grafana.json").read_text())
    yield from (target["expr"] for panel in board["panels"] for target in panel["targets"])
    yield from (rule["expr"] for group in yaml.safe_load((SERVE / "alerts.yaml").read_text())["groups"] for rule in group["rules"])


def test_dashboard_and_alerts_ask_for_what_there_is(asked: Replica) -> None:
    found, used = samples(asked), set()
    labels = {name: {label for one in values for label, _ in one} for name, values in found.items()}
    for expression in expressions():
        names = re.findall(r"\bretrikt_\w+", expression)
        used |= set(names)
        known = set[str]().union(*(labels[name] for name in names))
        asked_for = {word for group in re.findall(r"by \(([\w, ]+)\)", expression) for word in group.split(", ")}
        asked_for |= set(re.findall(r"[{,](\w+)=~?\"", expression)) - {"job"}
        assert asked_for <= known, expression
        assert expression.count("(") == expression.count(")") and expression.count("{") == expression.count("}")
    histograms = {"retrikt_request_seconds", "retrikt_phase_seconds", "retrikt_batch_requests"}
    counted = {re.sub(r"_(bucket|sum|count)$", "", name) if not name.endswith("_total") else name for name in found}
    shown = {next((h for h in histograms if name.startswith(h)), name) for name in used}
    assert shown == counted, "what is counted is shown, and the other way round"
    assert len({panel["id"] for panel in json.loads((SERVE / "grafana.json").read_text())["panels"]}) == 12


def test_alerts_are_rules(asked: Replica) -> None:
    for group in yaml.safe_load((SERVE / "alerts.yaml").read_text())["groups"]:
        for rule in group["rules"]:
            assert rule.keys() == {"alert", "expr", "for", "labels", "annotations"} and rule["alert"].startswith("Retrikt")
            assert rule["labels"]["severity"] in ("page", "ticket") and rule["annotations"].keys() == {"summary"}


def test_a_dashboard_has_no_panels_over_each_other() -> None:
    taken: set[tuple[int, int]] = set()
    panels: list[Any] = json.loads((SERVE / "grafana.json").read_text())["panels"]
    for panel in panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken and at["x"] + at["w"] <= 24
        taken |= cells
