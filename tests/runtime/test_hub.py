"""What the hub answers, what its cache has, and which names are the hub's, and how they differ."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hub_cache
import pytest

from spo.ingest.manifest import manifest
from spo.runtime import hub, hub_answers
from spo.runtime.messages import MISTAKE, TRANSIENT, exit_code

SHARD = "data/train-00000-of-00001.parquet"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, without a network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    hub.say.cache_clear()
    return tmp_path / "hub"


@pytest.fixture
def answers(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A hub on this machine that answers everything with one status, one body and its own headers."""
    from huggingface_hub import constants

    state = SimpleNamespace(status=200, headers={}, body="{}")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(state.status)
            for name, value in state.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(state.body)))
            self.end_headers()
            self.wfile.write(state.body.encode())

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *arguments: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{http.server_address[1]}")
    yield state
    http.shutdown()
    http.server_close()


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(
    ("status", "code", "line"),
    [
        (403, "GatedRepo", "gated on the hub: accept its conditions at http"),
        (401, "GatedRepo", "log in with `hf auth login` or HF_TOKEN"),
        (404, "RepoNotFound", "the hub has no repository {page}, or it is private"),
        (404, "RevisionNotFound", "the hub has no revision 'main' of {page}"),
        (401, "", "{page}.*HF_TOKEN"),
        (403, "", "the hub forbids access to {page} \\(403\\)"),
        (410, "", "the hub refuses the request for {page} \\(410\\)"),
    ],
)
@pytest.mark.parametrize("name", ["o/n", "hf://datasets/o/n/x.json"])
def test_an_answer_that_refuses_is_said_and_no_old_cache_is_used(
    cache: Path, answers: SimpleNamespace, name: str, cached: bool, status: int, code: str, line: str
) -> None:
    if cached:
        hub_cache.add(cache, name, {"x.json": b"{}"})
    answers.status, answers.headers = status, {"X-Error-Code": code} if code else {}
    page = "datasets/o/n" if "datasets" in name else "o/n"
    with pytest.raises(ValueError, match=line.format(page=page)) as error:
        manifest(name)
    message = str(error.value)
    assert "\n" not in message and "cannot be reached" not in message and "with a network" not in message
    assert exit_code(error.value) == MISTAKE
    if page == name:
        with pytest.raises(ValueError, match=line.format(page=page)):
            hub.files(name)
        assert hub.reason(name, error.value) in message


def test_a_token_that_is_not_accepted_is_said(cache: Path, answers: SimpleNamespace) -> None:
    answers.status = 401
    answers.headers = {"X-Error-Message": "Invalid credentials in Authorization header"}
    with pytest.raises(ValueError, match=r"does not authorise the request for o/n \(401\): log in"):
        hub.commit("o/n")


@pytest.mark.parametrize(
    ("status", "body", "line"),
    [
        (429, "often", "answers 429 (too many requests): try again later"),
        (503, "away", "answers 503: try again later"),
        (200, "<html>log in</html>", "does not answer; a proxy or a login page does instead"),
    ],
)
def test_a_hub_that_is_away_leaves_its_cache_with_a_line(
    cache: Path,
    answers: SimpleNamespace,
    capsys: pytest.CaptureFixture[str],
    status: int,
    body: str,
    line: str,
) -> None:
    answers.status, answers.body = status, body
    with pytest.raises(ValueError, match="hf download o/n") as error:
        hub.commit("o/n")
    assert line in str(error.value) and exit_code(error.value) == (MISTAKE if status == 200 else TRANSIENT)
    commit = hub_cache.add(cache, "o/n", {"model_index.json": b"{}"})
    assert hub.commit("o/n") == hub.commit("o/n") == commit
    if status == 200:  # of the others the client asks for the list five times more
        assert hub.files("o/n") == ["model_index.json"]
    said = [text for text in capsys.readouterr().err.splitlines() if "of its cache is used" in text]
    assert said == [f"spo: o/n: the hub {line}; commit {commit[:12]} of its cache is used"]


def test_offline_the_cache_is_used_as_such(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commit = hub_cache.add(cache, "o/n", {"model_index.json": b"{}"})
    assert manifest("o/n")["revision"] == commit
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("revision", ["@" + "a" * 40, "@main", "", "@refs/pr/3"])
def test_of_a_cache_filled_by_a_pattern_only_what_is_asked_for_must_be_there(
    cache: Path, revision: str
) -> None:
    model, files = f"o/m{revision}", f"hf://datasets/o/n{revision}/data/train-*"
    for name, path in ((model, "unet/config.json"), (files, SHARD)):
        commit = hub_cache.add(cache, name, {path: b"{}"})
        hub_cache.list_files(cache, name, commit, [path, "README.md", "data/test-1.parquet"])
        assert manifest(name)["revision"] == commit
    assert list(manifest(files)["files"]) == [SHARD]
    assert hub.files(model) == ["unet/config.json"]
    with pytest.raises(
        ValueError, match="lacks 2 of 3 files, e.g. README.md; with a network run `hf download"
    ):
        hub.download(f"hf://datasets/o/n{revision}")
    with pytest.raises(ValueError, match="o/n has no such file at"):
        hub.download(f"hf://datasets/o/n{revision}/data/val-*")


def test_a_cache_that_cannot_tell_whether_it_is_complete_says_so(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub_cache.add(cache, "hf://datasets/o/n", {"a/1.parquet": b"1", SHARD: b"2"})
    assert list(hub.download("hf://datasets/o/n/a/*")) == ["a/1.parquet"]
    assert "not known whether there are more" in capsys.readouterr().err
    hub.download("hf://datasets/o/n/a/1.parquet")
    hub.download("hf://datasets/o/n/data/train-*")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "revision", "pattern"),
    [
        ("@refs/convert/parquet/default/train/*.parquet", "refs/convert/parquet", "default/train/*.parquet"),
        ("@refs%2Fconvert%2Fparquet/default/0.parquet", "refs/convert/parquet", "default/0.parquet"),
        ("@~parquet/default/0.parquet", "refs/convert/parquet", "default/0.parquet"),
        ("@refs/pr/3/data/a.parquet", "refs/pr/3", "data/a.parquet"),
        ("@refs/pr/3", "refs/pr/3", "*"),
        ("@feature%2Fx/data", "feature/x", "data"),
        ("@v1/data/b@2.json", "v1", "data/b@2.json"),
        ("/data/b@2.json", None, "data/b@2.json"),
    ],
)
def test_a_revision_of_a_url_is_that_of_huggingface_hub(
    name: str, revision: str | None, pattern: str
) -> None:
    at = hub.place(f"hf://datasets/o/n{name}")
    assert (at.repository, at.kind, at.revision, at.pattern) == ("o/n", "dataset", revision, pattern)


@pytest.mark.parametrize("revision", ["refs/pr/3", "refs%2Fpr%2F3", "main", "v1"])
def test_a_model_may_name_any_revision(cache: Path, revision: str) -> None:
    want = revision.replace("%2F", "/")
    assert hub.split_revision(f"o/n@{revision}") == ("o/n", want)
    commit = hub_cache.add(cache, f"o/n@{revision}", {"config.json": b"{}"})
    assert manifest(f"o/n@{revision}")["revision"] == commit


@pytest.mark.parametrize(
    "url", ["hf://spaces/o/n/x", "hf://buckets/o/n/x", "hf://model/o/n", "hf://models/sd15"]
)
def test_a_url_of_no_model_and_no_data_set_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="not of the form"):
        hub.place(url)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("out/spo", "out/ is a folder here, so it is not looked up on the hub"),
        ("out/spo@main", ""),
        ("models/sd15", ""),
        ("checkpoints/my.safetensors", "a file, so not looked up on the hub"),
        ("lists/train.TXT", "a file, so not looked up on the hub"),
        ("./o/n", ""),
        ("../n", ""),
        ("~/n", ""),
        ("/n", ""),
        ("data/base", "data/ is a folder here"),
        ("o/n@branch/x", "a / of the revision is written %2F"),
        ("o/n/unet", ""),
        ("datasets/o/n", ""),
    ],
)
def test_a_path_that_is_not_there_is_not_looked_up_on_the_hub(
    cache: Path, monkeypatch: pytest.MonkeyPatch, name: str, why: str
) -> None:
    from huggingface_hub import HfApi

    monkeypatch.setattr(HfApi, "repo_info", lambda *_, **__: SimpleNamespace(sha="f" * 40))
    Path("out").mkdir()
    with pytest.raises(ValueError, match="no such file or folder") as error:
        manifest(name)
    assert why in str(error.value) and not hub.is_hub_id(name)
    assert manifest("stabilityai/stable-diffusion-2.1")["revision"] == "f" * 40


def test_only_a_refusal_is_one() -> None:
    assert hub_answers.refusal("o/n", None, OSError("no such file")) is None
    assert hub_answers.state(TimeoutError()) == "cannot be reached (TimeoutError)"
