"""Faults of the user's making: shown as one screen of text, never as a traceback.

Each message gives the rule, the values that break it and the way out. Faults of ours stay ordinary
exceptions (or `assert`) and keep their traceback.
"""


class UserError(ValueError):
    """A fault that the user can mend; the process ends with `exit_code`."""

    exit_code = 1


class ConfigError(UserError):
    """The command line or a configuration file asks for something that is not valid."""

    exit_code = 2


class DataError(UserError):
    """A data file breaks the schema: names file, row, feature, table and value."""


class PlanError(UserError):
    """No sharding plan exists, or a given plan is not one for this model and cluster."""


class NoPlanError(PlanError):
    """Memory is short for every plan, or constraints leave a table no way to be sharded: another request may have a plan."""


class DivergedError(UserError):
    """The loss is no number any more: what was trained is lost."""


class CheckpointError(UserError):
    """No checkpoint can be written, or none that is there can be gone on from; the same on every rank."""


class PeerError(DataError):
    """Another rank could not go on; what it says itself is what matters."""
