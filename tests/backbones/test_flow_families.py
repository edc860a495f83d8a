"""Stable Diffusion 3.5 and FLUX.1 beside diffusers' own pipelines, on tiny random models."""

import json
import shutil

import flow_models
import pytest
import torch
import torch.nn.functional as F
from checkpoints import PROMPTS, assert_equal, edit, inputs, load, ours, predict, pretend_training, refused
from diffusers import DiffusionPipeline
from small_experiment import pixels, run, write

from spo import backbones, config
from spo.diffusion.noise import SampleNoise
from spo.training import placement

JOINT_LORA = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
LORA = config.Lora(rank=2, alpha=4, target_modules=JOINT_LORA)
MAKERS = {
    "sd3": flow_models.sd3,
    "sd3 without T5": lambda words: flow_models.sd3(words, with_t5=False),
    "flux": flow_models.flux,
    "schnell": lambda words: flow_models.flux(words, dev=False),
}
VALIDATION = {"every": 1, "prompts": 2, "images": 2, "select": None}
ANY = pytest.mark.parametrize("family", ["sd3", "flux"])


@pytest.fixture(scope="session")
def checkpoints(words, tmp_path_factory):
    """The folder of each build; `experiment` takes its base from here too."""
    folders = {}
    for name, make in MAKERS.items():
        torch.manual_seed(0)
        folders[name] = tmp_path_factory.mktemp("flow")
        flow_models.livelier(make(words)).save_pretrained(folders[name])
    return folders


@pytest.fixture
def copy(checkpoints, tmp_path):
    return lambda name: shutil.copytree(checkpoints[name], tmp_path / name)


def theirs(folder, guidance: float, lora=None, pixels: int = flow_models.SIDE, **options) -> torch.Tensor:
    """Images of diffusers' pipeline from the latents of `ours`."""
    index = json.loads((folder / "model_index.json").read_text())
    absent = {name: None for name, entry in index.items() if entry == [None, None]}  # T5
    pipe = DiffusionPipeline.from_pretrained(folder, **absent)
    if lora is not None:
        pipe.load_lora_weights(lora)
    pipe.set_progress_bar_config(disable=True)
    latents = SampleNoise(0, [1, 2], (16, pixels // 2, pixels // 2)).draw()
    if "Flux" in type(pipe).__name__:
        latents = pipe._pack_latents(latents, *latents.shape)
    how = {"num_inference_steps": 5, "guidance_scale": guidance, "output_type": "pt", **options}
    return pipe(PROMPTS, latents=latents, height=pixels, width=pixels, **how).images


@pytest.mark.parametrize(
    ("name", "guidance"),
    [("sd3", 1.0), ("sd3", 4.5), ("sd3 without T5", 4.5), ("flux", 3.5), ("schnell", 1.0)],
)
def test_images_at_eta_0_are_those_of_diffusers(checkpoints, name: str, guidance: float) -> None:
    folder = checkpoints[name]
    assert_equal(ours(load(folder, family(name)), guidance), theirs(folder, guidance))


def family(name: str) -> str:
    return "sd3" if name.startswith("sd3") else "flux"


def test_the_tokens_of_t5_are_those_of_the_settings(checkpoints) -> None:
    for name, length in (("sd3", 7), ("sd3 without T5", 0), ("flux", 9)):
        folder, kind = checkpoints[name], family(name)
        text = load(folder, kind, max_sequence_length=length).encode_prompts(PROMPTS).tensors
        clip = (
            0 if kind == "flux" else load(folder, kind).encode_prompts(PROMPTS).tensors["text"].shape[1] - 256
        )
        assert text["text"].shape[1] == clip + length
    with pytest.raises(ValueError, match="0 is for a checkpoint without T5"):
        load(checkpoints["sd3"], "sd3", max_sequence_length=0)
    with pytest.raises(ValueError, match="max_sequence_length is of T5"):
        config.Backbone(family="sdxl", checkpoint="x", max_sequence_length=77)


def test_without_tokens_of_t5_images_are_those_of_diffusers(checkpoints) -> None:
    folder = checkpoints["sd3 without T5"]
    mine = ours(load(folder, "sd3", max_sequence_length=0), 4.5)
    assert_equal(mine, theirs(folder, 4.5, max_sequence_length=0))


def test_guidance_of_flux_is_an_input_and_true_guidance_is_classifier_free(checkpoints) -> None:
    folder = checkpoints["flux"]
    base = load(folder, "flux")
    assert (ours(base, 3.5) - ours(base, 1.0)).abs().max() > 1e-3
    both = load(folder, "flux", true_guidance=2.0)
    expected = theirs(folder, 3.5, negative_prompt=["", ""], true_cfg_scale=2.0)
    assert_equal(ours(both, 3.5), expected)
    assert (expected - theirs(folder, 3.5)).abs().max() > 1e-3


def test_guidance_that_a_family_does_not_take_is_refused(checkpoints) -> None:
    with pytest.raises(ValueError, match="guidance is 3.5, but the base takes none .*schnell"):
        ours(load(checkpoints["schnell"], "flux"), 3.5)
    with pytest.raises(ValueError, match="true_guidance is for flux"):
        config.Backbone(family="sd3", checkpoint="x", true_guidance=2.0)


@ANY
def test_a_saved_lora_gives_the_same_images_here_and_in_diffusers(checkpoints, family: str, tmp_path) -> None:
    from spo.adapters import load as load_adapted

    folder = checkpoints[family]
    backbone = load(folder, family)
    base = predict(backbone)
    backbone.add_lora(LORA, seed=0)
    assert torch.equal(predict(backbone), base)
    pretend_training(backbone)
    adapted = sum(".to_add_out.lora_A" in name for name, _ in backbone.unet.named_parameters())
    assert adapted > 0 and (predict(backbone) - base).abs().max() > 1e-3
    assert torch.equal(predict(backbone, reference=True), base)
    backbone.save_lora(tmp_path)
    images = ours(backbone, 3.5)
    assert_equal(images, theirs(folder, 3.5, lora=tmp_path))
    again = load_adapted(config.Backbone(family=family, checkpoint=str(folder)), tmp_path, "cpu")
    assert_equal(ours(again, 3.5), images)


@ANY
def test_latents_are_shifted_and_scaled(checkpoints, family: str) -> None:
    backbone = load(checkpoints[family], family)
    images = torch.rand(2, 3, *backbone.image_size) * 2 - 1
    raw = backbone.vae.encode(images).latent_dist.mean
    latents = backbone.encode(images)
    assert latents.shape[1:] == backbone.latent_shape == (16, 8, 8)
    assert torch.allclose(latents, (raw - 0.0609) * 1.5305, atol=1e-5)
    assert torch.allclose(backbone.decode(latents), backbone.vae.decode(raw).sample, atol=1e-4)


def test_flux_tokens_are_those_of_diffusers(checkpoints) -> None:
    """The packing is diffusers', so a transformer that returns its input gives the latents back."""
    pipe = DiffusionPipeline.from_pretrained(checkpoints["flux"])
    x_t = torch.randn(2, 16, 8, 6)
    packed = pipe._pack_latents(x_t, *x_t.shape)
    assert torch.equal(F.pixel_unshuffle(x_t, 2).flatten(2).transpose(1, 2), packed)
    backbone = load(checkpoints["flux"], "flux")
    seen = {}

    def same(hidden_states, **given):
        seen.update(given)
        return (hidden_states,)

    text = backbone.encode_prompts(PROMPTS)
    assert torch.equal(backbone._text.run(same, x_t, torch.tensor([250.5, 999.0]), text), x_t)
    ids = pipe._prepare_latent_image_ids(2, 4, 3, "cpu", torch.float32)
    assert torch.equal(seen["img_ids"], ids)
    assert torch.equal(seen["timestep"], torch.tensor([250.5, 999.0]) / 1000)


@ANY
def test_text_is_encoded_once_and_the_encoders_leave(checkpoints, family: str) -> None:
    backbone = load(checkpoints[family], family)
    alone = backbone.encode_prompts(["a red circle"]).tensors
    backbone.remember_prompts(PROMPTS)
    for encoder in backbone._text.encoders:
        encoder.forward = None  # a further call would fail
    known = backbone.encode_prompts([PROMPTS[1], "a red circle"])
    for name, value in alone.items():
        assert torch.equal(known.tensors[name][1:], value), name
    backbone.empty_prompt()
    with pytest.raises(TypeError):
        backbone.encode_prompts(["a small star"])


@ANY
def test_the_transformer_leaves_while_text_is_encoded(checkpoints, family: str, monkeypatch) -> None:
    """Also in training, when a prompt that was not remembered comes."""
    backbone, moved = load(checkpoints[family], family), []
    backbone.train_fully()
    backbone.predict(*inputs(backbone))
    names = {backbone.unet: "policy", backbone._reference: "reference", backbone._text.t5: "t5"}
    monkeypatch.setattr(
        placement, "move", lambda module, place: moved.append((names.get(module), str(place)))
    )
    monkeypatch.setattr(backbone, "_wake", lambda: moved.append("woken"))
    backbone.encode_prompts(["a small star"])
    assert moved[:2] == [("policy", "cpu"), ("reference", "cpu")] and moved.index(("t5", "cpu")) > 1
    assert backbone._resting is not None
    x_t, timesteps, text = inputs(backbone)
    moved.clear()
    backbone.predict(x_t, timesteps, text)
    assert moved == ["woken"]


@ANY
def test_t5_is_in_bf16_where_the_base_is_in_fp16(checkpoints, family: str) -> None:
    backbone = load(checkpoints[family], family, dtype="fp16")
    text = backbone.encode_prompts(PROMPTS).tensors["text"]
    assert backbone._text.t5.dtype == torch.bfloat16 and text.dtype == torch.float16
    assert backbone.unet.dtype == torch.float16


@pytest.mark.parametrize(
    ("name", "file", "changes", "said"),
    [
        ("sd3", "transformer/config.json", {"sample_size": 7}, ("sample_size 7", "patch_size 2")),
        ("sd3", "transformer/config.json", {"pos_embed_max_size": 3}, ("pos_embed_max_size", "sample_size")),
        ("sd3", "transformer/config.json", {"patch_size": None}, ("patch_size", "None")),
        ("sd3", "transformer/config.json", {"in_channels": 33}, ("in_channels 33", "out_channels 16")),
        ("sd3", "transformer/config.json", {"joint_attention_dim": 48}, ("transformer",)),
        ("sd3", "model_index.json", {"text_encoder": [None, None]}, ("text_encoder", "missing")),
        ("sd3", "model_index.json", {"_class_name": "FluxPipeline"}, ("FluxPipeline", "'sd3'")),
        ("flux", "transformer/config.json", {"in_channels": 384, "out_channels": 64}, ("in_channels 384",)),
        ("flux", "transformer/config.json", {"patch_size": 2}, ("patch_size is 2",)),
        ("flux", "transformer/config.json", {"guidance_embeds": "x"}, ("guidance_embeds",)),
        ("flux", "vae/config.json", {"sample_size": 18}, ("sample_size", "18")),
        ("flux", "vae/config.json", {"latent_channels": 4}, ("latent_channels 4", "16")),
        ("flux", "model_index.json", {"text_encoder_2": [None, None]}, ("text_encoder_2", "missing")),
    ],
)
def test_announcements_that_are_not_supported_are_refused(copy, name, file, changes, said) -> None:
    folder = copy(name)
    edit(folder / file, **changes)
    refused(folder, name, *said)


@ANY
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"_class_name": "DDIMScheduler"}, "_class_name"),
        ({"use_karras_sigmas": True}, "use_karras_sigmas"),
        ({"stochastic_sampling": True}, "stochastic_sampling"),
        ({"max_shift": "x"}, "max_shift"),
    ],
)
def test_other_schedules_than_the_pipelines_are_refused(copy, family: str, changes, said: str) -> None:
    folder = copy(family)
    edit(folder / "scheduler/scheduler_config.json", **changes)
    refused(folder, family, "scheduler_config.json", said)


@ANY
def test_quantized_weights_overrides_of_ddpm_and_single_files_are_refused(copy, family: str) -> None:
    folder = copy(family)
    refused(folder, family, "backbone.scheduler.prediction_type", scheduler={"prediction_type": "epsilon"})
    edit(folder / "transformer/config.json", quantization_config={"quant_method": "bitsandbytes"})
    refused(folder, family, "quantized weights")
    with pytest.raises(ValueError, match=f"single files of family '{family}' are not read"):
        config.Backbone(family=family, checkpoint="model.safetensors")


@ANY
def test_a_dynamic_shift_is_that_of_the_image_tokens(copy, family: str) -> None:
    folder = copy(family)
    edit(folder / "scheduler/scheduler_config.json", use_dynamic_shifting=True, max_shift=2.0, base_shift=1.0)
    edit(folder / "scheduler/scheduler_config.json", base_image_seq_len=4, max_image_seq_len=64)
    assert_equal(ours(load(folder, family), 3.5), theirs(folder, 3.5))


@ANY
@pytest.mark.parametrize("pixels", [8, 24])
def test_another_image_size_is_that_of_diffusers(checkpoints, family: str, pixels: int) -> None:
    """Its positions, and FLUX's dynamic shift by the number of its tokens."""
    backbone = load(checkpoints[family], family, image_size=pixels)
    assert backbone.image_size == (pixels, pixels) and backbone.latent_shape == (16, pixels // 2, pixels // 2)
    images = ours(backbone, 3.5)
    assert images.shape[-1] == pixels
    assert_equal(images, theirs(checkpoints[family], 3.5, pixels=pixels))
    other = load(checkpoints[family], family).schedule(5).timesteps
    assert torch.equal(backbone.schedule(5).timesteps, other) == (family == "sd3")


@ANY
def test_an_image_size_without_whole_tokens_or_positions_is_refused(checkpoints, family: str) -> None:
    refused(checkpoints[family], family, "backbone.image_size: 18 is not a multiple of 4", image_size=18)
    if family == "sd3":
        refused(checkpoints[family], family, "backbone.image_size: 36 is more than 32 pixels", image_size=36)


@ANY
def test_a_full_fine_tune_loads_in_diffusers(checkpoints, family: str, tmp_path) -> None:
    backbone = load(checkpoints[family], family)
    base = predict(backbone)
    backbone.train_fully()
    backbone.predict(*inputs(backbone)).square().mean().backward()
    with torch.no_grad():
        for parameter in backbone.trainable_parameters():
            if parameter.grad is not None:
                parameter -= 0.05 * parameter.grad.sign()
    assert (predict(backbone) - base).abs().max() > 0.01
    assert torch.equal(predict(backbone, reference=True), base)
    images = ours(backbone, 3.5)
    backbone.save_pipeline(tmp_path)
    assert_equal(images, theirs(tmp_path, 3.5))


@ANY
def test_other_names_of_a_lora_and_another_family_are_refused_in_a_line(
    checkpoints, family, tmp_path
) -> None:
    from safetensors.torch import save_file

    from spo.adapters import load as load_adapted

    settings = config.Backbone(family=family, checkpoint=str(checkpoints[family]))
    tensors = [torch.ones(2, 32), torch.ones(96, 2)]
    kohya, comfy = "lora_unet_joint_blocks_0_x_block_attn_qkv", "diffusion_model.double_blocks.0.img_attn.qkv"
    for number, stem in enumerate((kohya, comfy)):
        file = tmp_path / f"{number}.safetensors"
        save_file({f"{stem}.lora_{s}.weight": t for s, t in zip(("A", "B"), tensors, strict=True)}, file)
        with pytest.raises(ValueError, match="has no layer for") as error:
            load_adapted(settings, file, "cpu")
        assert "\n" not in str(error.value)
    other = {"sd3": "flux-1-dev/lora", "flux": "stable-diffusion-v3-medium/lora"}[family]
    save_file({"x.lora_A.weight": tensors[0]}, file, metadata={"modelspec.architecture": other})
    with pytest.raises(ValueError, match=f"modelspec.architecture .*backbone.family is '{family}'"):
        load_adapted(settings, file, "cpu")


@pytest.fixture
def prepared(experiment, monkeypatch):
    """An experiment of one iteration, with its pairs, and adapters on both streams of a joint block.

    Within, a stage may encode no prompt that it has not remembered beforehand: T5 would have to return.
    """
    encode = backbones.StableDiffusion.encode_prompts

    def known(self, prompts):
        assert set(prompts) <= set(self._texts)
        return encode(self, prompts)

    for method in ("spo", "lpo", "diffusion_dpo"):
        section = experiment["align"][method]
        section |= {"iterations": 1, "validation": None if method == "lpo" else VALIDATION}
        section["lora"] |= {"target_modules": list(JOINT_LORA)}
    for method in ("spo", "lpo"):
        experiment["align"][method] |= {"inner_steps": 1, "divert_start_step": 1}
    experiment["latent_preference"] |= {"trained": "lora", "lora": {"rank": 2, "alpha": 2}}
    write(experiment)
    for stage in ("inputs", "prompts", "pairs"):
        run(stage)
    with monkeypatch.context() as within:
        within.setattr(backbones.StableDiffusion, "encode_prompts", known)
        yield experiment


TINY = pytest.mark.parametrize("experiment", ["sd3", "flux"], indirect=True)


def trained(tmp_path, experiment, method: str) -> dict:
    """The metrics of a method; its adapter must load in diffusers."""
    run("align", method)
    pipe = DiffusionPipeline.from_pretrained(experiment["backbone"]["checkpoint"])
    pipe.load_lora_weights(tmp_path / "outputs/align" / method)
    return json.loads((tmp_path / f"reports/metrics/align_{method}.json").read_text())


@pytest.mark.smoke
@TINY
def test_spo_trains_and_its_images_are_those_of_its_lora(prepared, tmp_path, capsys) -> None:
    run("preference")
    metrics = trained(tmp_path, prepared, "spo")
    assert metrics["pairs"] > 0 and metrics["updates"] > 0
    for variant in ("base", "spo"):
        run("generate", variant)
    base, spo = (pixels(tmp_path / f"outputs/images/{name}/images.zip") for name in ("base", "spo"))
    assert any(not torch.equal(one, other) for one, other in zip(base, spo, strict=True))


@pytest.mark.smoke
@TINY
def test_what_training_takes_is_counted(experiment, capsys) -> None:
    for stage in ("align", "generate"):
        run(stage, "spo", "--dry-run")
        assert "memory: " in capsys.readouterr().out


@pytest.mark.smoke
@TINY
def test_lpo_and_diffusion_dpo_train(prepared, tmp_path) -> None:
    run("preference", "latent")
    measured = json.loads((tmp_path / "reports/metrics/preference_latent.json").read_text())
    assert measured["updates"] == 2 and measured["accuracy"]
    for method in ("lpo", "diffusion_dpo"):
        metrics = trained(tmp_path, prepared, method)
        assert metrics["pairs"] > 0 and metrics["updates"] > 0
