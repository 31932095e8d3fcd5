"""Completion for bash, zsh and fish: the shell asks the command itself, which knows its options, fields and names.

    eval "$(sae-train --completion bash)"        in ~/.bashrc; zsh likewise in ~/.zshrc
    sae-train --completion fish | source         in ~/.config/fish/config.fish

A field is completed part by part. Where nothing is offered, the shell completes file names.
"""

import argparse
from collections.abc import Iterable, Iterator
from typing import Any

from sae.base.fields import Field

from .running import COMPLETE

SCRIPTS = {
    "bash": """_{name}_complete() {{
    local line="${{COMP_LINE:0:COMP_POINT}}" current="${{COMP_WORDS[COMP_CWORD]}}" words found
    read -ra words <<< "$line"
    [[ "$line" == *" " ]] && words+=("")
    local typed="${{words[${{#words[@]}}-1]}}"
    mapfile -t found < <({prog} {complete} "${{words[@]:1}}" 2> /dev/null)
    [[ "${{found[*]}}" == *[.=] ]] && compopt -o nospace
    [[ "$current" != "$typed" ]] && found=("${{found[@]#*=}}")
    COMPREPLY=("${{found[@]}}")
}}
complete -o default -F _{name}_complete {prog}""",
    "zsh": """(( $+functions[compdef] )) || {{ autoload -Uz compinit && compinit }}
_{name}_complete() {{
    local -a found open
    found=("${{(@f)$({prog} {complete} "${{(@Q)words[2,CURRENT]}}" 2> /dev/null)}}")
    found=(${{found:#}})
    (( $#found )) || {{ _files; return }}
    open=(${{(M)found:#*[.=]}})
    compadd -S '' -- $open
    compadd -- ${{found:|open}}
}}
compdef _{name}_complete {prog}""",
    "fish": """function _{name}_complete
    set -l words (commandline -opc) (commandline -ct)
    set -l found ({prog} {complete} $words[2..-1] 2> /dev/null)
    if test -n "$found"
        printf '%s\\n' $found
    else
        __fish_complete_path (commandline -ct)
    end
end
complete -c {prog} -f -a '(_{name}_complete)'""",
}


def script(prog: str, shell: str) -> str:
    """Returns what a shell runs at its start to complete a command."""
    return SCRIPTS[shell].format(prog=prog, name=prog.replace("-", "_"), complete=COMPLETE)


def candidates(parser: Any, words: list[str]) -> list[str]:
    """Returns what the last word may become, by the words before it; [] where that is a file, or anything."""
    *before, last = words or [""]
    if before and before[0] in _commands(parser):
        return candidates(_commands(parser)[before[0]], [*before[1:], last])
    option, equals, typed = last.partition("=")
    if option.startswith("--") and equals:
        return [f"{option}={value}" for value in _values(parser, option) if value.startswith(typed)]
    behind = before[-1] if before and before[-1].startswith("--") and "=" not in before[-1] else ""
    if behind and _takes_value(parser, behind):
        return [value for value in _values(parser, behind) if value.startswith(last)]
    if last.startswith("-"):
        return _begin(parser.options, last) + _parts(_paths(parser.table), last)
    named = [] if before else [*_commands(parser)]
    return _begin([*named, *(_released() if "ID" in _positional(parser) else ())], last)


def _paths(table: Iterable[Field]) -> Iterator[str]:
    """Yields the fields that can be typed; a plug-in of a mapping is chosen by its type."""
    for one in table:
        yield f"--{one.path}"
        if one.kind.startswith("dict["):
            yield from (f"--{one.path}.{name}.type" for name in one.choices)


def _parts(paths: Iterable[str], typed: str) -> list[str]:
    """Returns what the next part of a dotted path may be; one that leads on ends with a dot."""
    done = typed.rpartition(".")[0] + "." if "." in typed else ""
    inside = [path.removeprefix(done).partition(".") for path in paths if path.startswith(typed)]
    return list(dict.fromkeys(f"{done}{part}{dot}" for part, dot, _ in inside if dot or not _leads(inside, part)))


def _leads(inside: list[tuple[str, str, str]], part: str) -> bool:
    return any(name == part and dot for name, dot, _ in inside)


def _values(parser: Any, option: str) -> list[str]:
    """Returns the values that an option or field may have, as far as there are names for them."""
    from .recipes import configs
    from .typed import field_of

    action = parser._option_string_actions.get(option)
    if action is None:
        field = field_of(option[2:].replace("-", "_"), parser.table)
        return list(field.choices) if field and not field.kind.startswith("dict[") else []
    if option == "--config":
        kinds = ("explain",) if parser.prog == "sae-explain" else ("families", "models")
        return [name for kind in kinds for name in configs(kind)]
    if option == "--on":
        return list(configs("models"))
    if option == "--help-fields":
        found = [
            *(one.path for one in parser.table if one.kind == "group"),
            *(one.of for one in parser.table if one.of),
        ]
        return list(dict.fromkeys(found))
    if parser.prog == "sae-load list":
        from sae.loading.releases import list_released

        rows = list_released()
        names = {"--model": [row.model for row in rows], "--release": [row.name for row in rows]}
        return list(dict.fromkeys(names.get(option, [])))
    return list(map(str, action.choices or ()))


def _takes_value(parser: Any, option: str) -> bool:
    action = parser._option_string_actions.get(option)
    return action is None or action.nargs != 0


def _commands(parser: Any) -> dict[str, Any]:
    known = [one.choices for one in parser._actions if isinstance(one, argparse._SubParsersAction)]
    return {**parser.commands, **(known[0] if known else {})}


def _positional(parser: Any) -> list[str]:
    return [str(one.metavar) for one in parser._get_positional_actions()]


def _released() -> list[str]:
    from sae.loading.releases import names

    return names()


def _begin(words: Iterable[str], typed: str) -> list[str]:
    return [word for word in words if word.startswith(typed)]
