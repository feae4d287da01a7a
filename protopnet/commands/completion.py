"""What a shell needs to complete commands and settings; for bash, and for zsh after `bashcompinit`.

protopnet completion > ~/.local/share/bash-completion/completions/protopnet
"""

import contextlib
import importlib
import io
import pkgutil
import re
import sys
from collections.abc import Mapping, Sequence

from protopnet import commands
from protopnet.cli import parse
from protopnet.config import Section
from protopnet.errors import exit_with_a_sentence


class CompletionSettings(Section):
    """`protopnet completion` has no settings."""


@exit_with_a_sentence
def main() -> None:
    parse(CompletionSettings, description=__doc__)
    names = sorted(module.name for module in pkgutil.iter_modules(commands.__path__))
    print(script({name: options(name) for name in names if name != "completion"} | {"completion": ["--help"]}))


def options(command: str) -> list[str]:
    """Of a command, as its help lists them."""
    said, given = io.StringIO(), sys.argv
    sys.argv = [command, "--help"]
    try:
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            importlib.import_module(f"protopnet.commands.{command}").main()
    finally:
        sys.argv = given
    return ["--help", *dict.fromkeys(re.findall(r"^  (--[\w.]+)", said.getvalue(), re.MULTILINE))]


def script(options_of: Mapping[str, Sequence[str]]) -> str:
    """For bash: commands as the first word, then the command's options; files where neither is meant."""
    cases = "\n".join(f'    {name}) words="{" ".join(words)}" ;;' for name, words in options_of.items())
    return f"""_protopnet() {{
  local words=""
  case "${{COMP_WORDS[1]}}" in
{cases}
  esac
  if [ "$COMP_CWORD" -eq 1 ]; then words="{" ".join(options_of)} --help --version"; fi
  COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o default -F _protopnet protopnet"""
