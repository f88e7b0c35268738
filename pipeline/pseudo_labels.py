"""Labels for unlabeled images, from the logits of a classifier."""


class PseudoLabeler:
    """One way."""


class TopFraction(PseudoLabeler):
    def __init__(self, fraction: float = 0.1) -> None:
        """x

        Args:
            fraction: of each class.
        """
        self.fraction = fraction
