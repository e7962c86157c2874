"""How far a rollout's parameters travel until the first evaluation: `python -m bench.walk --params params.yaml`.

A trace of calls through the modules of this package, in three parts: from params.yaml to the recipe, whose shard set
is opened, from there to the first task, and from that task to the first prompt that is encoded. Functions only: what
importing runs is left out, for the same rollout was run once before.

`--stage rats.stages.plan.plan:plan_stage` walks `rats plan` instead, all of it. An older tree is walked by this file,
its own PYTHONPATH and the stage's name in it, such as `rats.stages.rollout:rollout_stage`.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from rats.schemas.params import load_params

STAGE = "rats.stages.rollout.rollout:rollout_stage"
PARTS = {"recipe": "open_or_create", "tasks": "do_task", "worker": "encode"}
"""Each part of the way by the call that ends it; of what is called `encode` a method, the text encoders', counts."""
WEIGHTS = re.compile(r"pipeline/(weights|loading|lora)\b")
"""The modules of weights, in a folder or, in older trees, side by side."""


@dataclass
class Walk:
    """The modules that were entered, in order, and the files of the model's folder that were opened."""

    modules: list[str] = field(default_factory=list)
    looked_up: int = 0
    outlined: int = 0
    read: Counter[str] = field(default_factory=Counter)
    hashed: Counter[str] = field(default_factory=Counter)

    def enter(self, module: str) -> None:
        """Counts a call from another module. A call within a module is no entry."""
        if self.modules[-1:] != [module]:
            self.modules.append(module)

    def figures(self) -> dict[str, int]:
        """The walk in numbers. Rooms are distinct modules, returns are entries into a module that was left before."""
        inside = [bool(WEIGHTS.match(module)) for module in self.modules]
        return {
            "rooms": len(set(self.modules)),
            "returns": len(self.modules) - len(set(self.modules)),
            "weights entered": sum(now and not before for before, now in zip([False, *inside], inside, strict=False)),
            "model looked up": self.looked_up,
            "components outlined": self.outlined,
            "files hashed": self.hashed.total(),
            "most often one file": max(self.hashed.values(), default=0),
            "files read": self.read.total(),
            "model_index.json read": self.read["model_index.json"],
        }


def joined(parts: Iterable[Walk]) -> Walk:
    """Several walks, one after the other."""
    whole = Walk()
    for part in parts:
        whole.modules += part.modules
        whole.looked_up += part.looked_up
        whole.outlined += part.outlined
        whole.read.update(part.read)
        whole.hashed.update(part.hashed)
    return whole


class Tracer:
    """Writes one walk for each of `PARTS`."""

    def __init__(self, model: str) -> None:
        """`model`: whose files are counted."""
        self.model = Path(model).resolve()
        self.walks = {name: Walk() for name in PARTS}
        self._left = list(PARTS)

    @property
    def walk(self) -> Walk | None:
        """The walk of the part that runs now; None after the last part."""
        return self.walks[self._left[0]] if self._left else None

    def called(self, frame: FrameType, event: str, argument: Any) -> None:
        """For `sys.setprofile`."""
        if event != "call" or self.walk is None or (module := module_of(frame.f_code)) is None:
            return
        name, is_method = frame.f_code.co_name, "self" in frame.f_locals
        if name == PARTS[self._left[0]] and (name != "encode" or is_method):
            self._left.pop(0)
        if self.walk:
            self.walk.enter(module)
            self.walk.looked_up += name == "resolve" and self.is_model(frame.f_locals.get("path"))
            self.walk.outlined += name == "outline_component"

    def stop(self) -> None:
        """Writes nothing more."""
        self._left.clear()

    def is_model(self, path: Any) -> bool:
        """Whether a path names the model's folder."""
        return Path(str(path)).resolve() == self.model

    def opened(self, event: str, arguments: tuple[Any, ...]) -> None:
        """For `sys.addaudithook`: what Python opens. Weights that safetensors maps are not among it."""
        if event != "open" or self.walk is None or not isinstance(arguments[0], str | os.PathLike):
            return
        path = Path(arguments[0]).absolute()
        if path.is_relative_to(self.model):
            counted = self.walk.hashed if "hash" in innermost(sys._getframe(1)) else self.walk.read
            counted[path.relative_to(self.model).as_posix()] += 1


@cache
def module_of(code: CodeType) -> str | None:
    """The file of a function of this package, below its root; None for others, for class bodies and for modules."""
    if not code.co_flags & inspect.CO_OPTIMIZED:
        return None
    path = Path(os.path.realpath(code.co_filename))
    root = next((root for root in roots() if path.is_relative_to(root)), None)
    return path.relative_to(root.parent).as_posix() if root else None


@cache
def roots() -> list[Path]:
    """The folders of the package."""
    names = ("pipeline", "schemas", "stages", "trainer")
    return [Path(os.path.realpath(next(iter(importlib.import_module(f"rats.{name}").__path__)))) for name in names]


def innermost(frame: FrameType | None) -> str:
    """The name of the innermost function of this package that is running."""
    while frame is not None and module_of(frame.f_code) is None:
        frame = frame.f_back
    return frame.f_code.co_name if frame else ""


@contextmanager
def traced(tracer: Tracer) -> Iterator[None]:
    """Traces this thread. An audit hook cannot be removed: after this block it does nothing."""
    sys.addaudithook(tracer.opened)
    sys.setprofile(tracer.called)
    try:
        yield
    finally:
        sys.setprofile(None)
        tracer.stop()


def walk(path: Path, overrides: Sequence[str], stage: Callable[..., Any]) -> dict[str, Walk]:
    """The walks of a rollout of one prompt in this process, into a store that is thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.txt"
        prompts.write_text("a red fox")
        for name in ("first", "traced"):
            changes = [*overrides, f"prompts.train={prompts}", "store.workers=0", f"store.path={folder}/{name}"]
            tracer = Tracer(load_params(path, changes).model.path)
            if name == "first":
                stage(load_params(path, changes), "train")
                continue
            with traced(tracer):
                stage(load_params(path, changes), "train")
    return tracer.walks


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, int]]:
    """Walk, and print a table."""
    parser = argparse.ArgumentParser(description="the way of a rollout's parameters through the modules")
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--stage", default=STAGE, metavar="MODULE:FUNCTION")
    parser.add_argument("--rooms", action="store_true", help="name the modules in order")
    arguments = parser.parse_args(argv)
    module, _, function = arguments.stage.partition(":")
    stage = getattr(importlib.import_module(module), function)
    walks = walk(arguments.params, arguments.set, stage)
    figures = {name: part.figures() for name, part in {**walks, "all": joined(walks.values())}.items()}
    print(f"{'':<24}" + "".join(f"{name:>8}" for name in figures))
    for row in figures["all"]:
        print(f"{row:<24}" + "".join(f"{part[row]:>8}" for part in figures.values()))
    if arguments.rooms:
        for name, part in walks.items():
            print(f"\n{name}: {' > '.join(part.modules)}")
    return figures


if __name__ == "__main__":
    main()
