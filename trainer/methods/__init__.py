"""Few-step methods, one file each, all of one signature (`trainer.objective.Method`).

A method is called once for each micro-batch. Given the objective, the batch and the moment, it returns the `Losses`,
one value for each sample. It samples the student itself (`objective.sample`) if it needs to: a method whose loss uses
only stored states does not pay for a path of the student.

What it draws at random it draws by `randomness.generator`, keyed by the moment and a sample's place in the batch, so
that micro-batches and a resume change nothing. A method with networks of its own, such as a critic, is an object that
is called like a function and has the methods of `trainer.run.MovingTeacher` as well. By them the run lets it make its
own update after the student's, and keeps its state in every checkpoint.
"""

from rats.trainer.methods import rats
from rats.trainer.objective import Method

METHODS: dict[str, Method] = {"rats": rats.losses}
