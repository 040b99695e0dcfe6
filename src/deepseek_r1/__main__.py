"""`python -m deepseek_r1`: the same as the command `deepseek-r1`."""

from __future__ import annotations

from .cli import main

if __name__ == "__main__":
    main()
