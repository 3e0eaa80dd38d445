"""Ray job, stage 8: `ray job submit --working-dir . -- python jobs/8_evaluate.py RUN [key=value ...]`."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))  # the unpacked working directory, where the package may be all there is

from retrikt_ray.cli import main

main(["evaluate", *sys.argv[1:]])
