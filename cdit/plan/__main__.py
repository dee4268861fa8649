"""Planning with a world model, in open and closed loop.

    python -m cdit.plan open --checkpoint RUN --data FOLDER --out OUT
    python -m cdit.plan curve --checkpoint RUN --data FOLDER --out OUT
    python -m cdit.plan diagnose --checkpoint RUN --data FOLDER --out OUT
    python -m cdit.plan learn --checkpoint RUN --data FOLDER --out LEARNED
    python -m cdit.plan episodes --file EPISODES.json
    python -m cdit.plan act --checkpoint RUN --data FOLDER --episodes EPISODES.json --out OUT --planner.learned LEARNED

`open` plans to the frame two seconds ahead, in 100 episodes of a dataset, and compares the plans with the recorded
actions and with baselines. `curve` repeats that for several budgets of candidates and denoising steps. `diagnose`
measures how well costs order predicted frames. `learn` trains a small network, on the walks that the world was trained
on, to predict distance and steps to a goal image, the actions that lead there, and whether it is reached. `episodes`
samples starts and goals in a Doom map, and `act` runs agents on them (closed loop).
"""

from collections import Counter
from itertools import product
from pathlib import Path

from cdit.common.cli import Command, exit_on_sigterm, parse_command, run
from cdit.common.errors import UserError
from cdit.common.options import check_options
from cdit.plan.config import ActConfig, CurveConfig, DiagnoseConfig, EpisodesConfig, LearnConfig, OpenConfig

COMMANDS = {
    "open": Command(OpenConfig, "plan in recorded episodes and compare with the recorded actions (open loop)"),
    "curve": Command(CurveConfig, "measure how the error of plans depends on the budget"),
    "diagnose": Command(DiagnoseConfig, "measure how well costs order predicted frames"),
    "learn": Command(LearnConfig, "train a goal network: distance to a goal image, and a policy"),
    "episodes": Command(EpisodesConfig, "sample starts and goals in a Doom map"),
    "act": Command(ActConfig, "run agents on image goals in Doom (closed loop)"),
}


def main() -> None:
    """The command line."""
    name, config = parse_command(COMMANDS, __doc__)
    check_options(config)
    exit_on_sigterm()
    config.validate()
    COMMANDS_OF[name](config)


def _open(config: OpenConfig) -> None:
    from cdit.plan.openloop import nwm_compatible, run_open  # these import torch
    from cdit.plan.openloop_report import write_open

    print(write_open(run_open(nwm_compatible(config) if config.nwm_compat else config), Path(config.out)))


def _curve(config: CurveConfig) -> None:
    from dataclasses import asdict

    from cdit.plan.openloop import run_curve
    from cdit.plan.openloop_report import write_curve

    print(write_curve(run_curve(config), Path(config.out), asdict(config)))


def _diagnose(config: DiagnoseConfig) -> None:
    from cdit.plan.diagnose import diagnose

    diagnose(config)


def _learn(config: LearnConfig) -> None:
    from cdit.plan.learn import learn

    learn(config)


def _episodes(config: EpisodesConfig) -> None:
    from cdit.plan.episodes import draw_episodes, save_episodes

    episodes = draw_episodes(config.map, config.distances, config.count, config.seed)
    if not episodes:
        raise UserError(f"distances is {config.distances}: no episodes found in {config.map}")
    save_episodes(episodes, Path(config.file))
    have = Counter((episode.stratum, episode.visible) for episode in episodes)
    for distance, visible in product(config.distances, (True, False)):
        if have[distance, visible] < config.count:
            view = "in view" if visible else "out of view"
            found = f"{have[distance, visible]} of {config.count}"
            print(f"note: found only {found} episodes at {distance:g} m with the goal {view}")
    print(f"done: {config.file} ({len(episodes)} episodes)")


def _act(config: ActConfig) -> None:
    from cdit.plan.act import act
    from cdit.plan.act_report import write_act

    print(write_act(config, *act(config)))


COMMANDS_OF = {
    "open": _open,
    "curve": _curve,
    "diagnose": _diagnose,
    "learn": _learn,
    "episodes": _episodes,
    "act": _act,
}

if __name__ == "__main__":
    run(main)
