"""Prints a shell script that completes commands, options and their values.

    bash:  nanovllm completion bash > ~/.local/share/bash-completion/completions/nanovllm
    zsh:   nanovllm completion zsh > ~/.zfunc/_nanovllm     # a folder in $fpath
    fish:  nanovllm completion fish > ~/.config/fish/completions/nanovllm.fish

For one session: source <(nanovllm completion bash). The script covers the options of this version.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from nanovllm import hub
from nanovllm.flags import Parser

USAGE = "bash|zsh|fish"
HELP_CHARS = 70  # per option, in fish


@dataclass(frozen=True)
class Completed:
    """The completions after a command.

    options: with the start of their help. valued: options with a value that may be a file. choices:
    options with a fixed set of values. words: completions that are not options.
    """

    options: dict[str, str] = field(default_factory=dict)
    valued: list[str] = field(default_factory=list)
    choices: dict[str, list[str]] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)


def add_arguments(parser: Parser) -> None:
    parser.add_argument("shell", choices=tuple(WRITERS))


def main(args: argparse.Namespace) -> None:
    print(WRITERS[args.shell](commands()), end="")


def commands() -> dict[str, Completed]:
    """The completions after each command and each group of commands; "" for the beginning."""
    from nanovllm.cli.main import COMMANDS, load

    found: dict[str, Completed] = {"": Completed({"--help": "", "--version": ""})}
    for name in COMMANDS:
        group, _, last = name.rpartition(" ")
        if group and group not in found:
            found[""].words.append(group)
            found[group] = Completed({"--help": ""})
        found[group].words.append(last)
        found[name] = _completed(load(name, f"nanovllm {name}")[1])
    return found


def _completed(parser: Parser) -> Completed:
    made = Completed()
    for action in parser._actions:
        if not action.option_strings:
            made.words.extend(map(str, action.choices or ()))
            if "MODEL" in str(action.metavar):
                made.words.extend(hub.EMBEDDED)
            continue
        names = [name for name in action.option_strings if name.startswith("--")]
        text = " ".join((action.help or "").replace("%%", "%").split())
        text = text if len(text) <= HELP_CHARS else text[: HELP_CHARS - 1].rsplit(" ", 1)[0] + "…"
        made.options.update(dict.fromkeys(names, text))
        if action.choices:
            values = [str(one) for one in action.choices]
            made.choices.update((name, values) for name in names)
        elif action.nargs != 0:
            made.valued.extend(names)
    return made


def _cases(found: dict[str, Completed], line: Callable[[str, Completed], str]) -> str:
    return "\n".join(f'        "{name}") {line(name, one)} ;;' for name, one in found.items())


def _choices(found: dict[str, Completed]) -> str:
    """A case for each option with choices."""
    lines = [
        f'        "{name} {option}") words="{" ".join(values)}"; only=1 ;;'
        for name, one in found.items()
        for option, values in one.choices.items()
    ]
    return "\n".join(lines)


def _groups(found: dict[str, Completed]) -> str:
    return "|".join(sorted({name.split()[0] for name in found if " " in name}))


def _posix(found: dict[str, Completed], before: str, after: str) -> str:
    """The function for bash and zsh, which sets `options`, `words`, `valued` and `only`.

    before: sets `first`, `second` (the words after nanovllm and before the current one) and
    `previous`. after: offers the completions.
    """
    options = _cases(
        found,
        lambda name, one: (
            f'options="{" ".join(one.options)}"; words="{" ".join(one.words)}"; '
            f'valued="{" ".join(one.valued)}"'
        ),
    )
    return f"""_nanovllm() {{
    local first second previous name options words valued only=
{before}
    name="$first"
    case "$first" in {_groups(found)}) name="$first${{second:+ $second}}" ;; esac
    case "$name" in
{options}
    esac
    case "$name $previous" in
{_choices(found)}
    esac
{after}
}}
"""


def bash(found: dict[str, Completed]) -> str:
    before = """    local current="${COMP_WORDS[COMP_CWORD]}"
    previous="${COMP_WORDS[COMP_CWORD-1]}"
    first=; second=
    if (( COMP_CWORD > 1 )); then first="${COMP_WORDS[1]}"; fi
    if (( COMP_CWORD > 2 )); then second="${COMP_WORDS[2]}"; fi"""
    after = """    COMPREPLY=()
    if [[ -n "$only" ]]; then COMPREPLY=($(compgen -W "$words" -- "$current")); return; fi
    if [[ " $valued " == *" $previous "* ]]; then return; fi
    if [[ "$current" == -* ]]; then words="$options"; fi
    COMPREPLY=($(compgen -W "$words" -- "$current"))"""
    return f"{_posix(found, before, after)}complete -o default -F _nanovllm nanovllm\n"


def zsh(found: dict[str, Completed]) -> str:
    before = """    local -a typed=("${(@)words[1,CURRENT-1]}")
    local current="${words[CURRENT]}"
    previous="${typed[-1]}" first="${typed[2]}" second="${typed[3]}\""""
    after = """    if [[ -n "$only" ]]; then compadd -- ${=found}; return; fi
    if [[ " $valued " == *" $previous "* ]]; then _files; return; fi
    if [[ "$current" == -* ]]; then compadd -- ${=options}; return; fi
    compadd -- ${=found}
    _files"""
    # `words` is zsh's variable for the command line
    made = (
        _posix(found, before, after)
        .replace('words="', 'found="')
        .replace("options words valued", "options found valued")
    )
    # zsh uses a file in $fpath as the body of the function of that name
    call = """if [[ "$funcstack[1]" == _nanovllm ]]; then
    _nanovllm
else
    compdef _nanovllm nanovllm
fi
"""
    return f"#compdef nanovllm\n{made}{call}"


def fish(found: dict[str, Completed]) -> str:
    head = """function __nanovllm_at
    set -l typed (commandline -opc)
    set -e typed[1]
    set -l words (string split ' ' -- $argv[1])
    test "$argv[1]" = ''; and test (count $typed) -eq 0; and return 0
    test "$argv[1]" != ''; and test (count $typed) -ge (count $words)
    and test "$typed[1..$(count $words)]" = "$argv[1]"
end
"""
    return head + "".join(f"{line}\n" for name, one in found.items() for line in _fish(name, one))


def _fish(name: str, one: Completed) -> Iterator[str]:
    at = f"complete -c nanovllm -n '__nanovllm_at \"{name}\"'"
    if one.words:
        no_files = " -f" if name in ("", "bench") else ""
        yield f"{at}{no_files} -a '{' '.join(one.words)}'"
    for option, text in one.options.items():
        line = f"{at} -l {option[2:]}"
        if option in one.choices:
            line += f" -x -a '{' '.join(one.choices[option])}'"
        elif option in one.valued:
            line += " -r"
        escaped = text.replace("\\", "\\\\").replace("'", "\\'")
        yield f"{line} -d '{escaped}'" if text else line


WRITERS: dict[str, Callable[[dict[str, Completed]], str]] = {
    "bash": bash, "zsh": zsh, "fish": fish
}  # fmt: skip
