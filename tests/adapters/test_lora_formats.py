"""Adapters of every trainer against the same changes merged into the weights by hand."""

import copy
import functools
import json
import math

import adapters
import pytest
import torch
from diffusers import DiffusionPipeline
from rounding import assert_same

pytestmark = pytest.mark.smoke

PROMPTS = ["a red circle", ""]


@pytest.fixture(params=["sd", "sdxl"])
def family(request) -> str:
    return request.param


def predict(backbone, **how) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(2, *backbone.latent_shape, generator=generator)
    with torch.no_grad():
        return backbone.predict(x_t, torch.tensor([21, 801]), backbone.encode_prompts(PROMPTS), **how)


@pytest.fixture(scope="module")
def merged_by_hand(loaded):
    """By family: changes of all layers of the UNet, and what the base predicts without and with them."""

    @functools.cache
    def merged_by_hand(family: str):
        backbone = copy.deepcopy(loaded[family])
        adapter = adapters.changes(backbone.unet, adapters.layers(backbone.unet))
        base = predict(backbone)
        adapters.merge(backbone.unet, adapter)
        return adapter, base, predict(backbone)

    return merged_by_hand


def kohya(folder, adapter):
    return adapters.write(folder / "any name.safetensors", adapters.kohya("lora_unet_", adapter))


def kohya_with_original_names(folder, adapter):
    state = adapters.kohya("lora_unet_", adapter, adapters.original_name)
    assert any("input_blocks_3_1_transformer_blocks_0" in key for key in state)
    return adapters.write(folder / "sdxl.safetensors", state)


def kohya_as_a_pickle(folder, adapter):
    torch.save(adapters.kohya("lora_unet_", adapter), folder / "lora.pt")
    return folder / "lora.pt"


def diffusers(folder, adapter):
    state = {}
    for name, change in adapter.items():
        state |= {f"unet.{name}.lora_A.weight": change.down, f"unet.{name}.lora_B.weight": change.up}
    file = folder / "pytorch_lora_weights.safetensors"
    return adapters.write(file, state, **adapters.diffusers_metadata(adapter))


def diffusers_with_alphas(folder, adapter):
    state = {}
    for name, change in adapter.items():
        state |= {f"unet.{name}.lora.down.weight": change.down, f"unet.{name}.lora.up.weight": change.up}
        state[f"unet.{name}.alpha"] = torch.tensor(change.alpha)
    adapters.write(folder / "only.safetensors", state)
    return folder


def peft(folder, adapter):
    state = {}
    for name, change in adapter.items():
        state[f"base_model.model.{name}.lora_A.weight"] = change.down
        state[f"base_model.model.{name}.lora_B.weight"] = change.up
    adapters.write(folder / "adapter_model.safetensors", state)
    (folder / "adapter_config.json").write_text(json.dumps(adapters.settings(adapter)))
    return folder


def original_release(folder, adapter):
    state = {}
    for name, change in adapter.items():
        key = f"diffusion_model.{adapters.original_name(name)}"
        state |= {f"{key}.lora_A.weight": change.down, f"{key}.lora_B.weight": change.up}
        state[f"{key}.alpha"] = torch.tensor(change.alpha)
    return adapters.write(folder / "comfy.safetensors", state)


FORMATS = [
    *(kohya, kohya_with_original_names, kohya_as_a_pickle, original_release),
    *(diffusers, diffusers_with_alphas, peft),
]


@pytest.mark.parametrize("write", FORMATS)
def test_every_layer_has_its_own_strength(load, merged_by_hand, family, tmp_path, write) -> None:
    """All linear and convolution layers of the UNet, ranks 1 to 3, alpha / rank from 1/4 to 4."""
    backbone, (adapter, base, expected) = load(family), merged_by_hand(family)
    said = adapters.load_lora(backbone, write(tmp_path, adapter))
    assert f"changes {len(adapter)} layers of the unet" in said
    assert_same(predict(backbone), expected, backbone.unet)
    assert (expected - base).abs().max() > 0.1
    assert backbone.trainable_parameters() == []
    assert torch.equal(predict(backbone, reference=True), base)


def test_the_old_attention_processor_format_has_strength_one(load, family, tmp_path) -> None:
    merged, backbone = load(family), load(family)
    names = adapters.layers(merged.unet, "to_q", "to_k", "to_v", "to_out.0")
    adapter = adapters.changes(merged.unet, names)
    adapters.merge(merged.unet, adapter, lambda change: 1.0)
    state = {}
    for name, change in adapter.items():
        attention, _, layer = name.removesuffix(".0").rpartition(".")
        key = f"{attention}.processor.{layer}_lora"
        state |= {f"{key}.down.weight": change.down, f"{key}.up.weight": change.up}
    adapters.load_lora(backbone, adapters.write(tmp_path / "pytorch_lora_weights.safetensors", state))
    assert_same(predict(backbone), predict(merged), backbone.unet)


@pytest.mark.parametrize("write", [diffusers, peft])
def test_rank_stabilised_lora_is_divided_by_the_root_of_its_rank(
    load, family, tmp_path, monkeypatch, write
) -> None:
    merged, backbone = load(family), load(family)
    adapter = adapters.changes(merged.unet, adapters.layers(merged.unet))
    adapters.merge(merged.unet, adapter, lambda change: change.alpha / math.sqrt(change.rank))
    plain = adapters.settings
    monkeypatch.setattr(adapters, "settings", lambda adapter: plain(adapter, use_rslora=True))
    adapters.load_lora(backbone, write(tmp_path, adapter))
    assert_same(predict(backbone), predict(merged), backbone.unet)


@pytest.mark.parametrize("more", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_what_peft_saves_is_what_peft_computes(load, merged_by_hand, family, tmp_path, more) -> None:
    from peft import LoraConfig, get_peft_model

    theirs, backbone = load(family), load(family)
    how = {
        "r": 4,
        "lora_alpha": 2,
        "target_modules": ["to_q", "to_k", "to_v", "to_out.0", "proj", "conv1", "time_emb_proj"],
        "rank_pattern": {"to_q": 2, "^mid_block.attentions.0.transformer_blocks.0.attn1.to_k": 3},
        "alpha_pattern": {"attn2.to_k": 16, "conv1": 1},
        "init_lora_weights": False,
        **more,
    }
    torch.manual_seed(0)
    model = get_peft_model(theirs.unet, LoraConfig(**how))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
            elif "lora_" in name:
                parameter.mul_(0.3)
    model.save_pretrained(tmp_path)
    adapters.load_lora(backbone, tmp_path)
    expected, (_, base, _) = predict(theirs), merged_by_hand(family)
    assert_same(predict(backbone), expected, backbone.unet)
    assert (expected - base).abs().max() > 0.01


def test_kohyas_dora_has_the_rows_norms(load, family, tmp_path) -> None:
    """W' = m * (W + alpha / rank * up @ down) / its norm over each output's inputs (arXiv 2402.09353)."""
    merged, backbone = load(family), load(family)
    adapter = adapters.changes(merged.unet, adapters.layers(merged.unet))
    adapters.merge(merged.unet, adapter)
    state = adapters.kohya("lora_unet_", adapter)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name in adapter:
            weight = merged.unet.get_submodule(name).weight
            norm = weight.flatten(1).norm(dim=1).reshape(-1, *(1,) * (weight.ndim - 1))
            magnitude = norm * (0.7 + 0.6 * torch.rand(norm.shape, generator=generator))
            weight *= magnitude / norm
            state[f"lora_unet_{name.replace('.', '_')}.dora_scale"] = magnitude
    adapters.load_lora(backbone, adapters.write(tmp_path / "dora.safetensors", state))
    assert_same(predict(backbone), predict(merged), backbone.unet)


def test_locon_in_tuckers_form(load, family, tmp_path) -> None:
    """down [r,in,1,1], mid [r,r,3,3], up [out,r,1,1], one after the other."""
    merged, backbone = load(family), load(family)
    state, (name, other) = {}, adapters.layers(merged.unet, "conv1")[:2]
    generator = torch.Generator().manual_seed(0)
    for layer in (name, other):
        convolution = merged.unet.get_submodule(layer)
        outputs, inputs = convolution.weight.shape[:2]
        down = torch.randn(2, inputs, 1, 1, generator=generator)
        middle = torch.randn(3, 2, 3, 3, generator=generator)
        up = 0.1 * torch.randn(outputs, 3, 1, 1, generator=generator)
        kernel = torch.einsum("or,rskl,si->oikl", up[:, :, 0, 0], middle, down[:, :, 0, 0])
        with torch.no_grad():
            convolution.weight += 1.5 / 3 * kernel
        key = "lora_unet_" + layer.replace(".", "_")
        state |= {f"{key}.lora_down.weight": down, f"{key}.lora_mid.weight": middle}
        state |= {f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(1.5)}
    adapters.load_lora(backbone, adapters.write(tmp_path / "tucker.safetensors", state))
    assert torch.allclose(predict(backbone), predict(merged), atol=1e-4)


def test_matrices_and_kernels_of_one_are_the_same(load, family, tmp_path) -> None:
    """SDXL's projections are linear, those of SD 1.5 are 1x1 convolutions; tools write either for both."""
    merged, backbone = load(family), load(family)
    adapter = adapters.changes(merged.unet, adapters.layers(merged.unet, "proj_in", "proj_out", "to_q"))
    adapters.merge(merged.unet, adapter)
    state = adapters.kohya("lora_unet_", adapter)
    for key, value in state.items():
        if value.ndim:
            state[key] = value[:, :, 0, 0] if value.ndim == 4 else value[:, :, None, None]
    adapters.load_lora(backbone, adapters.write(tmp_path / "shapes.safetensors", state))
    assert_same(predict(backbone), predict(merged), backbone.unet)


def text_changes(backbone, component: str) -> dict[str, adapters.Change]:
    model = getattr(backbone.pipeline, component)
    return adapters.changes(model, adapters.layers(model, "q_proj", "v_proj", "out_proj", "fc1", "fc2"))


def components(family: str) -> dict[str, str]:
    both = {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
    return both if family == "sdxl" else {"text_encoder": "lora_te_"}


def text_name(name: str) -> str:
    return name if name.startswith("text_model.") else f"text_model.{name}"


def encoded(backbone) -> dict[str, torch.Tensor]:
    return dict(backbone.encode_prompts(PROMPTS).tensors)


@pytest.mark.parametrize("maker", ["kohya", "diffusers"])
def test_text_encoders_are_adapted_each_layer_at_its_strength(load, family, tmp_path, maker) -> None:
    merged, backbone = load(family), load(family)
    state = {}
    for component, prefix in components(family).items():
        adapter = text_changes(merged, component)
        adapters.merge(getattr(merged.pipeline, component), adapter)
        if maker == "kohya":
            state |= adapters.kohya(prefix, adapter, text_name)
        else:
            for name, change in adapter.items():
                key = f"{component}.{text_name(name)}"
                state |= {f"{key}.lora_linear_layer.down.weight": change.down}
                state |= {f"{key}.lora_linear_layer.up.weight": change.up}
                state |= {f"{key}.alpha": torch.tensor(change.alpha)}
    before = encoded(backbone)
    said = adapters.load_lora(backbone, adapters.write(tmp_path / "text.safetensors", state))
    assert "layers of the text_encoder" in said and "unet" not in said
    after, expected = encoded(backbone), encoded(merged)
    for name, value in expected.items():
        assert torch.allclose(after[name], value, atol=1e-5), name
        assert name == "time_ids" or (value - before[name]).abs().max() > 0.01


def test_a_uniform_adapter_is_that_of_diffusers_pipeline(load, family, checkpoints, tmp_path) -> None:
    """kohya's usual file: UNet and text encoders, one rank and one alpha."""
    backbone = load(family)
    unet = adapters.changes(backbone.unet, adapters.layers(backbone.unet, "to_q", "to_k", "to_v", "to_out.0"))
    parts = {"lora_unet_": unet}
    parts |= {prefix: text_changes(backbone, component) for component, prefix in components(family).items()}
    state = {}
    for prefix, adapter in parts.items():
        for change in adapter.values():
            change.down, change.up, change.alpha = change.down[:1], change.up[:, :1], 0.5
        state |= adapters.kohya(prefix, adapter, (lambda n: n) if "unet" in prefix else text_name)
    file = adapters.write(tmp_path / "lora.safetensors", state)

    pipe = DiffusionPipeline.from_pretrained(checkpoints[family])
    pipe.load_lora_weights(file)
    adapters.load_lora(backbone, file)
    with torch.no_grad():
        embeddings = pipe.encode_prompt(
            PROMPTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
    ours = encoded(backbone)
    text = embeddings[0].clone()
    if family == "sdxl":  # their pipeline makes the empty negative prompt all zeros, ours every empty prompt
        text[1] = 0
    assert torch.allclose(ours["text"], text, atol=1e-4)

    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(2, *backbone.latent_shape, generator=generator)
    arguments = backbone._text.unet_arguments(backbone.encode_prompts(PROMPTS))
    with torch.no_grad():
        theirs = pipe.unet(x_t, torch.tensor([21, 801]), **arguments).sample
    assert torch.allclose(predict(backbone), theirs, atol=1e-4)


def test_the_original_names_at_the_real_sizes(words) -> None:
    """As kohya's files of SD 1.5 and SDXL have them; the first block up of SD 1.5 has no attention."""
    import real_sizes

    from spo.adapters.names import layer_names, original_names, spelling

    with torch.device("meta"):
        small, large = real_sizes.sd15(words).unet, real_sizes.sdxl(words).unet
    assert original_names(small)["output_blocks.2.1.conv"] == "up_blocks.0.upsamplers.0.conv"
    names = layer_names(large)
    expected = {
        "input_blocks_4_1_transformer_blocks_0_attn1_to_q": (
            "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
        ),
        "input_blocks_8_1_transformer_blocks_9_ff_net_0_proj": (
            "down_blocks.2.attentions.1.transformer_blocks.9.ff.net.0.proj"
        ),
        "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
        "middle_block_1_proj_in": "mid_block.attentions.0.proj_in",
        "middle_block_2_in_layers_2": "mid_block.resnets.1.conv1",
        "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
        "output_blocks_5_1_transformer_blocks_1_attn2_to_out_0": (
            "up_blocks.1.attentions.2.transformer_blocks.1.attn2.to_out.0"
        ),
        "label_emb_0_2": "add_embedding.linear_2",
    }
    assert {alias: names.get(spelling(alias)) for alias in expected} == expected
    layers = set(adapters.layers(large))
    assert set(names.values()) == layers and layers <= set(original_names(large).values())
    assert len(layers) == 794
