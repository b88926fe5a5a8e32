"""Every exception the project raises on purpose.

Each constructor takes just a message, so that Ray can re-raise an actor's exception as its own class in the driver.
A message says what was found, where, and what would be right.
"""


class TopdError(Exception):
    """Base of every error raised on purpose."""


class ConfigError(TopdError, ValueError):
    """The configuration, or what it names (a model folder, a run folder, the machine), cannot work."""


class DataError(TopdError, ValueError):
    """A prompt file, a prompt or a record batch is malformed."""


class RolloutError(TopdError, RuntimeError):
    """A rollout engine could not generate."""


class TeacherError(TopdError, RuntimeError):
    """A teacher engine could not score or continue."""


class LearnerError(TopdError, RuntimeError):
    """A learner rank could not apply an update."""


class WeightSyncError(TopdError, RuntimeError):
    """A rollout engine does not serve the weights it should."""


class StalePolicyError(TopdError, RuntimeError):
    """A trajectory was written by a policy version that the mode of the run does not allow."""


class NonFiniteLossError(TopdError, RuntimeError):
    """The loss or the gradient norm is NaN or infinite."""


class CheckpointError(TopdError, RuntimeError):
    """A checkpoint cannot be written, or cannot be read as a whole."""


class RunInterrupted(TopdError, RuntimeError):
    """A signal asked the run to stop."""
