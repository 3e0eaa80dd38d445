"""What a report tells of the voices and of the knowledge they draw on, beside scores. Each function is a Ray task."""

from __future__ import annotations

from typing import Any

from retrikt_ray.index.mixture import NAMES, mix
from retrikt_ray.report.material import Material


def voices(material: Material) -> dict[str, Any]:
    """Of the voices that count: how many test answers each changes, beside those of all others, and how many of these it puts right or wrong.

    None in regression, where every answer changes a little.
    """
    if material.task.regression:
        return {}
    (texts, truth), mixture = material.split("test"), material.predictor.mixture
    found = material.predictor.answer(texts, evidence=False)
    whole, out = found.answers.argmax(1), {}
    for name in NAMES[1:]:
        if getattr(mixture, name):
            rest = {other: voice for other, voice in found.voices.items() if other != name}
            without = mix(found.student, rest, mixture).argmax(1)
            changed = whole != without
            right, wrong = (whole == truth) & changed, (without == truth) & changed
            out[name] = {"changed": int(changed.sum()), "put_right": int(right.sum()), "put_wrong": int(wrong.sum()), "of": len(truth)}
    return out


def numbers(material: Material) -> dict[str, int]:
    """What an answer may draw on beside the student's parameters: numbers in vectors, labels and n-gram weights."""
    view = material.predictor.knowledge.view
    count, width = view.count, view.base.card["width"]
    return {"rows": count, "vectors": count * width, "labels": int(view.labels.size), "ngrams": view.ngrams.numbers}
