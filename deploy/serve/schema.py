"""Whether a client's JSON schema can be held to: as a grammar of a model server, and by a check whose work is bounded.

A schema is somebody else's program. A grammar that refers to itself without end, or repeats something a billion times,
ends a model server; subschemas that refer to each other double the work of a check with every level.
"""

from __future__ import annotations

import msgspec

Json = dict[str, object]
SIZE = 20_000
# Subschemas when every reference is written out; repetitions that a grammar can hold.
PARTS = 1000
REPEATED = 1000
# Keywords that a grammar can hold and whose check is quick: no patterns, nothing fetched.
KEYWORDS = {
    "type", "properties", "required", "items", "enum", "const", "anyOf", "allOf", "oneOf", "additionalProperties",
    "minItems", "maxItems", "minLength", "maxLength", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum",
    "multipleOf", "title", "description", "default", "examples", "format", "$defs", "definitions", "$ref", "$schema",
    "nullable",
}  # fmt: skip
NAMED = ("properties", "$defs", "definitions")
BRANCHES = ("anyOf", "allOf", "oneOf")
VALUES = ("enum", "const", "default", "examples")
COUNTS = ("minItems", "maxItems", "minLength", "maxLength")
# What may stand beside a reference: nothing that applies to the same value once more.
BESIDE_REFERENCE = {"$ref", "title", "description", "default", "examples", "$defs", "definitions", "$schema"}


class BadSchema(ValueError):
    """What is wrong with a schema, as the end of a sentence that begins with its name."""


def check_schema(schema: Json) -> None:
    """Raise `BadSchema` unless an answer can be held to a schema here."""
    if len(msgspec.json.encode(schema)) > SIZE:
        raise BadSchema(f"has more than {SIZE} bytes")
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import Draft202012Validator

    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        raise BadSchema(f"is not a JSON schema ({error.message[:120]})") from None
    _check_keywords(schema)
    _Walk(schema).check()


def _check_keywords(schema: Json) -> None:
    rest: list[object] = [schema]
    while rest:
        one = rest.pop()
        if isinstance(one, list):
            rest += one
        if not isinstance(one, dict):
            continue
        for key, value in one.items():
            if key not in KEYWORDS:
                raise BadSchema(f"holds the keyword `{key[:40]}`, which is not supported")
            if key == "$ref" and _referred(schema, value) is None:
                raise BadSchema("holds a `$ref` that does not name a part of the schema under `$defs`")
            if key == "$ref" and not set(one) <= BESIDE_REFERENCE:
                raise BadSchema("holds a `$ref` with other rules beside it; put them into what it names")
            if key in COUNTS and isinstance(value, int | float) and value > REPEATED:
                raise BadSchema(f"asks for `{key}` {value:g}; {REPEATED} is the most")
            if key in NAMED and isinstance(value, dict):
                rest += value.values()
            elif key not in VALUES:
                rest.append(value)


def _referred(schema: Json, reference: object) -> object | None:
    """What `#/$defs/NAME` names; None where it names nothing."""
    parts = str(reference).split("/")
    if len(parts) != 3 or parts[0] != "#" or parts[1] not in ("$defs", "definitions"):
        return None
    held = schema.get(parts[1])
    return held.get(parts[2]) if isinstance(held, dict) else None


class _Walk:
    """Follows the references of a schema as a check or a grammar does."""

    def __init__(self, schema: Json) -> None:
        self.schema = schema
        self.count = 0

    def check(self) -> None:
        """Raise `BadSchema` where the work is not bounded by the length of the answer."""
        self._parts(self.schema, (), ())

    def _parts(self, one: object, open_names: tuple[str, ...], here: tuple[str, ...]) -> frozenset[str]:
        """Count a subschema with all that it refers to; the open references that it leads back to.

        `open_names` are the references under way, `here` those of them that apply to the very same value.
        """
        self.count += 1
        if self.count > PARTS:
            raise BadSchema(f"has more than {PARTS} parts when its references are written out")
        if not isinstance(one, dict):
            return frozenset()
        reference = one.get("$ref")
        if reference is not None:
            name = str(reference)
            if name in here:
                raise BadSchema(f"refers to `{name[:60]}` in a circle, without any value in between")
            if name in open_names:
                return frozenset((name,))
            return self._parts(_referred(self.schema, name), (*open_names, name), (*here, name)) - {name}
        inner = [part for key in ("items", "additionalProperties") if isinstance(part := one.get(key), dict)]
        properties = one.get("properties")
        inner += list(properties.values()) if isinstance(properties, dict) else []
        back = [frozenset(n for part in inner for n in self._parts(part, open_names, ()))]
        for key in BRANCHES:
            branches = one.get(key)
            for branch in branches if isinstance(branches, list) else []:
                back.append(self._parts(branch, open_names, here))
        if sum(1 for names in back if names) > 1:
            raise BadSchema(
                "refers to itself in several branches of one choice; the check of an answer would not end"
            )
        return frozenset().union(*back)
