"""The one exception of the package."""


class CPQError(ValueError):
    """Raised for everything a caller can get wrong: configs, models, checkpoints.

    It is a `ValueError`, so code that knows nothing of this package handles it too. The message names the place (a
    module's dotted name, a file), the value, the rule it breaks and a remedy.
    """
