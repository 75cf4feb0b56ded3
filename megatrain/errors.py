"""What a user can cause, and the exit code each of it ends with.

Raise these where the knowledge is, with the value, the place and the way out, in one short paragraph: the command
line prints the text alone, without a traceback. Anything else that escapes is a bug, shown in full, exit code 1.
"""

from __future__ import annotations

EXIT_OK = 0
EXIT_BUG = 1
EXIT_USAGE = 2
EXIT_DATA = 3
EXIT_CHECKPOINT = 4
EXIT_RANK = 5
EXIT_PREEMPTED = 75


class MegatrainError(Exception):
    """An error a user can cause; its text is all that they are shown."""

    exit_code: int = EXIT_BUG


class ConfigError(MegatrainError):
    """The command line or the config is wrong, or asks for what this machine cannot do."""

    exit_code = EXIT_USAGE


class DataError(MegatrainError):
    """A dataset or an input is missing, broken, or not what it was."""

    exit_code = EXIT_DATA


class CheckpointError(MegatrainError):
    """A checkpoint cannot be written or read, or the run folder is in use."""

    exit_code = EXIT_CHECKPOINT


class Unreachable(CheckpointError):
    """An object store does not answer: nothing is known of the checkpoints there, good or damaged."""


class Superseded(CheckpointError):
    """A later start of the same run has taken over: this one can save nothing any more, and has to end."""


class NotFinite(CheckpointError):
    """State has NaN or infinity in it, and is not worth a checkpoint."""


class RankError(MegatrainError):
    """A rank failed or hung."""

    exit_code = EXIT_RANK


class Diverged(MegatrainError):
    """The state is ruined, or too many updates had to be left out: the same start again would end the same way."""

    exit_code = EXIT_USAGE


class Preempted(MegatrainError):
    """Training stopped early on request with its state saved: start it again to go on."""

    exit_code = EXIT_PREEMPTED
