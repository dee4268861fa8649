"""The table of schedulers, which help and checks follow."""

import re

import pytest

from cdit.common.cli import parse_config
from cdit.common.errors import UserError
from cdit.diffusion.config import SCHEDULERS, SamplerConfig, SamplerOptions, check_sampler


@pytest.mark.parametrize("config_class", [SamplerConfig, SamplerOptions])
def test_help_names_every_scheduler(config_class, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        parse_config(config_class, "A test.", ["--help"])
    shown = capsys.readouterr().out.partition("--scheduler ")[2].partition("--steps ")[0]
    assert {name for names in SCHEDULERS.values() for name in names} <= set(re.findall(r"\w+", shown))


@pytest.mark.parametrize("objective", SCHEDULERS)
def test_schedulers_of_another_objective_are_refused(objective):
    others = {name for names in SCHEDULERS.values() for name in names} - set(SCHEDULERS[objective])
    for name in SCHEDULERS[objective]:
        check_sampler(objective, SamplerConfig(name, steps=1))
    for name in others:
        with pytest.raises(UserError, match=name):
            check_sampler(objective, SamplerConfig(name))


@pytest.mark.parametrize("objective", ["ddpm", "regression"])
def test_a_shift_without_effect_is_refused(objective):
    scheduler = next(iter(SCHEDULERS[objective]))
    with pytest.raises(UserError, match=f"sampler.shift is 3.0, expected 1 for a {objective}"):
        check_sampler(objective, SamplerConfig(scheduler, steps=1, shift=3.0))
