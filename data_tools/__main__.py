"""`python -m data_tools` is `megatrain-data`."""

from data_tools.cli import main

if __name__ == "__main__":
    main()
