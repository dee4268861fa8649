"""Samples futures from a trained world model.

    python sample.py --checkpoint runs/quickstart --data data/doom/quickstart --out samples
    python sample.py --checkpoint maze --actions "forward*8,turn_left*4" --out samples
    python sample.py --checkpoint runs/quickstart --image photo.jpg --actions "forward*8,turn_left(10)*8" --out samples

Writes for every sample a video (.mp4 and .gif) and a strip (.png: context, truth, prediction) of its rollout, frame by
frame; direct.png shows all samples with each horizon predicted in one jump; samples.json says what was sampled.
"""

from cdit.common.cli import parse_config, run
from cdit.sample.config import SampleConfig


def main() -> None:
    """The command line."""
    config = parse_config(SampleConfig, __doc__)
    config.check()

    from cdit.sample.futures import sample  # imports torch, for which --help and mistakes do not wait

    sample(config)


if __name__ == "__main__":
    run(main)
