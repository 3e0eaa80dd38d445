"""What a report tells of the store and of the voices, beside scores. Each function is a Ray task."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow.compute as pc

from retrikt_ray.index.mixture import NAMES, mix
from retrikt_ray.report.material import Material
from retrikt_ray.runtime.folders import Folder
from retrikt_ray.runtime.tables import matrix


def store_facts(store: Folder) -> dict[str, Any]:
    """agreement: share of the generated rows that the teacher labels as asked; begin_with_a_letter: share of texts, by source."""
    table = store.read_tables(columns=["text", "source", "condition", "teacher_probs"])
    labels, source = matrix(table["teacher_probs"]), np.array(table["source"].to_pylist())
    begins = pc.utf8_is_alnum(pc.utf8_slice_codeunits(table["text"], 0, 1)).to_numpy(zero_copy_only=False)
    generated = source == "generated"
    asked = table["condition"].filter(generated).to_numpy()
    agreement = float((labels[generated].argmax(1) == asked).mean()) if generated.any() and labels.shape[1] > 1 else None
    return {"agreement": agreement, "begin_with_a_letter": {str(s): float(begins[source == s].mean()) for s in np.unique(source)}}


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
