"""The experiment of tests/backbones/test_effects.py: tiny models, and other files to name in their place."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import blip
import hub_cache
import pandas as pd
import single_file
import small_experiment
import torch
import yaml
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel

from spo import config
from spo.data.images import save_images
from spo.scenes import world
from spo.scenes.oracle import Perception
from tools.scenes import clips, draws

REVISIONS = ("a" * 40, "b" * 40)
HUB = {
    "own/base": ("base", "other/base"),
    "own/pickscore": ("data/scorers/pickscore", "other/pickscore"),
    "own/aesthetic": ("data/scorers/aesthetic", "other/aesthetic"),
    "own/clip": ("wide/clip", "other/clip"),
}


def experiment() -> dict[str, Any]:
    """The smoke preset on the tiny models, shorter still."""
    params = yaml.safe_load(config.preset("smoke"))
    params["backbone"] |= {"checkpoint": "base", "channels_last": False}
    params["prompts"] |= {"n_train": 4, "n_validation": 3, "n_test": 2, "vocabulary": None, "max_tokens": 40}
    params["pairs"] |= {"source": "data/pairs", "validation_fraction": 0.3}
    params["score"]["oracle"] = None
    for model in ("preference", "latent_preference"):
        params[model] |= {"local_prompts": 0, "eval_timesteps": [701]}
    for method in config.METHODS:
        params["align"][method] |= {"iterations": 1, "validation": None}
        params["generate"][method]["adapter"] = f"adapters/{method}"
    params["align"]["diffusion_dpo"] |= {"iterations": 2, "beta": 10.0}
    params["generate"] |= {"num_inference_steps": 2}
    return params


def write(words: Any) -> None:
    """Write all files to the working folder."""
    small_experiment.inputs(Path("data"), words)
    for seed, name in ((0, "data/scorers/pickscore"), (8, "other/pickscore")):
        clips.save_pickscore(small_clip(words, seed), words, Path(name))
    bases(words)
    scorers(words)
    lists_and_pairs()
    stand_in(Path("stand_in/outputs"))
    for name, folders in HUB.items():
        for revision, folder in zip(REVISIONS, folders, strict=True):
            hub_cache.add(Path("hub").absolute(), name, hub_cache.of_folder(Path(folder)), revision)


def small_clip(words: Any, seed: int) -> CLIPModel:
    """One layer, images of 48 pixels; decided enough that candidates of a step differ."""
    torch.manual_seed(seed)
    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = size | {"vocab_size": len(words), "max_position_embeddings": words.model_max_length}
    text |= {f"{name}_token_id": getattr(words, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    vision = size | {"image_size": 48, "patch_size": 16}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=32))
    model.logit_scale.data.fill_(math.log(100))
    return model


def bases(words: Any) -> None:
    torch.manual_seed(0)
    blocks = {"block_out_channels": (8, 8), "norm_num_groups": 4}
    unet = UNet2DConditionModel(
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=4,
        **blocks,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        sample_size=16,
        **blocks,
    )
    encoder = CLIPTextModel(CLIPTextConfig(**small_clip(words, 0).config.text_config.to_dict()))
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=encoder,
        tokenizer=words,
        unet=unet,
        scheduler=DDIMScheduler(**betas, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    with torch.no_grad():  # so that prompt and latents have a measurable effect
        for name, parameter in unet.named_parameters():
            if "attn2" in name or "conv_out" in name:
                parameter.mul_(3)
        vae.decoder.conv_out.weight.mul_(3)
    pipeline.save_pretrained("base")
    single_file.write(Path("base"), Path("single.safetensors"), layers=1, vae_blocks=2)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in (*unet.parameters(), *vae.parameters()):
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    unet.save_pretrained("base/unet", variant="fp16")
    pipeline.scheduler = DDIMScheduler(**{**betas, "beta_end": 0.01}, clip_sample=False)
    pipeline.save_pretrained("other/base")


def scorers(words: Any) -> None:
    torch.manual_seed(5)
    Perception(16).save(Path("oracle"))
    words.save_pretrained("words")
    turned_words(Path("words"), Path("other/words"))
    clips.save_aesthetic(clips.RatedClip(clips.fresh_clip(words, seed=13)), words, Path("other/aesthetic"))
    model, settings, _ = clips.new_open_clip(words)
    clips.save_hps(model, settings, words, Path("other/hps"))
    settings["text_cfg"]["heads"] = 2
    Path("other/hps/two_heads.json").write_text(json.dumps(settings), encoding="utf-8")
    blip.save(Path("reward"))
    blip.save(Path("other/reward"), seed=1)
    Path("other/reward/med_config.json").write_text(
        json.dumps(blip.MED_CONFIG | {"hidden_act": "relu", "layer_norm_eps": 10.0}), encoding="utf-8"
    )
    swapped = [*blip.WORDS[:5], *reversed(blip.WORDS[5:])]
    Path("other/reward/bert/vocab.txt").write_text("\n".join(swapped) + "\n", encoding="utf-8")
    for seed, name in ((0, "wide/clip"), (1, "other/clip")):
        small_clip(words, seed).save_pretrained(name)


def turned_words(folder: Path, target: Path) -> None:
    """The same tokens with other numbers; the last two, which begin and end a text, keep theirs."""
    shutil.copytree(folder, target)
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.get)
    content["model"]["vocab"] = {t: i for i, t in enumerate([*reversed(tokens[:-2]), *tokens[-2:]])}
    (target / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")


def lists_and_pairs() -> None:
    generator = torch.Generator().manual_seed(2)
    captions = sorted(set(world.captions(draws.random_attributes(60, generator), generator)))
    Path("other/prompts").mkdir(parents=True)
    for name, lines in (("train", captions[:8]), ("evaluation", captions[8:16])):
        Path(f"other/prompts/{name}.txt").write_text("\n".join(lines), encoding="utf-8")
    evaluation = Path("data/prompts/evaluation.txt").read_text(encoding="utf-8").splitlines()
    training = Path("data/prompts/train.txt").read_text(encoding="utf-8").splitlines()
    Path("other/prompts/block_list.txt").write_text(training[0], encoding="utf-8")
    words = {word for line in (*evaluation, *training) for word in line.split()}
    Path("other/prompts/vocabulary.txt").write_text("\n".join(sorted(words - {"a"})), encoding="utf-8")
    small_experiment.save_pairs(Path("other/pairs"), [*captions[16:28], evaluation[0]])
    with Path("data/prompts/evaluation.txt").open("a", encoding="utf-8") as file:
        file.write("".join(f"\n{line}" for line in captions[28:34]))
    for name in ("bad", "tied"):
        shutil.copytree("data/pairs", f"{name}/pairs")
    (file,) = Path("tied/pairs").glob("*.parquet")
    table = pd.read_parquet(file)
    table.loc[table.index % 3 == 0, ["label_0", "label_1"]] = 0.5
    table.to_parquet(file)
    (file,) = Path("bad/pairs").glob("*.parquet")
    table = pd.read_parquet(file)
    table.loc[0, "jpg_0"] = b"no image"
    table.to_parquet(file)


def stand_in(folder: Path) -> None:
    """Images and scores of 24 prompts by each variant, and what is registered as its weights.

    In spo one metric rose and one fell; base_high_guidance is better than both.
    """
    generator = torch.Generator().manual_seed(3)
    prompts = sorted(set(world.captions(draws.random_attributes(40, generator), generator)))[:24]
    rows = pd.DataFrame({"index": range(24), "prompt": prompts, "seed": range(24)})
    gains = {"base": 0.0, "base_high_guidance": 3.0, "spo": 1.0, "diffusion_dpo": 0.5, "lpo": 2.0}
    for variant, gain in gains.items():
        pixels = torch.randint(256, (24, 3, 16, 16), generator=generator, dtype=torch.uint8)
        images = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pixels]
        save_images(folder / "images" / variant, iter(images), rows.prompt.tolist(), rows.seed.tolist())
        noise = torch.randn(24, generator=generator).numpy()
        scores = {"pickscore": 20 + gain + noise, "hps": 30 - 0.1 * gain + noise / 64, "aesthetic": 5.0}
        (folder / "scores").mkdir(exist_ok=True)
        rows.assign(**scores).to_csv(folder / f"scores/{variant}.csv", index=False)
        (folder / "align" / variant).mkdir(parents=True)
        (folder / "align" / variant / "stand_in.safetensors").touch()
