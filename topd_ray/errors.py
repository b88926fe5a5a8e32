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


class WorkerLostError(TopdError, RuntimeError):
    """A worker is gone without which the run cannot go on from where it is."""


class PayloadLostError(TopdError, RuntimeError):
    """Trajectories cannot be fetched: the worker or the node that held them is gone."""


class NonFiniteLossError(TopdError, RuntimeError):
    """The loss or the gradient norm is NaN or infinite."""


class CheckpointError(TopdError, RuntimeError):
    """A checkpoint cannot be written, or cannot be read as a whole."""


class RunInterrupted(TopdError, RuntimeError):
    """A signal asked the run to stop."""
