"""Scan a bundle for secrets, private paths and names, and redact them in texts.

Text of third parties (training and evaluation data) may name home folders and people: there these are warnings, like
all e-mail addresses. So are names of users and hosts in documents and source code, whose authors may state who they
are. Everything else is an error, and a bundle with an error is not released.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from open_lm.errors import DataError
from open_lm.release import layout
from open_lm.release.file_texts import Budget, Text, Unreadable, file_texts
from open_lm.release.manifest import bundle_files
from open_lm.release.secret_rules import PATH_RULES, SECRET_RULES, Match, Rule, find, replace
from open_lm.system.names import printable

UNREADABLE = "not scanned"
_THIRD_PARTY = (layout.DATA + "/", layout.EVALUATION_DATA + "/")
_WRITTEN = (layout.MODEL_CARD, layout.DATA_CARD, layout.MOF_FILE,
            *(f"{folder}/" for folder in (layout.REPORT, layout.PAPER, layout.CODE, layout.LICENSES)))  # fmt: skip
_CONTEXT = 30  # characters of an excerpt before and after a finding
_MAX_PER_FILE = 20  # findings of one rule in one file that are listed; the others are counted


@dataclass(frozen=True)
class Finding:
    """Private text in a file of a bundle.

    Attributes:
        file: path in the bundle; for a file in an archive followed by "!" and its path there.
        line: number of the line, from 1; None for a binary file.
        rule: name of the rule.
        excerpt: the text around it, without private text.
        is_warning: whether a release may contain it.
    """

    file: str
    line: int | None
    rule: str
    excerpt: str
    is_warning: bool

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        return f"{place}: {self.rule}: {self.excerpt}"


class Scanner:
    """Finds and replaces private text.

    Args:
        rules: rules in addition to the general ones: those of this machine, see `machine_rules`. A verification has
            none, so that a bundle is verified on each machine alike.
    """

    def __init__(self, rules: Iterable[Rule] = ()) -> None:
        self._rules: Sequence[Rule] = (*rules, *SECRET_RULES, *PATH_RULES)
        self._replaced = tuple(rule for rule in self._rules if not rule.is_warning)

    def redact(self, text: str) -> str:
        """Return a text without secrets, private paths and names. E-mail addresses are kept."""
        return replace(text, find(text, self._replaced))

    def scan(self, bundle: Path) -> list[Finding]:
        """Return the private text of all files of a bundle and in the names of files, by file and line.

        A file that cannot be read completely, such as a damaged archive, is a finding as well.
        """
        findings: list[Finding] = []
        paths = sorted(bundle_files(bundle, []))
        budget = Budget(sum((bundle / path).stat(follow_symlinks=False).st_size for path in paths))
        for path in paths:
            findings += self.scan_file(bundle / path, path, budget)
        return findings

    def scan_file(self, file: Path, path: str, budget: Budget | None = None) -> list[Finding]:
        """Return the private text of a file that has the given path in a bundle; `budget` as of `file_texts`."""
        name = Text("", printable(path), None)
        found: dict[Finding, None] = dict.fromkeys(self._findings(name, f"name of {name.content}", path, set()))
        in_binary: set[tuple[str, str]] = set()  # rule and private text: binary formats often hold a text twice
        try:
            for text in file_texts(file, budget):
                place = printable(f"{path}!{text.member}" if text.member else path)
                found.update(dict.fromkeys(self._findings(text, place, path, in_binary)))
        except (Unreadable, OSError) as error:
            found[Finding(path, None, UNREADABLE, printable(str(error)), False)] = None
        return _shortened(list(found))

    def _findings(self, text: Text, place: str, path: str, in_binary: set[tuple[str, str]]) -> Iterator[Finding]:
        matches = find(text.content, self._rules)
        line, counted = text.first_line or 0, 0
        for number, match in enumerate(matches):
            line += text.content.count("\n", counted, match.start)
            counted = match.start
            if text.first_line is None and match.rule.is_warning:
                continue  # random bytes look like e-mail addresses now and then
            if text.first_line is None:
                known = (place + match.rule.name, text.content[match.start : match.end])
                if known in in_binary:
                    continue
                in_binary.add(known)
            excerpt = _excerpt(text.content, matches, number)
            yield Finding(
                place, line if text.first_line else None, match.rule.name, excerpt, _is_warning(match.rule, path)
            )


def _is_warning(rule: Rule, path: str) -> bool:
    if path.startswith(_THIRD_PARTY):
        return rule.is_warning or rule.is_name or rule in PATH_RULES
    return rule.is_warning or (rule.is_name and path.startswith(_WRITTEN))


def _excerpt(text: str, matches: Sequence[Match], number: int) -> str:
    """Return the text around a match with all matches replaced. A warning shows its own text."""
    match = matches[number]
    start = max(text.rfind("\n", 0, match.start) + 1, match.start - _CONTEXT)
    end = text.find("\n", match.end)
    end = min(len(text) if end < 0 else end, match.end + _CONTEXT)
    parts, position = [], start
    for other in matches[max(0, number - 20) : number + 20]:
        if other.end <= start or other.start >= end:
            continue
        parts.append(text[position : max(position, other.start)])
        parts.append(text[other.start : other.end] if other.rule.is_warning else other.rule.replacement)
        position = other.end
    return "".join([*parts, text[position:end]]).strip().replace("\n", " ")


def _shortened(findings: Sequence[Finding]) -> list[Finding]:
    """Return at most _MAX_PER_FILE findings of each rule in each file, the last one with the number of the others."""
    total = Counter((finding.file, finding.rule, finding.is_warning) for finding in findings)
    listed: Counter[tuple[str, str, bool]] = Counter()
    kept = []
    for finding in findings:
        key = (finding.file, finding.rule, finding.is_warning)
        listed[key] += 1
        if listed[key] < _MAX_PER_FILE or total[key] == _MAX_PER_FILE:
            kept.append(finding)
        elif listed[key] == _MAX_PER_FILE:
            more = f"and {total[key] - _MAX_PER_FILE + 1} more in this file"
            kept.append(Finding(finding.file, None, finding.rule, more, finding.is_warning))
    return kept


def require_clean(findings: Sequence[Finding], bundle: Path) -> None:
    """Raise DataError with all findings that are not warnings."""
    errors = [str(finding) for finding in findings if not finding.is_warning]
    if errors:
        raise DataError(
            f"{bundle}: found {len(errors)} secrets or private paths; pass --redact to replace those in "
            "logs and settings, and remove others from the files of the run:\n  " + "\n  ".join(errors)
        )
