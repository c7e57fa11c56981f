"""`python -m virft_fast COMMAND`; see `commands`."""

from virft_fast.commands import script

if __name__ == "__main__":
    script()
