"""The commands of docs/experiments.md."""

GRID = [
    "dvc exp run --queue -S 'align.spo.beta=range(5,15,5)' -S 'align.spo.threshold=0.2,0.4'",
    "dvc queue status",
    "dvc exp run --run-all --jobs 1",
    "dvc exp show --sort-by reports/metrics/report.json:spo.gain",
    "dvc queue stop --kill",
]
KEEP = ["dvc exp apply NAME", "dvc exp branch NAME BRANCH"]
ARTIFACTS = [
    'git tag -a adapter@v1.0.0 -m "SPO, beta 10"',
    "git push origin adapter@v1.0.0",
    "dvc push outputs/align/spo",
    "dvc artifacts get https://example.org/owner/project.git adapter --rev v1.0.0 --out spo-lora",
]
