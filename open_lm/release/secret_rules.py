"""Rules that find secrets, private paths and names in text, and replace them.

A rule is a pattern and the words of which each of its matches has one. Words are searched first, and the pattern only
near them, which is ten times as fast. The formats of tokens are those that their providers document.
"""

from __future__ import annotations

import getpass
import json
import math
import os
import re
import socket
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

MASK = "***"
HOME = "~"
_COMMON_NAMES = """
    admin administrator app bigdata build builder cluster compute container data debian default docker ec2-user guest
    head host jenkins jovyan localhost login main master mnt model node nobody open_lm openlm python root runner server
    slurm student sudo system test tester torch train trainer ubuntu user username vagrant vscode work worker
"""
_MIN_NAME_LENGTH = 4  # shorter names are parts of other text too often
_MIN_SECRET_LENGTH = 8
_BEFORE = 250  # characters of a match before its word
_NUMBERS = re.compile(r"[\d\s,.\[\]\-]*")
_SECRET_VARIABLE = re.compile(r"secret|token|password|passwd|api_?key|access_?key|credential", re.IGNORECASE)
_PLACEHOLDER = re.compile(r"x+|\*+|[.…]+|\$.*|<.*|%[a-z(].*|.*[_\-]x{6,}|.*\*\*\*.*", re.IGNORECASE)


@dataclass(frozen=True)
class Rule:
    """A pattern of private text.

    Attributes:
        name: name in reports.
        pattern: its group `secret`, or else the whole match, is private.
        words: each match has one of them; a word of lower-case letters is found in any case.
        reach: number of characters from such a word to the end of a match.
        accept: returns whether a private text counts.
        replacement: takes the place of the private text.
        is_warning: whether a release may contain it.
        is_name: whether it is a name of this machine, which other people and things may have as well.
    """

    name: str
    pattern: re.Pattern[str]
    words: tuple[str, ...]
    accept: Callable[[str], bool] = lambda text: _PLACEHOLDER.fullmatch(text) is None
    replacement: str = MASK
    is_warning: bool = False
    is_name: bool = False
    reach: int = 700


@dataclass(frozen=True)
class Match:
    """Private text: characters start to end of a text, and the rule."""

    rule: Rule
    start: int
    end: int


# ------------------------------------------------------------------------------------------------ secrets
def _is_random(text: str) -> bool:
    """Return whether a text looks generated: letters and digits, with 3 bits of entropy per character or more."""
    counts = Counter(text)
    entropy = -sum(count / len(text) * math.log2(count / len(text)) for count in counts.values())
    return any(map(str.isdigit, text)) and any(map(str.isalpha, text)) and entropy >= 3.0


def _token(name: str, pattern: str, *words: str) -> Rule:
    return Rule(name, re.compile(rf"(?:(?<![A-Za-z0-9_\-])|{_AFTER_ESCAPE})(?:{pattern})"), words)


_AFTER_ESCAPE = r"(?<=\\[nrt])"  # after the escape of a line break or tab in JSON
_QUOTE = r"""\\?["']"""  # also as JSON writes it in a string
_SPACE = r"(?:\s|\\[nrt])"
_ASSIGNED = rf"""(?:{_QUOTE})?\]?\s{{0,3}}(?:=>|[:=])\s{{0,3}}(?:{_QUOTE})?"""
_KEY_NAMES = tuple(
    f"{kind}{sign}key"
    for kind in ("api", "access", "private", "auth", "encryption", "signing")
    for sign in ("_", "-", "")
)
SECRET_RULES: tuple[Rule, ...] = (
    _token("AWS access key", r"(?:AKIA|ASIA|AROA|AIDA|ABIA|ACCA)[A-Z0-9]{16}(?![A-Z0-9])",
           "AKIA", "ASIA", "AROA", "AIDA", "ABIA", "ACCA"),
    Rule("AWS secret key", re.compile(
        r"(?i:aws|secret)[\w\-. ]{0,30}" + _ASSIGNED + r"(?P<secret>[A-Za-z0-9/+]{40})(?![A-Za-z0-9/+=])"),
        ("aws", "secret"), _is_random),
    _token("Hugging Face token", r"hf_[A-Za-z0-9]{20,}|api_org_[A-Za-z0-9]{30,}", "hf_", "api_org_"),
    Rule("Weights & Biases key", re.compile(
        r"(?i:wandb|api\.wandb\.ai)[^\n]{0,30}?(?i:key|password|login)[\s\"':=\\]{1,6}(?P<secret>[0-9a-f]{40})(?![0-9a-f])"),
        ("wandb",)),
    _token("Weights & Biases key", r"wandb_v1_[A-Za-z0-9_]{20,}", "wandb_v1_"),
    _token("GitHub token", r"gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{30,}",
           "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_"),
    _token("GitLab token", r"gl(?:pat|dt|rt|ptt)-[A-Za-z0-9_\-]{20,}", "glpat-", "gldt-", "glrt-", "glptt-"),
    _token("OpenAI or Anthropic key", r"sk-(?:[A-Za-z0-9]{1,12}[-_]){0,3}[A-Za-z0-9]{20,}[A-Za-z0-9_\-]*", "sk-"),
    _token("Slack token", r"xox[abeoprs]-[A-Za-z0-9\-]{10,}|xapp-[A-Za-z0-9\-]{20,}", "xox", "xapp-"),
    Rule("Slack webhook", re.compile(r"hooks\.slack\.com/(?:services|workflows)/(?P<secret>[A-Za-z0-9/_]{20,})"),
         ("hooks.slack.com",)),
    _token("Google key", r"AIza[A-Za-z0-9_\-]{35}|ya29\.[A-Za-z0-9_\-]{20,}|GOCSPX-[A-Za-z0-9_\-]{20,}",
           "AIza", "ya29.", "GOCSPX-"),
    _token("Stripe key", r"[rs]k_(?:live|test)_[A-Za-z0-9]{16,}", "k_live_", "k_test_"),
    _token("package registry token", r"npm_[A-Za-z0-9]{36}|pypi-[A-Za-z0-9_\-]{50,}", "npm_", "pypi-"),
    _token("service token", r"gsk_[A-Za-z0-9]{40,}|r8_[A-Za-z0-9]{30,}|dapi[0-9a-f]{32}|SG\.[\w\-]{20,}\.[\w\-]{30,}",
           "gsk_", "r8_", "dapi", "SG."),
    Rule("Azure key", re.compile(r"(?:Account|SharedAccess)Key=(?P<secret>[A-Za-z0-9+/]{40,}={0,2})"),
         ("AccountKey=", "SharedAccessKey=")),
    _token("JSON web token", r"eyJ[A-Za-z0-9_\-]{10,}\.eyJ[A-Za-z0-9_\-]{10,}\.[A-Za-z0-9_\-]{10,}", "eyJ"),
    Rule("private key", re.compile(
        r"-----BEGIN (?:[A-Z]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----"
        r"(?:[A-Za-z0-9+/=\s:,\\-]{0,6000}?-----END (?:[A-Z]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----)?"),
        ("PRIVATE KEY",), reach=7_000),
    Rule("password in a URL", re.compile(
        r"(?<![A-Za-z0-9+.\-])[A-Za-z][A-Za-z0-9+.\-]{1,20}://[^\s/:@\"'<>{}|\\^`]{0,100}:"
        r"(?P<secret>[^\s/@\"'<>{}|\\^`]{1,200})@[\w\[]"), ("://",)),
    Rule("signature in a URL", re.compile(
        r"[?&](?:X-Amz-Signature|X-Amz-Security-Token|X-Goog-Signature|sig)=(?P<secret>[A-Za-z0-9%+/=_\-]{20,})"),
        ("signature=", "security-token=", "sig=")),
    Rule("authorization header", re.compile(
        r"(?i:authorization\\?[\"']?\s{0,3}[:=]\s{0,3}\\?[\"']?(?:bearer|basic|token)\s+)(?P<secret>[\w+/=.~\-]{8,})"),
        ("authorization",)),
    Rule("netrc password", re.compile(
        rf"machine\s[^\s\\]{{1,200}}{_SPACE}{{1,8}}login\s[^\s\\]{{1,200}}{_SPACE}{{1,8}}password\s"
        r"(?P<secret>[^\s\\\"]{4,200})"),
        ("machine",)),
    Rule("password", re.compile(
        rf"(?i:passw(?:or)?d|passphrase)(?:{_QUOTE})?\]?\s{{0,3}}[:=]\s{{0,3}}(?P<quote>{_QUOTE})"
        r"(?P<secret>[^\"'\s{}<>$\\]{6,200})(?P=quote)"),
        ("passw", "passphrase")),
    Rule("secret value", re.compile(
        r"(?i:secret(?:[_-]?(?:access[_-]?)?key)?|token|passw(?:or)?d|passphrase|credentials?"
        r"|(?:api|access|private|auth|encryption|signing)[_-]?key)"
        + _ASSIGNED + r"(?P<secret>[A-Za-z0-9+/_\-.~=]{16,512})(?![A-Za-z0-9+/_\-.~=(\[])"),
        ("secret", "token", "passw", "passphrase", "credential", *_KEY_NAMES), _is_random),
)  # fmt: skip

# ------------------------------------------------------------------------------------------------ paths and names
# Names that documentation uses in place of a user's own.
_NOBODY = re.compile(r"(?:user(?:name)?|you(?:r[\w\-]*)?|me|name|someone|example|\.+|x+)", re.IGNORECASE)
_ROOT_HOME = "/" + "root"  # home folder of the administrator on Unix
PATH_RULES: tuple[Rule, ...] = (
    Rule("home folder", re.compile(
        rf"(?:(?<![\w.\-/~])|{_AFTER_ESCAPE}|(?<=file://))"
        r"(?P<secret>(?:/[\w.\-]+){0,3}/(?:home|[Uu]sers)/(?:[\w.\-]*[\w\-]))(?=[/\s\"'`:;,.()\[\]{}<>|\\]|$)"),
        ("/home/", "/users/"), lambda path: _NOBODY.fullmatch(path.rpartition("/")[2]) is None, HOME),
    Rule("home folder", re.compile(
        rf"(?:(?<![\w.\-/~])|{_AFTER_ESCAPE}|(?<=file://))(?P<secret>{_ROOT_HOME})(?=/[\w.])"),
        (f"{_ROOT_HOME}/",), replacement=HOME),
    Rule("home folder", re.compile(
        r"(?<!\w)(?P<secret>[A-Za-z]:\\{1,2}Users\\{1,2}[\w.\- ]{1,60}?)(?=\\)"), ("users\\",),
        lambda path: _NOBODY.fullmatch(path.rpartition("\\")[2]) is None, HOME),
    Rule("host name", re.compile(
        r"(?<![\w.\-])(?:ip-\d{1,3}-\d{1,3}-\d{1,3}-\d{1,3}\b[\w.\-]*"
        r"|[\w\-]+(?:\.[\w\-]+){0,4}\.(?:compute|ec2|c\.[\w\-]+)\.internal)\b"), ("ip-", ".internal")),
    Rule("e-mail address", re.compile(
        r"(?<![\w.%+\-/])(?!git@)[A-Za-z0-9][\w.%+\-]{0,63}@(?!example\.|users\.noreply\.)(?:[A-Za-z0-9\-]{1,63}\.){1,4}"
        r"[A-Za-z]{2,18}(?![\w\-])"), ("@",), lambda text: not text.lower().startswith("noreply@"), is_warning=True),
)  # fmt: skip


def machine_rules(folders: Iterable[Path] = (), environ: Mapping[str, str] | None = None) -> list[Rule]:
    """Return rules for this machine: its user, host, home and current folder, and the values of secret variables.

    Args:
        folders: further private folders, such as the run folder.
        environ: environment variables (default: those of this process).
    """
    rules = []
    values = [
        value
        for name, value in (os.environ if environ is None else environ).items()
        if len(value) >= _MIN_SECRET_LENGTH and _SECRET_VARIABLE.search(name) and not os.path.exists(value)
    ]
    if values:
        pattern = re.compile("|".join(map(re.escape, sorted(values, key=len, reverse=True))))
        reach = max(map(len, values))
        rules.append(Rule("value of a secret environment variable", pattern, tuple(values), reach=reach))
    private = {
        str(path) for folder in [Path.home(), Path.cwd(), *folders] for path in (folder.absolute(), folder.resolve())
    }
    paths = sorted((path for path in private if path.count("/") > 1), key=len, reverse=True)
    if paths:
        pattern = re.compile(rf"(?<![\w.\-/])(?:{'|'.join(map(_spellings, paths))})(?![\w\-])")
        rules.append(Rule("folder of this machine", pattern, tuple(paths), replacement=HOME))
    return rules + _name_rules("user name", user_name(), r"user(?:_?name)?|login|uname") + _host_rules()


def _host_rules() -> list[Rule]:
    host = socket.gethostname()
    return [
        rule
        for name in {host, host.partition(".")[0]}
        for rule in _name_rules("host name", name, r"host(?:_?name)?|node|server")
    ]


def _name_rules(rule: str, name: str, labels: str) -> list[Rule]:
    """Return the rules for a user or host: after a label or at an @ sign, and, unless it is a common word, anywhere."""
    if not name:
        return []
    spelled = _spellings(name)
    words = _forms(name)
    label = rf"""(?:(?i:{labels})["']?\s{{0,3}}[:=]\s{{0,3}}["']?|[\w.\-]+@)(?P<secret>{spelled})(?![\w.\-])"""
    rules = []
    if name.lower() not in _COMMON_NAMES.split():
        rules.append(Rule(rule, re.compile(label), words, is_name=True))
        if len(name) >= _MIN_NAME_LENGTH:
            rules.append(Rule(rule, re.compile(rf"(?<![A-Za-z0-9]){spelled}(?![A-Za-z0-9])"), words, is_name=True))
    return rules


def _forms(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys((text, json.dumps(text, allow_nan=False)[1:-1])))


def _spellings(text: str) -> str:
    """Return the pattern of a text in its plain form and in its JSON form."""
    return f"(?:{'|'.join(map(re.escape, _forms(text)))})"


def user_name() -> str:
    """Return the name of the user who runs this process, "" if there is none."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a process without an entry in the user database
        return ""


# ------------------------------------------------------------------------------------------------ use
def find(text: str, rules: Sequence[Rule]) -> list[Match]:
    """Return the private texts in a text, by position, without overlaps."""
    if _NUMBERS.fullmatch(text):  # such as token ids
        return []
    lowered = text.lower()
    if len(lowered) != len(text):  # a letter whose lower case is two characters: keep the case
        lowered = text
    matches = [match for rule in rules for match in _matches(rule, text, lowered)]
    return list(_joined(sorted(matches, key=lambda match: match.start), rules))


def _matches(rule: Rule, text: str, lowered: str) -> Iterator[Match]:
    group = "secret" if "secret" in rule.pattern.groupindex else 0
    for start, end in _windows(rule, text, lowered):
        for match in rule.pattern.finditer(text, start, end):
            if rule.accept(match[group]):
                yield Match(rule, match.start(group), match.end(group))


def _windows(rule: Rule, text: str, lowered: str) -> Iterator[tuple[int, int]]:
    """Yield the parts of a text in which a rule can match: those around its words, with overlapping ones as one."""
    places: list[int] = []
    for word in rule.words:
        searched = lowered if word == word.lower() else text
        place = searched.find(word)
        while place >= 0:
            places.append(place)
            place = searched.find(word, place + len(word))
    start = end = 0
    for place in sorted(places):
        if place - _BEFORE > end:
            if end > start:
                yield start, end
            start = max(0, place - _BEFORE)
        end = place + rule.reach
    if end > start:
        yield start, end


def _joined(matches: Iterable[Match], rules: Sequence[Rule]) -> Iterator[Match]:
    """Yield matches that are sorted by start, with overlapping ones as one match of the earliest rule."""
    rank = {id(rule): number for number, rule in enumerate(rules)}
    current: Match | None = None
    for match in matches:
        if current is None or match.start >= current.end:
            if current is not None:
                yield current
            current = match
        else:
            rule = min(current.rule, match.rule, key=lambda rule: rank[id(rule)])
            current = Match(rule, current.start, max(current.end, match.end))
    if current is not None:
        yield current


def replace(text: str, matches: Iterable[Match]) -> str:
    """Return a text with the replacements of the matches."""
    parts, end = [], 0
    for match in matches:
        parts += [text[end : match.start], match.rule.replacement]
        end = match.end
    return "".join([*parts, text[end:]])
