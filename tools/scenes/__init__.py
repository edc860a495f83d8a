"""`python -m tools.scenes`: makes the default world's models and data, once, from a seed.

Every step keeps what it made in the work folder, so that an interrupted build goes on. The people
who label the preference pairs, the people who taught the scorers, and the oracle have different
seeds, training scenes and networks; they share the renderer.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

N_PAIRS, N_PAIR_CAPTIONS = 4000, 2000
N_SCORER_PAIRS, N_SCORER_CAPTIONS = 1400, 900
N_RATED_RENDERS = 6000
N_TRAIN_PROMPTS, N_EVALUATION_PROMPTS = 1400, 420
# one seed for each thing that must not share its randomness with another
SEED_BASE, SEED_EYES, SEED_ORACLE, SEED_CLIP, SEED_SCORER_CLIP, SEED_HPS = range(0, 60, 10)
SEED_PAIRS, SEED_SCORER_PAIRS, SEED_TRAIN_PROMPTS, SEED_EVALUATION, SEED_CHECK = range(60, 110, 10)
EYES_WIDTH, ORACLE_WIDTH = 24, 32


def run(output: Path, work: Path, until: str | None = None, seed: int = 0) -> None:
    """Make `output` (the content of data/); each step is skipped when its mark lies in `work`.

    Raises:
        ValueError: `until` names no step.
    """
    if until is not None and until not in STEPS:
        raise ValueError(f"no step {until!r} in `python -m tools.scenes`; there are: {', '.join(STEPS)}")
    work.mkdir(parents=True, exist_ok=True)
    for name, step in STEPS.items():
        mark = work / f"{name}.done"
        if not mark.exists():
            print(f"== {name}", flush=True)
            step(output, work, seed)
            mark.touch()
        if name == until:
            break


def _base(output: Path, work: Path, seed: int) -> None:
    from tools.scenes import base_model

    base_model.build(output, work, seed + SEED_BASE)


def _prompts(output: Path, work: Path, seed: int) -> None:
    from spo.scenes import world
    from tools.scenes.preferences import draw_captions

    folder = output / "prompts"
    folder.mkdir(parents=True, exist_ok=True)
    lists = {
        "train": draw_captions(N_TRAIN_PROMPTS, seed + SEED_TRAIN_PROMPTS),
        "evaluation": draw_captions(N_EVALUATION_PROMPTS, seed + SEED_EVALUATION),
        "vocabulary": world.vocabulary(),
    }
    for name, lines in lists.items():
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")


def _perception(output: Path, work: Path, seed: int) -> None:
    from diffusers import AutoencoderKL

    from tools.scenes import perception

    vae = AutoencoderKL.from_pretrained(output / "base" / "vae").float().eval()
    for name, width, own, folder in (
        ("eyes", EYES_WIDTH, SEED_EYES, work / "eyes"),
        ("oracle", ORACLE_WIDTH, SEED_ORACLE, output / "oracle"),
    ):
        perception.train(name, width, vae, work, seed + own).save(folder)


def _pairs(output: Path, work: Path, seed: int) -> None:
    from spo.scenes.oracle import Perception
    from tools.scenes import preferences

    models = (output / "base", work / "early.safetensors", Perception.load(work / "eyes"))
    cache = work / "preference pictures"
    pairs = preferences.compare(*models, N_PAIRS, N_PAIR_CAPTIONS, cache, seed + SEED_PAIRS)
    shutil.rmtree(output / "pairs", ignore_errors=True)
    preferences.write(pairs, output / "pairs")
    _report(output, "labels", preferences.statistics(pairs))


def _clip(output: Path, work: Path, seed: int) -> None:
    from tools.scenes import clips
    from tools.scenes.tokenizer import load

    tokenizer = load(work / "tokenizer")
    model = clips.fresh_clip(tokenizer, seed + SEED_CLIP)
    clips.contrastive("clip", model, clips.clip_features(model), tokenizer, work, seed + SEED_CLIP)
    clips.save_pickscore(model, tokenizer, output / "clip")


def _scorers(output: Path, work: Path, seed: int) -> None:
    from tools.scenes import scorers

    _report(output, "scorers", scorers.build(output, work, seed))


def _validate(output: Path, work: Path, seed: int) -> None:
    from tools.scenes import validation

    _report(output, "oracle", validation.validate(output, work, seed + SEED_CHECK))


def _report(output: Path, name: str, content: dict) -> None:
    """Facts about the world, shipped with it: data/world.json."""
    path = output / "world.json"
    facts = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**facts, name: content}, indent=1) + "\n")


STEPS: dict[str, Callable[[Path, Path, int], None]] = {
    "base": _base,
    "prompts": _prompts,
    "perception": _perception,
    "clip": _clip,
    "pairs": _pairs,
    "scorers": _scorers,
    "oracle": _validate,
}
