"""Experiments on top of evaluation.

    python -m cdit.studies ablate SPEC.yaml
    python -m cdit.studies steps --checkpoint RUN --data FOLDER --out OUT
    python -m cdit.studies turning --checkpoint RUN --data FOLDER
    python -m cdit.studies curve --curves "{old: [RUN], new: [RUN]}" --out OUT
    python -m cdit.studies growth --checkpoint RUN --data FOLDER --out OUT

`ablate` trains variants of a config with several seeds and measures all of them on the same cases. `steps` finds how
few denoising steps are enough: every scheduler, number of steps and shift samples the same cases from the same noise.
`turning` measures whether predicted frames turn as far as the action says. `curve` draws quality against training
time, and states how much less time one recipe needs for the quality of another. `growth` measures at several
checkpoints of a run whether heads find where the same surface was.

Finished parts are not computed again: after an interruption, the same command continues.
"""

from cdit.common.cli import Command, exit_on_sigterm, parse_command, run
from cdit.common.options import check_options
from cdit.studies.config import AblationConfig, CurveConfig, GrowthConfig, StepsConfig, TurningConfig

COMMANDS = {
    "ablate": Command(AblationConfig, "train and compare variants of a config", file="SPEC.yaml"),
    "steps": Command(StepsConfig, "find how few denoising steps are enough for a model"),
    "turning": Command(TurningConfig, "measure whether predicted frames turn as far as the action says"),
    "curve": Command(CurveConfig, "draw quality against training time"),
    "growth": Command(GrowthConfig, "measure how heads learn to find the same surface"),
}


def main() -> None:
    """The command line."""
    name, config = parse_command(COMMANDS, __doc__)
    check_options(config)
    exit_on_sigterm()
    if name == "ablate":
        from cdit.studies.ablation import ablate as study  # these import torch
    elif name == "steps":
        from cdit.studies.steps import compare_steps as study
    elif name == "curve":
        from cdit.studies.curve import draw_curves as study
    elif name == "growth":
        from cdit.studies.growth import measure_growth as study
    else:
        from cdit.studies.turning import measure_turning as study
    study(config)


if __name__ == "__main__":
    run(main)
