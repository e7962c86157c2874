"""The witness: which evaluations it counts, which latents it knows again, and what it leaves alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.modules import module as torch_module

from rats.stages.train.teacher_calls import PENDING, CountedStream, CountedStudent, TeacherCallCounter, fingerprints
from tests.support.toy import Network, ToyStream, ToyStudent

NOTHING = {"c": torch.zeros(1, 4)}


def ask(student: ToyStudent) -> None:
    student.velocity(torch.zeros(1, 3, 4), 1.0, NOTHING)


class Sharded(Network):
    """What FSDP does to a network: a class of its own, made from the network's."""


def test_the_witness_tells_the_students_evaluations_from_another_networks_of_its_class():
    witness, student, teacher, sharded = TeacherCallCounter(), ToyStudent(), ToyStudent(seed=7), ToyStudent(seed=8)
    sharded.network.__class__ = Sharded
    with witness.watching(student.network):
        for asked in (student, teacher, student, student, sharded, teacher):
            ask(asked)
        late = ToyStudent(seed=9)  # made inside the block
        ask(late)
    ask(teacher)
    assert (witness.student_forwards, witness.teacher_forwards) == (3, 4)


def test_a_whole_teacher_of_a_sharded_student_is_seen():
    witness, student, teacher = TeacherCallCounter(), ToyStudent(), ToyStudent(seed=7)
    student.network.__class__ = Sharded
    with witness.watching(student.network):
        ask(student), ask(teacher), ask(teacher)
    assert (witness.student_forwards, witness.teacher_forwards) == (1, 2)


def test_no_other_class_is_hooked_and_the_networks_own_is_as_it_was_afterwards():
    witness, student, other = TeacherCallCounter(), ToyStudent(), nn.Linear(2, 3)
    plain, before = nn.Module.__call__, dict(vars(Network))
    assert "__call__" not in before
    with pytest.raises(ZeroDivisionError), witness.watching(student.network):
        assert nn.Module.__call__ is plain and type(other).__call__ is plain
        assert not torch_module._global_forward_pre_hooks and not torch_module._global_forward_hooks
        raise ZeroDivisionError
    assert dict(vars(Network)) == before


def test_two_witnesses_of_one_class_count_each_for_itself():
    outer, inner, student, teacher = TeacherCallCounter(), TeacherCallCounter(), ToyStudent(), ToyStudent(seed=7)
    with outer.watching(student.network):
        with inner.watching(teacher.network):
            ask(student), ask(teacher), ask(teacher)
        ask(student)
    assert (outer.student_forwards, outer.teacher_forwards) == (2, 2)
    assert (inner.student_forwards, inner.teacher_forwards) == (2, 1)


def test_the_witness_sees_a_teacher_sample_that_is_scored():
    witness = TeacherCallCounter()
    student, stream = CountedStudent(ToyStudent(), witness), CountedStream(ToyStream(), witness)
    sample = stream.take()[2]
    student.decode(torch.stack([sample.x_HTC[-1].float(), sample.x_HTC[0].float()]))
    assert witness.teacher_reward_calls == 1


def test_every_scored_teacher_sample_is_counted_however_many_there_are():
    witness = TeacherCallCounter()
    student, stream = CountedStudent(ToyStudent(), witness), CountedStream(ToyStream(), witness)
    finals_BTC = torch.stack([sample.x_HTC[-1] for sample in stream.take()])
    for _ in range(PENDING + 3):
        student.decode(torch.cat([finals_BTC[:2].float(), torch.randn(1, 3, 4)]))
    assert witness.teacher_reward_calls == 2 * (PENDING + 3) == witness.teacher_reward_calls


def test_a_fingerprint_is_of_the_float16_bits_alone_and_one_bit_of_one_element_changes_it():
    x_BTC = torch.randn(5, 3, 4).half()
    marks = fingerprints(x_BTC).tolist()
    assert fingerprints(x_BTC.float().requires_grad_()).tolist() == marks and len(set(marks)) == 5
    assert fingerprints(x_BTC[2:3]).tolist() == marks[2:3]
    swapped = x_BTC.clone()
    swapped[:, 0, :2] = x_BTC[:, 0, :2].flip(1)
    assert not set(fingerprints(swapped).tolist()) & set(marks)
    for bit in range(16):
        flipped = x_BTC[:1].clone()
        flipped.view(torch.int16)[0, 2, 1] ^= torch.tensor(1 << bit).to(torch.int16)
        assert fingerprints(flipped).tolist() != marks[:1], bit


def test_latents_of_a_pictures_size_have_fingerprints_of_their_own():
    x_BTC = torch.randn(1, 4096, 64).half()
    near_BTC = x_BTC.repeat(40, 1, 1)
    near_BTC[range(40), range(40), 5] += 0.5
    assert len(set(fingerprints(torch.cat([x_BTC, near_BTC])).tolist())) == 41


@pytest.mark.gpu
def test_a_fingerprint_is_the_same_on_a_gpu_as_where_the_stored_final_was_read():
    x_BTC = torch.randn(5, 4096, 64)
    assert fingerprints(x_BTC.cuda()).tolist() == fingerprints(x_BTC.half()).tolist()
