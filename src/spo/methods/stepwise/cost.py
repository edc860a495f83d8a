"""Upper bounds of what the training of a stepwise method computes."""

from collections.abc import Callable

from spo.config import Stepwise
from spo.diffusion.denoiser import is_guided
from spo.methods.spec import Cost
from spo.methods.stepwise import pairs as step_pairs
from spo.training.compute import DOWN_PATH, TRAINED
from spo.types import NoiseSchedule


def cost_by_images(name: str, config: Stepwise, schedule: Callable[[int], NoiseSchedule]) -> Cost:
    """The cost with a reward model of images: the UNet's outputs at the candidates serve the next step too.

    Args:
        name: its section of params.yaml, for messages.
        schedule: as `types.Backbone.schedule`.
    """
    blocks = step_pairs.blocks(config, schedule(config.num_inference_steps), name)
    final = blocks[-1][-1] + 1 == config.num_inference_steps  # final latents are scored without a prediction
    candidates = config.candidates * (sum(map(len, blocks)) - final)
    return _cost(config, blocks, (blocks[0][0] + 1 + candidates) * (1 + is_guided(config.guidance)))


def cost_by_latents(
    name: str, config: Stepwise, schedule: Callable[[int], NoiseSchedule], feature_guidance: float
) -> Cost:
    """The cost with a reward model of latents: a down path for each candidate, two with the VFE.

    Args:
        name: as of `cost_by_images`.
        feature_guidance: of the VFE; 1: none.
    """
    blocks = step_pairs.blocks(config, schedule(config.num_inference_steps), name)
    inner = sum(len(block) - 1 for block in blocks)
    sampled = (blocks[0][0] + len(blocks) + config.candidates * inner) * (1 + is_guided(config.guidance))
    down = (1 + is_guided(feature_guidance)) * config.candidates * len(blocks)
    return _cost(config, blocks, sampled + DOWN_PATH * down)


def _cost(config: Stepwise, blocks: list[list[int]], rollout: float) -> Cost:
    """`rollout`: of one prompt."""
    pairs = sum(len(block) for block in blocks)
    samples = sum(2 * len(block) - 1 for block in blocks)  # two where the branches have diverged
    samples *= 1 + is_guided(config.guidance)
    prompts = config.iterations * config.prompts_per_iteration
    updates = config.iterations * -(-pairs * config.prompts_per_iteration // config.batch_size)
    most = f"at most {prompts * pairs} pairs, {updates} updates"
    text = f"{prompts} rollouts in {config.iterations} iterations; {most}"
    return Cost(text, updates=prompts * samples * (1 + TRAINED), rollouts=prompts * rollout)
