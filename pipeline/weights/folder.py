"""A model's folder in diffusers' format: looked up, read and hashed at the first use, and once. Never imports torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from rats.pipeline.weights.files import find_weights, opened_files
from rats.pipeline.weights.hashes import NETWORK, hash_content, hash_files, read_json
from rats.pipeline.weights.hub import (
    DECODER_PATTERNS,
    INSTEAD,
    PIPELINE_PATTERNS,
    absolute_if_local,
    find_checkpoint,
    resolve,
    resolve_checkpoint,
)
from rats.schemas.errors import ConfigError
from rats.schemas.fused_lora import FusedLora
from rats.schemas.params import ModelParams
from rats.schemas.recipe import DECODER

INDEX, SCHEDULER, LORA_FILE = "model_index.json", "scheduler", "pytorch_lora_weights.safetensors"

WEIGHED = (NETWORK, DECODER, "text_encoder")
"""How names of components with weights begin: `text_encoder_2` is one too."""


@dataclass(eq=False)
class ModelFolder:
    """The folder of `model.path` at `model.revision`, with the network of `model.transformer`.

    Making one reads no file. A hash is that of the files at its first use. A pickled ModelFolder holds the parameters
    alone and looks everything up again: another machine may have other files at the same path.
    """

    params: ModelParams
    _hashes: dict[str, str] = field(default_factory=dict, init=False, repr=False)

    def __reduce__(self) -> tuple[Any, ...]:
        """The parameters alone."""
        return ModelFolder, (self.params,)

    @cached_property
    def index_root(self) -> Path:
        """The pipeline's folder, of which only model_index.json is needed: of a hub repository only that is fetched."""
        return resolve(self.params.path, self.params.revision, (INDEX,))

    @cached_property
    def root(self) -> Path:
        """The pipeline's folder. All of a hub repository is fetched. Raises ConfigError if there is none."""
        found = self._fetched(PIPELINE_PATTERNS, WEIGHED)
        self.__dict__["decoder_root"] = found
        return found

    @cached_property
    def decoder_root(self) -> Path:
        """The same folder, of which only the decoder is needed: of a hub repository only the decoder is fetched."""
        return self._fetched(DECODER_PATTERNS, (DECODER,))

    def _fetched(self, patterns: Sequence[str], weighed: tuple[str, ...]) -> Path:
        """The folder, of the commit of `index_root` even if a branch has moved.

        Components whose names begin as in `weighed` need weights: where a hub has no plain ones, others are fetched.
        """
        if self.is_local:
            return self.index_root
        found = resolve(self.params.path, self.index_root.name, patterns)
        for endings in INSTEAD:
            names = (path.parent.name for path in found.glob("*/config.json") if find_weights(path.parent) is None)
            if lacking := [f"{name}/{end}" for name in names if name.startswith(weighed) for end in endings]:
                resolve(self.params.path, found.name, lacking, without=())
        return found

    @property
    def is_local(self) -> bool:
        """Whether `model.path` is no hub id."""
        return Path(self.params.path).exists()

    @cached_property
    def index(self) -> dict[str, Any]:
        """The content of model_index.json; empty if a local folder has none. Raises ConfigError if a hub has none."""
        path = self.index_root / INDEX
        if not path.is_file() and not self.is_local:
            raise ConfigError(
                f"hub repository '{self.params.path}' has no {INDEX}: it is no diffusers pipeline (another repository "
                "of the same model may be one, often named ...-Diffusers)"
            )
        return read_json(path) if path.is_file() else {}

    @cached_property
    def loras(self) -> tuple[FoundLora, ...]:
        """The files of `model.loras`. Of a hub, they are fetched. Raises ConfigError if there is none."""
        return tuple(map(find_lora, self.params.loras))

    @cached_property
    def scheduler_config(self) -> dict[str, Any]:
        """The scheduler's configuration. Raises ConfigError if there is none."""
        return read_json(self.parts(SCHEDULER)[SCHEDULER] / "scheduler_config.json")

    def parts(self, *names: str) -> dict[str, Path]:
        """Folders of components, by name. Raises ConfigError if one does not exist."""
        found = {name: self._part(name) for name in names}
        for folder in found.values():
            if not folder.is_dir():
                way_out = (
                    "" if self.is_local else f", `hf download {self.params.path}` fetches what is not in the cache"
                )
                raise ConfigError(
                    f"no folder {folder}: model.path must name a whole pipeline in diffusers' format{way_out}"
                )
        return found

    def hash_of(self, name: str) -> str:
        """The content hash of one component."""
        return self._hashed([name])[name]

    def hashes(self, names: Iterable[str]) -> dict[str, str]:
        """Content hashes of components, by name: of the files that are read to open them.

        Raises ConfigError when one does not exist.
        """
        return self._hashed(sorted(self.parts(*names)))

    def scheduler_hash(self) -> str:
        """sha256 of the scheduler's configuration as canonical JSON, without the version that wrote it."""
        config = {name: value for name, value in self.scheduler_config.items() if name != "_diffusers_version"}
        return hashlib.sha256(json.dumps(config, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def check(self, expected: Mapping[str, str]) -> None:
        """Compares weights and vocabularies with a recipe's: another machine may have others at the same path.

        Raises ConfigError when a component differs.
        """
        found = self.hashes(expected)
        if other := sorted(name for name, value in expected.items() if found.get(name) != value):
            raise ConfigError(
                f"{self.root / other[0]} holds other weights than the shard set's recipe names: "
                "give every worker the same model, or start the rollout again for the new one"
            )

    def pinned(self, decoder_alone: bool = False) -> ModelFolder:
        """The same folder with absolute local paths and, for a hub repository, the commit that was fetched.

        So every worker finds the same files. `decoder_alone`: of a hub repository only the decoder is fetched.
        """
        path, network = self.params.path, self.params.transformer
        found = self.decoder_root if decoder_alone else self.root
        revision = self.params.revision if self.is_local else found.name
        changes: dict[str, Any] = {"path": absolute_if_local(path), "revision": revision}
        changes[NETWORK] = network and absolute_if_local(network)
        changes["loras"] = self.params.loras if decoder_alone else tuple(lora.pinned for lora in self.loras)
        pinned = ModelFolder(self.params.model_copy(update=changes))
        names = ("index_root", "decoder_root") if decoder_alone else ("index_root", "root", "decoder_root")
        pinned.__dict__.update(dict.fromkeys(names, found.absolute()))  # so that a hub is asked once
        return pinned

    def _part(self, name: str) -> Path:
        """The path of a component, which need not exist. The network may lie elsewhere (`model.transformer`)."""
        if name == NETWORK and self.params.transformer is not None:
            return whole_network(Path(self.params.transformer))
        return (self.decoder_root if name == DECODER else self.root) / name

    def _hashed(self, names: list[str]) -> dict[str, str]:
        """Looks all components up first: hashing takes minutes."""
        if unknown := {name: self._part(name) for name in names if name not in self._hashes}:
            loras = self.loras if NETWORK in unknown else ()
            self._hashes |= {name: hash_files(opened_files(path, name), path) for name, path in unknown.items()}
            if loras:
                self._hashes[NETWORK] = fused_hash(self._hashes[NETWORK], loras)
        return {name: self._hashes[name] for name in names}


@dataclass(frozen=True)
class FoundLora:
    """A LoRA of `model.loras`: its file, and its parameters with a path for any folder and the hub's commit."""

    path: Path
    pinned: FusedLora


def find_lora(lora: FusedLora) -> FoundLora:
    """Looks up a file, a folder's `LORA_FILE` or a hub's; raises ConfigError if there is none."""
    found, revision = resolve_checkpoint(lora.path, lora.revision, (LORA_FILE,))
    changes = {"path": absolute_if_local(lora.path), "revision": revision}
    return FoundLora(find_checkpoint(found, (LORA_FILE,)).absolute(), lora.model_copy(update=changes))


def fused_hash(network: str, loras: Iterable[FoundLora]) -> str:
    """The hash of a network with LoRAs in it: of its own, and each file's content and weight, in their order."""
    parts = [network, *(f"{hash_content(lora.path)} {lora.pinned.weight!r}" for lora in loras)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def whole_network(folder: Path) -> Path:
    """The folder. Raises ConfigError if it holds no whole network."""
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"no network in {folder}: model.transformer names the folder of a whole one, such as "
            "runs/rats/student; adapters are merged into one by `rats export`"
        )
    return folder
