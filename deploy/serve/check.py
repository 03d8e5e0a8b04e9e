"""Whether an answer keeps to the task: one of its labels, its label field, its JSON schema."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Protocol

from deploy.serve.parameters import Json
from unshot.contracts.task import Task
from unshot.data.rows import read_text
from unshot.errors import InputError
from unshot.metrics.answers import INVALID

FENCE = re.compile(r"```(?:json)?\s*(.*?)\s*```", flags=re.DOTALL)


class Validator(Protocol):
    """A JSON schema's check."""

    def is_valid(self, instance: object) -> bool: ...


class Checker:
    """The check of one task. `active` False means that any answer will do, and none is held back for it."""

    def __init__(self, task: Task | None, schema: Json | None = None) -> None:
        labelled = task is not None and (task.labels is not None or task.answer_field is not None)
        self.task = task if labelled else None
        self._validators = [_validator(schema)] if schema is not None else []

    @property
    def active(self) -> bool:
        return self.task is not None or bool(self._validators)

    @property
    def closed(self) -> bool:
        """Whether a label is one of a known set, and not whatever the model wrote."""
        return self.task is not None and self.task.labels is not None

    def with_schema(self, schema: Json | None) -> Checker:
        """The check of a request that asks for a schema of its own too."""
        if schema is None:
            return self
        found = Checker(self.task)
        found._validators = [*self._validators, _validator(schema)]
        return found

    def check(self, text: str) -> tuple[bool | None, str | None]:
        """`(whether the answer keeps to the task, the label that it states)`; None where there is no such thing."""
        label = self.task.label(text) if self.task is not None else None
        ok = None if label is None else label != INVALID
        if self._validators and ok is not False:
            ok = self._keeps_schema(text)
        return ok, label if label != INVALID else None

    def _keeps_schema(self, text: str) -> bool:
        fenced = FENCE.fullmatch(text.strip())
        try:
            value = json.loads(fenced[1] if fenced else text)
            return all(v.is_valid(value) for v in self._validators)
        except (ValueError, RecursionError):
            return False
        except Exception:  # a reference that leads nowhere, and what else a schema's check may raise
            return False


def read_schema(path: Path) -> Json:
    """A JSON schema file. Raises `InputError` where it is none."""
    try:
        schema = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error}); `answer_schema` names a JSON schema") from None
    if not isinstance(schema, dict):
        raise InputError(f"{path}: not a JSON schema (an object)")
    try:
        _validator(schema)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return schema


def _validator(schema: Json) -> Validator:
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import validator_for

    kind = validator_for(schema)
    try:
        kind.check_schema(schema)
    except SchemaError as error:
        raise InputError(f"not a valid JSON schema ({error.message})") from None
    found: Validator = kind(schema)
    return found
