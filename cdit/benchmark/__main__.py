"""Measures speed on your machine, side by side with peers.

    python -m cdit.benchmark                      # train and sample
    python -m cdit.benchmark plan rollout data    # any modes, in this order

Modes: train, sample, rollout, plan, data (does the loader keep up?), scale (the cost of one more past frame), profile
(where the time of a training step goes), frames (frames per second of the world that ships with the package); and for
choices made in this package attention, context, probes, latents.

Contenders: ours; ours-nwm, the published network and its DDPM in our code; NWM-as-published, a plain implementation of
the same network and its use; DiT-concat, a DiT over past and predicted frames together. All have the same width, depth,
heads and patches, and random weights.

Prints Markdown tables. Only ratios carry over to other machines: alternatives run in turn, round after round, and each
number is the median over rounds with its interquartile range in parentheses.
"""

from cdit.benchmark.config import BenchmarkConfig
from cdit.common.cli import parse_config, run


def main() -> None:
    """The command line."""
    config = parse_config(BenchmarkConfig, __doc__, listed="modes")
    config.validate()

    from cdit.benchmark.bench import Bench  # imports torch

    Bench(config).run()


if __name__ == "__main__":
    run(main)
