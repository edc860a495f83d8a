"""`python -m tools.scenes`: makes the default world's models and data, once, from a seed.

Every step saves its results in the work folder, so that an interrupted build resumes. Three networks predict
quality and attributes: the oracle measures results; the network `eyes` gives the annotators' labels of the
preference pairs; the network `web` gives the words of quality in captions, and the labels of HPS and the
aesthetic score. They have different seeds and training scenes; they share the renderer.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spo.runtime.files import atomic, read_json, write_json, write_text

if TYPE_CHECKING:
    from tools.scenes.preferences import Pairs

N_PAIRS, N_PAIR_CAPTIONS = 16_700, 6000
N_SCORER_PAIRS, N_SCORER_CAPTIONS = 1600, 1000
N_RATED_RENDERS = 6000
N_TRAIN_PROMPTS, N_EVALUATION_PROMPTS = 1400, 420
# one seed for each thing that must not share its randomness with another
SEED_BASE, SEED_EYES, SEED_ORACLE, SEED_CLIP, SEED_AESTHETIC, SEED_HPS = range(0, 60, 10)
SEED_PAIRS, SEED_SCORER_PAIRS, SEED_TRAIN_PROMPTS, SEED_EVALUATION, SEED_CHECK = range(60, 110, 10)
SEED_WEB = 110
EYES_WIDTH, ORACLE_WIDTH = 24, 32


@dataclass(frozen=True)
class Build:
    """Where the world is made, and from what."""

    output: Path  # the content of data/
    work: Path  # marks, checkpoints and what is not shipped
    seed: int = 0
    processes: int = 1  # that draw images

    @property
    def evaluation(self) -> list[str]:
        """The prompts that no caption of a pair may be."""
        return (self.output / "prompts/evaluation.txt").read_text(encoding="utf-8").splitlines()

    def vae(self) -> Any:
        from diffusers import AutoencoderKL

        return AutoencoderKL.from_pretrained(self.output / "base" / "vae").float().eval()

    def report(self, name: str, content: dict[str, Any]) -> None:
        """Facts about the world, shipped with it: world.json."""
        path = self.output / "world.json"
        facts = read_json(path, "facts") if path.exists() else {}
        write_json(path, {**facts, name: content})


def run(build: Build, until: str | None = None, only: str | None = None) -> None:
    """Run the steps sequentially, without those that the work folder marks as done; or one step alone.

    Raises:
        ValueError: `until` or `only` names no step.
    """
    for name in (until, only):
        if name is not None and name not in STEPS:
            raise ValueError(f"no step {name!r} in `python -m tools.scenes`; known: {', '.join(STEPS)}")
    build.work.mkdir(parents=True, exist_ok=True)
    own_files(build.output)
    for name in [only] if only else STEPS:
        mark = build.work / f"{name}.done"
        if not mark.exists():
            print(f"== {name}", flush=True)
            STEPS[name](build)
            mark.touch()
        if name == until:
            break


def own_files(folder: Path) -> None:
    """Replace links by copies: as a link of DVC's, a file of data/ is one of its cache."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and (path.is_symlink() or path.stat().st_nlink > 1):
            with atomic(path) as partial:
                shutil.copyfile(path, partial)


def _base(build: Build) -> None:
    from tools.scenes import base_model

    base_model.build(build.output, build.work, build.seed + SEED_BASE)


def _flow_base(build: Build) -> None:
    from tools.scenes import flow_base

    flow_base.build(build.output, build.work, build.seed + SEED_BASE)


def _prompts(build: Build) -> None:
    from spo.scenes import world
    from tools.scenes.generation import different_captions

    folder = build.output / "prompts"
    lists = {
        "train": different_captions(N_TRAIN_PROMPTS, build.seed + SEED_TRAIN_PROMPTS),
        "evaluation": different_captions(N_EVALUATION_PROMPTS, build.seed + SEED_EVALUATION),
        "vocabulary": world.vocabulary(),
    }
    for name, lines in lists.items():
        write_text(folder / f"{name}.txt", "\n".join(lines) + "\n")


def _perception(name: str, width: int, own: int) -> Callable[[Build], None]:
    def step(build: Build) -> None:
        from tools.scenes import perception

        folder = build.output if name == "oracle" else build.work
        perception.train(name, width, build.vae(), build.work, build.seed + own).save(folder / name)

    return step


def _images(build: Build) -> None:
    for kind in ("pair", "scorer"):
        _draw(build, kind)


def _draw(build: Build, kind: str) -> tuple[Any, Any, Any]:
    """Captions [N], images [N,2,3,48,48] and generators [N,2] of the preference pairs or of the pairs
    for HPS and the aesthetic score."""
    from tools.scenes import preferences

    sizes = {"pair": (N_PAIRS, N_PAIR_CAPTIONS), "scorer": (N_SCORER_PAIRS, N_SCORER_CAPTIONS)}
    seed = build.seed + {"pair": SEED_PAIRS, "scorer": SEED_SCORER_PAIRS}[kind]
    captions, which = preferences.ask(*sizes[kind], build.evaluation, seed)
    cache = build.work / f"{kind} images"
    base = build.output / "base"
    pixels = preferences.draw_pairs(base, captions, which, cache, seed, build.processes)
    return captions, pixels, which


def _compared(build: Build, kind: str) -> Pairs:
    from spo.scenes.oracle import Perception
    from tools.scenes import preferences

    eyes = Perception.load(build.work / {"pair": "eyes", "scorer": "web"}[kind])
    seed = build.seed + {"pair": SEED_PAIRS, "scorer": SEED_SCORER_PAIRS}[kind]
    return preferences.compare(*_draw(build, kind), eyes, seed)


def _clip(build: Build) -> None:
    from tools.scenes import contrastive, scorers

    scorers.start_clip(build, "clip", SEED_CLIP, contrastive.Size())
    # a guard of alignment needs a CLIP that has seen no labels
    shutil.copytree(build.work / "clip", build.output / "scorers" / "start_clip", dirs_exist_ok=True)


def _pairs(build: Build) -> None:
    from tools.scenes import preferences, shards

    pairs = _compared(build, "pair")
    shutil.rmtree(build.output / "pairs", ignore_errors=True)
    shards.write(pairs, build.output / "pairs")
    build.report("labels", preferences.statistics(pairs))


def _pickscore(build: Build) -> None:
    from tools.scenes import scorers

    build.report("pickscore", scorers.pickscore(build))


def _hps(build: Build) -> None:
    from tools.scenes import scorers

    build.report("hps", scorers.hps(build, _compared(build, "scorer")))


def _aesthetic(build: Build) -> None:
    from tools.scenes import scorers

    build.report("aesthetic", scorers.aesthetic(build, _compared(build, "scorer")))


def _validation(build: Build) -> None:
    from tools.scenes import validation

    build.report("oracle", validation.validate(build, build.seed + SEED_CHECK))


STEPS: dict[str, Callable[[Build], None]] = {
    "base": _base,
    "flow_base": _flow_base,
    "prompts": _prompts,
    "oracle": _perception("oracle", ORACLE_WIDTH, SEED_ORACLE),
    "eyes": _perception("eyes", EYES_WIDTH, SEED_EYES),
    "web": _perception("web", EYES_WIDTH, SEED_WEB),
    "images": _images,
    "clip": _clip,
    "pairs": _pairs,
    "pickscore": _pickscore,
    "hps": _hps,
    "aesthetic": _aesthetic,
    "validation": _validation,
}
