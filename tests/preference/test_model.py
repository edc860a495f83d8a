import copy
import json
from types import SimpleNamespace

import pytest
import torch

from spo.preference.model import ClipRewardModel, StepAwarePreferenceModel, token_ids

IMAGES = torch.linspace(-1.2, 1.2, 4 * 3 * 16 * 16).view(4, 3, 16, 16)
PROMPTS = ["a dark square", "a bright square", "dark", "a square"]


def test_it_starts_as_the_clip_it_was_made_of(clip, tokenizer) -> None:
    plain = copy.deepcopy(clip)
    model = StepAwarePreferenceModel(clip)
    ids = token_ids(tokenizer, PROMPTS, model)
    pixels = (IMAGES / 2 + 0.5).clamp(0, 1)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)
    with torch.no_grad():
        expected = plain(input_ids=ids, pixel_values=(pixels - mean) / std).logits_per_image.diagonal()
        for t in (0, 500, 999):
            scores = model.score(IMAGES, ids, torch.full((4,), t))
            torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-5)


def test_the_step_matters_once_modulation_has_moved(clip, tokenizer) -> None:
    model = StepAwarePreferenceModel(clip)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adaLN" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        ids = token_ids(tokenizer, PROMPTS, model)
        early, late = (model.score(IMAGES, ids, torch.full((4,), t)) for t in (0, 900))
        both = model.score(IMAGES.repeat(2, 1, 1, 1), ids.repeat(2, 1), torch.tensor([0] * 4 + [900] * 4))
    assert (early - late).abs().min() > 1e-4
    torch.testing.assert_close(both, torch.cat([early, late]), atol=1e-4, rtol=1e-5)


def test_without_the_step_condition_the_step_is_ignored(clip, tokenizer, tmp_path) -> None:
    model = StepAwarePreferenceModel(clip, step_condition=False)
    assert not any("adaLN" in k or "t_embedder" in k for k in model.state_dict())
    model.save_pretrained(tmp_path)
    again = StepAwarePreferenceModel.from_pretrained(tmp_path)
    ids = token_ids(tokenizer, PROMPTS, model)
    with torch.no_grad():
        first, second = (model.score(IMAGES, ids, torch.full((4,), t)) for t in (0, 900))
        assert torch.equal(first, second)
        assert torch.equal(again.score(IMAGES, ids, torch.zeros(4, dtype=torch.int64)), first)


def test_a_reward_model_scores_as_its_model_does(clip, tokenizer) -> None:
    model = StepAwarePreferenceModel(clip)
    rewards, timesteps = ClipRewardModel(model, tokenizer), torch.tensor([1, 2, 3, 4])
    scores = rewards.score(SimpleNamespace(images=IMAGES, timesteps=timesteps), rewards.encode_text(PROMPTS))
    with torch.no_grad():
        expected = model.score(IMAGES, token_ids(tokenizer, PROMPTS, model), timesteps)
    torch.testing.assert_close(scores, expected)
    assert not scores.requires_grad


def test_broken_folders_are_refused_in_one_line(clip, tmp_path) -> None:
    with pytest.raises(ValueError, match="no preference model there"):
        StepAwarePreferenceModel.from_pretrained(tmp_path)
    model = StepAwarePreferenceModel(clip)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="model.safetensors lacks weights: .*layers.2"):
        StepAwarePreferenceModel.from_pretrained(tmp_path)


def test_an_official_file_that_is_none_is_refused(clip, tmp_path) -> None:
    path = tmp_path / "spm.bin"
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="spm.bin: cannot be read as weights"):
        StepAwarePreferenceModel.from_official_checkpoint(path, clip.config)
    torch.save({"model.logit_scale": torch.zeros(())}, path)
    with pytest.raises(ValueError, match="spm.bin lacks weights: .*not a checkpoint of this model"):
        StepAwarePreferenceModel.from_official_checkpoint(path, clip.config)


def test_from_clip_reads_a_folder_and_names_one_that_is_not_there(clip, tmp_path) -> None:
    clip.save_pretrained(tmp_path)
    model = StepAwarePreferenceModel.from_clip(str(tmp_path))
    for name, value in clip.state_dict().items():
        assert torch.equal(model.model.state_dict()[name], value)
    with pytest.raises(ValueError, match="preference.init"):
        StepAwarePreferenceModel.from_clip(str(tmp_path / "nowhere"))


def test_timesteps_of_a_flow_are_embedded_as_they_are(clip) -> None:
    """Between whole numbers, and at whole ones as those of DDPM."""
    embed = StepAwarePreferenceModel(clip).model.t_embedder
    with torch.no_grad():
        whole, same, between = (embed(torch.tensor([t])) for t in (750, 750.0, 750.5))
    assert torch.equal(whole, same) and not torch.allclose(whole, between)
