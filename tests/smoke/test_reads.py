"""What stages read when they run (tests/helpers/recorder) is what dvc.yaml declares for them.

What a stage reads and does not declare would leave stale results; what it declares and never reads runs it
again for nothing.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import clones
import pytest
import yaml
from dvc.repo import Repo

pytestmark = [pytest.mark.smoke, pytest.mark.timeout(3600)]  # the first test waits for the DAG

# keys that no stage's result depends on: {stage, or "" for every: {key: why}}
FREE_KEYS = {
    "": {
        "processes": "shares the work; the sum is the same (tests/backbones/test_processes.py)",
        "device": "cuts the work to fit a card (tests/backbones/test_budget.py)",
        "generate.batch_size": "noise belongs to the picture (tests/backbones/test_drawing.py)",
        "score.batch_size": "each picture has its own score (tests/backbones/test_drawing.py)",
    },
    "align": {
        "name": "the model card says what a model was trained from when it was trained",
        "prompts.train": "as `name`: the stage reads outputs/prompts",
        "pairs.source": "as `name`: the stage reads outputs/pairs",
        "latent_preference.feature_guidance": "outputs/preference_latent, which it reads, has it",
    },
}
# modules that no stage's result depends on
FREE_MODULES = {
    "": {
        "src/spo/__init__.py": "the names of the Python API",
        "src/spo/__main__.py": "starts the command",
        "src/spo/cli.py": "starts the command",
        "src/spo/commands/arguments.py": "the same",
        "src/spo/config": "its values are params and outputs/inputs/defaults.json",
        "src/spo/methods/__init__.py": "the list of methods; each stage declares its own method's file",
        "src/spo/runtime": "files, locks, signals and processes: not what is in them",
        "src/spo/stages/common.py": "holds the lock and opens the run of a stage",
        "src/spo/tracking": "logs runs",
    },
    "inputs": dict.fromkeys(
        (
            *(
                "src/spo/backbones",
                "src/spo/data",
                "src/spo/diffusion",
                "src/spo/methods",
                "src/spo/training",
            ),
            "src/spo/types.py",
        ),
        "refuses timesteps that the base does not have: no output depends on it",
    ),
    "align": {"src/spo/publish": "writes the model card: its words train nothing"},
}
# files that no result depends on, and those that stand for others
FREE_FILES = {
    "dvc.lock": "what was made so far, for the page and for MLflow",
    "params.yaml": "declared by key",
}


def free(table: dict[str, dict[str, str]], stage: str) -> set[str]:
    return {*table[""], *table.get(stage.split("@")[0], ())}


def under(name: str, declared: set[str], separator: str) -> bool:
    return any(name == d or name.startswith(d + separator) for d in declared)


class Declared:
    """What dvc.yaml says of each stage."""

    def __init__(self, clone: Path) -> None:
        self.keys: dict[str, set[str]] = {}
        self.paths: dict[str, set[str]] = {}
        self.outs: dict[str, set[str]] = {}
        for stage in Repo(str(clone)).index.stages:
            if stage.cmd is None:  # data.dvc
                continue
            name = stage.name
            self.keys[name] = {key for dep in stage.deps for key in getattr(dep, "params", None) or ()}
            self.paths[name] = {d.def_path for d in stage.deps if not getattr(d, "params", None)}
            self.outs[name] = {out.def_path for out in stage.outs}


@pytest.fixture(scope="module")
def declared(clone: Path) -> Declared:
    return Declared(clone)


def reads(clone: Path) -> dict[str, dict[str, Any]]:
    return {p.stem: json.loads(p.read_text()) for p in sorted((clone / ".spo/read").glob("*.json"))}


def of_variants(clone: Path) -> dict[str, dict[str, Any]]:
    """Without the stages of variants that are null, which have nothing to do."""
    variants = yaml.safe_load((clone / "params.yaml").read_text())["generate"]
    return {name: read for name, read in reads(clone).items() if variants.get(name.partition("@")[2], name)}


def undeclared_keys(read: dict[str, Any], declared: set[str], stage: str) -> list[str]:
    return [k for k in read["keys"] if not under(k, declared | free(FREE_KEYS, stage), ".")]


def undeclared_code(clone: Path, read: dict[str, Any], declared: set[str], stage: str) -> list[str]:
    known = declared | free(FREE_MODULES, stage)
    return [m for m in read["modules"] if not under(m, known, "/") and says_something(clone / m)]


def says_something(module: Path) -> bool:
    """Whether a module is more than its docstring."""
    return any(not isinstance(node, ast.Expr) for node in ast.parse(module.read_text(encoding="utf-8")).body)


def pinned(clone: Path, paths: set[str]) -> set[str]:
    """What the declared files of outputs/inputs stand for."""
    files = [clone / p for p in paths if p.startswith("outputs/inputs/") and not p.endswith("defaults.json")]
    return {source["path"] for file in files for source in json.loads(file.read_text()) if "path" in source}


def test_every_stage_was_recorded(clone: Path, declared: Declared) -> None:
    assert set(reads(clone)) == set(declared.keys) and len(declared.keys) == 23
    for name, read in reads(clone).items():
        assert read["keys"] and read["modules"] and "params.yaml" in read["files"], name


def test_the_record_sees_through_variables(clone: Path) -> None:
    """`settings = params.generate`, `getattr(params.align, item)`, copies with other values."""
    read = {name: set(row["keys"]) for name, row in reads(clone).items()}
    assert {"generate.eta", "generate.seed", "generate.base.guidance"} <= read["generate@base"]
    assert {"align.spo.beta", "align.spo.optimizer.epsilon", "align.spo.lora.rank"} <= read["align@spo"]
    assert "align.diffusion_dpo.beta" not in read["align@spo"]
    assert {"preference.steps", "preference.guidance"} <= read["preference_baseline@clean_only"]
    assert "generate.spo.guidance" not in read["generate@base"]
    assert "src/spo/scenes/world.py" in reads(clone)["score@base"]["modules"]


def test_every_key_that_a_stage_reads_is_declared(clone: Path, declared: Declared) -> None:
    found = {n: undeclared_keys(r, declared.keys[n], n) for n, r in reads(clone).items()}
    assert {name: keys for name, keys in found.items() if keys} == {}


def test_what_chooses_the_weights_is_not_exempt(clone: Path) -> None:
    """Scores of validation images do (`validation.select`): their sampler and scorers must be declared."""
    for method in ("spo", "diffusion_dpo", "lpo"):
        read = reads(clone)[f"align@{method}"]
        undeclared = undeclared_keys(read, set(), f"align@{method}")
        assert {"generate.eta", "generate.num_inference_steps", f"generate.{method}.guidance"} <= {
            *undeclared
        }
        assert any(key.startswith("score.hps") for key in undeclared)
        code = undeclared_code(clone, read, set(), f"align@{method}")
        assert {"src/spo/validation/scoring.py", "src/spo/rewards/hps.py"} <= {*code}


# not read there: named so that DVC misses the key before anything runs, not at the report
NAMED = {"inputs": {"registry.min_prompts"}}


def test_every_section_that_a_stage_declares_is_read(clone: Path, declared: Declared) -> None:
    for name, read in of_variants(clone).items():
        for key in declared.keys[name] - NAMED.get(name, set()):
            assert any(under(r, {key}, ".") for r in read["keys"]), f"{name} declares {key}, never read"


def test_every_module_that_a_stage_imports_is_declared(clone: Path, declared: Declared) -> None:
    found = {n: undeclared_code(clone, r, declared.paths[n], n) for n, r in reads(clone).items()}
    assert {name: modules for name, modules in found.items() if modules} == {}


# with preference.labels and pairs.filter only
OPTIONAL = {
    "pairs": {
        "src/spo/rewards",
        "src/spo/training",
    },
}


def test_every_module_that_a_stage_declares_is_used(clone: Path, declared: Declared) -> None:
    for name, read in of_variants(clone).items():
        # all code is opened to name the state that a killed stage goes on from: that is no use of it
        used = {*read["modules"], *(f for f in read["files"] if not f.endswith(".py"))}
        for path in declared.paths[name]:
            if path.startswith("src/") and path not in OPTIONAL.get(name.partition("_")[0], ()):
                assert any(under(u, {path}, "/") for u in used), f"{name} declares {path}, never used"


def test_every_file_that_a_stage_opens_is_declared(clone: Path, declared: Declared) -> None:
    """Data, too: by path, or by a file of outputs/inputs that pins its content."""
    for name, read in reads(clone).items():
        paths = declared.paths[name]
        known = paths | declared.outs[name] | pinned(clone, paths) | set(FREE_FILES)
        if name.startswith("align"):  # looks at validation prompts
            known |= {"data/scorers"}
        opened = [
            f for f in read["files"] if f.startswith(("data/", "outputs/", "reports/", "dvc.", "params"))
        ]
        assert [f for f in opened if not under(f, known, "/")] == [], name


@pytest.mark.nightly
def test_labels_by_a_scorer_need_nothing_else(copy: Path, declared: Declared) -> None:
    """A branch that the smoke preset does not take."""
    params = yaml.safe_load((copy / "params.yaml").read_text())
    params["preference"]["labels"] = {"pickscore": params["score"]["pickscore"], "gap": 0.001}
    (copy / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    before = (copy / "outputs/inputs/clip.json").read_bytes()
    recorded = clones.environment(copy, clones.RECORDER)
    for command in ("inputs", "pairs", "preference"):
        done = clones.run(copy, "spo", command, variables=recorded)
        assert done.returncode == 0, done.stderr[-3000:]
    read = reads(copy)
    assert "preference.labels.gap" in read["pairs"]["keys"]
    assert "src/spo/rewards/pickscore.py" in read["pairs"]["modules"]
    assert "src/spo/rewards/pickscore.py" not in read["preference"]["modules"]
    assert "outputs/pairs/labels.csv" in read["preference"]["files"]
    for stage in ("pairs", "preference"):
        assert undeclared_keys(read[stage], declared.keys[stage], stage) == []
        assert undeclared_code(copy, read[stage], declared.paths[stage], stage) == []
    assert len(json.loads((copy / "outputs/inputs/labels.json").read_text())) == 1
    assert (copy / "outputs/inputs/clip.json").read_bytes() == before


@pytest.mark.nightly
def test_a_filter_of_pairs_needs_nothing_else(copy: Path, declared: Declared) -> None:
    """A branch that the smoke preset does not take."""
    params = yaml.safe_load((copy / "params.yaml").read_text())
    scorer = params["score"]["pickscore"]
    params["pairs"]["filter"] = {"pickscore": scorer, "win_lose_above": {"pickscore": 0.0}}
    (copy / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    recorded = clones.environment(copy, clones.RECORDER)
    for command in ("inputs", "pairs"):
        done = clones.run(copy, "spo", command, variables=recorded)
        assert done.returncode == 0, done.stderr[-3000:]
    read = reads(copy)["pairs"]
    assert "src/spo/rewards/pickscore.py" in read["modules"]
    assert undeclared_keys(read, declared.keys["pairs"], "pairs") == []
    assert undeclared_code(copy, read, declared.paths["pairs"], "pairs") == []
    assert len(json.loads((copy / "outputs/inputs/pairs.json").read_text())) == 2
