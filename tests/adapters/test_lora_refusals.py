"""Announcements of an adapter file that are not supported are refused by name in one line."""

import json

import adapters
import pytest
import torch
from safetensors.torch import save_file

from spo import backbones, config
from spo.adapters import load as load_adapted

Q = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
KEY = "lora_unet_" + Q.replace(".", "_")


@pytest.fixture(scope="module")
def backbone(checkpoints):
    """One backbone for all tests: no refused file may change it."""
    return backbones.load(config.Backbone(family="sd", checkpoint=str(checkpoints["sd"])), "cpu")


@pytest.fixture
def good(backbone) -> dict[str, torch.Tensor]:
    return adapters.kohya("lora_unet_", adapters.changes(backbone.unet, [Q]))


def refused(backbone, path, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        adapters.load_lora(backbone, path)
    assert str(path.name) in str(error.value) and "\n" not in str(error.value)
    assert not getattr(backbone.unet, "peft_config", None)


OTHER_KINDS = {
    "hada_w1_a": "LoHa",
    "lokr_w1": "LoKr",
    "oft_blocks": "OFT",
    "oft_diag": "OFT",
    "a1.weight": "GLoRA",
    "b2.weight": "GLoRA",
    "diff": "a full weight difference",
    "diff_b": "a full weight difference",
    "w_norm": "a norm's difference",
    "bias": "a bias",
    "bias_values": "a bias",
    "on_input": r"\(IA\)3",
    "scalar": "LyCORIS' scalar",
    "something_new": "not part of a LoRA",
}


@pytest.mark.parametrize("part, kind", OTHER_KINDS.items())
def test_other_adapters_are_refused_by_name(backbone, good, tmp_path, part, kind) -> None:
    state = {**good, f"{KEY}.{part}": torch.ones(4, 4)}
    message = rf"lora.safetensors: {KEY}.{part} is {kind}; only LoRA, LoCon and DoRA"
    refused(backbone, adapters.write(tmp_path / "lora.safetensors", state), message)


@pytest.mark.parametrize("part", ["hada_w1_a", "lokr_w1", "oft_blocks", "a1.weight", "diff"])
def test_a_file_of_another_adapter_alone_is_refused_by_name(backbone, tmp_path, part) -> None:
    state = {f"{KEY}.{part}": torch.ones(4, 4), f"{KEY}.alpha": torch.tensor(1.0)}
    refused(backbone, adapters.write(tmp_path / "lora.safetensors", state), f"{part} is .*; only LoRA")


def changed(state, part, value):
    return {**state, f"{KEY}.{part}": value}


SPOILT = {
    "no up": (lambda s: {k: v for k, v in s.items() if "lora_up" not in k}, "has no up matrix beside it"),
    "no down": (
        lambda s: {k: v for k, v in s.items() if "lora_down" not in k},
        "has no down matrix beside it",
    ),
    "alpha 0": (lambda s: changed(s, "alpha", torch.tensor(0.0)), "alpha is 0; alpha must be one number"),
    "alphas": (lambda s: changed(s, "alpha", torch.ones(2)), r"alpha is of shape \[2\]"),
    "NaN": (lambda s: changed(s, "lora_up.weight", s[f"{KEY}.lora_up.weight"] * torch.nan), "has NaN"),
    "alpha NaN": (lambda s: changed(s, "alpha", torch.tensor(torch.nan)), "has NaN"),
    "int8": (lambda s: changed(s, "lora_up.weight", s[f"{KEY}.lora_up.weight"].to(torch.int8)), "is int8"),
    "ranks": (
        lambda s: changed(s, "lora_up.weight", torch.ones(64, 3)),
        r"does not fit the unet: .* is \[64, 3\]",
    ),
    "all zero": (lambda s: {k: v if "alpha" in k else v * 0 for k, v in s.items()}, "changes no layer"),
    "norm per input": (
        lambda s: changed(s, "dora_scale", torch.ones(1, 64)),
        "a norm for each of 64 outputs",
    ),
    "twice": (
        lambda s: {**s, f"unet.{Q}.lora_A.weight": s[f"{KEY}.lora_down.weight"]},
        "are for the same layer",
    ),
    "unknown layer": (
        lambda s: {**s, "lora_unet_nowhere.alpha": torch.tensor(1.0)},
        "no layer for lora_unet_nowhere",
    ),
    "second text encoder": (
        lambda s: {**s, "lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha": torch.tensor(1.0)},
        "is for text_encoder_2, which this backbone lacks",
    ),
}


@pytest.mark.parametrize("spoil, message", SPOILT.values(), ids=SPOILT)
def test_an_incomplete_or_misfitting_file_is_refused(backbone, good, tmp_path, spoil, message) -> None:
    refused(backbone, adapters.write(tmp_path / "lora.safetensors", spoil(good)), message)


def test_dora_on_some_layers_only_is_refused(backbone, tmp_path) -> None:
    other = Q.replace("to_q", "to_k")
    state = adapters.kohya("lora_unet_", adapters.changes(backbone.unet, [Q, other]))
    state[f"{KEY}.dora_scale"] = torch.ones(64, 1)
    refused(backbone, adapters.write(tmp_path / "dora.safetensors", state), "to_k.* has no DoRA magnitude")


ANNOUNCED = {
    "ss_base_model_version": ("sdxl_base_v1-0", "backbone.family is 'sd'"),
    "modelspec.architecture": ("stable-diffusion-xl-v1-base/lora", "backbone.family is 'sd'"),
    "ss_v_parameterization": ("True", "the backbone predicts epsilon"),
    "modelspec.prediction_type": ("v", "the backbone predicts epsilon"),
    "ss_network_alpha": ("0.5", "rank 1 and no alpha tensor"),
}


@pytest.mark.parametrize("key", ANNOUNCED)
def test_what_the_header_announces_must_be_the_backbones(checkpoints, good, tmp_path, key) -> None:
    value, message = ANNOUNCED[key]
    state = {k: v for k, v in good.items() if "alpha" not in k}
    file = adapters.write(tmp_path / "lora.safetensors", state, **{key: value})
    settings = config.Backbone(family="sd", checkpoint=str(checkpoints["sd"]))
    with pytest.raises(ValueError, match=f"lora.safetensors: {key} is .*{message}"):
        load_adapted(settings, file, "cpu")


@pytest.mark.parametrize(
    "family, announced",
    [
        *(("sd", version) for version in ("sd_v1", "sd_v2_v", "sd1.5", "SD15", "stable-diffusion-v1/lora")),
        *(("sdxl", version) for version in ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora")),
        *(("sd", version) for version in ("", "my own base")),
    ],
)
def test_the_backbones_own_family_may_be_announced(tmp_path, family, announced) -> None:
    from spo.adapters import files
    from spo.data import weights

    other = {"sd": "sdxl", "sdxl": "sd"}[family]
    for key in ("ss_base_model_version", "modelspec.architecture"):
        file = adapters.write(tmp_path / "lora.safetensors", {"a": torch.ones(1)}, **{key: announced})
        files.check_header(weights.read(file), family, "epsilon")
        if announced in ("", "my own base"):
            continue
        with pytest.raises(ValueError, match=f"backbone.family is '{other}'"):
            files.check_header(weights.read(file), other, "epsilon")


@pytest.mark.parametrize(
    "announced", ["flux-1-dev/lora", "stable-diffusion-3-medium", "sd_v3", "stable-cascade"]
)
def test_other_architectures_are_refused_for_both_families(tmp_path, announced) -> None:
    from spo.adapters import files
    from spo.data import weights

    file = adapters.write(tmp_path / "l.safetensors", {"a": torch.ones(1)}, ss_base_model_version=announced)
    for family in ("sd", "sdxl"):
        with pytest.raises(ValueError, match=f"ss_base_model_version is '{announced}'"):
            files.check_header(weights.read(file), family, "epsilon")


PEFT = {
    "peft_type": ("LOHA", "peft_type is 'LOHA'; only LORA"),
    "bias": ("all", "bias is 'all'"),
    "init_lora_weights": ("pissa_niter_4", "changes the base's weights too"),
    "modules_to_save": (["conv_in"], "modules_to_save is .*not supported"),
    "use_qalora": (True, "use_qalora is True, which is not supported"),
    "lora_alpha": (None, "lora_alpha is None"),
    "r": (7, "r is 7, but .* has rank 1"),
    "use_dora": (True, "has no DoRA magnitude"),
    "alpha_pattern": ({"to_q": "8"}, "alpha_pattern is {'to_q': '8'}; it must map .* to numbers"),
    "rank_pattern": ({"(": 8}, r"rank_pattern is {'\(': 8}; it must map valid patterns"),
}


@pytest.mark.parametrize("key", PEFT)
def test_unsupported_settings_of_peft_are_refused(backbone, tmp_path, key) -> None:
    value, message = PEFT[key]
    adapter = adapters.changes(backbone.unet, [Q])
    state = {f"base_model.model.{Q}.lora_A.weight": adapter[Q].down}
    state |= {f"base_model.model.{Q}.lora_B.weight": adapter[Q].up}
    file = adapters.write(tmp_path / "adapter_model.safetensors", state)
    path = tmp_path / "adapter_config.json"
    with pytest.raises(ValueError, match="put that file beside this one"):
        adapters.load_lora(backbone, file)
    path.write_text(json.dumps(adapters.settings(adapter, **{key: value})))
    with pytest.raises(ValueError, match=f"adapter_(config.json|model.safetensors): .*{message}"):
        adapters.load_lora(backbone, file)
    path.write_text("{")
    with pytest.raises(ValueError, match="adapter_config.json: not valid JSON"):
        adapters.load_lora(backbone, file)


def test_two_announced_strengths_that_differ_are_refused(backbone, good, tmp_path) -> None:
    adapter = adapters.changes(backbone.unet, [Q])
    metadata = adapters.diffusers_metadata(adapter, lora_alpha=adapter[Q].alpha * 2)
    file = adapters.write(tmp_path / "lora.safetensors", good, **metadata)
    refused(backbone, file, "gives .* the strength .* its alpha tensor")


def test_pickles_that_run_code_are_refused(backbone, tmp_path) -> None:
    for name, content in {"code.bin": {"a": print}, "list.pt": [1], "step.pt": {"step": 3}}.items():
        torch.save(content, tmp_path / name)
        refused(
            backbone,
            tmp_path / name,
            "cannot be read as weights .not tensors alone.; save it as .safetensors|"
            "must be tensors by name, not a list|step is a int, not a tensor",
        )
    (tmp_path / "lora.ckpt").write_bytes(b"")
    refused(backbone, tmp_path / "lora.ckpt", "not a supported file .*.safetensors, .bin, .pt, .pth")


def test_several_files_in_a_folder_are_refused(backbone, good, tmp_path) -> None:
    (tmp_path / "none").mkdir()
    refused(backbone, tmp_path / "none", "no LoRA weights, no UNet")
    for name in ("epoch1", "epoch2"):
        adapters.write(tmp_path / "some" / f"{name}.safetensors", good)
    refused(backbone, tmp_path / "some", r"several weights files \(epoch1.safetensors, epoch2.safetensors\)")
    for name in ("pytorch_lora_weights", "adapter_model"):
        adapters.write(tmp_path / "both" / f"{name}.safetensors", good)
    refused(backbone, tmp_path / "both", "several weights files")
    adapters.write(tmp_path / "peft/unet/adapter_model.safetensors", good)
    adapters.write(tmp_path / "peft/text_encoder/adapter_model.safetensors", good)
    refused(backbone, tmp_path / "peft", "weights lie in .*text_encoder, .*unet: give one")
    save_file({"x.weight": torch.ones(1)}, tmp_path / "other.safetensors")
    refused(backbone, tmp_path / "other.safetensors", r"neither a LoRA nor .* \(its first key is x.weight\)")
