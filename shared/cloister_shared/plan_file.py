"""Reading a plan from YAML. Every fault becomes one sentence: the line, the key, the value and the mend."""

from __future__ import annotations

import difflib
import json
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from cloister_shared.errors import PlanRefused
from cloister_shared.plan import StudyPlan
from cloister_shared.plan_rules import broken
from cloister_shared.terms import Broken, Path


@dataclass(frozen=True)
class Source:
    """Plain values with where they came from: a file's name, and the line of each key."""

    name: str
    terms: object
    lines: Mapping[Path, int] = field(default_factory=dict[Path, int])
    prefix: Path = ()

    def below(self, key: str) -> Source:
        """The part of the document under ``key``, with its lines kept."""
        lines = {path[1:]: line for path, line in self.lines.items() if path[:1] == (key,)}
        return Source(self.name, _at(self.terms, (key,)), lines, (*self.prefix, key))

    def sentence(self, fault: Broken) -> str:
        """Line, key, value and what is wrong with it; the mend is not part of it."""
        line = next(
            (self.lines[p] for n in range(len(fault.path), -1, -1) if (p := fault.path[:n]) in self.lines), None
        )
        where = f"{self.name} line {line}" if line else self.name
        key = "".join(
            f"[{part}]" if isinstance(part, int) else f".{_printable(part)}" for part in (*self.prefix, *fault.path)
        ).lstrip(".")
        value = _at(self.terms, fault.path)
        shown = "" if value is None or isinstance(value, dict) else f" = {json.dumps(value, default=str)[:60]}"
        return f"{where}: {key or 'the document'}{shown} {fault.wrong}."


def _printable(key: str) -> str:
    """A key on one line, whatever is in it."""
    return key if key.isprintable() else json.dumps(key)[1:-1]


def _at(terms: Any, path: Path) -> Any:
    """The value under a path, or None."""
    for part in path:
        try:
            terms = terms[part]
        except (KeyError, IndexError, TypeError):
            return None
    return terms


def read_plan(text: str, name: str = "plan") -> StudyPlan:
    """Parse a plan's YAML.

    Raises:
        PlanRefused: one sentence for each fault, with line, key, value and mend.
    """
    return parse(StudyPlan, load(text, name), broken)


def amend(plan: StudyPlan, **changes: object) -> StudyPlan:
    """The same plan with other terms, checked anew: ``amend(plan, privacy={"epsilon": 1.0})``.

    A mapping is merged into the section of that name, unless it names another strategy, task or method; anything else
    replaces the term.

    Raises:
        PlanRefused: the changed plan is not a sound one.
    """
    terms: dict[str, Any] = plan.model_dump(mode="json")
    for key, change in changes.items():
        terms[key] = _merged(terms.get(key), change)
    return parse(StudyPlan, Source(f"{plan.study} as amended", terms), broken)


def _merged(old: Any, change: Any) -> Any:
    same = isinstance(old, dict) and isinstance(change, dict)
    same = same and all(change.get(key, old.get(key)) == old.get(key) for key in ("name", "method"))  # pyright: ignore
    return {**old, **change} if same else change  # pyright: ignore[reportUnknownVariableType]


M = typing.TypeVar("M", bound=BaseModel)


def parse(model: type[M], source: Source, rules: Callable[[M], Iterable[Broken]] | None = None) -> M:
    """Plain values into a strict pydantic model, then through the rules.

    Raises:
        PlanRefused: one sentence for each fault found.
    """
    try:
        # Through JSON, because pydantic's strict mode knows that a JSON array may become a tuple.
        parsed = model.model_validate_json(json.dumps(source.terms))
    except ValidationError as error:
        faults = _root_causes([_explained(model, detail) for detail in error.errors(include_url=False)])
    else:
        faults = list(rules(parsed)) if rules else []
        if not faults:
            return parsed
    first, *others = faults
    raise PlanRefused(
        source.sentence(first),
        mend=first.mend + "".join(f"\n{source.sentence(fault)} {fault.mend}" for fault in others),
    )


def _root_causes(faults: list[Broken]) -> list[Broken]:
    """One fault for each mistake: not also the list it stands in, nor the key that a misspelling leaves missing."""
    paths = {fault.path for fault in faults}
    meant = {(*fault.path[:-1], fault.mend.removeprefix("Did you mean ").rstrip("?")) for fault in faults}
    kept: dict[Path, Broken] = {}
    for fault in faults:
        holds_another = any(path[: len(fault.path)] == fault.path and path != fault.path for path in paths)
        if not holds_another and not (fault.wrong == "is missing" and fault.path in meant):
            kept.setdefault(fault.path, fault)
    return list(kept.values())


# --- YAML with line numbers --------------------------------------------------------------------------------
class _NotPlain(yaml.MarkedYAMLError):
    """YAML, but more than plain values."""


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core schema: ``1e-5`` is a number, ``no`` and ``2020-01-01`` are text, ``010`` is ten.

    No aliases, so that ten lines cannot unfold to thousands of millions of values; no tags, which ask for objects.
    """

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = typing.cast(Any, self.peek_event())  # pyright: ignore
        if isinstance(event, yaml.AliasEvent):
            raise _NotPlain(problem=f"*{event.anchor} is an alias", problem_mark=event.start_mark)
        if event.tag:
            raise _NotPlain(problem=f"{event.tag} is a tag", problem_mark=event.start_mark)
        if self._depth == _DEEPEST:
            raise _NotPlain(problem="it is nested too deep", problem_mark=event.start_mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


_DEEPEST = 30
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))
_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("int", r"^[-+]?[0-9]+$", "-+0123456789"),
    ("float", r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$", "-+.0123456789"),
    ("float", r"^(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$", "-+."),
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first))


def load(text: str, name: str) -> Source:
    """Plain values of a YAML document, and the line of each of its keys.

    Raises:
        PlanRefused: not YAML, or a key given twice.
    """
    try:
        loader = _Loader(text)
        node: yaml.Node | None = loader.get_single_node()  # pyright: ignore
        if node is None:
            return Source(name, None)
        lines = dict(_lines(node, (), name))
        return Source(name, loader.construct_document(node), lines)  # pyright: ignore
    except yaml.MarkedYAMLError as error:
        mark, not_plain = error.problem_mark, isinstance(error, _NotPlain)
        line = f" line {mark.line + 1}" if mark else ""
        raise PlanRefused(
            f"{name}{line}: this is not {'plain ' if not_plain else ''}YAML: {error.problem or error.context}.",
            mend="Write the value out." if not_plain else "Check indentation, colons and brackets on that line.",
        ) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        said = (str(error).splitlines() or ["too deep"])[0]
        raise PlanRefused(f"{name}: this is not YAML: {said}.", mend="Save the file as plain UTF-8 YAML.") from None


def _lines(node: yaml.Node, path: Path, name: str) -> Iterator[tuple[Path, int]]:
    """The line of each key below a node."""
    yield path, node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            word, line = str(key.value), key.start_mark.line + 1
            if word in seen:
                raise PlanRefused(
                    f"{name} line {line}: {word} is given a second time, first on line {seen[word]}.",
                    mend="Keep one of the two.",
                )
            seen[word] = line
            yield (*path, word), line
            yield from ((p, n) for p, n in _lines(value, (*path, word), name) if p != (*path, word))
    elif isinstance(node, yaml.SequenceNode):
        for at, value in enumerate(node.value):
            yield from _lines(value, (*path, at), name)


# --- pydantic's errors in our words --------------------------------------------------------------------------
def _explained(model: type[BaseModel], detail: ErrorDetails) -> Broken:
    """One pydantic error as a broken rule."""
    kind, context = detail["type"], detail.get("ctx", {})
    path, owner = _resolve(model, detail["loc"])
    last = path[-1] if path else ""
    match kind:
        case "extra_forbidden":
            return Broken(path, "is not a known key", _did_you_mean(str(last), sorted(owner.model_fields)))
        case "missing" if isinstance(last, int):
            return Broken(path[:-1], "has too few entries", f"Write at least {last + 1}.")
        case "missing":
            return Broken(path, "is missing", f"Add {last}: VALUE.")
        case "union_tag_not_found" | "union_tag_invalid":
            key = str(context["discriminator"]).strip("'").strip("_()")
            allowed = [str(tag) for member in _kinds_at(model, path) if _is_model(member) for tag in _tags(member)]
            if "tag" not in context:
                return Broken((*path, key), "is missing", f"Add {key}: one of {', '.join(allowed)}.")
            return Broken(
                (*path, key), f"is not one of {', '.join(allowed)}", _did_you_mean(str(context["tag"]), allowed)
            )
        case "literal_error" | "enum":
            allowed = re.findall(r"[^', ]+", str(context["expected"]).replace(" or ", ", "))
            return Broken(path, f"is not one of {', '.join(allowed)}", _did_you_mean(str(detail["input"]), allowed))
        case "greater_than" | "greater_than_equal" | "less_than" | "less_than_equal":
            words = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
            key, bound = next(iter(context.items()))
            return Broken(path, f"must be {words[key]} {bound}", "Write a number within that bound.")
        case "string_pattern_mismatch":
            return Broken(
                path, f"does not have the form {context['pattern']}", _FORMS.get(last, "Write it in that form.")
            )
        case _ if detail["input"] is None:
            return Broken(path, "is empty", _type_mend(kind))
        case _:
            return Broken(path, f"is not accepted: {_lower(detail['msg'])}", _type_mend(kind))


_FORMS: dict[str | int, str] = {
    "study": "Write it in small letters, digits and hyphens.",
    "code": "Write the vocabulary, a colon and the code: LOINC:2093-3.",
}


def _type_mend(kind: str) -> str:
    mends = {
        "int": "Write a whole number.",
        "float": "Write a number, without quotes.",
        "bool": "Write true or false.",
        "string": "Write text, in quotes if it looks like a number.",
        "tuple": "Write a list: [a, b].",
        "model": "Write a section of keys below it.",
        "dict": "Write a section of keys below it.",
        "too": "Write as many entries as it says.",
        "finite": "Write an ordinary number.",
        "site_name": "Write the name that the hospital is enrolled with.",
    }
    return next((mend for start, mend in mends.items() if kind.startswith(start)), "Write a value of that kind.")


def _lower(message: str) -> str:
    return message[:1].lower() + message[1:]


def _did_you_mean(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, 1, cutoff=0.5)
    return f"Did you mean {near[0]}?" if near else f"Write one of {', '.join(known)}."


def _resolve(model: type[BaseModel], location: tuple[int | str, ...]) -> tuple[Path, type[BaseModel]]:
    """The key's path in the document, and the model that owns it.

    Pydantic's own location also names the member of a union; such a part is not a key of the document.
    """
    path: Path = ()
    owner = model
    kinds: list[Any] = [model]
    for part in location:
        models = [kind for kind in kinds if _is_model(kind)]
        tagged = [kind for kind in models if part in _tags(kind)]
        if tagged:
            kinds = tagged
            continue
        named = [kind for kind in kinds if getattr(kind, "__name__", "") == part] if len(kinds) > 1 else []
        if named:
            kinds = named
            continue
        if isinstance(part, str) and not models and not any(map(_is_mapping, kinds)):
            continue
        owner = models[0] if models else owner
        path = (*path, part)
        kinds = _kinds_below(kinds, part)
    return path, owner


def _kinds_at(model: type[BaseModel], path: Path) -> list[Any]:
    """What may stand under a path."""
    kinds: list[Any] = [model]
    for part in path:
        kinds = _kinds_below(kinds, part)
    return kinds


def _kinds_below(kinds: list[Any], part: str | int) -> list[Any]:
    if isinstance(part, int):
        below = [argument for kind in kinds for argument in typing.get_args(kind)]
    else:
        below = [k.model_fields[part].annotation for k in kinds if _is_model(k) and part in k.model_fields]
        below += [typing.get_args(kind)[1] for kind in kinds if _is_mapping(kind)]
    return [member for kind in below for member in _members(kind)]


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _is_mapping(kind: Any) -> bool:
    return typing.get_origin(kind) is dict


def _members(annotation: Any) -> list[Any]:
    """The alternatives of a (nested, annotated) union."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _members(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return [member for argument in typing.get_args(annotation) for member in _members(argument)]
    return [annotation]


def _tags(model: type[BaseModel]) -> tuple[object, ...]:
    """The discriminator's values of a union member: its one required literal, or ``kind`` or ``method``."""
    for name, described in model.model_fields.items():
        if (described.is_required() or name in ("kind", "method")) and typing.get_origin(
            described.annotation
        ) is Literal:
            return typing.get_args(described.annotation)
    return ()
