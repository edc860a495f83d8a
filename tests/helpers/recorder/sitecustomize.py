"""Records what a stage of `spo` reads: keys of params.yaml, modules of spo, and files of the experiment.

Python imports a module of this name when it starts, wherever this folder is on PYTHONPATH. When a stage ends,
it then writes `.spo/read/STAGE.json`; what it computes is the same.
"""

import atexit
import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(".spo/read")
# these dump whole sections to log them and to name what a killed stage goes on from
NO_READERS = {("common.py", "stage"), ("fingerprint.py", "fingerprint")}
keys: set[str] = set()
files: set[str] = set()
named: dict[int, tuple[Any, str]] = {}  # by id: a section, which is so kept alive, and its dotted key


def main() -> None:
    from spo import cli, config
    from spo.config import base, reading

    if sys.argv[1:2] and sys.argv[1] not in cli.STAGES:
        return
    root = f"{os.getcwd()}{os.sep}"
    sys.addaudithook(functools.partial(opened, root=root))
    validate = reading.validate

    def validated(*arguments: Any, **options: Any) -> config.Params:
        params = validate(*arguments, **options)
        name(params, "")
        return params

    reading.validate = validated
    watch(base.Section)
    atexit.register(write, root)


def name(section: Any, key: str) -> None:
    named[id(section)] = (section, key)
    for part in type(section).model_fields:
        value = section.__dict__[part]
        if hasattr(value, "model_fields_set") and id(value) not in named:
            name(value, join(key, part))


def watch(base: Any) -> None:
    """Note each field of a named section that is read, under whatever variable the section goes."""
    read, dump, dump_json, copy = (
        base.__getattribute__,
        base.model_dump,
        base.model_dump_json,
        base.model_copy,
    )

    def attribute(self: Any, part: str) -> Any:
        value = read(self, part)
        if id(self) in named and part in type(self).model_fields and not hasattr(value, "model_fields_set"):
            keys.add(join(named[id(self)][1], part))
        return value

    def dumped(self: Any, *arguments: Any, **options: Any) -> Any:
        whole(self, options)
        return dump(self, *arguments, **options)

    def dumped_json(self: Any, *arguments: Any, **options: Any) -> Any:
        whole(self, options)
        return dump_json(self, *arguments, **options)

    def copied(self: Any, *arguments: Any, **options: Any) -> Any:
        other = copy(self, *arguments, **options)
        if id(self) in named:
            name(other, named[id(self)][1])
        return other

    base.__getattribute__, base.model_copy = attribute, copied
    base.model_dump, base.model_dump_json = dumped, dumped_json


def whole(section: Any, options: dict[str, Any]) -> None:
    code = sys._getframe(2).f_code
    if id(section) not in named or (Path(code.co_filename).name, code.co_name) in NO_READERS:
        return
    parts = set(options.get("include") or type(section).model_fields) - set(options.get("exclude") or ())
    keys.update(join(named[id(section)][1], part) for part in parts)


def join(key: str, part: str) -> str:
    return f"{key}.{part}" if key else part


def opened(event: str, arguments: tuple[Any, ...], root: str) -> None:
    if event != "open" or not isinstance(arguments[0], str | bytes):
        return
    path = os.path.abspath(os.fsdecode(arguments[0]))
    reads = not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
    if reads and path.startswith(root):
        files.add(path.removeprefix(root))


def write(root: str) -> None:
    """The stage is named as DVC names it."""
    modules = {
        str(Path(m.__file__).resolve()) for m in list(sys.modules.values()) if getattr(m, "__file__", None)
    }
    code = {path.removeprefix(root) for path in modules if path.startswith(f"{root}src/")}
    folder = Path(root) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    record = {"keys": sorted(keys), "modules": sorted(code), "files": sorted(files)}
    stage = os.environ.get("DVC_STAGE") or "@".join(a for a in sys.argv[1:3] if not a.startswith("-"))
    (folder / f"{stage}.json").write_text(json.dumps(record, indent=1))


if Path(sys.orig_argv[1] if len(sys.orig_argv) > 1 else "").name == "spo":
    main()
