"""Whether a client's JSON schema can be held to: as a grammar of a model server, and by a check whose work is bounded.

A schema is somebody else's program. A grammar that refers to itself without end, or repeats something a billion times,
ends a model server; subschemas that refer to each other double the work of a check with every level.
"""

from __future__ import annotations

import json
import math
import re
from typing import cast

import msgspec

Json = dict[str, object]
SIZE = 20_000
# Subschemas when every reference is written out; repetitions and members of one object that a grammar can hold.
PARTS = 1000
REPEATED = 500
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
LIMITS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
# What may stand beside a reference or branches: nothing that applies to the same value once more.
NOTES = {"title", "description", "default", "examples", "$defs", "definitions", "$schema"}
# llama.cpp's own rules by name, which a rule of ours may not be called.
RESERVED = {
    "root", "dot", "space", "char", "string", "number", "integer", "boolean", "null", "value", "object", "array",
    "integral-part", "decimal-part", "uuid", "date", "time", "date-time", "date-string", "time-string",
    "date-time-string",
}  # fmt: skip
# What becomes of a text in JSON that a grammar's literal cannot hold: it ends there, or no token fits it
# (llama-cpp-python 0.3.36, `SchemaConverter._format_literal`, writes all but ASCII as \\uXXXX).
NO_LITERAL = re.compile(r"\\(?!u(?!00[01]|d[89a-f])[0-9a-f]{4})")
LARGEST = 2**53


class BadSchema(ValueError):
    """What is wrong with a schema, as the end of a sentence that begins with its name."""


def check_schema(schema: Json) -> None:
    """Raise `BadSchema` unless an answer can be held to a schema here."""
    try:
        size = len(msgspec.json.encode(schema))
    except (UnicodeEncodeError, OverflowError):
        raise BadSchema("holds half a character, or a number of no use") from None
    if size > SIZE:
        raise BadSchema(f"has more than {SIZE} bytes")
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import Draft202012Validator

    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        raise BadSchema(f"is not a JSON schema ({error.message[:120]})") from None
    _check_keywords(schema)
    _Walk(schema).check()
    _Forms(schema).check_all()


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
            if key == "$ref" and not set(one) <= NOTES | {"$ref"}:
                raise BadSchema("holds a `$ref` with other rules beside it; put them into what it names")
            if key in COUNTS and isinstance(value, int | float) and value > REPEATED:
                raise BadSchema(f"asks for `{key}` {str(value)[:20]}; {REPEATED} is the most")
            if key in NAMED and isinstance(value, dict):
                rest += value.values()
            elif key not in VALUES:
                rest.append(value)


def _referred(schema: Json, reference: object) -> object | None:
    """What `#/$defs/NAME` names; None where it names nothing."""
    parts = str(reference).split("/")
    if (
        len(parts) != 3
        or parts[0] != "#"
        or parts[1] not in ("$defs", "definitions")
        or {*parts[2]} & {*"~%"}
    ):
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
                if not re.fullmatch("[a-zA-Z0-9-]+", name.split("/")[2]):
                    raise BadSchema(
                        f"refers to `{name[:60]}` inside itself; a grammar takes only letters, digits and `-` in "
                        "such a name"
                    )
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


class _Forms:
    """Holds every subschema to a form that llama.cpp makes a grammar of, and that some finite value fits.

    llama-cpp-python adds the grammar that it could not read to its sampler, which ends the process; so does a
    grammar after which no token fits.
    """

    def __init__(self, schema: Json) -> None:
        self.schema = schema
        if "$defs" in schema and "definitions" in schema:
            raise BadSchema("holds both `$defs` and `definitions`; use one of them")

    def check_all(self) -> None:
        """Raise `BadSchema` for the first subschema that has no such form."""
        self.check(self.schema, "the schema")
        if not self._finite(self.schema, ()):
            raise BadSchema("fits no value: every value would hold itself once more")

    def check(self, one: object, where: str) -> None:
        """The same of one subschema; `where` names it."""
        if not isinstance(one, dict):
            raise BadSchema(f"holds {json.dumps(one)} in place of a schema ({where})")
        for name in ("$defs", "definitions"):
            for key, part in cast(Json, one.get(name, {})).items():
                if one is not self.schema:
                    raise BadSchema(f"holds `{name}` inside {where}; put them at its top")
                if re.sub("[^a-zA-Z0-9-]+", "-", key) in RESERVED:
                    raise BadSchema(f"calls a part of `{name}` `{key}`, which is the grammar's own name")
                self.check(part, f"`{key[:40]}`")
        branches = [key for key in (*BRANCHES, "$ref") if key in one]
        if "$ref" not in one and branches:
            self._branches(one, branches, where)
        elif "$ref" not in one:
            self._values(one, where)
            self._members(one, where)
            self._ranges(one, where)
            known = {"type", "enum", "const", "properties", "additionalProperties", "items"}
            if one and not known & set(one):
                raise BadSchema(f"gives no `type` for {where}")

    def _branches(self, one: Json, keys: list[str], where: str) -> None:
        if len(keys) > 1 or not set(one) <= NOTES | set(keys):
            raise BadSchema(
                f"holds `{keys[0]}` with other rules beside it ({where}); put them into its branches"
            )
        for branch in cast(list[object], one[keys[0]]):
            self.check(branch, f"a branch of {where}")
            if keys[0] != "allOf":
                continue
            # A grammar has all the members of all its parts, and nothing else of them.
            part = self._meant(branch)
            if "properties" not in part or "additionalProperties" in part:
                raise BadSchema(
                    f"holds `allOf` ({where}) of other than open objects with `properties`; write out what they "
                    "have together"
                )

    def _values(self, one: Json, where: str) -> None:
        from jsonschema.validators import Draft202012Validator

        if one.get("enum") == []:
            raise BadSchema(f"holds an empty `enum` ({where}), which no value fits")
        values = [*cast(list[object], one.get("enum", [])), *([one["const"]] if "const" in one else [])]
        held = {key: self.schema[key] for key in ("$defs", "definitions") if key in self.schema}
        check = Draft202012Validator({**one, **held})
        for value in values:
            if NO_LITERAL.search(json.dumps(value)):
                raise BadSchema(
                    f"holds a value of `enum` or `const` ({where}) with a quote, a backslash, a control character or "
                    "one beyond U+FFFF, which a grammar cannot hold"
                )
            try:
                fits = check.is_valid(value)
            except (
                OverflowError,
                RecursionError,
            ):  # a number or a depth that no answer could be checked with
                fits = False
            if not fits:
                raise BadSchema(f"contradicts itself: a value of `enum` or `const` does not fit {where}")

    def _members(self, one: Json, where: str) -> None:
        properties = cast(Json, one.get("properties", {}))
        if len(properties) > REPEATED:
            raise BadSchema(f"has more than {REPEATED} properties ({where})")
        for name, part in properties.items():
            if not name or name == "$ref" or NO_LITERAL.search(json.dumps(name)):
                raise BadSchema(
                    f"holds a property ({where}) whose name is empty, `$ref`, or has a quote, a backslash, a control "
                    "character or one beyond U+FFFF, which a grammar cannot hold"
                )
            self.check(part, f"`{name[:40]}`")
        for name in cast(list[str], one.get("required", [])):
            if name not in properties:
                raise BadSchema(f"requires `{name[:40]}`, which is not among the `properties` of {where}")
        if not isinstance(one.get("additionalProperties", True), bool):
            self.check(one["additionalProperties"], f"the further properties of {where}")
        if "items" in one:
            if one["items"] == {}:
                raise BadSchema(f"holds empty `items` ({where}); leave them out or give them a `type`")
            self.check(one["items"], f"the items of {where}")

    def _ranges(self, one: Json, where: str) -> None:
        found = {key: cast(float, one[key]) for key in (*COUNTS, *LIMITS) if key in one}
        for key, value in found.items():
            if not abs(value) <= LARGEST or (key in COUNTS and not isinstance(value, int)):
                raise BadSchema(f"holds a `{key}` ({where}) that a grammar cannot hold")
        low = max(found.get("minimum", -math.inf), found.get("exclusiveMinimum", -math.inf))
        high = min(found.get("maximum", math.inf), found.get("exclusiveMaximum", math.inf))
        open_end = low == found.get("exclusiveMinimum") or high == found.get("exclusiveMaximum")
        empty = low > high or (low == high and open_end)
        if one.get("type") == "integer" and not empty and high - low < LARGEST:
            first = math.floor(low) + 1 if low == found.get("exclusiveMinimum") else math.ceil(low)
            last = math.ceil(high) - 1 if high == found.get("exclusiveMaximum") else math.floor(high)
            empty = first > last
        for what in ("Items", "Length"):
            empty = empty or found.get(f"min{what}", 0) > found.get(f"max{what}", math.inf)
        if empty:
            raise BadSchema(f"contradicts itself: no value lies within the limits of {where}")

    def _meant(self, one: object) -> Json:
        """A subschema, or the one that it refers to in the end; circles are refused before."""
        while isinstance(one, dict) and "$ref" in one:
            one = _referred(self.schema, one["$ref"])
        return cast(Json, one) if isinstance(one, dict) else {}

    def _finite(self, one: object, open_names: tuple[str, ...]) -> bool:
        """Whether some value of it does not hold itself once more."""
        if not isinstance(one, dict):
            return True
        if "$ref" in one:
            name = str(one["$ref"])
            if name in open_names:
                return False
            return self._finite(_referred(self.schema, name), (*open_names, name))
        for key in ("anyOf", "oneOf"):
            if key in one:
                return any(self._finite(part, open_names) for part in cast(list[object], one[key]))
        properties = cast(Json, one.get("properties", {}))
        needed = [properties[name] for name in cast(list[str], one.get("required", [])) if name in properties]
        for part in cast(list[object], one.get("allOf", [])):
            needed += cast(Json, self._meant(part).get("properties", {})).values()
        if cast(int, one.get("minItems", 0)) > 0:
            needed.append(one.get("items"))
        kinds = one.get("type")
        return isinstance(kinds, list) or all(self._finite(part, open_names) for part in needed)
