"""Opens the parts of a model that a stage needs. The family names the classes, the folder holds the weights."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from rats.pipeline.families.base import Family
from rats.pipeline.families.fit import check_fit, part_configs
from rats.pipeline.families.index import check_index
from rats.pipeline.families.models import FamilyDecoder, FamilyStudent, FamilyTeacher, FamilyText
from rats.pipeline.lengths import Lengths, read_lengths
from rats.pipeline.weights.files import check_layout
from rats.pipeline.weights.folder import SCHEDULER, ModelFolder
from rats.pipeline.weights.fuse import fuse_loras
from rats.pipeline.weights.hashes import NETWORK
from rats.pipeline.weights.loading import (
    META,
    apply_kernels,
    load_component,
    load_pipeline,
    load_tokenizer,
    outline_component,
    quiet_notices,
    torch_device,
)
from rats.pipeline.weights.lora import add_lora, is_lora, load_lora
from rats.pipeline.weights.opening import opening, stock_class
from rats.schemas.params import ComputeParams, ModelParams, Params, TeacherParams
from rats.schemas.plugins import FAMILIES, load_plugin
from rats.schemas.recipe import DECODER
from rats.schemas.train_params import LoraParams


@dataclass(eq=False)
class Model:
    """The model that the parameters name. Its parts are opened by its methods.

    Making one reads no file. The folder is looked up, read and hashed at the first use, and only once. A pickled Model
    holds the parameters alone: where it is unpickled, everything is looked up again.
    """

    params: ModelParams
    teacher: TeacherParams
    compute: ComputeParams
    shared: ModelFolder | None = field(default=None, repr=False)
    """The folder of another Model with the same path, revision and transformer, so that nothing is read twice."""

    @classmethod
    def of(cls, params: Params) -> Model:
        """The model of the whole configuration `params`."""
        return cls(params.model, params.teacher, params.compute)

    def __reduce__(self) -> tuple[Any, ...]:
        """The parameters alone."""
        return Model, (self.params, self.teacher, self.compute)

    def using(self, *, teacher: TeacherParams | None = None, compute: ComputeParams | None = None) -> Model:
        """The same files with other settings of the teacher or of the computation."""
        return Model(self.params, teacher or self.teacher, compute or self.compute, self._files)

    def pinned(self, decoder_alone: bool = False) -> Model:
        """The same files, with paths and revision as `ModelFolder.pinned` makes them."""
        files = self._files.pinned(decoder_alone)
        return Model(files.params, self.teacher, self.compute, files)

    @cached_property
    def _files(self) -> ModelFolder:
        return self.shared or ModelFolder(self.params)

    @cached_property
    def family(self) -> type[Family]:
        """The class that `model.family` names. Raises ConfigError when it cannot be imported."""
        cls: type[Family] = load_plugin(FAMILIES, self.params.family)
        return cls

    @cached_property
    def folder(self) -> ModelFolder:
        """The model's folder. If it has a model_index.json, it must be of the family's pipeline."""
        files = self._fitting()
        _ = files.root  # of a hub, the rest
        return files

    @cached_property
    def decoder_folder(self) -> ModelFolder:
        """The same folder, of which only the decoder has to exist. Of a hub repository only the decoder is fetched."""
        return self._fitting()

    def _fitting(self) -> ModelFolder:
        """Of a hub repository, model_index.json alone is fetched and checked, before tens of GB are."""
        check_layout(self.params, self.family.network_class.__name__)
        check_index(self.params, self.family, self._files.index)
        return self._files

    def hashes(self) -> dict[str, str]:
        """Content hashes of all components that the family opens, by name."""
        return self.folder.hashes((NETWORK, DECODER, *self.family.encoders, *self.family.tokenizers))

    def examined(self) -> FamilyTeacher:
        """The teacher as a stage opens it, without the values of its weights: on torch's meta device.

        Reads every configuration, every tokenizer and the headers of all weights. Raises what `open_teacher` raises.
        """
        compute = self.compute.model_copy(update={"device": META, "compile": False})
        return self.using(compute=compute).open_teacher()

    def _check_fit(self, student: Path | None = None) -> None:
        """Compares the parts' classes, channels and widths by their configurations, if all parts are there.

        `student`: the folder of a whole network in place of the model's. Raises ConfigError when they are not of one
        pipeline, DataError when a configuration is damaged.
        """
        family, folder = self.family, self.folder
        if not all((folder.root / name).is_dir() for name in family.encoders):
            return  # who needs the encoders asks for them
        classes = {NETWORK: family.network_class, DECODER: family.vae_class, **family.encoders}
        folders = folder.parts(*classes)
        if student is not None and not is_lora(student):
            folders[NETWORK] = student
        check_fit(family.fits(part_configs(classes, folders)))

    @cached_property
    def outline(self) -> FamilyStudent:
        """A student without weights, on torch's meta device. It is shared: copy it before changing it."""
        parts = self.folder.parts(NETWORK, DECODER)
        self._check_fit()
        network = outline_component(self.family.network_class, parts[NETWORK])
        fuse_loras(network, self.family.pipeline_class, self.folder.loras)
        vae = outline_component(self.family.vae_class, parts[DECODER])
        family = self._family_of(vae, parts[DECODER])
        student = FamilyStudent(family, network, vae, self.scheduler())
        student.rehearse(parts[NETWORK])
        return student

    def _family_of(self, vae: Any, folder: Path) -> Family:
        """The family at the teacher's resolution, which it takes from the decoder's configuration."""
        with opening(folder, f"the decoder of a {self.family.__name__}"):
            return self.family(self.teacher, vae)

    def scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        """The pipeline's scheduler in the form in which the family samples by it."""
        with opening(self.folder.parts(SCHEDULER)[SCHEDULER], "a scheduler"), quiet_notices():
            return self.family.scheduler(self.folder.scheduler_config)

    def sigmas(self, counts: Iterable[int]) -> dict[int, tuple[float, ...]]:
        """The grid of each number of steps, as the scheduler makes it now: `FamilyStudent.stock_sigmas`."""
        return {steps: tuple(self.outline.stock_sigmas(steps)) for steps in counts}

    def call(self) -> dict[str, int | float]:
        """The arguments of the pipeline's call as in training, besides prompt and number of steps."""
        return self.family.call(self.teacher)

    def open_student(
        self, transformer: Path | None = None, lora: LoraParams | None = None, seed: int = 0
    ) -> FamilyStudent:
        """Loads transformer, VAE and scheduler, and no text encoder.

        `transformer` is the folder of a trained student. It holds a whole network, which replaces the pipeline's, or
        adapters for the pipeline's network. The network can be trained. With `lora`, only new adapters can; `seed`
        decides their initial weights.
        """
        student = FamilyStudent(*self._sampling_parts(transformer))
        if lora is not None:
            add_lora(student.network, lora, self.family.lora_targets, seed)
        return student

    def open_teacher(self) -> FamilyTeacher:
        """Loads the whole pipeline, frozen."""
        parts = self._sampling_parts(None)
        return FamilyTeacher(*parts, FamilyText(parts[0], self._text_parts()))

    def open_decoder(self) -> FamilyDecoder:
        """Loads the VAE. The other parts of the model need not exist."""
        parts = self.decoder_folder.parts(DECODER)
        vae = load_component(self.family.vae_class, parts[DECODER], self.params, self.compute)
        return FamilyDecoder(self._family_of(vae, parts[DECODER]), vae)

    def open_text(self) -> FamilyText:
        """Loads the text encoders, and nothing else."""
        self._check_fit()
        folder = self.folder.parts(DECODER)[DECODER]
        family = self._family_of(outline_component(self.family.vae_class, folder), folder)
        return FamilyText(family, self._text_parts())

    def lengths(self, prompts: Sequence[str], guided: bool = True) -> Lengths:
        """What the text encoders read of different prompts, and of the negative prompt where it is used.

        Opens the tokenizers alone. `guided`: whether the prompts are for the teacher.
        """
        family, tokenizers = self.outline.family, self._tokenizers({})
        negative = self.teacher.negative_prompt if guided and self.teacher.true_cfg_scale > 1 else None
        with opening(self.folder.root, "a pipeline with its tokenizers"):
            return read_lengths(family.windows(tokenizers), prompts, negative)

    def open_live_teacher(self, student: FamilyStudent) -> FamilyTeacher:
        """A teacher with the student's decoder and a copy of its network as it is now, guided as `self.teacher` says.

        The text encoders are loaded only if there is guidance against a negative prompt, and freed after encoding it.
        """
        family = self.family(self.teacher, student.vae)
        text = FamilyText(family, self._text_parts()) if self.teacher.true_cfg_scale > 1 else None
        network = copy.deepcopy(student.network)
        apply_kernels(network, self.compute)
        live = FamilyTeacher(family, network, student.vae, student.scheduler, text)
        live.forget_encoders()
        return live

    def open_pipeline(self, student: Path | None = None) -> Any:
        """The stock diffusers pipeline on the CPU, with the network or adapters in the folder `student` if given.

        Its parts are opened as everywhere else; what other parts model_index.json names, diffusers opens.
        """
        on_cpu = self.using(compute=self.compute.model_copy(update={"device": "cpu", "compile": False}))
        parts = on_cpu._stock_parts(student)
        folder = self.folder.root if self.folder.index else None
        return load_pipeline(self.family.pipeline_class, folder, self.params.dtype, parts)

    def _stock_parts(self, student: Path | None) -> dict[str, Any]:
        """The components of the pipeline by name, of classes that diffusers can save."""
        vae_class, folder = stock_class(self.family.vae_class), self.folder.parts(DECODER)[DECODER]
        return {
            SCHEDULER: self.scheduler(),  # the family may sample by another one
            DECODER: load_component(vae_class, folder, self.params, self.compute),
            **self._text_parts(),
            NETWORK: self._network(student),
        }

    def rebuilt_network(self, weights: dict[str, Tensor], lora: LoraParams | None) -> nn.Module:
        """A network with these trained weights (CPU tensors by name), for saving. With `lora`, they are its adapters.

        The network in training cannot be saved as it is: it may be sharded, and it is in float32 where `model.dtype` is
        not. This one is built on the CPU, since the device's memory is full.
        """
        network = self.base_network()
        if lora is not None:
            add_lora(network, lora, self.family.lora_targets, seed=0)  # all of them are replaced
        network.load_state_dict(weights, strict=lora is None)
        return network

    def base_network(self, dtype: str | None = None) -> nn.Module:
        """The pipeline's network on the CPU, in the model's dtype or another one."""
        params = self.params.model_copy(update={"dtype": dtype or self.params.dtype})
        return Model(params, self.teacher, ComputeParams(), self.folder)._fused_base()

    def _sampling_parts(
        self, student: Path | None
    ) -> tuple[Family, nn.Module, nn.Module, FlowMatchEulerDiscreteScheduler]:
        """Loads the network last, so that wrong settings are found before it."""
        parts, scheduler = self.folder.parts(DECODER, NETWORK), self.scheduler()
        self._check_fit(student)
        vae = load_component(self.family.vae_class, parts[DECODER], self.params, self.compute)
        family = self._family_of(vae, parts[DECODER])
        network = self._network(student)
        apply_kernels(network, self.compute)
        return family, network, vae, scheduler

    def _network(self, student: Path | None) -> Any:
        """The base, a student's whole network in its place, or the base with a student's adapters."""
        if student is not None and not is_lora(student):
            return load_component(self.family.network_class, student, self.params, self.compute)
        network = self._fused_base()
        if student is not None:
            load_lora(network, student)
        return network

    def _fused_base(self) -> Any:
        """The pipeline's network with `model.loras` in it, which are added on the CPU: the same bits on any device."""
        cls, base, loras = self.family.network_class, self.folder.parts(NETWORK)[NETWORK], self.folder.loras
        first = self.compute if not loras or self.compute.device == META else ComputeParams(device="cpu")
        network = load_component(cls, base, self.params, first)
        fuse_loras(network, self.family.pipeline_class, loras)
        return network.to(torch_device(self.compute.device))

    def _text_parts(self) -> dict[str, Any]:
        """The text encoders and their tokenizers by name."""
        classes = self.family.encoders
        parts = self.folder.parts(*classes, *self.family.tokenizers)  # all are looked for before one is loaded
        encoders = {name: load_component(cls, parts[name], self.params, self.compute) for name, cls in classes.items()}
        return encoders | self._tokenizers(encoders)

    def _tokenizers(self, encoders: Mapping[str, Any]) -> dict[str, Any]:
        """All tokenizers by name, checked against those text encoders that are there."""
        parts = self.folder.parts(*self.family.tokenizers)
        tokenizers = {name: self._tokenizer(name, parts[name], encoders) for name in self.family.tokenizers}
        with opening(self.folder.root, "a pipeline with its tokenizers"):
            self.family.check_tokenizers(tokenizers)
        return tokenizers

    def _tokenizer(self, name: str, folder: Path, encoders: Mapping[str, Any]) -> Any:
        """The tokenizer `name`, checked against the text encoder of the same number."""
        encoder = encoders.get(name.replace("tokenizer", "text_encoder"))
        config = None if encoder is None else encoder.config.get_text_config()
        return load_tokenizer(self.family.tokenizers[name], folder, config)
