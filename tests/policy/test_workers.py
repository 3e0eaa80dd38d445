"""Reinforcement on several workers: the curves and prompts of one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from making.policy_run import make_teacher
from safetensors.torch import load_file
from torch.testing import assert_close

from retrikt_ray.runtime.folders import Folder

SCRIPT = Path(__file__).resolve().parents[1] / "making" / "policy_workers.py"


@pytest.mark.parametrize(("algorithm", "worlds"), [("rloo", (1, 2, 3, 5)), ("ppo", (1, 3))])
def test_any_number_of_workers_gives_the_same_curves(algorithm: str, worlds: tuple[int, ...], tiny_lm: str, tmp_path: Path) -> None:
    make_teacher(Folder.at(tmp_path), tiny_lm)
    command = [sys.executable, str(SCRIPT), str(tmp_path), tiny_lm, algorithm, *map(str, worlds)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    one, *others = (json.loads((tmp_path / f"{algorithm}-{world}.json").read_text()) for world in worlds)
    assert len(one["curve"]) == 2 and len(one["watch"]) == 3 and one["curve"][1]["kl"] > 0 and len(one["reservoir"]) == 18
    for other in others:
        assert other["reservoir"] == one["reservoir"]  # the same texts, in the same order
        assert other["best_step"] == one["best_step"] and other["best_rewards"] == pytest.approx(one["best_rewards"], abs=1e-4)
        for name in ("curve", "watch"):
            for mine, theirs in zip(one[name], other[name], strict=True):
                assert theirs == pytest.approx(mine, abs=2e-4)
    first, *rest = (load_file(tmp_path / f"{algorithm}-{world}.safetensors") for world in worlds)
    for tensors in rest:
        assert_close(tensors["policy"], first["policy"], rtol=0, atol=1e-5)
