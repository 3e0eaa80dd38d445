"""Ray job, stage 1: `ray job submit --working-dir . -- python jobs/1_prepare.py RUN [key=value ...]`."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))  # the unpacked working directory, where the package may be all there is

from retrikt_ray.cli import main

main(["prepare", *sys.argv[1:]])
