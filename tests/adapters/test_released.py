"""Released models on the base: UNets and complete pipelines, through `spo generate` and params.yaml."""

import json
import shutil

import adapters
import pytest
import single_file
import torch
import yaml
from rounding import assert_same
from safetensors.torch import load_file, save_file

from spo import backbones, cli, config
from spo.adapters import files, unet
from spo.adapters import load as load_adapted
from spo.data.images import load_images

pytestmark = pytest.mark.smoke

FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(params=["sd", "sdxl"])
def family(request) -> str:
    return request.param


def predict(backbone) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(1, *backbone.latent_shape, generator=generator)
    with torch.no_grad():
        return backbone.predict(x_t, torch.tensor([801]), backbone.encode_prompts(["a red circle"]))


@pytest.fixture
def aligned(checkpoints, family):
    def aligned(path):
        settings = config.Backbone(family=family, checkpoint=str(checkpoints[family]))
        return load_adapted(settings, path, "cpu")

    return aligned


@pytest.fixture
def tuned(checkpoints, family, tmp_path):
    """A fine-tuned UNet: its folder, and what its predictions are."""
    folder = shutil.copytree(checkpoints[family] / "unet", tmp_path / "release" / "unet")
    generator = torch.Generator().manual_seed(5)
    state = load_file(folder / FILE)
    noise = {k: 1 + 0.3 * torch.randn(v.shape, generator=generator) for k, v in state.items()}
    save_file({key: value * noise[key] for key, value in state.items()}, folder / FILE)
    pipeline = shutil.copytree(checkpoints[family], tmp_path / "pipeline")
    shutil.copytree(folder, pipeline / "unet", dirs_exist_ok=True)
    expected = predict(backbones.load(config.Backbone(family=family, checkpoint=str(pipeline)), "cpu"))
    return folder, pipeline, expected


def test_a_unet_is_loaded_from_every_release_format(aligned, tuned, family, tmp_path, capsys) -> None:
    folder, pipeline, expected = tuned
    file = shutil.copy(folder / FILE, tmp_path / "my unet.safetensors")
    half = shutil.copytree(folder, tmp_path / "half")
    (half / FILE).rename(half / "diffusion_pytorch_model.fp16.safetensors")
    pickled = shutil.copytree(folder, tmp_path / "pickled")
    torch.save(load_file(pickled / FILE), pickled / "diffusion_pytorch_model.bin")
    (pickled / FILE).unlink()
    single = tmp_path / "pipeline.safetensors"
    single_file.write(pipeline, single, layers=1, vae_blocks=2)
    alone = {k: v for k, v in load_file(single).items() if k.startswith("model.diffusion_model.")}
    save_file(alone, tmp_path / "original names.safetensors")
    ways = [folder, folder.parent, folder / FILE, tmp_path / "my unet.safetensors", half, pickled]
    for path in [*ways, tmp_path / "original names.safetensors"]:
        backbone = aligned(path)
        assert_same(predict(backbone), expected, backbone.unet)
        assert backbone.trainable_parameters() == []
        assert "UNet, " in capsys.readouterr().err
    for path in (pipeline, single):
        backbone = aligned(path)
        assert_same(predict(backbone), expected, backbone.unet)
    assert (predict(aligned(None)) - expected).abs().max() > 0.01
    assert file.exists()


def test_shards_are_one_unet(aligned, tuned) -> None:
    folder, _, expected = tuned
    state = load_file(folder / FILE)
    names = [f"diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    parts = [dict(list(state.items())[n::2]) for n in (0, 1)]
    for name, part in zip(names, parts, strict=True):
        save_file(part, folder / name)
    index = {"weight_map": {k: n for n, part in zip(names, parts, strict=True) for k in part}}
    (folder / f"{FILE}.index.json").write_text(json.dumps(index))
    (folder / FILE).unlink()
    backbone = aligned(folder)
    assert_same(predict(backbone), expected, backbone.unet)


def refused(attempt, path, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        attempt(path)
    assert "\n" not in str(error.value)


def test_a_unet_of_another_architecture_is_refused(load, family, tuned, tmp_path) -> None:
    (folder, *_), base = tuned, load(family).unet

    def aligned(path) -> None:
        unet.load(base, files.find(path).weights)

    settings = json.loads((folder / "config.json").read_text())
    for key, value in (("sample_size", 96), ("cross_attention_dim", 2048), ("time_cond_proj_dim", 256)):
        (folder / "config.json").write_text(json.dumps({**settings, key: value}))
        refused(aligned, folder, f"config.json: {key} is {value}, but the backbone's UNet has")
    (folder / "config.json").write_text(json.dumps({**settings, "_class_name": "SD3Transformer2DModel"}))
    refused(aligned, folder, "config.json: _class_name is SD3Transformer2DModel")
    same = {**settings, "mid_block_type": "UNetMidBlock2DCrossAttn", "upcast_attention": None, "dropout": 0.0}
    same.pop("act_fn")
    (folder / "config.json").write_text(json.dumps(same))
    aligned(folder)

    good = load_file(folder / FILE)
    weight = good["conv_in.weight"]
    spoilt = {
        "unet.safetensors: not the backbone's UNet: Missing key.*conv_in.bias": {
            k: v for k, v in good.items() if k != "conv_in.bias"
        },
        'Unexpected key.*conv_new.bias", "conv_new.weight': {
            **good,
            "conv_new.bias": weight,
            "conv_new.weight": weight,
        },
        r"conv_in.weight: .*\[32, 9, 3, 3\].*current model is .*\[32, 4, 3, 3\]": {
            **good,
            "conv_in.weight": torch.ones(32, 9, 3, 3),
        },
        "conv_in.weight has NaN": {**good, "conv_in.weight": weight * torch.nan},
    }
    for message, state in spoilt.items():
        refused(aligned, adapters.write(tmp_path / "bad" / "unet.safetensors", state), message)


def test_files_beside_a_unet_are_not_ignored(aligned, tuned, checkpoints, family) -> None:
    folder, *_ = tuned
    shutil.copytree(checkpoints[family] / "text_encoder", folder.parent / "text_encoder")
    refused(aligned, folder.parent, "contains text_encoder beside the UNet, but no model_index.json")
    adapters.write(folder / "pytorch_lora_weights.safetensors", {"a": torch.ones(1)})
    refused(aligned, folder, "contains pytorch_lora_weights.safetensors beside the UNet")
    (folder / "pytorch_lora_weights.safetensors").unlink()
    (folder / FILE).rename(folder / "diffusion_pytorch_model.non_ema.safetensors")
    shutil.copy(
        folder / "diffusion_pytorch_model.non_ema.safetensors",
        folder / "diffusion_pytorch_model.v2.safetensors",
    )
    refused(aligned, folder, "must contain one weights file, not .*non_ema.*v2.safetensors")


def test_spo_generate_draws_with_it(tuned, checkpoints, family, tmp_path, monkeypatch, capsys) -> None:
    folder, pipeline, _ = tuned
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a red circle\na blue star\n")
    params = yaml.safe_load(config.preset("smoke"))
    params["backbone"] = {"family": family, "checkpoint": str(checkpoints[family])}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    backbone = backbones.load(config.Backbone(**params["backbone"]), "cpu")
    adapter = adapters.changes(backbone.unet, adapters.layers(backbone.unet, "to_q", "to_v"))
    lora = adapters.write(tmp_path / "style.v2.safetensors", adapters.kohya("lora_unet_", adapter))

    drawn = {}
    for option, path, name in (
        ("--unet", folder, "release"),
        ("--checkpoint", pipeline, "pipeline"),
        ("--lora", lora, "style.v2"),
    ):
        assert cli.main(["generate", option, str(path), "--prompts", "prompts.txt"]) == 0
        out, err = capsys.readouterr()
        assert out.strip() == f"outputs/judged/{name}"
        drawn[name] = [image.tobytes() for image, *_ in load_images(tmp_path / out.strip())]
        if option == "--lora":
            assert f"spo: {lora}: LoRA, changes {len(adapter)} layers of the unet" in err
    assert drawn["release"] == drawn["pipeline"] != drawn["style.v2"]
    assert cli.main(["generate", "--lora", str(tmp_path / "prompts.txt"), "--prompts", "prompts.txt"]) == 2
    assert "prompts.txt: not a supported file (.safetensors" in capsys.readouterr().err.splitlines()[-1]
