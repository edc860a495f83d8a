import shutil

import diffusers
import pytest
import torch
from checkpoints import PROMPTS, inputs, predict, pretend_training
from diffusers import DDIMScheduler, DiffusionPipeline
from rounding import assert_same
from safetensors.torch import load_file

from spo import backbones, config
from spo.adapters import load as load_adapted
from spo.diffusion.noise import SampleNoise
from spo.diffusion.rollout import sample_latents
from spo.diffusion.schedule import Schedule

FAMILIES = ["sd", "sdxl"]
LORA = config.Lora(rank=2, alpha=6)  # alpha is not the rank, so a lost scale shows

pytestmark = pytest.mark.parametrize("family", FAMILIES)


def test_reference_is_the_base_whatever_was_trained(load, family) -> None:
    backbone = load(family)
    base = predict(backbone)
    assert base.shape == (2, *backbone.latent_shape) and base.dtype == torch.float32
    assert torch.equal(predict(backbone, reference=True), base)

    backbone.add_lora(LORA, seed=0)
    assert torch.equal(predict(backbone), base)  # B is zero
    pretend_training(backbone)
    assert (predict(backbone) - base).abs().max() > 0.01
    assert torch.equal(predict(backbone, reference=True), base)
    assert (predict(backbone) - base).abs().max() > 0.01  # switched on again


def test_only_the_adapter_trains(load, family) -> None:
    backbone = load(family, dtype="bf16")
    assert backbone.trainable_parameters() == []
    backbone.add_lora(LORA, seed=0)
    trained = {n: p for n, p in backbone.unet.named_parameters() if p.requires_grad}
    assert len(trained) == len(backbone.trainable_parameters())
    for target in LORA.target_modules:
        assert any(f".{target}.lora_B." in name for name in trained)
    assert all("lora_" in n and p.dtype == torch.float32 for n, p in trained.items())

    output = backbone.predict(*inputs(backbone))
    assert output.dtype == torch.float32
    output.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())
    others = (backbone.unet, backbone.vae, backbone.pipeline.text_encoder)
    frozen = [p for m in others for p in m.parameters()]
    assert all(p.grad is None for p in frozen if not p.requires_grad)


def test_gradient_checkpointing_computes_the_blocks_again(load, family) -> None:
    gradients, forwards = [], []
    for again in (False, True):
        backbone = load(family)
        backbone.add_lora(LORA, seed=0)
        pretend_training(backbone)
        if again:
            backbone.checkpoint_gradients()
        calls: list[None] = []
        backbone.unet.up_blocks[0].resnets[0].register_forward_pre_hook(
            lambda *_, calls=calls: calls.append(None)
        )
        backbone.predict(*inputs(backbone)).square().mean().backward()
        gradients.append([p.grad for p in backbone.trainable_parameters()])
        forwards.append(len(calls))
    assert forwards == [1, 2]
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.allclose(plain, checkpointed, atol=1e-7) and plain.abs().max() > 0


def test_the_seed_alone_decides_the_adapter(load, family) -> None:
    def weights(seed: int) -> torch.Tensor:
        backbone = load(family)
        backbone.add_lora(LORA, seed)
        return torch.cat([p.flatten() for p in backbone.trainable_parameters()])

    state = torch.random.get_rng_state()
    first = weights(3)
    torch.rand(5)
    assert torch.equal(weights(3), first) and not torch.equal(weights(4), first)
    torch.random.set_rng_state(state)


def test_the_prompt_and_the_timestep_reach_the_unet(load, family) -> None:
    backbone = load(family)
    x_t, timesteps, conditioning = inputs(backbone)
    output = backbone.predict(x_t, timesteps, conditioning)
    assert not torch.allclose(
        backbone.predict(x_t, timesteps, conditioning.select([1, 0])), output, atol=1e-4
    )
    assert not torch.allclose(backbone.predict(x_t, timesteps.flip(0), conditioning), output, atol=1e-4)
    alone = backbone.predict(x_t[1:], timesteps[1:], conditioning.select(slice(1, 2)))
    assert_same(alone, output[1:], backbone.unet)


def image_pipeline(folder):
    """diffusers' own, with the DDIM sampler."""
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("channels_last", [False, True])
def test_images_are_those_of_diffusers(load, family, checkpoints, channels_last) -> None:
    backbone = load(family, channels_last=channels_last)
    schedule = Schedule.from_config(backbone.scheduler_config, 6)

    def noise() -> SampleNoise:
        return SampleNoise(0, [5, 6], backbone.latent_shape)

    latents = sample_latents(backbone, schedule, PROMPTS, noise(), guidance=3.0, eta=0.0)
    decoded = backbone.decode(latents)
    assert decoded.shape == (2, 3, *backbone.image_size)
    images = (decoded.clamp(-1, 1).permute(0, 2, 3, 1).numpy() + 1) / 2

    pipe = image_pipeline(checkpoints[family])
    how = {"prompt": PROMPTS, "num_inference_steps": 6, "eta": 0.0}
    expected = pipe(**how, latents=noise().draw(), guidance_scale=3.0, output_type="latent").images
    assert (latents - expected).abs().max() < 1e-4 * expected.abs().max()
    theirs = pipe(**how, latents=noise().draw(), guidance_scale=3.0, output_type="np").images
    assert abs(images - theirs).max() * 255 <= 2
    other = pipe(**how, latents=noise().draw(), guidance_scale=2.0, output_type="np").images
    assert abs(images - other).max() * 255 > 4  # a difference is one that can be seen here


def test_encode_is_the_scaled_mean_and_the_inverse_of_decodes_scale(load, family) -> None:
    backbone = load(family)
    images = torch.rand(2, 3, *backbone.image_size) * 2 - 1
    latents = backbone.encode(images)
    raw = backbone.vae.encode(images).latent_dist.mean
    assert latents.shape == (2, *backbone.latent_shape)
    assert torch.allclose(latents, raw * {"sd": 0.18215, "sdxl": 0.13025}[family], atol=1e-6)
    assert torch.allclose(backbone.decode(latents), backbone.vae.decode(raw).sample, atol=1e-4)


def test_the_vae_may_be_another_and_of_another_dtype(load, family, checkpoints, tmp_path) -> None:
    vae = diffusers.AutoencoderKL.from_pretrained(checkpoints[family], subfolder="vae")
    vae.decoder.conv_out.bias.data.fill_(9.0)
    vae.save_pretrained(tmp_path)
    other = load(family, vae=str(tmp_path))
    assert other.decode(torch.zeros(1, *other.latent_shape)).mean() > 5

    half = load(family, dtype="fp16")  # SDXL's own VAE overflows in fp16
    assert half.unet.dtype == torch.float16
    assert half.vae.dtype == (torch.float32 if family == "sdxl" else torch.float16)


def refused(message: str, attempt) -> None:
    with pytest.raises(ValueError, match=message) as error:
        attempt()
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_wrong_checkpoints_are_one_line(load, family, checkpoints, tmp_path) -> None:
    other = {"sd": "sdxl", "sdxl": "sd"}[family]
    refused(
        f"is a StableDiffusion.*Pipeline, but backbone.family is '{family}'",
        lambda: load(family, checkpoint=str(checkpoints[other])),
    )
    refused(
        "backbone.checkpoint: data/nowhere: no such file", lambda: load(family, checkpoint="data/nowhere")
    )
    refused("is not a diffusers pipeline", lambda: load(family, checkpoint=str(tmp_path)))
    refused("nowhere: config.json: cannot be loaded", lambda: load(family, vae=str(tmp_path / "nowhere")))

    spoilt = shutil.copytree(checkpoints[family], tmp_path / "spoilt")
    (spoilt / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"truncated")
    refused("spoilt: unet: cannot be loaded", lambda: load(family, checkpoint=str(spoilt)))


def test_a_full_fine_tune_keeps_its_reference_and_loads_here_and_in_diffusers(load, family, tmp_path) -> None:
    backbone = load(family)
    base = predict(backbone)
    backbone.train_fully()
    trained = backbone.trainable_parameters()
    assert len(trained) == len(list(backbone.unet.parameters()))
    backbone.predict(*inputs(backbone)).square().mean().backward()
    assert all(p.grad is not None for p in trained)
    with torch.no_grad():
        for parameter in trained:
            parameter -= 0.05 * parameter.grad.sign()
    changed = predict(backbone)
    assert (changed - base).abs().max() > 0.01
    assert torch.equal(predict(backbone, reference=True), base)
    backbone.save_pipeline(tmp_path)

    settings = config.Backbone(family=family, checkpoint="nowhere/at-all")
    again = load_adapted(settings, tmp_path, "cpu")
    assert_same(predict(again), changed, again.unet)
    assert again.trainable_parameters() == []
    pipe = DiffusionPipeline.from_pretrained(tmp_path)
    x_t, timesteps, conditioning = inputs(backbone)
    with torch.no_grad():
        output = pipe.unet(x_t, timesteps, **backbone._text.unet_arguments(conditioning)).sample
    assert_same(output, changed, pipe.unet)


def test_a_full_fine_tune_in_half_precision_has_fp32_weights(load, family, tmp_path) -> None:
    backbone = load(family, dtype="bf16")
    base = predict(backbone, reference=True)
    backbone.train_fully()
    assert {p.dtype for p in backbone.trainable_parameters()} == {torch.float32}
    assert torch.allclose(predict(backbone), base, atol=0.1 * float(base.abs().max()))
    backbone.predict(*inputs(backbone)).square().mean().backward()
    assert all(p.grad.isfinite().all() for p in backbone.trainable_parameters())
    backbone.save_pipeline(tmp_path)
    again = backbones.load(config.Backbone(family=family, checkpoint=str(tmp_path), dtype="bf16"), "cpu")
    assert again.unet.dtype == torch.bfloat16 and torch.equal(predict(again), base)


def test_saving_a_full_fine_tune_copies_no_weights_on_its_device(load, family, tmp_path, monkeypatch) -> None:
    """What is copied is cast on the way, to the CPU; the weights in training stay what they were."""
    backbone = load(family, dtype="bf16")
    backbone.train_fully()
    before = {name: id(value) for name, value in backbone.unet.named_parameters()}
    copied = []
    clone = torch.nn.Parameter.__deepcopy__
    monkeypatch.setattr(
        torch.nn.Parameter, "__deepcopy__", lambda self, memo: copied.append(self) or clone(self, memo)
    )
    backbone.save_pipeline(tmp_path)
    assert copied == []
    assert {name: id(value) for name, value in backbone.unet.named_parameters()} == before
    assert backbone.pipeline.unet is backbone.unet and backbone.unet.dtype == torch.float32
    saved = load_file(tmp_path / "unet/diffusion_pytorch_model.safetensors")
    for name, value in backbone.unet.state_dict().items():
        assert torch.equal(saved[name], value.to(torch.bfloat16)), name
