"""Single-file checkpoints (.safetensors), with the tensor names of the original releases."""

import pytest
import single_file
import torch
import yaml
from rounding import assert_same

from spo import backbones, config
from spo.commands.dry_run import lines
from spo.stages import prompts

pytestmark = pytest.mark.smoke


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def one(request, checkpoints, tmp_path_factory) -> config.Backbone:
    family = request.param
    file = tmp_path_factory.mktemp("single") / "model.safetensors"
    single_file.write(checkpoints[family], file, layers=1, vae_blocks=2)
    return config.Backbone(family=family, checkpoint=str(file), config=str(checkpoints[family]))


def test_it_is_the_model_of_the_folder(one, load) -> None:
    ours, theirs = backbones.load(one, "cpu"), load(one.family)
    embeddings = [b.encode_prompts(["a large red circle on sand"]) for b in (ours, theirs)]
    x_t, t = torch.randn(1, *theirs.latent_shape), torch.tensor([501])
    for part in (n for n, m in theirs.pipeline.components.items() if isinstance(m, torch.nn.Module)):
        weights = [getattr(b.pipeline, part).state_dict() for b in (ours, theirs)]
        assert weights[0].keys() == weights[1].keys()
        assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items()), part
    outputs = [b.predict(x_t, t, e) for b, e in zip((ours, theirs), embeddings, strict=True)]
    assert_same(*outputs, ours.unet)
    assert_same(ours.decode(x_t), theirs.decode(x_t), ours.vae)
    assert ours.scheduler_config["beta_schedule"] == theirs.scheduler_config["beta_schedule"]


def test_prompts_and_the_dry_run_read_its_description(one, checkpoints) -> None:
    params = config.validate({**yaml.safe_load(config.preset("smoke")), "backbone": one.model_dump()})
    assert prompts._token_counter(params)("a red ring") == 5  # start, three words, end
    found = backbones.describe(one)
    folder = one.model_copy(update={"checkpoint": str(checkpoints[one.family]), "config": None})
    same = backbones.describe(folder)
    assert (found.denoiser, found.vae) == (same.denoiser, same.vae)
    assert found.scheduler_config == same.scheduler_config
    plans = [lines(params.model_copy(update={"backbone": b}), "generate", "base") for b in (one, folder)]
    (ours,), (theirs,) = ([line for line in plan if line.startswith("UNet ")] for plan in plans)
    assert ours == theirs


def test_without_a_network_it_says_what_is_missing(one) -> None:
    alone = one.model_copy(update={"config": None})
    with pytest.raises(ValueError, match="backbone.config: .*cannot be loaded .*local copy"):
        backbones.load(alone, "cpu")
