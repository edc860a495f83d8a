"""Poisoned and overflowing checkpoints: the stage says which part, and writes nothing."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from spo import cli, config
from spo.backbones.tensors import check_finite
from spo.data.latents import encode
from spo.diffusion.finite import FiniteCheck
from spo.diffusion.schedule import Schedule
from spo.methods.diffusion_dpo import DiffusionDpoMethod
from spo.methods.spo import SpoMethod
from spo.preference import trainer as spm
from spo.preference.model import ClipRewardModel
from spo.preference.step_aware import StepAwareTask, images_of
from spo.preference.trainer import NoisedPairs
from spo.training import loop
from spo.training.alignment import Alignment
from spo.types import PreferencePair

pytestmark = pytest.mark.smoke

PROMPTS = ["a circle", "a blue star on sand"]
UNET = ("unet", "conv_out.bias")
DECODER = ("vae", "decoder.conv_out.bias")
LORA = {"rank": 2, "alpha": 2}
NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def loaded_unseen(monkeypatch) -> None:
    """Weights are refused when they are loaded; here they stand for what goes wrong later."""
    monkeypatch.setattr("spo.backbones.loading.check_finite", lambda module, where: None)


def file_of(folder: Path, part: str) -> Path:
    name = "model" if "text" in part else "diffusion_pytorch_model"
    return folder / part / f"{name}.safetensors"


def poisoned(checkpoints, tmp_path, part: str, key: str, value: float) -> Path:
    """A copy of a tiny checkpoint with one weight that is `value`."""
    folder = tmp_path / "poisoned"
    shutil.copytree(checkpoints["sd"], folder)
    file = file_of(folder, part)
    state = load_file(file)
    state[key].view(-1)[0] = value
    save_file(state, file, metadata={"format": "pt"})
    return folder


def poisoned_word(checkpoints, tmp_path, words) -> Path:
    """A copy whose text encoder gives NaN for prompts with the word star."""
    folder = tmp_path / "poisoned"
    shutil.copytree(checkpoints["sd"], folder)
    file = file_of(folder, "text_encoder")
    state = load_file(file)
    (name,) = (name for name in state if name.endswith("token_embedding.weight"))
    state[name][words(["star"]).input_ids[0][1]] = NAN
    save_file(state, file, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """One working folder for all: to make a store of runs takes more seconds than a stage."""
    return tmp_path_factory.mktemp("workspace")


@pytest.fixture
def experiment(workspace, monkeypatch):
    """Writes params.yaml for a checkpoint, and the test prompts."""
    monkeypatch.chdir(workspace)
    Path("outputs/prompts").mkdir(parents=True, exist_ok=True)
    Path("outputs/prompts/test.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")

    def write(checkpoint: Path, **changes) -> None:
        params = yaml.safe_load(config.preset("smoke"))
        params["backbone"] = {"family": "sd", "checkpoint": str(checkpoint)} | changes
        params["prompts"]["vocabulary"] = None
        params["generate"] |= {"num_inference_steps": 3, "batch_size": 1}
        Path("params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")

    return write


def refusal(capsys, *command: str) -> str:
    """The line in which a command refuses, having written no image."""
    assert cli.main(command) == 2
    line = [text for text in capsys.readouterr().err.splitlines() if text.startswith("spo: ")]
    assert len(line) == 1
    assert not [p for p in Path().rglob("*") if p.suffix in (".png", ".zip") and not p.name.startswith(".")]
    return line[0]


@pytest.mark.parametrize(
    ("weight", "value", "named"),
    [(UNET, NAN, "UNet output at step 1 of 3 (t="), (DECODER, INF, "VAE decoder output, prompt ")],
)
def test_generate_stops_at_a_poisoned_part(
    checkpoints, tmp_path, experiment, capsys, weight, value, named
) -> None:
    experiment(poisoned(checkpoints, tmp_path, *weight, value))
    line = refusal(capsys, "generate", "base")
    assert named in line and "prompt 'a circle'" in line and "weights" in line


def test_generate_names_the_prompt_of_a_poisoned_word(
    checkpoints, tmp_path, experiment, words, capsys
) -> None:
    experiment(poisoned_word(checkpoints, tmp_path, words))
    line = refusal(capsys, "generate", "base")
    assert "text encoder output, prompt 'a blue star on sand'" in line
    line = refusal(capsys, "sample", "a star", "--method", "base")
    assert "text encoder output, prompt 'a star'" in line
    assert cli.main(["sample", "a circle", "--method", "base"]) == 0
    Path("sample.png").unlink()


def test_generate_stops_at_a_poisoned_lora(load, checkpoints, tmp_path, experiment, capsys) -> None:
    backbone = load("sd")
    backbone.add_lora(config.Lora(**LORA), 0)
    backbone.trainable_parameters()[0].data[0, 0] = NAN
    backbone.save_lora(tmp_path / "lora")
    experiment(checkpoints["sd"])
    line = refusal(capsys, "generate", "--lora", str(tmp_path / "lora"), "--output", "elsewhere")
    assert "lora/pytorch_lora_weights.safetensors" in line and "has NaN or infinite values" in line


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_overflow_in_half_precision_says_so(checkpoints, tmp_path, experiment, capsys, part) -> None:
    """All weights are finite in fp16; what the last layer computes from them is beyond 65504."""
    weight = {"unet": "conv_out.weight", "vae": "decoder.conv_out.weight"}[part]
    folder = poisoned(checkpoints, tmp_path, part, weight, 0.0)
    file = file_of(folder, part)
    state = load_file(file)
    state[weight] = 60_000 * torch.sign(state[weight] + 1e-9)
    save_file(state, file, metadata={"format": "pt"})
    experiment(folder, dtype="fp16")
    line = refusal(capsys, "generate", "base")
    assert "if backbone.dtype is fp16, set bf16 or fp32" in line
    assert ("backbone.vae" in line) == (part == "vae")


def test_validation_images_are_refused(checkpoints, tmp_path, load) -> None:
    from spo.validation import images

    backbone = load("sd", checkpoint=str(poisoned(checkpoints, tmp_path, *DECODER, NAN)))
    params = config.validate(yaml.safe_load(config.preset("smoke")))
    Path(tmp_path / "outputs/prompts").mkdir(parents=True)
    (tmp_path / images.PROMPTS).write_text("a circle\na star\n")
    settings = config.Validation(every=1, prompts=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        with pytest.raises(ValueError, match="VAE decoder output, prompt 'a circle'"):
            images.generate(backbone, params, settings, 2.0)


def spo_method(backbone, model, words) -> SpoMethod:
    settings = config.Spo(
        lora=LORA, optimizer={"learning_rate": 1e-3}, iterations=1, prompts_per_iteration=2, batch_size=4,
        candidates=2, num_inference_steps=4, guidance=2.0, divert_start_step=2, threshold=0.0,
    )  # fmt: skip
    schedule = Schedule.from_config(backbone.scheduler_config, 4)
    return SpoMethod(settings, schedule, ClipRewardModel(model, words), PROMPTS, seed=0)


@pytest.mark.parametrize("value", [NAN, INF])
def test_rollouts_stop_at_a_poisoned_part(load, model, words, value) -> None:
    """Infinite pixels would be clamped before the preference model scores them."""
    backbone = load("sd")
    backbone.vae.decoder.conv_out.bias.data[0] = value
    with pytest.raises(ValueError, match=r"VAE decoder output at step 4 of 4 \(t=\d+\), prompt 'a "):
        spo_method(backbone, model, words).collect(backbone, 0)
    backbone = load("sd")
    backbone.unet.conv_out.bias.data[0] = value
    with pytest.raises(ValueError, match=r"UNet output at step 1 of 4 \(t=\d+\), prompt 'a "):
        spo_method(backbone, model, words).collect(backbone, 0)


@pytest.mark.parametrize("value", [NAN, INF])
def test_training_stops_where_the_reference_is_not_finite(load, pairs, value) -> None:
    """An infinite error of the reference on the winner would be a loss of 0."""
    backbone = load("sd")
    backbone.add_lora(config.Lora(**LORA), 0)
    plain = backbone.predict

    def predict(*inputs, reference=False, copies=1):
        output = plain(*inputs, reference=reference)
        return (
            torch.where(torch.arange(len(output)).view(-1, 1, 1, 1) == 0, value, output)
            if reference
            else output
        )

    backbone.predict = predict
    settings = config.DiffusionDpo(lora=LORA, optimizer={"learning_rate": 1e-3}, iterations=1, batch_size=2)
    method = DiffusionDpoMethod(settings, Schedule.from_config(backbone.scheduler_config, 4), pairs, seed=0)
    before = [p.detach().clone() for p in backbone.trainable_parameters()]
    with pytest.raises(FloatingPointError, match=r"update 1: .* reference UNet output at t=\d+, prompt 'a "):
        loop.fit(
            Alignment("align.x", backbone, method), settings.optimizer, checkpoints=None, checkpoint_every=1,
            on_metrics=lambda metrics, step: None,
        )  # fmt: skip
    assert all(map(torch.equal, backbone.trainable_parameters(), before))


def test_preference_training_and_its_evaluation_stop(load, model, words, pairs) -> None:
    """Accuracy is a count of comparisons, of which NaN loses every one."""
    backbone = load("sd")
    schedule = Schedule.from_config(backbone.scheduler_config, 4)
    optimizer = {"learning_rate": 1e-3}
    settings = config.Preference(init="x", optimizer=optimizer, steps=1, batch_size=4, guidance=1.0)
    setup = StepAwareTask(model, words, backbone, schedule, settings.model_copy(update={"guidance": 2.0}))
    evaluate = (setup, pairs, [0, 500])
    assert spm.evaluate(*evaluate, seed=0)[500]["n"] == 9
    backbone.vae.decoder.conv_out.bias.data[0] = INF
    with pytest.raises(ValueError, match="VAE decoder output at t=0, prompt 'a circle'"):
        spm.evaluate(*evaluate, seed=0)
    check = FiniteCheck()
    clean = NoisedPairs(pairs.read(torch.tensor([0, 1])), pairs.captions[:2], torch.zeros(2).long(), None)
    images_of(backbone, schedule, clean, 1.0, check)
    with pytest.raises(ValueError, match="VAE decoder output at t=0, prompt 'a circle'"):
        check.check()
    with pytest.raises(
        FloatingPointError, match=r"VAE decoder output at t=\d+, prompt 'a .*nothing was updated"
    ):
        spm.train(replace(setup, settings=settings), pairs, seed=0)
    backbone.vae.decoder.conv_out.bias.data[0] = 0
    model.model.visual_projection.weight.data[0] = NAN
    with pytest.raises(ValueError, match="preference model's score at t=0, prompt 'a circle'"):
        spm.evaluate(*evaluate, seed=0)


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (NAN, "NaN or infinity in the VAE encoder output"),
        (INF, "VAE encoder"),
        (1e6, "beyond float16.s 65504"),
    ],
)
def test_latents_beyond_float16_are_refused(load, tmp_path, value, named) -> None:
    backbone = load("sd")
    backbone.vae.quant_conv.bias.data[0] = value
    labelled = [PreferencePair("a star", b"0", b"1", 1.0, 0.0)]
    with pytest.raises(ValueError, match=f"{named}.*, prompt 'a star'"):
        encode([labelled], 1, backbone, lambda data: torch.zeros(3, 16, 16), tmp_path / "latents")
    assert not (tmp_path / "latents/pairs.json").exists()


def test_weights_that_are_not_finite_are_named(load) -> None:
    backbone = load("sd")
    check_finite(backbone.unet, "base")
    backbone.unet.conv_out.bias.data[1] = NAN
    with pytest.raises(ValueError, match="base: NaN or infinity in weight conv_out.bias"):
        check_finite(backbone.unet, "base")


@pytest.mark.smoke
@pytest.mark.nightly
def test_a_process_that_meets_it_ends_all_with_one_line(
    checkpoints, tmp_path, experiment, words, capfd
) -> None:
    """Both processes refuse the weights, and the launcher says it once."""
    experiment(poisoned_word(checkpoints, tmp_path, words))
    params = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8")) | {"processes": 2}
    Path("params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    assert cli.main(["generate", "base"]) == 2
    error = capfd.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("spo: ")]
    assert len(lines) == 1 and "text_encoder: NaN or infinity in weight" in lines[0]
    assert "Traceback" not in error and not Path("outputs/images/base/images.zip").exists()
