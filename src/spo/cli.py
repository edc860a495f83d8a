"""The command line: nothing heavy is imported before a command runs; a failure is one line.

Exit codes: 2 for a mistake in parameters or data, 75 for what may pass by itself, 130 when stopped.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spo import config
from spo.runtime import launch, signals
from spo.runtime.exit_codes import MISTAKE, STOPPED, exit_code, leave_exit_code
from spo.runtime.messages import first_line, redact

# stage: (what it does, its items)
STAGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "inputs": ("pin every outside input by its content", ()),
    "prompts": ("clean and split the prompts", ()),
    "pairs": ("check, filter and shard the preference pairs", ()),
    "preference": ("train the step-aware preference model", ("unconditioned", "clean_only")),
    "align": ("fine-tune the base model by one method", config.METHODS),
    "generate": ("images of the base or an aligned model", config.VARIANTS),
    "score": ("PickScore, HPS and aesthetic score of those images", config.VARIANTS),
    "report": ("statistics, tables and grids on one page", ()),
}


def entry() -> int:
    """Run `main`; in a stage, Ctrl-C has a limit after which the kernel ends the process."""
    if sys.argv[1:2] and sys.argv[1] in STAGES:
        signals.arm_ctrl_c()
    return main()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(arguments)
    if not launch.is_main_process():
        os.environ["TQDM_DISABLE"] = "1"
    try:
        if not _launched(options, arguments):
            options.run(options)
    except (ValueError, FloatingPointError, OSError) as error:
        return _fail(redact(str(error)), exit_code(error))
    except Exception as error:
        if (reason := _shortage(error)) is None:
            raise
        return _fail(reason, MISTAKE)
    except KeyboardInterrupt as stop:
        if launch.is_main_process():
            print(f"spo: {str(stop) or 'stopped'}", file=sys.stderr)
        return STOPPED
    return 0


def _launched(options: argparse.Namespace, arguments: Sequence[str]) -> bool:
    """Whether the command ran in several processes, as params.yaml wants it."""
    stage = getattr(options, "stage", None)
    if stage not in launch.STAGES or options.dry_run:
        return False
    processes = config.load(options.params).processes
    if not launch.wanted(stage, processes):
        return False
    signals.disarm_ctrl_c()
    launch.run(arguments, processes)
    return True


def _say(result: object) -> None:
    if launch.is_main_process():
        print(result)


def _fail(reason: str, code: int) -> int:
    """Say the reason once, in the outermost process; return the exit code, which a flow gets too."""
    if not launch.report_to_launcher(reason, code):
        print(f"spo: {reason}", file=sys.stderr)
    leave_exit_code(code)
    return code


def _shortage(error: Exception) -> str | None:
    """One line for what the machine has too little of; None for a mistake of ours."""
    text = first_line(error, 200)
    if isinstance(error, MemoryError) or "can't allocate memory" in text or "out of memory" in text:
        return f"out of memory ({text}); lower the stage's batch_size in params.yaml"
    if type(error).__name__ == "SafetensorError":  # its writer has no OSError
        return f"weights cannot be read or written ({text})"
    return None


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="spo",
        description="Align text-to-image models with human preferences, step by step.",
        epilog="`make repro` or `dvc repro` runs all stages in order, each only when something changed.",
    )
    commands = top.add_subparsers(required=True, metavar="command")
    for name, (text, items) in STAGES.items():
        stage = commands.add_parser(name, help=f"stage: {text}", description=text)
        if items:
            optional = "?" if name in ("preference", *_ELSEWHERE) else None
            stage.add_argument("item", choices=items, nargs=optional, help="which one")
        stage.add_argument("--params", type=Path, default=Path("params.yaml"), metavar="FILE")
        stage.add_argument(
            "--dry-run", action="store_true", help="resolve all, show sizes and steps, run nothing"
        )
        stage.set_defaults(run=_stage, stage=name, item=None)
        if name in _ELSEWHERE:
            _ELSEWHERE[name](stage)
    _sample(commands.add_parser("sample", help="an image of one prompt by the base or an aligned model"))
    _preset(commands.add_parser("preset", help="write a ready-made params.yaml"))
    sync = commands.add_parser("sync", help="deliver to MLflow what was logged while its server was away")
    sync.set_defaults(run=_run_sync)
    register = commands.add_parser(
        "register", help="the aligned model to MLflow's registry, through the gate"
    )
    register.set_defaults(run=_run_register)
    repro = commands.add_parser("repro", help="dvc repro, with cached stages in MLflow too")
    repro.add_argument("arguments", nargs=argparse.REMAINDER, help="of dvc repro")
    repro.set_defaults(run=_run_repro)
    return top


def _guidance(text: str) -> float:
    """Check a scale of classifier-free guidance as params.yaml's is checked."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, not {text!r}")
    return value


def _stage(options: argparse.Namespace) -> None:
    params = config.load(options.params)
    if options.dry_run:
        from spo.commands import dry_run

        print("\n".join(dry_run.lines(params, options.stage, options.item)))
        return
    importlib.import_module(f"spo.stages.{options.stage}").run(params, options.item)


def _generate_elsewhere(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("instead of a variant: an external model or external images")
    group.add_argument(
        *("--lora", "--unet", "--checkpoint"),
        type=Path,
        metavar="PATH",
        help="a LoRA or UNet (file or folder) on the base, or a whole model (diffusers folder, .safetensors)",
    )
    group.add_argument("--prompts", type=Path, metavar="FILE", help="default: the experiment's own")
    group.add_argument("--guidance", type=_guidance, help="default: that of generate.base")
    group.add_argument("--output", type=Path, metavar="FOLDER", help="default: outputs/judged/NAME")
    command.set_defaults(run=_run_generate)


def _run_generate(options: argparse.Namespace) -> None:
    if not _elsewhere(options, "lora", ("prompts", "guidance", "output")):
        return _stage(options)
    from spo.commands import external

    _say(
        external.generate(
            config.load(options.params), options.lora, options.prompts, options.guidance, options.output
        )
    )


def _score_elsewhere(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("instead of a variant: an external model or external images")
    group.add_argument("--images", type=Path, metavar="FOLDER", help="image files, or what generate wrote")
    group.add_argument(
        "--prompts", type=Path, metavar="FILE", help="one for each, in the order of file names"
    )
    group.add_argument(
        "--baseline", type=Path, metavar="FOLDER", help="compare with these, for the same prompts"
    )
    group.add_argument("--output", type=Path, metavar="FOLDER", help="default: outputs/judged/NAME")
    command.set_defaults(run=_run_score)


def _run_score(options: argparse.Namespace) -> None:
    if not _elsewhere(options, "images", ("prompts", "baseline", "output")):
        return _stage(options)
    from spo.commands import external

    _say(
        external.score(
            config.load(options.params), options.images, options.prompts, options.baseline, options.output
        )
    )


def _elsewhere(options: argparse.Namespace, option: str, others: tuple[str, ...]) -> bool:
    """Whether `option` stands in for the item; one of them there must be."""
    given = getattr(options, option) is not None
    if given == (options.item is not None):
        raise ValueError(
            f"{options.stage}: give a variant ({', '.join(config.VARIANTS)}) or --{option}, not both"
        )
    stray = [name for name in others if not given and getattr(options, name) is not None]
    if stray:
        raise ValueError(f"{options.stage}: --{stray[0]} goes with --{option} only")
    return given


_ELSEWHERE: dict[str, Any] = {"generate": _generate_elsewhere, "score": _score_elsewhere}


def _sample(command: argparse.ArgumentParser) -> None:
    command.add_argument("prompt")
    command.add_argument("--method", default="spo", choices=config.VARIANTS)
    command.add_argument("--model", metavar="ALIAS", help="from MLflow's registry: champion, or a version")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--guidance", type=_guidance, help="default: the variant's own")
    command.add_argument("--output", type=Path, default=Path("sample.png"), metavar="FILE")
    command.add_argument("-n", type=int, default=1, help="images, side by side (default 1)")
    command.add_argument("--params", type=Path, default=Path("params.yaml"), metavar="FILE")
    command.set_defaults(run=_run_sample)


def _run_sample(options: argparse.Namespace) -> None:
    from spo.commands import sample

    params = config.load(options.params)
    if options.n < 1:
        raise ValueError(f"-n {options.n}: must be at least 1")
    method, adapter = options.method, None
    if options.model is not None:
        from spo.commands import registry

        adapter, method = registry.fetch(params, options.model)
    path = sample.run(
        params, options.prompt, method, options.seed, options.guidance, options.output, options.n, adapter
    )
    print(path)


def _preset(command: argparse.ArgumentParser) -> None:
    command.add_argument("name", choices=config.preset_names())
    command.add_argument("--output", type=Path, default=Path("params.yaml"), metavar="FILE")
    command.add_argument("--force", action="store_true", help="replace a file that is there")
    command.set_defaults(run=_run_preset)


def _run_preset(options: argparse.Namespace) -> None:
    text = config.preset(options.name)
    if options.output.exists() and options.output.read_text() != text and not options.force:
        raise ValueError(f"{options.output} is there and differs; --force replaces it")
    options.output.write_text(text)
    print(f"{options.output}: {options.name}")


def _run_sync(options: argparse.Namespace) -> None:
    from spo.commands import repro
    from spo.tracking import runs

    uri = None
    if Path("params.yaml").exists():
        params = config.load()
        uri = params.tracking
        repro.record_if_new(params)
    delivered, left = runs.sync(uri)
    print(f"{delivered} records delivered, {left} left")
    if left:
        raise ValueError(f"sync: {left} records are left, for the reasons above; `spo sync` tries again")


def _run_register(options: argparse.Namespace) -> None:
    from spo.commands import registry

    verdict = registry.register(config.load())
    print(f"{verdict.name} version {verdict.version}: {verdict.alias}")
    for reason in verdict.reasons:
        print(f"  {reason}")


def _run_repro(options: argparse.Namespace) -> None:
    from spo.commands import repro

    sys.exit(repro.run(config.load(), options.arguments))
