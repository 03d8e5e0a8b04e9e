"""On-policy distillation: the student's own samples, scored by the teacher, with the reverse KL divergence.

Generalised knowledge distillation (GKD, Agarwal et al. 2024, arXiv 2306.13649): from the second epoch on, half of the
training rows carry an answer that the student has just sampled under the short prompt; at its tokens the student is
drawn towards what the prompted base would say there, and away from what that would not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tune.assess.forgetting import untuned
from tune.batches import Taught
from tune.distil import TeacherAnswer, ask, key, load_answers, save_answers, scored
from tune.job import Job, request
from tune.loss import core
from tune.split import order
from unshot.data.rows import Example
from unshot.text.chat import Encoded

# Share of the rows that an epoch samples anew.
SHARE = 0.5
TEMPERATURE = 1.0


@dataclass(frozen=True)
class OnPolicy:
    """The rows of an epoch, `rows` being those of the teacher's own answers. An epoch's samples are kept in `work`."""

    job: Job
    net: Any
    work: Path

    def rows(self, epoch: int) -> Sequence[Encoded]:
        """The training rows, half of them with the student's own answers from the second epoch on."""
        rows = list(self.job.train_rows)
        examples = self.job.extras.train
        if epoch == 0:
            return rows
        seed = self.job.config.seed
        ranked = sorted(range(len(examples)), key=lambda i: order(seed + epoch, key(examples[i])))
        chosen = sorted(ranked[: max(1, round(SHARE * len(examples)))])
        path = self.work / f"on-policy-{epoch}-{self.job.config.fingerprint[:16]}.safetensors"
        if not path.is_file():
            save_answers(path, self._sampled([examples[i] for i in chosen], epoch))
        for index, answer in zip(chosen, load_answers(path), strict=True):
            prompt = self._short(examples[index])
            rows[index] = Taught([*prompt, *answer.ids], len(prompt), answer.soft, reverse=True)
        return rows

    def _short(self, row: Example) -> list[int]:
        return self.job.chat.prompt_ids(request(row, self.job.task))

    def _sampled(self, rows: Sequence[Example], epoch: int) -> list[TeacherAnswer]:
        """The student's answers to rows, with the teacher's distributions at their tokens."""
        job, teaching = self.job, self.job.teaching
        assert teaching is not None
        said = ask(
            core(self.net), [self._short(row) for row in rows], end=job.chat.end,
            max_tokens=job.task.max_answer_tokens or 64, temperature=TEMPERATURE,
            seed=1_000_003 * (job.config.seed + 1) + epoch,
        )  # fmt: skip
        with untuned(self.net):
            soft = scored(core(self.net), [teaching.prompts[key(row)] for row in rows], [a.ids for a in said])
        return [TeacherAnswer(answer.ids, own) for answer, own in zip(said, soft, strict=True)]
