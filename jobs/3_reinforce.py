"""Ray job, stage 3: `ray job submit --working-dir . -- python jobs/3_reinforce.py RUN [key=value ...]`."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))  # the unpacked working directory, where the package may be all there is

from retrikt_ray.cli import main

main(["reinforce", *sys.argv[1:]])
