"""The published figures beside one's own."""

import pandas as pd
import yaml

from spo import config
from spo.evaluation import published, report


def dumped(name: str, **changes) -> dict:
    raw = yaml.safe_load(config.preset(name))
    raw["generate"] |= changes
    return config.validate(raw).model_dump(mode="json")


def test_each_row_of_the_table_has_the_figures_of_its_guidance() -> None:
    found = published.scores(dumped("sd15-eval"))
    assert list(found) == ["base", "base_high_guidance", "diffusion_dpo", "spo", "lpo"]  # none of DPO at 7.5
    assert (found["base"]["pickscore"], found["base_high_guidance"]["pickscore"]) == (20.53, 20.56)
    assert found["spo"] | {"in": ""} == {
        "pickscore": 21.43,
        "hps": 26.45,
        "aesthetic": 5.887,
        "imagereward": 0.171,
        "in": "",
    }
    assert set(published.scores(dumped("sdxl-eval"))) == {"base", "diffusion_dpo", "spo", "lpo"}


def test_nothing_is_published_of_other_models_prompts_guidance_and_steps() -> None:
    assert published.scores(dumped("scenes")) == {}
    assert published.scores(dumped("sd15-eval", num_inference_steps=50)) == {}
    params = dumped("sd15-eval")
    assert published.scores(params | {"prompts": {"evaluation": "own.txt"}}) == {}
    params["generate"]["spo"]["guidance"] = 6.0
    assert "spo" not in published.scores(params)


def test_the_page_s_table_names_guidance_paper_and_table() -> None:
    tables = {
        v: pd.DataFrame({"index": [0], "prompt": ["a"], "seed": [1], "pickscore": [20.0], "hps": [25.0]})
        for v in ("base", "diffusion_dpo", "diffusion_dpo_high_guidance")
    }

    class Run:
        scores, params = tables, dumped("sd15-eval")

    frame = report.scores(Run)
    assert list(frame.index) == [
        "Base, guidance 5",
        "Diffusion-DPO, guidance 5",
        "Diffusion-DPO, guidance 7.5",
    ]
    assert list(frame) == ["pickscore", "hps", "PickScore, published", "HPS ×100, published", "published in"]
    assert frame.iloc[0].tolist() == ["20.000", "25.000", 20.53, 23.79, "arXiv 2406.04314, table 2"]
    assert frame.iloc[2, 2:].isna().all()
    Run.params = dumped("scenes")
    assert list(
        report.scores(type("Run", (), {"scores": {"base": tables["base"]}, "params": Run.params}))
    ) == [
        "pickscore",
        "hps",
    ]
