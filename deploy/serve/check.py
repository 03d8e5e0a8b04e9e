"""Whether an answer keeps to the task: one of its labels, its label field, its JSON schema."""

from __future__ import annotations

from deploy.serve.parameters import Json
from unshot.contracts.task import Task, schema_check
from unshot.metrics.answers import INVALID


class Checker:
    """The check of one task. `active` False means that any answer will do, and none is held back for it."""

    def __init__(self, task: Task | None, schema: Json | None = None) -> None:
        labelled = task is not None and (task.labels is not None or task.answer_field is not None)
        self.task = task if labelled else None
        if schema is None and task is not None:
            schema = task.answer_schema
        self._faults = [schema_check(schema)] if schema is not None else []

    @property
    def active(self) -> bool:
        return self.task is not None or bool(self._faults)

    @property
    def closed(self) -> bool:
        """Whether a label is one of a known set, and not whatever the model wrote."""
        return self.task is not None and self.task.labels is not None

    def with_schema(self, schema: Json | None) -> Checker:
        """The check of a request that asks for a schema of its own too."""
        if schema is None:
            return self
        found = Checker(self.task)
        found._faults = [*self._faults, schema_check(schema)]
        return found

    def check(self, text: str) -> tuple[bool | None, str | None]:
        """`(whether the answer keeps to the task, the label that it states)`; None where there is no such thing."""
        label = self.task.label(text) if self.task is not None else None
        ok = None if label is None else label != INVALID
        if self._faults and ok is not False:
            ok = all(fault(text) is None for fault in self._faults)
        return ok, label if label != INVALID else None
