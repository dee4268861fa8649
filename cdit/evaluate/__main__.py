"""Measures a world model's predictions on a dataset, next to baselines.

    python -m cdit.evaluate --checkpoint RUN --data FOLDER --out OUT

There are two protocols: "time" predicts each horizon in one jump, "rollout" frame by frame. OUT gets results.json (all
numbers, also of every sample), results.md (tables) and index.html (tables and pictures). Finished batches stay in
OUT/parts: after an interruption the same command continues; if nothing is missing, it only redraws the pages.

With `accelerate launch -m cdit.evaluate …` several processes share the batches; the results are the same.
"""

from cdit.common.cli import parse_config, run
from cdit.common.options import check_options
from cdit.evaluate.config import EvaluateConfig


def main() -> None:
    """The command line."""
    config = parse_config(EvaluateConfig, __doc__)
    config.validate()
    check_options(config)

    from cdit.evaluate.evaluation import evaluate  # imports torch

    evaluate(config)


if __name__ == "__main__":
    run(main)
