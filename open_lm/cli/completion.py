"""Print the completion of `open-lm` for a shell: commands, flags, choices and paths.

    open-lm completion bash > ~/.local/share/bash-completion/completions/open-lm
    open-lm completion zsh > ~/.zfunc/_open-lm        (with `fpath+=~/.zfunc` before `compinit` in ~/.zshrc)
    open-lm completion fish > ~/.config/fish/completions/open-lm.fish

The output is made from the parsers of all commands, which takes some seconds. Write it again after an update.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from open_lm.config.command_line import FlagParser
from open_lm.errors import run_cli

if TYPE_CHECKING:
    from open_lm.cli.programs import Flag, Program, Value


def bash_script(programs: Sequence[Program]) -> str:
    """Return the completion for bash. It works with the bash 3.2 of macOS too."""
    tables = _tables(programs)
    words = [
        f"        {_quoted(program.key)}) flags={_quoted(' '.join(_flag_names(program)))}"
        f" words={_quoted(' '.join(program.words))} files={int(program.is_path)} ;;"
        for program in programs
    ]
    return _BASH.replace("@TABLES@", tables).replace("@WORDS@", "\n".join(words))


def zsh_script(programs: Sequence[Program]) -> str:
    """Return the completion for zsh, with descriptions."""
    tables = _tables(programs)
    lines = []
    for program in programs:
        flags = [f"{name}:{flag.help}" for flag in program.flags for name in flag.names]
        words = [f"{word}:{text}" for word, text in program.words.items()]
        lines += [
            f"        {_quoted(program.key)})",
            f"            flags=({' '.join(map(_quoted, flags))})",
            f"            words=({' '.join(map(_quoted, words))}) files={int(program.is_path)} ;;",
        ]
    return _ZSH.replace("@TABLES@", tables).replace("@WORDS@", "\n".join(lines))


def fish_script(programs: Sequence[Program]) -> str:
    """Return the completion for fish, with descriptions."""
    moves = [
        f"            case {_fish_quoted(f'{program.key}/{word}')}\n                set key {_fish_quoted(key)}"
        for program in programs
        for word, key in program.next_key.items()
    ]
    lines = [line for program in programs for line in _fish_lines(program)]
    return _FISH.replace("@MOVES@", "\n".join(moves)).replace("@LINES@", "\n".join(lines))


SCRIPTS: dict[str, Callable[[Sequence[Program]], str]] = {
    "bash": bash_script, "zsh": zsh_script, "fish": fish_script,
}  # fmt: skip


# ---------------------------------------------------------------------------------------------- bash and zsh
_FOLLOW = """
# Follow a word: `key` becomes the program that it selects, `flag` the flag that the next word may belong to.
_open_lm_follow() {
    _open_lm_value "$key $flag"
    if [[ $1 == -* ]]; then
        flag=$1
    elif [[ $takes == none ]]; then
        flag=""
        _open_lm_next "$key" "$1"
        key=$next
    elif [[ $takes == one ]]; then
        flag=""
    fi
}"""
_BASH = """# Completion of open-lm for bash; `open-lm completion bash` writes it.
@TABLES@

_open_lm() {
    local cur=${COMP_WORDS[COMP_CWORD]} key="" flag="" i next takes values values_are_files flags words files
    COMPREPLY=()
    for ((i = 1; i < COMP_CWORD; i++)); do
        [[ ${COMP_WORDS[i]} == "=" ]] || _open_lm_follow "${COMP_WORDS[i]}"
    done
    [[ $cur == "=" ]] && cur=""
    _open_lm_value "$key $flag"
    if [[ $takes != none && $cur != -* ]]; then
        words=$values files=$values_are_files
    else
        case "$key" in
@WORDS@
        esac
        [[ $cur == -* ]] && words=$flags files=0
    fi
    COMPREPLY=($(compgen -W "$words" -- "$cur"))
    # Without a word that fits, `complete -o default` completes paths.
    ((files)) || compopt +o default +o bashdefault 2>/dev/null
}

complete -o bashdefault -o default -F _open_lm open-lm
"""
_ZSH = """#compdef open-lm
# Completion of open-lm for zsh; `open-lm completion zsh` writes it.
@TABLES@

_open_lm() {
    local cur=${words[CURRENT]} key="" flag="" i next takes values values_are_files files
    local -a typed=("${words[@]}") flags words
    for ((i = 2; i < CURRENT; i++)); do
        _open_lm_follow "${typed[i]}"
    done
    if [[ $cur == -*=* ]]; then
        flag=${cur%%=*}
        compset -P '*='
        cur=""
    fi
    _open_lm_value "$key $flag"
    if [[ $takes != none && $cur != -* ]]; then
        [[ -n $values ]] && compadd -- ${=values}
        ((values_are_files)) && _files
        return
    fi
    case "$key" in
@WORDS@
    esac
    if [[ $cur == -* ]]; then
        _describe -o 'flag' flags
    else
        ((${#words})) && _describe 'command' words
        ((files)) && _files
    fi
}

if [[ $funcstack[1] == _open-lm ]]; then
    _open_lm "$@"
else
    compdef _open_lm open-lm
fi
"""


def _tables(programs: Sequence[Program]) -> str:
    """Return the functions that the scripts of bash and zsh share."""
    return "\n".join([*_transition_table(programs), "", *_value_table(programs), _FOLLOW])


def _transition_table(programs: Sequence[Program]) -> Iterator[str]:
    """Yield a function of bash and zsh that sets `next` to the key of the program that a word selects."""
    yield "_open_lm_next() {"
    yield "    next=$1"
    yield '    case "$1/$2" in'
    for program in programs:
        for word, key in program.next_key.items():
            yield f"        {_quoted(f'{program.key}/{word}')}) next={_quoted(key)} ;;"
    yield "    esac"
    yield "}"


def _value_table(programs: Sequence[Program]) -> Iterator[str]:
    """Yield a function of bash and zsh that sets what the value of a flag may be, given `KEY FLAG`."""
    cases: dict[str, list[str]] = {}
    for program in programs:
        for flag in program.flags:
            if flag.value is not None:
                cases.setdefault(_assignments(flag.value, flag.many), []).extend(
                    f"{program.key} {n}" for n in flag.names
                )
    yield "_open_lm_value() {"
    yield "    takes=none values= values_are_files=0"
    yield '    case "$1" in'
    for text, names in cases.items():
        yield f"        {'|'.join(map(_quoted, names))})"
        yield f"            {text} ;;"
    yield "    esac"
    yield "}"


def _assignments(value: Value, many: bool) -> str:
    words = _quoted(" ".join(value.words))
    return f"takes={'many' if many else 'one'} values={words} values_are_files={int(value.is_path)}"


def _flag_names(program: Program) -> list[str]:
    return [name for flag in program.flags for name in flag.names]


def _quoted(text: str) -> str:
    """Return a word of bash and zsh."""
    return "'" + text.replace("'", "'\\''") + "'"


# ---------------------------------------------------------------------------------------------- fish
_FISH = """# Completion of open-lm for fish; `open-lm completion fish` writes it.
function __open_lm_at
    set -l key ''
    for word in (commandline -opc)[2..-1]
        switch "$key/$word"
@MOVES@
        end
    end
    test "$key" = "$argv[1]"
end

function __open_lm_more # KEY FLAG…: whether further values of a flag may follow
    __open_lm_at $argv[1]; and contains -- (string match -- '-*' (commandline -opc))[-1] $argv[2..-1]
end

complete -c open-lm -f
@LINES@
"""


def _fish_lines(program: Program) -> Iterator[str]:
    start = f"complete -c open-lm -n {_fish_quoted(f'__open_lm_at {_fish_quoted(program.key)}')}"
    for word, text in program.words.items():
        yield f"{start} -a {_fish_quoted(word)}{_fish_help(text)}"
    if program.is_path:
        yield f"{start} -F"
    for flag in program.flags:
        names = " ".join(_fish_name(name) for name in flag.names)
        yield f"{start} {names}{_fish_value(flag)}{_fish_help(flag.help)}"
        if flag.many:
            condition = " ".join(["__open_lm_more", _fish_quoted(program.key), *flag.names])
            yield f"complete -c open-lm -n {_fish_quoted(condition)}{_fish_value(flag)}".replace(" -r", "", 1)


def _fish_name(name: str) -> str:
    option = "-l" if name.startswith("--") else "-s" if len(name) == 2 else "-o"
    return f"{option} {_fish_quoted(name.lstrip('-'))}"


def _fish_value(flag: Flag) -> str:
    if flag.value is None:
        return ""
    words = f" -a {_fish_quoted(' '.join(flag.value.words))}" if flag.value.words else ""
    return f" -r{' -F' if flag.value.is_path else ' -f'}{words}"


def _fish_help(text: str) -> str:
    return f" -d {_fish_quoted(text)}" if text else ""


def _fish_quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def main(argv: list[str]) -> None:
    """Print the completion for a shell."""
    parser = FlagParser.of_program("open-lm completion", __doc__, allow_abbrev=False)
    parser.add_argument("shell", choices=tuple(SCRIPTS), help="shell in which open-lm is to be completed")
    args = parser.parse_args(argv)
    from open_lm.cli.programs import all_programs

    print(SCRIPTS[args.shell](all_programs()), end="")


if __name__ == "__main__":
    sys.exit(run_cli(main))
