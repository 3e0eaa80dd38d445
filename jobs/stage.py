"""Ray job, one stage: `ray job submit --working-dir . -- python jobs/stage.py STAGE RUN [key=value ...]`.

A run is the stages in order, so a scheduler of its own can submit them one by one and give each its own share of a cluster:

    for stage in prepare teach reinforce generate harvest annotate distill index evaluate; do
        ray job submit --working-dir . -- python jobs/stage.py $stage s3://bucket/run || break
    done
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))  # the unpacked working directory, where the package may be all there is

from retrikt_ray.cli import main
from retrikt_ray.pipeline import STAGES

names = [stage.name for stage in STAGES]
if not sys.argv[1:] or sys.argv[1] not in names:
    found = f"found {sys.argv[1]!r}" if sys.argv[1:] else "found nothing"
    sys.exit(f"error: expected STAGE RUN [key=value ...], {found}; the stages are {', '.join(names)}")

main(sys.argv[1:])
