"""External models and images: tiny scorers in their real formats, images as files."""

import json
import weakref

import pytest
import torch
import yaml
from PIL import Image

from spo import cli, config
from spo.commands import external
from spo.config import reading
from spo.scenes import world
from tools.scenes import clips, tokenizer

PROMPTS = ["a red circle", "a blue square", "a small green triangle"]


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """A params.yaml whose scorers are small and random."""
    folder = tmp_path_factory.mktemp("scorers")
    words = tokenizer.save(sorted(world.vocabulary()), folder / "tokenizer")
    clips.save_pickscore(clips.fresh_clip(words, seed=1), words, folder / "pickscore")
    torch.manual_seed(2)
    model, model_config, _ = clips.new_open_clip(words)
    clips.save_hps(model, model_config, words, folder / "hps")
    clips.save_aesthetic(clips.RatedClip(clips.fresh_clip(words, seed=3)), words, folder / "aesthetic")
    params = yaml.safe_load(config.preset("smoke"))
    text = yaml.safe_dump(params["score"]).replace("data/scorers", str(folder))
    params["score"] = {**yaml.safe_load(text), "oracle": None}
    params["registry"]["min_prompts"] = 2
    path = folder / "params.yaml"
    path.write_text(yaml.safe_dump(params))
    return path


@pytest.fixture
def images(tmp_path):
    """image 2 comes before image 10."""

    def make(name: str, seed: int, count: int = 3):
        folder = tmp_path / name
        folder.mkdir()
        generator = torch.Generator().manual_seed(seed)
        for number in (2, 10, 11)[:count]:
            pixels = torch.randint(256, (48, 48, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / f"image{number}.png")
        (folder / "notes.md").write_text("not an image")
        return folder

    return make


def run(capsys, *arguments) -> tuple[int, str, str]:
    status = cli.main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err.splitlines()[-1] if captured.err else ""


def test_a_folder_is_scored_and_compared(capsys, tmp_path, experiment, images) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n")
    options = ("--prompts", prompts, "--params", experiment, "--output", tmp_path / "judged")
    mine, other = images("mine", 0), images("other", 1)
    status, out, _ = run(capsys, "score", "--images", mine, "--baseline", other, *options)
    assert status == 0 and "pickscore" in out and "% better" in out
    rows = json.loads((tmp_path / "judged/comparisons.json").read_text())
    assert {r["metric"] for r in rows} == {"pickscore", "hps", "aesthetic"}
    assert all(r["n"] == 3 and r["ci_low"] <= r["mean_difference"] <= r["ci_high"] for r in rows)
    first = (tmp_path / "judged/scores.csv").read_text().splitlines()
    assert [line.split(",")[1] for line in first[1:]] == PROMPTS

    assert run(capsys, "score", "--images", other, *options)[0] == 0
    means = {}
    for line in (tmp_path / "judged/scores.csv").read_text().splitlines()[1:]:
        for name, value in zip(("pickscore", "hps", "aesthetic"), line.split(",")[3:], strict=True):
            means.setdefault(name, []).append(float(value))
    for row in rows:
        assert row["mean_baseline"] == pytest.approx(sum(means[row["metric"]]) / 3, abs=1e-5)


def test_the_python_api_gives_the_same_comparison(capsys, tmp_path, experiment, images) -> None:
    import spo

    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    mine, other = images("mine", 0), images("other", 1)
    options = ("--params", experiment, "--output", tmp_path / "judged")
    given = ("--images", mine, "--baseline", other, "--prompts", tmp_path / "prompts.txt")
    assert run(capsys, "score", *given, *options)[0] == 0
    written = json.loads((tmp_path / "judged/comparisons.json").read_text())
    for prompts in (PROMPTS, tmp_path / "prompts.txt"):
        table = spo.judge(spo.load_params(experiment), mine, other, prompts)
        assert list(table.index) == [row["metric"] for row in written]
        for row in written:
            found = table.loc[row["metric"]].to_dict()
            assert found == pytest.approx({k: row[k] for k in found})
    with pytest.raises(ValueError, match="3 images, but the list of prompts has 2 prompts"):
        spo.judge(spo.load_params(experiment), mine, other, PROMPTS[:2])


def test_images_come_in_the_order_of_their_numbers(images) -> None:
    from spo.ingest.folders import list_images

    assert [p.name for p in list_images(images("mine", 0))] == [f"image{n}.png" for n in (2, 10, 11)]


def test_no_more_images_than_a_batch_are_in_memory(tmp_path, experiment, images, monkeypatch) -> None:
    """Of both folders and all scorers together; one more may be there while it is opened."""
    raw = yaml.safe_load(experiment.read_text())
    raw["score"]["batch_size"] = 1
    open_one, now, most = external._open, set(), []

    def opened(path):
        image = open_one(path)
        now.add(id(image))
        weakref.finalize(image, now.discard, id(image))
        most.append(len(now))
        return image

    monkeypatch.setattr(external, "_open", opened)
    folders = {"method": images("mine", 0), "baseline": images("theirs", 1)}
    scored = external.tables(reading.validate(raw), folders, PROMPTS)
    assert max(most) <= 2 and len(most) == 2 * 3 * (len(scored["method"].columns) - 3)


def test_mistakes_are_one_line(capsys, tmp_path, experiment, images) -> None:
    lists = {"three": PROMPTS, "two": PROMPTS[:2], "gap": [PROMPTS[0], " ", PROMPTS[1]], "none": []}
    for name, lines in lists.items():
        (tmp_path / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines))
    mine, truncated = images("mine", 0), images("truncated", 0)
    (truncated / "image11.png").write_bytes(b"truncated")
    (tmp_path / "empty").mkdir()
    cases = [
        (["--images", mine, "--prompts", tmp_path / "two.txt"], "3 images, but .*two.txt has 2 prompts"),
        (["--images", mine, "--prompts", tmp_path / "gap.txt"], "gap.txt: prompt 2 has no text"),
        (["--images", mine, "--prompts", tmp_path / "none.txt"], "none.txt: is empty"),
        (["--images", mine], "give --prompts FILE"),
        (["--images", truncated, "--prompts", tmp_path / "three.txt"], "image11.png: not a readable image"),
        (["--images", tmp_path / "empty", "--prompts", tmp_path / "three.txt"], "no images in this folder"),
        (["--images", tmp_path / "nowhere", "--prompts", tmp_path / "three.txt"], "no such folder"),
        (["base", "--images", mine], "give either a variant"),
        (["--images", mine, "--dry-run"], "--dry-run needs a variant"),
        ([], "give either a variant .* or --images"),
        (["base", "--prompts", tmp_path / "two.txt"], "--prompts needs --images"),
    ]
    for arguments, message in cases:
        status, _, error = run(capsys, "score", *arguments, "--params", experiment)
        assert status == 2, arguments
        with pytest.raises(ValueError, match=message):
            raise ValueError(error)
    status, _, error = run(capsys, "generate", "--lora", tmp_path / "nowhere", "--params", experiment)
    assert status == 2 and "nowhere: no such file or folder; give a LoRA" in error


def test_images_of_every_shape_and_kind_are_scored(capsys, tmp_path, experiment) -> None:
    prompts, folder = tmp_path / "prompts.txt", tmp_path / "shapes"
    folder.mkdir()
    shapes = [(4000, 1), (1, 4000), (1, 1), (3, 700), (48, 48)]
    for number, (shape, ending) in enumerate(zip(shapes, ("PNG", "png", "jfif", "JPG", "webp"), strict=True)):
        kind = {"webp": "WEBP", "jfif": "JPEG", "JPG": "JPEG"}.get(ending, "PNG")
        Image.new("RGB", shape, (200, 30, 90)).save(folder / f"{number}.{ending}", kind)
    prompts.write_text(f"{PROMPTS[0]}\n" * len(shapes))
    options = ("--prompts", prompts, "--params", experiment, "--output", tmp_path / "judged")
    status, _, error = run(capsys, "score", "--images", folder, *options)
    assert status == 0, error
    assert len((tmp_path / "judged/scores.csv").read_text().splitlines()) == 1 + len(shapes)
    (folder / "2.bmp").write_bytes(b"BM" + bytes(60))
    prompts.write_text(f"{PROMPTS[0]}\n" * (len(shapes) + 1))
    status, _, error = run(capsys, "score", "--images", folder, *options)
    assert status == 2 and "2.bmp: not a readable image (BMP; give JPEG, PNG or WebP)" in error


def test_an_archive_beside_other_images_is_refused(capsys, tmp_path, experiment) -> None:
    from spo.data.images import save_images

    save_images(tmp_path / "both", [Image.new("RGB", (8, 8))], PROMPTS[:1], [0])
    Image.new("RGB", (8, 8)).save(tmp_path / "both/1.png")
    status, _, error = run(capsys, "score", "--images", tmp_path / "both", "--params", experiment)
    assert status == 2 and "contains images.zip and 1.png" in error
    save_images(tmp_path / "none", [], [], [])
    status, _, error = run(capsys, "score", "--images", tmp_path / "none", "--params", experiment)
    assert status == 2 and "no images in this archive" in error


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.json", r'["a cat", "half \ud83d"]', "p.json: prompt 2 has half of a surrogate pair"),
        ("p.jsonl", r'{"caption": "half \ude00"}', "p.jsonl: prompt 1 has half of a surrogate pair"),
        ("p.json", r'["a\u0000b"]', "p.json: prompt 1 has a NUL character"),
        ("p.txt", "a\0b\n", "p.txt: line 1 has a NUL character"),
        ("p.txt", "a cat\na <|endoftext|> dog\n", "p.txt: prompt 2 has the special token <|endoftext|>"),
        ("p.csv", "prompt,id\na,1\n,2\n", "p.csv: prompt 2 has no text"),
        ("p.csv", "prompt,id\n", "p.csv: is empty"),
        ("p.md", "a", "not .md"),
        ("folder", None, "not a folder"),
    ],
)
def test_prompts_that_cannot_be_encoded_are_one_line(
    capsys, tmp_path, experiment, name: str, content: str | None, message: str
) -> None:
    path = tmp_path / name
    if content is None:
        path.mkdir()
    else:
        path.write_text(content)
    (tmp_path / "lora").mkdir()
    options = ("--lora", tmp_path / "lora", "--prompts", path, "--params", experiment)
    assert cli.main(["generate", *map(str, options)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_special_token_in_the_prompt_of_a_sample_is_one_line(capsys, experiment) -> None:
    assert cli.main(["sample", "a cat &lt;|endoftext|&gt; a dog", "--params", str(experiment)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "the prompt has the special token <|endoftext|> of a tokenizer; it cannot be encoded" in line


def test_bytes_that_are_not_utf_8_are_one_line(capsys, experiment) -> None:
    prompt = b"a caf\xe9".decode("utf-8", "surrogateescape")  # as Python gives an argument
    assert cli.main(["sample", prompt, "--params", str(experiment)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "half of a surrogate pair" in line
