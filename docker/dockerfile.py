"""Reads a Dockerfile, as far as ours goes: instructions, stages, variables, and what .dockerignore leaves of a context.

No more than FROM, ARG, ENV, WORKDIR, COPY, RUN, USER, SHELL and descriptions of the image (which are kept, and nobody
asks for them); everything else is an error, never ignored.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath

STEPS = frozenset({"ARG", "ENV", "WORKDIR", "COPY", "RUN", "USER", "SHELL"})
DESCRIPTIONS = frozenset({"CMD", "ENTRYPOINT", "EXPOSE", "HEALTHCHECK", "LABEL", "STOPSIGNAL", "VOLUME"})

HEREDOC = re.compile(r"<<(-?)(['\"]?)([A-Za-z_][A-Za-z0-9_]*)\2")
_FLAG = re.compile(r"--([a-z]+)=(\S+)\s*")
_VARIABLE = re.compile(r"\$(?:\{([A-Za-z_]\w*)(?:(:[-+])([^}]*))?\}|([A-Za-z_]\w*))|\\(\$)")


class DockerfileError(Exception):
    """What happened · with which values · what to do."""


@dataclass(frozen=True, slots=True)
class Instruction:
    """`text` is what follows the name and its flags, continued lines joined by spaces; `heredocs` are the bodies."""

    line: int
    name: str
    text: str
    flags: tuple[tuple[str, str], ...] = ()
    heredocs: tuple[str, ...] = ()

    def flag(self, name: str) -> str:
        return next((value for key, value in self.flags if key == name), "")


@dataclass(slots=True)
class Stage:
    """`base` is another stage's name or an image."""

    name: str
    base: str
    steps: list[Instruction] = field(default_factory=list)


def parse(text: str) -> list[Instruction]:
    """Raises DockerfileError with the line."""
    lines = text.splitlines()
    found, i = [], 0
    while i < len(lines):
        if not lines[i].strip() or lines[i].lstrip().startswith("#"):
            i += 1
            continue
        start = i
        logical, i = _logical_line(lines, i)
        bodies, i = _heredocs(lines, i, logical)
        found.append(_instruction(start + 1, logical, bodies))
    return found


def _logical_line(lines: list[str], i: int) -> tuple[str, int]:
    """The line at i with those it goes on in (comments and empty lines between fall away), and the next one's index."""
    start = i
    parts: list[str] = []
    while i < len(lines):
        line = lines[i].rstrip()
        i += 1
        if len(parts) and (not line.strip() or line.lstrip().startswith("#")):
            continue
        parts.append(line.removesuffix("\\").strip())
        if not line.endswith("\\"):
            return " ".join(parts), i
    raise DockerfileError(f"line {start + 1}: it goes on with a backslash, but the file ends")


def _heredocs(lines: list[str], i: int, logical: str) -> tuple[tuple[str, ...], int]:
    bodies = []
    for dash, _, word in HEREDOC.findall(logical) if logical.split(None, 1)[0].upper() in ("RUN", "COPY") else ():
        body: list[str] = []
        while True:
            if i == len(lines):
                raise DockerfileError(f"the here-document {word} has no end")
            line = lines[i].lstrip("\t") if dash else lines[i]
            i += 1
            if line == word:
                break
            body.append(line)
        bodies.append("".join(f"{line}\n" for line in body))
    return tuple(bodies), i


def _instruction(line: int, logical: str, heredocs: tuple[str, ...]) -> Instruction:
    name, _, rest = logical.partition(" ")
    name, rest, flags = name.upper(), rest.strip(), []
    if name not in STEPS | DESCRIPTIONS | {"FROM"}:
        raise DockerfileError(f"line {line}: {name} is not understood · use {', '.join(sorted(STEPS))}")
    while name in ("FROM", "RUN", "COPY") and (match := _FLAG.match(rest)):
        flags.append((match[1], match[2]))
        rest = rest[match.end() :]
    if not rest:
        raise DockerfileError(f"line {line}: {name} says nothing")
    return Instruction(line, name, rest, tuple(flags), heredocs)


def stages(instructions: list[Instruction], given: Mapping[str, str]) -> list[Stage]:
    """In order. `given`: values of ARGs from outside."""
    found: list[Stage] = []
    for each in instructions:
        if each.name == "FROM":
            words = expand(each.text, global_arguments(instructions, given)).split()
            if len(words) not in (1, 3) or (len(words) == 3 and words[1].upper() != "AS"):
                raise DockerfileError(f"line {each.line}: FROM {each.text!r} · write FROM IMAGE AS NAME")
            found.append(Stage(words[2] if len(words) == 3 else str(len(found)), words[0]))
        elif found:
            found[-1].steps.append(each)
        elif each.name != "ARG":
            raise DockerfileError(f"line {each.line}: {each.name} before the first FROM")
    return found


def global_arguments(instructions: list[Instruction], given: Mapping[str, str]) -> dict[str, str]:
    """ARGs before the first FROM."""
    values: dict[str, str] = {}
    for each in instructions:
        if each.name == "FROM":
            break
        values |= arguments(each, given, {}, values)
    return values


def arguments(
    each: Instruction, given: Mapping[str, str], outer: Mapping[str, str], known: Mapping[str, str]
) -> dict[str, str]:
    """Of one ARG: the value from outside, else its own default, else that of the ARG before the first FROM."""
    found = {}
    for word in shlex.split(each.text):
        name, has_default, default = word.partition("=")
        if name in given:
            found[name] = given[name]
        elif has_default:
            found[name] = expand(default, known)
        elif name in outer:
            found[name] = outer[name]
    return found


def assignments(each: Instruction, known: Mapping[str, str]) -> dict[str, str]:
    """Of one ENV NAME=VALUE …"""
    words = shlex.split(each.text)
    if not all("=" in word for word in words):
        raise DockerfileError(f"line {each.line}: ENV {each.text!r} · write ENV NAME=VALUE")
    return {name: expand(value, known) for name, _, value in (word.partition("=") for word in words)}


def shell(each: Instruction) -> list[str]:
    """Of one SHELL."""
    try:
        words = json.loads(each.text)
    except ValueError as error:
        raise DockerfileError(f'line {each.line}: SHELL {each.text!r} · write SHELL ["/bin/bash", "-c"]') from error
    return [str(word) for word in words]


def command(each: Instruction) -> str:
    """What the shell gets of one RUN."""
    if not each.heredocs:
        return each.text
    if each.text.startswith("<<"):
        return each.heredocs[0]
    ends = [match[3] for match in HEREDOC.finditer(each.text)]
    return f"{each.text}\n" + "".join(f"{body}{end}\n" for body, end in zip(each.heredocs, ends, strict=True))


def secrets(each: Instruction) -> list[tuple[str, str]]:
    """(id, target) of one RUN's --mount=type=secret,id=…,target=…; other kinds of mounts are an error."""
    found = []
    for name, value in each.flags:
        options = dict(part.partition("=")[::2] for part in value.split(","))
        if name != "mount" or options.get("type") != "secret" or not {"id", "target"} <= set(options):
            raise DockerfileError(f"line {each.line}: --{name}={value} · only type=secret with id and target")
        found.append((options["id"], options["target"]))
    return found


def expand(text: str, known: Mapping[str, str]) -> str:
    """$NAME, ${NAME}, ${NAME:-other}, ${NAME:+other}; an unknown name is empty, as Docker has it."""

    def value(match: re.Match[str]) -> str:
        if match[5]:
            return "$"
        found = known.get(match[1] or match[4], "")
        other = expand(match[3] or "", known)
        if match[2] == ":-":
            return found or other
        return (other if found else "") if match[2] == ":+" else found

    return _VARIABLE.sub(value, text)


def needed(all_stages: list[Stage], target: str) -> list[Stage]:
    """The target and what it is made from, by FROM and by COPY --from, in the order of the file."""
    by_name = {stage.name: stage for stage in all_stages}
    if target not in by_name:
        raise DockerfileError(f"there is no target {target!r} · there are {', '.join(by_name)}")
    wanted, todo = set(), [target]
    while todo:
        name = todo.pop()
        if name in by_name and name not in wanted:
            wanted.add(name)
            todo += [by_name[name].base, *(step.flag("from") for step in by_name[name].steps)]
    return [stage for stage in all_stages if stage.name in wanted]


class Ignore:
    """The rules of a .dockerignore; the last one that fits a path, or a folder that it is in, decides."""

    def __init__(self, text: str) -> None:
        rules = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
        self._rules = [(not rule.startswith("!"), re.compile(_regex(rule.lstrip("!").strip("/")))) for rule in rules]

    def leaves_out(self, path: str) -> bool:
        out = False
        for excludes, pattern in self._rules:
            if any(pattern.fullmatch(part) for part in _with_folders(path)):
                out = excludes
        return out


def _with_folders(path: str) -> Iterator[str]:
    yield path
    yield from (str(folder) for folder in PurePosixPath(path).parents if str(folder) != ".")


def _regex(rule: str) -> str:
    parts = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(parts.get(word, re.escape(word)) for word in re.split(r"(\*\*/|\*\*|\*|\?)", rule))
