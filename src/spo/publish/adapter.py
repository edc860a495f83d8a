"""`spo publish`: put an adapter with its card, licence and sample images in a folder or on the hub."""

import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, get_token

from spo.config import METHODS, Params
from spo.publish import card
from spo.runtime.files import read_text, require, write_text
from spo.runtime.hub import is_hub_id
from spo.runtime.licence import metadata
from spo.runtime.messages import one_line

SAMPLES, SAMPLE_PROMPTS = "samples", 4


def run(
    params: Params,
    adapter: Path,
    target: str,
    base_model: str | None = None,
    licence: str | None = None,
    private: bool = False,
) -> str:
    """Publish the adapter of a method to a folder or hub id; returns where it is.

    Args:
        base_model: hub id of the base model; None: backbone.checkpoint if that is one.
        licence: its identifier on the hub; None: that on the adapter's card.
        private: whether a new repository on the hub is private.
    """
    method = _method(params, adapter)
    _check_current(adapter, method)
    given = base_model or params.backbone.checkpoint
    known_base = given if is_hub_id(given) else None
    if base_model and known_base is None:
        raise ValueError(f"--base-model {base_model}: not a hub id of the form OWNER/NAME")
    if not is_hub_id(target):
        _write(params, adapter, method, Path(target), "this folder", known_base, licence)
        return str(Path(target))
    if known_base is None:
        raise ValueError(
            f"publish: the hub wants the id of the base model, not {given}: give --base-model OWNER/NAME"
        )
    if constants.HF_HUB_OFFLINE:
        raise ValueError(
            f"publish: HF_HUB_OFFLINE is set, so nothing can go to {target}; give a folder by --to"
        )
    token = get_token()
    if not token:
        raise ValueError(f"publish: no token for {target}: run `hf auth login` or set HF_TOKEN")
    with tempfile.TemporaryDirectory() as folder:
        content = Path(folder) / "content"
        _write(params, adapter, method, content, target, known_base, licence)
        if metadata(read_text(content / card.FILE, "model card")).license is None:
            raise ValueError("publish: the base model's licence is not stated: give --license NAME")
        return _upload(content, target, token, private)


def _method(params: Params, adapter: Path) -> str:
    """The method whose variant has this adapter."""
    own = {m: own.adapter for m, own in params.generate.variants().items() if m in METHODS}
    for method, path in own.items():
        if path is not None and Path(path).resolve() == adapter.resolve():
            return method
    known = ", ".join(path for path in own.values() if path)
    raise ValueError(f"publish: {adapter} is not the adapter of a method in params.yaml; known: {known}")


def _check_current(adapter: Path, method: str) -> None:
    """Refuse images of another adapter, or scores of other images, if DVC ran the stages."""
    from spo.tracking import dvc_lock, dvc_stages

    stages = [f"generate@{method}", f"score@{method}"]
    if not set(stages) <= set(dvc_lock.read()):
        return
    made_from = {str(adapter.resolve()), str(Path(f"outputs/images/{method}").resolve())}
    for stage, changes in dvc_stages.status(stages).items():
        for change in changes:
            changed = change.get("changed deps", {}) if isinstance(change, dict) else {}
            for path in changed:
                if str(Path(path).resolve()) in made_from:
                    raise ValueError(f"publish: {path} is not what {stage} read; run `spo repro` first")


def _write(
    params: Params,
    adapter: Path,
    method: str,
    folder: Path,
    place: str,
    base_model: str | None,
    licence: str | None,
) -> None:
    """Write the folder, all or nothing; one with content is refused."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"publish: {folder} exists and is not empty; remove it or give another folder")
    trained = read_text(adapter / card.FILE, "model card")
    rows = _rows(method)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as partial:
        content = Path(partial) / "content"
        webui = _copy_weights(params, adapter, method, content)
        base = Path(params.backbone.checkpoint)
        for path in sorted(base.glob("LICENSE*")) if base.is_dir() else ():
            shutil.copy(path, content / path.name)
        samples = _write_samples(content, method, rows[0]["baseline"])
        text = card.published(trained, params, method, rows, samples, place, base_model, licence, webui)
        write_text(content / card.FILE, text)
        content.replace(folder)


def _rows(method: str) -> list[dict[str, Any]]:
    """The method's rows of the comparisons, whose means must be those of its score table."""
    from spo.evaluation import results, statistics

    rows = [row for row in results.read_comparisons() if row["method"] == method]
    scores = Path(f"outputs/scores/{method}.csv")
    if not rows:
        raise ValueError(f"{results.COMPARISONS}: no scores of {method}; run `spo report`")
    table = statistics.prompt_means(results.read_scores(scores))
    for row in rows:
        metric = row["metric"]
        if metric not in table or abs(table[metric].mean() - row["mean_method"]) > 1e-6:
            raise ValueError(
                f"{results.COMPARISONS}: {metric} is not that of {scores}; run `spo report` again"
            )
    return rows


def _copy_weights(params: Params, adapter: Path, method: str, content: Path) -> str | None:
    """Copy a pipeline, or a LoRA; returns the name of the LoRA's second file, in kohya's key names.

    None for a pipeline, and for families whose LoRAs other programs read in diffusers' format.
    """
    from spo.adapters.files import find
    from spo.backbones.lora import FILE
    from spo.publish import kohya

    source = find(adapter)
    if source.kind == "pipeline" and adapter.is_dir():
        shutil.copytree(adapter, content, ignore=shutil.ignore_patterns(SAMPLES, card.FILE))
        return None
    if source.kind == "lora" and source.path.name == FILE:
        content.mkdir()
        shutil.copy(source.path, content / FILE)
        if params.backbone.family not in kohya.PREFIXES:
            return None
        webui = re.sub(r"[^\w.-]+|_", "-", f"{params.name}-{method}") + "_webui.safetensors"
        kohya.write(params.backbone, source.weights[0], content / webui)
        return webui
    raise ValueError(f"{adapter}: neither {FILE} nor a diffusers pipeline there; run `spo align`")


def _write_samples(content: Path, method: str, baseline: str) -> list[card.Sample]:
    """Write the images of the first test prompts by baseline and method."""
    from spo.data.images import archived

    folders = [require(f"outputs/images/{name}", f"images of {name}") for name in (baseline, method)]
    (before, prompts, seeds), (after, *same) = map(archived, folders)
    if same != [prompts, seeds]:
        raise ValueError(f"outputs/images: {baseline} and {method} have other prompts; run `spo repro`")
    (content / SAMPLES).mkdir(exist_ok=True)
    samples = []
    for number, prompt in enumerate(prompts[:SAMPLE_PROMPTS]):
        sample = card.Sample(prompt, f"{SAMPLES}/{number}-{baseline}.png", f"{SAMPLES}/{number}-{method}.png")
        before[number].save(content / sample.baseline)
        after[number].save(content / sample.method)
        samples.append(sample)
    return samples


def _upload(content: Path, target: str, token: str, private: bool) -> str:
    """Upload a folder; returns the URL of the commit."""
    api = HfApi(token=token)
    try:
        api.create_repo(target, private=private or None, exist_ok=True)
        done = api.upload_folder(repo_id=target, folder_path=content, commit_message="Published by spo")
    except Exception as error:  # the hub's client raises many types
        raise ValueError(f"publish: {target}: {one_line(error)}") from error
    return str(done.commit_url)
