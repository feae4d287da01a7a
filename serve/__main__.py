"""`python -m serve`; see `protopnet.serving.__main__`."""

from protopnet.serving.__main__ import main

main()
