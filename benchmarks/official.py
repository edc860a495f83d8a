"""SPO in the official code's order of work (RockeyCoss/SPO, train_spo.py), on diffusers' and peft's modules.

Written for comparison: the same forwards in the same order, its own arithmetic of ratio and loss. What it
does otherwise than this package:
1. Policy and reference predict for the win and for the lose apart: four guided UNet calls a batch, two of
   which need gradients.
2. The reference is a deep copy of the UNet.
3. The preference model's text tower runs at every denoising step.
4. All K x B candidates are decoded and scored in one batch.
Noise is drawn by sample, in this package's order, so that both sides see the same numbers.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor

from benchmarks.models import Models
from spo import config
from spo.diffusion import ddim
from spo.diffusion.noise import SampleNoise
from spo.preference.model import token_ids
from spo.types import Conditioning


@dataclass
class Pairs:
    """N valid pairs of a rollout."""

    x_t: Tensor  # [N,C,h,w]
    timesteps: Tensor  # int64 [N]
    following: Tensor  # [N,2,C,h,w]: x_{t-1} of the better and of the worse candidate
    text: Conditioning  # N samples

    def take(self, rows: Tensor) -> Pairs:
        return Pairs(self.x_t[rows], self.timesteps[rows], self.following[rows], self.text.select(rows))


class Official:
    """Rollout and training step of the official algorithm."""

    def __init__(self, models: Models, settings: config.Spo, copied: bool = True) -> None:
        """`copied`: copy the UNet and VAE of `models`; else use and change them."""
        assert settings.lora is not None
        self.models, self.settings = models, settings
        self.schedule = models.schedule(settings.num_inference_steps)
        self.unet, self.vae = models.backbone.unet, models.backbone.vae
        if copied:
            self.unet, self.vae = copy.deepcopy(self.unet), copy.deepcopy(self.vae)
        for module in (self.unet, self.vae):
            module.to(memory_format=torch.contiguous_format)
        self.reference = copy.deepcopy(self.unet).requires_grad_(False)
        self.unet.add_adapter(
            LoraConfig(
                r=settings.lora.rank,
                lora_alpha=settings.lora.alpha,
                target_modules=list(settings.lora.target_modules),
                init_lora_weights="gaussian",
            )
        )
        for parameter in self.parameters():
            parameter.data = parameter.data.float()
        self.empty = models.backbone.encode_prompts([""])

    def parameters(self) -> list[torch.nn.Parameter]:
        return [p for p in self.unet.parameters() if p.requires_grad]

    def predict(self, unet: Any, x_t: Tensor, timesteps: Tensor, text: Conditioning) -> Tensor:
        """The guided prediction [B,C,h,w]."""
        both = Conditioning.cat([self.empty.repeat(len(x_t)), text])
        x_t = torch.cat([x_t, x_t]).to(unet.dtype)
        run = self.models.backbone._text.run
        noise = run(unet, x_t, torch.cat([timesteps, timesteps]), both).float()
        unconditional, conditional = noise.chunk(2)
        return unconditional + self.settings.guidance * (conditional - unconditional)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        latents = latents / self.vae.config.scaling_factor
        return self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0].float()

    @torch.no_grad()
    def score(self, images: Tensor, prompts: list[str], timesteps: Tensor) -> Tensor:
        """Scores [B]; text is encoded anew."""
        spm = self.models.spm
        return spm.score(images, token_ids(self.models.tokenizer, prompts, spm), timesteps)

    @torch.no_grad()
    def rollout(self, prompts: list[str], noise: SampleNoise) -> Pairs:
        """The valid pairs of B prompts, in the order of the steps."""
        k, steps = self.settings.candidates, self.schedule.timesteps
        text = self.models.backbone.encode_prompts(prompts)
        every = torch.arange(len(prompts), device=noise.device)
        latents, branched, found = noise.draw(), text.repeat(k), []
        x_t, candidates = latents, None
        for i, t in enumerate(steps):
            timesteps = t.expand(len(latents))
            output = self.predict(self.unet, latents, timesteps, text if candidates is None else branched)
            step = ddim.transition(self.schedule, output, timesteps, latents, self.settings.eta)
            if i < self.settings.divert_start_step:
                x_t = latents = ddim.sample(step, noise.draw())
                continue
            if candidates is not None:
                scores = self.score(self.decode(step.x0), prompts * k, timesteps).view(k, -1)
                found.append(self._pairs(x_t, steps[i - 1], candidates, scores, text))
                chosen = noise.integers(k)
                x_t = candidates[chosen, every]
                rows = chosen * len(prompts) + every
                step = step.select(rows)
            candidates = ddim.sample(step, noise.draw_many(k))
            latents = candidates.flatten(0, 1)
        scores = self.score(self.decode(latents), prompts * k, torch.zeros_like(timesteps)).view(k, -1)
        assert candidates is not None
        found.append(self._pairs(x_t, steps[-1], candidates, scores, text))
        return Pairs(
            torch.cat([p.x_t for p in found]),
            torch.cat([p.timesteps for p in found]),
            torch.cat([p.following for p in found]),
            Conditioning.cat([p.text for p in found]),
        )

    def _pairs(self, x_t: Tensor, t: Tensor, candidates: Tensor, scores: Tensor, text: Conditioning) -> Pairs:
        """Best and worst of K, if the softmax over their scores differs by more than the threshold."""
        best, win = scores.max(0)
        worst, lose = scores.min(0)
        better, worse = torch.stack([best, worst]).float().softmax(0)
        valid = better - worse > self.settings.threshold
        every = torch.arange(len(win), device=win.device)
        following = torch.stack([candidates[win, every], candidates[lose, every]], dim=1)
        return Pairs(x_t[valid], t.expand(len(win))[valid], following[valid], text.select(valid))

    def losses(self, batch: Pairs) -> Tensor:
        """SPO's losses [P] with gradients."""
        ratios = []
        for side in range(2):
            following = batch.following[:, side]
            policy = self._log_prob(self.unet, batch, following)
            with torch.no_grad():
                reference = self._log_prob(self.reference, batch, following)
            clip = self.settings.clip
            ratios.append(torch.clamp(torch.exp(policy - reference), 1 - clip, 1 + clip))
        win, lose = (self.settings.beta * torch.log(ratio) for ratio in ratios)
        return -torch.log(torch.sigmoid(win - lose))

    def _log_prob(self, unet: Any, batch: Pairs, following: Tensor) -> Tensor:
        output = self.predict(unet, batch.x_t, batch.timesteps, batch.text)
        step = ddim.transition(self.schedule, output, batch.timesteps, batch.x_t, self.settings.eta)
        return ddim.log_prob(step, following)

    def update(self, batch: Pairs, optimizer: torch.optim.Optimizer) -> float:
        """One optimizer update; returns the mean loss."""
        optimizer.zero_grad(set_to_none=True)
        loss = self.losses(batch).mean()
        loss.backward()
        if self.settings.optimizer.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters(), self.settings.optimizer.max_grad_norm)
        optimizer.step()
        return float(loss.detach())
