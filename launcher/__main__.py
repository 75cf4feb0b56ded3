"""`python -m launcher` is `megatrain-launch`."""

from launcher.cli import main

if __name__ == "__main__":
    main()
