"""`python -m fanin_compile` is the `fanin` command."""

from fanin_compile.cli import main

main()
