"""Updates on stored pairs: Diffusion-DPO and the preference model, against the official orders of work."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import Tensor

from benchmarks.measure import Case
from benchmarks.models import SEED, Models, perturb, restore
from spo import config
from spo.data.latents import EncodedPairs
from spo.diffusion.denoiser import is_guided
from spo.diffusion.noise import generator, shuffled
from spo.diffusion.schedule import Schedule
from spo.methods.diffusion_dpo import DiffusionDpoMethod
from spo.preference.model import token_ids
from spo.preference.step_aware import StepAwareTask
from spo.preference.trainer import LabelObjective, preference_loss
from spo.training import loop
from spo.training.alignment import Alignment
from spo.training.optimizer import adamw
from spo.training.state import TrainingState


def pairs_of(models: Models, count: int) -> tuple[EncodedPairs, Tensor]:
    """`count` pairs of random images, with their latents: images [count,2,3,H,W] in [-1,1]."""
    images = 2 * torch.rand(count, 2, 3, *models.backbone.image_size, generator=generator(SEED, "images")) - 1
    images = images.to(models.backbone.device)
    latents = models.backbone.encode(images.flatten(0, 1))
    stored = latents.view(count, 2, *latents.shape[1:]).cpu().numpy().astype(np.float32)
    labels = torch.arange(count).remainder(2).float()
    return EncodedPairs(stored, models.some_prompts(count), labels, torch.ones(count)), images


class Plain:
    """Copies of the UNet and the VAE in diffusers' own memory format."""

    def __init__(self, models: Models) -> None:
        self.backbone = models.backbone
        self.unet = copy.deepcopy(models.backbone.unet).to(memory_format=torch.contiguous_format)
        self.vae = copy.deepcopy(models.backbone.vae).to(memory_format=torch.contiguous_format)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        return self.vae.encode(images.to(self.vae.dtype)).latent_dist.mean * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents / self.vae.config.scaling_factor, return_dict=False)[0]

    def predict(self, unet: Any, x_t: Tensor, timesteps: Tensor, prompts: list[str]) -> Tensor:
        with torch.no_grad():
            text = self.backbone.encode_prompts(prompts)
        return self.backbone._text.run(unet, x_t.to(self.backbone.unet.dtype), timesteps, text).float()


def _finish(
    loss: Tensor, parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, norm: float | None
) -> None:
    loss.backward()
    if norm is not None:
        torch.nn.utils.clip_grad_norm_(parameters, norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _update(objective: loop.Objective, start: list[Tensor], settings: config.Optimizer) -> Tensor:
    """The mean loss [1] of this package's first update."""
    restore(objective.parameters(), start)
    state = TrainingState(objective.parameters(), settings, 0.0, False)
    (parts,), _ = objective.collect(0)
    return torch.tensor([loop.update(objective, parts, state)["loss"]])


def diffusion_dpo(models: Models, count: int, tolerance: float = 1e-4) -> Iterator[Case]:
    """An update, against the order of work of Diffusion-DPO's train.py: images are encoded at every visit,
    the reference is a second UNet. This package encodes each image once, before training, which is not in
    its time."""
    settings = models.params.align.section("diffusion_dpo").model_copy(
        update={"batch_size": count, "iterations": 1}
    )
    assert settings.lora is not None
    schedule, plain = models.schedule(20), Plain(models)
    reference = copy.deepcopy(plain.unet).requires_grad_(False)
    lora = settings.lora
    plain.unet.add_adapter(
        LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.target_modules))
    )
    theirs = [p for p in plain.unet.parameters() if p.requires_grad]
    models.backbone.add_lora(lora, SEED)
    pairs, images = pairs_of(models, count)
    method = DiffusionDpoMethod(settings, schedule, pairs, SEED)
    objective = Alignment("align.diffusion_dpo", models.backbone, method)
    start = perturb(objective.parameters())
    order = [i for _, i in shuffled(count, 0, count, SEED)]
    captions = [pairs.captions[i] for i in order]
    sides = [images[i] if pairs.label_0[i] > 0.5 else images[i].flip(0) for i in order]
    chosen = torch.stack(sides).transpose(0, 1).flatten(0, 1)  # winners, then losers
    (((batch,),), _) = method.collect(models.backbone, 0)
    assert isinstance(schedule, Schedule) and schedule.prediction_type == "epsilon"
    noise, timesteps = batch.target_win.repeat(2, 1, 1, 1), batch.timesteps

    def usual() -> Tensor:
        restore(theirs, start)
        optimizer = adamw(theirs, settings.optimizer)
        x_t = schedule.add_noise(plain.encode(chosen), noise, timesteps)
        policy = plain.predict(plain.unet, x_t, timesteps, captions * 2)
        with torch.no_grad():
            before = plain.predict(reference, x_t, timesteps, captions * 2)
        errors, known = ((p - noise).pow(2).mean((1, 2, 3)) for p in (policy, before))
        win, lose = errors.chunk(2)
        win_before, lose_before = known.chunk(2)
        inside = -0.5 * settings.beta * ((win - lose) - (win_before - lose_before))
        loss = -F.logsigmoid(inside).mean()
        _finish(loss, theirs, optimizer, settings.optimizer.max_grad_norm)
        return loss.detach()[None]

    yield Case(
        "Diffusion-DPO: update",
        "the order of its code",
        "pair",
        count,
        lambda: _update(objective, start, settings.optimizer),
        usual,
        tolerance,
    )


def preference_model(models: Models, count: int, tolerance: float = 1e-4) -> Iterator[Case]:
    """An update of the preference model, against the official order of work (spm_task.py): both images of a
    pair are encoded at every visit, and each has UNet and decoder calls of its own."""
    changes = {"batch_size": count, "steps": 1, "labels": None, "ema": 0.0}
    settings = models.params.preference.model_copy(update=changes)
    schedule, plain, spm = models.schedule(settings.num_inference_steps), Plain(models), models.spm
    trained = StepAwareTask(spm.requires_grad_(True), models.tokenizer, models.backbone, schedule, settings)
    trained.prepare()
    pairs, images = pairs_of(models, count)
    objective = LabelObjective(trained, pairs, SEED)
    parameters = objective.parameters()
    start = [p.detach().clone() for p in parameters]
    (((batch,),), _) = objective.collect(0)
    labels, captions = pairs.label_0[batch.indices], list(batch.prompts)

    @torch.no_grad()
    def predicted(side: Tensor) -> Tensor:
        x_t = schedule.add_noise(plain.encode(side), batch.noise, batch.timesteps)
        if is_guided(settings.guidance):
            twice = torch.cat([x_t, x_t]), batch.timesteps.repeat(2)
            both = plain.predict(plain.unet, *twice, [""] * count + captions)
            without, with_prompt = both.chunk(2)
            output = without + settings.guidance * (with_prompt - without)
        else:
            output = plain.predict(plain.unet, x_t, batch.timesteps, captions)
        return plain.decode(schedule.predict_x0(output, batch.timesteps, x_t)).clamp(-1, 1)

    def official() -> Tensor:
        restore(parameters, start)
        optimizer = adamw(parameters, settings.optimizer)
        seen = torch.cat([predicted(images[batch.indices, side]) for side in range(2)])
        features = F.normalize(spm.encode_image(seen, batch.timesteps.repeat(2)), dim=-1)
        text = spm.encode_text(token_ids(models.tokenizer, captions, spm))
        scores = spm.model.logit_scale.exp() * (features.view(2, count, -1) * text).sum(-1)
        loss = preference_loss(scores[0], scores[1], labels).mean()
        _finish(loss, parameters, optimizer, settings.optimizer.max_grad_norm)
        return loss.detach()[None]

    yield Case(
        "preference model: update",
        "the order of its official code",
        "pair",
        count,
        lambda: _update(objective, start, settings.optimizer),
        official,
        tolerance,
    )
