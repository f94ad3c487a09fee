"""Any file of trajectories as a benchmark: the question straight, without the steps, as `pearl-train` words it."""

from __future__ import annotations

from collections.abc import Iterator

from pearl.evaluation.benchmarks.base import Benchmark, BenchmarkError, first_of_each
from pearl.evaluation.records import Question
from pearl.parquet import read_trajectories
from pearl.records import Trajectory
from pearl.trainer.conversation import Conversation, Template, load_template

TEMPLATE = "pearl"


class Trajectories(Benchmark):
    """`trajectories=DATA`, a file, folder, glob or Hub id, of splits one (`DATA:test`): what was kept out of training, say.
    Category: the skill."""

    name = "trajectories"
    version = 1

    def questions(self) -> tuple[Question, ...]:
        if self.place is None:
            raise BenchmarkError("say which: trajectories=DATA, a Parquet file, folder, glob or Hub id")
        if self.scoring != "strict":
            raise BenchmarkError(f"trajectories have options in words, which the scoring {self.scoring!r} cannot read")
        return tuple(first_of_each(self._questions(self.place), self.count))

    def _questions(self, place: str) -> Iterator[Question]:
        template = load_template(TEMPLATE)
        for row, trajectory in enumerate(read_trajectories(place, one_split=True)):
            if trajectory.answer not in trajectory.choices:
                raise BenchmarkError(
                    f"{place} row {row} ({trajectory.id}): the answer {trajectory.answer!r} is not one of its options"
                )
            yield question_of(trajectory, template, self.name)


def question_of(trajectory: Trajectory, template: Template, benchmark: str) -> Question:
    """
    Raises:
        ValueError: the answer is not one of the options.
    """
    parts = Conversation(trajectory, template).question()[-1].parts
    prompt = "".join(part for part in parts if isinstance(part, str))
    answer = trajectory.choices.index(trajectory.answer)
    return Question(trajectory.id, benchmark, trajectory.skill, (trajectory.image,), prompt, trajectory.choices, answer)
