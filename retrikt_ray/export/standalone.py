"""Answers of an exported RetriKT student, with numpy, tokenizers and faiss alone.

    from answer import Model

    model = Model()                     # of the folder that this file lies in
    model.predict(["a text", ...])      # [{"label", "score", "scores", "neighbours", "ngrams"}, ...]; a pair is ("a text", "its second")

On the command line: python answer.py "a text" "another".
"""

import json
import re
import sys
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from tokenizers import Tokenizer

FLOOR = 0.02  # of a voice's probability that is spread over all classes before voices are multiplied
K1, B = 1.5, 0.75  # of BM25
# Scripts without spaces between words, counted by character: as in retrikt_ray/task/words.py.
UNSPACED = (
    "\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u1950-\u19ff\u1a20-\u1aaf\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
    "\ua9e0-\ua9ff\uaa60-\uaadf\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
WORD = rf"[{UNSPACED}]|[^\W{UNSPACED}]+"
MARKED = re.compile(rf"{WORD}|[^\w\s]")  # words and marks
BETWEEN = "\x1f"
SHARES = 10
GRID, WEIGHT = 2048, 8.0  # steps of a unit vector's components; weight of a pair's shares
SHOWN = 5


def softmax(x: Any) -> Any:
    e = np.exp(x - x.max())
    return e / e.sum()


class Model:
    """The student, its store and its n-gram memory."""

    def __init__(self, folder: Any = None) -> None:
        folder = Path(folder or Path(__file__).parent)
        self.card = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        arrays = np.load(folder / "weights.npz")
        self.w = {name: arrays[name] for name in arrays.files}
        self.index = faiss.read_index(str(folder / "vectors.faiss"))
        self.rows = [json.loads(line) for line in (folder / "store.jsonl").open(encoding="utf-8")]
        self.told = {folded((r["text"], r.get("text_pair"))): i for i, r in enumerate(self.rows) if r["source"] == "added"}
        self.mixture = self.card["mixture"]
        self.postings: Any = self.count_words() if self.mixture["lexical"] else None

    def predict(self, texts: Any, evidence: bool = True) -> Any:
        """Answer some texts, each a string, or in pair tasks two of them."""
        return [self.one(t if isinstance(t, (tuple, list)) else (t, None), evidence) for t in texts]

    def one(self, text: Any, evidence: bool = True) -> Any:
        """Answer one text (first, second or None)."""
        m = self.mixture
        own, vector = self.student(text)
        total, left = np.zeros_like(own), sum(m[name] for name in ("student", "dense", "lexical", "ngrams"))
        near, similar = self.nearest(vector, m["k"])
        voices = {"dense": self.vote(near, similar, m["tau"])}
        if m["lexical"]:
            rows, scores = self.bm25(text, m["lexical_k"])
            voices["lexical"] = self.vote(rows, scores, m["lexical_tau"])
        spoken = self.spoken(text)
        voices["ngrams"] = self.of_ngrams(spoken)
        for name, answer in voices.items():
            if m[name] and answer is not None:
                total = total + m[name] * self.scaled(answer)
                left -= m[name]
        total = total + left * self.scaled(own) + np.array(m["prior"] or 0.0)
        answer = softmax(total) if len(total) > 1 else total
        told = self.told.get(folded(text))
        if told is not None:  # a row that somebody added is this text word for word
            answer = self.w["labels"][told].astype(np.float64)
        labels, best = self.card["labels"], int(answer.argmax())
        found = (
            {"label": labels[best], "score": float(answer[best])} if labels else {"label": f"{answer[0]:.3g}", "score": float(answer[0])}
        )
        found["scores"] = answer.tolist()
        if evidence:
            found["neighbours"] = [self.rows[i] | {"similarity": float(s)} for i, s in zip(near[:SHOWN], similar[:SHOWN], strict=True)]
            found["ngrams"] = self.named(spoken, best)
        return found

    # the student

    def student(self, text: Any) -> Any:
        """Answer (C,) and unit query vector (width,)."""
        sides = [self.side(part or "") for part in (text if self.card["pair"] else text[:1])]
        vector = sides[0]
        if self.card["pair"]:
            a, b = sides
            vector = np.concatenate([a, b, np.abs(a - b), a * b, self.compared(text)])
        logits = self.w["head"] @ vector + self.w["head_bias"]
        answer = softmax(logits) if len(logits) > 1 else logits * self.card["scale"] + self.card["shift"]
        return answer.astype(np.float64), vector / max(float(np.linalg.norm(vector)), 1e-12)

    def tokens(self, text: str) -> Any:
        """Token ids of a text, and their rows in the student's table."""
        ids: Any = self.tokenizer.encode(text, add_special_tokens=False).ids[: self.card["max_tokens"]]
        return np.array(ids, np.int64), self.w["token_map"][ids] if ids else np.zeros(0, np.int64)

    def compared(self, text: Any) -> Any:
        """What each text of a pair lacks of the other."""
        (a_ids, a), (b_ids, b) = (self.tokens(part or "") for part in text)
        similar = np.zeros((len(a), len(b)), np.float32)
        if similar.size:
            whole = [
                np.round(e / np.maximum(np.linalg.norm(e, axis=1, keepdims=True), 1e-12) * GRID)
                for e in (self.w["embedding"][a], self.w["embedding"][b])
            ]
            similar = np.clip(whole[0] @ whole[1].T / GRID**2, 0, 1)
        same = a_ids[:, None] == b_ids[None]
        similar[same] = 1
        return np.concatenate(
            [self.matched(a, similar.max(1, initial=0), same.any(1)), self.matched(b, similar.max(0, initial=0), same.any(0))]
        )

    def matched(self, rows: Any, best: Any, same: Any) -> Any:
        """The mean of one text's unmatched tokens; the share that is matched, and by the same token; the largest and the weightiest miss."""
        embedded, weights = self.w["embedding"][rows], np.exp(self.w["importance"][rows])
        total, missed = max(float(weights.sum()), 1e-6), weights * (1 - best)
        figures = [(weights * best).sum() / total, (weights * same).sum() / total, (1 - best).max(initial=0), missed.max(initial=0)]
        return np.concatenate([(embedded * missed[:, None]).sum(0) / total, np.array(figures, np.float32) * WEIGHT])

    def side(self, text: str) -> Any:
        """What the student makes of one text."""
        _, ids = self.tokens(text)
        embedded, weights = self.w["embedding"][ids], np.exp(self.w["importance"][ids])
        mean = (embedded * weights[:, None]).sum(0) / max(float(weights.sum()), 1e-6)
        if "filters" not in self.w:
            return mean
        if not len(ids):
            return np.concatenate([mean, np.zeros(len(self.w["filters"]), mean.dtype)])
        span = self.w["filters"].shape[1] // embedded.shape[1]
        padded = np.pad(embedded, ((span // 2, span // 2), (0, 0)))
        windows = np.concatenate([padded[i : i + len(ids)] for i in range(span)], 1)
        return np.concatenate([mean, np.maximum(windows @ self.w["filters"].T + self.w["filters_bias"], 0).max(0)])

    # what is retrieved

    def nearest(self, vector: Any, k: int) -> Any:
        similar, near = self.index.search(np.ascontiguousarray(vector[None], np.float32), min(k, len(self.rows)))
        return near[0].tolist(), similar[0]

    def vote(self, rows: Any, scores: Any, tau: float) -> Any:
        """Mean of some rows' labels, weighted by softmax of score / tau; None where there is no row."""
        return softmax(np.asarray(scores, np.float64) / tau) @ self.w["labels"][rows].astype(np.float64) if len(rows) else None

    def scaled(self, answer: Any) -> Any:
        return answer if len(answer) == 1 else np.log((1 - FLOOR) * answer + FLOOR / len(answer))

    def spoken(self, text: Any) -> Any:
        """(n-gram, its place in the table) of a text's n-grams that are known."""
        words = MARKED.findall(text[0].lower()) + ([BETWEEN, *MARKED.findall(text[1].lower())] if text[1] else [])
        keys = np.array([key_of(w) for w in words], np.uint64)
        first, second = keys[:-1], keys[1:]
        mixed = first * np.uint64(0x9E3779B97F4A7C15) + second
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        pairs = mixed ^ (mixed >> np.uint64(31))
        names = dict(zip(pairs.tolist(), (f"{a} {b}" for a, b in pairwise(words)), strict=True))
        names |= dict(zip(keys.tolist(), words, strict=True)) | {key_of(w): read for w, read in crossed(text).items()}
        table, wanted = self.w["ngram_keys"], np.array(sorted(names), np.uint64)
        at = np.minimum(np.searchsorted(table, wanted), max(len(table) - 1, 0))
        return [(names[int(k)], int(i)) for k, i in zip(wanted, at, strict=True) if len(table) and table[i] == k]

    def weights_of(self, place: int) -> Any:
        """What an n-gram says of each class, (C,)."""
        low, high = self.w["ngram_starts"][place : place + 2]
        out = np.zeros(len(self.w["ngram_bias"]))
        out[self.w["ngram_classes"][low:high]] = self.w["ngram_steps"][low:high] * float(self.w["ngram_scales"][place])
        return out

    def of_ngrams(self, spoken: Any) -> Any:
        if not spoken:
            return None
        logits = self.w["ngram_bias"] + sum(self.weights_of(place) for _, place in spoken) / np.sqrt(len(spoken))
        return softmax(logits) if len(logits) > 1 else logits

    def named(self, spoken: Any, label: int) -> Any:
        """The n-grams that say most for or against an answer."""
        says = []
        for ngram, place in spoken:
            weights = self.weights_of(place)
            says.append((float(weights[label] - (weights.mean() if len(weights) > 1 else 0)) / np.sqrt(len(spoken)), ngram))
        strongest = sorted((s for s in says if BETWEEN not in s[1]), key=lambda s: -abs(s[0]))[:SHOWN]
        return [{"ngram": ngram, "weight": weight} for weight, ngram in strongest]

    def count_words(self) -> Any:
        """Of each word the rows that hold it and how often, and the rows' lengths."""
        found: Any = {}
        lengths = np.zeros(len(self.rows), np.float32)
        for i, row in enumerate(self.rows):
            for word in plain_words((row["text"], row.get("text_pair"))):
                found.setdefault(word, {}).setdefault(i, 0)
                found[word][i] += 1
                lengths[i] += 1
        return found, lengths

    def bm25(self, text: Any, k: int) -> Any:
        """The k rows with the highest scores, best first, and the scores."""
        postings, lengths = self.postings
        scores, count, mean = np.zeros(len(lengths)), len(lengths), max(1.0, float(lengths.mean()))
        for word in plain_words(text):
            rows = postings.get(word)
            if rows:
                at, times = np.array(list(rows)), np.array(list(rows.values()), float)
                weight = np.log(1 + (count - len(rows) + 0.5) / (len(rows) + 0.5))
                scores[at] += weight * times / (times + K1 * (1 - B + B * lengths[at] / mean))
        best = np.argsort(-scores, kind="stable")[:k]
        best = best[scores[best] > 0]
        return best.tolist(), scores[best]


def key_of(word: str) -> int:
    return int.from_bytes(blake2b(word.encode(), digest_size=8).digest(), "little")


def crossed(text: Any) -> Any:
    """What the texts of a pair have in common, as words of their own, each with how it reads."""
    if not text[1]:
        return {}
    first, second = (set(MARKED.findall(part.lower())) for part in text)
    both = first & second
    found = {f"{BETWEEN}={w}": f"{w} (in both)" for w in both}
    for mark, side, name in (("<", first, "first"), (">", second, "second")):
        found |= {f"{BETWEEN}{mark}{w}": f"{w} (in the {name} alone)" for w in side - both}
        share = SHARES * len(both) // max(1, len(side))
        found[f"{BETWEEN}{mark}{BETWEEN}{share}"] = f"{share} of {SHARES} words of the {name} in both"
    return found


def folded(text: Any) -> Any:
    return tuple(None if part is None else part.casefold() for part in text)


def plain_words(text: Any) -> Any:
    return re.findall(WORD, " ".join(part for part in text if part).lower())


if __name__ == "__main__":
    for answer in Model().predict(sys.argv[1:]):
        print(json.dumps(answer, ensure_ascii=False))
