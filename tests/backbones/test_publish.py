"""What `spo publish` writes: a card that the hub's parser reads, weights that diffusers loads."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from rounding import assert_same

from spo import backbones, cli, config
from spo.adapters import load as load_adapted
from spo.data.images import save_images
from spo.evaluation import statistics
from spo.publish import adapter
from spo.publish import card as cards

PROMPTS = ["a red circle", "a | b <b>*bold*</b>", "a star", "sand", "snow"]
ADAPTER = "outputs/align/spo"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, checkpoints: dict[str, Path]) -> Path:
    """A run's results: a real adapter of a small random checkpoint, images and scores."""
    root = tmp_path_factory.mktemp("run")
    shutil.copytree(checkpoints["sd"], root / "base")
    raw = yaml.safe_load(config.preset("smoke"))
    raw["backbone"] |= {"checkpoint": str(root / "base"), "license": "openrail", "channels_last": False}
    (root / "params.yaml").write_text(yaml.safe_dump(raw))
    params = config.validate(raw)
    backbone = backbones.load(params.backbone, "cpu")
    backbone.add_lora(params.align.spo.lora, seed=1)
    for parameter in backbone.trainable_parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    backbone.save_lora(root / ADAPTER)
    cards.write(root / ADAPTER, params, "spo", {"updates": 4})
    (root / "base/LICENSE").write_text("the licence")
    tables = {}
    for number, variant in enumerate(("base", "spo")):
        pictures = [Image.new("RGB", (16, 16), (100 * number, 40 * i, 0)) for i in range(len(PROMPTS))]
        save_images(root / "outputs/images" / variant, pictures, PROMPTS, range(5))
        scores = {"hps": [20.0 + number + i for i in range(5)]}
        tables[variant] = pd.DataFrame({"index": range(5), "prompt": PROMPTS, "seed": range(5), **scores})
        (root / "outputs/scores").mkdir(exist_ok=True)
        tables[variant].to_csv(root / f"outputs/scores/{variant}.csv", index=False)
    (root / "reports").mkdir()
    rows = statistics.comparisons(tables, ["base"], 100, 0)
    (root / "reports/comparisons.json").write_text(json.dumps(rows))
    return root


@pytest.fixture
def run(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made, tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    return tmp_path / "run"


def publish(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """The exit status, and the line that says what is wrong."""
    status = cli.main(["publish", ADAPTER, *arguments])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("spo: ")]
    assert len(lines) == (status != 0)
    return status, "".join(lines)


def test_the_card_is_what_the_hub_reads(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert publish(capsys, "--to", "out", "--base-model", "someone/model") == (0, "")
    card = ModelCard.load(run / "out/README.md")
    data = card.data
    assert (data.base_model, data.license, data.library_name) == ("someone/model", "openrail", "diffusers")
    (result,) = data.eval_results
    assert (data.model_name, result.metric_type, result.metric_value) == ("smoke-spo", "hps", 23.0)
    assert result.dataset_name == "5 test prompts of smoke" and result.task_type == "text-to-image"
    assert [w["text"] for w in data.widget] == PROMPTS[:4]
    for w in data.widget:
        with Image.open(run / "out" / w["output"]["url"]) as image:
            assert image.getpixel((0, 0))[0] == 100  # SPO's
    assert "| hps | 23.000 | base | +1.000 |" in card.text and "updates: 4" in card.text
    assert "In A1111 and ComfyUI: `smoke-spo_webui.safetensors` with strength 1." in card.text
    assert "| a \\| b \\<b\\>\\*bold\\*\\</b\\> |" in card.text
    assert (run / "out/LICENSE").read_text() == "the licence"
    assert sorted(p.name for p in (run / "out").iterdir()) == [
        *(
            "LICENSE",
            "README.md",
            "pytorch_lora_weights.safetensors",
            "samples",
            "smoke-spo_webui.safetensors",
        )
    ]


def test_diffusers_loads_it_from_there(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from diffusers import StableDiffusionPipeline

    assert publish(capsys, "--to", "out")[0] == 0
    pipe = StableDiffusionPipeline.from_pretrained(run / "base", safety_checker=None)
    inputs = (torch.ones(1, 4, 8, 8), torch.tensor([501]))
    text = torch.ones(1, 4, pipe.unet.config.cross_attention_dim)
    plain = pipe.unet(*inputs, text).sample
    ours = load_adapted(config.load().backbone, run / ADAPTER, "cpu")
    for path in (run / "out", run / "out/smoke-spo_webui.safetensors"):
        pipe.load_lora_weights(path)
        assert not torch.allclose(pipe.unet(*inputs, text).sample, plain)
        assert_same(pipe.unet(*inputs, text).sample, ours.unet(*inputs, text).sample, ours.unet)
        pipe.unload_lora_weights()


def test_a_local_base_and_an_unknown_licence_are_omitted(run: Path, capsys: Any) -> None:
    card = run / ADAPTER / "README.md"
    card.write_text(card.read_text().replace("license: openrail\n", ""))
    assert publish(capsys, "--to", "out")[0] == 0
    data = ModelCard.load(run / "out/README.md").data
    assert data.base_model is None and data.license is None
    assert publish(capsys, "--to", "other", "--license", "mit")[0] == 0
    other = ModelCard.load(run / "other/README.md")
    assert other.data.license == "mit" and "- licence of the base model: mit\n" in other.text


def test_mistakes_are_one_line_and_leave_nothing(
    run: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: str) -> str:
        status, line = publish(capsys, *arguments)
        assert status == 2 and not (run / "out").exists()
        return line

    assert "HF_HUB_OFFLINE is set" in refused("--to", "someone/spo", "--base-model", "a/b")
    monkeypatch.setattr(adapter.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(adapter, "get_token", lambda: None)
    line = refused("--to", "someone/spo", "--base-model", "a/b")
    assert "no token for someone/spo: run `hf auth login`" in line
    assert "give --base-model OWNER/NAME" in refused("--to", "someone/spo")
    assert "not a hub id" in refused("--to", "out", "--base-model", "base")
    assert "exists and is not empty" in refused("--to", "base")
    rows = json.loads((run / "reports/comparisons.json").read_text())
    (run / "reports/comparisons.json").write_text(json.dumps([{**rows[0], "mean_method": 9.0}]))
    assert "hps is not that of outputs/scores/spo.csv; run `spo report` again" in refused("--to", "out")
    (run / "reports/comparisons.json").write_text("[]")
    assert "no scores of spo" in refused("--to", "out")
    (run / ADAPTER / "README.md").unlink()
    assert "no model card there" in refused("--to", "out")
    status = cli.main(["publish", "base", "--to", "out"])
    assert status == 2 and "not the adapter of a method in params.yaml" in capsys.readouterr().err


class Hub(BaseHTTPRequestHandler):
    """The few requests of a hub that creating a repository and uploading to it make."""

    def do_GET(self) -> None:
        self._answer({})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        place: Any = self.server
        place.calls.append((self.path, self.headers["Authorization"]))
        if self.path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
            return self._answer({"files": modes})
        if self.path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    place.files[value["path"]] = base64.b64decode(value["content"])
            return self._answer({"commitUrl": f"{place.url}/commit/{'1' * 40}", "commitOid": "1" * 40})
        return self._answer({"url": place.url, "warnings": [], "errors": []})

    def _answer(self, content: Any) -> None:
        text = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.calls, server.files = [], {}
    server.url = f"http://127.0.0.1:{server.server_address[1]}/someone/spo"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.services
@pytest.mark.nightly
def test_a_hub_gets_all_of_it(run: Path, hub: Any) -> None:
    address = hub.url.removesuffix("/someone/spo")
    own = {
        **os.environ,
        "HF_ENDPOINT": address,
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": "hf_a",
        "HF_HOME": str(run),
    }
    command = [sys.executable, "-m", "spo", "publish", ADAPTER, "--to", "someone/spo"]

    command += ["--base-model", "someone/model"]

    def spo() -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, env=own, capture_output=True, text=True, timeout=600)

    done = spo()
    assert done.returncode == 0 and done.stdout.startswith(f"{hub.url}/commit/1111"), done.stderr
    assert {token for _, token in hub.calls} == {"Bearer hf_a"}
    assert hub.files["pytorch_lora_weights.safetensors"] == (
        (run / ADAPTER / "pytorch_lora_weights.safetensors").read_bytes()
    )
    assert 'pipe.load_lora_weights("someone/spo")' in hub.files["README.md"].decode()
    assert len([name for name in hub.files if name.startswith("samples/")]) == 8

    hub.shutdown()
    hub.server_close()
    done = spo()
    assert done.returncode == 75 and done.stderr.startswith("spo: publish: someone/spo: Connect"), done.stderr
    assert "Traceback" not in done.stderr and "hf_a" not in done.stderr
