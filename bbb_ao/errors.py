"""The errors that a user can act on, each with the exit code of the command line."""


class BitByBitError(Exception):
    """Base of all expected errors. The message names the thing, what was expected, what was found and the fix.

    Attributes:
        exit_code: what `bbb-ao` exits with (2 usage or recipe, 3 model or checkpoint, 4 data, 5 resources, 6 numerics,
            7 resume).
    """

    exit_code = 1


class RecipeError(BitByBitError, ValueError):
    """A recipe or a command's arguments are invalid."""

    exit_code = 2


class ModelError(BitByBitError, ValueError):
    """A model or a checkpoint cannot be used."""

    exit_code = 3


class DataError(BitByBitError, ValueError):
    """Calibration or evaluation data cannot be used."""

    exit_code = 4


class ResourceError(BitByBitError, RuntimeError):
    """Memory, disk or another resource of the machine does not suffice."""

    exit_code = 5


class NumericsError(BitByBitError, ArithmeticError):
    """NaN, infinity or divergence. The message names the layer."""

    exit_code = 6


class ResumeError(BitByBitError, RuntimeError):
    """A run's saved state does not fit the command that is to continue it."""

    exit_code = 7
