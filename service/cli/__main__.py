"""`python -m service.cli`: the same as `reward-router`; child processes are started this way."""

from service.cli import main

main()
