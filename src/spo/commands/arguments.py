"""The commands with their arguments, and what each runs."""

from __future__ import annotations

import argparse
import importlib
import math
import sys
from pathlib import Path
from typing import Any

from spo import config
from spo.runtime import launch
from spo.runtime.files import write_text

# stage: (description, variants or methods that it takes as an argument)
STAGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "inputs": ("pin every external input by its content", ()),
    "prompts": ("clean and split the prompts", ()),
    "pairs": ("check, filter and shard the preference pairs", ()),
    "preference": ("train a preference model", ("latent", "unconditioned", "clean_only")),
    "align": ("fine-tune the base model by one method", config.METHODS),
    "generate": ("generate images by the base or an aligned model", config.VARIANTS),
    "score": ("score those images by PickScore, HPS and the aesthetic predictor", config.VARIANTS),
    "report": ("write statistics, tables and image grids to one page", ()),
}
VARIANT_HELP = {
    "align": "the method",
    "preference": "latent: the latent reward model (LPO's); unconditioned, clean_only: baselines of the "
    "step-aware preference model (SPO's), which is the default",
}


def parser() -> argparse.ArgumentParser:
    """Build the parser of all commands."""
    top = argparse.ArgumentParser(
        prog="spo",
        description="Align text-to-image models with human preferences, step by step.",
        epilog="`spo repro` or `dvc repro` runs all stages, each only when something changed.",
    )
    commands = top.add_subparsers(required=True, metavar="command")
    for name, (text, variants) in STAGES.items():
        stage = commands.add_parser(name, help=f"stage: {text}", description=text)
        if variants:
            optional = "?" if name in ("preference", *_EXTERNAL) else None
            stage.add_argument(
                "variant",
                choices=variants,
                nargs=optional,
                help=VARIANT_HELP.get(name, "the variant"),
            )
        stage.add_argument("--params", type=Path, default=Path("params.yaml"), metavar="FILE")
        stage.add_argument(
            "--dry-run", action="store_true", help="check inputs, print sizes and steps, run nothing"
        )
        stage.set_defaults(run=_stage, stage=name, variant=None, uses_torch=name in launch.STAGES)
        if name in _EXTERNAL:
            _EXTERNAL[name](stage)
    _sample(
        commands.add_parser("sample", help="generate an image of a prompt by the base or an aligned model")
    )
    _preset(commands.add_parser("preset", help="write a ready-made params.yaml"))
    sync = commands.add_parser(
        "sync", help="deliver records to MLflow that were logged while it was unreachable"
    )
    sync.set_defaults(run=_run_sync)
    register = commands.add_parser("register", help="register the aligned model in MLflow, through the gate")
    register.set_defaults(run=_run_register)
    keep = commands.add_parser("keep", help="keep this run's results, for the pages of later runs")
    keep.add_argument("name", help="of the file in reports/runs")
    keep.set_defaults(run=_run_keep)
    _publish(commands.add_parser("publish", help="write an adapter for the hub: weights, card, samples"))
    repro = commands.add_parser("repro", help="run dvc repro and log its cached stages to MLflow too")
    repro.add_argument(
        "--jobs", type=int, metavar="N", help="stages at the same time; default: one a core, in turn on a GPU"
    )
    repro.add_argument("arguments", nargs=argparse.REMAINDER, help="of dvc repro")
    repro.set_defaults(run=_run_repro)
    return top


def _guidance(text: str) -> float:
    """Parse a guidance scale, with the bounds of params.yaml.

    Raises:
        ArgumentTypeError: not a finite number of at least 0.
    """
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, not {text!r}")
    return value


def _stage(args: argparse.Namespace) -> None:
    params = config.load(args.params)
    if args.dry_run:
        from spo.commands import dry_run

        if getattr(args, "suite", None) is not None:
            raise ValueError("--suite with --dry-run: only the prompts of the split are estimated")
        print("\n".join(dry_run.lines(params, args.stage, args.variant)))
        return
    suite = {} if getattr(args, "suite", None) is None else {"suite": args.suite}
    importlib.import_module(f"spo.stages.{args.stage}").run(params, args.variant, **suite)


def _suite_option(command: argparse.ArgumentParser) -> None:
    command.add_argument("--suite", metavar="NAME", help="of generate.suites, instead of the split's prompts")


def _generate_external(command: argparse.ArgumentParser) -> None:
    _suite_option(command)
    group = command.add_argument_group("an external model instead of a variant")
    group.add_argument(
        *("--lora", "--unet", "--checkpoint"),
        type=Path,
        metavar="PATH",
        help="a LoRA or UNet (file or folder) on the base, or a pipeline (diffusers folder, .safetensors)",
    )
    group.add_argument("--prompts", type=Path, metavar="FILE", help="default: the experiment's prompts")
    group.add_argument("--guidance", type=_guidance, help="default: that of generate.base")
    group.add_argument("--output", type=Path, metavar="FOLDER", help="default: outputs/judged/NAME")
    command.set_defaults(run=_run_generate)


def _run_generate(args: argparse.Namespace) -> None:
    if not _is_external(args, "lora", ("prompts", "guidance", "output")):
        return _stage(args)
    from spo.commands import external

    _print(external.generate(config.load(args.params), args.lora, args.prompts, args.guidance, args.output))


def _score_external(command: argparse.ArgumentParser) -> None:
    _suite_option(command)
    group = command.add_argument_group("external images instead of a variant")
    group.add_argument(
        "--images", type=Path, metavar="FOLDER", help="image files, or the output of spo generate"
    )
    group.add_argument(
        "--prompts", type=Path, metavar="FILE", help="one per image, in the order of the file names"
    )
    group.add_argument(
        "--baseline", type=Path, metavar="FOLDER", help="images of the same prompts to compare with"
    )
    group.add_argument("--output", type=Path, metavar="FOLDER", help="default: outputs/judged/NAME")
    command.set_defaults(run=_run_score)


def _run_score(args: argparse.Namespace) -> None:
    if not _is_external(args, "images", ("prompts", "baseline", "output")):
        return _stage(args)
    from spo.commands import external

    _print(external.score(config.load(args.params), args.images, args.prompts, args.baseline, args.output))


def _is_external(args: argparse.Namespace, option: str, others: tuple[str, ...]) -> bool:
    """Whether `option` replaces the variant.

    Raises:
        ValueError: both or neither of them, or an option of `others` without `option`.
    """
    given = getattr(args, option) is not None
    if given == (args.variant is not None):
        raise ValueError(f"{args.stage}: give either a variant ({', '.join(config.VARIANTS)}) or --{option}")
    if given and args.suite is not None:
        raise ValueError(f"{args.stage}: --suite is of a variant; give --prompts FILE with --{option}")
    stray = [name for name in others if not given and getattr(args, name) is not None]
    if stray:
        raise ValueError(f"{args.stage}: --{stray[0]} needs --{option}")
    return given


_EXTERNAL: dict[str, Any] = {"generate": _generate_external, "score": _score_external}


def _sample(command: argparse.ArgumentParser) -> None:
    command.add_argument("prompt")
    command.add_argument("--method", default="spo", choices=config.VARIANTS)
    command.add_argument("--model", metavar="ALIAS", help="of MLflow's registry: champion, or a version")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--guidance", type=_guidance, help="default: the variant's own")
    command.add_argument("--output", type=Path, default=Path("sample.png"), metavar="FILE")
    command.add_argument("-n", type=int, default=1, help="number of images, side by side (default 1)")
    command.add_argument("--params", type=Path, default=Path("params.yaml"), metavar="FILE")
    command.set_defaults(run=_run_sample, uses_torch=True)


def _run_sample(args: argparse.Namespace) -> None:
    from spo.commands import sample

    params = config.load(args.params)
    if args.n < 1:
        raise ValueError(f"-n {args.n}: must be at least 1")
    method, adapter = args.method, None
    if args.model is not None:
        from spo.commands import registry

        adapter, method = registry.fetch(params, args.model)
    path = sample.run(params, args.prompt, method, args.seed, args.guidance, args.output, args.n, adapter)
    print(path)


def _preset(command: argparse.ArgumentParser) -> None:
    command.add_argument("name", choices=config.preset_names())
    command.add_argument("--output", type=Path, default=Path("params.yaml"), metavar="FILE")
    command.add_argument("--force", action="store_true", help="overwrite an existing file")
    command.add_argument("--card", type=int, metavar="GIB", help="of the card to plan for, as 24 or 80")
    command.set_defaults(run=_run_preset)


def _run_preset(args: argparse.Namespace) -> None:
    text = config.preset(args.name, args.card)
    if not args.output.parent.is_dir():
        raise ValueError(f"{args.output}: no such folder; make it, or correct --output")
    if args.output.exists() and args.output.read_text(encoding="utf-8") != text and not args.force:
        raise ValueError(f"{args.output} exists and differs; --force overwrites it")
    write_text(args.output, text)
    print(f"{args.output}: {args.name}")


def _run_sync(args: argparse.Namespace) -> None:
    from spo.commands import repro
    from spo.tracking import delivery

    params = config.load() if Path("params.yaml").exists() else None
    uri = params.tracking if params else None
    delivered, left = delivery.sync(uri)
    if params and not left and repro.record_if_new(params):
        more, left = delivery.sync(uri)
        delivered += more
    print(f"{delivered} runs delivered, {left} left")
    if left:
        raise ValueError(f"sync: {left} runs are left, for the reasons above; run `spo sync` again")


def _run_register(args: argparse.Namespace) -> None:
    from spo.commands import registry

    verdict = registry.register(config.load())
    print(f"{verdict.name} version {verdict.version}: {verdict.alias}")
    for reason in verdict.reasons:
        print(f"  {reason}")


def _run_keep(args: argparse.Namespace) -> None:
    from spo.commands import keep

    print(keep.run(config.load(), args.name))


def _publish(command: argparse.ArgumentParser) -> None:
    command.add_argument("adapter", type=Path, help="of a method, as outputs/align/spo")
    command.add_argument("--to", required=True, metavar="FOLDER|ID", help="a new folder, or OWNER/NAME")
    command.add_argument("--base-model", metavar="ID", help="default: backbone.checkpoint, if it is a hub id")
    command.add_argument("--license", metavar="NAME", help="default: that of the base model")
    command.add_argument(
        "--private", action="store_true", help="on the hub: a private repository, if it is new"
    )
    command.set_defaults(run=_run_publish)


def _run_publish(args: argparse.Namespace) -> None:
    from spo.commands import publish

    params = config.load()
    print(publish.run(params, args.adapter, args.to, args.base_model, args.license, args.private))


def _run_repro(args: argparse.Namespace) -> None:
    from spo.commands import repro

    sys.exit(repro.run(config.load(), args.arguments, args.jobs))


def _print(result: object) -> None:
    if launch.is_main_process():
        print(result)
