"""Evaluates a world model: `python -m cdit.evaluate --checkpoint RUN --data FOLDER --out OUT`

Two protocols, beside baselines: *time* predicts each horizon in one jump, *rollout* frame by frame. Also
`accelerate launch -m cdit.evaluate …` on many processes, with the same results. OUT gets results.json (numbers, and
those of every sample), results.md (tables) and index.html (tables and pictures). What was computed stays in OUT/parts:
the same command goes on after an interruption, and only draws anew where nothing is missing.

`python -m cdit.evaluate ablate SPEC.yaml` trains and evaluates variants of a config (see `ablate --help`);
`python -m cdit.evaluate steps --checkpoint RUN …` finds how few denoising steps do (see `steps --help`).
"""

import sys
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from tqdm import tqdm

from cdit.common.cli import parse_config, run
from cdit.evaluate.config import EvaluateConfig
from cdit.evaluate.page import draw, write_markdown, write_page
from cdit.evaluate.parts import Parts, weights_hash
from cdit.evaluate.results import Results, summarize
from cdit.evaluate.setup import build_judge, build_studies, describe, made_of
from cdit.evaluate.tracking import track
from cdit.loading import load_world, windows_for
from cdit.studies.ablation import ablate
from cdit.studies.steps import compare_steps

PATIENCE = timedelta(hours=24)
"""How long processes wait for each other."""


def main() -> None:
    """Reads the command line: options, or a subcommand and its own."""
    subcommands = {"ablate": ablate, "steps": compare_steps}
    if sys.argv[1:] and sys.argv[1] in subcommands:
        subcommands[sys.argv[1]](sys.argv[2:])
    else:
        evaluate(parse_config(EvaluateConfig, __doc__))


def evaluate(config: EvaluateConfig) -> None:
    """Computes what is missing, and writes what all of it says.

    Raises:
        UserError: something does not fit together; nothing was computed.
    """
    config.validate()
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision, kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)]
    )
    is_main = accelerator.is_main_process
    world = load_world(config.checkpoint, str(accelerator.device))
    sampler, weights = config.sampler.over(world.description), weights_hash(world)
    dataset = windows_for(world, config.data, config.split, config.splits, config.follow_links, config.spacing)
    studies = build_studies(config, world, dataset)
    with accelerator.local_main_process_first():  # so that the others find downloads done
        judge = build_judge(config, world, studies, accelerator.device)

    # What is there already: of this evaluation, or none. All processes look at the same before any of them writes.
    parts = []
    for study in studies:
        folder = Path(config.out, "parts", study.protocol.name)
        depends_on = made_of(study, config, dataset.info.spacing, judge, sampler, weights)
        parts.append(Parts(folder, depends_on, len(study.batches)))
    if config.overwrite and is_main:
        for part in parts:
            part.clear()
    accelerator.wait_for_everyone()
    for part in parts:
        part.check()
    accelerator.wait_for_everyone()
    if is_main:
        for part in parts:
            part.begin()
    missing = [(study, part, batch) for study, part in zip(studies, parts, strict=True) for batch in part.missing()]
    accelerator.wait_for_everyone()

    # Batches are shared out whole, so that nothing is computed twice, or differently, whoever does it.
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    total = sum(len(study.batches[batch]) for study, _, batch in mine)
    with tqdm(total=total, unit="sample", disable=not is_main) as bar:
        for study, part, batch in mine:
            bar.set_description(study.protocol.name)
            with accelerator.autocast():
                found = study.compute(batch, world, dataset, judge, sampler)
            part.write(batch, found)
            bar.update(len(study.batches[batch]))
    accelerator.wait_for_everyone()

    if is_main:
        out = Path(config.out)
        results, pictures = Results(describe(config, sampler, weights, accelerator.device)), {}
        for study, part in zip(studies, parts, strict=True):
            found, name = part.read(), study.protocol.name
            results.protocols[name] = summarize(study.protocol, study.cases, found, config.seed)
            pictures[name] = draw(study.protocol, found, out / "pictures")
        results.save(out)
        print(write_markdown(results, out / "results.md"))
        write_page(results, pictures, out / "index.html")
        if config.tracking == "wandb":
            track(results, pictures, config.project, asdict(config), out)
        print(f"done: {out / 'index.html'}, results.md and results.json")
    accelerator.end_training()


if __name__ == "__main__":
    run(main)
