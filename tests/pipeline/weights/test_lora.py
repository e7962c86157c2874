"""Adapters of a tiny FLUX: what trains, what is saved, and that nothing is lost on the way back."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rats.pipeline.families.flux import Flux
from rats.pipeline.families.models import FamilyStudent
from rats.pipeline.families.open import Model
from rats.pipeline.weights.lora import WEIGHTS, add_lora, is_lora, merge_lora, save_lora
from rats.schemas.errors import ConfigError, DataError
from rats.schemas.params import ComputeParams, ModelParams, Params, TeacherParams
from rats.schemas.train_params import LoraParams, TrainParams
from rats.stages.train.train import save_student
from rats.trainer.optim import Learner
from tests.support import tiny

LORA = LoraParams(rank=4, alpha=6.0)
SETTINGS = TrainParams(reward="r", lora=LORA, lr=1e-2, warmup=0)
FLUX_LINEARS = 12 + 3
"""Adapted modules of one block of each kind: all of the list in the first, queries, keys and values in the second."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_flux(tmp_path_factory.mktemp("flux"))


def open_(base: Path, dtype: str = "float32", **options: object) -> FamilyStudent:
    teacher = TeacherParams(height=tiny.SIZE, width=tiny.SIZE, max_sequence_length=tiny.LENGTH)
    return Model(ModelParams(path=str(base), dtype=dtype), teacher, ComputeParams()).open_student(**options)


def velocity(student: FamilyStudent) -> Tensor:
    random = torch.Generator().manual_seed(3)
    x, prompt, pooled = (torch.randn(2, *shape, generator=random) for shape in ((4, 16), (tiny.LENGTH, 16), (16,)))
    return student.velocity(x, 0.7, {"prompt_embeds": prompt, "pooled_prompt_embeds": pooled})


def trained(base: Path, steps: int = 3, dtype: str = "float32", settings: TrainParams = SETTINGS) -> Learner:
    """A learner whose adapters have taken a few steps away from the base's velocity."""
    student = open_(base, dtype, lora=settings.lora)
    learner = Learner(student.network, settings)
    target = velocity(student).detach() + 1.0
    for step in range(steps):
        loss = (velocity(student) - target).square().mean()
        learner.accumulate(loss, loss.detach(), split=False)
        learner.update(step, False, refuse=ValueError)
    return learner


def saved(base: Path, learner: Learner, folder: Path, dtype: str = "float32") -> Path:
    params = Params.model_validate(
        {
            "model": {"path": str(base), "dtype": dtype},
            "prompts": {"train": "none.txt"},
            "teacher": {"height": tiny.SIZE, "width": tiny.SIZE},
            "train": learner.settings,
        }
    )
    return save_student(learner, folder, Model.of(params), learner.settings).folder


@pytest.fixture(scope="module")
def moved(base: Path) -> Learner:
    """A learner that the tests look at and leave as it is."""
    return trained(base)


def drawn_by(network: nn.Module, base: Path) -> Tensor:
    student = open_(base)
    student.network = network
    with torch.no_grad():
        return velocity(student)


def test_only_float32_adapters_of_the_whole_list_train_and_the_output_starts_as_the_base_s(base: Path) -> None:
    student, plain = open_(base, lora=LORA), open_(base)
    named = {name: p for name, p in student.network.named_parameters() if p.requires_grad}
    assert len(named) == 2 * FLUX_LINEARS and all("lora_" in name for name in named)
    assert all(min(p.shape) == LORA.rank for p in named.values())
    assert torch.equal(velocity(student), velocity(plain))
    half = open_(base, "bfloat16", lora=LORA).network
    assert {p.dtype for p in half.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in half.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_the_first_weights_follow_from_the_seed_and_no_global_generator_moves(base: Path) -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first, again, other = (open_(base, lora=LORA, seed=seed).network.state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_saved_student_is_the_trained_one_to_the_last_bit_and_not_the_base(base: Path, moved, tmp_path: Path, dtype):
    learner = moved if dtype == "float32" else trained(base, steps=1, dtype=dtype)
    folder = saved(base, learner, tmp_path / "student", dtype)
    again = open_(base, dtype, transformer=folder)
    assert is_lora(folder) and not any(p.requires_grad for p in again.network.parameters())
    own, back = learner.network.state_dict(), again.network.state_dict()
    assert own.keys() == back.keys() and all(torch.equal(own[name], back[name]) for name in own)
    with torch.no_grad():
        assert (velocity(again) - velocity(open_(base, dtype))).abs().max() > 1e-3
    if dtype == "float32":
        assert (velocity(again) - drawn_by(learner.network, base)).abs().max() <= 1e-6


def test_the_file_holds_every_adapter_and_its_rank_and_alpha(moved: Learner, tmp_path: Path) -> None:
    learner, folder = moved, tmp_path
    save_lora(learner.network, folder)
    assert [path.name for path in folder.iterdir()] == [WEIGHTS]
    assert len(load_file(folder / WEIGHTS)) == len(learner.named) == 2 * FLUX_LINEARS
    with safe_open(folder / WEIGHTS, "pt") as file:
        about = json.loads(file.metadata()["lora_adapter_metadata"])
    expected = {"r": 4, "lora_alpha": 6.0, "rank_pattern": {}, "target_modules": sorted(Flux.lora_targets)}
    assert about == {f"transformer.{name}": value for name, value in expected.items()}
    for _ in range(12):  # with two metadata keys every second one differs
        save_lora(learner.network, tmp_path / "again")
        assert (tmp_path / "again" / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()


def test_plain_diffusers_reads_the_file_as_we_do(base: Path, moved: Learner, tmp_path: Path) -> None:
    learner, folder = moved, tmp_path
    save_lora(learner.network, folder)
    network = FluxTransformer2DModel.from_pretrained(base / "transformer")
    network.load_lora_adapter(load_file(folder / WEIGHTS), metadata=metadata_of(folder), adapter_name="any")
    assert (drawn_by(network, base) - drawn_by(learner.network, base)).abs().max() <= 1e-6


def metadata_of(folder: Path) -> dict[str, object]:
    with safe_open(folder / WEIGHTS, "pt") as file:
        return json.loads(file.metadata()["lora_adapter_metadata"])


def test_the_moving_average_is_what_is_saved(base: Path, tmp_path: Path) -> None:
    learner = trained(base, settings=SETTINGS.model_copy(update={"ema": 0.5}))
    own = {name: p.detach().clone() for name, p in learner.named.items()}
    again = open_(base, transformer=saved(base, learner, tmp_path / "student")).network.state_dict()
    assert all(torch.equal(again[name], value) for name, value in learner.ema.items())
    assert any(not torch.equal(again[name], value) for name, value in own.items())
    assert all(torch.equal(p, own[name]) for name, p in learner.named.items())


def test_merged_adapters_are_gone_and_draw_the_same(base: Path, moved: Learner) -> None:
    network = copy.deepcopy(moved.network)
    merge_lora(network)
    assert network.state_dict().keys() == open_(base).network.state_dict().keys()
    assert (drawn_by(network, base) - drawn_by(moved.network, base)).abs().max() <= 1e-5


def rewritten(folder: Path, change: dict[str, Tensor | None], about: dict[str, object] | None) -> Path:
    """The file with other tensors (None: without) and other metadata."""
    state = load_file(folder / WEIGHTS)
    state = {name: tensor for name, tensor in (state | change).items() if tensor is not None}
    metadata = {"lora_adapter_metadata": json.dumps(about)} if about else None
    save_file(state, folder / WEIGHTS, metadata)
    return folder


def test_a_file_that_lacks_adapters_has_more_of_them_or_says_nothing_of_itself_is_refused(
    base: Path, moved, tmp_path: Path
):
    folder = tmp_path
    save_lora(moved.network, folder)
    about = metadata_of(folder)
    name = "transformer.transformer_blocks.0.attn.add_k_proj.lora_A.weight"
    tensor = load_file(folder / WEIGHTS)[name]
    with pytest.raises(
        DataError, match=r"lacks transformer_blocks\.0\.attn\.add_k_proj\.lora_A\.weight, which its own"
    ):
        open_(base, transformer=rewritten(folder, {name: None}, about))
    more = name.replace("blocks.0", "blocks.7")
    with pytest.raises(DataError, match=r"adapts transformer_blocks\.7\.attn\.add_k_proj\.lora_A\.weight, which this"):
        open_(base, transformer=rewritten(folder, {name: tensor, more: tensor.clone()}, about))
    with pytest.raises(DataError, match="of shape"):
        open_(base, transformer=rewritten(folder, {more: None, name: tensor[:, 1:].contiguous()}, about))
    with pytest.raises(DataError, match="does not say its rank"):
        open_(base, transformer=rewritten(folder, {name: tensor}, None))
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-9])
    with pytest.raises(DataError, match="is damaged"):
        open_(base, transformer=folder)


def test_targets_of_ones_own_are_adapted_alone_and_unknown_ones_are_refused() -> None:
    network = tiny.transformer()
    add_lora(network, LoraParams(targets=("proj_mlp",)), Flux.lora_targets, 0)
    assert {name for name, p in network.named_parameters() if p.requires_grad} == {
        f"single_transformer_blocks.0.proj_mlp.lora_{side}.default.weight" for side in "AB"
    }
    with pytest.raises(ConfigError, match="no module of FluxTransformer2DModel is named 'attn.to_z'"):
        add_lora(tiny.transformer(), LoraParams(targets=("attn.to_q", "attn.to_z")), Flux.lora_targets, 0)
    with pytest.raises(ConfigError, match="peft cannot adapt attn"):
        add_lora(tiny.transformer(), LoraParams(targets=("attn",)), Flux.lora_targets, 0)
