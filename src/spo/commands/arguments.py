"""The commands with their arguments, and the functions that run them."""

import argparse
import importlib
import math
import sys
from pathlib import Path
from typing import Any

from spo import config
from spo.runtime import processes
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
# stage: the option that replaces its variant, and the options that need this one
EXTERNAL = {
    "generate": ("lora", ("prompts", "guidance", "output")),
    "score": ("images", ("prompts", "baseline", "output")),
}
LORA_HELP = "a LoRA or UNet (file or folder) on the base, or a pipeline (diffusers folder, .safetensors)"


def parser() -> argparse.ArgumentParser:
    """Build the parser of all commands."""
    top = argparse.ArgumentParser(
        prog="spo",
        description="Align text-to-image models with human preferences, step by step.",
        epilog="`spo repro` or `dvc repro` runs all stages, each only when something changed.",
    )
    commands = top.add_subparsers(required=True, metavar="command")
    for name, (text, variants) in STAGES.items():
        _stage(commands.add_parser(name, help=f"stage: {text}", description=text), name, variants)
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
    keep = commands.add_parser("keep", help="save the results of this seed, for the pages of other seeds")
    keep.set_defaults(run=_run_keep)
    _publish(commands.add_parser("publish", help="write an adapter for the hub: weights, card, samples"))
    _convert(commands.add_parser("convert", help="write an adapter for other programs, or merge it"))
    repro = commands.add_parser("repro", help="run dvc repro and log its cached stages to MLflow too")
    repro.add_argument(
        "--jobs", type=int, metavar="N", help="stages in parallel; default: one a core, one on a GPU"
    )
    repro.add_argument("arguments", nargs=argparse.REMAINDER, help="of dvc repro")
    repro.set_defaults(run=_run_repro)
    return top


def _stage(command: argparse.ArgumentParser, name: str, variants: tuple[str, ...]) -> None:
    if variants:
        optional = "?" if name == "preference" or name in EXTERNAL else None
        text = VARIANT_HELP.get(name, "the variant")
        command.add_argument("variant", choices=variants, nargs=optional, help=text)
    _path(command, "--params", "FILE", default=Path("params.yaml"))
    command.add_argument(
        "--dry-run", action="store_true", help="check inputs, print sizes and steps, run nothing"
    )
    uses_torch = name in processes.STAGES
    command.set_defaults(run=_run_stage, stage=name, variant=None, suite=None, uses_torch=uses_torch)
    if name in EXTERNAL:
        suite_help = "of generate.suites, instead of the split's prompts"
        command.add_argument("--suite", metavar="NAME", help=suite_help)
        _external(command, name)


def _external(command: argparse.ArgumentParser, stage: str) -> None:
    if stage == "generate":
        group = command.add_argument_group("an external model instead of a variant")
        group.add_argument("--lora", "--unet", "--checkpoint", type=Path, metavar="PATH", help=LORA_HELP)
        _path(group, "--prompts", "FILE", "default: the experiment's prompts")
        group.add_argument("--guidance", type=_guidance, help="default: that of generate.base")
    else:
        group = command.add_argument_group("external images instead of a variant")
        _path(group, "--images", "FOLDER", "image files, or the output of spo generate")
        _path(group, "--prompts", "FILE", "one per image, in the order of the file names")
        _path(group, "--baseline", "FOLDER", "images of the same prompts to compare with")
    _path(group, "--output", "FOLDER", "default: outputs/judged/NAME")


def _path(
    place: Any,  # a parser or a group of its arguments
    name: str,
    metavar: str,
    text: str | None = None,
    default: Path | None = None,
) -> None:
    place.add_argument(name, type=Path, metavar=metavar, help=text, default=default)


def _guidance(text: str) -> float:
    """Parse a guidance scale, with the bounds of params.yaml."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, not {text!r}")
    return value


def _run_stage(args: argparse.Namespace) -> None:
    if args.stage in EXTERNAL and _is_external(args):
        return _run_external(args)
    params = config.load(args.params)
    if args.dry_run:
        from spo.commands import dry_run

        if args.suite is not None:
            raise ValueError("--suite with --dry-run: a dry run estimates only the prompts of the split")
        print("\n".join(dry_run.lines(params, args.stage, args.variant)))
        return
    suite = {} if args.suite is None else {"suite": args.suite}
    importlib.import_module(f"spo.stages.{args.stage}").run(params, args.variant, **suite)


def _is_external(args: argparse.Namespace) -> bool:
    """Whether an external model or images replace the variant; refuse options that exclude each other."""
    option, others = EXTERNAL[args.stage]
    external = getattr(args, option) is not None
    if external == (args.variant is not None):
        raise ValueError(f"{args.stage}: give either a variant ({', '.join(config.VARIANTS)}) or --{option}")
    if external and args.suite is not None:
        raise ValueError(f"{args.stage}: --suite needs a variant; give --prompts FILE with --{option}")
    if external and args.dry_run:
        raise ValueError(f"{args.stage}: --dry-run needs a variant; it does not estimate --{option}")
    stray = [name for name in others if not external and getattr(args, name) is not None]
    if stray:
        raise ValueError(f"{args.stage}: --{stray[0]} needs --{option}")
    return external


def _run_external(args: argparse.Namespace) -> None:
    from spo.commands import external

    params = config.load(args.params)
    done: object
    if args.stage == "generate":
        done = external.generate(params, args.lora, args.prompts, args.guidance, args.output)
    else:
        done = external.score(params, args.images, args.prompts, args.baseline, args.output)
    if processes.is_main_process():
        print(done)


def _sample(command: argparse.ArgumentParser) -> None:
    command.add_argument("prompt")
    command.add_argument("--method", default="spo", choices=config.VARIANTS)
    command.add_argument("--model", metavar="ALIAS", help="of MLflow's registry: champion, or a version")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--guidance", type=_guidance, help="default: the variant's own")
    _path(command, "--output", "FILE", default=Path("sample.png"))
    command.add_argument("-n", type=int, default=1, help="number of images, side by side (default 1)")
    _path(command, "--params", "FILE", default=Path("params.yaml"))
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
    print(sample.run(params, args.prompt, method, args.seed, args.guidance, args.output, args.n, adapter))


def _preset(command: argparse.ArgumentParser) -> None:
    command.add_argument("name", choices=config.preset_names())
    _path(command, "--output", "FILE", default=Path("params.yaml"))
    command.add_argument("--force", action="store_true", help="overwrite an existing file")
    command.add_argument("--card", type=int, metavar="GIB", help="of the GPU to plan for, such as 24 or 80")
    command.add_argument("--quick", action="store_true", help="a first try of the preset, on few prompts")
    command.add_argument("--checkpoint", metavar="MODEL", help="your own: a folder, .safetensors or hub id")
    command.add_argument("--prompts", type=Path, metavar="FILE", help="your own, to train on and to evaluate")
    command.set_defaults(run=_run_preset)


def _run_preset(args: argparse.Namespace) -> None:
    from spo.commands import preset

    text = preset.text(args.name, args.card, args.quick, args.checkpoint, args.prompts)
    if counted := config.counted(text):
        print(f"{args.name}: {counted}")
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
        raise ValueError(
            f"sync: {left} runs are left, for the reasons above; run `spo sync` again, or remove a run that "
            "MLflow will never take from .spo/runs"
        )


def _run_register(args: argparse.Namespace) -> None:
    from spo.commands import registry

    verdict = registry.register(config.load())
    print(f"{verdict.name} version {verdict.version}: {verdict.alias}", *verdict.reasons, sep="\n  ")


def _run_keep(args: argparse.Namespace) -> None:
    from spo.evaluation import seeds

    print(seeds.save(config.load()))


def _publish(command: argparse.ArgumentParser) -> None:
    command.add_argument("adapter", type=Path, help="of a method, such as outputs/align/spo")
    command.add_argument("--to", required=True, metavar="FOLDER|ID", help="a new folder, or OWNER/NAME")
    command.add_argument("--base-model", metavar="ID", help="default: backbone.checkpoint, if it is a hub id")
    command.add_argument("--license", metavar="NAME", help="default: that of the base model")
    command.add_argument(
        "--private", action="store_true", help="on the hub: a private repository, if it is new"
    )
    command.set_defaults(run=_run_publish)


def _run_publish(args: argparse.Namespace) -> None:
    from spo.publish import adapter

    params = config.load()
    print(adapter.run(params, args.adapter, args.to, args.base_model, args.license, args.private))


def _convert(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", type=Path, help=LORA_HELP)
    command.add_argument(
        "--to",
        type=Path,
        required=True,
        metavar="PATH",
        help="a new .safetensors file, or a pipeline's folder",
    )
    command.add_argument(
        "--merge-into",
        metavar="BASE",
        help="a diffusers folder, .safetensors or hub id of that family; default: a LoRA stays one, and gets "
        "kohya's key names",
    )
    _path(command, "--params", "FILE", default=Path("params.yaml"))
    command.set_defaults(run=_run_convert, uses_torch=True)


def _run_convert(args: argparse.Namespace) -> None:
    settings = config.load(args.params).backbone
    from spo.publish import convert

    print(convert.run(settings, args.source, args.to, args.merge_into))


def _run_repro(args: argparse.Namespace) -> None:
    from spo.commands import repro

    sys.exit(repro.run(config.load(), args.arguments, args.jobs))
