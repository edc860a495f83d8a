"""The latent reward model on transformers, against hidden states of diffusers' own forward pass."""

import math

import flow_models
import pytest
import torch
from checkpoints import PROMPTS, load
from diffusers import DiffusionPipeline

from spo import config
from spo.preference.latent import LatentPreferenceModel

LORA = config.Lora(rank=2, alpha=4, target_modules=("to_q", "to_k", "add_q_proj"))
MAKERS = {
    "sd3": flow_models.sd3,
    "flux": flow_models.flux,
    "schnell": lambda words: flow_models.flux(words, dev=False),
}
ANY = pytest.mark.parametrize("family", ["sd3", "flux"])
BLOCKS = {"sd3": [3, 0], "flux": [2, 1]}  # three quarters of 4 joint ones, and of 2 joint and 2 single ones


@pytest.fixture(scope="module")
def checkpoints(words, tmp_path_factory):
    folders = {}
    for name, make in MAKERS.items():
        torch.manual_seed(0)
        folders[name] = tmp_path_factory.mktemp("flow")
        flow_models.livelier(make(words)).save_pretrained(folders[name])
    return folders


def model_of(backbone, guidance: float = 7.5) -> LatentPreferenceModel:
    """With heads unlike those it starts with."""
    torch.manual_seed(0)
    model = LatentPreferenceModel(backbone.feature_model(), guidance)
    if model.text_projection is not None:
        torch.nn.init.normal_(model.text_projection.weight)
    torch.nn.init.constant_(model.logit_scale, 1.5)
    return model


def settings(**changes) -> config.LatentPreference:
    fixed = {"optimizer": {"learning_rate": 1e-3}, "steps": 1, "batch_size": 1}
    return config.LatentPreference(**fixed | changes)


def noisy() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([250.5, 999.0])


def hidden_states(folder, text, x_t, timesteps) -> torch.Tensor:
    """Means over the image tokens after the third of all blocks [2,D], in diffusers' whole forward pass."""
    pipe = DiffusionPipeline.from_pretrained(folder)
    transformer, seen = pipe.transformer, []
    single = getattr(transformer, "single_transformer_blocks", [])
    block = [*transformer.transformer_blocks, *single][2]
    block.register_forward_hook(lambda module, given, output: seen.append(output[1]))
    states, pooled = text.tensors["text"], text.tensors["pooled"]
    if not hasattr(transformer, "single_transformer_blocks"):
        transformer(x_t, states, pooled, timesteps)
        return seen[0].mean(1)
    ids = torch.zeros(states.shape[1], 3), pipe._prepare_latent_image_ids(2, 4, 4, "cpu", torch.float32)
    guidance = torch.ones(2) if transformer.config.guidance_embeds else None
    transformer(
        pipe._pack_latents(x_t, *x_t.shape), states, pooled, timesteps / 1000, ids[1], ids[0], guidance
    )
    return seen[0].mean(1)


@pytest.mark.parametrize("name", [*MAKERS])
@torch.no_grad()
def test_features_are_means_of_the_hidden_states_at_three_quarters(checkpoints, name) -> None:
    backbone = load(checkpoints[name], "sd3" if name == "sd3" else "flux")
    model = model_of(backbone, 1.0)
    x_t, timesteps = noisy()
    features = hidden_states(checkpoints[name], backbone.encode_prompts(PROMPTS), x_t, timesteps)
    text = model.encode_text(PROMPTS)
    assert features.std() > 0.1
    torch.testing.assert_close(model.image_features(x_t, text, timesteps), features, rtol=1e-6, atol=1e-6)
    pooled = text.tensors["pooled"]
    if model.text_projection is not None:
        pooled = pooled @ model.text_projection.weight.T
    seen = features @ model.visual_projection.weight.T
    score = math.exp(1.5) * torch.nn.functional.cosine_similarity(seen, pooled)
    torch.testing.assert_close(model.score(x_t, text, timesteps), score, rtol=1e-5, atol=1e-5)


@ANY
@torch.no_grad()
def test_feature_guidance_goes_from_the_empty_prompt_to_the_text(checkpoints, family) -> None:
    backbone = load(checkpoints[family], family)
    model = model_of(backbone, 7.5)
    x_t, timesteps = noisy()
    with_text, without = (
        hidden_states(checkpoints[family], backbone.encode_prompts(prompts), x_t, timesteps)
        for prompts in (PROMPTS, ["", ""])
    )
    features = model.image_features(x_t, model.encode_text(PROMPTS), timesteps)
    assert (with_text - without).abs().max() > 1e-2
    torch.testing.assert_close(features, without + 7.5 * (with_text - without), rtol=1e-4, atol=1e-4)


@ANY
def test_only_the_blocks_up_to_that_layer_are_there(checkpoints, family) -> None:
    backbone = load(checkpoints[family], family)
    encoder = backbone.feature_model()
    width = backbone.unet.inner_dim
    assert encoder.facts == {"blocks of the transformer": BLOCKS[family], "width of the transformer": width}
    names = set(encoder.state_dict())
    assert not any("norm_out" in name or "proj_out" in name.split(".")[1] for name in names)
    assert not any(name.startswith("text") for name in names)
    total = (
        len(backbone.unet.transformer_blocks),
        len(getattr(backbone.unet, "single_transformer_blocks", ())),
    )
    assert total == {"sd3": (4, 0), "flux": (2, 2)}[family]  # those of the base are still there


@ANY
@pytest.mark.parametrize("trained", ["all", "lora", "heads"])
def test_gradients_reach_what_is_trained(checkpoints, family, trained) -> None:
    backbone = load(checkpoints[family], family)
    model = model_of(backbone)
    model.make_trainable(settings(trained=trained, lora=LORA if trained == "lora" else None), 0)
    model.encoder.checkpoint_gradients()
    x_t, timesteps = noisy()
    model.score(x_t, model.encode_text(PROMPTS), timesteps).sum().backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    heads = {"visual_projection.weight", "logit_scale"}
    heads |= {"text_projection.weight"} if family == "flux" else set()
    assert heads <= reached
    inside = {name for name in reached if name.startswith("encoder.")}
    if trained == "all":
        first = "transformer_blocks.0.attn.to_q.weight"
        assert {f"encoder.unet.{first}", "encoder.unet.context_embedder.weight"} <= inside
    else:
        assert all("lora" in name for name in inside) and bool(inside) == (trained == "lora")
    assert all(p.grad is None and not p.requires_grad for p in backbone.unet.parameters())


@ANY
@pytest.mark.parametrize("trained", ["all", "lora"])
@torch.no_grad()
def test_a_saved_model_scores_as_before(checkpoints, family, trained, tmp_path) -> None:
    backbone = load(checkpoints[family], family)
    model = model_of(backbone)
    model.make_trainable(settings(trained=trained, lora=LORA if trained == "lora" else None), 0)
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    x_t, timesteps = noisy()
    text = model.encode_text(PROMPTS)
    before = model.score(x_t, text, timesteps)
    model.save_pretrained(tmp_path, backbone)
    again = LatentPreferenceModel.from_pretrained(tmp_path, load(checkpoints[family], family))
    torch.testing.assert_close(again.score(x_t, text, timesteps), before, rtol=1e-4, atol=1e-4)
    assert (
        model_of(load(checkpoints[family], family)).score(x_t, text, timesteps) - before
    ).abs().max() > 0.01


def test_a_model_of_another_transformer_is_refused(checkpoints, tmp_path) -> None:
    backbone = load(checkpoints["sd3"], "sd3")
    model_of(backbone).save_pretrained(tmp_path, backbone)
    with pytest.raises(ValueError, match=r"another base: blocks of the transformer: \[3, 0\].* has \[2, 1\]"):
        LatentPreferenceModel.from_pretrained(tmp_path, load(checkpoints["flux"], "flux"))
