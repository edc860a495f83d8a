"""Step-aware Preference Optimization (arXiv 2406.04314, Sec. 4; the loss is Eq. 4).

Departures from the paper (P) or the official code (C):
1. C runs each UNet twice a pair; win and lose share x_t, so one policy and one reference forward give
   all four log-probs. Same numbers.
2. P has no clamp on the log-ratio; C has it, and so have we, written without exp. Same values.
3. C encodes the preference model's text at every step; here once a prompt.
4. C decodes and scores in one batch; here at most CHUNK samples at once. Same numbers.
5. The threshold may change over the diverted steps (`threshold_end`); C keeps it constant.
6. With inner steps the branches part after the first: then winner and loser have an x_t each, as in C.
7. A step without variance (the last one where set_alpha_to_one) has no density and gives no pair.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from spo.config import Spo
from spo.diffusion import ddim, finite
from spo.diffusion.guidance import guided, is_guided
from spo.diffusion.noise import SampleNoise, generator, shuffled
from spo.diffusion.schedule import Schedule
from spo.methods import step_pairs
from spo.methods.step_pairs import select_pairs
from spo.training import distributed
from spo.types import Backbone, Batch, Conditioning, Judge, StepPair

CHUNK = 64  # samples a UNet, decoder or judge call of the rollout; guidance doubles the UNet's


def spo_loss(
    policy_win: Tensor,
    policy_lose: Tensor,
    reference_win: Tensor,
    reference_lose: Tensor,
    *,
    beta: float,
    clip: float,
) -> Tensor:
    """-log sigmoid(beta (r_win - r_lose)) [B] from four log-probs [B] (Eq. 4).

    r = log(policy / reference), clamped to [log(1 - clip), log(1 + clip)]: outside, the gradient is 0.
    """
    low, high = math.log(1 - clip), math.log(1 + clip)
    ratio_win = (policy_win - reference_win).clamp(low, high)
    ratio_lose = (policy_lose - reference_lose).clamp(low, high)
    return -F.logsigmoid(beta * (ratio_win - ratio_lose))


def loss(
    policy_output: Tensor, reference_output: Tensor, batch: Batch, schedule: Schedule, config: Spo
) -> tuple[Tensor, dict[str, Tensor]]:
    """SPO's loss [P] of two UNet outputs [B,C,h,w] at batch.x_t, and its metrics (weighted means).

    batch.targets: x_win, x_lose [P,C,h,w], two draws of the step from batch.x_t. Sample p is pair p's; with
    lose_row (int64 [P]), x_lose was drawn from sample lose_row[p].
    """
    policy = ddim.transition(schedule, policy_output, batch.timesteps, batch.x_t, config.eta)
    reference = ddim.transition(schedule, reference_output, batch.timesteps, batch.x_t, config.eta)
    policy_win, policy_lose = _log_probs(policy, batch)
    reference_win, reference_lose = _log_probs(reference, batch)
    losses = spo_loss(
        policy_win, policy_lose, reference_win, reference_lose, beta=config.beta, clip=config.clip
    )
    win, lose = (policy_win - reference_win).detach(), (policy_lose - reference_lose).detach()
    low, high = math.log(1 - config.clip), math.log(1 + config.clip)
    clipped = torch.stack([(r < low) | (r > high) for r in (win, lose)]).float().mean(0)
    each = {
        "loss": losses.detach(),
        "kl": ddim.divergence(policy, reference)[: len(losses)].detach(),
        "win_log_ratio": win,
        "lose_log_ratio": lose,
        "clipped_fraction": clipped,
        "implicit_accuracy": (win > lose).float(),
    }
    share = batch.weight / batch.weight.sum().clamp(min=1e-12)
    return losses, {name: (share * value).sum() for name, value in each.items()}


def _log_probs(step: ddim.Transition, batch: Batch) -> tuple[Tensor, Tensor]:
    """Of the winners and of the losers, [P] each."""
    x_win, x_lose = batch.targets["x_win"], batch.targets["x_lose"]
    if "lose_row" not in batch.targets:
        return ddim.log_prob(step, x_win), ddim.log_prob(step, x_lose)
    rows = batch.targets["lose_row"]
    win, lose = (
        ddim.Transition(step.x0[at], step.mean[at], step.std[at]) for at in (slice(len(x_win)), rows)
    )
    return ddim.log_prob(win, x_win), ddim.log_prob(lose, x_lose)


@dataclass(frozen=True)
class _Told:
    """What UNet and judge are told of B prompts; encoded once a rollout."""

    conditioning: Conditioning
    unconditional: Conditioning | None  # None: no guidance
    text: Tensor  # [B,D], of the judge
    prompts: list[str]
    check: finite.FiniteCheck  # of the whole rollout

    def repeat(self, k: int) -> _Told:
        """Copies in the order of candidates.flatten(0, 1)."""
        empty = None if self.unconditional is None else self.unconditional.repeat(k)
        text = self.text.repeat(k, 1)
        return _Told(self.conditioning.repeat(k), empty, text, self.prompts * k, self.check)


@dataclass(frozen=True)
class _Judged:
    """The pairs of all B samples at one diverted step, valid or not."""

    step: int  # index of x_t's timestep in the schedule
    pair: StepPair
    valid: Tensor  # bool [B]
    scores: Tensor  # [K,B]


class SpoMethod:
    """Online batches: a rollout of the current policy, judged at every diverted step."""

    loss = staticmethod(loss)

    def __init__(
        self, config: Spo, schedule: Schedule, judge: Judge, prompts: Sequence[str], seed: int
    ) -> None:
        """`schedule` has the sampler's timesteps, on the backbone's device.

        Raises:
            ValueError: the config has no step to divert at, a clip of 1 or more, or there are no prompts.
        """
        self.blocks = step_pairs.blocks(config, schedule)
        if config.clip >= 1:
            raise ValueError(f"align.spo.clip: {config.clip} is not below 1; the paper's is 0.1")
        if not prompts:
            raise ValueError("align.spo: there are no training prompts; look at the prompts stage")
        self._thresholds = step_pairs.thresholds(config, schedule, self.blocks)
        self.config, self.schedule, self.judge = config, schedule, judge
        self.prompts, self.seed = list(prompts), seed
        self.iterations, self.guidance = config.iterations, config.guidance

    def collect(self, backbone: Backbone, iteration: int) -> tuple[list[Batch], dict[str, float]]:
        """The valid pairs of one rollout, shuffled, in batches of at most config.batch_size.

        Without a valid pair: one batch of one pair of weight 0. The metrics by timestep are named by
        x_t's, as in `valid_fraction/t0701`. Each process rolls out its share of the prompts; all see all
        pairs, shuffle them alike and take their share of every batch.
        """
        count = self.config.prompts_per_iteration
        distributed.check_shards(count, "align.spo.prompts_per_iteration")
        order = shuffled(len(self.prompts), iteration * count, count, self.seed)
        chosen = distributed.shard(order)
        prompts = [self.prompts[i] for _, i in chosen]
        keys = [f"rollout {iteration} epoch {epoch} prompt {i}" for epoch, i in chosen]
        with backbone.inference():
            noise = SampleNoise(self.seed, keys, backbone.latent_shape, backbone.device)
            told = self._tell(backbone, prompts)
            judged = _gathered(list(self._rollout(backbone, noise, told)))
        everyone = [self.prompts[i] for _, i in order]  # in the order of the gathered samples
        return self._batches(judged, everyone, iteration), self._metrics(judged)

    def _tell(self, backbone: Backbone, prompts: list[str]) -> _Told:
        empty = None if not is_guided(self.guidance) else backbone.encode_prompts([""] * len(prompts))
        conditioning, check = backbone.encode_prompts(prompts), finite.FiniteCheck(self.schedule.timesteps)
        check.note_text(conditioning, prompts)
        check.note_text(empty, [""] * len(prompts))
        return _Told(conditioning, empty, self.judge.encode_text(prompts), prompts, check)

    def _rollout(self, backbone: Backbone, noise: SampleNoise, told: _Told) -> Iterator[_Judged]:
        """DDIM from x_T; a block yields the pairs of its steps and goes on from one of its branches."""
        size, told_k = len(noise), told.repeat(self.config.candidates)
        starts = {block[0]: number for number, block in enumerate(self.blocks)}
        x_t, output, i = noise.draw(), None, 0
        while i <= self.blocks[-1][-1]:
            timesteps = self.schedule.timesteps[i].expand(size)
            if output is None:
                output = self._predict(backbone, x_t, timesteps, told)
            step = ddim.transition(self.schedule, output, timesteps, x_t, self.config.eta)
            if i not in starts:
                x_t, output, i = ddim.sample(step, noise.draw()), None, i + 1
                continue
            block, threshold = self.blocks[starts[i]], self._thresholds[starts[i]]
            branches = self._branch(backbone, block, step, noise, told_k)
            scores, outputs = self._judge(backbone, block[-1], branches[-1], told_k)
            if self.config.pair_choice == "random":
                win, lose, valid = step_pairs.random_pairs(scores, threshold, noise)
            else:
                win, lose, valid = select_pairs(scores, threshold)
            for pair in self._pairs(block, x_t, branches, win, lose, told.conditioning):
                yield _Judged(pair[0], pair[1], valid, scores)
            following = step_pairs.go_on(self.config, win, lose, noise), torch.arange(size, device=x_t.device)
            x_t, i = branches[-1][following], block[-1] + 1
            output = None if outputs is None else outputs[following]

    def _branch(
        self, backbone: Backbone, block: list[int], step: ddim.Transition, noise: SampleNoise, told: _Told
    ) -> list[Tensor]:
        """The latents [K,B,C,h,w] of the branches after each step of the block; `step` is its first."""
        k = self.config.candidates
        branches = [ddim.sample(step, noise.draw_many(k))]
        for i in block[1:]:
            flat = branches[-1].flatten(0, 1)
            timesteps = self.schedule.timesteps[i].expand(len(flat))
            output = self._predict(backbone, flat, timesteps, told)
            step = ddim.transition(self.schedule, output, timesteps, flat, self.config.eta)
            branches.append(ddim.sample(step, noise.draw_many(k).flatten(0, 1)).view_as(branches[-1]))
        return branches

    def _pairs(
        self,
        block: list[int],
        x_t: Tensor,
        branches: list[Tensor],
        win: Tensor,
        lose: Tensor,
        conditioning: Conditioning,
    ) -> Iterator[tuple[int, StepPair]]:
        """Every step of the block and its pair; all have the label of the judgement at the end."""
        every = torch.arange(len(x_t), device=x_t.device)
        x_t_lose = None
        for i, after in zip(block, branches, strict=True):
            timesteps = self.schedule.timesteps[i].expand(len(x_t))
            x_win, x_lose = after[win, every], after[lose, every]
            yield i, StepPair(x_t, timesteps, x_win, x_lose, conditioning, x_t_lose)
            x_t, x_t_lose = x_win, x_lose

    def _judge(
        self, backbone: Backbone, i: int, candidates: Tensor, told: _Told
    ) -> tuple[Tensor, Tensor | None]:
        """Scores [K,B] of the candidates [K,B,C,h,w] of step i, and the model's outputs at them.

        Each is judged by the x_0 predicted from it, at its own timestep; final latents as they are, at 0.

        Raises:
            ValueError: something of the rollout so far is NaN or infinite, scores among it.
        """
        flat, outputs = candidates.flatten(0, 1), None
        if i + 1 < len(self.schedule.timesteps):
            timesteps = self.schedule.timesteps[i + 1].expand(len(flat))
            outputs = self._predict(backbone, flat, timesteps, told)
            x0 = self.schedule.predict_x0(outputs, timesteps, flat)
        else:
            timesteps, x0 = torch.zeros(len(flat), dtype=torch.int64, device=flat.device), flat
        told.check.note(finite.LATENTS, x0, told.prompts, timesteps)
        judged = []
        for part in _parts(len(flat)):
            images = backbone.decode(x0[part])
            told.check.note(finite.DECODER, images, told.prompts[part], timesteps[part])
            judged.append(self.judge.score_images(images, told.text[part], timesteps[part]))
        scores = torch.cat(judged)
        told.check.note(finite.JUDGE, scores, told.prompts, timesteps)
        told.check.check()
        return scores.view(candidates.shape[:2]), None if outputs is None else outputs.view_as(candidates)

    def _predict(self, backbone: Backbone, x_t: Tensor, timesteps: Tensor, told: _Told) -> Tensor:
        empty = told.unconditional
        parts = [
            guided(
                backbone,
                x_t[part],
                timesteps[part],
                told.conditioning.select(part),
                None if empty is None else empty.select(part),
                self.guidance,
            )
            for part in _parts(len(x_t))
        ]
        outputs = torch.cat(parts)
        told.check.note(finite.UNET, outputs, told.prompts, timesteps)
        return outputs

    def _batches(self, judged: list[_Judged], prompts: list[str], iteration: int) -> list[Batch]:
        """Indexing copies, so the batches are ordinary tensors, whatever `inference` made."""
        rows = step_pairs.Rows.of([j.pair for j in judged])
        valid = torch.cat([j.valid for j in judged]).nonzero().flatten()
        order = torch.randperm(len(valid), generator=generator(self.seed, f"pairs {iteration}"))
        chosen, weight = valid[order.to(valid.device)], 1.0
        if len(chosen) == 0:
            chosen, weight = torch.zeros(1, dtype=torch.int64, device=rows.x_t.device), 0.0
        batches = []
        for update in chosen.split(self.config.batch_size):
            mine, worth = distributed.shard(update), weight
            if len(mine) == 0:
                mine, worth = update[:1], 0.0  # a process without pairs still takes part in the update
            parts = mine.split(-(-self.config.batch_size // self.config.gradient_accumulation))
            for part in parts:
                batch = rows.batch(part, worth, accumulate=part is not parts[-1])
                batches.append(replace(batch, prompts=[prompts[r % len(prompts)] for r in part.tolist()]))
        return batches

    def _metrics(self, judged: list[_Judged]) -> dict[str, float]:
        valid = torch.stack([j.valid for j in judged]).float().cpu()
        scores = torch.stack([j.scores.float().mean() for j in judged]).cpu()
        metrics = {
            "pairs": float(valid.sum()),
            "valid_fraction": float(valid.mean()),
            "score": float(scores.mean()),
        }
        for row, j in enumerate(judged):
            name = f"t{int(self.schedule.timesteps[j.step]):04d}"
            metrics[f"valid_fraction/{name}"] = float(valid[row].mean())
            metrics[f"score/{name}"] = float(scores[row])
        return metrics


def _gathered(judged: list[_Judged]) -> list[_Judged]:
    """The samples of all processes."""
    pairs = step_pairs.gathered([j.pair for j in judged])
    return [
        _Judged(j.step, pair, distributed.gather(j.valid), distributed.gather(j.scores.T).T)
        for j, pair in zip(judged, pairs, strict=True)
    ]


def _parts(n: int) -> list[slice]:
    return [slice(start, start + CHUNK) for start in range(0, n, CHUNK)]
