"""Commands of DVC that the docs name: tests/docs/test_dvc_commands.py runs them."""

EXPERIMENT = [
    "dvc exp run -S align.spo.beta=20",
    "dvc exp show --only-changed --drop '.*/.*'",
    "dvc metrics diff",
    "dvc plots diff",
]
DAY = [
    "dvc remote add --local -d team /srv/dvc",
    "dvc push",
    "dvc pull",
    "dvc repro",
    "dvc exp run -S align.spo.beta=20 --name b20",
    "dvc exp show",
    "dvc metrics diff",
    "dvc plots diff HEAD",
    "dvc exp push origin b20",
    "dvc exp pull origin b20",
    "dvc exp apply b20",
    "dvc exp run --queue -S align.spo.beta=5",
    "dvc exp run --run-all --jobs 2",
]
NODES = [
    "dvc repro preference",
    "dvc commit --force align@spo",
    "dvc cache dir --local /shared/dvc-cache",
    "dvc config --local cache.type reflink,hardlink,symlink,copy",
    "dvc config --local cache.shared group",
]
FETCH = ["dvc pull data.dvc"]  # by every clone of experiments.settled
CLEAN_UP = [
    "dvc gc --all-branches --all-tags --all-experiments --dry",
    "dvc gc --all-branches --all-tags --all-experiments",
    "dvc gc --all-branches --all-tags --all-experiments --cloud -r team --dry",
    "dvc exp remove --queue",
]
