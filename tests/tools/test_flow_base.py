"""The tool that trains the flow-matching base of scenes, with few scenes and steps."""

import shutil
from pathlib import Path

import pytest
import torch

from spo import backbones, config
from tools.scenes import flow_base

BASE = Path(__file__).parents[2] / "data/base"


@pytest.mark.smoke
@pytest.mark.skipif(not (BASE / "vae").exists(), reason="data/ is not here: dvc pull data.dvc")
def test_the_flow_base_is_a_pipeline_with_the_vae_of_the_first_and_no_t5(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(flow_base, "BATCH", 4)
    shutil.copytree(BASE, tmp_path / "base")
    (tmp_path / "work").mkdir()
    flow_base.build(tmp_path, tmp_path / "work", seed=0, steps=2, scenes=8)
    weights = "vae/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "base_flow" / weights).read_bytes() == (BASE / weights).read_bytes()
    for name in ("tokenizer", "tokenizer_2"):
        for file in (BASE / "tokenizer").iterdir():
            assert (tmp_path / "base_flow" / name / file.name).read_bytes() == file.read_bytes()
    settings = config.Backbone(family="sd3", checkpoint=str(tmp_path / "base_flow"), max_sequence_length=0)
    flow = backbones.load(settings, "cpu")
    first = backbones.load(config.Backbone(family="sd", checkpoint=str(BASE)), "cpu")
    assert flow.encode_prompts(["a large red circle on sand"]).tensors["text"].shape == (1, 16, 192)
    latents = torch.randn(1, *flow.latent_shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(flow.decode(latents), first.decode(latents))


def test_a_clip_with_one_layer_more_starts_with_the_states_of_the_first() -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 96, "intermediate_size": 32, "num_attention_heads": 4, "vocab_size": 20}
    start = CLIPTextModel(CLIPTextConfig(num_hidden_layers=2, max_position_embeddings=16, **sizes)).eval()
    ids = torch.tensor([[1, 5, 7, 2]])
    with torch.no_grad():
        longer = flow_base._one_layer_more(start).eval()(ids, output_hidden_states=True)
        states = start(ids, output_hidden_states=True).hidden_states
    assert torch.allclose(longer.hidden_states[-2], states[-1], atol=1e-6)
