"""`protopnet COMMAND …`: the jobs and the service by the names of their modules in `protopnet/commands/`."""

import importlib
import sys

from protopnet import __version__
from protopnet.cli import nearest
from protopnet.errors import UserError, exit_with_a_sentence

COMMANDS = {
    "prepare": "turn any source of images into shards",
    "train": "train a ProtoPNet, from images to a bundle",
    "reproduce": "a table of runs: networks, black boxes, seeds, ensembles",
    "tune": "search for better settings, on validation images",
    "import_checkpoint": "a network of the ProtoPNet authors' code → a bundle",
    "evaluate": "how good a bundle is on labelled images",
    "explain": "why the model decides as it does, for a few images",
    "audit": "what each prototype means, and which are doubtful",
    "prune": "drop, merge or move prototypes without training again",
    "workbench": "correct a bundle by looking at its prototypes, on a page",
    "export": "a bundle as one graph for other programs (ONNX)",
    "score": "score any number of images to Parquet",
    "serve": "serve bundles over HTTP from this machine",
    "doctor": "what this machine has, and what is wrong with it",
    "completion": "a script by which bash and zsh complete commands and settings",
}


@exit_with_a_sentence
def main() -> None:
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print("usage: protopnet COMMAND …        protopnet COMMAND --help explains its settings\n")
        print("\n".join(f"  {command:<19}{purpose}" for command, purpose in COMMANDS.items()))
        return
    if name in ("-V", "--version"):
        print(f"protopnet {__version__}")
        return
    if name not in COMMANDS:
        raise UserError(f"there is no command {name}; did you mean protopnet {nearest(name, COMMANDS)}?")
    sys.argv = [f"protopnet {name}", *arguments]
    importlib.import_module(f"protopnet.commands.{name}").main()  # only then: the others' imports take seconds


if __name__ == "__main__":
    main()
