"""A small experiment as a user has it: a folder with params.yaml and data, and its stages in this process."""

from __future__ import annotations

import io
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from PIL import Image

from spo import cli
from spo.scenes import world
from tools.scenes import clips, draws


def save_pairs(folder, captions: list[str]) -> None:
    """Pick-a-Pic's columns; the first image is preferred in every other row."""
    generator = torch.Generator().manual_seed(0)

    def image() -> bytes:
        pixels = torch.randint(256, (16, 16, 3), generator=generator, dtype=torch.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels.numpy()).save(buffer, format="PNG")
        return buffer.getvalue()

    rows = [
        {
            "caption": caption,
            "jpg_0": image(),
            "jpg_1": image(),
            "label_0": float(i % 2),
            "label_1": float(1 - i % 2),
            "has_label": True,
            "num_example_per_prompt": 1,
        }
        for i, caption in enumerate(captions)
    ]
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "train-00000.parquet")


def inputs(folder, words) -> None:
    generator = torch.Generator().manual_seed(1)
    captions = sorted(set(world.captions(draws.random_attributes(60, generator), generator)))
    (folder / "prompts").mkdir(parents=True)
    (folder / "prompts/train.txt").write_text("\n".join(captions[:8]))
    (folder / "prompts/evaluation.txt").write_text("\n".join(captions[8:12]))
    save_pairs(folder / "pairs", captions[12:24])
    clips.save_pickscore(clips.fresh_clip(words, seed=1), words, folder / "scorers/pickscore")
    torch.manual_seed(2)
    model, model_config, _ = clips.new_open_clip(words)
    clips.save_hps(model, model_config, words, folder / "scorers/hps")
    clips.save_aesthetic(
        clips.RatedClip(clips.fresh_clip(words, seed=3)), words, folder / "scorers/aesthetic"
    )


def write(params: dict) -> None:
    with open("params.yaml", "w", encoding="utf-8") as file:
        yaml.safe_dump(params, file)


def run(*arguments: str) -> None:
    assert cli.main(arguments) == 0, arguments


def pixels(archive) -> list[torch.Tensor]:
    with zipfile.ZipFile(archive) as file:
        images = [Image.open(io.BytesIO(file.read(n))) for n in file.namelist() if n.endswith(".png")]
    return [torch.frombuffer(bytearray(p.tobytes()), dtype=torch.uint8).int() for p in images]
