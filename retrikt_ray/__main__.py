"""`python -m retrikt_ray` is the `retrikt` command."""

from retrikt_ray.cli import main

main()
